"""The paper's figures and table as data: which variants of what, what is measured, and what the paper says of it.

The captions are lost with the figures' images; which of 1c and 1d is which, what divides 6 from 7, and the panels of 5 and
11 are read from the text of the paper's sections 3.3 and 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsetweaks.lottery import demo
from sparsetweaks.lottery.config import Network, Recipe
from sparsetweaks.lottery.experiment import Source
from sparsetweaks.lottery.smoothness import EVERYTHING, INPUTS, KEPT

DECIDING = (
    0.91  # the sparsity at which the paper looks at curvature and landscapes: the nearest level is taken
)
EARLY = 5 / 180  # of the epochs: figure 5 looks after epoch 5 of 180
MOMENTS = 24  # at most so many epochs of a training are kept to be looked at


@dataclass(frozen=True)
class Claim:
    """What the paper says of one variant over another, at its highest or lowest sparsities."""

    variant: str
    over: str
    words: str
    where: str = "highest"  # or "lowest": the sparsity that decides
    gains: bool = True  # whether it is said to gain; else that the two are about equal


@dataclass(frozen=True)
class Contrast:
    """What the paper says of something measured of one variant's network, against another's, at the deciding sparsity."""

    variant: str
    over: str
    words: str
    quantity: str
    expects: str  # the ratio: "lower" or "higher" than 1, "other" than 1, or "equal" to it
    space: str  # of the measure; "last stage" is the deepest
    against: str = ""  # the space of `over`, where it is another
    epoch: str = ""  # "first" or "last" of those that were looked at; empty for the reported network


@dataclass(frozen=True)
class Figure:
    """One figure: its variants, and over what it ranges beside the sparsities."""

    title: str
    variants: tuple[str, ...]
    claims: tuple[Claim, ...] | tuple[Contrast, ...]
    drawing: str = "imp"
    dense: tuple[str, ...] = ("vanilla",)
    networks: bool = False  # all of the preset's, or its main ones
    sources: bool = False
    measure: str | None = (
        None  # of `smoothness.MEASURES`, taken of the spent tickets; None for accuracy alone
    )
    deciding: bool = False  # only at the deciding sparsity, or at all
    moments: str = "best"  # or "early", or "each" of at most `MOMENTS` epochs


@dataclass(frozen=True)
class Preset:
    """How large a reproduction is: networks, data, recipe, levels and seeds."""

    words: str
    networks: tuple[Network, ...]
    recipe: Recipe
    levels: int
    fraction: float
    seeds: tuple[int, ...]
    seconds: float  # that a training takes on one thread of an AMD EPYC, on average over the variants
    sources: tuple[Source, ...] = ()  # the user's, by --data, where there are none
    size: int | None = None  # pixels to bring the user's images to
    limit: int | None = None
    scales: dict[str, Any] | None = None
    main: int = 1  # how many of the networks stand in figures that are not of all


_BOTH = ("vanilla", "AT", "TRT", "AT+TRT")
_SPARSER = "helps sparse networks, most at high sparsity"
FIGURES: dict[str, Figure] = {
    "1a": Figure(
        "New skip connections",
        ("vanilla", "skips"),
        (Claim("skips", "vanilla", "hurt the dense network and help sparse ones, most at high sparsity"),),
        dense=("vanilla", "skips"),
    ),
    "1b": Figure(
        "Smooth activations",
        ("vanilla", "swish", "mish"),
        (
            Claim("swish", "vanilla", f"is marginal for dense networks and {_SPARSER}"),
            Claim("mish", "vanilla", f"is marginal for dense networks and {_SPARSER}"),
        ),
        dense=("vanilla", "swish", "mish"),
    ),
    "1c": Figure(
        "Smoothed labels",
        ("vanilla", "smoothing"),
        (Claim("smoothing", "vanilla", "helps sparse networks, at low sparsity too", "lowest"),),
        dense=("vanilla", "smoothing"),
    ),
    "1d": Figure(
        "Learned layer scales",
        ("vanilla", "scales"),
        (Claim("scales", "vanilla", "helps sparse networks, at low sparsity too", "lowest"),),
        dense=("vanilla", "scales"),
    ),
    "2": Figure(
        "Top Hessian eigenvalue by activation",
        ("vanilla", "swish", "mish"),
        tuple(
            Contrast(
                name,
                "vanilla",
                "has a lower top eigenvalue than ReLU in sparse networks",
                "eigenvalue",
                "lower",
                KEPT,
            )
            for name in ("swish", "mish")
        ),
        dense=("vanilla", "swish", "mish"),
        measure="curvature",
    ),
    "4a": Figure(
        "Architecture and recipe together",
        _BOTH,
        (
            Claim("AT", "vanilla", "outperforms vanilla the more, the sparser"),
            Claim("TRT", "vanilla", "outperforms vanilla at low sparsity", "lowest"),
            Claim("AT+TRT", "vanilla", "patently outperforms vanilla"),
        ),
    ),
    "4b": Figure(
        "Tweaks against weight rewinding",
        ("vanilla", "rewinding", "AT+TRT"),
        (
            Claim(
                "AT+TRT", "rewinding", "generally outperforms rewinding below a critical sparsity", "lowest"
            ),
        ),
    ),
    "5": Figure(
        "Loss contours early in training",
        ("vanilla", "skips", "smoothing", "scales"),
        (
            Contrast(
                "skips",
                "vanilla",
                "remarkably change the landscape, to a larger basin",
                "median rise",
                "lower",
                KEPT,
                epoch="first",
            ),
            Contrast(
                "smoothing",
                "vanilla",
                "differs least early in training",
                "median rise",
                "equal",
                KEPT,
                epoch="first",
            ),
            Contrast(
                "scales",
                "vanilla",
                "change the contours' variance much early in training",
                "median rise",
                "other",
                KEPT,
                epoch="first",
            ),
        ),
        dense=(),
        measure="plane",
        deciding=True,
        moments="early",
    ),
    "6": Figure(
        "Across networks",
        ("vanilla", "AT+TRT"),
        (Claim("AT+TRT", "vanilla", "outperforms vanilla on every network"),),
        networks=True,
    ),
    "7": Figure(
        "Across data sets",
        ("vanilla", "AT+TRT"),
        (Claim("AT+TRT", "vanilla", "outperforms vanilla on every data set"),),
        sources=True,
    ),
    "8": Figure(
        "Tweaks with weight rewinding",
        ("vanilla", "rewinding", "AT+rewinding", "TRT+rewinding", "AT+TRT+rewinding"),
        (
            Claim("AT+rewinding", "rewinding", "is marginally better than rewinding"),
            Claim("TRT+rewinding", "rewinding", "is significantly better than rewinding"),
            Claim("AT+TRT+rewinding", "rewinding", "is the best of all, and hardly falls with sparsity"),
        ),
    ),
    "9": Figure(
        "Distillation in place of smoothing",
        ("vanilla", "AT+TRT", "AT+TRT+KD"),
        (Claim("AT+TRT+KD", "AT+TRT", "has only marginal benefits", gains=False),),
    ),
    "10": Figure(
        "Test loss along the top eigenvector",
        _BOTH,
        (
            Contrast("AT+TRT", "vanilla", "lies in a flatter minimum", "rise", "lower", KEPT),
            Contrast("AT", "vanilla", "lies in a flatter minimum", "rise", "lower", KEPT),
            Contrast("TRT", "vanilla", "lies in a flatter minimum", "rise", "lower", KEPT),
        ),
        dense=(),
        measure="line",
        deciding=True,
    ),
    "11": Figure(
        "Loss around the inputs",
        ("vanilla", "swish", "skips", "smoothing", "scales", "AT+TRT"),
        (
            Contrast(
                "AT+TRT",
                "vanilla",
                "notably flattens the landscape of inputs",
                "rise",
                "lower",
                INPUTS,
            ),
            Contrast(
                "skips",
                "vanilla",
                "remarkably change the landscape to the end",
                "rise",
                "other",
                INPUTS,
            ),
            Contrast("smoothing", "vanilla", "differs most at the end of training", "rise", "other", INPUTS),
        ),
        dense=(),
        measure="inputs",
        deciding=True,
    ),
    "A1": Figure(
        "Activation sparsity of ReLU (vanilla) and Swish",
        ("vanilla", "swish"),
        (
            Contrast(
                "swish",
                "vanilla",
                "leaves far fewer activations near zero than ReLU (0.2 to 0.4 % beside 27 to 66 %)",
                "near zeros",
                "lower",
                EVERYTHING,
            ),
            Contrast(
                "vanilla",
                "vanilla",
                "grows sparser with depth",
                "exact zeros",
                "higher",
                "last stage",
                against="stage 1",
            ),
        ),
        dense=("vanilla", "swish"),
        measure="activations",
    ),
    "A12": Figure(
        "Top Hessian eigenvalue during training",
        ("vanilla", "AT+TRT"),
        (
            Contrast(
                "AT+TRT",
                "vanilla",
                "has a higher top eigenvalue at first",
                "eigenvalue",
                "higher",
                KEPT,
                epoch="first",
            ),
            Contrast(
                "AT+TRT", "vanilla", "has a lower one at the end", "eigenvalue", "lower", KEPT, epoch="last"
            ),
        ),
        dense=(),
        measure="curvature",
        deciding=True,
        moments="each",
    ),
    "A13": Figure(
        "One-shot pruning",
        _BOTH,
        (Claim("AT+TRT", "vanilla", "still performs significantly better than vanilla"),),
        drawing="omp",
    ),
}
PRESETS: dict[str, Preset] = {
    "digits": Preset(
        "scikit-learn's digits, networks of 4 to 8 channels",
        (
            demo.NETWORK,
            Network("plain8", width=8),
            Network("vgg16", width=4),
            Network("mobilenet_v1", width=4),
        ),
        demo.RECIPE,
        demo.LEVELS,
        demo.FRACTION,
        demo.SEEDS,
        seconds=2.8,
        sources=(Source("digits"), Source("digits", limit=40), Source("digits", size=12)),
        scales=demo.SCALES,
    ),
    "cifar10-small": Preset(
        "CIFAR-10 (--data) at 16 x 16 pixels, 1,000 images per class; ResNet-20 and plain-20 of 8 channels",
        (Network("resnet20", width=8), Network("plain20", width=8)),
        Recipe(epochs=16),
        levels=2,
        fraction=0.8,
        seeds=(0, 1, 2),
        seconds=72,
        size=16,
        limit=1000,
        scales={"iterations": 40},  # 1 in 28 of the training's steps; 180 would take a third of its time
        main=2,
    ),
    "paper": Preset(
        "the paper's: 180 epochs, 16 levels; --data CIFAR-100, then CIFAR-10 and Tiny-ImageNet for figure 7",
        (Network("resnet18"), Network("resnet34"), Network("vgg16"), Network("mobilenet_v1")),
        Recipe(),
        levels=16,
        fraction=0.2,
        seeds=(0, 1, 2),
        seconds=80_000,
    ),
}
