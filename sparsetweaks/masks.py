"""Masks: read them, set them, rewind beneath them, hold them through training, and count what they leave.

A masked model is an ordinary model whose pruned weights are exactly zero, with a bool buffer
`<parameter>_mask` (True = kept) beside each masked parameter. The forms of `torch.nn.utils.prune` and of a
mask parametrization (such as `torch.ao.pruning`'s `FakeSparsity`) are understood as well, and kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import LBFGS, Optimizer

from sparsetweaks.copying import copy_model
from sparsetweaks.prunable import (
    Selection,
    added_modules,
    close_names,
    mask_parametrization,
    parameter_behind,
    prunable_weights,
    select_weights,
)

Model = TypeVar("Model", bound=nn.Module)

# A whole number of each width, to AND masks into floating-point numbers of that width.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# LBFGS keeps its state for all parameters in one flat vector each: single ones, and lists of them.
_LBFGS_VECTORS = ("d", "prev_flat_grad")
_LBFGS_HISTORIES = ("old_dirs", "old_stps")
_LBFGS_LEAST_CURVATURE = 1e-10  # as in torch.optim.LBFGS: a pair below it is not kept


# ------------------------------------------------------------------------------------------------------------
# Where a mask lives


@dataclass(frozen=True, eq=False)
class _Place:
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


def _places(model: nn.Module) -> Iterator[_Place]:
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
                yield _Place(name, module, attribute, parameter)


def _masked_places(model: nn.Module) -> list[_Place]:
    return [place for place in _places(model) if place.stored_mask() is not None]


# ------------------------------------------------------------------------------------------------------------
# Reading and setting


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
        ValueError: a buffer in the place of a mask is not bool; or `zeros` is asked for and nothing is
            prunable.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> masked = apply_masks(layer, {"weight": torch.tensor([[True, False]])})
        >>> find_masks(masked)
        {'weight': tensor([[ True, False]])}
    """
    masks = {place.name: place.mask() for place in _masked_places(model)}
    if zeros:
        for name, parameter in prunable_weights(model).items():
            masks.setdefault(name, parameter.detach() != 0)
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
        ValueError: no masks; a name that is no parameter; a mask of another shape or dtype; a mask that would
            revive a pruned weight; two masks that differ for one tied weight.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> masked = apply_masks(layer, {"weight": torch.tensor([[True, False]])})
        >>> masked.weight[0, 1].item(), list(masked.state_dict())
        (0.0, ['weight', 'weight_mask'])
    """
    if not masks:
        raise ValueError("no masks given: pass a dict of parameter name to bool mask, e.g. from find_masks")
    known = {place.name: place for place in _places(model)}
    given: dict[nn.Parameter, str] = {}
    for name, mask in masks.items():
        if name not in known:
            raise ValueError(f"no parameter is called {name!r}; close: {close_names(name, known)}")
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
    for place in list(_places(masked)):
        first = given.get(known[place.name].parameter, "")
        if place.name in masks or (first and place.stored_mask() is not None):
            place.set_mask(masks[first])
    return masked


def masks_by_parameter(model: nn.Module) -> dict[nn.Parameter, Tensor]:
    """`find_masks` by parameter, so that a tied weight's mask is found from any of its names."""
    return {place.parameter: place.mask() for place in _masked_places(model)}


def lift_masks(model: nn.Module) -> dict[nn.Parameter, Tensor]:
    """Make a model's pruned weights ordinary zeros, in place, and return the masks that they had.

    For an analysis that must see, or move along, pruned weights too: afterwards every form computes the same
    as before, and each masked parameter holds its own zeros beneath a mask that keeps everything.
    """
    masks = masks_by_parameter(model)
    for place in _masked_places(model):
        with torch.no_grad():
            place.parameter.masked_fill_(~masks[place.parameter], 0)
        place.set_mask(torch.ones_like(masks[place.parameter]))
    return masks


def _check_mask(place: _Place, mask: Tensor) -> None:
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

    Raises:
        ValueError: the model has no masks; the state lacks a tensor, or has one that is unknown or of
            another shape.

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
    if not _masked_places(masked):
        raise ValueError("the model has no masks: use prune or apply_masks first, then rewind")
    given = initial_state.state_dict() if isinstance(initial_state, nn.Module) else initial_state
    earlier = {name: given[key] for name, key in _keys_by_name(given).items()}
    state = masked.state_dict()
    keys = _keys_by_name(state)
    added = _keys_within(masked, added_modules(masked))

    missing = [name for name, key in keys.items() if name not in earlier and key not in added]
    unknown = [name for name in earlier if name not in keys]
    if missing or unknown:
        raise ValueError(
            f"the state is not of this architecture: it lacks {_listed(missing)}, "
            f"and the model does not know {_listed(unknown)}"
        )
    for name, value in earlier.items():
        old = state[keys[name]]
        if isinstance(old, Tensor) and old.shape != value.shape:
            raise ValueError(
                f"{name!r} has shape {tuple(value.shape)} in the state, but {tuple(old.shape)} in the model"
            )
        state[keys[name]] = value
    ticket = copy_model(masked)
    ticket.load_state_dict(state)
    for place in _masked_places(ticket):
        place.set_mask(place.mask())
    return ticket


def _keys_by_name(state: Mapping[str, Any]) -> dict[str, str]:
    """The logical name of everything in a state_dict but the masks, to its key there."""
    keys = {}
    for key, value in state.items():
        base, _, kind = key.rpartition("_")
        masked = state.get(base, state.get(base + "_orig"))
        if kind == "mask" and isinstance(masked, Tensor) and masked.shape == value.shape:
            continue
        if re.search(r"(^|\.)parametrizations\.\w+\.0\.mask$", key):
            continue
        name = base if kind == "orig" and base + "_mask" in state else key
        keys[re.sub(r"(^|\.)parametrizations\.(\w+)\.original$", r"\1\2", name)] = key
    return keys


def _keys_within(model: nn.Module, modules: list[nn.Module]) -> set[str]:
    within = set(modules)
    names = [name for name, module in model.named_modules(remove_duplicate=False) if module in within]
    return {f"{name}.{key}" for name in names for key in model.get_submodule(name).state_dict()}


def _listed(names: list[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more or "nothing"


# ------------------------------------------------------------------------------------------------------------
# Holding


@contextmanager
def keep_masks(model: nn.Module, *optimizers: Optimizer) -> Iterator[None]:
    """Hold pruned weights at exactly zero while you train, whatever the optimizer does (paper, section 3).

    On entry the pruned weights, their gradients and their optimizer state are zeroed (momentum, say, from
    before the masks). Within, a gradient hook on every masked parameter zeroes the gradient of what is
    pruned, so that gradient clipping, line searches and distributed averaging see the sparse network alone;
    and after every `optimizer.step()` the pruned weights and their optimizer state are zeroed again, also
    where the optimizer made them infinite or NaN. On leaving, by whatever way, the hooks are gone and the
    masks remain.

    The masks are those of the model's buffers at each moment, so a checkpoint may be loaded within. Parameter
    groups may be added within. Layers of `torch.nn.utils.prune` and mask parametrizations hold their own
    weights; for these only gradients and optimizer state are held. It costs one integer AND per masked
    tensor of weights, gradients and state, and the memory of one more copy of the masked weights.

    Args:
        model: the masked model that is trained, also wrapped by torch.compile or DistributedDataParallel.
        optimizers: every optimizer that steps its parameters.

    Raises:
        ValueError: the model has no masks, no optimizer is given, or none of the masked parameters is in one
            (the usual cause: the optimizer was built for another copy of the model).

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> ticket = apply_masks(layer, {"weight": torch.tensor([[True, False]])})
        >>> optimizer = torch.optim.SGD(ticket.parameters(), lr=0.1, momentum=0.9)
        >>> with keep_masks(ticket, optimizer):
        ...     ticket(torch.ones(1, 2)).sum().backward()
        ...     optimizer.step()
        >>> ticket.weight[0, 1].item()
        0.0
    """
    held = {place.parameter: _Held(place) for place in _masked_places(model)}
    if not held:
        raise ValueError("the model has no masks to keep: use prune or apply_masks first")
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            raise ValueError(
                f"expected torch.optim optimizers after the model, got {type(optimizer).__name__}"
            )
    if not any(parameter in held for optimizer in optimizers for parameter in _parameters_of(optimizer)):
        raise ValueError(
            "none of the masked parameters is in the optimizers: build the optimizer from the parameters "
            "of this very model (every function here returns a new one), then keep_masks(model, optimizer)"
        )

    def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        _zero_pruned(optimizer, held)

    with ExitStack() as stack:
        for parameter, hold in held.items():
            hold.zero_weight_()
            if parameter.grad is not None:
                hold.zero_(parameter.grad)
            stack.callback(_register_gradient_hook(parameter, hold.zeroed).remove)
        for optimizer in dict.fromkeys(optimizers):
            _zero_pruned(optimizer, held)
            if isinstance(optimizer, LBFGS):
                _renew_curvature(optimizer)
            stack.callback(optimizer.register_step_post_hook(after_step).remove)
        yield


class _Held:
    """A masked parameter, with its mask as integers of its width: all bits set where kept, else none.

    ANDed with the bits of a tensor they give an exact zero also for NaN and inf, where multiplying would
    not, and on a CPU in about a tenth of the time of `masked_fill_`.
    """

    def __init__(self, place: _Place) -> None:
        self._parameter = place.parameter
        self._plain = place.plain
        self._buffers, self._key = place.slot()
        self._stored: Tensor | None = None
        self._version = -1

    def bits(self) -> Tensor:
        stored = self._buffers[self._key]
        assert stored is not None
        if stored is not self._stored or stored._version != self._version:  # loaded, moved or changed
            integer = _INTEGERS.get(self._parameter.dtype.itemsize, torch.int8)
            self._bits = (stored != 0).to(integer).neg_()
            self._stored, self._version = stored, stored._version
        return self._bits

    @torch.no_grad()
    def zero_(self, tensor: Tensor) -> None:
        """Zero the pruned places of a tensor shaped like the parameter."""
        bits = self.bits()
        if _fit(tensor, bits):
            tensor.view(bits.dtype).bitwise_and_(bits)
        else:  # optimizer state of another width, or held elsewhere
            tensor.masked_fill_((bits == 0).to(tensor.device), 0)

    def zero_weight_(self) -> None:
        if self._plain:
            self.zero_(self._parameter)

    def zeroed(self, gradient: Tensor) -> Tensor:
        bits = self.bits()
        # with create_graph the gradient has a gradient itself, and integers have none
        if gradient.requires_grad or not _fit(gradient, bits):
            return gradient.masked_fill(bits == 0, 0)
        return (gradient.view(bits.dtype) & bits).view(gradient.dtype)


def _fit(tensor: Tensor, bits: Tensor) -> bool:
    return tensor.dtype.itemsize == bits.dtype.itemsize and tensor.device == bits.device


def _register_gradient_hook(parameter: nn.Parameter, hook: Callable[[Tensor], Tensor]) -> Any:
    """Register `hook`, also on a parameter that is frozen now: it may be unfrozen later."""
    frozen = not parameter.requires_grad
    parameter.requires_grad_(True)
    handle = parameter.register_hook(hook)
    parameter.requires_grad_(not frozen)
    return handle


def _parameters_of(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _zero_pruned(optimizer: Optimizer, held: Mapping[nn.Parameter, _Held]) -> None:
    """Zero the pruned weights that `optimizer` steps, and all the state it keeps for them."""
    for parameter in _parameters_of(optimizer):
        hold = held.get(parameter)
        if hold is None:
            continue
        hold.zero_weight_()
        for value in optimizer.state.get(parameter, {}).values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                hold.zero_(value)
    if isinstance(optimizer, LBFGS):
        for vector in _lbfgs_vectors(optimizer):
            parameters = list(_parameters_of(optimizer))
            for parameter, part in zip(
                parameters, vector.split([p.numel() for p in parameters]), strict=True
            ):
                if parameter in held:
                    held[parameter].zero_(part.view(parameter.shape))


def _lbfgs_vectors(optimizer: LBFGS) -> Iterator[Tensor]:
    for state in optimizer.state.values():
        yield from (state[key] for key in _LBFGS_VECTORS if state.get(key) is not None)
        for key in _LBFGS_HISTORIES:
            yield from state.get(key) or ()


def _renew_curvature(optimizer: LBFGS) -> None:
    """Bring LBFGS's scalars back in line with its history, after parts of the history were zeroed."""
    for state in optimizer.state.values():
        if not state.get("old_dirs"):
            continue
        pairs = [(y, s, y.dot(s)) for y, s in zip(state["old_dirs"], state["old_stps"], strict=True)]
        pairs = [(y, s, ys) for y, s, ys in pairs if ys > _LBFGS_LEAST_CURVATURE]
        state["old_dirs"] = [y for y, _, _ in pairs]
        state["old_stps"] = [s for _, s, _ in pairs]
        state["ro"] = [1.0 / ys for _, _, ys in pairs]
        state["H_diag"] = pairs[-1][2] / pairs[-1][0].dot(pairs[-1][0]) if pairs else 1


# ------------------------------------------------------------------------------------------------------------
# Counting


@dataclass(frozen=True)
class LayerSparsity:
    """What is left of one weight."""

    name: str
    shape: tuple[int, ...]
    weights: int
    """How many weights there are."""
    kept: int
    """How many the mask keeps; all of them where there is no mask."""
    masked: bool
    zeros: int
    """How many are exactly zero just now, pruned or not."""

    @property
    def sparsity(self) -> float:
        """The fraction removed, in [0, 1]."""
        return _removed(self.kept, self.weights)


@dataclass(frozen=True)
class SparsityReport:
    """What is left of a model, layer by layer and overall; `print` it for a table."""

    layers: tuple[LayerSparsity, ...]
    """The prunable weights, and whatever else carries a mask."""
    parameters: int
    """All parameters of the model, without those that a tweak added."""
    parameters_kept: int
    """Those of them that no mask removes."""
    added_parameters: int
    """Parameters that tweaks added (projections, normalisation, learned strengths)."""
    added_kept: int
    """Those of them that no mask removes."""

    @property
    def weights(self) -> int:
        """How many prunable weights there are."""
        return sum(layer.weights for layer in self.layers)

    @property
    def kept(self) -> int:
        """How many of the prunable weights are kept."""
        return sum(layer.kept for layer in self.layers)

    @property
    def overall(self) -> float:
        """The fraction removed of the prunable weights: what papers call the sparsity."""
        return _removed(self.kept, self.weights)

    @property
    def of_all_parameters(self) -> float:
        """The fraction removed of all parameters of the model, without what tweaks added."""
        return _removed(self.parameters_kept, self.parameters)

    @property
    def overall_with_added(self) -> float:
        """`overall` with what tweaks added counted as kept: compare with a plain ticket of this sparsity."""
        return _removed(self.kept + self.added_kept, self.weights)

    @property
    def of_all_parameters_with_added(self) -> float:
        """`of_all_parameters` with what tweaks added counted as kept; below 0 if they add more."""
        return _removed(self.parameters_kept + self.added_kept, self.parameters)

    def __str__(self) -> str:
        kept, parameters_kept = self.kept, self.parameters_kept
        layers = [
            _row(x.name, x.weights, x.kept, "x".join(map(str, x.shape)), x.zeros, x.masked)
            for x in self.layers
        ]
        totals = [
            _row("prunable weights", self.weights, kept),
            _row("all parameters", self.parameters, parameters_kept),
        ]
        if self.added_parameters:
            totals += [
                ("added by tweaks", "", f"{self.added_parameters:,}", f"{self.added_kept:,}", "", ""),
                _row("prunable, added counted", self.weights, kept + self.added_kept),
                _row("all, added counted", self.parameters, parameters_kept + self.added_kept),
            ]
        head = ("prunable weight", "shape", "weights", "kept", "sparsity", "exact zeros")
        columns = list(zip(*[head, *layers, *totals], strict=True))
        widths = [max(map(len, column)) for column in columns]
        rule = tuple("-" * width for width in widths)
        rows = [head, rule, *layers, rule, *totals]
        return "\n".join(
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
            for row in rows
        )


def sparsity(
    model: nn.Module,
    *,
    layers: Iterable[str] | None = None,
    include: Selection | None = None,
    exclude: Selection | None = None,
) -> SparsityReport:
    """Count what is left of a model: per layer, overall, and with what tweaks added (paper, section 3).

    A masked layer is counted by its mask. A layer without one counts as dense, whatever it holds; its exact
    zeros are shown beside it. A layer that was pruned completely shows as 100 %. A tweak's parameters are
    counted apart, as kept: the released code of the paper adds a dense projection per skip, several times what
    survives at 97 %.

    Args:
        model: any module, masked or not. It is only read.
        layers, include, exclude: which weights count as prunable, as in `prunable_weights`. Masked ones
            always do.

    Raises:
        ValueError: as `prunable_weights` for a wrong selection.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(4, 1)
        >>> ticket = apply_masks(layer, {"weight": torch.tensor([[True, False, False, False]])})
        >>> report = sparsity(ticket)
        >>> report.overall, report.of_all_parameters
        (0.75, 0.6)
        >>> print(report)
        prunable weight   shape  weights  kept  sparsity  exact zeros
        ----------------  -----  -------  ----  --------  -----------
        weight              1x4        4     1   75.00 %            3
        ----------------  -----  -------  ----  --------  -----------
        prunable weights               4     1   75.00 %
        all parameters                 5     2   60.00 %
    """
    added = set(added_modules(model))
    places: dict[nn.Parameter, _Place] = {}
    for place in _places(model):
        first = places.setdefault(place.parameter, place)
        if first.stored_mask() is None and place.stored_mask() is not None:
            places[place.parameter] = place  # a tied weight counts once, by its mask
    kept = {
        parameter: parameter.numel() if place.stored_mask() is None else int(place.mask().sum())
        for parameter, place in places.items()
    }
    everything = dict.fromkeys(model.parameters())
    of_tweaks = {parameter for module in added for parameter in module.parameters()}
    of_model = [parameter for parameter in everything if parameter not in of_tweaks]
    chosen = {w.parameter for w in select_weights(model, layers=layers, include=include, exclude=exclude)}
    return SparsityReport(
        layers=tuple(
            _count_layer(place, kept[parameter])
            for parameter, place in places.items()
            if parameter not in of_tweaks and (parameter in chosen or place.stored_mask() is not None)
        ),
        parameters=sum(parameter.numel() for parameter in of_model),
        parameters_kept=sum(kept.get(parameter, parameter.numel()) for parameter in of_model),
        added_parameters=sum(parameter.numel() for parameter in of_tweaks),
        added_kept=sum(kept.get(parameter, parameter.numel()) for parameter in of_tweaks),
    )


def _count_layer(place: _Place, kept: int) -> LayerSparsity:
    weight = place.parameter.detach()
    masked = place.stored_mask() is not None
    zeros = weight == 0
    if masked:
        zeros |= ~place.mask()  # in other forms than ours the parameter keeps its value beneath the mask
    return LayerSparsity(place.name, tuple(weight.shape), weight.numel(), kept, masked, int(zeros.sum()))


def _removed(kept: int, total: int) -> float:
    return 1 - kept / total if total else 0.0


def _row(
    label: str, total: int, kept: int, shape: str = "", zeros: int | None = None, masked: bool = True
) -> tuple[str, ...]:
    removed = f"{100 * _removed(kept, total):.2f} %" if masked else "no mask"
    return label, shape, f"{total:,}", f"{kept:,}", removed, "" if zeros is None else f"{zeros:,}"
