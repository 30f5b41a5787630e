"""Masks: read them, set them, and rewind the weights beneath them, in whatever form a model carries them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparsetweaks.copying import check_model, copy_model
from sparsetweaks.errors import SurgeryError
from sparsetweaks.forms import Place, erase, masked_parameters, masked_places, places
from sparsetweaks.prunable import added_modules, close_names, how_to_mask, prunable_weights

Model = TypeVar("Model", bound=nn.Module)


def find_masks(model: nn.Module, *, zeros: bool = False) -> dict[str, Tensor]:
    """Read the masks of a model, in whatever form it carries them.

    Args:
        model: any module. It is only read, and what comes back shares no memory with it.
        zeros: also take the exact zeros of the prunable weights without a mask as pruned, for a model whose
            pruner left nothing but zeros. Never by default: a weight can be zero by chance and still train.

    Returns:
        A weight's logical name (`layer1.0.conv1.weight`) to a bool mask of its shape, True = kept. Empty for
        a dense model.

    Raises:
        TypeError: what is given is no module.
        ValueError: a buffer in the place of a mask is not bool; or `zeros` is asked for and nothing is
            prunable.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> masked = apply_masks(layer, {"weight": torch.tensor([[True, False]])})
        >>> find_masks(masked)
        {'weight': tensor([[ True, False]])}
    """
    check_model(model)
    found = masked_places(model)
    masks = {place.name: place.mask() for place in found}
    if zeros:
        masked = {place.parameter for place in found}
        for name, parameter in prunable_weights(model).items():
            if parameter not in masked:
                masks[name] = parameter.detach() != 0
    return masks


def apply_masks(model: Model, masks: Mapping[str, Tensor]) -> Model:
    """Return a copy of `model` with these masks set and the weights beneath them exactly zero.

    The weights that survive, and everything else of the model, stay as they are. Where the model is masked
    already, in our form or another, the new mask takes the old one's place and form, and may only prune more.

    Args:
        model: any module. It is not changed.
        masks: a parameter's name, as `find_masks` gives it, to a bool mask of its shape, True = kept, on any
            device. Parameters that are not named keep what they have.

    Returns:
        A new model with a bool buffer `<parameter>_mask` beside each masked parameter, on its device.

    Raises:
        TypeError: what is given is no module.
        ValueError: no masks, or no mapping of them; a name that is no parameter; a mask of another shape or
            dtype; a mask that would revive a pruned weight; two masks that differ for one tied weight.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> masked = apply_masks(layer, {"weight": torch.tensor([[True, False]])})
        >>> masked.weight[0, 1].item(), list(masked.state_dict())
        (0.0, ['weight', 'weight_mask'])
    """
    check_model(model)
    if not isinstance(masks, Mapping):
        raise ValueError(
            "masks are a mapping of parameter name to bool mask, e.g. from find_masks, "
            f"got a {type(masks).__name__}"
        )
    if not masks:
        raise ValueError("no masks given: pass a dict of parameter name to bool mask, e.g. from find_masks")
    known = {place.name: place for place in places(model)}
    given: dict[nn.Parameter, str] = {}
    for name, mask in masks.items():
        if name not in known:
            _refuse_unknown(model, name, known)
        _check_mask(known[name], mask)
        first = given.setdefault(known[name].parameter, name)
        if first != name and not torch.equal(mask.cpu(), masks[first].cpu()):
            raise ValueError(f"{first!r} and {name!r} are one tied weight: give both the same mask")
    already = masks_by_parameter(model)
    for parameter, name in given.items():
        revived = (
            int((masks[name].to(parameter.device) & ~already[parameter]).sum()) if parameter in already else 0
        )
        if revived:
            raise ValueError(
                f"the mask of {name!r} keeps {revived} weights that are pruned already: nothing is left to revive. "
                "Apply it to the dense model instead"
            )
    masked = copy_model(model)
    for place in list(places(masked)):
        first = given.get(known[place.name].parameter, "")
        if place.name in masks or (first and place.masked):
            place.set_mask(masks[first])
    return masked


def masks_by_parameter(model: nn.Module) -> dict[nn.Parameter, Tensor]:
    """`find_masks` by parameter, so that a tied weight's mask is found from any of its names."""
    return {parameter: place.mask() for parameter, place in masked_parameters(model).items()}


def lift_masks(model: nn.Module) -> dict[nn.Parameter, Tensor]:
    """Make a model's pruned weights ordinary zeros, in place, and return the masks that they had.

    For an analysis that must see, or move along, pruned weights too: afterwards every form computes the same
    as before, and each masked parameter holds its own zeros beneath a mask that keeps everything.
    """
    masks = masks_by_parameter(model)
    for place in masked_places(model):
        with torch.no_grad():
            erase(place.parameter, masks[place.parameter])
        place.set_mask(torch.ones_like(masks[place.parameter]))
    return masks


def _refuse_unknown(model: nn.Module, name: str, known: Iterable[str]) -> NoReturn:
    owner, _, attribute = name.rpartition(".")
    module = dict(model.named_modules()).get(owner)
    if module is not None and parametrize.is_parametrized(module, attribute):
        raise SurgeryError(
            f"{name!r} is not a parameter: a parametrization computes it (weight_norm, ...). "
            "Remove that first: torch.nn.utils.parametrize.remove_parametrizations"
        )
    raise ValueError(f"no parameter is called {name!r}; close: {close_names(name, known)}")


def _check_mask(place: Place, mask: Tensor) -> None:
    if not isinstance(mask, Tensor):
        raise ValueError(f"the mask of {place.name!r} is a {type(mask).__name__}: pass a bool tensor")
    if mask.dtype != torch.bool:
        raise ValueError(
            f"the mask of {place.name!r} is {mask.dtype}: masks are bool, True = kept: use mask.bool()"
        )
    if mask.shape != place.parameter.shape:
        raise ValueError(
            f"the mask of {place.name!r} has shape {tuple(mask.shape)}, "
            f"but its weight {tuple(place.parameter.shape)}"
        )


def rewind(masked: Model, initial_state: Mapping[str, Any] | nn.Module) -> Model:
    """Return a copy of `masked` with an earlier state's weights beneath the same masks (paper, 4.1).

    Everything the state holds comes back, the statistics of normalisation layers too. Masks stay, in the form
    they have, and so does what a tweak has added since, unless the state holds it.

    Args:
        masked: a masked model. It is not changed.
        initial_state: the `state_dict`, dense or masked, of the same architecture at the step to rewind to
            (step 0 is the original initialisation), or a model that is in that state.

    Returns:
        A new model: the ticket, at the weights that training starts from.

    Raises:
        TypeError: what is given is no module.
        ValueError: the model has no masks; `initial_state` is neither; the state lacks a tensor, or has one
            that is unknown or of another shape.

    Example:
        >>> import copy, torch
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> initial_state = copy.deepcopy(layer.state_dict())
        >>> masked = apply_masks(layer, {"weight": torch.tensor([[True, False]])})
        >>> _ = torch.nn.init.ones_(masked.weight)  # stands for training
        >>> ticket = rewind(masked, initial_state)
        >>> torch.equal(ticket.weight[0, 0], initial_state["weight"][0, 0]), ticket.weight[0, 1].item()
        (True, 0.0)
    """
    check_model(masked)
    if not masked_places(masked):
        raise ValueError(f"the model has no masks to rewind beneath: {how_to_mask(masked)}")
    given = initial_state.state_dict() if isinstance(initial_state, nn.Module) else initial_state
    if not isinstance(given, Mapping):
        raise ValueError(f"initial_state is a state_dict or a model, got a {type(given).__name__}")
    earlier = {name: given[key] for name, key in _keys_by_name(given).items()}
    state = masked.state_dict()
    keys = _keys_by_name(state)
    added = _keys_within(masked, added_modules(masked))

    missing = [name for name, key in keys.items() if name not in earlier and key not in added]
    unknown = [name for name in earlier if name not in keys]
    if missing or unknown:
        raise ValueError(
            f"the state is not of this architecture: it lacks {listed(missing)}, "
            f"and the model does not know {listed(unknown)}"
        )
    for name, value in earlier.items():
        old = state[keys[name]]
        if isinstance(old, Tensor) and old.shape != value.shape:
            raise ValueError(
                f"{name!r} has shape {tuple(value.shape)} in the state, but {tuple(old.shape)} in the model"
            )
        state[keys[name]] = value
    ticket = copy_model(masked)
    ticket.load_state_dict(state, strict=False)  # torch's FakeSparsity leaves its mask out of the state
    for place in masked_places(ticket):
        place.set_mask(place.mask())
    return ticket


def _keys_by_name(state: Mapping[str, Any]) -> dict[str, str]:
    """The logical name of everything in a state_dict but the masks and what parametrizations keep beside them."""
    keys = {}
    for key, value in state.items():
        base, _, kind = key.rpartition("_")
        masked = state.get(base, state.get(base + "_orig"))
        if kind == "mask" and isinstance(masked, Tensor) and masked.shape == value.shape:
            continue
        parametrization = re.match(r"((?:.+\.)?parametrizations\.\w+\.\d+\.)\w+$", key)
        if parametrization and parametrization[1] + "mask" in state:
            continue
        name = base if kind == "orig" and base + "_mask" in state else key
        keys[re.sub(r"(^|\.)parametrizations\.(\w+)\.original$", r"\1\2", name)] = key
    return keys


def _keys_within(model: nn.Module, modules: list[nn.Module]) -> set[str]:
    within = set(modules)
    names = [name for name, module in model.named_modules(remove_duplicate=False) if module in within]
    return {f"{name}.{key}" for name in names for key in model.get_submodule(name).state_dict()}


def listed(names: list[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more or "nothing"
