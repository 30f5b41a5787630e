"""Pictures of looks at spent tickets, in the forms of the paper's: lines with intervals over seeds, and contours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sparsetweaks.analysis.figures import SURFACE_COLORS
from sparsetweaks.lottery.contrasts import Place, Readings, geometric
from sparsetweaks.lottery.plots import appearance, png_of
from sparsetweaks.lottery.smoothness import ALL, BEST, EVERYTHING, KEPT, Look
from sparsetweaks.lottery.summaries import Cell

CONTOURS = 14
DOTS = 110  # per inch
RISES = {"plane": "median rise", "inputs": "rise"}  # what the titles of contours say
NOTE = "{mean} over {seeds} seeds; bars and bands: 95 % interval"


def picture_of(measure: str, looks: Sequence[Look], found: Readings, setting: str) -> bytes:
    """The picture of a measure, as the content of a PNG.

    Args:
        measure: a name of `smoothness.MEASURES`.
        looks: what was measured.
        found: the same, by place.
        setting: network, data and recipe, for the title.

    Returns:
        The bytes.
    """
    if measure == "curvature":
        return _curvature(looks, found, setting)
    if measure == "line":
        return _lines(looks, setting)
    if measure == "activations":
        return _activations(looks, found, setting)
    return _contours(measure, looks, found, setting)


def _curvature(looks: Sequence[Look], found: Readings, setting: str) -> bytes:
    """Eigenvalues against sparsity, or against epochs where there are several; over each space."""
    epochs = sorted({look.epoch for look in looks})
    panels = [
        (KEPT, "eigenvalue", f"over the {KEPT}, which training moves"),
        (ALL, "eigenvalue", f"over {ALL}, pruned ones too"),
    ]
    if len(epochs) > 1:
        panels.append((KEPT, "gradient flow", f"over the {KEPT}"))
    figure, axes = _figure(len(panels), setting)
    for panel, (space, quantity, title) in zip(axes, panels, strict=True):
        wanted = {place: cells for place, cells in found.items() if place[2:] == (space, quantity)}
        if len(epochs) > 1:
            _curves(panel, {place.epoch: cells for place, cells in wanted.items()}, looks)
            panel.set_xlabel("epochs of training")
        else:
            _over_sparsities(panel, {place.sparsity: cells for place, cells in wanted.items()}, looks)
        panel.set_ylabel(
            "largest Hessian eigenvalue" if quantity == "eigenvalue" else "effective gradient flow"
        )
        panel.set_yscale("log")
        panel.set_title(title, fontsize=10)
    _match(axes[:2])
    _plain_ticks(axes)
    return _finished(figure, axes[0], looks)


def _lines(looks: Sequence[Look], setting: str) -> bytes:
    """The test loss along the top eigenvector of each space."""
    figure, axes = _figure(2, setting)
    for panel, (space, title) in zip(
        axes,
        ((KEPT, f"eigenvector over the {KEPT}"), (ALL, f"eigenvector over {ALL}, pruned ones too")),
        strict=True,
    ):
        points: dict[float, dict[str, Cell]] = {}
        for look in looks:
            for x, y in zip(look.drawn[space]["x"], look.drawn[space]["y"], strict=True):
                points.setdefault(x, {}).setdefault(look.variant, Cell({})).by_seed[look.seed] = y
        _curves(panel, points, looks)
        panel.set(
            title=title,
            xlabel="distance along the eigenvector (Euclidean)",
            ylabel="test loss, nats (log scale)",
        )
        panel.title.set_fontsize(10)
        panel.set_yscale("log")
    _match(axes)
    _plain_ticks(axes)
    return _finished(figure, axes[0], looks)


def _activations(looks: Sequence[Look], found: Readings, setting: str) -> bytes:
    """The share of zeros in each stage against sparsity: those within the authors' threshold, and exact ones dashed."""
    stages = sorted({place.space for place in found if place.space.startswith("stage")})
    figure, axes = _figure(len(stages), setting)
    for panel, stage in zip(axes, stages, strict=True):
        for quantity, dashed in (("near zeros", False), ("exact zeros", True)):
            cells = {p.sparsity: found[p] for p in found if p[2:] == (stage, quantity)}
            _over_sparsities(panel, cells, looks, logarithmic=False, dashed=dashed)
        panel.set_title(stage, fontsize=10)
        panel.set(ylabel="activations that are zero, %", ylim=(-2, None))
    _match(axes)
    return _finished(figure, axes[0], looks)


def _contours(measure: str, looks: Sequence[Look], found: Readings, setting: str) -> bytes:
    """Filled contours of the first seed's planes, all on one scale: a row for each space, a column for each variant."""
    seed = looks[0].seed
    shown = [look for look in looks if look.seed == seed]
    spaces = list(shown[0].numbers)
    columns = len(shown) if len(spaces) > 1 else 3
    rows = len(spaces) * -(-len(shown) // columns)
    figure, axes = _figure(columns, setting, rows=rows, size=(2.9 * columns + 0.9, 2.75 * rows + 0.9))
    panels = axes if rows == 1 else [panel for row in axes for panel in row]
    places = [(space, look) for space in spaces for look in shown]
    finite = [
        v for space, look in places for row in look.drawn[space]["losses"] for v in row if math.isfinite(v)
    ]
    ends = (math.log(max(min(finite), 1e-4)), math.log(_high(finite)))
    levels = [math.exp(ends[0] + (ends[1] - ends[0]) * step / CONTOURS) for step in range(CONTOURS + 1)]
    for number, (panel, (space, look)) in enumerate(zip(panels, places, strict=False)):
        plane = look.drawn[space]
        losses = [[value if math.isfinite(value) else math.nan for value in row] for row in plane["losses"]]
        style: dict[str, Any] = {"levels": levels, "norm": "log", "extend": "max"}
        filled = panel.contourf(plane["x"], plane["y"], losses, cmap=SURFACE_COLORS, **style)
        panel.contour(plane["x"], plane["y"], losses, levels=levels, colors="#ffffff", linewidths=0.4)
        panel.plot(0, 0, marker="+", color="#ffffff", markersize=9, markeredgewidth=2)
        cell = found[Place(look.sparsity, look.epoch, space, RISES[measure])][look.variant]
        panel.set_title(f"{look.variant}: {RISES[measure]} {cell.mean:.2f}", fontsize=10)
        panel.set_aspect("equal")
        if number % columns == 0:
            panel.set_ylabel(f"{space}\n{plane['names'][1]}" if len(spaces) > 1 else plane["names"][1])
        if number >= (rows - 1) * columns:
            panel.set_xlabel(plane["names"][0])
    unit = {"plane": "norms of each filter", "inputs": "standard deviations of a pixel"}[measure]
    part = {"plane": "training", "inputs": "test"}[measure]
    figure.colorbar(
        filled, ax=axes, label=f"{part} loss, nats (log scale)", ticks=levels[::2], format="%.2g", aspect=30
    )
    when = "" if looks[0].epoch == BEST else f" after epoch {looks[0].epoch}"
    count = len({look.seed for look in looks})
    figure.supxlabel(
        f"seed {seed}{when}; distances in {unit}; rises over the centre are means over {count} seeds",
        fontsize=9,
    )
    return png_of(figure)


def _high(finite: list[float]) -> float:
    """An upper end of the scale that a few far points do not stretch."""
    return max(sorted(finite)[int(0.98 * (len(finite) - 1))], 1.01 * max(min(finite), 1e-4))


# -------------------------------------------------------------------------------------------------- their parts


def _figure(
    columns: int, setting: str, *, rows: int = 1, size: tuple[float, float] | None = None
) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size or (4.4 * columns + 0.6, 4.6), layout="constrained", dpi=DOTS)
    figure.suptitle(setting.replace("$", r"\$"), fontsize=10)
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, axes[0] if rows == 1 else axes


def _over_sparsities(
    panel: Any,
    cells: Mapping[float, Mapping[str, Cell]],
    looks: Sequence[Look],
    *,
    logarithmic: bool = True,
    dashed: bool = False,
) -> None:
    """A line per variant, at evenly spaced sparsities: each level keeps the same fraction of the one before."""
    at = {sparsity: place for place, sparsity in enumerate(sorted(cells))}
    names = _variants(looks)
    for number, name in enumerate(names):
        aside = 0.07 * (number - (len(names) - 1) / 2)
        own = [(at[s] + aside, cells[s][name]) for s in sorted(cells) if name in cells[s]]
        _line(panel, name, number, own, logarithmic=logarithmic, dashed=dashed)
    panel.set_xticks(list(at.values()), [f"{100 * s:.3g}" if s else "dense" for s in at])
    panel.set_xlabel("sparsity: weights removed, %")


def _curves(panel: Any, points: Mapping[float, Mapping[str, Cell]], looks: Sequence[Look]) -> None:
    """A line per variant with a band."""
    for number, name in enumerate(_variants(looks)):
        own = [(x, points[x][name]) for x in sorted(points)]
        _line(panel, name, number, own, logarithmic=True, band=True)


def _line(
    panel: Any,
    name: str,
    number: int,
    cells: Sequence[tuple[float, Cell]],
    *,
    logarithmic: bool,
    band: bool = False,
    dashed: bool = False,
) -> None:
    colour, marker = appearance(name, number)
    xs = [x for x, _ in cells]
    found = [geometric(cell) if logarithmic else _arithmetic(cell) for _, cell in cells]
    means, lows, highs = zip(*found, strict=True)
    label = None if dashed else name
    if band:
        panel.fill_between(xs, lows, highs, color=colour, alpha=0.15, linewidth=0)
        every = max(1, len(xs) // 8)
        panel.plot(
            xs, means, color=colour, marker=marker, markevery=every, markersize=6, linewidth=2, label=label
        )
        return
    errors = [
        [mean - low for mean, low in zip(means, lows, strict=True)],
        [high - mean for mean, high in zip(means, highs, strict=True)],
    ]
    style = "--" if dashed else "-"
    panel.errorbar(
        xs, means, errors, color=colour, marker=marker, markersize=6, linewidth=1.2 if dashed else 2, linestyle=style,
        markerfacecolor="#ffffff" if dashed else colour, elinewidth=1.3, capsize=3, label=label,
    )  # fmt: skip


def _arithmetic(cell: Cell) -> tuple[float, float, float]:
    wide = cell.interval or 0.0
    return cell.mean, cell.mean - wide, cell.mean + wide


def _variants(looks: Sequence[Look]) -> list[str]:
    return list(dict.fromkeys(look.variant for look in looks))


def _match(axes: Sequence[Any]) -> None:
    """The same scale in panels that are to be compared."""
    low, high = min(each.get_ylim()[0] for each in axes), max(each.get_ylim()[1] for each in axes)
    for each in axes:
        each.set_ylim(low, high)


def _finished(figure: Any, first: Any, looks: Sequence[Look]) -> bytes:
    for panel in figure.axes:
        panel.grid(axis="y", color="#e4e4e4", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    logarithmic = first.get_yscale() == "log"
    mean = "geometric mean" if logarithmic else "mean"
    note = NOTE.format(mean=mean, seeds=len({look.seed for look in looks}))
    if any(EVERYTHING in look.numbers for look in looks):
        note += "; solid: at most 0.01, as the authors count; dashed: exactly zero"
    handles, labels = first.get_legend_handles_labels()
    figure.legend(handles, labels, title=note, loc="outside lower center", ncols=len(labels), frameon=False)
    return png_of(figure)


def _plain_ticks(axes: Sequence[Any]) -> None:
    """Plain numbers on logarithmic axes, where they span little too."""
    from matplotlib.ticker import LogLocator, NullFormatter

    for panel in axes:
        low, high = panel.get_ylim()
        panel.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 300 else (1.0, 2.0, 5.0)))
        panel.yaxis.set_minor_formatter(NullFormatter())
        if high < 1e5:
            panel.yaxis.set_major_formatter("{x:g}")
