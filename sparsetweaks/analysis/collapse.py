"""Which kept weights still lie on a path from input to output, and which layers have collapsed.

Paths are followed through a copy of the network in which every kept weight is 1, every pruned one 0, activations
and normalisations let everything through, and nothing can cancel: what enters is positive, differences are sums,
the largest of several is their mean. There the derivative of the outputs' sum by the inputs is a sum over paths,
one positive term each, and a weight is on a path exactly if that sum depends on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparsetweaks.analysis.evaluation import call, table_text, undisturbed, working_copy
from sparsetweaks.analysis.figures import COLORS, label, new_figure
from sparsetweaks.analysis.left_out import about_left, left_out
from sparsetweaks.analysis.paths import Passing, in_double
from sparsetweaks.analysis.subspace import KEEP_ALL, check_zeros
from sparsetweaks.calling import map_tensors, tensors
from sparsetweaks.forms import masked_places
from sparsetweaks.masks import masks_by_parameter
from sparsetweaks.prunable import added_modules, select_weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NAMED_AT_MOST = 40


@dataclass(frozen=True)
class LayerPaths:
    """What is left of one weight tensor, and how much of that matters.

    Attributes:
        name: the weight's.
        weights: how many there are.
        kept: how many of them no mask removes.
        on_path: how many of the kept lie on a path from an input to an output. A bias, and whatever else is added rather
            than multiplied (an embedding of positions, a token of a class), is a source of its own: it is on a path if
            what it is added to reaches an output, whether or not anything of an input does.
        counted: whether the overall sparsity is of these weights too, as that of `sparsity(model)` is: prunable ones,
            and whatever has a mask; so not the classifier's.
    """

    name: str
    weights: int
    kept: int
    on_path: int
    counted: bool = True

    @property
    def collapsed(self) -> str:
        """Why nothing passes through this layer, or comes from this bias: `"no weight is kept"`, `"no path"`, or empty."""
        if self.on_path:
            return ""
        return "no path" if self.kept else "no weight is kept"


@dataclass(frozen=True)
class LayerPathsReport:
    """What `layer_collapse` and `effective_sparsity` found; `print` it, `plot()` it, or take its `table()`.

    Attributes:
        layers: one for each weight of a convolution or linear layer, and whatever else has a mask.
        inputs: for each input whether any path leads from it to an output.
        opened: the operations on the way that are not known here, by name. All that enters one is taken to reach all that
            leaves it, so that no path is missed, and some may be counted that are none: the true `on_path` are at most
            as large, and the true effective sparsity is at least as large. What is collapsed is so in any case.
        left: the weights of convolutions and linear layers that are not among `layers`, each with the reason.
    """

    layers: tuple[LayerPaths, ...]
    inputs: Mapping[str, bool]
    opened: tuple[str, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)

    @property
    def connected(self) -> bool:
        """Whether a path leads from every input to an output."""
        return all(self.inputs.values())

    @property
    def collapsed(self) -> tuple[LayerPaths, ...]:
        """The layers through which nothing passes."""
        return tuple(layer for layer in self.layers if layer.collapsed)

    @property
    def sparsity(self) -> float:
        """The fraction of the counted weights that masks remove, as `sparsity(model).overall`."""
        return self._missing("kept")

    @property
    def effective_sparsity(self) -> float:
        """The fraction of the counted weights that is on no path, removed or not (Vysogorets and Kempe 2023)."""
        return self._missing("on_path")

    def _missing(self, what: str) -> float:
        layers = [layer for layer in self.layers if layer.counted] or self.layers
        return 1 - sum(getattr(layer, what) for layer in layers) / sum(layer.weights for layer in layers)

    def table(self) -> list[dict[str, Any]]:
        """A row for each layer: `layer`, `weights`, `kept`, `on_path`, `sparsity`, `effective_sparsity`, `collapsed`."""
        return [
            {
                "layer": layer.name,
                "weights": layer.weights,
                "kept": layer.kept,
                "on_path": layer.on_path,
                "sparsity": 1 - layer.kept / layer.weights,
                "effective_sparsity": 1 - layer.on_path / layer.weights,
                "collapsed": layer.collapsed,
            }
            for layer in self.layers
        ]

    def __str__(self) -> str:
        dead = [name for name, reached in self.inputs.items() if not reached]
        paths = f"no path from {', '.join(dead)}" if dead else "every input has a path to the output"
        head = (
            f"sparsity {100 * self.sparsity:.2f} %, effective {100 * self.effective_sparsity:.2f} %; "
            f"{len(self.collapsed)} of {len(self.layers)} layers collapsed; {paths}"
        )
        if self.opened:
            head += (
                f"\nnot known, and taken to let everything through: {', '.join(self.opened)}; "
                "the effective sparsity is at least this, and more layers may have collapsed"
            )
        return "\n".join([head, *about_left(self.left), table_text(self.table())])

    def plot(self) -> Figure:
        """For each layer, from input to output, the fractions kept and on a path, on a logarithmic scale."""
        figure, axes = new_figure(
            size=(max(6.0, 0.22 * min(len(self.layers), 2 * _NAMED_AT_MOST) + 1.5), 4.0)
        )
        places = range(len(self.layers))
        kept = [100 * layer.kept / layer.weights or math.nan for layer in self.layers]
        on_path = [100 * layer.on_path / layer.weights or math.nan for layer in self.layers]
        axes.plot(places, kept, "s--", color=COLORS[1], label="kept")
        axes.plot(places, on_path, "o-", color=COLORS[0], label="kept and on a path")
        for place, layer in enumerate(self.layers):
            if layer.collapsed:
                axes.axvline(place, color=COLORS[3], linewidth=3, alpha=0.5)
        axes.set_yscale("log")
        if len(self.layers) <= _NAMED_AT_MOST:
            names = [layer.name.removesuffix(".weight") for layer in self.layers]
            axes.set_xticks(list(places), names, rotation=90, fontsize=8)
        axes.legend()
        label(axes, x="layer, in order of registration", y="weights, % (a bar: collapsed)")
        return figure


def layer_collapse(model: nn.Module, inputs: Any) -> LayerPathsReport:
    """Find the layers through which nothing passes any more, for each layer, input and the network (paper, section 2).

    A layer has collapsed if none of its weights is kept (Tanaka et al. 2020), or if none of those that are kept lies
    on a path from an input to an output. Skips, residuals and added projections are paths: a network with a collapsed
    layer may still be connected. Values do not matter, only what is kept: a skip whose learned strength is 0 is a path.

    Args:
        model: any module, masked in any form or not. It is not changed, and runs as a copy in evaluation mode. Without
            a mask a weight is kept whatever its value, and an `UnmaskedZerosWarning` tells of zeros: see
            `find_masks(model, zeros=True)`.
        inputs: what the model is called with: a tensor, a tuple of positional or a mapping of keyword arguments, on its
            device. Only shapes matter; one example is enough. Whole and complex numbers go in as they are; paths then
            start at the rows of embeddings, any of which may be looked up.

    Returns:
        For each weight how many are kept, and how many of these are on a path for inputs of this shape (a tap of a
        kernel that only ever meets padding is on none). Exact where forwards consist of convolutions, linear and
        embedding layers, normalisations, what works number by number on one tensor (activations, powers), sums,
        differences, products, means, the largest of several, pooling, attention, and moving of values about. Any other
        operation is named in `opened` and taken to let everything through: no path is missed, and what is found to have
        collapsed has. Masked biases, embeddings and weights of normalisations are judged too (see `LayerPaths.on_path`).
        A forward that branches on values takes one branch, as if gradients were on; numbers that it reads out of tensors
        are no path.

    Raises:
        ValueError: the model fails on the inputs, has no weights to follow, or puts out nothing that depends on them
            other than through values; the inputs are neither real numbers nor looked up in embeddings; part of the model
            is scripted, compiled or checkpointed, and cannot be followed; or the number of paths overflows even so.

    Example:
        >>> import sparsetweaks as st
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> masks = {"0.weight": torch.tensor([[True, True], [False, False]]), "2.weight": torch.tensor([[False, True]])}
        >>> found = layer_collapse(st.apply_masks(model, masks), torch.ones(1, 2))
        >>> found.connected, [layer.collapsed for layer in found.layers]
        (False, ['no path', 'no path'])
    """
    return _follow(model, inputs)


def effective_sparsity(model: nn.Module, inputs: Any) -> LayerPathsReport:
    """Count the weights that are on no path from input to output as removed (Vysogorets and Kempe 2023).

    A kept weight whose unit nothing enters, or whose unit nothing leaves, computes nothing: two masks of one sparsity
    may differ much in this. As `layer_collapse`, of which it is the other reading.

    Args:
        model: as in `layer_collapse`.
        inputs: as in `layer_collapse`.

    Returns:
        `sparsity` and `effective_sparsity` overall, and both for each layer.

    Raises:
        ValueError: as `layer_collapse`.

    Example:
        >>> import sparsetweaks as st
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> ticket = st.apply_masks(model, {"0.weight": torch.tensor([[True, True], [False, False]])})
        >>> found = effective_sparsity(ticket, torch.ones(1, 2))
        >>> round(found.sparsity, 3), found.effective_sparsity
        (0.5, 0.5)
    """
    return _follow(model, inputs)


def _follow(model: nn.Module, inputs: Any) -> LayerPathsReport:
    network = working_copy(model, dtype=torch.float64)
    masks = masks_by_parameter(network)
    check_zeros(network, masks, unless=KEEP_ALL)
    weights = _weights(network)
    left = left_out(network, weights.values())
    if not weights:
        text = "there is no weight of a convolution or linear layer to follow paths through"
        raise ValueError("; ".join([text, *about_left(left)]))
    of_tweaks = {parameter for module in added_modules(network) for parameter in module.parameters()}
    counted = {weight.parameter for weight in select_weights(network)} | ({*masks} - of_tweaks)
    _count_paths_with(network)
    with undisturbed(network):
        passing = Passing()
        try:
            output = _run(network, passing, inputs)
            sensitivity, reached = _derivatives(output, passing, list(weights.values()))
        finally:
            passing.close()
    layers = []
    for (name, weight), gradient in zip(weights.items(), sensitivity, strict=True):
        mask = masks.get(weight)
        on_path = torch.zeros_like(weight, dtype=torch.bool) if gradient is None else gradient != 0
        if mask is not None:
            on_path &= mask
        kept = weight.numel() if mask is None else int(mask.sum())
        layers.append(LayerPaths(name, weight.numel(), kept, int(on_path.sum()), weight in counted))
    return LayerPathsReport(tuple(layers), reached, tuple(passing.opened), left)


def _weights(network: nn.Module) -> dict[str, nn.Parameter]:
    """What is counted, by name: the weights of convolutions and linear layers, and whatever else has a mask."""
    layers = {w.parameter: w.name for w in select_weights(network, include=lambda name, module: True)}
    names = {place.parameter: place.name for place in masked_places(network)} | layers
    return {names[p]: p for p in network.parameters() if p in names and p.numel() > 0 and _can_be_followed(p)}


def _can_be_followed(value: Tensor) -> bool:
    """Whether there are derivatives by it."""
    return value.is_floating_point() or value.is_complex()


# ------------------------------------------------------------------------------------------------------------
# The network in which paths are counted


def _count_paths_with(network: nn.Module) -> None:
    """Make every kept parameter 1 and every pruned one 0, in a copy of our own."""
    masks = masks_by_parameter(network)
    plain = {place.parameter for place in masked_places(network) if place.plain}
    for parameter in filter(_can_be_followed, network.parameters()):
        parameter.requires_grad_(True)
        with torch.no_grad():
            parameter.fill_(1)
            if parameter in plain:
                parameter.masked_fill_(~masks[parameter], 0)


def _run(network: nn.Module, passing: Passing, inputs: Any) -> Tensor:
    """The sum of everything the network puts out."""
    if not any(True for _ in tensors(inputs)):
        raise ValueError(
            "inputs are what the model is called with: a tensor, a tuple of arguments or a mapping of them, "
            f"got a {type(inputs).__name__} without any tensor"
        )
    names = _names(inputs)
    entering = map_tensors(lambda each: _entering(next(names), each, passing), inputs)
    try:
        with passing:
            outputs = call(network, entering)
    except (ValueError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever the model's own code raises
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors(inputs))
        raise ValueError(
            f"the model fails on inputs of shape {shapes}: {type(error).__name__}: {error}"
        ) from error
    if not passing.starts:
        kinds = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors(inputs)}))
        raise ValueError(
            "paths start at real numbers that go in and at embeddings, but the inputs are "
            f"{kinds}, and nothing is looked up in an embedding"
        )
    parts = [leaf for leaf in _tensors_out(outputs) if leaf.is_floating_point() or leaf.is_complex()]
    if not parts:
        raise ValueError("the model puts out no floating-point tensor: there is nothing for paths to lead to")
    with passing:
        real = [torch.view_as_real(part) if part.is_complex() else part for part in parts]
        return torch.stack([part.sum() for part in real]).sum()


def _names(inputs: Any) -> Iterator[str]:
    """A name for each tensor among the inputs, in the order of `map_tensors`."""
    if isinstance(inputs, Mapping):
        named = {str(key): part for key, part in inputs.items()}
    elif isinstance(inputs, (tuple, list)) and len(inputs) > 1:
        named = {f"input {number}": part for number, part in enumerate(inputs)}
    else:
        named = {"the input": inputs[0] if isinstance(inputs, (tuple, list)) else inputs}
    for name, part in named.items():
        yield from _names_within(name, part)


def _names_within(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, Tensor):
        yield name
    elif isinstance(value, (Mapping, tuple, list)):
        for key, part in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _names_within(f"{name}[{key!r}]", part)


def _entering(name: str, value: Tensor, passing: Passing) -> Tensor:
    """What goes in: real numbers as ones, from which paths start."""
    if not value.is_floating_point():
        return in_double(value.clone())
    if value.ndim == 0 or value.numel() == 0:
        raise ValueError("the inputs hold no example")
    return passing.start(name, torch.ones_like(value, dtype=torch.float64).requires_grad_(True))


def _tensors_out(outputs: Any, seen: frozenset[int] = frozenset()) -> Iterator[Tensor]:
    """The tensors that are put out, also in classes of their own (dataclasses, ordered mappings), however deep."""
    for leaf in pytree.tree_leaves(dict(outputs) if isinstance(outputs, Mapping) else outputs):
        if isinstance(leaf, Tensor):
            yield leaf
        elif id(leaf) not in seen and (isinstance(leaf, Mapping) or hasattr(leaf, "__dict__")):
            inside = leaf if isinstance(leaf, Mapping) else vars(leaf)
            yield from _tensors_out(dict(inside), seen | {id(leaf)})


def _derivatives(
    output: Tensor, passing: Passing, weights: list[nn.Parameter]
) -> tuple[list[Tensor | None], dict[str, bool]]:
    """How the sum over all paths depends on each weight, and which inputs have paths."""
    if not output.requires_grad:
        raise ValueError(
            "what the model puts out depends on nothing by any function of torch: numbers that a forward reads out of "
            "tensors (.item(), .tolist(), comparisons) are no path"
        )
    starts, sources = passing.starts, passing.sources
    found = _derivative(output, [*starts.values(), *sources], create_graph=True)
    by_input, by_source = found[: len(starts)], found[len(starts) :]
    reached = {name: part is not None and bool((part != 0).any()) for name, part in zip(starts, by_input)}
    paths = [part.sum() for part in by_input if part is not None and part.requires_grad]
    begun = [(source, part.detach()) for source, part in zip(sources, by_source) if part is not None]
    if not paths and not begun:
        return [None] * len(weights), reached
    ends = [*paths, *(source for source, _ in begun)]
    shares = [*map(torch.ones_like, paths), *(share for _, share in begun)]
    sensitivity = _derivative(ends, weights, grad_outputs=shares)
    if not all(each is None or bool(each.isfinite().all()) for each in sensitivity):
        raise ValueError(
            "there are more paths than double precision can count: look at a part of the network"
        )
    return sensitivity, reached


def _derivative(of: Any, by: list[Any], **options: Any) -> list[Tensor | None]:
    try:
        return list(torch.autograd.grad(of, by, allow_unused=True, **options))
    except RuntimeError as error:
        raise ValueError(
            f"cannot follow paths backward ({error}): if the model checkpoints activations, switch that off"
        ) from error
