"""Unmodified attention kernels over span tensors compute what they compute over dense ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import kvspan

DEVICE = "cuda:0"
HEADS, DIM = 8, 128


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q [B, H, 1, D], k and v [B, L, H, D]."""
    return scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2))


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention in float64."""
    q, k, v = (x.double() for x in (q, k.transpose(1, 2), v.transpose(1, 2)))
    return ((q @ k.transpose(2, 3)) / DIM**0.5).softmax(-1) @ v


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layers_per_page", [1, 2])
def test_sdpa_is_that_over_dense_tensors(
    pool: kvspan.Pool, layers_per_page: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"layers_per_page": layers_per_page}
    cache = kvspan.KVCache(pool, 2, HEADS, DIM, dtype, max_seqs=4, max_seq_len=8192, **options)
    batch = cache.batch(3)
    layers = [batch.layer(i) for i in range(2)]
    addresses = [plane.data_ptr() for planes in layers for plane in planes]
    for n in (1, 1, 100, 155, 1, 2000, 1):  # to, at and across the ends of pages
        at = len(batch.sequences[0])
        batch.step(n)
        for k, v in layers:
            k[:, at : at + n] = torch.randn(3, n, HEADS, DIM, device=DEVICE, dtype=dtype)
            v[:, at : at + n] = torch.randn(3, n, HEADS, DIM, device=DEVICE, dtype=dtype)
            ours = k[:, : at + n], v[:, : at + n]
            dense = [x.clone(memory_format=torch.contiguous_format) for x in ours]
            assert all(x.is_contiguous() for x in dense)
            q = torch.randn(3, HEADS, 1, DIM, device=DEVICE, dtype=dtype)
            # torch may take another kernel for other strides, and TF32 for float32.
            tolerance = 2e-3 if dtype == torch.float32 else 2e-2
            out = attend(q, *ours)
            assert (out - attend(q, *dense)).abs().max().item() < tolerance
            assert (out.double() - reference(q, *ours)).abs().max().item() < tolerance
    assert [plane.data_ptr() for planes in layers for plane in planes] == addresses


def test_flash_attention_appends_and_attends(pool: kvspan.Pool) -> None:
    flash_attn = pytest.importorskip("flash_attn", reason="flash-attn is not installed")
    torch.manual_seed(0)
    cache = kvspan.KVCache(pool, 1, HEADS, DIM, torch.float16, max_seqs=6, max_seq_len=16384)
    k_cache, v_cache = cache.layer(0)
    rows = [cache.sequence() for _ in range(5)]
    chosen = [rows[3], rows[0], rows[4]]  # slots in no order
    for row, length in zip(chosen, (5, 1000, 511), strict=True):
        row.extend(length)
        for plane in row.layer(0):
            plane.normal_()
    batch = cache.batch(chosen)
    for _ in range(4):
        before = batch.step()
        q, k, v = (
            torch.randn(3, 1, HEADS, DIM, device=DEVICE, dtype=torch.float16) for _ in range(3)
        )
        out = flash_attn.flash_attn_with_kvcache(
            q,
            k_cache,
            v_cache,
            k,
            v,
            cache_seqlens=before,
            cache_batch_idx=batch.slots,
            causal=True,
        )
        for i, row in enumerate(chosen):
            mine = [plane[None] for plane in row.layer(0)]
            assert torch.equal(mine[0][0, -1], k[i, 0])
            assert torch.equal(mine[1][0, -1], v[i, 0])
            expected = reference(q[i : i + 1].transpose(1, 2), *mine)
            error = (out[i : i + 1].transpose(1, 2).double() - expected).abs().max().item()
            assert error < 2e-2


def test_forks_attend_to_the_same_history(cache: kvspan.KVCache) -> None:
    parent = cache.sequence()
    parent.extend(700)
    for plane in parent.layer(0):
        plane.normal_()
    child = parent.fork()
    q = torch.randn(1, HEADS, 1, DIM, device=DEVICE, dtype=torch.float16)

    def over(sequence: kvspan.Sequence) -> torch.Tensor:
        return attend(q, *(plane[None] for plane in sequence.layer(0)))

    before = over(parent)
    assert torch.equal(over(child), before)
    child.extend(1)
    for plane in child.layer(0):
        plane[-1] = 100
    assert not torch.equal(over(child), before)
    assert torch.equal(over(parent), before)
