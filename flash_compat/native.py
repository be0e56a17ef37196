"""The native decode kernel, over tensors: attention of a few queries that reads keys once.

The kernel (``kernel/``) takes addresses. This is the one place that makes them of tensors; what it
cannot take, `can_decode` says beforehand.
"""

from __future__ import annotations

import math

import torch

from flash_compat import _decode

MAX_QUERY_LENGTH = 16
"""Beyond it, computing outweighs reading, and other kernels are made for that."""

_ELEMENTS = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.int8: 3,
    torch.float8_e4m3fn: 4,
    torch.float8_e5m2: 5,
}
_QUERY_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LEAST_HEAD_DIM = 8


def levels() -> list[str]:
    """Return what the kernel was compiled for and this processor runs, the best first."""
    return _decode.levels()


def can_decode(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether `decode` takes tensors of these devices, dtypes, shapes and strides.

    It computes no gradients.
    """
    dtype, stored = q.dtype, k.dtype
    if not (
        q.is_cpu
        and k.is_cpu
        and v.is_cpu
        and q.dim() == k.dim() == v.dim() == 4
        and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        and dtype in _QUERY_DTYPES
        and (stored == dtype or (stored in _ELEMENTS and stored.itemsize == 1))
        and stored == v.dtype
    ):
        return False
    _, n_queries, n_heads, dim = q.shape
    n_kv_heads = k.shape[2]
    return (
        1 <= n_queries <= MAX_QUERY_LENGTH
        and dim == k.shape[3] == v.shape[3] >= _LEAST_HEAD_DIM
        and n_kv_heads > 0
        and n_heads % n_kv_heads == 0
        and not (
            torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        )
    )


def decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor,
    *,
    begins: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    n_threads: int | None = None,
    level: str = "",
) -> torch.Tensor:
    """Return the attention of ``q`` over the keys of each row's slot, up to ``lengths[i]``.

    Memory beyond the lengths is never read, nor before `begins`.

    Parameters
    ----------
    q
        ``[batch, queries, heads, dim]``; the last query stands at the last key.
    k, v
        ``[slots, positions, kv_heads, dim]``; with a block table ``[blocks, block_size, kv_heads,
        dim]``. Any strides, but the last dimension dense. Of q's dtype, or int8, float8_e4m3fn or
        float8_e5m2.
    lengths
        int32 ``[batch]``. A row without keys, and a query that sees none, gets zeros, and a
        log-sum-exp of minus infinity.
    begins
        int32 ``[batch]``: the first key of each row; without it, 0.
    slots
        int32 ``[batch]``; without it, row i is in slot i.
    block_table
        int32 ``[batch, blocks]``, instead of slots.
    scale
        Of the scores; by default ``dim ** -0.5``.
    causal, window
        Which keys a query sees, counted from its own position; -1 is no limit. Causal is a right
        limit of 0.
    softcap
        Scores become ``softcap * tanh(score / softcap)``; 0: they stay.
    alibi_slopes
        fp32 ``[heads]`` or ``[batch, heads]``; ``slope * distance`` is taken off the scores.
    k_scale, v_scale
        fp32, one number or ``[kv_heads]``: what stored keys and values are multiplied by.
    out, lse
        Where results go: as ``q``, with the last dimension dense; fp32 ``[batch, heads, queries]``,
        contiguous.
    n_threads
        By default torch's. The result's bits depend on it, and on the level.
    level
        One of `levels`, for tests; by default the best for this ``dim``.

    Raises
    ------
    ValueError
        Before anything is written: tensors that `can_decode` refuses, or that do not fit together;
        a length, slot or block that is not there.
    """
    if not can_decode(q, k, v):
        shown = ", ".join(f"{x.dtype} {list(x.shape)} {list(x.stride())}" for x in (q, k, v))
        raise ValueError(f"the decode kernel does not take these queries, keys and values: {shown}")
    batch, n_queries, n_heads, dim = q.shape
    if k.shape != v.shape:
        raise ValueError(f"k is {list(k.shape)}, v {list(v.shape)}")
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    if out.shape != q.shape or out.dtype != q.dtype or out.stride(-1) != 1:
        raise ValueError(f"out must be as q, the last dimension dense, not {list(out.shape)}")
    n_positions, table_stride = k.shape[1], 0
    _integers("lengths", lengths, (batch,))
    for name, integers in (("begins", begins), ("slots", slots)):
        if integers is not None:
            _integers(name, integers, (batch,))
    if block_table is not None:
        _integers("block_table", block_table, (batch, block_table.shape[-1]))
        n_positions = block_table.shape[1] * k.shape[1]
        table_stride = block_table.stride(0)
    _floats("lse", lse, ((batch, n_heads, n_queries),))
    _floats("alibi_slopes", alibi_slopes, ((n_heads,), (batch, n_heads)))
    for name, of in (("k_scale", k_scale), ("v_scale", v_scale)):
        _floats(name, of, ((), (1,), (k.shape[2],)))
    _decode.decode(
        out.data_ptr(),
        *out.stride()[:3],
        q.data_ptr(),
        *q.stride()[:3],
        k.data_ptr(),
        *k.stride()[:3],
        v.data_ptr(),
        *v.stride()[:3],
        _ELEMENTS[q.dtype],
        _ELEMENTS[k.dtype],
        batch,
        n_queries,
        n_heads,
        k.shape[2],
        dim,
        k.shape[0],
        n_positions,
        lengths.data_ptr(),
        _address(begins),
        _address(slots),
        _address(block_table),
        table_stride,
        k.shape[1],
        1 / math.sqrt(dim) if scale is None else scale,
        softcap,
        window[0],
        0 if causal else window[1],
        _address(alibi_slopes),
        n_heads if alibi_slopes is not None and alibi_slopes.dim() == 2 else 0,
        _address(lse),
        _address(k_scale),
        _per_head(k_scale),
        _address(v_scale),
        _per_head(v_scale),
        torch.get_num_threads() if n_threads is None else n_threads,
        level,
    )
    return out


def _address(of: torch.Tensor | None) -> int:
    return 0 if of is None else of.data_ptr()


def _per_head(scale: torch.Tensor | None) -> int:
    return int(scale is not None and scale.numel() > 1)


def _integers(name: str, of: torch.Tensor, shape: tuple[int, ...]) -> None:
    if of.dtype != torch.int32 or of.shape != shape or of.stride(-1) != 1 or of.is_cuda:
        raise ValueError(f"{name} must be int32 {list(shape)} on the CPU, not {_shown(of)}")


def _floats(name: str, of: torch.Tensor | None, shapes: tuple[tuple[int, ...], ...]) -> None:
    if of is None:
        return
    if of.dtype != torch.float32 or of.shape not in shapes or not of.is_contiguous() or of.is_cuda:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{name} must be float32 {wanted} on the CPU, not {_shown(of)}")


def _shown(of: torch.Tensor) -> str:
    return f"{of.dtype} {list(of.shape)} on {of.device}"
