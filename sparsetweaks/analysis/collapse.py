"""Which kept weights still lie on a path from input to output, and which layers have collapsed.

Paths are followed through a copy of the network in which every kept weight is 1, every pruned one 0, activations
and normalisations let everything through, and nothing can cancel: what enters is positive, differences are sums,
the largest of several is their mean. There the derivative of the outputs' sum by the inputs is a sum over paths,
one positive term each, and a weight is on a path exactly if that sum depends on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from sparsetweaks.analysis.evaluation import call, table_text, undisturbed, working_copy
from sparsetweaks.analysis.figures import COLORS, label, new_figure
from sparsetweaks.forms import masked_places
from sparsetweaks.masks import masks_by_parameter
from sparsetweaks.prunable import select_weights

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
        on_path: how many of the kept lie on a path from an input to an output.
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
        """Why nothing passes through this layer: `"no weight is kept"`, `"no path"`, or empty if something does."""
        if self.on_path:
            return ""
        return "no path" if self.kept else "no weight is kept"


@dataclass(frozen=True)
class LayerPathsReport:
    """What `layer_collapse` and `effective_sparsity` found; `print` it, `plot()` it, or take its `table()`.

    Attributes:
        layers: one for each weight of a convolution or linear layer, and whatever else has a mask.
        inputs: for each input whether any path leads from it to an output.
    """

    layers: tuple[LayerPaths, ...]
    inputs: Mapping[str, bool]

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
        return f"{head}\n{table_text(self.table())}"

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
            a mask a weight is kept whatever its value: see `find_masks(model, zeros=True)`.
        inputs: what the model is called with: a tensor, a tuple of positional or a mapping of keyword arguments, on its
            device. Only shapes matter; one example is enough. Whole numbers go in as they are, and paths then start at
            their embeddings.

    Returns:
        For each weight how many are kept, and how many of these are on a path for inputs of this shape (a tap of a
        kernel that only ever meets padding is on none). Exact where forwards consist of convolutions, linear and
        embedding layers, normalisations, the activations known by name, sums, differences, products, means, pooling,
        attention, and moving of values about. A forward that branches on values takes one branch.

    Raises:
        ValueError: the model fails on the inputs, has no weights to follow, or puts out nothing that depends on them
            other than through values; or the number of paths overflows even so.

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
    weights = _weights(network)
    counted = {weight.parameter for weight in select_weights(network)} | set(masks)
    if not weights:
        raise ValueError("the model has no weight of a convolution or linear layer to follow paths through")
    _count_paths_with(network)
    with undisturbed(network):
        given = {name: _positive(value) for name, value in _named(inputs).items()}
        starts = {name: value for name, value in given.items() if _starts_paths(value)}
        given |= {name: value * 1 for name, value in starts.items()}  # no leaf: a forward may work in place
        passing = _Passing(starts)
        output = _run(network, passing, given, inputs)
        sensitivity, reached = _derivatives(output, passing.starts, list(weights.values()))
    layers = []
    for (name, weight), gradient in zip(weights.items(), sensitivity, strict=True):
        mask = masks.get(weight)
        on_path = torch.zeros_like(weight, dtype=torch.bool) if gradient is None else gradient != 0
        if mask is not None:
            on_path &= mask
        kept = weight.numel() if mask is None else int(mask.sum())
        layers.append(LayerPaths(name, weight.numel(), kept, int(on_path.sum()), weight in counted))
    return LayerPathsReport(tuple(layers), reached)


def _weights(network: nn.Module) -> dict[str, nn.Parameter]:
    """What is counted, by name: the weights of convolutions and linear layers, and whatever else has a mask."""
    layers = {w.parameter: w.name for w in select_weights(network, include=lambda name, module: True)}
    names = {place.parameter: place.name for place in masked_places(network)} | layers
    return {names[p]: p for p in network.parameters() if p in names}


# ------------------------------------------------------------------------------------------------------------
# The network in which paths are counted


def _count_paths_with(network: nn.Module) -> None:
    """Make every kept parameter 1 and every pruned one 0, in a copy of our own."""
    masks = masks_by_parameter(network)
    plain = {place.parameter for place in masked_places(network) if place.plain}
    for parameter in network.parameters():
        parameter.requires_grad_(True)
        with torch.no_grad():
            parameter.fill_(1)
            if parameter in plain:
                parameter.masked_fill_(~masks[parameter], 0)


def _named(inputs: Any) -> dict[str, Any]:
    if not any(isinstance(part, Tensor) for part in pytree.tree_leaves(inputs)):
        raise ValueError(
            "inputs are what the model is called with: a tensor, a tuple of arguments or a mapping of them, "
            f"got a {type(inputs).__name__} without any tensor"
        )
    if isinstance(inputs, Mapping):
        return dict(inputs)
    parts = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
    return (
        {f"input {number}": part for number, part in enumerate(parts)}
        if len(parts) > 1
        else {"the input": parts[0]}
    )


def _positive(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    if value.ndim == 0 or value.numel() == 0:
        raise ValueError("the inputs hold no example")
    return torch.ones_like(value, dtype=torch.float64).requires_grad_(True)


def _starts_paths(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _run(network: nn.Module, passing: _Passing, given: Mapping[str, Any], inputs: Any) -> Tensor:
    """The sum of everything the network puts out."""
    arguments = dict(given) if isinstance(inputs, Mapping) else tuple(given.values())
    try:
        with passing:
            outputs = call(network, arguments)
    except (RuntimeError, TypeError, IndexError) as error:
        shapes = ", ".join(str(tuple(v.shape)) for v in given.values() if isinstance(v, Tensor))
        raise ValueError(f"the model fails on inputs of shape {shapes}: {error}") from error
    parts = [
        leaf
        for leaf in pytree.tree_leaves(_plain(outputs))
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]
    if not parts:
        raise ValueError("the model puts out no floating-point tensor: there is nothing for paths to lead to")
    return torch.stack([part.sum() for part in parts]).sum()


def _plain(outputs: Any) -> Any:
    """Outputs of classes of their own (dataclasses, ordered mappings) as what they hold."""
    if isinstance(outputs, Mapping):
        return dict(outputs)
    return vars(outputs) if hasattr(outputs, "__dict__") and not isinstance(outputs, Tensor) else outputs


def _derivatives(
    output: Tensor, starts: Mapping[str, Tensor], weights: list[nn.Parameter]
) -> tuple[list[Tensor | None], dict[str, bool]]:
    """How the sum over all paths depends on each weight, and which inputs have paths."""
    if not starts:
        raise ValueError("the inputs hold no floating-point tensor, and nothing is looked up in an embedding")
    if not output.requires_grad:
        return [None] * len(weights), dict.fromkeys(starts, False)
    by_input = torch.autograd.grad(output, list(starts.values()), create_graph=True, allow_unused=True)
    reached = {name: part is not None and bool((part != 0).any()) for name, part in zip(starts, by_input)}
    paths = [part.sum() for part in by_input if part is not None]
    total = torch.stack(paths).sum() if paths else None
    if total is None or not total.requires_grad:
        return [None] * len(weights), reached
    found: list[Tensor | None] = list(torch.autograd.grad(total, weights, allow_unused=True))
    if not all(each is None or bool(each.isfinite().all()) for each in found):
        raise ValueError(
            "there are more paths than double precision can count: look at a part of the network"
        )
    return found, reached


class _Passing(TorchFunctionMode):
    """Lets everything through: what can stop or cancel a value is replaced by what cannot."""

    def __init__(self, starts: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.starts = dict(starts)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "embedding":
            result = torch.ones_like(func(*args, **kwargs)).requires_grad_(True)
            self.starts[f"embedding {len(self.starts)}"] = result
            return result
        replacement = _REPLACEMENTS.get(name)
        result = replacement(*args, **kwargs) if replacement else func(*args, **kwargs)
        return _levelled(result) if name in _LEVELLED and isinstance(result, Tensor) else result


def _levelled(value: Tensor) -> Tensor:
    """1 wherever the value is positive, with a positive derivative there, so that no depth overflows or vanishes."""
    return value * torch.where(value > 0, 1 / value, 1).detach()


def _same(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return input


def _open(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A gate: open whatever enters, and yet dependent on it."""
    return 1 + input


def _sum(input: Any, other: Any, *, alpha: float = 1, **kwargs: Any) -> Tensor:
    return _constant(input) + abs(alpha) * _constant(other)


def _product(input: Any, other: Any, *args: Any, **kwargs: Any) -> Tensor:
    return _constant(input) * _constant(other)


def _constant(value: Any) -> Any:
    """Constants without sign or infinity (masks are added); what depends on an input or a weight as it is."""
    if not isinstance(value, Tensor):
        return abs(value)
    if value.requires_grad or not value.is_floating_point():
        return value
    return value.abs().nan_to_num(posinf=0)


def _in_place(replacement: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda input, *args, **kwargs: input.copy_(replacement(input, *args, **kwargs))


def _mean_pool(pool: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def replaced(
        input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
        ceil_mode: bool = False, return_indices: bool = False, **_: Any,
    ) -> Tensor:  # fmt: skip
        if return_indices or any(step != 1 for step in pytree.tree_leaves(dilation)):
            raise ValueError("cannot follow paths through a max pooling with dilation or indices")
        return pool(input, kernel_size, stride or kernel_size, padding, ceil_mode)

    return replaced


def _adaptive_mean_pool(pool: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def replaced(input: Tensor, output_size: Any, return_indices: bool = False) -> Tensor:
        if return_indices:
            raise ValueError("cannot follow paths through a max pooling with indices")
        return pool(input, output_size)

    return replaced


def _mean_of(input: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    return input.mean() if dim is None else input.mean(dim, keepdim)


def _largest(input: Tensor, dim: Any = None, keepdim: bool = False, *, other: Any = None) -> Any:
    if other is not None or isinstance(dim, Tensor):
        return _sum(input, dim if other is None else other)
    if dim is None:
        return input.mean()
    return torch.return_types.max((input.mean(dim, keepdim), input.argmax(dim, keepdim)))


def _attention(
    query: Tensor, key: Tensor, value: Tensor, *args: Any, enable_gqa: bool = False, **kwargs: Any
) -> Tensor:
    """Every position attends to every one, masks or not; paths also go through the scores."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (each.repeat_interleave(groups, -3) for each in (key, value))
    return _levelled((1 + _levelled(query @ key.transpose(-2, -1))) @ value)


def _joint_attention(
    query: Tensor, key: Tensor, value: Tensor, embed_dim: int, heads: int, in_weight: Tensor | None, in_bias: Tensor | None,
    bias_k: Any, bias_v: Any, add_zero_attn: bool, dropout: float, out_weight: Tensor, out_bias: Tensor | None,
    q_proj_weight: Tensor | None = None, k_proj_weight: Tensor | None = None, v_proj_weight: Tensor | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """`torch.nn.MultiheadAttention`'s function, sequence first."""
    weights = (q_proj_weight, k_proj_weight, v_proj_weight) if in_weight is None else in_weight.chunk(3)
    biases = (None, None, None) if in_bias is None else in_bias.chunk(3)
    parts = []
    for each, weight, bias in zip((query, key, value), weights, biases):
        assert weight is not None
        projected = _levelled(F.linear(each, weight, bias)).unflatten(-1, (heads, -1))
        parts.append(projected.movedim(-2, 0).movedim(1, -2))  # heads, (batch,) sequence, head's width
    mixed = _attention(*parts).movedim(-2, 1).movedim(0, -2).flatten(-2)
    return _levelled(F.linear(mixed, out_weight, out_bias)), None


_SAME = (
    "relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "prelu", "rrelu", "rrelu_", "elu", "elu_", "selu", "selu_",
    "celu", "celu_", "gelu", "silu", "mish", "hardswish", "hardtanh", "hardtanh_", "softplus", "softsign", "tanh",
    "tanh_", "tanhshrink", "hardshrink", "softshrink", "threshold", "threshold_", "logsigmoid", "clamp", "clamp_",
    "clip", "abs", "neg", "__neg__", "exp", "log", "log1p", "sqrt", "rsqrt", "dropout", "dropout1d", "dropout2d",
    "dropout3d", "alpha_dropout", "feature_alpha_dropout", "batch_norm", "layer_norm", "group_norm", "instance_norm",
    "rms_norm", "local_response_norm", "normalize", "detach", "sin", "cos", "erf", "pow", "__pow__", "square",
)  # fmt: skip
_OPEN = ("sigmoid", "sigmoid_", "hardsigmoid", "softmax", "log_softmax", "softmin", "gumbel_softmax")
_SUMS = ("add", "__add__", "__radd__", "sub", "subtract", "__sub__", "rsub", "__rsub__", "maximum", "minimum")
_PRODUCTS = ("mul", "multiply", "__mul__", "__rmul__", "div", "true_divide", "__truediv__")
_SUMS_IN_PLACE = ("add_", "__iadd__", "sub_", "__isub__")
_PRODUCTS_IN_PLACE = ("mul_", "__imul__", "div_", "__itruediv__")

_REPLACEMENTS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(_SAME, _same),
    **dict.fromkeys(_OPEN, _open),
    **dict.fromkeys(_SUMS, _sum),
    **dict.fromkeys(_PRODUCTS, _product),
    **dict.fromkeys(_SUMS_IN_PLACE, _in_place(_sum)),
    **dict.fromkeys(_PRODUCTS_IN_PLACE, _in_place(_product)),
    "max": _largest,
    "min": _largest,
    "max_pool1d": _mean_pool(F.avg_pool1d),
    "max_pool2d": _mean_pool(F.avg_pool2d),
    "max_pool3d": _mean_pool(F.avg_pool3d),
    "adaptive_max_pool1d": _adaptive_mean_pool(F.adaptive_avg_pool1d),
    "adaptive_max_pool2d": _adaptive_mean_pool(F.adaptive_avg_pool2d),
    "adaptive_max_pool3d": _adaptive_mean_pool(F.adaptive_avg_pool3d),
    "amax": _mean_of,
    "amin": _mean_of,
    "logsumexp": _mean_of,
    "masked_fill": _same,
    "masked_fill_": _same,
    "scaled_dot_product_attention": _attention,
    "multi_head_attention_forward": _joint_attention,
}
_LEVELLED = frozenset(
    (*_SAME, *_SUMS, "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear",
     "addcmul", "matmul", "__matmul__", "bmm", "einsum")
)  # fmt: skip
