"""A kvspan cache with sequences of given lengths, for the tests of attention over it."""

from __future__ import annotations

from typing import Any

import torch

import kvspan


class Cached:
    """Rows of a cache's last layer, poisoned behind every length, and what is in them."""

    def __init__(
        self,
        lengths: list[int],
        dtype: torch.dtype = torch.float32,
        layers_per_page: int = 2,
        *,
        n_kv_heads: int = 2,
        head_dim: int = 32,
        max_seq_len: int = 512,
        layers: list[kvspan.LayerSpec] | None = None,
        **options: Any,
    ) -> None:
        if layers is None:
            layers = [kvspan.LayerSpec(n_kv_heads, head_dim, dtype)] * 2
        self.lengths = lengths
        self.pool = kvspan.Pool(capacity="512MiB", page_size="64KiB")
        self.cache = kvspan.KVCache(
            self.pool,
            layers=layers,
            max_seqs=len(lengths) + 3,
            max_seq_len=max_seq_len,
            layers_per_page=layers_per_page,
            **options,
        )
        spare = self.cache.sequence()  # so that slots are not 0, 1, 2
        self.sequences = [self.cache.sequence() for _ in lengths][::-1]
        spare.release()
        self.k, self.v = self.cache.layer(len(layers) - 1)
        for sequence, n in zip(self.sequences, lengths, strict=True):
            sequence.extend(n + 8)
            for plane in (self.k, self.v):
                plane[sequence.slot, :n] = torch.randn(n, *plane.shape[2:]).to(dtype)
                plane[sequence.slot, n : n + 8] = torch.nan  # mapped, and none of anybody's
        self.batch = self.cache.batch(self.sequences)
        self.seqlens = torch.tensor(lengths, dtype=torch.int32)

    def row(self, i: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return copies of the first n keys and values of a row."""
        slot = self.sequences[i].slot
        return self.k[slot, :n].clone(), self.v[slot, :n].clone()
