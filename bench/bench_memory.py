"""How much memory does decoding take with a SpanCache, beside transformers' own caches?

Each case is a process of its own: the model is loaded, the cache is written a piece at a time to
the length of a prompt, and some tokens are decoded. What counts is by how much the process's
resident memory grows at its highest, after the same without a cache that keeps anything. The keys
and values that there are at the end are what it must take. For a SpanCache, its pool says what is
mapped. The others may use again what malloc kept of before: theirs is understated by some MiB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from cached_models import OURS, cases, fill, kv_bytes, load, step
from harness import BenchError, Expectation, Result, Series

NAME = "memory"
STEPS = 20
PIECE = 256
SPARE_BYTES = 2 * (2 << 20)  # two pages of 2 MiB a sequence
# Of live keys and values, from so many tokens on.
LONG, OVER_LIVE = 8192, 1.05


def status(key: str) -> int:
    """Return a figure of this process's status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) << 10
    raise BenchError(f"/proc/self/status has no {key}")


class Discards:
    """A cache that keeps nothing, to have what writing takes besides."""

    def update(self, *states: object) -> None:
        """Take states, and forget them."""


def child(
    name: str, rows: int, tokens: int, dtype: torch.dtype, model: str | None
) -> dict[str, int]:
    """Measure one case in this process."""
    from transformers import DynamicCache

    torch.set_num_threads(2)
    reads, make = cases(load(model), rows, tokens, STEPS, dtype)[name]
    # What libraries take at first, and pieces and steps by themselves.
    warm = DynamicCache(config=reads.config)
    for _ in range(STEPS):
        fill(Discards(), reads.config, rows, PIECE, dtype)
        step(reads, warm, rows)
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is now
    before = status("VmRSS")
    cache = make()
    fill(cache, reads.config, rows, tokens, dtype, piece=PIECE)
    for _ in range(STEPS):
        step(reads, cache, rows)
    measured = {"peak": status("VmHWM") - before}
    if name == OURS:
        measured["mapped"] = sum(one.stats().mapped_bytes for one in cache.kv_caches)
    return measured


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the sizes."""
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048, 8192, 16384])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--model", help="a folder or name for from_pretrained")


def run(args: argparse.Namespace) -> Result:
    """Measure every case."""
    result = Result({}, parameters={"model": args.model or "small Llama"})
    model = load(args.model)
    # Made here for their names only; each is measured in a process of its own.
    names = list(cases(load(None), 1, 1, STEPS, torch.float32))
    for name in args.dtypes:
        dtype = getattr(torch, name)
        for rows in args.batches:
            for tokens in args.contexts:
                cell = (rows, tokens, name)
                _measure(result, names, model.config, cell, dtype, args.model)
    return result


def _measure(
    result: Result,
    names: list[str],
    config: Any,
    cell: tuple[int, int, str],
    dtype: torch.dtype,
    model: str | None,
) -> None:
    rows, tokens, name = cell
    where = f"{name}, {rows} x {tokens}"
    live = kv_bytes(config, rows, tokens + STEPS, dtype)
    shown = [f"live {live / 2**20:.0f}"]
    for case in names:
        measured = json.loads(_output_of([case, rows, tokens, name, model]))
        result.measurements[f"{where}: {case}"] = Series((measured["peak"] / 2**20,), "MiB")
        shown.append(f"{case} {measured['peak'] / 2**20:.0f}")
        if case == OURS:
            mapped = measured["mapped"]
            shown.append(f"of it mapped {mapped / 2**20:.1f}")
            result.expectations.append(
                Expectation(
                    f"{where}: mapped MiB", mapped / 2**20, (live + rows * SPARE_BYTES) / 2**20
                )
            )
            if tokens >= LONG:
                result.expectations.append(
                    Expectation(f"{where}: peak over live", measured["peak"] / live, OVER_LIVE)
                )
    result.notes.append(f"{where}, MiB: {', '.join(shown)}")


def _output_of(case: list[object]) -> str:
    found = subprocess.run(
        [sys.executable, __file__, json.dumps(case)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if found.returncode != 0:
        raise BenchError(f"{case}: {found.stderr.strip().splitlines()[-1:]}")
    return found.stdout.splitlines()[-1]


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(json.dumps(child(given[0], given[1], given[2], getattr(torch, given[3]), given[4])))
