"""The strategies hold what they promise: every drawn network runs, and all the hazards are drawn."""

from __future__ import annotations

import collections
import os
import pickle
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsetweaks.testing import (
    ACTIVATIONS,
    BLOCKS,
    FORMS,
    HAZARDS,
    BlockSpec,
    Observation,
    Spec,
    batches,
    build,
    differences,
    example_batch,
    hazards,
    isolated_rng,
    mask_model,
    maskable_weights,
    masked_models,
    masks,
    models,
    observe,
    picklable,
    snapshot,
    specs,
)

SCALE = int(os.environ.get("SPARSETWEAKS_FUZZ", "600")) / 600
drawn = settings(
    max_examples=max(1, round(60 * SCALE)),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def test_every_hazard_is_in_at_least_one_percent_of_500_networks():
    counts: collections.Counter[str] = collections.Counter()
    total = 0

    @settings(drawn, max_examples=500)
    @given(spec=specs())
    def draw(spec):
        nonlocal total
        total += 1
        counts.update(hazards(spec))

    draw()
    assert total == 500
    assert set(counts) == HAZARDS
    assert {name: count for name, count in counts.items() if count < 5} == {}


@drawn
@given(spec=specs())
def test_networks_run_forward_and_backward_in_every_mode_and_twins_agree(spec):
    for training in (None, True, False):
        seen = observe(build(spec), example_batch(spec), training=training)
        again = observe(build(spec), example_batch(spec), training=training)
        assert differences(seen, again) == []
        assert all(bool(value.isfinite().all()) for value in seen.values.values() if torch.is_tensor(value))


@drawn
@given(spec=specs())
def test_the_head_gets_a_gradient_and_the_given_modes_hold(spec):
    model = build(spec)
    seen = observe(model, example_batch(spec), training=None)
    head = [name for name, _ in model.named_parameters()][-1]
    assert seen.values[f"gradient of {head}"].abs().sum() > 0
    assert model.training == ("eval_mode" not in spec.extras)


@drawn
@given(spec=specs())
def test_building_drawing_and_looking_leave_the_random_state(spec):
    before = random.getstate(), torch.get_rng_state()
    model = build(spec)
    looked = snapshot(model)
    observe(model, example_batch(spec, seed=3))
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert differences(looked, snapshot(model)) != []


@drawn
@given(spec=specs())
def test_networks_pickle_where_torch_can(spec):
    model, batch = build(spec), example_batch(spec)
    if not picklable(spec):
        with pytest.raises(RuntimeError, match="parametrized"):
            pickle.dumps(model)
        return
    loaded = pickle.loads(pickle.dumps(model))
    assert differences(observe(model, batch), observe(loaded, batch)) == []


@settings(drawn, max_examples=max(1, round(30 * SCALE)))
@given(data=st.data())
def test_masks_fit_and_masked_networks_have_zeros_in_every_form(data):
    masked = data.draw(masked_models())
    weights = {name: masked.model.get_submodule(name.rpartition(".")[0]).weight for name in masked.masks}
    for name, mask in masked.masks.items():
        assert mask.dtype == torch.bool
        assert mask.shape == weights[name].shape
        assert bool((weights[name][~mask] == 0).all())
        owner, _, weight = name.rpartition(".")
        stored = {"zeros": name, "parametrization": f"{owner}.parametrizations.{weight}.0.mask"}
        assert stored.get(masked.form, f"{name}_mask") in masked.model.state_dict()
    inputs, targets = data.draw(batches(masked.model))
    assert len(inputs) == len(targets)
    observe(masked.model, example_batch(masked.model.spec))


def test_masks_are_empty_full_and_random():
    densities = set()

    @settings(drawn, max_examples=100)
    @given(mask=masks(build(Spec())))
    def draw(mask):
        densities.update(float(each.float().mean()) for each in mask.values())

    draw()
    assert {0.0, 1.0} < densities


def test_the_classifier_and_computed_weights_are_not_maskable():
    flat = build(Spec(network="mlp", blocks=(BlockSpec(), BlockSpec(layer="weight_norm"))))
    assert list(maskable_weights(flat)) == ["stem.weight", "blocks.0.conv.weight"]
    tied = build(Spec(blocks=(BlockSpec(form="tied_weights"),)))
    assert "blocks.0.conv2.weight" in maskable_weights(tied)
    assert "blocks.0.conv3.weight" not in maskable_weights(tied)


@pytest.mark.parametrize("form", BLOCKS)
def test_every_form_can_be_built_with_every_activation(form):
    for activation in ACTIVATIONS:
        spec = Spec(blocks=(BlockSpec(form=form, activation=activation),))
        assert f"form: {form}" in hazards(build(spec))
        build(spec)(example_batch(spec).inputs)


def test_differences_finds_each_kind_of_change():
    def changed(change, model=None):
        model = model or build(Spec(extras=("gradients", "block_hook")))
        before = snapshot(model)
        change(model)
        return differences(before, snapshot(model))

    assert changed(lambda model: None) == []
    assert changed(lambda model: model.stem.weight.data.mul_(2))
    assert changed(lambda model: model.stem.weight.grad.mul_(2))
    assert changed(lambda model: model.stem.requires_grad_(False))
    assert changed(lambda model: model.stem.eval())
    assert changed(lambda model: model.blocks[0]._forward_hooks.clear())
    assert changed(lambda model: setattr(model, "note", 1))
    assert changed(lambda model: setattr(model, "head", torch.nn.Linear(4, 3)))
    assert changed(lambda model: setattr(model.stem, "weight", torch.nn.Parameter(model.stem.weight.data)))
    with isolated_rng(0):
        assert changed(lambda model: torch.rand(1))
        assert changed(lambda model: random.random())


def test_differences_of_values():
    nan = torch.tensor([float("nan"), 1.0])
    assert differences(Observation({"a": nan}), Observation({"a": nan.clone()})) == []
    assert differences(Observation({"a": nan}), Observation({"a": torch.tensor([0.0, 1.0])}))
    near = Observation({"a": torch.tensor([1.0])}), Observation({"a": torch.tensor([1.0 + 1e-6])})
    assert differences(*near)
    assert differences(*near, tolerance=1e-5) == []
    assert differences(Observation({"a": 1}), Observation({})) == ["a: gone"]
    assert differences(Observation({}), Observation({"a": 1}), added=True) == []


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"sparsetweaks\.testing\.build"):
        hazards(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match=", ".join(FORMS)):
        mask_model(build(Spec()), {}, "csr")


@settings(drawn, max_examples=5)
@given(model=models(max_blocks=1))
def test_models_carry_their_spec(model):
    assert len(model.spec.blocks) == 1
    assert hazards(model) == hazards(model.spec)
