"""Every public function reads masks in every form, and keeps each in its own."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from small_models import (
    FORMS_AND_OURS,
    NAMES,
    every_second,
    forms_of,
    inputs,
    masked_rooted,
    masks_of_rooted,
    rooted,
    same,
    small_model,
    snapshot,
    tied_model,
)
from torch import Tensor, nn
from torch.ao.pruning import FakeSparsity, WeightNormSparsifier
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune
from torch.nn.utils.parametrizations import weight_norm

from sparsetweaks.counting import sparsity
from sparsetweaks.errors import SurgeryError
from sparsetweaks.forms import erase, masked_places
from sparsetweaks.keeping import keep_masks
from sparsetweaks.masks import apply_masks, find_masks, rewind
from sparsetweaks.pruning import prune
from sparsetweaks.recipe.layer_scales import learn_layer_scales, scale_layers
from sparsetweaks.surgery.activations import swap_activations
from sparsetweaks.surgery.skips import inject_skips


def batch() -> tuple[Tensor, Tensor]:
    return inputs(), torch.tensor([0, 1, 2, 0])


def visible_weight(model: nn.Module, name: str) -> Tensor:
    owner, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(owner), attribute)


FUNCTIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "inject_skips": inject_skips,
    "swap_activations": lambda model: swap_activations(model, "relu"),
    "learn_layer_scales": lambda model: learn_layer_scales(model, batch(), iterations=0),
    "rewind": lambda model: rewind(model, rooted()),
    "apply_masks": lambda model: apply_masks(model, find_masks(model)),
    "prune": lambda model: prune(model, 0.0, of="remaining"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("form", FORMS_AND_OURS)
def test_each_function_keeps_masks_forms_names_and_the_function(form, name):
    model = masked_rooted(form)
    before = snapshot(model)
    result = FUNCTIONS[name](model)
    assert same(snapshot(model), before)
    assert same(find_masks(result), find_masks(model))
    assert {key: find_masks(model)[key].tolist() for key in NAMES} == {
        key: mask.tolist() for key, mask in masks_of_rooted().items()
    }
    assert forms_of(result) == forms_of(model)
    assert set(before) <= set(snapshot(result))
    assert torch.equal(result(inputs()), model(inputs()))


@pytest.mark.parametrize("form", FORMS_AND_OURS)
def test_masks_shrink_in_each_form_and_the_zeros_are_in_the_weight(form):
    model = masked_rooted(form)
    smaller = {name: mask & every_second(mask) for name, mask in masks_of_rooted().items()}
    result = apply_masks(model, smaller)
    result(inputs())
    assert {name: mask.tolist() for name, mask in find_masks(result).items()} == {
        name: smaller[name].tolist() for name in find_masks(model)
    }
    for name, mask in smaller.items():
        assert torch.equal(visible_weight(result, name), visible_weight(model, name) * mask)
        assert bool((visible_weight(model, name) != 0).eq(masks_of_rooted()[name]).all())
    assert sparsity(result).kept == sum(
        int(smaller[layer.name].sum()) if layer.masked else layer.weights for layer in sparsity(result).layers
    )


@pytest.mark.parametrize("form", FORMS_AND_OURS)
def test_training_and_scaling_hold_the_masks_in_each_form(form):
    model = scale_layers(masked_rooted(form), {"conv.weight": 2.0}).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    with keep_masks(model, optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs()), batch()[1]).backward()
            for place in masked_places(model):
                assert not place.parameter.grad[~place.mask()].any()
                assert place.parameter.grad[place.mask()].any()
            optimizer.step()
    model(inputs())
    for name, mask in masks_of_rooted().items():
        assert torch.equal(visible_weight(model, name) != 0, mask)


def test_a_sparsifier_of_torch_ao_goes_on_and_squashes_its_masks():
    model = small_model()
    sparsifier = WeightNormSparsifier(sparsity_level=0.5, sparse_block_shape=(1, 4), zeros_per_block=4)
    sparsifier.prepare(model, [{"tensor_fqn": "4.weight"}])
    assert find_masks(model)["4.weight"].all()
    sparsifier.step()
    mask = find_masks(model)["4.weight"]
    assert 0 < mask.sum() < mask.numel()
    ticket = swap_activations(model, "silu")
    assert same(find_masks(ticket), find_masks(model))
    assert "4.parametrizations.weight.0.mask" not in ticket.state_dict()  # torch leaves it out, so:
    assert torch.equal(find_masks(rewind(ticket, small_model(seed=7)))["4.weight"], mask)
    sparsifier.squash_mask()
    assert torch.equal(find_masks(model, zeros=True).get("4.weight", mask), mask)
    assert torch.equal(ticket[4].weight != 0, mask)  # the ticket did not lose its parametrization


def test_a_mask_on_a_computed_weight_is_refused():
    model = small_model()
    weight_norm(model[1].conv)
    assert find_masks(model) == {}
    parametrize.register_parametrization(model[1].conv, "weight", FakeSparsity(torch.ones(4, 4, 3, 3)))
    for function in (find_masks, sparsity):
        with pytest.raises(
            SurgeryError, match=r"'1.conv.weight' .*_WeightNorm and FakeSparsity\) compute it"
        ):
            function(model)
    with pytest.raises(
        SurgeryError, match=r"'1.conv.weight' is not a parameter: a parametrization computes it"
    ):
        prune(model, 0.5)
    swap_activations(model, "silu")  # which does not read masks goes on
    with pytest.raises(SurgeryError, match="is not a parameter: a parametrization computes it"):
        apply_masks(weight_norm(nn.Linear(2, 2)), {"weight": torch.ones(2, 2, dtype=torch.bool)})


def test_a_parametrization_whose_mask_does_not_mask_is_refused():
    class Inverted(FakeSparsity):
        def forward(self, x: Tensor) -> Tensor:
            return x * (1 - self.mask)

    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", Inverted(torch.eye(4)))
    with pytest.raises(SurgeryError, match=r"12 of its weights survive .*is 1 pruned there"):
        find_masks(layer)


def test_pruning_inside_a_parametrization_is_read():
    layer = weight_norm(nn.Linear(4, 4))
    torch_prune.l1_unstructured(layer.parametrizations.weight, "original1", amount=0.5)
    masks = find_masks(layer)
    assert list(masks) == ["parametrizations.weight.original1"]
    assert int(masks["parametrizations.weight.original1"].sum()) == 8


@pytest.mark.parametrize(
    "use",
    [
        sparsity,
        lambda model: prune(model, 0.9, include="*"),
        lambda model: keep_masks(model, torch.optim.SGD(model.parameters(), lr=0.1)).__enter__(),
        lambda model: apply_masks(model, {"2.weight": torch.ones(2, 4, dtype=torch.bool)}),
    ],
    ids=["sparsity", "prune", "keep_masks", "apply_masks"],
)
def test_a_tied_weight_with_two_masks_or_half_a_mask_is_refused(use):
    half = tied_model()
    torch_prune.custom_from_mask(half[0], "weight", torch.eye(4))
    with pytest.raises(
        SurgeryError, match=r"'0.weight' and '1.weight' are one tied weight, masked under its first"
    ):
        use(half)
    two = copy.deepcopy(tied_model())
    torch_prune.custom_from_mask(two[0], "weight", torch.eye(4))
    torch_prune.custom_from_mask(two[1], "weight", 1 - torch.eye(4))
    assert set(find_masks(two)) == {"0.weight", "1.weight"}  # reading tells what is there
    with pytest.raises(SurgeryError, match="two different masks"):
        use(two)
    one = tied_model()
    torch_prune.custom_from_mask(one[0], "weight", torch.eye(4))
    torch_prune.custom_from_mask(one[1], "weight", torch.eye(4))
    use(one)


def test_a_mask_of_a_network_that_was_made_smaller_is_refused():
    for form in ("buffers", "torch_prune", "FakeSparsity"):
        model = nn.Sequential(nn.Linear(4, 6))
        FORMS_AND_OURS[form](model[0], "weight", torch.ones(6, 4, dtype=torch.bool))
        place = masked_places(model)[0]
        place.parameter.data = place.parameter.data[:3]
        for function in (find_masks, sparsity):
            with pytest.raises(
                SurgeryError, match=r"shape \(6, 4\), but its weight has \(3, 4\): a network is to be"
            ):
                function(model)


def test_buffers_that_are_no_masks_are_left_alone():
    layer = nn.Linear(4, 4)
    layer.register_buffer(
        "weight_mask", torch.ones(1, 4, dtype=torch.bool)
    )  # smaller than what it would mask
    layer.register_buffer("bias_mask", torch.ones(1, 4, dtype=torch.bool))
    assert find_masks(layer) == {}


def test_scripted_modules_are_read_and_refuse_new_masks():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated in some versions
        model = nn.Sequential(nn.Conv2d(2, 2, 3), torch.jit.script(prune(nn.Linear(4, 4), 0.5)))
    assert set(find_masks(model)) == {"1.weight"}
    assert sparsity(prune(model, 0.5)).layers[0].sparsity == 0.5
    smaller = find_masks(model)["1.weight"] & every_second(torch.ones(4, 4))
    assert same(find_masks(apply_masks(model, {"1.weight": smaller})), {"1.weight": smaller})
    with pytest.raises(SurgeryError, match="scripted module, which takes no new buffer"):
        apply_masks(model, {"1.bias": torch.ones(4, dtype=torch.bool)})


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.complex64,
        torch.complex128,
        torch.int8,
    ],
)
def test_erasing_leaves_exact_zeros_whatever_was_there(dtype: torch.dtype) -> None:
    values = torch.tensor(
        [1.0, -2.0, 3.0, -4.0] if dtype == torch.int8 else [math.nan, -2.0, -math.inf, -4.0]
    )
    tensor, mask = values.to(dtype).reshape(2, 2).t(), torch.tensor([[False, False], [False, True]])
    same, version = tensor, tensor._version
    erase(tensor, mask)
    assert tensor is same and tensor._version > version  # whoever saved it for a backward pass hears of it
    assert tensor.tolist() == [[0, 0], [0, -4]]
    if dtype.is_floating_point:
        assert not tensor[~mask].signbit().any()
