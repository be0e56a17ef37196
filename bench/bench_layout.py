"""What does attention pay for the longer strides when more layers share a page?

Unmodified kernels over span tensors of every `layers_per_page`, interleaved, over several
placements of all memory: decoding by flash_compat's native kernel and by torch's, and prefilling
(causal) by torch's, through flash_compat. This is the measurement behind the automatic choice of
the layout: the price of a choice is the median, over rounds, of its time over that of one layer a
page. Beside them dense tensors, and all layers per page in plain memory with a cache line between
records: what of the price is that long strides are multiples of what the caches are indexed by.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from decode_attention import (
    SMOLLM2,
    Layers,
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
from flash_compat import flash_attn_func
from flash_compat.native import decode
from harness import Result, Series, interleave

__all__ = ["NAME", "add_arguments", "run"]

NAME = "layout"
SMOL = replace(SMOLLM2, rows=6)
LLAMA = Shape("Llama-3-8B bf16", 32, 8, 4, 128, torch.bfloat16, rows=2)
MQA = Shape("one KV head of 128, bf16", 32, 1, 8, 128, torch.bfloat16, rows=16)
SHAPES = (
    SMOL,
    replace(SMOL, name="SmolLM2-135M bf16", dtype=torch.bfloat16, rows=12),
    LLAMA,
    replace(LLAMA, name="Llama-3-8B fp32", dtype=torch.float32, rows=1),
    MQA,
)
PREFILLED_LAYERS = 2  # computing outweighs reading: a few layers of one row say it


def native(shape: Shape, layers: Layers) -> Callable[[], Tensor]:
    """Return a decode step's attention by the native kernel."""
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(shape.rows, 1, shape.heads * shape.group, shape.dim, generator=generator)
    lengths = torch.full((shape.rows,), shape.tokens, dtype=torch.int32)
    return lambda: torch.stack([decode(q.to(shape.dtype), k, v, lengths) for k, v in layers])


def prefill(shape: Shape, layers: Layers) -> Callable[[], Tensor]:
    """Return a prompt's causal attention in the first layers of the first row."""
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(1, shape.tokens, shape.heads * shape.group, shape.dim, generator=generator)
    first = [(k[:1], v[:1]) for k, v in layers[:PREFILLED_LAYERS]]
    return lambda: torch.stack(
        [flash_attn_func(q.to(shape.dtype), k, v, causal=True) for k, v in first]
    )


KERNELS = {"decode, native": native, "decode, torch": attend, "prefill": prefill}


def choices(n_layers: int) -> list[int]:
    """Return every `layers_per_page` that leaves no page with fewer layers."""
    return [n for n in range(1, n_layers + 1) if n_layers % n == 0]


def measure(shape: Shape, args: argparse.Namespace) -> dict[str, Series]:
    """Allocate every layout, and the dense one; compare; time a pass over each in turn."""
    stores = {name_of(n): span_layers(shape, n) for n in choices(shape.n_layers)}
    layers = {name: store for name, (_, store) in stores.items()}
    layers["all layers, 64 B between records"] = longer_records(shape, 64)
    layers["dense [B,L,H,D]"] = dense(shape, head_major=False)
    for store in layers.values():
        fill(store)
    clock = time.process_time_ns if args.threads == 1 else time.perf_counter_ns
    series: dict[str, Series] = {}
    for kernel, function in KERNELS.items():
        passes = {f"{kernel}, {name}": function(shape, store) for name, store in layers.items()}
        series |= interleave(passes, args.repeats, equal=is_close, clock=clock)
    batches.clear()
    for cache, _ in stores.values():
        cache.close()
    return series


def name_of(layers_per_page: int) -> str:
    """Return what a layout is called in the results."""
    return f"{layers_per_page} layers per page"


def run(args: argparse.Namespace) -> Result:
    """Measure."""
    torch.set_num_threads(args.threads)
    result = Result({}, parameters={"threads": args.threads, "placements": args.placements})
    for given in SHAPES:
        shape = replace(given, rows=1, tokens=128) if args.quick else given
        series = over_placements(
            lambda shape=shape: measure(shape, args),  # type: ignore[misc]
            1 if args.quick else args.placements,
        )
        result.measurements |= {f"{shape.name}: {name}": one for name, one in series.items()}
        for kernel in KERNELS:
            one = series[f"{kernel}, {name_of(1)}"]
            prices = ", ".join(
                f"{name.removeprefix(kernel + ', ')} {1 / speed(s, one).median:.3f}"
                for name, s in series.items()
                if name.startswith(kernel)
            )
            result.notes.append(
                f"{shape.name}, {kernel}: time over that of one layer per page: {prices}"
            )
    return result
