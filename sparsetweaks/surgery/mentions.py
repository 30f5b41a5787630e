"""What the code of a forward mentions: names, text, loops and assignments, in everything that it calls by name.

A trace sees one path through a forward; its code tells what other paths there may be, and what it can reach.
"""

from __future__ import annotations

import collections
import contextlib
import dis
import functools
import inspect
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

MUTATES, STORES_GLOBAL, TYPE_CALL = "[]=", "global", "type()"
"""What stands beside the names of code that assigns to attributes or items, assigns to globals, or calls `type`."""

SLICES, LOOPS, INDEXES = "[:]", "for", "[]"
"""What stands beside the names of code that slices, loops, or indexes and unpacks."""

DYNAMIC = frozenset(["__dict__", "vars", "getattr", "hasattr", "attrgetter", "__getattribute__"])
"""Names by which code may read attributes that it does not name."""

FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodDescriptorType)
_PAIRING = ("enumerate", "items", "named_children", "zip")
_INDEXING = ("BINARY_SUBSCR", "UNPACK_SEQUENCE", "UNPACK_EX", "CALL_FUNCTION_EX")


def mentions(cls: type, classes: frozenset[type], held: frozenset[Any]) -> collections.Counter[str]:
    """Names and string constants in the code of `cls.forward` and of what it calls by name, torch's own left out."""
    names: collections.Counter[str] = collections.Counter()
    seen: set[int] = set()
    pending: list[Any] = [getattr(cls, "forward", None), *held]
    while pending:
        function = inspect.unwrap(pending.pop())
        code = getattr(function, "__code__", None)
        if code is None or id(code) in seen:
            continue
        seen.add(id(code))
        found_here = _names_in(code)
        new = found_here.keys() - names.keys()
        names += found_here
        scope = getattr(function, "__globals__", {})
        libraries = [scope[name] for name in new if isinstance(scope.get(name), types.ModuleType)]
        libraries = [each for each in libraries if not each.__name__.startswith("torch")]
        for cell in getattr(function, "__closure__", None) or ():
            with contextlib.suppress(ValueError):  # an empty cell
                pending += [each for each in functions_in(cell.cell_contents) if _is_own(each)]
        for name in new:
            names.update(torch_names(scope.get(name)))
            found = [vars(base).get(name) for base in cls.__mro__]
            if name not in ("forward", "__call__"):
                found += [vars(base).get(name) for each in classes for base in each.__mro__]
            found += [scope.get(name), *(getattr(each, name, None) for each in libraries)]
            for candidate in found:
                if isinstance(candidate, type) and issubclass(candidate, torch.autograd.Function):
                    candidate = candidate.forward
                candidate = getattr(candidate, "fget", None) or getattr(candidate, "__func__", candidate)
                if _is_own(candidate):
                    pending.append(candidate)
    return names


def functions_in(value: Any, depth: int = 2) -> Iterator[Any]:
    """The functions that an attribute holds: itself, bound, partial, called by an object's class, in a container."""
    if isinstance(value, functools.partial):
        yield value.func
    elif isinstance(value, types.MethodType):
        yield value.__func__
    elif isinstance(value, FUNCTIONS):
        yield value
    elif depth and type(value) in (list, tuple, dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from functions_in(each, depth - 1)
    elif not isinstance(value, (nn.Module, type, torch.Tensor)) and callable(value):
        call = type(value).__call__
        if isinstance(call, types.FunctionType):
            yield call


def _is_own(function: Any) -> bool:
    """Whether this is a Python function of the model's authors: not torch's, not the standard library's."""
    origin = (getattr(function, "__module__", None) or "").partition(".")[0]
    return isinstance(function, types.FunctionType) and origin not in ("torch", *sys.stdlib_module_names)


def torch_names(value: Any) -> set[str]:
    """What torch calls the functions that a global holds, which code may know by another name."""
    functions = () if value is None else functions_in(value)
    return {each.__name__ for each in functions if not _is_own(each) and hasattr(each, "__name__")}


@functools.lru_cache(maxsize=4096)
def _names_in(code: types.CodeType) -> collections.Counter[str]:
    return collections.Counter(_each_name_in(code))


def _each_name_in(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    yield from code.co_freevars
    before, pairs_up = "", False
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("BUILD_SLICE", "BINARY_SLICE"):
            yield SLICES
        elif instruction.opname.startswith("LOAD") and instruction.argval in _PAIRING:
            pairs_up = True
        elif instruction.opname == "UNPACK_SEQUENCE" and before == "FOR_ITER" and pairs_up:
            pairs_up = False  # `for name, layer in layers.items()` is one step down, not two
        elif instruction.opname in _INDEXING or instruction.argrepr == "[]":
            yield INDEXES
        elif instruction.opname == "FOR_ITER":
            yield LOOPS
        elif instruction.opname == "STORE_GLOBAL":
            yield STORES_GLOBAL
        elif instruction.opname == "LOAD_GLOBAL" and instruction.argval == "type":
            yield TYPE_CALL
        elif instruction.opname in ("STORE_ATTR", "STORE_SUBSCR", "DELETE_ATTR", "DELETE_SUBSCR"):
            yield MUTATES
        before = instruction.opname
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, slice):
            yield SLICES
        elif isinstance(constant, types.CodeType):
            yield from _each_name_in(constant)
