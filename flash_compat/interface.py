"""flash-attn's functions, with its signatures, over any strided tensors on any device.

Semantics are those of flash-attn 2.8 (flash_attn/flash_attn_interface.py), with these differences
off a GPU: fp32 is accepted, there is no dropout, and appending past what a kvspan sequence was
extended to raises `kvspan.InvalidArgument` before anything is written.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from flash_compat import checks, operators, packages
from flash_compat.dense import Score
from flash_compat.mask import Band
from flash_compat.rows import NewTokens, Rows
from flash_compat.runs import Runs
from kvspan import InvalidArgument

Window = tuple[int, int]


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Return the attention of ``q [batch, queries, heads, dim]`` over ``k`` and ``v``.

    Parameters
    ----------
    q
        ``[batch, queries, heads, dim]``, float16, bfloat16 or (not on a GPU) float32.
    k, v
        ``[batch, keys, kv_heads, dim]``; ``heads`` is a multiple of ``kv_heads``.
    softmax_scale
        None: ``dim ** -0.5``.
    causal
        A query attends to no key behind it; the last query stands at the last key.
    window_size
        ``(left, right)``: how many keys before and behind its own a query attends to; -1: all.
    softcap
        Above 0, scores become ``softcap * tanh(score / softcap)``.
    alibi_slopes
        fp32 ``[heads]`` or ``[batch, heads]``: ``-slope * |distance|`` is added to a score.
    return_attn_probs
        Return ``(out, softmax_lse, None)``; ``softmax_lse`` is fp32 ``[batch, heads, queries]``.

    Raises
    ------
    kvspan.InvalidArgument
        Shapes, dtypes or options that do not go together, or dropout without flash-attn.
    """
    checks.check_qkv(q, k, v, n_dims=4)
    score = _score(q, softmax_scale, causal, window_size, softcap, alibi_slopes, batch=q.shape[0])
    if k.shape[0] != q.shape[0]:
        raise InvalidArgument(f"q has {q.shape[0]} rows, k and v have {k.shape[0]}")
    if q.is_cuda and (function := _of_a_package(flash_attn_func, locals())) is not None:
        return function(q, k, v)
    checks.check_no_dropout(dropout_p)
    rows = Rows(k, v, _lengths(k.shape[1], q))
    out, lse = operators.attend(q, rows, None, score, with_lse=return_attn_probs)
    return (out, lse, None) if return_attn_probs else out


def flash_attn_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` with ``kv [batch, keys, 2, kv_heads, dim]``."""
    k, v = _unpacked(kv, "kv", 2, n_dims=5)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_qkvpacked_func(
    qkv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` with ``qkv [batch, tokens, 3, heads, dim]``."""
    q, k, v = _unpacked(qkv, "qkv", 3, n_dims=5)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
) -> Any:
    """Return the attention of sequences laid end to end, each over its own keys.

    Parameters
    ----------
    q
        ``[all_queries, heads, dim]``.
    k, v
        ``[all_keys, kv_heads, dim]``, or with a block table
        ``[blocks, block_size, kv_heads, dim]``.
    cu_seqlens_q, cu_seqlens_k
        int32 ``[batch + 1]``: where each sequence begins, and the end.
    max_seqlen_q, max_seqlen_k
        The longest of each; a GPU's kernels want to know.
    block_table
        int32 ``[batch, blocks]``.

    The other arguments are those of `flash_attn_func`; ``softmax_lse`` is ``[heads, all_queries]``.
    """
    checks.check_qkv(
        q,
        k[0] if block_table is not None and k.dim() == 4 else k,
        v[0] if block_table is not None and v.dim() == 4 else v,
        n_dims=3,
    )
    checks.check_ints(cu_seqlens_q, "cu_seqlens_q", (-1,))
    batch = cu_seqlens_q.shape[0] - 1
    checks.check_ints(cu_seqlens_k, "cu_seqlens_k", (batch + 1,))
    checks.check_ints(block_table, "block_table", (batch, -1))
    score = _score(q, softmax_scale, causal, window_size, softcap, alibi_slopes, batch=batch)
    if q.is_cuda and (function := _of_a_package(flash_attn_varlen_func, locals())) is not None:
        return function(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    checks.check_no_dropout(dropout_p)
    runs = Runs(k, v, cu_seqlens_q, cu_seqlens_k, block_table)
    out, lse = operators.attend_runs(q, runs, score, with_lse=return_attn_probs)
    return (out, lse, None) if return_attn_probs else out


def flash_attn_varlen_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` with ``kv [all_keys, 2, kv_heads, dim]``."""
    k, v = _unpacked(kv, "kv", 2, n_dims=4)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` with ``qkv [all_tokens, 3, heads, dim]``."""
    q, k, v = _unpacked(qkv, "qkv", 3, n_dims=4)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: torch.Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Append to a KV cache, in place, and return the attention of the new queries over it.

    Parameters
    ----------
    q
        ``[batch, queries, heads, dim]``.
    k_cache, v_cache
        ``[slots, positions, kv_heads, dim]``, such as ``cache.layer(i)``, or with a block table
        ``[blocks, block_size, kv_heads, dim]``. The last dimension is contiguous.
    k, v
        ``[batch, new, kv_heads, dim]``: written behind each row's `cache_seqlens`, and attended to.
    rotary_cos, rotary_sin
        ``[positions, rotary_dim / 2]``: rotates `k`, and `q` if causal or in a window (otherwise
        all queries stand at `cache_seqlens`), from `cache_seqlens` on. Only with `k` and `v`.
    cache_seqlens
        int32 ``[batch]``, or one int: the tokens in each row before the call. None: the cache is
        full. What ``batch.step()`` returns.
    cache_batch_idx
        int32 ``[batch]``: the slot of each row (``batch.slots``). None: 0, 1, 2, ...
    cache_leftpad
        int32 ``[batch]``: where a row begins.
    block_table
        int32 ``[batch, blocks]``: vLLM's way of paging, here to be compared with.
    num_splits
        Into how many parts a GPU's kernel splits the keys; elsewhere the threads decide.
    return_softmax_lse
        Return ``(out, lse)``; fp32 ``[batch, heads, queries]``.

    The other arguments are those of `flash_attn_func`.

    Raises
    ------
    kvspan.InvalidArgument
        Arguments that do not go together, or (not on a GPU, where reading the lengths would wait)
        new tokens past what a row has room for, or past what its kvspan sequence was extended to.
        Nothing has been written.
    """
    checks.check_qkv(q, k_cache, v_cache, n_dims=4)
    batch = q.shape[0]
    score = _score(q, softmax_scale, causal, window_size, softcap, alibi_slopes, batch=batch)
    if q.is_cuda and (function := _of_a_package(flash_attn_with_kvcache, locals())) is not None:
        return function(q, k_cache, v_cache)

    for t, name in ((cache_batch_idx, "cache_batch_idx"), (cache_leftpad, "cache_leftpad")):
        checks.check_ints(t, name, (batch,))
    checks.check_ints(block_table, "block_table", (batch, -1))
    if block_table is not None and (cache_batch_idx is not None or cache_leftpad is not None):
        raise InvalidArgument("block_table goes with neither cache_batch_idx nor cache_leftpad")
    if cache_batch_idx is None and block_table is None and k_cache.shape[0] < batch:
        raise InvalidArgument(f"the cache has {k_cache.shape[0]} slots for {batch} rows of q")
    if (k is None) != (v is None):
        raise InvalidArgument("new tokens need both k and v")
    if k is None and (rotary_cos is not None or rotary_sin is not None):
        raise InvalidArgument("rotary_cos and rotary_sin go with new tokens, k and v")
    if k is not None and cache_seqlens is None:
        raise InvalidArgument("new tokens need cache_seqlens, which says where they go")
    new = None
    if k is not None and v is not None:
        checks.check_qkv(q, k, v, n_dims=4)
        if k.shape[0] != batch or k.shape[2] != k_cache.shape[2]:
            raise InvalidArgument(
                f"k and v must be [{batch}, new tokens, {k_cache.shape[2]}, {q.shape[-1]}], not "
                f"{tuple(k.shape)}"
            )
        checks.check_rotary(rotary_cos, rotary_sin, q)
        new = NewTokens(k, v, rotary_cos, rotary_sin, rotary_interleaved)

    if cache_seqlens is None:
        cache_seqlens = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    lengths = _lengths(cache_seqlens, q)
    rows = Rows(k_cache, v_cache, lengths, cache_batch_idx, block_table, cache_leftpad)
    out, lse = operators.attend(q, rows, new, score, with_lse=return_softmax_lse)
    return (out, lse) if return_softmax_lse else out


def _score(
    q: torch.Tensor,
    softmax_scale: float | None,
    causal: bool,
    window_size: Window,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    *,
    batch: int,
) -> Score:
    checks.check_window(window_size)
    checks.check_slopes(alibi_slopes, batch, q.shape[-2])
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return Score(scale, Band.of(causal, window_size), softcap, alibi_slopes)


def _lengths(given: int | torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    if not isinstance(given, torch.Tensor):
        return torch.full((q.shape[0],), int(given), dtype=torch.int32, device=q.device)
    checks.check_ints(given, "cache_seqlens", (q.shape[0],))
    return given


def _unpacked(t: torch.Tensor, name: str, n: int, *, n_dims: int) -> tuple[torch.Tensor, ...]:
    if t.dim() != n_dims or t.shape[-3] != n:
        raise InvalidArgument(
            f"{name} must have {n_dims} dimensions, the third from the end of size {n}, not "
            f"{tuple(t.shape)}"
        )
    return t.unbind(-3)


def _of_a_package(ours: Callable[..., Any], arguments: dict[str, Any]) -> Callable[..., Any] | None:
    """Return a package's function of that name, given what is not at its default; or None."""
    options = {
        name: arguments[name]
        for name, default in _defaults(ours).items()
        if arguments[name] is not default
        and not (isinstance(default, (int, float, tuple)) and arguments[name] == default)
    }
    return packages.find(ours.__name__, arguments["q"].device, options)


@functools.cache
def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}
