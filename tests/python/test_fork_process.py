"""fork(2) with live caches: the child can neither reach nor harm what the parent has.

A child finds PROT_NONE where the tensors were, and ReleasedError in every call; it may make pools
of its own, and ends as any process does. The parent notices nothing (DESIGN rule 8).
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import resource
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from device import IS_HOST, PAGE, SCALE, only_on_the_host, run_program

import kvspan

CUDA_ENDS = only_on_the_host("a child of fork(2) cannot use CUDA")


class Scene:
    """A cache with two sequences that share pages, and a batch."""

    def __init__(self, unmapped: str | None = None) -> None:
        self.pool = kvspan.Pool(capacity=32 * PAGE, page_size=PAGE)
        self.cache = kvspan.KVCache(
            self.pool,
            *(2, 5, 16 * SCALE, torch.float32),
            max_seqs=6,
            max_seq_len=1000,
            unmapped=unmapped,
        )
        self.sequence = self.cache.sequence()
        self.sequence.extend(200)
        self.tensor = self.cache.layer(0)[0]
        self.tensor[self.sequence.slot, :200] = 7
        self.child = self.sequence.fork()
        self.batch = self.cache.batch(2)
        self.batch.step(60)
        self.view = self.cache.view(0, 0)

    def check(self) -> None:
        for sequence in (self.sequence, self.child):
            assert (sequence.layer(0)[0] == 7).all()
        self.sequence.extend(60)
        self.child.extend(60)
        self.sequence.layer(0)[0][200:] = 8
        assert not (self.child.layer(0)[0][200:] == 8).any()
        assert self.batch.step().tolist() == [60, 60]


def in_child(call: Callable[[], object]) -> int:
    """Run `call` in a child; return its exit code: 0, 1 for an exception, -n for a signal."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            faulthandler.disable()  # pytest's would report a trap that we are waiting for
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            call()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_calls_of_the_child_raise() -> None:
    scene = Scene()
    sequence, cache, pool, batch = scene.sequence, scene.cache, scene.pool, scene.batch
    calls: list[Callable[[], Any]] = [
        lambda: sequence.extend(1),
        lambda: sequence.truncate(0),
        sequence.fork,
        lambda: sequence.slot,
        cache.sequence,
        cache.stats,
        cache.page_map,
        cache.trim,
        cache.close,
        lambda: cache.batch(1),
        lambda: cache.batch([sequence]),
        lambda: cache.layer(1),
        lambda: cache.view(0, 0),
        batch.step,
        lambda: batch.select([1, 0]),
        lambda: batch.lengths,
        pool.stats,
        pool.trim,
        lambda: pool.preallocate(PAGE),
        lambda: kvspan.KVCache(pool, 1, 1, 16, max_seqs=1, max_seq_len=1),
    ]

    def child() -> None:
        for call in calls:
            with pytest.raises(kvspan.ReleasedError, match="fork"):
                call()
        sequence.release()  # nothing to release, and no error on the way out of a `with`
        assert repr(cache)

    assert in_child(child) == 0
    scene.check()


@only_on_the_host("nobody reaches a GPU's memory from the host")
@pytest.mark.parametrize("unmapped", ["zero", "fault"])
@pytest.mark.parametrize("position", [0, 199, 200, 999])
def test_stray_accesses_of_the_child_trap(unmapped: str, position: int) -> None:
    scene = Scene(unmapped)
    slot, tensor = scene.sequence.slot, scene.tensor
    assert in_child(lambda: tensor[slot, position].fill_(9)) == -signal.SIGSEGV
    assert in_child(lambda: tensor[slot, position].sum()) == -signal.SIGSEGV
    scene.check()


@CUDA_ENDS
def test_child_may_have_a_pool_of_its_own() -> None:
    scene = Scene()

    def child() -> None:
        Scene().check()
        # And children of its own, in which that is sealed in turn.
        mine = Scene()
        assert in_child(lambda: mine.tensor[0, 0].fill_(9)) == -signal.SIGSEGV
        assert in_child(lambda: Scene().check()) == 0
        mine.check()

    assert in_child(child) == 0
    scene.check()


def test_child_drops_what_it_inherited() -> None:
    scene = Scene()
    things = vars(scene)

    def child() -> None:
        names = list(things)
        while names:
            del things[names.pop()]
        if IS_HOST:
            Scene().check()

    before = scene.pool.stats()
    assert in_child(child) == 0
    assert scene.pool.stats() == before
    scene.check()


@only_on_the_host("its frames lie in a file of ours")
def test_child_holds_none_of_the_memory() -> None:
    scene = Scene()

    def child() -> None:
        folder = Path("/proc/self/fd")
        fds = [os.readlink(fd) for fd in folder.iterdir() if fd.exists()]
        assert not any("kvspan" in name for name in fds)
        assert "memfd:kvspan" not in Path("/proc/self/maps").read_text()

    assert "memfd:kvspan" in Path("/proc/self/maps").read_text()
    assert in_child(child) == 0
    scene.check()


def test_parent_runs_programs() -> None:
    scene = Scene()
    done = subprocess.run(["cat", "/proc/self/maps"], capture_output=True, text=True, check=True)
    assert "kvspan" not in done.stdout
    # With a function before exec, Python forks rather than vforks.
    subprocess.run(["true"], check=True, preexec_fn=os.getpgrp)
    scene.check()


def work(scene: Scene, answers: Any) -> None:
    try:
        scene.sequence.extend(1)
    except kvspan.ReleasedError:
        answers.put("ReleasedError")
    if IS_HOST:
        Scene().check()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_multiprocessing_by_fork() -> None:
    scene = Scene()
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    worker = context.Process(target=work, args=(scene, answers))
    worker.start()
    assert answers.get() == "ReleasedError"
    worker.join()
    assert worker.exitcode == 0
    scene.check()


EXIT = """
import os, sys, threading, torch, kvspan
from device import PAGE, SCALE
pool = kvspan.Pool(capacity=32 * PAGE, page_size=PAGE)
cache = kvspan.KVCache(pool, 2, 5, 16 * SCALE, torch.float32, max_seqs=4, max_seq_len=1000)
batch = cache.batch(2)
batch.step(60)
k, v = cache.layer(0)
capsule = cache.view(0, 0).__dlpack__()
k[:2, :60] = 7
pid = os.fork()
if pid == 0:
    {child}
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert (k[:2, :60] == 7).all()
batch.step()
"""


@pytest.mark.parametrize(
    "child",
    [
        "sys.exit(0)",
        "del k, v, capsule, batch, cache, pool; sys.exit(0)",
        pytest.param(
            "own = kvspan.Pool(capacity=PAGE, page_size=PAGE); "
            "mine = kvspan.KVCache(own, 1, 1, 16, max_seqs=1, max_seq_len=9).batch(1); sys.exit(0)",
            marks=CUDA_ENDS,
        ),
    ],
    ids=["with all it inherited", "with nothing", "with its own"],
)
def test_child_exits_as_any_process(child: str) -> None:
    code = EXIT.format(child=child)
    done = run_program(code)
    assert (done.returncode, done.stderr) == (0, "")
