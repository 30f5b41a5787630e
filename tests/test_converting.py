"""Masks move between all forms without a bit of the function or of the masks changing."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import (
    FORMS,
    FORMS_AND_OURS,
    forms_of,
    in_form,
    inputs,
    masked_rooted,
    masks_of_rooted,
    rooted,
    small_model,
    tied_model,
)
from torch import Tensor, nn
from torch.ao.pruning import FakeSparsity
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune
from torch.nn.utils.parametrizations import weight_norm

from sparsetweaks.converting import MaskParametrization, convert_masks
from sparsetweaks.errors import SurgeryError
from sparsetweaks.forms import places
from sparsetweaks.keeping import keep_masks
from sparsetweaks.masks import apply_masks, find_masks
from sparsetweaks.pruning import prune
from sparsetweaks.surgery.activations import swap_activations
from sparsetweaks.surgery.skips import inject_skips
from sparsetweaks.testing import differences, snapshot

TARGETS = ("buffers", "torch_prune", "parametrization", "zeros")


def outputs_and_gradients(model: nn.Module, masks: dict[str, Tensor], given: Tensor) -> dict[str, Tensor]:
    """What the network computes, with the gradients of the weights that are kept."""
    given = given.clone().requires_grad_()
    output = model(given)
    model.zero_grad()
    output.square().sum().backward()
    gradients = {place.name: place.parameter.grad for place in places(model)}
    kept = {name: grad[masks[name]] if name in masks else grad for name, grad in gradients.items()}
    return {"output": output.detach(), "input": given.grad, **kept}


def assert_same_function(one: nn.Module, other: nn.Module, masks: dict[str, Tensor], given: Tensor) -> None:
    first, second = (outputs_and_gradients(model, masks, given) for model in (one, other))
    assert set(first) == set(second)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("form", FORMS_AND_OURS)
def test_every_form_becomes_every_other(form, to):
    model = masked_rooted(form)
    before = snapshot(model)
    result = convert_masks(model, to=to)
    assert differences(before, snapshot(model)) == []
    assert set(forms_of(result).values()) == ({to} if to != "zeros" else set())
    if to == "zeros":
        assert torch.equal(find_masks(result, zeros=True)["weight"], masks_of_rooted()["weight"])
        assert set(result.state_dict()) == set(rooted().state_dict())
        assert type(result) is type(rooted())
        assert not result._forward_pre_hooks
    else:
        assert {name: mask.tolist() for name, mask in find_masks(result).items()} == {
            name: masks_of_rooted()[name].tolist() for name in find_masks(result)
        }
        assert set(find_masks(result)) == set(masks_of_rooted())
    assert_same_function(model, result, masks_of_rooted(), inputs())


@pytest.mark.parametrize("to", ["torch_prune", "parametrization"])
def test_there_and_back_is_the_identity_with_the_order_of_the_parameters(to):
    model = prune(small_model(), 0.5)
    back = convert_masks(convert_masks(model, to=to), to="buffers")
    assert list(back.state_dict()) == list(model.state_dict())
    assert [name for name, _ in back.named_parameters()] == [name for name, _ in model.named_parameters()]
    for name, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
        assert back.state_dict()[name].stride() == value.stride()
    assert [type(module) for module in back.modules()] == [type(module) for module in model.modules()]
    assert not any(module._forward_pre_hooks for module in back.modules())
    zeros = convert_masks(model, to="zeros")
    again = convert_masks(zeros, to="buffers", zeros=True)
    assert {name: value.tolist() for name, value in again.state_dict().items()} == {
        name: value.tolist() for name, value in model.state_dict().items()
    }


def test_the_order_of_the_parameters_and_with_it_the_optimizers_state_stays():
    model = prune(small_model(), 0.5)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    with keep_masks(model, optimizer):
        model(torch.ones(2, 2, 5, 5)).square().sum().backward()
        optimizer.step()
    theirs = convert_masks(model, to="torch_prune")
    other = torch.optim.Adam(theirs.parameters(), lr=0.1)
    other.load_state_dict(optimizer.state_dict())
    for one, two in zip(model.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, two)
        assert optimizer.state[one]["exp_avg"].shape == two.shape
        assert torch.equal(optimizer.state[one]["exp_avg"], other.state[two]["exp_avg"])


def test_values_beneath_the_mask_live_on_where_the_form_lets_them():
    mask = torch.eye(4, dtype=torch.bool)
    layer = nn.Linear(4, 4)
    original = layer.weight.detach().clone()
    torch_prune.custom_from_mask(layer, "weight", mask)
    multiplied = convert_masks(layer, to="parametrization")
    assert torch.equal(multiplied.parametrizations.weight.original, original)
    assert torch.equal(convert_masks(multiplied, to="torch_prune").weight_orig, original)
    assert torch.equal(convert_masks(multiplied, to="buffers").weight, original * mask)


def test_a_mask_in_the_wanted_form_is_left_as_it_came():
    model = in_form("torch_prune twice", small_model(), "1.conv.weight", torch.ones(4, 4, 3, 3).bool())
    result = convert_masks(model, to="torch_prune")
    assert [type(hook) for hook in result[1].conv._forward_pre_hooks.values()] == [
        torch_prune.PruningContainer
    ]
    model = in_form("FakeSparsity", small_model(), "1.conv.weight", torch.ones(4, 4, 3, 3).bool())
    assert isinstance(
        convert_masks(model, to="parametrization")[1].conv.parametrizations.weight[0], FakeSparsity
    )


def test_our_parametrization_keeps_its_mask_in_the_state_and_takes_assignments():
    layer = convert_masks(apply_masks(nn.Linear(2, 2), {"weight": torch.eye(2).bool()}), to="parametrization")
    assert isinstance(layer.parametrizations.weight[0], MaskParametrization)
    layer.weight = torch.ones(2, 2)
    assert torch.equal(layer.weight, torch.eye(2))
    other = convert_masks(
        apply_masks(nn.Linear(2, 2), {"weight": torch.ones(2, 2).bool()}), to="parametrization"
    )
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, torch.eye(2))
    assert other.half().weight.dtype == torch.float16


@pytest.mark.parametrize("to", TARGETS)
def test_what_a_parameter_is_besides_its_values_stays(to):
    model = small_model().to(torch.float64, memory_format=torch.channels_last)
    model[1].conv.weight.requires_grad_(False)
    masked = prune(model, 0.5)
    tied = apply_masks(tied_model(), {"0.weight": torch.eye(4).bool()})
    result, of_tied = convert_masks(masked, to=to), convert_masks(tied, to=to)
    by_name = {place.name: place.parameter for place in places(result)}
    for name, parameter in masked.named_parameters():
        facts = [(p.dtype, p.stride(), p.requires_grad) for p in (parameter, by_name[name])]
        assert facts[0] == facts[1], name
    by_name = {place.name: place.parameter for place in places(of_tied)}
    assert by_name["0.weight"] is by_name["1.weight"]
    assert len(list(of_tied.parameters())) == len(list(tied.parameters()))
    assert torch.equal(of_tied[1].weight, tied[1].weight)
    given = torch.ones(1, 4)
    assert torch.equal(of_tied(given), tied(given))


@pytest.mark.parametrize("to", ["buffers", "torch_prune", "parametrization"])
@pytest.mark.parametrize("layer", ["lstm", "attention"])
def test_layers_that_read_their_weights_in_ways_of_their_own(to, layer):
    if layer == "lstm":
        model: nn.Module = nn.LSTM(3, 4, num_layers=2)
        names = ["weight_ih_l0", "weight_hh_l1"]
        given: tuple[Tensor, ...] = (torch.randn(5, 2, 3),)
    else:
        model = nn.MultiheadAttention(4, 2)
        names = ["in_proj_weight"]
        given = (torch.randn(5, 2, 4),) * 3
    masked = apply_masks(model, {name: torch.rand(model.get_parameter(name).shape) < 0.5 for name in names})
    result = convert_masks(masked, to=to)
    back = convert_masks(result, to="buffers")
    for each in (result, back):
        assert torch.equal(each(*given)[0], masked(*given)[0])
    with torch.no_grad():
        for place in places(result):
            place.parameter.mul_(2)
        for parameter in masked.parameters():
            parameter.mul_(2)
    assert torch.equal(result(*given)[0], masked(*given)[0])


def test_a_layer_that_is_never_called_cannot_have_torchs_hook():
    model = nn.MultiheadAttention(4, 2)
    masked = apply_masks(model, {"out_proj.weight": torch.eye(4).bool()})
    with pytest.raises(SurgeryError, match=r"'out_proj.weight' is read by the attention around it"):
        convert_masks(masked, to="torch_prune")
    given = torch.randn(3, 1, 4)
    result = convert_masks(masked, to="parametrization")
    assert torch.equal(result(given, given, given)[0], masked(given, given, given)[0])


@pytest.mark.parametrize("to", TARGETS)
def test_tweaked_models_convert_and_are_tweaked_again(to):
    for form in ("buffers", "torch_prune"):
        tweaked = inject_skips(masked_rooted(form), strength=0.5)
        assert not torch.equal(tweaked(inputs()), masked_rooted(form)(inputs()))
        result = convert_masks(tweaked, to=to)
        again = swap_activations(result, "relu")
        for each in (result, again):
            assert torch.equal(each(inputs()), tweaked(inputs()))


def test_a_forward_rewritten_around_a_parametrization_keeps_it():
    tweaked = swap_activations(masked_rooted("FakeSparsity"), "silu")
    with pytest.raises(SurgeryError, match="convert the masks first, then tweak"):
        convert_masks(tweaked, to="buffers")
    assert torch.equal(convert_masks(tweaked, to="parametrization")(inputs()), tweaked(inputs()))


# ---------------------------------------------------------------------------------------------------------
# What is refused


def test_there_must_be_masks_and_a_known_form():
    with pytest.raises(ValueError, match=r"no masks to convert.*zeros=True"):
        convert_masks(small_model(), to="buffers")
    with pytest.raises(ValueError, match="unknown form 'dict': choose from 'buffers', 'torch_prune'"):
        convert_masks(prune(small_model(), 0.5), to="dict")


def test_a_zero_that_may_be_trained_is_no_mask():
    model = convert_masks(prune(small_model(), 0.5), to="zeros")
    model(torch.ones(2, 2, 5, 5)).square().sum().backward()
    with pytest.raises(SurgeryError, match=r"'0.weight' has \d+ exact zeros with a gradient"):
        convert_masks(model, to="buffers", zeros=True)
    model.zero_grad()
    assert set(find_masks(convert_masks(model, to="buffers", zeros=True))) == {"0.weight", "1.conv.weight"}
    nn.init.zeros_(model[1].conv.weight)
    with pytest.raises(SurgeryError, match=r"'1.conv.weight' is zero altogether"):
        convert_masks(model, to="buffers", zeros=True)


def test_a_mask_wins_over_the_zeros_it_keeps_which_plain_zeros_cannot_hold():
    model = prune(small_model(), 0.5)
    where = tuple(model[0].weight_mask.nonzero()[0])
    with torch.no_grad():
        model[0].weight[where] = 0
    assert find_masks(convert_masks(model, to="torch_prune", zeros=True))["0.weight"][where]
    with pytest.raises(SurgeryError, match=r"'0.weight' keeps 1 weights that are exactly zero"):
        convert_masks(model, to="zeros")


def test_masks_that_scale_or_sit_on_computed_weights_or_disagree_are_refused():
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", FakeSparsity(torch.eye(4) / 2))
    with pytest.raises(SurgeryError, match="4 values other than 0 and 1"):
        convert_masks(layer, to="buffers")
    layer = weight_norm(nn.Linear(4, 4))
    parametrize.register_parametrization(layer, "weight", FakeSparsity(torch.eye(4)))
    with pytest.raises(SurgeryError, match="is no parameter"):
        convert_masks(layer, to="buffers")
    model = tied_model()
    torch_prune.custom_from_mask(model[0], "weight", torch.eye(4))
    torch_prune.custom_from_mask(model[1], "weight", 1 - torch.eye(4))
    with pytest.raises(SurgeryError, match="two different masks"):
        convert_masks(model, to="buffers")


def test_weights_that_diverged_beneath_the_mask_are_refused_where_zeros_would_hide_them():
    layer = nn.Linear(4, 4)
    torch_prune.custom_from_mask(layer, "weight", torch.eye(4))
    with torch.no_grad():
        layer.weight_orig[0, 1] = float("inf")
    with pytest.raises(SurgeryError, match="1 weights beneath its mask that are not finite"):
        convert_masks(layer, to="buffers")
    convert_masks(layer, to="parametrization")


@pytest.mark.parametrize("form", [form for form in FORMS if form.startswith(("Fake", "Dense"))])
def test_the_given_model_keeps_its_parametrizations(form):
    """torch's copies share the class in which a parametrization lives."""
    model = masked_rooted(form)
    copied = copy.deepcopy(model)
    convert_masks(copied, to="buffers")
    assert parametrize.is_parametrized(copied, "weight")
    assert torch.equal(copied(inputs()), model(inputs()))


def test_from_torchs_form_too_the_order_and_the_optimizers_state_stay():
    norm = nn.BatchNorm1d(4)
    torch_prune.random_unstructured(norm, "weight", 1)
    optimizer = torch.optim.SGD(norm.parameters(), 0.1, momentum=0.9)
    norm(torch.randn(8, 4)).square().sum().backward()
    optimizer.step()
    for to in ("buffers", "zeros"):
        converted = convert_masks(norm, to=to)
        assert [name for name, _ in converted.named_parameters()] == ["bias", "weight"]  # torch put it last
        other = torch.optim.SGD(converted.parameters(), 0.1, momentum=0.9)
        other.load_state_dict(optimizer.state_dict())
        moved = other.state[converted.weight]["momentum_buffer"]
        assert torch.equal(moved, optimizer.state[norm.weight_orig]["momentum_buffer"])
