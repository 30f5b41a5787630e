"""The paper's figures that need training alone, as data: which variants of what, and what the paper says of them.

The captions are lost with the figures' images; which of 1c and 1d is which, and what divides 6 from 7, is read from the
text of the paper's section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsetweaks.lottery import demo
from sparsetweaks.lottery.config import LotteryError, Network, Recipe
from sparsetweaks.lottery.experiment import Experiment, Source, compare
from sparsetweaks.lottery.files import write
from sparsetweaks.lottery.grid import Engine, run_all
from sparsetweaks.lottery.results import csv_of, picture, statistics, summarise, table
from sparsetweaks.lottery.train import Trained


@dataclass(frozen=True)
class Claim:
    """What the paper says of one variant over another, at its highest or lowest sparsities."""

    variant: str
    over: str
    words: str
    where: str = "highest"  # or "lowest": the sparsity that decides
    gains: bool = True  # whether it is said to gain; else that the two are about equal


@dataclass(frozen=True)
class Figure:
    """One figure: its variants, and over what it ranges beside the sparsities."""

    title: str
    variants: tuple[str, ...]
    claims: tuple[Claim, ...]
    drawing: str = "imp"
    dense: tuple[str, ...] = ("vanilla",)
    networks: bool = False  # all of the preset's, or the first
    sources: bool = False


@dataclass(frozen=True)
class Preset:
    """How large a reproduction is: networks, data, recipe, levels and seeds."""

    words: str
    networks: tuple[Network, ...]
    recipe: Recipe
    levels: int
    fraction: float
    seeds: tuple[int, ...]
    sources: tuple[Source, ...] = ()  # the user's, by --data, where there are none
    size: int | None = None  # pixels to bring the user's images to
    limit: int | None = None
    scales: dict[str, Any] | None = None


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
        sources=(Source("digits"), Source("digits", limit=40), Source("digits", size=12)),
        scales=demo.SCALES,
    ),
    "cifar10-small": Preset(
        "CIFAR-10 (--data) at 16 x 16 pixels, 1,000 images per class",
        (Network("resnet20", width=16), Network("plain20", width=16)),
        Recipe(epochs=30),
        levels=4,
        fraction=0.6,
        seeds=(0, 1, 2),
        size=16,
        limit=1000,
    ),
    "paper": Preset(
        "the paper's: 180 epochs, 16 levels; --data CIFAR-100, then CIFAR-10 and Tiny-ImageNet for figure 7",
        (Network("resnet18"), Network("resnet34"), Network("vgg16"), Network("mobilenet_v1")),
        Recipe(),
        levels=16,
        fraction=0.2,
        seeds=(0, 1, 2),
    ),
}


def experiments(figure: str, preset: str, data: Sequence[str] = ()) -> list[Experiment]:
    """What it takes to reproduce a figure.

    Args:
        figure: a name of `FIGURES`.
        preset: a name of `PRESETS`.
        data: folders of images, for presets that bring none.

    Returns:
        A comparison per network and data set.

    Raises:
        LotteryError: for a name that is not there, and where data is missing, or given to a preset that has its own.

    Example:
        >>> [(each.network.name, each.spendings) for each in experiments("4a", "digits")]
        [('resnet8', 51)]
    """
    for kind, name, known in (("figure", figure, FIGURES), ("preset", preset, PRESETS)):
        if name not in known:
            raise LotteryError(f"unknown {kind} {name!r}; choose from {', '.join(known)}")
    drawn, size = FIGURES[figure], PRESETS[preset]
    if size.sources and data:
        raise LotteryError(
            f"the preset {preset!r} brings its data: leave out --data, or choose another preset"
        )
    if not size.sources and not data:
        raise LotteryError(f"the preset {preset!r} needs --data, a folder: {size.words}")
    sources = size.sources or tuple(Source(folder, size.size, size.limit) for folder in data)
    return [
        Experiment(
            drawn.variants, source, network, size.recipe, size.levels, size.fraction, size.seeds,
            drawing=drawn.drawing, dense=drawn.dense, scales=size.scales,
        )
        for network in (size.networks if drawn.networks else size.networks[:1])
        for source in (sources if drawn.sources else sources[:1])
    ]  # fmt: skip


def reproduce(
    figure: str,
    preset: str,
    folder: Path,
    *,
    data: Sequence[str] = (),
    device: str = "cpu",
    engine: Engine = run_all,
    on_run: Callable[[int, int], None] | None = None,
    on_epoch: Callable[[Trained], None] | None = None,
) -> str:
    """Run what a figure needs and is not there yet, and write its picture, its numbers, and what the paper says to them.

    Args:
        figure: a name of `FIGURES`.
        preset: a name of `PRESETS`.
        folder: for everything; what figures share in it is run once.
        data: folders of images, for presets that bring none.
        device: to train on.
        engine: what runs the stages; see `compare`.
        on_run: called with the number of stages done and of all.
        on_epoch: see `train`; it must pickle where the stages run elsewhere.

    Returns:
        The tables and the comparison, as text. `figures/FIGURE-PRESET.png`, `.csv` and `.txt` hold the same.

    Raises:
        LotteryError: as `experiments`, and when the folder cannot be written to.
    """
    parts = experiments(figure, preset, data)
    total, before, rows = sum(len(part.seeds) + part.spendings for part in parts), 0, []
    for part in parts:

        def so_far(done: int, _: int, before: int = before) -> None:
            if on_run is not None:
                on_run(before + done, total)

        rows += compare(part, folder, device=device, engine=engine, on_run=so_far, on_epoch=on_epoch)
        before += len(part.seeds) + part.spendings
    told = comparison(figure, rows)
    settings = summarise(rows)
    base = folder / "figures" / f"{figure}-{preset}"
    write(base.with_suffix(".png"), picture(settings))
    over = [claim.over for claim in FIGURES[figure].claims]
    lines = [line for name in dict.fromkeys(over) for line in statistics(rows, over=name)]
    write(base.with_suffix(".csv"), csv_of(lines).encode())
    write(base.with_suffix(".txt"), f"{told}\n".encode())
    tables = [f"{title}\n\n{table(summary, over=over[0])}" for title, summary in settings.items()]
    return "\n\n".join([*tables, told])


def comparison(figure: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """What the paper claims and what came out, a line per claim and setting.

    Args:
        figure: a name of `FIGURES`.
        rows: of its experiments.

    Returns:
        Lines of text.
    """
    lines = []
    for title, summary in summarise(rows).items():
        sparse = sorted(sparsity for sparsity in summary if sparsity)
        for claim in FIGURES[figure].claims:
            at = sparse[-1] if claim.where == "highest" else sparse[0]
            cells = summary[at]
            gain = cells[claim.variant].over(cells[claim.over])
            assert gain is not None, "each variant has each seed"
            width = "" if gain.interval is None else f" ± {gain.interval:.1f}"
            lines.append(
                f"Figure {figure}, {title}: the paper says that {claim.variant} {claim.words}. Here, {claim.variant} over "
                f"{claim.over} at {100 * at:.4g} % sparsity: {gain.mean:+.1f}{width} points over {len(gain.by_seed)} "
                f"seeds; {verdict(claim, gain.mean, gain.interval)}."
            )
    return "\n".join(lines)


def verdict(claim: Claim, gain: float, interval: float | None) -> str:
    """Whether a gain bears a claim out, in words.

    Args:
        claim: of the paper.
        gain: in points.
        interval: half of its 95 % interval; None for one seed.

    Returns:
        A phrase.

    Example:
        >>> verdict(Claim("AT", "vanilla", ""), 0.5, 1.2)
        'not settled: so few seeds show no difference beyond noise'
    """
    if interval is None:
        return "one seed settles nothing"
    if abs(gain) <= interval:
        few = "so few seeds show no difference beyond noise"
        return f"not settled: {few}" if claim.gains else f"in agreement as far as that goes: {few}"
    if not claim.gains:
        return "a difference, where the paper finds almost none"
    return "in agreement" if gain > 0 else "the opposite, beyond noise"


def overview(folder: Path) -> str:
    """Every figure and preset: how many trainings and epochs it takes by itself, and whether it is done.

    Args:
        folder: where results may be.

    Returns:
        A table as text. Trainings that figures share count for each of them here, and are run once.
    """
    lines = [f"{'figure':8}{'preset':16}{'trainings':>10}{'epochs':>9}{'done':>6}  what"]
    for name, figure in FIGURES.items():
        for preset, size in PRESETS.items():
            parts = experiments(name, preset, () if size.sources else ("",) * (3 if figure.sources else 1))
            trainings = sum(part.spendings for part in parts)  # drawing trains some of these, and no others
            done = "yes" if (folder / "figures" / f"{name}-{preset}.png").is_file() else "no"
            lines.append(
                f"{name:8}{preset:16}{trainings:>10}{trainings * size.recipe.epochs:>9}{done:>6}  {figure.title}"
            )
    lines += ["", *(f"{preset}: {size.words}" for preset, size in PRESETS.items())]
    return "\n".join(lines)
