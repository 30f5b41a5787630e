"""Figures that belong to nobody else: no pyplot, no global style, matplotlib imported when one is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which stay apart for colour-blind readers, on white and in grey.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
SURFACE_COLORS = "cividis"  # the map of matplotlib that is made for colour-blind readers
SIZE = (6.0, 4.0)  # inches


def new_figure(
    *, columns: int = 1, rows: int = 1, size: tuple[float, float] | None = None
) -> tuple[Figure, Any]:
    """A figure of our own and its axes: one, or an array of them where there are several.

    Raises:
        ImportError: matplotlib is not installed; says how to install it.
    """
    try:
        from sparsetweaks.analysis.shown import ShownFigure
    except ImportError as error:
        raise ImportError("plotting needs matplotlib: pip install matplotlib") from error
    figure = ShownFigure(figsize=size or (SIZE[0] * columns, SIZE[1] * rows), layout="constrained")
    return figure, figure.subplots(rows, columns)


def label(axes: Axes, *, x: str, y: str, title: str = "") -> None:
    """Name what the axes show, with units."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if title:
        axes.set_title(title)
