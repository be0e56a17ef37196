"""Attention of one dense problem with torch's own operators: the tier that is there everywhere.

`scaled_dot_product_attention` wherever it can say what is asked, with the query heads of a group
folded into the query's length: that reads the keys once a group and not once a head, and is several
times faster on a CPU than ``enable_gqa``. What it cannot say (softcap, log-sum-exp) is written out
in fp32, some query rows at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from flash_compat.mask import Band, alibi_bias

# Folding repeats the mask for every head of a group; past this many query rows the repeated masks
# cost more than reading the keys again.
_MAX_FOLDED_QUERIES = 64
# How much the scores of one block of query rows may take where attention is written out.
_SCORE_BYTES = 64 << 20


class Score(NamedTuple):
    """How scores are made of products: scaled, capped, biased, masked."""

    scale: float
    band: Band
    softcap: float = 0.0
    alibi_slopes: torch.Tensor | None = None

    def of_row(self, row: int) -> Score:
        """Return the same for one row of a batch."""
        if self.alibi_slopes is None or self.alibi_slopes.dim() == 1:
            return self
        return self._replace(alibi_slopes=self.alibi_slopes[row])


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, score: Score, *, with_lse: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the attention of ``q [batch, queries, heads, dim]`` over all given keys.

    ``k`` and ``v`` are ``[batch, keys, kv_heads, dim]``, with any strides. Returns the output,
    shaped as ``q``, and the log-sum-exp ``[batch, heads, queries]`` in fp32 if asked for. A query
    that attends to no key gets zeros, and a log-sum-exp of infinity, as in flash-attn.
    """
    n_queries, n_keys = q.shape[1], k.shape[1]
    if n_queries == 0 or n_keys == 0 or q.shape[0] == 0:
        out = torch.zeros_like(q)
        return out, q.new_full((*_rows(q),), torch.inf, dtype=torch.float32) if with_lse else None
    if with_lse or score.softcap > 0:
        return _written_out(q, k, v, score, with_lse)
    return _with_sdpa(q, k, v, score), None


def _rows(q: torch.Tensor) -> tuple[int, int, int]:
    return q.shape[0], q.shape[2], q.shape[1]


def _with_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, score: Score) -> torch.Tensor:
    n_queries, n_heads = q.shape[1:3]
    n_keys, n_kv_heads = k.shape[1:3]
    band = score.band
    is_plain = score.alibi_slopes is None
    if is_plain and band == Band(None, 0) and n_queries > 1:
        # Bottom-right: the first queries of more than there are keys see nothing.
        unseeing = max(n_queries - n_keys, 0)
        if n_queries - unseeing == n_keys:
            square = sdpa(
                q[:, unseeing:].transpose(1, 2),
                k.transpose(1, 2),
                v.transpose(1, 2),
                scale=score.scale,
                is_causal=True,
                enable_gqa=n_heads != n_kv_heads,
            ).transpose(1, 2)
            if unseeing == 0:
                return square
            return torch.nn.functional.pad(square, (0, 0, 0, 0, unseeing, 0))
    first, last = band.keys(n_queries, n_keys)
    if first >= last:
        return torch.zeros_like(q)
    positions = torch.arange(n_keys - n_queries, n_keys, device=q.device)
    keys = torch.arange(first, last, device=q.device)
    k, v = k[:, first:last], v[:, first:last]
    mask = None if band.is_full(n_queries, n_keys) else band.mask(positions, keys)
    bias = mask
    if score.alibi_slopes is not None:
        bias = alibi_bias(score.alibi_slopes, positions, keys)
        if mask is not None:
            bias = bias.masked_fill(~mask, -torch.inf)
        bias = bias.to(q.dtype)
    group = n_heads // n_kv_heads
    if group > 1 and n_queries <= _MAX_FOLDED_QUERIES:
        folded = q.unflatten(2, (n_kv_heads, group)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        if bias is not None and bias.dim() == 4:
            bias = bias.unflatten(1, (n_kv_heads, group)).flatten(2, 3)
        elif bias is not None:
            bias = bias.repeat(group, 1)
        out = sdpa(folded, k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias, scale=score.scale)
        out = out.unflatten(2, (group, n_queries)).permute(0, 3, 1, 2, 4).flatten(2, 3)
    else:
        out = sdpa(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=bias,
            scale=score.scale,
            enable_gqa=group > 1,
        ).transpose(1, 2)
    if mask is not None:
        # Softmax over nothing is NaN; flash-attn says 0.
        out = out.masked_fill(~mask.any(1)[None, :, None, None], 0.0)
    return out


def _written_out(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, score: Score, with_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    batch, n_queries, n_heads, _ = q.shape
    n_keys, n_kv_heads = k.shape[1:3]
    group = n_heads // n_kv_heads
    working = torch.promote_types(q.dtype, torch.float32)
    k_heads, v_heads = (t.transpose(1, 2).to(working).unsqueeze(2) for t in (k, v))
    keys = torch.arange(n_keys, device=q.device)
    row_bytes = batch * n_heads * n_keys * working.itemsize
    rows = max(1, _SCORE_BYTES // row_bytes)
    outs, lses = [], []
    for begin in range(0, n_queries, rows):
        end = min(begin + rows, n_queries)
        positions = torch.arange(
            n_keys - n_queries + begin, n_keys - n_queries + end, device=q.device
        )
        block = q[:, begin:end].unflatten(2, (n_kv_heads, group)).permute(0, 2, 3, 1, 4)
        scores = block.to(working) @ k_heads.transpose(-1, -2) * score.scale
        if score.softcap > 0:
            scores = torch.tanh(scores / score.softcap) * score.softcap
        if score.alibi_slopes is not None:
            bias = alibi_bias(score.alibi_slopes, positions, keys)
            scores = scores + bias.unflatten(1, (n_kv_heads, group))
        scores = scores.masked_fill(~score.band.mask(positions, keys), -torch.inf)
        lse = scores.logsumexp(-1, keepdim=True)
        sees = lse > -torch.inf
        weights = torch.exp(scores - lse.masked_fill(~sees, 0.0))
        outs.append((weights @ v_heads).permute(0, 3, 1, 2, 4).flatten(2, 3).to(q.dtype))
        lses.append(lse.masked_fill(~sees, torch.inf).squeeze(-1).flatten(1, 2).float())
    return torch.cat(outs, 1), torch.cat(lses, 2) if with_lse else None
