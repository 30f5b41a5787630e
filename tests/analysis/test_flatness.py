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
    assert "eigenvalue" in found.plot().axes[0].get_title()


def test_one_space_at_a_time():
    model, batch = case()
    with pytest.raises(ValueError, match="call it for each"):
        flatness(model, batch, F.cross_entropy, over="both")
