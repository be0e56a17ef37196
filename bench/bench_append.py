"""Does appending a token to a SpanCache cost the same whatever the length, beside others' caches?

What is timed is `update` of all layers with a token of each row, caches of several lengths and
kinds in turn; nobody attends.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from typing import Any

import torch

from cached_models import OURS, cases, fill, load, shape_of
from harness import Expectation, Result, interleave

NAME = "append"
SHORT, LONG, OVER_SHORT = 512, 16384, 1.2
KINDS = (OURS, "DynamicCache, sdpa", "StaticCache, sdpa")


def append(cache: Any, states: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Write a token of each row in all layers."""
    for layer, (k, v) in enumerate(states):
        cache.update(k, v, layer)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the sizes."""
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: 2)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--contexts", type=int, nargs="+", default=[SHORT, LONG])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])


def run(args: argparse.Namespace) -> Result:
    """Measure."""
    torch.set_num_threads(args.threads)
    model, repeats = load(None), max(args.repeats, 25)
    layers, heads, dim = shape_of(model.config)
    result = Result({}, parameters={"threads": args.threads})
    for name in args.dtypes:
        dtype = getattr(torch, name)
        for rows in args.batches:
            states = [tuple(torch.randn(2, rows, heads, 1, dim).to(dtype)) for _ in range(layers)]
            timed = {}
            for tokens in args.contexts:
                found = cases(model, rows, tokens, repeats + 1, dtype)
                for kind in KINDS:
                    cache = found[kind][1]()
                    fill(cache, model.config, rows, tokens, dtype)
                    label = f"{name}, {rows} x {tokens}: {kind.partition(',')[0]}"
                    timed[label] = functools.partial(append, cache, states)
            with torch.inference_mode():
                series = interleave(timed, repeats)
            result.measurements |= series
            short, long = (
                series.get(f"{name}, {rows} x {tokens}: SpanCache") for tokens in (SHORT, LONG)
            )
            if short is not None and long is not None:
                ratios = [a / b for a, b in zip(long.samples, short.samples, strict=True)]
                what = f"{name}, {rows} rows: a SpanCache of {LONG} over one of {SHORT}"
                result.expectations.append(Expectation(what, statistics.median(ratios), OVER_SHORT))
    return result
