"""Who overwrites what in a graph, and who looks at it afterwards: what in-place activations make us ask."""

from __future__ import annotations

import operator

import torch
from torch import fx, nn

from sparsetweaks.surgery import kinds as k

_FRESH_FUNCTIONS = {
    operator.add, operator.sub, operator.mul, torch.add, torch.sub, torch.mul, torch.cat, torch.matmul,
    nn.functional.linear, nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d,
    nn.functional.batch_norm,
}  # fmt: skip
_FRESH_MODULES = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.Linear,
)
_IN_PLACE_OPERATORS = {operator.iadd, operator.isub, operator.imul, operator.itruediv}


def is_observed(node: fx.Node, module: nn.Module) -> bool:
    """Whether anything may look at the input of this in-place call after it, other than through its result.

    Walks back through in-place operations to the tensor's origin. Only an origin known to make a fresh tensor, with
    no later reader of any of its names and no earlier one that may be a view of it, counts as not observed.
    """
    step, value = node, first_input(node)
    while value is not None:
        if any(user is not step and (user > node or not _makes_fresh(user, module)) for user in value.users):
            return True
        if _makes_fresh(value, module):
            return False
        if value.op == "call_module" and _is_tweak(called(value, module)):
            step, value = value, value.args[1]  # type: ignore[assignment]  # a skip returns its second input, or a sum
        elif mutates(value, module):
            step, value = value, first_input(value)
        else:
            return True
    return True


def is_overwritten(node: fx.Node, module: nn.Module) -> bool:
    """Whether another operation may overwrite the input of this call after it.

    ReLU keeps its output for the backward pass and does not mind; a smooth activation keeps its input.
    """
    value = first_input(node)
    while value is not None:
        if any(user > node and _may_overwrite(user, value, module) for user in value.users):
            return True
        value = first_input(value) if mutates(value, module) else None
    return False


def _makes_fresh(node: fx.Node, module: nn.Module) -> bool:
    """Whether a call is known to return a tensor that shares no memory with its inputs."""
    if node.op == "call_module":
        return isinstance(called(node, module), _FRESH_MODULES)
    return node.op == "call_function" and node.target in _FRESH_FUNCTIONS


def _may_overwrite(user: fx.Node, value: fx.Node, module: nn.Module) -> bool:
    """Whether a call may overwrite one of its inputs, itself or through a view that it returns."""
    if mutates(user, module):
        return first_input(user) is value
    if user.op == "call_module":
        child = called(user, module)
        return not (_is_tweak(child) or type(child).__module__.startswith("torch.nn.modules."))
    if user.op in ("call_function", "call_method") and not _makes_fresh(user, module):
        return any(_may_overwrite(each, user, module) for each in user.users)
    return False


def _is_tweak(module: nn.Module) -> bool:
    return bool(getattr(type(module), "added_by_tweak", False))


def called(node: fx.Node, module: nn.Module) -> nn.Module:
    """The child that a `call_module` node of the module's graph calls."""
    child = module._modules.get(str(node.target))  # the common case, in less time
    return module.get_submodule(str(node.target)) if child is None else child


def mutates(node: fx.Node, module: nn.Module) -> bool:
    """Whether a call overwrites its first input, as far as its form tells."""
    if node.op == "call_module":
        return bool(getattr(called(node, module), "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        in_place = node.target in _IN_PLACE_OPERATORS or node.target is operator.setitem
        return in_place or (name.endswith("_") and not name.endswith("__")) or bool(k.works_in_place(node))
    return False


def first_input(node: fx.Node) -> fx.Node | None:
    first = node.args[0] if node.args else node.kwargs.get("input")
    return first if isinstance(first, fx.Node) else None
