"""Activation sparsity against counts by hand, in every form in which a forward computes activations."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsetweaks as st
from sparsetweaks.analysis.activations import activation_sparsity

GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randn(6, 3, 5, 5, generator=GENERATOR)
DATA = (INPUTS, torch.zeros(6))


class Forms(nn.Module):
    """One activation in each form, in place and not, a module called twice, and one within a child."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU6())

    def forward(self, x):
        a = self.act(self.conv(x))
        b = F.relu(self.inner(a) - 0.5)
        c = torch.relu(b - 0.1)
        d = (c - 0.2).relu_()
        e = self.act(d - 0.3)
        return F.leaky_relu(e - 0.1, 0.01).flatten(1)

    def by_hand(self, x):
        conv = self.conv(x)
        a = conv.clamp(min=0)
        inner = self.inner[0](a).clamp(0, 6)
        b = (inner - 0.5).clamp(min=0)
        c = (b - 0.1).clamp(min=0)
        d = (c - 0.2).clamp(min=0)
        e = (d - 0.3).clamp(min=0)
        f = torch.where(e - 0.1 >= 0, e - 0.1, 0.01 * (e - 0.1))
        return {
            "act": [a, e],
            "inner.1": [inner],
            "relu": [b],
            "relu_1": [c],
            "relu_2": [d],
            "leaky_relu": [f],
        }


@pytest.mark.parametrize("cut", [None, 1, 4])
def test_every_form_is_counted_once_and_right(cut):
    model = Forms()
    found = activation_sparsity(model, DATA, threshold=0.05, chunk_size=cut)
    with torch.no_grad():
        known = model.by_hand(INPUTS)
    assert {site.site for site in found.sites} == set(known)
    for site in found.sites:
        outputs = known[site.site]
        assert site.values == sum(each.numel() for each in outputs)
        assert site.zeros == sum(int((each == 0).sum()) for each in outputs)
        assert site.near_zeros == sum(int((each.abs() <= 0.05).sum()) for each in outputs)
        assert site.units == 4 * len(outputs)
        assert site.dead == sum(int((each == 0).all(0).flatten(1).all(1).sum()) for each in outputs)
    assert found.examples == 6


def test_sites_are_those_that_find_activations_names():
    sites = {site.path for site in st.find_activations(Forms())}
    assert {site.site for site in activation_sparsity(Forms(), DATA).sites} >= sites - {"relu_", "relu__1"}
    assert len(activation_sparsity(Forms(), DATA).sites) == len(sites)


SWAPS = {
    "silu": "silu",
    "gelu": "gelu",
    "prelu": nn.PReLU,
    "function": torch.square,
    "module": nn.Softplus(beta=3),
}


@pytest.mark.parametrize("to", SWAPS)
def test_swapped_sites_are_still_the_sites(to):
    swapped = st.swap_activations(Forms(), SWAPS[to])
    before, after = (activation_sparsity(model, DATA) for model in (Forms(), swapped))
    assert len(after.sites) == len(before.sites)
    assert sum(site.values for site in after.sites) == sum(site.values for site in before.sites)


def test_a_ghost_counts_as_the_activation_that_it_is():
    ghost = st.swap_activations(Forms(), "swish", ghost=True)
    found = activation_sparsity(ghost, DATA)
    assert len(found.sites) == len(activation_sparsity(Forms(), DATA).sites)
    skipped = st.inject_skips(Forms(), ghost=True)
    assert len(activation_sparsity(skipped, DATA).sites) == len(found.sites)


def test_smooth_activations_are_near_zero_but_hardly_ever_zero():
    relu = activation_sparsity(Forms(), DATA)
    smooth = activation_sparsity(st.swap_activations(Forms(), "swish"), DATA)
    assert relu.zeros > 0.3 and smooth.zeros == 0
    assert relu.near_zeros >= relu.zeros and smooth.near_zeros > 0


def test_dead_units_of_linear_layers_and_of_tokens():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 5)

        def forward(self, x):
            return F.relu(self.layer(x))

    model = Tokens()
    with torch.no_grad():
        model.layer.bias[:2] = -100
        model.layer.bias[2:] = 100
    for shape in ((7, 3), (2, 4, 3)):
        (site,) = activation_sparsity(model, (torch.ones(shape), torch.zeros(shape[0]))).sites
        assert (site.units, site.dead) == (5, 2)


def test_a_unit_that_lives_in_one_batch_is_not_dead():
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU())
    with torch.no_grad():
        model[0].weight[:] = torch.tensor([[1.0], [-1.0]])
    batches = [(torch.tensor([[1.0]]), torch.zeros(1)), (torch.tensor([[-1.0]]), torch.zeros(1))]
    assert activation_sparsity(model, batches).dead == 0
    assert activation_sparsity(model, batches[:1]).dead == 1


def test_stages_add_up():
    import torchvision

    model = torchvision.models.resnet18(num_classes=4)
    found = activation_sparsity(model, (torch.randn(1, 3, 32, 32), torch.zeros(1)))
    rows = found.table(by="stage")
    assert [row["stage"] for row in rows] == ["relu", "layer1", "layer2", "layer3", "layer4"]
    assert sum(row["values"] for row in rows) == sum(site.values for site in found.sites)
    assert rows[1]["values"] == 4 * 64 * 8 * 8
    with pytest.raises(ValueError, match="by must be"):
        found.table(by="depth")


def test_the_model_is_only_read_and_the_figure_is_its_own():
    model = Forms().train()
    state, hooks = torch.get_rng_state(), [len(m._forward_hooks) for m in model.modules()]
    found = activation_sparsity(model, DATA)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert hooks == [len(m._forward_hooks) for m in model.modules()]
    figure = found.plot()
    assert figure.axes[0].get_xlabel() == "activations, %"
    assert "exactly zero" in str(found) and "inner.1" in str(found)


def test_a_threshold_is_any_real_number():
    found = [
        activation_sparsity(Forms(), DATA, threshold=each) for each in (np.float32(0.25), Fraction(1, 4))
    ]
    assert [type(each.threshold) for each in found] == [float, float]
    assert {each.threshold for each in found} == {0.25} and "at most 0.25" in str(found[0])


class Casting(nn.Module):
    """Two precisions, and a forward that knows."""

    def __init__(self):
        super().__init__()
        self.first, self.act, self.second = nn.Linear(3, 4).bfloat16(), nn.ReLU(), nn.Linear(4, 2)

    def forward(self, inputs):
        return self.second(self.act(self.first(inputs.bfloat16())).float())


def test_a_model_runs_in_its_own_precision():
    model, inputs = Casting(), torch.randn(20, 3)
    found = activation_sparsity(model, (inputs, torch.zeros(20)))
    assert found.sites[0].zeros == int((model.act(model.first(inputs.bfloat16())) == 0).sum())


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="no activation was seen"):
        activation_sparsity(nn.Linear(2, 2), (torch.ones(1, 2), torch.ones(1)))
    for threshold in (float("nan"), -1, "0.1", None, True, False, 1j, [0.1]):
        with pytest.raises(ValueError, match="threshold must be at least 0"):
            activation_sparsity(Forms(), DATA, threshold=threshold)
    with pytest.raises(ValueError, match="the model fails on these inputs"):
        activation_sparsity(Forms(), (torch.ones(1, 7), torch.ones(1)))
    with pytest.raises(ValueError, match="no batch"):
        activation_sparsity(Forms(), [])
    broken = Forms()
    nn.init.constant_(broken.conv.weight, float("nan"))
    with pytest.raises(ValueError, match=r"'conv.weight' holds values that are not finite"):
        activation_sparsity(broken, DATA)


class SameName(nn.Module):
    """A function called beside a module that has the function's name."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.relu = nn.Linear(3, 4), nn.Linear(4, 5), nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.b(self.relu(self.a(x))))


def test_a_call_and_a_module_of_one_name_are_two_sites():
    model = SameName()
    nn.init.constant_(model.b.bias, -100.0)
    found = activation_sparsity(model, (torch.randn(3, 3), None))
    assert [(site.site, site.kind, site.dead) for site in found.sites] == [
        ("relu", "gelu", 0),
        ("relu_1", "relu", 5),
    ]
    assert [site.path for site in st.find_activations(model)] == ["relu_1"]
