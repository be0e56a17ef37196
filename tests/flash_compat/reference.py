"""Attention written out in float64, from flash-attn's documentation."""

from __future__ import annotations

import torch


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    slopes: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``q [queries, heads, dim]`` over ``k, v [keys, kv_heads, dim]``: output and log-sum-exp.

    With `dtype` a lower precision does the same work: what flash-attn's own tests compare with.
    """
    n_queries, n_heads, dim = q.shape
    n_keys, n_kv_heads = k.shape[:2]
    k, v = (t.repeat_interleave(n_heads // n_kv_heads, 1).to(dtype) for t in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q.to(dtype), k) * (dim**-0.5 if scale is None else scale)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    ahead = torch.arange(n_keys) - (torch.arange(n_queries)[:, None] + n_keys - n_queries)
    if slopes is not None:
        scores = scores - slopes.to(dtype)[:, None, None] * ahead.abs()
    right = 0 if causal else window[1]
    sees = torch.ones_like(ahead, dtype=torch.bool)
    if window[0] >= 0:
        sees &= ahead >= -window[0]
    if right >= 0:
        sees &= ahead <= right
    scores = scores.masked_fill(~sees, -torch.inf)
    weights = torch.softmax(scores, -1).nan_to_num(0.0)  # a query that sees nothing gets zeros
    lse = torch.logsumexp(scores.double(), -1)
    return torch.einsum("hij,jhd->ihd", weights, v), lse.masked_fill(lse == -torch.inf, torch.inf)


def assert_close(out: torch.Tensor, exact: torch.Tensor, same_precision: torch.Tensor) -> None:
    """As flash-attn's tests: at most twice the error of the same work in the same precision."""
    assert out.shape == exact.shape
    if out.numel() == 0:
        return
    allowed = 2 * (same_precision.double() - exact).abs().max().item() + 1e-5
    error = (out.double() - exact).abs().max().item()
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"
