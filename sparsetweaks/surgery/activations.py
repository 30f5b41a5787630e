"""Swap activations, wherever and however a forward computes them."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from sparsetweaks.copying import Model, copy_model
from sparsetweaks.errors import NoEffectWarning, SurgeryError
from sparsetweaks.surgery import ghosts as g
from sparsetweaks.surgery import kinds as k
from sparsetweaks.surgery import sites as s
from sparsetweaks.surgery.dataflow import first_input
from sparsetweaks.surgery.programs import rewrite
from sparsetweaks.surgery.scopes import Scopes

Activation = str | nn.Module | Callable[..., Any]


class Function(nn.Module):
    """A plain function as a module, so that it can stand where an activation module stood."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.function = function

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.function(input)

    def extra_repr(self) -> str:
        return getattr(self.function, "__name__", repr(self.function))


def copied(input: torch.Tensor) -> torch.Tensor:
    """A copy with the gaps that its input has, as torch rounds an activation of strided memory in another way.

    `clone` closes gaps. Memory in which elements overlap, as in an expanded tensor, cannot be written to: its copy is
    dense.
    """
    dense = input.clone()
    if input.layout is not torch.strided or input.is_nested or dense.stride() == input.stride():
        return dense
    extent = 1
    for stride, size in sorted(zip(input.stride(), input.shape)):
        if size > 1 and stride < extent:
            return dense
        extent += stride * (size - 1)
    return input.new_empty_strided(input.shape, input.stride()).copy_(input)


class OnCopy(nn.Module):
    """Any activation of a copy of its input, for inputs that are overwritten before the backward pass needs them."""

    def __init__(self, activation: nn.Module):
        super().__init__()
        self.activation = activation

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.activation(copied(input))


class InPlace(nn.Module):
    """Any activation with its result written over its input, for callers that look at the input afterwards."""

    def __init__(self, activation: nn.Module):
        super().__init__()
        self.activation = activation

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input.copy_(self.activation(copied(input)))


def swap_activations(
    model: Model,
    to: Activation,
    *,
    kinds: Sequence[str] = k.RELU_FAMILY,
    where: s.Where = None,
    ghost: bool = False,
) -> Model:
    """Replace activations by a smoother one, wherever the model computes them (paper, section 3.1).

    Finds activations as modules, functions (`F.relu`, `torch.relu`), methods (`x.relu_()`) and functions held in
    attributes, in place or not. What `find_activations` lists is what is swapped.

    An activation that worked in place, and whose input nobody looks at afterwards, is swapped for one that does not:
    a smooth activation must keep its input for the backward pass, so working in place saves no memory in training
    and costs a copy. Where the overwritten input may be observed, the new activation overwrites it as well.

    Args:
        model: any module, masked or not, in any mask form.
        to: a name ("swish" or "silu", "mish", "gelu", "elu", "selu", "celu", "softplus", "tanh", "hardswish", "relu",
            "relu6", "leaky_relu"), a module (copied for each site), a factory of modules (`nn.PReLU`,
            `lambda: nn.Softplus(beta=2)`; called for each site), or a function of one tensor (`F.silu`; a lambda
            cannot be pickled, and so neither can the result).
        kinds: names of the activations to replace; default: the ReLU family (relu, relu6, leaky_relu).
        where: glob pattern(s) on a site's path, or a predicate on a `Site`; default: everywhere.
        ghost: whether the Swish is there for the early part of training only (ToST, ICML 2022). Its beta is the
            inverse of a strength, a buffer that starts at 1; `anneal_ghosts` lets that fall to 0, where each site
            computes its original activation again, slope and limit included (for finite inputs; zeros may differ in
            sign), and `remove_ghosts` gives the original model back. Swish only, in place of the ReLU family only.

    Returns:
        A new model. Parameters, buffers, masks, hooks, modes, names and the classes of all other modules are those
        of `model`, which is left untouched. Only modules whose own forward calls an activation function are
        rewritten, and only their forwards: a method that computes a part of the network and is called directly
        (`encode`, `forward_features`) still computes what it did. Parameters of the new activation,
        if any, sit where the activation sits.

    Raises:
        ValueError: for an unknown name, a pattern that matches nothing, or a ghost of anything but Swish for the ReLU
            family.

    Warns:
        NoEffectWarning: if the model holds no such activation that can be swapped.

    Example:
        >>> import sparsetweaks as st
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(inplace=True))
        >>> st.swap_activations(model, "swish")
        Sequential(
          (0): Linear(in_features=4, out_features=4, bias=True)
          (1): SiLU()
        )
    """
    target = _ghost_target(to, kinds) if ghost else _target(to)
    result = copy_model(model)
    s.refuse_wrapped(result)
    found = s.activation_sites(result, kinds, Scopes())
    if ghost:
        found = [
            replace(each, site=replace(each.site, left=each.site.left or g.why_no_ghost(each)))
            for each in found
        ]
    chosen = s.select(s.Sites(each.site for each in found), where)
    within = frozenset(chosen)
    picked = [each for each in found if each.site in within]
    done = [each for each in picked if each.site.left is None]
    _warn_if_nothing(picked, done)
    like = next(result.parameters(), None)
    calls: dict[int, list[s.Found]] = {}
    for each in done:
        if each.site.kind == target.name:
            continue  # already what was asked for, with parameters of its own
        if each.site.form == "module":
            target.replace_module(each, like)
        elif each.site.form == "attribute":
            _set_attribute(each, target, like)
        else:
            calls.setdefault(id(each.module), []).append(each)
    for group in calls.values():
        _swap_calls(group, target, like)
    s.record_change(result, f"swap_activations to {target.name}", chosen.possible, chosen.left)
    return result


def _warn_if_nothing(picked: list[s.Found], done: list[s.Found]) -> None:
    if done:
        return
    if picked:
        text = f"none of the {len(picked)} activations chosen can be swapped; the first: {picked[0].site}"
    else:
        text = (
            "the model has no activation of these kinds: nothing was swapped; see kinds= and find_activations"
        )
    warnings.warn(text, NoEffectWarning, stacklevel=3)


# ---------------------------------------------------------------------------------------------------- the target


@dataclass(frozen=True)
class _Target:
    """What every chosen site becomes."""

    name: str
    make: Callable[[], nn.Module]
    kind: k.Kind | None = None
    edit = "swap"

    def replace_module(self, found: s.Found, like: torch.Tensor | None) -> None:
        """Turn the activation module of this site into what it becomes."""
        become(found.module, self.module(found, like))

    def module(self, found: s.Found, like: torch.Tensor | None) -> nn.Module:
        """A new activation for this site, working in place exactly where it must."""
        in_place = found.site.in_place and found.observed
        if self.kind is not None and self.kind.can_work_in_place and not found.overwritten:
            return self.kind.module(inplace=in_place)
        with torch.random.fork_rng(devices=[]):
            made = self.make()
        if not isinstance(made, nn.Module):
            raise SurgeryError(
                f"the factory {self.name} returned a {type(made).__name__}: return a torch.nn.Module"
            )
        if like is not None and next(made.parameters(), None) is not None:
            made = made.to(device=like.device, dtype=like.dtype if like.is_floating_point() else None)
        if next(made.parameters(), None) is not None:
            made.added_by_tweak = True  # type: ignore[assignment]  # `sparsity` counts it apart
        if in_place:
            return InPlace(made)
        return OnCopy(made) if found.overwritten else made


class _GhostTarget(_Target):
    """Every chosen site becomes the ghost of its own activation."""

    edit = g.SWAP_EDIT

    def replace_module(self, found: s.Found, like: torch.Tensor | None) -> None:
        g.haunt(found.module, self._past(found), like)

    def module(self, found: s.Found, like: torch.Tensor | None) -> nn.Module:
        kind = k.KINDS[found.site.kind]
        if found.site.form == "attribute":
            return g.ghost_of_attribute(kind, found.module, found.site.name, like)
        (call,) = g.calls_at(found)
        return g.ghost_of_call(kind, call, replace(self._past(found), was=call), like)

    @staticmethod
    def _past(found: s.Found) -> g.Past:
        return g.Past(None, found.overwritten, found.site.in_place and found.observed)


def _ghost_target(to: Activation, kinds: Sequence[str]) -> _Target:
    if not isinstance(to, str) or k.kind_named(to).name != "silu":
        raise ValueError(
            f"a ghost is a Swish that becomes the original activation: give to='swish', not {to!r}"
        )
    names = [k.kind_named(name).name for name in ([kinds] if isinstance(kinds, str) else kinds)]
    if others := [name for name in names if name not in k.RELU_FAMILY]:
        raise ValueError(
            f"a ghost Swish becomes one of {', '.join(k.RELU_FAMILY)}; kinds has {', '.join(others)}"
        )
    return _GhostTarget("ghost silu", nn.SiLU)


def _target(to: Activation) -> _Target:
    if isinstance(to, str):
        kind = k.kind_named(to)
        return _Target(kind.name, kind.module, kind)
    if isinstance(to, nn.Module):
        return _Target(type(to).__name__, lambda: copy.deepcopy(to))
    if not callable(to):
        raise ValueError(
            f"cannot swap activations for {to!r}: give a name, a module, a factory or a function"
        )
    name = getattr(to, "__name__", repr(to))
    if isinstance(to, type) or _takes_nothing(to):
        return _Target(name, to)
    return _Target(name, lambda: Function(to))


def _takes_nothing(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind()
    except (TypeError, ValueError):  # an argument is required, or a builtin without a signature
        return False
    return True


# ------------------------------------------------------------------------------------------------------ the swap


def become(old: nn.Module, new: nn.Module) -> None:
    """Turn `old` into `new` where it stands, so that every reference, name and hook of it stays valid."""
    base = set(vars(nn.Module()))
    for name in set(vars(old)) - base:
        del vars(old)[name]
    old.__class__ = type(new)
    for name, value in vars(new).items():
        if name not in base:
            vars(old)[name] = value
    for group in ("_parameters", "_buffers", "_modules"):
        vars(old)[group] = vars(new)[group]
    for child in old.children():
        child.train(old.training)


def _set_attribute(found: s.Found, target: _Target, like: torch.Tensor | None) -> None:
    """Swap a function that a module holds as a plain attribute."""
    module, name = found.module, found.site.name
    if target.kind is not None:
        vars(module)[name] = target.kind.function
    else:
        made = target.module(found, like)
        del vars(module)[name]
        setattr(module, name, made)
    if isinstance(module, nn.TransformerEncoderLayer):
        module.activation_relu_or_gelu = 0  # torch's fused kernel knows only relu and gelu


def _swap_calls(group: list[s.Found], target: _Target, like: torch.Tensor | None) -> None:
    """Swap function and method calls in one scope's forward."""
    scope, trace = group[0].module, group[0].trace
    assert trace is not None
    in_place = {each.site.name: each.site.in_place and each.observed for each in group}
    children: dict[str, str] = {}
    by_hand = any(in_place.values()) and target.kind is not None and not target.kind.can_work_in_place
    if target.kind is None or by_hand or any(each.overwritten for each in group):
        for each in group:
            children[each.site.name] = _free_name(scope, each.site.name)
            made = target.module(each, like)
            made.train(scope.training)
            scope.add_module(children[each.site.name], made)

    def edit(graph: fx.Graph) -> None:
        for node in list(graph.nodes):
            if node.name not in in_place or k.kind_of_node(node) is None:
                continue
            value = first_input(node)
            with graph.inserting_before(node):
                if children:
                    new = graph.call_module(children[node.name], (value,))
                else:
                    assert target.kind is not None
                    options: dict[str, Any] = {"inplace": True} if in_place[node.name] else {}
                    new = graph.call_function(target.kind.function, (value,), options)
            node.replace_all_uses_with(new)
            graph.erase_node(node)

    key = (target.edit, target.name, tuple(sorted(in_place.items())), tuple(sorted(children.items())))
    rewrite(scope, trace, key, edit)


def _free_name(module: nn.Module, wanted: str) -> str:
    name, number = wanted, 2
    while hasattr(module, name):
        name, number = f"{wanted}_{number}", number + 1
    return name
