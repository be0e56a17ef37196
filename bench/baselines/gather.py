"""A block table without a kernel that knows it: gather the blocks, then torch's attention."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention


class PagedCache:
    """One layer's K and V in pools of blocks, and which blocks each row has."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, block_table: torch.Tensor) -> None:
        """Take ``[blocks, block_size, kv_heads, dim]`` and ``[batch, blocks_per_row]``, no copy."""
        self.k, self.v, self.block_table = k, v, block_table

    def attend(self, q: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Decode: ``q [batch, heads, dim]``, one query a row.

        All rows must have one length, or else ValueError: ragged ones would need a mask, which
        would measure another of torch's kernels. The query heads of a group are folded into the
        query's length, the fastest that torch has here.
        """
        batch, blocks_per_row = self.block_table.shape
        block_size, n_kv_heads = self.k.shape[1:3]
        length = int(lengths[0])
        if len(lengths) != batch or not bool((lengths == length).all()):
            raise ValueError(f"{batch} rows of one length are needed, not {lengths.tolist()}")
        if not 1 <= length <= blocks_per_row * block_size:
            raise ValueError(f"rows have 1 to {blocks_per_row * block_size} tokens, not {length}")
        blocks = self.block_table[:, : -(-length // block_size)].flatten()
        keys, values = (
            pool.index_select(0, blocks).view(batch, -1, *pool.shape[2:])[:, :length]
            for pool in (self.k, self.v)
        )
        folded = q.view(batch, n_kv_heads, -1, q.shape[-1])
        return scaled_dot_product_attention(
            folded, keys.transpose(1, 2), values.transpose(1, 2)
        ).flatten(1, 2)
