"""Unmodified attention over span tensors: plain strided tensors to the kernel, at every length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from device import IS_GPU, PAGE, only_on_the_host
from torch.nn.functional import scaled_dot_product_attention

import kvspan

HEADS, DIM = 3, 32
# What rounding to the dtype costs against float64, with room: about 2 units in the last place
# (a GPU may take TF32 for float32).
TOLERANCE = {torch.float32: 2e-3 if IS_GPU else 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
LAYOUTS: dict[str, dict[str, Any]] = {
    "auto": {},
    "one layer per page": {"layers_per_page": 1},
    "two layers per page": {"layers_per_page": 2},
    "split planes": {"split_planes": True},
}


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention in float64: q [n, heads, dim], k and v [n, tokens, heads, dim]."""
    q, k, v = q.double(), k.double(), v.double()
    scores = torch.einsum("nhd,nthd->nht", q, k) / DIM**0.5
    return torch.einsum("nht,nthd->nhd", scores.softmax(-1), v)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_growing_batch(layout: str, dtype: torch.dtype) -> None:
    """Token by token across pages, all rows at once and without a copy, against float64."""
    torch.manual_seed(0)
    pool = kvspan.Pool(capacity=96 * PAGE, page_size=PAGE)
    cache = kvspan.KVCache(
        pool, 4, HEADS, DIM, dtype, max_seqs=6, max_seq_len=2048, **LAYOUTS[layout]
    )
    batch = cache.batch(3)
    layers = [batch.layer(i) for i in range(4)]
    addresses = [k.data_ptr() for k, _ in layers]
    written = torch.zeros(4, 2, 3, 0, HEADS, DIM, dtype=dtype)
    for n in (1, 1, 1, 30, 1, 200, 1):
        at = int(batch.step(n)[0])
        new = torch.randn(4, 2, 3, n, HEADS, DIM).to(dtype)
        written = torch.cat([written, new], dim=3)
        for (k, v), (k_new, v_new), (k_all, v_all) in zip(layers, new, written, strict=True):
            k[:, at : at + n], v[:, at : at + n] = k_new, v_new
            q = torch.randn(3, HEADS, DIM).to(dtype)
            out = scaled_dot_product_attention(
                q[:, :, None], k[:, : at + n].transpose(1, 2), v[:, : at + n].transpose(1, 2)
            )[:, :, 0]
            error = (out.double() - reference(q, k_all, v_all)).abs().max()
            assert error < TOLERANCE[dtype]
    assert [k.data_ptr() for k, _ in (batch.layer(i) for i in range(4))] == addresses


@only_on_the_host("zeros wherever nothing is mapped")
def test_ragged_rows_under_a_mask() -> None:
    """Static shapes over unmapped tails: zeros are read there, so the mask leaves no NaN."""
    pool = kvspan.Pool(capacity=64 * PAGE, page_size=PAGE)
    cache = kvspan.KVCache(pool, 1, HEADS, DIM, torch.float32, max_seqs=4, max_seq_len=1024)
    batch = cache.batch(3)
    lengths = [5, 700, 90]
    k, v = batch.layer(0)
    for sequence, length in zip(batch.sequences, lengths, strict=True):
        sequence.extend(length)
        for plane in sequence.layer(0):
            plane.normal_()
    assert batch.lengths.tolist() == lengths
    q = torch.randn(3, HEADS, 1, DIM)
    mask = torch.arange(1024)[None] < batch.lengths[:, None]
    out = scaled_dot_product_attention(
        q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask[:, None, None]
    )
    for row, length in enumerate(lengths):
        expected = reference(q[row, None, :, 0], k[row, None, :length], v[row, None, :length])
        assert torch.allclose(out[row, :, 0].double(), expected[0], atol=2e-6)


def test_forks_attend_to_the_same_history() -> None:
    pool = kvspan.Pool(capacity=64 * PAGE, page_size=PAGE)
    cache = kvspan.KVCache(pool, 1, HEADS, DIM, torch.float32, max_seqs=4, max_seq_len=1024)
    parent = cache.sequence()
    parent.extend(300)
    for plane in parent.layer(0):
        plane.normal_()
    child = parent.fork()
    q = torch.randn(HEADS, 1, DIM)

    def attend(sequence: kvspan.Sequence) -> torch.Tensor:
        k, v = sequence.layer(0)
        return scaled_dot_product_attention(q, k.transpose(0, 1), v.transpose(0, 1))

    before = attend(parent)
    assert torch.equal(attend(child), before)
    child.extend(1)
    for plane in child.layer(0):
        plane[-1] = 100
    assert not torch.equal(attend(child), before)
    assert torch.equal(attend(parent), before)
