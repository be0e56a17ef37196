"""CUDA graphs over a cache: addresses stay, lengths and slots are read at each replay."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import kvspan

DEVICE = "cuda:0"


def warmed_up(body: Callable[[], Any]) -> None:
    """Run once on a side stream, as torch asks before a capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        body()
    torch.cuda.current_stream().wait_stream(side)


def captured(body: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    warmed_up(body)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # capture_error_mode="global", the strictest
        body()
    return graph


@pytest.mark.parametrize("background", [True, False])
def test_replays_see_lengths_slots_and_pages_of_now(background: bool) -> None:
    """Pages are mapped under a graph that was captured before there were any."""
    pool = kvspan.Pool(DEVICE, capacity="1GiB", background=background)
    cache = kvspan.KVCache(pool, 1, 8, 128, torch.float16, max_seqs=8, max_seq_len=16384)
    others = [cache.sequence() for _ in range(3)]
    rows = [cache.sequence() for _ in range(3)]
    others[1].release()
    for row, length in zip(rows, (1, 500, 1030), strict=True):
        row.extend(length)
    batch = cache.batch(rows[::-1])
    k, _ = cache.layer(0)
    lengths, slots = batch.lengths, batch.slots
    out = torch.zeros(3, 8, 128, device=DEVICE, dtype=torch.float16)

    def last_tokens() -> None:
        out.copy_(k[slots.long(), lengths.long() - 1])

    graph = captured(last_tokens)
    address, mapped = k.data_ptr(), cache.stats().mapped_bytes
    for step in range(1, 1200):
        before = batch.step()
        k[slots.long(), before.long()] = float(step)
        graph.replay()
        if step % 100 == 0:
            assert (out == step).all()
    assert (out == 1199).all()
    assert k.data_ptr() == address
    assert cache.stats().mapped_bytes > mapped
    assert lengths.tolist() == [1030 + 1199, 500 + 1199, 1 + 1199]
    rows[0].truncate(3)
    k[rows[0].slot, 2] = 7
    assert batch.lengths.tolist()[2] == 3  # which brings the array up to date
    graph.replay()
    assert (out[2] == 7).all()


def test_kvspan_at_work_spoils_no_capture(pool: kvspan.Pool) -> None:
    """Another thread creates, maps, asks and unmaps all the while, and the background as well."""
    cache = kvspan.KVCache(pool, 1, 8, 128, torch.float16, max_seqs=8, max_seq_len=16384)
    stop, failures = threading.Event(), []
    stream = torch.cuda.Stream()

    def work() -> None:
        try:
            while not stop.is_set():
                with cache.sequence(stream=stream) as sequence:
                    for _ in range(4):
                        sequence.extend(1000, stream=stream)
                    sequence.fork(stream=stream).release(stream=stream)
                    sequence.release(stream=stream)
                cache.trim()
                pool.trim()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        x = torch.zeros(1 << 20, device=DEVICE)
        for _ in range(20):
            graph = captured(lambda: [x.add_(1) for _ in range(200)])
            x.zero_()
            graph.replay()
            assert (x == 200).all()
    finally:
        stop.set()
        thread.join()
    assert failures == []


def test_a_stream_that_is_captured_is_refused_and_all_stays(cache: kvspan.KVCache) -> None:
    batch = cache.batch(2)
    batch.step(300)
    sequence = batch.sequences[0]
    x = torch.zeros(8, device=DEVICE)

    def body() -> None:
        x.add_(1)
        if not torch.cuda.is_current_stream_capturing():
            return
        calls: list[Callable[[], Any]] = [
            batch.step,
            sequence.fork,
            sequence.release,
            lambda: sequence.truncate(10),
        ]
        for call in calls:
            with pytest.raises(kvspan.InvalidArgument, match="captured into a CUDA graph"):
                call()

    graph = captured(body)
    x.zero_()
    graph.replay()
    assert (x == 1).all()
    assert [len(row) for row in batch.sequences] == [300, 300]
    assert cache.stats().n_sequences == 2
    assert batch.step().tolist() == [300, 300]
    assert len(sequence.fork()) == 301
