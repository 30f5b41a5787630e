"""Layers and normalisations: every geometry, and what libraries make of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORMS: dict[int, Any] = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
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
FLAT_LAYERS = (
    *("plain", "bias", "weight_norm", "weight_norm_hook", "spectral_norm", "parametrized"),
    *("widening", "narrowing"),
)
PARAMETRIZED = ("weight_norm", "spectral_norm", "parametrized")
FLAT_NORMS = (
    *("batch", "none", "identity", "empty", "group", "layer", "batch_act", "frozen"),
    *("batch_no_affine", "batch_no_statistics"),
)
NORMS = (*FLAT_NORMS, "instance", "local_response")


def make_layer(name: str, width: int, rank: int) -> tuple[nn.Module, int]:
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
        layer = kinds.get(name, CONVS)[rank](width, out, **geometry)
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


def make_norm(name: str, width: int, rank: int) -> nn.Module | None:
    makers: dict[str, Callable[[], nn.Module | None]] = {
        "none": lambda: None,
        "identity": nn.Identity,
        "empty": nn.Sequential,
        "batch": lambda: BATCH_NORMS[rank](width),
        "batch_act": lambda: _ACTING_NORMS[rank](width),
        "batch_no_affine": lambda: BATCH_NORMS[rank](width, affine=False),
        "batch_no_statistics": lambda: BATCH_NORMS[rank](width, track_running_stats=False),
        "frozen": lambda: FrozenNorm(width),
        "group": lambda: nn.GroupNorm(2, width),
        "instance": lambda: _INSTANCE_NORMS[rank](width, affine=True),
        "local_response": lambda: nn.LocalResponseNorm(2),
        "layer": lambda: ChannelNorm(width) if rank else nn.LayerNorm(width),
    }
    return makers[name]()
