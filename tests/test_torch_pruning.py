"""Torch-Pruning before and after our surgery: it sees the skips, and what it leaves is tweaked like any network.

Its dependency graph follows indices from channel to channel. An identity skip couples the channels it joins, and
a projection is a layer like others. A skip that pads or averages channels couples nothing that its graph could
say, so its input is detached while the graph is traced (`uncoupled`); such a skip fits its input to whatever
channels are left.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch_pruning
import torchvision
from torch import Tensor, nn

from sparsetweaks.converting import convert_masks
from sparsetweaks.counting import sparsity
from sparsetweaks.errors import SurgeryError
from sparsetweaks.keeping import keep_masks
from sparsetweaks.masks import apply_masks, find_masks
from sparsetweaks.pruning import prune
from sparsetweaks.recipe.layer_scales import learn_layer_scales
from sparsetweaks.surgery.activations import swap_activations
from sparsetweaks.surgery.skips import Skip, inject_skips
from sparsetweaks.verifying import verify

CLASSES = 5


def unit(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def plain() -> nn.Sequential:
    """Units that keep, widen, shrink and narrow."""
    units = [unit(3, 16), unit(16, 16), unit(16, 32, stride=2), unit(32, 16), unit(16, 16)]
    return nn.Sequential(*units, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES))


def vgg_like() -> nn.Sequential:
    units = [unit(3, 16), nn.MaxPool2d(2), unit(16, 32), nn.MaxPool2d(2), unit(32, 32), unit(32, 32)]
    return nn.Sequential(
        *units, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 24), nn.ReLU(), nn.Linear(24, CLASSES)
    )


def resnet18() -> nn.Module:
    return torchvision.models.resnet18(num_classes=CLASSES)


MODELS: dict[str, Callable[[], nn.Module]] = {"plain": plain, "vgg_like": vgg_like, "resnet18": resnet18}
SKIPS = {
    "learned": {},
    "number": {"strength": 0.5},
    "norm": {"strength": 0.5, "norm": True},
    "projection": {"shortcut": "projection", "strength": 0.5},
    "project-all": {"shortcut": "project-all"},
}


def images() -> Tensor:
    return torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))


@contextmanager
def uncoupled(model: nn.Module) -> Iterator[None]:
    """While Torch-Pruning traces: skips that pad or average channels do not tie the channels they join."""
    handles = [
        skip.register_forward_pre_hook(lambda module, inputs: (inputs[0].detach(), *inputs[1:]))
        for skip in model.modules()
        if isinstance(skip, Skip) and skip.projection is None and not skip.geometry.keeps_channels
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def cut(model: nn.Module, ratio: float = 0.5) -> nn.Module:
    """Remove this share of the channels of each layer, in place, as a user of Torch-Pruning does."""
    classifier = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    with warnings.catch_warnings(), uncoupled(model):
        warnings.simplefilter("ignore")
        pruner = torch_pruning.pruner.BasePruner(
            model,
            images(),
            importance=torch_pruning.importance.MagnitudeImportance(p=2),
            pruning_ratio=ratio,
            ignored_layers=[classifier],
        )
    pruner.step()
    return model


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def assert_it_trains(model: nn.Module) -> None:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    for _ in range(2):  # in the first, a learned strength of 0 lets nothing through its skip
        optimizer.zero_grad()
        output = model(images())
        assert output.shape == (2, CLASSES)
        output.square().mean().backward()
        optimizer.step()
    assert all(bool(value.isfinite().all()) for value in model.parameters())
    strengths = [name for name in before if name.endswith("skip.strength")]
    assert all(not torch.equal(before[name], model.get_parameter(name)) for name in strengths)
    assert model.eval()(images()).shape == (2, CLASSES)


@pytest.mark.parametrize("skips", SKIPS)
@pytest.mark.parametrize("name", ["plain", "vgg_like"])
def test_a_tweaked_network_that_is_cut_runs_forward_and_backward(name, skips):
    tweaked = swap_activations(inject_skips(MODELS[name](), **SKIPS[skips]), "silu")
    before = count(tweaked)
    cut(tweaked)
    assert count(tweaked) < 0.45 * before
    assert_it_trains(tweaked)


@pytest.mark.parametrize("skips", ["learned", "norm", "projection"])
def test_a_tweaked_resnet_that_is_cut_runs_forward_and_backward(skips):
    tweaked = inject_skips(resnet18(), **SKIPS[skips])
    before = count(tweaked)
    cut(tweaked)
    assert count(tweaked) < 0.45 * before
    assert_it_trains(tweaked)


def test_the_dependency_graph_sees_an_identity_skip():
    """A unit and what feeds it lose the same channels where a skip joins them, and only there."""
    for tweak, joined in ((inject_skips, True), (lambda model: model, False)):
        model = tweak(plain())
        with warnings.catch_warnings(), uncoupled(model):
            warnings.simplefilter("ignore")
            graph = torch_pruning.DependencyGraph().build_dependency(model, images())
        group = graph.get_pruning_group(model[1][0], torch_pruning.prune_conv_out_channels, idxs=[3])
        touched = {id(dep.target.module): idxs for dep, idxs in group}
        assert (id(model[0][0]) in touched) is joined
        if joined:
            assert list(touched[id(model[0][0])]) == [3]


def test_channels_that_an_identity_skip_joins_stay_aligned():
    """Where the cut channels were zero in all that feeds them, the smaller network computes the same."""
    model = inject_skips(plain(), where="1.0", strength=0.5)
    drop = [2, 5, 11]
    with torch.no_grad():
        for layer in (model[0][0], model[1][0]):
            layer.weight[drop] = 0
    expected = model.eval()(images())
    with warnings.catch_warnings(), uncoupled(model):
        warnings.simplefilter("ignore")
        graph = torch_pruning.DependencyGraph().build_dependency(model, images())
    graph.get_pruning_group(model[1][0], torch_pruning.prune_conv_out_channels, idxs=drop).prune()
    assert (model[0][0].out_channels, model[1][0].out_channels, model[2][0].in_channels) == (13, 13, 13)
    torch.testing.assert_close(model(images()), expected)


@pytest.mark.parametrize("name", MODELS)
def test_a_network_that_was_cut_goes_through_every_surgery(name):
    small = cut(MODELS[name](), 0.3)
    batch = images(), torch.tensor([0, 1])
    ticket = prune(small, 0.5)
    assert sparsity(ticket).overall == pytest.approx(0.5, abs=1e-3)
    verify(ticket, swap_activations(ticket, "relu"), inputs=images()).raise_if_failed()
    verify(ticket, inject_skips(ticket), inputs=images()).raise_if_failed()
    tweaked = swap_activations(inject_skips(ticket, strength=0.5), "silu")
    if name != "resnet18":
        tweaked = learn_layer_scales(tweaked, batch, iterations=2)
    optimizer = torch.optim.SGD(tweaked.parameters(), lr=0.1)
    with keep_masks(tweaked, optimizer):
        tweaked(images()).square().mean().backward()
        optimizer.step()
    verify(ticket, tweaked, trained=True).raise_if_failed()


def test_old_masks_beside_channels_that_were_cut_are_refused_and_plain_zeros_go_through():
    ticket = prune(plain(), 0.5)
    cut(ticket)
    for function in (find_masks, sparsity, lambda model: prune(model, 0.9)):
        with pytest.raises(
            SurgeryError, match=r"'0.0.weight' has shape \(16, 3, 3, 3\), but its weight has \(8, 3"
        ):
            function(ticket)
    small = cut(convert_masks(prune(plain(), 0.5), to="zeros"))
    masked = apply_masks(small, find_masks(small, zeros=True))
    assert 0 < sparsity(masked).overall < 0.5  # magnitude keeps the channels that have more weights left
    assert_it_trains(masked)
