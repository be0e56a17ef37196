"""CUDA graphs: kvspan spoils nobody's capture, and refuses a stream that is being captured.

The emulator only declares streams captured; real graphs are in tests/gpu.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from test_cuda_pool import clean, emulator  # noqa: F401 (a fixture)

import kvspan

pytestmark = pytest.mark.skipif(
    emulator is None, reason="the emulator's libcuda.so.1 is not first on LD_LIBRARY_PATH"
)

GLOBAL, NON_BLOCKING = 0, 1  # CU_STREAM_CAPTURE_MODE_GLOBAL, torch's default


@contextmanager
def cache_of() -> Iterator[kvspan.KVCache]:
    """With the background at work."""
    with (
        kvspan.Pool("cuda:0", capacity="256MiB") as pool,
        kvspan.KVCache(pool, 2, 2, 64, torch.bfloat16, max_seqs=4, max_seq_len=65536) as made,
    ):
        yield made


@contextmanager
def captured() -> Iterator[int]:
    """The handle of a stream that this thread captures."""
    assert emulator is not None
    context, stream = ctypes.c_void_p(), ctypes.c_void_p()
    emulator.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
    emulator.cuCtxPushCurrent_v2(context)
    assert emulator.cuStreamCreate(ctypes.byref(stream), NON_BLOCKING) == 0
    assert emulator.kvspan_emulator_begin_capture(stream, GLOBAL) == 0
    yield stream.value or 0
    emulator.kvspan_emulator_end_capture()
    emulator.cuStreamDestroy_v2(stream)
    emulator.cuCtxPopCurrent_v2(ctypes.byref(context))
    emulator.cuDevicePrimaryCtxRelease_v2(0)


def test_work_goes_on_beside_a_capture() -> None:
    with cache_of() as cache, captured():
        for _ in range(3):
            sequence = cache.sequence()
            for _ in range(3):
                sequence.extend(3000)
            sequence.fork().release()
            sequence.truncate(100)
            sequence.release()
            cache.trim()
            cache.pool.trim()


def test_a_captured_stream_is_refused_and_all_stays() -> None:
    with cache_of() as cache, captured() as stream:
        sequence = cache.sequence()
        sequence.extend(3000)
        calls: list[Callable[[], Any]] = [
            lambda: sequence.fork(stream=stream),
            lambda: sequence.truncate(10, stream=stream),
            lambda: sequence.release(stream=stream),
        ]
        before = cache.page_map()
        for call in calls:
            with pytest.raises(kvspan.InvalidArgument, match="captured into a CUDA graph"):
                call()
        assert (len(sequence), cache.stats().n_sequences) == (3000, 1)
        assert [entry for entry in cache.page_map() if entry.slot == sequence.slot] == before
        sequence.fork().release()
        sequence.truncate(10)
        sequence.release()
        assert cache.stats().n_sequences == 0
