"""What the functions can be asked for, alone and together, and the check of one row's answer."""

from __future__ import annotations

from typing import Any

import torch
from reference import assert_close, attention

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "left window": {"window_size": (7, -1)},
    "causal window": {"causal": True, "window_size": (5, 3)},
    "both windows": {"window_size": (4, 6)},
    "softcap": {"softcap": 3.0},
    "alibi": {"alibi": True},
    "causal alibi": {"causal": True, "alibi": True},
    "scale": {"softmax_scale": 0.3},
    "all": {"causal": True, "window_size": (9, 0), "softcap": 5.0, "alibi": True},
}


def check(
    out: torch.Tensor,
    lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    option: dict[str, Any],
    slopes: torch.Tensor | None,
) -> None:
    """One row: ``[queries, heads, dim]`` over its own keys."""
    wanted = {
        "causal": option.get("causal", False),
        "window": option.get("window_size", (-1, -1)),
        "softcap": option.get("softcap", 0.0),
        "scale": option.get("softmax_scale"),
        "slopes": slopes,
    }
    exact, exact_lse = attention(q, k, v, **wanted)
    same, _ = attention(q, k, v, **wanted, dtype=q.dtype)
    assert_close(out, exact, same)
    if lse is not None:
        torch.testing.assert_close(lse.double(), exact_lse, atol=2e-2, rtol=2e-2)


def keywords(option: dict[str, Any], slopes: torch.Tensor | None) -> dict[str, Any]:
    given = {key: value for key, value in option.items() if key != "alibi"}
    return {**given, "alibi_slopes": slopes}


def slopes_of(option: dict[str, Any], *shape: int) -> torch.Tensor | None:
    return torch.rand(*shape) * 0.5 if option.get("alibi") else None
