"""A ticket from elsewhere may be plain zeros without a mask: every count takes them as zeros, and says so once."""

from __future__ import annotations

import warnings
from dataclasses import astuple

import pytest
import torch
from torch import nn

import sparsetweaks as st

INPUTS = torch.zeros(1, 3, 6, 6)
TOLD = r"192 of the 384 prunable weights are exactly zero without a mask: .*find_masks\(model, zeros=True\)"


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 4, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 2),
    )


@pytest.fixture
def ticket() -> nn.Module:
    return st.prune(network(), 0.5)


@pytest.fixture
def zeros(ticket) -> nn.Module:
    return st.convert_masks(ticket, to="zeros")


def test_cost_counts_what_is_not_zero(ticket, zeros):
    with pytest.warns(st.UnmaskedZerosWarning, match=TOLD) as told:
        found = st.cost(zeros, INPUTS)
    assert len(told) == 1 and told[0].filename == __file__
    assert found.modules == st.cost(ticket, INPUTS).modules
    biases = 8  # of the normalisation: zero, and no weights that pruning would take
    assert found.nonzeros == sum(int(p.count_nonzero()) for p in zeros.parameters()) + biases


def test_sparsity_counts_what_is_not_zero(ticket, zeros):
    with pytest.warns(st.UnmaskedZerosWarning, match=TOLD) as told:
        found = st.sparsity(zeros)
    assert len(told) == 1 and told[0].filename == __file__
    wanted = st.sparsity(ticket)
    assert (found.overall, found.of_all_parameters) == (wanted.overall, wanted.of_all_parameters)
    assert (found.layers[0].kept, found.layers[0].masked) == (192, False)
    assert "50.00 %" in str(found) and "no mask" not in str(found)


def test_only_what_counts_as_prunable_counts_as_pruned():
    model = network()
    nn.init.zeros_(model[5].weight)  # a classifier that is to be trained, as many are
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert st.cost(model, INPUTS).nonzeros == sum(p.numel() for p in model.parameters())
        assert st.sparsity(model).overall == 0
    with pytest.warns(st.UnmaskedZerosWarning, match="16 of the 16 prunable weights"):
        assert st.sparsity(model, include="5").overall == 1


def test_a_budget_is_of_what_is_not_zero(ticket, zeros):
    budget = st.cost(ticket, INPUTS).nonzeros - 10
    with pytest.warns(st.UnmaskedZerosWarning, match=TOLD) as told:
        matched = st.match_budget(zeros, budget)
    assert len(told) == 1 and told[0].filename == __file__
    wanted = st.find_masks(st.match_budget(ticket, budget))
    assert all(torch.equal(st.find_masks(matched)[name], mask) for name, mask in wanted.items())
    assert st.cost(matched, INPUTS).nonzeros == budget
    with (
        pytest.warns(st.UnmaskedZerosWarning, match=TOLD),
        pytest.raises(ValueError, match="masks only shrink"),
    ):
        st.match_budget(zeros, budget + 11)


def test_a_budget_of_what_is_masked_in_part():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 2))
    both = st.prune(model, 0.5, scope="layer")
    part = st.copy_model(both)
    del part[1]._buffers["weight_mask"]
    with pytest.warns(st.UnmaskedZerosWarning, match="288 of the 576 prunable weights"):
        before = st.cost(part, INPUTS)
    assert before.modules == st.cost(both, INPUTS).modules
    with pytest.warns(st.UnmaskedZerosWarning, match="288 of the 576 prunable weights"):
        matched = st.match_budget(part, before.nonzeros - 5)
    assert st.cost(matched, INPUTS).nonzeros == before.nonzeros - 5


def test_a_summary_counts_what_is_not_zero(ticket, zeros):
    shown, wanted = st.summary(zeros), st.summary(ticket)
    assert shown.facts.part.counts == wanted.facts.part.counts
    (note, _) = shown.facts.notes
    assert "192 of the 384 prunable weights are exactly zero without a mask" in note
    assert st.summary(zeros, inputs=INPUTS).facts.totals == st.summary(ticket, inputs=INPUTS).facts.totals


def test_the_analyses_take_them_as_kept_and_say_so(zeros):
    batch = torch.randn(4, 3, 6, 6), torch.tensor([0, 1, 0, 1])
    loss = nn.functional.cross_entropy
    looks = (
        lambda: st.analysis.layer_collapse(zeros, INPUTS).layers[0].kept,
        lambda: st.analysis.gradient_flow(zeros, batch, loss).layers[0].kept,
    )
    for look in looks:
        with pytest.warns(st.UnmaskedZerosWarning, match=TOLD) as told:
            assert look() == 384
        assert len(told) == 1 and told[0].filename == __file__
        assert "if not, a mask that keeps them. Here they count as kept" in str(told[0].message)


def test_zeros_that_came_by_chance_or_that_a_mask_keeps_are_told_to_nobody():
    chance = nn.Sequential(nn.Linear(200, 200), nn.Linear(200, 2))
    with torch.no_grad():
        chance[0].weight[0, :4] = 0
    kept = network()
    nn.init.zeros_(kept[0].weight)
    for model, inputs in ((chance, torch.zeros(1, 200)), (st.prune(kept, 0.0), INPUTS)):
        found = st.cost(model, inputs)
        assert found.nonzeros == found.parameters and found.effective_flops == found.flops
        assert st.sparsity(model).overall == 0
        assert st.sparsity(st.match_budget(model, found.nonzeros)).overall == 0


def test_masks_are_never_made_of_them_unasked(zeros, tmp_path):
    assert st.find_masks(zeros) == {}
    st.export(zeros, tmp_path / "file", format="sparse")
    assert st.find_masks(st.load_sparse(tmp_path / "file", into=network())) == {}
    assert astuple(st.verify(zeros, zeros).checks[0])[1] is None
