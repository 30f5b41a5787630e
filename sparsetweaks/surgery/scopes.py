"""Which modules of a model have a forward of their own to rewrite, and what those forwards are.

A *scope* is a module whose own `forward` is traced with all its children as leaves. What a surgery rebuilds is a
scope's `forward` and nothing else; what is not a scope of an edit is never touched, so the outer model may do
anything. Modules that are alike are traced once.
"""

from __future__ import annotations

import collections
import functools
import itertools
from collections.abc import Callable, Hashable, Set
from typing import Any

import torch
from torch import fx, nn

from sparsetweaks.surgery.mentions import (
    DYNAMIC,
    FUNCTIONS,
    INDEXES,
    LOOPS,
    SLICES,
    functions_in,
    mentions,
    torch_names,
)
from sparsetweaks.surgery.programs import PLAIN, Rewritten, Trace, Untraceable
from sparsetweaks.surgery.tracing import BASE_ATTRIBUTES, trace_cases

_UNNAMED = DYNAMIC | {"_modules", "children", "get_submodule", "map", "modules", "named_children", "named_modules"} | {
    "next", "pop", "reduce", "super",
}  # fmt: skip
"""Names by which code reaches any module below it without naming that."""


def is_scope(module: nn.Module) -> bool:
    """Whether the module's own forward may hold a site: not a layer of torch itself, not a scripted module."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    if isinstance(module, Rewritten):
        return True
    forward = getattr(type(module), "forward", None)
    if forward is None or getattr(forward, "__name__", "") == "_forward_unimplemented":
        return False
    origin = getattr(forward, "__module__", None) or ""
    if origin.startswith("torch.nn.modules.transformer") or forward is nn.Sequential.forward:
        return True
    return not origin.startswith(("torch.nn.", "torch.ao."))


class Scopes:
    """Traces the scopes of one model; modules that are alike are traced once."""

    def __init__(self) -> None:
        self._traces: dict[Hashable, Trace | Untraceable] = {}
        self._names: dict[Hashable, collections.Counter[str]] = {}
        self._asked: dict[tuple[nn.Module, type], collections.Counter[str]] = {}

    def trace(self, module: nn.Module) -> Trace:
        """The cases of the module's own forward.

        Raises:
            Untraceable: with the reason.
        """
        names = self.names(module)
        key = _fingerprint(module, names)
        if key not in self._traces:
            try:
                self._traces[key] = trace_cases(module, names)
            except Untraceable as reason:
                self._traces[key] = reason
        found = self._traces[key]
        if isinstance(found, Untraceable):
            raise found
        return found

    def names(self, module: nn.Module) -> Set[str]:
        """Every name that the code reachable from the module's forward mentions."""
        return self._mentions(module).keys()

    def may_call(self, module: nn.Module, wanted: Callable[[nn.Module], object]) -> bool:
        """Whether the module's forward may itself call a wanted module below it.

        Each step of the way down needs a name in the code, or a loop, an index or an unpacking there.
        """
        mentioned = self._mentions(module)
        steps = sum(mentioned[each] for each in (SLICES, LOOPS, INDEXES))
        anything = not _UNNAMED.isdisjoint(mentioned)
        return any(
            wanted(each) and (anything or sum(part not in mentioned for part in path.split(".")) <= steps)
            for path, each in module.named_modules()
            if path
        )

    def _mentions(self, module: nn.Module) -> collections.Counter[str]:
        asked = (module, type(module))  # of which a surgery makes another
        if asked not in self._asked:
            self._asked[asked] = self._look_up(module)
        return self._asked[asked]

    def _look_up(self, module: nn.Module) -> collections.Counter[str]:
        classes = frozenset(type(child) for child in module.modules())
        held = frozenset(itertools.chain.from_iterable(map(functions_in, vars(module).values())))
        key = (type(module), classes, held)
        if key not in self._names:
            self._names[key] = mentions(type(module), classes, held)
        found = self._names[key]
        if not DYNAMIC.isdisjoint(found):  # then what it looks up may be named by an attribute
            texts = (value for value in vars(module).values() if isinstance(value, str))
            found = found + collections.Counter(texts)
        for name, value in vars(module).items():
            if name in found and name not in BASE_ATTRIBUTES and type(value) in (list, tuple, dict):
                found = found + collections.Counter(torch_names(value))
        return found


def _fingerprint(module: nn.Module, names: Set[str]) -> Hashable:
    """Equal for modules whose traces are equal: class, structure, and every attribute that the code can name."""
    everything = bool(names & DYNAMIC)
    numbers: dict[int, int] = {}

    def describe(each: nn.Module) -> Hashable:
        if id(each) in numbers:
            return ("again", numbers[id(each)])
        numbers[id(each)] = len(numbers)
        attributes = tuple(
            (name, _value_key(value))
            for name, value in vars(each).items()
            if name not in BASE_ATTRIBUTES and (everything or name in names)
        )
        tensors = tuple(
            (name, value is None)
            for group in (each._parameters, each._buffers)
            for name, value in group.items()
            if each is module or name in names
        )
        children = tuple(
            (name, None if child is None else describe(child)) for name, child in each._modules.items()
        )
        instance = id(each) if "forward" in vars(each) or isinstance(each, fx.GraphModule) else None
        return (type(each), instance, attributes, tensors, children)

    return describe(module)


def _value_key(value: Any) -> Hashable:
    if isinstance(value, (*PLAIN, *FUNCTIONS)):
        return (type(value), value)
    if isinstance(value, functools.partial):
        return (functools.partial, value.func, _value_key(value.args), _value_key(value.keywords))
    if type(value) in (tuple, list):
        return (type(value), tuple(_value_key(each) for each in value))
    if type(value) is dict:
        return (dict, tuple((_value_key(key), _value_key(each)) for key, each in value.items()))
    return id(value)
