"""The prefix index: what a sequence begins with, what is shared, merged, evicted."""

from __future__ import annotations

import pytest
import torch
from device import PAGE, SCALE

import kvspan
from kvspan import KVCache, LayerSpec, Pool

HEADS, DIM = 5, 16 * SCALE
RECORD = 2 * 2 * HEADS * DIM * 4  # two layers' keys and values: 51.2 tokens a page


def prompt(n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 50_000, (n,), generator=generator)


def compute(cache: KVCache, sequence: kvspan.Sequence, ids: torch.Tensor) -> None:
    """Write what follows from the ids from the sequence's length on."""
    begin = sequence.length
    sequence.extend(len(ids) - begin)
    for i, planes in enumerate(cache.layer(i) for i in range(2)):
        for plane in planes:
            values = (ids[begin:, None, None] + i).to(plane.dtype)
            plane[sequence.slot, begin : len(ids)] = values.to(plane.device)


def check(cache: KVCache, sequence: kvspan.Sequence, ids: torch.Tensor) -> None:
    for i in range(2):
        for shown in sequence.layer(i):
            wanted = (ids[: sequence.length, None, None] + i).to(shown.dtype)
            assert torch.equal(shown.cpu(), wanted.expand(shown.shape))


def committed(cache: KVCache, ids: torch.Tensor, salt: str = "") -> kvspan.Sequence:
    sequence = cache.sequence(token_ids=ids, salt=salt)
    compute(cache, sequence, ids)
    sequence.commit(ids)
    return sequence


def test_a_prompt_that_is_known_is_not_computed_again(cache: KVCache) -> None:
    ids = prompt(200)
    first = committed(cache, ids)
    again = cache.sequence(token_ids=ids)
    # Three chunks of 52 tokens; the last page of them is cut where its last token straddles.
    assert again.length == 3 * PAGE // RECORD == 153
    check(cache, again, ids)
    longer = torch.cat([ids, prompt(30, seed=1)])
    compute(cache, again, longer)
    check(cache, again, longer)
    check(cache, first, ids)
    stats = cache.stats().prefixes
    assert (stats.n_hits, stats.n_misses, stats.n_hit_tokens) == (1, 1, 153)
    assert stats.n_published == 3


def test_pages_below_the_length_are_shared_and_one_is_copied(cache: KVCache) -> None:
    ids = prompt(200)
    committed(cache, ids)
    before = cache.stats()
    again = cache.sequence(token_ids=ids)
    after = cache.stats()
    assert again.length == 153
    # 153 tokens end in the third page.
    assert after.mapped_bytes - before.mapped_bytes == 3 * PAGE
    assert after.shared_bytes - before.shared_bytes == 2 * PAGE


def test_any_beginning_is_found_to_the_token(cache: KVCache) -> None:
    ids = prompt(200)
    committed(cache, ids)
    other = prompt(200, seed=1)
    for n in (1, 51, 52, 53, 100, 103, 104, 140, 153, 154, 156, 157, 200):
        mixed = torch.cat([ids[:n], other[n:]])
        with cache.sequence(token_ids=mixed) as sequence:
            assert sequence.length == min(n, 153)
            check(cache, sequence, ids)
        with cache.sequence(token_ids=ids[:n]) as sequence:
            assert sequence.length == min(n - 1, 153)


def test_what_is_known_outlives_its_sequence(cache: KVCache) -> None:
    ids = prompt(150)
    committed(cache, ids).release()
    assert cache.stats().n_sequences == 0
    again = cache.sequence(token_ids=ids)
    assert again.length == 2 * PAGE // RECORD
    check(cache, again, ids)


def test_branches(cache: KVCache) -> None:
    trunk = prompt(120)
    ends = [torch.cat([trunk, prompt(80, seed)]) for seed in (1, 2, 3)]
    for ids in ends:
        committed(cache, ids).release()
    for ids in ends:
        with cache.sequence(token_ids=ids) as sequence:
            assert sequence.length == 153
            check(cache, sequence, ids)
    assert cache.stats().prefixes.n_published == 2 + 3


def test_many_branches_are_told_apart(cache: KVCache) -> None:
    # The last chunk of one of many: the one that agrees longest is found among all.
    trunk = prompt(60)
    ends = [torch.cat([trunk, torch.full((100,), seed), prompt(1, seed)]) for seed in range(5)]
    ends += [torch.cat([trunk, torch.full((30,), 7), prompt(80, seed)]) for seed in range(5)]
    for ids in ends:
        committed(cache, ids).release()
    for ids in ends:
        for n in (61, 75, 91, 100, 104):
            cut = torch.cat([ids[:n], torch.tensor([49_999, 49_998])])
            with cache.sequence(token_ids=cut) as sequence:
                assert sequence.length == n
                check(cache, sequence, cut)


def test_salts_share_nothing(cache: KVCache) -> None:
    ids = prompt(150)
    committed(cache, ids, salt="tenant a")
    assert cache.sequence(token_ids=ids, salt="tenant b").length == 0
    assert cache.sequence(token_ids=ids).length == 0
    of_a = cache.sequence(token_ids=ids, salt="tenant a")
    assert of_a.length == 102
    # A fork is its parent's tenant's.
    child = of_a.fork()
    more = torch.cat([ids[:102], prompt(60, seed=4)])
    compute(cache, child, more)
    child.commit(more)
    assert cache.sequence(token_ids=more, salt="tenant a").length == 153


@pytest.mark.parametrize("merge", [True, False])
def test_what_was_computed_twice_is_kept_once(cache: KVCache, pool: Pool, merge: bool) -> None:
    ids = prompt(200)
    first, second = cache.sequence(), cache.sequence()
    compute(cache, first, ids)
    compute(cache, second, ids)
    first.commit(ids)
    before = pool.stats().in_use_bytes
    second.commit(ids, merge=merge)
    assert before - pool.stats().in_use_bytes == (3 * PAGE if merge else 0)
    assert cache.stats().merged_bytes == (3 * PAGE if merge else 0)
    check(cache, second, ids)
    first.release()
    longer = torch.cat([ids, prompt(60, seed=1)])
    compute(cache, second, longer)
    check(cache, second, longer)


def test_growing_again_after_a_truncate_copies_first(cache: KVCache) -> None:
    ids = prompt(200)
    first = committed(cache, ids)
    first.truncate(60)
    changed = torch.cat([ids[:60], prompt(60, seed=1)])
    compute(cache, first, changed)
    check(cache, first, changed)
    again = cache.sequence(token_ids=ids)
    assert again.length == 153
    check(cache, again, ids)


def test_memory_that_nobody_maps_is_given_up_for_others(pool: Pool, cache: KVCache) -> None:
    old, recent = prompt(500), prompt(500, seed=1)
    committed(cache, old).release()
    committed(cache, recent).release()
    growing = [cache.sequence() for _ in range(5)]
    for sequence in growing:  # into all the rest of 64 pages, and more
        sequence.extend(500)
    stats = cache.stats().prefixes
    assert stats.n_evicted > 0
    # From the end of what was used least recently.
    assert cache.sequence(token_ids=old).length < 9 * PAGE // RECORD
    stats = cache.stats()
    assert stats.prefix_bytes <= 18 * PAGE


def test_what_is_mapped_is_not_evicted(pool: Pool, cache: KVCache) -> None:
    ids = prompt(500)
    live = committed(cache, ids)
    gone = committed(cache, prompt(500, seed=1))
    gone.release()
    assert cache.trim() >= 9 * PAGE
    assert cache.stats().prefix_bytes == 9 * PAGE
    check(cache, live, ids)
    assert cache.sequence(token_ids=ids).length == 9 * PAGE // RECORD
    live.release()


def test_pages_that_windows_left_are_given_up_with_their_chunks(pool: Pool) -> None:
    layers = [LayerSpec(HEADS, DIM, torch.float32, window=window) for window in (None, 20)]
    with KVCache(pool, layers=layers, max_seqs=4, max_seq_len=1000) as cache:
        ids = prompt(500)
        live = committed(cache, ids)
        live.drop_before(480)
        kept = cache.stats().prefix_bytes
        in_use = pool.stats().in_use_bytes
        freed = cache.trim()  # nobody maps them, but what else their chunks hold is mapped
        assert freed == in_use - pool.stats().in_use_bytes > 0
        assert cache.stats().prefix_bytes < kept
        rest = pool.capacity - pool.stats().in_use_bytes
        other = KVCache(
            pool, 1, 1, PAGE // 2, torch.int8, max_seqs=1, max_seq_len=64, overread_tokens=0
        ).sequence()
        other.extend(rest // PAGE)  # and all else can be had
        assert live.layer(0)[0].shape[0] == 500


def test_close_lets_go(pool: Pool) -> None:
    cache = KVCache(
        pool, 2, HEADS, DIM, torch.float32, max_seqs=4, max_seq_len=1000, layers_per_page=2
    )
    committed(cache, prompt(200))
    cache.close()
    assert pool.stats().in_use_bytes == 0


@pytest.mark.parametrize(("layers_per_page", "split_planes"), [(1, False), (2, True), (4, False)])
def test_layouts(pool: Pool, layers_per_page: int, split_planes: bool) -> None:
    cache = KVCache(
        pool, 4, 3, 32 * SCALE, torch.bfloat16, max_seqs=4, max_seq_len=4000,
        layers_per_page=layers_per_page, split_planes=split_planes,
    )  # fmt: skip
    ids = prompt(1200)
    committed(cache, ids)
    again = cache.sequence(token_ids=ids)
    per_page = min(cache.tokens_per_page), max(cache.tokens_per_page)
    assert per_page[0] == per_page[1]
    assert again.length == int(1200 // per_page[0] * per_page[0])
    check(cache, again, ids)
    cache.close()


def test_token_ids_of_any_kind(cache: KVCache) -> None:
    ids = prompt(120)
    sequence = cache.sequence()
    compute(cache, sequence, ids)
    assert sequence.commit(ids.tolist()) == -(-2 * PAGE // RECORD)
    for same in (ids.int(), ids.to(torch.int64), tuple(ids.tolist()), range(0)):
        assert cache.sequence(token_ids=same).length == (102 if len(same) else 0)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1.5, 2.0], "integers"),
        (torch.zeros(2, 2, dtype=torch.int32), "one dimension"),
        ("hello", "integers"),
        ([1 << 40], "int32"),
    ],
)
def test_ids_that_make_no_sense(cache: KVCache, ids: object, message: str) -> None:
    with pytest.raises(kvspan.InvalidArgument, match=message):
        cache.sequence(token_ids=ids)  # type: ignore[arg-type]


def test_more_tokens_than_there_are(cache: KVCache) -> None:
    sequence = cache.sequence()
    sequence.extend(10)
    with pytest.raises(kvspan.InvalidArgument, match="11 tokens of a sequence of 10"):
        sequence.commit(range(11))
