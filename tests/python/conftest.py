"""What the tests of the package share: small pools, and caches whose records straddle pages."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import device
import pytest
import torch
from device import IS_HOST, PAGE, SCALE

import kvspan

# No device changes these.
if not IS_HOST:
    collect_ignore = [
        *("demo", "test_bench_harness.py", "test_cli.py", "test_frame_pool.py", "test_layers.py"),
        *("test_readme.py", "test_stubs.py"),
    ]


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[device.Holdings]:
    """What the process has of pools beforehand; the same is left, and no rule was broken."""
    before = device.holdings()
    yield before
    request.node.funcargs.clear()  # pytest keeps what the other fixtures gave
    if device.holdings() != before:
        gc.collect()  # of frames, too
    assert device.take_violations() == []
    assert device.holdings() == before


@pytest.fixture
def pool() -> Iterator[kvspan.Pool]:
    """64 pages: of 64 KiB on a host."""
    with kvspan.Pool(capacity=64 * PAGE, page_size=PAGE) as made:
        yield made


@pytest.fixture
def cache(pool: kvspan.Pool) -> Iterator[kvspan.KVCache]:
    """Two layers in one lane, 51.2 tokens a page: records of 1,280 B on a host."""
    with kvspan.KVCache(
        pool,
        n_layers=2,
        n_kv_heads=5,
        head_dim=16 * SCALE,
        dtype=torch.float32,
        max_seqs=8,
        max_seq_len=1000,
        layers_per_page=2,
    ) as made:
        yield made
