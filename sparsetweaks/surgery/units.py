"""Units: a convolution or linear layer and the normalisation that directly follows it, and what a skip must bridge."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from sparsetweaks.surgery import kinds as k
from sparsetweaks.surgery.dataflow import called, first_input, mutates


@dataclass(frozen=True)
class Geometry:
    """How a layer maps positions and channels, per spatial dimension; a linear layer has channels only.

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
    """A layer and the normalisation that directly follows it, in one graph."""

    layer: fx.Node
    output: fx.Node
    left: str | None


LAYERS = {"conv": nn.modules.conv._ConvNd, "linear": nn.Linear}
"""The kinds of layers around which a unit may be built, as `layers=` names them."""

_FORWARDS = {nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward, nn.Linear.forward}
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)


def layer_types(layers: str | Iterable[str]) -> tuple[type[nn.Module], ...]:
    """The module types that `layers=` names.

    Raises:
        ValueError: for an unknown kind, or none at all.
    """
    names = (layers,) if isinstance(layers, str) else tuple(layers)
    if not names or any(name not in LAYERS for name in names):
        raise ValueError(f"layers must be one or more of {', '.join(map(repr, LAYERS))}, not {layers!r}")
    return tuple(LAYERS[name] for name in names)


def units_in(graph: fx.Graph, module: nn.Module, types: tuple[type[nn.Module], ...]) -> Iterator[Unit]:
    """The units around layers of these types in one graph of a scope, those that must be left included."""
    nodes = list(graph.nodes)
    order = {node: position for position, node in enumerate(nodes)}
    for node in nodes:
        if node.op != "call_module" or not isinstance(called(node, module), types):
            continue
        layer = called(node, module)
        if len(node.users) != 1 or first_input(node) is None:
            continue
        follower = next(iter(node.users))
        if _is_norm_call(follower, module):
            output = follower
        elif _is_activation_call(follower, module):
            output = node
        else:
            continue
        left = _why_no_geometry(layer) or _why_not_here(node, output, order, nodes, module)
        yield Unit(node, output, left)


def _why_not_here(
    layer: fx.Node, output: fx.Node, order: dict[fx.Node, int], nodes: list[fx.Node], module: nn.Module
) -> str | None:
    source = first_input(layer)
    assert source is not None
    if output is not layer:
        norm = called(output, module)
        if any(not isinstance(child, nn.Identity) for child in norm.children()):
            return "its normalisation applies an activation itself"
        between = nodes[order[layer] + 1 : order[output]]
        if any(mutates(node, module) for node in between):
            return "a tensor is overwritten between its layer and its normalisation"
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


def _is_norm_call(node: fx.Node, module: nn.Module) -> bool:
    if node.op != "call_module" or len(node.args) != 1:
        return False
    norm = called(node, module)
    return isinstance(norm, _NORMS) or type(norm).__name__.rstrip("123d").endswith("Norm")


def _is_activation_call(node: fx.Node, module: nn.Module) -> bool:
    if node.op == "call_module":
        return k.is_activation_module(called(node, module))
    return k.kind_of_node(node) is not None


def kind_of_layer(layer: nn.Module) -> str:
    """What a skip around the layer has to bridge: nothing ("kept"), or a change of shape ("changed")."""
    return "kept" if _why_no_geometry(layer) is None and geometry_of(layer).keeps_shape else "changed"


def _why_no_geometry(layer: nn.Module) -> str | None:
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        return "it is lazy: run a batch through the model first"
    if getattr(layer, "transposed", False):
        return "it is a transposed convolution"
    if type(layer).forward not in _FORWARDS:
        return f"{type(layer).__name__} computes its geometry in a forward of its own"
    if hasattr(layer, "skip") and not getattr(type(layer.skip), "added_by_tweak", False):
        return "its layer has an attribute named skip of its own"
    if any(offset < 0 for offset in geometry_of(layer).offset):
        return "it pads by more than its kernel covers"
    return None


def geometry_of(layer: Any) -> Geometry:
    """The geometry of an ordinary convolution or linear layer, from its attributes."""
    if isinstance(layer, nn.Linear):
        return Geometry(layer.in_features, layer.out_features, (), (), True)
    reach = [dilation * (kernel - 1) for dilation, kernel in zip(layer.dilation, layer.kernel_size)]
    if layer.padding == "same":
        excess = [0] * len(reach)
    else:
        padding = [0] * len(reach) if layer.padding == "valid" else layer.padding
        excess = [r - 2 * p for r, p in zip(reach, padding)]
    same = all(e == 0 for e in excess) and all(s == 1 for s in layer.stride)
    offset = tuple(e // 2 for e in excess)
    return Geometry(layer.in_channels, layer.out_channels, tuple(layer.stride), offset, same)
