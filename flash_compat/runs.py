"""Sequences laid end to end, as the varlen functions take them, without flash-attn."""

from __future__ import annotations

from typing import NamedTuple

import torch

from flash_compat.dense import Score
from flash_compat.kv_cache import attend_rows
from flash_compat.rows import Rows
from kvspan import InvalidArgument


class Runs(NamedTuple):
    """Keys and values of sequences, end to end or through a block table, and where each begins."""

    k: torch.Tensor  # [all_keys, kv_heads, dim], or [blocks, block_size, kv_heads, dim]
    v: torch.Tensor
    begins_q: torch.Tensor  # int32 [batch + 1]
    begins_k: torch.Tensor
    block_table: torch.Tensor | None = None  # int [batch, blocks]

    def row(self, row: int, begin: int, end: int) -> Rows:
        """Return the keys of one sequence as the only row of a cache."""
        if self.block_table is None:
            return Rows(
                self.k[None, begin:end], self.v[None, begin:end], _length(end - begin, self.k)
            )
        table = self.block_table[row : row + 1]
        return Rows(self.k, self.v, _length(end - begin, self.k), block_table=table)


def attend_runs(
    q: torch.Tensor, runs: Runs, score: Score, *, with_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the attention of ``q [all_queries, heads, dim]``, and ``lse [heads, all_queries]``."""
    at_q, at_k = runs.begins_q.tolist(), runs.begins_k.tolist()
    n_keys = runs.k.shape[0]
    if at_q[-1] > q.shape[0] or (runs.block_table is None and at_k[-1] > n_keys):
        raise InvalidArgument(
            f"cu_seqlens end at {at_q[-1]} queries and {at_k[-1]} keys, of {q.shape[0]} and "
            f"{n_keys}"
        )
    out = torch.zeros_like(q)
    lse = q.new_full((q.shape[1], q.shape[0]), torch.inf, dtype=torch.float32) if with_lse else None
    for row in range(len(at_q) - 1):
        queries = slice(at_q[row], at_q[row + 1])
        rows = runs.row(row, at_k[row], at_k[row + 1])
        row_out, row_lse = attend_rows(q[queries][None], rows, score.of_row(row), with_lse=with_lse)
        out[queries] = row_out[0]
        if lse is not None and row_lse is not None:
            lse[:, queries] = row_lse[0]
    return out, lse


def _length(n: int, like: torch.Tensor) -> torch.Tensor:
    return torch.full((1,), n, dtype=torch.int32, device=like.device)
