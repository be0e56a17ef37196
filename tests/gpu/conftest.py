"""What only a GPU shows: real kernels, graphs, streams and memory that runs out.

    pytest -m gpu tests/gpu

Everything here is skipped, with the reason, where there is no CUDA device that torch can use; the
driver emulator is none. docs/gpu.md says what else to run on a GPU, and how.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import kvspan
from kvspan._gpu import look_for_gpu

DEVICE = "cuda:0"
HERE = Path(__file__).parent


def why_not() -> str:
    found = look_for_gpu()
    if not found.usable:
        return found.why_not
    return "" if torch.cuda.is_available() else "torch.cuda.is_available() says no"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = why_not()
    for item in items:
        if not item.path.is_relative_to(HERE):
            continue
        item.add_marker(pytest.mark.gpu)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def nothing_is_pending() -> Iterator[None]:
    """An error of a kernel shows at the next synchronisation: let it be this test's."""
    yield
    torch.cuda.synchronize()


@pytest.fixture
def pool() -> Iterator[kvspan.Pool]:
    with kvspan.Pool(DEVICE, capacity="1GiB") as made:
        yield made


@pytest.fixture
def cache(pool: kvspan.Pool) -> Iterator[kvspan.KVCache]:
    """Two layers of Llama-3-8B's shape in a lane: 256 tokens in a page of 2 MiB."""
    with kvspan.KVCache(pool, 2, 8, 128, torch.float16, max_seqs=8, max_seq_len=16384) as made:
        yield made
