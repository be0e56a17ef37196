"""One decode step's attention as benchmarks pose it: rows, lengths, queries, block tables.

Keys and values are the layers of decode_attention.py.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from decode_attention import Layers, Shape, is_close
from harness import BenchError, Series, interleave

LLAMA = Shape("", 1, 8, 4, 128, torch.bfloat16)  # one layer of Llama-3-8B


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

    def in_layers(self, least_bytes: int) -> Problem:
        """Return the same in so many layers that at least these bytes are read."""
        n_layers = -(-least_bytes // self.bytes_read)
        return replace(self, shape=replace(self.shape, n_layers=n_layers))


def block_table(problem: Problem, layers: Layers, block_size: int) -> tuple[Tensor, Layers]:
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


def reader(problem: Problem, layers: Layers) -> Callable[[], object]:
    """Return the sum of all bytes that attention reads, as integers of 64 bits."""
    planes = [plane.view(torch.int64) for pair in layers for plane in pair]
    if problem.is_ragged:
        lengths = problem.lengths().tolist()
        planes = [plane[row, :n] for plane in planes for row, n in enumerate(lengths)]
    return lambda: [plane.sum() for plane in planes]


def compare_and_time(
    problem: Problem,
    plain: Layers,
    cases: dict[str, Callable[[], Tensor]],
    args: argparse.Namespace,
) -> dict[str, Series]:
    """Require that all cases agree; time them and the reading of dense layers in turn.

    On one thread that is CPU time, on more the wall's.
    """
    first = next(iter(cases.values()))()
    for name, case in cases.items():
        if not is_close(first, case()):
            raise BenchError(f"{problem.name}: {name} gives something else")
    return interleave(
        {"read": reader(problem, plain), **cases},
        args.repeats,
        clock=time.process_time_ns if args.threads == 1 else time.perf_counter_ns,
    )
