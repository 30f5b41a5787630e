"""What there is to show of a model: its modules as a tree of parts, with counts, marks and arcs.

`read` reads one model, `pair` lays the readings of two models side by side. Both give the same plain tree, which
`text` and `html` draw; neither of these sees a model.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from sparsetweaks.prunable import added_modules, select_weights
from sparsetweaks.surgery.programs import Rewritten, original_class
from sparsetweaks.surgery.sites import changes
from sparsetweaks.surgery.skips import Skip

_LONGEST_DETAIL = 40
_COMMA = re.compile(r", (?![^(]*\))")
"""Between two settings, not within the brackets of one."""
_UNTOLD = ("=False", "inplace=True", "dilation=1", "padding=0")


@dataclass(frozen=True)
class Counts:
    """What a part holds, everything inside it included; a tied tensor counts where it comes first."""

    parameters: int = 0
    kept: int = 0
    """Parameters that no mask removes: what is called non-zeros."""
    prunable: int = 0
    """Of the parameters, those that the sparsity is of: prunable weights, and whatever has a mask."""
    prunable_kept: int = 0
    added: int = 0
    """Of the parameters, those that a tweak added."""
    flops: int = 0
    flops_kept: int = 0
    """FLOPs on weights that are kept."""

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def sparsity(self) -> float | None:
        """The fraction removed of the prunable weights; None where there are none."""
        return 1 - self.prunable_kept / self.prunable if self.prunable else None


@dataclass(frozen=True)
class Mark:
    """Something to point out about a part: `kind` chooses the look; `value` may differ between parts that are alike."""

    kind: str
    text: str
    value: str = ""

    def __str__(self) -> str:
        return self.text + self.value


@dataclass(frozen=True)
class Arc:
    """A skip around the children number `first` to `last` of a part."""

    first: int
    last: int
    text: str


@dataclass(frozen=True)
class Part:
    """A module, or several that are alike, as it is shown."""

    name: str
    path: str
    kind: str
    detail: str = ""
    settings: tuple[str, ...] = ()
    """All that the module says of itself, of which the detail is the gist."""
    before: Counts | None = None
    after: Counts | None = None
    marks: tuple[Mark, ...] = ()
    children: tuple[Part, ...] = ()
    arcs: tuple[Arc, ...] = ()
    program: str = ""
    """The source of a forward that a surgery wrote."""
    times: int = 1
    """How many alike modules this stands for."""

    @property
    def counts(self) -> Counts:
        """What it holds; what it held, if it is gone."""
        return self.after or self.before or Counts()

    @property
    def changed(self) -> bool:
        """Whether the two models differ here or inside."""
        own = any(mark.kind != "shared" for mark in self.marks) or self.before != self.after
        return own or any(child.changed for child in self.children)

    def structure(self) -> object:
        """Equal for parts that are built alike, whatever their sizes."""
        return (self.kind, tuple((child.name, child.structure()) for child in self.children))

    def signature(self) -> object:
        """Equal for parts that are alike in all but their own name and their counts."""
        marks = tuple((mark.kind, mark.text) for mark in self.marks)
        states = (self.before is None, self.after is None, self.before == self.after)
        inner = tuple((child.name, child.signature()) for child in self.children)
        return (self.kind, self.detail, marks, states, self.arcs, inner)


def walk(part: Part) -> Iterator[Part]:
    """The part and everything inside it, in order."""
    yield part
    for child in part.children:
        yield from walk(child)


# ------------------------------------------------------------------------------------------------------ one model


@dataclass
class _Reading:
    """What is known of a model while its modules are read one by one."""

    masks: Mapping[nn.Parameter, Tensor]
    prunable: set[nn.Parameter]
    added: set[nn.Module]
    flops: Mapping[str, tuple[int, int]]
    calls: Mapping[str, list[Mark]]
    modules: dict[nn.Module, str] = field(default_factory=dict)
    parameters: set[nn.Parameter] = field(default_factory=set)


def read(
    model: nn.Module,
    masks: Mapping[nn.Parameter, Tensor],
    flops: Mapping[str, tuple[int, int]] | None = None,
) -> Part:
    """Read a model as a tree of parts.

    Args:
        model: any module; it is only read.
        masks: its masks by parameter.
        flops: a module's path to the FLOPs of its own forward: all of them, and those on weights that are kept.
    """
    prunable = {weight.parameter for weight in select_weights(model) if weight.parameter is not None}
    reading = _Reading(
        masks, prunable | set(masks), set(added_modules(model)), flops or {}, _call_marks(model)
    )
    return _with_arcs(_read("", "", model, reading), _skip_spans(model))


def _read(name: str, path: str, module: nn.Module, reading: _Reading) -> Part:
    kind, detail = original_class(module).__name__, _detail(module)
    first = reading.modules.setdefault(module, path)
    if first != path:
        same = Mark("shared", f"same as {first or 'the model'}")
        return Part(name, path, kind, detail, after=Counts(), marks=(same,))
    counts, marks, children = _own_counts(path, module, reading), list(reading.calls.get(path, ())), []
    for child_name, child in module._modules.items():
        if child is None or (child_name == "parametrizations" and parametrize.is_parametrized(module)):
            continue
        part = _read(child_name, f"{path}.{child_name}" if path else child_name, child, reading)
        if isinstance(child, Skip):  # shown as a mark and an arc, not as a child of its convolution
            counts += part.counts
            marks.append(_skip_mark(child, part.counts))
        else:
            children.append(part)
    if getattr(module, "added_by_tweak", False) and not isinstance(module, Skip):
        marks.append(Mark("added", "added by a tweak"))
    return Part(
        name,
        path,
        kind,
        detail,
        tuple(_COMMA.split(module.extra_repr())),
        after=sum((child.counts for child in children), counts),
        marks=tuple(marks),
        children=tuple(children),
        program=module._program.source if isinstance(module, Rewritten) else "",
    )


def _own_counts(path: str, module: nn.Module, reading: _Reading) -> Counts:
    own = [parameter for parameter in module._parameters.values() if parameter is not None]
    if parametrize.is_parametrized(module):
        own += module.parametrizations.parameters()  # type: ignore[union-attr, operator]
    flops, flops_kept = reading.flops.get(path, (0, 0))
    total = Counts(flops=flops, flops_kept=flops_kept)
    for parameter in own:
        if parameter in reading.parameters:
            continue
        reading.parameters.add(parameter)
        size = parameter.numel()
        kept = int(reading.masks[parameter].sum()) if parameter in reading.masks else size
        prunable = (size, kept) if parameter in reading.prunable else (0, 0)
        total += Counts(size, kept, *prunable, size if module in reading.added else 0)
    return total


def _detail(module: nn.Module) -> str:
    """The sizes of a layer, short."""
    if isinstance(module, _ConvNd):
        sizes = [f"{module.in_channels}→{module.out_channels}", "×".join(map(str, module.kernel_size))]
        if any(step != 1 for step in module.stride):
            sizes.append("/" + "×".join(map(str, dict.fromkeys(module.stride))))
        if any(step != 1 for step in module.dilation):
            sizes.append("dilated " + "×".join(map(str, dict.fromkeys(module.dilation))))
        if module.groups != 1:
            sizes.append(f"{module.groups} groups")
        return " ".join(sizes)
    if isinstance(module, nn.Linear):
        return f"{module.in_features}→{module.out_features}"
    if isinstance(module, _NormBase):
        return str(module.num_features)
    if isinstance(module, nn.LayerNorm):
        return "×".join(map(str, module.normalized_shape))
    said = [piece for piece in module.extra_repr().split(", ") if not piece.endswith(_UNTOLD)]
    text = " ".join(", ".join(said).split())
    for long, shorter in (("kernel_size=", ""), ("output_size=", "to "), ("=", " ")):
        text = text.replace(long, shorter)
    return text if len(text) <= _LONGEST_DETAIL else text[: _LONGEST_DETAIL - 1] + "…"


# ---------------------------------------------------------------------------------------- what surgeries have left


def _call_marks(model: nn.Module) -> dict[str, list[Mark]]:
    """By scope: the calls of functions and methods in its forward that were swapped."""
    swapped: Counter[tuple[str, str]] = Counter()
    for change in changes(model):
        to = change.tweak.partition(" to ")[2]
        for site in change.rewritten:
            if to and site.form in ("function", "method", "attribute"):
                swapped[site.scope, f"{site.kind} → {to}"] += 1
    marks: dict[str, list[Mark]] = {}
    for (scope, text), count in swapped.items():
        calls = "1 call" if count == 1 else f"{count} calls"
        marks.setdefault(scope, []).append(Mark("swap", f"{text} in {calls}"))
    return marks


def _skip_mark(skip: Skip, counts: Counts) -> Mark:
    strength, value = skip.strength, ""
    if isinstance(strength, nn.Parameter) and not strength.is_meta:
        value = f", now {float(strength.detach()):.3g}"
    beside = f", {counts.parameters:,} parameters" if counts.parameters > 1 else ""
    return Mark("skip", f"skip: {_in_words(skip)}", value + beside)


def _in_words(skip: Skip) -> str:
    return skip.extra_repr().replace("strength=learned", "learned").replace("=", " ")


def _skip_spans(model: nn.Module) -> list[tuple[str, str, str]]:
    """Where each skip starts (its convolution's path), where it is added (the end of the unit), and what it is."""
    skips = {
        path.rpartition(".")[0]: module for path, module in model.named_modules() if isinstance(module, Skip)
    }
    ends = dict.fromkeys(skips, "")
    for path, module in model.named_modules() if skips else ():
        inside = f"{path}." if path else ""
        for conv, end in _ends_in(module._program.source if isinstance(module, Rewritten) else ""):
            if inside + conv in skips:
                ends[inside + conv] = inside + end
    return [(conv, ends[conv] or conv, _in_words(skip)) for conv, skip in skips.items()]


def _ends_in(source: str) -> Iterator[tuple[str, str]]:
    """From the source of a rewritten forward: each convolution with a skip, and the module whose output it adds to.

    The source is a surgery's own, one call a line; reading it takes a hundredth of the time of tracing it again.
    """
    maker: dict[str, str] = {}
    for line in ast.walk(ast.parse(source)):
        if not (isinstance(line, ast.Assign) and isinstance(line.value, ast.Call)):
            continue
        path = _module_path(line.value.func)
        if path is None:
            continue
        maker |= {target.id: path for target in line.targets if isinstance(target, ast.Name)}
        output = line.value.args[1] if len(line.value.args) == 2 else None
        conv, _, name = path.rpartition(".")
        if name == "skip" and isinstance(output, ast.Name) and output.id in maker:
            yield conv, maker[output.id]


def _module_path(called: ast.expr) -> str | None:
    """`self.a.b` and `getattr(self, "0").b` as a path below the module."""
    if isinstance(called, ast.Name):
        return "" if called.id == "self" else None
    if isinstance(called, ast.Attribute):
        inside, name = _module_path(called.value), called.attr
    elif isinstance(called, ast.Call) and len(called.args) == 2 and isinstance(called.args[1], ast.Constant):
        inside, name = _module_path(called.args[0]), str(called.args[1].value)
    else:
        return None
    return None if inside is None else f"{inside}.{name}" if inside else name


def _with_arcs(part: Part, spans: Sequence[tuple[str, str, str]]) -> Part:
    """Give each arc to the smallest part that holds both of its ends."""
    by_parent: dict[str, list[tuple[str, str, str]]] = {}
    for start, end, text in spans:
        starts, ends = start.split("."), end.split(".")
        depth = 0
        while depth < min(len(starts), len(ends)) - 1 and starts[depth] == ends[depth]:
            depth += 1
        by_parent.setdefault(".".join(starts[:depth]), []).append((starts[depth], ends[depth], text))

    def place(part: Part) -> Part:
        number = {child.name: index for index, child in enumerate(part.children)}
        ends = [(number[a], number.get(b, number[a]), text) for a, b, text in by_parent.get(part.path, ())]
        arcs = tuple(Arc(min(a, b), max(a, b), text) for a, b, text in sorted(ends))
        return replace(part, arcs=arcs, children=tuple(map(place, part.children)))

    return place(part)


def lanes(arcs: Sequence[Arc]) -> list[int]:
    """A lane for each arc, so that no two that overlap share one; 0 is the innermost."""
    ends: list[int] = []
    chosen = []
    for arc in arcs:
        lane = next((index for index, end in enumerate(ends) if end < arc.first), len(ends))
        ends[lane : lane + 1] = [arc.last]
        chosen.append(lane)
    return chosen


# ----------------------------------------------------------------------------------------------------- two models


def pair(before: Part, after: Part, values: Mapping[str, Sequence[Mark]] | None = None) -> Part:
    """Lay two readings side by side: what is in both, in the order of the second; what is gone, where it was.

    Args:
        before, after: from `read`.
        values: marks to add to a part, by path.
    """
    marks = [mark for mark in after.marks if mark.kind == "shared" or not _has(before, mark)]
    if before.kind != after.kind:
        marks.insert(0, Mark("swap", f"{before.kind} → {after.kind}"))
    elif before.detail != after.detail:
        marks.insert(0, Mark("swap", f"{before.detail or 'default'} → {after.detail or 'default'}"))
    elif before.settings != after.settings:
        marks.insert(0, Mark("swap", _changed_settings(before.settings, after.settings)))
    if before.program != after.program:
        marks.append(Mark("rewritten", "forward rewritten"))
    gone = [
        mark
        for mark in before.marks
        if mark.kind == "skip" and not any(m.kind == "skip" for m in after.marks)
    ]
    marks += [Mark("removed", f"removed {mark.text}") for mark in gone]
    marks += (values or {}).get(after.path, ())

    old = {child.name: child for child in before.children}
    children = []
    for child in after.children:
        known = old.pop(child.name, None)
        children.append(pair(known, child, values) if known else _only(child, "added"))
    places = {child.name: index for index, child in enumerate(before.children)}
    for name, child in old.items():  # after the last of its elder siblings that is still there
        elder = [i for i, other in enumerate(children) if places.get(other.name, -1) in range(places[name])]
        children.insert(elder[-1] + 1 if elder else 0, _only(child, "removed"))
    moved = {child.name: index for index, child in enumerate(children)}
    names = [child.name for child in after.children]
    arcs = tuple(Arc(moved[names[a.first]], moved[names[a.last]], a.text) for a in after.arcs)
    return replace(after, before=before.after, marks=tuple(marks), children=tuple(children), arcs=arcs)


def _changed_settings(before: Sequence[str], after: Sequence[str]) -> str:
    """Those that only one of two has."""
    old, new = (
        ", ".join(x for x in one if x not in other) for one, other in ((before, after), (after, before))
    )
    return f"{old or 'default'} → {new or 'default'}"


def _has(part: Part, mark: Mark) -> bool:
    return any((mark.kind, mark.text) == (other.kind, other.text) for other in part.marks)


def _only(part: Part, what: str) -> Part:
    """A part that only one of two models has."""
    if what == "added":
        return replace(part, marks=(Mark("added", "added"), *(m for m in part.marks if m.kind != "added")))
    children = tuple(replace(_only(child, what), marks=()) for child in part.children)
    return replace(
        part, before=part.after, after=None, marks=(Mark("removed", "removed"),), children=children
    )


# -------------------------------------------------------------------------------------------------------- folding


@dataclass(frozen=True)
class Row:
    """One line of a folded tree: a part, or a run of neighbours that are alike (`part` then stands for their sum)."""

    part: Part
    open: bool
    start: int
    stop: int
    """The children of the parent that it stands for: from `start` up to, without, `stop`."""
    like: str = ""
    """Path of a part of the same structure that is shown open."""


def unfolded(part: Part, open: bool = True) -> list[Row]:
    """Every child of a part in a row of its own."""
    return [Row(child, open and bool(child.children), i, i + 1) for i, child in enumerate(part.children)]


_LONGEST_PERIOD = 12
_CONTAINERS = ("Sequential", "ModuleList", "ModuleDict")


def fold(part: Part, shown: dict[object, str]) -> list[Row]:
    """The children of a part as rows: a structure is opened where it is first met, and runs of alike are folded.

    Args:
        part: whose children are folded.
        shown: the structures that are open already, and where; those that open here are added.
    """
    rows: list[Row] = []
    numbers: dict[object, int] = {}
    alike = [numbers.setdefault(child.signature(), len(numbers)) for child in part.children]
    at = 0
    while at < len(alike):
        child = part.children[at]
        key = child.structure()
        opens = bool(child.children) and (child.changed or child.before is None)
        if opens and (key not in shown or (child.kind in _CONTAINERS and child.signature() not in shown)):
            shown[key] = shown[child.signature()] = child.path
            rows.append(Row(child, True, at, at + 1))
            at += 1
            continue
        period, times = _repeats(alike, at)
        if (
            period > 1 or not child.children
        ):  # layers, not blocks: start at the largest, and show one group first
            lead = _lead(part.children, alike, at, period, times)
            wanted = lead + period + (2 if period == 1 else 1)
            if times * period > wanted + 1:
                rows += [Row(part.children[i], False, i, i + 1) for i in range(at, at + lead + period)]
                at += lead + period
                times = _times(alike, at, period)
            else:
                times = 1
        if times > 1:
            stop = at + period * times
            group = part.children[at:stop]
            rows.append(Row(_merged(group, period, times), False, at, stop, shown.get(key, "")))
            at = stop
        else:
            rows.append(Row(child, False, at, at + 1, shown.get(key, "")))
            at += 1
    return rows


def _times(alike: Sequence[int], at: int, period: int) -> int:
    """How often the next `period` numbers come, one after the other."""
    times = 1
    while alike[at + times * period : at + (times + 1) * period] == alike[at : at + period]:
        times += 1
    return times


def _repeats(alike: Sequence[int], at: int) -> tuple[int, int]:
    """The period that folds most from here on, and how often it comes."""
    best = (1, 1)
    for period in range(1, min(_LONGEST_PERIOD, (len(alike) - at) // 2) + 1):
        times = _times(alike, at, period)
        if times > 1 and period * times > best[0] * best[1]:
            best = (period, times)
    return best


def _lead(children: Sequence[Part], alike: Sequence[int], at: int, period: int, times: int) -> int:
    """How many children to pass over so that a repeated group starts with its largest layer."""
    sizes = [part.counts.parameters for part in children[at : at + period]]
    lead = sizes.index(max(sizes))
    return lead if _times(alike, at + lead, period) >= times - 1 else 0


def _merged(group: Sequence[Part], period: int, times: int) -> Part:
    """Alike parts as one, with the sums of their counts."""
    before, after = ([getattr(each, side) for each in group] for side in ("before", "after"))
    first, last = group[0], group[-1]
    kinds = ", ".join(each.kind for each in group[:period])
    said: dict[tuple[str, str], set[str]] = {}
    for mark in (mark for each in group for mark in each.marks if mark.kind != "shared"):
        said.setdefault((mark.kind, mark.text), set()).add(mark.value)
    return Part(
        f"{first.name}–{last.name[_common(first.name, last.name) :]}",
        first.path,
        kinds,
        first.detail if period == 1 else "",
        before=None if None in before else sum(before, Counts()),
        after=None if None in after else sum(after, Counts()),
        marks=tuple(
            Mark(kind, text, values.pop() if len(values) == 1 else "")
            for (kind, text), values in said.items()
        ),
        times=times,
    )


def _common(first: str, last: str) -> int:
    """How many characters two names start with in common, the digits of a number left together."""
    pairs = zip(first, last)
    count = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    while count and first[count - 1].isdigit():
        count -= 1
    return count
