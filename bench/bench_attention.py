"""Does unmodified attention over span tensors keep the speed of plain memory of the same strides?

A pass is one decode step's attention in all layers, in the layout that "auto" chooses: every K and
V is read once, at least 8 times the last-level cache. Both memories are in huge pages, which is
checked, and give the same bits. Beside them a second plain copy, which shows what is noise, and the
dense layouts. Ratios are taken round by round, over several placements of all memory.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import replace

import torch

import plots
from decode_attention import (
    LLAMA,
    SMOLLM2,
    Shape,
    attend,
    batches,
    dense,
    fill,
    is_close,
    over_placements,
    same_strides,
    span_layers,
    speed,
)
from decode_attention import add_arguments as add_common_arguments
from harness import BenchError, Expectation, Result, Series, interleave
from machine import machine

NAME = "attention"
SHAPES = (
    SMOLLM2,
    replace(SMOLLM2, name="SmolLM2-135M bf16", dtype=torch.bfloat16),
    LLAMA,
    replace(LLAMA, name="8 layers of Llama-3-8B fp32", dtype=torch.float32),
)
TIMES_CACHE = 8


def last_level_cache() -> int:
    """Return its bytes; 32 MiB where the machine does not say."""
    units = {"K": 1 << 10, "M": 1 << 20}
    sizes = [re.fullmatch(r"(\d+)([KM])", size) for size in machine()["caches"].values()]
    return max((int(s[1]) * units[s[2]] for s in sizes if s), default=32 << 20)


def measure(shape: Shape, repeats: int) -> dict[str, Series]:
    """Allocate everything, compare, and time it in turn."""
    cache, span = span_layers(shape, "auto")
    with cache:
        stores = {
            "span": span,
            "plain, same strides": same_strides(span),
            "plain again": same_strides(span),
            "dense [B,L,H,D]": dense(shape, head_major=False),
            "dense [B,H,L,D]": dense(shape, head_major=True),
        }
        for layers in stores.values():
            fill(layers)
        passes = {name: attend(shape, layers) for name, layers in stores.items()}
        if not torch.equal(passes["span"](), passes["plain, same strides"]()):
            raise BenchError(f"{shape.name}: the same strides give different bits")
        series = interleave(passes, repeats, equal=is_close)
        batches.clear()
    return series


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the sizes."""
    add_common_arguments(parser)
    plots.add_argument(parser)


def run(args: argparse.Namespace) -> Result:
    """Measure."""
    torch.set_num_threads(args.threads)
    result = Result({}, parameters={"threads": args.threads, "placements": args.placements})
    groups: dict[str, dict[str, float]] = {}
    for given in SHAPES:
        row_bytes = given.bytes_read // given.rows
        rows = 1 if args.quick else -(-TIMES_CACHE * last_level_cache() // row_bytes)
        shape = replace(given, rows=rows)
        series = over_placements(
            lambda shape=shape: measure(shape, args.repeats),  # type: ignore[misc]
            1 if args.quick else args.placements,
        )
        result.measurements |= {f"{shape.name}: {name}": one for name, one in series.items()}
        plain = series["plain, same strides"]
        of_span, of_again = speed(series["span"], plain), speed(series["plain again"], plain)
        result.measurements[f"{shape.name}: speed of span"] = of_span
        result.measurements[f"{shape.name}: speed of plain again"] = of_again
        rates = {name: shape.bytes_read / one.median / 1e9 for name, one in series.items()}
        groups[shape.name] = rates
        shown = ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items())
        result.notes.append(f"{shape.name}, {shape.bytes_read >> 20} MiB a pass, GB/s: {shown}")
        if not args.quick:
            result.expectations.append(
                Expectation(f"{shape.name}: speed over plain memory", of_span.median, 0.97, True)
            )
    if args.plot is not None:
        plots.bars(args.plot, "Attention by torch's SDPA", "GB/s of KV read", {"": groups})
    return result
