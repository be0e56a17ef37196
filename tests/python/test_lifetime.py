"""Objects may go in any order, from any thread, at any time: nothing crashes and nothing leaks.

After each test nothing may be left that was not there before (conftest.py looks).
"""

from __future__ import annotations

import gc
import itertools
import random
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from device import (
    IS_HOST,
    PAGE,
    SCALE,
    Holdings,
    holdings,
    not_on_a_gpu,
    only_on_the_host,
    run_program,
)

import kvspan

pytestmark = not_on_a_gpu("nobody else's account of its memory is exact")


@pytest.fixture(autouse=True, scope="module")
def nothing_of_others_goes_meanwhile() -> None:
    gc.collect()


@pytest.fixture
def before(nothing_is_left: Holdings) -> Holdings:
    """What there is beforehand, of other tests' pools."""
    return nothing_is_left


def make() -> dict[str, Any]:
    """Make one of everything, and write sevens."""
    pool = kvspan.Pool(capacity=32 * PAGE, page_size=PAGE)
    cache = kvspan.KVCache(pool, 1, 5, 32 * SCALE, torch.float32, max_seqs=4, max_seq_len=400)
    batch = cache.batch(2)
    batch.step(60)
    tensor = cache.layer(0)[0]
    tensor[:2, :60] = 7
    return {
        "pool": pool,
        "cache": cache,
        "batch": batch,
        "tensor": tensor,
        "lengths": batch.lengths,
    }


@pytest.mark.parametrize(
    "order", list(itertools.permutations(["pool", "cache", "batch", "tensor"]))
)
def test_any_order(order: tuple[str, ...], before: Holdings) -> None:
    things = make()
    for name in order:
        del things[name]
        if "tensor" in things and "batch" in things:  # it holds the sequences, and they the pages
            things["tensor"][0, 59] = 8
        if "batch" in things:
            assert things["batch"].step().tolist() == things["lengths"].sub(1).tolist()
            things["batch"].select([1, 0])
        if "cache" in things:
            assert things["cache"].stats().n_sequences == (2 if "batch" in things else 0)
        if "pool" in things and "cache" in things and "batch" not in things:
            things["cache"].trim()
            assert things["pool"].stats().in_use_bytes == 0
    assert things["lengths"].tolist() == [60 + order.index("batch")] * 2
    # The array lives on, which a GPU has memory of its own for.
    assert holdings() == before if IS_HOST else holdings().n_mappings == before.n_mappings


@pytest.mark.parametrize(
    "order", list(itertools.permutations(["pool", "cache", "tensor", "sequence"]))
)
def test_close_at_any_time_leaves_the_bytes(order: tuple[str, ...], before: Holdings) -> None:
    things = make()
    things["sequence"] = things.pop("batch").sequences[0]
    tensor: torch.Tensor = things["tensor"]
    things["cache"].close()
    things["pool"].close()
    for name in order:
        del things[name]
        assert (tensor[0, :60] == 7).all()
        tensor[0, 0] = 7
    assert holdings().n_bytes > before.n_bytes


def test_everything_raises_after_close() -> None:
    things = make()
    cache, batch, pool = things["cache"], things["batch"], things["pool"]
    sequence = batch.sequences[0]
    cache.close()
    pool.close()
    for call in (
        cache.sequence,
        cache.stats,
        cache.trim,
        cache.page_map,
        lambda: cache.layer(0),
        lambda: cache.view(0, 0),
        lambda: cache.batch(1),
        lambda: sequence.extend(1),
        lambda: sequence.truncate(0),
        sequence.fork,
        batch.step,
        pool.stats,
        pool.trim,
    ):
        with pytest.raises(kvspan.ReleasedError):
            call()
    for again in (cache.close, pool.close, sequence.release):
        again()
    assert sequence.is_released
    assert [repr(thing) for thing in (cache, pool, sequence)] == [
        "<kvspan.KVCache, closed>",
        "<kvspan.Pool, closed>",
        "<kvspan.Sequence, released>",
    ]


def test_closing_a_pool_leaves_its_caches_at_work() -> None:
    things = make()
    things["pool"].close()
    cache = things["cache"]
    sequence = cache.sequence()
    sequence.extend(300)
    assert sequence.fork().length == 300
    with pytest.raises(kvspan.ReleasedError):
        kvspan.KVCache(things["pool"], 1, 1, 16, max_seqs=1, max_seq_len=1)


@only_on_the_host("what is resident is the kernel's account")
def test_memory_really_returns(before: Holdings) -> None:
    def resident_shared() -> int:
        found = re.search(r"RssShmem:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found
        return int(found[1]) << 10

    resident = resident_shared()
    pool = kvspan.Pool(capacity="64MiB", page_size="2MiB")
    cache = kvspan.KVCache(pool, 4, 8, 64, max_seqs=4, max_seq_len=8192)
    sequence = cache.sequence()
    sequence.extend(4096)  # 32 MiB
    planes = [plane for i in range(4) for plane in sequence.layer(i)]
    for plane in planes:
        plane.fill_(1)
    assert resident_shared() - resident >= 32 << 20
    del plane, planes
    sequence.release()
    cache.trim()
    assert pool.trim() >= 32 << 20
    assert resident_shared() - resident < 1 << 20  # given back while everybody lives
    assert holdings().n_bytes == before.n_bytes
    sequence = cache.sequence()
    sequence.extend(4096)
    del sequence, cache, pool
    assert resident_shared() - resident < 1 << 20  # and when all are gone
    assert holdings() == before


def test_last_reference_goes_on_another_thread(before: Holdings) -> None:
    things = make()
    keeper = [things.pop("tensor")]
    things.clear()
    assert holdings().n_bytes > before.n_bytes
    thread = threading.Thread(target=keeper.clear)
    thread.start()
    thread.join()
    assert holdings() == before


def test_in_a_cycle(before: Holdings) -> None:
    things = make()
    things["cache"].myself = things
    things["itself"] = things
    del things
    assert holdings().n_bytes > before.n_bytes
    gc.collect()
    assert holdings() == before


def test_dropping_a_sequence_releases_it() -> None:
    cache = make()["cache"]
    assert cache.stats().n_sequences == 0  # the batch is gone already
    sequence = cache.sequence()
    child = sequence.fork()
    assert cache.stats().n_sequences == 2
    del sequence
    assert cache.stats().n_sequences == 1
    del child
    assert cache.stats().n_sequences == 0


def test_close_while_threads_work() -> None:
    """Seeded load: four threads that grow, fork and drop sequences until the cache is gone."""
    for seed in range(10):
        pool = kvspan.Pool(capacity=64 * PAGE, page_size=PAGE)
        cache = kvspan.KVCache(pool, 1, 5, 32 * SCALE, torch.float32, max_seqs=16, max_seq_len=400)
        ends: list[BaseException] = []

        def work(seed: int, cache: Any = cache, ends: Any = ends) -> None:
            rng = random.Random(seed)
            try:
                while True:
                    try:
                        sequence = cache.sequence()
                        for _ in range(rng.randrange(6)):
                            sequence.extend(rng.randrange(1, 60))
                        child = sequence.fork()
                        sequence.truncate(rng.randrange(sequence.length + 1))
                        child.extend(1)
                    except (kvspan.OutOfMemory, kvspan.CapacityError):
                        continue
            except BaseException as error:
                ends.append(error.with_traceback(None))

        threads = [threading.Thread(target=work, args=(seed * 4 + i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        while cache.stats().n_sequences == 0:
            assert not ends
        time.sleep(0.002 * seed)
        cache.close()
        for thread in threads:
            thread.join()
        assert [type(end) for end in ends] == [kvspan.ReleasedError] * 4
        assert pool.stats().in_use_bytes == 0
        del threads, ends


SHUTDOWN = """
import sys, threading, time, torch, kvspan
from device import IS_HOST, PAGE, SCALE
pool = kvspan.Pool(capacity=256 * PAGE, page_size=PAGE)
cache = kvspan.KVCache(pool, 2, 1, 64 * SCALE, torch.float32, max_seqs=8, max_seq_len=4096)
batch = cache.batch(4)
rows = batch.sequences
k, v = cache.layer(0)
capsule = cache.view(0, 0).__dlpack__()
batch.step(50)
def work(mine):
    while True:
        mine.step()
        if mine.sequences[0].length > 1000:  # no torch here: its own calls do not survive this
            for row in mine.sequences: row.truncate(0)
"""


@pytest.mark.parametrize(
    "body",
    [
        "",
        """
for _ in range(2): threading.Thread(target=work, args=(cache.batch(2),), daemon=True).start()
time.sleep(0.02)
""",
        "sys.modules['keep'] = [k, batch]; k.me = k, batch; del cache, pool",
        "import atexit; atexit.register(cache.close); atexit.register(batch.step); sys.exit(0)",
    ],
    ids=["globals", "daemon threads", "kept by sys.modules", "atexit"],
)
def test_interpreter_shutdown(body: str) -> None:
    done = run_program(SHUTDOWN + body)
    assert (done.returncode, done.stderr) == (0, "")
