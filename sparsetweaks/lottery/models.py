"""The paper's networks, for small images: ResNet, its plain twin, VGG and MobileNet, in plain `nn`; and everybody else's."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import inspect
import re
import sys
from typing import Any

import torch
from torch import Tensor, nn

from sparsetweaks.lottery.config import LotteryError, Network

DEEP = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}  # blocks per stage
VGG16 = (1, 1, "pool", 2, 2, "pool", 4, 4, 4, "pool", 8, 8, 8, "pool", 8, 8, 8, "pool")  # channels, in widths
MOBILENET_V1 = (  # channels in widths, and stride; the second convolution keeps the image's size, as is usual for CIFAR
    (2, 1), (4, 2), (4, 1), (8, 2), (8, 1), (16, 2), (16, 1), (16, 1), (16, 1), (16, 1), (16, 1), (32, 2), (32, 1),
)  # fmt: skip
MOBILENET_V2 = (  # expansion, channels at width 32, blocks, stride; the second stage keeps the size for small images
    (1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
)  # fmt: skip


class PlainBlock(nn.Module):
    """Two 3x3 convolutions, each with normalisation and activation."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.act2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.act1(self.bn1(self.conv1(x)))
        return self.act2(self.bn2(self.conv2(out)))


class Block(PlainBlock):
    """The same beside a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__(inputs, outputs, stride)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.act1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.act2(out + self.shortcut(x))


class ResNet(nn.Module):
    """Stages of blocks; each but the first doubles the channels and halves the image."""

    def __init__(
        self, width: int, blocks: tuple[int, ...], block: type[PlainBlock], *, channels: int, classes: int
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.act = nn.ReLU()
        stages = []
        for stage, count in enumerate(blocks):
            outputs, inputs = width * 2**stage, width * 2 ** max(0, stage - 1)
            first = block(inputs, outputs, 2 if stage else 1)
            stages.append(nn.Sequential(first, *(block(outputs, outputs, 1) for _ in range(count - 1))))
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(width * 2 ** (len(blocks) - 1), classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.act(self.bn(self.conv(x))))
        return self.fc(x.mean(dim=(2, 3)))


class Features(nn.Module):
    """Layers one after the other, the mean over the image, and a linear classifier."""

    def __init__(self, layers: list[nn.Module], channels: int, classes: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.features = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.dropout(self.features(x).mean(dim=(2, 3))))


class Inverted(nn.Module):
    """MobileNet v2's block: widen, filter each channel, narrow; beside the identity where the shape is kept."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        inside = inputs * expansion
        widen = _conv_unit(inputs, inside, 1, act=nn.ReLU6) if expansion != 1 else []
        each = _conv_unit(inside, inside, 3, stride=stride, groups=inside, act=nn.ReLU6)
        self.layers = nn.Sequential(*widen, *each, *_conv_unit(inside, outputs, 1, act=None))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


def build(network: Network, *, channels: int, classes: int, seed: int) -> nn.Module:
    """A freshly initialised network, the same for the same seed.

    Ours have the convolutions' initialisation of He et al. 2015; the others bring their own.

    Args:
        network: which.
        channels: of the images, 1 or 3 or any other number.
        classes: how many to tell apart.
        seed: of the initialisation; the global random state is left as it was.

    Returns:
        The network, on the CPU, in training mode.

    Raises:
        LotteryError: for a module, function or torchvision model that is not there, or one that builds no module.

    Example:
        >>> model = build(Network("resnet8", width=4), channels=1, classes=10, seed=0)
        >>> model(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if network.family == "torchvision":
            return _of_torchvision(network.name.partition(":")[2], channels, classes)
        if network.family == "user":
            return _of_user(network.name, channels, classes)
        model = _ours(network, channels, classes)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def code_of(network: Network, *, channels: int, classes: int, seed: int) -> tuple[str, ...]:
    """What a network that is not ours is keyed by, beside its name: an edit of its code makes another one.

    Args:
        network: which.
        channels: of the images.
        classes: to tell apart.
        seed: of the initialisation.

    Returns:
        Nothing for ours, whose code is of this package's version; else a digest of its structure and, without comments, of
        the source of the files that its classes are from. Its weights are not in it: a function of yours may draw them
        as it likes.
    """
    if network.family not in ("torchvision", "user"):
        return ()
    model = build(network, channels=channels, classes=classes, seed=seed)
    files = {network.name.partition(":")[0], *(type(module).__module__ for module in model.modules())}
    texts = [re.sub(r" at 0x[0-9a-f]+", "", repr(model))]  # addresses differ from process to process
    for name in sorted(name for name in files if name.partition(".")[0] != "torch"):
        with contextlib.suppress(
            KeyError, OSError, TypeError, SyntaxError
        ):  # made at run time: it has no source
            texts.append(ast.dump(ast.parse(inspect.getsource(sys.modules[name]))))
    return (hashlib.sha256("\n".join(texts).encode()).hexdigest(),)


def _ours(network: Network, channels: int, classes: int) -> nn.Module:
    width = network.channels
    if network.name in DEEP:
        return ResNet(width, DEEP[network.name], Block, channels=channels, classes=classes)
    if network.family in ("resnet", "plain"):
        blocks = ((network.depth - 2) // 6,) * 3
        kind = Block if network.family == "resnet" else PlainBlock
        return ResNet(width, blocks, kind, channels=channels, classes=classes)
    return {"vgg16": _vgg16, "mobilenet_v1": _mobilenet_v1, "mobilenet_v2": _mobilenet_v2}[network.family](
        width, channels, classes
    )


def _vgg16(width: int, channels: int, classes: int) -> nn.Module:
    layers: list[nn.Module] = []
    for size in VGG16:
        if isinstance(size, str):
            layers.append(nn.MaxPool2d(2, ceil_mode=True))  # which leaves a single pixel as it is
        else:
            layers += _conv_unit(channels, channels := size * width, 3)
    return Features(layers, channels, classes)


def _mobilenet_v1(width: int, channels: int, classes: int) -> nn.Module:
    layers = _conv_unit(channels, channels := width, 3)
    for size, stride in MOBILENET_V1:
        layers += _conv_unit(channels, channels, 3, stride=stride, groups=channels)
        layers += _conv_unit(channels, channels := size * width, 1)
    return Features(layers, channels, classes)


def _mobilenet_v2(width: int, channels: int, classes: int) -> nn.Module:
    scaled = lambda size: max(1, round(size * width / 32))
    layers: list[nn.Module] = _conv_unit(channels, channels := width, 3, act=nn.ReLU6)
    for expansion, size, count, stride in MOBILENET_V2:
        for place in range(count):
            layers.append(Inverted(channels, channels := scaled(size), 1 if place else stride, expansion))
    layers += _conv_unit(channels, channels := scaled(1280), 1, act=nn.ReLU6)
    return Features(layers, channels, classes, dropout=0.2)


def _conv_unit(
    inputs: int,
    outputs: int,
    kernel: int,
    *,
    stride: int = 1,
    groups: int = 1,
    act: type[nn.Module] | None = nn.ReLU,
) -> list[nn.Module]:
    padding = kernel // 2
    conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs), *([act()] if act is not None else [])]


def _of_torchvision(name: str, channels: int, classes: int) -> nn.Module:
    try:
        from torchvision import models
    except ImportError:
        raise LotteryError(f"torchvision:{name} needs torchvision: pip install torchvision") from None
    if name not in models.list_models():
        raise LotteryError(f"torchvision has no model {name!r}; see torchvision.models.list_models()")
    if channels != 3:
        raise LotteryError(f"torchvision:{name} takes images of 3 channels, and these have {channels}")
    options: dict[str, Any] = {"weights": None, "num_classes": classes}
    if name in ("googlenet", "inception_v3"):  # beside the logits they return those of earlier layers
        options |= {"aux_logits": False, "init_weights": True}
    return models.get_model(name, **options)


def _of_user(name: str, channels: int, classes: int) -> nn.Module:
    module, _, function = name.partition(":")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise LotteryError(f"{name} is not a function that can be imported: {error}") from error
    try:
        model = make(channels=channels, classes=classes)
    except TypeError as error:
        raise LotteryError(f"{name} must be a function of channels= and classes=: {error}") from error
    if not isinstance(model, nn.Module):
        raise LotteryError(f"{name} made a {type(model).__name__}, not a torch.nn.Module")
    return model
