"""Three places to keep the same keys and values, behind `kvspan.demo.model.KVStore`.

- `SpanKV`: kvspan. A row is contiguous to the kernel and paged underneath; views are zero-copy.
- `BlockTableKV`: vLLM-style blocks of 16 tokens and a free list. The kernel wants a contiguous row,
  so each layer's blocks are gathered into a scratch buffer first, once for the whole batch.
- `PreallocKV`: every slot has room for the longest request.

All show ``[length, kv_heads, head_dim]`` views of exactly a row's length, so the kernel does the
same work. The baselines' memory asks for huge pages and is touched at construction, as kvspan's is,
so that no page fault is timed. Bytes are counted in the baselines' favour: a block counts while a
request holds it and a slot while a request occupies it, although both pools stay allocated
throughout; kvspan counts every page that is mapped.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

import kvspan

from .model import KVStore, LlamaConfig

# The calls that make, map and unmap memory; copies, fills and fences are work, not mapping.
_DRIVER_CALLS = ("reserve", "free", "create", "release", "map", "set_access", "unmap")


@dataclass(frozen=True)
class Memory:
    """Bytes of KV memory at one moment, in DESIGN.md's terms.

    Attributes
    ----------
    used : int
        Live token bytes.
    partial : int
        Mapped behind the last token of a partly filled page or block.
    ahead : int
        Mapped for tokens to come.
    kept : int
        Mapped for requests to come.
    """

    used: int
    partial: int = 0
    ahead: int = 0
    kept: int = 0

    @property
    def mapped(self) -> int:
        """All of it."""
        return self.used + self.partial + self.ahead + self.kept


@dataclass(frozen=True)
class DriverWork:
    """Calls that make, map or unmap memory, and `maps`, the pages that were mapped."""

    calls: int
    maps: int

    def __sub__(self, earlier: DriverWork) -> DriverWork:
        return DriverWork(self.calls - earlier.calls, self.maps - earlier.maps)


class RowStore(KVStore, Protocol):
    """A `KVStore` whose rows come and go."""

    name: str

    def admit(self, n_tokens: int) -> int:
        """Give a new, empty row; `n_tokens` is the length of its prompt."""
        ...

    def release(self, row: int) -> None:
        """Take a row back."""
        ...

    def memory(self) -> Memory:
        """Bytes right now."""
        ...

    def driver_work(self) -> DriverWork | None:
        """Count what the backend was asked to do; None where memory is allocated once."""
        ...

    def close(self) -> None:
        """Give all memory back."""
        ...


class SpanKV:
    """Keys and values in a `kvspan.KVCache`.

    Parameters
    ----------
    config : LlamaConfig
        The model.
    max_rows, max_tokens : int
        Rows in flight; the longest row.
    capacity_bytes : int
        The pool's budget.
    preallocate_bytes : int
        Physical memory created at construction.
    """

    name = "span"

    def __init__(
        self,
        config: LlamaConfig,
        max_rows: int,
        max_tokens: int,
        capacity_bytes: int,
        preallocate_bytes: int,
    ) -> None:
        self.pool = kvspan.Pool(
            device="cpu", capacity=capacity_bytes, preallocate=preallocate_bytes
        )
        self.cache = kvspan.KVCache(
            self.pool,
            n_layers=config.n_layers,
            n_kv_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            dtype=torch.float32,
            max_seqs=max_rows,
            max_seq_len=max_tokens,
            # As where memory is in demand: an ample pool keeps all that was ever mapped.
            keep=self.pool.page_size,
        )
        self._layers = [self.cache.layer(i) for i in range(config.n_layers)]
        self.step_s: list[float] = []  # what each `batch.step` took
        self._sequences: dict[int, kvspan.Sequence] = {}
        self._batch: kvspan.Batch | None = None
        self._batch_rows: tuple[int, ...] = ()
        self._index: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))
        self._ends: list[tuple[int, int]] = []

    def admit(self, n_tokens: int) -> int:
        """Give a new, empty row: a slot, preferably one whose mapped pages fit."""
        return self._add(self.cache.sequence(n_tokens))

    def fork(self, row: int) -> int:
        """Give a row that shares the whole pages of another and owns a copy of the rest."""
        return self._add(self._sequences[row].fork())

    def release(self, row: int) -> None:
        """Take a row back; its pages may stay mapped for the next one."""
        self._batch, self._batch_rows = None, ()
        self._sequences.pop(row).release()

    def begin(self, rows: Sequence[int], n_tokens: int) -> Tensor:
        """Make `n_tokens` more tokens of each row writable: one native call for the batch."""
        if len(rows) == 1 and n_tokens > 1:  # a prompt: it leaves the decoding batch alone
            sequence = self._sequences[rows[0]]
            starts, slots = torch.tensor([sequence.length]), torch.tensor(rows)
            sequence.extend(n_tokens)
        else:
            if self._batch is None or self._batch_rows != tuple(rows):
                self._batch_rows = tuple(rows)
                self._batch = self.cache.batch([self._sequences[row] for row in rows])
            began = time.perf_counter()
            before = self._batch.step(n_tokens)
            self.step_s.append(time.perf_counter() - began)
            starts, slots = before.long(), self._batch.slots.long()
        self._index = (slots[:, None], starts[:, None] + torch.arange(n_tokens))
        self._ends = [
            (row, start + n_tokens) for row, start in zip(rows, starts.tolist(), strict=True)
        ]
        return starts

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store the new tokens' keys and values."""
        keys, values = self._layers[layer]
        keys[self._index] = k
        values[self._index] = v

    def views(self, layer: int) -> Sequence[tuple[Tensor, Tensor]]:
        """Show the cache itself."""
        keys, values = self._layers[layer]
        return [(keys[row, :end], values[row, :end]) for row, end in self._ends]

    def memory(self) -> Memory:
        """Bytes right now, from the cache's own count."""
        stats = self.cache.stats()
        return Memory(stats.used_bytes, stats.partial_bytes, stats.ahead_bytes, stats.kept_bytes)

    def driver_work(self) -> DriverWork:
        """Count what the backend was asked to do so far, for the cache and for its pool."""
        calls = self.pool.stats().calls
        return DriverWork(sum(calls[name].calls for name in _DRIVER_CALLS), calls["map"].handles)

    def close(self) -> None:
        """Give all memory back."""
        self._layers = []
        self._batch = None
        self._sequences.clear()
        self.cache.close()
        self.pool.close()

    def _add(self, sequence: kvspan.Sequence) -> int:
        self._sequences[sequence.slot] = sequence
        return sequence.slot


class BlockTableKV:
    """Keys and values in blocks of 16 tokens, gathered for the kernel.

    Parameters
    ----------
    config : LlamaConfig
        The model.
    max_rows : int
        Rows in flight.
    n_blocks : int
        Blocks in the pool.
    """

    name = "block table"
    block_tokens = 16

    def __init__(self, config: LlamaConfig, max_rows: int, n_blocks: int) -> None:
        heads = (config.n_kv_heads, config.head_dim)
        pool = huge_page_tensor((config.n_layers, 2, n_blocks, self.block_tokens, *heads))
        self._layers = [(keys, values) for keys, values in pool]
        self._scratch = huge_page_tensor((2, n_blocks, self.block_tokens, *heads))
        self._bytes_per_token = config.kv_bytes_per_token
        self._free_blocks = list(range(n_blocks - 1, -1, -1))
        self._free_rows = list(range(max_rows - 1, -1, -1))
        self._tables: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}
        self._slots = self._blocks = torch.empty(0, dtype=torch.long)
        self._spans: list[tuple[int, int]] = []
        self.gathered_bytes = 0

    def admit(self, n_tokens: int) -> int:
        """Give a new, empty row."""
        row = self._free_rows.pop()
        self._tables[row], self._lengths[row] = [], 0
        return row

    def release(self, row: int) -> None:
        """Take a row back and put its blocks on the free list."""
        self._free_blocks += self._tables.pop(row)
        del self._lengths[row]
        self._free_rows.append(row)

    def begin(self, rows: Sequence[int], n_tokens: int) -> Tensor:
        """Make `n_tokens` more tokens of each row writable, taking blocks from the free list."""
        size = self.block_tokens
        starts = [self._lengths[row] for row in rows]
        slots: list[int] = []
        blocks: list[int] = []
        self._spans = []
        for row, start in zip(rows, starts, strict=True):
            table, end = self._tables[row], start + n_tokens
            while len(table) * size < end:
                table.append(self._free_blocks.pop())
            self._lengths[row] = end
            slots += [table[p // size] * size + p % size for p in range(start, end)]
            self._spans.append((len(blocks) * size, len(blocks) * size + end))
            blocks += table
        self._slots, self._blocks = torch.tensor(slots), torch.tensor(blocks)
        return torch.tensor(starts)

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store the new tokens' keys and values where the block tables say."""
        keys, values = self._layers[layer]
        keys.flatten(0, 1)[self._slots] = k.flatten(0, 1)
        values.flatten(0, 1)[self._slots] = v.flatten(0, 1)

    def views(self, layer: int) -> Sequence[tuple[Tensor, Tensor]]:
        """Gather this layer's blocks of the whole batch, then views of the result."""
        n_blocks = len(self._blocks)
        rows = []
        for blocks, scratch in zip(self._layers[layer], self._scratch, strict=True):
            torch.index_select(blocks, 0, self._blocks, out=scratch[:n_blocks])
            rows.append(scratch.flatten(0, 1))
        self.gathered_bytes += 2 * n_blocks * blocks[0].nbytes
        return [(rows[0][begin:end], rows[1][begin:end]) for begin, end in self._spans]

    def memory(self) -> Memory:
        """Bytes of the blocks that requests hold."""
        used = sum(self._lengths.values())
        held = sum(len(table) for table in self._tables.values()) * self.block_tokens
        return Memory(used * self._bytes_per_token, partial=(held - used) * self._bytes_per_token)

    def driver_work(self) -> None:
        """Memory is allocated once."""
        return None

    def close(self) -> None:
        """Give all memory back."""
        self._layers, self._scratch = [], torch.empty(0)


class PreallocKV:
    """Keys and values in one dense tensor per layer, every slot as long as the longest request.

    Parameters
    ----------
    config : LlamaConfig
        The model.
    max_rows, max_tokens : int
        Slots; tokens of each.
    """

    name = "preallocation"

    def __init__(self, config: LlamaConfig, max_rows: int, max_tokens: int) -> None:
        pool = huge_page_tensor(
            (config.n_layers, 2, max_rows, max_tokens, config.n_kv_heads, config.head_dim)
        )
        self._layers = [(keys, values) for keys, values in pool]
        self._slot_bytes = max_tokens * config.kv_bytes_per_token
        self._bytes_per_token = config.kv_bytes_per_token
        self._free_rows = list(range(max_rows - 1, -1, -1))
        self._lengths: dict[int, int] = {}
        self._index: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))
        self._ends: list[tuple[int, int]] = []

    def admit(self, n_tokens: int) -> int:
        """Give a new, empty row: a slot."""
        row = self._free_rows.pop()
        self._lengths[row] = 0
        return row

    def release(self, row: int) -> None:
        """Take a row back."""
        del self._lengths[row]
        self._free_rows.append(row)

    def begin(self, rows: Sequence[int], n_tokens: int) -> Tensor:
        """Count `n_tokens` more tokens of each row."""
        starts = torch.tensor([self._lengths[row] for row in rows])
        self._ends = [(row, self._lengths[row] + n_tokens) for row in rows]
        self._lengths |= dict(self._ends)
        self._index = (torch.tensor(rows)[:, None], starts[:, None] + torch.arange(n_tokens))
        return starts

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store the new tokens' keys and values."""
        keys, values = self._layers[layer]
        keys[self._index] = k
        values[self._index] = v

    def views(self, layer: int) -> Sequence[tuple[Tensor, Tensor]]:
        """Show the tensor itself."""
        keys, values = self._layers[layer]
        return [(keys[row, :end], values[row, :end]) for row, end in self._ends]

    def memory(self) -> Memory:
        """Bytes of the slots that requests occupy."""
        used = sum(self._lengths.values()) * self._bytes_per_token
        return Memory(used, ahead=len(self._lengths) * self._slot_bytes - used)

    def driver_work(self) -> None:
        """Memory is allocated once."""
        return None

    def close(self) -> None:
        """Give all memory back."""
        self._layers = []


def huge_page_tensor(shape: Sequence[int]) -> Tensor:
    """Make an fp32 tensor of zeros whose memory asked for huge pages and has been touched."""
    memory = mmap.mmap(-1, math.prod(shape) * 4, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without transparent huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32).view(*shape).zero_()
