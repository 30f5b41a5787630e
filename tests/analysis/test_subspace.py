"""The flat vectors: what belongs to them in every form of mask, and what stays out."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.ao.pruning.sparsifier.utils import FakeSparsity
from torch.nn.utils import parametrize, prune

from sparsetweaks.analysis.lanczos import random_signs, random_vector
from sparsetweaks.analysis.subspace import named_weights, new_seed, subspace
from sparsetweaks.copying import copy_model
from sparsetweaks.errors import UnmaskedZerosWarning
from sparsetweaks.masks import apply_masks, find_masks, lift_masks

MASK = torch.tensor([[True, False, True], [False, False, True]])


def network(form: str) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    if form == "buffers":
        return apply_masks(model, {"0.weight": MASK})
    if form == "torch.nn.utils.prune":
        prune.custom_from_mask(model[0], "weight", MASK)
    if form == "parametrization":
        parametrize.register_parametrization(model[0], "weight", FakeSparsity(MASK))
    return model


FORMS = ["buffers", "torch.nn.utils.prune", "parametrization"]


@pytest.mark.parametrize("form", FORMS)
def test_lifted_masks_compute_the_same_and_let_every_weight_move(form):
    model = network(form)
    inputs = torch.randn(4, 3)
    before = model(inputs)
    lifted = copy_model(model)
    (mask,) = lift_masks(lifted).values()
    assert torch.equal(mask, MASK)
    assert torch.equal(lifted(inputs), before)
    lifted(inputs).sum().backward()
    assert named_weights(lifted)["0.weight"].grad[~MASK].abs().min() > 0
    assert torch.equal(find_masks(model)["0.weight"], MASK)  # the given one keeps its own


@pytest.mark.parametrize("form", FORMS)
def test_pruned_weights_are_no_coordinate(form):
    model = network(form)
    masks = lift_masks(model)
    space = subspace(model, masks)
    assert list(space.parameters) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    assert space.dimension == 3 + 2 + 4 + 2
    assert subspace(model, masks, over="all").dimension == 6 + 2 + 4 + 2
    flat = torch.arange(1.0, 12)
    tensors = space.tensors(flat)
    assert tensors[1].tolist() == [[3, 0, 4], [0, 0, 5]]
    assert torch.equal(space.flat(tensors), flat)


def test_frozen_weights_stay_out_and_patterns_choose():
    model = network("buffers")
    model[2].bias.requires_grad_(False)
    masks = lift_masks(model)
    assert list(subspace(model, masks, where="2").parameters) == ["2.weight"]
    assert list(subspace(model, masks, where=["*.bias", "2.*"]).parameters) == ["0.bias", "2.weight"]
    with pytest.raises(ValueError, match=r"no trainable parameter; close: '0\.bias'"):
        subspace(model, masks, where="0.bia")
    with pytest.raises(ValueError, match="no trainable parameter: all are frozen"):
        subspace(model.requires_grad_(False), masks)


def test_complex_weights_that_training_moves_are_named():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, dtype=torch.complex64))
    for given in (model, model[1:]):
        with pytest.raises(ValueError, match=r"complex \('1\.bias', '1\.weight'\).*: freeze them.*where="):
            subspace(given, {})
    assert list(subspace(model, {}, where="0").parameters) == ["0.bias", "0.weight"]
    model[1].requires_grad_(False)
    assert list(subspace(model, {}).parameters) == ["0.bias", "0.weight"]


def test_nothing_left_to_move():
    model = apply_masks(nn.Linear(3, 2, bias=False), {"weight": torch.zeros(2, 3, dtype=torch.bool)})
    with pytest.raises(ValueError, match="pruned"):
        subspace(model, lift_masks(model))


def test_zeros_without_a_mask_are_told_with_what_to_call():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        model[1].weight[:3] = 0
    message = r"108 of the 180 prunable weights .* apply_masks\(model, find_masks\(model, zeros=True\)\).*over='all'"
    with pytest.warns(UnmaskedZerosWarning, match=message) as caught:
        assert subspace(model, {}).dimension == sum(p.numel() for p in model.parameters())
    assert caught[0].filename == __file__
    subspace(model, {}, over="all")  # where it makes no difference, nothing is said
    masked = apply_masks(model, find_masks(model, zeros=True))
    subspace(masked, lift_masks(masked))
    partly = apply_masks(model, {"0.weight": torch.rand(4, 1, 3, 3) > 0.5})
    with pytest.warns(UnmaskedZerosWarning, match="108 of the 144"):
        subspace(partly, lift_masks(partly))


def test_a_tied_weight_is_one_coordinate_and_other_memory_formats_round_trip():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(2, 3, 3)).to(memory_format=torch.channels_last)
    model[1].weight = model[0].weight
    model = apply_masks(model, {"0.weight": torch.rand(3, 2, 3, 3) > 0.5})
    space = subspace(model, lift_masks(model))
    assert list(space.parameters) == ["0.bias", "0.weight", "1.bias"]
    weights = [parameter.detach() for parameter in space.parameters.values()]
    for tensor, weight in zip(space.tensors(space.flat(weights)), weights, strict=True):
        assert torch.equal(tensor, weight)


@pytest.mark.parametrize("draw", [random_vector, random_signs])
def test_what_a_parameter_gets_depends_on_no_other_and_on_no_mask(draw):
    model = network("buffers")
    larger = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2), nn.Linear(2, 5))
    other = apply_masks(larger, {"2.weight": torch.tensor([[True, False], [False, True]])})
    spaces = {
        "kept": subspace(model, lift_masks(model)),
        "all": subspace(model, {}, over="all"),
        "one": subspace(model, {}, where="2.weight"),
        "larger": subspace(other, lift_masks(other)),
    }
    drawn = {name: space.named(space.random(draw, 7)) for name, space in spaces.items()}
    assert torch.equal(drawn["kept"]["0.weight"], drawn["all"]["0.weight"] * MASK)
    assert torch.equal(drawn["one"]["2.weight"], drawn["all"]["2.weight"])
    for name in ("0.weight", "0.bias", "2.bias"):
        assert torch.equal(drawn["larger"][name], drawn["all"][name])
    assert not torch.equal(drawn["all"]["0.bias"], drawn["all"]["2.bias"])  # of one shape, and not the same
    again = [spaces["all"].random(draw, seed) for seed in (7, 8)]
    assert torch.equal(spaces["all"].flat(list(drawn["all"].values())), again[0])
    assert not torch.equal(*again)


def test_one_number_is_taken_of_a_generator_for_each_vector():
    generator = torch.Generator().manual_seed(3)
    seeds = [new_seed(generator) for _ in range(3)]
    assert len(set(seeds)) == 3
    assert [new_seed(generator.manual_seed(3))] == seeds[:1]
