"""`flash_attn_with_kvcache` without flash-attn: append, rotate, attend.

A few queries over keys in host memory are the native kernel's; longer queries, which compute more
than they read, and other devices are torch's.
"""

from __future__ import annotations

import torch

from flash_compat import native
from flash_compat.dense import Score, attend
from flash_compat.rotary import rotate
from flash_compat.rows import NewTokens, Rows


def append_and_attend(
    q: torch.Tensor, rows: Rows, new: NewTokens | None, score: Score, *, with_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Write new tokens behind each row's length, and attend to all; or raise before writing."""
    rows.check()
    if new is not None:
        rows.check_appendable(new)
        k = new.k
        if new.cos is not None and new.sin is not None:
            k = _rotate_keys(k, new.cos, new.sin, rows.lengths, interleaved=new.interleaved)
            q = _rotate_queries(
                q, new.cos, new.sin, rows.lengths, score, interleaved=new.interleaved
            )
        rows.append(k, new.v)
        rows = rows.grown(k.shape[1])
    return attend_rows(q, rows, score, with_lse=with_lse)


def attend_rows(
    q: torch.Tensor, rows: Rows, score: Score, *, with_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the attention of ``q [batch, queries, heads, dim]``, each row over its own keys."""
    if native.can_decode(q, rows.k, rows.v):
        return _decode(q, rows, score, with_lse=with_lse)
    return _attend_dense(q, rows, score, with_lse=with_lse)


def _attend_dense(
    q: torch.Tensor, rows: Rows, score: Score, *, with_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    lengths = rows.lengths.tolist()
    begins = [0] * len(lengths) if rows.leftpad is None else rows.leftpad.tolist()
    is_even = rows.slots is None and rows.block_table is None and rows.leftpad is None
    if is_even and len(set(lengths)) == 1:
        n = slice(0, lengths[0])
        return attend(q, rows.k[: len(q), n], rows.v[: len(q), n], score, with_lse=with_lse)
    outs, lses = [], []
    for row, (begin, end) in enumerate(zip(begins, lengths, strict=True)):
        k, v = rows.keys_of(row, min(begin, end), end)
        out, lse = attend(q[row : row + 1], k, v, score.of_row(row), with_lse=with_lse)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(
        [lse for lse in lses if lse is not None]
    ) if with_lse else None


def _decode(
    q: torch.Tensor, rows: Rows, score: Score, *, with_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    batch, n_queries, n_heads, _ = q.shape
    lse = torch.empty(batch, n_heads, n_queries) if with_lse else None
    slopes, band = score.alibi_slopes, score.band
    out = native.decode(
        q,
        rows.k,
        rows.v,
        rows.lengths.int().contiguous(),
        begins=None if rows.leftpad is None else rows.leftpad.int().contiguous(),
        slots=None if rows.slots is None else rows.slots.int().contiguous(),
        block_table=None if rows.block_table is None else rows.block_table.int().contiguous(),
        scale=score.scale,
        causal=False,
        window=(
            -1 if band.left is None else band.left,
            -1 if band.right is None else band.right,
        ),
        softcap=score.softcap,
        alibi_slopes=None if slopes is None else slopes.float().contiguous(),
        lse=lse,
    )
    # flash-attn says infinity where a query sees no key.
    return out, None if lse is None else lse.masked_fill_(lse == -torch.inf, torch.inf)


def _rotate_queries(
    q: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    begin: torch.Tensor,
    score: Score,
    *,
    interleaved: bool,
) -> torch.Tensor:
    """Rotate queries, which stand where the new keys do.

    Where every query sees every key they have no order: all stand at the first one's place.
    """
    offsets = torch.arange(q.shape[1], device=q.device)
    if score.band.left is None and score.band.right is None:
        offsets = torch.zeros_like(offsets)
    return rotate(q, cos, sin, begin.long()[:, None] + offsets, interleaved=interleaved)


def _rotate_keys(
    k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, begin: torch.Tensor, *, interleaved: bool
) -> torch.Tensor:
    """Rotate new keys from each row's `begin` on."""
    offsets = torch.arange(k.shape[1], device=k.device)
    return rotate(k, cos, sin, begin.long()[:, None] + offsets, interleaved=interleaved)
