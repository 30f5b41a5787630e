"""The summary: the three analyses that it is made of, at the same place."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparsetweaks.analysis import flatness, hessian_top_eigenvalues, hessian_trace, loss_line
from sparsetweaks.masks import apply_masks


def case():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    masked = apply_masks(model, {"0.weight": torch.rand(8, 4) > 0.5})
    return masked, (torch.randn(32, 4).double(), torch.randint(3, (32,)))


@pytest.mark.parametrize("over", ["kept", "all"])
def test_the_numbers_are_those_of_the_analyses(over):
    model, batch = case()
    found = flatness(model, batch, F.cross_entropy, probes=5, over=over, radius=0.3, points=7)
    top = hessian_top_eigenvalues(model, batch, F.cross_entropy, over=over)
    trace = hessian_trace(model, batch, F.cross_entropy, probes=5, over=over)
    line = loss_line(model, batch, F.cross_entropy, direction=top, radius=0.3, points=7)
    assert found.table() == [
        {
            "over": over,
            "weights": top.work.dimension,
            "loss": top.work.loss,
            "largest_eigenvalue": top.values[0],
            "trace": trace.value,
            "trace_standard_error": trace.standard_error,
            "mean_eigenvalue": trace.value / top.work.dimension,
            "rise": line.rise,
        }
    ]
    assert "within 0.3 along" in str(found)
    (axes,) = found.plot().axes
    assert f"{over} weights, eigenvalue {top.values[0]:.3g}" in axes.get_legend().get_texts()[0].get_text()


def test_both_spaces_beside_each_other_with_progress():
    model, batch = case()
    calls = []
    options = {"probes": 5, "points": 7}
    both = flatness(
        model, batch, F.cross_entropy, over="both", progress=lambda *call: calls.append(call), **options
    )
    alone = [flatness(model, batch, F.cross_entropy, over=over, **options) for over in ("kept", "all")]
    assert both.table() == alone[0].table() + alone[1].table()
    assert str(both).count("loss 1.") == 2 and "all" in str(both)
    assert len(both.plot().axes[0].get_legend().get_texts()) == 2
    assert [most for _, most in calls] == [2 * (200 + 5 + 7)] * len(calls)
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert calls[-1] == (424, 424)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"over": "pruned"}, "'kept', 'all' or 'both'"),
        ({"points": 4}, "odd number"),
        ({"probes": 1}, "probes must be a whole number, at least 2"),
        ({"radius": 0}, "radius must be positive"),
    ],
)
def test_wrong_options_are_named_before_anything_is_done(options, message):
    model, batch = case()

    def untouched(outputs, targets):
        raise AssertionError

    with pytest.raises(ValueError, match=message):
        flatness(model, batch, untouched, **options)
