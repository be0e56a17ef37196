"""The functions' work as operators of torch, for `torch.compile`, which keeps each whole.

A compiled graph holds one call where Python would have read lengths and chosen a kernel. That new
tokens are written into the cache is not declared: torch would make that a copy of the cache, all of
its reservation, and write it back. So inside of one graph, what reads the cache by other means has
no order among these calls; what takes a call's result comes after it.
"""

from __future__ import annotations

import torch
from torch.fx.node import has_side_effect

from flash_compat import kv_cache, runs
from flash_compat.dense import Score
from flash_compat.mask import Band
from flash_compat.rows import NewTokens, Rows
from flash_compat.runs import Runs

Result = tuple[torch.Tensor, torch.Tensor | None]


def attend(
    q: torch.Tensor, rows: Rows, new: NewTokens | None, score: Score, *, with_lse: bool
) -> Result:
    """`kv_cache.append_and_attend`, as one operator where a graph is compiled."""
    if not _is_for_a_graph(q, rows.k, rows.v):
        return kv_cache.append_and_attend(q, rows, new, score, with_lse=with_lse)
    k_new, v_new, cos, sin, interleaved = None, None, None, None, True
    if new is not None:
        k_new, v_new, cos, sin, interleaved = new.k, new.v, new.cos, new.sin, new.interleaved
    out, lse = _append_and_attend(
        q,
        rows.k,
        rows.v,
        rows.lengths,
        rows.slots,
        rows.block_table,
        rows.leftpad,
        k_new,
        v_new,
        cos,
        sin,
        interleaved,
        *_flat(score),
        with_lse,
    )
    return out, lse if with_lse else None


def attend_runs(q: torch.Tensor, of: Runs, score: Score, *, with_lse: bool) -> Result:
    """`runs.attend_runs`, as one operator where a graph is compiled."""
    if not _is_for_a_graph(q, of.k, of.v):
        return runs.attend_runs(q, of, score, with_lse=with_lse)
    out, lse = _attend_runs(
        q, of.k, of.v, of.begins_q, of.begins_k, of.block_table, *_flat(score), with_lse
    )
    return out, lse if with_lse else None


def _is_for_a_graph(*tensors: torch.Tensor) -> bool:
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return torch.compiler.is_compiling() and not needs_grad


# A cache is taken as it lies: to be given the strides of its tracing, it would be copied.
@torch.library.custom_op(
    "flash_compat::append_and_attend", mutates_args=(), tags=(torch.Tag.flexible_layout,)
)
def _append_and_attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor,
    slots: torch.Tensor | None,
    block_table: torch.Tensor | None,
    leftpad: torch.Tensor | None,
    k_new: torch.Tensor | None,
    v_new: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    interleaved: bool,
    scale: float,
    left: int | None,
    right: int | None,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    with_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = Rows(k, v, lengths, slots, block_table, leftpad)
    new = None
    if k_new is not None and v_new is not None:
        new = NewTokens(k_new, v_new, cos, sin, interleaved)
    score = Score(scale, Band(left, right), softcap, alibi_slopes)
    out, lse = kv_cache.append_and_attend(q, rows, new, score, with_lse=with_lse)
    return _as_declared(out, lse)


@_append_and_attend.register_fake
def _(q: torch.Tensor, *others: object) -> tuple[torch.Tensor, torch.Tensor]:
    return _declared(q, (q.shape[0], q.shape[2], q.shape[1]), others[-1])


@torch.library.custom_op(
    "flash_compat::attend_runs", mutates_args=(), tags=(torch.Tag.flexible_layout,)
)
def _attend_runs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    begins_q: torch.Tensor,
    begins_k: torch.Tensor,
    block_table: torch.Tensor | None,
    scale: float,
    left: int | None,
    right: int | None,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    with_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    of = Runs(k, v, begins_q, begins_k, block_table)
    score = Score(scale, Band(left, right), softcap, alibi_slopes)
    return _as_declared(*runs.attend_runs(q, of, score, with_lse=with_lse))


@_attend_runs.register_fake
def _(q: torch.Tensor, *others: object) -> tuple[torch.Tensor, torch.Tensor]:
    return _declared(q, (q.shape[1], q.shape[0]), others[-1])


# A graph drops what nobody uses; tokens are written all the same.
has_side_effect(torch.ops.flash_compat.append_and_attend.default)


def _flat(
    score: Score,
) -> tuple[float, int | None, int | None, float, torch.Tensor | None]:
    return score.scale, score.band.left, score.band.right, score.softcap, score.alibi_slopes


def _as_declared(out: torch.Tensor, lse: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    return out.contiguous(), out.new_empty(0, dtype=torch.float32) if lse is None else lse


def _declared(
    q: torch.Tensor, lse_shape: tuple[int, ...], with_lse: object
) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(lse_shape if with_lse else (0,), dtype=torch.float32)
