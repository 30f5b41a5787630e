"""What may be folded into what: the normalisations and skips after each layer, and why the others stay.

A layer and what follows it, call by call, are a *unit*. What can be merged is the part of that sequence which is the
same wherever the layer is called, up to the first normalisation or skip that is not affine or is called elsewhere too.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils import prune as torch_prune

from sparsetweaks.prunable import added_modules
from sparsetweaks.surgery import sites as s
from sparsetweaks.surgery.affine import forward_of, why_not_finite, why_not_layer, why_not_part
from sparsetweaks.surgery.dataflow import called, first_input, mutates
from sparsetweaks.surgery.mentions import DYNAMIC, INDEXES, LOOPS, SLICES
from sparsetweaks.surgery.norms import children_after
from sparsetweaks.surgery.programs import Trace, Untraceable
from sparsetweaks.surgery.scopes import Scopes, is_scope
from sparsetweaks.surgery.skips import Skip

_LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
_DROPOUT_FUNCTIONS = {
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d),
    *(F.alpha_dropout, F.feature_alpha_dropout),
}
_IDENTITY_FORWARDS = {
    nn.Identity.forward,
    *(nn.Dropout.forward, nn.Dropout1d.forward, nn.Dropout2d.forward, nn.Dropout3d.forward),
    *(nn.AlphaDropout.forward, nn.FeatureAlphaDropout.forward),
}


class Part(NamedTuple):
    """A normalisation or a skip, with its name in the model."""

    path: str
    module: Any


@dataclass
class Unit:
    """A layer with what is merged into it, and what stays although it follows the layer, with the reason.

    A normalisation or skip that follows no layer is a unit without one.
    """

    path: str
    layer: Any
    merged: list[Part] = field(default_factory=list)
    left: list[tuple[Part, str]] = field(default_factory=list)

    def site(self) -> s.Site:
        """Where `where=` finds it: by the layer."""
        left = None if self.merged else self.left[0][1]
        return s.Site(*_split(self.path), "folded" if self.merged else "kept", "unit", left=left)

    def left_sites(self) -> Iterator[s.Site]:
        """What stays, each by its own name."""
        for part, reason in self.left:
            yield s.Site(*_split(part.path), "kept", "module", left=reason)

    def cut(self, at: int, reason: str) -> None:
        """Merge what is before this place only, and less if even that would not be finite."""
        while True:
            rest = self.merged[at:]
            after = f"what it follows stays: {reason}"
            told = [(part, after if index else reason) for index, part in enumerate(rest)]
            self.merged, self.left = self.merged[:at], told + self.left
            found = why_not_finite(self.layer, self.modules()) if self.merged else None
            if found is None:
                return
            at, reason = len(self.merged) - 1, found

    def modules(self) -> list[nn.Module]:
        """What is merged into the layer, in order."""
        return [part.module for part in self.merged]


def _split(path: str) -> tuple[str, str]:
    scope, _, name = path.rpartition(".")
    return scope, name


# -------------------------------------------------------------------------------------------------------- the calls


@dataclass
class Calls:
    """Every call in the forwards that can be read, in eval mode.

    Attributes:
        of: by the id of a module, the scopes and nodes that call it.
        read: ids of modules whose tensors a forward reads without calling them.
        unread: ids of modules that a forward may call which cannot be read, and why it cannot.
        after: by the id of a BatchNorm with a forward of its own that can be read: its children that it calls after it
            normalised, which stay when that is merged.
        traces: the scopes that were read.
    """

    of: dict[int, list[tuple[nn.Module, fx.Node]]] = field(default_factory=dict)
    read: set[int] = field(default_factory=set)
    unread: dict[int, str] = field(default_factory=dict)
    after: dict[int, dict[str, nn.Module]] = field(default_factory=dict)
    traces: list[tuple[nn.Module, Trace]] = field(default_factory=list)


def read_calls(model: nn.Module) -> Calls:
    """Read the forward of every module that holds a layer, a normalisation or a skip."""
    calls, scopes = Calls(), Scopes()
    for module in model.modules():
        if isinstance(module, Skip) or not is_scope(module) or not any(map(_is_of_unit, module.modules())):
            continue
        try:
            trace = scopes.trace(module)
        except Untraceable as reason:
            for child in _within_reach(module, scopes.names(module)):
                calls.unread[id(child)] = str(reason)
            continue
        calls.traces.append((module, trace))
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            after = children_after(module, trace)
            if after is not None:
                calls.after[id(module)] = after
        for node in _nodes_in_eval(trace):
            if node.op == "call_module":
                calls.of.setdefault(id(called(node, module)), []).append((module, node))
            elif node.op == "get_attr":
                owner, _, _ = str(node.target).rpartition(".")
                if owner:
                    calls.read.add(id(module.get_submodule(owner)))
    return calls


def _nodes_in_eval(trace: Trace) -> Iterator[fx.Node]:
    for case in trace.cases:
        if not case.answers.get("self.training", False):
            yield from case.graph.nodes


_ANY_NAME = DYNAMIC | {
    "_modules",
    "children",
    "get_submodule",
    "modules",
    "named_children",
    "named_modules",
    "super",
}
"""Names by which code reaches children that it does not name."""


def _within_reach(module: nn.Module, names: Set[str]) -> Iterator[nn.Module]:
    """What a forward that cannot be read may call: its children; of containers that it takes apart the children, and of
    whatever it reaches those that its code names, or all where it reads attributes that it does not name."""
    pending = list(module.children())
    while pending:
        child = pending.pop()
        yield child
        listed = isinstance(child, (nn.ModuleList, nn.ModuleDict))
        apart = listed or (isinstance(child, nn.Sequential) and {SLICES, LOOPS, INDEXES} & names)
        pending += [
            each for name, each in child.named_children() if apart or _ANY_NAME & names or name in names
        ]


def _is_of_unit(module: nn.Module) -> bool:
    return isinstance(module, (*_LAYERS, Skip)) or _is_norm(module)


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._NormBase) or _kind(module).endswith("Norm")


def _is_batchnorm(module: nn.Module) -> bool:
    """Whether it is a BatchNorm, whoever wrote it; one of these that stays is named wherever it is."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or _kind(module).endswith("BatchNorm")


def _kind(module: nn.Module) -> str:
    """The name of the module's class, also where it was scripted, without the number of dimensions."""
    scripted = isinstance(module, torch.jit.ScriptModule)
    return str(module.original_name if scripted else type(module).__name__).rstrip("123d")


# -------------------------------------------------------------------------------------------------------- the units


def find_units(model: nn.Module, calls: Calls) -> list[Unit]:
    """Every layer that a normalisation or a skip follows, and every BatchNorm and skip that follows none."""
    paths = {id(module): path for path, module in model.named_modules()}
    added = set(added_modules(model))
    units, following = [], set()
    for path, module in model.named_modules():
        if isinstance(module, _LAYERS) and module not in added:
            unit = _unit_of(path, module, calls, paths)
            if unit is not None:
                units.append(unit)
                following |= {part.path for part in (*unit.merged, *(part for part, _ in unit.left))}
    for path, module in model.named_modules():
        own = isinstance(module, Skip) or (_is_batchnorm(module) and module not in added)
        if own and path not in following:
            units.append(Unit(path, None, left=[(Part(path, module), _why_apart(module, calls))]))
    order = {path: position for position, path in enumerate(paths.values())}
    return sorted(units, key=lambda unit: order[unit.path])


def _unit_of(path: str, layer: nn.Module, calls: Calls, paths: dict[int, str]) -> Unit | None:
    chains = [tuple(_followers(node, scope, calls)) for scope, node in calls.of.get(id(layer), [])]
    if not any(chains):
        return None
    same = [each[0] for each in itertools.takewhile(lambda each: len(set(each)) == 1, zip(*chains))]
    others = dict.fromkeys(part for chain in chains for part in chain[len(same) :])
    differ = f"its {type(layer).__name__} is called in several places, and not followed by the same layers"
    unit = Unit(path, layer, [Part(paths[id(part)], part) for part in same])
    unit.left = [(Part(paths[id(part)], part), differ) for part in others]
    unit.cut(*_limit(unit, calls))
    return unit


def _followers(layer: fx.Node, scope: nn.Module, calls: Calls) -> Iterator[nn.Module]:
    """The normalisations and skips after one call of a layer, each reading nothing but what is before it."""
    last = layer
    while len(last.users) == 1:
        (user,) = last.users
        if not _is_identity(user, scope):
            if user.op != "call_module" or not _follows(user, last, layer, scope):
                return
            norm = called(user, scope)
            yield norm
            if not all(map(_does_nothing, calls.after.get(id(norm), {}).values())):
                return
        last = user


def _follows(node: fx.Node, last: fx.Node, layer: fx.Node, scope: nn.Module) -> bool:
    """Whether a call is that of a normalisation of `last`, or of a skip from what the layer read to `last`."""
    child = called(node, scope)
    if not isinstance(child, Skip):
        return _is_norm(child) and first_input(node) is last and len(node.args) + len(node.kwargs) == 1
    between = itertools.takewhile(lambda each: each is not node, _after(layer))
    return node.args == (first_input(layer), last) and not any(mutates(each, scope) for each in between)


def _after(node: fx.Node) -> Iterator[fx.Node]:
    while (node := node.next).op != "root":
        yield node


def _is_identity(node: fx.Node, scope: nn.Module) -> bool:
    """Whether a call returns its input in eval mode."""
    if node.op == "call_module":
        return _does_nothing(called(node, scope))
    training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else None)
    return node.op == "call_function" and node.target in _DROPOUT_FUNCTIONS and training is False


def _does_nothing(module: nn.Module) -> bool:
    return forward_of(module) in _IDENTITY_FORWARDS and not module.training and not _hooks(module)


def settle(units: list[Unit], calls: Calls) -> None:
    """Cut units before what is also called where it is not merged, until none is left to cut."""
    while True:
        places: collections.Counter[nn.Module] = collections.Counter()
        for unit in units:
            for part in unit.merged:
                places[part.module] += len(calls.of[id(unit.layer)])
        shared = {module for module, count in places.items() if count != len(calls.of[id(module)])}
        if not shared:
            return
        for unit in units:
            at = next((at for at, part in enumerate(unit.merged) if part.module in shared), None)
            if at is not None:
                unit.cut(at, "it is also called elsewhere")


# ------------------------------------------------------------------------------------------------------ the reasons


def _limit(unit: Unit, calls: Calls) -> tuple[int, str]:
    """How much of what follows a layer can be merged into it, and why no more."""
    layer = unit.layer
    reason = why_not_layer(layer) or _why_closed(layer, calls, f"its {type(layer).__name__}")
    if reason:
        return 0, reason
    for at, part in enumerate(unit.merged):
        known = id(part.module) in calls.after
        reason = why_not_part(part.module, layer, known=known) or _why_closed(part.module, calls, "it")
        if reason:
            return at, reason
    return len(unit.merged), ""


def _why_closed(module: nn.Module, calls: Calls, subject: str) -> str | None:
    """Why a module may do something else than what its forward says, or elsewhere than where it is called."""
    inside = module.modules() if isinstance(module, Skip) else (module,)
    if any(hook for each in inside for hook in _hooks(each)):
        return f"{subject} has hooks, which may change what it computes"
    if id(module) in calls.unread:
        return f"{subject} may be called by a forward that cannot be read: {calls.unread[id(module)]}"
    if id(module) in calls.read:
        return f"a forward reads what {subject} holds"
    return None


def _hooks(module: nn.Module) -> list[Any]:
    """Hooks of the forward, but for those by which `torch.nn.utils.prune` masks a layer."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    masks = isinstance(module, _LAYERS)
    return [each for each in hooks if not (masks and isinstance(each, torch_prune.BasePruningMethod))]


def _why_apart(part: nn.Module, calls: Calls) -> str:
    """Why a normalisation or a skip follows no layer."""
    if id(part) in calls.unread:
        return f"it may be called by a forward that cannot be read: {calls.unread[id(part)]}"
    if id(part) not in calls.of:
        return "no forward that can be read calls it in eval mode"
    scope, node = calls.of[id(part)][0]
    value = node.args[-1] if isinstance(part, Skip) else first_input(node)
    alone = True
    while isinstance(value, fx.Node):
        alone = alone and len(value.users) == 1
        if not _is_identity(value, scope):
            break
        value = first_input(value)
    before = called(value, scope) if isinstance(value, fx.Node) and value.op == "call_module" else None
    if before is None or not _is_of_unit(before):
        return f"it follows {_in_words(value, before)}, not a convolution or a linear layer"
    if not alone:
        return f"what the {type(before).__name__} before it computes is also used elsewhere"
    if isinstance(part, Skip):
        return "what its layer reads may be overwritten before it reads it"
    return f"the {type(before).__name__} before it follows no layer either, or it is given more than that"


def _in_words(value: Any, module: nn.Module | None) -> str:
    if module is not None:
        return f"a {type(module).__name__}"
    if not isinstance(value, fx.Node) or value.op == "placeholder":
        return "the input of its forward"
    return str(getattr(value.target, "__name__", value.target))
