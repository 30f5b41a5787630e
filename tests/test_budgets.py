"""A budget is met to the last weight, by pruning the smallest only, or refused."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune as torch_prune

import sparsetweaks as sw
from sparsetweaks.budgets import match_budget
from sparsetweaks.cost import cost

IMAGES = torch.zeros(1, 3, 8, 8)


def network() -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 2),
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in (model[0], model[3]):  # full of ties
            layer.weight.copy_(torch.randint(-3, 3, layer.weight.shape, generator=generator) + 0.5)
    return model


@settings(max_examples=20, deadline=None)
@given(st.floats(0, 0.9), st.data())
def test_the_number_is_exact_masks_shrink_and_the_smallest_go(sparsity, data):
    ticket = sw.prune(network(), sparsity)
    tweaked = sw.inject_skips(ticket, shortcut="projection")
    before = cost(tweaked, IMAGES)
    fixed = before.nonzeros - sw.sparsity(tweaked).kept
    wanted = data.draw(st.integers(fixed + 1, before.nonzeros))
    matched = match_budget(tweaked, wanted)
    assert cost(matched, IMAGES).nonzeros == wanted
    old, new = sw.find_masks(tweaked), sw.find_masks(matched)
    assert list(old) == list(new)
    gone, kept = [], []
    for name, mask in new.items():
        assert not (mask & ~old[name]).any()
        values = tweaked.get_parameter(name).detach().abs()
        gone.append(values[old[name] & ~mask])
        kept.append(values[mask])
        assert torch.equal(matched.get_parameter(name)[mask], tweaked.get_parameter(name)[mask])
    if len(torch.cat(gone)) and len(torch.cat(kept)):
        assert torch.cat(gone).max() <= torch.cat(kept).min()


def test_counted_as_papers_count():
    ticket = sw.prune(network(), 0.5)
    tweaked = sw.inject_skips(ticket, shortcut="projection")
    report = sw.sparsity(tweaked)
    assert report.added_kept > 0
    matched = sw.sparsity(match_budget(tweaked, sw.sparsity(ticket).kept, of="weights"))
    assert matched.kept + matched.added_kept == sw.sparsity(ticket).kept
    assert matched.added_kept == report.added_kept


def test_the_whole_budget_changes_nothing_and_the_model_is_left_alone():
    ticket = sw.prune(network(), 0.5)
    state = copy.deepcopy(ticket.state_dict())
    same = match_budget(ticket, cost(ticket, IMAGES).nonzeros)
    assert all(torch.equal(value, state[key]) for key, value in same.state_dict().items())
    match_budget(ticket, 100)
    assert all(torch.equal(value, state[key]) for key, value in ticket.state_dict().items())


def test_a_dense_model_is_pruned_by_its_prunable_weights():
    matched = match_budget(network(), 100)
    assert list(sw.find_masks(matched)) == ["0.weight", "3.weight"]
    assert cost(matched, IMAGES).nonzeros == 100


def test_other_forms_of_mask_are_kept():
    model = network()
    torch_prune.l1_unstructured(model[0], "weight", 0.5)
    before = cost(model, IMAGES).nonzeros
    matched = match_budget(model, before - 10)
    assert cost(matched, IMAGES).nonzeros == before - 10
    assert torch_prune.is_pruned(matched) and "0.weight_orig" in matched.state_dict()


def test_a_tied_weight_counts_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    matched = match_budget(sw.prune(model, 0.25, include="*"), 5)
    assert cost(matched, torch.zeros(1, 4)).nonzeros == 5
    assert matched[0].weight is matched[1].weight


@pytest.mark.parametrize("as_state", [False, True])
def test_ranked_by_the_weights_that_chose_the_masks(as_state):
    model = network()
    initial = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for layer in (model[0], model[3]):
            layer.weight.copy_(torch.arange(1.0, layer.weight.numel() + 1).view(layer.weight.shape))
    trained = sw.prune(model, 0.5)
    ticket = sw.rewind(trained, initial)
    by = trained.state_dict() if as_state else trained
    matched = match_budget(ticket, 60, ranked_by=by, of="weights")
    wanted = match_budget(trained, 60, of="weights")
    for name, mask in sw.find_masks(wanted).items():
        assert torch.equal(sw.find_masks(matched)[name], mask)
        assert torch.equal(matched.get_parameter(name), torch.where(mask, initial[name], 0))


@pytest.mark.parametrize(
    ("nonzeros", "options", "message"),
    [
        (10**6, {}, "the model has .* non-zeros, and masks only shrink: not 1,000,000"),
        (38, {}, r"38 parameters carry no mask \(0 of them added by tweaks\)"),
        (0, {"of": "weights"}, "leaves no weight of 0 non-zeros"),
        (50, {"of": "layers"}, "unknown of 'layers': choose from 'parameters', 'weights'"),
        (50, {"ranked_by": {}}, "ranked_by has no '0.weight' of shape"),
        (50, {"ranked_by": {"0.weight": [1]}}, "ranked_by has no '0.weight' of shape"),
    ],
)
def test_what_cannot_be_met_is_refused(nonzeros, options, message):
    with pytest.raises(ValueError, match=message):
        match_budget(sw.prune(network(), 0.5), nonzeros, **options)


def test_tweaks_that_alone_exceed_the_budget_are_named():
    tweaked = sw.inject_skips(sw.prune(network(), 0.5), shortcut="projection")
    added = sw.sparsity(tweaked).added_kept
    with pytest.raises(ValueError, match=f"{added} of them added by tweaks.*choose tweaks that add fewer"):
        match_budget(tweaked, added, of="weights")


@pytest.mark.parametrize(
    ("nonzeros", "given"), [(0.05, "0.05"), (100.5, "100.5"), ("60", "'60'"), (network(), "Sequential")]
)
def test_a_budget_is_a_whole_number(nonzeros, given):
    with pytest.raises(
        ValueError, match=rf"a whole number such as cost\(other, inputs\)\.nonzeros, got {given}"
    ):
        match_budget(sw.prune(network(), 0.5), nonzeros)


def test_what_ranks_is_a_model_or_a_state():
    with pytest.raises(ValueError, match="ranked_by is a model or a state_dict, got a list"):
        match_budget(sw.prune(network(), 0.5), 60, ranked_by=[])


def test_weights_are_those_that_sparsity_counts_where_masks_are_on_some_only():
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)
    part = sw.prune(nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 2)), 0.5, exclude="0")
    assert sw.sparsity(match_budget(part, 400, of="weights")).kept == 400
    with pytest.raises(ValueError, match=r"216 parameters carry no mask \(0 of them added by tweaks\)"):
        match_budget(part, 200, of="weights")
