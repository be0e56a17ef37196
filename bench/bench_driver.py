"""How much driver work does one request of 4,096 + 512 tokens cost, beside what others would issue?

Llama-3-8B (32 layers, 8 KV heads, d 128, bf16), one request after another through `KVCache` on the
driver emulator, whose ledger counts handles and calls; the others by formulas read off their code
(`peers.py`), at the same published latencies. Not a GPU result.

Work is handles created, mapped, granted, unmapped and released. `cold` is the first request, whose
frames are created for it. `recycled` is a later one
whose pages were given back, so that all of them are mapped and unmapped for it. A request that
takes over the pages of the last one costs nothing, with us and with them; what is then held beside
requests is told. Waste is 1 - live token bytes / mapped bytes over the decode steps.

Compared is what a request costs, cold and recycled, at equal waste: against each of the others our
cheapest configuration that wastes no more than it does. The last lines are decode steps with the
background at work, which takes its turns between steps, on a clock of its own.

Held to the target: at most half of each.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass, field

import torch

import kvspan
from emulator import BACKGROUND, LATENCY_US, NOT_A_GPU, SERVING, Emulator
from harness import BenchError, Expectation, Result, Series
from peers import Request, peers, us

NAME = "driver"
REQUEST = Request(prompt=4096, output=512, n_layers=32, plane_bytes=8 * 128 * 2)
MAX_LEN = 8192
CAPACITY = "8GiB"
KEEP_ALL = "2GiB"
STEP_US = 20_000.0  # what a step of the model takes


@dataclass(frozen=True)
class Configuration:
    """How a pool and a cache are made."""

    layers_per_page: int
    page_size: str = "2MiB"
    max_frame_size: str | None = None
    split_planes: bool = False
    overread_tokens: int | str = "auto"

    def __str__(self) -> str:
        return (
            f"{self.layers_per_page} layers a page{', K and V apart' * self.split_planes}, pages "
            f"of {self.page_size}{f', frames to {self.max_frame_size}' * bool(self.max_frame_size)}"
            f"{f', over-read {self.overread_tokens}' * (self.overread_tokens != 'auto')}"
        )


CONFIGURATIONS = (
    *(Configuration(n) for n in (32, 16, 8, 4, 2, 1)),
    Configuration(32, split_planes=True),
    Configuration(1, split_planes=True),
    Configuration(32, max_frame_size="2MiB"),
    Configuration(32, overread_tokens=0),
    Configuration(32, max_frame_size="4MiB", overread_tokens=0),
    Configuration(32, page_size="16MiB"),
    Configuration(32, page_size="64MiB"),
    Configuration(32, page_size="64MiB", max_frame_size="512MiB"),
    Configuration(32, page_size="64MiB", max_frame_size="512MiB", overread_tokens=0),
)


@dataclass
class Work:
    """What was asked of the driver from one moment to another."""

    handles: Counter[str]
    calls: dict[int, Counter[str]]  # by lane
    call_us: float  # of the serving thread

    def __sub__(self, before: Work) -> Work:
        calls = {lane: n - before.calls[lane] for lane, n in self.calls.items()}
        return Work(self.handles - before.handles, calls, self.call_us - before.call_us)

    def memory_calls(self, lane: int) -> int:
        return sum(n for name, n in self.calls[lane].items() if name in LATENCY_US)


@dataclass
class Measured:
    """One request."""

    all: Work
    steps: Work
    steps_with_calls: int = 0
    mapped: list[int] = field(default_factory=list)
    used: list[int] = field(default_factory=list)

    @property
    def waste(self) -> float:
        return 1 - sum(self.used) / sum(self.mapped)


@dataclass(frozen=True)
class Ours:
    """What a configuration comes to: waste, and handles by call."""

    waste: float
    cold: Counter[str]
    recycled: Counter[str]


def now(emulator: Emulator) -> Work:
    return Work(emulator.handles(), emulator.calls(), emulator.call_us())


def work_ahead(emulator: Emulator, pool: kvspan.Pool) -> None:
    """Do what the background thread does, until it would pause for longer."""
    with emulator.background():
        pool._native.work_ahead()


def serve(
    emulator: Emulator, pool: kvspan.Pool, cache: kvspan.KVCache, background: bool
) -> Measured:
    """Run one request from its prompt to its release."""
    begin = now(emulator)
    sequence = cache.sequence(REQUEST.prompt)
    sequence.extend(REQUEST.prompt)
    emulator.compute(STEP_US)
    if background:
        work_ahead(emulator, pool)
    measured = Measured(begin, begin)
    decoding = now(emulator)
    for _ in range(REQUEST.output):
        before = emulator.handles()
        sequence.extend(1)
        measured.steps_with_calls += emulator.handles() != before
        if background:
            work_ahead(emulator, pool)
        emulator.compute(STEP_US)
        stats = cache.stats()
        measured.mapped.append(stats.mapped_bytes)
        measured.used.append(stats.used_bytes)
    measured.steps = now(emulator) - decoding
    if len(sequence) != REQUEST.prompt + REQUEST.output:
        raise BenchError("the request did not get its tokens")
    sequence.release()
    measured.all = now(emulator) - begin
    return measured


def requests(
    emulator: Emulator, configuration: Configuration, *, keep: str, background: bool
) -> list[Measured]:
    """Run three requests one after another, in a process that has just begun."""
    emulator.restart("16GiB")
    c = configuration
    with (
        kvspan.Pool("cuda:0", CAPACITY, c.page_size, c.max_frame_size, background=False) as pool,
        kvspan.KVCache(
            pool, REQUEST.n_layers, 8, 128, torch.bfloat16,
            max_seqs=2, max_seq_len=MAX_LEN, layers_per_page=c.layers_per_page,
            split_planes=c.split_planes, overread_tokens=c.overread_tokens, keep=keep,
        ) as cache,
    ):  # fmt: skip
        if background:
            work_ahead(emulator, pool)
        measured = [serve(emulator, pool, cache, background) for _ in range(3)]
        if cache.bytes_per_token != REQUEST.token_bytes:
            raise BenchError("the model is not the one that the formulas are for")
    return measured


def show(handles: Counter[str]) -> str:
    """Return created / mapped / granted / unmapped / released."""
    return " / ".join(str(handles[name]) for name in LATENCY_US)


def row(name: str, waste: float, cold: Counter[str], recycled: Counter[str]) -> str:
    return (
        f"{name:58} {100 * waste:5.1f}%  {show(cold):32} {us(cold):8.0f}  "
        f"{show(recycled):32} {us(recycled):8.0f}"
    )


def run(args: argparse.Namespace) -> Result:
    """Count."""
    emulator = Emulator()
    others = peers(REQUEST)
    result = Result(
        {},
        parameters={"prompt": REQUEST.prompt, "output": REQUEST.output, "model": "Llama-3-8B bf16"},
        notes=[
            NOT_A_GPU,
            "handles created / mapped / granted / unmapped / released, and modelled microseconds",
            f"{'':58} waste   {'cold':32} {'us':>8}  {'recycled':32} {'us':>8}",
        ],
    )
    ours: dict[Configuration, Ours] = {}
    for c in CONFIGURATIONS:
        cold, again, third = requests(emulator, c, keep="0", background=False)
        if (again.all.handles, again.waste) != (third.all.handles, third.waste):
            raise BenchError(f"{c}: two recycled requests differ")
        ours[c] = Ours(again.waste, cold.all.handles, again.all.handles)
        result.notes.append(row(str(c), again.waste, cold.all.handles, again.all.handles))
        for name, m in (("cold", cold), ("recycled", again)):
            result.measurements[f"{name}, {c}"] = Series((us(m.all.handles),), "us")
        if c == CONFIGURATIONS[0]:
            everything = (
                "with all other calls (events, zeroing, reservations, current "
                f"context): cold {cold.all.call_us:.0f}, recycled {again.all.call_us:.0f} us"
            )
    for peer in others:
        result.notes.append(row(peer.name, peer.waste, peer.cold, peer.recycled))
        result.measurements[f"cold, {peer.name}"] = Series((us(peer.cold),), "us")
        result.measurements[f"recycled, {peer.name}"] = Series((us(peer.recycled),), "us")
    result.notes += [f"{CONFIGURATIONS[0]}: {everything}", ""]
    for peer in others:
        fair = [c for c in ours if ours[c].waste <= peer.waste]
        if not fair:
            raise BenchError(f"no configuration wastes as little as {peer.name}")
        best = min(fair, key=lambda c: us(ours[c].recycled))
        result.notes.append(
            f"{peer.name}, waste {100 * peer.waste:.1f}%, beside {best}, waste "
            f"{100 * ours[best].waste:.1f}%: cold {us(ours[best].cold) / us(peer.cold):.2f}, "
            f"recycled {us(ours[best].recycled) / us(peer.recycled):.2f} of its microseconds"
        )
        result.notes.append(f"    costs nothing while {peer.taken_over}; holds {peer.aside}")
        for kind, mine, theirs in (
            ("cold", ours[best].cold, peer.cold),
            ("recycled", ours[best].recycled, peer.recycled),
        ):
            for what, ratio in (
                ("microseconds", us(mine) / us(theirs)),
                ("handles", mine.total() / theirs.total()),
            ):
                result.expectations.append(
                    Expectation(f"{what} of a {kind} request over {peer.name}'s", ratio, 0.5)
                )
    result.notes.append("")
    for keep, what in (("auto", "keep=auto"), (KEEP_ALL, f"keep={KEEP_ALL}")):
        for c in (CONFIGURATIONS[0], CONFIGURATIONS[5]):
            steady = requests(emulator, c, keep=keep, background=True)[1]
            serving = steady.steps.memory_calls(SERVING)
            result.notes.append(
                f"second request, background on, {what}, {c}: virtual-memory calls in its "
                f"{REQUEST.output} steps {serving} by the serving thread, "
                f"{steady.steps.memory_calls(BACKGROUND)} by the background; in the whole request "
                f"{steady.all.memory_calls(SERVING)} and {steady.all.memory_calls(BACKGROUND)}; "
                f"waste {100 * steady.waste:.1f}%"
            )
            result.expectations.append(
                Expectation(f"calls in steady decode steps, {what}, {c}", serving, 0)
            )
    return result
