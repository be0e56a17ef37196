"""What does attention pay for the longer strides when more layers share a page?

The same kernel over span tensors of several `layers_per_page`, interleaved, over several placements
of all memory. This is the measurement behind the automatic choice of the layout: the price of a
choice is the median, over rounds, of its time over that of one layer per page. Beside them dense
tensors, and all layers per page in plain memory with a cache line between records: what of the
price is that long strides are multiples of what the caches are indexed by.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

from decode_attention import (
    SMOLLM2,
    Shape,
    add_arguments,
    attend,
    batches,
    dense,
    fill,
    is_close,
    longer_records,
    over_placements,
    span_layers,
    speed,
)
from harness import Result, Series, interleave

__all__ = ["NAME", "add_arguments", "run"]

NAME = "layout"
SMOL = replace(SMOLLM2, rows=6)
LLAMA = Shape("Llama-3-8B bf16", 32, 8, 4, 128, torch.bfloat16, rows=2)
CASES = (
    (SMOL, (1, 5, 30)),
    (replace(SMOL, name="SmolLM2-135M bf16", dtype=torch.bfloat16, rows=12), (1, 5, 30)),
    (LLAMA, (1, 8, 32)),
    (replace(LLAMA, name="Llama-3-8B fp32", dtype=torch.float32, rows=1), (1, 8, 32)),
)


def measure(shape: Shape, choices: tuple[int, ...], repeats: int) -> dict[str, Series]:
    """Allocate every layout, and the dense one; compare; time a pass over each in turn."""
    stores = {f"{n} layers per page": span_layers(shape, n) for n in choices}
    layers = {name: store for name, (_, store) in stores.items()}
    layers["all layers, 64 B between records"] = longer_records(shape, 64)
    layers["dense [B,L,H,D]"] = dense(shape, head_major=False)
    for store in layers.values():
        fill(store)
    passes = {name: attend(shape, store) for name, store in layers.items()}
    series = interleave(passes, repeats, equal=is_close)
    batches.clear()
    for cache, _ in stores.values():
        cache.close()
    return series


def run(args: argparse.Namespace) -> Result:
    """Measure."""
    torch.set_num_threads(args.threads)
    result = Result({}, parameters={"threads": args.threads, "placements": args.placements})
    for given, choices in CASES:
        shape = replace(given, rows=1, tokens=128) if args.quick else given
        series = over_placements(
            lambda shape=shape, choices=choices: measure(shape, choices, args.repeats),  # type: ignore[misc]
            1 if args.quick else args.placements,
        )
        result.measurements |= {f"{shape.name}: {name}": one for name, one in series.items()}
        one = series["1 layers per page"]
        prices = ", ".join(f"{name}: {1 / speed(s, one).median:.3f}" for name, s in series.items())
        result.notes.append(
            f"{shape.name}, {shape.bytes_read >> 20} MiB a pass; time over that of one layer per "
            f"page: {prices}"
        )
    return result
