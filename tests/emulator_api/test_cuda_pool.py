"""Pools on "cuda:0" over the driver emulator (tests/emulator). Nothing here is a GPU result.

Started by `make test-emulator`, which puts the emulator's libcuda.so.1 first on LD_LIBRARY_PATH.
torch for the CPU cannot show the tensors, so bytes are read and written through the emulator.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from device import load_emulator

import kvspan

emulator = load_emulator()
pytestmark = pytest.mark.skipif(
    emulator is None, reason="the emulator's libcuda.so.1 is not first on LD_LIBRARY_PATH"
)

RECORD = 2 * 2 * 2 * 64 * 2  # layers, planes, heads, dim, bytes: 1 KiB a token


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """Start over, and look for what was done wrong or left behind."""
    assert emulator is not None
    assert emulator.kvspan_emulator_reset(None) == 0
    yield
    emulator.kvspan_emulator_violations.restype = ctypes.c_ulonglong
    assert emulator.kvspan_emulator_violations() == 0
    assert emulator.kvspan_emulator_reset(None) == 0  # refused unless the ledger is empty


def cache_of(pool: kvspan.Pool, **options: object) -> kvspan.KVCache:
    return kvspan.KVCache(pool, 2, 2, 64, torch.bfloat16, max_seqs=4, max_seq_len=65536, **options)


def address(cache: kvspan.KVCache, sequence: kvspan.Sequence, position: int) -> int:
    strides = 65536 + cache.overread_tokens
    page = cache.pool.page_size
    slot_bytes = -(-strides * RECORD // page) * page
    return cache.view(0, 0).address + sequence.slot * slot_bytes + position * RECORD


def let_streams_finish() -> None:
    """Wait for what is queued: the next two functions reach past the streams."""
    assert emulator is not None
    ledger = (ctypes.c_ulonglong * 11)()
    emulator.kvspan_emulator_ledger(ledger)
    while ledger[9] != 0:  # pending operations
        time.sleep(1e-4)
        emulator.kvspan_emulator_ledger(ledger)


def poke(at: int, data: bytes) -> None:
    assert emulator is not None
    let_streams_finish()
    assert emulator.kvspan_emulator_poke(ctypes.c_ulonglong(at), data, len(data)) == 0


def peek(at: int, n: int) -> bytes:
    assert emulator is not None
    let_streams_finish()
    out = ctypes.create_string_buffer(n)
    assert emulator.kvspan_emulator_peek(ctypes.c_ulonglong(at), out, n) == 0
    return out.raw


def wait_until(comes_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not comes_true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_request_from_prompt_to_release() -> None:
    with (
        kvspan.Pool("cuda:0", capacity="256MiB", background=False) as pool,
        cache_of(pool) as cache,
    ):
        assert cache.view(0, 0).__dlpack_device__() == (2, 0)
        sequence = cache.sequence()
        sequence.extend(10_000)
        calls = cache.stats().calls
        # 10,128 tokens of 1 KiB are five pages: a frame of four and one of one.
        assert calls["map"] == (2, 2)
        assert calls["set_access"].handles == 2
        poke(address(cache, sequence, 9_999), b"last token")
        for _ in range(112):
            sequence.extend(1)
        assert cache.stats().calls["map"] == (2, 2)
        assert peek(address(cache, sequence, 9_999), 10) == b"last token"
        sequence.release()


def test_a_fork_shares_whole_frames_and_copies_the_rest() -> None:
    with (
        kvspan.Pool("cuda:0", capacity="256MiB", background=False) as pool,
        cache_of(pool) as cache,
    ):
        parent = cache.sequence()
        parent.extend(9_000)
        poke(address(cache, parent, 100), b"shared")
        poke(address(cache, parent, 8_999), b"tail")
        child = parent.fork()
        assert cache.stats().shared_bytes == 8 << 20
        poke(address(cache, parent, 8_999), b"mine")
        child.extend(1)
        child.release()  # waits for nothing; what it shared stays with the parent
        assert peek(address(cache, parent, 100), 6) == b"shared"
        parent.truncate(50)
        parent.extend(1)
        parent.release()


def test_the_background_maps_ahead() -> None:
    with kvspan.Pool("cuda:0", capacity="256MiB") as pool, cache_of(pool) as cache:
        sequence = cache.sequence()
        sequence.extend(1)
        for page in (1, 2, 3):
            sequence.extend(2048 * page - 128 - 4 - len(sequence))  # four tokens of room
            late = cache.stats().n_grown_late
            wait_until(lambda n=page + 1: cache.stats().mapped_bytes == n * pool.page_size)
            for _ in range(8):
                sequence.extend(1)
            assert cache.stats().n_grown_late == late
        wait_until(lambda: pool.stats().free_bytes > 0)  # frames that are ready
        sequence.release()


def test_running_out_of_memory_changes_nothing() -> None:
    with kvspan.Pool("cuda:0", capacity="16MiB", background=False) as pool, cache_of(pool) as cache:
        sequence = cache.sequence()
        sequence.extend(8_000)
        before = cache.stats().mapped_bytes
        with pytest.raises(kvspan.OutOfMemory, match="the pool's capacity is 16 MiB"):
            sequence.extend(20_000)
        assert (len(sequence), cache.stats().mapped_bytes) == (8_000, before)
        sequence.release()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"device": "cuda:7"}, "there is no cuda:7: the driver sees"),
        ({"page_size": "1MiB"}, "page_size on cuda:0 is a power of two from 2 MiB to 64 MiB"),
        ({"peers": [0]}, "cuda:0 cannot be a peer of cuda:0"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(kvspan.InvalidArgument, match=says):
        kvspan.Pool(**{"device": "cuda:0", "capacity": "64MiB", **options})  # type: ignore[arg-type]


def test_a_cache_that_reads_as_zeros_is_refused_and_says_what_to_do() -> None:
    with (
        kvspan.Pool("cuda:0", capacity="64MiB", background=False) as pool,
        pytest.raises(kvspan.InvalidArgument, match="needs static_len"),
    ):
        kvspan.KVCache(pool, 1, 1, 64, max_seqs=1, max_seq_len=64, unmapped="zero")


def read_kernel(stream: int, at: int, size: int) -> ctypes.c_ulonglong:
    """Queue a kernel that reads all of a range, in FlashAttention's tiles, for a millisecond."""
    assert emulator is not None
    token = ctypes.c_ulonglong()
    assert (
        emulator.kvspan_emulator_read_kernel(
            ctypes.c_void_p(stream),
            ctypes.c_ulonglong(at),
            ctypes.c_size_t(size),
            ctypes.c_size_t(128 * RECORD),
            ctypes.c_double(1000.0),
            ctypes.byref(token),
        )
        == 0
    )
    return token


@pytest.fixture
def context(clean: None) -> Iterator[None]:
    """Make the device's context current, as torch does for whoever launches kernels."""
    assert emulator is not None
    handle = ctypes.c_void_p()
    assert emulator.cuInit(0) == 0
    assert emulator.cuDevicePrimaryCtxRetain(ctypes.byref(handle), 0) == 0
    assert emulator.cuCtxPushCurrent_v2(handle) == 0
    yield
    assert emulator.cuCtxPopCurrent_v2(ctypes.byref(handle)) == 0
    assert emulator.cuDevicePrimaryCtxRelease_v2(0) == 0


@pytest.mark.usefixtures("context")
@pytest.mark.parametrize("background", [False, True])
def test_kernels_of_static_shape_read_zeros_in_their_window(background: bool) -> None:
    static_len = 16_384
    with (
        kvspan.Pool("cuda:0", capacity="256MiB", background=background) as pool,
        cache_of(pool, unmapped="zero", static_len=static_len) as cache,
    ):
        assert cache.stats().zero_bytes == pool.stats().in_use_bytes > 0
        rows = [cache.sequence() for _ in range(3)]
        for i, row in enumerate(rows):
            row.extend(100 + i)
        for step in range(3000):
            # Every row's whole window, whatever its length, is being read while rows grow.
            if step % 100 == 0:
                for row in rows:
                    read_kernel(0, address(cache, row, 0), static_len * RECORD)
            for row in rows:
                row.extend(1)
        rows[0].truncate(5)
        read_kernel(0, address(cache, rows[0], 0), static_len * RECORD)
        rows[1].fork().release()
        cache.trim()
        rows[0].extend(40)
        for row in rows:
            window = peek(address(cache, row, 0), static_len * RECORD)
            tail = -(-(row.length + cache.overread_tokens) * RECORD // pool.page_size)
            assert not any(window[tail * pool.page_size :])
        for row in rows:
            row.release()
    # The fixture finds no kernel that read what was not mapped, and nothing unmapped under one.


@pytest.mark.parametrize(
    ("capacity", "error"), [("256MiB", kvspan.OutOfMemory), ("2GiB", kvspan.CapacityError)]
)
def test_a_window_that_takes_too_much_is_refused(capacity: str, error: type[Exception]) -> None:
    with kvspan.Pool("cuda:0", capacity=capacity, max_frame_size="2MiB", background=False) as pool:
        with pytest.raises(error, match="lower static_len or max_seqs"):
            kvspan.KVCache(
                pool, 32, 8, 128, max_seqs=512, max_seq_len=65536, unmapped="zero", static_len=16384
            )
        assert pool.stats().in_use_bytes == 0
        assert pool.stats().n_mappings == 0


@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="this torch can show them")
def test_a_torch_without_cuda_is_told_so() -> None:
    with (
        kvspan.Pool("cuda:0", capacity="256MiB", background=False) as pool,
        cache_of(pool) as cache,
    ):
        for use in (lambda: cache.layer(0), lambda: cache.batch(2)):
            with pytest.raises(kvspan.InvalidArgument, match="built without CUDA"):
                use()
        assert cache.stats().n_sequences == 0


def test_many_windows_share_several_frames_of_zeros() -> None:
    # 8,192 mappings of single pages: more than a driver takes of one handle in one reservation.
    with (
        kvspan.Pool("cuda:0", capacity="256MiB", max_frame_size="2MiB", background=False) as pool,
        kvspan.KVCache(
            pool, 2, 2, 64, max_seqs=1024, max_seq_len=65536, unmapped="zero", static_len=16_384
        ) as cache,
    ):
        assert pool.stats().n_mappings == 1024 * 8 + cache.stats().zero_bytes // pool.page_size
        assert cache.stats().zero_bytes > pool.page_size
