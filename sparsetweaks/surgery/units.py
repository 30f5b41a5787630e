"""Units: a convolution and the normalisation that directly follows it, and the geometry that a skip must bridge."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from sparsetweaks.surgery import kinds as k
from sparsetweaks.surgery.dataflow import called, first_input, mutates


@dataclass(frozen=True)
class Geometry:
    """How a convolution maps positions and channels, per spatial dimension.

    Output position i is centred on input position `offset + i * stride`.
    """

    in_channels: int
    out_channels: int
    stride: tuple[int, ...]
    offset: tuple[int, ...]
    keeps_size: bool

    @property
    def keeps_channels(self) -> bool:
        """Whether input and output have equally many channels."""
        return self.in_channels == self.out_channels

    @property
    def keeps_shape(self) -> bool:
        """Whether input and output have equal shapes for every input."""
        return self.keeps_size and self.keeps_channels


@dataclass(frozen=True)
class Unit:
    """A convolution and the normalisation that directly follows it, in one graph."""

    conv: fx.Node
    output: fx.Node
    left: str | None


_CONV_FORWARDS = {nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward}
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)


def units_in(graph: fx.Graph, module: nn.Module) -> Iterator[Unit]:
    """The units in one graph of a scope, those that must be left included."""
    nodes = list(graph.nodes)
    order = {node: position for position, node in enumerate(nodes)}
    for node in nodes:
        if node.op != "call_module" or not is_conv(called(node, module)):
            continue
        conv = called(node, module)
        if len(node.users) != 1 or first_input(node) is None:
            continue
        follower = next(iter(node.users))
        if _is_norm_call(follower, module):
            output = follower
        elif _is_activation_call(follower, module):
            output = node
        else:
            continue
        left = _why_no_geometry(conv) or _why_not_here(node, output, order, nodes, module)
        yield Unit(node, output, left)


def _why_not_here(
    conv: fx.Node, output: fx.Node, order: dict[fx.Node, int], nodes: list[fx.Node], module: nn.Module
) -> str | None:
    source = first_input(conv)
    assert source is not None
    if output is not conv:
        norm = called(output, module)
        if any(not isinstance(child, nn.Identity) for child in norm.children()):
            return "its normalisation applies an activation itself"
        between = nodes[order[conv] + 1 : order[output]]
        if any(mutates(node, module) for node in between):
            return "a tensor is overwritten between its convolution and its normalisation"
    for user in output.users:
        if user.op == "call_module":
            skip = called(user, module)
            if getattr(type(skip), "added_by_tweak", False):
                return "it already has a skip"
        if _is_add(user):
            operands = [_through_identity(each, module) for each in user.args if isinstance(each, fx.Node)]
            if _through_identity(source, module) in operands:
                return "a residual already spans exactly this unit"
    return None


def _through_identity(node: fx.Node, module: nn.Module) -> fx.Node:
    while node.op == "call_module" and type(called(node, module)) is nn.Identity:
        inner = first_input(node)
        if inner is None:
            break
        node = inner
    return node


def _is_add(node: fx.Node) -> bool:
    if node.op == "call_function":
        return node.target in (operator.add, operator.iadd, torch.add)
    return node.op == "call_method" and node.target in ("add", "add_")


def is_conv(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd)


def _is_norm_call(node: fx.Node, module: nn.Module) -> bool:
    if node.op != "call_module" or len(node.args) != 1:
        return False
    norm = called(node, module)
    return isinstance(norm, _NORMS) or type(norm).__name__.rstrip("123d").endswith("Norm")


def _is_activation_call(node: fx.Node, module: nn.Module) -> bool:
    if node.op == "call_module":
        return k.kind_of_module(called(node, module)) is not None
    return k.kind_of_node(node) is not None


def conv_kind(conv: nn.Module) -> str:
    return "kept" if _why_no_geometry(conv) is None and geometry_of(conv).keeps_shape else "changed"


def _why_no_geometry(conv: nn.Module) -> str | None:
    assert isinstance(conv, nn.modules.conv._ConvNd)
    if isinstance(conv, nn.modules.lazy.LazyModuleMixin):
        return "it is lazy: run a batch through the model first"
    if conv.transposed:
        return "it is a transposed convolution"
    if type(conv).forward not in _CONV_FORWARDS:
        return f"{type(conv).__name__} computes its geometry in a forward of its own"
    if hasattr(conv, "skip") and not getattr(type(conv.skip), "added_by_tweak", False):
        return "its convolution has an attribute named skip of its own"
    if any(offset < 0 for offset in geometry_of(conv).offset):
        return "it pads by more than its kernel covers"
    return None


def geometry_of(conv: Any) -> Geometry:
    """The geometry of an ordinary convolution, from its attributes."""
    reach = [dilation * (kernel - 1) for dilation, kernel in zip(conv.dilation, conv.kernel_size)]
    if conv.padding == "same":
        excess = [0] * len(reach)
    else:
        padding = [0] * len(reach) if conv.padding == "valid" else conv.padding
        excess = [r - 2 * p for r, p in zip(reach, padding)]
    same = all(e == 0 for e in excess) and all(s == 1 for s in conv.stride)
    offset = tuple(e // 2 for e in excess)
    return Geometry(conv.in_channels, conv.out_channels, tuple(conv.stride), offset, same)
