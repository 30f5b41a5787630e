"""The models of the zoo: how each is built here, small, with random weights, and what it is called with.

A model is offered as a series of specimens, cheapest first; the sweep takes the first that runs by itself. Nothing is
ever downloaded.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import importlib
import inspect
import itertools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
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
    return {
        "torchvision": _torchvision_names,
        "timm": _timm_names,
        "transformers": _transformers_names,
        "homemade": _homemade_names,
    }[family]()


def specimens(family: str, name: str) -> Iterator[Specimen]:
    """The ways to build one model, cheapest first."""
    return {
        "torchvision": _torchvision_specimens,
        "timm": _timm_specimens,
        "transformers": _transformers_specimens,
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


# ------------------------------------------------------------------------------------------------- transformers

_FIRST = (
    "resnet convnext convnextv2 vit deit swin swinv2 regnet mobilenet_v1 mobilenet_v2 segformer beit dinov2 efficientnet "
    "bit poolformer pvt pvt_v2 cvt levit mobilevit mobilevitv2 focalnet hiera data2vec-vision vit_mae dpt glpn detr "
    "yolos bert roberta distilbert albert electra deberta deberta-v2 xlnet mpnet funnel convbert squeezebert "
    "mobilebert fnet longformer big_bird roformer xlm-roberta modernbert gpt2 gpt_neo gpt_neox gptj opt bloom codegen "
    "llama mistral mixtral qwen2 qwen3 gemma gemma2 phi phi3 falcon mpt stablelm mamba rwkv t5 mt5 bart mbart pegasus "
    "blenderbot m2m_100 marian led longt5 switch_transformers prophetnet whisper wav2vec2 hubert wavlm sew unispeech "
    "data2vec-audio speech_to_text audio-spectrogram-transformer clip siglip blip vilt chinese_clip align"
)
"""The families that most people use, in front of all others."""

_LAYERS = re.compile(
    r"(^|_)(n_layers?|num_layers|num_\w+_layers|\w*_layers|layers|depth|num_blocks|n_blocks)$"
)
_WIDTHS = re.compile(
    r"(size|dim|dims|d_model|d_ff|d_kv|d_inner|n_embd|n_inner|channels|filters|features|rank|planes)$"
)
_NOT_WIDTHS = re.compile(
    r"(image|patch|vocab|window|kernel|crop|chunk|block|batch|kv_heads|num_channels|stride|max_)"
)


def _transformers_names() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    first = [name for name in _FIRST.split() if name in MODEL_MAPPING_NAMES]
    return first + [name for name in MODEL_MAPPING_NAMES if name not in first]


def _transformers_specimens(name: str) -> Iterator[Specimen]:
    """Narrow and shallow first, then wider; each called with every recipe of inputs that its forward may take."""
    import transformers

    for factor, size in ((8, 64), (4, 64), (2, 64), (1, 64), (8, None), (1, None)):
        config = transformers.AutoConfig.for_model(name)
        _shrink(config, factor, size)
        build = functools.partial(transformers.AutoModel.from_config, config)
        cls = transformers.MODEL_MAPPING[type(config)]
        takes = set(inspect.signature((cls[0] if isinstance(cls, tuple) else cls).forward).parameters)
        for recipe in _recipes(config, takes):
            text = ", ".join(f"{key} {'x'.join(map(str, shape))}" for key, shape in recipe.items())
            keywords = functools.partial(
                _hugging_inputs, recipe=recipe, vocabulary=_first_of(config, ("vocab_size",), 200)
            )
            yield Specimen(build, lambda generator: (), f"widths/{factor}: {text}", keywords)


def _shrink(config: Any, factor: int, size: int | None) -> None:
    """Two layers everywhere, widths divided, small pictures and vocabularies; nested configurations as well."""
    from transformers import PretrainedConfig

    for key, value in list(vars(config).items()):
        small = value
        if isinstance(value, PretrainedConfig):
            _shrink(value, factor, size)
        elif key.endswith("token_id") and isinstance(value, int) and value > 199:
            small = 199
        elif key == "image_size" and size is not None and isinstance(value, (int, list, tuple)):
            small = size if isinstance(value, int) else type(value)(size for _ in value)
        elif key == "layer_types" and isinstance(value, list):
            small = value[:2]
        elif key in ("depths", "layers_per_stage", "num_blocks_per_stage") and isinstance(
            value, (list, tuple)
        ):
            small = type(value)(min(2, each) if isinstance(each, int) else each for each in value)
        elif isinstance(value, (list, tuple)) and _WIDTHS.search(key.rstrip("s")):
            small = type(value)(_narrow(key, each, factor) for each in value)
        elif type(value) is int:
            small = min(2, value) if _LAYERS.search(key) else _narrow(key, value, factor)
        if small is not value:
            with contextlib.suppress(AttributeError, NotImplementedError, ValueError, TypeError):
                setattr(config, key, small)


def _narrow(key: str, value: Any, factor: int) -> Any:
    if type(value) is not int:
        return value
    if key == "vocab_size":
        return min(value, 200)
    if "expert" in key and "num" in key:
        return min(value, 4)
    wide = _WIDTHS.search(key.rstrip("s")) and not _NOT_WIDTHS.search(key)
    return value // factor if wide and value % factor == 0 and value // factor >= 4 else value


def _first_of(config: Any, keys: tuple[str, ...], default: int) -> int:
    """The first of these settings, here or in a nested configuration."""
    from transformers import PretrainedConfig

    nested = [value for value in vars(config).values() if isinstance(value, PretrainedConfig)]
    for each in (config, *nested):
        for key in keys:
            value = getattr(each, key, None)
            if isinstance(value, (list, tuple)) and value:
                value = value[0]
            if isinstance(value, int) and value > 0:
                return value
    return default


def _recipes(config: Any, takes: set[str]) -> Iterator[dict[str, tuple[int, ...]]]:
    """Shapes of inputs by name; several guesses, the first that runs is taken."""
    size = _first_of(config, ("image_size", "img_size"), 64)
    channels = _first_of(config, ("num_channels", "in_channels", "in_chans"), 3)
    mels = _first_of(config, ("num_mel_bins", "input_feat_per_channel", "feature_size", "n_mels"), 80)
    frames = 2 * _first_of(config, ("max_source_positions",), 50)
    decoder = (
        {"decoder_input_ids": (2, 6)} if "decoder_input_ids" in takes and config.is_encoder_decoder else {}
    )
    text = {"input_ids": (2, 8)} if "input_ids" in takes else {}
    pictures: list[dict[str, tuple[int, ...]]] = []
    if "pixel_values" in takes:
        sizes = dict.fromkeys((size, 64, 128, 224))
        pictures = [{"pixel_values": (2, channels, each, each)} for each in sizes]
        pictures += [{"pixel_values": (2, _first_of(config, ("num_frames",), 8), channels, size, size)}]
    for picture in pictures:
        yield {**picture, **decoder}
        if text:
            yield {**picture, **text, **decoder}
    if text:
        yield {**text, **decoder}
        yield {"input_ids": (2, 128), **decoder}
    if "input_values" in takes:
        for shape in (
            (2, 4000),
            (2, 1, 4000),
            (2, _first_of(config, ("max_length",), 1024), mels),
            (2, 16000),
        ):
            yield {"input_values": shape, **decoder}
    if "input_features" in takes:
        for shape in ((2, mels, frames), (2, frames, mels), (2, 64, mels), (2, mels, 3000)):
            yield {"input_features": shape, **decoder}
    if "pixel_values_videos" in takes:
        yield {
            "pixel_values_videos": (
                2,
                _first_of(config, ("num_frames", "frames_per_clip"), 8),
                channels,
                size,
                size,
            )
        }
    if "past_values" in takes:
        length = _first_of(config, ("context_length",), 32)
        yield {"past_values": (2, length, _first_of(config, ("num_input_channels",), 1))}
        yield {"past_values": (2, length)}
    if "inputs_embeds" in takes and not text:
        yield {"inputs_embeds": (2, 8, _first_of(config, ("hidden_size", "d_model"), 64))}
    if "hidden_states" in takes:
        yield {"hidden_states": (2, 8, _first_of(config, ("hidden_size", "d_model"), 64))}


def _hugging_inputs(generator: torch.Generator, *, recipe: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    return {
        key: torch.randint(5, vocabulary - 5, shape, generator=generator)
        if key.endswith("_ids")
        else torch.randn(shape, generator=generator)
        for key, shape in recipe.items()
    }


# ----------------------------------------------------------------------------------------------------- homemade


def _homemade_names() -> list[str]:
    import zoo_homemade

    return list(zoo_homemade.HAZARDS)


def _homemade_specimens(name: str) -> Iterator[Specimen]:
    import zoo_homemade

    yield zoo_homemade.HAZARDS[name]()
