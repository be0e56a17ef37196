"""What does the bookkeeping cost from 1,000 frames to 1,000,000, in time, bytes and atomics?

A tenth as many slots as frames, nearly all taken; sequences picked at random; no memory and no
driver behind them. Each operation twice: as it comes, where a small pool's tables lie in the
caches and a large one's cannot, and with the caches full of other data before every 64 operations,
which leaves what the tables' size itself costs. Bytes are resident memory. Atomic
read-modify-writes are counted by stepping through the calls (`bench/cpp/atomics.cpp`).
"""

from __future__ import annotations

import argparse

from cpp_programs import cpp_benchmark
from harness import Expectation, Result

NAME = "scale"
SMALL, LARGE = "1000 frames", "1000000 frames"
OPERATIONS = (
    "begin",
    "extend within a page",
    "extend into a new page",
    "step of 64",
    "release",
    "take and give 16 frames",
)


def run(args: argparse.Namespace) -> Result:
    """Measure."""
    result = cpp_benchmark("kvspan_bench_scale", [str(args.repeats)])
    atomics = cpp_benchmark("kvspan_bench_atomics").measurements
    counts = {name: series.median for name, series in atomics.items()}
    result.notes.append(
        "atomic read-modify-writes: " + ", ".join(f"{k} {v:.0f}" for k, v in counts.items())
    )

    def growth(operation: str) -> float:
        large = result.measurements[f"{operation}, {LARGE}"].median
        return large / result.measurements[f"{operation}, {SMALL}"].median

    for operation in OPERATIONS:
        result.notes.append(
            f"{operation}: from {SMALL} to {LARGE} {growth(operation):.1f}x as it comes, "
            f"{growth(f'{operation} (caches cold)'):.1f}x with cold caches"
        )
        result.expectations.append(
            Expectation(
                f"growth of {operation}, caches cold", growth(f"{operation} (caches cold)"), 3
            )
        )
    per_page = (counts["extend by 64 pages"] - counts["extend by 16 pages"]) / 48
    result.expectations += [
        Expectation("atomics of a step, a row", counts["step of 256"] / 256, 1),
        Expectation("atomics of mapping, a page", per_page, 2),
    ]
    return result
