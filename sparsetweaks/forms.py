"""Where a mask lives, in each form that pruners leave behind.

A masked model of ours is an ordinary model whose pruned weights are exactly zero, with a bool buffer
`<parameter>_mask` (True = kept) beside each masked parameter. The forms of `torch.nn.utils.prune` and of a
mask parametrization (such as `torch.ao.pruning`'s `FakeSparsity`) are understood as well, and kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


@dataclass(frozen=True, eq=False)
class Place:
    """A parameter that has a mask, or could have one."""

    name: str
    module: nn.Module
    attribute: str
    parameter: nn.Parameter

    @property
    def plain(self) -> bool:
        """Whether the parameter itself holds the zeros; in other forms the mask is multiplied in."""
        return self.module._parameters.get(self.attribute) is not None

    def slot(self) -> tuple[dict[str, Tensor | None], str]:
        """The buffers among which the mask is, or would be, and its name there."""
        masking = mask_parametrization(self.module, self.attribute)
        if masking is not None:
            return masking._buffers, "mask"
        return self.module._buffers, self.attribute + "_mask"

    def stored_mask(self) -> Tensor | None:
        """The mask as the module stores it: of any dtype where the form is not ours."""
        buffers, key = self.slot()
        mask = buffers.get(key)
        if mask is None or mask.shape != self.parameter.shape:
            return None
        if self.plain and mask.dtype != torch.bool:
            raise ValueError(
                f"the buffer {self.name}_mask is {mask.dtype}: masks are bool, True = kept: store mask.bool()"
            )
        return mask

    def mask(self) -> Tensor:
        """A fresh bool mask, True = kept."""
        stored = self.stored_mask()
        assert stored is not None
        return stored.detach() != 0

    @torch.no_grad()
    def set_mask(self, mask: Tensor) -> None:
        stored = self.stored_mask()
        if stored is None:
            stored = torch.empty_like(self.parameter, dtype=torch.bool, requires_grad=False)
            self.module.register_buffer(self.attribute + "_mask", stored)
        stored.copy_(mask)
        if self.plain:
            self.parameter.masked_fill_(~mask.to(self.parameter.device), 0)
        elif self.attribute in vars(self.module):  # torch.nn.utils.prune computes it anew at the next forward
            setattr(self.module, self.attribute, stored.to(self.parameter.dtype) * self.parameter)


def places(model: nn.Module) -> Iterator[Place]:
    for module_name, module in model.named_modules():
        if isinstance(module, parametrize.ParametrizationList):
            continue  # found from the module whose weight it computes
        attributes = [
            key.removesuffix("_orig") if key.removesuffix("_orig") + "_mask" in module._buffers else key
            for key, value in module._parameters.items()
            if value is not None
        ]
        if parametrize.is_parametrized(module):
            attributes += list(module.parametrizations)  # type: ignore[arg-type]
        for attribute in attributes:
            parameter = parameter_behind(module, attribute)
            if parameter is not None:
                name = f"{module_name}.{attribute}" if module_name else attribute
                yield Place(name, module, attribute, parameter)


def masked_places(model: nn.Module) -> list[Place]:
    return [place for place in places(model) if place.stored_mask() is not None]


def parameter_behind(module: nn.Module, attribute: str) -> nn.Parameter | None:
    """The parameter that training updates for `module.<attribute>`, in any form of mask; None if none."""
    plain = module._parameters.get(attribute)
    if plain is not None:
        return plain
    if attribute + "_mask" in module._buffers:  # torch.nn.utils.prune; without a mask it is spectral_norm's
        return module._parameters.get(attribute + "_orig")
    if mask_parametrization(module, attribute) is not None:
        return module.parametrizations[attribute].original  # type: ignore[index, union-attr, return-value]
    return None


def mask_parametrization(module: nn.Module, attribute: str) -> nn.Module | None:
    """The parametrization that masks `module.<attribute>`: the only one there, with a buffer `mask`."""
    if not parametrize.is_parametrized(module, attribute):
        return None
    chain = module.parametrizations[attribute]  # type: ignore[index]
    original = chain._parameters.get("original")  # type: ignore[union-attr]
    if original is None or len(chain) != 1:  # type: ignore[arg-type]
        return None
    mask = chain[0]._buffers.get("mask")  # type: ignore[index, union-attr]
    return chain[0] if mask is not None and mask.shape == original.shape else None  # type: ignore[index, return-value]
