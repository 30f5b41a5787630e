"""The activations known by name, in every form in which a forward can hold them."""

from __future__ import annotations

import difflib
import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn


@dataclass(frozen=True)
class Kind:
    """One activation: its module class, its functions and method names, and whether it can work in place."""

    name: str
    module: type[nn.Module]
    function: Callable[..., torch.Tensor]
    spellings: tuple[Any, ...] = ()
    methods: tuple[str, ...] = ()
    can_work_in_place: bool = True


_KINDS = (
    Kind(
        *("relu", nn.ReLU, F.relu),
        spellings=(torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_),
        methods=("relu", "relu_"),
    ),
    Kind("relu6", nn.ReLU6, F.relu6),
    Kind("leaky_relu", nn.LeakyReLU, F.leaky_relu, (F.leaky_relu_,)),
    Kind("elu", nn.ELU, F.elu, (F.elu_,)),
    Kind("selu", nn.SELU, F.selu, (torch.selu, torch.selu_)),
    Kind("celu", nn.CELU, F.celu, (torch.celu, torch.celu_)),
    Kind("gelu", nn.GELU, F.gelu, can_work_in_place=False),
    Kind("silu", nn.SiLU, F.silu),
    Kind("mish", nn.Mish, F.mish),
    Kind("hardswish", nn.Hardswish, F.hardswish),
    Kind("softplus", nn.Softplus, F.softplus, can_work_in_place=False),
    Kind("tanh", nn.Tanh, F.tanh, (torch.tanh, torch.tanh_), ("tanh", "tanh_"), can_work_in_place=False),
)

KINDS = {kind.name: kind for kind in _KINDS}
ALIASES = {"swish": "silu"}
RELU_FAMILY = ("relu", "relu6", "leaky_relu")
"""What `swap_activations` replaces by default: the paper replaces ReLU; these share its kink at zero (paper 3.1)."""

_BY_FUNCTION = {function: kind for kind in _KINDS for function in (kind.function, *kind.spellings)}
_BY_METHOD = {method: kind for kind in _KINDS for method in kind.methods}
_IN_PLACE_FUNCTIONS = tuple(
    function for function in _BY_FUNCTION if getattr(function, "__name__", "").endswith("_")
)


def kind_named(name: str) -> Kind:
    """The kind of that name or alias.

    Raises:
        ValueError: if there is none; the message lists them all.
    """
    name = ALIASES.get(name, name)
    if name not in KINDS:
        valid = [*KINDS, *ALIASES]
        close = difflib.get_close_matches(name, valid, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"unknown activation {name!r}{hint}; known: {', '.join(valid)}")
    return KINDS[name]


def kind_of_module(module: nn.Module) -> Kind | None:
    """The kind of an activation module; a subclass counts if its forward is the inherited one."""
    for kind in _KINDS:
        if isinstance(module, kind.module) and type(module).forward is kind.module.forward:
            return kind
    return None


def is_activation_module(module: nn.Module) -> bool:
    """Whether a module is an activation, also one that other libraries wrote (`GELUActivation`, `QuickGELU`)."""
    if kind_of_module(module) is not None:
        return True
    bare = not (module._parameters or module._buffers or module._modules)
    name = type(module).__name__.lower()
    return bare and (name.endswith("activation") or "gelu" in name)


def kind_of_function(function: object) -> Kind | None:
    """The kind of an activation function, also with some arguments given by `functools.partial`."""
    if isinstance(function, functools.partial):
        function = function.func
    try:
        return _BY_FUNCTION.get(function)  # type: ignore[call-overload]
    except TypeError:  # unhashable
        return None


def kind_of_node(node: fx.Node) -> Kind | None:
    """The kind of a function or method call in a graph."""
    if node.op == "call_function":
        return kind_of_function(node.target)
    if node.op == "call_method":
        return _BY_METHOD.get(str(node.target))
    return None


def works_in_place(node: fx.Node) -> bool:
    """Whether an activation call in a graph overwrites its input."""
    if node.op == "call_method":
        return str(node.target).endswith("_")
    if node.target in _IN_PLACE_FUNCTIONS:
        return True
    if "inplace" in node.kwargs:
        return bool(node.kwargs["inplace"])
    position = _inplace_position(node.target)  # type: ignore[arg-type]
    return position is not None and len(node.args) > position and bool(node.args[position])


@functools.cache
def _inplace_position(function: Callable[..., Any]) -> int | None:
    if not isinstance(function, types.FunctionType):
        return None
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return names.index("inplace") if "inplace" in names else None


def spellings(names: tuple[str, ...]) -> frozenset[str]:
    """Every name under which code may mention one of these kinds."""
    found: set[str] = set()
    for name in names:
        kind = KINDS[name]
        found |= {name, f"{name}_", kind.module.__name__, *kind.methods}
    return frozenset(found)
