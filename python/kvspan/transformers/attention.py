"""``attn_implementation="kvspan"``: attention that reads a cache's views through flash_compat.

Steps of a few tokens are flash_compat's, without a mask tensor: keys and values are read once for
all heads of a group, where they lie. Prompts, which compute more than they read, and masks that are
more than left padding go to transformers' ``sdpa``. The result is the same; only who computes it
differs.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from flash_compat import flash_attn_func, flash_attn_with_kvcache
from flash_compat.native import MAX_QUERY_LENGTH
from kvspan import InvalidArgument
from kvspan.transformers import graph

NAME = "kvspan"


def register() -> None:
    """Make the implementation known to transformers."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    *,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **options: Any,
) -> torch.Tensor | None:
    """Return what `attention_forward` is to be given as the mask; as transformers' `sdpa_mask`.

    None: the last query sees all keys, and those before it one fewer each, or all of them if the
    module is not causal. Where the length is a tensor, as in a compiled graph, int32
    ``[2, batch]``: the first key of each row and one past the last, where the last query stands.
    """
    if (
        isinstance(q_offset, torch.Tensor)
        and allow_is_causal_skip
        and kv_offset == 0
        and (local_size is None or q_length == 1)
    ):
        return _extents(batch_size, q_offset + q_length, attention_mask, local_size)
    is_compiling = torch.compiler.is_compiling()
    ends_together = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    if (
        allow_is_causal_skip
        and ends_together
        and q_length <= MAX_QUERY_LENGTH
        and (local_size is None or kv_length < local_size)
        and (
            attention_mask is None
            or (not is_compiling and bool(attention_mask[:, kv_offset:].all()))
        )
    ):
        return None
    mask: torch.Tensor | None = sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip and ends_together,
        **options,
    )
    if mask is not None and q_length == 1 and not is_compiling:
        _note_left_padding(mask)
    return mask


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    position_bias: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Return the attention of ``query [batch, heads, queries, dim]``, ``[batch, queries, ...]``.

    Raises
    ------
    InvalidArgument
        What neither flash_compat nor sdpa computes: attention sinks, and a softcap with a mask.
    """
    if options.get("s_aux") is not None:
        raise InvalidArgument(
            f'attn_implementation="{NAME}" has no attention sinks; use "eager" for this model'
        )
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    is_extents = attention_mask is not None and attention_mask.dim() == 2
    extents = attention_mask if is_extents else getattr(attention_mask, _EXTENTS, None)
    if (
        (attention_mask is None or extents is not None)
        and (query.shape[2] <= MAX_QUERY_LENGTH or softcap or is_extents)
        and position_bias is None
        and dropout == 0.0
        and key.shape == value.shape
    ):
        out = _attend(query, key, value, extents, scaling, bool(causal), softcap or 0.0)
        return out, None
    if is_extents:
        raise InvalidArgument(
            f'attn_implementation="{NAME}" has no biases of positions, no dropout and no values of '
            'another head_dim in a compiled graph; use "sdpa"'
        )
    if softcap:
        raise InvalidArgument(
            f'attn_implementation="{NAME}" has no softcap together with a mask; use "eager"'
        )
    n_queries, n_keys = query.shape[2], key.shape[2]
    if attention_mask is None and causal and 1 < n_queries < n_keys:
        # There, no mask would say that the first query stands at the first key.
        seen = torch.ones(n_queries, n_keys, dtype=torch.bool, device=query.device)
        attention_mask = seen.tril(n_keys - n_queries)[None, None]
    out, _ = sdpa_attention_forward(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        is_causal=is_causal,
        position_bias=position_bias,
        **options,
    )
    return out, None


_EXTENTS = "_kvspan_extents"


def _extents(
    n_rows: int, end: torch.Tensor, attention_mask: torch.Tensor | None, window: int | None
) -> torch.Tensor:
    """Return which keys a query at position ``end - 1`` of each row sees: int32 ``[2, rows]``."""
    ends = end.to(torch.int32).expand(n_rows)
    begins = torch.zeros_like(ends)
    if attention_mask is not None:
        begins = graph.left_padding(attention_mask).expand(n_rows)
    if window is not None:
        begins = torch.maximum(begins, ends - window)
    return torch.stack([begins, ends])


def _note_left_padding(mask: torch.Tensor) -> None:
    """Note on a mask of one query a row which keys it sees, if it hides none but the first.

    An operation of the model on the mask loses the note, and what it changed is then honoured.
    """
    seen = mask[:, 0, 0]
    begins = seen.int().argmax(-1)
    ends = torch.full_like(begins, seen.shape[-1])
    if bool((seen.sum(-1) == ends - begins).all()):
        setattr(mask, _EXTENTS, torch.stack([begins, ends]).int())


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    extents: torch.Tensor | None,
    scaling: float | None,
    causal: bool,
    softcap: float,
) -> torch.Tensor:
    """Attend each row to its keys from ``extents[0]`` up to ``extents[1]``; None: to all."""
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    out: torch.Tensor
    if extents is None:
        out = flash_attn_func(q, k, v, softmax_scale=scaling, causal=causal, softcap=softcap)
        return out
    begins, ends = extents.expand(2, q.shape[0]).unbind()  # where a mask of one row is for all
    out = flash_attn_with_kvcache(
        q,
        k,
        v,
        cache_seqlens=ends,
        cache_leftpad=begins,
        softmax_scale=scaling,
        causal=causal,
        softcap=softcap,
    )
    return out
