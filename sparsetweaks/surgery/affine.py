"""The algebra of folding: in eval mode a normalisation and a skip are affine maps, which a layer's weight can take in.

A BatchNorm scales the layer's filters. A skip reads the input where the kernel is centred, so its matrix belongs at the
kernel's central tap. What is constant goes to the bias.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from sparsetweaks.forms import places
from sparsetweaks.surgery.skips import Skip

_LAYERS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
_FORWARDS = {layer.forward for layer in _LAYERS}
_CONV_FORWARDS = {getattr(layer, "_conv_forward", None) for layer in _LAYERS}
_NORM_FORWARDS = {nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward}


@dataclass
class Affine:
    """What a layer computes, exactly: in float64 or complex128, on the CPU.

    Attributes:
        weight, bias: in the layer's own layout; the bias is None if there is nothing to add.
        filled: where a skip put something into the weight.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    filled: torch.Tensor

    def scale(self, layer: Any, scale: torch.Tensor, shift: torch.Tensor) -> None:
        """Apply a scale and a shift to every output channel."""
        self.weight = self.weight * _beside_weight(layer, scale, self.weight.dim())
        self.bias = shift if self.bias is None else self.bias * scale + shift

    def add(self, layer: Any, matrix: torch.Tensor, shift: torch.Tensor | None) -> None:
        """Add a matrix of the channels, applied to the input where the kernel is centred."""
        own, tap = _within_groups(matrix, _groups(layer)), _central_tap(layer)
        assert own is not None and tap is not None
        index: Any = (slice(None), slice(None), *tap)
        self.weight = self.weight.to(torch.promote_types(self.weight.dtype, own.dtype), copy=True)
        self.weight[index] += own
        self.filled[index] |= own != 0
        if shift is not None:
            self.bias = shift if self.bias is None else self.bias + shift


def merged(layer: Any, parts: Iterable[nn.Module]) -> Affine:
    """What a layer and the normalisations and skips after it compute together."""
    weight = value_of(layer, "weight")
    result = Affine(weight, value_of(layer, "bias"), torch.zeros_like(weight, dtype=torch.bool))
    for part in parts:
        if not isinstance(part, Skip):
            result.scale(layer, *_scale_and_shift(part))
        elif (strength := _strength(part)) != 0:
            matrix, shift = strength * _matrix(part, layer), None
            if part.norm is not None:
                scale, shift = _scale_and_shift(part.norm)
                matrix, shift = scale[:, None] * matrix, strength * shift
            result.add(layer, matrix, shift)
    return result


def why_not_finite(layer: Any, parts: Iterable[nn.Module]) -> str | None:
    """Why the layer's dtype cannot hold what the layer and these parts compute together."""
    result, dtype = merged(layer, parts), layer.weight.dtype
    for tensor in (result.weight, result.bias):
        if tensor is not None and tensor.numel() and not exact(tensor.abs().max().to(dtype)).isfinite():
            return f"merged into its {type(layer).__name__}, it would make numbers that are not finite in {dtype}"
    return None


# ----------------------------------------------------------------------------------------------------- the limits


def why_not_layer(layer: Any) -> str | None:
    """Why nothing can be merged into a layer, whatever follows it."""
    kind = type(layer).__name__
    if is_unvalued(layer):
        return f"its {kind} has no values yet: it is lazy, or on the meta device"
    own = forward_of(layer) not in _FORWARDS
    if own or getattr(type(layer), "_conv_forward", None) not in _CONV_FORWARDS:
        return f"its {kind} has a forward of its own"
    weight = layer.weight
    if type(weight) not in (torch.Tensor, nn.Parameter) or weight.layout != torch.strided:
        return f"the weight of its {kind} is no plain dense tensor"
    if not (weight.is_floating_point() or weight.is_complex()):
        return f"the weight of its {kind} is {weight.dtype}, which holds no fractions"
    if not (parametrize.is_parametrized(layer, "weight") or places_of(layer, "weight")):
        return f"its {kind} computes its weight in a way of its own"
    return None


def why_not_part(part: Any, layer: Any, *, known: bool = False) -> str | None:
    """Why a normalisation or a skip is no affine map that the layer can take in.

    Args:
        known: whether its forward is known to be a BatchNorm's, although it is not torch's.
    """
    if isinstance(part, Skip):
        return _why_not_skip(part, layer)
    if reason := _why_no_scale(part, known):
        return f"it {reason}"
    outputs = _channels(layer)[1]
    if part.num_features != outputs:
        return f"it normalises {part.num_features} channels, and its {type(layer).__name__} gives {outputs}"
    return None


def _why_no_scale(norm: Any, known: bool = False) -> str | None:
    """Why a normalisation is no scale and shift of each channel, the same for every input."""
    if not known and forward_of(norm) not in _NORM_FORWARDS:
        torchs = isinstance(norm, nn.modules.batchnorm._BatchNorm)
        return (
            "has a forward of its own" if torchs else "is no BatchNorm of torch, whose statistics are fixed"
        )
    if is_unvalued(norm):
        return "has no values yet: it is lazy, or on the meta device"
    if norm.training:
        return "stays in training mode when the model is in eval mode"
    if norm.running_mean is None:
        return "keeps no running statistics"
    return None


def _why_not_skip(skip: Skip, layer: Any) -> str | None:
    if is_unvalued(skip):
        return "it has no values yet: it is lazy, or on the meta device"
    if _strength(skip) == 0:
        return None
    if skip.norm is not None and (reason := _why_no_scale(skip.norm)):
        return f"its {type(skip.norm).__name__} {reason}"
    if _central_tap(layer) is None:
        return "the kernel has no tap at the position that it reads"
    matrix = _matrix(skip, layer)
    if tuple(matrix.shape) != _channels(layer)[::-1]:
        return f"it maps {matrix.shape[1]} channels to {matrix.shape[0]}, which are not those of its layer"
    if _within_groups(matrix, _groups(layer)) is None:
        return "it crosses the groups of its convolution"
    return None


def forward_of(module: nn.Module) -> Any:
    """The function behind a module's forward, also where the object has another than its class."""
    return getattr(module.forward, "__func__", module.forward)


def is_unvalued(module: nn.Module) -> bool:
    """Whether a module, or one within it, has tensors without values."""
    tensors = (*module.parameters(), *module.buffers())
    return any(nn.parameter.is_lazy(tensor) or tensor.is_meta for tensor in tensors)


# ------------------------------------------------------------------------------------------------------ the numbers


def exact(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers with room for what is computed from them."""
    return tensor.detach().to("cpu", torch.complex128 if tensor.is_complex() else torch.float64)


def places_of(layer: nn.Module, attribute: str) -> list[Any]:
    """Where a parameter of the layer itself lives; none if something computes it from others."""
    return [each for each in places(layer) if each.module is layer and each.attribute == attribute]


def value_of(layer: Any, attribute: str) -> Any:
    """What the forward sees; what `torch.nn.utils.prune` computed last may be older than its mask."""
    for place in places_of(layer, attribute):
        return exact(place.value())
    value = getattr(layer, attribute)
    return None if value is None else exact(value)


def _scale_and_shift(norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A BatchNorm in eval mode, per channel."""
    mean, variance = exact(norm.running_mean), exact(norm.running_var)
    scale = torch.rsqrt(variance + norm.eps)
    if norm.weight is not None:
        scale = scale * exact(norm.weight)
    shift = -mean * scale
    return scale, shift if norm.bias is None else shift + exact(norm.bias)


def _strength(skip: Skip) -> Any:
    return skip.strength.item() if isinstance(skip.strength, torch.Tensor) else skip.strength


def _matrix(skip: Skip, layer: Any) -> torch.Tensor:
    """What a skip does to the channels that the layer has now, before its own BatchNorm, as outputs by inputs."""
    if skip.projection is not None:
        return value_of(skip.projection, "weight").flatten(1)
    inputs, outputs = _channels(layer)
    if outputs >= inputs:
        return torch.eye(outputs, inputs, dtype=torch.float64)
    return F.adaptive_avg_pool1d(torch.eye(inputs, dtype=torch.float64), outputs).T


def _groups(layer: Any) -> int:
    return getattr(layer, "groups", 1)


def _channels(layer: Any) -> tuple[int, int]:
    """Inputs and outputs, from the weight itself."""
    first, second = layer.weight.shape[:2]
    groups = _groups(layer)
    return (first, second * groups) if _is_transposed(layer) else (second * groups, first)


def _is_transposed(layer: Any) -> bool:
    return getattr(layer, "transposed", False)


def _beside_weight(layer: Any, scale: torch.Tensor, dimensions: int) -> torch.Tensor:
    """One number per output channel in a shape that multiplies the weight, which is inputs first where transposed."""
    if _is_transposed(layer):
        inputs, groups = layer.weight.shape[0], _groups(layer)
        scale = scale.view(groups, -1).repeat_interleave(inputs // groups, 0)
    else:
        scale = scale[:, None]
    return scale.view(*scale.shape, *[1] * (dimensions - 2))


def _within_groups(matrix: torch.Tensor, groups: int) -> torch.Tensor | None:
    """A matrix of channels in the form of a grouped convolution's weight; None if it crosses the groups."""
    outputs, inputs = matrix.shape
    blocks = matrix.reshape(groups, outputs // groups, groups, inputs // groups)
    own = torch.stack([blocks[group, :, group] for group in range(groups)])
    if torch.count_nonzero(own) != torch.count_nonzero(matrix):
        return None
    return own.reshape(outputs, inputs // groups)


def _central_tap(layer: Any) -> tuple[int, ...] | None:
    """The index of the kernel's tap on the position that a skip reads, in every spatial dimension."""
    if isinstance(layer, nn.Linear):
        return ()
    if _is_transposed(layer):
        return None
    tap = []
    for dilation, kernel in zip(layer.dilation, layer.kernel_size):
        centre = dilation * (kernel - 1) // 2
        if centre % dilation:
            return None
        tap.append(centre // dilation)
    return tuple(tap)
