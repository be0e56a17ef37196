"""Rows of a KV cache: where new tokens go, and which keys each row attends to."""

from __future__ import annotations

from typing import NamedTuple

import torch

import kvspan
from flash_compat import checks
from kvspan import InvalidArgument


class NewTokens(NamedTuple):
    """What is appended: keys and values ``[batch, new, kv_heads, dim]``, and how to turn them."""

    k: torch.Tensor
    v: torch.Tensor
    cos: torch.Tensor | None = None  # [positions, rotary_dim / 2]
    sin: torch.Tensor | None = None
    interleaved: bool = True


class Rows(NamedTuple):
    """Keys and values of a batch in a cache, contiguous by slot or through a block table.

    ``lengths`` counts each row's keys from position 0 of the cache.
    """

    k: torch.Tensor  # [slots, positions, kv_heads, dim], or [blocks, block_size, kv_heads, dim]
    v: torch.Tensor
    lengths: torch.Tensor  # int32 [batch]
    slots: torch.Tensor | None = None  # int [batch]; None: 0, 1, 2, ...
    block_table: torch.Tensor | None = None  # int [batch, blocks]
    leftpad: torch.Tensor | None = None  # int32 [batch]: the first position that counts

    @property
    def capacity(self) -> int:
        """How many positions a row has room for."""
        if self.block_table is None:
            return self.k.shape[1]
        return self.block_table.shape[1] * self.k.shape[1]

    def grown(self, n_new: int) -> Rows:
        """Return the same rows, each longer by so many tokens."""
        return self._replace(lengths=self.lengths + n_new)

    def check(self) -> None:
        """Raise InvalidArgument unless lengths, slots and blocks are all there."""
        checks.check_between(self.lengths.tolist(), "cache_seqlens", 0, self.capacity)
        last = self.k.shape[0] - 1
        if self.slots is not None:
            checks.check_between(self.slots.tolist(), "cache_batch_idx", 0, last)
        if self.block_table is not None and self.block_table.numel() > 0:
            ends = [int(n) for n in torch.aminmax(self.block_table)]
            checks.check_between(ends, "block_table", 0, last)

    def check_appendable(self, new: NewTokens) -> None:
        """Raise InvalidArgument unless every row has room for the new tokens behind its length.

        A row of a kvspan cache has those positions that its sequence was extended to: writing
        behind them would trap, or hit what is mapped for somebody else.
        """
        n_new = new.k.shape[1]
        begins = self.lengths.tolist()
        slots = range(len(begins)) if self.slots is None else self.slots.tolist()
        most = None if self.block_table is not None else kvspan.writable_positions(self.k, slots)
        if most is None:
            most, what = [self.capacity] * len(begins), "positions of the cache"
        else:
            what = "tokens of the sequence: extend it, or step() its batch, before the call"
        for row, (begin, has) in enumerate(zip(begins, most, strict=True)):
            if begin + n_new > has:
                raise InvalidArgument(
                    f"row {row} has no room for {n_new} new tokens from position {begin} on: it "
                    f"has {has} {what}"
                )
        if new.cos is not None and new.cos.shape[0] < max(begins, default=0) + n_new:
            raise InvalidArgument(
                f"rotary_cos has {new.cos.shape[0]} positions, and new tokens reach position "
                f"{max(begins) + n_new - 1}"
            )

    def append(self, k_new: torch.Tensor, v_new: torch.Tensor) -> None:
        """Write new tokens ``[batch, tokens, kv_heads, dim]`` behind each row's length."""
        batch, n_new = k_new.shape[:2]
        device = self.lengths.device
        if n_new > 1 and self.block_table is None and device.type == "cpu":
            # A prompt is one run of memory a row, which is copied faster than it is scattered.
            slots = range(batch) if self.slots is None else self.slots.tolist()
            for row, (slot, begin) in enumerate(zip(slots, self.lengths.tolist(), strict=True)):
                self.k[slot, begin : begin + n_new] = k_new[row]
                self.v[slot, begin : begin + n_new] = v_new[row]
            return
        positions = self.lengths.long()[:, None] + torch.arange(n_new, device=device)
        if self.block_table is None:
            rows = torch.arange(batch, device=device) if self.slots is None else self.slots
            place = (rows.long()[:, None].expand_as(positions), positions)
        else:
            block_size = self.k.shape[1]
            blocks = self.block_table.long().gather(1, positions // block_size)
            place = (blocks, positions % block_size)
        self.k.index_put_(place, k_new)
        self.v.index_put_(place, v_new)

    def keys_of(self, row: int, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values ``[1, end - begin, kv_heads, dim]`` of one row."""
        if self.block_table is None:
            slot = row if self.slots is None else int(self.slots[row])
            return self.k[slot : slot + 1, begin:end], self.v[slot : slot + 1, begin:end]
        block_size = self.k.shape[1]
        blocks = self.block_table[row, : -(-end // block_size)].long()
        k, v = (t[blocks].flatten(0, 1)[None, begin:end] for t in (self.k, self.v))
        return k, v
