"""How near does the native decode kernel come to the speed of reading memory, and what else does?

A pass is one decode step's attention in so many layers that eight times the last-level cache is
read. "read" adds up the same bytes as integers. The kernel runs over dense memory, over kvspan's
own, and through block tables, whose blocks are shuffled within each row; with --vllm beside vLLM's
operator for CPUs, over its own layout. The results of all agree. On one thread CPU time is taken,
on more the wall's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from baselines import vllm_paged
from bench_attention import TIMES_CACHE, last_level_cache
from decode_attention import Shape, batches, dense, fill, is_close, span_layers, speed
from flash_compat.native import decode
from harness import Expectation, Result, Series, interleave

NAME = "decode"
LEAST_SHARE = 0.65
BLOCK_SIZES = (16, 32, 128)
# vLLM's time over the kernel's, from 4,096 tokens on, by dtype and threads.
OVER_VLLM = {
    (torch.bfloat16, 1): 2.5,
    (torch.bfloat16, 2): 1.8,
    (torch.float32, 1): 1.6,
    (torch.float32, 2): 1.4,
}
VLLM = "vLLM, blocks of 128"
SLOW = ("SDPA enable_gqa", "SDPA folded")


@dataclass(frozen=True)
class Problem:
    """Rows of one shape, all of full length or ragged."""

    shape: Shape
    is_ragged: bool = False

    @property
    def name(self) -> str:
        s = self.shape
        dtype = str(s.dtype).removeprefix("torch.")
        lengths = f"up to {s.tokens}" if self.is_ragged else str(s.tokens)
        return f"{dtype}, {s.heads}x{s.group} heads of {s.dim}, batch {s.rows}, {lengths} tokens"

    def lengths(self) -> Tensor:
        s = self.shape
        if not self.is_ragged:
            return torch.full((s.rows,), s.tokens, dtype=torch.int32)
        generator = torch.Generator().manual_seed(2)
        return torch.randint(0, s.tokens + 1, (s.rows,), generator=generator, dtype=torch.int32)

    def queries(self) -> Tensor:
        """[rows, 1, heads, dim]; the same ones each time."""
        s = self.shape
        generator = torch.Generator().manual_seed(1)
        return torch.randn(s.rows, 1, s.heads * s.group, s.dim, generator=generator).to(s.dtype)

    @property
    def bytes_read(self) -> int:
        s = self.shape
        return s.bytes_read * int(self.lengths().sum()) // (s.rows * s.tokens)


def problems(args: argparse.Namespace) -> list[Problem]:
    """Return Llama-3-8B's attention at all sizes that are asked for, then other shapes."""
    llama = Shape("", 1, 8, 4, 128, torch.bfloat16)
    dtypes = [getattr(torch, name) for name in args.dtypes]
    found = [
        Problem(replace(llama, dtype=dtype, rows=rows, tokens=tokens))
        for dtype in dtypes
        for rows in args.batches
        for tokens in args.contexts
    ]
    for dtype in dtypes if args.other_shapes else []:
        at = replace(llama, dtype=dtype, rows=8, tokens=4096)
        found.append(Problem(at, is_ragged=True))
        found += [
            Problem(replace(at, heads=heads, group=group, dim=dim))
            for heads, group, dim in (
                (32, 1, 128), (8, 1, 128), (8, 2, 128), (8, 3, 128), (8, 7, 128), (8, 8, 128),
                (1, 8, 128), (8, 4, 64), (8, 4, 80), (8, 4, 96), (8, 4, 256),
            )
        ]  # fmt: skip
    least = 1 if args.quick else TIMES_CACHE * last_level_cache()
    return [replace(p, shape=replace(p.shape, n_layers=-(-least // p.bytes_read))) for p in found]


def cases(
    problem: Problem, plain: list[tuple[Tensor, Tensor]], span: list[tuple[Tensor, Tensor]]
) -> dict[str, Callable[[], Tensor]]:
    """Return what is compared; each gives [layers, rows, heads, dim]."""
    shape = problem.shape
    lengths = problem.lengths()
    q = problem.queries()

    def native(layers: list[tuple[Tensor, Tensor]]) -> Tensor:
        return torch.stack([decode(q, k, v, lengths)[:, 0] for k, v in layers])

    def through(block_size: int) -> Callable[[], Tensor]:
        table, pools = block_table(problem, plain, block_size)
        return lambda: torch.stack(
            [decode(q, k, v, lengths, block_table=table)[:, 0] for k, v in pools]
        )

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

    found = {"kernel": lambda: native(plain), "kernel, span": lambda: native(span)}
    found |= {f"kernel, blocks of {size}": through(size) for size in BLOCK_SIZES}
    if not problem.is_ragged:
        found |= {"SDPA folded": folded, "SDPA enable_gqa": with_gqa}
    return found


def vllm(problem: Problem, layers: list[tuple[Tensor, Tensor]]) -> Callable[[], Tensor]:
    """Return vLLM's decode over the same keys and values, at the block size that suits it best."""
    lengths = problem.lengths()
    query = problem.queries()[:, 0]
    caches = [vllm_paged.PagedCache(k, v, 128) for k, v in layers]

    def step() -> Tensor:
        plan = caches[0].metadata(query, lengths)
        return torch.stack(
            [c.attend(query, lengths, torch.empty_like(query), plan) for c in caches]
        )

    return step


def block_table(
    problem: Problem, layers: list[tuple[Tensor, Tensor]], block_size: int
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Return each row's blocks in an order of their own, and the planes as pools of blocks.

    Only whole blocks change places: the last, partly valid one stays the last.
    """
    shape = problem.shape
    per_row = shape.tokens // block_size
    table = torch.empty(shape.rows, per_row, dtype=torch.int32)
    generator = torch.Generator().manual_seed(3)
    for row, length in enumerate(problem.lengths().tolist()):
        whole = length // block_size
        order = torch.arange(per_row)
        order[:whole] = torch.randperm(whole, generator=generator)
        table[row] = row * per_row + order
    size = (-1, block_size, shape.heads, shape.dim)
    return table, [(k.reshape(size), v.reshape(size)) for k, v in layers]


def reader(problem: Problem, layers: list[tuple[Tensor, Tensor]]) -> Callable[[], object]:
    """Return the sum of all bytes that attention reads, as integers of 64 bits."""
    planes = [plane.view(torch.int64) for pair in layers for plane in pair]
    if problem.is_ragged:
        lengths = problem.lengths().tolist()
        planes = [plane[row, :n] for plane in planes for row, n in enumerate(lengths)]
    return lambda: [plane.sum() for plane in planes]


def measure(problem: Problem, args: argparse.Namespace) -> dict[str, Series]:
    """Allocate, compare, and time in turn."""
    shape = problem.shape
    plain = dense(shape, head_major=False)
    fill(plain)
    cache, span = span_layers(shape, "auto")
    with cache:
        fill(span)
        compared = cases(problem, plain, span)
        if args.only_kernel:
            compared = {name: case for name, case in compared.items() if name not in SLOW}
        if args.vllm and not problem.is_ragged:
            compared[VLLM] = vllm(problem, plain)
        first = compared["kernel"]()
        for name, case in compared.items():
            if not is_close(first, case()):
                raise ValueError(f"{problem.name}: {name} gives something else")
        series = interleave(
            {"read": reader(problem, plain), **compared},
            args.repeats,
            clock=time.process_time_ns if args.threads == 1 else time.perf_counter_ns,
        )
        batches.clear()
    return series


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the sizes."""
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--other-shapes", action="store_true", help="other heads and lengths, too")
    parser.add_argument("--only-kernel", action="store_true", help="leave torch's kernels out")
    parser.add_argument("--vllm", action="store_true", help="beside vLLM's operator")
    parser.add_argument(
        "--install-vllm", action="store_true", help="download it first (a wheel of 130 MB)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="one layer each, nothing checked but that all agree"
    )


def run(args: argparse.Namespace) -> Result:
    """Measure."""
    torch.set_num_threads(args.threads)
    if args.install_vllm:
        vllm_paged.install()
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
        if VLLM in series:
            ratio = speed(series["kernel"], series[VLLM])
            result.measurements[f"{problem.name}: vLLM's time over the kernel's"] = ratio
            least = OVER_VLLM.get((problem.shape.dtype, args.threads), 1.0)
            least = least if problem.shape.tokens >= 4096 else 1.0
            result.expectations.append(
                Expectation(f"{problem.name}: times vLLM's speed", ratio.median, least, True)
            )
        if args.threads == 1:
            result.expectations.append(
                Expectation(f"{problem.name}: share of read", share.median, LEAST_SHARE, True)
            )
    return result
