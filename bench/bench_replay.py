"""How much mapped memory is wasted over a real trace, and how often is the driver called?

Every request of the trace is replayed through the real cache, without a model: its prompt is
extended when it arrives, takes its time (8,000 tokens/s), then a token every 1/30 s through
`batch.step`, then it is released. Waste is 1 - live token bytes / mapped bytes, time-weighted, all
terms shown. Beside it, the same requests in blocks of 16 tokens and in slots of the maximal length.

Records and pages are both 32 times smaller than the model's, which leaves all arithmetic of tokens
and pages as it is and lets 60 GiB be replayed in 2. The first requests are replayed at full size,
too, and must give the same figures.
"""

from __future__ import annotations

import argparse
import csv
import gzip
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import kvspan
from harness import BenchError, Expectation, Result, Series

NAME = "replay"

EXCERPT = Path(kvspan.__file__).parent / "data" / "azure_conv_2023_excerpt.csv"
TICK_S = 1 / 30  # a decode step
PREFILL_TOKENS_PER_S = 8000
MAX_LEN = 16384
MAX_SEQS = 512
BLOCK = 16
SHRINK = 32
PAGE = 2 << 20
CAPACITY = 60 << 30
CHECKED_REQUESTS = 24  # replayed at full size, too: 2 GiB
QUICK_REQUESTS = 64


@dataclass(frozen=True)
class Shape:
    """A model's cache: layers of K and V, heads x dim of dtype."""

    name: str
    n_layers: int
    heads: int
    dim: int
    dtype: torch.dtype

    def cache(self, pool: kvspan.Pool, shrink: int) -> kvspan.KVCache:
        """Make a cache whose records are `shrink` times smaller: one layer with all the bytes."""
        if shrink == 1:
            layers = [kvspan.LayerSpec(self.heads, self.dim, self.dtype)] * self.n_layers
        else:
            layers = [
                kvspan.LayerSpec(1, self.n_layers * self.heads * self.dim // shrink, self.dtype)
            ]
        return kvspan.KVCache(pool, layers=layers, max_seqs=MAX_SEQS, max_seq_len=MAX_LEN)


SHAPES = (
    Shape("Llama-3-8B", 32, 8, 128, torch.bfloat16),
    Shape("SmolLM2-135M", 30, 3, 64, torch.float32),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare this benchmark's options."""
    parser.add_argument(
        "--trace",
        type=Path,
        default=EXCERPT,
        help="a CSV, plain or gzipped, with columns t_s, prompt, output (default: the excerpt of "
        "the Azure conversation trace that comes with kvspan)",
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"only the first {QUICK_REQUESTS} requests"
    )


def read_trace(path: Path) -> list[tuple[float, int, int]]:
    """Return (arrival in s, prompt tokens, output tokens), in order of arrival."""
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    rows = csv.DictReader(text.splitlines())
    return sorted((float(r["t_s"]), int(r["prompt"]), int(r["output"])) for r in rows)


@dataclass
class Sums:
    """Byte-ticks of each term, and what else is counted."""

    mapped: int = 0
    used: int = 0
    partial: int = 0
    ahead: int = 0
    kept: int = 0
    blocks: int = 0
    slots: int = 0
    peak: int = 0
    ticks: int = 0
    steps: int = 0
    calls: int = 0
    handles: int = 0
    calls_in_steps: int = 0
    handles_in_steps: int = 0
    steps_with_calls: int = 0

    def scaled(self, factor: int) -> Sums:
        """Return the same with bytes so many times larger."""
        terms = ("mapped", "used", "partial", "ahead", "kept", "blocks", "slots", "peak")
        return replace(self, **{term: factor * getattr(self, term) for term in terms})


def driver_work(stats: kvspan.CacheStats) -> tuple[int, int]:
    """Count mappings and unmappings: calls, and the pages (handles) in them."""
    both = stats.calls["map"], stats.calls["unmap"]
    return sum(c.calls for c in both), sum(c.handles for c in both)


def replay(cache: kvspan.KVCache, requests: list[tuple[float, int, int]]) -> Sums:
    """Run all requests; advance a tick at a time."""
    sums = Sums()
    per_token = cache.bytes_per_token
    waiting = iter(requests)
    upcoming = next(waiting, None)
    starting: dict[int, list[tuple[kvspan.Sequence, int]]] = {}  # by the tick of the first token
    ending: dict[int, list[kvspan.Sequence]] = {}
    held: dict[kvspan.Sequence, None] = {}  # all, in order
    decoding: dict[kvspan.Sequence, None] = {}
    batch: kvspan.Batch | None = None
    tick = 0
    while upcoming is not None or held:
        for sequence in ending.pop(tick, ()):
            sequence.release()
            del held[sequence], decoding[sequence]
            batch = None
        while upcoming is not None and upcoming[0] <= tick * TICK_S:
            _, prompt, output = upcoming
            upcoming = next(waiting, None)
            if prompt + output > MAX_LEN:
                raise BenchError(f"a request of {prompt + output} tokens is longer than {MAX_LEN}")
            sequence = cache.sequence(prompt)
            sequence.extend(prompt)
            held[sequence] = None
            first = tick + 1 + int(prompt / PREFILL_TOKENS_PER_S / TICK_S)
            starting.setdefault(first, []).append((sequence, output))
        for sequence, output in starting.pop(tick, ()):
            decoding[sequence] = None
            ending.setdefault(tick + output, []).append(sequence)
            batch = None
        before = driver_work(cache.stats())
        if decoding:
            if batch is None:
                batch = cache.batch(list(decoding))
            batch.step()
            sums.steps += 1
        now = cache.stats()
        sums.calls, sums.handles = driver_work(now)
        sums.calls_in_steps += sums.calls - before[0]
        sums.handles_in_steps += sums.handles - before[1]
        sums.steps_with_calls += sums.calls > before[0]
        sums.mapped += now.mapped_bytes
        sums.used += now.used_bytes
        sums.partial += now.partial_bytes
        sums.ahead += now.ahead_bytes
        sums.kept += now.kept_bytes
        sums.blocks += sum(-(-s.length // BLOCK) for s in held) * BLOCK * per_token
        sums.slots += len(held) * MAX_LEN * per_token
        sums.peak = max(sums.peak, now.mapped_bytes)
        sums.ticks += 1
        tick += 1
    return sums


def replay_small(shape: Shape, requests: list[tuple[float, int, int]]) -> Sums:
    """Replay with small records in small pages; return the figures at full size."""
    pool = kvspan.Pool(capacity=CAPACITY // SHRINK, page_size=PAGE // SHRINK)
    with pool, shape.cache(pool, SHRINK) as cache:
        return replay(cache, requests).scaled(SHRINK)


def check_small(shape: Shape, requests: list[tuple[float, int, int]]) -> float:
    """Require that the first requests give the same at full size; return their tokens a page."""
    requests = requests[:CHECKED_REQUESTS]
    small = replay_small(shape, requests)
    with (
        kvspan.Pool(capacity=small.peak + PAGE, page_size=PAGE) as pool,
        shape.cache(pool, 1) as cache,
    ):
        full = replay(cache, requests)
        if full != small:
            raise BenchError(f"{shape.name}: at full size {full}, in small pages {small}")
        return cache.tokens_per_page[0]


def run(args: argparse.Namespace) -> Result:
    """Replay the trace for each model."""
    requests = read_trace(args.trace)[: QUICK_REQUESTS if args.quick else None]
    n_tokens = sum(prompt + output for _, prompt, output in requests)
    result = Result({}, parameters={"trace": args.trace.name, "requests": len(requests)})
    for shape in SHAPES:
        tokens_per_page = check_small(shape, requests)
        sums = replay_small(shape, requests)
        for name, mapped in (
            (f"waste, {shape.name}, span", sums.mapped),
            (f"waste, {shape.name}, block table of {BLOCK}", sums.blocks),
            (f"waste, {shape.name}, slots of {MAX_LEN}", sums.slots),
        ):
            result.measurements[name] = Series((100 * (1 - sums.used / mapped),), unit="%")
        for term in ("partial", "ahead", "kept"):
            share = 100 * getattr(sums, term) / sums.mapped
            result.measurements[f"of it {term}, {shape.name}"] = Series((share,), unit="%")
        for count in ("calls", "handles"):
            n, in_steps = getattr(sums, count), getattr(sums, f"{count}_in_steps")
            for what, value in (
                ("a request", n / len(requests)),
                ("a request, in decode steps", in_steps / len(requests)),
                ("per 1,000 tokens", 1000 * n / n_tokens),
            ):
                result.measurements[f"{count} {what}, {shape.name}"] = Series((value,), unit="")
        result.notes.append(
            f"{shape.name}: {tokens_per_page:.1f} tokens a page; mean mapped "
            f"{sums.mapped / sums.ticks / 2**30:.2f} GiB, peak {sums.peak / 2**30:.2f} GiB at full "
            f"size; {sums.steps_with_calls} of {sums.steps} decode steps called the driver"
        )
        waste = result.measurements[f"waste, {shape.name}, span"].median
        if not args.quick:
            result.expectations.append(Expectation(f"percent of waste, {shape.name}", waste, 4.0))
    return result
