"""What others' allocators ask of the driver for one request, by formulas read off their code.

Nothing of theirs is run. The versions read:

- vAttention, microsoft/vattention at ef3fff25
- kvcached, ovg-project/kvcached at e8e64063
- torch's expandable segments, pytorch/pytorch at 001074d2, c10/cuda/CUDACachingAllocator.cpp

The request is alone, and as favourable to each as can be: torch is told the final length, since its
tensors cannot grow; nobody's pages are shared with, or fragmented by, other requests.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from emulator import LATENCY_US

MAP, GRANT, UNMAP, CREATE, RELEASE = (
    "cuMemMap",
    "cuMemSetAccess",
    "cuMemUnmap",
    "cuMemCreate",
    "cuMemRelease",
)
MIB = 1 << 20


@dataclass(frozen=True)
class Request:
    """A prompt, the tokens decoded after it, and a model's KV."""

    prompt: int
    output: int
    n_layers: int
    plane_bytes: int  # of a token in one layer, K or V

    @property
    def token_bytes(self) -> int:
        return 2 * self.n_layers * self.plane_bytes

    def waste(self, mapped_bytes: Callable[[int], int]) -> float:
        """Return the share of mapped bytes without a token, over the steps; given are lengths."""
        lengths = range(self.prompt + 1, self.prompt + self.output + 1)
        return 1 - sum(lengths) * self.token_bytes / sum(mapped_bytes(n) for n in lengths)


@dataclass(frozen=True)
class Peer:
    """One allocator's work for a request, in handles by call."""

    name: str
    cold: Counter[str]  # the first request: handles are created for it, before or while it runs
    recycled: Counter[str]  # a later one whose memory was another request's meanwhile
    taken_over: str  # when a later one costs nothing
    waste: float
    aside: str  # memory that is held beside what requests have mapped


def us(handles: Counter[str]) -> float:
    """Return what the calls take by the published latencies."""
    return sum(LATENCY_US[name] * n for name, n in handles.items())


def work(n: int, *names: str) -> Counter[str]:
    """Return `n` handles in each of the calls; a call that is named twice is made twice."""
    return Counter({name: n * times for name, times in Counter(names).items()})


def up(n: int, unit: int) -> int:
    return -(-n // unit)


def vattention(r: Request, megacache: bool) -> Peer:
    """Count blocks of a page of 2 MiB each for K and V, of one layer or (megacache) of all."""
    # vattention.cu 105-128 and utils.h 8-11: a block is two pages, in each layer unless megacache.
    plane_bytes = r.plane_bytes * (r.n_layers if megacache else 1)
    tokens = 2 * MIB // plane_bytes
    per_block = 2 if megacache else 2 * r.n_layers
    # utils.h 206-219, vattention.cu 486-526: up to 9 tokens are mapped ahead.
    ahead = 9

    def mapped(n: int) -> int:
        return up(n + ahead, tokens) * per_block * 2 * MIB

    n = mapped(r.prompt + r.output) // (2 * MIB)
    # cudaInternal.h 45-59: all handles are created at start-up; 70-82: two maps, two set-accesses.
    # mux.h 51-66: unmapped one by one when somebody else needs them, and never released.
    return Peer(
        f"vAttention, {'megacache' if megacache else 'per layer'}",
        cold=work(n, CREATE, MAP, GRANT),
        recycled=work(n, MAP, GRANT, UNMAP),
        # vattention.cu 420-452 and 564-589.
        taken_over="pages stay mapped in the slot until there is a shortage",
        waste=r.waste(mapped),
        aside="all of the memory, from start-up on",
    )


def kvcached(r: Request, compound: bool) -> Peer:
    """Count pages: 2 MiB of K and of V in each layer, or (compound) one handle for all of that."""
    tokens = 2 * MIB // r.plane_bytes
    per_page = 1 if compound else 2 * r.n_layers  # allocator.cpp 138-148 and 161-209

    def mapped(n: int) -> int:
        return up(n, tokens) * 2 * r.n_layers * 2 * MIB

    pages = up(r.prompt + r.output, tokens)
    # ftensor.cpp 100-118, page.cpp 10-25: the zero page is unmapped, a handle created and mapped.
    take = (UNMAP, CREATE, MAP, GRANT)
    # ftensor.cpp 120-140: the zero page comes back, the handle goes.
    give = (UNMAP, MAP, GRANT, RELEASE)
    # page_allocator.cpp 27-35, 176-197 and 254-260: up to 10 pages stay mapped for later.
    held = 10 * 2 * r.n_layers * 2
    return Peer(
        f"kvcached, {'compound' if compound else 'split'}",
        cold=work(pages * per_page, *take),
        recycled=work(pages * per_page, *take, *give),
        taken_over="5 to 10 pages are held in reserve, all that this request needs",
        waste=r.waste(mapped),
        aside=f"up to {held} MiB in reserve; the zero page is mapped everywhere at start-up",
    )


def torch_segments(r: Request, segment_mib: int) -> Peer:
    """Count a tensor of the final length for K and V of each layer, in 2 or 20 MiB segments."""
    # kSmallBuffer and kLargeBuffer. Segments of 2 MiB take tensors of up to 1 MiB (kSmallSize):
    # there the tokens are cut into tensors of that size.
    total = (r.prompt + r.output) * r.token_bytes
    n = up(total, segment_mib * MIB)
    # ExpandableSegment::map and mapAndSetAccess; unmapHandles, at a shortage or empty_cache.
    return Peer(
        f"torch expandable segments, {segment_mib} MiB",
        cold=work(n, CREATE, MAP, GRANT),
        recycled=work(n, CREATE, MAP, GRANT, UNMAP, RELEASE),
        taken_over="freed blocks stay in the allocator's cache",
        waste=r.waste(lambda _: n * segment_mib * MIB),
        aside="the allocator's cache; the final length must be known beforehand",
    )


def peers(r: Request) -> list[Peer]:
    return [
        vattention(r, megacache=False),
        vattention(r, megacache=True),
        kvcached(r, compound=False),
        kvcached(r, compound=True),
        torch_segments(r, 2),
        torch_segments(r, 20),
    ]
