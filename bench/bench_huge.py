"""What do huge pages buy: the same reads over frames in small pages, collapsed ones and hugetlb?

Dependent random reads, gathered records and streaming by one C++ program, in which the memories
take turns (`bench/cpp/huge.cpp`), with the processor's count of TLB misses where it is to be had.
Then decode attention over caches, in turn as well. hugetlb is left out where too few pages are set
aside: as many as --mib says are enough (sysctl -w vm.nr_hugepages=1024).
"""

from __future__ import annotations

import argparse
import statistics
from contextlib import ExitStack
from dataclasses import replace

import torch

import kvspan
from cpp_programs import cpp_benchmark
from decode_attention import LLAMA, attend, batches, fill, span_layers
from harness import Expectation, Result, interleave

NAME = "huge"
KINDS: dict[str, bool | str] = {"small pages": False, "collapsed": True, "hugetlb": "hugetlb"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the sizes."""
    parser.add_argument("--mib", type=int, default=1024, help="of each memory (default: 1024)")


def attention(args: argparse.Namespace, result: Result) -> None:
    """Time one decode step's attention over a cache of each kind, and note who is missing."""
    torch.set_num_threads(1)
    rows = max(1, (args.mib << 20) // (LLAMA.bytes_read // LLAMA.rows))
    shape = replace(LLAMA, rows=rows)
    with ExitStack() as caches:
        passes = {}
        for name, huge_pages in KINDS.items():
            try:
                cache, layers = span_layers(shape, "auto", huge_pages)
            except kvspan.Error as error:
                result.notes.append(f"attention, {name}: left out: {error}")
                continue
            caches.enter_context(cache)
            fill(layers)
            passes[f"attention, {name}"] = attend(shape, layers)
        result.measurements |= interleave(passes, args.repeats, equal=torch.equal)
        batches.clear()


def run(args: argparse.Namespace) -> Result:
    """Measure."""
    result = cpp_benchmark("kvspan_bench_huge", [str(args.repeats), str(args.mib)])
    attention(args, result)
    for what in ("chase", "gather", "stream of 4 KiB", "attention"):
        small = result.measurements[f"{what}, small pages"].samples
        for kind in ("collapsed", "hugetlb"):
            huge = result.measurements.get(f"{what}, {kind}")
            if huge is None:
                continue
            ratio = statistics.median(h / s for h, s in zip(huge.samples, small, strict=True))
            result.expectations.append(Expectation(f"{what}: {kind} over small pages", ratio, 1.05))
    return result
