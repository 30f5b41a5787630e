"""Ghosts leave no trace and folded networks agree, on random networks that contain what breaks surgery.

`SPARSETWEAKS_FUZZ` is the number of networks over all tests of this file; 120 unless told otherwise.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from sparsetweaks.errors import NoEffectWarning
from sparsetweaks.masks import find_masks
from sparsetweaks.surgery.activations import swap_activations
from sparsetweaks.surgery.folding import fold
from sparsetweaks.surgery.ghosts import Ghost, anneal_ghosts, remove_ghosts
from sparsetweaks.surgery.programs import Rewritten, original_class
from sparsetweaks.surgery.sites import changes
from sparsetweaks.surgery.skips import Skip, inject_skips
from sparsetweaks.testing import (
    build,
    differences,
    example_batch,
    isolated_rng,
    masked_models,
    observe,
    snapshot,
    specs,
)

TESTS = 4
NETWORKS = int(os.environ.get("SPARSETWEAKS_FUZZ", "120"))
ROUNDING = 1e-5
"""A gradient of another memory format is summed in another order."""
drawn = settings(
    max_examples=max(1, NETWORKS // TESTS),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
SKIPS: dict[str, dict[str, Any]] = {
    "number": {"strength": 0.5},
    "learned": {},
    "ghost": {"ghost": True, "strength": 0.7},
    "norm": {"strength": 0.5, "norm": True},
    "projection": {"strength": 0.5, "shortcut": "projection"},
    "project-all": {"strength": 0.5, "shortcut": "project-all"},
}
skips = st.sampled_from(sorted(SKIPS))


def quietly(surgery: Any, *given: Any, **options: Any) -> Any:
    """A surgery on a model that may have no site."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)
        return surgery(*given, **options)


def haunted(model: nn.Module, norm: bool = False) -> nn.Module:
    skipped = quietly(inject_skips, model, ghost=True, norm=norm)
    return quietly(swap_activations, skipped, "swish", ghost=True)


def kinds(model: nn.Module) -> list[tuple[str, bool]]:
    """What each module is, by name: each copy of a parametrized layer may have a class of its own."""
    return [(original_class(each).__qualname__, isinstance(each, Rewritten)) for each in model.modules()]


def shake(model: nn.Module, seed: int) -> None:
    """Statistics, affine parameters and skips as after training: nothing is 0 or 1 by accident."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_buffers(), *model.named_parameters()]:
        if name.endswith("running_mean") or (".skip." in name and tensor.dim() > 0 and tensor.requires_grad):
            tensor.data.normal_(generator=generator)
        elif name.endswith("running_var"):
            tensor.data.uniform_(0.5, 2, generator=generator)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for parameter in module.parameters(recurse=False):
                parameter.data.uniform_(0.5, 1.5, generator=generator)


@drawn
@given(spec=specs(), training=st.booleans(), beside=st.booleans(), norm=st.booleans())
def test_ghosts_at_strength_0_are_removed_without_a_trace(spec, training, beside, norm):
    """`beside`: another surgery has rewritten some of the same forwards and must stay."""

    def given_model() -> nn.Module:
        model = build(spec)
        return (
            quietly(swap_activations, model, "mish", where=lambda site: "1" in site.path) if beside else model
        )

    model = given_model()
    ghost = haunted(model, norm)
    quietly(anneal_ghosts, ghost, 1.0)
    before = snapshot(ghost)
    back = quietly(remove_ghosts, ghost)
    assert differences(before, snapshot(ghost)) == []
    assert kinds(back) == kinds(model)
    assert list(back.state_dict()) == list(model.state_dict())
    batch = example_batch(spec)
    expected = observe(given_model(), batch, training=training)
    assert differences(expected, observe(back, batch, training=training)) == []
    assert (
        differences(expected, observe(ghost, batch, training=training), tolerance=ROUNDING, added=True) == []
    )


@drawn
@given(spec=specs(), progress=st.floats(0, 0.49))
def test_living_ghosts_are_all_reached_by_annealing_and_named_by_removal(spec, progress):
    ghost = haunted(build(spec))
    left = quietly(anneal_ghosts, ghost, progress)
    alive = [module.strength for module in ghost.modules() if isinstance(module, Ghost)]
    assert all(strength.item() == torch.tensor(left, dtype=strength.dtype).item() for strength in alive)
    forced = quietly(remove_ghosts, ghost, force=True)
    assert not any(isinstance(module, Ghost) for module in forced.modules())
    assert list(forced.state_dict()) == list(build(spec).state_dict())


@drawn
@given(spec=specs(), skip=skips, swapped=st.booleans())
def test_a_folded_network_computes_what_it_did(spec, skip, swapped):
    model = build(spec)
    if swapped:
        model = quietly(swap_activations, model, "mish")
    model = quietly(inject_skips, model, **SKIPS[skip]).double()
    shake(model, spec.seed)
    batch = example_batch(spec)
    batch = batch._replace(inputs=batch.inputs.double())
    with isolated_rng(spec.seed):
        before = snapshot(model)
        folded = quietly(fold, model)
        assert differences(before, snapshot(model)) == []
    named = {site.path: site.left for site in changes(folded)[-1].left}
    assert all(named.values())
    kept = dict(folded.named_modules())
    for path, module in model.named_modules():
        if isinstance(module, Skip):
            assert isinstance(kept.get(path), Skip) == (path in named)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and ".skip." not in path:
            assert type(kept[path]) is (type(module) if path in named else nn.Identity)

    def outputs(network: nn.Module) -> Any:
        seen = observe(network, batch, training=False)
        return type(seen)({key: value for key, value in seen.values.items() if "output" in key})

    expected = outputs(model)
    assert any(isinstance(value, torch.Tensor) for value in expected.values.values())
    assert differences(expected, outputs(folded), tolerance=1e-10) == []


@drawn
@given(masked=masked_models(), skip=skips)
def test_folding_keeps_masks_beneath_what_it_fills(masked, skip):
    model = quietly(inject_skips, masked.model, **SKIPS[skip])
    shake(model, 1)
    folded = quietly(fold, model)
    masks = find_masks(model)
    assert {name for name in masks if name.endswith("weight")} <= find_masks(folded).keys() <= masks.keys()
    for name, mask in find_masks(folded).items():
        grown = mask & ~masks[name]
        assert not (masks[name] & ~mask).any()
        if any(f"{each.name}.weight" == name for each in changes(folded)[-1].layers):
            assert not folded.get_parameter(name)[~mask].any()
            assert int(grown.sum()) <= mask.shape[0] * mask.shape[1]  # one tap of the kernel
