"""What the attention benchmarks share: shapes, memory in huge pages, one decode step's attention.

A store is, for each layer, a pair of tensors (K, V) `[rows, kv_heads, tokens, dim]`, whatever the
strides. The kernel is always `scaled_dot_product_attention`, unmodified, with the query heads that
share a KV head folded into the query length, which is its quickest form on a CPU.
"""

from __future__ import annotations

import argparse
import math
import mmap
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

import kvspan
from harness import BenchError, Series, interleave
from machine import machine

HUGE = 2 << 20
SEED = 1

Store = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Shape:
    """A model's attention."""

    name: str
    n_layers: int
    q_heads: int
    kv_heads: int
    dim: int

    def token_bytes(self, dtype: torch.dtype) -> int:
        return self.n_layers * 2 * self.kv_heads * self.dim * dtype.itemsize

    def rows(self, dtype: torch.dtype, tokens: int, n_bytes: int) -> int:
        """Count the rows of so many tokens that it takes to read `n_bytes` in a pass."""
        return math.ceil(n_bytes / (tokens * self.token_bytes(dtype)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=2048, help="in a row (default: 2048)")
    parser.add_argument(
        "--working-set",
        type=int,
        metavar="MIB",
        help="what one pass over all layers reads (default: 8 times the last-level cache)",
    )
    parser.add_argument("--threads", type=int, help="of torch (default: torch's own choice)")
    parser.add_argument(
        "--placements",
        type=int,
        default=3,
        help="how often all memory is allocated anew: where it lies matters, too (default: 3)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="16 MiB, one placement: only whether it runs"
    )


def read_arguments(args: argparse.Namespace) -> int:
    """Apply what was said about threads; return the bytes to read in a pass."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.quick:
        args.placements = 1
        return 16 << 20
    return args.working_set << 20 if args.working_set is not None else 8 * last_level_cache()


def last_level_cache() -> int:
    """Return its bytes; 32 MiB where the machine does not say."""
    units = {"K": 1 << 10, "M": 1 << 20}
    sizes = {
        level: int(found[1]) * units[found[2]]
        for level, size in machine()["caches"].items()
        if (found := re.fullmatch(r"(\d+)([KM])", size))
    }
    return sizes[max(sizes)] if sizes else 32 << 20


# ---- memory ----


class HugeMemory:
    """Anonymous memory in huge pages, aligned to them."""

    def __init__(self, size: int) -> None:
        self._map = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._map.madvise(mmap.MADV_HUGEPAGE)
        whole = torch.frombuffer(self._map, dtype=torch.uint8)
        start = -whole.data_ptr() % HUGE
        self.bytes = whole[start : start + size].zero_()

    def like(self, tensor: torch.Tensor, base: int) -> torch.Tensor:
        """Return a view with the strides of `tensor`, placed as that one is after `base`."""
        view = self.bytes.view(tensor.dtype)
        offset = (tensor.data_ptr() - base) // tensor.element_size()
        return view.as_strided(tensor.shape, tensor.stride(), offset)


def huge_share(first: int, size: int) -> float:
    """Say which part of a range of this process is mapped by huge pages, from smaps."""
    huge = 0
    begin = end = 0
    for line in Path("/proc/self/smaps").read_text(encoding="ascii", errors="replace").splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            begin, end = (int(x, 16) for x in found.groups())
        elif line.startswith(("AnonHugePages:", "ShmemPmdMapped:")):
            # A mapping may have neighbours merged into it; ours are huge or they are not.
            if begin < first + size and end > first:
                huge += int(line.split()[1]) << 10
    return min(1.0, huge / size)


def span_store(
    pool: kvspan.Pool, shape: Shape, dtype: torch.dtype, rows: int, tokens: int, per_page: int | str
) -> tuple[Store, kvspan.KVCache]:
    """Return planes of a cache with so many full rows."""
    cache = kvspan.KVCache(
        pool,
        shape.n_layers,
        shape.kv_heads,
        shape.dim,
        dtype,
        max_seqs=rows,
        max_seq_len=tokens,
        layers_per_page=per_page,
    )
    batch = cache.batch(rows)
    batch.step(tokens)
    store: Store = []
    for i in range(shape.n_layers):
        k, v = (plane.transpose(1, 2) for plane in batch.layer(i))
        store.append((k, v))
    return store, cache


def plain_copy(store: Store) -> tuple[Store, HugeMemory]:
    """Return planes in plain memory with the same strides at the same distances."""
    tensors = [t for pair in store for t in pair]
    begins = [t.data_ptr() for t in tensors]
    ends = [
        b
        + t.element_size()
        * (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)))
        for b, t in zip(begins, tensors, strict=True)
    ]
    base = min(begins) - min(begins) % HUGE
    memory = HugeMemory(-(-(max(ends) - base) // HUGE) * HUGE)
    return [(memory.like(k, base), memory.like(v, base)) for k, v in store], memory


def dense_store(
    shape: Shape, dtype: torch.dtype, rows: int, tokens: int, is_head_major: bool
) -> tuple[Store, HugeMemory]:
    """Return planes that are dense: `[B, H, L, D]`, or `[B, L, H, D]`."""
    memory = HugeMemory(-(-rows * tokens * shape.token_bytes(dtype) // HUGE) * HUGE)
    middle = (shape.kv_heads, tokens) if is_head_major else (tokens, shape.kv_heads)
    n = 2 * shape.n_layers * rows * tokens * shape.kv_heads * shape.dim
    planes = memory.bytes.view(dtype)[:n].view(2 * shape.n_layers, rows, *middle, shape.dim)
    if not is_head_major:
        planes = planes.transpose(2, 3)
    return [(planes[2 * i], planes[2 * i + 1]) for i in range(shape.n_layers)], memory


def fill(stores: Sequence[Store]) -> None:
    """Write the same random K and V into all."""
    generator = torch.Generator().manual_seed(SEED)
    for layers in zip(*stores, strict=True):
        for planes in zip(*layers, strict=True):
            values = torch.randn(planes[0].shape, generator=generator)
            for plane in planes:
                plane.copy_(values)


# ---- attention ----


def queries(shape: Shape, dtype: torch.dtype, rows: int) -> list[torch.Tensor]:
    """Return one new token's queries, for each layer."""
    generator = torch.Generator().manual_seed(SEED + 1)
    size = (rows, shape.kv_heads, shape.q_heads // shape.kv_heads, shape.dim)
    return [torch.randn(size, generator=generator).to(dtype) for _ in range(shape.n_layers)]


def attend(q: Sequence[torch.Tensor], store: Store) -> list[torch.Tensor]:
    """Attend in all layers, as a decode step does: all of K and V is read once."""
    return [
        scaled_dot_product_attention(query, k, v) for query, (k, v) in zip(q, store, strict=True)
    ]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    """Whether two passes agree to the last bit but for the order of sums."""
    tolerance = 1e-5 if one[0].dtype == torch.float32 else 1e-2
    return all(
        torch.allclose(a, b, rtol=tolerance, atol=tolerance)
        for a, b in zip(one, other, strict=True)
    )


def identical(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def times(
    q: Sequence[torch.Tensor], stores: Mapping[str, Store], repeats: int
) -> dict[str, Series]:
    """Time a pass over each store, in turn; all are checked to give the same first."""

    def case(store: Store) -> Callable[[], list[torch.Tensor]]:
        return lambda: attend(q, store)

    with torch.inference_mode():
        return interleave({n: case(s) for n, s in stores.items()}, repeats, equal=same)


def joined(series: Sequence[Series]) -> Series:
    """Put the samples of several placements together."""
    return Series(tuple(x for one in series for x in one.samples))


def paired_ratio(one: Series, other: Series) -> Series:
    """Divide sample by sample: what was timed in the same round met the same disturbance."""
    ratios = (a / b for a, b in zip(one.samples, other.samples, strict=True))
    return Series(tuple(ratios), unit="x")


def gigabytes_per_s(n_bytes: int, series: Series) -> float:
    return n_bytes / statistics.median(series.samples) / 1e9


def require_huge(name: str, first: int, size: int) -> float:
    """Return the share in huge pages; too little of it and nothing is comparable."""
    share = huge_share(first, size)
    if share < 0.9:
        raise BenchError(f"{name}: only {share:.0%} of the memory is in huge pages")
    return share
