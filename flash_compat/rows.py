"""Rows of a KV cache: where new tokens go, and which keys each row attends to."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

import kvspan
from kvspan import InvalidArgument


@dataclass(frozen=True)
class Rows:
    """Keys and values of a batch in a cache, contiguous by slot or through a block table.

    ``lengths`` counts each row's keys from position 0 of the cache, new ones included.
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
        return replace(self, lengths=self.lengths + n_new)

    def check_writable(self, begin: list[int], n_new: int) -> None:
        """Raise InvalidArgument unless every row has `n_new` positions from its `begin` on.

        A row of a kvspan cache has those that its sequence was extended to: writing behind them
        would trap, or hit what is mapped for somebody else.
        """
        most = [self.capacity] * len(begin)
        what = "positions of the cache"
        extended = kvspan.writable_positions(self.k) if self.block_table is None else None
        if extended is not None:
            slots = range(len(begin)) if self.slots is None else self.slots.tolist()
            most = [extended[slot] for slot in slots]
            what = "tokens of the sequence: extend it, or step() its batch, before the call"
        for row, (at, has) in enumerate(zip(begin, most, strict=True)):
            if at < 0 or at + n_new > has:
                raise InvalidArgument(
                    f"row {row} has no room for {n_new} new tokens from position {at} on: it has "
                    f"{has} {what}"
                )

    def append(self, k_new: torch.Tensor, v_new: torch.Tensor, begin: torch.Tensor) -> None:
        """Write new tokens ``[batch, tokens, kv_heads, dim]`` from each row's `begin` on."""
        batch, n_new = k_new.shape[:2]
        positions = begin.long()[:, None] + torch.arange(n_new, device=begin.device)
        if self.block_table is None:
            rows = torch.arange(batch, device=begin.device) if self.slots is None else self.slots
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
