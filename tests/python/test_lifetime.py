"""Objects may go in any order, from any thread, at any time: nothing crashes and nothing leaks."""

from __future__ import annotations

import gc
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import kvspan

PAGE = 64 << 10


def shared_memory_bytes() -> int:
    """Return how much memory the memfds of this process hold."""
    total = 0
    for fd in Path("/proc/self/fd").iterdir():
        try:
            if "memfd:" in os.readlink(fd):
                total += os.stat(fd).st_blocks * 512
        except OSError:  # the listing's own descriptor
            continue
    return total


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    gc.collect()
    before = shared_memory_bytes()
    yield
    gc.collect()
    assert shared_memory_bytes() == before


def make(dtype: torch.dtype = torch.float32) -> dict[str, object]:
    """Make one of everything, with 60 tokens of sevens."""
    pool = kvspan.Pool(capacity=16 * PAGE, page_size=PAGE)
    cache = kvspan.KVCache(pool, 1, 5, 32, dtype, max_seqs=4, max_seq_len=400)
    sequence = cache.sequence()
    sequence.extend(60)
    tensor = cache.layer(0)[0]
    tensor[sequence.slot, :60].view(torch.uint8)[:] = 7
    return {"pool": pool, "cache": cache, "sequence": sequence, "tensor": tensor}


@pytest.mark.parametrize(
    "order", list(itertools.permutations(["pool", "cache", "sequence", "tensor"]))
)
def test_any_order(order: tuple[str, ...]) -> None:
    things = make()
    for name in order:
        del things[name]
        gc.collect()
        if "tensor" in things and "sequence" in things:
            tensor = things["tensor"]
            assert isinstance(tensor, torch.Tensor)
            assert (tensor[0, :60].view(torch.uint8) == 7).all()
            del tensor
    assert not things


def test_close_leaves_tensors_alone() -> None:
    things = make()
    cache, pool, tensor = things["cache"], things["pool"], things["tensor"]
    assert isinstance(cache, kvspan.KVCache)
    assert isinstance(pool, kvspan.Pool)
    assert isinstance(tensor, torch.Tensor)
    cache.close()
    pool.close()
    with pytest.raises(kvspan.ReleasedError):
        cache.sequence()
    cache.close()  # may be called again
    assert (tensor[0, :60].view(torch.uint8) == 7).all()
    tensor[0, :60] = 3  # still writable where it was


def test_memory_goes_with_the_last_tensor() -> None:
    things = make()
    tensor = things.pop("tensor")
    things.clear()
    gc.collect()
    assert shared_memory_bytes() > 0
    del tensor


def test_from_another_thread() -> None:
    things = make()
    keeper = [things.pop("tensor")]
    thread = threading.Thread(target=keeper.clear)
    things.clear()
    thread.start()
    thread.join()


def test_in_a_cycle() -> None:
    things = make()
    cycle: list[object] = [things]
    cycle.append(cycle)
    del things, cycle


def test_dropping_a_sequence_releases_it() -> None:
    things = make()
    cache = things["cache"]
    assert isinstance(cache, kvspan.KVCache)
    assert cache.stats().n_sequences == 1
    del things["sequence"]
    gc.collect()
    assert cache.stats().n_sequences == 0


SHUTDOWN = """
import threading, time, torch, kvspan
pool = kvspan.Pool(capacity="16MiB", page_size="64KiB")
cache = kvspan.KVCache(pool, 2, 1, 64, torch.float32, max_seqs=8, max_seq_len=4096)
batch = cache.batch(4)
rows = batch.sequences
k, v = cache.layer(0)
capsule = cache.view(0, 0).__dlpack__()
def work():
    while True:
        batch.step()
        if rows[0].length > 1000:  # no torch here: its own calls do not survive this
            for row in rows: row.truncate(0)
{body}
"""


@pytest.mark.parametrize(
    "body",
    [
        "batch.step()",
        "threading.Thread(target=work, daemon=True).start(); time.sleep(0.05)",
        "import sys; sys.modules['keep'] = [k, batch]; batch.step()",
        "pool.close(); cache.close()",
    ],
    ids=["globals", "a daemon thread", "kept by sys.modules", "closed"],
)
def test_interpreter_shutdown(body: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SHUTDOWN.format(body=body)], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int8,
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_leaves_as_itself(dtype: torch.dtype) -> None:
    tensor = make(dtype)["tensor"]
    assert isinstance(tensor, torch.Tensor)
    assert tensor.dtype == dtype
    assert tensor.shape == (4, 400, 5, 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
def test_numpy_takes_what_it_knows(dtype: torch.dtype) -> None:
    things = make(dtype)
    cache, tensor = things["cache"], things["tensor"]
    assert isinstance(cache, kvspan.KVCache)
    assert isinstance(tensor, torch.Tensor)
    array = np.from_dlpack(cache.view(0, 0))
    assert array.__array_interface__["data"][0] == tensor.data_ptr()
    del things, cache, tensor
    assert (array[0, :60].view(np.uint8) == 7).all()


def test_capsules_by_version() -> None:
    cache = make()["cache"]
    assert isinstance(cache, kvspan.KVCache)
    view = cache.view(0, 0)
    assert '"dltensor"' in repr(view.__dlpack__())
    assert '"dltensor"' in repr(view.__dlpack__(max_version=(0, 8)))
    assert '"dltensor_versioned"' in repr(view.__dlpack__(max_version=(1, 0)))
    capsule = view.__dlpack__()
    taken = torch.from_dlpack(capsule)
    assert taken.data_ptr() == cache.layer(0)[0].data_ptr()
    with pytest.raises(RuntimeError):  # a capsule is consumed once
        torch.from_dlpack(capsule)


def test_fork_leaves_the_parents_bytes_alone() -> None:
    """A child's calls raise, its stray write traps, and the parent never notices."""
    things = make()
    cache, sequence, tensor = things["cache"], things["sequence"], things["tensor"]
    assert isinstance(cache, kvspan.KVCache)
    assert isinstance(sequence, kvspan.Sequence)
    assert isinstance(tensor, torch.Tensor)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for call in (cache.stats, cache.sequence, lambda: sequence.extend(1), cache.trim):
                try:
                    call()
                except kvspan.ReleasedError:
                    continue
                os._exit(2)
            own = kvspan.Pool(capacity=PAGE, page_size=PAGE)
            assert own.stats().in_use_bytes == 0
            del things, cache, sequence, own
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    child = os.fork()
    if child == 0:
        tensor[0, 0] = 9  # traps
        os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -11
    assert (tensor[0, :60].view(torch.uint8) == 7).all()
    sequence.extend(100)


def test_a_child_exits_cleanly() -> None:
    code = SHUTDOWN.format(body="import os, sys; batch.step()") + (
        "pid = os.fork()\n"
        "if pid == 0: sys.exit(0)\n"
        "assert os.waitpid(pid, 0)[1] == 0\n"
        "batch.step()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
