"""The ground rules that concern every public function at once, and what no single module's tests look at."""

from __future__ import annotations

import inspect
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsetweaks as st

POSITIONAL = {
    "apply_masks": 2,
    "distillation_loss": 3,
    "find_layer_scales": 2,
    "anneal_ghosts": 2,
    "cost": 2,
    "diff": 2,
    "export": 2,
    "match_budget": 2,
    "verify": 2,
    "keep_masks": 2,  # and the rest: any number of optimizers
    "learn_layer_scales": 2,
    "prune": 2,
    "rewind": 2,
    "scale_layers": 2,
    "smooth_labels": 2,
    "swap_activations": 2,
    "tweak": 2,
}
"""How many arguments may be given by position; one, the model, for every other function."""


def functions() -> list[str]:
    return [name for name in st.__all__ if inspect.isfunction(getattr(st, name))]


def unit() -> nn.Sequential:
    layers = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()
    return nn.Sequential(*layers)


@pytest.mark.parametrize("name", functions())
def test_options_are_keyword_only(name):
    parameters = list(inspect.signature(getattr(st, name)).parameters.values())
    by_position = [each for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
    assert len(by_position) <= POSITIONAL.get(name, 1), f"{name}{inspect.signature(getattr(st, name))}"


def test_a_factory_that_draws_random_numbers_leaves_the_random_state():
    model, state = unit(), torch.get_rng_state()
    st.swap_activations(model, lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.Tanh()))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("training", [True, False])
def test_new_modules_are_in_the_mode_of_what_they_stand_beside(training):
    model = unit().train(training)
    tweaked = st.swap_activations(st.inject_skips(model, norm=True), lambda: nn.Sequential(nn.Tanh()))
    assert isinstance(tweaked[0].skip.norm, nn.BatchNorm2d)
    assert {module.training for module in tweaked.modules()} == {training}


@pytest.mark.parametrize("surgery", ["inject_skips", "swap_activations", "scale_layers"])
def test_every_surgery_keeps_the_masks(surgery):
    model = st.prune(unit(), 0.5, include="0")
    made = {
        "inject_skips": lambda: st.inject_skips(model, shortcut="project-all"),
        "swap_activations": lambda: st.swap_activations(model, "silu"),
        "scale_layers": lambda: st.scale_layers(model, {"0.weight": 3.0}),
    }[surgery]()
    assert torch.equal(st.find_masks(made)["0.weight"], st.find_masks(model)["0.weight"])
    assert torch.equal(made[0].weight == 0, model[0].weight == 0)


class DropsPaths(nn.Module):
    """Draws while it is traced, from both generators."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x) * (random.random() + torch.rand(1))


def test_a_forward_that_draws_random_numbers_leaves_the_random_states():
    state, python_state = torch.get_rng_state(), random.getstate()
    with pytest.warns(st.NoEffectWarning):
        st.swap_activations(DropsPaths(), "silu")
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python_state


@pytest.mark.parametrize("surgery", ["inject_skips", "swap_activations", "scale_layers"])
def test_every_surgery_keeps_frozen_parameters_frozen(surgery):
    model = unit()
    model[0].weight.requires_grad_(False)
    made = {
        "inject_skips": lambda: st.inject_skips(model),
        "swap_activations": lambda: st.swap_activations(model, "silu"),
        "scale_layers": lambda: st.scale_layers(model, {"0.weight": 3.0}),
    }[surgery]()
    assert not made[0].weight.requires_grad and made[1].weight.requires_grad


class Branching(nn.Module):
    """Has layers of its own, and a forward that no tracer can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) if x.sum() > 0 else -self.layer(x)


class Outer(nn.Module):
    """A forward to rewrite around a child that must be called, hooks and all, and not read."""

    def __init__(self) -> None:
        super().__init__()
        self.child = Branching()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.child(x))


def test_a_child_is_called_and_not_read_where_its_parent_is_rewritten():
    model, x = Outer(), torch.randn(2, 3)
    model.child.register_forward_hook(lambda module, inputs, output: 2 * output)
    made = st.swap_activations(model, "silu")
    assert torch.equal(made(x), F.silu(model.child(x)))
    assert type(made.child) is Branching
