"""Bad input: a typed error that says what was wrong and what is allowed, and nothing changed.

Each case names the call, the exception, and words that the message must have: the first say what was
wrong, the last what is allowed or what to do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

import kvspan
from kvspan import (
    BusyError,
    CapacityError,
    DriverError,
    Error,
    InvalidArgument,
    KVCache,
    LayerSpec,
    OutOfMemory,
    Plane,
    Pool,
    ReleasedError,
)

PAGE = 64 << 10
SHAPE: dict[str, Any] = {
    "n_layers": 2,
    "n_kv_heads": 5,
    "head_dim": 16,
    "dtype": torch.float32,
    "max_seqs": 4,
    "max_seq_len": 1000,
}


class Scene:
    """A pool of 30 pages, and a cache with one sequence of 100 tokens in it."""

    def __init__(self) -> None:
        self.pool = Pool(capacity=30 * PAGE, page_size=PAGE)
        self.cache = KVCache(self.pool, **SHAPE)
        self.other = KVCache(self.pool, **SHAPE)
        self.sequence = self.cache.sequence()
        self.sequence.extend(100)
        for plane in self.cache.layer(1):
            plane[self.sequence.slot, :100] = 7
        self.foreign = self.other.sequence()
        self.released = self.cache.sequence()
        self.released.release()
        self.listed = self.cache.batch([self.sequence])
        self.adjacent = self.cache.batch(2)
        self.closed_pool = Pool(capacity=PAGE, page_size=PAGE)
        self.closed_pool.close()
        self.closed_cache = KVCache(self.pool, **SHAPE)
        self.of_closed = self.closed_cache.sequence()
        self.batch_of_closed = self.closed_cache.batch([self.of_closed])
        self.closed_cache.close()

    def state(self) -> tuple[Any, ...]:
        """All that a failed call must leave as it was."""
        s = self.cache.stats()
        return (
            *(s.mapped_bytes, s.used_bytes, s.kept_bytes, s.shared_bytes, s.n_sequences),
            *(self.sequence.length, self.listed.lengths.tolist(), self.pool.stats().in_use_bytes),
            bool((self.cache.layer(1)[0][self.sequence.slot, :100] == 7).all()),
        )

    def make(self, **changes: Any) -> KVCache:
        return KVCache(self.pool, **{**SHAPE, **changes})

    def take_all_slots(self) -> None:
        taken = []
        try:
            while True:
                taken.append(self.cache.sequence())
        finally:
            for sequence in taken:
                sequence.release()


@dataclass
class Case:
    call: Callable[[Scene], Any]
    error: type[Exception]
    words: tuple[str, ...]


def mib_pool(**options: Any) -> Pool:
    return Pool(**{"capacity": "1MiB", "page_size": PAGE, **options})


CASES = {
    # pools
    "capacity 0": Case(
        lambda s: mib_pool(capacity=0), InvalidArgument, ("capacity", "1 bytes or more")
    ),
    "capacity negative": Case(lambda s: mib_pool(capacity=-5), InvalidArgument, ("capacity", "-5")),
    "capacity a float": Case(
        lambda s: mib_pool(capacity=1e6), InvalidArgument, ("integer", "1000000.0")
    ),
    "capacity without sense": Case(
        lambda s: mib_pool(capacity="much"), InvalidArgument, ("'much'", '"512MiB"')
    ),
    "capacity in GB": Case(lambda s: mib_pool(capacity="4GB"), InvalidArgument, ("'4GB'", "GiB")),
    "capacity beyond the machine": Case(
        lambda s: mib_pool(capacity="999TiB"), InvalidArgument, ("999 TiB", "more than the")
    ),
    "capacity not of whole pages": Case(
        lambda s: mib_pool(capacity=PAGE + 1),
        InvalidArgument,
        ("multiple of the page size", "64 KiB"),
    ),
    "page size no power of two": Case(
        lambda s: mib_pool(page_size=3 * PAGE), InvalidArgument, ("power of two", "192 KiB")
    ),
    "page size too small": Case(
        lambda s: mib_pool(page_size="4KiB"), InvalidArgument, ("from 64 KiB", "4 KiB")
    ),
    "page size too large": Case(
        lambda s: Pool(capacity="256MiB", page_size="128MiB"),
        InvalidArgument,
        ("to 64 MiB", "128 MiB"),
    ),
    "frame size no multiple": Case(
        lambda s: mib_pool(max_frame_size=PAGE + 1),
        InvalidArgument,
        ("max_frame_size", "times the page"),
    ),
    "frame size of three pages": Case(
        lambda s: mib_pool(max_frame_size=3 * PAGE), InvalidArgument, ("1, 2, 4", "192 KiB")
    ),
    "frame size 0": Case(
        lambda s: mib_pool(max_frame_size=0), InvalidArgument, ("max_frame_size",)
    ),
    "device unknown": Case(lambda s: mib_pool(device="tpu"), InvalidArgument, ('"cpu"', "'tpu'")),
    "preallocate too much": Case(
        lambda s: mib_pool(preallocate="2MiB"), OutOfMemory, ("2 MiB asked", "larger pool")
    ),
    "preallocate negative": Case(
        lambda s: s.pool.preallocate(-1), InvalidArgument, ("n_bytes", "0 bytes or more")
    ),
    "stats of a closed pool": Case(
        lambda s: s.closed_pool.stats(), ReleasedError, ("closed", "make a new one")
    ),
    "a cache in a closed pool": Case(
        lambda s: KVCache(s.closed_pool, **SHAPE), ReleasedError, ("closed", "make a new one")
    ),
    # caches
    "no pool": Case(lambda s: KVCache("pool", **SHAPE), InvalidArgument, ("kvspan.Pool", "str")),
    "no layers": Case(lambda s: s.make(n_layers=0), InvalidArgument, ("n_layers", "between 1")),
    "no heads": Case(lambda s: s.make(n_kv_heads=0), InvalidArgument, ("heads", "between 1")),
    "negative head_dim": Case(lambda s: s.make(head_dim=-64), InvalidArgument, ("dim", "-64")),
    "shape missing": Case(
        lambda s: KVCache(s.pool, max_seqs=1, max_seq_len=9), InvalidArgument, ("needs n_layers",)
    ),
    "both shapes": Case(
        lambda s: s.make(layers=[LayerSpec(1, 8)]), InvalidArgument, ("either", "not both")
    ),
    "an empty list of layers": Case(
        lambda s: KVCache(s.pool, layers=[], max_seqs=1, max_seq_len=9),
        InvalidArgument,
        ("at least one layer",),
    ),
    "layers of something else": Case(
        lambda s: KVCache(s.pool, layers=[3], max_seqs=1, max_seq_len=9),
        InvalidArgument,
        ("LayerSpec",),
    ),
    "float64": Case(
        lambda s: s.make(dtype=torch.float64),
        InvalidArgument,
        ("float64", "float32, float16, bfloat16"),
    ),
    "complex": Case(
        lambda s: s.make(dtype=torch.complex64), InvalidArgument, ("complex64", "int8")
    ),
    "max_seqs 0": Case(lambda s: s.make(max_seqs=0), InvalidArgument, ("max_seqs", "between 1")),
    "max_seqs a float": Case(lambda s: s.make(max_seqs=1.5), InvalidArgument, ("integer", "1.5")),
    "max_seq_len 0": Case(
        lambda s: s.make(max_seq_len=0), InvalidArgument, ("between 1 and", "not 0")
    ),
    "max_seq_len 2**31": Case(lambda s: s.make(max_seq_len=2**31), InvalidArgument, ("int32",)),
    "address space": Case(
        lambda s: s.make(max_seqs=1 << 20, max_seq_len=2**31 - 1), CapacityError, ("address space",)
    ),
    "layers_per_page no divisor": Case(
        lambda s: s.make(n_layers=4, layers_per_page=3), InvalidArgument, ("1, 2, 4", "not 3")
    ),
    "layers_per_page a word": Case(
        lambda s: s.make(layers_per_page="all"), InvalidArgument, ("layers_per_page", "'all'")
    ),
    "overread negative": Case(
        lambda s: s.make(overread_tokens=-1), InvalidArgument, ("overread_tokens", "-1")
    ),
    "unmapped unknown": Case(
        lambda s: s.make(unmapped="nan"), InvalidArgument, ('"zero", "fault"', "'nan'")
    ),
    "scrub unknown": Case(lambda s: s.make(scrub="yes"), InvalidArgument, ('"cross", "reuse"',)),
    "keep negative": Case(lambda s: s.make(keep=-1), InvalidArgument, ("keep", "0 bytes or more")),
    "window 0": Case(
        lambda s: KVCache(s.pool, layers=[LayerSpec(1, 8, window=0)], max_seqs=1, max_seq_len=9),
        InvalidArgument,
        ("window", "at least 1"),
    ),
    "a layer without planes": Case(lambda s: LayerSpec(), InvalidArgument, ("either", "planes")),
    "a plane of no heads": Case(
        lambda s: KVCache(
            s.pool, layers=[LayerSpec(planes=(Plane("latent", 0, 8),))], max_seqs=1, max_seq_len=9
        ),
        InvalidArgument,
        ("'latent'", "between 1"),
    ),
    "layer index": Case(lambda s: s.cache.layer(2), InvalidArgument, ("0 to 1", "not 2")),
    "layer index negative": Case(
        lambda s: s.cache.layer(-1), InvalidArgument, ("0 to 1", "not -1")
    ),
    "plane index": Case(lambda s: s.cache.view(0, 2), InvalidArgument, ("no plane 2",)),
    "no free slot": Case(
        lambda s: s.take_all_slots(), CapacityError, ("no free slot", "release sequences")
    ),
    "a closed cache's sequence": Case(
        lambda s: s.closed_cache.sequence(), ReleasedError, ("closed", "new")
    ),
    "a closed cache's stats": Case(
        lambda s: s.closed_cache.stats(), ReleasedError, ("closed", "new")
    ),
    "a closed cache's layer": Case(
        lambda s: s.closed_cache.layer(0), ReleasedError, ("closed", "new")
    ),
    "a hint below 0": Case(lambda s: s.cache.sequence(-1), InvalidArgument, ("0 or more", "-1")),
    # sequences
    "extend by 0": Case(
        lambda s: s.sequence.extend(0), InvalidArgument, ("1 token or more", "not 0")
    ),
    "extend by -3": Case(
        lambda s: s.sequence.extend(-3), InvalidArgument, ("1 token or more", "-3")
    ),
    "extend by a half": Case(lambda s: s.sequence.extend(0.5), InvalidArgument, ("integer", "0.5")),
    "extend by None": Case(lambda s: s.sequence.extend(None), InvalidArgument, ("integer", "None")),
    "extend by 2**70": Case(lambda s: s.sequence.extend(2**70), InvalidArgument, ("out of range",)),
    "extend past the maximum": Case(
        lambda s: s.sequence.extend(901), CapacityError, ("max_seq_len is 1000", "truncate it")
    ),
    "truncate below 0": Case(
        lambda s: s.sequence.truncate(-1), InvalidArgument, ("between 0 and", "100", "-1")
    ),
    "truncate past the end": Case(
        lambda s: s.sequence.truncate(101), InvalidArgument, ("between 0 and", "100", "101")
    ),
    "drop_before without a window": Case(
        lambda s: s.sequence.drop_before(5), InvalidArgument, ("sliding window", "LayerSpec")
    ),
    "extend what was released": Case(
        lambda s: s.released.extend(1), ReleasedError, ("released", "cache.sequence()")
    ),
    "fork what was released": Case(lambda s: s.released.fork(), ReleasedError, ("released",)),
    "the slot of what was released": Case(lambda s: s.released.slot, ReleasedError, ("no slot",)),
    "the tensors of what was released": Case(
        lambda s: s.released.layer(0), ReleasedError, ("another's",)
    ),
    "extend in a closed cache": Case(lambda s: s.of_closed.extend(1), ReleasedError, ("closed",)),
    # batches
    "a batch of nothing": Case(lambda s: s.cache.batch([]), InvalidArgument, ("at least one row",)),
    "a batch of 0 rows": Case(lambda s: s.cache.batch(0), InvalidArgument, ("between 1", "not 0")),
    "a row twice": Case(
        lambda s: s.cache.batch([s.sequence, s.sequence]), InvalidArgument, ("twice", "fork()")
    ),
    "a foreign row": Case(
        lambda s: s.cache.batch([s.foreign]), InvalidArgument, ("another cache",)
    ),
    "a row that is none": Case(
        lambda s: s.cache.batch([3]), InvalidArgument, ("made of sequences",)
    ),
    "a released row": Case(
        lambda s: s.cache.batch([s.released]), ReleasedError, ("row 0", "released")
    ),
    "no adjacent slots": Case(
        lambda s: s.cache.batch(4), CapacityError, ("4 adjacent free slots", "max_seqs")
    ),
    "step by 0": Case(lambda s: s.listed.step(0), InvalidArgument, ("1 token or more", "not 0")),
    "step past the maximum": Case(
        lambda s: s.listed.step(901),
        CapacityError,
        ("row 0", "max_seq_len is 1000", "out of the batch"),
    ),
    "step in a closed cache": Case(lambda s: s.batch_of_closed.step(), ReleasedError, ("closed",)),
    "select in any slots": Case(
        lambda s: s.listed.select([0]), InvalidArgument, ("adjacent", "cache.batch(n)")
    ),
    "rows side by side in any slots": Case(
        lambda s: s.listed.layer(0), InvalidArgument, ("adjacent", "batch.slots")
    ),
    "select a row that is not": Case(
        lambda s: s.adjacent.select([0, 2]), InvalidArgument, ("rows 0 to 1", "not 2")
    ),
    "select too many": Case(
        lambda s: s.adjacent.select([0, 1, 0]), InvalidArgument, ("1 to 2 rows", "not 3")
    ),
    "select nothing": Case(lambda s: s.adjacent.select([]), InvalidArgument, ("1 to 2 rows",)),
    # tensors
    "numpy has no such stream": Case(
        lambda s: s.cache.view(0, 0).__dlpack__(stream=1), BufferError, ("no stream",)
    ),
    "another device": Case(
        lambda s: s.cache.view(0, 0).__dlpack__(dl_device=(2, 0)), BufferError, ("on the CPU",)
    ),
    "bfloat16 in numpy": Case(
        lambda s: np.from_dlpack(
            KVCache(s.pool, 1, 1, 8, torch.bfloat16, max_seqs=1, max_seq_len=9).view(0, 0)
        ),
        RuntimeError,
        ("unsupported dtype",),
    ),
}

BUILTINS = {
    OutOfMemory: MemoryError,
    InvalidArgument: ValueError,
    CapacityError: RuntimeError,
    DriverError: OSError,
    ReleasedError: RuntimeError,
    BusyError: RuntimeError,
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case: str) -> None:
    scene = Scene()
    before = scene.state()
    with pytest.raises(CASES[case].error) as raised:
        CASES[case].call(scene)
    for word in CASES[case].words:
        assert word.lower() in str(raised.value).lower()
    assert scene.state() == before
    scene.sequence.extend(1)  # and the sequence still works
    assert scene.sequence.length == 101


def test_the_table_is_long_enough() -> None:
    assert len(CASES) >= 40


@pytest.mark.parametrize("error", BUILTINS)
def test_errors_are_what_one_would_catch(error: type[Exception]) -> None:
    assert issubclass(error, Error)
    assert issubclass(error, BUILTINS[error])


def test_out_of_memory_is_an_answer() -> None:
    scene = Scene()
    greedy = scene.cache.sequence()
    greedy.extend(1000)
    before = scene.state()
    second = scene.cache.sequence()
    with pytest.raises(OutOfMemory) as raised:
        second.extend(1000)
    assert raised.value.requested == 20 * PAGE
    assert raised.value.free == 30 * PAGE - scene.pool.stats().in_use_bytes
    assert raised.value.reclaimable == 0
    assert second.length == 0
    assert scene.state()[1:4] == before[1:4]
    greedy.release()  # what the message says to do
    second.extend(1000)
    assert second.length == 1000


def test_two_threads_on_one_sequence() -> None:
    """Calls drop the GIL, so they do meet: each one happens whole or is refused by name."""
    pool = Pool(capacity=64 * PAGE, page_size=PAGE)
    cache = KVCache(pool, **{**SHAPE, "max_seq_len": 3000})
    sequence = cache.sequence()
    grown, refused, others = [0, 0], [0, 0], []

    def work(i: int) -> None:
        for _ in range(1000):
            try:
                sequence.extend(1)
                grown[i] += 1
            except BusyError as error:
                refused[i] += 1
                assert "another thread" in str(error)
            except Exception as error:
                others.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not others
    assert sequence.length == sum(grown)
    assert sum(grown) + sum(refused) == 2000


def test_long_strides_are_warned_of_by_name() -> None:
    pool = Pool(capacity="64MiB")
    with pytest.warns(UserWarning, match=r"offset 2\^31.*layers_per_page=\"auto\""):
        KVCache(pool, 32, 8, 128, max_seqs=1, max_seq_len=131072, layers_per_page=32)
    cache = KVCache(pool, 32, 8, 128, max_seqs=1, max_seq_len=131072)
    assert cache.layers_per_page == 8
    assert "auto" in repr(cache)
    assert kvspan.KVCache(pool, 32, 8, 128, max_seqs=1, max_seq_len=16384).layers_per_page == 32
