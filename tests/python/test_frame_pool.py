"""The frame pool's ids: every call against a plain dictionary, every buffer that is none refused.

The load of the model is an engine's: requests take some blocks, share a prefix of another's, and
give all of theirs back at their end; now and then someone gives back what is not theirs.
"""

from __future__ import annotations

import array
import ctypes
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st

import kvspan
from kvspan import FramePool, InvalidArgument, OutOfMemory, RefusedError

N = 200  # more than three words of the bitmap
LARGE = 2000  # while 1,024 are free, a thread is lent a word of it


def ids(*numbers: int) -> np.ndarray[Any, Any]:
    return np.array(numbers, np.int64).astype(np.uint32)


def taken(pool: FramePool, n: int) -> np.ndarray[Any, Any]:
    out = np.empty(n, np.uint32)
    pool.take(out)
    return out


class Model:
    """The pool, and what it must say: references by frame, and how far it was ever taken."""

    def __init__(self, n_frames: int = N) -> None:
        self.pool = FramePool(n_frames)
        self.references: Counter[int] = Counter()
        self.fresh = n_frames

    def check(self) -> None:
        n, in_use = self.pool.n_frames, len(+self.references)
        counts = self.pool.counts()
        assert counts == (self.fresh, n - self.fresh - in_use, in_use)
        assert counts.available == n - in_use
        assert [self.pool.references(i) for i in range(n)] == [self.references[i] for i in range(n)]

    def take(self, n: int) -> None:
        out = np.full(n, 7777, np.uint32)
        available = self.pool.counts().available
        if n > available:
            with pytest.raises(OutOfMemory) as caught:
                self.pool.take(out)
            assert (out == 7777).all()
            error = caught.value
            assert (error.requested, error.free, error.reclaimable) == (n, available, 0)
            return
        recycled = self.pool.n_frames - self.fresh - len(+self.references)
        self.pool.take(out)
        numbers = out.tolist()
        assert len(set(numbers)) == n
        assert all(0 <= i < self.pool.n_frames and self.references[i] == 0 for i in numbers)
        self.fresh -= max(0, n - recycled)
        self.references.update(numbers)

    def share(self, numbers: list[int]) -> None:
        known = [i for i in numbers if self.references[i] > 0]
        self.refuse(len(numbers) - len(known), self.pool.share, numbers, "others were shared")
        self.references.update(known)

    def give(self, numbers: list[int]) -> None:
        n_freed = n_refused = 0
        for i in numbers:
            if self.references[i] > 0:
                self.references[i] -= 1
                n_freed += self.references[i] == 0
            else:
                n_refused += 1
        freed = self.refuse(n_refused, self.pool.give, numbers, "others were given back")
        assert freed is None or freed == n_freed

    def refuse(self, n_refused: int, call: Any, numbers: list[int], says: str) -> Any:
        if n_refused == 0:
            return call(ids(*numbers))
        with pytest.raises(
            RefusedError, match=f"^{n_refused} of {len(numbers)} .*{says}"
        ) as caught:
            call(ids(*numbers))
        assert caught.value.n_refused == n_refused
        return None


NUMBERS = st.one_of(st.integers(0, N - 1), st.sampled_from([N, 1 << 28, (1 << 32) - 1]))
CALLS = st.one_of(
    st.tuples(st.just("take"), st.integers(0, N + 1)),
    st.tuples(st.sampled_from(["share", "give"]), st.lists(NUMBERS, max_size=40)),
    # What is in use, from the k-th on.
    st.tuples(st.sampled_from(["share in use", "give in use"]), st.integers(0, N)),
)


@seed(6)
@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(CALLS, max_size=30))
def test_it_does_what_a_dictionary_does(calls: list[tuple[str, Any]]) -> None:
    follow(calls, Model())


@seed(6)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(CALLS, max_size=30))
def test_so_it_does_where_many_are_free(calls: list[tuple[str, Any]]) -> None:
    model = Model(LARGE)
    model.take(LARGE)
    model.give(list(range(LARGE)))
    follow(calls, model)


def follow(calls: list[tuple[str, Any]], model: Model) -> None:
    for name, argument in calls:
        if name.endswith(" in use"):
            argument = sorted(+model.references)[argument:]
        getattr(model, name.partition(" ")[0])(argument)
        model.check()


@pytest.mark.parametrize(
    "out",
    [
        np.zeros(6, np.uint32),
        np.zeros(6, np.int32),
        np.zeros((2, 3), np.int32),
        np.zeros(6, "<u4"),
        torch.zeros(2, 3, dtype=torch.int32).numpy(),
        array.array("I", [0] * 6),
        array.array("i", [0] * 6),
        (ctypes.c_uint32 * 6)(),
        memoryview(bytearray(24)).cast("I"),
    ],
    ids=lambda out: type(out).__name__,
)
def test_buffers_of_32_bit_integers(out: Any) -> None:
    pool = FramePool(10)
    taken(pool, 2)
    pool.take(out)
    assert np.frombuffer(out, np.uint32).tolist() == [2, 3, 4, 5, 6, 7]
    pool.share(out)
    assert pool.give(out) == 0
    assert pool.give(out) == 6
    assert pool.counts() == (2, 6, 2)


def test_memory_is_filled_in_place() -> None:
    pool = FramePool(100)
    table = torch.full((4, 8), -1, dtype=torch.int32)
    rows = table.numpy()
    pool.take(rows[1, :3])
    pool.take(rows[2])
    assert table[1].tolist() == [0, 1, 2, -1, -1, -1, -1, -1]
    assert table[2].tolist() == list(range(3, 11))
    assert table[0].tolist() == table[3].tolist() == [-1] * 8
    with pytest.raises(RefusedError, match="5 of 8"):
        pool.give(rows[1])  # -1 names no frame
    assert pool.counts().in_use == 8


WRONG = {
    "list": ([0, 1], "a bytes-like object is required, not 'list'"),
    "None": (None, "not this NoneType"),
    "tensor": (torch.zeros(2, dtype=torch.int32), "tensor.numpy.*not this Tensor"),
    "int64": (np.zeros(2, np.int64), "numpy.ndarray: items of format 'l'"),
    "float32": (np.zeros(2, np.float32), "items of format 'f'"),
    "bytes": (bytearray(8), "items of format 'B'"),
    "big-endian": (np.zeros(2, ">u4"), "items of format '>I'"),
    "structured": (np.zeros(2, "u2,u2"), "items of format 'T"),
    "strided": (np.zeros(4, np.uint32)[::2], "not C-contiguous"),
    "misaligned": (
        np.frombuffer(bytearray(12), np.uint32, count=2, offset=1),
        "an address that is no multiple of 4",
    ),
}


@pytest.mark.parametrize("name", ["take", "share", "give"])
@pytest.mark.parametrize(("buffer", "says"), WRONG.values(), ids=WRONG)
def test_other_objects_are_refused(name: str, buffer: Any, says: str) -> None:
    pool = FramePool(10)
    taken(pool, 5)
    before = [sys.getrefcount(buffer), pool.counts()]
    with pytest.raises(InvalidArgument, match=says):
        getattr(pool, name)(buffer)
    assert [sys.getrefcount(buffer), pool.counts()] == before
    if isinstance(buffer, bytearray):
        buffer.append(0)  # raises BufferError if it were still exported


def test_only_take_writes() -> None:
    pool = FramePool(10)
    mine = taken(pool, 4)
    mine.flags.writeable = False
    with pytest.raises(InvalidArgument, match=r"writable.*read-only"):
        pool.take(mine)
    pool.share(mine)
    assert [pool.give(mine) for _ in range(2)] == [0, 4]


def test_buffers_are_let_go() -> None:
    pool = FramePool(10)
    out = array.array("I", [0] * 6)
    pool.take(out)
    pool.share(out)
    pool.give(out)
    with pytest.raises(OutOfMemory):
        pool.take(array.array("I", [0] * 5))
    with pytest.raises(RefusedError):
        pool.give(array.array("I", [9]))
    out.append(1)  # raises BufferError while anyone has the buffer


def test_sizes() -> None:
    for wrong in (0, -1, 1.5, "16", None, 1 << 31):
        with pytest.raises(InvalidArgument, match="n_frames must be"):
            FramePool(wrong)
    with pytest.raises(InvalidArgument, match="at most 268435455"):
        FramePool(1 << 28)
    largest = FramePool((1 << 28) - 1)
    assert largest.counts() == (largest.n_frames, 0, 0)
    assert taken(largest, 3).tolist() == [0, 1, 2]
    foreign = (-1, 3, 1 << 28, (1 << 32) + 1, 1 - (1 << 32))
    assert [largest.references(i) for i in (1, *foreign)] == [1, 0, 0, 0, 0, 0]
    assert repr(largest) == "<kvspan.FramePool: 3 of 268435455 frames in use>"


def test_refusals_are_kvspans_and_builtins() -> None:
    pool = FramePool(4)
    with pytest.raises(RefusedError) as caught:
        pool.share(ids(0))
    assert isinstance(caught.value, kvspan.Error)
    assert isinstance(caught.value, ValueError)
