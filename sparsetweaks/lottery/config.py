"""What determines a run, as values that can be compared, written down and hashed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from sparsetweaks.recipe.labels import SMOOTHING


class LotteryError(ValueError):
    """What a user can put right: a missing folder, a broken ticket, a loss that is not finite."""


class RunError(LotteryError):
    """What is wrong with one run alone, such as a loss that is not finite: the others of its grid need not wait for it."""


FAMILIES = {  # own networks for small images, and the channels of their first stage, each as published
    "resnet18": 64,  # He et al. 2016, with a 3x3 stem of stride 1, as is usual for CIFAR
    "resnet34": 64,
    "vgg16": 64,  # Simonyan and Zisserman 2014, with BatchNorm and one linear layer
    "mobilenet_v1": 32,  # Howard et al. 2017
    "mobilenet_v2": 32,  # Sandler et al. 2018
}
SMALL_WIDTH = 16  # of resnet20, plain20 and the others of 6n + 2 layers (He et al. 2016, 4.2)
COMPILE_MODES = (
    "default",
    "reduce-overhead",
    "max-autotune",
    "max-autotune-no-cudagraphs",
)  # torch.compile's


@dataclass(frozen=True)
class Network:
    """Which network: one of ours, torchvision's, or a user's.

    Ours are for small images: `resnet18`, `resnet34`, `vgg16`, `mobilenet_v1`, `mobilenet_v2`, and He et al.'s of
    6n + 2 layers, with residuals (`resnet20`, `resnet32`, ...) or without (`plain20`, ...). `torchvision:NAME` is
    `torchvision.models.get_model(NAME)`; `MODULE:FUNCTION` calls a function of yours with `channels` and `classes`.

    Example:
        >>> Network("resnet20"), Network("torchvision:resnet50").family
        (Network(name='resnet20', width=16), 'torchvision')
    """

    name: str = "resnet20"
    width: int | None = None  # channels of the first stage; None becomes the published one; others have none

    def __post_init__(self) -> None:
        if self.family in ("torchvision", "user"):
            if self.width is not None:
                raise LotteryError(f"{self.name} has no width: that is for the networks that are ours")
            return
        if self.family in ("resnet", "plain") and (self.depth < 8 or (self.depth - 2) % 6):
            raise LotteryError(f"{self.name}: depth must be 6n + 2 (8, 14, 20, 32, ...), 18 or 34")
        if self.width is None:
            object.__setattr__(self, "width", FAMILIES.get(self.name, SMALL_WIDTH))
        if self.channels < 1:
            raise LotteryError(f"width must be at least 1, got {self.width}")

    @property
    def family(self) -> str:
        """Which kind of network the name says."""
        if ":" in self.name:
            return "torchvision" if self.name.startswith("torchvision:") else "user"
        if self.name in FAMILIES:
            return self.name
        kind = self.name.rstrip("0123456789")
        if kind not in ("resnet", "plain") or kind == self.name:
            raise LotteryError(
                f"unknown network {self.name!r}; choose from {', '.join(FAMILIES)}, resnet20, plain20 (and other depths "
                "of 6n + 2), torchvision:NAME, or MODULE:FUNCTION"
            )
        return kind

    @property
    def depth(self) -> int:
        """How many layers the name says; only for those of 6n + 2."""
        return int(self.name.lstrip("abcdefghijklmnopqrstuvwxyz"))

    @property
    def channels(self) -> int:
        """The width, of a network that has one."""
        assert self.width is not None
        return self.width

    @property
    def slug(self) -> str:
        """The name for use in a file's name."""
        name = self.name.replace(":", "-").replace("/", "-")
        return name if self.width is None else f"{name}w{self.width}"


@dataclass(frozen=True)
class Recipe:
    """How to train. The defaults are those of the paper and, where it is silent, of its authors' code."""

    epochs: int = 180  # the paper
    batch_size: int = 128  # the paper
    learning_rate: float = 0.1  # the paper
    momentum: float = 0.9  # the authors' code
    weight_decay: float = 2e-4  # the authors' code, on all parameters
    decay: float = 0.1  # the paper: the learning rate falls to a tenth ...
    milestones: tuple[float, ...] = (
        1 / 2,
        3 / 4,
    )  # ... at epochs 90 and 135 of 180, as fractions of the whole
    warmup_epochs: float = 0.0  # none in the paper; a linear rise from 0 where one is wanted
    crop_padding: float = 4 / 32  # the authors' code pads 32 pixels by 4: the same fraction at every size
    precision: str = (
        "auto"  # "float32", "bfloat16", or "auto": bfloat16 where the processor multiplies it natively
    )
    compile: bool | str = False  # a string is a mode of `torch.compile`; "reduce-overhead" takes CUDA graphs
    average_from: float | None = (
        None  # fraction of the epochs from which weights are averaged, None for never
    )
    average_rate: float = (
        0.5  # learning rate meanwhile, as a fraction of the highest (Izmailov et al.: 0.05 of 0.1)
    )

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 2:
            raise LotteryError(
                f"a recipe needs at least 1 epoch and batches of at least 2, got {self.epochs} and {self.batch_size}"
            )
        if not self.learning_rate > 0:
            raise LotteryError(f"learning_rate must be positive, got {self.learning_rate}")
        if not 0 <= self.warmup_epochs <= self.epochs:
            raise LotteryError(
                f"warmup_epochs must lie between 0 and the {self.epochs} epochs, got {self.warmup_epochs}"
            )
        if isinstance(self.compile, str) and self.compile not in COMPILE_MODES:
            raise LotteryError(
                f"compile must be a bool or one of {', '.join(COMPILE_MODES)}, got {self.compile!r}"
            )
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise LotteryError(f"precision must be auto, float32 or bfloat16, got {self.precision!r}")


@dataclass(frozen=True)
class Tweaks:
    """Which of the paper's tweaks to spend a ticket with, and with what options of `sparsetweaks`' own functions.

    Example:
        >>> Tweaks(activation="mish").uses_architecture
        True
    """

    skips: dict[str, Any] | None = None  # options of `inject_skips`; {} is its defaults, None is no skips
    activation: str | None = None
    scales: dict[str, Any] | None = None  # options of `learn_layer_scales`
    scales_on: str = (
        "ticket"  # "dense": learned on the dense network and masked then, as one of the authors' scripts
    )
    smoothing: float = 0.0
    smoothing_form: str = "uniform"  # or "wrong", see `SoftLabelLoss`
    distillation: bool = False  # learn from the dense network's answers
    start: str = "ticket"  # weights to start from: the ticket's, "late" (rewound to an epoch), "trained"
    averaging: bool = False  # of the weights over the last quarter of the epochs
    matched: bool = True  # what tweaks add is pruned elsewhere; the budget is the ticket's own

    def __post_init__(self) -> None:
        for name, value, known in (
            ("scales_on", self.scales_on, ("ticket", "dense")),
            ("start", self.start, ("ticket", "late", "trained")),
        ):
            if value not in known:
                raise LotteryError(f"{name} must be one of {', '.join(known)}, got {value!r}")

    @property
    def uses_architecture(self) -> bool:
        return self.skips is not None or self.activation is not None


_AUTHORS_SKIPS = {
    "shortcut": "project-all",
    "strength": 1.0,
    "where": "*.conv[12]",
}  # of basic blocks, and no others
PARTS: dict[str, dict[str, Any]] = {
    "vanilla": {},
    "AT": {"skips": {}, "activation": "swish"},
    "TRT": {"scales": {}, "smoothing": SMOOTHING},
    "skips": {"skips": {}},
    "swish": {"activation": "swish"},
    "mish": {"activation": "mish"},
    "scales": {"scales": {}},
    "smoothing": {"smoothing": SMOOTHING},
    "KD": {"distillation": True, "smoothing": 0.0},  # in place of smoothing, as in the paper's figure 9
    "rewinding": {"start": "late"},  # Frankle et al. 2019; the paper, 4.5
    "lr-rewinding": {
        "start": "trained"
    },  # Renda et al. 2020: the trained weights, the learning rate from the start
    "SWA": {"averaging": True},  # Izmailov et al. 2018; the paper names it in 3.3
    "unmatched": {"matched": False},
    # where the authors' code parts from their paper
    "authors-skips": {"skips": _AUTHORS_SKIPS},
    "authors-scales": {"scales": {}, "scales_on": "dense"},
    "authors-smoothing": {"smoothing": SMOOTHING, "smoothing_form": "wrong"},
    "authors-AT": {"skips": _AUTHORS_SKIPS, "activation": "swish"},
    "authors-TRT": {"scales": {}, "scales_on": "dense", "smoothing": SMOOTHING, "smoothing_form": "wrong"},
}
"""What variants are put together from by "+", the later deciding where two say different things."""


def variant(name: str) -> Tweaks:
    """Read a set of tweaks from its name.

    Args:
        name: parts of `PARTS`, joined by "+", such as "AT+TRT+rewinding".

    Returns:
        Its tweaks.

    Raises:
        LotteryError: for a part that is not there; lists those that are.

    Example:
        >>> variant("swish+smoothing") == Tweaks(activation="swish", smoothing=0.1)
        True
    """
    chosen: dict[str, Any] = {}
    for part in name.split("+"):
        if part not in PARTS:
            raise LotteryError(f"unknown variant {part!r}; choose from {', '.join(PARTS)}, or join some by +")
        chosen |= PARTS[part]
    return Tweaks(**chosen)


VARIANTS: dict[str, Tweaks] = {
    name: variant(name)
    for name in ("vanilla", "AT", "TRT", "AT+TRT", "skips", "swish", "mish", "scales", "smoothing")
}
"""The paper's combinations and each tweak by itself."""


def key(*parts: Any) -> str:
    """A short name for whatever determines a stage: equal parts, equal key, in every process and on every machine.

    Args:
        parts: dataclasses of this module, strings, numbers, None, and lists and dicts of them.

    Returns:
        16 hexadecimal digits.

    Example:
        >>> key(Recipe(), 0) == key(Recipe(), 0), key(Recipe(), 0) == key(Recipe(), 1)
        (True, False)
    """
    text = json.dumps([_plain(part) for part in parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(part: Any) -> Any:
    return dataclasses.asdict(part) if dataclasses.is_dataclass(part) and not isinstance(part, type) else part
