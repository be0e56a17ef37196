"""The native decode kernel against attention written out in float64.

Its error is bounded as flash-attn's own tests bound theirs: at most twice that of the same written
out in the tensors' own precision, and a little.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from reference import attention

from flash_compat.native import can_decode, decode, levels

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ATOL = {FP32: 3e-6, BF16: 2e-3, FP16: 3e-4}
LENGTHS = (0, 1, 31, 32, 33, 100, 257)


@dataclass(frozen=True)
class Case:
    """A problem, and its parts as the kernel takes them."""

    q: torch.Tensor  # [batch, queries, heads, dim]
    k: torch.Tensor  # [slots, positions, kv_heads, dim]
    v: torch.Tensor
    lengths: torch.Tensor
    begins: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    causal: bool = True
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi_slopes: torch.Tensor | None = None
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None

    def written_out(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return outputs and log-sum-exps, every operation in `dtype`."""
        rows = []
        for row, n in enumerate(self.lengths.tolist()):
            slot = row if self.slots is None else int(self.slots[row])
            begin = 0 if self.begins is None else min(int(self.begins[row]), n)
            k, v = (
                plane[slot, begin:n].to(dtype)
                * (1 if scale is None else scale.to(dtype).view(-1, 1))
                for plane, scale in ((self.k, self.k_scale), (self.v, self.v_scale))
            )
            slopes = self.alibi_slopes
            rows.append(
                attention(
                    self.q[row],
                    k,
                    v,
                    causal=self.causal,
                    window=self.window,
                    softcap=self.softcap,
                    slopes=slopes if slopes is None or slopes.dim() == 1 else slopes[row],
                    dtype=dtype,
                )
            )
        outs, lses = zip(*rows, strict=True)
        return torch.stack(outs), torch.stack(lses)


def make(
    dtype: torch.dtype = FP32,
    group: int = 4,
    dim: int = 64,
    lengths: tuple[int, ...] = LENGTHS,
    queries: int = 1,
    kv_heads: int = 2,
    **more: Any,
) -> Case:
    """Make a case whose memory before the begins and beyond the lengths is NaN."""
    generator = torch.Generator().manual_seed(0)
    batch, room = len(lengths), max(lengths) + 5

    def normal(*shape: int, times: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * times).to(dtype)

    # Queries of some size, so that the weights are uneven.
    case = Case(
        normal(batch, queries, group * kv_heads, dim, times=2.0),
        normal(batch, room, kv_heads, dim),
        normal(batch, room, kv_heads, dim),
        torch.tensor(lengths, dtype=torch.int32),
        **more,
    )
    for row, n in enumerate(lengths):
        slot = row if case.slots is None else int(case.slots[row])
        case.k[slot, n:] = torch.nan
        case.v[slot, n:] = torch.nan
        if case.begins is not None:
            case.k[slot, : case.begins[row]] = torch.nan
            case.v[slot, : case.begins[row]] = torch.nan
    return case


def run(case: Case, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    batch, n_queries, n_heads, _ = case.q.shape
    lse = torch.full((batch, n_heads, n_queries), 7.0)
    out = decode(
        case.q,
        case.k,
        case.v,
        case.lengths,
        lse=lse,
        **{
            "begins": case.begins,
            "slots": case.slots,
            "causal": case.causal,
            "window": case.window,
            "softcap": case.softcap,
            "alibi_slopes": case.alibi_slopes,
            "k_scale": case.k_scale,
            "v_scale": case.v_scale,
            **more,
        },
    )
    return out, lse


def check(case: Case, **more: Any) -> None:
    out, lse = run(case, **more)
    exact, exact_lse = case.written_out(torch.float64)
    dtype = case.q.dtype
    same, _ = case.written_out(dtype)
    allowed = 2 * (same.double() - exact).abs().max().item() + ATOL[dtype]
    assert not out.isnan().any()
    assert (out.double() - exact).abs().max().item() <= allowed
    assert torch.equal(lse.isinf(), exact_lse.isinf())
    finite = exact_lse.isfinite()
    torch.testing.assert_close(
        lse.double()[finite], exact_lse[finite], rtol=1e-5, atol=1e-5 if dtype == FP32 else 2e-3
    )


@pytest.fixture(params=levels())
def level(request: pytest.FixtureRequest) -> str:
    """Every level that this processor runs."""
    return str(request.param)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 12])
def test_groups(level: str, dtype: torch.dtype, group: int) -> None:
    check(make(dtype, group), level=level)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("dim", [32, 40, 64, 72, 80, 96, 100, 112, 128, 192, 256])
def test_head_dims(level: str, dtype: torch.dtype, dim: int) -> None:
    check(make(dtype, 2, dim), level=level)


@pytest.mark.parametrize("dim", [8, 9, 16, 24, 31, 33])
def test_small_and_odd_head_dims_take_a_narrower_level(dim: int) -> None:
    check(make(BF16, 4, dim))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("queries", [2, 5, 16])
@pytest.mark.parametrize("window", [(-1, -1), (40, -1), (0, 0), (70, 3)])
def test_queries_and_windows(
    level: str, queries: int, causal: bool, window: tuple[int, int]
) -> None:
    check(make(FP32, 2, 32, queries=queries, causal=causal, window=window), level=level)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("window", [(-1, -1), (40, -1)])
def test_rows_that_begin_late(
    level: str, queries: int, causal: bool, window: tuple[int, int]
) -> None:
    begins = torch.tensor([0, 3, 30, 1, 33, 64, 250], dtype=torch.int32)
    case = make(FP32, 2, 32, queries=queries, causal=causal, window=window, begins=begins)
    check(case, level=level, n_threads=3)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("queries", [1, 4])
def test_softcap(level: str, dtype: torch.dtype, queries: int) -> None:
    case = make(dtype, queries=queries, softcap=3.0)
    check(replace(case, q=case.q * 4), level=level)
    check(replace(case, softcap=50.0), level=level)


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_alibi(level: str, per_row: bool, queries: int, causal: bool) -> None:
    slopes = torch.rand((len(LENGTHS), 6) if per_row else (6,)) * 0.3
    check(make(group=3, queries=queries, alibi_slopes=slopes, causal=causal), level=level)


@pytest.mark.parametrize("n_threads", [1, 2, 3, 8])
def test_slots_and_threads(level: str, n_threads: int) -> None:
    slots = torch.tensor([3, 0, 6, 1, 5, 2, 4], dtype=torch.int32)
    check(make(slots=slots), level=level, n_threads=n_threads)


@pytest.mark.parametrize("n_threads", [2, 3, 7])
@pytest.mark.parametrize("lengths", [(5000,), (0, 3000, 1, 0, 2000)])
def test_long_contexts_are_split(level: str, lengths: tuple[int, ...], n_threads: int) -> None:
    case = make(BF16, 8, 128, lengths)
    check(case, level=level, n_threads=n_threads)
    first, again = (run(case, level=level, n_threads=n_threads) for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


def test_threads_of_an_openmp_region_that_gives_one() -> None:
    """Called on a thread of its own, where torch's pool starts anew."""
    import threading

    case = make(lengths=(3000, 40))
    expected = run(case, n_threads=2)[0]
    got: list[torch.Tensor] = []
    threads = [
        threading.Thread(target=lambda: got.append(run(case, n_threads=2)[0])) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 4
    assert all(torch.equal(one, expected) for one in got)


def _lay_out(plane: torch.Tensor, layout: str) -> torch.Tensor:
    slots, positions, heads, dim = plane.shape
    if layout == "all layers in one page":
        memory = torch.full((slots, positions, 5, heads, dim), torch.nan).to(plane.dtype)
        view = memory[:, :, 3]
    elif layout == "heads first":
        view = plane.new_empty(slots, heads, positions, dim).transpose(1, 2)
    else:
        memory = torch.full((slots, positions, heads, dim + 3), torch.nan).to(plane.dtype)
        view = memory[..., 1 : dim + 1]
    return view.copy_(plane)


@pytest.mark.parametrize("layout", ["all layers in one page", "heads first", "uneven"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_layouts(level: str, dtype: torch.dtype, layout: str) -> None:
    case = make(dtype, lengths=(0, 700, 33, 1), kv_heads=3)
    moved = replace(case, k=_lay_out(case.k, layout), v=_lay_out(case.v, layout))
    check(moved, level=level, n_threads=3)
    q = torch.randn(4, 12, 2, 70).to(dtype).transpose(1, 2)[..., 3:67]
    out = torch.empty(4, 12, 2, 64, dtype=dtype).transpose(1, 2)
    case = replace(moved, q=q)
    assert run(case, out=out)[0] is out
    assert torch.equal(out, run(replace(case, q=q.contiguous()))[0])


@pytest.mark.parametrize("block_size", [1, 7, 16, 32, 128])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_block_tables_give_the_same_bits(level: str, dtype: torch.dtype, block_size: int) -> None:
    case = make(dtype, lengths=(0, 1, 900, 33, 128), queries=2, window=(500, -1))
    expected = run(case, level=level, n_threads=3)
    blocks = -(-case.k.shape[1] // block_size)
    order = torch.randperm(len(case.lengths) * blocks).view(len(case.lengths), blocks)
    k, v = (_in_blocks(plane, order, block_size) for plane in (case.k, case.v))
    paged = run(
        replace(case, k=k, v=v), block_table=order.to(torch.int32), level=level, n_threads=3
    )
    assert torch.equal(paged[0], expected[0])
    assert torch.equal(paged[1], expected[1])


def _in_blocks(plane: torch.Tensor, order: torch.Tensor, block_size: int) -> torch.Tensor:
    slots, positions, heads, dim = plane.shape
    pool = plane.new_full((order.numel(), block_size, heads, dim), torch.nan)
    for row in range(slots):
        for position in range(positions):
            pool[order[row, position // block_size], position % block_size] = plane[row, position]
    return pool


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2])
def test_quantized(level: str, stored: torch.dtype, dtype: torch.dtype, per_head: bool) -> None:
    case = make(dtype, 3, 64)
    k, v = (
        (plane.float().nan_to_num(1.0) * (30 if stored == torch.int8 else 1)).to(stored)
        for plane in (case.k, case.v)
    )
    scale = torch.tensor([0.03, 0.02] if per_head else 0.03)
    check(replace(case, k=k, v=v, k_scale=scale, v_scale=scale * 3), level=level)


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, FP16, BF16])
def test_every_stored_number(level: str, stored: torch.dtype) -> None:
    """One key has all the weight: its value comes out as it is stored."""
    bits = torch.arange(1 << 8 * stored.itemsize, dtype=torch.int32)
    numbers = bits.to(torch.uint8 if stored.itemsize == 1 else torch.uint16).view(stored)
    v = numbers.view(-1, 1, 1, 64).contiguous()
    q = torch.zeros(v.shape[0], 1, 1, 64, dtype=stored if stored.itemsize == 2 else FP32)
    lengths = torch.ones(v.shape[0], dtype=torch.int32)
    out = decode(q, torch.zeros_like(v.float()).to(stored), v, lengths, level=level)
    expected = v.to(q.dtype)
    if stored == BF16 and level == "avx512bf16":
        # The instruction takes subnormal numbers for zero.
        expected = torch.where(expected.abs() < torch.finfo(BF16).tiny, expected * 0, expected)
    # What is masked has a weight of 0, which infinity makes NaN.
    expected = torch.where(expected.isinf(), torch.nan, expected)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


def test_nothing_is_read_behind_the_last_key(level: str) -> None:
    """The last key ends where the memory does: a read behind it would be a fault."""
    for dtype in (FP32, BF16):
        n_bytes = 16 * mmap.PAGESIZE
        outer = mmap.mmap(-1, n_bytes + mmap.PAGESIZE)
        _forbid(outer, n_bytes)
        memory = torch.frombuffer(outer, dtype=torch.uint8)[:n_bytes].view(dtype)
        for heads, dim in ((1, 33), (2, 80), (3, 128)):
            n = memory.numel() // (heads * dim)
            plane = memory[memory.numel() - n * heads * dim :].view(1, n, heads, dim)
            plane.copy_(torch.randn(plane.shape))
            for length in (n, n - 1):
                view = plane[:, n - length :]
                q = torch.randn(1, 1, 2 * heads, dim).to(dtype)
                check(Case(q, view, view, torch.tensor([length], dtype=torch.int32)), level=level)


def _forbid(mapping: mmap.mmap, offset: int) -> None:
    import ctypes

    start = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + offset), mmap.PAGESIZE, 0) == 0


def test_refusals() -> None:
    case = make()
    with pytest.raises(ValueError, match="length of row 1 is 1000"):
        run(replace(case, lengths=torch.tensor([1, 1000, 1, 1, 1, 1, 1], dtype=torch.int32)))
    with pytest.raises(ValueError, match="slot of row 6 is 7"):
        run(replace(case, slots=torch.arange(1, 8, dtype=torch.int32)))
    with pytest.raises(ValueError, match="lengths must be int32"):
        run(replace(case, lengths=case.lengths.long()))
    with pytest.raises(ValueError, match="does not take"):
        run(replace(case, q=case.q.double()))
    with pytest.raises(ValueError, match="no level 'mmx'"):
        run(case, level="mmx")
    table = torch.full((7, 1), 7, dtype=torch.int32)
    with pytest.raises(ValueError, match="block of row 1 is 7"):
        run(case, block_table=table)
    assert not can_decode(case.q.repeat(1, 17, 1, 1), case.k, case.v)
    assert not can_decode(case.q, case.k.half(), case.v.half())


def test_an_empty_batch() -> None:
    case = make()
    out = decode(case.q[:0], case.k, case.v, case.lengths[:0])
    assert out.shape == (0, *case.q.shape[1:])
