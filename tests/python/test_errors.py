"""Bad input gets a typed error with a helpful message, and leaves all state as it was.

The cases are in error_table.py. Around each of them a small world of pools, caches and sequences is
looked at: figures, page tables and bytes are as before, and everything goes on working (DESIGN
rules 3 and 4).
"""

from __future__ import annotations

import re
import resource
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from device import IS_HOST, PAGE, SCALE, only_on_the_host
from error_table import TABLE

import kvspan
from kvspan import BusyError, CapacityError, KVCache, LayerSpec, OutOfMemory, Pool

BUILTIN = {
    kvspan.OutOfMemory: MemoryError,
    kvspan.InvalidArgument: ValueError,
    kvspan.CapacityError: RuntimeError,
    kvspan.ReleasedError: RuntimeError,
    kvspan.BusyError: RuntimeError,
    kvspan.DriverError: OSError,
}


def pool_of(**options: Any) -> Pool:
    return Pool(**{"capacity": 32 * PAGE, "page_size": PAGE, **options})


def cache_of(pool: Pool, **options: Any) -> KVCache:
    shape = {"n_layers": 4, "n_kv_heads": 5, "head_dim": 8 * SCALE, "dtype": torch.float32}
    sizes = {"max_seqs": 4, "max_seq_len": 1000, "layers_per_page": shape["n_layers"]}
    return KVCache(pool, **{**shape, **sizes, **options})


def layers_of(pool: Pool, layers: Any) -> KVCache:
    return KVCache(pool, layers=layers, max_seqs=4, max_seq_len=1000)


class World:
    """What bad calls are made on: no slot is free in `cache`, and little memory."""

    def __init__(self) -> None:
        # All frames exist: those that a call made before it failed would stay, as free ones.
        self.pool = pool_of(preallocate=32 * PAGE)
        self.cache = cache_of(self.pool)
        self.rows = self.cache.batch(2)
        self.a, self.b = (self.cache.sequence() for _ in range(2))
        self.sequences = [*self.rows.sequences, self.a, self.b]
        for i, sequence in enumerate(self.sequences):
            sequence.extend(300)
            for plane in self.planes_of(sequence):
                plane.fill_(i + 1)
        self.listed = self.cache.batch([self.a, self.b])

        self.other = cache_of(pool_of())
        self.foreign, self.released = (self.other.sequence() for _ in range(2))
        self.row_released = self.other.batch([self.foreign, self.released])
        self.released.release()

        specs = [LayerSpec(1, 32 * SCALE, torch.float32, window) for window in (None, 40)]
        self.hybrid = layers_of(pool_of(), specs)
        self.windowed = self.hybrid.sequence()
        self.windowed.extend(200)
        self.windowed.drop_before(100)

        self.closed_pool = pool_of()
        self.closed_pool.close()
        self.closed = cache_of(self.pool)
        self.orphan = self.closed.sequence()
        self.orphans = self.closed.batch(2)
        self.closed.close()

    def planes_of(self, sequence: kvspan.Sequence) -> list[torch.Tensor]:
        return [plane for layer in range(4) for plane in sequence.layer(layer)]

    def call(self, text: str) -> Any:
        names = {**vars(kvspan), **vars(self), "np": np, "torch": torch, "PAGE": PAGE}
        names["pool_of"] = pool_of
        names["layers_of"] = lambda layers: layers_of(self.pool, layers)
        names["cache_of"] = lambda pool=self.pool, **options: cache_of(pool, **options)
        return eval(text, names)

    def state(self) -> list[Any]:
        caches = (self.cache, self.other, self.hybrid)
        owners = (*caches, *(cache.pool for cache in caches))
        # What a call looked at or undid is counted, too; that is no change of state.
        stats = [replace(owner.stats(), calls={}) for owner in owners]
        alive = [(s.slot, s.length) for s in (*self.sequences, self.foreign, self.windowed)]
        tables = [batch.lengths.tolist() for batch in (self.rows, self.listed, self.row_released)]
        return [stats, alive, tables, [cache.page_map() for cache in caches]]

    def goes_on(self) -> None:
        for i, sequence in enumerate(self.sequences):
            assert all((plane == i + 1).all() for plane in self.planes_of(sequence))
        self.a.extend(1)
        assert self.rows.step().tolist() == [300, 300]
        self.windowed.extend(1)
        assert self.foreign.fork().length == 0


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    for cache in (made.cache, made.other, made.hybrid):
        cache.close()


def check(error: BaseException, kind: type[kvspan.Error], says: str) -> None:
    assert type(error) is kind
    assert isinstance(error, kvspan.Error)
    assert isinstance(error, BUILTIN[kind])
    assert re.search(".*".join(map(re.escape, says.split("..."))), str(error)), str(error)


def test_the_table_is_long_and_has_every_kind() -> None:
    assert len({call for call, _, _ in TABLE}) == len(TABLE) >= 40
    kinds = {kind for _, kind, _ in TABLE}
    assert kinds | {kvspan.BusyError, kvspan.DriverError} == set(BUILTIN)


@pytest.mark.parametrize(("call", "kind", "says"), TABLE, ids=[case[0] for case in TABLE])
def test_bad_input(world: World, call: str, kind: type[kvspan.Error], says: str) -> None:
    before = world.state()
    with pytest.raises(kvspan.Error) as caught:
        world.call(call)
    check(caught.value, kind, says)
    assert world.state() == before
    world.goes_on()


def test_out_of_memory_carries_its_figures(world: World) -> None:
    free = world.pool.stats().free_bytes
    with pytest.raises(OutOfMemory) as caught:
        world.a.extend(700)
    assert caught.value.free == free < caught.value.requested
    assert caught.value.reclaimable == 0
    world.b.release()
    world.a.extend(700)


@only_on_the_host("limits of a process")
@pytest.mark.parametrize(
    ("limit", "to", "says"),
    [
        (resource.RLIMIT_FSIZE, 16 * PAGE, "RLIMIT_FSIZE limits files of this process to 1 MiB"),
        (
            resource.RLIMIT_NOFILE,
            3,
            "no file descriptor is left ...raise RLIMIT_NOFILE (ulimit -n)",
        ),
    ],
    ids=["FSIZE", "NOFILE"],
)
def test_limits_that_a_new_pool_meets(world: World, limit: int, to: int, says: str) -> None:
    before = world.state()
    soft, hard = resource.getrlimit(limit)
    resource.setrlimit(limit, (to, hard))
    try:
        with pytest.raises(kvspan.Error) as caught:
            pool_of()
    finally:
        resource.setrlimit(limit, (soft, hard))
    check(caught.value, CapacityError, says)
    assert world.state() == before
    world.goes_on()


@only_on_the_host("limits of a process")
def test_limit_of_address_space_that_a_new_cache_meets(world: World) -> None:
    before = world.state()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (64 << 30, hard))
    try:
        with pytest.raises(CapacityError) as caught:
            cache_of(world.pool, max_seqs=1 << 10, max_seq_len=1 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    check(caught.value, CapacityError, "RLIMIT_AS limits this process to 64 GiB; raise it (ulimit")
    assert world.state() == before
    world.goes_on()


def call_while_it_grows(second: str) -> BusyError | None:
    pool = Pool(capacity="512MiB", huge_pages=False)
    cache = cache_of(pool, n_layers=32, n_kv_heads=8, head_dim=64, max_seq_len=1000)
    sequence = cache.sequence()
    batch = cache.batch([sequence])
    calls: dict[str, Callable[[], Any]] = {
        "extend": lambda: sequence.extend(1),
        "truncate": lambda: sequence.truncate(0),
        "fork": sequence.fork,
        "release": sequence.release,
        "step": batch.step,
    }
    grower = threading.Thread(target=sequence.extend, args=(999,))  # 128 MiB to allocate
    grower.start()
    while pool.stats().calls["create"].calls == 0:
        pass
    try:
        calls[second]()
    except BusyError as busy:
        grower.join()
        assert sequence.length == 999
        assert cache.stats().n_sequences == 1
        sequence.extend(1)
        return busy
    finally:
        grower.join()
        cache.close()
    return None


@pytest.mark.parametrize("second", ["extend", "truncate", "fork", "release", "step"])
def test_two_threads_on_one_sequence(second: str) -> None:
    # Again, should this thread have slept through it all.
    error = next(filter(None, (call_while_it_grows(second) for _ in range(20))), None)
    assert error is not None
    check(error, BusyError, "another thread is inside a call on this sequence; ...guard it with a")


def test_threads_that_meet_are_refused_or_served_whole() -> None:
    cache = cache_of(pool_of())
    sequence = cache.sequence()
    grown, refused = [0, 0], [0, 0]

    def work(i: int) -> None:
        for _ in range(450):
            try:
                sequence.extend(1)
                grown[i] += 1
            except BusyError:
                refused[i] += 1

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sequence.length == sum(grown)
    assert sum(grown) + sum(refused) == 900


def test_numpy_refuses_what_it_does_not_have(world: World) -> None:
    cache = cache_of(world.pool, dtype=torch.bfloat16)
    with pytest.raises((RuntimeError, BufferError)):
        np.from_dlpack(cache.view(0, 0))
    assert cache.layer(0)[0].dtype == torch.bfloat16


def test_dlpack_refuses_what_it_cannot_do(world: World) -> None:
    view = world.cache.view(0, 0)
    wrong, says = (1, "no stream; pass stream=None") if IS_HOST else (0, "stream must be None, -1")
    with pytest.raises(BufferError, match=says):
        view.__dlpack__(stream=wrong)
    with pytest.raises(BufferError, match="a view of its device's memory and is not copied"):
        view.__dlpack__(dl_device=(2, 0) if IS_HOST else (1, 0))
    with pytest.raises(BufferError, match="views are not copied here; copy the result"):
        view.__dlpack__(copy=True)
