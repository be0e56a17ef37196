"""Exact figures of pools and caches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


class CallCount(NamedTuple):
    """How often a driver call was made, and how many frames (handles) it concerned in all."""

    calls: int
    handles: int


class PageMapEntry(NamedTuple):
    """One mapped page of a cache: which slot, lane and page of it, and the frame behind it."""

    slot: int
    lane: int
    page: int
    frame_id: int
    n_references: int


class MapperEvent(NamedTuple):
    """Something that the background mapper of a cache did, or that came too late for it.

    ``kind`` is one of ``"mapped"`` (ahead of need), ``"late"`` (a call had to map pages itself: a
    prompt that was not announced, or a step that the mapper did not foresee), ``"unmapped"`` (what
    a free slot kept over the limit), ``"starved"`` (no memory for a page ahead: the mapper pauses,
    up to 64 ms) and ``"failed"`` (the driver did; the call that needs the page will say how).
    ``time_s`` is ``time.monotonic()``'s, ``n_pages`` what the slot got or lost, and
    ``room_tokens`` for how many more tokens it had room before that.
    """

    time_s: float
    kind: str
    slot: int
    n_pages: int
    room_tokens: int


class FrameCounts(NamedTuple):
    """Frames of a `FramePool`: never taken, taken and given back, and those that are referenced."""

    fresh: int
    free: int
    in_use: int

    @property
    def available(self) -> int:
        """What can be taken: fresh and free frames."""
        return self.fresh + self.free


@dataclass(frozen=True)
class PoolStats:
    """What a pool holds, in bytes.

    ``in_use`` frames are referenced by a cache; ``free`` ones were created and are unused;
    ``fresh`` is what the capacity still allows to create. The three add up to the capacity.
    ``huge`` and ``small`` say how the physical memory lies in pages of the machine, and
    ``huge_refusal`` why the latest that is not huge is not; ``hugetlb`` is what of ``huge`` lies in
    pages that the administrator has set aside. All of it comes from ``numa_node``, if the pool was
    given one. ``n_mappings`` counts the frames that are mapped, each as often as it is mapped: a
    CUDA context takes about half a million.
    """

    capacity_bytes: int
    in_use_bytes: int
    free_bytes: int
    fresh_bytes: int
    huge_bytes: int
    small_bytes: int
    huge_refusal: str
    hugetlb_bytes: int
    numa_node: int | None
    n_failures: int
    n_mappings: int
    calls: Mapping[str, CallCount]


@dataclass(frozen=True)
class PrefixStats:
    """What a cache's prefix index did: lookups, tokens that they saved, pages' worth of tokens."""

    n_hits: int
    n_misses: int
    n_hit_tokens: int
    n_published: int
    n_evicted: int


@dataclass(frozen=True)
class CacheStats:
    """What a cache maps, in bytes as its page tables show it.

    ``mapped = used + partial + ahead + kept``: live token bytes; the unused rest of their pages;
    pages mapped ahead (by the background, and for kernels that read past a length); pages kept
    mapped for the next sequence (in free slots, and past the length after a truncate). ``prefix``
    is what the prefix index holds for sequences to come, and ``shared`` what of ``mapped + prefix``
    is counted already: the physical memory is ``mapped + prefix - shared``, and ``zero_bytes`` of
    frames that only read as zeros
    (``unmapped="zero"`` on a GPU; they are in no other figure).
    ``merged`` bytes were computed twice, and freed by `Sequence.commit`.
    ``n_grown_late`` counts the calls that had to map pages themselves, or waited for the background
    to finish doing it.
    """

    reserved_bytes: int
    mapped_bytes: int
    used_bytes: int
    partial_bytes: int
    ahead_bytes: int
    kept_bytes: int
    shared_bytes: int
    prefix_bytes: int
    merged_bytes: int
    zero_bytes: int
    n_sequences: int
    n_slots: int
    n_grown_late: int
    prefixes: PrefixStats
    calls: Mapping[str, CallCount]

    @property
    def waste(self) -> float:
        """The share of mapped bytes that holds no live token; 0 when nothing is mapped."""
        return 1 - self.used_bytes / self.mapped_bytes if self.mapped_bytes else 0.0


def call_counts(figures: Mapping[str, Any]) -> dict[str, CallCount]:
    """Return the ``calls`` of native figures, by name."""
    return {name: CallCount(*count) for name, count in figures["calls"].items()}
