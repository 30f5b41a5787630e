"""Small models, and the forms in which other pruners mask them, that several tests share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune


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


def mask_parametrization(mask: Tensor) -> nn.Module:
    class Masking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", mask)

        def forward(self, weight: Tensor) -> Tensor:
            return weight * self.mask

    return Masking()


def in_form(form: str, model: nn.Module, name: str, mask: Tensor) -> nn.Module:
    """The model masked at one weight by the means of another pruner."""
    module_name, _, attribute = name.rpartition(".")
    module = model.get_submodule(module_name)
    if form == "torch.nn.utils.prune":
        torch_prune.custom_from_mask(module, attribute, mask)
    else:
        parametrize.register_parametrization(module, attribute, mask_parametrization(mask.float()))
    loss_of(model)  # from here on torch.nn.utils.prune holds a tensor that is not a leaf
    return model


FORMS = ["torch.nn.utils.prune", "parametrization"]


class Added(nn.Linear):
    added_by_tweak = True


def tied_model() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight = model[0].weight
    return model
