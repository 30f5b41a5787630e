"""Masks are read, set, and rewound beneath."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from small_models import FORMS, Added, in_form, loss_of, random_masks, same, small_model, snapshot, tied_model
from torch import nn

from sparsetweaks.counting import sparsity
from sparsetweaks.masks import apply_masks, find_masks, rewind
from sparsetweaks.pruning import prune


def test_what_is_applied_is_found_and_the_model_is_left_alone():
    model = small_model()
    before = snapshot(model)
    masks = random_masks(model, "0.weight", "1.conv.weight", "4.bias")
    masked = apply_masks(model, masks)
    assert same(snapshot(model), before)
    assert same(find_masks(masked), masks)
    assert find_masks(model) == {}
    for name, mask in masks.items():
        assert torch.equal(masked.get_parameter(name), torch.where(mask, before[name], 0))
        assert torch.equal(masked.get_buffer(name + "_mask"), mask)
    assert torch.equal(masked[1].norm.weight, before["1.norm.weight"])


def test_found_masks_are_not_views_of_the_models():
    masked = prune(small_model(), 0.5)
    find_masks(masked)["0.weight"].fill_(True)
    assert not masked[0].weight_mask.all()


def test_masks_survive_a_save_and_a_load(tmp_path):
    masked = prune(small_model(), 0.5)
    torch.save(masked.state_dict(), tmp_path / "ticket.pt")
    other = apply_masks(
        small_model(seed=9), {name: torch.ones_like(m) for name, m in find_masks(masked).items()}
    )
    other.load_state_dict(torch.load(tmp_path / "ticket.pt"))
    assert same(find_masks(other), find_masks(masked))
    assert same(find_masks(pickle.loads(pickle.dumps(masked))), find_masks(masked))
    assert same(find_masks(copy.deepcopy(masked)), find_masks(masked))


def test_a_mask_has_the_memory_format_and_dtype_of_its_weight_and_moves_with_it():
    model = small_model().to(memory_format=torch.channels_last)
    masked = prune(model, 0.5)
    assert masked[1].conv.weight_mask.stride() == masked[1].conv.weight.stride() != (36, 9, 3, 1)
    assert masked.half()[0].weight_mask.dtype == torch.bool


@pytest.mark.parametrize("form", FORMS)
def test_masks_of_other_pruners_are_found_and_kept_in_their_form(form):
    mask = random_masks(small_model(), "1.conv.weight")["1.conv.weight"]
    model = in_form(form, small_model(), "1.conv.weight", mask)
    original = small_model()[1].conv.weight
    assert same(find_masks(model), {"1.conv.weight": mask})

    smaller = mask & (torch.arange(mask.numel()).view(mask.shape) % 2 == 0)
    other = apply_masks(model, {"1.conv.weight": smaller})
    assert same(find_masks(other), {"1.conv.weight": smaller})
    assert same(find_masks(model), {"1.conv.weight": mask})
    assert list(other.state_dict()) == list(model.state_dict())
    assert torch.equal(other[1].conv.weight, original * smaller)
    loss_of(other).backward()
    assert torch.equal(other[1].conv.weight, original * smaller)


@pytest.mark.parametrize("form", FORMS)
def test_prune_goes_on_from_the_masks_of_other_pruners_in_their_form(form):
    names = {"0.weight", "1.conv.weight"}
    mask = random_masks(small_model(), "1.conv.weight")["1.conv.weight"]
    pruned = prune(in_form(form, small_model(), "1.conv.weight", mask), 0.9)
    masks = find_masks(pruned)
    assert set(masks) == names
    assert not (masks["1.conv.weight"] & ~mask).any()
    assert sum(int((~m).sum()) for m in masks.values()) == round(0.9 * sum(m.numel() for m in masks.values()))
    assert torch.equal(pruned[1].conv.weight, small_model()[1].conv.weight * masks["1.conv.weight"])


def test_plain_zeros_are_read_only_when_asked_for():
    model = small_model()
    with torch.no_grad():
        model[0].weight[0] = 0
    assert find_masks(model) == {}
    masks = find_masks(model, zeros=True)
    assert set(masks) == {"0.weight", "1.conv.weight"}
    assert torch.equal(masks["0.weight"], model[0].weight != 0)
    assert masks["1.conv.weight"].all()


def test_a_tied_weight_has_one_mask_and_stays_tied():
    masks = random_masks(tied_model(), "0.weight")
    masked = apply_masks(tied_model(), masks)
    assert masked[0].weight is masked[1].weight
    assert sparsity(masked).kept == int(masks["0.weight"].sum())
    both = apply_masks(tied_model(), {"0.weight": masks["0.weight"], "1.weight": masks["0.weight"].clone()})
    assert len(sparsity(both).layers) == 1
    second = apply_masks(tied_model(), {"1.weight": masks["0.weight"]})  # from its other name, too
    for model in (masked, both, second):
        further = prune(model, 0.9)
        for mask in find_masks(further).values():
            assert not (mask & ~masks["0.weight"]).any()
            assert torch.equal(further[0].weight, model[0].weight * mask)
    with pytest.raises(ValueError, match="nothing is left to revive"):
        apply_masks(second, {"0.weight": torch.ones(4, 4, dtype=torch.bool)})
    with pytest.raises(ValueError, match="one tied weight"):
        apply_masks(tied_model(), {"0.weight": masks["0.weight"], "1.weight": ~masks["0.weight"]})


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({}, "no masks given"),
        ({"1.conv.wieght": torch.ones(4, 4, 3, 3, dtype=torch.bool)}, "close: '1.conv.weight'"),
        ({"0.weight": torch.ones(4, 2, 3, 3)}, r"float32.*use mask.bool\(\)"),
        ({"0.weight": torch.ones(4, 2, 3, dtype=torch.bool)}, r"shape \(4, 2, 3\).*\(4, 2, 3, 3\)"),
        ({"0.weight": [True]}, "pass a bool tensor"),
    ],
)
def test_wrong_masks_are_refused(masks, message):
    model = small_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        apply_masks(model, masks)
    assert same(snapshot(model), before)


def test_pruned_weights_are_not_revived():
    masked = prune(small_model(), 0.5)
    with pytest.raises(ValueError, match="nothing is left to revive"):
        apply_masks(masked, {"0.weight": torch.ones(4, 2, 3, 3, dtype=torch.bool)})


def test_a_mask_of_ours_that_is_not_bool_is_refused():
    model = small_model()
    model[0].register_buffer("weight_mask", torch.ones(4, 2, 3, 3))
    with pytest.raises(ValueError, match=r"0.weight_mask is torch.float32"):
        find_masks(model)


# ---------------------------------------------------------------------------------------------------------
# rewind


@torch.no_grad()
def trained(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.add_(1)
    model(torch.ones(2, 2, 5, 5))
    return model


def test_rewind_brings_everything_back_beneath_the_masks():
    initial = small_model()
    masked = prune(trained(initial), 0.5)
    before = snapshot(masked)
    masks = find_masks(masked)
    for state in (initial, initial.state_dict()):
        ticket = rewind(masked, state)
        assert same(find_masks(ticket), masks)
        for name, value in initial.state_dict().items():
            wanted = torch.where(masks[name], value, 0) if name in masks else value
            assert torch.equal(ticket.state_dict()[name], wanted), name
    assert ticket[1].norm.num_batches_tracked == 0 < masked[1].norm.num_batches_tracked
    assert same(snapshot(masked), before)


def test_rewind_takes_a_masked_state_too_and_keeps_the_models_own_masks():
    masked = prune(small_model(), 0.5)
    further = prune(trained(masked), 0.8)
    ticket = rewind(further, masked.state_dict())
    assert same(find_masks(ticket), find_masks(further))
    assert torch.equal(ticket[0].weight, small_model()[0].weight * find_masks(further)["0.weight"])


@pytest.mark.parametrize("form", FORMS)
def test_rewind_beneath_the_masks_of_other_pruners(form):
    mask = random_masks(small_model(), "1.conv.weight")["1.conv.weight"]
    masked = in_form(form, small_model(seed=5), "1.conv.weight", mask)
    ticket = rewind(masked, small_model())
    assert torch.equal(ticket[1].conv.weight, small_model()[1].conv.weight * mask)
    assert same(find_masks(ticket), {"1.conv.weight": mask})
    assert list(ticket.state_dict()) == list(masked.state_dict())
    back = rewind(prune(small_model(seed=5), 0.5), ticket)  # and such a state may be rewound to
    assert torch.equal(back[0].weight, small_model()[0].weight * find_masks(back)["0.weight"])


def test_rewind_keeps_what_a_tweak_added():
    masked = prune(small_model(), 0.5)
    masked[1].add_module("skip", Added(2, 2))
    ticket = rewind(masked, small_model())
    assert torch.equal(ticket[1].skip.weight, masked[1].skip.weight)


def test_rewind_names_what_does_not_fit():
    masked = prune(small_model(), 0.5)
    state = small_model().state_dict()
    with pytest.raises(ValueError, match="no masks"):
        rewind(small_model(), state)
    with pytest.raises(ValueError, match=r"it lacks '4.bias'.*not know 'head.bias'"):
        rewind(masked, {("head.bias" if name == "4.bias" else name): value for name, value in state.items()})
    with pytest.raises(ValueError, match=r"'4.bias' has shape \(5,\) in the state, but \(3,\)"):
        rewind(masked, state | {"4.bias": torch.zeros(5)})


@pytest.mark.parametrize("given", [[torch.ones(2)], torch.ones(2)], ids=["list", "tensor"])
def test_masks_are_a_mapping(given):
    with pytest.raises(
        ValueError, match=f"mapping of parameter name to bool mask.*got a {type(given).__name__}"
    ):
        apply_masks(nn.Linear(2, 1), given)


def test_a_state_to_rewind_to_is_a_mapping_or_a_model():
    masked = apply_masks(nn.Linear(2, 1), {"weight": torch.ones(1, 2, dtype=torch.bool)})
    with pytest.raises(ValueError, match="initial_state is a state_dict or a model, got a list"):
        rewind(masked, [torch.ones(2)])
