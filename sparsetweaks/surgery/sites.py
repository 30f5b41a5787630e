"""See before you cut: where a surgery would change a model, and what it would leave alone and why.

`find_activations` and `find_skip_sites` are the previews of `swap_activations` and `inject_skips`; the surgeries
themselves work from these very lists. What a surgery did is kept with the model: `changes` reads it.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass

import torch
from torch import nn

from sparsetweaks.copying import check_model
from sparsetweaks.errors import SurgeryError
from sparsetweaks.surgery import kinds as k
from sparsetweaks.surgery.dataflow import called, is_observed, is_overwritten
from sparsetweaks.surgery.mentions import DYNAMIC, LOOPS, SLICES
from sparsetweaks.surgery.programs import Trace, Untraceable
from sparsetweaks.surgery.scopes import Scopes, is_scope
from sparsetweaks.surgery.tracing import BASE_ATTRIBUTES
from sparsetweaks.surgery.units import kind_of_layer, layer_types, units_in

Where = Callable[["Site"], bool] | str | Sequence[str] | None
"""Which sites: all (None), a glob pattern or several on `Site.path`, or a predicate on the `Site`."""


@dataclass(frozen=True)
class Site:
    """One place in one module's forward that a surgery changes, or leaves for a reason.

    Attributes:
        scope: name of the module whose forward holds the site ("" is the model itself).
        name: the child module there, or the name of the call in the traced forward (`relu_1`).
        kind: an activation's name, or "kept" / "changed" for a unit whose layer keeps the shape or not.
        form: "module", "function", "method", "attribute" or "unit".
        in_place: whether an activation overwrites its input.
        left: None, or the reason why the site stays as it is.
    """

    scope: str
    name: str
    kind: str
    form: str
    in_place: bool = False
    left: str | None = None

    @property
    def path(self) -> str:
        """The site's full name, as `where=` patterns see it."""
        return f"{self.scope}.{self.name}" if self.scope else self.name

    def __str__(self) -> str:
        text = f"{self.path} ({self.kind}, {self.form})"
        return f"{text} left as it is: {self.left}" if self.left else text


class Sites(tuple[Site, ...]):
    """Sites in the order of the model's modules; prints as one line per site."""

    @property
    def possible(self) -> Sites:
        """The sites that a surgery can rewrite."""
        return Sites(site for site in self if site.left is None)

    @property
    def left(self) -> Sites:
        """The sites that stay as they are, each with its reason."""
        return Sites(site for site in self if site.left is not None)

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "no sites"


@dataclass(frozen=True)
class Change:
    """What one surgery did: its name and options in words, the sites rewritten, and those left with the reason."""

    tweak: str
    rewritten: Sites
    left: Sites

    def __str__(self) -> str:
        lines = [f"{self.tweak}: {len(self.rewritten)} sites rewritten, {len(self.left)} left as they are"]
        return "\n".join([*lines, *(f"  {site}" for site in self.left)])


def changes(model: nn.Module) -> tuple[Change, ...]:
    """The change report: what the surgeries did to this model, in order.

    Args:
        model: a model that `inject_skips`, `swap_activations` or `tweak` returned, or a copy of one.

    Returns:
        One `Change` per surgery; empty for a model that had none.

    Example:
        >>> import sparsetweaks as st
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
        >>> print(st.changes(st.swap_activations(model, "mish"))[0])
        swap_activations to mish: 1 sites rewritten, 0 left as they are
    """
    check_model(model)
    return vars(model).get("_changes", ())


def record_change(model: nn.Module, tweak: str, rewritten: Iterable[Site], left: Iterable[Site]) -> None:
    """Keep with the (copied) model what was done to it."""
    vars(model)["_changes"] = (*changes(model), Change(tweak, Sites(rewritten), Sites(left)))


def refuse_wrapped(model: nn.Module) -> None:
    """A wrapper that has seen the parameters would not synchronise those that a surgery adds."""
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise SurgeryError(
                "do the surgery on model.module, then wrap the result in DistributedDataParallel"
            )


def select(sites: Sites, where: Where) -> Sites:
    """The sites that `where` chooses.

    Raises:
        ValueError: if a pattern matches no site; the message names some that there are.
    """
    if where is None:
        return sites
    if callable(where):
        return Sites(site for site in sites if where(site))
    patterns = (
        [where] if isinstance(where, str) else list(where) if isinstance(where, (list, tuple, set)) else []
    )
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(
            f"where must be a glob pattern, a list of them, or a function of a Site, not {where!r}"
        )
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(site.path, pattern) for site in sites):
            some = ", ".join(site.path for site in sites[:5]) or "none"
            raise ValueError(f"where={pattern!r} matches no site of this model; its sites: {some}, ...")
    return Sites(site for site in sites if any(fnmatch.fnmatchcase(site.path, each) for each in patterns))


# -------------------------------------------------------------------------------------------------- activations


@dataclass
class Found:
    """A site with what a surgery needs to change it."""

    site: Site
    module: nn.Module  # the activation itself (form "module") or the scope
    trace: Trace | None = None
    observed: bool = False  # whether the input it overwrites may be looked at afterwards
    overwritten: bool = False  # whether its input is overwritten afterwards, by another operation


def find_activations(model: nn.Module, *, kinds: Sequence[str] = k.RELU_FAMILY, where: Where = None) -> Sites:
    """Preview of `swap_activations`: every place that computes one of these activations (paper, section 3.1).

    An activation that is a module is one site, however often and under how many names it is called. A call of a
    function or method in a forward (`F.relu(x)`, `torch.relu_(x)`, `x.relu()`) is one site each.

    Args:
        model: any module; it is not changed.
        kinds: names of the activations to look for; default: the ReLU family (relu, relu6, leaky_relu).
        where: glob pattern(s) on `Site.path`, or a predicate on `Site`.

    Returns:
        The sites; those with a `left` reason cannot be rewritten.

    Raises:
        ValueError: for an unknown kind, or a pattern that matches nothing.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
        >>> print(find_activations(model))
        1 (relu, module)
    """
    return select(Sites(found.site for found in activation_sites(model, kinds, Scopes())), where)


def activation_sites(model: nn.Module, kinds: Sequence[str], scopes: Scopes) -> list[Found]:
    """All activation sites of a model, with their modules and traces."""
    check_model(model)
    wanted = tuple(k.kind_named(name).name for name in ([kinds] if isinstance(kinds, str) else kinds))
    spelled = k.spellings(wanted)
    found: list[Found] = []
    observed: set[int] = set()
    overwritten: set[int] = set()
    reached: set[int] = set()
    opaque: set[int] = set()  # activation modules whose callers cannot be read
    for scope, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            name = str(getattr(module, "original_name", "")).lower()
            if name in wanted:
                found.append(Found(Site(*_split(scope), name, "module", left="it is scripted"), module))
            continue
        kind = k.kind_of_module(module)
        if kind is not None and kind.name in wanted:
            in_place = bool(getattr(module, "inplace", False))
            found.append(Found(Site(*_split(scope), kind.name, "module", in_place), module))
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            name = (
                "relu"
                if "relu" in f"{getattr(module, 'mode', '')}{getattr(module, 'nonlinearity', '')}".lower()
                else "tanh"
            )
            if name in wanted:
                site = Site(*_split(scope), name, "module", left="it is inside a recurrent layer of torch")
                found.append(Found(site, module))
        if not is_scope(module) or not _may_activate(module, spelled, scopes):
            continue
        try:
            trace = scopes.trace(module)
        except Untraceable as reason:
            opaque |= {id(child) for child in module.children()}
            found += _unread(scope, module, wanted, scopes.names(module), reason)
            continue
        found += _calls(scope, module, trace, wanted)
        for case in trace.cases:
            for node in case.graph.nodes:
                if node.op == "call_module":
                    child = called(node, module)
                    if k.kind_of_module(child) is None:
                        continue
                    reached.add(id(child))
                    if getattr(child, "inplace", False) and is_observed(node, module):
                        observed.add(id(child))
                    if is_overwritten(node, module):
                        overwritten.add(id(child))
    for each in found:
        if each.site.form == "module":
            key = id(each.module)
            each.observed = key in observed or key in opaque or key not in reached
            each.overwritten = key in overwritten
    return found


def _may_activate(module: nn.Module, spelled: Set[str], scopes: Scopes) -> bool:
    """Whether a forward has anything to do with activations: it mentions, calls or holds one."""
    telling = spelled | DYNAMIC | {"super"}  # what torch's own forward above it does has no name in its code
    if scopes.names(module) & telling or scopes.may_call(module, k.kind_of_module):
        return True
    held = (value for name, value in vars(module).items() if name not in BASE_ATTRIBUTES)
    return any(callable(value) or isinstance(value, (dict, list, tuple)) for value in held)


def _calls(scope: str, module: nn.Module, trace: Trace, wanted: tuple[str, ...]) -> Iterator[Found]:
    """Function and method calls in a traced forward, one per name over all its cases."""
    found: dict[str, Found] = {}
    for case in trace.cases:
        for node in case.graph.nodes:
            kind = k.kind_of_node(node)
            if kind is None or kind.name not in wanted:
                continue
            form = "method" if node.op == "call_method" else "function"
            site = Site(scope, node.name, kind.name, form, k.works_in_place(node))
            each = found.setdefault(node.name, Found(site, module, trace))
            each.observed |= site.in_place and is_observed(node, module)
            each.overwritten |= is_overwritten(node, module)
    yield from found.values()


def _unread(
    scope: str, module: nn.Module, wanted: tuple[str, ...], mentions: Set[str], reason: Untraceable
) -> Iterator[Found]:
    """What an untraceable forward holds: attributes that are known functions, and calls that its code mentions."""
    asks = sorted(mentions & {"vars", "__dict__"})  # where a module that takes a function's place is not
    left = f"its code asks for attributes by {asks[0]}" if asks else None
    for name, value in vars(module).items():
        kind = k.kind_of_function(value)
        if kind is not None and kind.name in wanted:
            yield Found(Site(scope, name, kind.name, "attribute", left=left), module)
    children = set(module._modules)
    for name, value in vars(module).items():
        value = list(value.values()) if isinstance(value, dict) and name not in BASE_ATTRIBUTES else value
        for held in value if isinstance(value, (list, tuple)) else ():
            kind = k.kind_of_module(held) if isinstance(held, nn.Module) else None
            if kind is not None and kind.name in wanted and held not in module.modules():
                yield Found(Site(scope, name, kind.name, "module", left="it is not registered"), held)
    for kind_name in wanted:
        if (k.spellings((kind_name,)) & mentions) - children - set(vars(module)):
            yield Found(Site(scope, kind_name, kind_name, "function", left=str(reason)), module)


def _split(path: str) -> tuple[str, str]:
    """The name of a module's parent, and its own name there."""
    parent, _, name = path.rpartition(".")
    return parent, name


# -------------------------------------------------------------------------------------------------------- skips


def find_skip_sites(
    model: nn.Module, *, layers: str | Sequence[str] = ("conv",), where: Where = None
) -> Sites:
    """Preview of `inject_skips`: every unit that can get a skip connection (paper, section 3.1 and figure 3).

    A unit is a convolution (or linear layer, by `layers`) and the normalisation that directly follows it, or one that
    an activation follows directly. Its site is named after that layer. `kind` says whether the layer keeps the shape
    ("kept", an identity fits) or not ("changed", a shortcut must adapt it), from its own geometry alone.

    Args:
        model: any module; it is not changed.
        layers: around which layers, of "conv" and "linear"; default: convolutions, as in the paper. For MLPs and
            Transformers say `layers="linear"`.
        where: glob pattern(s) on `Site.path`, or a predicate on `Site`.

    Returns:
        The sites; those with a `left` reason cannot be rewritten, e.g. where a residual already spans the unit.

    Raises:
        ValueError: for an unknown kind of layer, or a pattern that matches nothing.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.BatchNorm2d(8))
        >>> print(find_skip_sites(model))
        0 (kept, unit)
    """
    return select(Sites(found.site for found in skip_sites(model, layer_types(layers), Scopes())), where)


def skip_sites(model: nn.Module, types: tuple[type[nn.Module], ...], scopes: Scopes) -> list[Found]:
    """All units of a model around layers of these types, with their scopes and traces."""
    check_model(model)
    found: list[Found] = []
    bypassed: dict[int, str] = {}
    for scope, module in model.named_modules():
        if not is_scope(module) or not scopes.may_call(module, lambda each: isinstance(each, types)):
            continue
        try:
            trace = scopes.trace(module)
        except Untraceable as reason:
            bypassed.update(_perhaps_bypassed(module, scopes.names(module)))
            found += [
                Found(Site(scope, name, kind_of_layer(child), "unit", left=str(reason)), module)
                for name, child in module.named_children()
                if isinstance(child, types)
            ]
            continue
        units: dict[str, Found] = {}
        for case in trace.cases:
            for unit in units_in(case.graph, module, types):
                layer = called(unit.layer, module)
                left = bypassed.get(id(module), unit.left)
                if left is None and getattr(type(getattr(layer, "skip", None)), "added_by_tweak", False):
                    left = "its layer already has a skip elsewhere"
                site = Site(scope, str(unit.layer.target), kind_of_layer(layer), "unit", left=left)
                units.setdefault(site.name, Found(site, module, trace))
        found += units.values()
    return found


def _perhaps_bypassed(module: nn.Module, names: Set[str]) -> Iterator[tuple[int, str]]:
    """Sequentials whose layers a forward that cannot be read may call one by one, past their own forward."""
    for name, child in module.named_children():
        plain = _is_sequential(child) and name in names
        if plain and SLICES in names:
            yield id(child), "the module that holds it may slice it"
        elif plain and LOOPS in names:
            yield id(child), "the module that holds it may call its layers one by one"


def _is_sequential(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
