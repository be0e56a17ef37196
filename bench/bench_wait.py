"""What share of a decode step does the serving thread wait for the driver or the mapper?

256 sequences of Llama-3-8B of mixed lengths, steps of 20 ms, with the background at work and
without it, in virtual time on the driver emulator: every run gives the same. `bench/cpp/wait.cpp`
says what counts as waiting. Not a GPU result.

Launches are taken to share the context's lock with virtual-memory calls, which is an assumption of
the emulator's. Then a step that is one captured graph is hardly ever held up, and one of 320
launches is by as much as if it had mapped its pages itself: only the graph is held to the target.
"""

from __future__ import annotations

import argparse
import statistics

from cpp_programs import cpp_benchmark
from emulator import NOT_A_GPU
from harness import Expectation, Result, Series

NAME = "wait"
MAIN = (
    "background, recycled frames, graph",
    "background, recycled frames, graph, all cross at once",
    "background, new frames, graph",
)


def p99(series: Series) -> float:
    """Return the share that one step in a hundred exceeds."""
    return statistics.quantiles(series.samples, n=100, method="inclusive")[98]


def run(args: argparse.Namespace) -> Result:
    """Model."""
    result = cpp_benchmark("kvspan_bench_wait")
    result.notes.append(NOT_A_GPU)
    for name, series in result.measurements.items():
        if series.unit != "%":
            continue
        result.notes.append(f"{name}: p50 {series.median:.3f}%, p99 {p99(series):.3f}% of a step")
    result.expectations = [
        Expectation(f"percent of a step waited at p99, {name}", p99(result.measurements[name]), 0.5)
        for name in MAIN
    ]
    return result
