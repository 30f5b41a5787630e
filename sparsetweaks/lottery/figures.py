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
WINNING = (
    0.59  # a sparsity of winning tickets, at which the paper's section 4.3 looks: the nearest level is taken
)
MOMENTS = 24  # at most so many epochs of a training are kept to be looked at


@dataclass(frozen=True)
class Reading:
    """What is compared of two networks."""

    quantity: str = "accuracy"  # or a number of the figure's measure
    space: str = ""  # of the measure; "last stage" is the deepest
    against: str = ""  # the space of the other network's number, where it is another
    epoch: str = ""  # "first" or "last" of those that were looked at; empty for the reported network


@dataclass(frozen=True)
class Claim:
    """One thing that the paper says of a variant: what to compare, and what bears it out.

    A sentence of the paper that says several things, "the best, and hardly falls with sparsity", is as many claims. A
    sparsity is "dense", "lowest" or "highest", a number for the nearest to it, or "sparse" for the mean over all but dense.
    The kinds, seed by seed: the "gain" of a variant over another; the "growth" of that gain between two sparsities; and
    a "distance", how much farther the variant is from `over` than each rival is, on either side.
    """

    variant: str
    over: str
    words: str
    expects: str = "higher"  # of `claims.EXPECTATIONS`
    kind: str = "gain"  # of `claims.KINDS`
    at: str | float = "sparse"  # the sparsity that decides
    since: str | float | None = None  # that of `over`, or of the gain before, where it is another
    rivals: tuple[str, ...] = ()  # others that it is over or compared with: it holds where it holds for each
    reading: Reading = Reading()


@dataclass(frozen=True)
class Figure:
    """One figure: its variants, and over what it ranges beside the sparsities."""

    title: str
    variants: tuple[str, ...]
    claims: tuple[Claim, ...]
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


def _of_look(variant: str, words: str, expects: str, reading: Reading, **others: Any) -> Claim:
    """A claim of something measured of a variant's network against vanilla's, at the deciding sparsity."""
    return Claim(variant, "vanilla", words, expects, at=DECIDING, reading=reading, **others)


def _of_recipe(variant: str, help: str) -> tuple[Claim, ...]:
    """What section 4.3 says of each part of the recipe."""
    return (
        Claim(variant, "vanilla", f"{help} sparse networks"),
        Claim(
            variant,
            "vanilla",
            f"{help} sparse networks more than the dense one",
            kind="growth",
            since="dense",
        ),
        Claim(variant, "vanilla", f"{help} winning tickets at low sparsity win better", at=WINNING),
    )


_EARLY = Reading("median rise", KEPT, epoch="first")
_AROUND = Reading("rise", INPUTS)
FIGURES: dict[str, Figure] = {
    "1a": Figure(
        "New skip connections",
        ("vanilla", "skips"),
        (
            Claim("skips", "vanilla", "hurt the dense network", "lower", at="dense"),
            Claim("skips", "vanilla", "help sparse networks"),
            Claim(
                "skips", "vanilla", "help most at high sparsity", kind="growth", at="highest", since="lowest"
            ),
        ),
        dense=("vanilla", "skips"),
    ),
    "1b": Figure(
        "Smooth activations",
        ("vanilla", "swish", "mish"),
        tuple(
            claim
            for name in ("swish", "mish")
            for claim in (
                Claim(name, "vanilla", "is marginal for the dense network", "equal", at="dense"),
                Claim(name, "vanilla", "helps sparse networks"),
            )
        ),
        dense=("vanilla", "swish", "mish"),
    ),
    "1c": Figure(
        "Smoothed labels",
        ("vanilla", "smoothing"),
        _of_recipe("smoothing", "helps"),
        dense=("vanilla", "smoothing"),
    ),
    "1d": Figure(
        "Learned layer scales",
        ("vanilla", "scales"),
        _of_recipe("scales", "help"),
        dense=("vanilla", "scales"),
    ),
    "2": Figure(
        "Top Hessian eigenvalue by activation",
        ("vanilla", "swish", "mish"),
        tuple(
            _of_look(
                name,
                "has a lower top eigenvalue than ReLU in sparse networks",
                "lower",
                Reading("eigenvalue", KEPT),
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
            Claim("AT", "vanilla", "outperforms vanilla"),
            Claim(
                "AT",
                "vanilla",
                "outperforms vanilla the more, the sparser",
                kind="growth",
                at="highest",
                since="lowest",
            ),
            Claim("TRT", "vanilla", "outperforms vanilla at low sparsity", at=WINNING),
            Claim(
                "TRT",
                "vanilla",
                "outperforms even the dense network at low sparsity",
                at=WINNING,
                since="dense",
            ),
            Claim("AT+TRT", "vanilla", "patently outperforms vanilla"),
            Claim("AT+TRT", "vanilla", "outperforms vanilla at the highest sparsity", at="highest"),
            Claim(
                "AT+TRT",
                "vanilla",
                "is no worse at 91 % sparsity than the dense network",
                "no lower",
                at=DECIDING,
                since="dense",
            ),
            Claim(
                "vanilla",
                "vanilla",
                "is worse at 91 % sparsity than the dense network",
                "lower",
                at=DECIDING,
                since="dense",
            ),
        ),
    ),
    "4b": Figure(
        "Tweaks against weight rewinding",
        ("vanilla", "rewinding", "AT+TRT"),
        (
            Claim("AT+TRT", "rewinding", "outperforms rewinding at low sparsity", at="lowest"),
            Claim(
                "AT+TRT", "rewinding", "is comparable with rewinding at 97 % sparsity", "equal", at="highest"
            ),
        ),
    ),
    "5": Figure(
        "Loss contours early in training",
        ("vanilla", "skips", "smoothing", "scales"),
        (
            _of_look("skips", "change the landscape early in training", "other", _EARLY),
            _of_look("skips", "have a larger basin early in training", "lower", _EARLY),
            _of_look("scales", "change the landscape early in training", "other", _EARLY),
            _of_look(
                "smoothing",
                "differs least from vanilla early in training",
                "lower",
                _EARLY,
                kind="distance",
                rivals=("skips", "scales"),
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
            Claim("AT+rewinding", "rewinding", "is better than rewinding"),
            Claim("AT+rewinding", "rewinding", "differs marginally from rewinding", "equal"),
            Claim("TRT+rewinding", "rewinding", "is better than rewinding"),
            Claim(
                "AT+TRT+rewinding",
                "rewinding",
                "is the best of all",
                rivals=("AT+rewinding", "TRT+rewinding", "vanilla"),
            ),
            Claim(
                "AT+TRT+rewinding",
                "AT+TRT+rewinding",
                "hardly falls with sparsity",
                "equal",
                at="highest",
                since="lowest",
            ),
            Claim(
                "AT+TRT+rewinding",
                "vanilla",
                "falls less with sparsity than vanilla",
                kind="growth",
                at="highest",
                since="lowest",
            ),
        ),
    ),
    "9": Figure(
        "Distillation in place of smoothing",
        ("vanilla", "AT+TRT", "AT+TRT+KD"),
        (Claim("AT+TRT+KD", "AT+TRT", "has only marginal benefits over smoothing", "equal"),),
    ),
    "10": Figure(
        "Test loss along the top eigenvector",
        _BOTH,
        tuple(
            _of_look(name, "lies in a flatter minimum", "lower", Reading("rise", KEPT))
            for name in ("AT+TRT", "AT", "TRT")
        ),
        dense=(),
        measure="line",
        deciding=True,
    ),
    "11": Figure(
        "Loss around the inputs",
        ("vanilla", "swish", "skips", "smoothing", "scales", "AT+TRT"),
        (
            _of_look("AT+TRT", "flattens the landscape of inputs", "lower", _AROUND),
            _of_look("skips", "change the landscape to the end", "other", _AROUND),
            _of_look(
                "smoothing",
                "differs most from vanilla of the single tweaks at the end of training",
                "higher",
                _AROUND,
                kind="distance",
                rivals=("swish", "skips", "scales"),
            ),
        ),
        dense=(),
        measure="inputs",
        deciding=True,
    ),
    "A1": Figure(
        "Activation sparsity of ReLU (vanilla) and Swish",
        ("vanilla", "swish"),
        (
            _of_look(
                "swish",
                "leaves fewer activations near zero than ReLU",
                "lower",
                Reading("near zeros", EVERYTHING),
            ),
            _of_look(
                "vanilla",
                "grows sparser with depth",
                "higher",
                Reading("exact zeros", "last stage", against="stage 1"),
            ),
        ),
        dense=("vanilla", "swish"),
        measure="activations",
    ),
    "A12": Figure(
        "Top Hessian eigenvalue during training",
        ("vanilla", "AT+TRT"),
        (
            _of_look(
                "AT+TRT",
                "has a higher top eigenvalue at first",
                "higher",
                Reading("eigenvalue", KEPT, epoch="first"),
            ),
            _of_look(
                "AT+TRT", "has a lower one at the end", "lower", Reading("eigenvalue", KEPT, epoch="last")
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
        (Claim("AT+TRT", "vanilla", "still performs better than vanilla"),),
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
