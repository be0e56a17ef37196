"""What the tests of the package share: small pools, and caches whose records straddle pages."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import kvspan

PAGE = 64 << 10


@pytest.fixture
def pool() -> Iterator[kvspan.Pool]:
    """64 pages of 64 KiB."""
    with kvspan.Pool(capacity=64 * PAGE, page_size=PAGE) as made:
        yield made


@pytest.fixture
def cache(pool: kvspan.Pool) -> Iterator[kvspan.KVCache]:
    """Two layers in one lane, records of 1,280 B: 51.2 tokens a page."""
    with kvspan.KVCache(
        pool,
        n_layers=2,
        n_kv_heads=5,
        head_dim=16,
        dtype=torch.float32,
        max_seqs=8,
        max_seq_len=1000,
    ) as made:
        yield made
