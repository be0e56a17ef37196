"""Batches: one native call a step, arrays at fixed addresses, rows that move by remapping."""

from __future__ import annotations

from collections.abc import Sequence as Items

import numpy as np
import pytest
import torch
from device import IS_HOST, PAGE, SCALE

import kvspan


@pytest.fixture
def cache(pool: kvspan.Pool) -> kvspan.KVCache:
    """16 tokens a page in each of two lanes, ten slots."""
    return kvspan.KVCache(
        pool, 2, 4, 128 * SCALE, torch.float32, max_seqs=10, max_seq_len=160, layers_per_page=1
    )


def fill(batch: kvspan.Batch, lengths: Items[int]) -> None:
    """Grow each row to a length of its own, and write the row's number everywhere."""
    for i, (sequence, length) in enumerate(zip(batch.sequences, lengths, strict=True)):
        sequence.extend(length)
        for layer in range(2):
            for plane in sequence.layer(layer):
                plane.fill_(i + 1)


def values(batch: kvspan.Batch) -> list[float]:
    """Return which row's number each row holds, having checked all of its bytes."""
    result = []
    for sequence in batch.sequences:
        planes = [plane for layer in range(2) for plane in sequence.layer(layer)]
        value = planes[0][0, 0, 0].item()
        assert all((plane == value).all() for plane in planes)
        result.append(value)
    return result


def test_step_returns_the_lengths_before(cache: kvspan.KVCache) -> None:
    sequences = [cache.sequence() for _ in range(3)]
    for sequence, length in zip(sequences, (5, 0, 100), strict=True):
        if length:
            sequence.extend(length)
    batch = cache.batch(sequences[::-1])
    lengths, slots = batch.lengths, batch.slots
    before = batch.step()
    assert before.dtype == lengths.dtype == slots.dtype == torch.int32
    assert before.tolist() == [100, 0, 5]
    assert lengths.tolist() == [101, 1, 6]  # in place: a captured graph sees it
    assert slots.tolist() == [2, 1, 0]
    again = batch.step(10)
    assert again.data_ptr() == before.data_ptr()
    assert before.tolist() == [101, 1, 6]
    assert [len(sequence) for sequence in sequences] == [16, 11, 111]
    sequences[0].truncate(2)
    sequences[2].extend(1)
    assert batch.lengths.tolist() == [112, 11, 2]
    assert batch.lengths.data_ptr() == lengths.data_ptr()
    assert len(batch) == 3
    assert batch.sequences == sequences[::-1]


def test_step_within_pages_calls_no_driver(cache: kvspan.KVCache) -> None:
    batch = cache.batch([cache.sequence() for _ in range(10)])
    batch.step()
    before = cache.stats().calls, cache.pool.stats().calls
    for _ in range(15):
        batch.step()
    assert (cache.stats().calls, cache.pool.stats().calls) == before
    batch.step()
    grown = cache.stats().calls["map"].handles - before[0]["map"].handles
    assert grown == 10 * 2  # a page for each row in each lane


@pytest.mark.parametrize("row", range(3))
def test_any_row_may_be_the_one_that_needs_a_page(cache: kvspan.KVCache, row: int) -> None:
    batch = cache.batch(3)
    fill(batch, [16 if i == row else 3 for i in range(3)])
    mapped = cache.stats().mapped_bytes
    batch.step()
    assert cache.stats().mapped_bytes == mapped + 2 * PAGE
    batch.sequences[row].layer(0)[0][16] = row  # traps if it is not there


def test_step_is_all_or_nothing() -> None:
    pool = kvspan.Pool(capacity=5 * PAGE, page_size=PAGE)
    cache = kvspan.KVCache(pool, 1, 4, 128 * SCALE, torch.float32, max_seqs=3, max_seq_len=160)
    batch = cache.batch(3)
    lengths = (16, 10, 16)
    for sequence, length in zip(batch.sequences, lengths, strict=True):
        sequence.extend(length)
    other = cache.batch(batch.sequences[:2])
    with pytest.raises(kvspan.OutOfMemory):
        batch.step(17)
    assert batch.lengths.tolist() == list(lengths)
    assert cache.stats().mapped_bytes == 3 * PAGE
    batch.sequences[1].release()
    with pytest.raises(kvspan.ReleasedError):
        batch.step()
    with pytest.raises(kvspan.ReleasedError):
        other.step()
    assert [len(batch.sequences[i]) for i in (0, 2)] == [16, 16]


def test_rows_in_any_slots_index_the_tensors(cache: kvspan.KVCache) -> None:
    sequences = [cache.sequence() for _ in range(4)]
    batch = cache.batch([sequences[3], sequences[1]])
    fill(batch, (20, 20))
    k, _ = cache.layer(1)
    assert k[batch.slots.long(), 19, 3, -1].tolist() == [1, 2]
    assert repr(batch) == "<kvspan.Batch of 2 rows in any slots>"


def test_adjacent_rows_are_a_view(cache: kvspan.KVCache) -> None:
    first = cache.sequence()
    batch = cache.batch(4)
    assert batch.slots.tolist() == [1, 2, 3, 4]
    assert repr(batch) == "<kvspan.Batch of 4 rows in adjacent slots from 1>"
    for i in range(2):
        for rows, plane in zip(batch.layer(i), cache.layer(i), strict=True):
            assert rows.shape == (4, 160, 4, 128 * SCALE)
            assert rows.data_ptr() == plane[1].data_ptr()
            assert rows.stride() == plane.stride()
    assert first.slot == 0


@pytest.mark.parametrize(
    "rows",
    [[1, 0, 2, 3], [3, 2, 1, 0], [2], [0, 2], [0, 0, 0, 0], [3, 3, 1], [1, 2, 3, 0]],
)
def test_select_moves_rows_under_fixed_addresses(cache: kvspan.KVCache, rows: list[int]) -> None:
    batch = cache.batch(4)
    lengths = (40, 16, 100, 3)
    fill(batch, lengths)
    old = batch.sequences
    addresses = [plane.data_ptr() for i in range(2) for plane in batch.layer(i)]
    copies = cache.stats().calls["copy"].calls
    batch.select(rows)
    assert [plane.data_ptr() for i in range(2) for plane in batch.layer(i)] == addresses
    assert values(batch) == [row + 1 for row in rows]
    assert batch.lengths.tolist() == [lengths[row] for row in rows]
    assert batch.slots.tolist() == list(range(len(rows)))
    for row, sequence in enumerate(old):
        assert sequence.is_released == (row not in rows)
        assert row not in rows or batch.sequences[rows.index(row)] is sequence
    # Only the partly filled tails of repeated rows are copied: one in each lane.
    repeats = [row for i, row in enumerate(rows) if row in rows[:i]]
    tails = [row for row in repeats if lengths[row] % 16]
    assert cache.stats().calls["copy"].calls - copies == 2 * len(tails)
    shared = sum(lengths[row] // 16 for row in repeats)
    assert cache.stats().shared_bytes == 2 * shared * PAGE

    batch.step(20)
    for i, plane in enumerate(batch.layer(0)):
        for row, length in enumerate(batch.lengths.tolist()):
            plane[row, length - 20 : length] = 100 * i + row  # nobody else sees it
    for row, was in enumerate(rows):
        assert (batch.sequences[row].layer(0)[1][: lengths[was]] == was + 1).all()


def test_select_takes_what_holds_integers(cache: kvspan.KVCache) -> None:
    batch = cache.batch(3)
    fill(batch, (5, 6, 7))
    order: list[Items[int] | torch.Tensor] = [
        torch.tensor([1, 2, 0]),
        np.array([1, 2, 0]),
        (1, 2, 0),
        range(3),
    ]
    for rows in order:
        batch.select(rows)
    assert values(batch) == [1, 2, 3]


def test_a_batch_shrinks_and_grows_within_its_slots(cache: kvspan.KVCache) -> None:
    """A beam search: the beams die out to one, which branches again."""
    batch = cache.batch(4)
    fill(batch, (33, 33, 33, 33))
    batch.select([2])
    assert cache.stats().n_sequences == 1
    others = [cache.sequence() for _ in range(6)]  # the slots of the batch stay its own
    assert {one.slot for one in others} == {4, 5, 6, 7, 8, 9}
    with pytest.raises(kvspan.CapacityError):
        cache.sequence()
    batch.select([0, 0, 0, 0])
    assert values(batch) == [3] * 4
    assert batch.step().tolist() == [33] * 4


def test_dropping_a_batch_gives_its_slots_back(cache: kvspan.KVCache) -> None:
    batch = cache.batch(10)
    fill(batch, [16] * 10)
    kept = batch.sequences[7]
    with pytest.raises(kvspan.CapacityError):
        cache.batch(1)
    del batch
    assert (kept.layer(0)[0] == 8).all()
    assert cache.batch(7).slots.tolist() == list(range(7))
    kept.release()
    assert len(cache.batch(10)) == 10


def test_a_fork_of_a_row_lies_outside(cache: kvspan.KVCache) -> None:
    batch = cache.batch(3)
    fill(batch, (40, 40, 40))
    child = batch.sequences[1].fork()
    assert child.slot not in batch.slots.tolist()
    batch.select([2, 0])
    assert (child.layer(1)[1] == 2).all()
    both = cache.batch([child, *batch.sequences])
    assert both.step().tolist() == [40, 40, 40]
    assert batch.lengths.tolist() == [41, 41]


def test_release_of_a_row_empties_its_slot(cache: kvspan.KVCache) -> None:
    batch = cache.batch(2)
    fill(batch, (40, 40))
    batch.sequences[0].release()
    assert cache.stats().mapped_bytes == 2 * 3 * PAGE
    if IS_HOST:
        assert not batch.layer(0)[0][0].any()
    with pytest.raises(kvspan.ReleasedError):
        batch.select([0, 1])
    batch.select([1])
    assert values(batch) == [2]


def test_256_rows() -> None:
    pool = kvspan.Pool(capacity=256 * PAGE, page_size=PAGE)
    cache = kvspan.KVCache(pool, 1, 1, 64 * SCALE, max_seqs=256, max_seq_len=1000)
    batch = cache.batch(256)
    for step in range(30):
        assert (batch.step() == step).all()
    batch.select(torch.arange(255, -1, -1))
    assert (batch.lengths == 30).all()


def test_fork_shares_whole_pages_of_all_rows(cache: kvspan.KVCache) -> None:
    batch = cache.batch(4)
    fill(batch, (40, 16, 3, 33))
    batch.select([0, 1, 2])
    before = cache.stats()
    child = batch.fork()
    assert child.slots.tolist() == [4, 5, 6]
    assert child.lengths.tolist() == [40, 16, 3]
    assert values(child) == values(batch) == [1, 2, 3]
    after = cache.stats()
    assert after.shared_bytes - before.shared_bytes == 2 * (2 + 1) * PAGE
    assert after.calls["copy"].calls - before.calls["copy"].calls == 2 * 2  # the tails
    child.select([0, 0, 0, 0])  # in slots of its own, as many as the parent has
    child.step()
    for plane in child.layer(1):
        plane[:, 40] = 7
    assert values(batch) == [1, 2, 3]
    batch.step(13)
    for sequence in batch.sequences:
        sequence.layer(0)[0][-13:] = 9
    assert (child.layer(0)[0][:, :40] == 1).all()
    del batch
    assert (child.layer(1)[1][:, :40] == 1).all()


def test_fork_happens_whole_or_not_at_all(pool: kvspan.Pool) -> None:
    with kvspan.KVCache(
        pool, 2, 4, 128 * SCALE, torch.float32, max_seqs=10, max_seq_len=500, layers_per_page=1
    ) as cache:
        batch = cache.batch(3)
        fill(batch, (160, 160, 161))
        assert pool.stats().in_use_bytes == 62 * PAGE
        filler = cache.sequence()
        filler.extend(16)
        before = cache.stats()
        with pytest.raises(kvspan.OutOfMemory):
            batch.fork()
        assert cache.stats().n_sequences == before.n_sequences
        assert cache.stats().mapped_bytes == before.mapped_bytes
        filler.release()
        assert values(batch.fork()) == [1, 2, 3]
        others = cache.batch(6)
        with pytest.raises(kvspan.CapacityError, match="adjacent"):
            batch.fork()
        with pytest.raises(kvspan.InvalidArgument, match="adjacent slots"):
            cache.batch(others.sequences).fork()
