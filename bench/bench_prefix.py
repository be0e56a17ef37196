"""How much prefill does the prefix index save on a real trace, and how much could be saved at all?

The trace names a prompt's tokens in ids of 512 that are equal where prompts begin alike: each id
becomes 512 token ids of its own here. Requests arrive as in the trace, begin with what the cache
knows of their prompt (`sequence(token_ids=...)`), compute the rest at 8,000 tokens/s, commit it,
decode 30 tokens/s, and are released; who finds no memory waits. Llama-3-8B's shape, with records
and pages 32 times smaller, which leaves all arithmetic of tokens and pages as it is.

Two bounds stand beside it: what whole ids would save if nothing were ever forgotten, and were known
at once; and what ids of the same capacity would, the least recently used forgotten first,
if live requests took no memory.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import heapq
import math
import time
from collections import OrderedDict, deque
from dataclasses import dataclass
from pathlib import Path

import torch

import kvspan
from harness import Result, Series

NAME = "prefix"
ID_TOKENS = 512
MAX_LEN = 131072 + 4096
PREFILL_TOKENS_PER_S, DECODE_TOKENS_PER_S = 8000, 30
SHRINK = 32
PAGE = 2 << 20
LAYERS, HEADS, DIM = 32, 8, 128
RECORD = LAYERS * 2 * HEADS * DIM * 2
QUICK_REQUESTS = 200


@dataclass(frozen=True)
class Request:
    """What arrives when."""

    time_s: float
    n_prompt: int
    n_output: int
    ids: list[int]

    def token_ids(self) -> torch.Tensor:
        """Return the prompt, int32."""
        ids = torch.tensor(self.ids, dtype=torch.int32)
        return (ids[:, None] * ID_TOKENS + torch.arange(ID_TOKENS)).flatten()[: self.n_prompt].int()


def read_trace(path: Path) -> list[Request]:
    """Read `t_s,prompt,output,hashes`, ids as runs: "3-7 9" is 3, 4, 5, 6, 7, 9."""
    with gzip.open(path, "rt", newline="") as lines:
        return [
            Request(
                float(row["t_s"]),
                int(row["prompt"]),
                int(row["output"]),
                [
                    i
                    for run in row["hashes"].split()
                    for first, _, last in [run.partition("-")]
                    for i in range(int(first), int(last or first) + 1)
                ],
            )
            for row in csv.DictReader(lines)
        ]


def upper_bound(requests: list[Request], n_tokens: float = math.inf) -> int:
    """Return how many prompt tokens lie in whole ids that some earlier prompt had.

    Of the ids so many tokens are kept; the least recently used are forgotten.
    """
    known: OrderedDict[int, None] = OrderedDict()
    saved = 0
    for request in requests:
        n = next((i for i, one in enumerate(request.ids) if one not in known), len(request.ids))
        saved += min(n * ID_TOKENS, request.n_prompt)
        for one in reversed(request.ids):  # of a chain, the end is forgotten first
            known[one] = None
            known.move_to_end(one)
        while len(known) * ID_TOKENS > n_tokens:
            known.popitem(last=False)
    return saved


@dataclass
class Run:
    """What a replay found."""

    saved: int = 0
    hits: int = 0
    waited: int = 0
    begin_s: float = 0.0  # spent in `sequence` and `commit`
    commit_s: float = 0.0


def replay(requests: list[Request], capacity: int) -> tuple[Run, kvspan.CacheStats]:
    """Run all requests in a pool of so many bytes at full size."""
    pool = kvspan.Pool(capacity=capacity // SHRINK, page_size=PAGE // SHRINK, huge_pages=False)
    layer = kvspan.LayerSpec(1, RECORD // SHRINK // 4, torch.bfloat16)
    cache = kvspan.KVCache(pool, layers=[layer], max_seqs=1024, max_seq_len=MAX_LEN)
    found = Run()
    ending: list[tuple[float, int, kvspan.Sequence]] = []
    computing: list[tuple[float, int, kvspan.Sequence, Request]] = []
    waiting: deque[Request] = deque()
    n = 0

    def admit(request: Request, now: float) -> bool:
        nonlocal n
        ids = request.token_ids()
        start = time.perf_counter()
        sequence = cache.sequence(request.n_prompt, token_ids=ids)
        known = sequence.length
        try:
            sequence.extend(request.n_prompt + request.n_output - known)
        except kvspan.OutOfMemory:
            sequence.release()
            return False
        found.begin_s += time.perf_counter() - start
        found.saved += known
        found.hits += known > 0
        n += 1
        done = now + (request.n_prompt - known) / PREFILL_TOKENS_PER_S
        heapq.heappush(computing, (done, n, sequence, request))
        return True

    def advance(until: float) -> float:
        """Do what ends first, up to a time; return when it was."""
        ends = min(computing[0][0] if computing else until, ending[0][0] if ending else until)
        if ends >= until:
            return until
        if computing and computing[0][0] == ends:
            _, number, sequence, request = heapq.heappop(computing)
            start = time.perf_counter()
            sequence.commit(request.token_ids())
            found.commit_s += time.perf_counter() - start
            heapq.heappush(
                ending, (ends + request.n_output / DECODE_TOKENS_PER_S, number, sequence)
            )
        else:
            heapq.heappop(ending)[2].release()
            while waiting and admit(waiting[0], ends):
                waiting.popleft()
        return ends

    for request in requests:
        now = 0.0
        while now < request.time_s:
            now = advance(request.time_s)
        if waiting or not admit(request, request.time_s):
            waiting.append(request)
            found.waited += 1
    while computing or ending:
        advance(float("inf"))
    stats = cache.stats()
    cache.close()
    return found, stats


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the trace and the sizes."""
    parser.add_argument("--trace", type=Path, required=True, help="t_s,prompt,output,hashes (.gz)")
    parser.add_argument("--capacity-gib", type=int, nargs="+", default=[60, 240, 960])
    parser.add_argument("--quick", action="store_true", help="a few requests")


def run(args: argparse.Namespace) -> Result:
    """Replay."""
    torch.set_num_threads(1)  # other threads would only wait
    requests = read_trace(args.trace)[: QUICK_REQUESTS if args.quick else None]
    prompts = sum(request.n_prompt for request in requests)
    bound = upper_bound(requests)
    result = Result({}, parameters={"trace": args.trace.name, "requests": len(requests)})
    result.measurements["upper bound at ids of 512"] = Series((100 * bound / prompts,), unit="%")
    for gib in args.capacity_gib:
        name = f"{gib} GiB"
        kept = 100 * upper_bound(requests, (gib << 30) // RECORD) / prompts
        result.measurements[f"{name}: bound of ids, least recently used"] = Series((kept,), "%")
        found, stats = replay(requests, gib << 30)
        for what, value, unit in (
            ("prompt tokens saved", 100 * found.saved / prompts, "%"),
            ("requests that hit", 100 * found.hits / len(requests), "%"),
            ("requests that waited", 100 * found.waited / len(requests), "%"),
            ("a request's sequence and extend", found.begin_s / len(requests), "s"),
            ("a request's commit", found.commit_s / len(requests), "s"),
        ):
            result.measurements[f"{name}: {what}"] = Series((value,), unit=unit)
        p = stats.prefixes
        result.notes.append(
            f"{name}: {p.n_published} pages published, {p.n_evicted} evicted, merged "
            f"{stats.merged_bytes * SHRINK / 2**30:.1f} GiB"
        )
    return result
