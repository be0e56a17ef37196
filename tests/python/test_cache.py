"""Caches: layouts, what may be read beyond a length, and what reprs and figures say."""

from __future__ import annotations

import signal
import warnings
from typing import Any

import pytest
import torch
from device import IS_HOST, PAGE, not_on_a_gpu, only_on_the_host, run_program

import kvspan
from kvspan import KVCache, LayerSpec, Plane, Pool
from kvspan._check import size_text

# What may be read and written

ACCESS = """
import torch, kvspan
from device import PAGE, SCALE
pool = kvspan.Pool(capacity=16 * PAGE, page_size=PAGE)
shape = (1, 4, 128 * SCALE, torch.float32)
cache = kvspan.KVCache(pool, *shape, max_seqs=2, max_seq_len=512, {options})
sequence = cache.sequence()
sequence.extend(5)
k = cache.layer(0)[0]
{body}
"""
ZERO, FAULT = "unmapped='zero'", "unmapped='fault', overread_tokens='auto'"
ZEROS = only_on_the_host("zeros wherever nothing is mapped")


@pytest.mark.parametrize(
    ("options", "body", "ends"),
    [
        pytest.param(ZERO, "assert not k[:, 16:].any() and not k[1].any()", 0, marks=ZEROS),
        pytest.param(ZERO, "k[0, 16] = 1", -signal.SIGSEGV, marks=ZEROS),
        (FAULT, "assert k[0, 5:133].isfinite().all()", 0),  # FlashAttention's tile
        (FAULT, "k[0, 144].sum()", -signal.SIGSEGV),
        ("unmapped='fault', overread_tokens=0", "k[0, :16].sum(); k[0, 16].sum()", -signal.SIGSEGV),
        (FAULT, "k[1, 0].sum()", -signal.SIGSEGV),
    ],
)
@not_on_a_gpu("a trap is a kernel's error there, after which nothing of the process works")
def test_what_lies_beyond_a_length(options: str, body: str, ends: int) -> None:
    code = ACCESS.format(options=options, body=body)
    done = run_program(code)
    assert (done.returncode, done.stderr) == (ends, "")


def test_overread_is_chosen_by_what_may_be_read(pool: Pool) -> None:
    def overread(max_seq_len: int = 512, **options: Any) -> int:
        return KVCache(
            pool, 1, 4, 128, max_seqs=1, max_seq_len=max_seq_len, **options
        ).overread_tokens

    assert overread(overread_tokens="auto") == (0 if IS_HOST else 128)
    assert overread(unmapped="fault", overread_tokens="auto") == 128
    assert overread(unmapped="fault", overread_tokens="auto", max_seq_len=50) == 50
    assert overread(overread_tokens=7) == 7


# Layouts


@pytest.mark.parametrize(
    ("options", "n_lanes", "record_bytes"),
    [
        ({"layers_per_page": 1}, 4, 1280),
        ({"layers_per_page": 2}, 2, 2560),
        ({"layers_per_page": 4}, 1, 5120),
        ({"layers_per_page": 4, "split_planes": True}, 2, 2560),
        ({"layers_per_page": 1, "split_planes": True}, 8, 640),
    ],
)
def test_layouts_are_strided_views(
    pool: Pool, options: dict[str, Any], n_lanes: int, record_bytes: int
) -> None:
    cache = KVCache(pool, 4, 5, 32, torch.float32, max_seqs=3, max_seq_len=300, **options)
    assert cache.tokens_per_page == (PAGE / record_bytes,) * n_lanes
    assert cache.bytes_per_token == 4 * 2 * 5 * 32 * 4
    assert cache.layers_per_page == options["layers_per_page"]
    assert f"{n_lanes} lane" in cache.layout
    seen = set()
    for i in range(4):
        assert cache.layer(i) is cache.layer(i)
        for plane in cache.layer(i):
            assert plane.shape == (3, 300, 5, 32)
            assert plane.stride()[1:] == (record_bytes // 4, 32, 1)
            assert plane.stride(0) * 4 % PAGE == 0
            seen.add(plane.data_ptr())
    assert len(seen) == 8


def test_auto_layout_explains_itself() -> None:
    pool = Pool(capacity="64MiB")
    wide = KVCache(pool, 32, 8, 128, max_seqs=1, max_seq_len=16384)
    assert wide.layers_per_page == 32
    assert wide.tokens_per_page == (16.0,)  # PagedAttention's block
    assert "auto: least expected waste" in repr(wide)
    long = KVCache(pool, 32, 8, 128, max_seqs=1, max_seq_len=131072)
    assert long.layers_per_page == 8
    assert "16 layers per page would put offsets in a slot beyond 2^31" in repr(long)
    asked = KVCache(pool, 32, 8, 128, max_seqs=1, max_seq_len=16384, layers_per_page=4)
    assert "4 of 32 layers per page, 8 lanes" in asked.layout
    assert "as asked" in asked.layout


def test_offsets_beyond_32_bits_are_warned_of_by_name(pool: Pool) -> None:
    with pytest.warns(UserWarning, match=r"offset 2\^31.*layers_per_page=\"auto\"") as caught:
        KVCache(pool, 32, 8, 128, max_seqs=1, max_seq_len=131072, layers_per_page=32)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        KVCache(pool, 32, 8, 128, max_seqs=1, max_seq_len=131072)
        KVCache(pool, 32, 8, 128, max_seqs=1, max_seq_len=32767, layers_per_page=32)


def test_layers_may_differ(pool: Pool) -> None:
    latent = LayerSpec(planes=(Plane("latent", 1, 576, torch.bfloat16),))
    quantized = LayerSpec(
        planes=(
            Plane("k", 8, 64, torch.float8_e4m3fn),
            Plane("v", 8, 64, torch.int8),
            Plane("scales", 8, 1, torch.float32),
        ),
        window=64,
    )
    plain = LayerSpec(2, 64, torch.float16)
    cache = KVCache(pool, layers=[latent, quantized, plain], max_seqs=2, max_seq_len=100)
    assert [len(cache.layer(i)) for i in range(3)] == [1, 3, 2]
    shapes = [(tuple(p.shape[2:]), p.dtype) for i in range(3) for p in cache.layer(i)]
    assert shapes == [
        ((1, 576), torch.bfloat16),
        ((8, 64), torch.float8_e4m3fn),
        ((8, 64), torch.int8),
        ((8, 1), torch.float32),
        *[((2, 64), torch.float16)] * 2,
    ]
    assert cache.bytes_per_token == 1152 + 512 + 512 + 32 + 512
    assert cache.layers[0].planes[0].name == "latent"
    with cache.sequence() as sequence:
        sequence.extend(100)
        for i in range(3):
            for j, plane in enumerate(sequence.layer(i)):
                plane.view(torch.uint8).fill_(16 * i + j)
        for i in range(3):
            for j, plane in enumerate(sequence.layer(i)):
                assert (plane.view(torch.uint8) == 16 * i + j).all()


# Figures, page map, end


def test_page_map_is_in_order_and_true(cache: KVCache) -> None:
    assert cache.page_map() == []
    sequences = [cache.sequence() for _ in range(2)]
    for sequence, n in zip(sequences, (60, 200), strict=True):
        sequence.extend(n)
    entries = cache.page_map()
    assert [(e.slot, e.lane, e.page) for e in entries] == [
        (slot, 0, page) for slot, n_pages in ((0, 2), (1, 4)) for page in range(n_pages)
    ]
    assert {e.n_references for e in entries} == {1}


def test_repr_says_what_is_there(cache: KVCache) -> None:
    sequence = cache.sequence()
    sequence.extend(100)
    assert repr(cache).startswith(
        f"<kvspan.KVCache: 1 of 8 slots of 1000 positions, {size_text(2 * PAGE * 125 // 128)} used "
        f"of {size_text(2 * PAGE)} mapped; 2 of 2 layers per page, 1 lane, 51.2 tokens a page (as "
    )
    with cache:
        pass
    assert repr(cache) == "<kvspan.KVCache, closed>"


def test_stats_count_calls_by_name(cache: KVCache) -> None:
    assert set(cache.stats().calls) == {
        *("reserve", "free", "create", "release", "map", "set_access", "unmap"),
        *("copy", "fill", "record_fence", "wait_fence", "order_after"),
        *("export_frame", "import_frame"),
    }
    sequence = cache.sequence()
    sequence.extend(100)
    calls = cache.stats().calls
    assert calls["reserve"] == (1, 1)
    assert calls["map"] == kvspan.CallCount(calls=1 if IS_HOST else 2, handles=2)
    sequence.release()
    cache.trim()
    assert cache.stats().calls["unmap"].handles == 2
