"""How near does the native decode kernel come to the speed of reading memory?

A pass is one decode step's attention in so many layers that eight times the last-level cache is
read. "read" adds up the same bytes as integers. The kernel runs over dense memory and over
kvspan's own, with one layer a page and with all of them (which "auto" chooses for the whole model);
beside it torch's attention as transformers calls it (enable_gqa), and with the heads of a group
folded into the query's length. The results of all agree. On one thread CPU time is taken, on more
the wall's. `vs-block-table` compares with block tables.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench_attention import TIMES_CACHE, last_level_cache
from decode_attention import Layers, batches, dense, fill, span_layers, speed
from decode_problem import LLAMA, Problem, compare_and_time
from flash_compat.native import decode
from harness import Expectation, Result, Series

NAME = "decode"
LEAST_SHARE = 0.65
# Over SDPA with enable_gqa, bfloat16, from 8,192 tokens on.
LEAST_OVER_GQA = 10.0
GQA = "SDPA enable_gqa"
OTHER_SHAPES = (
    (32, 1, 128), (8, 1, 128), (8, 2, 128), (8, 3, 128), (8, 7, 128), (8, 8, 128),
    (1, 8, 128), (8, 4, 64), (8, 4, 80), (8, 4, 96), (8, 4, 256),
)  # fmt: skip


def problems(args: argparse.Namespace) -> list[Problem]:
    """Return Llama-3-8B's attention at all sizes that are asked for, then other shapes."""
    dtypes = [getattr(torch, name) for name in args.dtypes]
    found = [
        Problem(replace(LLAMA, dtype=dtype, rows=rows, tokens=tokens))
        for dtype in dtypes
        for rows in args.batches
        for tokens in args.contexts
    ]
    for dtype in dtypes if args.other_shapes else []:
        at = replace(LLAMA, dtype=dtype, rows=8, tokens=4096)
        found.append(Problem(at, is_ragged=True))
        found += [
            Problem(replace(at, heads=heads, group=group, dim=dim))
            for heads, group, dim in OTHER_SHAPES
        ]
    return [
        p.in_layers(1 if args.quick else max(TIMES_CACHE * last_level_cache(), 2 * p.bytes_read))
        for p in found
    ]


def cases(
    problem: Problem, plain: Layers, spans: dict[str, Layers]
) -> dict[str, Callable[[], Tensor]]:
    """Return what is compared; each gives [layers, rows, heads, dim]."""
    shape = problem.shape
    lengths = problem.lengths()
    q = problem.queries()

    def native(layers: Layers) -> Callable[[], Tensor]:
        return lambda: torch.stack([decode(q, k, v, lengths)[:, 0] for k, v in layers])

    def folded() -> Tensor:
        of = q.view(shape.rows, shape.heads, shape.group, shape.dim)
        return torch.stack(
            [
                scaled_dot_product_attention(of, k.transpose(1, 2), v.transpose(1, 2)).flatten(1, 2)
                for k, v in plain
            ]
        )

    def with_gqa() -> Tensor:
        of = q.transpose(1, 2)
        return torch.stack(
            [
                scaled_dot_product_attention(
                    of, k.transpose(1, 2), v.transpose(1, 2), enable_gqa=True
                )[:, :, 0]
                for k, v in plain
            ]
        )

    found = {"kernel": native(plain)}
    found |= {f"kernel, span, {name}": native(layers) for name, layers in spans.items()}
    if not problem.is_ragged:
        found |= {"SDPA folded": folded, GQA: with_gqa}
    return found


def measure(problem: Problem, args: argparse.Namespace) -> dict[str, Series]:
    """Allocate, compare, and time in turn."""
    plain = dense(problem.shape, head_major=False)
    fill(plain)
    stores = {
        "one layer a page": span_layers(problem.shape, 1),
        "all layers a page": span_layers(problem.shape, problem.shape.n_layers),
    }
    spans = {name: layers for name, (_, layers) in stores.items()}
    for layers in spans.values():
        fill(layers)
    compared = cases(problem, plain, spans)
    if args.only_kernel:
        compared = {name: case for name, case in compared.items() if name.startswith("kernel")}
    series = compare_and_time(problem, plain, compared, args)
    batches.clear()
    for cache, _ in stores.values():
        cache.close()
    return series


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the sizes."""
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--other-shapes", action="store_true", help="other heads and lengths, too")
    parser.add_argument("--only-kernel", action="store_true", help="leave torch's kernels out")
    parser.add_argument(
        "--quick", action="store_true", help="one layer each, nothing checked but that all agree"
    )


def run(args: argparse.Namespace) -> Result:
    """Measure."""
    torch.set_num_threads(args.threads)
    result = Result({}, parameters={"threads": args.threads})
    for problem in problems(args):
        series = measure(problem, args)
        result.measurements |= {f"{problem.name}: {name}": one for name, one in series.items()}
        share = speed(series["kernel"], series["read"])
        result.measurements[f"{problem.name}: kernel's share of read"] = share
        rates = ", ".join(
            f"{name} {problem.bytes_read / one.median / 1e9:.1f}" for name, one in series.items()
        )
        result.notes.append(f"{problem.name}, GB/s: {rates}")
        if args.quick:
            continue
        if args.threads == 1:
            result.expectations.append(
                Expectation(f"{problem.name}: share of read", share.median, LEAST_SHARE, True)
            )
        if GQA in series and problem.shape.dtype == torch.bfloat16 and problem.shape.tokens >= 8192:
            over = speed(series["kernel, span, all layers a page"], series[GQA])
            result.expectations.append(
                Expectation(f"{problem.name}: times {GQA}", over.median, LEAST_OVER_GQA, True)
            )
    return result
