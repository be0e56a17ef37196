"""What does mapping a page cost beside the system calls that it needs?

`extend` by whole pages, frames created before, against one mmap of as many huge pages of a memfd at
a fixed address, both in the middle of their reservations. Unmapping is not timed. One C++ program,
the two alternating with a third: `extend` over a backend that does nothing, which is what pool and
page tables cost.
"""

from __future__ import annotations

import argparse
import statistics

from cpp_programs import cpp_benchmark
from harness import Expectation, Result

NAME = "map"


def run(args: argparse.Namespace) -> Result:
    """Measure."""
    result = cpp_benchmark("kvspan_bench_map", [str(max(args.repeats, 15))])
    for pages in (1, 16, 64):
        span = result.measurements[f"extend, {pages} pages"].samples
        raw = result.measurements[f"raw mmap, {pages} pages"].samples
        ratio = statistics.median(s / r for s, r in zip(span, raw, strict=True))
        result.expectations.append(
            Expectation(f"extend by {pages} pages over the system call", ratio, 1.3)
        )
    return result
