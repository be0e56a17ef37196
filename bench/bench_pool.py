"""What does it cost to take frames from the pool and to give them back, beside other free lists?

One C++ program, all lists in turn: a mutex around a vector, with and without the pool's checks
(references, double gives, foreign ids), and, where their headers are, boost::lockfree::stack and
moodycamel::ConcurrentQueue. `bench/cpp/pool.cpp` says in what state the lists are. Times are a
thread's own CPU time; "wall" is of all threads, each on its own processor, and what scaling is.
A stalled thread is stopped for 5 ms in mid-operation: by a signal, or with the mutex in its hands.

From Python, `kvspan.FramePool` with a buffer of the caller's, beside the free lists of vLLM and
kvcached (`--install-vllm` and `--install-kvcached` download them), which deal in lists of Python;
baselines/free_lists.py says what of them runs. All are in the state that bench/cpp/pool.cpp calls
steady, and are checked as there. Last, a sequence that grows by as many pages and shrinks again,
with its pages kept mapped, and without, where mapping and unmapping them is in the time.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import Any

import numpy as np
import torch

import kvspan
from baselines import free_lists, vllm_paged
from baselines.free_lists import FreeList
from cpp_programs import cpp_benchmark
from harness import BenchError, Expectation, Result, Series, interleave

NAME = "pool"
OURS, MUTEX = "frame pool", "mutex with checks"
N_BLOCKS = 1 << 16
OUR_FRAMES, VLLM = "kvspan.FramePool", "vLLM's BlockPool"
PYTHON_SIZES = {16: 5, 256: 20}  # and how many times as long vLLM's list must take


class _Frames:
    """kvspan's frame pool."""

    def __init__(self, n_blocks: int) -> None:
        self.pool = kvspan.FramePool(n_blocks)

    def take(self, n: int) -> Any:
        out: Any = np.empty(n, np.uint32)
        self.pool.take(out)
        return out

    def give(self, blocks: Items[int]) -> None:
        self.pool.give(np.array(blocks, np.uint32))

    def ids(self, blocks: Any) -> list[int]:
        return list(blocks.tolist())

    def pair(self, n: int) -> Callable[[], object]:
        take, give = self.pool.take, self.pool.give
        out: Any = np.empty(n, np.uint32)

        def call() -> None:
            take(out)
            give(out)

        return call


class _Steady:
    """A list freed in random order, then half in use after requests of 1 to 32 came and went."""

    def __init__(self, kind: Callable[[int], FreeList]) -> None:
        self.blocks = kind(N_BLOCKS)
        rng = random.Random(1)
        everything = list(self.blocks.take(N_BLOCKS))
        rng.shuffle(everything)
        for i in range(0, N_BLOCKS, 16):
            self.blocks.give(everything[i : i + 16])
        self.held: list[Any] = [None] * (N_BLOCKS // 16)  # of which half hold blocks at a time
        for _ in range(10 * len(self.held)):
            i = rng.randrange(len(self.held))
            if self.held[i] is not None:
                self.blocks.give(self.held[i])
                self.held[i] = None
            else:
                self.held[i] = self.blocks.take(rng.randint(1, 32))

    def check(self) -> None:
        """Raise BenchError unless all ids are there, once each."""
        found = [i for blocks in self.held if blocks is not None for i in self.blocks.ids(blocks)]
        rest = self.blocks.take(N_BLOCKS - len(found))
        found += self.blocks.ids(rest)
        self.blocks.give(rest)
        if sorted(found) != list(range(N_BLOCKS)):
            raise BenchError(f"{type(self.blocks).__name__} lost ids, or gave some twice")


def _free_lists() -> dict[str, _Steady]:
    kinds: dict[str, Callable[[int], FreeList]] = {OUR_FRAMES: _Frames}
    if vllm_paged.FOLDER.exists():
        kinds[VLLM] = free_lists.VllmBlocks
        kinds["vLLM's FreeKVCacheBlockQueue alone"] = free_lists.VllmQueue
    if free_lists.KVCACHED.exists():
        kinds["kvcached's KVCacheManager"] = free_lists.KvcachedBlocks
    return {name: _Steady(kind) for name, kind in kinds.items()}


def _grow_and_shrink(n: int, keep: str) -> Callable[[], object]:
    pool = kvspan.Pool(capacity="64MiB", page_size="64KiB", huge_pages=False)
    cache = kvspan.KVCache(
        pool, n_layers=1, n_kv_heads=1, head_dim=16, dtype=torch.float32,
        max_seqs=1, max_seq_len=1 << 18, keep=keep,
    )  # fmt: skip
    sequence = cache.sequence()
    n_tokens = int(n * cache.tokens_per_page[0]) // len(cache.tokens_per_page)

    def call() -> None:
        sequence.extend(n_tokens)
        sequence.truncate(0)

    return call


def _from_python(repeats: int) -> dict[str, Series]:
    """Measure what a Python program sees, and check every list before and after."""
    lists = _free_lists()
    for blocks in lists.values():
        blocks.check()
    found: dict[str, Series] = {}
    for n in PYTHON_SIZES:
        pairs = {_python_case(n, name): steady.blocks.pair(n) for name, steady in lists.items()}
        found |= interleave(pairs, repeats, calls=1000, clock=time.thread_time_ns)
        pages = {
            _python_case(n, f"a sequence's pages, {how}"): _grow_and_shrink(n, keep)
            for how, keep in (("kept mapped", "64MiB"), ("mapped and unmapped", "0"))
        }
        found |= interleave(pages, repeats, calls=100, clock=time.thread_time_ns)
    for blocks in lists.values():
        blocks.check()
    return found


def _python_case(n: int, name: str) -> str:
    return f"Python, pair of {n}, {name}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what only this benchmark has."""
    parser.add_argument(
        "--install-vllm", action="store_true", help="download it first (a wheel of 130 MB)"
    )
    parser.add_argument("--install-kvcached", action="store_true", help="download it first")


def run(args: argparse.Namespace) -> Result:
    """Measure."""
    if args.install_vllm:
        vllm_paged.install()
    if args.install_kvcached:
        free_lists.install_kvcached()
    result = cpp_benchmark("kvspan_bench_pool", [str(max(args.repeats, 15))])

    def median(what: str, name: str = OURS) -> float:
        return result.measurements[f"{what}, steady, {name}"].median

    def ratio(over: str, under: str, over_name: str = OURS) -> float:
        """Of what was measured in the same round."""
        a = result.measurements[f"{over}, steady, {over_name}"].samples
        b = result.measurements[f"{under}, steady, {OURS}"].samples
        return statistics.median(x / y for x, y in zip(a, b, strict=True))

    one, two = "pair of {}, threads: 1, wall", "pair of {}, threads: 2, wall"
    stalled = "pairs of 16 beside a stall of 5 ms"
    result.expectations = [
        Expectation("ns a frame, 16 at a time", median("pair of 16") / 16 * 1e9, 2.5),
        Expectation("ns of a single take and give", median("pair of 1") * 1e9, 15),
        *(
            Expectation(f"two threads over one, {n} at a time", scaling, 1.8, at_least=True)
            for n in (1, 16)
            for scaling in [ratio(one.format(n), two.format(n))]
        ),
        Expectation(
            "two threads over the mutex, 16 at a time",
            ratio(two.format(16), two.format(16), MUTEX), 5, at_least=True,
        ),
        Expectation(
            "pairs beside a stalled thread over the mutex",
            median(stalled) / max(median(stalled, MUTEX), 1), 10, at_least=True,
        ),
        Expectation("runs of a batch of 16", median("runs of a batch of 16"), 1.1),
        Expectation(
            "bytes a frame of free list", result.measurements["of these the free list"].median, 0.3
        ),
    ]  # fmt: skip
    found = _from_python(args.repeats)
    result.measurements |= found
    for n, at_least in PYTHON_SIZES.items():
        ours = found[_python_case(n, OUR_FRAMES)]
        if theirs := found.get(_python_case(n, VLLM)):
            times = statistics.median(
                a / b for a, b in zip(theirs.samples, ours.samples, strict=True)
            )
            what = f"{VLLM} over ours from Python, {n} at a time"
            result.expectations.append(Expectation(what, times, at_least, at_least=True))
    for name, word in (("boost stack", "boost"), ("moodycamel queue", "moodycamel")):
        if not any(name in key for key in result.measurements):
            result.notes.append(f"left out, no header: {word}")
    if not vllm_paged.FOLDER.exists():
        result.notes.append("left out, not installed: vLLM's free list (--install-vllm)")
    if not free_lists.KVCACHED.exists():
        result.notes.append("left out, not installed: kvcached's (--install-kvcached)")
    return result
