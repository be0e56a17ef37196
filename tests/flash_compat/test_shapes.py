"""Attention over a kvspan cache against float64: dtypes, heads, lengths and layouts.

The options of the functions take turns over the grid, so that each meets every value of each axis.
"""

from __future__ import annotations

import itertools
import zlib
from typing import Any

import pytest
import torch
from cached import Cached
from options import OPTIONS, check, keywords, slopes_of

import flash_compat
import kvspan

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["one layer a page", "all layers", "split planes", "layers that differ"]


def cached_in(
    layout: str, lengths: list[int], dtype: torch.dtype, n_kv_heads: int, head_dim: int, **more: Any
) -> Cached:
    shape = {"n_kv_heads": n_kv_heads, "head_dim": head_dim, **more}
    if layout == "one layer a page":
        return Cached(lengths, dtype, 1, **shape)
    if layout == "layers that differ":  # strides that are multiples of nothing but 16 bytes
        spec = kvspan.LayerSpec(n_kv_heads, head_dim, dtype)
        others = [kvspan.LayerSpec(1, 24, torch.float32), kvspan.LayerSpec(3, 40, torch.int8)]
        return Cached(lengths, dtype, 3, layers=[*others, spec], **more)
    return Cached(lengths, dtype, 2, split_planes=layout == "split planes", **shape)


def check_rows(cached: Cached, n_queries: int, group: int, name: str, dtype: torch.dtype) -> None:
    """Append as many tokens as there are queries, attend, and compare every row."""
    n_kv_heads, dim = cached.k.shape[2:]
    option, batch = OPTIONS[name], len(cached.lengths)
    q = torch.randn(batch, n_queries, n_kv_heads * group, dim).to(dtype)
    k, v = torch.randn(2, batch, n_queries, n_kv_heads, dim).to(dtype)
    slopes = slopes_of(option, n_kv_heads * group)
    for sequence in cached.sequences:
        sequence.extend(n_queries)
    before = [cached.row(i, n) for i, n in enumerate(cached.lengths)]
    out = flash_compat.flash_attn_with_kvcache(
        q,
        cached.k,
        cached.v,
        k,
        v,
        cache_seqlens=cached.seqlens,
        cache_batch_idx=cached.batch.slots,
        **keywords(option, slopes),
    )
    for i, n in enumerate(cached.lengths):
        row_k, row_v = cached.row(i, n + n_queries)
        assert torch.equal(row_k, torch.cat((before[i][0], k[i])))
        assert torch.equal(row_v, torch.cat((before[i][1], v[i])))
        check(out[i], None, q[i], row_k, row_v, option, slopes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 64, 80, 128, 192, 256])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n_queries", [1, 5, 40])
def test_every_shape(dtype: torch.dtype, head_dim: int, layout: str, n_queries: int) -> None:
    torch.manual_seed(head_dim + n_queries)
    where = zlib.crc32(f"{dtype} {head_dim} {layout} {n_queries}".encode())
    names = itertools.cycle(sorted(OPTIONS))
    for _ in range(where % len(OPTIONS)):
        next(names)
    for n_kv_heads, group in ((2, 1), (1, 2), (3, 4), (1, 8)):
        cached = cached_in(layout, [63, 0, 257, 1], dtype, n_kv_heads, head_dim)
        check_rows(cached, n_queries, group, next(names), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["plain", "causal", "causal window", "softcap", "alibi"])
@pytest.mark.parametrize("n_queries", [1, 20])
def test_long_contexts(dtype: torch.dtype, name: str, n_queries: int) -> None:
    torch.manual_seed(16)
    cached = cached_in("all layers", [16383, 5], dtype, 2, 64, max_seq_len=1 << 15)
    check_rows(cached, n_queries, 4, name, dtype)
