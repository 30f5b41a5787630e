"""Prove that a tweak kept what it had to keep: masks, zeros, values, tying, and the function."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sparsetweaks.calling import call
from sparsetweaks.copying import check_model, copy_model
from sparsetweaks.cost import counted
from sparsetweaks.errors import SurgeryError
from sparsetweaks.forms import Place, places
from sparsetweaks.masks import find_masks, listed
from sparsetweaks.probing import rng_restored
from sparsetweaks.prunable import check_values

_SHOWN = 3  # how many names a line gives before it only counts the rest

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel)


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    passed: bool | None
    """None where there was nothing to judge."""
    found: str

    def __str__(self) -> str:
        verdict = {True: "ok", False: "FAILED", None: "-"}[self.passed]
        return f"{verdict:6}  {self.name}: {self.found}"


@dataclass(frozen=True)
class Verification:
    """What `verify` found; `print` it for one line per check."""

    checks: tuple[Check, ...]
    added_parameters: int
    """Parameters that are there now and were not before."""
    added_nonzeros: int
    """Those of them that no mask removes."""
    added_flops: int | None
    """More than before, in one forward, as `cost` counts; None without inputs."""
    added_effective_flops: int | None
    """The same without what masks remove."""
    largest_difference: float | None
    """Between the outputs, over both modes; None where they were not compared."""

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return not self.failed

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.passed is False)

    def raise_if_failed(self) -> Verification:
        """Return the report itself where every check passed.

        Raises:
            SurgeryError: names each check that failed and what it found.
        """
        if self.failed:
            lines = "\n".join(f"  {check.name}: {check.found}" for check in self.failed)
            raise SurgeryError(f"the model is not what it was where it should be:\n{lines}")
        return self

    def __str__(self) -> str:
        return "\n".join(map(str, self.checks))


def verify(
    before: nn.Module,
    after: nn.Module,
    *,
    inputs: Any = None,
    neutral: bool = True,
    trained: bool = False,
    zeros: bool = False,
) -> Verification:
    """Compare a model with what a tweak, a conversion or a training made of it, and report check by check.

    Looked at: the masks, whatever forms both have; weights beneath them that are not zero any more; every
    parameter and buffer that was there (its name, dtype, device, shape, memory format, `requires_grad`, value
    and what it is tied to; a masked weight by the values that the forward sees); with `inputs`, the function;
    and what was added.

    Args:
        before: the model as it was.
        after: what became of it, also wrapped by torch.compile, DistributedDataParallel or `AveragedModel`.
            Neither is changed: functions are compared on copies, with generators put back.
        inputs: what one call of the model takes, without labels: a tensor, a tuple of arguments or a mapping of keyword
            arguments. Outputs and gradients are then compared in eval and in training mode, and FLOPs counted
            (by `cost`).
        neutral: whether the functions must be equal bit for bit, as at every tweak's neutral setting (the
            default). False reports the largest difference and judges nothing.
        trained: whether `after` was trained or rescaled, so that values and the function differ on purpose; then
            only masks, zeros and structure are judged.
        zeros: also read plain zeros of prunable weights as masks, as in `find_masks`.

    Returns:
        A `Verification`: print it, ask its `ok`, or call `raise_if_failed()`.

    Raises:
        TypeError: what is given is no module.
        SurgeryError: a model's masks cannot be read (`find_masks` says why) or have no values (meta device); or
            `before` fails on the inputs in both modes.

    Example:
        >>> import torch, sparsetweaks as st
        >>> model = st.prune(torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.ReLU()), 0.5)
        >>> print(verify(model, st.inject_skips(model), inputs=torch.ones(2, 4, 5, 5)))
        ok      masks: 1 as they were
        ok      zeros: 72 weights are pruned, none has come back
        ok      names: 2 parameters and buffers, all there
        ok      properties: dtype, device, shape, memory format and requires_grad as they were
        ok      values: equal
        ok      tying: as it was
        ok      function: equal bit for bit, outputs and gradients, in eval and in training mode
        -       added: 1 parameters, 1 of them non-zero: '0.skip.strength'; FLOPs 14,400, effective 7,200
    """
    for model in (before, after):
        check_model(model)
    after = _unwrapped(after)
    before = _unwrapped(before)
    old, new = _tensors_of(before), _tensors_of(after)
    masks, found = find_masks(before, zeros=zeros), find_masks(after, zeros=zeros)
    check_values(masks | found)
    checks = [
        _check_masks(masks, found, old, new, zeros),
        _check_zeros(masks, new),
        _check_names(old, new),
        _check_properties(old, new),
        _check_values(old, new, trained),
        _check_tying(old, new),
    ]
    comparison = None
    if inputs is not None and not trained:
        comparison = _compare_functions(before, after, _by_all_names(masks, old), inputs)
        checks.append(_check_function(comparison, neutral))
    added = {
        name: each for name, each in new.items() if name not in old and isinstance(each.tensor, nn.Parameter)
    }
    flops = _Flops(None, None, "") if inputs is None else _compare_flops(before, after, inputs)
    checks.append(_describe_added(added, flops))
    return Verification(
        tuple(checks),
        added_parameters=sum(each.tensor.numel() for each in added.values()),
        added_nonzeros=sum(map(_nonzeros, added.values())),
        added_flops=flops.all,
        added_effective_flops=flops.effective,
        largest_difference=None if comparison is None else comparison.largest,
    )


# ------------------------------------------------------------------------------------------------------------
# What a model holds, by names that no form of mask changes


@dataclass(frozen=True, eq=False)
class _Held:
    """A parameter or buffer under its logical name."""

    tensor: Tensor
    place: Place | None
    """Where its mask lives, if it has one."""

    def value(self) -> Tensor:
        """The values that the forward sees."""
        return self.tensor.detach() if self.place is None else self.place.value()


def _tensors_of(model: nn.Module) -> dict[str, _Held]:
    """Every parameter and buffer but the masks, and what belongs to a mask's form."""
    masked = [place for place in places(model) if place.masked]
    by_module: dict[nn.Module, list[Place]] = {}
    hidden: set[tuple[int, str]] = set()
    inside: set[nn.Module] = set()
    for place in masked:
        by_module.setdefault(place.module, []).append(place)
        hidden |= {(id(buffers), key) for buffers, key in place.slots()}
        if place.form == "parametrization":
            inside |= set(place.module.parametrizations[place.attribute].modules())  # type: ignore[index, union-attr]
    held: dict[str, _Held] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if module in inside:
            continue
        dot = prefix + "." if prefix else ""
        behind = {id(place.parameter) for place in by_module.get(module, [])}
        for place in by_module.get(module, []):
            held[dot + place.attribute] = _Held(place.parameter, place)
        for group in (module._parameters, module._buffers):
            for key, tensor in group.items():
                if tensor is not None and id(tensor) not in behind and (id(group), key) not in hidden:
                    held[dot + key] = _Held(tensor, None)
    return held


def _by_all_names(masks: Mapping[str, Tensor], held: Mapping[str, _Held]) -> dict[str, Tensor]:
    """The masks under every name of a tied weight."""
    by_tensor = {id(held[name].tensor): mask for name, mask in masks.items()}
    return {name: by_tensor[id(each.tensor)] for name, each in held.items() if id(each.tensor) in by_tensor}


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, _WRAPPERS):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


# ------------------------------------------------------------------------------------------------------------
# The checks


def _check_masks(
    masks: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    old: Mapping[str, _Held],
    new: Mapping[str, _Held],
    zeros: bool,
) -> Check:
    if not masks:
        hint = "" if zeros else " (zeros=True reads plain zeros)"
        return Check("masks", None if not found else False, f"none before{hint}, {len(found)} now")
    of_found = {id(new[name].tensor): found[name] for name in found if name in new}
    elsewhere = {
        name: of_found[id(new[name].tensor)]
        for name in masks
        if name in new and id(new[name].tensor) in of_found
    }
    found = {**elsewhere, **found}  # a tied weight is masked under whichever of its names
    faults = [f"{name!r} has lost its mask" for name in masks if name not in found]
    faults += [
        f"{name!r} keeps {int(found[name].sum()):,} weights, was {int(mask.sum()):,}"
        if int(found[name].sum()) != int(mask.sum())
        else f"{name!r} keeps other weights"
        for name, mask in masks.items()
        if name in found and not _equal(mask, found[name])
    ]
    of_masked = {id(old[name].tensor) for name in masks if name in old}
    added = [name for name in found if name not in masks]
    tied = [name for name in added if name in old and id(old[name].tensor) in of_masked]
    faults += [f"{name!r} has a mask now" for name in added if name not in tied]
    return _judge("masks", faults, f"{len(masks)} as they were")


def _check_zeros(masks: Mapping[str, Tensor], new: Mapping[str, _Held]) -> Check:
    if not masks:
        return Check("zeros", None, "no weight is pruned")
    faults = []
    for name, mask in masks.items():
        if name in new and new[name].tensor.shape == mask.shape:
            value = new[name].value()
            revived = int(((value != 0) & ~mask.to(value.device)).sum())
            if revived:
                faults.append(f"{revived:,} of {name!r} have come back")
    pruned = sum(int((~mask).sum()) for mask in masks.values())
    return _judge("zeros", faults, f"{pruned:,} weights are pruned, none has come back")


def _check_names(old: Mapping[str, _Held], new: Mapping[str, _Held]) -> Check:
    faults = [f"{name!r} is gone" for name in old if name not in new]
    return _judge("names", faults, f"{len(old)} parameters and buffers, all there")


def _check_properties(old: Mapping[str, _Held], new: Mapping[str, _Held]) -> Check:
    faults = []
    for name, was in old.items():
        if name in new:
            one, other = _properties(was.tensor), _properties(new[name].tensor)
            faults += [
                f"{key} of {name!r} is {other[key]}, was {one[key]}" for key in one if one[key] != other[key]
            ]
    return _judge("properties", faults, "dtype, device, shape, memory format and requires_grad as they were")


def _properties(tensor: Tensor) -> dict[str, Any]:
    facts = {
        "kind": "a parameter" if isinstance(tensor, nn.Parameter) else "a buffer",
        "dtype": tensor.dtype,
        "device": tensor.device,
        "requires_grad": tensor.requires_grad,
    }
    if is_lazy(tensor):
        return facts | {"shape": "not known yet"}
    strides = tensor.stride() if tensor.layout == torch.strided else tensor.layout
    return facts | {"shape": tuple(tensor.shape), "memory format (strides)": strides}


def _check_values(old: Mapping[str, _Held], new: Mapping[str, _Held], trained: bool) -> Check:
    if trained:
        return Check("values", None, "not compared, as the model was trained")
    faults = []
    for name, was in old.items():
        if name not in new or is_lazy(was.tensor) or was.tensor.is_meta:
            continue
        one, other = was.value(), new[name].value()
        if not _equal(one, other):
            faults.append(f"{name!r} differs{_by_how_much(_gap(one, other))}")
    check = _judge("values", faults, "equal")
    if not faults:
        return check
    return dataclasses.replace(
        check, found=f"{check.found}; if it was trained or rescaled in between, give trained=True"
    )


def _check_tying(old: Mapping[str, _Held], new: Mapping[str, _Held]) -> Check:
    common = [name for name in old if name in new]
    first_before: dict[int, str] = {}
    first_after: dict[int, str] = {}
    faults = []
    for name in common:
        was = first_before.setdefault(id(old[name].tensor), name)
        now = first_after.setdefault(id(new[name].tensor), name)
        if was != now:
            pair = (was, name) if was != name else (now, name)
            faults.append(
                f"{pair[0]!r} and {pair[1]!r} are {'two tensors now' if was != name else 'one tensor now'}"
            )
    return _judge("tying", faults, "as it was")


def _judge(name: str, faults: list[str], fine: str) -> Check:
    if not faults:
        return Check(name, True, fine)
    more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
    return Check(name, False, "; ".join(faults[:_SHOWN]) + more)


# ------------------------------------------------------------------------------------------------------------
# The function


@dataclass
class _Comparison:
    largest: float = 0.0
    """The largest difference between outputs."""
    faults: list[str] = dataclasses.field(default_factory=list)
    modes: list[str] = dataclasses.field(default_factory=list)
    skipped: list[str] = dataclasses.field(default_factory=list)


def _compare_functions(
    before: nn.Module, after: nn.Module, masks: Mapping[str, Tensor], inputs: Any
) -> _Comparison:
    comparison, errors = _Comparison(), []
    for training, mode in ((False, "eval"), (True, "training")):
        try:
            outputs, gradients = _run(before, inputs, training)
        except (
            Exception
        ) as error:  # whatever the given model raises in this mode (one image, batch statistics)
            errors.append(error)
            reason = error.__cause__ or error
            comparison.skipped.append(
                f"not compared in {mode} mode, where the given model raises {reason!r:.120}"
            )
            continue
        found, found_gradients = _run(after, inputs, training)
        comparison.modes.append(mode)
        if [each.shape for each in outputs] != [each.shape for each in found]:
            comparison.faults.append(f"{mode}: outputs of other shapes")
            comparison.largest = float("inf")
            continue
        pairs = [(one, other) for one, other in zip(outputs, found) if not _equal(one, other)]
        if pairs:
            gap = max(_gap(one, other) for one, other in pairs)
            comparison.largest = max(comparison.largest, gap)
            comparison.faults.append(f"{mode}: outputs differ{_by_how_much(gap)}")
        for name, gradient in gradients.items():
            if not _equal_where_kept(gradient, found_gradients.get(name), masks.get(name)):
                comparison.faults.append(f"{mode}: the gradient of {name!r} differs")
    if not comparison.modes:
        raise errors[0]
    return comparison


def _check_function(comparison: _Comparison, neutral: bool) -> Check:
    modes = " and in ".join(comparison.modes) + " mode"
    skipped = "".join("; " + each for each in comparison.skipped)
    if not neutral:
        gap = f"outputs differ by up to {comparison.largest:.3g} in {modes}"
        return Check("function", None, f"{gap}; not judged, as neutral=False{skipped}")
    return _judge(
        "function", comparison.faults, f"equal bit for bit, outputs and gradients, in {modes}{skipped}"
    )


def _run(model: nn.Module, inputs: Any, training: bool) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    """The outputs of one call, and the gradient that each parameter of the model gets from them."""
    copied = copy_model(model).train(training)
    with _generators_put_back(model), torch.enable_grad():
        outputs = list(_tensors_in(call(copied, inputs)))
        loss = sum(_weighted_sum(output) for output in outputs if output.requires_grad)
        if isinstance(loss, Tensor):
            loss.backward()
    gradients = {
        name: held.tensor.grad
        for name, held in _tensors_of(copied).items()
        if isinstance(held.tensor, nn.Parameter)
    }
    return [output.detach() for output in outputs], gradients


def _weighted_sum(output: Tensor) -> Tensor:
    """A loss in which no two elements weigh the same, so that no gradient cancels."""
    weights = torch.arange(output.numel(), device=output.device, dtype=torch.float32).cos()
    return (output * weights.to(output.dtype).view(output.shape)).sum().abs()


def _equal_where_kept(one: Tensor | None, other: Tensor | None, mask: Tensor | None) -> bool:
    """Whether two gradients are; a pruned weight has one in some forms, and in others none."""
    if one is None or other is None:
        return one is other
    if mask is not None and one.shape == other.shape == mask.shape:
        one, other = one[mask.to(one.device)], other[mask.to(other.device)]
    return _equal(one, other)


@contextmanager
def _generators_put_back(model: nn.Module) -> Iterator[None]:
    """So that dropout draws the same in both models: each starts from the caller's state."""
    state = random.getstate()
    try:
        with rng_restored(model):
            yield
    finally:
        random.setstate(state)


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in an output: containers and dataclasses, in order."""
    parts: Iterable[Any] = ()
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        parts = value.values()
    elif isinstance(value, (list, tuple)):
        parts = value
    elif dataclasses.is_dataclass(value):
        parts = vars(value).values()
    for part in parts:
        yield from _tensors_in(part)


def _equal(one: Tensor, other: Tensor) -> bool:
    """Equal values, NaN like NaN."""
    if one.shape != other.shape:
        return False
    one, other = _dense(one), _dense(other.to(one.device))
    return bool(((one == other) | ((one != one) & (other != other))).all())


def _gap(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape or not one.numel():
        return float("inf")
    one, other = _dense(one), _dense(other)
    wide = torch.complex128 if one.is_complex() else torch.float64
    gap = (one.detach().to(wide) - other.detach().to(one.device, wide)).abs()
    return float(gap.nan_to_num(nan=float("inf")).max())


def _dense(tensor: Tensor) -> Tensor:
    """Sparse tensors, gradients of embeddings say, as what they stand for."""
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


def _by_how_much(gap: float) -> str:
    return f" by up to {gap:.3g}" if gap < float("inf") else ""


# ------------------------------------------------------------------------------------------------------------
# What was added


@dataclass(frozen=True)
class _Flops:
    """FLOPs more than before, and what to say of them."""

    all: int | None
    effective: int | None
    found: str


def _compare_flops(before: nn.Module, after: nn.Module, inputs: Any) -> _Flops:
    try:
        old, new = counted(before, inputs), counted(after, inputs)
    except SurgeryError as reason:
        return _Flops(None, None, f"; FLOPs not counted: {reason}")
    pairs = {"FLOPs": (old.flops, new.flops), "effective": (old.effective_flops, new.effective_flops)}
    found = ", ".join(
        f"{name} {was:,}{'' if was == now else f' -> {now:,}'}" for name, (was, now) in pairs.items()
    )
    return _Flops(new.flops - old.flops, new.effective_flops - old.effective_flops, "; " + found)


def _nonzeros(held: _Held) -> int:
    """How many of a parameter no mask removes, as `sparsity` counts."""
    return held.tensor.numel() if held.place is None else int(held.place.mask().sum())


def _describe_added(added: Mapping[str, _Held], flops: _Flops) -> Check:
    count, nonzeros = sum(each.tensor.numel() for each in added.values()), sum(map(_nonzeros, added.values()))
    found = f"{count:,} parameters, {nonzeros:,} of them non-zero: {listed(list(added), _SHOWN)}"
    return Check("added", None, (found if added else "no parameters") + flops.found)
