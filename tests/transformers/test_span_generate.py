"""`generate` with a SpanCache says what it says with its own DynamicCache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from small_models import ALL, DECODERS, WINDOW, make, prompt  # noqa: E402

import kvspan  # noqa: E402
from kvspan.transformers import EncoderDecoderSpanCache, SpanCache  # noqa: E402

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 4},
    "several beams": {"num_beams": 4, "num_return_sequences": 3},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "several samples": {"do_sample": True, "num_return_sequences": 5},
    "chunked prompt": {"prefill_chunk_size": 7},
}


def span_cache(model: Any, pool: kvspan.Pool, **options: Any) -> Any:
    of = EncoderDecoderSpanCache if model.config.is_encoder_decoder else SpanCache
    return of(model.config, pool=pool, **options)


def generate(model: Any, ids: torch.Tensor, cache: Any = None, n: int = 40, **how: Any) -> Any:
    torch.manual_seed(11)
    how = {"do_sample": False, "attention_mask": torch.ones_like(ids), **how}
    return model.generate(ids, past_key_values=cache, max_new_tokens=n, min_new_tokens=n, **how)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ALL)
def test_tokens_are_those_of_a_dynamic_cache(name: str, way: str, pool: kvspan.Pool) -> None:
    model, ids = make(name), prompt(3, 25)
    if name == "t5" and way == "chunked prompt":
        pytest.skip("an encoder takes its prompt whole")
    expected = generate(model, ids, **WAYS[way])
    with span_cache(model, pool) as cache:
        assert torch.equal(generate(model, ids, cache, **WAYS[way]), expected)
        assert pool.stats().in_use_bytes > 0  # it was this cache that was used


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("num_beams", [1, 3])
def test_rows_with_padding_on_the_left(name: str, num_beams: int, pool: kvspan.Pool) -> None:
    model, ids = make(name), prompt(4, 21)
    seen = torch.ones_like(ids)
    for row, n_padding in enumerate((0, 3, 20, 9)):
        ids[row, :n_padding], seen[row, :n_padding] = 0, 0
    how = {"attention_mask": seen, "num_beams": num_beams}
    expected = generate(model, ids, **how)
    with span_cache(model, pool) as cache:
        assert torch.equal(generate(model, ids, cache, **how), expected)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("assistant", ["itself", "another", "prompt lookup"])
def test_assisted_decoding_takes_tokens_back(name: str, assistant: str, pool: kvspan.Pool) -> None:
    model, ids = make(name), prompt(1, 25)
    how: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
    if assistant != "prompt lookup":
        other = model
        if assistant == "another":
            other = copy.deepcopy(model)
            with torch.no_grad():
                for parameter in other.parameters():
                    parameter += 0.01 * torch.randn_like(parameter)
        how = {"assistant_model": other}
    expected = generate(model, ids, **how)
    with span_cache(model, pool) as cache:
        assert torch.equal(generate(model, ids, cache, **how), expected)


@pytest.mark.parametrize("name", DECODERS)
def test_a_second_turn_continues_the_first(name: str, pool: kvspan.Pool) -> None:
    model, ids = make(name), prompt(2, 9)
    caches = transformers.DynamicCache(config=model.config), span_cache(model, pool)
    turns = []
    for cache in caches:
        first = generate(model, ids, cache, n=2 * WINDOW)
        turns.append(generate(model, torch.cat([first, prompt(2, 5)], dim=1), cache, n=9))
    assert torch.equal(*turns)
    caches[1].release()


@pytest.mark.parametrize("name", DECODERS)
def test_prompts_that_continue_one_prefix(name: str, pool: kvspan.Pool) -> None:
    """The prefix is computed once, forked for each prompt, and not touched by any of them."""
    model, prefix = make(name), prompt(1, 70)
    prompts = [torch.cat([prefix, prompt(1, 4 + i) + 1], dim=1) for i in range(3)]
    with torch.no_grad(), span_cache(model, pool) as known:
        model(prefix, past_key_values=known)
        used = pool.stats().in_use_bytes
        for ids in prompts * 2:
            fork = copy.deepcopy(known)
            assert torch.equal(generate(model, ids, fork), generate(model, ids))
            assert known.get_seq_length() == 70
            del fork
        assert pool.stats().in_use_bytes <= 3 * used


def test_calls_share_one_kv_cache(pool: kvspan.Pool) -> None:
    model, ids = make("llama"), prompt(2, 25)
    expected = generate(model, ids)
    with kvspan.KVCache(pool, 4, 2, 16, torch.float32, max_seqs=5, max_seq_len=200) as shared:
        for _ in range(3):
            assert torch.equal(generate(model, ids, SpanCache(shared)), expected)
            assert shared.stats().n_sequences == 0  # the cache is gone, and its rows with it
        first, second = SpanCache(shared), SpanCache(shared)
        assert torch.equal(generate(model, ids, first), expected)
        assert torch.equal(generate(model, ids, second), expected)
        with pytest.raises(kvspan.CapacityError):
            generate(model, ids, SpanCache(shared))
        first.release()
        with SpanCache(shared) as third:
            assert torch.equal(generate(model, ids, third), expected)
        assert shared.stats().n_sequences == 2


def test_a_kv_cache_with_windows(pool: kvspan.Pool) -> None:
    model, ids = make("gemma3"), prompt(2, 25)
    layers = [kvspan.LayerSpec(2, 16, torch.float32, window=w) for w in (WINDOW, None) * 2]
    with kvspan.KVCache(pool, layers=layers, max_seqs=5, max_seq_len=900) as shared:
        cache = SpanCache(shared)
        assert torch.equal(generate(model, ids, cache, n=600), generate(model, ids, n=600))
        assert shared.stats().used_bytes < 0.7 * shared.bytes_per_token * 624 * 2
