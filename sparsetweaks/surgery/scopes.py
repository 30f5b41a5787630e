"""Which modules of a model have a forward of their own to rewrite, and what those forwards are.

A *scope* is a module whose own `forward` is traced with all its children as leaves. What a surgery rebuilds is a
scope's `forward` and nothing else; what is not a scope of an edit is never touched, so the outer model may do
anything. Modules that are alike are traced once.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
import itertools
import sys
import types
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import fx, nn

from sparsetweaks.surgery.programs import PLAIN, Rewritten, Trace, Untraceable
from sparsetweaks.surgery.tracing import (
    BASE_ATTRIBUTES,
    DYNAMIC,
    MUTATES,
    STORES_GLOBAL,
    TYPE_CALL,
    trace_cases,
)

SLICES, LOOPS = "[:]", "for"
"""What `Scopes.names` holds, beside names, for code that slices or loops."""

_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodDescriptorType)


def is_scope(module: nn.Module) -> bool:
    """Whether the module's own forward may hold a site: not a layer of torch itself, not a scripted module."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    if isinstance(module, Rewritten):
        return True
    forward = _forward_of(type(module))
    if forward is None or getattr(forward, "__name__", "") == "_forward_unimplemented":
        return False
    origin = getattr(forward, "__module__", None) or ""
    if origin.startswith("torch.nn.modules.transformer") or forward is nn.Sequential.forward:
        return True
    return not origin.startswith(("torch.nn.", "torch.ao."))


def _forward_of(cls: type) -> Callable[..., Any] | None:
    return getattr(cls, "forward", None)


class Scopes:
    """Traces the scopes of one model; modules that are alike are traced once."""

    def __init__(self) -> None:
        self._traces: dict[Hashable, Trace | Untraceable] = {}
        self._names: dict[Hashable, frozenset[str]] = {}

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

    def names(self, module: nn.Module) -> frozenset[str]:
        """Every name that the code reachable from the module's forward mentions."""
        classes = frozenset(type(child) for child in module.modules())
        held = frozenset(itertools.chain.from_iterable(map(_functions_in, vars(module).values())))
        key = (type(module), classes, held)
        if key not in self._names:
            self._names[key] = _reachable_names(type(module), classes, held)
        found = self._names[key]
        if found & DYNAMIC:  # then what it looks up may be named by an attribute
            found |= {value for value in vars(module).values() if isinstance(value, str)}
        for name, value in vars(module).items():
            if name in found and name not in BASE_ATTRIBUTES and type(value) in (list, tuple, dict):
                found |= _torch_names(value)
        return found


def _fingerprint(module: nn.Module, names: frozenset[str]) -> Hashable:
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
    if isinstance(value, (*PLAIN, *_FUNCTIONS)):
        return (type(value), value)
    if isinstance(value, functools.partial):
        return (functools.partial, value.func, _value_key(value.args), _value_key(value.keywords))
    if type(value) in (tuple, list):
        return (type(value), tuple(_value_key(each) for each in value))
    if type(value) is dict:
        return (dict, tuple((_value_key(key), _value_key(each)) for key, each in value.items()))
    return id(value)


def _functions_in(value: Any, depth: int = 2) -> Iterator[Any]:
    """The functions that an attribute holds: itself, bound, partial, called by an object's class, in a container."""
    if isinstance(value, functools.partial):
        yield value.func
    elif isinstance(value, types.MethodType):
        yield value.__func__
    elif isinstance(value, _FUNCTIONS):
        yield value
    elif depth and type(value) in (list, tuple, dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _functions_in(each, depth - 1)
    elif not isinstance(value, (nn.Module, type, torch.Tensor)) and callable(value):
        yield from _functions_in(type(value).__call__, 0)


def _reachable_names(cls: type, classes: frozenset[type], held: frozenset[Any]) -> frozenset[str]:
    """Names and string constants in the code of `cls.forward` and of what it calls by name, torch's own left out."""
    names: set[str] = set()
    seen: set[int] = set()
    pending: list[Any] = [_forward_of(cls), *held]
    while pending:
        function = inspect.unwrap(pending.pop())
        code = getattr(function, "__code__", None)
        if code is None or id(code) in seen:
            continue
        seen.add(id(code))
        new = set(_names_in(code)) - names
        names |= new
        scope = getattr(function, "__globals__", {})
        for cell in getattr(function, "__closure__", None) or ():
            with contextlib.suppress(ValueError):  # an empty cell
                pending += [each for each in _functions_in(cell.cell_contents) if _is_own(each)]
        for name in new:
            names |= _torch_names(scope.get(name))
            found = [vars(base).get(name) for base in cls.__mro__]
            if name not in ("forward", "__call__"):
                found += [vars(base).get(name) for each in classes for base in each.__mro__]
            found.append(scope.get(name))
            for candidate in found:
                candidate = getattr(candidate, "fget", None) or getattr(candidate, "__func__", candidate)
                if _is_own(candidate):
                    pending.append(candidate)
    return frozenset(names)


def _is_own(function: Any) -> bool:
    """Whether this is a Python function of the model's authors: not torch's, not the standard library's."""
    origin = (getattr(function, "__module__", None) or "").partition(".")[0]
    return isinstance(function, types.FunctionType) and origin not in ("torch", *sys.stdlib_module_names)


def _torch_names(value: Any) -> set[str]:
    """What torch calls the functions that a global holds, which code may know by another name."""
    functions = () if value is None else _functions_in(value)
    return {each.__name__ for each in functions if not _is_own(each) and hasattr(each, "__name__")}


@functools.lru_cache(maxsize=4096)
def _names_in(code: types.CodeType) -> frozenset[str]:
    return frozenset(_each_name_in(code))


def _each_name_in(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    yield from code.co_freevars
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("BUILD_SLICE", "BINARY_SLICE"):
            yield SLICES
        elif instruction.opname == "FOR_ITER":
            yield LOOPS
        elif instruction.opname == "STORE_GLOBAL":
            yield STORES_GLOBAL
        elif instruction.opname == "LOAD_GLOBAL" and instruction.argval == "type":
            yield TYPE_CALL
        elif instruction.opname in ("STORE_ATTR", "STORE_SUBSCR", "DELETE_ATTR", "DELETE_SUBSCR"):
            yield MUTATES
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, slice):
            yield SLICES
        elif isinstance(constant, types.CodeType):
            yield from _each_name_in(constant)
