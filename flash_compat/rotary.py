"""Rotary position embedding as flash-attn applies it inside of its kernels."""

from __future__ import annotations

import torch


def rotate(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    *,
    interleaved: bool,
) -> torch.Tensor:
    """Return ``x [batch, tokens, heads, dim]`` rotated, each token by its ``cos`` and ``sin``.

    ``cos`` and ``sin`` are ``[positions, rotary_dim / 2]``; dimensions past ``rotary_dim`` stay as
    they are. ``positions`` is ``[batch, tokens]``. Pairs are dimensions 0 and 1, 2 and 3, ... if
    ``interleaved``, else 0 and ``rotary_dim / 2``, and so on. Computed in fp32, rounded once.
    """
    half = cos.shape[1]
    c, s = (t[positions].float().unsqueeze(2) for t in (cos, sin))
    turned, rest = x[..., : 2 * half].float(), x[..., 2 * half :]
    if interleaved:
        a, b = turned.unflatten(-1, (half, 2)).unbind(-1)
        turned = torch.stack((a * c - b * s, a * s + b * c), -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        turned = torch.cat((a * c - b * s, a * s + b * c), -1)
    return torch.cat((turned.to(x.dtype), rest), -1)
