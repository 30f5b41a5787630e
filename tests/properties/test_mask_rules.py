"""Masks live through every surgery, copy, save and optimizer step, in the form in which they came.

`SPARSETWEAKS_FUZZ` is the number of networks over all tests of this file and `test_surgery.py`; 600 unless told.
"""

from __future__ import annotations

import copy
import os
import warnings
from typing import Any

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsetweaks.converting import convert_masks
from sparsetweaks.errors import NoEffectWarning
from sparsetweaks.masks import apply_masks, find_masks, masks_by_parameter
from sparsetweaks.surgery.activations import swap_activations
from sparsetweaks.surgery.skips import inject_skips
from sparsetweaks.testing import (
    Observation,
    build,
    differences,
    example_batch,
    isolated_rng,
    mask_model,
    masked_models,
    masks,
    observe,
    snapshot,
    specs,
)

TARGETS = ("buffers", "torch_prune", "parametrization")
NETWORKS = int(os.environ.get("SPARSETWEAKS_FUZZ", "600"))
drawn = settings(
    max_examples=max(1, NETWORKS // 24),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def tweak(model: nn.Module) -> nn.Module:
    """Both architecture tweaks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)
        return swap_activations(inject_skips(model, strength="learned", norm=True), "silu")


def weight(model: nn.Module, name: str) -> Tensor:
    owner, _, parameter = name.rpartition(".")
    return getattr(model.get_submodule(owner), parameter)


@drawn
@given(masked=masked_models())
def test_a_masked_model_copies_after_it_has_run(masked):
    observe(masked.model, example_batch(masked.model.spec))
    result = tweak(masked.model)
    for name, mask in masked.masks.items():
        assert bool((weight(result, name)[~mask] == 0).all())
    if masked.form != "torch_prune":  # torch's own copy of those fails after a forward
        assert set(copy.deepcopy(result).state_dict()) == set(result.state_dict())


@drawn
@given(data=st.data(), spec=specs())
def test_applied_masks_are_found_again_and_change_nothing_else(data, spec):
    model = build(spec)
    chosen = data.draw(masks(model))
    assume(chosen)
    with isolated_rng(0):
        before = snapshot(model)
        result = apply_masks(model, chosen)
        assert differences(before, snapshot(model)) == []
    found = find_masks(result)
    assert {name: mask.tolist() for name, mask in found.items()} == {
        name: mask.tolist() for name, mask in chosen.items()
    }
    twin = mask_model(build(spec), chosen, "buffers")
    batch = example_batch(spec)
    assert differences(observe(twin, batch), observe(result, batch)) == []


@drawn
@given(
    masked=masked_models(forms=("buffers", "torch_prune")), to=st.sampled_from(TARGETS), tweaked=st.booleans()
)
def test_masks_move_between_forms_and_back_without_changing_the_function(masked, to, tweaked):
    assume(masked.masks)
    given_model = tweak(masked.model) if tweaked else masked.model
    before = snapshot(given_model)
    with isolated_rng(0):
        there = convert_masks(given_model, to=to)
        back = convert_masks(there, to="buffers")
        assert differences(before, snapshot(given_model)) == []
    for model in (there, back):
        kept = masks_by_parameter(model).values()
        assert [mask.tolist() for mask in kept] == [
            mask.tolist() for mask in masks_by_parameter(given_model).values()
        ]
        assert all(torch.equal(find_masks(model)[name], mask) for name, mask in masked.masks.items())
    batch = example_batch(masked.model.spec)
    seen = [kept_values(observe(model, batch), masked.masks) for model in (given_model, there, back)]
    assert seen[0] == seen[1] == seen[2]


def kept_values(seen: Observation, masks: dict[str, Tensor]) -> dict[str, Any]:
    """What was observed, by names that all forms share, and of the gradients only those of kept weights."""
    values = {}
    for name, value in seen.values.items():
        if name.endswith((".mask", "_mask")):
            continue
        name = name.replace("parametrizations.", "").removesuffix(".original").removesuffix("_orig")
        mask = masks.get(name.removeprefix("gradient of "))
        if mask is not None and value is not None:
            value = value[mask]
        values[name] = value.tolist() if isinstance(value, Tensor) else value
    return values
