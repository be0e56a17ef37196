"""What does attention pay for the longer strides when more layers share a page?

The same kernel over span tensors of every `layers_per_page`, interleaved. This is the measurement
behind the automatic choice of the layout.
"""

from __future__ import annotations

import argparse

import torch

from decode_attention import LLAMA, SMOLLM2, attend, fill, is_close, span_layers
from harness import Result, interleave

NAME = "layout"


def run(args: argparse.Namespace) -> Result:
    """Measure."""
    result = Result({}, parameters={"threads": torch.get_num_threads()})
    for shape, choices in ((SMOLLM2, (1, 5, 30)), (LLAMA, (1, 2, 8))):
        cases = {}
        caches = []
        for layers_per_page in choices:
            cache, layers = span_layers(shape, layers_per_page)
            fill(layers)
            caches.append(cache)
            cases[f"{shape.name}: {layers_per_page} layers per page"] = attend(shape, layers)
        series = interleave(cases, max(args.repeats, 15), equal=is_close)
        result.measurements |= series
        one = next(iter(series.values())).median
        ratios = ", ".join(
            f"{n}: {s.median / one:.3f}" for n, s in zip(choices, series.values(), strict=True)
        )
        result.notes.append(f"{shape.name}: time over that of one layer per page: {ratios}")
        for cache in caches:
            cache.close()
    return result
