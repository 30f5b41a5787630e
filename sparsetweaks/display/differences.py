"""What differs between the tensors of two models where modules and counts may be the same."""

from __future__ import annotations

import re
from collections.abc import Mapping, Set

import torch
from torch import Tensor, nn

from sparsetweaks.display.parts import Mark
from sparsetweaks.forms import masked_places

_SCALE_TOLERANCE = 1e-5
"""How far kept weights may be from a multiple of what they were, relative to the largest, and count as scaled."""

Masks = Mapping[nn.Parameter, Tensor]


def differences(
    before: nn.Module, after: nn.Module, masks: tuple[Masks, Masks], paths: Set[str]
) -> tuple[dict[str, list[Mark]], list[str]]:
    """Compare the parameters, masks and buffers that two models have under the same names.

    Args:
        before, after: the models; they are only read.
        masks: of each, by parameter.
        paths: of the modules of `after` that are shown.

    Returns:
        Marks by path, for weights that were multiplied by a number and masks that keep others; and a note for
        everything else that differs.
    """
    old, new = _parameters_by_name(before), _parameters_by_name(after)
    both = [(name, old[name], new[name]) for name in new if name in old]
    pairs = [(name, a, b) for name, a, b in both if a.shape == b.shape]
    marks: dict[str, list[Mark]] = {}
    shared = {path for path, _ in before.named_modules()} & {path for path, _ in after.named_modules()}
    notes = _only(_within(old, shared), _within(new, shared), "parameter tensor")
    notes.append(_about("the names in the state_dict of {}", _renamed(before, after, pairs)))
    notes.append(_about("the shapes of {}", len(both) - len(pairs)))
    notes.append(_about("the dtypes of {}", sum(a.dtype != b.dtype for _, a, b in pairs)))
    notes.append(_compare_masks(pairs, masks, marks, paths))
    notes += _only(*_masked(pairs, masks), "mask")
    notes.append(_compare_values(pairs, masks, marks, paths))
    notes.append(_compare_frozen(pairs))
    notes += _compare_buffers(_buffers(before, shared), _buffers(after, shared))
    return marks, [note for note in notes if note]


def _parameters_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by their logical names, in whatever form they are masked."""
    named = model.named_parameters()
    return {
        re.sub(r"(^|\.)parametrizations\.(\w+)\.original$", r"\1\2", name.removesuffix("_orig")): parameter
        for name, parameter in named
    }


def _renamed(before: nn.Module, after: nn.Module, pairs: Pairs) -> int:
    """How many parameters are there under another name, which says in what form they are masked."""
    old, new = ({id(p): name for name, p in model.named_parameters()} for model in (before, after))
    return sum(old[id(a)] != new[id(b)] for _, a, b in pairs)


def _masked(pairs: Pairs, masks: tuple[Masks, Masks]) -> tuple[set[str], set[str]]:
    """The names of the parameters that have a mask before and after."""
    return {name for name, a, _ in pairs if a in masks[0]}, {name for name, _, b in pairs if b in masks[1]}


def _within(named: Mapping[str, Tensor], paths: Set[str]) -> set[str]:
    """The names of tensors that these modules hold."""
    return {name for name in named if name.rpartition(".")[0] in paths}


def _only(before: Set[str], after: Set[str], kind: str) -> list[str]:
    """What is there by name in one model alone."""
    counts = (len(before - after), "before"), (len(after - before), "after")
    return [
        f"{_counted(count, kind)} {'is' if count == 1 else 'are'} only {when}"
        for count, when in counts
        if count
    ]


def _about(what: str, count: int, kind: str = "parameter tensor") -> str:
    return f"{what.format(_counted(count, kind))} differ" if count else ""


def _counted(count: int, kind: str = "parameter tensor") -> str:
    return f"{count:,} {kind}{'' if count == 1 else 's'}"


def _mark(
    marks: dict[str, list[Mark]], paths: Set[str], name: str, kind: str, text: str, value: str = ""
) -> None:
    """A mark on the innermost module around a parameter that is shown; a skip is part of its convolution there."""
    path, _, _ = name.rpartition(".")
    while path and path not in paths:
        path, _, _ = path.rpartition(".")
    attribute = name.removeprefix(f"{path}.") if path else name
    marks.setdefault(path, []).append(Mark(kind, f"{attribute} {text}", value))


Pairs = list[tuple[str, nn.Parameter, nn.Parameter]]


def _compare_masks(
    pairs: Pairs, masks: tuple[Masks, Masks], marks: dict[str, list[Mark]], paths: Set[str]
) -> str:
    """Masks that keep what they did not; that one keeps less is seen from its count."""
    tensors = lost = gained = 0
    for name, a, b in pairs:
        if a not in masks[0]:
            continue
        kept = masks[0][a]
        kept_after = masks[1][b].to(kept.device) if b in masks[1] else torch.ones_like(kept)
        revived = int((kept_after & ~kept).sum())
        if revived and b in masks[1]:
            tensors, gained, lost = tensors + 1, gained + revived, lost + int((kept & ~kept_after).sum())
            _mark(marks, paths, name, "mask", "mask differs")
    if not tensors:
        return ""
    weights = (
        f"{_counted(lost, 'weight')} {'is' if lost == 1 else 'are'} kept only before, {gained:,} only after"
    )
    return f"{_about('the masks of {}', tensors, 'weight tensor')}: {weights}"


def _compare_values(
    pairs: Pairs, masks: tuple[Masks, Masks], marks: dict[str, list[Mark]], paths: Set[str]
) -> str:
    """Marks what was multiplied by a number, and says how many others differ."""
    known = [(name, a, b) for name, a, b in pairs if not (a.is_meta or b.is_meta)]
    without = len(pairs) - len(known)
    are = "is" if without == 1 else "are"
    unknown = (
        f"{_counted(without)} {are} on the meta device: their values are not compared" if without else ""
    )
    other = 0
    for name, a, b in known:
        factor = _factor(a, b, masks)
        if factor is None:
            other += 1
        elif factor != 1:
            _mark(marks, paths, name, "scaled", "scaled", f" ×{factor:.3g}")
    found = f"the kept values of {other:,} of {_counted(len(known))} differ" if other else ""
    return "; ".join(filter(None, (found, unknown)))


def _factor(before: nn.Parameter, after: nn.Parameter, masks: tuple[Masks, Masks]) -> float | None:
    """The positive number by which what both keep of `before` was multiplied, or None if there is no single one."""
    a, b = before.detach(), after.detach().to(before.device)
    if _equal(a, b):
        return 1.0
    for parameter, known in ((before, masks[0]), (after, masks[1])):
        if parameter in known:
            pruned = ~known[parameter].to(a.device)
            a, b = a.masked_fill(pruned, 0), b.masked_fill(pruned, 0)
    if _equal(a, b):
        return 1.0
    if a.numel() < 2 or not a.is_floating_point():
        return None
    a, b = a.double().flatten(), b.double().flatten()
    size = a.dot(a)
    factor = float(a.dot(b) / size) if size else 0.0
    close = bool(((b - factor * a).abs() <= _SCALE_TOLERANCE * b.abs().max()).all())
    return factor if close and factor > 0 and abs(factor - 1) > _SCALE_TOLERANCE else None


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether all values are the same, one that is not a number being the same as another such."""
    a, b = (each if each.layout == torch.strided else each.to_dense() for each in (a, b))
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _compare_frozen(pairs: Pairs) -> str:
    frozen = sum(not a.requires_grad and b.requires_grad for _, a, b in pairs)
    since = sum(a.requires_grad and not b.requires_grad for _, a, b in pairs)
    if not frozen and not since:
        return ""
    are = "is" if frozen == 1 else "are"
    return f"requires_grad differs: {_counted(frozen)} {are} frozen only before, {since:,} only after"


def _compare_buffers(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> list[str]:
    """What differs in buffers of the same names."""
    both = [(old[name], new[name]) for name in new if name in old]
    notes = _only(old.keys(), new.keys(), "buffer")
    if other := sum(a.dtype != b.dtype for a, b in both):
        notes.append(_about("the dtypes of {}", other, "buffer"))
    known = [(a, b) for a, b in both if not (a.is_meta or b.is_meta)]
    other = sum(a.shape != b.shape or not _equal(a, b.to(a.device)) for a, b in known)
    if other:
        notes.append(f"the values of {other:,} of {_counted(len(both), 'buffer')} differ")
    return notes


def _buffers(model: nn.Module, paths: Set[str]) -> dict[str, Tensor]:
    """Those of these modules by name, masks aside."""
    masks = {id(mask) for place in masked_places(model) for mask in place.stored_masks()}
    return {
        name: buffer
        for name, buffer in model.named_buffers()
        if name.rpartition(".")[0] in paths and id(buffer) not in masks
    }
