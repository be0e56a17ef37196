"""How large a cache is that nobody gave sizes: address space is cheap, and memory comes as used."""

from __future__ import annotations

import os
from collections.abc import Sequence as Items

import torch

from kvspan import InvalidArgument, KVCache, LayerSpec, Plane, Pool

LEAST_MAX_LEN = 32_768
"""Positions of a row where the model's configuration names no more."""

CAPACITY_UNIT = 64 << 20
"""What a capacity that nobody gave is rounded to."""

PAGE_TOKENS = 128
"""What a host's page holds of one layer. Without other layers between them, attention reads tokens
up to 1.4 times as fast, and a row wastes no more than so many."""

HUGE_PAGE = 2 << 20
LEAST_PAGE = HUGE_PAGE // 16
"""Below it, growing would be limited by how many mappings a process may have."""

MAX_SLOTS = 256
MAX_RESERVED_BYTES = 1 << 42
"""A thirtieth of what a process can address, for the slots of one cache."""


class Sizes:
    """What a `SpanCache` was told, and the pool that its KVCaches share, made when it is needed.

    Parameters
    ----------
    pool
        None: one is made on the device of the first keys, with `capacity`.
    capacity
        Bytes, or a string such as ``"4GiB"``. None: most of the device's memory.
    max_len
        Positions of a row.
    max_batch
        Rows that a call may grow to by repeating them.
    """

    def __init__(
        self,
        pool: Pool | None = None,
        capacity: int | str | None = None,
        max_len: int = LEAST_MAX_LEN,
        max_batch: int | None = None,
    ) -> None:
        if pool is not None and capacity is not None:
            raise InvalidArgument("give either a pool or the capacity of a new one, not both")
        self._pool = pool
        self._capacity = capacity
        self._max_len = max_len
        self._max_batch = max_batch

    def n_slots(self, n_rows: int, *, spare: bool) -> int:
        """Return how many adjacent slots a call takes that begins with `n_rows`.

        Where nobody said how many, with `spare` four times as many, and at least 16.
        """
        if self._max_batch is None:
            return max(4 * n_rows, 16) if spare else n_rows
        if n_rows > self._max_batch:
            raise InvalidArgument(
                f"the batch has {n_rows} rows, and max_batch is {self._max_batch}"
            )
        return self._max_batch

    def cache(
        self, windows: Items[int | None], keys: torch.Tensor, values: torch.Tensor
    ) -> KVCache:
        """Return a new cache of layers like these ``[rows, heads, tokens, dim]``."""
        planes = tuple(
            Plane(name, t.shape[1], t.shape[3], t.dtype) for name, t in (("k", keys), ("v", values))
        )
        max_len = max(self._max_len, keys.shape[2])
        token_bytes = sum(p.heads * p.dim * p.dtype.itemsize for p in planes)
        affordable = MAX_RESERVED_BYTES // (token_bytes * len(windows) * max_len)
        return KVCache(
            self._pool_on(keys.device, PAGE_TOKENS * token_bytes),
            layers=[LayerSpec(planes=planes, window=window) for window in windows],
            max_seqs=max(self.n_slots(keys.shape[0], spare=True), min(MAX_SLOTS, affordable)),
            max_seq_len=max_len,
        )

    def _pool_on(self, device: torch.device, wanted_page: int) -> Pool:
        if self._pool is None:
            capacity = self._capacity
            if capacity is None:
                capacity = memory_bytes(device) * 9 // 10 // CAPACITY_UNIT * CAPACITY_UNIT
            page = HUGE_PAGE
            if device.type == "cpu":
                page = max(LEAST_PAGE, min(1 << (wanted_page - 1).bit_length(), HUGE_PAGE))
            self._pool = Pool(device=device, capacity=capacity, page_size=page)
        return self._pool


def memory_bytes(device: torch.device) -> int:
    """Return how much memory the device has: a host all in all, a GPU now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
