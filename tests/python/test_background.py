"""The pool's background thread beside an interpreter: the GIL, its end, and fork(2)."""

from __future__ import annotations

import ctypes
import time

import pytest
import torch
from device import PAGE, SCALE, only_on_the_host, run_program

import kvspan

# Mapped piece by piece by the background, which the call that wakes it does not wait for.
WORK = """
import os, sys, torch, kvspan
from device import PAGE, SCALE
pool = kvspan.Pool(capacity=4096 * PAGE, page_size=PAGE, background=True)
cache = kvspan.KVCache(pool, 1, 2, 64 * SCALE, torch.float32, max_seqs=64, max_seq_len=4096)
rows = [cache.sequence(2000) for _ in range(60)]
"""


def test_it_works_while_a_call_holds_the_gil() -> None:
    hold_the_gil = ctypes.PyDLL(None).usleep
    with (
        kvspan.Pool(capacity=4096 * PAGE, page_size=PAGE, background=True) as pool,
        kvspan.KVCache(
            pool, 1, 2, 64 * SCALE, torch.float32, max_seqs=64, max_seq_len=4096, keep=0
        ) as cache,
    ):
        meanwhile: set[str] = set()
        for _ in range(20):  # where all is done before the call begins, it says nothing
            rows = [cache.sequence(2000) for _ in range(60)]
            begin = time.monotonic()
            hold_the_gil(50_000)
            end = time.monotonic()
            meanwhile |= {e.kind for e in cache.mapper_events() if begin < e.time_s < end}
            if "mapped" in meanwhile:
                break
            for row in rows:
                row.release()
        assert "mapped" in meanwhile
        del rows


@pytest.mark.parametrize(
    "end",
    [
        "",
        "cache.close()",
        "pool.close()",
        "del rows, cache, pool",
        "rows[0].extend(1); sys.exit(0)",
    ],
)
def test_a_program_ends_while_it_works(end: str) -> None:
    done = run_program(WORK + end)
    assert (done.returncode, done.stderr) == (0, "")


@only_on_the_host("a child of fork(2) cannot use CUDA")
def test_a_fork_meets_it_in_the_middle_of_its_work() -> None:
    """Each child finds the locks as they were at its moment, drops everything and ends."""
    done = run_program(
        WORK
        + """
planes = cache.layer(0)
del rows[12:]
for i, row in enumerate(rows):
    pid = os.fork()
    if pid == 0:
        try:
            row.extend(1)
        except kvspan.ReleasedError:
            del planes, row, rows, cache, pool
            sys.exit(7)
        sys.exit("the child could use its parent's cache")
    row.extend(500)
    planes[0][row.slot, :500] = i
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
for i, row in enumerate(rows):
    assert (planes[0][row.slot, :500] == i).all()
assert any(event.kind == "mapped" for event in cache.mapper_events())
cache.close()
"""
    )
    assert (done.returncode, done.stderr) == (0, "")
