"""What an overview says in words and numbers, beside its tree of parts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sparsetweaks.display.parts import Mark, Part, pair, read
from sparsetweaks.masks import masks_by_parameter
from sparsetweaks.prunable import about_zeros, check_dense, plain_zeros, select_weights
from sparsetweaks.surgery.programs import original_class
from sparsetweaks.surgery.sites import Change, Site, changes

_SCALE_TOLERANCE = 1e-5
"""How far kept weights may be from a multiple of what they were, relative to the largest, and count as scaled."""


@dataclass(frozen=True)
class Total:
    """One number of a whole model, or of two."""

    label: str
    before: float | None
    after: float
    share: bool = False
    """Whether it is a fraction, to be shown in percent."""


@dataclass(frozen=True)
class Left:
    """The sites that a surgery left as they are for one reason."""

    tweak: str
    reason: str
    sites: tuple[Site, ...]


@dataclass(frozen=True)
class Facts:
    """All that is shown of one model, or of two."""

    title: str
    part: Part
    totals: tuple[Total, ...]
    done: tuple[Change, ...]
    left: tuple[Left, ...]
    notes: tuple[str, ...]
    has_flops: bool

    @property
    def of_two(self) -> bool:
        """Whether two models are shown."""
        return self.part.before is not None


def facts_of_one(model: nn.Module, flops: Mapping[str, tuple[int, int]] | None) -> Facts:
    """What there is to say about one model; `flops` as in `read`."""
    masks = _masks(model)
    zeros = plain_zeros(select_weights(model), masks)
    part, done = read(model, masks | zeros, flops), changes(model)
    notes = [*_about_masks(masks, zeros), *_about_flops(flops)]
    title = original_class(model).__name__
    return Facts(
        title, part, _totals(part, flops is not None), done, _left(done), tuple(notes), flops is not None
    )


def facts_of_two(
    before: nn.Module,
    after: nn.Module,
    flops: tuple[Mapping[str, tuple[int, int]], Mapping[str, tuple[int, int]]] | None,
) -> Facts:
    """What there is to say about two models side by side; `flops` of each, as in `read`."""
    masks = _masks(before), _masks(after)
    zeros = [plain_zeros(select_weights(model), of) for model, of in zip((before, after), masks, strict=True)]
    values, notes = _values(before, after, masks)
    counted = flops or (None, None)
    part = pair(
        read(before, masks[0] | zeros[0], counted[0]), read(after, masks[1] | zeros[1], counted[1]), values
    )
    earlier, done = changes(before), changes(after)
    if done[: len(earlier)] == earlier:
        done = done[len(earlier) :]
    if not part.changed:
        notes.insert(0, "no module, mask or count differs")
    names = [original_class(model).__name__ for model in (before, after)]
    title = names[0] if names[0] == names[1] else " → ".join(names)
    notes += [*_about_masks(masks[1], zeros[1]), *_about_flops(flops)]
    return Facts(
        title, part, _totals(part, flops is not None), done, _left(done), tuple(notes), flops is not None
    )


def _totals(part: Part, has_flops: bool) -> tuple[Total, ...]:
    before, after = part.before, part.counts
    rows: list[tuple[str, str]] = [("parameters", "parameters"), ("non-zeros", "kept")]
    if after.added or (before and before.added):
        rows.append(("of these from tweaks", "added"))
    if has_flops:
        rows += [("FLOPs", "flops"), ("FLOPs on kept weights", "flops_kept")]
    totals = [Total(label, getattr(before, name, None), getattr(after, name)) for label, name in rows]
    sparsity = after.sparsity
    if sparsity is not None:
        label = f"sparsity of the {after.prunable:,} prunable weights"
        totals.insert(
            len(rows) - 2 * has_flops, Total(label, before.sparsity if before else None, sparsity, share=True)
        )
    return tuple(totals)


def _left(done: Sequence[Change]) -> tuple[Left, ...]:
    groups: dict[tuple[str, str], list[Site]] = {}
    for change in done:
        for site in change.left:
            groups.setdefault((change.tweak, str(site.left)), []).append(site)
    return tuple(Left(tweak, reason, tuple(sites)) for (tweak, reason), sites in groups.items())


def _masks(model: nn.Module) -> dict[nn.Parameter, Tensor]:
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(f"{name!r} is not initialised yet: run one batch through the lazy model first")
    check_dense(dict(model.named_parameters()))
    masks = masks_by_parameter(model)
    if any(mask.is_meta for mask in masks.values()):
        raise ValueError("the masks are on the meta device and have no values: load the model first")
    return masks


def _about_masks(masked: Mapping[nn.Parameter, Tensor], zeros: Mapping[nn.Parameter, Tensor]) -> list[str]:
    if zeros:
        return [f"{about_zeros(zeros)}. Here they count as pruned"]
    return [] if masked else ["no masks: nothing is pruned"]


def _about_flops(flops: object) -> list[str]:
    return [] if flops is not None else ["FLOPs are counted where inputs= is given"]


# ------------------------------------------------------------------------------------------------ values that differ


def _values(
    before: nn.Module,
    after: nn.Module,
    masks: tuple[Mapping[nn.Parameter, Tensor], Mapping[nn.Parameter, Tensor]],
) -> tuple[dict[str, list[Mark]], list[str]]:
    """Marks on the modules whose parameters were multiplied by a number, and how many differ otherwise."""
    old, new = _parameters_by_name(before), _parameters_by_name(after)
    marks: dict[str, list[Mark]] = {}
    same = scaled = 0
    shared = [name for name in new if name in old and new[name].shape == old[name].shape]
    for name in shared:
        factor = _factor(old[name], new[name], masks)
        if factor == 1:
            same += 1
        elif factor is not None:
            scaled += 1
            path, _, attribute = name.rpartition(".")
            marks.setdefault(path, []).append(Mark("scaled", f"{attribute} scaled", f" ×{factor:.3g}"))
    other = len(shared) - same - scaled
    notes = []
    if other:
        notes.append(f"the kept values of {other} of {len(shared)} parameter tensors differ")
    return marks, notes


def _parameters_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by their logical names, in whatever form they are masked."""
    named = model.named_parameters()
    return {
        re.sub(r"(^|\.)parametrizations\.(\w+)\.original$", r"\1\2", name.removesuffix("_orig")): parameter
        for name, parameter in named
    }


def _factor(
    before: nn.Parameter,
    after: nn.Parameter,
    masks: tuple[Mapping[nn.Parameter, Tensor], Mapping[nn.Parameter, Tensor]],
) -> float | None:
    """The positive number by which what both keep of `before` was multiplied, or None if there is no single one."""
    if before.is_meta or after.is_meta:
        return 1.0
    a, b = before.detach(), after.detach().to(before.device)
    if torch.equal(a, b):
        return 1.0
    for parameter, known in ((before, masks[0]), (after, masks[1])):
        if parameter in known:
            pruned = ~known[parameter].to(a.device)
            a, b = a.masked_fill(pruned, 0), b.masked_fill(pruned, 0)
    if torch.equal(a, b):
        return 1.0
    if a.numel() < 2 or not a.is_floating_point():
        return None
    a, b = a.double().flatten(), b.double().flatten()
    size = a.dot(a)
    factor = float(a.dot(b) / size) if size else 0.0
    close = bool(((b - factor * a).abs() <= _SCALE_TOLERANCE * b.abs().max()).all())
    return factor if close and factor > 0 else None
