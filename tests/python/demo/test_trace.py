"""Act two's arithmetic: waste over time, the referee, the picture's data."""

from __future__ import annotations

import pytest
import torch

from kvspan import PageMapEntry
from kvspan.demo.errors import DemoError
from kvspan.demo.picture import frame_map, step_curves, virtual_map
from kvspan.demo.report import paired_ratio
from kvspan.demo.stores import Memory
from kvspan.demo.trace import NEAR_TIE, Referee, Sample, time_weighted


def test_waste_is_a_ratio_of_integrals() -> None:
    samples = [
        Sample(0.0, 2.0, Memory(used=50, partial=25, ahead=25)),  # mapped 100
        Sample(2.0, 1.0, Memory(used=0, kept=40)),
        Sample(5.0, 1.0, Memory(used=10)),
    ]
    mapped, used, waste = time_weighted(samples)
    assert mapped == pytest.approx((2 * 100 + 1 * 40 + 1 * 10) / 4)
    assert used == pytest.approx((2 * 50 + 1 * 0 + 1 * 10) / 4)
    assert waste == pytest.approx(1 - 110 / 250)


def test_waste_of_nothing_is_zero() -> None:
    assert time_weighted([]) == (0.0, 0.0, 0.0)
    assert time_weighted([Sample(0.0, 1.0, Memory(0))]) == (0.0, 0.0, 0.0)


def test_referee_wants_the_same_token() -> None:
    referee = Referee()
    reference = torch.tensor([[0.0, 1.0, 3.0], [5.0, 1.0, 0.0]])
    assert referee.judge(reference, {"other": reference + 1e-5}, "here").tolist() == [2, 0]
    assert (referee.n_compared, referee.n_near_ties) == (2, 0)
    assert referee.max_difference == pytest.approx(1e-5, rel=0.1)
    other = reference.clone()
    other[1] = torch.tensor([5.0, 5.1, 0.0])
    with pytest.raises(DemoError, match=r"step 7, row 1: other chose token 1, the reference 0"):
        referee.judge(reference, {"other": other}, "step 7")


def test_referee_compares_logits_at_near_ties() -> None:
    tie = torch.tensor([[1.0, 1.0 + NEAR_TIE / 2, 0.0]])
    flipped = torch.tensor([[1.0 + NEAR_TIE / 2, 1.0, 0.0]])
    referee = Referee()
    assert referee.judge(tie, {"other": flipped}, "here").tolist() == [1]
    assert referee.n_near_ties == 1
    with pytest.raises(DemoError):
        referee.judge(tie, {"other": tie + torch.tensor([0.0, 0.0, 10 * NEAR_TIE])}, "here")


def test_paired_ratio_is_the_median_of_ratios() -> None:
    assert paired_ratio([1.0, 20.0, 3.0], [2.0, 10.0, 3.0]) == 1.0


def test_picture_data() -> None:
    entries = [(3, 0, 0, 7, 1), (3, 0, 1, 2, 1), (3, 1, 0, 4, 2), (8, 0, 0, 4, 2)]
    pages = [PageMapEntry(*entry) for entry in entries]
    rows, slots, n_lanes = virtual_map(pages)
    assert (rows, slots, n_lanes) == ([[3, 3], [3, -1], [8, -1], [-1, -1]], [3, 8], 2)
    assert frame_map(pages, 3) == [[3, 3, 8], [3, -1, -1]]
    samples = [Sample(0.0, 1.0, Memory(2**20)), Sample(2.0, 1.0, Memory(0, kept=2**21))]
    times, stacks = step_curves(samples)
    assert times == [0.0, 1.0, 2.0, 3.0]
    assert stacks == [[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 2, 2]]
