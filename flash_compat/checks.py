"""Arguments checked before anything is touched; every error names what is wrong and allowed."""

from __future__ import annotations

import torch

from kvspan import InvalidArgument

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, n_dims: int) -> None:
    """Check shapes ``[..., heads, dim]``, dtypes and devices of queries, keys and values."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, torch.Tensor) or t.dim() != n_dims:
            shape = tuple(t.shape) if isinstance(t, torch.Tensor) else type(t).__name__
            raise InvalidArgument(f"{name} must be a tensor of {n_dims} dimensions, not {shape}")
    if q.dtype not in _DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES)
        raise InvalidArgument(
            f"q, k and v must have one dtype of {allowed}, not {q.dtype}, {k.dtype} and {v.dtype}"
        )
    if k.device != q.device or v.device != q.device:
        raise InvalidArgument(
            f"q, k and v must be on one device, not {q.device}, {k.device} and {v.device}"
        )
    if k.shape != v.shape or k.shape[-1] != q.shape[-1]:
        raise InvalidArgument(
            f"k and v must have one shape and q's head_dim, not q {tuple(q.shape)}, "
            f"k {tuple(k.shape)} and v {tuple(v.shape)}"
        )
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2] != 0:
        raise InvalidArgument(
            f"the {q.shape[-2]} heads of q must be a multiple of the {k.shape[-2]} heads of k and v"
        )


def check_window(window_size: tuple[int, int]) -> None:
    """Check a pair of ints."""
    if len(window_size) != 2:
        raise InvalidArgument(f"window_size is (left, right), -1 for no limit, not {window_size!r}")


def check_no_dropout(dropout_p: float) -> None:
    """Refuse dropout, which is for training."""
    if dropout_p != 0.0:
        raise InvalidArgument(
            f"dropout_p must be 0.0 without flash-attn on a GPU, not {dropout_p}: these functions "
            "are for inference"
        )


def check_slopes(slopes: torch.Tensor | None, batch: int, n_heads: int) -> None:
    """Check the shape ``[heads]`` or ``[batch, heads]``."""
    if slopes is not None and tuple(slopes.shape) not in ((n_heads,), (batch, n_heads)):
        raise InvalidArgument(
            f"alibi_slopes must be [{n_heads}] or [{batch}, {n_heads}], not {tuple(slopes.shape)}"
        )


def check_ints(t: torch.Tensor | None, name: str, shape: tuple[int, ...]) -> None:
    """Check an int32 tensor (int64 passes) of a shape; -1 in it is any size."""
    if t is None:
        return
    is_shaped = t.dim() == len(shape) and all(
        want in (-1, has) for want, has in zip(shape, t.shape, strict=True)
    )
    if t.dtype not in (torch.int32, torch.int64) or not is_shaped:
        wanted = str(list(shape)).replace("-1", "n")
        raise InvalidArgument(
            f"{name} must be an int32 tensor of shape {wanted}, not {t.dtype} {tuple(t.shape)}"
        )


def check_between(values: list[int], name: str, least: int, most: int) -> None:
    """Check every one of some numbers."""
    if not values:
        return
    low, high = min(values), max(values)
    if low < least or high > most:
        raise InvalidArgument(
            f"{name} must be between {least} and {most}, and has {low if low < least else high}"
        )


def check_rotary(cos: torch.Tensor | None, sin: torch.Tensor | None, q: torch.Tensor) -> None:
    """Check ``[positions, rotary_dim / 2]`` of the cosines and sines, if there are any."""
    if cos is None and sin is None:
        return
    if cos is None or sin is None or cos.shape != sin.shape or cos.dim() != 2:
        raise InvalidArgument("rotary_cos and rotary_sin go together: [positions, rotary_dim / 2]")
    if 2 * cos.shape[1] > q.shape[-1]:
        raise InvalidArgument(
            f"rotary_dim is at most head_dim {q.shape[-1]}, not {2 * cos.shape[1]}"
        )
