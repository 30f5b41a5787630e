"""What an overview says in words and numbers, beside its tree of parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sparsetweaks.display.differences import differences
from sparsetweaks.display.parts import Part, pair, read, walk
from sparsetweaks.masks import masks_by_parameter
from sparsetweaks.prunable import about_zeros, check_dense, plain_zeros, select_weights
from sparsetweaks.surgery.programs import original_class
from sparsetweaks.surgery.sites import Change, Site, changes


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
    counted = flops or (None, None)
    old, new = (
        read(model, kept | plain, count)
        for model, kept, plain, count in zip((before, after), masks, zeros, counted, strict=True)
    )
    marks, notes = differences(before, after, masks, {part.path for part in walk(new)})
    part = pair(old, new, marks)
    earlier, done = changes(before), changes(after)
    if done[: len(earlier)] == earlier:
        done = done[len(earlier) :]
    if not part.changed and not notes:
        notes.append("no module, mask, parameter or buffer differs")
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
