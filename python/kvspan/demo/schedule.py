"""Which request is in the batch when: one schedule that every store has to follow.

Requests come from an excerpt of a real trace, with its order of arrival and its lengths, both
scaled. The scheduler is plain continuous batching: requests are admitted in the order of their
arrival as rows become free, an admitted request's prompt is computed whole, and every running row
decodes one token a step. Nothing is known ahead and no request overtakes another.

Time is virtual: a prompt token takes 1 / `PREFILL_TOKENS_PER_S` and a decode step 1 /
`DECODE_STEPS_PER_S`, whatever the machine, so the schedule and every byte count over time are the
same everywhere. Arrival times are scaled like the lengths, which keeps the load (requests in
flight) that of the unscaled trace.
"""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import DemoError

# A data-centre GPU's order of magnitude for an 8B model; only ratios to arrival times matter here.
PREFILL_TOKENS_PER_S = 8000.0
DECODE_STEPS_PER_S = 30.0
EXCERPT = Path(__file__).parents[1] / "data" / "azure_conv_2023_excerpt.csv"


@dataclass(frozen=True)
class Request:
    """When a request comes (virtual seconds), how many tokens it brings and gets."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int

    @property
    def stored_tokens(self) -> int:
        """Tokens whose KV is stored at the end; the last output token is never fed back."""
        return self.prompt_tokens + self.output_tokens - 1


@dataclass(frozen=True)
class Step:
    """One turn of the engine; requests are named by their place in the trace.

    Attributes
    ----------
    start_s, duration_s : float
        Virtual seconds.
    admitted : tuple of int
        Requests whose prompts are computed in this step; each gets its first output token.
    decoding : tuple of int
        Requests that get one more output token in this step.
    finished : tuple of int
        Requests that have all their tokens after this step and leave.
    """

    start_s: float
    duration_s: float
    admitted: tuple[int, ...]
    decoding: tuple[int, ...]
    finished: tuple[int, ...]


def load_excerpt(n_requests: int, scale: float) -> list[Request]:
    """Read the first requests of the shipped trace, lengths and times multiplied by `scale`.

    Raises
    ------
    DemoError
        If the excerpt has fewer requests.
    """
    lines = list(csv.DictReader(EXCERPT.read_text().splitlines()))
    if not 0 < n_requests <= len(lines):
        raise DemoError(
            f"--requests must be 1 to {len(lines)}, the requests of the shipped excerpt"
        )
    if scale <= 0:
        raise DemoError("--scale must be positive")

    def scaled(n_tokens: str) -> int:
        return max(1, round(int(n_tokens) * scale))

    return [
        Request(float(line["t_s"]) * scale, scaled(line["prompt"]), scaled(line["output"]))
        for line in lines[:n_requests]
    ]


def plan(requests: Sequence[Request], max_rows: int, max_prefill_tokens: int = 2048) -> list[Step]:
    """Continuous batching in arrival order.

    Parameters
    ----------
    requests : sequence of Request
        In order of arrival.
    max_rows : int
        Requests that may be in flight together.
    max_prefill_tokens : int
        No further prompt starts in a step that already computes so many prompt tokens.

    Returns
    -------
    list of Step
        In order of time; gaps between steps are idle.
    """
    waiting = deque(range(len(requests)))
    produced: dict[int, int] = {}  # output tokens so far of each running request
    steps: list[Step] = []
    now = 0.0
    while waiting or produced:
        if not produced:
            now = max(now, requests[waiting[0]].arrival_s)
        decoding = tuple(produced)
        admitted: list[int] = []
        prefill_tokens = 0
        while (
            waiting
            and requests[waiting[0]].arrival_s <= now
            and len(produced) < max_rows
            and (not admitted or prefill_tokens < max_prefill_tokens)
        ):
            admitted.append(waiting.popleft())
            produced[admitted[-1]] = 0
            prefill_tokens += requests[admitted[-1]].prompt_tokens
        for i in produced:
            produced[i] += 1
        finished = tuple(i for i, n in produced.items() if n == requests[i].output_tokens)
        for i in finished:
            del produced[i]
        duration = prefill_tokens / PREFILL_TOKENS_PER_S
        duration += 1 / DECODE_STEPS_PER_S if decoding else 0.0
        steps.append(Step(now, duration, tuple(admitted), decoding, finished))
        now += duration
    return steps


def live_lengths(requests: Sequence[Request], steps: Iterable[Step]) -> Iterator[dict[int, int]]:
    """For each step, the stored tokens of every request in it, before the finished ones leave."""
    lengths: dict[int, int] = {}
    for step in steps:
        for i in step.decoding:
            lengths[i] += 1
        lengths |= {i: requests[i].prompt_tokens for i in step.admitted}
        yield dict(lengths)
        for i in step.finished:
            del lengths[i]
