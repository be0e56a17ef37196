"""A Llama decoder in plain torch, with its keys and values kept elsewhere.

The decoder knows nothing of pages, blocks or slots. It asks a `KVStore` to write the new keys and
values of some rows and to show the whole keys and values of each row, and it hands what it is shown
to `torch.nn.functional.scaled_dot_product_attention`, unmodified. Whatever store stands behind, the
same kernel sees the same shapes, which is what makes three stores comparable token by token.

Grouped-query attention needs neither `enable_gqa` nor a copy of the keys. In a decode step the
query heads of one KV head become query positions (``[1, kv_heads, group, head_dim]``); in a prefill
they become the batch, and the keys are expanded over it with stride 0.

Rows of different lengths are attended one by one over exact-length slices: no padding, no mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class LlamaConfig:
    """The numbers that describe a Llama model with tied embeddings."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_size: int
    ffn_size: int
    vocab_size: int
    max_positions: int
    rope_base: float
    norm_eps: float

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one token has in fp32, all layers together."""
        return self.n_layers * 2 * self.n_kv_heads * self.head_dim * 4


class KVStore(Protocol):
    """Where the decoder's keys and values live: the one seam between model and memory.

    A pass over the model is ``begin``, then for each layer ``write`` and ``views``.
    """

    def begin(self, rows: Sequence[int], n_tokens: int) -> Tensor:
        """Make `n_tokens` more tokens of each row writable.

        Returns
        -------
        Tensor
            int64 ``[len(rows)]``: the lengths before, which are the positions of the first new
            tokens.
        """
        ...

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store the new tokens' keys and values, each ``[rows, n_tokens, kv_heads, head_dim]``."""
        ...

    def views(self, layer: int) -> Sequence[tuple[Tensor, Tensor]]:
        """Show keys and values of each row, ``[length, kv_heads, head_dim]``, new ones included."""
        ...


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation over the last dimension (Zhang and Sennrich, 2019)."""
    return functional.rms_norm(x, (x.shape[-1],), weight, eps)


def rope_table(config: LlamaConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary embedding, ``[max_positions, head_dim]``, halves repeated."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    angles = torch.outer(
        torch.arange(config.max_positions, dtype=torch.float64), config.rope_base**-half
    )
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().float(), angles.sin().float()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate element i of the first half together with element i of the second half.

    Parameters
    ----------
    x : Tensor
        ``[rows, tokens, heads, head_dim]``.
    cos, sin : Tensor
        ``[rows, tokens, 1, head_dim]``, rows of `rope_table`.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def attend_step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One new token of one row against all of its keys.

    `q` is ``[heads, head_dim]``; `k` and `v` are ``[length, kv_heads, head_dim]``, any strides with
    a contiguous last dimension. Returns ``[heads * head_dim]``.
    """
    kv_heads, head_dim = k.shape[1], k.shape[2]
    out = functional.scaled_dot_product_attention(
        q.view(1, kv_heads, -1, head_dim),
        k.transpose(0, 1).unsqueeze(0),
        v.transpose(0, 1).unsqueeze(0),
    )
    return out.reshape(-1)


def attend_prompt(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`tokens` new tokens of one row, causal, against all of its keys.

    `q` is ``[tokens, heads, head_dim]``; `k` and `v` are ``[length, kv_heads, head_dim]`` with the
    new tokens last. Returns ``[tokens, heads * head_dim]``.
    """
    n_tokens, heads, head_dim = q.shape
    length, kv_heads, _ = k.shape
    group = heads // kv_heads
    # The batch is the group: query head h * group + g reads KV head h.
    queries = q.view(n_tokens, kv_heads, group, head_dim).permute(2, 1, 0, 3)
    keys = k.transpose(0, 1).expand(group, -1, -1, -1)
    values = v.transpose(0, 1).expand(group, -1, -1, -1)
    mask = None
    if length > n_tokens > 1:
        # torch aligns is_causal to the first key; behind a prefix the last key is meant.
        mask = torch.ones(n_tokens, length, dtype=torch.bool).tril(length - n_tokens)
    out = functional.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, is_causal=length == n_tokens
    )
    return out.permute(2, 1, 0, 3).reshape(n_tokens, heads * head_dim)


class Llama:
    """The decoder: tied embeddings, RMSNorm, RoPE, grouped-query attention, SwiGLU.

    Parameters
    ----------
    config : LlamaConfig
        The model's numbers.
    tensors : dict of str to Tensor
        fp32 weights: ``embed``, ``norm``, and per layer ``{i}.attn_norm``, ``{i}.qkv``,
        ``{i}.out``, ``{i}.ffn_norm``, ``{i}.gate_up``, ``{i}.down``, matrices as ``[out, in]``, q
        and k rows in half-split RoPE order.
    """

    def __init__(self, config: LlamaConfig, tensors: dict[str, Tensor]) -> None:
        self.config = config
        self.tensors = tensors
        self._cos, self._sin = rope_table(config)

    @torch.inference_mode()
    def forward(self, tokens: Tensor, starts: Tensor, store: KVStore) -> Tensor:
        """Run new tokens through the model and return the last one's logits per row.

        Parameters
        ----------
        tokens : Tensor
            int64 ``[rows, n_tokens]``: as many new tokens for every row.
        starts : Tensor
            int64 ``[rows]``: what ``store.begin(rows, n_tokens)`` returned.
        store : KVStore
            Keeps keys and values.

        Returns
        -------
        Tensor
            fp32 ``[rows, vocab_size]``.
        """
        config, weight = self.config, self.tensors
        positions = starts[:, None] + torch.arange(tokens.shape[1])
        cos, sin = self._cos[positions].unsqueeze(2), self._sin[positions].unsqueeze(2)
        q_size, kv_size = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        x = weight["embed"][tokens]
        for i in range(config.n_layers):
            h = rms_norm(x, weight[f"{i}.attn_norm"], config.norm_eps)
            qkv = functional.linear(h, weight[f"{i}.qkv"])
            q, k, v = qkv.tensor_split((q_size, q_size + kv_size), dim=-1)
            q = apply_rope(q.view(*tokens.shape, config.n_heads, -1), cos, sin)
            k = apply_rope(k.view(*tokens.shape, config.n_kv_heads, -1), cos, sin)
            store.write(i, k, v.view(*tokens.shape, config.n_kv_heads, -1))
            x = x + functional.linear(self._attend(q, store, i), weight[f"{i}.out"])
            h = rms_norm(x, weight[f"{i}.ffn_norm"], config.norm_eps)
            gate, up = functional.linear(h, weight[f"{i}.gate_up"]).chunk(2, dim=-1)
            x = x + functional.linear(functional.silu(gate) * up, weight[f"{i}.down"])
        x = rms_norm(x[:, -1], weight["norm"], config.norm_eps)
        return functional.linear(x, weight["embed"])

    def _attend(self, q: Tensor, store: KVStore, layer: int) -> Tensor:
        """Attention of every row, ``[rows, n_tokens, heads * head_dim]``."""
        views = store.views(layer)
        if q.shape[1] == 1:
            return torch.stack(
                [attend_step(q[r, 0], k, v) for r, (k, v) in enumerate(views)]
            ).unsqueeze(1)
        return torch.stack([attend_prompt(q[r], k, v) for r, (k, v) in enumerate(views)])
