"""Act two: the same requests, weights and schedule over the three stores, step by step.

The stores take turns inside every step of the schedule, and the one that goes first changes from
step to step, so that whatever else the machine does hits all three alike. What is timed is
everything a store and the model do for a step: taking a row, extending it, the forward pass, giving
it back. Not timed: choosing tokens, comparing them, counting bytes.

Every store is fed the tokens of the reference (preallocation, plain torch memory). Each store's own
choice has to be the same token. Where the reference's two best logits lie within `NEAR_TIE`,
rounding could decide, so there the logits themselves have to agree within `NEAR_TIE`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import kvspan

from .errors import DemoError
from .model import Llama
from .schedule import Request, Step, live_lengths
from .stores import DriverWork, Memory, RowStore, SpanKV

NEAR_TIE = 1e-3


@dataclass(frozen=True)
class Sample:
    """Memory during a stretch of virtual time."""

    start_s: float
    duration_s: float
    memory: Memory


def time_weighted(samples: Sequence[Sample]) -> tuple[float, float, float]:
    """Mean mapped bytes, mean used bytes, and waste, weighted by duration.

    Waste is 1 - integral of used / integral of mapped (DESIGN.md, "Waste, defined once"); 0 for no
    memory.
    """
    seconds = sum(s.duration_s for s in samples)
    mapped = sum(s.duration_s * s.memory.mapped for s in samples)
    used = sum(s.duration_s * s.memory.used for s in samples)
    if seconds == 0 or mapped == 0:
        return 0.0, 0.0, 0.0
    return mapped / seconds, used / seconds, 1 - used / mapped


@dataclass
class Run:
    """One store's way through the schedule, and what it measured."""

    store: RowStore
    rows: dict[int, int] = field(default_factory=dict)
    total_s: float = 0.0
    decode_s: list[float] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    calls_in_steps: int = 0
    steps_with_calls: int = 0
    work_before: DriverWork | None = None

    def prefill(self, model: Llama, request: int, prompt: Tensor) -> Tensor:
        """Admit a request and compute its prompt; logits ``[1, vocab]``."""
        began = time.perf_counter()
        row = self.rows[request] = self.store.admit(len(prompt))
        starts = self.store.begin([row], len(prompt))
        logits = model.forward(prompt[None], starts, self.store)
        self.total_s += time.perf_counter() - began
        return logits

    def decode(self, model: Llama, requests: Sequence[int], tokens: Tensor) -> Tensor:
        """One token more of each request; logits ``[requests, vocab]``."""
        rows = [self.rows[i] for i in requests]
        before = self.store.driver_work()
        began = time.perf_counter()
        starts = self.store.begin(rows, 1)
        extended = time.perf_counter()
        after = self.store.driver_work()
        if before and after:
            calls = (after - before).calls
            self.calls_in_steps += calls
            self.steps_with_calls += calls > 0
        resumed = time.perf_counter()
        logits = model.forward(tokens[:, None], starts, self.store)
        self.decode_s.append(extended - began + time.perf_counter() - resumed)
        self.total_s += self.decode_s[-1]
        return logits

    def finish(self, request: int) -> None:
        """Give a request's row back."""
        began = time.perf_counter()
        self.store.release(self.rows.pop(request))
        self.total_s += time.perf_counter() - began


@dataclass(frozen=True)
class StoreResult:
    """A row of the table.

    Times are wall-clock seconds, bytes are time-weighted over the schedule's virtual time. `work`
    is None where memory is allocated once; then there are no calls in steps either.
    """

    name: str
    total_s: float
    decode_s: list[float]
    peak_mapped: int
    mean_mapped: float
    mean_used: float
    waste: float
    work: DriverWork | None
    calls_in_steps: int
    steps_with_calls: int
    samples: list[Sample]


@dataclass(frozen=True)
class TraceResult:
    """What act two found.

    `pages` is the span cache's page map at the moment of most live tokens, `pages_at_s` when that
    was, and `row_requests` which request each slot belonged to then.
    """

    stores: list[StoreResult]
    n_output_tokens: int
    n_prompt_tokens: int
    n_compared: int
    n_near_ties: int
    max_logit_difference: float
    pages: list[kvspan.PageMapEntry]
    pages_at_s: float
    row_requests: dict[int, int]


class Referee:
    """Compares the stores' logits with the reference's, place by place."""

    def __init__(self) -> None:
        self.n_compared = 0
        self.n_near_ties = 0
        self.max_difference = 0.0

    def judge(self, reference: Tensor, others: dict[str, Tensor], where: str) -> Tensor:
        """Return the reference's tokens, int64 ``[rows]``.

        Raises
        ------
        DemoError
            If a store chose another token, or its logits differ where the choice is a near tie.
        """
        best = reference.topk(2, dim=-1)
        chosen = best.indices[:, 0]
        near_tie = (best.values[:, 0] - best.values[:, 1]) <= NEAR_TIE
        self.n_compared += len(chosen)
        self.n_near_ties += int(near_tie.sum())
        for name, logits in others.items():
            difference = (logits - reference).abs().amax(dim=-1)
            self.max_difference = max(self.max_difference, float(difference.max()))
            agrees = torch.where(near_tie, difference <= NEAR_TIE, logits.argmax(dim=-1) == chosen)
            if not agrees.all():
                row = int((~agrees).nonzero()[0])
                raise DemoError(
                    f"the stores disagree at {where}, row {row}: {name} chose token "
                    f"{int(logits[row].argmax())}, the reference {int(chosen[row])}; "
                    f"largest logit difference {float(difference[row]):.3g}"
                )
        return chosen


def run_trace(
    model: Llama,
    stores: Sequence[RowStore],
    requests: Sequence[Request],
    steps: Sequence[Step],
    prompts: Sequence[Tensor],
    advance: Callable[[int, float], None],
) -> TraceResult:
    """Run the schedule over all stores.

    Parameters
    ----------
    model : Llama
        The decoder.
    stores : sequence of RowStore
        The last one is the reference that the others are compared with.
    requests, steps
        The requests and their schedule.
    prompts : sequence of Tensor
        int64 token ids of each request's prompt.
    advance : callable
        Told after each step how many tokens (prompt and output) it computed per store, and the
        virtual time.

    Raises
    ------
    DemoError
        If a store's tokens differ from the reference's.
    """
    runs = [Run(store, work_before=store.driver_work()) for store in stores]
    referee = Referee()
    last_token: dict[int, Tensor] = {}
    live = [sum(lengths.values()) for lengths in live_lengths(requests, steps)]
    peak_step = live.index(max(live))
    pages: list[kvspan.PageMapEntry] = []
    row_requests: dict[int, int] = {}

    for n, step in enumerate(steps):
        order = runs[n % len(runs) :] + runs[: n % len(runs)]

        def judged(logits: dict[str, Tensor], where: str) -> Tensor:
            reference = logits.pop(stores[-1].name)
            return referee.judge(reference, logits, where)

        if step.decoding:
            tokens = torch.stack([last_token[i] for i in step.decoding])
            logits = {run.store.name: run.decode(model, step.decoding, tokens) for run in order}
            chosen = judged(logits, f"step {n}")
            last_token |= dict(zip(step.decoding, chosen, strict=True))
        for i in step.admitted:
            logits = {run.store.name: run.prefill(model, i, prompts[i]) for run in order}
            last_token[i] = judged(logits, f"the prompt of request {i}")[0]
        for run in runs:
            run.samples.append(Sample(step.start_s, step.duration_s, run.store.memory()))
            if n == peak_step and isinstance(run.store, SpanKV):
                pages = run.store.cache.page_map()
                row_requests = {row: request for request, row in run.rows.items()}
        for run in order:
            for i in step.finished:
                run.finish(i)
        end_s = step.start_s + step.duration_s
        if n + 1 < len(steps) and steps[n + 1].start_s > end_s:
            for run in runs:
                idle = Sample(end_s, steps[n + 1].start_s - end_s, run.store.memory())
                run.samples.append(idle)
        n_tokens = len(step.decoding) + sum(requests[i].prompt_tokens for i in step.admitted)
        advance(n_tokens, step.start_s)

    return TraceResult(
        stores=[_result(run) for run in runs],
        n_output_tokens=sum(r.output_tokens for r in requests),
        n_prompt_tokens=sum(r.prompt_tokens for r in requests),
        n_compared=referee.n_compared,
        n_near_ties=referee.n_near_ties,
        max_logit_difference=referee.max_difference,
        pages=pages,
        pages_at_s=steps[peak_step].start_s,
        row_requests=row_requests,
    )


def _result(run: Run) -> StoreResult:
    """Boil a run down to its row of the table."""
    mean_mapped, mean_used, waste = time_weighted(run.samples)
    before, after = run.work_before, run.store.driver_work()
    return StoreResult(
        name=run.store.name,
        total_s=run.total_s,
        decode_s=run.decode_s,
        peak_mapped=max(s.memory.mapped for s in run.samples),
        mean_mapped=mean_mapped,
        mean_used=mean_used,
        waste=waste,
        work=after - before if before and after else None,
        calls_in_steps=run.calls_in_steps,
        steps_with_calls=run.steps_with_calls,
        samples=run.samples,
    )
