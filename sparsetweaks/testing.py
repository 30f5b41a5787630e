"""Random small networks that contain what breaks model surgery, for property tests with hypothesis.

People write forwards that a tracer freezes, reorders or drops: in-place operations seen through another
name, `F.dropout(x, training=self.training)`, a branch on `torch.is_grad_enabled()`, a counter, a custom
gradient, one module under two names. Each such hazard is one small block class here. A `Spec` (plain data,
which hypothesis can shrink and print) names the blocks of one network, `build` makes it, `observe` records
all it does, and `snapshot` all it is::

    @given(spec=specs())
    def test_a_rewrite_changes_nothing_at_its_neutral_setting(spec):
        batch = example_batch(spec)
        before = observe(build(spec), batch, training=True)
        after = observe(my_rewrite(build(spec)), batch, training=True)
        assert differences(before, after) == []

The same spec always builds the same network, so two calls give two twins that share nothing. No function here
reads or moves a global random state. Needs hypothesis: `pip install sparsetweaks[testing]`.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import random
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import prune as torch_prune
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

try:
    from hypothesis import strategies as st
except ImportError as error:
    raise ImportError(
        "sparsetweaks.testing needs hypothesis; install it with: pip install 'sparsetweaks[testing]'"
    ) from error

CLASSES = 3
T = TypeVar("T")


# --- The specification of one network: plain data -----------------------------------------------------------


@dataclass(frozen=True)
class BlockSpec:
    """One block: how its forward is written, and the layer, normalisation and activation it is made of."""

    form: str = "plain"
    layer: str = "plain"
    norm: str = "batch"
    activation: str = "ReLU"
    options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Spec:
    """One network. `build(spec)` makes it; equal specs make equal networks."""

    blocks: tuple[BlockSpec, ...] = (BlockSpec(),)
    network: str = "conv"
    width: int = 4
    size: int = 6
    batch: int = 2
    root: str = "tower"
    returns: str = "tensor"
    extras: tuple[str, ...] = ()
    seed: int = 0


# --- Activations: every way of writing one ------------------------------------------------------------------


def relu_inplace(x: Tensor) -> Tensor:
    return F.relu(x, inplace=True)


def relu_positional(x: Tensor) -> Tensor:
    return F.relu(x, True)


def relu_keyword(x: Tensor) -> Tensor:
    return F.relu(input=x)


def relu_method(x: Tensor) -> Tensor:
    return x.relu()


def relu_method_inplace(x: Tensor) -> Tensor:
    return x.relu_()


def relu6_inplace(x: Tensor) -> Tensor:
    return F.relu6(x, inplace=True)


def leaky_relu_inplace(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2, inplace=True)


rectify = F.relu


def relu_alias(x: Tensor) -> Tensor:
    return rectify(x)


class CallableReLU:
    """An object that is called and is no module."""

    def __call__(self, x: Tensor) -> Tensor:
        return F.relu(x)


class DoubledReLU(nn.ReLU):
    """A subclass of an activation whose forward does something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class PlainReLUSubclass(nn.ReLU):
    """A subclass of an activation that changes nothing but the name."""


ACTIVATIONS: dict[str, Callable[[], Any]] = {
    "ReLU": nn.ReLU,
    "ReLU(inplace)": lambda: nn.ReLU(inplace=True),
    "ReLU6": nn.ReLU6,
    "ReLU6(inplace)": lambda: nn.ReLU6(inplace=True),
    "LeakyReLU": lambda: nn.LeakyReLU(0.1),
    "LeakyReLU(inplace)": lambda: nn.LeakyReLU(0.1, inplace=True),
    "Sequential(ReLU)": lambda: nn.Sequential(nn.ReLU()),
    "DoubledReLU": DoubledReLU,
    "PlainReLUSubclass": PlainReLUSubclass,
    "PReLU": nn.PReLU,
    "GELU": nn.GELU,
    "Tanh": nn.Tanh,
    "F.relu": lambda: F.relu,
    "F.relu(inplace=True)": lambda: relu_inplace,
    "F.relu(x, True)": lambda: relu_positional,
    "F.relu(input=x)": lambda: relu_keyword,
    "torch.relu": lambda: torch.relu,
    "torch.relu_": lambda: torch.relu_,
    "x.relu()": lambda: relu_method,
    "x.relu_()": lambda: relu_method_inplace,
    "F.relu6": lambda: F.relu6,
    "F.relu6(inplace=True)": lambda: relu6_inplace,
    "F.leaky_relu": lambda: F.leaky_relu,
    "F.leaky_relu(inplace=True)": lambda: leaky_relu_inplace,
    "partial(F.leaky_relu)": lambda: functools.partial(F.leaky_relu, negative_slope=0.3),
    "partial(F.relu, inplace=True)": lambda: functools.partial(F.relu, inplace=True),
    "F.leaky_relu_": lambda: F.leaky_relu_,
    "Tensor.relu": lambda: Tensor.relu,
    "alias of F.relu": lambda: relu_alias,
    "callable object": CallableReLU,
    "F.gelu": lambda: F.gelu,
}


# --- Layers and normalisations ------------------------------------------------------------------------------


_CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_BATCH_NORMS: dict[int, Any] = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_INSTANCE_NORMS: dict[int, Any] = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


class Doubled(nn.Module):
    """A convolution with its own forward, as weight-standardised ones have."""

    weight: Tensor
    bias: Tensor | None
    _conv_forward: Callable[..., Tensor]

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, 2 * self.weight, self.bias)


class DoubledConv1d(Doubled, nn.Conv1d):
    """In one dimension."""


class DoubledConv2d(Doubled, nn.Conv2d):
    """In two."""


class DoubledConv3d(Doubled, nn.Conv3d):
    """In three."""


_DOUBLED: dict[int, Any] = {1: DoubledConv1d, 2: DoubledConv2d, 3: DoubledConv3d}


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of an image, through two permutations (ConvNeXt's)."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


class FrozenNorm(nn.Module):
    """Batch normalisation by fixed statistics in buffers, without parameters, as detection models have."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, input: Tensor) -> Tensor:
        return F.batch_norm(input, self.running_mean, self.running_var)


class Acting(nn.Module):
    """A normalisation that applies an activation itself, as timm's do."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.act = nn.ReLU(inplace=True)

    def forward(self, input: Tensor) -> Tensor:
        return 0.5 * self.act(super().forward(input))  # type: ignore[safe-super]


class BatchNormAct1d(Acting, nn.BatchNorm1d):
    """In one dimension, or none."""


class BatchNormAct2d(Acting, nn.BatchNorm2d):
    """In two."""


class BatchNormAct3d(Acting, nn.BatchNorm3d):
    """In three."""


_ACTING_NORMS: dict[int, Any] = {0: BatchNormAct1d, 1: BatchNormAct1d, 2: BatchNormAct2d, 3: BatchNormAct3d}


class Halved(nn.Module):
    """A parametrization of one's own."""

    def forward(self, weight: Tensor) -> Tensor:
        return 0.5 * weight


LAYERS: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3, "padding": 1, "bias": False},
    "bias": {"kernel_size": 3, "padding": 1},
    "pointwise": {"kernel_size": 1},
    "asymmetric": {"kernel_size": (1, 3), "padding": (0, 1)},
    "grouped": {"kernel_size": 3, "padding": 1, "groups": 2},
    "depthwise": {"kernel_size": 3, "padding": 1},
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "same": {"kernel_size": 3, "padding": "same"},
    "same_dilated": {"kernel_size": (5, 3), "padding": "same", "dilation": (1, 2)},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    "transposed": {"kernel_size": 3, "padding": 1},
    "subclass": {"kernel_size": 3, "padding": 1},
    "weight_norm": {"kernel_size": 3, "padding": 1},
    "weight_norm_hook": {"kernel_size": 3, "padding": 1},
    "spectral_norm": {"kernel_size": 3, "padding": 1},
    "parametrized": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 3, "padding": 1, "stride": 2},
    "valid": {"kernel_size": 3},
    "overpadded": {"kernel_size": 1, "padding": 1},
    "patches": {"kernel_size": 2, "stride": 2},
    "upsampling": {"kernel_size": 2, "stride": 2},
    "widening": {"kernel_size": 3, "padding": 1},
    "narrowing": {"kernel_size": 1},
    "depthwise_widening": {"kernel_size": 3, "padding": 1},
    "strided_widening": {"kernel_size": 3, "padding": 1, "stride": 2, "bias": False},
}
RESHAPING = (
    *("strided", "valid", "overpadded", "patches", "upsampling"),
    *("widening", "narrowing", "depthwise_widening", "strided_widening"),
)
_FLAT_LAYERS = (
    *("plain", "bias", "weight_norm", "weight_norm_hook", "spectral_norm", "parametrized"),
    *("widening", "narrowing"),
)
_PARAMETRIZED = ("weight_norm", "spectral_norm", "parametrized")
_FLAT_NORMS = (
    *("batch", "none", "identity", "empty", "group", "layer", "batch_act", "frozen"),
    *("batch_no_affine", "batch_no_statistics"),
)
_NORMS = (*_FLAT_NORMS, "instance", "local_response")


def _layer(name: str, width: int, rank: int) -> tuple[nn.Module, int]:
    """A convolution in `rank` dimensions (0: a linear layer) of `width` channels, and how many it gives."""
    out = 2 * width if "widening" in name else width // 2 if name == "narrowing" else width
    layer: nn.Module
    if rank == 0:
        layer = nn.Linear(width, out, bias=name != "plain")
    else:
        kinds = {"transposed": _TRANSPOSED, "upsampling": _TRANSPOSED, "subclass": _DOUBLED}
        geometry = {key: _in_rank(value, rank) for key, value in LAYERS[name].items()}
        if name.startswith("depthwise"):
            geometry["groups"] = width
        layer = kinds.get(name, _CONVS)[rank](width, out, **geometry)
    if name == "weight_norm":
        layer = parametrizations.weight_norm(layer)
    elif name == "spectral_norm":
        layer = parametrizations.spectral_norm(layer)
    elif name == "parametrized":
        parametrize.register_parametrization(layer, "weight", Halved())
    elif name == "weight_norm_hook":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # deprecated, and still in use everywhere
            layer = nn.utils.weight_norm(layer)
    return layer, out


def _in_rank(value: Any, rank: int) -> Any:
    """A pair for two dimensions as it is in one (its last) or three (its first twice)."""
    return (value[0], *value)[-rank:] if isinstance(value, tuple) else value


def _norm(name: str, width: int, rank: int) -> nn.Module | None:
    makers: dict[str, Callable[[], nn.Module | None]] = {
        "none": lambda: None,
        "identity": nn.Identity,
        "empty": nn.Sequential,
        "batch": lambda: _BATCH_NORMS[rank](width),
        "batch_act": lambda: _ACTING_NORMS[rank](width),
        "batch_no_affine": lambda: _BATCH_NORMS[rank](width, affine=False),
        "batch_no_statistics": lambda: _BATCH_NORMS[rank](width, track_running_stats=False),
        "frozen": lambda: FrozenNorm(width),
        "group": lambda: nn.GroupNorm(2, width),
        "instance": lambda: _INSTANCE_NORMS[rank](width, affine=True),
        "local_response": lambda: nn.LocalResponseNorm(2),
        "layer": lambda: ChannelNorm(width) if rank else nn.LayerNorm(width),
    }
    return makers[name]()


# --- Blocks: one hazard each --------------------------------------------------------------------------------


class Block(nn.Module):
    """What all blocks have: one unit (a layer and its normalisation) and one activation."""

    adds_input = False  # whether the forward needs the unit to keep the shape
    width: int
    total: Tensor
    steps: Tensor
    scratch: Tensor
    offset: Tensor

    def __init__(self, spec: BlockSpec, width: int, rank: int) -> None:
        super().__init__()
        self.conv, self.width = _layer(spec.layer, width, rank)
        self.norm = _norm(spec.norm, self.width, rank)
        self.act = ACTIVATIONS[spec.activation]()
        self.rank = rank
        self.channels_shape = (1, -1, *[1] * rank)
        self.extend(spec, width)

    def extend(self, spec: BlockSpec, width: int) -> None:
        """What a block has besides; `width` channels come in and `self.width` go out."""

    def second(self) -> nn.Module:
        """A further layer that keeps the shape."""
        return _layer("plain", self.width, self.rank)[0]

    def unit(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x if self.norm is None else self.norm(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.unit(x))


class Plain(Block):
    """Layer, normalisation, activation."""


class Residual(Block):
    """A residual that spans exactly one unit."""

    adds_input = True

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.unit(x) + x)


class InplaceResidual(Block):
    """`out += x`, as torchvision's ResNet has it."""

    adds_input = True

    def forward(self, x: Tensor) -> Tensor:
        out = self.unit(x)
        out += x
        return self.act(out)


class Basic(Block):
    """A residual that spans two units; one activation called twice."""

    adds_input = True

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.conv2 = self.second()
        self.norm2 = _norm(spec.norm, self.width, self.rank)

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.unit(x))
        out = self.conv2(out)
        if self.norm2 is not None:
            out = self.norm2(out)
        return self.act(out + x)


class PreActivation(Block):
    """Normalisation and activation before the layer; two units' worth of order changed."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.first_norm = _BATCH_NORMS[self.rank](width)

    def forward(self, x: Tensor) -> Tensor:
        return self.unit(self.act(self.first_norm(x)))


class Alias(Block):
    """The result of an in-place activation is also seen through the name that was there before."""

    def forward(self, x: Tensor) -> Tensor:
        before = self.unit(x) * 0.5
        return self.act(before) + before


class View(Block):
    """An in-place activation on a part of a tensor, whose result nobody takes."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.unit(x) * 0.5
        self.act(out[:, :1])
        return out


class Inner(nn.Module):
    """A child whose first step may write into the tensor it was given."""

    def __init__(self, act: Any, layer: nn.Module) -> None:
        super().__init__()
        self.act = act
        self.conv = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.act(x))


class InplaceAcross(Block):
    """A child changes its input in place and the parent adds that input afterwards."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.inner = Inner(self.act, self.second())

    def forward(self, x: Tensor) -> Tensor:
        x = self.unit(x) + 0.125
        return self.inner(x) + x


class Tap(Block):
    """The layer's output is used beside the normalisation that follows it."""

    def forward(self, x: Tensor) -> Tensor:
        raw = self.conv(x) * 0.5
        return self.act(raw if self.norm is None else self.norm(raw)) + raw.detach().mean()


class Reused(Block):
    """One unit called twice in one forward."""

    adds_input = True

    def forward(self, x: Tensor) -> Tensor:
        return self.unit(self.act(self.unit(x)))


class Branches(Block):
    """Two branches joined by `torch.cat`, one activation module for both."""

    adds_input = True

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.conv2 = self.second()
        self.mix = _CONVS[self.rank](2 * width, width, 1) if self.rank else nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(torch.cat([self.act(self.unit(x)), self.act(self.conv2(x))], 1))


class Gated(Block):
    """A squeeze-and-excitation gate: the activation also works on pooled values."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.gate = nn.Linear(self.width, self.width)

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.unit(x))
        gate = torch.sigmoid(self.gate(F.relu(out.flatten(2).mean(2) if self.rank else out)))
        return out * gate.view(out.size(0), *self.channels_shape[1:])


class TiedWeights(Block):
    """One `Parameter` in two modules."""

    adds_input = True

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.conv2, self.conv3 = self.second(), self.second()
        self.conv3.weight = self.conv2.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.unit(x) + self.conv3(self.act(self.conv2(x)))


class TwoNames(Block):
    """One module registered under two names, and both are called."""

    adds_input = True

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.again = self.conv
        self.act_again = self.act

    def forward(self, x: Tensor) -> Tensor:
        return self.act_again(self.again(self.act(self.unit(x))))


class Unused(Block):
    """Modules that no forward calls."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.spare = nn.Sequential(self.second(), nn.ReLU())


class FunctionalDropout(Block):
    """`F.dropout(x, training=self.training)`: a tracer that runs once freezes one mode."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.act(self.unit(x)), 0.3, training=self.training)


class ModuleDropout(Block):
    """`nn.Dropout`, in place."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.drop = nn.Dropout(0.3, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(self.unit(x) * 1.5))


class TrainingBranch(Block):
    """`if self.training`: other code, other noise and other activations in the two modes."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.unit(x)
        if self.training:
            return self.act(out + 0.1 * torch.randn_like(out))
        return F.relu(self.act(out) - 0.1)


class PythonDropPath(Block):
    """Stochastic depth by Python's `random`: drawn anew at each call."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.unit(x))
        return out * 0.25 if self.training and random.random() < 0.5 else out


class TorchDropPath(Block):
    """Stochastic depth by a `torch.rand` that no input goes into."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.unit(x))
        return out * (torch.rand(1, dtype=torch.float32) + 0.5) if self.training else out


class SampleDropPath(Block):
    """Stochastic depth per sample: random numbers shaped by the input."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.unit(x))
        if self.training:
            out = out * (torch.rand((x.shape[0], 1, *self.channels_shape[2:])) > 0.3).to(out.dtype)
        return out


class NoGrad(Block):
    """A part of the forward under `torch.no_grad()`."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.conv2 = self.second()

    def forward(self, x: Tensor) -> Tensor:
        out = self.unit(x)
        with torch.no_grad():
            fixed = self.act(self.conv2(out))
        return self.act(out * 0.5) + fixed


class NoGradMethod(Block):
    """A method of the module that is decorated by `torch.no_grad()`."""

    @torch.no_grad()
    def scale(self, x: Tensor) -> Tensor:
        return F.relu(x).mean() + 1

    def forward(self, x: Tensor) -> Tensor:
        out = self.unit(x)
        return self.act(out * self.scale(out))


class GradMode(Block):
    """A branch on `torch.is_grad_enabled()`."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.unit(x))
        return out if torch.is_grad_enabled() else out * 0.5


class Autocast(Block):
    """A part of the forward under `torch.autocast`."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = self.conv(x)
        out = out.to(x.dtype)
        return self.act(out if self.norm is None else self.norm(out))


class Flags(Block):
    """Arguments with bool, None, int, float and str defaults; `options` of the spec calls it with others."""

    def forward(
        self,
        x: Tensor,
        half: bool = False,
        shift: Tensor | None = None,
        times: int = 1,
        scale: float = 1.0,
        how: str = "act",
    ) -> Tensor:
        out = self.unit(x)
        for _ in range(times):
            out = self.act(out * scale)
        if shift is not None:
            out = out + shift
        if how == "gelu":
            out = F.gelu(out)
        return out * 0.5 if half else out


class KeywordOnly(Block):
    """Keyword-only arguments and `**kwargs`."""

    def forward(self, x: Tensor, *, half: bool = False, **rest: Any) -> Tensor:
        out = self.act(self.unit(x))
        return out * 0.5 if half or rest else out


class VariadicInputs(Block):
    """`forward(*inputs)`."""

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.act(self.unit(inputs[0])) * len(inputs)


class TypeCheck(Block):
    """`isinstance(x, Tensor)`, whose other branch is also valid code."""

    def forward(self, x: Any) -> Tensor:
        out = self.act(self.unit(x))
        return out if isinstance(x, Tensor) else out * 0.5


class ListInput(Block):
    """A tensor or a list of tensors, as DenseNet's layers take."""

    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        parts = [x] if isinstance(x, Tensor) else x
        return self.act(self.unit(torch.cat(list(parts), 1)))


class ShapeBranch(Block):
    """Control flow on the input's shape."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.unit(x)
        if x.shape[0] > 2:
            return self.act(out)
        return self.act(out - 0.1)


class ValueBranch(Block):
    """Control flow on the values."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.unit(x)
        return self.act(out) if out.sum() > 0 else F.relu(out + 0.5)


class ShapeLoop(Block):
    """A Python loop over the batch."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.unit(x)
        return torch.stack([self.act(out[i] * (1 + i)) for i in range(out.size(0))])


class ShapeUnpack(Block):
    """Sizes unpacked and computed with."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.unit(x)
        batch, channels = out.shape[:2]
        return self.act(out.reshape(batch, channels, -1)).reshape(out.shape) / (batch * 0.5)


class Guarded(Block):
    """`try` and `except` around code that a tracer cannot follow."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.unit(x))
        try:
            return out * (1.0 if bool(out.sum() > -1e9) else 2.0)
        except ValueError:
            return out * 0.5


class Counter(Block):
    """A Python attribute that every call changes, and that the result depends on."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.act(self.unit(x)) * (1 + self.calls / 8)


class Remembers(Block):
    """The module keeps a tensor of its last call."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.unit(x))
        self.seen = out.detach().clone()
        return out


class AppendsToList(Block):
    """The module keeps a list of what its calls saw."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.history: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.unit(x))
        self.history.append(out.detach().mean())
        return out


class BufferInplace(Block):
    """A buffer that the forward updates in place in training."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.register_buffer("total", torch.zeros(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        out = self.unit(x)
        if self.training:
            self.total.add_(out.detach().mean())
            self.steps += 1
        return self.act(out + self.total)


class BufferAssigned(Block):
    """A buffer that the forward replaces."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        out = self.unit(x)
        self.total = 0.5 * self.total + out.detach().mean()
        return self.act(out + self.total)


class OwnParameters(Block):
    """Parameters and buffers of the module's own, used directly; one buffer is not saved."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.gamma = nn.Parameter(torch.full((self.width,), 0.5))
        self.betas = nn.ParameterList([nn.Parameter(torch.full((self.width,), 0.1))])
        self.register_buffer("offset", torch.full((), 0.25))
        self.register_buffer("scratch", torch.ones(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.unit(x) * self.gamma.view(self.channels_shape) * self.scratch
        return self.act(out + self.betas[0].view(self.channels_shape)) + self.offset


class BuffersOnly(Block):
    """A child with a buffer and no parameter, whose forward has the activation."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.shift = Shift(self.act)

    def forward(self, x: Tensor) -> Tensor:
        return self.shift(self.unit(x))


class Shift(nn.Module):
    """No parameters: one buffer and an activation."""

    by: Tensor

    def __init__(self, act: Any) -> None:
        super().__init__()
        self.register_buffer("by", torch.full((), 0.1))
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.by)


class FunctionalLayer(Block):
    """A child's weight used by `F.conv2d` or `F.linear`, not by calling the child."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.conv2 = self.second()

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.unit(x))
        weight: Any = self.conv2.weight
        functions: Any = (F.linear, F.conv1d, F.conv2d, F.conv3d)
        return F.relu(functions[self.rank](out, weight, **({"padding": 1} if self.rank else {})))


class Nested(Block):
    """Scopes in scopes: a Sequential in a Sequential, with a block in it."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        inside = BlockSpec(form="residual", activation=spec.activation)
        self.body = nn.Sequential(
            nn.Sequential(Residual(inside, self.width, self.rank), nn.ReLU()), self.second()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.body(self.unit(x)))


class Stack(nn.Sequential):
    """A Sequential with its own forward that calls the parent's."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x)) + x


class LoopStack(nn.Sequential):
    """A Sequential with its own loop over the children."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x


class SequentialSubclass(Block):
    """Subclasses of `nn.Sequential`, with and without their own forward."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.stack = Stack(self.second(), nn.ReLU())
        self.loop = LoopStack(self.second(), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.loop(self.stack(self.act(self.unit(x))))


class SequentialSlice(Block):
    """A slice of a Sequential, which is a module that is registered nowhere."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.body = nn.Sequential(self.second(), nn.ReLU(), self.second())

    def forward(self, x: Tensor) -> Tensor:
        return self.body[2:](self.body[:2](self.act(self.unit(x))))


class ListLoop(Block):
    """A loop over a ModuleList and one over a ModuleDict."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.layers = nn.ModuleList([self.second(), nn.ReLU()])
        self.named = nn.ModuleDict({"conv": self.second(), "act": nn.ReLU6()})

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.unit(x))
        for layer in self.layers:
            x = layer(x)
        for _, layer in self.named.items():
            x = layer(x)
        return x


class Hidden(Block):
    """An activation module in a plain list, which `modules()` does not see."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.hidden = [nn.ReLU()]

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden[0](self.act(self.unit(x)) - 0.1)


class Child(Block):
    """A block with a second way in."""

    def features(self, x: Tensor) -> Tensor:
        return self.act(self.unit(x)) * 0.5


class ChildMethod(Block):
    """A method of a child that is not its forward."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.child = Child(BlockSpec(activation=spec.activation), self.width, self.rank)

    def forward(self, x: Tensor) -> Tensor:
        return self.child.features(self.unit(x)) + self.child(self.unit(x))


class ChildForward(Block):
    """A child's forward called without `__call__`, so that its hooks do not run."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.child = Child(BlockSpec(activation=spec.activation), self.width, self.rank)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.unit(x)) + self.child.forward(self.unit(x))


class Pair(NamedTuple):
    """What some children return."""

    main: Tensor
    rest: list[Tensor]


class Structured(Block):
    """A child that returns a dict, a tuple or a named tuple."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.as_dict, self.as_tuple = AsDict(self.act), AsPair(self.act)

    def forward(self, x: Tensor) -> Tensor:
        out = self.unit(x) * 0.5
        first, second = self.as_dict(out + 0.1), self.as_tuple(out)
        return first["main"] + first["rest"][0] + second.main + second.rest[0]


class AsDict(nn.Module):
    def __init__(self, act: Any) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"main": F.relu(x), "rest": (self.act(x), 1)}


class AsPair(AsDict):
    def forward(self, x: Tensor) -> Any:
        return Pair(F.relu(x), [self.act(x)])


class Rounded(torch.autograd.Function):
    """Rounding with a straight-through gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(4 * x) / 4

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class CustomGradient(Block):
    """An `autograd.Function`: a tracer that looks inside loses its backward."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(Rounded.apply(self.unit(x)))


class Checkpointed(Block):
    """Gradient checkpointing: the body runs again in the backward, and moves its statistics again."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


def double_gradient(gradient: Tensor) -> Tensor:
    return 2 * gradient


class TensorHook(Block):
    """A hook on a tensor of the forward."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.unit(x)
        if out.requires_grad:
            out.register_hook(double_gradient)
        return self.act(out * 0.5)


class Constant(Block):
    """A tensor made in the forward from constants alone."""

    def forward(self, x: Tensor) -> Tensor:
        ramp = torch.linspace(0.5, 1.5, self.width).view(self.channels_shape)
        return self.act(self.unit(x)) * ramp


class SequentialUnit(Block):
    """The whole unit in one Sequential, as torchvision's ConvNormActivation has it."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        parts = [self.conv, *([] if self.norm is None else [self.norm])]
        if isinstance(self.act, nn.Module):
            parts.append(self.act)
        for name in ("conv", "norm", "act"):
            self._modules.pop(name, None)
        self.body = nn.Sequential(*parts)

    @property
    def first(self) -> nn.Module:
        return self.body[0]

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        return self.act(out) if "act" in vars(self) else out


class EmptyShortcut(Block):
    """A residual through an empty Sequential, which is an identity."""

    adds_input = True

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.shortcut = nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        out = self.unit(x)
        out += self.shortcut(x)
        return self.act(out)


class AddMethod(Block):
    """`add_` as a method, its result straight into the activation."""

    adds_input = True

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.unit(x).add_(x))


class SharedNorm(Block):
    """One normalisation after two layers."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.conv2 = self.second()

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.act(self.unit(x)))
        return self.act(out if self.norm is None else self.norm(out))


class Split(Block):
    """The channels in two parts, of which one is activated (in place, perhaps) and both are joined again."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.unit(x) * 0.5
        first, second = out[:, : self.width // 2], out[:, self.width // 2 :]
        return torch.cat([first, self.act(second) + first], 1)


class Collect(Block):
    """A list that grows while the forward runs, and is joined in the end."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.steps_of = nn.ModuleList([self.second(), self.second()])

    def forward(self, x: Tensor) -> Tensor:
        outputs = [self.unit(x)]
        outputs.extend(self.act(step(outputs[-1])) for step in self.steps_of)
        return torch.stack(outputs).sum(0)


class RegisteredInList(Block):
    """Registered modules that the forward reads from a plain list of tuples."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.conv2 = self.second()
        self.pairs = [(self.conv, self.act), (self.conv2, self.act)]

    def forward(self, x: Tensor) -> Tensor:
        for layer, activation in self.pairs:
            x = activation(layer(x))
        return x if self.norm is None else self.norm(x)


class SuperForward(Plain):
    """A forward that calls the parent class's."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


class OwnCall(Plain):
    """A `__call__` of its own around the module's."""

    def __call__(self, x: Tensor) -> Tensor:
        return 0.5 * super().__call__(x)


class CallsOwnCall(Block):
    """A child with a `__call__` of its own."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.child = OwnCall(BlockSpec(activation=spec.activation), self.width, self.rank)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.child(self.unit(x)))


def halving(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A decorator of forwards, as transformers has many."""

    @functools.wraps(forward)
    def wrapper(self: Any, *inputs: Any, **keywords: Any) -> Tensor:
        return 0.5 * forward(self, *inputs, **keywords)

    return wrapper


class Decorated(Block):
    """A forward under a decorator that changes its result."""

    @halving
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.unit(x))


class KeywordCalls(Block):
    """Layers called by keyword."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(input=x)
        return self.act(out if self.norm is None else self.norm(input=out))


class InnerFunction(Block):
    """A function defined in the forward, which closes over the module."""

    def forward(self, x: Tensor) -> Tensor:
        def body(value: Tensor, factor: float = 0.5) -> Tensor:
            return self.act(self.unit(value) * factor)

        return body(x) + body(x, factor=0.25)


class PropertyActivation(Block):
    """The activation behind a property."""

    @property
    def activation(self) -> Any:
        return self.act

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.unit(x))


class ByName(Block):
    """An activation looked up by its name in `torch.nn.functional`."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.how = "relu"

    def forward(self, x: Tensor) -> Tensor:
        return getattr(F, self.how)(self.act(self.unit(x)) - 0.1)


class ByNameInABranch(ByName):
    """The same, in a forward that cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.unit(x)) - 0.1
        return getattr(F, self.how)(out) if out.sum() > 0 else out


class FunctionTable(Block):
    """Activation functions in a dict of the module's."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.table: dict[str, Any] = {"relu": F.relu, "gelu": F.gelu}
        self.how = "relu"

    def forward(self, x: Tensor) -> Tensor:
        return self.table[self.how](self.act(self.unit(x)) - 0.1)


class FunctionTableInABranch(FunctionTable):
    """The same, in a forward that cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.unit(x)) - 0.1
        return self.table[self.how](out) if out.sum() > 0 else out


ACT2FN: dict[str, Any] = {"relu": F.relu, "gelu": F.gelu, "relu6": nn.ReLU6}


class GlobalTable(Block):
    """Activations looked up in a global table in the forward (transformers' ACT2FN)."""

    def forward(self, x: Tensor) -> Tensor:
        return ACT2FN["relu"](self.act(self.unit(x)) - 0.1)


class GlobalTableInABranch(Block):
    """The same, in a forward that cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.unit(x)) - 0.1
        return ACT2FN["relu"](out) if out.sum() > 0 else out


class FromTable(Block):
    """An activation module made from a global table, as transformers' `self.act_fn = ACT2FN[...]`."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.act_fn = ACT2FN["relu6"]()

    def forward(self, x: Tensor) -> Tensor:
        return self.act_fn(self.act(self.unit(x)) - 0.1)


class MadeInForward(Block):
    """An activation module that is made in the forward."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.ReLU()(self.act(self.unit(x)) - 0.1)


class HiddenInDict(Block):
    """An activation module in a plain dict, which `modules()` does not see."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.hidden = {"act": nn.ReLU()}

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden["act"](self.act(self.unit(x)) - 0.1)


class LowRank(nn.Module):
    """A layer with a low-rank correction beside it (LoRA), and the layer's attributes as its own (peft)."""

    def __init__(self, base_layer: nn.Module, rank: int, width: int, out: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        kind: Any = _CONVS[rank] if rank else nn.Linear
        size = (1,) if rank else ()
        self.lora_a, self.lora_b = kind(width, 1, *size, bias=False), kind(1, out, *size, bias=False)
        self.dropout = nn.Dropout(0.1)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or name.startswith("__"):  # copying and pickling ask for such names
                raise
            return getattr(self.base_layer, name)

    def forward(self, input: Tensor, *rest: Any, **keywords: Any) -> Tensor:
        return self.base_layer(input, *rest, **keywords) + 0.5 * self.lora_b(self.lora_a(self.dropout(input)))


class Lora(Block):
    """A layer that is wrapped as LoRA wraps it."""

    adds_input = True  # so that the correction fits whatever the geometry

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.conv = LowRank(self.conv, self.rank, width, self.width)


class TiedEmbedding(Block):
    """A linear layer and an embedding that share one weight."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.embedding = nn.Embedding(5, self.width)
        self.scores = nn.Linear(self.width, 5, bias=False)
        self.scores.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.unit(x))
        scores = self.scores(out.flatten(2).mean(2) if self.rank else out)
        words = self.embedding(scores.argmax(1)) + scores.mean()
        return out + words.view(words.size(0), *self.channels_shape[1:])


class Attention(Block):
    """A transformer's layer of torch: a fused kernel takes over in eval mode without gradients."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.layer = nn.TransformerEncoderLayer(
            self.width, 1, self.width, dropout=0.1, batch_first=True, norm_first=True
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.unit(x))
        tokens = out.flatten(2).transpose(1, 2) if self.rank else out.unsqueeze(1)
        return self.layer(tokens).transpose(1, 2).reshape(out.shape)


class Recurrent(Block):
    """A recurrent layer of torch, whose ReLUs are inside its kernel."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.layer = nn.RNN(self.width, self.width, nonlinearity="relu", batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.unit(x))
        pooled = out.flatten(2).mean(2) if self.rank else out
        return out + self.layer(pooled.unsqueeze(1))[0].squeeze(1).view(out.size(0), *self.channels_shape[1:])


@dataclass
class Answer:
    """What some children and networks return."""

    main: Tensor
    rest: list[Tensor] = field(default_factory=list)


class AsDataclass(nn.Module):
    """A child that returns a dataclass."""

    def __init__(self, act: Any) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Answer:
        return Answer(main=self.act(x), rest=[F.relu(x)])


class DataclassOutput(Block):
    """A child that returns a dataclass, whose fields the forward reads."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.child = AsDataclass(self.act)

    def forward(self, x: Tensor) -> Tensor:
        answer = self.child(self.unit(x) * 0.5)
        return answer.main + answer.rest[0]


class BufferViews(Block):
    """A buffer that is a view of another one, and is written to."""

    table: Tensor
    first_row: Tensor

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.register_buffer("table", torch.zeros(2, self.width))
        self.register_buffer("first_row", self.table[0])

    def forward(self, x: Tensor) -> Tensor:
        out = self.unit(x)
        if self.training:
            self.first_row.add_(0.5)
        return self.act(out + self.table.sum(0).view(self.channels_shape))


class TensorAttribute(Block):
    """A tensor that is a plain attribute, neither parameter nor buffer."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.ramp = torch.linspace(0.5, 1.5, self.width).view(self.channels_shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.unit(x) * self.ramp)


class BackReference(Block):
    """A child that knows its parent, through a list so that it is not registered."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.factor = 0.5
        self.child = KnowsParent(self.act)
        self.child.parent = [self]

    def forward(self, x: Tensor) -> Tensor:
        return self.child(self.unit(x))


class KnowsParent(nn.Module):
    """Asks its parent for a number."""

    parent: list[Any]

    def __init__(self, act: Any) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x * self.parent[0].factor)


class ReplacedForward(Block):
    """A forward that was replaced on the instance, as accelerate's hooks do."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.forward = self.replacement  # type: ignore[method-assign]

    def replacement(self, x: Tensor) -> Tensor:
        return F.relu(self.act(self.unit(x)) - 0.1)


BLOCKS: dict[str, type[Block]] = {
    "plain": Plain,
    "residual": Residual,
    "inplace_residual": InplaceResidual,
    "basic": Basic,
    "pre_activation": PreActivation,
    "alias": Alias,
    "view": View,
    "inplace_across": InplaceAcross,
    "tap": Tap,
    "reused": Reused,
    "branches": Branches,
    "gated": Gated,
    "tied_weights": TiedWeights,
    "two_names": TwoNames,
    "unused": Unused,
    "functional_dropout": FunctionalDropout,
    "module_dropout": ModuleDropout,
    "training_branch": TrainingBranch,
    "python_drop_path": PythonDropPath,
    "torch_drop_path": TorchDropPath,
    "sample_drop_path": SampleDropPath,
    "no_grad": NoGrad,
    "no_grad_method": NoGradMethod,
    "grad_mode": GradMode,
    "autocast": Autocast,
    "flags": Flags,
    "keyword_only": KeywordOnly,
    "variadic_inputs": VariadicInputs,
    "type_check": TypeCheck,
    "list_input": ListInput,
    "shape_branch": ShapeBranch,
    "value_branch": ValueBranch,
    "shape_loop": ShapeLoop,
    "shape_unpack": ShapeUnpack,
    "guarded": Guarded,
    "counter": Counter,
    "remembers": Remembers,
    "appends_to_list": AppendsToList,
    "buffer_inplace": BufferInplace,
    "buffer_assigned": BufferAssigned,
    "own_parameters": OwnParameters,
    "buffers_only": BuffersOnly,
    "functional_layer": FunctionalLayer,
    "nested": Nested,
    "sequential_subclass": SequentialSubclass,
    "sequential_slice": SequentialSlice,
    "list_loop": ListLoop,
    "hidden": Hidden,
    "child_method": ChildMethod,
    "child_forward": ChildForward,
    "structured": Structured,
    "custom_gradient": CustomGradient,
    "checkpointed": Checkpointed,
    "tensor_hook": TensorHook,
    "constant": Constant,
    "sequential_unit": SequentialUnit,
    "empty_shortcut": EmptyShortcut,
    "add_method": AddMethod,
    "shared_norm": SharedNorm,
    "split": Split,
    "collect": Collect,
    "registered_in_list": RegisteredInList,
    "super_forward": SuperForward,
    "own_call": OwnCall,
    "calls_own_call": CallsOwnCall,
    "decorated": Decorated,
    "keyword_calls": KeywordCalls,
    "inner_function": InnerFunction,
    "property_activation": PropertyActivation,
    "by_name": ByName,
    "by_name_in_a_branch": ByNameInABranch,
    "function_table": FunctionTable,
    "function_table_in_a_branch": FunctionTableInABranch,
    "global_table": GlobalTable,
    "global_table_in_a_branch": GlobalTableInABranch,
    "from_table": FromTable,
    "made_in_forward": MadeInForward,
    "hidden_in_dict": HiddenInDict,
    "lora": Lora,
    "tied_embedding": TiedEmbedding,
    "attention": Attention,
    "recurrent": Recurrent,
    "dataclass_output": DataclassOutput,
    "buffer_views": BufferViews,
    "tensor_attribute": TensorAttribute,
    "back_reference": BackReference,
    "replaced_forward": ReplacedForward,
}

_OPTIONS: dict[str, tuple[tuple[str, Any], ...]] = {
    "flags": (("half", True), ("times", 2), ("scale", 0.5), ("how", "gelu"), ("shift", 0.25)),
    "keyword_only": (("half", True), ("unknown", 1)),
}


# --- Whole networks -----------------------------------------------------------------------------------------


class Pool(nn.Module):
    """The mean over all positions; a vector stays."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2) if x.dim() > 2 else x


class Tower(nn.Module):
    """A stem, blocks in a loop, pooling, a classifier; the root has an activation of its own."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.stem, blocks, head = _parts(spec)
        self.blocks = nn.ModuleList(blocks)
        self.pool = Pool()
        self.head = head
        self.returns = spec.returns
        self.options = [dict(block.options) for block in spec.blocks]
        if "shared_block" in spec.extras:
            self.options.insert(0, self.options[0])

    def forward(self, inputs: Tensor) -> Any:
        x = F.relu(self.stem(inputs))
        for block, options in zip(self.blocks, self.options, strict=True):
            x = block(x, **options)
        pooled = self.pool(x)
        logits = self.head(pooled)
        if self.returns == "tuple":
            return logits, pooled
        if self.returns == "list":
            return [logits, [pooled]]
        if self.returns == "dict":
            return {"logits": logits, "features": {"pooled": pooled, "count": len(self.blocks)}}
        if self.returns == "named_tuple":
            return Pair(logits, [pooled])
        if self.returns == "dataclass":
            return Answer(main=logits, rest=[pooled])
        if self.returns == "ordered_dict":
            return collections.OrderedDict(logits=logits, pooled=pooled)
        return logits


class Staged(Tower):
    """A tower whose blocks are two Sequential stages, called one after the other."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        blocks, head = list(self.blocks), self.head
        half = len(blocks) // 2
        del self.blocks, self.head
        self.stages = nn.Sequential(nn.Sequential(*blocks[:half]), nn.Sequential(*blocks[half:]))
        self.head = head

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.pool(self.stages(F.relu_(self.stem(inputs)))))


def _parts(spec: Spec) -> tuple[nn.Module, list[nn.Module], nn.Module]:
    rank, width = NETWORKS[spec.network], spec.width
    stem = _CONVS[rank](3, width, 3, padding=1) if rank else nn.Linear(spec.size, width)
    blocks: list[nn.Module] = []
    for block in spec.blocks:
        made = BLOCKS[block.form](block, width, rank)
        blocks.append(made)
        width = made.width
    if "shared_block" in spec.extras:
        blocks.insert(0, blocks[0])
    return stem, blocks, nn.Linear(width, CLASSES)


NETWORKS = {"conv": 2, "mlp": 0, "conv1d": 1, "conv3d": 3}
"""Kinds of networks, and in how many dimensions they convolve; 0: linear layers."""

ROOTS = ("tower", "sequential", "staged")
RETURNS = ("tensor", "tuple", "list", "dict", "named_tuple", "dataclass", "ordered_dict")


_NORM_CLASSES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def halve_output(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output * 0.5


def shift_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0] + 0.125, *inputs[1:])


def shift_input_with_keywords(module: nn.Module, inputs: Any, keywords: Any) -> Any:
    return (inputs[0] - 0.125, *inputs[1:]), keywords


def double_input_gradient(module: nn.Module, gradients: Any, output_gradients: Any) -> Any:
    return tuple(None if gradient is None else 2 * gradient for gradient in gradients)


def double_output_gradient(module: nn.Module, gradients: Any) -> Any:
    return tuple(2 * gradient for gradient in gradients)


@dataclass
class Recorder:
    """An object outside the network that a hook of the network feeds."""

    seen: list[float] = field(default_factory=list)

    def record(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.seen.append(float(output.detach().sum()))


def _first_block(model: nn.Module) -> Block:
    return next(module for module in model.modules() if isinstance(module, Block))


def _hook_activation(model: nn.Module) -> None:
    """On the first activation module, where there is one."""
    for module in model.modules():
        if isinstance(module, (nn.ReLU, nn.ReLU6, nn.LeakyReLU)):
            module.register_forward_hook(halve_output)
            break


def _first_layer(model: nn.Module) -> nn.Module:
    """The layer of the first block, wherever the block keeps it."""
    block = _first_block(model)
    return block.first if isinstance(block, SequentialUnit) else block.conv


def _hook_norm(model: nn.Module) -> None:
    """On the first normalisation, where there is one."""
    for module in model.modules():
        if isinstance(module, (*_NORM_CLASSES, nn.GroupNorm, nn.LayerNorm)):
            module.register_forward_hook(halve_output)
            break


def note_calls(module: nn.Module, state: Any, *rest: Any) -> None:
    """A hook on saving or loading that leaves everything as it is."""


def _hook_state(model: nn.Module) -> None:
    block = _first_block(model)
    block.register_state_dict_post_hook(note_calls)
    block.register_load_state_dict_pre_hook(note_calls)


def _hook_bound(model: nn.Module) -> None:
    """A hook that is a method of a module of this model."""
    block = _first_block(model)
    block.hook_calls = Tally()
    block.register_forward_hook(block.hook_calls.count)


class Tally(nn.Module):
    """Counts in a buffer how often its hook was called."""

    number: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("number", torch.zeros((), dtype=torch.long))

    def count(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.number += 1


def _head(model: nn.Module) -> nn.Linear:
    return next(module for module in reversed(list(model.modules())) if isinstance(module, nn.Linear))


def _hook_head_backward(model: nn.Module) -> None:
    _head(model).register_full_backward_hook(double_input_gradient)


def _hook_head_before_backward(model: nn.Module) -> None:
    _head(model).register_full_backward_pre_hook(double_output_gradient)


def _hook_keywords(model: nn.Module) -> None:
    _first_block(model).register_forward_pre_hook(shift_input_with_keywords, with_kwargs=True)


def _freeze_body(model: nn.Module) -> None:
    for parameter in list(model.parameters())[:-2]:  # the classifier's weight and bias come last
        parameter.requires_grad_(False)


def _norms_in_eval(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, _NORM_CLASSES):
            module.eval()


def _to_channels_last(model: nn.Module) -> None:
    """Convolution weights of two dimensions, and of three, with the channels last in memory."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in model.parameters():
        if parameter.dim() in formats:
            parameter.data = parameter.data.contiguous(memory_format=formats[parameter.dim()])


def _fill_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 0.5)


_EXTRAS: dict[str, Callable[[nn.Module], Any]] = {
    "shared_block": lambda model: None,  # the first block is there twice: made in `_parts`
    "frozen_layer": lambda model: _first_layer(model).requires_grad_(False),
    "frozen_body": _freeze_body,
    "eval_mode": lambda model: model.eval(),
    "mixed_mode": _norms_in_eval,
    "double": lambda model: model.double(),
    "channels_last": _to_channels_last,
    "gradients": _fill_gradients,
    "block_hook": lambda model: _first_block(model).register_forward_hook(halve_output),
    "block_pre_hook": lambda model: _first_block(model).register_forward_pre_hook(shift_input),
    "keyword_pre_hook": _hook_keywords,
    "layer_hook": lambda model: _first_layer(model).register_forward_hook(halve_output),
    "activation_hook": _hook_activation,
    "root_hook": lambda model: model.register_forward_pre_hook(shift_input),
    "backward_hook": _hook_head_backward,
    "norm_hook": _hook_norm,
    "state_hooks": _hook_state,
    "bound_hook": _hook_bound,
    "always_called_hook": lambda model: _first_block(model).register_forward_hook(
        halve_output, always_call=True
    ),
    "backward_pre_hook": _hook_head_before_backward,
    "recorder_hook": lambda model: _first_block(model).register_forward_hook(Recorder().record),
}


@contextmanager
def isolated_rng(seed: int) -> Iterator[None]:
    """Start torch's CPU generator and Python's `random` from `seed`, and put both back afterwards.

    Args:
        seed: any integer in [0, 2**63).

    Example:
        >>> state = torch.get_rng_state()
        >>> with isolated_rng(3):
        ...     _ = torch.rand(2)
        >>> torch.equal(state, torch.get_rng_state())
        True
    """
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            yield
    finally:
        random.setstate(state)


def build(spec: Spec) -> nn.Module:
    """Make the network that `spec` describes: always the same one, in a few milliseconds.

    Every parameter and running statistic is drawn from `spec.seed`, so that normalisations are not at their
    trivial start. The network carries its specification as `model.spec`.

    Args:
        spec: what to build, as drawn by `specs()` or written by hand.

    Returns:
        A network in train mode, unless the specification says otherwise. It takes what `example_batch` makes.

    Raises:
        KeyError: the specification names a form, layer or activation that is not there.

    Example:
        >>> model = build(Spec(blocks=(BlockSpec(form="alias", activation="x.relu_()"),)))
        >>> inputs, targets = example_batch(model.spec)
        >>> model(inputs).shape
        torch.Size([2, 3])
    """
    with isolated_rng(spec.seed):
        model: nn.Module
        if spec.root == "sequential":
            stem, blocks, head = _parts(spec)
            model = nn.Sequential(stem, *blocks, Pool(), head)
        else:
            model = {"tower": Tower, "staged": Staged}[spec.root](spec)
        _shake(model)
        for extra in spec.extras:
            _EXTRAS[extra](model)
    model.spec = spec  # type: ignore[assignment]
    return model


@torch.no_grad()
def _shake(model: nn.Module) -> None:
    """Move normalisations and running statistics away from ones and zeros."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and "norm" in name and "parametrizations" not in name:
            parameter.add_(torch.empty_like(parameter).uniform_(-0.5, 0.5))
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.add_(torch.empty_like(buffer).uniform_(0, 0.3))


# --- What is in a network -----------------------------------------------------------------------------------

HAZARDS: frozenset[str] = frozenset(
    [f"form: {name}" for name in BLOCKS]
    + [f"layer: {name}" for name in LAYERS]
    + [f"norm: {name}" for name in _NORMS]
    + [f"activation: {name}" for name in ACTIVATIONS]
    + [f"root: {name}" for name in ROOTS]
    + [f"returns: {name}" for name in RETURNS]
    + [f"extra: {name}" for name in _EXTRAS]
    + [f"network: {name}" for name in NETWORKS]
    + ["called with options"]
)


def hazards(model: nn.Module | Spec) -> set[str]:
    """Name what a drawn network contains, as members of `HAZARDS`: to measure what a test has covered.

    Args:
        model: a network made by `build`, or its specification.

    Raises:
        ValueError: the model was not made by `build`.

    Example:
        >>> sorted(hazards(Spec()))[:3]
        ['activation: ReLU', 'form: plain', 'layer: plain']
    """
    spec = model if isinstance(model, Spec) else getattr(model, "spec", None)
    if not isinstance(spec, Spec):
        raise ValueError("hazards() knows only networks made by sparsetweaks.testing.build")
    found = {f"network: {spec.network}", f"root: {spec.root}", f"returns: {spec.returns}"}
    found |= {f"extra: {extra}" for extra in spec.extras}
    for block in spec.blocks:
        found |= {f"form: {block.form}", f"layer: {block.layer}", f"norm: {block.norm}"}
        found |= {f"activation: {block.activation}"} | ({"called with options"} if block.options else set())
    return found


def picklable(model: nn.Module | Spec) -> bool:
    """Whether torch can pickle the network whole: it refuses modules with parametrizations.

    Example:
        >>> picklable(Spec(blocks=(BlockSpec(layer="spectral_norm"),)))
        False
    """
    if isinstance(model, nn.Module) and any(parametrize.is_parametrized(each) for each in model.modules()):
        return False
    return not hazards(model) & {f"layer: {name}" for name in _PARAMETRIZED}


# --- Strategies ---------------------------------------------------------------------------------------------


class _Choices:
    """Bytes read as choices, one each; zero is the first option, so that shrinking leads to plain ones."""

    def __init__(self, drawn: bytes) -> None:
        self._bytes = iter(drawn)

    def among(self, options: Sequence[T]) -> T:
        return options[next(self._bytes) % len(options)]


_BYTES_PER_BLOCK, _BYTES_BESIDES = 7, 16


def specs(*, max_blocks: int = 4) -> st.SearchStrategy[Spec]:
    """Strategy for network specifications; failing ones shrink towards one plain convolution block.

    All choices are drawn as one string of bytes. Drawn one by one, hypothesis would mutate each example by
    copying parts of it around, which makes clusters of like networks and misses hazards for long.

    Args:
        max_blocks: most blocks in a network, at least 1.

    Example:
        >>> from hypothesis import find
        >>> spec = find(specs(), lambda spec: "form: alias" in hazards(spec))
        >>> "alias" in [block.form for block in spec.blocks]
        True
    """
    size = _BYTES_BESIDES + _BYTES_PER_BLOCK * max_blocks
    return st.binary(min_size=size, max_size=size).map(lambda drawn: _read_spec(drawn, max_blocks))


def draw_spec(drawn: random.Random, *, max_blocks: int = 4) -> Spec:
    """One random network specification without hypothesis, as `specs()` draws them: for sweeps of thousands.

    Args:
        drawn: where the choices come from, e.g. `random.Random(7)`.
        max_blocks: most blocks in a network, at least 1.

    Example:
        >>> draw_spec(random.Random(7)) == draw_spec(random.Random(7))
        True
    """
    return _read_spec(drawn.randbytes(_BYTES_BESIDES + _BYTES_PER_BLOCK * max_blocks), max_blocks)


def _read_spec(drawn: bytes, max_blocks: int) -> Spec:
    choices = _Choices(drawn[:_BYTES_BESIDES])
    network = choices.among(("conv", "conv", "conv", "mlp", "conv", "conv1d", "conv", "conv3d"))
    root = choices.among(("tower", *ROOTS))
    blocks: list[BlockSpec] = []
    for number in range(choices.among(range(1, max_blocks + 1))):
        start = _BYTES_BESIDES + _BYTES_PER_BLOCK * number
        block_choices = _Choices(drawn[start : start + _BYTES_PER_BLOCK])
        may_reshape = all(block.layer not in RESHAPING for block in blocks)
        blocks.append(_read_block(block_choices, network, may_reshape, root == "tower"))
    names = [choices.among(tuple(_EXTRAS)) for _ in range(choices.among((0, 1, 1, 2, 3)))]
    extras = tuple(dict.fromkeys(names))
    if blocks[0].layer in RESHAPING:
        extras = tuple(extra for extra in extras if extra != "shared_block")
    return Spec(
        blocks=tuple(blocks),
        network=network,
        width=choices.among((4, 8)),
        size=choices.among((6, 7, 8)),
        batch=choices.among((2, 3, 4)),
        root=root,
        returns=choices.among(RETURNS) if root == "tower" else "tensor",
        extras=extras,
        seed=256 * choices.among(range(256)) + choices.among(range(256)),
    )


def _read_block(choices: _Choices, network: str, may_reshape: bool, may_call: bool) -> BlockSpec:
    form = choices.among(tuple(BLOCKS))
    layers = _FLAT_LAYERS if network == "mlp" else tuple(LAYERS)
    if BLOCKS[form].adds_input or not may_reshape:
        layers = tuple(layer for layer in layers if layer not in RESHAPING)
    layer = choices.among(layers)
    norm = choices.among(_FLAT_NORMS if network == "mlp" else _NORMS)
    activation = choices.among(tuple(ACTIVATIONS))
    options: tuple[tuple[str, Any], ...] = ()
    if may_call and form in _OPTIONS:
        first, second = choices.among(_OPTIONS[form]), choices.among(_OPTIONS[form])
        options = tuple({first[0]: first, second[0]: second}.values())
        options = choices.among(((), options, options))
    return BlockSpec(form, layer, norm, activation, options)


def models(*, max_blocks: int = 4) -> st.SearchStrategy[nn.Module]:
    """Strategy for small random networks that contain hazards; each has its specification as `model.spec`.

    Args:
        max_blocks: most blocks in a network, at least 1.

    Example:
        >>> from hypothesis import find
        >>> model = find(models(), lambda model: "form: basic" in hazards(model))
        >>> model(example_batch(model.spec)[0]).shape
        torch.Size([2, 3])
    """
    return specs(max_blocks=max_blocks).map(build)


class Batch(NamedTuple):
    """Inputs of shape (batch, 3, size, ...) or (batch, size), and targets of shape (batch,)."""

    inputs: Tensor
    targets: Tensor


def example_batch(spec: Spec, *, seed: int = 0) -> Batch:
    """A batch that the network of `spec` takes, in its dtype and memory format.

    Args:
        spec: the network's specification.
        seed: which batch; the same seed gives the same one.

    Example:
        >>> example_batch(Spec(network="mlp", batch=4)).inputs.shape
        torch.Size([4, 6])
    """
    generator = torch.Generator().manual_seed(seed)
    rank = NETWORKS[spec.network]
    shape = (spec.batch, *([3] if rank else []), *[spec.size] * max(1, rank))
    inputs = torch.randn(shape, generator=generator)
    if "double" in spec.extras:
        inputs = inputs.double()
    if "channels_last" in spec.extras and inputs.dim() in (4, 5):
        last = torch.channels_last if inputs.dim() == 4 else torch.channels_last_3d
        inputs = inputs.to(memory_format=last)
    return Batch(inputs, torch.randint(CLASSES, (spec.batch,), generator=generator))


def batches(model: nn.Module | Spec) -> st.SearchStrategy[Batch]:
    """Strategy for (inputs, targets) that the drawn network takes.

    Args:
        model: a network made by `build`, or its specification.

    Example:
        >>> from hypothesis import find
        >>> inputs, targets = find(batches(Spec(batch=4)), lambda batch: True)
        >>> inputs.shape, targets.shape
        (torch.Size([4, 3, 6, 6]), torch.Size([4]))
    """
    hazards(model)  # says so where the model is not ours
    spec: Spec = model if isinstance(model, Spec) else model.spec  # type: ignore[assignment]
    return st.integers(0, 2**16).map(lambda seed: example_batch(spec, seed=seed))


def maskable_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of convolutions or, where there are none, of all linear layers but the last, by name.

    A tied weight is there once, under its first name. Weights that a parametrization or a hook
    computes are left out.

    Example:
        >>> list(maskable_weights(build(Spec())))
        ['stem.weight', 'blocks.0.conv.weight']
    """
    by_kind: dict[bool, dict[str, Tensor]] = {True: {}, False: {}}
    seen: set[int] = set()
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        is_layer = isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))
        if weight is None or id(weight) in seen or not is_layer:
            continue
        seen.add(id(weight))
        by_kind[not isinstance(module, nn.Linear)][f"{name}.weight".lstrip(".")] = weight
    linear = dict(list(by_kind[False].items())[:-1])  # the last one is the classifier
    return by_kind[True] or linear


@st.composite
def masks(draw: st.DrawFn, model: nn.Module) -> dict[str, Tensor]:
    """Strategy for masks of some or all weights: True is kept; all kept, all zero, and random ones.

    Args:
        model: any module; only its weights' names and shapes are read.

    Example:
        >>> from hypothesis import find
        >>> drawn = find(masks(build(Spec())), lambda drawn: "stem.weight" in drawn)
        >>> drawn["stem.weight"].dtype, bool(drawn["stem.weight"].all())
        (torch.bool, True)
    """
    weights = maskable_weights(model)
    chosen = draw(st.lists(st.sampled_from(sorted(weights)), unique=True)) if weights else []
    drawn: dict[str, Tensor] = {}
    for name in sorted(chosen):
        density = draw(st.sampled_from((1.0, 0.5, 0.1, 0.0)))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
        drawn[name] = torch.rand(weights[name].shape, generator=generator) < density
    return drawn


FORMS = ("zeros", "buffers", "torch_prune", "torch_prune_twice", "parametrization")


class MaskedWeight(nn.Module):
    """A parametrization that multiplies a weight by a mask in a buffer, as `torch.ao.pruning`'s does."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


class Masked(NamedTuple):
    """A masked network, the masks it was given, and in what form they are in it (one of `FORMS`)."""

    model: nn.Module
    masks: dict[str, Tensor]
    form: str


def mask_model(model: nn.Module, masks: dict[str, Tensor], form: str) -> nn.Module:
    """Put `masks` into `model`, in place, in one of the forms that pruners leave behind.

    `"zeros"` only writes zeros, `"buffers"` adds `<parameter>_mask` too, `"torch_prune"` is
    `torch.nn.utils.prune`, which leaves a computed weight that is not a leaf of autograd (`"torch_prune_twice"`:
    in two steps), and `"parametrization"` one of `torch.nn.utils.parametrize` with a buffer `mask`.

    Args:
        model: any module; it is changed.
        masks: bool tensors by weight name, True is kept.
        form: one of `FORMS`.

    Raises:
        ValueError: an unknown form.

    Example:
        >>> model = build(Spec())
        >>> _ = mask_model(model, {"stem.weight": torch.zeros(4, 3, 3, 3, dtype=torch.bool)}, "buffers")
        >>> float(model.stem.weight.detach().abs().sum()), model.stem.weight_mask.dtype
        (0.0, torch.bool)
    """
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}; use one of {', '.join(FORMS)}")
    for name, mask in masks.items():
        owner, _, parameter = name.rpartition(".")
        module = model.get_submodule(owner)
        with torch.no_grad():
            getattr(module, parameter).mul_(mask)
        if form == "buffers":
            module.register_buffer(f"{parameter}_mask", mask.clone())
        elif form.startswith("torch_prune"):
            if form == "torch_prune_twice":
                torch_prune.custom_from_mask(
                    module, parameter, mask | (torch.arange(mask.numel()) % 2 == 0).view(mask.shape)
                )
            torch_prune.custom_from_mask(module, parameter, mask)
        elif form == "parametrization":
            parametrize.register_parametrization(module, parameter, MaskedWeight(mask.clone()))
    return model


@st.composite
def masked_models(draw: st.DrawFn, *, max_blocks: int = 4, forms: tuple[str, ...] = FORMS) -> Masked:
    """Strategy for masked networks, in every form that pruners leave behind.

    Args:
        max_blocks: most blocks in a network, at least 1.
        forms: which of `FORMS` to draw from.

    Example:
        >>> from hypothesis import find
        >>> masked = find(masked_models(forms=("torch_prune",)), lambda masked: "stem.weight" in masked.masks)
        >>> masked.model.get_submodule("stem").weight.is_leaf
        False
    """
    model = build(draw(specs(max_blocks=max_blocks)))
    drawn, form = draw(masks(model)), draw(st.sampled_from(forms))
    return Masked(mask_model(model, drawn, form), drawn, form)


# --- What a network does, and what it is --------------------------------------------------------------------


class Observation(NamedTuple):
    """All that a network did: by name, the values that a rewrite may not change."""

    values: dict[str, Any]


def observe(
    model: nn.Module, batch: Batch, *, training: bool | None = None, seed: int = 0, calls: int = 2
) -> Observation:
    """Run `model` forward and backward and record outputs, gradients, buffers and attributes.

    This changes the model. It runs `calls` times with gradients, and once without. The loss weighs every
    element of the outputs differently, so that no gradient cancels.

    Args:
        model: any module; its gradients, buffers and mode change, so pass a twin made for this.
        batch: what to run it on.
        training: the mode to run in; None keeps the modes as they are.
        seed: where torch's and Python's global generators start; both are put back afterwards.
        calls: forward and backward passes.

    Example:
        >>> spec = Spec()
        >>> seen = observe(build(spec), example_batch(spec), training=True)
        >>> "output 0.0" in seen.values, "gradient of head.weight" in seen.values
        (True, True)
    """
    values: dict[str, Any] = {}
    if training is not None:
        model.train(training)
    model.zero_grad()
    with isolated_rng(seed):
        for call in range(calls):
            inputs = batch.inputs.clone(memory_format=torch.preserve_format).requires_grad_()
            outputs = _leaves(model(inputs))
            loss = sum(_weighted_sum(output) for output in outputs if isinstance(output, Tensor))
            if isinstance(loss, Tensor) and loss.requires_grad:
                loss.backward()
            values |= {f"output {call}.{i}": _frozen(output) for i, output in enumerate(outputs)}
            values[f"input gradient {call}"] = _frozen(inputs.grad)
        with torch.no_grad():
            outputs = _leaves(model(batch.inputs.clone()))
            values |= {f"output without gradients {i}": _frozen(output) for i, output in enumerate(outputs)}
    values |= {f"gradient of {name}": _frozen(each.grad) for name, each in model.named_parameters()}
    values |= {f"buffer {name}": _frozen(buffer) for name, buffer in model.named_buffers()}
    for name, module in model.named_modules():
        for attribute in ("calls", "seen", "history"):
            if attribute in vars(module):
                values[f"attribute {name}.{attribute}"] = _frozen(vars(module)[attribute])
    return Observation(values)


def _leaves(outputs: Any) -> list[Any]:
    """What is in a network's outputs, the fields of dataclasses too."""
    parts = vars(outputs) if dataclasses.is_dataclass(outputs) else outputs
    return pytree.tree_leaves(parts)


def _weighted_sum(output: Tensor) -> Tensor:
    weights = torch.cos(torch.arange(output.numel(), dtype=output.dtype)).view(output.shape)
    return (output * weights).sum()


def _frozen(value: Any) -> Any:
    """A value that later steps of the network cannot change."""
    if isinstance(value, Tensor):
        return value.detach().clone(memory_format=torch.preserve_format)
    if isinstance(value, (list, tuple)):
        return [_frozen(each) for each in value]
    return value


def snapshot(model: nn.Module) -> Observation:
    """Record all that a network is: tensors, gradients, tying, hooks, modes, classes and attributes.

    Two snapshots of one model, before and after a call, have no `differences` where the call was pure.

    Args:
        model: any module.

    Example:
        >>> model = build(Spec())
        >>> before = snapshot(model)
        >>> _ = model.eval()
        >>> differences(before, snapshot(model))[0]
        'training of : True, now False'
    """
    values: dict[str, Any] = {"random": random.getstate(), "torch random": torch.get_rng_state()}
    for name, module in model.named_modules(remove_duplicate=False):
        values |= {f"training of {name}": module.training, f"class of {name}": type(module)}
        values[f"identity of {name}"] = id(module)
        for attribute, value in vars(module).items():
            here = f"{attribute} of {name}"
            if attribute in ("_parameters", "_buffers"):
                for key, tensor in value.items():
                    values |= _tensor_facts(f"{name}.{key}", tensor)
            elif isinstance(value, Tensor):
                values |= _tensor_facts(f"{name}.{attribute}", value)
            elif "hooks" in attribute and isinstance(value, dict):
                values[here] = [(key, id(getattr(hook, "__func__", hook))) for key, hook in value.items()]
            elif attribute == "_modules":
                values[here] = list(value)
            else:
                values[here] = _frozen(value)
    return Observation(values)


def _tensor_facts(name: str, tensor: Tensor | None) -> dict[str, Any]:
    if tensor is None:
        return {f"value of {name}": None}
    return {
        f"value of {name}": _frozen(tensor),
        f"identity of {name}": id(tensor),
        f"memory of {name}": (tensor.data_ptr(), tensor.stride(), tensor.dtype, tensor.device, type(tensor)),
        f"requires_grad of {name}": (tensor.requires_grad, tensor.is_leaf),
        f"gradient of {name}": _frozen(tensor.grad) if tensor.is_leaf else None,
    }


def differences(
    expected: Observation, found: Observation, *, tolerance: float = 0.0, added: bool = False
) -> list[str]:
    """What differs between two observations, one line each; an empty list where nothing does.

    Args:
        expected: what it should be.
        found: what it is.
        tolerance: the largest gap between floating-point values that counts as none, relative to the largest
            expected value or to 1; 0 asks for equal values (NaN equals NaN).
        added: whether `found` may have more names, as a rewrite that adds parameters has.

    Example:
        >>> differences(Observation({"a": 1}), Observation({"a": 2, "b": 0}))
        ['a: 1, now 2', 'b: not there before']
    """
    lines = []
    for name, value in expected.values.items():
        if name not in found.values:
            lines.append(f"{name}: gone")
        elif line := _difference(value, found.values[name], tolerance):
            lines.append(f"{name}: {line}")
    if not added:
        lines += [f"{name}: not there before" for name in found.values if name not in expected.values]
    return lines


def _difference(a: Any, b: Any, tolerance: float) -> str:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
            return f"{a.dtype} {tuple(a.shape)}, now {b.dtype} {tuple(b.shape)}"
        if torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num()):
            return ""
        gap = float((a.double() - b.double()).abs().max())
        scale = max(1.0, float(a.double().abs().max()))
        return "" if gap <= tolerance * scale else f"differs by up to {gap:.2g}"
    if isinstance(a, list) and isinstance(b, list):
        if len(a) != len(b):
            return f"{len(a)} entries, now {len(b)}"
        found = (_difference(x, y, tolerance) for x, y in zip(a, b, strict=True))
        return next((line for line in found if line), "")
    if isinstance(a, weakref.ref) and isinstance(b, weakref.ref):
        return "" if a() is b() else "refers to another object"  # their own comparison would ask the tensors
    if isinstance(a, Tensor) or isinstance(b, Tensor) or a != b:
        return f"{a!r:.40}, now {b!r:.40}"
    return ""
