"""Masks in every form that pruners leave behind."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune


def maskable_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of convolutions or, where there are none, of all linear layers but the last, by name.

    A tied weight is there once, under its first name. Weights that a parametrization or a hook
    computes are left out.

    Example:
        >>> from sparsetweaks.testing import Spec, build, maskable_weights
        >>> list(maskable_weights(build(Spec())))
        ['stem.weight', 'blocks.0.conv.weight']
    """
    by_kind: dict[bool, dict[str, Tensor]] = {True: {}, False: {}}
    seen: set[int] = set()
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        is_layer = isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))
        if weight is None or id(weight) in seen or not is_layer:
            continue
        seen.add(id(weight))
        by_kind[not isinstance(module, nn.Linear)][f"{name}.weight".lstrip(".")] = weight
    linear = dict(list(by_kind[False].items())[:-1])  # the last one is the classifier
    return by_kind[True] or linear


FORMS = ("zeros", "buffers", "torch_prune", "torch_prune_twice", "parametrization")


class MaskedWeight(nn.Module):
    """A parametrization that multiplies a weight by a mask in a buffer, as `torch.ao.pruning`'s does."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


class Masked(NamedTuple):
    """A masked network, the masks it was given, and in what form they are in it (one of `FORMS`)."""

    model: nn.Module
    masks: dict[str, Tensor]
    form: str


def mask_model(model: nn.Module, masks: dict[str, Tensor], form: str) -> nn.Module:
    """Put `masks` into `model`, in place, in one of the forms that pruners leave behind.

    `"zeros"` only writes zeros, `"buffers"` adds `<parameter>_mask` too, `"torch_prune"` is
    `torch.nn.utils.prune`, which leaves a computed weight that is not a leaf of autograd (`"torch_prune_twice"`:
    in two steps), and `"parametrization"` one of `torch.nn.utils.parametrize` with a buffer `mask`.

    Args:
        model: any module; it is changed.
        masks: bool tensors by weight name, True is kept.
        form: one of `FORMS`.

    Raises:
        ValueError: an unknown form.

    Example:
        >>> from sparsetweaks.testing import Spec, build, mask_model
        >>> model = build(Spec())
        >>> _ = mask_model(model, {"stem.weight": torch.zeros(4, 3, 3, 3, dtype=torch.bool)}, "buffers")
        >>> float(model.stem.weight.detach().abs().sum()), model.stem.weight_mask.dtype
        (0.0, torch.bool)
    """
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}; use one of {', '.join(FORMS)}")
    for name, mask in masks.items():
        owner, _, parameter = name.rpartition(".")
        module = model.get_submodule(owner)
        with torch.no_grad():
            getattr(module, parameter).mul_(mask)
        if form == "buffers":
            module.register_buffer(f"{parameter}_mask", mask.clone())
        elif form.startswith("torch_prune"):
            if form == "torch_prune_twice":
                torch_prune.custom_from_mask(
                    module, parameter, mask | (torch.arange(mask.numel()) % 2 == 0).view(mask.shape)
                )
            torch_prune.custom_from_mask(module, parameter, mask)
        elif form == "parametrization":
            parametrize.register_parametrization(module, parameter, MaskedWeight(mask.clone()))
    return model
