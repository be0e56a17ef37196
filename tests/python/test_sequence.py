"""Sequences: what each method promises, in figures, page tables and driver calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from device import IS_HOST, PAGE, SCALE, finish_default_stream

import kvspan
from kvspan import KVCache, LayerSpec, Pool

TOKEN = PAGE // 16  # bytes of one in `cache_of`
# Calls that make, map and unmap memory: what rule 1 keeps off the critical path.
DRIVER = ("reserve", "free", "create", "release", "map", "set_access", "unmap", "wait_fence")


def cache_of(pool: Pool, **options: Any) -> KVCache:
    """16 tokens a page."""
    shape = {"n_layers": 1, "n_kv_heads": 4, "head_dim": 128 * SCALE, "dtype": torch.float32}
    return KVCache(pool, **{**shape, "max_seqs": 8, "max_seq_len": 512, **options})


def driver_calls(cache: KVCache) -> dict[str, kvspan.CallCount]:
    both = (cache.stats().calls, cache.pool.stats().calls)
    return {f"{i} {name}": calls[name] for i, calls in enumerate(both) for name in DRIVER}


def kept_pages(cache: KVCache) -> int:
    return cache.stats().kept_bytes // PAGE


# Growing


def test_extend_within_a_page_calls_nobody(pool: Pool) -> None:
    cache = cache_of(pool)
    sequence = cache.sequence()
    sequence.extend(1)
    before = driver_calls(cache)
    for _ in range(15):
        sequence.extend(1)
    assert driver_calls(cache) == before
    sequence.extend(1)
    assert cache.stats().calls["map"].calls == before["0 map"].calls + 1
    assert cache.stats().mapped_bytes == 2 * PAGE


def test_a_long_prompt_is_mapped_by_one_call(pool: Pool) -> None:
    cache = cache_of(pool)
    cache.sequence().extend(500)
    # Adjacent frames under adjacent pages; a GPU takes a call for each, and one to grant access.
    assert cache.stats().calls["map"] == (1 if IS_HOST else 32, 32)
    assert cache.stats().calls["set_access"].calls == (0 if IS_HOST else 1)


def test_figures_of_a_growing_sequence(pool: Pool) -> None:
    cache = cache_of(pool, overread_tokens=20)
    sequence = cache.sequence()
    assert cache.stats().waste == 0
    sequence.extend(10)
    s = cache.stats()
    assert cache.bytes_per_token == TOKEN
    assert (s.used_bytes, s.partial_bytes) == (10 * TOKEN, 6 * TOKEN)
    assert (s.ahead_bytes, s.kept_bytes, s.shared_bytes) == (PAGE, 0, 0)  # 30 tokens: two pages
    assert s.mapped_bytes == 2 * PAGE
    assert s.waste == 1 - 10 / 32
    assert (s.n_sequences, s.n_slots) == (1, 8)
    assert s.reserved_bytes == 8 * 34 * PAGE  # 532 positions a slot


def test_truncate_keeps_what_is_soon_needed_again(pool: Pool) -> None:
    """After a rejected speculation the next tokens come at once."""
    cache = cache_of(pool, keep=2 * PAGE)
    sequence = cache.sequence()
    sequence.extend(100)
    sequence.layer(0)[0].fill_(5)
    before = driver_calls(cache)
    sequence.truncate(90)
    assert (len(sequence), kept_pages(cache)) == (90, 1)
    sequence.extend(10)
    assert driver_calls(cache) == before
    sequence.truncate(0)
    # What a GPU may still be reading stays until somebody needs it.
    assert kept_pages(cache) in ((2,) if IS_HOST else (2, 7))
    assert len(sequence) == 0


def test_tensors_of_a_sequence_are_its_tokens(cache: KVCache) -> None:
    first, second = cache.sequence(), cache.sequence()
    for i, sequence in enumerate((first, second)):
        sequence.extend(60)
        for plane in sequence.layer(1):
            assert plane.shape == (60, 5, 16 * SCALE)
            plane.fill_(i + 1)
    k, v = cache.layer(1)
    assert torch.equal(k[[first.slot, second.slot], 59, 0, 0], torch.tensor([1.0, 2.0]))
    assert second.layer(1)[1].data_ptr() == v[second.slot].data_ptr()
    assert not any(sequence.layer(0)[0].any() for sequence in (first, second))


# Slots


def test_next_sequence_takes_over_what_the_last_one_left(pool: Pool) -> None:
    cache = cache_of(pool, keep="1GiB")
    first = cache.sequence()
    first.extend(100)
    slot = first.slot
    first.release()
    finish_default_stream()  # slots that are still read come last
    assert kept_pages(cache) == 7
    before = driver_calls(cache)
    second = cache.sequence(100)
    second.extend(100)
    assert second.slot == slot
    assert driver_calls(cache) == before
    assert kept_pages(cache) == 0


def test_slots_are_chosen_by_what_fits(pool: Pool) -> None:
    cache = cache_of(pool, keep="1GiB", max_seqs=4)
    sequences = [cache.sequence() for _ in range(4)]
    for sequence, n_pages in zip(sequences, (2, 8, 4, 16), strict=True):
        sequence.extend(16 * n_pages)
    slots = [sequence.slot for sequence in sequences]
    for sequence in sequences:
        sequence.release()
    hints = {0: 2, 30: 2, 33: 4, 16 * 4: 4, 16 * 9: 16, 512: 16}
    for hint, n_pages in hints.items():
        finish_default_stream()
        with cache.sequence(hint) as sequence:
            expected = slots[(2, 8, 4, 16).index(n_pages)] if hint else sequence.slot
            assert sequence.slot == expected, hint
    cache.trim()
    assert kept_pages(cache) == 0


@pytest.mark.parametrize(
    ("keep", "n_pages"), [(0, 0), (3 * PAGE, 3), (16 * PAGE, 16), ("auto", 30)]
)
def test_keep_limits_what_free_slots_hold(pool: Pool, keep: int | str, n_pages: int) -> None:
    cache = cache_of(pool, keep=keep)
    sequences = [cache.sequence() for _ in range(3)]
    for sequence in sequences:
        sequence.extend(160)
    for sequence in sequences:
        sequence.release()
    finish_default_stream()  # what is still read stays,
    cache.sequence().release()  # until the next call that looks
    assert kept_pages(cache) == n_pages
    assert cache.stats().mapped_bytes == pool.stats().in_use_bytes == n_pages * PAGE
    assert cache.trim() == n_pages * PAGE
    assert pool.stats().in_use_bytes == 0


def test_little_is_kept_of_a_pool_that_is_more_than_half_used(pool: Pool) -> None:
    cache = cache_of(pool)
    n_pages = pool.stats().capacity_bytes // PAGE
    long, short = cache.sequence(), cache.sequence()
    long.extend(160)
    while pool.stats().in_use_bytes <= n_pages // 2 * PAGE:
        long = cache.sequence()
        long.extend(400)
    short.extend(160)
    short.release()
    finish_default_stream()
    cache.sequence().release()
    assert kept_pages(cache) == 2


def test_slots_come_and_go(cache: KVCache) -> None:
    with cache.sequence() as sequence:
        assert (sequence.slot, sequence.length, len(sequence)) == (0, 0, 0)
        assert not sequence.is_released
        sequence.extend(7)
        assert repr(sequence) == "<kvspan.Sequence in slot 0: 7 tokens>"
        assert cache.stats().n_sequences == 1
    assert sequence.is_released
    assert repr(sequence) == "<kvspan.Sequence, released>"
    assert cache.stats().n_sequences == 0
    many = [cache.sequence() for _ in range(8)]
    assert sorted(one.slot for one in many) == list(range(8))


# Sharing


def test_fork_shares_whole_pages_and_copies_the_tail(pool: Pool) -> None:
    cache = cache_of(pool)
    parent = cache.sequence()
    parent.extend(40)  # two pages and a half
    k, v = parent.layer(0)
    k.fill_(1), v.fill_(2)
    child = parent.fork()
    s = cache.stats()
    assert (s.mapped_bytes, s.shared_bytes) == (6 * PAGE, 2 * PAGE)
    assert pool.stats().in_use_bytes == 4 * PAGE
    assert s.calls["copy"].calls == 1
    frames = {(e.slot, e.page): (e.frame_id, e.n_references) for e in cache.page_map()}
    for page, n_references in enumerate((2, 2, 1)):
        mine, its = frames[parent.slot, page], frames[child.slot, page]
        assert mine[1] == its[1] == n_references
        assert (mine[0] == its[0]) == (n_references == 2)

    child.extend(1)
    parent.extend(1)
    for i, sequence in enumerate((child, parent)):
        for plane in sequence.layer(0):
            plane[40:] = 10 + i
    for i, sequence in enumerate((child, parent)):
        k, v = sequence.layer(0)
        assert ((k[:40] == 1).all(), (v[:40] == 2).all(), (k[40] == 10 + i).all()) == (True,) * 3

    grandchild = child.fork()
    parent.release()
    finish_default_stream()
    cache.trim()  # on a GPU, what was still being read
    assert all(e.n_references in (1, 2) for e in cache.page_map())
    child.release()
    cache.trim()
    assert cache.stats().shared_bytes == 0
    assert (grandchild.layer(0)[0][:40] == 1).all()
    assert {e.n_references for e in cache.page_map()} == {1}


def test_extending_after_truncating_into_a_shared_page_copies_first(pool: Pool) -> None:
    cache = cache_of(pool)
    parent = cache.sequence()
    parent.extend(64)
    parent.layer(0)[0].fill_(1)
    child = parent.fork()
    child.truncate(20)
    before = cache.stats().calls["copy"].calls
    child.extend(1)
    assert cache.stats().calls["copy"].calls == before + 1
    child.layer(0)[0][20] = 9
    assert (parent.layer(0)[0] == 1).all()
    assert (child.layer(0)[0][:20] == 1).all()
    parent.truncate(3)
    parent.extend(1)
    parent.layer(0)[0][3] = 7
    assert (child.layer(0)[0][:20] == 1).all()


# Windows


def test_drop_before_frees_the_pages_of_layers_with_a_window(pool: Pool) -> None:
    full, sliding = (LayerSpec(4, 128 * SCALE, torch.float32, window) for window in (None, 32))
    cache = KVCache(pool, layers=[full, sliding], max_seqs=2, max_seq_len=512)
    sequence = cache.sequence()
    sequence.extend(160)
    for i in range(2):
        for plane in sequence.layer(i):
            plane.fill_(i + 1)
    before = cache.stats()
    sequence.drop_before(100)  # six whole pages
    after = cache.stats()
    assert before.mapped_bytes - after.mapped_bytes == 6 * PAGE
    assert before.used_bytes - after.used_bytes == 100 * TOKEN
    assert (after.partial_bytes, after.kept_bytes) == (4 * TOKEN, 0)  # 96 to 99, of a whole page
    assert (sequence.layer(0)[0] == 1).all()
    if IS_HOST:
        assert not sequence.layer(1)[0][:96].any()
    assert (sequence.layer(1)[0][96:] == 2).all()
    sequence.drop_before(50)  # gone already
    assert cache.stats() == after
    child = sequence.fork()
    child.extend(1)
    assert (child.layer(1)[1][100:160] == 2).all()
    sequence.release()
    child.release()
    cache.trim()
    assert pool.stats().in_use_bytes == 0
