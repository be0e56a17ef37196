"""What does it cost to take frames from the pool and to give them back, beside other free lists?

One C++ program, all lists in turn: a mutex around a vector, with and without the pool's checks
(references, double gives, foreign ids), and, where their headers are, boost::lockfree::stack and
moodycamel::ConcurrentQueue. `bench/cpp/pool.cpp` says in what state the lists are. Times are a
thread's own CPU time; "wall" is of all threads, each on its own processor, and what scaling is.
A stalled thread is stopped for 5 ms in mid-operation: by a signal, or with the mutex in its hands.

From Python, vLLM's own free list (`--install-vllm` downloads it), its classes taken out of their
files, since importing them takes all of vLLM. The frame pool has no binding of its own: what stands
beside them is a sequence that grows by as many pages and shrinks again, with its pages kept mapped,
and without, where mapping and unmapping them is in the time.
"""

from __future__ import annotations

import argparse
import ast
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import kvspan
from baselines import vllm_paged
from cpp_programs import cpp_benchmark
from harness import Expectation, Result, interleave

NAME = "pool"
PYTHON_SIZES = (16, 256)
OURS, MUTEX = "frame pool", "mutex with checks"


def _vllm_pool() -> Any:
    """Return vLLM's BlockPool without prefix cache, its free blocks in random order."""
    names: dict[str, Any] = {"__name__": __name__, "MEDIUM_GPU": "GPU"}
    imports = "from __future__ import annotations\nfrom dataclasses import dataclass, field"
    wanted = ("KVCacheBlock", "FreeKVCacheBlockQueue", "BlockHashToBlockMap", "BlockPool")
    for file in ("kv_cache_utils.py", "block_pool.py"):
        path = vllm_paged.FOLDER / "vllm" / "v1" / "core" / file
        theirs = ast.parse(path.read_text(encoding="utf-8")).body
        tree = ast.parse(imports)
        tree.body += [x for x in theirs if isinstance(x, ast.ClassDef) and x.name in wanted]
        exec(compile(tree, str(path), "exec"), names)
    pool = names["BlockPool"](1 << 16, enable_caching=False, hash_block_size=16)
    blocks = pool.get_new_blocks(pool.get_num_free_blocks())
    assert len({block.block_id for block in blocks}) == (1 << 16) - 1
    random.Random(1).shuffle(blocks)
    pool.free_blocks(blocks)
    return pool


def _python_cases(n: int) -> dict[str, Callable[[], object]]:
    def grow_and_shrink(keep: str) -> Callable[[], object]:
        pool = kvspan.Pool(capacity="64MiB", page_size="64KiB", huge_pages=False)
        cache = kvspan.KVCache(
            pool, n_layers=1, n_kv_heads=1, head_dim=16, dtype=torch.float32,
            max_seqs=1, max_seq_len=1 << 18, keep=keep,
        )  # fmt: skip
        sequence = cache.sequence()
        n_tokens = int(n * cache.tokens_per_page[0]) // len(cache.tokens_per_page)

        def case() -> int:
            sequence.extend(n_tokens)
            sequence.truncate(0)
            return n

        return case

    cases = {
        f"Python, {n} pages, kvspan, kept mapped": grow_and_shrink("64MiB"),
        f"Python, {n} pages, kvspan, mapped and unmapped": grow_and_shrink("0"),
    }
    if vllm_paged.FOLDER.exists():
        pool = _vllm_pool()

        def get_and_free() -> int:
            blocks = pool.get_new_blocks(n)
            pool.free_blocks(reversed(blocks))
            return len(blocks)

        cases[f"Python, {n} blocks, vLLM's BlockPool"] = get_and_free
    return cases


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what only this benchmark has."""
    parser.add_argument(
        "--install-vllm", action="store_true", help="download it first (a wheel of 130 MB)"
    )


def run(args: argparse.Namespace) -> Result:
    """Measure."""
    if args.install_vllm:
        vllm_paged.install()
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
    for n in PYTHON_SIZES:
        result.measurements.update(
            interleave(_python_cases(n), args.repeats, calls=100, clock=time.thread_time_ns)
        )
    for name, word in (("boost stack", "boost"), ("moodycamel queue", "moodycamel")):
        if not any(name in key for key in result.measurements):
            result.notes.append(f"left out, no header: {word}")
    if not vllm_paged.FOLDER.exists():
        result.notes.append("left out, not installed: vLLM's free list (--install-vllm)")
    return result
