"""Calibration against sums by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sparsetweaks.analysis.calibration import BINS, calibration

GENERATOR = torch.Generator().manual_seed(0)


def scores(*confidences):
    """Scores of two classes, of which the first has these probabilities."""
    return torch.tensor([[math.log(c / (1 - c)), 0.0] for c in confidences], dtype=torch.float64)


def test_four_examples_by_hand():
    data = scores(0.9, 0.9, 0.6, 0.2), torch.tensor([0, 1, 0, 1])  # confidences 0.9, 0.9, 0.6, 0.8
    found = calibration(nn.Identity(), data, bins=10)
    filled = [(each.examples, each.confidence, each.accuracy) for each in found.bins if each.examples]
    assert [each[0] for each in filled] == [1, 1, 2]
    assert [value for each in filled for value in each[1:]] == pytest.approx([0.6, 1, 0.8, 1, 0.9, 0.5])
    assert found.error == pytest.approx((0.4 + 0.2 + 2 * 0.4) / 4)
    assert found.largest_error == pytest.approx(0.4)
    assert found.accuracy == 0.75 and found.confidence == pytest.approx(0.8)


def test_random_scores_against_a_loop():
    outputs, targets = torch.randn(200, 5, generator=GENERATOR), torch.randint(5, (200,), generator=GENERATOR)
    probabilities = outputs.double().softmax(1)
    total = 0.0
    for index in range(BINS):
        inside = [
            (float(p.max()), float(p.argmax() == t))
            for p, t in zip(probabilities, targets, strict=True)
            if index / BINS < float(p.max()) <= (index + 1) / BINS
        ]
        if inside:
            total += abs(sum(c for c, _ in inside) - sum(r for _, r in inside)) / 200
    batches = [(outputs[:70], targets[:70]), (outputs[70:], targets[70:])]
    for data in ((outputs, targets), batches, (outputs, nn.functional.one_hot(targets, 5).float())):
        assert calibration(nn.Identity(), data).error == pytest.approx(total, rel=1e-12)
    assert calibration(nn.Identity(), (outputs, targets), chunk_size=7).error == pytest.approx(
        total, rel=1e-12
    )


def test_one_who_is_right_as_often_as_it_says():
    found = calibration(nn.Identity(), (scores(*[0.75] * 4), torch.tensor([0, 0, 0, 1])))
    assert found.error == pytest.approx(0)
    figure = found.plot()
    assert figure.axes[0].get_ylabel() == "accuracy" and figure.axes[1].get_xlabel() == "confidence"
    assert "expected error 0.00 %" in str(found) and len(found.table()) == BINS


def test_a_bin_holds_its_upper_bound():
    found = calibration(nn.Identity(), (torch.zeros(1, 2), torch.tensor([0])), bins=2)  # a confidence of 1/2
    assert [each.examples for each in found.bins] == [1, 0]


def test_certainty_falls_into_the_last_bin():
    found = calibration(nn.Identity(), (torch.tensor([[800.0, 0.0]]), torch.tensor([0])))
    assert found.bins[-1].examples == 1 and found.error == 0


def test_mistakes_are_named():
    two = scores(0.5, 0.7)
    with pytest.raises(ValueError, match="bins must be"):
        calibration(nn.Identity(), (two, torch.tensor([0, 1])), bins=0)
    with pytest.raises(ValueError, match="bins must be a whole number, from 1 to 10,000, got 1000000000"):
        calibration(nn.Identity(), (two, torch.tensor([0, 1])), bins=10**9)
    with pytest.raises(ValueError, match="class numbers from 0 to 1"):
        calibration(nn.Identity(), (two, torch.tensor([0, 2])))
    with pytest.raises(ValueError, match="class numbers from 0 to 1"):
        calibration(nn.Identity(), (two, torch.tensor([0.0, 1.0])))
    with pytest.raises(ValueError, match=r"scores of shape \(examples, classes\)"):
        calibration(nn.Identity(), (two[:, :1], torch.tensor([0, 1])))
    with pytest.raises(ValueError, match="not finite"):
        calibration(nn.Identity(), (two * math.nan, torch.tensor([0, 1])))
    with pytest.raises(ValueError, match="probabilities that are not finite"):
        calibration(nn.Identity(), (two, two * math.nan))
    with pytest.raises(ValueError, match="no batch"):
        calibration(nn.Identity(), [])
    with pytest.raises(ValueError, match=r"scores, of shape \(2, 3, 0\), hold no position"):
        calibration(nn.Identity(), (torch.randn(2, 3, 0), torch.zeros(2, 0).long()))
    with pytest.raises(ValueError, match=r"real numbers; got a torch\.complex128 tensor of shape \(2, 2\)"):
        calibration(nn.Identity(), (two.cfloat().to(torch.complex128), torch.tensor([0, 1])))
    for targets in (two.cfloat(), torch.zeros(2, dtype=torch.cfloat)):
        with pytest.raises(ValueError, match="class numbers from 0 to 1"):
            calibration(nn.Identity(), (two, targets))


class Casting(nn.Module):
    """Two precisions, and a forward that knows."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4).bfloat16(), nn.Linear(4, 2)

    def forward(self, inputs):
        return self.second(self.first(inputs.bfloat16()).relu().float())


@pytest.mark.parametrize("model", [Casting(), nn.Linear(3, 2).bfloat16()], ids=["both", "bfloat16"])
def test_a_model_runs_in_its_own_precision(model):
    inputs, targets = torch.randn(20, 3), torch.randint(2, (20,))
    with torch.no_grad():
        outputs = model(inputs.bfloat16())
    assert str(calibration(model, (inputs, targets))) == str(calibration(nn.Identity(), (outputs, targets)))


@pytest.mark.parametrize("positions", [(5,), (3, 4)])
@pytest.mark.parametrize("soft", [False, True])
def test_each_position_of_dense_scores_is_an_example(positions, soft):
    draw = torch.Generator().manual_seed(0)
    dense = torch.randn(6, 3, *positions, generator=draw)
    targets = torch.randint(3, (6, *positions), generator=draw)
    flat = dense.movedim(1, -1).reshape(-1, 3)
    given = torch.nn.functional.one_hot(targets, 3).movedim(-1, 1).float() if soft else targets
    found = calibration(nn.Identity(), (dense, given), chunk_size=4)
    wanted = calibration(nn.Identity(), (flat, targets.flatten()))
    assert found.examples == 6 * math.prod(positions)
    assert [each.examples for each in found.bins] == [each.examples for each in wanted.bins]
    assert (found.error, found.accuracy) == pytest.approx((wanted.error, wanted.accuracy))


def test_positions_that_a_loss_ignores_are_refused():
    targets = torch.zeros(2, 5, dtype=torch.long)
    targets[0, 0] = -100
    with pytest.raises(ValueError, match=r"from 0 to 2 of shape \(2, 5\).*leave out what a loss ignores"):
        calibration(nn.Identity(), (torch.zeros(2, 3, 5), targets))
