"""Which keys a query attends to, and how near they are: causal, sliding window, ALiBi."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Band(NamedTuple):
    """Queries attend to keys from ``left`` before to ``right`` behind their own position.

    The last query stands at the last key (aligned at the bottom right). None: no limit.
    """

    left: int | None
    right: int | None

    @staticmethod
    def of(causal: bool, window_size: tuple[int, int]) -> Band:
        """Return the band of flash-attn's arguments: -1 is no limit, causal is nothing behind."""
        left, right = (None if n < 0 else int(n) for n in window_size)
        return Band(left, 0 if causal else right)

    def keys(self, n_queries: int, n_keys: int) -> tuple[int, int]:
        """Return the first and one past the last key that any query attends to."""
        offset = n_keys - n_queries  # the first query's position
        first = 0 if self.left is None else max(0, offset - self.left)
        last = n_keys if self.right is None else min(n_keys, n_keys + self.right)
        return min(first, n_keys), max(last, 0)

    def is_full(self, n_queries: int, n_keys: int) -> bool:
        """Whether every query attends to all of `keys`."""
        first, last = self.keys(n_queries, n_keys)
        reaches_first = self.left is None or n_keys - 1 - self.left <= first
        reaches_last = self.right is None or n_keys - n_queries + self.right >= last - 1
        return reaches_first and reaches_last

    def mask(self, positions: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Return ``[queries, keys]``: True where a query at a position attends to a key."""
        ahead = keys[None, :] - positions[:, None]
        mask = torch.ones_like(ahead, dtype=torch.bool)
        if self.left is not None:
            mask &= ahead >= -self.left
        if self.right is not None:
            mask &= ahead <= self.right
        return mask


def alibi_bias(slopes: torch.Tensor, positions: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Return ``[batch or 1, heads, queries, keys]``, fp32: ``-slope * |position - key|``."""
    distance = (positions[:, None] - keys[None, :]).abs().float()
    return -slopes.float().reshape(-1, slopes.shape[-1], 1, 1) * distance
