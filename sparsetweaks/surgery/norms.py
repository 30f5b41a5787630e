"""BatchNorms with more in them than torch's, such as timm's `BatchNormAct2d`: normalise, drop, activate.

The normalisation can be merged into a layer where the class's own forward is torch's normalisation and then a chain of
calls of the module's children; the children stay.
"""

from __future__ import annotations

import inspect
import operator

import torch
import torch.nn.functional as F
from torch import fx, nn

from sparsetweaks.surgery.programs import Case, Trace

_BATCH_NORM = inspect.signature(F.batch_norm)
_TENSORS = ("running_mean", "running_var", "weight", "bias")
_CHECKS = (
    getattr,
    torch._assert,
    operator.eq,
    operator.ne,
    operator.lt,
    operator.le,
    operator.gt,
    operator.ge,
)
"""What a forward may do beside, as it changes nothing: check the shape of its input."""


def children_after(norm: nn.Module, trace: Trace) -> dict[str, nn.Module] | None:
    """The children that a BatchNorm calls after it normalised in eval mode, in order; None if it does anything else."""
    chains = [
        _chain(norm, case) for case in trace.cases if case.answers.get("self.training") in (False, None)
    ]
    if not chains or None in chains or any(chain != chains[0] for chain in chains):
        return None
    return {name: norm.get_submodule(name) for name in chains[0] or ()}


def _chain(norm: nn.Module, case: Case) -> tuple[str, ...] | None:
    """The names of the children in one path through the forward."""
    *nodes, last = case.graph.nodes
    known = {node for node in nodes if node.op in ("placeholder", "get_attr")}
    known |= {node for node in nodes if node.op == "call_function" and node.target in _CHECKS}
    names: list[str] = []
    node = last.args[0]
    while isinstance(node, fx.Node) and node.op == "call_module":
        names.append(str(node.target))
        known.add(node)
        if len(node.args) != 1 or node.kwargs:
            return None
        (node,) = node.args
    if not isinstance(node, fx.Node) or not _normalises(node, norm):
        return None
    once = len(set(names)) == len(names) and not any("." in name for name in names)
    return tuple(reversed(names)) if once and known | {node} == set(nodes) else None


def _normalises(node: fx.Node, norm: nn.Module) -> bool:
    """Whether a call is torch's normalisation of the forward's input by the statistics that the module keeps."""
    if node.op != "call_function" or node.target is not F.batch_norm:
        return False
    given = _BATCH_NORM.bind(*node.args, **node.kwargs)
    given.apply_defaults()
    arguments = given.arguments
    source = arguments["input"]
    own = (_is_own(arguments[name], name, norm) for name in _TENSORS)
    return (
        isinstance(source, fx.Node)
        and source.op == "placeholder"
        and all(own)
        and arguments["training"] is False
        and arguments["eps"] == norm.eps
    )


def _is_own(value: object, name: str, norm: nn.Module) -> bool:
    if getattr(norm, name) is None:
        return value is None
    return isinstance(value, fx.Node) and value.op == "get_attr" and value.target == name
