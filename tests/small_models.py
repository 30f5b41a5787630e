"""Small models, and the forms in which other pruners mask them, that several tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.pruning import FakeSparsity
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

from sparsetweaks.forms import masked_places


class Block(nn.Module):
    """A residual block with batch normalisation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm(self.conv(x)))


def small_model(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), Block(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
        )


def a_batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 2, 5, 5, generator=generator), torch.randint(3, (6,), generator=generator)


def loss_of(model: nn.Module, seed: int = 0) -> Tensor:
    inputs, targets = a_batch(seed)
    return F.cross_entropy(model(inputs), targets)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def random_masks(model: nn.Module, *names: str, density: float = 0.4, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(model.get_parameter(name).shape, generator=generator) < density for name in names
    }


class DenseGradients(nn.Module):
    """A mask parametrization as dynamic sparse training has it: it records the gradients of all weights."""

    mask: Tensor
    gradients: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.register_buffer("gradients", torch.zeros_like(mask))
        self.register_full_backward_hook(record_gradient)

    def forward(self, weight: Tensor) -> Tensor:
        return self.mask * weight


def record_gradient(module: nn.Module, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> None:
    module.gradients += outputs[0]


def prune_twice(module: nn.Module, attribute: str, mask: Tensor) -> None:
    torch_prune.custom_from_mask(module, attribute, mask | every_second(mask))
    torch_prune.custom_from_mask(module, attribute, mask)
    assert any(isinstance(hook, torch_prune.PruningContainer) for hook in module._forward_pre_hooks.values())


def parametrize_twice(module: nn.Module, attribute: str, mask: Tensor) -> None:
    for part in (mask | every_second(mask), mask | ~every_second(mask)):
        parametrize.register_parametrization(module, attribute, FakeSparsity(part.float()))


def every_second(mask: Tensor) -> Tensor:
    return torch.arange(mask.numel()).view(mask.shape) % 2 == 0


FORMS: dict[str, Callable[[nn.Module, str, Tensor], Any]] = {
    "torch_prune": torch_prune.custom_from_mask,
    "torch_prune twice": prune_twice,
    "FakeSparsity": lambda module, attribute, mask: parametrize.register_parametrization(
        module, attribute, FakeSparsity(mask.float())
    ),
    "FakeSparsity twice": parametrize_twice,
    "DenseGradients": lambda module, attribute, mask: parametrize.register_parametrization(
        module, attribute, DenseGradients(mask.float())
    ),
}
"""How other pruners mask one parameter of a module, in place."""


def in_form(form: str, model: nn.Module, name: str, mask: Tensor) -> nn.Module:
    """The model masked at one weight by the means of another pruner."""
    module_name, _, attribute = name.rpartition(".")
    FORMS[form](model.get_submodule(module_name), attribute, mask)
    loss_of(model)  # from here on torch.nn.utils.prune holds a tensor that is not a leaf
    return model


class Added(nn.Linear):
    added_by_tweak = True


def tied_model() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight = model[0].weight
    return model


class Rooted(nn.Conv2d):
    """A model that is a layer itself: its own weight and bias are read by its own forward."""

    def __init__(self) -> None:
        super().__init__(2, 2, 3, padding=1)
        self.norm = nn.BatchNorm2d(2)
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(F.conv2d(x, self.weight, self.bias, padding=1)))
        return self.head(F.relu(self.conv(x)).mean((2, 3)))


NAMES = ("weight", "bias", "conv.weight", "head.bias")
FORMS_AND_OURS = {
    **FORMS,
    "buffers": lambda module, attribute, mask: (
        module.get_parameter(attribute).data.mul_(mask),
        module.register_buffer(attribute + "_mask", mask),
    ),
}


def rooted(seed: int = 0) -> Rooted:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Rooted()


def masks_of_rooted() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    model = rooted()
    return {
        name: torch.rand(model.get_parameter(name).shape, generator=generator) < 0.6
        for name in ("weight", "conv.weight")
    } | {"bias": torch.tensor([True, False]), "head.bias": torch.tensor([False, True, True])}


def masked_rooted(form: str) -> nn.Module:
    model = rooted()
    for name, mask in masks_of_rooted().items():
        owner, _, attribute = name.rpartition(".")
        FORMS_AND_OURS[form](model.get_submodule(owner), attribute, mask)
    output = model.eval()(inputs())
    assert output.requires_grad
    return model


def inputs() -> Tensor:
    return torch.randn(4, 2, 5, 5, generator=torch.Generator().manual_seed(0))


def forms_of(model: nn.Module) -> dict[str, str]:
    return {place.name: place.form for place in masked_places(model)}


class Call(nn.Module):
    """One activation call, whose input may be seen again."""

    def __init__(self, call, seen: bool):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.call = call
        self.seen = seen

    def forward(self, x):
        x = self.inner(x)
        y = self.call(x)
        return (x, y) if self.seen else y
