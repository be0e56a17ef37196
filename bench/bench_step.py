"""What does a decode step cost while no sequence crosses into an unmapped page?

The native time is that of `Batch::step` in C++, the other that of `batch.step()` as Python calls
it. Beside them, what an engine in Python does for a block table: a loop that looks whether each
sequence's last block is full and counts its length up; and the same in numpy. What an extend costs
that does map a page is `map`'s question.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch

import kvspan
from cpp_programs import cpp_benchmark
from harness import Expectation, Result, Series

NAME = "step"
ROWS = 256
ALL_ROWS = (1, 32, ROWS, 1024)
CALLS = 400
BLOCK = 16


def _span(rows: int, repeats: int) -> Series:
    pool = kvspan.Pool(capacity="256MiB", page_size="64KiB", huge_pages=False)
    cache = kvspan.KVCache(
        pool, n_layers=1, n_kv_heads=1, head_dim=16, dtype=torch.float32,
        max_seqs=rows, max_seq_len=CALLS + 1, keep="256MiB",
    )  # fmt: skip
    batch = cache.batch(rows)
    samples = []
    for repeat in range(repeats + 1):
        calls = cache.stats().calls
        start = time.perf_counter()
        for _ in range(CALLS):
            batch.step()
        samples.append((time.perf_counter() - start) / CALLS)
        assert repeat == 0 or cache.stats().calls == calls, "a timed step called the driver"
        assert batch.lengths.tolist() == [CALLS] * rows
        for sequence in batch.sequences:
            sequence.truncate(0)
    return Series(tuple(samples[1:]))  # the first one mapped the pages


def _block_table(repeats: int) -> Series:
    samples = []
    for _ in range(repeats):
        free = list(range(ROWS * CALLS // BLOCK + ROWS))
        lengths = [0] * ROWS
        tables: list[list[int]] = [[] for _ in range(ROWS)]
        start = time.perf_counter()
        for _ in range(CALLS):
            for row in range(ROWS):
                if lengths[row] % BLOCK == 0:
                    tables[row].append(free.pop())
                lengths[row] += 1
        samples.append((time.perf_counter() - start) / CALLS)
        assert lengths == [CALLS] * ROWS
    return Series(tuple(samples))


def _numpy_block_table(repeats: int) -> Series:
    samples = []
    for _ in range(repeats):
        free: Any = np.arange(ROWS * CALLS // BLOCK + ROWS, dtype=np.int32)
        n_free = len(free)
        lengths: Any = np.zeros(ROWS, dtype=np.int32)
        tables: Any = np.zeros((ROWS, CALLS // BLOCK + 1), dtype=np.int32)
        start = time.perf_counter()
        for _ in range(CALLS):
            full = np.flatnonzero(lengths % BLOCK == 0)
            if len(full):
                tables[full, lengths[full] // BLOCK] = free[n_free - len(full) : n_free]
                n_free -= len(full)
            lengths += 1
        samples.append((time.perf_counter() - start) / CALLS)
        assert lengths.tolist() == [CALLS] * ROWS
    return Series(tuple(samples))


def run(args: argparse.Namespace) -> Result:
    """Measure."""
    result = cpp_benchmark("kvspan_bench_step", [str(args.repeats)])
    for rows in ALL_ROWS:
        result.measurements[f"Python step, {rows} rows"] = _span(rows, args.repeats)
    result.measurements[f"Python loop over a block table, {ROWS} rows"] = _block_table(args.repeats)
    result.measurements[f"numpy over a block table, {ROWS} rows"] = _numpy_block_table(args.repeats)
    native = result.measurements[f"native step, {ROWS} rows"].median * 1e6
    python = result.measurements[f"Python step, {ROWS} rows"].median * 1e6
    result.expectations = [
        Expectation(f"native microseconds a step of {ROWS} sequences", native, 10),
        Expectation(f"microseconds with Python of a step of {ROWS} sequences", python, 20),
    ]
    return result
