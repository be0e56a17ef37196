"""What does decode attention gain over block tables, and how much of it is the kernel?

A pass is one decode step's attention (Llama-3-8B's heads) in so many layers that eight times the
last-level cache is read. The native kernel runs over kvspan's memory, with one layer a page and
with all of them (which "auto" chooses for the whole model), and, the same kernel, through block
tables of 16, 32 and 128 tokens in dense memory: the difference is what contiguity gains or a layout
costs, the rest is the kernel.
Beside it vLLM's operator for CPUs in its own layout, a gather of the blocks with torch's attention,
and transformers' continuous batching (its cost grows with the square of the batch, so it is timed
at the smaller sizes only). All results agree before anything is timed. On one thread CPU time is
taken, on more the wall's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

import plots
from baselines import gather, transformers_paged, vllm_paged
from bench_attention import TIMES_CACHE, last_level_cache
from decode_attention import Layers, batches, dense, fill, span_layers, speed
from decode_problem import LLAMA, Problem, block_table, compare_and_time
from flash_compat.native import decode
from harness import Expectation, Result, Series

NAME = "vs-block-table"
BLOCK_SIZES = (16, 32, 128)
VLLM = "vLLM, blocks of 128"
# vLLM's time over the kernel's, from 4,096 tokens on, by dtype and threads; below, at least 1.
LEAST = {
    (torch.bfloat16, 1): 2.5,
    (torch.bfloat16, 2): 1.8,
    (torch.float32, 1): 1.6,
    (torch.float32, 2): 1.4,
}
ONE_LAYER, ALL_LAYERS = "kvspan, one layer a page", "kvspan, all layers a page"
MOST_BYTES_OF_TWO_LAYERS = 5 << 30  # four stores of them, in memory at once
MOST_TOKENS_OF_TRANSFORMERS = 8 * 4096


def kernels(
    problem: Problem, plain: Layers, spans: dict[str, Layers]
) -> dict[str, Callable[[], Tensor]]:
    """Return our kernel over spans and through block tables: [layers, rows, heads, dim]."""
    lengths, q = problem.lengths(), problem.queries()

    def over(layers: Layers, table: Tensor | None = None) -> Callable[[], Tensor]:
        return lambda: torch.stack(
            [decode(q, k, v, lengths, block_table=table)[:, 0] for k, v in layers]
        )

    found = {name: over(layers) for name, layers in spans.items()}
    for size in BLOCK_SIZES:
        table, pools = block_table(problem, plain, size)
        found[f"the same kernel, blocks of {size}"] = over(pools, table)
    return found


def others(
    problem: Problem, plain: Layers, args: argparse.Namespace
) -> dict[str, Callable[[], Tensor]]:
    """Return what other projects do."""
    lengths, q = problem.lengths(), problem.queries()[:, 0]
    table, pools = block_table(problem, plain, 16)
    gathered = [gather.PagedCache(k, v, table) for k, v in pools]
    found = {
        "gather blocks of 16, SDPA": lambda: torch.stack(
            [cache.attend(q, lengths) for cache in gathered]
        )
    }
    if (
        args.transformers
        and problem.shape.rows * problem.shape.tokens <= MOST_TOKENS_OF_TRANSFORMERS
    ):
        paged = [transformers_paged.PagedCache(k, v, q.shape[1]) for k, v in plain]
        found["transformers, paged"] = lambda: torch.stack(
            [cache.attend(q, lengths) for cache in paged]
        )
    if args.vllm:
        of_vllm = [vllm_paged.PagedCache(k, v, 128) for k, v in plain]

        def step() -> Tensor:
            plan = of_vllm[0].metadata(q, lengths)
            return torch.stack(
                [cache.attend(q, lengths, torch.empty_like(q), plan) for cache in of_vllm]
            )

        found[VLLM] = step
    return found


def measure(problem: Problem, args: argparse.Namespace) -> dict[str, Series]:
    """Allocate, compare, and time in turn."""
    plain = dense(problem.shape, head_major=False)
    fill(plain)
    layouts = {ONE_LAYER: 1, ALL_LAYERS: problem.shape.n_layers}
    if problem.shape.n_layers == 1:
        del layouts[ALL_LAYERS]
    stores = {name: span_layers(problem.shape, g) for name, g in layouts.items()}
    spans = {name: layers for name, (_, layers) in stores.items()}
    for layers in spans.values():
        fill(layers)
    compared = kernels(problem, plain, spans) | others(problem, plain, args)
    series = compare_and_time(problem, plain, compared, args)
    batches.clear()
    for cache, _ in stores.values():
        cache.close()
    return series


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the sizes and the baselines."""
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--vllm", action="store_true", help="beside vLLM's operator")
    parser.add_argument(
        "--install-vllm", action="store_true", help="download it first (a wheel of 130 MB)"
    )
    parser.add_argument("--transformers", action="store_true", help="beside transformers")
    parser.add_argument(
        "--install-transformers", action="store_true", help="download it first (280 MB unpacked)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="one layer each, nothing checked but that all agree"
    )
    plots.add_argument(parser)


def run(args: argparse.Namespace) -> Result:
    """Measure."""
    torch.set_num_threads(args.threads)
    if args.install_vllm:
        vllm_paged.install()
    if args.install_transformers:
        transformers_paged.install()
    result = Result({}, parameters={"threads": args.threads})
    panels: dict[str, dict[str, dict[str, float]]] = {}
    for name in args.dtypes:
        dtype = getattr(torch, name)
        for rows in args.batches:
            panel = panels.setdefault(f"{name}, batch {rows}", {})
            for tokens in args.contexts:
                problem = Problem(replace(LLAMA, dtype=dtype, rows=rows, tokens=tokens))
                least_bytes = 1 if args.quick else TIMES_CACHE * last_level_cache()
                two_layers = 2 * problem.bytes_read
                if not args.quick and two_layers <= MOST_BYTES_OF_TWO_LAYERS:
                    least_bytes = max(least_bytes, two_layers)
                problem = problem.in_layers(least_bytes)
                series = measure(problem, args)
                result.measurements |= {f"{problem.name}: {n}": one for n, one in series.items()}
                rates = {n: problem.bytes_read / one.median / 1e9 for n, one in series.items()}
                panel[f"{tokens:,} tokens"] = rates
                shown = ", ".join(f"{n} {rate:.1f}" for n, rate in rates.items())
                result.notes.append(f"{problem.name}, GB/s: {shown}")
                if VLLM in series and not args.quick:
                    least = LEAST.get((dtype, args.threads), 1.0) if tokens >= 4096 else 1.0
                    for n in (n for n in (ONE_LAYER, ALL_LAYERS) if n in series):
                        ratio = speed(series[n], series[VLLM]).median
                        what = f"{problem.name}: {n}, times vLLM's speed"
                        result.expectations.append(Expectation(what, ratio, least, True))
    if args.plot is not None:
        threads = f"{args.threads} thread{'s' if args.threads > 1 else ''}"
        plots.bars(args.plot, f"Decode attention on a CPU, {threads}", "GB/s of KV read", panels)
    return result
