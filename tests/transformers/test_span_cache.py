"""What a SpanCache holds, where, and what it says when it cannot."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from small_models import WINDOW, make, prompt  # noqa: E402

import kvspan  # noqa: E402
from kvspan.transformers import EncoderDecoderSpanCache, SpanCache  # noqa: E402

PAGE = 64 << 10
HEADS, DIM = 2, 16


def states(rows: int, tokens: int, start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values ``[rows, heads, tokens, dim]`` that name row and position."""
    place = 1000.0 * torch.arange(rows)[:, None] + torch.arange(start, start + tokens)
    keys = place[:, None, :, None].expand(rows, HEADS, tokens, DIM).clone()
    return keys, -keys


def write(cache: Any, rows: int, tokens: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Give every layer so many tokens more."""
    new = states(rows, tokens, cache.get_seq_length())
    return [cache.update(*new, layer) for layer in range(len(cache.layers))]


def written(cache: Any, layer: int = 0) -> list[list[float]]:
    """Return row and position of each token that the layer's next one sees, checking all bytes."""
    keys, values = cache.layers[layer].keys, cache.layers[layer].values
    assert torch.equal(keys, -values)
    assert torch.equal(keys, keys[:, :1, :, :1].expand_as(keys))
    return keys[:, 0, :, 0].tolist()


def dynamic(name: str) -> Any:
    return transformers.DynamicCache(config=make(name).config)


def test_tokens_are_appended_in_place(pool: kvspan.Pool) -> None:
    with SpanCache(make("llama").config, pool=pool) as cache:
        first = write(cache, 2, 5)
        steps_before = cache.kv_caches[0].stats().calls
        then = [write(cache, 2, 1) for _ in range(20)][-1]
        assert cache.kv_caches[0].stats().calls == steps_before  # room for them was there
        for old, new in zip(first, then, strict=True):
            for a, b in zip(old, new, strict=True):
                assert a.shape == (2, HEADS, 5, DIM)
                assert b.shape == (2, HEADS, 25, DIM)
                assert (a.data_ptr(), a.stride()) == (b.data_ptr(), b.stride())
        assert written(cache, 3) == [[1000.0 * row + i for i in range(25)] for row in range(2)]
        del first, then, old, new, a, b


def test_only_the_first_layer_of_a_step_makes_the_rows_grow(pool: kvspan.Pool) -> None:
    with SpanCache(make("llama").config, pool=pool) as cache:
        write(cache, 2, 5)
        cache.update(*states(2, 1), 0)
        assert [layer.get_seq_length() for layer in cache.layers] == [6, 5, 5, 5]
        lengths = [len(row) for row in cache.layers[0].rows._bound.sequences]
        assert lengths == [6, 6]
        cache.update(*states(2, 1), 1)
        assert [len(row) for row in cache.layers[0].rows._bound.sequences] == lengths


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral"])
def test_masks_and_views_are_those_of_a_dynamic_cache(name: str, pool: kvspan.Pool) -> None:
    other = dynamic(name)
    with SpanCache(make(name).config, pool=pool) as cache:
        for n_tokens in (3, 1, 11, 1, 1, 1, 40, 1, 1, 5):
            for layer in range(4):
                sizes = [x.get_mask_sizes(n_tokens, layer) for x in (cache, other)]
                assert sizes[0] == sizes[1]
                assert cache.layers[layer].get_max_length() == other.layers[layer].get_max_length()
            new = states(2, n_tokens, other.get_seq_length())
            for layer in range(4):
                for ours, theirs in zip(
                    cache.update(*new, layer), other.update(*new, layer), strict=True
                ):
                    assert torch.equal(ours, theirs)
                assert torch.equal(cache.layers[layer].keys, other.layers[layer].keys)
            assert cache.get_seq_length() == other.get_seq_length()
        assert cache.is_sliding == other.is_sliding
        assert cache.is_croppable
        assert not cache.is_compileable
        del ours, theirs


def test_rows_are_remapped_not_copied(pool: kvspan.Pool) -> None:
    with SpanCache(make("llama").config, pool=pool) as cache:
        write(cache, 3, 300)
        address = cache.layers[2].keys.data_ptr()
        mapped = pool.stats().in_use_bytes
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        assert [row[0] for row in written(cache, 2)] == [2000, 0, 0]
        assert cache.layers[2].keys.data_ptr() == address
        assert pool.stats().in_use_bytes <= mapped
        assert cache.kv_caches[0].stats().shared_bytes > 0
        write(cache, 3, 1)  # which the shared rows do not share
        assert [row[-1] for row in written(cache, 1)] == [300, 1300, 2300]
        cache.batch_select_indices(torch.tensor([0, 2]))
        assert [row[0] for row in written(cache, 3)] == [2000, 0]
        cache.batch_select_indices(torch.tensor([False, True]))
        assert [row[0] for row in written(cache)] == [0]
        cache.batch_repeat_interleave(5)
        assert written(cache) == [[*range(300), 2300]] * 5
        cache.batch_select_indices((0, 1))
        cache.batch_repeat_interleave(2)
        write(cache, 4, 1)
        assert [row[-1] for row in written(cache)] == [301, 1301, 2301, 3301]


def test_rows_that_are_repeated_need_slots(pool: kvspan.Pool) -> None:
    with SpanCache(make("llama").config, pool=pool, max_batch=5) as cache:
        write(cache, 2, 3)
        with pytest.raises(kvspan.CapacityError, match="max_batch=6"):
            cache.batch_repeat_interleave(3)
        assert len(written(cache)) == 2
        cache.batch_repeat_interleave(2)
        assert len(written(cache)) == 4
    with (
        SpanCache(make("llama").config, pool=pool, max_batch=1) as cache,
        pytest.raises(kvspan.InvalidArgument, match="max_batch is 1"),
    ):
        write(cache, 2, 3)


def test_crop(pool: kvspan.Pool) -> None:
    with SpanCache(make("llama").config, pool=pool) as cache:
        cache.crop(-3)  # of nothing
        write(cache, 2, 30)
        cache.crop(0)
        cache.crop(-12)
        assert cache.get_seq_length() == 18
        assert [len(row) for row in cache.layers[0].rows._bound.sequences] == [18, 18]
        write(cache, 2, 2)
        assert written(cache, 1)[1] == [1000 + i for i in range(20)]
        with pytest.raises(ValueError, match="negative"):
            cache.crop(4)
        cache.crop(-100)
        assert cache.get_seq_length() == 0


def test_a_window_is_cropped_only_where_its_past_was_kept(pool: kvspan.Pool) -> None:
    with SpanCache(make("gemma3").config, pool=pool) as cache:
        write(cache, 1, WINDOW - 1)
        cache.crop(-5)
        write(cache, 1, 600)
        with pytest.raises(kvspan.CapacityError, match="activate_past_recording"):
            cache.crop(-1)
        assert [layer.get_seq_length() for layer in cache.layers] == [610] * 4
        cache.activate_past_recording()
        assert cache.is_recording_past(0)
        assert not cache.is_recording_past(1)
        for _ in range(3):
            write(cache, 1, 400)
            write(cache, 1, 400)  # an assistant drafts several steps
            cache.crop(-790)
        length = 610 + 30
        assert cache.get_seq_length() == length
        assert written(cache, 0) == [[*range(length - WINDOW + 1, length)]]
        assert written(cache, 1) == [[*range(length)]]
        with pytest.raises(kvspan.CapacityError, match="has left"):
            cache.crop(-300)


def test_what_a_window_left_is_given_back(pool: kvspan.Pool) -> None:
    with SpanCache(make("mistral").config, pool=pool) as cache:
        write(cache, 1, 40)
        little = pool.stats().in_use_bytes
        for _ in range(60):
            write(cache, 1, 40)
        assert cache.get_seq_length() == 61 * 40
        n_lanes = sum(len(kv.tokens_per_page) for kv in cache.kv_caches)
        assert pool.stats().in_use_bytes <= little + 2 * PAGE * n_lanes


def test_a_deep_copy_is_a_fork(pool: kvspan.Pool) -> None:
    with SpanCache(make("gemma3").config, pool=pool) as cache:
        write(cache, 2, 300)
        copies = [copy.deepcopy(cache) for _ in range(4)]
        shared = sum(kv.stats().shared_bytes for kv in cache.kv_caches)
        assert shared > 0
        for i, fork in enumerate(copies):
            assert fork.kv_caches == cache.kv_caches
            write(fork, 2, i)
            write(fork, 2, 1)
        write(cache, 2, 7)
        del cache.layers[1].rows._planes, fork
        cache.layers[1].rows._planes = {}
        for i, fork in enumerate(copies):
            assert fork.get_seq_length() == 301 + i
            assert written(fork, 1)[1] == [1000 + j for j in range(301 + i)]
            fork.batch_repeat_interleave(2)
            assert len(written(fork, 3)) == 4
        n_sequences = cache.kv_caches[0].stats().n_sequences
        assert n_sequences == 2 + 4 * 4
        del fork
        copies.clear()
        assert cache.kv_caches[0].stats().n_sequences == 2
        assert copy.deepcopy(SpanCache(make("llama").config, pool=pool)).get_seq_length() == 0


def test_reset_and_release_give_the_memory_back(pool: kvspan.Pool) -> None:
    cache = SpanCache(make("llama").config, pool=pool)
    cache.release()
    write(cache, 3, 50)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert not cache.is_initialized
    assert cache.kv_caches[0].stats().n_sequences == 0
    write(cache, 2, 4)  # another batch
    assert written(cache, 3)[1] == [1000, 1001, 1002, 1003]
    cache.release()
    assert cache.kv_caches == []
    assert pool.stats().in_use_bytes == 0


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_cache_that_is_dropped_gives_the_memory_back_at_once(
    name: str, pool: kvspan.Pool
) -> None:
    cache = SpanCache(make(name).config, pool=pool)
    write(cache, 1, 4)
    gc.disable()  # nothing in it goes round in a circle
    try:
        del cache
        assert pool.stats().in_use_bytes == 0
    finally:
        gc.enable()


def test_layers_of_other_lengths_are_told_apart_or_refused(pool: kvspan.Pool) -> None:
    config = make("llama").config
    ahead = 300  # pages further than the others
    with SpanCache(config, pool=pool) as cache:
        for layer in range(4):
            cache.update(*states(2, ahead if layer == 1 else 4), layer)
        cache.crop(-1)
        assert [layer.get_seq_length() for layer in cache.layers] == [3, ahead - 1, 3, 3]
        assert written(cache, 1)[1] == [*range(1000, 1000 + ahead - 1)]
        cache.reorder_cache(torch.tensor([0, 0]))
        with pytest.raises(kvspan.InvalidArgument, match=r"SpanCache\(\), without a config"):
            write(cache, 2, 1)
        assert cache.get_seq_length() == 3
    crossing = copy.deepcopy(config)
    crossing.cross_attention_layers = [1]
    for cache in (SpanCache(pool=pool), SpanCache(crossing, pool=pool)):
        with cache:
            for layer in range(4):
                cache.update(*states(2, ahead if layer == 1 else 4), layer)
            cache.reorder_cache(torch.tensor([0, 0]))
            cache.update(*(t[[1, 0]] for t in states(2, 1, 4)), 0)
            assert written(cache, 0) == [[0, 1, 2, 3, 1004], [0, 1, 2, 3, 4]]
            assert written(cache, 1) == [[*range(ahead)]] * 2


def test_layers_of_all_kinds_grow_or_none() -> None:
    config = make("gemma3").config
    with (
        kvspan.Pool(capacity=24 * PAGE, page_size=PAGE) as pool,
        SpanCache(config, pool=pool, max_batch=1) as cache,
    ):
        write(cache, 1, 10)
        assert len(cache.kv_caches) == 2
        write(copied := copy.deepcopy(cache), 1, 1)

        def grow() -> None:
            while True:
                write(cache, 1, 7)

        with pytest.raises(kvspan.OutOfMemory):
            grow()
        assert len({layer.get_seq_length() for layer in cache.layers}) == 1
        assert {len(s) for rows in cache._rows() for s in rows._bound.sequences} == {
            cache.get_seq_length()
        }
        assert {layer.get_seq_length() for layer in copied.layers} == {11}
        copied.release()


def test_memory_that_is_short_leaves_the_cache_as_it_was() -> None:
    with (
        kvspan.Pool(capacity=4 * PAGE, page_size=PAGE) as pool,
        SpanCache(make("llama").config, pool=pool) as cache,
    ):
        write(cache, 1, 128)
        with pytest.raises(kvspan.OutOfMemory):
            write(cache, 1, 1000)
        assert [layer.get_seq_length() for layer in cache.layers] == [128] * 4
        write(cache, 1, 1)
        assert written(cache, 3) == [[*range(129)]]


def test_errors_say_what_to_do(pool: kvspan.Pool) -> None:
    config = make("llama").config
    with SpanCache(config, pool=pool, max_len=100) as cache:
        write(cache, 2, 100)
        with pytest.raises(kvspan.CapacityError, match=r"100 tokens a row, not 101.*max_len"):
            write(cache, 2, 1)
        with pytest.raises(kvspan.InvalidArgument, match="holds 2 rows of 2 heads of 16"):
            write(cache, 3, 1)
        with pytest.raises(kvspan.InvalidArgument, match="bfloat16"):
            cache.update(*(t.bfloat16() for t in states(2, 1)), 0)
        assert cache.get_seq_length() == 100
    with pytest.raises(kvspan.InvalidArgument, match="not LlamaForCausalLM"):
        SpanCache(make("llama"))
    with pytest.raises(kvspan.InvalidArgument, match="pool or the capacity"):
        SpanCache(config, pool=pool, capacity="1GiB")
    with kvspan.KVCache(pool, 4, 2, 16, torch.float32, max_seqs=2, max_seq_len=10) as shared:
        with pytest.raises(kvspan.InvalidArgument, match="of its own"):
            SpanCache(shared, max_len=10)
        with pytest.raises(kvspan.CapacityError, match="max_seq_len"):
            write(SpanCache(shared), 1, 11)
    latent = [kvspan.LayerSpec(planes=(kvspan.Plane("latent", 1, 64),))]
    with (
        kvspan.KVCache(pool, layers=latent, max_seqs=2, max_seq_len=10) as shared,
        pytest.raises(kvspan.InvalidArgument, match="planes latent"),
    ):
        SpanCache(shared)


def test_a_call_begins_with_what_earlier_ones_committed(pool: kvspan.Pool) -> None:
    model = make("llama")
    config = model.config
    cache = kvspan.KVCache(
        pool,
        config.num_hidden_layers,
        config.num_key_value_heads,
        config.head_dim,
        torch.float32,
        max_seqs=8,
        max_seq_len=4096,
    )
    torch.manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (2, 700))
    known = []
    for _ in range(3):  # turns
        wanted = model.generate(ids, max_new_tokens=5, do_sample=False)
        with SpanCache(cache, token_ids=ids) as rows:
            known.append(rows.get_seq_length())
            ours = model.generate(ids, past_key_values=rows, max_new_tokens=5, do_sample=False)
            rows.commit(ours)
        assert torch.equal(ours, wanted)
        said = torch.randint(0, config.vocab_size, (2, 300))
        ids = torch.cat([ours, said], dim=1)
    per_page = int(min(cache.tokens_per_page))
    assert known[0] == 0
    assert 704 - per_page < known[1] <= 704
    assert 1009 - per_page < known[2] <= 1009
    assert SpanCache(cache, token_ids=ids, salt="another").get_seq_length() == 0
    assert cache.stats().n_sequences == 0
    with pytest.raises(kvspan.InvalidArgument, match="go with a KVCache"):
        SpanCache(config, token_ids=ids)
    cache.close()


def test_sizes_that_nobody_gave(pool: kvspan.Pool) -> None:
    with SpanCache(make("llama").config) as cache:
        write(cache, 1, 1)
        kv = cache.kv_caches[0]
        assert kv.max_seq_len == 32768
        assert kv.pool.capacity > 1 << 30
        assert kv.pool.stats().in_use_bytes <= 2 << 20
        del kv


def test_layers_without_a_configuration(pool: kvspan.Pool) -> None:
    with SpanCache(pool=pool) as cache:
        assert cache.get_seq_length() == 0
        for layer in range(3):
            cache.update(*states(2, 4), layer)
        cache.update(*(t[..., :8] for t in states(2, 4)), 3)  # they need not be alike
        cache.reorder_cache(torch.tensor([1, 0]))
        assert written(cache, 2)[0] == [1000, 1001, 1002, 1003]
        assert len(copy.deepcopy(cache).layers) == 4


def test_gradients_reach_the_new_states(pool: kvspan.Pool) -> None:
    with SpanCache(make("llama").config, pool=pool) as cache:
        write(cache, 1, 3)
        new = [t.requires_grad_() for t in states(1, 2, 3)]
        keys, values = cache.update(*new, 0)
        assert keys[0, 0, :, 0].tolist() == [0, 1, 2, 3, 4]
        (keys * values).sum().backward()
        assert torch.equal(new[0].grad, new[1].detach())
        assert written(cache) == [[0, 1, 2, 3, 4]]
        assert not cache.layers[0].keys.requires_grad
        del keys, values


def test_a_cache_outlives_inference_mode(pool: kvspan.Pool) -> None:
    with SpanCache(make("llama").config, pool=pool) as cache:
        with torch.inference_mode():
            write(cache, 1, 3)
        write(cache, 1, 1)
        assert written(cache) == [[0, 1, 2, 3]]


def test_an_encoder_and_a_decoder(pool: kvspan.Pool) -> None:
    model = make("t5")
    with EncoderDecoderSpanCache(model.config, pool=pool) as cache:
        model.generate(prompt(2, 30), past_key_values=cache, max_new_tokens=6, min_new_tokens=6)
        assert cache.get_seq_length() == 6
        assert cache.cross_attention_cache.get_seq_length() == 30
        cache.crop(-2)
        cache.batch_repeat_interleave(2)
        assert cache.self_attention_cache.layers[2].keys.shape == (4, 4, 4, 16)
        assert cache.cross_attention_cache.layers[2].keys.shape == (4, 4, 30, 16)
    assert not any(cache.is_updated.values())
