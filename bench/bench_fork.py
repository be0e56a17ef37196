"""How much faster than copying is a fork, and how much memory does it save?

A cache shaped like Llama-3-8B's, bf16. A long sequence is forked, and beside it its keys and values
are copied into memory that has been touched before (what an engine without sharing does at best).
A fork's pages are entered into the machine's tables as they are first read, which is shown beside
it. Then 16 samples of one prompt, decoded for some steps, beside 16 separate sequences; and a beam
search of 4, with the pages that its steps copy. Bytes seen through a child equal the parent's.
"""

from __future__ import annotations

import argparse
import time

import torch

import kvspan
from harness import Expectation, Result, Series

NAME = "fork"
LAYERS, HEADS, DIM = 32, 8, 128
PAGE_ELEMENTS = (2 << 20) // 2
TOKEN_BYTES = LAYERS * 2 * HEADS * DIM * 2
SAMPLES, STEPS = 16, 64
LEAST_SPEEDUP = 100.0
MOST_MEMORY = 1 / 8


def cache_of(n_tokens: int, max_seqs: int, capacity: int) -> kvspan.KVCache:
    """Make a cache for sequences of so many tokens."""
    pool = kvspan.Pool(capacity=f"{capacity}MiB")
    return kvspan.KVCache(
        pool, LAYERS, HEADS, DIM, torch.bfloat16, max_seqs=max_seqs, max_seq_len=n_tokens + 1024
    )


def write(cache: kvspan.KVCache, sequence: kvspan.Sequence, begin: int) -> None:
    """Write numbers of its own from a position on."""
    for i in range(LAYERS):
        for plane in cache.layer(i):
            row = plane[sequence.slot, begin : sequence.length]
            row.copy_(torch.randint(-99, 99, (len(row), 1, 1), dtype=torch.int8))


def fork_and_copy(n_tokens: int, repeats: int) -> dict[str, Series]:
    """Time both in turn."""
    mib = n_tokens * TOKEN_BYTES >> 20
    cache = cache_of(n_tokens, 3, 2 * mib + 256)
    parent, other = cache.sequence(), cache.sequence()
    parent.extend(n_tokens)
    other.extend(n_tokens)
    write(cache, parent, 0)
    # In a slot, the layers that share pages are one run of memory.
    runs = [
        [
            plane[sequence.slot].as_strided(
                (n_tokens * plane.stride(1),), (1,), plane[sequence.slot].storage_offset()
            )
            for sequence in (parent, other)
        ]
        for plane, _ in (cache.layer(i) for i in range(0, LAYERS, cache.layers_per_page))
    ]
    assert sum(run.nbytes for run, _ in runs) == n_tokens * TOKEN_BYTES
    forks, copies, touches = [], [], []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        for source, target in runs:
            target.copy_(source)
        copies.append(time.perf_counter() - start)
        start = time.perf_counter()
        child = parent.fork()
        forks.append(time.perf_counter() - start)
        # The machine enters the pages of a long run into its own tables as they are first read.
        start = time.perf_counter()
        for plane, _ in (cache.layer(i) for i in range(0, LAYERS, cache.layers_per_page)):
            of_child = plane[child.slot]
            n_pages = n_tokens * plane.stride(1) // PAGE_ELEMENTS
            of_child.as_strided((n_pages,), (PAGE_ELEMENTS,), of_child.storage_offset()).sum()
        touches.append(time.perf_counter() - start)
        for plane, mine in zip(child.layer(LAYERS - 1), parent.layer(LAYERS - 1), strict=True):
            assert torch.equal(plane, mine)
        child.release()
    cache.close()
    return {
        "copy": Series(tuple(copies[1:])),
        "fork": Series(tuple(forks[1:])),
        "first touch of every page": Series(tuple(touches[1:])),
    }


def samples(n_prompt: int) -> tuple[float, float]:
    """Return the bytes that samples of one prompt take, and what separate sequences would."""
    n_pooled = n_prompt + SAMPLES * (STEPS + 32)
    cache = cache_of(n_prompt + STEPS, SAMPLES, n_pooled * TOKEN_BYTES >> 20)
    parent = cache.sequence()
    parent.extend(n_prompt)
    alone = cache.pool.stats().in_use_bytes
    rows = [parent, *parent.fork(SAMPLES - 1)]
    batch = cache.batch(rows)
    for _ in range(STEPS):
        batch.step()
    in_use = cache.pool.stats().in_use_bytes
    per_token = alone / n_prompt
    cache.close()
    return in_use, SAMPLES * (alone + STEPS * per_token)


def beams(n_prompt: int, n_beams: int) -> tuple[list[int], list[int], Series]:
    """Return pages copied and beams changed in each step, and the time of a step's reorder."""
    n_pooled = n_prompt + n_beams * (STEPS + 32)
    cache = cache_of(n_prompt + STEPS, n_beams, n_pooled * TOKEN_BYTES >> 20)
    first = cache.sequence()
    first.extend(n_prompt)
    rows = [first, *first.fork(n_beams - 1)]
    batch = cache.batch(rows)
    generator = torch.Generator().manual_seed(0)
    copied, changed, times = [], [], []
    for _ in range(STEPS):
        batch.step()
        parents = torch.randint(0, n_beams, (n_beams,), generator=generator).tolist()
        before = cache.stats().calls["copy"].handles
        start = time.perf_counter()
        cache.reorder(rows, parents)
        times.append(time.perf_counter() - start)
        copied.append(cache.stats().calls["copy"].handles - before)
        changed.append(sum(parent != i for i, parent in enumerate(parents)))
    cache.close()
    return copied, changed, Series(tuple(times))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the sizes."""
    parser.add_argument("--tokens", type=int, default=32768, help="of the sequence that is forked")
    parser.add_argument("--quick", action="store_true", help="small, nothing checked but results")


def run(args: argparse.Namespace) -> Result:
    """Measure."""
    n_tokens, n_prompt, n_beam = (512, 256, 128) if args.quick else (args.tokens, 4096, 2048)
    result = Result(fork_and_copy(n_tokens, args.repeats), baseline="copy")
    in_use, separate = samples(n_prompt)
    copied, changed, times = beams(n_beam, 4)
    result.measurements[f"reorder of 4 beams over {n_beam} tokens"] = times
    result.notes = [
        f"a sequence of {n_tokens} tokens, {n_tokens * TOKEN_BYTES >> 20} MiB",
        f"{SAMPLES} samples of {n_prompt} tokens and {STEPS} steps: {in_use / 2**20:.0f} MiB, "
        f"separate sequences {separate / 2**20:.0f}",
        f"beams: {sum(copied)} pages copied for {sum(changed)} changed beams in {STEPS} steps",
    ]
    worst = max(n - of for n, of in zip(copied, changed, strict=True))
    result.expectations = [
        Expectation("pages copied in a step beyond one a changed beam", worst, 0)
    ]
    if not args.quick:
        speedup = 1 / result.ratio("fork")
        result.expectations += [
            Expectation("a fork's speed over a copy's", speedup, LEAST_SPEEDUP, True),
            Expectation(
                "memory of the samples over separate ones'", in_use / separate, MOST_MEMORY
            ),
        ]
    return result
