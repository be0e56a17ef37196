"""A block table without a kernel that knows it: gather the blocks, then torch's attention."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_table: torch.Tensor
) -> torch.Tensor:
    """Decode: ``q [batch, heads, dim]`` over all tokens of each row's blocks.

    ``k`` and ``v`` are ``[blocks, block_size, kv_heads, dim]``. The query heads of a group are
    folded into the query's length, the fastest that torch has here.
    """
    batch, _, dim = q.shape
    folded = q.view(batch, k.shape[2], -1, dim)
    keys, values = (
        pool.index_select(0, block_table.flatten()).view(batch, -1, *pool.shape[2:]).transpose(1, 2)
        for pool in (k, v)
    )
    return scaled_dot_product_attention(folded, keys, values).flatten(1, 2)
