"""A decode step of transformers' continuous batching on a CPU, in one layer.

Its cache writes the new tokens, gathers those of all requests into one row by index
(FullAttentionCacheAllocator.update in generation/continuous_batching/cache_allocators/
full_attention.py, 5.23), and its `sdpa_attention_forward`, which is called here, attends with a
mask that keeps the requests apart.
"""

from __future__ import annotations

import torch


class NotInstalledError(Exception):
    """There is no transformers."""


class _Attention(torch.nn.Module):
    """What transformers' function asks of a layer."""

    is_causal = False

    def __init__(self, num_key_value_groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = num_key_value_groups


class PagedCache:
    """One layer's K and V, blocks of 32 tokens (transformers' default) in any order."""

    block_size = 32

    def __init__(self, k: torch.Tensor, v: torch.Tensor, n_heads: int) -> None:
        """Fill from ``[batch, positions, kv_heads, dim]``."""
        try:
            from transformers.integrations.sdpa_attention import sdpa_attention_forward
        except ImportError as error:
            raise NotInstalledError("pip install transformers") from error
        self._forward = sdpa_attention_forward
        batch, length, n_kv_heads, _ = k.shape
        blocks = torch.randperm(batch * length // self.block_size)
        places = blocks[:, None] * self.block_size + torch.arange(self.block_size)
        self._read_index = places.flatten()
        self._write_index = self._read_index.view(batch, length)[:, -1]
        self._k, self._v = (torch.empty_like(x).flatten(0, 1) for x in (k, v))
        self._k[self._read_index], self._v[self._read_index] = k.flatten(0, 1), v.flatten(0, 1)
        self._newest = k[:, -1].clone(), v[:, -1].clone()
        row = torch.arange(batch).repeat_interleave(length)
        is_own = row[None, :] == torch.arange(batch)[:, None]
        self._mask = torch.zeros(1, 1, batch, batch * length, dtype=k.dtype)
        self._mask.masked_fill_(~is_own, torch.finfo(k.dtype).min)
        self._module = _Attention(n_heads // n_kv_heads)

    def attend(self, q: torch.Tensor) -> torch.Tensor:
        """Write each row's last token, and attend: ``q [batch, heads, dim]``."""
        for cache, new in zip((self._k, self._v), self._newest, strict=True):
            cache.index_copy_(0, self._write_index, new)
        k, v = (
            torch.index_select(cache, 0, self._read_index).transpose(0, 1).unsqueeze(0)
            for cache in (self._k, self._v)
        )
        queries = q.transpose(0, 1).unsqueeze(0)
        out: torch.Tensor = self._forward(self._module, queries, k, v, self._mask)[0]
        return out[0]
