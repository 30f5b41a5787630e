"""The models of the zoo: how each is built here, small, with random weights, and what it is called with.

A model is offered as a series of specimens, cheapest first; the sweep takes the first that runs by itself. Nothing is
ever downloaded.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import importlib
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import zoo_transformers
from torch import nn

os.environ["HF_HUB_OFFLINE"] = "1"  # weights are never downloaded, whatever a builder would like

CLASSES = 5
"""Outputs of every classifier: fewer than ImageNet's, so that the head is not most of a small model."""

DROP = 0.1
"""Dropout and stochastic depth where a builder takes them, so that train and eval mode really differ."""

FAMILIES = ("torchvision", "timm", "transformers", "homemade")


@dataclass(frozen=True)
class Specimen:
    """One way to build a model and to call it.

    Attributes:
        build: makes the model; fresh random weights.
        inputs: positional arguments of a call in eval mode, made from a seeded generator.
        keywords: keyword arguments of every call.
        training: positional arguments in train mode where they differ (detection models want targets).
        text: the specimen in words, for the table.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], tuple[Any, ...]]
    text: str
    keywords: Callable[[torch.Generator], dict[str, Any]] = lambda generator: {}
    training: Callable[[torch.Generator], tuple[Any, ...]] | None = None


def names(family: str) -> list[str]:
    """All models of a family, those to look at first in front."""
    if family == "transformers":
        return zoo_transformers.names()
    return {"torchvision": _torchvision_names, "timm": _timm_names, "homemade": _homemade_names}[family]()


def specimens(family: str, name: str) -> Iterator[Specimen]:
    """The ways to build one model, cheapest first."""
    if family == "transformers":
        return (Specimen(*each) for each in zoo_transformers.specimens(name))
    return {
        "torchvision": _torchvision_specimens,
        "timm": _timm_specimens,
        "homemade": _homemade_specimens,
    }[family](name)


def library(family: str) -> str:
    """Name and version of the library that a family comes from."""
    if family == "homemade":
        return "homemade"
    return f"{family} {importlib.import_module(family).__version__}"


def preload(family: str) -> None:
    """Import what the builders need, once, before the sweep forks."""
    with contextlib.suppress(Exception), torch.device("meta"):
        next(specimens(family, names(family)[0])).build()


def _images(*shape: int) -> Callable[[torch.Generator], tuple[torch.Tensor, ...]]:
    return lambda generator: (torch.randn(*shape, generator=generator),)


# -------------------------------------------------------------------------------------------------- torchvision

_DETECTORS = ("*rcnn*", "*retinanet*", "*fcos*", "ssd*")
_VIDEO = ("r3d*", "mc3*", "r2plus1d*", "mvit*", "s3d", "swin3d*")
_SEGMENTERS = ("*deeplab*", "fcn_*", "lraspp*")


def _like(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _torchvision_names() -> list[str]:
    from torchvision import models

    return sorted(models.list_models(), key=lambda name: (_torchvision_size(name), name))


def _torchvision_size(name: str) -> float:
    """Parameters in millions, as torchvision states them with its weights; roughly, for the order only."""
    from torchvision import models

    weights = list(models.get_model_weights(name))
    return min((each.meta["num_params"] / 1e6 for each in weights if "num_params" in each.meta), default=1e3)


def _torchvision_specimens(name: str) -> Iterator[Specimen]:
    if _like(name, _DETECTORS):
        yield from _detectors(name)
    elif name.startswith("raft"):
        yield _torchvision(
            name, {}, _pairs(128), "2 pairs of 128x128", lambda generator: {"num_flow_updates": 2}
        )
    elif _like(name, _VIDEO):
        for count, frames, size in ((2, 8, 64), (2, 16, 112), (1, 16, 224)):
            shape = (count, 3, frames, size, size)
            yield _torchvision(name, {}, _images(*shape), "x".join(map(str, shape)))
    else:
        for size in (64, 96, 128, 224, 299):
            options = (
                {"image_size": size // 14 * 14 if "_14" in name else size} if name.startswith("vit_") else {}
            )
            size = options.get("image_size", size)
            yield _torchvision(name, options, _images(2, 3, size, size), f"2x3x{size}x{size}")


def _torchvision(
    name: str, options: dict[str, Any], inputs: Any, text: str, keywords: Any = None
) -> Specimen:
    from torchvision import models

    options = {"weights": None, **options}
    if not name.startswith("raft"):
        options["num_classes"] = CLASSES
    if _like(name, _SEGMENTERS):
        options["weights_backbone"] = None
    if name.startswith(("fcn_", "deeplab")):
        options["aux_loss"] = True
    if "googlenet" in name or "inception" in name:
        options["init_weights"] = False
    if name.startswith("quantized"):
        options["quantize"] = False
    build = functools.partial(models.get_model, name, **options)
    return Specimen(build, inputs, text, **({"keywords": keywords} if keywords else {}))


def _pairs(size: int) -> Callable[[torch.Generator], tuple[torch.Tensor, ...]]:
    return lambda generator: tuple(
        torch.rand(2, 3, size, size, generator=generator) * 2 - 1 for _ in range(2)
    )


def _detectors(name: str) -> Iterator[Specimen]:
    from torchvision import models

    options: dict[str, Any] = {"weights": None, "weights_backbone": None, "num_classes": CLASSES}
    if "rcnn" in name:
        options |= {"min_size": 64, "max_size": 96, "box_score_thresh": 0.0, "box_detections_per_img": 10}
    elif name.startswith("ssd"):
        options |= {"score_thresh": 0.0, "detections_per_img": 10}
    else:
        options |= {"min_size": 64, "max_size": 96, "score_thresh": 0.0, "detections_per_img": 10}
    build = functools.partial(models.get_model, name, **options)

    def inputs(generator: torch.Generator) -> tuple[Any, ...]:
        return ([torch.rand(3, 64, 80, generator=generator) for _ in range(2)],)

    def training(generator: torch.Generator) -> tuple[Any, ...]:
        target = {
            "boxes": torch.tensor([[8.0, 8.0, 40.0, 48.0], [20.0, 10.0, 70.0, 60.0]]),
            "labels": torch.tensor([1, 2]),
            "masks": torch.ones(2, 64, 80, dtype=torch.uint8),
            "keypoints": torch.tensor([[[20.0, 20.0, 1.0]] * 17, [[30.0, 30.0, 1.0]] * 17]),
        }
        return (*inputs(generator), [dict(target), dict(target)])

    yield Specimen(build, inputs, "list of 2 3x64x80", training=training)


# --------------------------------------------------------------------------------------------------------- timm


def _timm_names() -> list[str]:
    """One model of each architecture module first, then the rest; the smallest by name stands for its module."""
    import timm

    first: list[str] = []
    rest: list[str] = []
    for module in timm.list_modules():
        found = sorted(timm.list_models(module=module), key=_timm_rank)
        first += found[:1]
        rest += found[1:]
    listed = set(timm.list_models())
    return [name for name in first + sorted(rest, key=_timm_rank) if name in listed]


_RANKS = [
    "test_",
    "atto",
    "femto",
    "pico",
    "nano",
    "xx",
    "tiny",
    "_t",
    "mini",
    "micro",
    "_s",
    "small",
    "18",
    "b0",
]
_LARGE = [
    "giant",
    "gigantic",
    "enormous",
    "huge",
    "so400m",
    "so150m",
    "7b",
    "xlarge",
    "xxl",
    "large",
    "_l_",
    "_h_",
]


def _timm_rank(name: str) -> tuple[int, str]:
    if any(each in name for each in _LARGE):
        return (len(_RANKS) + 1, name)
    ranks = (
        rank for rank, each in enumerate(_RANKS) if (name.startswith(each) if rank == 0 else each in name)
    )
    return (next(ranks, len(_RANKS)), name)


def _timm_specimens(name: str) -> Iterator[Specimen]:
    import timm

    config = timm.get_pretrained_cfg(name)
    default = max(config.input_size[1:]) if config is not None else 224
    channels = config.input_size[0] if config is not None else 3
    smallest = max(config.min_input_size[1:]) if config is not None and config.min_input_size else 64
    fixed = bool(config is not None and config.fixed_input_size)
    sizes = sorted(
        {size for size in (64, 96, 128, 160, 192, 224, 256) if smallest <= size < default} | {default}
    )
    drops = {"drop_rate": DROP, "drop_path_rate": DROP}
    for size in sizes:
        # an attempt with the size told to the builder, where it must know it; the default size needs no telling
        resized = [{"img_size": size}] if fixed and size != default else [{}]
        for sized, dropped in itertools.product(resized, (drops, {})):
            options = {"pretrained": False, "num_classes": CLASSES, **sized, **dropped}
            build = functools.partial(timm.create_model, name, **options)
            yield Specimen(build, _images(2, channels, size, size), f"2x{channels}x{size}x{size}")


# ----------------------------------------------------------------------------------------------------- homemade


def _homemade_names() -> list[str]:
    import zoo_homemade

    return list(zoo_homemade.HAZARDS)


def _homemade_specimens(name: str) -> Iterator[Specimen]:
    import zoo_homemade

    yield zoo_homemade.HAZARDS[name]()
