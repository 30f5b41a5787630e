"""Where a mask lives, in each form that pruners leave behind.

    form               what training updates         the mask                           holds the zeros
    "buffers" (ours)   <parameter>                   bool buffer <parameter>_mask       the parameter
    "torch_prune"      <parameter>_orig              buffer <parameter>_mask            a hook before each forward
    "parametrization"  parametrizations.<parameter>  a buffer `mask` of each            each reading of the weight
                       .original                     parametrization in the chain

"torch_prune" is what `torch.nn.utils.prune` leaves, "parametrization" what `torch.ao.pruning`'s sparsifiers and
sparsimony leave (`FakeSparsity`). A network that was pruned more than once has one mask in the first two, and
may have several in the third, of which the product counts. Plain zeros carry no mask that could be found, and
a network made smaller (Torch-Pruning) has none: there, the shape is the mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparsetweaks.errors import SurgeryError

T = TypeVar("T", bound=Tensor)

Form = Literal["buffers", "torch_prune", "parametrization"]
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""A whole number of each width, for whoever works on the bits of numbers."""


@dataclass(frozen=True, eq=False)
class Place:
    """A parameter that has a mask, or could have one."""

    name: str
    module: nn.Module
    attribute: str
    parameter: nn.Parameter

    @property
    def form(self) -> Form:
        """The form of the mask; a parameter without one is as in "buffers"."""
        if _tensor(self.module._parameters, self.attribute) is not None:
            return "buffers"
        return "parametrization" if _chain(self.module, self.attribute) else "torch_prune"

    @property
    def plain(self) -> bool:
        """Whether the parameter itself holds the zeros; in other forms the mask is multiplied in."""
        return self.form == "buffers"

    def slots(self) -> list[tuple[dict[str, Tensor | None], str]]:
        """The buffers among which the masks are, or would be, and their names there."""
        if self.form == "parametrization":
            chain = self.module.parametrizations[self.attribute]  # type: ignore[index]
            return [(each._buffers, "mask") for each in chain]  # type: ignore[union-attr]
        return [(self.module._buffers, self.attribute + "_mask")]

    def stored_masks(self) -> list[Tensor]:
        """The masks as the module stores them, of any dtype where the form is not ours; empty if it has none."""
        stored = [mask for buffers, key in self.slots() if (mask := _tensor(buffers, key)) is not None]
        if self.plain:
            stored = [mask for mask in stored if _is_ours(self.name, mask, self.parameter)]
        for mask in stored:
            if mask.shape != self.parameter.shape:
                raise SurgeryError(
                    f"the mask of {self.name!r} has shape {tuple(mask.shape)}, but its weight has "
                    f"{tuple(self.parameter.shape)}: a network is to be made smaller before it is masked, or as "
                    'convert_masks(model, to="zeros"), whose zeros are masks again afterwards'
                )
        return stored

    @property
    def masked(self) -> bool:
        """Whether there is a mask."""
        return bool(self.stored_masks())

    @torch.no_grad()
    def mask(self) -> Tensor:
        """A fresh bool mask, True = kept."""
        first, *others = self.stored_masks()
        mask = first.detach() != 0
        for other in others:
            mask &= other != 0
        if self.form == "parametrization":
            self._check_that_it_masks(mask)
        return mask

    @torch.no_grad()
    def value(self) -> Tensor:
        """The weight that the forward sees: the masked one."""
        if self.plain:
            return self.parameter.detach()
        value = self.parameter.detach()
        if self.form == "torch_prune":
            return self.stored_masks()[0].to(value.dtype) * value
        for each in self.module.parametrizations[self.attribute]:  # type: ignore[index, union-attr]
            value = each.forward(value)  # not the call: nobody's hooks are to run for a mere look
        return value

    @torch.no_grad()
    def set_mask(self, mask: Tensor) -> None:
        """Write a mask in the form the place has, and zeros beneath it where the form has them."""
        if not self.masked:
            assert self.plain
            if isinstance(self.module, torch.jit.ScriptModule):
                raise SurgeryError(
                    f"{self.name!r} belongs to a scripted module, which takes no new buffer: mask the model before "
                    "torch.jit.script"
                )
            empty = torch.empty_like(self.parameter, dtype=torch.bool, requires_grad=False)
            self.module.register_buffer(self.attribute + "_mask", empty)
        for stored in self.stored_masks():
            stored.copy_(mask)
        if self.plain:
            erase(self.parameter, mask.to(self.parameter.device))
        self.refresh()

    def refresh(self) -> None:
        """Bring what `torch.nn.utils.prune` last computed up to date, as it does at the next forward."""
        if self.form == "torch_prune" and self.attribute in vars(self.module):
            setattr(self.module, self.attribute, self.value())

    def _check_that_it_masks(self, mask: Tensor) -> None:
        if self.parameter.is_meta:
            return
        survives = (self.value() != 0) & ~mask.to(self.parameter.device) & self.parameter.isfinite()
        if survives.any():
            raise SurgeryError(
                f"{self.name!r} has a parametrization with a buffer `mask`, but {int(survives.sum())} of its weights "
                "survive where that mask is 0: it does not multiply by it (is 1 pruned there?). Set the masks with "
                "apply_masks on the model without this parametrization"
            )


def erase(tensor: Tensor, mask: Tensor) -> None:
    """Zero a tensor in place where its bool mask is False.

    Its bits times the mask: zero also where it was negative, NaN or infinite, and on a CPU in less than half of the time of
    `masked_fill_`, which serves tensors of other kinds.
    """
    integer = INTEGERS.get(tensor.dtype.itemsize)
    if integer is None or tensor.layout != torch.strided or type(tensor) not in (Tensor, nn.Parameter):
        tensor.masked_fill_(~mask, 0)
    else:
        tensor.view(integer).mul_(mask)


def places(model: nn.Module) -> Iterator[Place]:
    """Every parameter of the model that has a mask, or could have one.

    Raises:
        SurgeryError: a mask among the parametrizations that compute a weight from something else.
    """
    inside: set[nn.Module] = set()  # parametrizations, whose weights are found from the module that has them
    for module_name, module in model.named_modules():
        attributes = [
            key.removesuffix("_orig") if key.removesuffix("_orig") + "_mask" in module._buffers else key
            for key, value in module._parameters.items()
            if value is not None
        ]
        if isinstance(module, parametrize.ParametrizationList):
            inside |= set(module.modules())
        if module in inside:  # torch.nn.utils.prune works there as well
            attributes = [attribute for attribute in attributes if attribute + "_mask" in module._buffers]
        if _is_parametrized(module):
            attributes += list(module.parametrizations)  # type: ignore[arg-type]
        for attribute in attributes:
            name = f"{module_name}.{attribute}" if module_name else attribute
            parameter = parameter_behind(module, attribute)
            if parameter is not None:
                yield Place(name, module, attribute, parameter)
            elif any(map(_is_mask, _chain(module, attribute))):
                kinds = " and ".join(type(each).__name__ for each in _chain(module, attribute))
                raise SurgeryError(
                    f"{name!r} has a mask, but is no parameter: its parametrizations ({kinds}) compute it. Remove "
                    "them (torch.nn.utils.parametrize.remove_parametrizations) and mask the weight that remains"
                )


def masked_places(model: nn.Module) -> list[Place]:
    """The places that have a mask; a tied weight is there once per name."""
    return [place for place in places(model) if place.masked]


def masked_parameters(model: nn.Module) -> dict[nn.Parameter, Place]:
    """The masked parameters, each with a place of its mask; a tied weight has one.

    Raises:
        SurgeryError: one tied weight is masked in two ways, or only under some of its names.
    """
    groups: dict[nn.Parameter, list[Place]] = {}
    for place in places(model):
        groups.setdefault(place.parameter, []).append(place)
    found = {}
    for parameter, group in groups.items():
        masked = [place for place in group if place.masked]
        if masked:
            _check_that_they_agree(group, masked[0])
            found[parameter] = masked[0]
    return found


def _check_that_they_agree(group: list[Place], first: Place) -> None:
    """Refuse a tied weight of which no single mask could be kept."""
    if len(group) == 1:
        return
    mask = first.mask()
    for place in group:
        if place.masked and not torch.equal(place.mask().to(mask.device), mask):
            raise SurgeryError(
                f"{first.name!r} and {place.name!r} are one tied weight with two different masks: "
                "give both the same mask, or untie them (a parameter of its own for each)"
            )
        if not place.masked and ((place.parameter != 0) & ~mask.to(place.parameter.device)).any():
            raise SurgeryError(
                f"{first.name!r} and {place.name!r} are one tied weight, masked under its first name and whole "
                "under the other: give both the same mask, or untie them (a parameter of its own for each)"
            )


def parameter_behind(module: nn.Module, attribute: str) -> nn.Parameter | None:
    """The parameter that training updates for `module.<attribute>`, in any form of mask; None if none."""
    plain = _tensor(module._parameters, attribute)
    if plain is not None:
        return plain
    if attribute + "_mask" in module._buffers:  # torch.nn.utils.prune; without a mask it is spectral_norm's
        return _tensor(module._parameters, attribute + "_orig")
    chain = _chain(module, attribute)
    if chain and all(map(_is_mask, chain)):
        return _tensor(module.parametrizations[attribute]._parameters, "original")  # type: ignore[index, union-attr]
    return None


def _tensor(group: Mapping[str, T | None], name: str) -> T | None:
    """`group.get(name)`, which the groups of scripted modules do not have."""
    return group[name] if name in group else None  # noqa: SIM401


def _chain(module: nn.Module, attribute: str) -> list[nn.Module]:
    """The parametrizations of an attribute, in the order in which they are applied."""
    if not _is_parametrized(module) or not parametrize.is_parametrized(module, attribute):
        return []
    return list(module.parametrizations[attribute])  # type: ignore[index, arg-type]


def _is_parametrized(module: nn.Module) -> bool:
    """Whether the module itself is, rather than a child whose attributes it lends, as wrappers do."""
    return "parametrizations" in module._modules


def _is_mask(parametrization: nn.Module) -> bool:
    return parametrization._buffers.get("mask") is not None


def _is_ours(name: str, buffer: Tensor, parameter: Tensor) -> bool:
    """Whether a buffer `<parameter>_mask` is our mask, perhaps of the weight before it was cut smaller."""
    if buffer.shape == parameter.shape and buffer.dtype != torch.bool:
        raise ValueError(
            f"the buffer {name}_mask is {buffer.dtype}: masks are bool, True = kept: store mask.bool()"
        )
    larger = buffer.dim() == parameter.dim() and all(b >= p for b, p in zip(buffer.shape, parameter.shape))
    return buffer.dtype == torch.bool and larger
