"""Summaries as a picture: accuracy against sparsity, and gains over vanilla."""

from __future__ import annotations

import io
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from sparsetweaks.lottery.config import LotteryError
from sparsetweaks.lottery.files import write
from sparsetweaks.lottery.summaries import BASELINE, Cell, Summary, counted, ordered

COLOURS = 128  # of a picture
_LOOK = {  # colours of Okabe and Ito, told apart by colour-blind readers; markers for those who print in grey
    "vanilla": ("#000000", "o"),
    "AT": ("#0072B2", "s"),
    "TRT": ("#E69F00", "^"),
    "AT+TRT": ("#009E73", "D"),
    "skips": ("#56B4E9", "v"),
    "swish": ("#CC79A7", "P"),
    "mish": ("#D55E00", "X"),
    "scales": ("#8C6BB1", "<"),
    "smoothing": ("#A6761D", ">"),
}
_OTHERS = ("#D55E00", "#56B4E9", "#CC79A7", "#8C6BB1", "#A6761D", "#666666", "#117733", "#882255")  # by place


def plot(settings: Mapping[str, Summary], path: Path) -> None:
    """Draw accuracy against sparsity, and the gains over vanilla, a line per variant with its 95 % interval.

    Args:
        settings: from `summarise`; each gets a panel.
        path: of the PNG; its folder is made.

    Raises:
        LotteryError: when there is nothing to draw, or the file cannot be written.
    """
    write(path, picture(settings))


def picture(settings: Mapping[str, Summary]) -> bytes:
    """The picture of `plot`, as the content of a PNG.

    Args:
        settings: from `summarise`; each gets a panel.

    Returns:
        The bytes.

    Raises:
        LotteryError: when there is nothing to draw.
    """
    from matplotlib.figure import Figure

    drawn = {title: summary for title, summary in settings.items() if any(summary)}
    if not drawn:
        raise LotteryError("there are no results of sparse networks to draw yet")
    wide = 8.5 if len(drawn) == 1 else 6.2
    figure = Figure(figsize=(wide * len(drawn), 8), layout="constrained", dpi=120)
    panels = figure.subplots(2, len(drawn), squeeze=False, sharex="col", height_ratios=(3, 2))
    for accuracies, gains, (title, summary) in zip(*panels, drawn.items(), strict=True):
        _panel(accuracies, gains, title, summary)
    return png_of(figure)


def png_of(figure: Any) -> bytes:
    """A figure of matplotlib's as a small PNG: of 128 colours, as flat surfaces and thin lines need no more.

    Args:
        figure: to be drawn.

    Returns:
        The content of the file.
    """
    from PIL import Image

    drawn, content = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    image = Image.open(drawn).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    image.save(content, format="png", optimize=True)
    return content.getvalue()


def _panel(accuracies: Any, gains: Any, title: str, summary: Summary) -> None:
    """One setting: accuracies above, and below them the gains over vanilla, seed by seed, where noise hides less."""
    sparse = sorted(sparsity for sparsity in summary if sparsity)
    names = ordered({name for sparsity in sparse for name in summary[sparsity]})
    for place, (name, cell) in enumerate(summary.get(0.0, {}).items()):
        colour = "#666666" if name == BASELINE else appearance(name, place)[0]
        label = "dense" if name == BASELINE else f"dense, {name}"
        accuracies.axhline(cell.mean, color=colour, linestyle="--", linewidth=1.3, zorder=1, label=label)
    gains.axhline(0, color="#000000", linewidth=1.3, zorder=1)
    gap = min(
        ((1 - low) / (1 - high) for low, high in pairwise(sparse)), default=2.0
    )  # on the logarithmic axis
    for place, name in enumerate(names):
        aside = gap ** (0.06 * ((len(names) - 1) / 2 - place))  # so that no interval hides another
        cells = {sparsity: summary[sparsity][name] for sparsity in sparse if name in summary[sparsity]}
        _line_of(accuracies, name, place, aside, cells)
        over = {s: cell.over(summary[s][BASELINE]) for s, cell in cells.items() if BASELINE in summary[s]}
        if name != BASELINE:
            _line_of(gains, name, place, aside, {s: cell for s, cell in over.items() if cell is not None})
    accuracies.set_title(
        title.replace("$", r"\$").replace(", on ", "\non ").replace("), ", "),\n"), fontsize=11
    )
    accuracies.set_ylabel("test accuracy, %")
    gains.set(
        ylabel="points gained over vanilla", xlabel="sparsity: weights removed, % (log scale of what remains)"
    )
    gains.set_xscale("log")
    gains.invert_xaxis()
    gains.set_xticks(
        [100 * (1 - sparsity) for sparsity in sparse], [f"{100 * sparsity:.3g}" for sparsity in sparse]
    )
    for axes in (accuracies, gains):
        axes.minorticks_off()
        axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    low, high = accuracies.get_ylim()
    accuracies.set_ylim(max(low, -0.5), min(high, 100.5))  # an interval may reach beyond what can be
    handles, labels = accuracies.get_legend_handles_labels()
    number = counted([cell for cells in summary.values() for cell in cells.values()])
    place_below: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.17), "ncols": 5}
    gains.legend(handles, labels, title=f"mean and 95 % interval over {number}", frameon=False, **place_below)


def appearance(name: str, place: int) -> tuple[str, str]:
    """The colour and the marker of a variant, the same in every picture.

    Args:
        name: of the variant.
        place: its number in the picture, for those that have none of their own.

    Returns:
        As matplotlib takes them.
    """
    return _LOOK.get(name, (_OTHERS[place % len(_OTHERS)], "hpd8*"[place % 5]))


def _line_of(axes: Any, name: str, place: int, aside: float, cells: Mapping[float, Cell]) -> None:
    colour, marker = appearance(name, place)
    at = [100 * (1 - sparsity) * aside for sparsity in cells]
    means = [cell.mean for cell in cells.values()]
    widths = [cell.interval or 0.0 for cell in cells.values()]
    low, high = ([mean + sign * width for mean, width in zip(means, widths, strict=True)] for sign in (-1, 1))
    axes.fill_between(at, low, high, color=colour, alpha=0.06, linewidth=0, zorder=2)
    axes.errorbar(at, means, widths, color=colour, elinewidth=1.4, capsize=3, linewidth=0, zorder=3)
    axes.plot(at, means, color=colour, marker=marker, markersize=7, linewidth=2, label=name, zorder=4)
