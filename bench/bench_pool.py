"""What does it cost to take frames from the pool and to give them back, beside other free lists?

One C++ program, all cases in turn, time of the thread's own CPU. Of 65,536 frames half are free,
after batches of 16 came and went at random. Beside the pool: a mutex around a vector, with and
without the pool's checks (references, double gives, foreign ids), and boost::lockfree::stack, if
its headers are there. Two threads: the time of the slower. A stalled thread is one that is stopped
for 5 ms in the middle of what it does: by a signal, or holding the mutex.
"""

from __future__ import annotations

import argparse

from cpp_programs import cpp_benchmark
from harness import Expectation, Result

NAME = "pool"


def run(args: argparse.Namespace) -> Result:
    """Measure."""
    result = cpp_benchmark("kvspan_bench_pool", [str(args.repeats)])
    ns = {name: one.median * 1e9 for name, one in result.measurements.items() if one.unit == "s"}
    ours, mutex = "kvspan", "mutex, checked"
    scaling = 2 * ns[f"{ours}, 1 frame"] / ns[f"{ours}, 1 frame, two threads"]
    over_mutex = ns[f"{mutex}, 16 frames, two threads"] / ns[f"{ours}, 16 frames, two threads"]
    stalled = "done beside a thread stalled for 5 ms"
    done = {pool: result.measurements[f"{pool}, {stalled}"].median for pool in (ours, mutex)}
    result.expectations = [
        Expectation("ns a frame, batches of 16", ns[f"{ours}, 16 frames"] / 16, 2.5),
        Expectation("ns of a single take and give", ns[f"{ours}, 1 frame"], 15),
        Expectation("two threads over one", scaling, 1.8, True),
        Expectation("two threads, batches of 16, over the mutex", over_mutex, 5, True),
        Expectation("done beside a stalled thread", done[ours] / max(done[mutex], 1), 10, True),
        Expectation(
            "runs in 16 frames at half used",
            result.measurements[f"{ours}, runs in 16 frames"].median, 1.1,
        ),
    ]  # fmt: skip
    return result
