"""Pools: sizes as people write them, exact figures, memory ahead and back, caches side by side."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path

import pytest
import torch
from device import DEVICE, PAGE, SCALE, only_on_the_host

import kvspan
from kvspan._check import size_text

TOKENS = 16  # a page of `cache_of`


def cache_of(pool: kvspan.Pool, dtype: torch.dtype = torch.float32, **options) -> kvspan.KVCache:
    """16 tokens a page, in any dtype."""
    dim = 512 * SCALE * 4 // dtype.itemsize
    return kvspan.KVCache(pool, 1, 1, dim, dtype, max_seqs=4, max_seq_len=64 * TOKENS, **options)


def figures(pool: kvspan.Pool) -> tuple[int, int, int]:
    """Return the pages in use, free and not created."""
    s = pool.stats()
    assert s.in_use_bytes + s.free_bytes + s.fresh_bytes == s.capacity_bytes == pool.capacity
    assert s.huge_bytes + s.small_bytes == s.in_use_bytes + s.free_bytes
    return s.in_use_bytes // PAGE, s.free_bytes // PAGE, s.fresh_bytes // PAGE


@pytest.mark.parametrize(
    ("size", "n_bytes"),
    [
        (2 << 20, 2 << 20),
        ("2097152", 2 << 20),
        ("2097152B", 2 << 20),
        ("2048KiB", 2 << 20),
        (" 2 MiB ", 2 << 20),
        ("1.5GiB", 3 << 29),
        ("0.25GiB", 1 << 28),
        ("0.0009765625TiB", 1 << 30),
        (torch.tensor(2 << 20), 2 << 20),
    ],
)
def test_sizes_as_people_write_them(size: int | str, n_bytes: int) -> None:
    assert kvspan.Pool(capacity=size, page_size=PAGE).capacity == n_bytes


def test_memory_from_fresh_to_free_and_back(pool: kvspan.Pool) -> None:
    assert figures(pool) == (0, 0, 64)
    cache = cache_of(pool)
    assert figures(pool) == (0, 0, 64)  # address space is no memory
    sequence = cache.sequence()
    sequence.extend(10 * TOKENS)
    assert figures(pool) == (10, 0, 54)
    sequence.release()
    cache.trim()
    assert figures(pool) == (0, 10, 54)
    creations = pool.stats().calls["create"].handles
    cache.sequence().extend(6 * TOKENS)
    assert pool.stats().calls["create"].handles == creations  # frames are recycled
    cache.close()
    assert pool.trim() == 10 * PAGE
    assert figures(pool) == (0, 0, 64)
    assert pool.trim() == 0
    calls = pool.stats().calls
    assert calls["create"].handles == calls["release"].handles == 10
    assert calls["map"].handles == calls["unmap"].handles


def test_preallocated_frames_are_taken_without_creating_any(pool: kvspan.Pool) -> None:
    pool.preallocate(8 * PAGE)
    pool.preallocate(8 * PAGE)  # so much in all
    pool.preallocate(3 * PAGE - 1)
    assert figures(pool) == (0, 8, 56)
    before = pool.stats().calls["create"]
    cache = cache_of(pool)
    sequence = cache.sequence()
    sequence.extend(8 * TOKENS)
    assert pool.stats().calls["create"] == before
    assert figures(pool) == (8, 0, 56)
    pool.preallocate(2 * PAGE)
    assert figures(pool) == (8, 2, 54)
    with pytest.raises(kvspan.OutOfMemory):
        pool.preallocate(57 * PAGE)
    assert kvspan.Pool(capacity=PAGE, page_size=PAGE, preallocate=PAGE).stats().free_bytes == PAGE


def test_the_whole_capacity_can_be_used(pool: kvspan.Pool) -> None:
    cache = cache_of(pool)
    sequences = [cache.sequence() for _ in range(4)]
    for sequence in sequences:
        sequence.extend(16 * TOKENS)
    assert figures(pool) == (64, 0, 0)
    with pytest.raises(kvspan.OutOfMemory):
        sequences[0].extend(1)


@only_on_the_host("huge pages are the kernel's")
def test_huge_pages_are_counted_and_refusals_explained() -> None:
    def run(**options) -> kvspan.PoolStats:
        pool = kvspan.Pool(capacity="16MiB", preallocate="8MiB", **options)
        return pool.stats()

    asked = run()
    assert asked.huge_bytes + asked.small_bytes == 8 << 20
    assert bool(asked.huge_refusal) == (asked.small_bytes > 0)
    not_asked = run(huge_pages=False)
    assert (not_asked.huge_bytes, not_asked.small_bytes) == (0, 8 << 20)
    assert not_asked.huge_refusal
    small = run(page_size="1MiB")
    assert small.huge_bytes == 0
    assert small.huge_refusal == "pages of 1 MiB are smaller than a huge page of 2 MiB"


def free_hugetlb_bytes() -> int:
    path = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
    return int(path.read_text()) << 21 if path.exists() else 0


@only_on_the_host("hugetlb pages are the kernel's")
@pytest.mark.skipif(
    free_hugetlb_bytes() < 32 << 20, reason="vm.nr_hugepages gives fewer than 16 free pages"
)
@pytest.mark.parametrize("huge_pages", ["hugetlb", "auto"])
def test_hugetlb_pages_are_taken_and_running_out_is_an_answer(huge_pages: str) -> None:
    free = free_hugetlb_bytes()
    pool = kvspan.Pool(
        capacity=free, page_size="2MiB", huge_pages=huge_pages, preallocate=free - (8 << 20)
    )
    stats = pool.stats()
    assert stats.hugetlb_bytes == stats.huge_bytes == free - (8 << 20)
    assert (stats.small_bytes, stats.huge_refusal) == (0, "")
    late = kvspan.Pool(capacity="12MiB", page_size="2MiB", huge_pages="hugetlb")
    cache = kvspan.KVCache(late, 1, 1, 1024, max_seqs=2, max_seq_len=1 << 12)  # 512 a page
    first, second = cache.sequence(), cache.sequence()
    first.extend(4 * 512)
    first.layer(0)[0].fill_(3)
    with pytest.raises(kvspan.OutOfMemory, match=r"raise vm\.nr_hugepages \(sysctl -w") as caught:
        second.extend(2 * 512)
    assert caught.value.requested >= 2 << 20
    assert (first.layer(0)[0] == 3).all()
    pool.trim()
    second.extend(2 * 512)
    assert late.stats().hugetlb_bytes == late.stats().in_use_bytes


@only_on_the_host("hugetlb pages are the kernel's")
def test_without_enough_hugetlb_pages_auto_takes_others() -> None:
    pool = kvspan.Pool(
        capacity=free_hugetlb_bytes() + (2 << 20), page_size="2MiB", huge_pages="auto"
    )
    pool.preallocate("2MiB")
    assert pool.stats().hugetlb_bytes == 0
    assert kvspan.Pool(capacity="1MiB", page_size="64KiB", huge_pages="auto", preallocate="64KiB")


@only_on_the_host("a device has its own memory")
@pytest.mark.skipif(
    not Path("/proc/self/numa_maps").exists(), reason="the kernel was built without NUMA"
)
def test_frames_come_from_the_node_that_was_asked_for() -> None:
    with pytest.raises(kvspan.InvalidArgument, match="there are: ") as caught:
        kvspan.Pool(numa_node=1000)
    node = int(str(caught.value).rpartition(": ")[2].split(", ")[-1])  # the last one there is
    pool = kvspan.Pool(capacity=8 * PAGE, page_size=PAGE, numa_node=node)
    assert pool.stats().numa_node == node
    assert kvspan.Pool(capacity=PAGE, page_size=PAGE).stats().numa_node is None
    sequence = cache_of(pool).sequence()
    sequence.extend(3 * TOKENS)
    maps = Path("/proc/self/numa_maps").read_text().splitlines()
    ours = [line.split() for line in maps if "memfd:kvspan" in line]
    assert ours
    for words in ours:
        assert words[1] == f"bind:{node}"
        assert [w.partition("=")[0] for w in words if re.match(r"N\d+=", w)] == [f"N{node}"]


@only_on_the_host("huge pages are the kernel's")
def test_the_background_makes_huge_frames_before_they_are_needed() -> None:
    with kvspan.Pool(capacity="64MiB", page_size="2MiB", background=True, ready="8MiB") as pool:
        until = time.monotonic() + 10
        while pool.stats().free_bytes < 8 << 20 and time.monotonic() < until:
            time.sleep(0.01)
        stats = pool.stats()
        assert stats.free_bytes == 8 << 20
        assert stats.huge_bytes == 8 << 20 or stats.huge_refusal


def test_repr_and_context_manager() -> None:
    with kvspan.Pool(capacity=64 * PAGE, page_size=PAGE, preallocate=16 * PAGE) as pool:
        cache_of(pool).sequence().extend(2 * TOKENS)
        assert repr(pool).startswith(f"<kvspan.Pool on {DEVICE}: ")
        assert f"not created, pages of {size_text(PAGE)}>" in repr(pool)
        assert (pool.device, pool.page_size, pool.capacity) == (DEVICE, PAGE, 64 * PAGE)
    assert repr(pool) == "<kvspan.Pool, closed>"
    pool.close()


def test_two_pools_side_by_side() -> None:
    first = kvspan.Pool(capacity=4 * PAGE, page_size=PAGE)
    second = kvspan.Pool(capacity=8 * PAGE, page_size=2 * PAGE)
    a, b = cache_of(first).sequence(), cache_of(second).sequence()
    a.extend(4 * TOKENS)
    with pytest.raises(kvspan.OutOfMemory):
        a.extend(1)
    b.extend(8 * TOKENS)  # the other one has its own
    with pytest.raises(kvspan.OutOfMemory):
        b.extend(1)
    first.close()
    assert second.stats().in_use_bytes == 8 * PAGE
    assert second.stats().calls["map"].handles == 4


def test_caches_share_one_pool(pool: kvspan.Pool) -> None:
    caches = [cache_of(pool, dtype) for dtype in (torch.float32, torch.bfloat16, torch.int8)]
    sequences = [cache.sequence() for cache in caches]
    for i, sequence in enumerate(sequences):
        sequence.extend((i + 1) * TOKENS)
        sequence.layer(0)[0].fill_(i)
    assert [cache.stats().mapped_bytes for cache in caches] == [PAGE, 2 * PAGE, 3 * PAGE]
    assert figures(pool)[0] == 6
    frames = [entry.frame_id for cache in caches for entry in cache.page_map()]
    assert len(set(frames)) == 6
    caches[1].close()
    assert figures(pool)[0] == 4
    assert all((sequences[i].layer(0)[0] == i).all() for i in (0, 2))


def test_pressure_takes_what_another_cache_keeps(pool: kvspan.Pool) -> None:
    a, b = cache_of(pool, keep="1GiB"), cache_of(pool)
    alive, gone = a.sequence(), a.sequence()
    alive.extend(36 * TOKENS)
    alive.layer(0)[0].fill_(3)
    alive.truncate(30 * TOKENS)
    gone.extend(20 * TOKENS)
    gone.release()
    assert a.stats().kept_bytes == (6 + 20) * PAGE

    mine = b.sequence()
    mine.extend(8 * TOKENS)
    assert figures(pool) == (64, 0, 0)
    assert a.stats().kept_bytes == (6 + 20) * PAGE
    mine.extend(TOKENS)
    assert 0 < a.stats().kept_bytes < (6 + 20) * PAGE
    mine.extend(25 * TOKENS)
    assert a.stats().kept_bytes == 0  # from the living one, too
    with pytest.raises(kvspan.OutOfMemory) as caught:
        mine.extend(TOKENS)
    assert (caught.value.requested, caught.value.free) == (PAGE, 0)
    assert (alive.layer(0)[0] == 3).all()
    assert alive.length == 30 * TOKENS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_frames_that_cross_caches_come_zeroed(dtype: torch.dtype) -> None:
    """Stale NaN of one model would be NaN in the masked attention of the next."""
    pool = kvspan.Pool(capacity=4 * PAGE, page_size=PAGE)
    first, second = cache_of(pool), cache_of(pool, dtype)
    with first.sequence() as tenant:
        tenant.extend(4 * TOKENS)
        for plane in tenant.layer(0):
            plane.fill_(torch.nan)
    first.trim()
    sequence = second.sequence()
    sequence.extend(4 * TOKENS)
    assert figures(pool) == (4, 0, 0)
    for plane in sequence.layer(0):
        assert not plane.contiguous().view(torch.uint8).any()
    assert second.stats().calls["fill"].calls > 0


def test_frames_that_stay_in_their_cache_are_not_zeroed_unless_asked(pool: kvspan.Pool) -> None:
    for scrub in ("cross", "reuse"):
        cache = cache_of(pool, scrub=scrub)
        with cache.sequence() as tenant:
            tenant.extend(4 * TOKENS)
            tenant.layer(0)[0].fill_(1)
        cache.trim()  # so that the next one takes these frames
        before = cache.stats().calls["fill"]
        sequence = cache.sequence()
        sequence.extend(4 * TOKENS)
        if scrub == "reuse":
            assert not sequence.layer(0)[0].any()
        assert (cache.stats().calls["fill"] == before) == (scrub == "cross")
        cache.close()


def test_large_frames_take_fewer_handles() -> None:
    pool = kvspan.Pool(capacity=64 * PAGE, page_size=PAGE, max_frame_size=16 * PAGE)
    cache = cache_of(pool, keep=PAGE)  # no longer strides
    sequence = cache.sequence()
    sequence.extend(23 * TOKENS)  # 23 pages: 16 + 4 + 2 + 1
    assert cache.stats().mapped_bytes == 23 * PAGE
    assert cache.stats().calls["map"].handles == 4
    assert len({entry.frame_id for entry in cache.page_map()}) == 4


def test_threads_share_a_pool() -> None:
    """Four threads with a cache each, seeded alike: one pool, no frame twice."""
    pool = kvspan.Pool(capacity=48 * PAGE, page_size=PAGE)
    failures: list[BaseException] = []

    def work(value: int) -> None:
        try:
            cache = cache_of(pool)
            for _ in range(60):
                with cache.sequence() as sequence:
                    try:
                        sequence.extend((1 + value) * TOKENS)
                    except kvspan.OutOfMemory:
                        continue
                    for plane in sequence.layer(0):
                        plane.fill_(value)
                    assert all((plane == value).all() for plane in sequence.layer(0))
            cache.close()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert figures(pool)[0] == 0
