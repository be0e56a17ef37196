"""flash-attn's functions against float64, on the CPU: every option, alone and together."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from cached import Cached
from options import OPTIONS, check, keywords, slopes_of
from reference import attention

import flash_compat
import kvspan


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("with_lse", [False, True])
def test_dense(
    name: str, dtype: torch.dtype, n_heads: int, n_kv_heads: int, with_lse: bool
) -> None:
    torch.manual_seed(1)
    option = OPTIONS[name]
    for (n_queries, n_keys), dim in zip(
        [(1, 1), (1, 33), (5, 5), (4, 19), (70, 90), (9, 4), (3, 0), (0, 3)],
        itertools.cycle([32, 64, 40]),
    ):
        q = torch.randn(2, n_queries, n_heads, dim).to(dtype)
        k, v = torch.randn(2, 2, n_keys, n_kv_heads, dim).to(dtype)
        slopes = slopes_of(option, 2, n_heads)
        result = flash_compat.flash_attn_func(
            q, k, v, **keywords(option, slopes), return_attn_probs=with_lse
        )
        out, lse, _ = result if with_lse else (result, None, None)
        assert out.dtype == dtype
        if n_queries == 0:
            assert out.shape == q.shape
            continue
        for row in range(2):
            check(
                out[row],
                None if lse is None else lse[row],
                q[row],
                k[row],
                v[row],
                option,
                None if slopes is None else slopes[row],
            )


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("paged", [False, True])
def test_sequences_end_to_end(name: str, paged: bool) -> None:
    torch.manual_seed(2)
    option = OPTIONS[name]
    lengths_q, lengths_k = [3, 0, 17, 1, 5], [8, 4, 17, 0, 2]
    at_q, at_k = (
        torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32)
        for n in (lengths_q, lengths_k)
    )
    q = torch.randn(int(at_q[-1]), 6, 32)
    k, v = torch.randn(2, int(at_k[-1]), 2, 32)
    slopes = slopes_of(option, 6)
    given: dict[str, Any] = {"return_attn_probs": True}
    k_arg, v_arg = k, v
    if paged:
        block_size, blocks = 8, torch.randperm(20)[: 5 * 3].reshape(5, 3)
        k_arg, v_arg = torch.full((2, 20, block_size, 2, 32), torch.nan).unbind()
        for row, n in enumerate(lengths_k):
            for i in range(n):
                place = blocks[row, i // block_size], i % block_size
                k_arg[place], v_arg[place] = k[at_k[row] + i], v[at_k[row] + i]
        given["block_table"] = blocks.int()
    out, lse, _ = flash_compat.flash_attn_varlen_func(
        q, k_arg, v_arg, at_q, at_k, 17, 17, **keywords(option, slopes), **given
    )
    for row in range(5):
        queries, keys = slice(at_q[row], at_q[row + 1]), slice(at_k[row], at_k[row + 1])
        check(out[queries], lse[:, queries], q[queries], k[keys], v[keys], option, slopes)


def test_packed_variants_are_the_same() -> None:
    torch.manual_seed(3)
    qkv = torch.randn(2, 9, 3, 4, 32)
    q, k, v = qkv.unbind(2)
    expected = flash_compat.flash_attn_func(q, k, v, causal=True)
    torch.testing.assert_close(flash_compat.flash_attn_qkvpacked_func(qkv, causal=True), expected)
    torch.testing.assert_close(
        flash_compat.flash_attn_kvpacked_func(q, qkv[:, :, 1:], causal=True), expected
    )
    at = torch.tensor([0, 9, 18], dtype=torch.int32)
    flat = flash_compat.flash_attn_varlen_qkvpacked_func(qkv.flatten(0, 1), at, 9, causal=True)
    torch.testing.assert_close(flat.reshape(expected.shape), expected)
    flat = flash_compat.flash_attn_varlen_kvpacked_func(
        q.flatten(0, 1), qkv.flatten(0, 1)[:, 1:], at, at, 9, 9, causal=True
    )
    torch.testing.assert_close(flat.reshape(expected.shape), expected)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers_per_page", [1, 2])
@pytest.mark.parametrize("n_new", [0, 1, 3, 20])
def test_cache(name: str, dtype: torch.dtype, layers_per_page: int, n_new: int) -> None:
    torch.manual_seed(4)
    option = OPTIONS[name]
    lengths = [5, 0, 130, 1, 64] if n_new <= 8 else [5, 9, 130]
    cached = Cached(lengths, dtype, layers_per_page)
    if n_new > 8:
        for sequence in cached.sequences:
            sequence.extend(n_new)
    n_queries = n_new or 2
    q = torch.randn(len(lengths), n_queries, 6, 32).to(dtype)
    k, v = torch.randn(2, len(lengths), n_new, 2, 32).to(dtype)
    slopes = slopes_of(option, len(lengths), 6)
    before = [cached.row(i, n) for i, n in enumerate(lengths)]
    out, lse = flash_compat.flash_attn_with_kvcache(
        q,
        cached.k,
        cached.v,
        *((k, v) if n_new else ()),
        cache_seqlens=cached.seqlens,
        cache_batch_idx=cached.batch.slots,
        return_softmax_lse=True,
        **keywords(option, slopes),
    )
    assert not out.isnan().any()
    for i, n in enumerate(lengths):
        row_k, row_v = cached.row(i, n + n_new)
        torch.testing.assert_close(row_k, torch.cat((before[i][0], k[i])), atol=0, rtol=0)
        torch.testing.assert_close(row_v, torch.cat((before[i][1], v[i])), atol=0, rtol=0)
        row_slopes = None if slopes is None else slopes[i]
        check(out[i], lse[i], q[i], row_k, row_v, option, row_slopes)


def turned(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, position: int, interleaved: bool
) -> torch.Tensor:
    """Rotate ``x [heads, dim]`` by complex numbers, in float64."""
    half = cos.shape[1]
    x = x.double().clone()
    first, second = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
        if interleaved
        else (slice(0, half), slice(half, 2 * half))
    )
    z = torch.complex(x[:, first], x[:, second])
    z = z * torch.complex(cos[position].double(), sin[position].double())
    x[:, first], x[:, second] = z.real, z.imag
    return x


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("rotary_dim", [16, 32])
@pytest.mark.parametrize("causal", [True, False])
def test_rotary(interleaved: bool, rotary_dim: int, causal: bool) -> None:
    torch.manual_seed(5)
    lengths = [5, 0, 40]
    cached = Cached(lengths)
    angle = torch.rand(64, rotary_dim // 2) * 6.28
    cos, sin = angle.cos(), angle.sin()
    q = torch.randn(3, 2, 4, 32)
    k, v = torch.randn(2, 3, 2, 2, 32)
    out = flash_compat.flash_attn_with_kvcache(
        q,
        cached.k,
        cached.v,
        k,
        v,
        cos,
        sin,
        cached.seqlens,
        cached.batch.slots,
        causal=causal,
        rotary_interleaved=interleaved,
    )
    for i, n in enumerate(lengths):
        row_k, row_v = cached.row(i, n + 2)
        for j in range(2):
            expected = turned(k[i, j], cos, sin, n + j, interleaved)
            torch.testing.assert_close(row_k[n + j].double(), expected, atol=1e-5, rtol=1e-5)
        at = [n + j if causal else n for j in range(2)]
        row_q = torch.stack([turned(q[i, j], cos, sin, at[j], interleaved) for j in range(2)])
        exact, _ = attention(row_q, row_k, row_v, causal=causal)
        torch.testing.assert_close(out[i].double(), exact, atol=2e-5, rtol=1e-4)


def test_left_padding_hides_the_first_keys() -> None:
    torch.manual_seed(6)
    k, v = torch.randn(2, 2, 40, 2, 32)
    q = torch.randn(2, 1, 2, 32)
    lengths, pad = torch.tensor([30, 12]).int(), torch.tensor([4, 12]).int()
    out = flash_compat.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, cache_leftpad=pad)
    exact, _ = attention(q[0], k[0, 4:30], v[0, 4:30])
    torch.testing.assert_close(out[0].double(), exact, atol=2e-5, rtol=1e-4)
    assert not out[1].any()


def test_a_block_table_is_read_and_written_like_a_contiguous_cache() -> None:
    torch.manual_seed(7)
    lengths = torch.tensor([5, 30, 0], dtype=torch.int32)
    k, v = torch.randn(2, 3, 48, 2, 32)
    blocks = torch.randperm(12)[:9].reshape(3, 3).int()
    paged_k, paged_v = torch.randn(2, 12, 16, 2, 32)
    for row in range(3):
        paged_k[blocks[row].long()] = k[row].unflatten(0, (3, 16))
        paged_v[blocks[row].long()] = v[row].unflatten(0, (3, 16))
    q, k_new, v_new = torch.randn(3, 4, 4, 32), *torch.randn(2, 3, 4, 2, 32)
    expected = flash_compat.flash_attn_with_kvcache(
        q, k, v, k_new, v_new, cache_seqlens=lengths, causal=True
    )
    out = flash_compat.flash_attn_with_kvcache(
        q, paged_k, paged_v, k_new, v_new, cache_seqlens=lengths, block_table=blocks, causal=True
    )
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
    for row in range(3):
        torch.testing.assert_close(paged_k[blocks[row].long()].flatten(0, 1), k[row])


def test_an_append_past_what_was_extended_writes_nothing() -> None:
    cached = Cached([5, 20])
    row = cached.row(0, 13)
    q, k, v = torch.randn(2, 9, 2, 32), *torch.randn(2, 2, 9, 2, 32)
    with pytest.raises(kvspan.InvalidArgument, match=r"row 0 has no room for 9 new tokens from"):
        flash_compat.flash_attn_with_kvcache(
            q, cached.k, cached.v, k, v, cache_seqlens=cached.seqlens,
            cache_batch_idx=cached.batch.slots,
        )  # fmt: skip
    for now, then in zip(cached.row(0, 13), row, strict=True):
        torch.testing.assert_close(now, then, equal_nan=True)
    plain = torch.zeros(2, 16, 2, 32)
    with pytest.raises(kvspan.InvalidArgument, match=r"it has 16 positions of the cache"):
        flash_compat.flash_attn_with_kvcache(q, plain, plain.clone(), k, v, cache_seqlens=8)


def test_writable_positions() -> None:
    cached = Cached([5, 20])
    at = {sequence.slot: sequence.length for sequence in cached.sequences}
    expected = [at.get(slot, 0) for slot in range(5)]
    assert kvspan.writable_positions(cached.k) == expected
    assert kvspan.writable_positions(cached.v[1:3]) == expected[1:3]
    assert kvspan.writable_positions(cached.v, [2, 0]) == [expected[2], expected[0]]
    assert kvspan.writable_positions(cached.k[:, 10:24]) == [
        min(14, max(0, n - 10)) for n in expected
    ]
    assert kvspan.writable_positions(cached.k[:, :7]) == [min(7, n) for n in expected]
    assert kvspan.writable_positions(torch.zeros(2, 3)) is None
    cached.cache.close()
    assert kvspan.writable_positions(cached.k) is None


T = torch.zeros


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: f.flash_attn_func(T(1, 2, 3, 8), T(1, 2, 2, 8), T(1, 2, 2, 8)), "multiple of"),
        (lambda f: f.flash_attn_func(T(2, 3, 8), T(2, 3, 8), T(2, 3, 8)), "4 dimensions"),
        (
            lambda f: f.flash_attn_func(T(1, 2, 2, 8), T(1, 2, 2, 8).half(), T(1, 2, 2, 8)),
            "one dtype",
        ),
        (lambda f: f.flash_attn_func(T(1, 2, 2, 8), T(3, 2, 2, 8), T(3, 2, 2, 8)), "1 rows"),
        (
            lambda f: f.flash_attn_func(*[T(1, 2, 2, 8)] * 3, dropout_p=0.1),
            r"dropout_p must be 0\.0",
        ),
        (lambda f: f.flash_attn_func(*[T(1, 2, 2, 8)] * 3, alibi_slopes=T(3)), "alibi_slopes must"),
        (lambda f: f.flash_attn_func(*[T(1, 2, 2, 8)] * 3, window_size=(1,)), "window_size is"),
        (lambda f: f.flash_attn_qkvpacked_func(T(1, 2, 2, 2, 8)), "of size 3"),
        (
            lambda f: f.flash_attn_with_kvcache(*[T(1, 2, 2, 8)] * 3, T(1, 1, 2, 8)),
            "both k and v",
        ),
        (lambda f: f.flash_attn_with_kvcache(*[T(1, 2, 2, 8)] * 5), "need cache_seqlens"),
        (
            lambda f: f.flash_attn_with_kvcache(*[T(1, 2, 2, 8)] * 3, cache_seqlens=3),
            "between 0 and 2, and has 3",
        ),
        (
            lambda f: f.flash_attn_with_kvcache(
                *[T(1, 2, 2, 8)] * 3, cache_batch_idx=torch.tensor([4])
            ),
            "cache_batch_idx must be between 0 and 0",
        ),
        (
            lambda f: f.flash_attn_with_kvcache(
                *[T(1, 2, 2, 8)] * 3, cache_batch_idx=T(1).int(), block_table=T(1, 1).int()
            ),
            "goes with neither",
        ),
        (
            lambda f: f.flash_attn_with_kvcache(*[T(1, 2, 2, 8)] * 3, rotary_cos=T(4, 4)),
            "go with new tokens",
        ),
        (
            lambda f: f.flash_attn_with_kvcache(
                *[T(1, 2, 2, 8)] * 5, T(1, 4), T(1, 4), cache_seqlens=0
            ),
            "has 1 positions",
        ),
        (lambda f: f.flash_attn_with_kvcache(T(2, 1, 2, 8), *[T(1, 2, 2, 8)] * 2), "1 slots for 2"),
        (
            lambda f: f.flash_attn_varlen_func(
                *[T(2, 2, 8)] * 3, *[torch.tensor([0, 3])] * 2, 3, 3
            ),
            "of 2 and 2",
        ),
    ],
)
def test_bad_arguments_say_what_is_allowed(call: Any, message: str) -> None:
    with pytest.raises(kvspan.InvalidArgument, match=message):
        call(flash_compat)
