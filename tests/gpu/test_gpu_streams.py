"""Order between kernels and what is done to pages: by events, without waiting for the device."""

from __future__ import annotations

import time

import pytest
import torch

import kvspan

DEVICE = "cuda:0"
PAGE = 2 << 20
TOKENS = 512  # a page of `cache_of`: K and V of 8 heads, 128 wide, in float16


def cache_of(pool: kvspan.Pool, max_seqs: int = 8) -> kvspan.KVCache:
    return kvspan.KVCache(
        pool,
        *(1, 8, 128, torch.float16),
        max_seqs=max_seqs,
        max_seq_len=16384,
        overread_tokens=0,
    )


def keep_busy(stream: torch.cuda.Stream) -> None:
    """Queue a kernel of half a second or so."""
    with torch.cuda.stream(stream):
        torch.cuda._sleep(1_000_000_000)


def read_later(stream: torch.cuda.Stream, sequence: kvspan.Sequence) -> torch.Tensor:
    """Queue a kernel behind a long one that adds up all of a sequence's K."""
    k, _ = sequence.layer(0)
    with torch.cuda.stream(stream):
        k.sum(dtype=torch.float64)  # a kernel's first use loads it, which may wait for the device
    keep_busy(stream)
    with torch.cuda.stream(stream):
        return k.sum(dtype=torch.float64)


def filled(
    cache: kvspan.KVCache, n_tokens: int, value: float, stream: torch.cuda.Stream
) -> kvspan.Sequence:
    sequence = cache.sequence(n_tokens, stream=stream)
    sequence.extend(n_tokens, stream=stream)
    with torch.cuda.stream(stream):
        for plane in sequence.layer(0):
            plane.fill_(value)
    return sequence


@pytest.fixture
def streams() -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    return torch.cuda.Stream(), torch.cuda.Stream()


Streams = tuple[torch.cuda.Stream, torch.cuda.Stream]


@pytest.mark.parametrize("background", [True, False])
def test_the_next_in_a_slot_comes_after_its_readers(streams: Streams, background: bool) -> None:
    first, second = streams
    pool = kvspan.Pool(DEVICE, capacity="256MiB", background=background)
    cache = cache_of(pool, max_seqs=1)
    old = filled(cache, 4 * TOKENS, 1, first)
    seen = read_later(first, old)
    old.release(stream=first)
    new = filled(cache, 4 * TOKENS, 2, second)
    assert new.slot == 0
    torch.cuda.synchronize()
    assert seen.item() == 4 * TOKENS * 8 * 128
    assert all((plane == 2).all() for plane in new.layer(0))


@pytest.mark.parametrize("how", ["release", "truncate"])
def test_pages_that_others_need_are_taken_after_their_readers(streams: Streams, how: str) -> None:
    first, second = streams
    pool = kvspan.Pool(
        DEVICE, capacity=8 * PAGE, page_size=PAGE, max_frame_size=PAGE, background=False
    )
    cache = cache_of(pool)
    old = filled(cache, 8 * TOKENS, 1, first)
    seen = read_later(first, old)
    if how == "release":
        old.release(stream=first)
    else:
        old.truncate(TOKENS, stream=first)
    new = filled(cache, 7 * TOKENS, 2, second)  # there are no others: it waits for the fence
    torch.cuda.synchronize()
    assert seen.item() == 8 * TOKENS * 8 * 128
    assert all((plane == 2).all() for plane in new.layer(0))
    if how == "truncate":
        assert all((plane == 1).all() for plane in old.layer(0))


def test_a_fork_copies_what_was_queued_before_it(streams: Streams) -> None:
    first, _ = streams
    cache = cache_of(kvspan.Pool(DEVICE, capacity="256MiB"))
    parent = filled(cache, 2 * TOKENS + 100, 1, first)
    k, _ = parent.layer(0)
    keep_busy(first)
    with torch.cuda.stream(first):
        k[2 * TOKENS :] = 5  # the tail, after the long kernel
    child = parent.fork(stream=first)
    with torch.cuda.stream(first):
        k[2 * TOKENS :] = 6  # the parent's own from here on
        mine = child.layer(0)[0].clone()
    torch.cuda.synchronize()
    assert (mine[: 2 * TOKENS] == 1).all()
    assert (mine[2 * TOKENS :] == 5).all()


def test_nothing_but_close_waits_for_the_device(streams: Streams) -> None:
    """What a server does meanwhile, beside a long kernel on another stream."""
    busy, mine = streams
    pool = kvspan.Pool(DEVICE, capacity="512MiB")
    cache = cache_of(pool)
    reader = filled(cache, 4 * TOKENS, 1, busy)
    other = filled(cache, 4 * TOKENS + 10, 1, mine)
    batch = cache.batch([other], stream=mine)
    batch.step(stream=mine)
    other.fork(stream=mine).release(stream=mine)  # what is done for the first time may wait
    torch.cuda.synchronize()
    seen = read_later(busy, reader)

    def took(call: object, *args: object, **options: object) -> float:
        begin = time.perf_counter()
        call(*args, **options)  # type: ignore[operator]
        return time.perf_counter() - begin

    times = {
        "release": took(reader.release, stream=busy),
        "step": took(batch.step, stream=mine),
        "extend": took(other.extend, 3 * TOKENS, stream=mine),
        "truncate": took(other.truncate, TOKENS, stream=mine),
        "fork": took(other.fork, stream=mine),
        "sequence": took(cache.sequence, stream=mine),
        "batch": took(cache.batch, [other], stream=mine),
        "stats": took(cache.stats),
    }
    begin = time.perf_counter()
    del batch
    times["del batch"] = time.perf_counter() - begin
    assert not busy.query(), f"the long kernel is over; calls took {times}"
    assert max(times.values()) < 0.2, times
    torch.cuda.synchronize()
    assert seen.item() == 4 * TOKENS * 8 * 128


def test_streams_may_come_as_handles_or_from_the_context(streams: Streams) -> None:
    stream, _ = streams
    cache = cache_of(kvspan.Pool(DEVICE, capacity="256MiB"))
    with torch.cuda.stream(stream):
        sequence = cache.sequence()
        sequence.extend(10)
        sequence.layer(0)[0].fill_(3)
        child = sequence.fork()  # torch's current stream
    other = sequence.fork(stream=stream.cuda_stream)
    stream.synchronize()
    for one in (child, other):
        assert (one.layer(0)[0] == 3).all()
