"""A budget: prune a tweaked model until what tweaks added is paid for."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args

from torch import Tensor, nn

from sparsetweaks.copying import check_model
from sparsetweaks.export import remove_masks
from sparsetweaks.forms import masked_parameters
from sparsetweaks.masks import apply_masks, find_masks
from sparsetweaks.prunable import (
    added_modules,
    check_dense,
    check_values,
    plain_zeros,
    prunable_weights,
    select_weights,
    warn_of_zeros,
)
from sparsetweaks.selection import keep_highest_globally

Model = TypeVar("Model", bound=nn.Module)

Of = Literal["parameters", "weights"]


def match_budget(
    model: Model,
    nonzeros: int,
    *,
    of: Of = "parameters",
    ranked_by: nn.Module | Mapping[str, Tensor] | None = None,
) -> Model:
    """Return a copy of `model` pruned to a stated number of non-zeros, with what tweaks added counted.

    A tweak that brings parameters is compared fairly only at equal non-zeros: what it adds, it pays for with the
    smallest of the weights that masks still keep. Those are pruned by magnitude, of all layers together and in exact
    number; of equal ones the earlier goes first. Masks only shrink, and what tweaks added is never pruned, unless it
    carries a mask itself.

    Args:
        model: a masked model. One without any mask is pruned by its prunable weights, as `prune` would. Exact zeros of
            prunable weights without a mask, more than by chance, count as pruned, as in `cost`. It
            is not changed.
        nonzeros: how many shall be left of what `of` says.
        of: what is counted: `"parameters"`, all parameters that no mask removes, those of normalisation, biases and
            the classifier too (`cost(model, inputs).nonzeros`); or `"weights"`, the prunable and masked weights and all that
            tweaks added (`sparsity(model)`'s `kept` and `added_kept`), as papers count sparsity.
        ranked_by: a model or `state_dict` of the same names, whose weights' magnitudes decide in place of the
            model's own: the trained weights, say, of a ticket that is rewound since.

    Returns:
        A new model with exactly `nonzeros` left.

    Raises:
        TypeError: what is given is no module.
        ValueError: `nonzeros` is no whole number; the model has fewer; what no mask removes is that many by itself; or
            `ranked_by` lacks a weight.
        SurgeryError: a parameter or a mask has no values (lazy, meta device), or is stored in another way than number by
            number (sparse layouts, quantized).

    Example:
        >>> import torch, sparsetweaks as st
        >>> units = torch.nn.Conv2d(4, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.ReLU()
        >>> ticket = st.prune(torch.nn.Sequential(*units), 0.5)
        >>> tweaked = st.inject_skips(ticket, shortcut="projection")
        >>> st.cost(ticket, torch.zeros(1, 4, 8, 8)).nonzeros, st.cost(tweaked, torch.zeros(1, 4, 8, 8)).nonzeros
        (168, 217)
        >>> st.cost(match_budget(tweaked, 168), torch.zeros(1, 4, 8, 8)).nonzeros
        168
    """
    check_model(model)
    if of not in get_args(Of):
        raise ValueError(f"unknown of {of!r}: choose from {', '.join(map(repr, get_args(Of)))}")
    nonzeros = _whole(nonzeros)
    check_values(dict(model.named_parameters()))
    check_dense(dict(model.named_parameters()))
    zeros = plain_zeros(select_weights(model), masked_parameters(model))
    warn_of_zeros(zeros)
    masks = _masks_to_tighten(model, zeros)
    ordinary = remove_masks(model)
    weights = {name: ordinary.get_parameter(name) for name in masks}
    first = {weight: name for name, weight in reversed(weights.items())}  # a tied weight counts once
    masks = {name: masks[name] for name, weight in weights.items() if first[weight] == name}

    added = {p for module in added_modules(ordinary) for p in module.parameters()} - set(weights.values())
    whole = added | {each.parameter for each in select_weights(ordinary) if each.parameter is not None}
    counted = (whole if of == "weights" else set(ordinary.parameters())) - set(weights.values())
    fixed = sum(parameter.numel() for parameter in counted)
    left = sum(int(mask.count_nonzero()) for mask in masks.values())
    if nonzeros > fixed + left:
        raise ValueError(f"the model has {fixed + left:,} non-zeros, and masks only shrink: not {nonzeros:,}")
    if nonzeros <= fixed:
        more = sum(parameter.numel() for parameter in added)
        raise ValueError(
            f"{fixed:,} parameters carry no mask ({more:,} of them added by tweaks), which leaves no weight of "
            f"{nonzeros:,} non-zeros: choose tweaks that add fewer, or a larger budget"
        )
    scores = _scores({name: weights[name] for name in masks}, ranked_by)
    new = keep_highest_globally(scores, masks, nonzeros - fixed, absolute=True)
    return apply_masks(model, new)


def _whole(nonzeros: Any) -> int:
    try:
        return operator.index(nonzeros)
    except TypeError as error:
        given = type(nonzeros).__name__ if isinstance(nonzeros, nn.Module) else repr(nonzeros)
        raise ValueError(
            "nonzeros is how many non-zeros shall be left, a whole number such as "
            f"cost(other, inputs).nonzeros, got {given}"
        ) from error


def _masks_to_tighten(model: nn.Module, zeros: Mapping[nn.Parameter, Tensor]) -> dict[str, Tensor]:
    masks = find_masks(model)
    check_values(masks)
    if not (masks or zeros):
        return {
            name: weight.new_ones(weight.shape).bool() for name, weight in prunable_weights(model).items()
        }
    names = {weight.parameter: weight.name for weight in select_weights(model)}
    return masks | {names[parameter]: mask for parameter, mask in zeros.items()}


def _scores(
    weights: Mapping[str, Tensor], ranked_by: nn.Module | Mapping[str, Any] | None
) -> dict[str, Tensor]:
    """The values whose magnitudes decide."""
    if ranked_by is None:
        return dict(weights)
    state = remove_masks(ranked_by).state_dict() if isinstance(ranked_by, nn.Module) else ranked_by
    if not isinstance(state, Mapping):
        raise ValueError(f"ranked_by is a model or a state_dict, got a {type(ranked_by).__name__}")
    for name, weight in weights.items():
        if getattr(state.get(name), "shape", None) != weight.shape:
            raise ValueError(f"ranked_by has no {name!r} of shape {tuple(weight.shape)} to rank by")
    return {name: state[name] for name in weights}
