"""One decode step's attention over every layer of a cache, however the cache lies in memory.

The kernel is torch's own scaled_dot_product_attention, unmodified, with the query heads of a group
folded into the query length. What differs between the cases is only where K and V are.
"""

from __future__ import annotations

import argparse
import mmap
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import kvspan
from harness import BenchError, Series

HUGE_PAGE = 2 << 20
Layers = list[tuple[Tensor, Tensor]]  # K and V, each [rows, tokens, heads, dim]


@dataclass(frozen=True)
class Shape:
    """What is attended over."""

    name: str
    n_layers: int
    heads: int
    group: int  # query heads to a KV head
    dim: int
    dtype: torch.dtype
    rows: int = 8
    tokens: int = 1024

    @property
    def bytes_read(self) -> int:
        """Bytes of K and V that one pass reads."""
        n = self.rows * self.tokens * self.n_layers * 2 * self.heads * self.dim
        return n * self.dtype.itemsize


SMOLLM2 = Shape("SmolLM2-135M fp32", 30, 3, 3, 64, torch.float32)
LLAMA = Shape("8 layers of Llama-3-8B bf16", 8, 8, 4, 128, torch.bfloat16, rows=8, tokens=1024)


def span_layers(
    shape: Shape, layers_per_page: int | str, huge_pages: bool | str = True
) -> tuple[kvspan.KVCache, Layers]:
    """Make a cache with all rows at full length, and show it."""
    # At most one page partly filled for each row and layer.
    capacity = (-(-shape.bytes_read // HUGE_PAGE) + shape.rows * shape.n_layers) * HUGE_PAGE
    pool = kvspan.Pool(capacity=capacity, huge_pages=huge_pages)
    cache = kvspan.KVCache(
        pool,
        shape.n_layers,
        shape.heads,
        shape.dim,
        shape.dtype,
        max_seqs=shape.rows,
        max_seq_len=shape.tokens,
        layers_per_page=layers_per_page,
    )
    batch = cache.batch(shape.rows)
    batch.step(shape.tokens)
    batches.append(batch)
    if huge_pages and pool.stats().small_bytes:
        raise BenchError(f"the kernel refuses huge pages: {pool.stats().huge_refusal}")
    return cache, [(k, v) for k, v in (batch.layer(i) for i in range(shape.n_layers))]


batches: list[kvspan.Batch] = []  # kept, for dropping one releases its rows


def plain_memory(n_bytes: int) -> Tensor:
    """Return anonymous memory in huge pages, touched, as uint8."""
    mapping = mmap.mmap(-1, n_bytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapping.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(mapping, dtype=torch.uint8)
    memory = memory[-memory.data_ptr() % HUGE_PAGE :][:n_bytes]
    before = _anonymous_huge_bytes()
    memory.zero_()
    if _anonymous_huge_bytes() - before < 0.95 * n_bytes:
        raise BenchError("the kernel gives no huge pages for plain memory")
    return memory


def same_strides(layers: Layers) -> Layers:
    """Return plain memory with the very strides of `layers`, which are of one lane."""
    k0 = layers[0][0]
    base = min(plane.data_ptr() for pair in layers for plane in pair)
    memory = plain_memory(k0.shape[0] * k0.stride(0) * k0.element_size()).view(k0.dtype)

    def twin(plane: Tensor) -> Tensor:
        offset = (plane.data_ptr() - base) // plane.element_size()
        return memory.as_strided(plane.shape, plane.stride(), offset)

    return [(twin(k), twin(v)) for k, v in layers]


def longer_records(shape: Shape, extra_bytes: int) -> Layers:
    """Return plain memory as one lane of all layers has it, but for so many bytes a position."""
    record = shape.n_layers * 2 * shape.heads * shape.dim + extra_bytes // shape.dtype.itemsize
    n_bytes = shape.rows * shape.tokens * record * shape.dtype.itemsize
    memory = plain_memory(-(-n_bytes // HUGE_PAGE) * HUGE_PAGE).view(shape.dtype)
    size = (shape.rows, shape.tokens, shape.heads, shape.dim)
    strides = (shape.tokens * record, record, shape.dim, 1)
    planes = [
        memory.as_strided(size, strides, i * shape.heads * shape.dim)
        for i in range(2 * shape.n_layers)
    ]
    return list(zip(planes[::2], planes[1::2], strict=True))


def dense(shape: Shape, head_major: bool) -> Layers:
    """Return dense K and V of every layer: [rows, tokens, heads, dim], or heads before tokens."""
    plane = shape.bytes_read // shape.n_layers // 2
    memory = plain_memory(plane * 2 * shape.n_layers).view(shape.dtype)
    outer = (shape.n_layers, 2, shape.rows)
    if head_major:
        planes = memory.view(*outer, shape.heads, shape.tokens, shape.dim).transpose(3, 4)
    else:
        planes = memory.view(*outer, shape.tokens, shape.heads, shape.dim)
    return [(k, v) for k, v in planes]


def fill(layers: Layers) -> None:
    """Write the same numbers whatever the strides."""
    generator = torch.Generator().manual_seed(0)
    for pair in layers:
        for plane in pair:
            plane.copy_(torch.randn(plane.shape, generator=generator))


def attend(shape: Shape, layers: Layers) -> Callable[[], Tensor]:
    """Return a pass over all layers: outputs [layers, rows, heads, group, dim]."""
    q = torch.randn(
        shape.rows, shape.heads, shape.group, shape.dim, generator=torch.Generator().manual_seed(1)
    ).to(shape.dtype)

    @torch.inference_mode()
    def run() -> Tensor:
        return torch.stack(
            [
                scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2))
                for k, v in layers
            ]
        )

    return run


def is_close(a: Tensor, b: Tensor) -> bool:
    """Whether two passes agree as far as another order of additions allows."""
    return torch.allclose(a.float(), b.float(), rtol=2e-2, atol=2e-2)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the benchmarks of attention have in common."""
    parser.add_argument(
        "--placements",
        type=int,
        default=3,
        help="how often all memory is allocated anew, for where it lies matters, too (default: 3)",
    )
    # On a machine that others use, two threads that wait for each other measure the others.
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument(
        "--quick", action="store_true", help="a few MiB, nothing checked but that results agree"
    )


def over_placements(measure: Callable[[], dict[str, Series]], n: int) -> dict[str, Series]:
    """Measure in n placements of the memory; put the samples together."""
    placed = [measure() for _ in range(n)]
    return {
        name: Series(tuple(x for one in placed for x in one[name].samples)) for name in placed[0]
    }


def speed(of: Series, over: Series) -> Series:
    """Divide round by round: what was timed together met the same disturbance."""
    ratios = (b / a for a, b in zip(of.samples, over.samples, strict=True))
    return Series(tuple(ratios), unit="x")


def _anonymous_huge_bytes() -> int:
    with open("/proc/self/smaps_rollup") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if "AnonHugePages" in line)
