"""Where the units lie behind layers of every kind of layout, by networks whose dead units are known."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsetweaks as st
from sparsetweaks.analysis.activations import activation_sparsity
from sparsetweaks.analysis.comparing import compare

DEAD, UNITS = 2, 5


def with_dead_units(layer: nn.Module) -> nn.Module:
    """Its first units put out -1 and the others 1, whatever comes in."""
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.fill_(1)
        layer.bias[:DEAD] = -1
    return layer


class Network(nn.Module):
    """A layer, and a function of it and the input."""

    def __init__(self, layer, function):
        super().__init__()
        self.layer, self.function = with_dead_units(layer), function

    def forward(self, x):
        return self.function(self.layer, x)


def units_of(layer, shape, function):
    (site,) = activation_sparsity(Network(layer, function), (torch.ones(shape), torch.zeros(shape[0]))).sites
    return site.units, site.dead


IMAGE, TOKENS = (2, 3, 4, 4), (2, 7, 3)
KNOWN = {
    "images": (nn.Conv2d(3, 5, 1), IMAGE, lambda layer, x: layer(x).relu()),
    "one image": (nn.Conv2d(3, 5, 1), (3, 4, 4), lambda layer, x: layer(x).relu()),
    "sequences": (nn.Conv1d(7, 5, 1), TOKENS, lambda layer, x: layer(x).relu()),
    "volumes, transposed": (nn.ConvTranspose3d(3, 5, 1), (2, 3, 2, 2, 2), lambda layer, x: layer(x).relu()),
    "tokens": (nn.Linear(3, 5), TOKENS, lambda layer, x: layer(x).relu()),
    "channels last": (nn.Linear(3, 5), (2, 4, 4, 3), lambda layer, x: F.relu(layer(x))),
    "embedded": (nn.Linear(3, 5), (2, 4, 4, 3), lambda layer, x: layer(x).permute(0, 3, 1, 2).relu()),
    "patches": (nn.Conv2d(3, 5, 2), IMAGE, lambda layer, x: layer(x).flatten(2).transpose(1, 2).relu()),
    "pooled": (
        nn.Conv2d(3, 5, 1),
        IMAGE,
        lambda layer, x: F.adaptive_avg_pool2d(layer(x), 1).flatten(1).relu(),
    ),
    "dropped and added": (
        nn.Conv2d(3, 5, 1),
        IMAGE,
        lambda layer, x: (F.dropout(layer(x), 0.5, False) + 0.1).relu_(),
    ),
    "half of a gate": (nn.Linear(3, 5), TOKENS, lambda layer, x: layer(x).chunk(2, 1)[0].relu()),
    "joined": (nn.Linear(3, 5), TOKENS, lambda layer, x: torch.cat([layer(x), layer(x)], 1).relu()),
    "functional layer": (
        nn.Linear(3, 5),
        TOKENS,
        lambda layer, x: F.linear(x, layer.weight, layer.bias).relu(),
    ),
    "product": (
        nn.Linear(3, 5),
        TOKENS,
        lambda layer, x: torch.addmm(layer.bias, x.view(-1, 3), layer.weight.t()).view(2, 7, 5).relu(),
    ),
    "normalised in another layout": (
        nn.Conv2d(3, 5, 1),
        IMAGE,
        lambda layer, x: (
            F.layer_norm(layer(x).permute(0, 2, 3, 1), (5,)) * 0 + layer(x).movedim(1, 3)
        ).relu(),
    ),
}


@pytest.mark.parametrize("case", KNOWN)
def test_units_lie_where_their_layer_puts_them(case):
    assert units_of(*KNOWN[case]) == (UNITS, DEAD)


UNKNOWN = {
    "merged with positions": (nn.Conv2d(3, 5, 1), IMAGE, lambda layer, x: layer(x).flatten(1).relu()),
    "merged with examples": (nn.Linear(3, 5), (2, 3), lambda layer, x: layer(x).flatten().relu()),
    "one of them taken": (nn.Linear(3, 5), (2, 3), lambda layer, x: layer(x)[:, 0].relu()),
    "shuffled": (nn.Linear(3, 5), (5, 3), lambda layer, x: torch.einsum("nc->cn", layer(x)).relu()),
    "numbers that leave the tensor": (
        nn.Linear(3, 5),
        (2, 3),
        lambda layer, x: torch.tensor(layer(x).tolist()).relu(),
    ),
    "no layer": (nn.Linear(3, 5), (2, 3), lambda layer, x: layer(x.relu())),
    "layouts that disagree": (
        nn.Linear(5, 5),
        (5, 5),
        lambda layer, x: (layer(x) + layer(x).transpose(0, 1)).relu(),
    ),
    "a single number": (nn.Linear(3, 5), (2, 3), lambda layer, x: layer(x).sum().relu()),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_is_not_known_is_not_said(case):
    assert units_of(*UNKNOWN[case]) == (None, None)


def test_an_activation_module_of_any_making_has_the_units_of_what_enters():
    class Own(nn.Module):
        def forward(self, x):
            return torch.tensor(x.tolist()).clamp(min=0)

    network = nn.Sequential(with_dead_units(nn.Conv2d(3, 5, 1)), nn.ReLU(), nn.Hardtanh(0, 1))
    found = activation_sparsity(st.swap_activations(network, Own), (torch.ones(IMAGE), torch.zeros(2)))
    assert [(site.units, site.dead) for site in found.sites] == [(5, 2), (5, 2)]


def test_a_layer_norm_over_channels_first_is_no_layer_of_last_units():
    import torchvision

    model = torchvision.models.convnext.CNBlock(6, 1.0, 0.0)
    with torch.no_grad():
        model.block[3].weight.zero_()
        model.block[3].bias.fill_(1)
        model.block[3].bias[:4] = 0
    (site,) = activation_sparsity(model, (torch.randn(2, 6, 3, 3), torch.zeros(2))).sites
    assert (site.units, site.dead) == (24, 4)

    norm = torchvision.models.convnext.LayerNorm2d(5)
    model = nn.Sequential(with_dead_units(nn.Conv2d(3, 5, 1)), norm, nn.ReLU())
    assert activation_sparsity(model, (torch.ones(IMAGE), torch.zeros(2))).sites[0].units == 5


def test_a_transformer_encoder_is_seen():
    model = nn.TransformerEncoderLayer(4, 2, dim_feedforward=5, batch_first=True)
    with_dead_units(model.linear1)
    (site,) = activation_sparsity(model, (torch.randn(2, 7, 4), torch.zeros(2))).sites
    assert (site.units, site.dead) == (5, 2)


def test_unknown_units_are_a_dash_and_leave_no_sum():
    class Both(Network):
        def forward(self, x):
            return super().forward(x).flatten(1).relu()

    model = Both(nn.Conv2d(3, 5, 1), lambda layer, x: layer(x).relu())
    found = activation_sparsity(model, (torch.ones(IMAGE), torch.zeros(2)))
    assert [site.dead for site in found.sites] == [2, None]
    assert math.isnan(found.dead) and [row["dead"] for row in found.table()] == [2, None]
    compared = compare(
        {"it": model}, (torch.ones(IMAGE), torch.zeros(2).long()), F.cross_entropy, analyses="activations"
    )
    assert "nan" in str(compared) and compared.plot()
    text = str(found)
    assert "2 dead units at the 1 of 2 sites where units are known" in text
    bare = activation_sparsity(nn.ReLU(), (torch.ones(2, 3), torch.zeros(2)))
    assert "; units not known" in str(bare)
    assert "None" not in text and text.splitlines()[-1].split()[-2:] == ["-", "-"]


def test_the_zoo_of_torchvision_has_no_unknown_units():
    import torchvision.models as zoo

    for build, size in (
        (zoo.resnet18, 32),
        (zoo.mobilenet_v3_small, 32),
        (zoo.swin_t, 32),
        (zoo.convnext_tiny, 32),
    ):
        found = activation_sparsity(
            build(num_classes=3).eval(), (torch.randn(1, 3, size, size), torch.zeros(1))
        )
        assert found.dead >= 0, [site.site for site in found.sites if site.dead is None]
