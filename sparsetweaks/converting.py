"""Move masks from one form into another, without changing what the network computes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

from sparsetweaks.copying import copy_model, own_class
from sparsetweaks.errors import SurgeryError
from sparsetweaks.forms import Place, erase, masked_parameters, places
from sparsetweaks.prunable import prunable_weights
from sparsetweaks.surgery.programs import program_of, unwritten

Model = TypeVar("Model", bound=nn.Module)

Target = Literal["buffers", "torch_prune", "parametrization", "zeros"]


class MaskParametrization(nn.Module):
    """Multiplies a weight by its mask whenever it is read; what `convert_masks(to="parametrization")` registers.

    Unlike `torch.ao.pruning`'s `FakeSparsity` it keeps its mask in the `state_dict`, and takes assignments.
    """

    mask: Tensor

    def __init__(self, mask: Tensor, before: Iterable[str] = ()) -> None:
        """Mask by `mask`; `before` names the parameters ahead of which the weight stood in its module."""
        super().__init__()
        self.register_buffer("mask", mask)
        self.before = tuple(before)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight, zero where the mask is False."""
        return weight * self.mask

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What is stored when `module.weight` is assigned to: the weight as it is, the mask stays."""
        return weight


def convert_masks(model: Model, *, to: Target, zeros: bool = False) -> Model:
    """Return a copy of `model` with its masks in another form, the same function and the same masks.

    Outputs, and the gradients of the weights that are kept, are equal bit for bit. Every name of the
    `state_dict` that is no weight with a mask stays, and so do dtype, device, memory format, `requires_grad` and
    tying. A mask that is in the wanted form already is left as it is.

    Args:
        model: any module with masks, in any form or in several. It is not changed.
        to: the form that comes out.

            - `"buffers"`: our own; a bool buffer `<parameter>_mask` beside the parameter, which holds the zeros.
              An optimizer sees `<parameter>`, whose pruned weights it may move: train within `keep_masks`.
            - `"torch_prune"`: `torch.nn.utils.prune`; an optimizer sees `<parameter>_orig`.
            - `"parametrization"`: `torch.nn.utils.parametrize`; an optimizer sees
              `parametrizations.<parameter>.original`, which comes after the module's own parameters. torch cannot
              pickle such a model whole; use its `state_dict`.
            - `"zeros"`: nothing but the zeros, e.g. to cut channels with Torch-Pruning;
              `find_masks(model, zeros=True)` and `zeros=True` here read them.

            Between the first two and "zeros", `model.parameters()` keeps its order, so an optimizer's state
            fits the result. Where a form multiplies the mask in, values beneath it live on; a form that holds
            zeros puts zeros in their place.
        zeros: also read plain zeros: a prunable weight (`prunable_weights`) without a mask gets its exact zeros
            as one. A mask that is there always wins over the values beneath it. Refused where a zero may be one
            that is trained: the whole weight is zero (initialised so, like the last convolution of some residual
            branches, or pruned away?), or it has a gradient there.

    Returns:
        A new model with the same masks in the other form.

    Raises:
        ValueError: an unknown form; no masks (and `zeros` not asked for); nothing prunable to read zeros of.
        SurgeryError: the masks are ambiguous. A zero that may be trained, as above; kept weights that are
            exactly zero, for `to="zeros"`, which could not tell them from pruned ones; one tied weight with two
            masks; a mask among parametrizations that compute the weight; a mask with other values than 0 and 1.
            Or the form does not work there: scripted modules, and `torch.nn.utils.prune` on a layer that is
            never called itself (`out_proj` of `torch.nn.MultiheadAttention`).

    Example:
        >>> import torch, sparsetweaks as st
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> masked = st.apply_masks(layer, {"weight": torch.tensor([[True, False]])})
        >>> theirs = convert_masks(masked, to="torch_prune")
        >>> list(theirs.state_dict()), list(convert_masks(theirs, to="buffers").state_dict())
        (['weight_orig', 'weight_mask'], ['weight', 'weight_mask'])
    """
    if to not in get_args(Target):
        raise ValueError(f"unknown form {to!r}: choose from {', '.join(map(repr, get_args(Target)))}")
    converted = copy_model(model)
    masks = {parameter: place.mask() for parameter, place in masked_parameters(converted).items()}
    if zeros:
        given = dict(prunable_weights(model))
        for name, parameter in prunable_weights(converted).items():
            if parameter not in masks:
                masks[parameter] = _zeros_as_mask(name, given[name])
    if not masks:
        raise ValueError(
            "the model has no masks to convert: use prune or apply_masks first, or say zeros=True if its pruner "
            "left nothing but zeros"
        )
    for place in list(places(converted)):
        if place.parameter in masks:
            _convert(place, masks[place.parameter], to, converted)
    return converted


def _convert(place: Place, mask: Tensor, to: Target, model: nn.Module) -> None:
    """Bring one place into another form; a tied weight comes here once per name."""
    if place.masked and place.form == to:
        return
    _check_that_nothing_is_lost(place, mask, to)
    if to in ("torch_prune", "parametrization"):
        _check_that_it_can_be_multiplied_in(place, to, model)
    if place.masked:
        _take_off(place, model, zeros_stay=to in ("buffers", "zeros"))
    with unwritten(place.module):
        if to == "torch_prune":
            _put_torch_prune(place, mask)
        elif to == "parametrization":
            _put_parametrization(place, mask)
        elif to == "buffers":
            place.set_mask(mask)


def make_permanent(place: Place, model: nn.Module) -> None:
    """Turn a masked parameter, of a copy of ours, into an ordinary one that is zero where it was pruned.

    It takes the place that it had before it was masked, as far as the module's own order or torch's habit tells.
    """
    module, attribute = place.module, place.attribute
    _take_off(place, model, zeros_stay=True)
    keys = list(module._parameters)
    bias = attribute.replace("weight", "bias")
    if natural := getattr(module, "_flat_weights_names", None):  # recurrent layers say
        keys.sort(key=lambda key: natural.index(key) if key in natural else len(natural))
    elif bias in keys and keys.index(bias) < keys.index(attribute):  # torch put what it masked last
        keys.remove(attribute)
        keys.insert(keys.index(bias), attribute)
    with unwritten(module):
        _reorder(module, keys)


def _check_that_nothing_is_lost(place: Place, mask: Tensor, to: Target) -> None:
    mask = mask.to(place.parameter.device)
    parameter, value = place.parameter.detach(), place.value()
    scaled = int(((value != parameter) & mask & parameter.isfinite()).sum())
    if scaled:
        raise SurgeryError(
            f"the mask of {place.name!r} has {scaled} values other than 0 and 1, which scale the weights: no other "
            "form can hold them. Multiply them into the weights first"
        )
    if to in ("buffers", "zeros") and (broken := int((value.isnan() & ~mask).sum())):
        raise SurgeryError(
            f"{place.name!r} has {broken} weights beneath its mask that are not finite (diverged?), and 0 times "
            "infinity is NaN: zeros in their place would change the function. Rewind or mend the weights first"
        )
    if to == "zeros" and (unlucky := int(((value == 0) & mask).sum())):
        raise SurgeryError(
            f"{place.name!r} keeps {unlucky} weights that are exactly zero: as plain zeros they could not be told "
            "from pruned ones. Prune them too (apply_masks), or choose another form"
        )


def _check_that_it_can_be_multiplied_in(place: Place, to: Target, model: nn.Module) -> None:
    if isinstance(place.module, torch.jit.ScriptModule):
        raise SurgeryError(f"{place.name!r} belongs to a scripted module: convert before torch.jit.script")
    projections = [each.out_proj for each in model.modules() if isinstance(each, nn.MultiheadAttention)]
    if to == "torch_prune" and place.module in projections:
        raise SurgeryError(
            f"{place.name!r} is read by the attention around it, which never calls the layer, so the hook of "
            "torch.nn.utils.prune would not run: choose another form"
        )


def _check_that_no_forward_reads_the_parametrization(place: Place, model: nn.Module) -> None:
    for module in model.modules():
        program = program_of(module)
        reads = program is not None and f".parametrizations.{place.attribute}(" in program.source
        if reads and place.module in module.modules():
            raise SurgeryError(
                f"the forward of {type(module).__name__}, which a tweak rewrote, reads the parametrization of "
                f"{place.name!r} itself: convert the masks first, then tweak"
            )


def _zeros_as_mask(name: str, parameter: nn.Parameter) -> Tensor:
    """Exact zeros as a mask, unless training may be what put them there."""
    mask = parameter.detach() != 0
    if parameter.numel() and not mask.any():
        raise SurgeryError(
            f"{name!r} is zero altogether: pruned away, or initialised at zero and still to be trained? Say which "
            "with apply_masks before you convert"
        )
    if parameter.grad is not None and (trained := int(((parameter.grad != 0) & ~mask).sum())):
        raise SurgeryError(
            f"{name!r} has {trained} exact zeros with a gradient: pruned, or about to be trained? Clear the "
            "gradients (zero_grad) if they are pruned, or say with apply_masks which weights are"
        )
    return mask


# ------------------------------------------------------------------------------------------------------------
# Taking a form off: the parameter is itself again


@torch.no_grad()
def _take_off(place: Place, model: nn.Module, *, zeros_stay: bool) -> None:
    module, attribute, form = place.module, place.attribute, place.form
    if form == "parametrization":
        _check_that_no_forward_reads_the_parametrization(place, model)
    if zeros_stay:
        mask = place.mask().to(place.parameter.device)
        place.parameter.copy_(place.value())
        erase(place.parameter, mask)
    with unwritten(module):
        if form == "buffers":
            del module._buffers[attribute + "_mask"]
        elif form == "torch_prune":
            _take_off_torch_prune(module, attribute)
        else:
            _take_off_parametrization(module, attribute)


def _take_off_torch_prune(module: nn.Module, attribute: str) -> None:
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, torch_prune.BasePruningMethod) and hook._tensor_name == attribute:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
    vars(module).pop(attribute, None)
    del module._buffers[attribute + "_mask"]
    parameter = module._parameters[attribute + "_orig"]
    keys = [attribute if key == attribute + "_orig" else key for key in module._parameters]
    _reorder(module, keys)
    setattr(module, attribute, parameter)  # as torch's own `remove` does: recurrent layers listen


def _take_off_parametrization(module: nn.Module, attribute: str) -> None:
    chain: Any = module.parametrizations[attribute]  # type: ignore[index]
    del module.parametrizations[attribute]  # type: ignore[union-attr, operator]
    if len(module.parametrizations):  # type: ignore[arg-type]
        own_class(module, without=attribute)
    else:
        del module.parametrizations
        module.__class__ = type(module).__bases__[0]
    stood_before = getattr(chain[0], "before", (attribute.replace("weight", "bias"),))
    followers = [key for key in module._parameters if key in stood_before]
    first = followers[0] if followers else None
    keys = [each for key in module._parameters for each in ([attribute, key] if key == first else [key])]
    _reorder(module, keys if followers else [*keys, attribute])
    setattr(module, attribute, chain.original)


# ------------------------------------------------------------------------------------------------------------
# Putting a form on a plain parameter


def _put_torch_prune(place: Place, mask: Tensor) -> None:
    module, attribute = place.module, place.attribute
    keys = [attribute + "_orig" if key == attribute else key for key in module._parameters]
    torch_prune.custom_from_mask(module, attribute, mask.to(place.parameter.device))
    _reorder(module, keys)
    place.refresh()


def _put_parametrization(place: Place, mask: Tensor) -> None:
    module, attribute = place.module, place.attribute
    keys = list(module._parameters)
    if parametrize.is_parametrized(module):
        own_class(module)  # the class below a rewritten one may be the given model's too
    parametrization = MaskParametrization(mask.to(place.parameter.device), keys[keys.index(attribute) + 1 :])
    parametrize.register_parametrization(module, attribute, parametrization)


def _reorder(module: nn.Module, keys: Iterable[str]) -> None:
    """Put a module's own parameters in this order; a key that is not among them makes room for one."""
    parameters = {key: module._parameters.get(key) for key in keys}
    module._parameters.clear()
    module._parameters.update(parameters)
