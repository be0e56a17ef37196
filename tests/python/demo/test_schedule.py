"""Properties of the forced schedule, and of the trace it is made from."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from kvspan.demo.errors import DemoError
from kvspan.demo.schedule import (
    DECODE_STEPS_PER_S,
    EXCERPT,
    PREFILL_TOKENS_PER_S,
    Request,
    load_excerpt,
    plan,
)


def random_requests(seed: int) -> list[Request]:
    rng = random.Random(seed)
    arrivals = sorted(rng.uniform(0, 6) for _ in range(40))
    return [Request(t, rng.randint(1, 900), rng.randint(1, 60)) for t in arrivals]


@pytest.mark.parametrize("max_rows", [1, 3, 16])
@pytest.mark.parametrize("seed", range(5))
def test_plan_properties(seed: int, max_rows: int) -> None:
    requests = random_requests(seed)
    steps = plan(requests, max_rows, max_prefill_tokens=1000)

    admitted = [i for step in steps for i in step.admitted]
    assert admitted == list(range(len(requests))), "in the order of arrival, each once"
    finished = [i for step in steps for i in step.finished]
    assert sorted(finished) == admitted

    produced = dict.fromkeys(admitted, 0)
    running: set[int] = set()
    for step in steps:
        assert set(step.decoding) == running, "every running row decodes in every step"
        assert all(requests[i].arrival_s <= step.start_s for i in step.admitted)
        running |= set(step.admitted)
        assert len(running) <= max_rows
        for i in (*step.decoding, *step.admitted):
            produced[i] += 1
        assert set(step.finished) <= running
        running -= set(step.finished)
        prefill = sum(requests[i].prompt_tokens for i in step.admitted)
        assert prefill - (requests[step.admitted[-1]].prompt_tokens if step.admitted else 0) < 1000
        seconds = prefill / PREFILL_TOKENS_PER_S + bool(step.decoding) / DECODE_STEPS_PER_S
        assert step.duration_s == pytest.approx(seconds)
        assert step.duration_s > 0
    assert produced == {i: r.output_tokens for i, r in enumerate(requests)}
    for one, following in pairwise(steps):
        assert following.start_s >= one.start_s + one.duration_s - 1e-9


def test_plan_waits_for_nobody_without_reason() -> None:
    """An arrived request enters with the next step while rows and the prompt budget allow it."""
    requests = random_requests(0)
    steps = plan(requests, max_rows=1000, max_prefill_tokens=10**9)
    for before, step in pairwise(steps):
        for i in step.admitted:
            assert requests[i].arrival_s > before.start_s


def test_idle_time_is_skipped() -> None:
    steps = plan([Request(0.0, 10, 1), Request(100.0, 10, 2)], max_rows=4)
    assert [step.start_s for step in steps][:2] == [0.0, 100.0]
    assert len(steps) == 3


def test_excerpt_is_scaled_and_bounded() -> None:
    full, half = load_excerpt(64, 1.0), load_excerpt(64, 0.5)
    assert full[0] == Request(0.0, 374, 44)
    assert half[1].prompt_tokens == full[1].prompt_tokens // 2
    assert half[5].arrival_s == full[5].arrival_s / 2
    assert all(a.arrival_s <= b.arrival_s for a, b in pairwise(full))
    assert min(r.output_tokens for r in load_excerpt(512, 0.001)) == 1
    for n, scale in ((0, 1.0), (513, 1.0), (5, 0.0), (5, -1.0)):
        with pytest.raises(DemoError):
            load_excerpt(n, scale)


def test_excerpt_travels_with_its_licence() -> None:
    text = EXCERPT.with_name("ATTRIBUTION.md").read_text()
    for words in (EXCERPT.name, "CC-BY-4.0", "Splitwise", "ISCA", "AzurePublicDataset", "Changes"):
        assert words in text
