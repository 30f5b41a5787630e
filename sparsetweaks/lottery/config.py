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


@dataclass(frozen=True)
class Network:
    """A CIFAR-style ResNet (He et al. 2016, section 4.2): `depth` = 6n + 2 layers, `width` channels in the first stage.

    Example:
        >>> Network(depth=20, width=16).name
        'resnet20'
    """

    depth: int = 20
    width: int = 16

    def __post_init__(self) -> None:
        if self.depth < 8 or (self.depth - 2) % 6:
            raise LotteryError(f"depth must be 6n + 2 (8, 14, 20, 32, ...), got {self.depth}")
        if self.width < 1:
            raise LotteryError(f"width must be at least 1, got {self.width}")

    @property
    def name(self) -> str:
        return f"resnet{self.depth}"


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
    compile: bool = False

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 2:
            raise LotteryError(
                f"a recipe needs at least 1 epoch and batches of at least 2, got {self.epochs} and {self.batch_size}"
            )
        if not self.learning_rate > 0:
            raise LotteryError(f"learning_rate must be positive, got {self.learning_rate}")
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
    smoothing: float = 0.0

    @property
    def uses_architecture(self) -> bool:
        return self.skips is not None or self.activation is not None


VARIANTS: dict[str, Tweaks] = {
    "vanilla": Tweaks(),
    "AT": Tweaks(skips={}, activation="swish"),
    "TRT": Tweaks(scales={}, smoothing=SMOOTHING),
    "AT+TRT": Tweaks(skips={}, activation="swish", scales={}, smoothing=SMOOTHING),
    "skips": Tweaks(skips={}),
    "swish": Tweaks(activation="swish"),
    "mish": Tweaks(activation="mish"),
    "scales": Tweaks(scales={}),
    "smoothing": Tweaks(smoothing=SMOOTHING),
}
"""The paper's combinations and each tweak by itself."""


def variant(name: str) -> Tweaks:
    """Look up a set of tweaks by name.

    Args:
        name: one of `VARIANTS`.

    Returns:
        Its tweaks.

    Raises:
        LotteryError: for a name that is not there; lists those that are.

    Example:
        >>> variant("smoothing").smoothing
        0.1
    """
    if name not in VARIANTS:
        raise LotteryError(f"unknown variant {name!r}; choose from {', '.join(VARIANTS)}")
    return VARIANTS[name]


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
