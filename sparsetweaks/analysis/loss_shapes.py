"""What the landscape's functions return: the loss along a line and over a plane, as text, table and picture."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from sparsetweaks.analysis.evaluation import table_text
from sparsetweaks.analysis.figures import COLORS, SURFACE_COLORS, label, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EUCLIDEAN = "Euclidean distance"
OF_FILTERS = "norms of each filter"
OF_INPUTS = "root mean square change per input element"
SPACES = {"kept": "the kept weights", "all": "all weights", "given": "given directions", "inputs": "inputs"}
CONTOURS = 20


@dataclass(frozen=True, eq=False)
class LossLine:
    """The loss along a line.

    Attributes:
        positions: where, in `unit`.
        losses: the mean loss at each; nan or infinite where the network diverges.
        unit: of the positions.
        between: whether the line runs from one network (position 0) to another (position 1).
        kept: how many of the parameters' entries may be non-zero within the line.
        weights: how many there are.
    """

    positions: tuple[float, ...]
    losses: tuple[float, ...]
    unit: str
    between: bool
    kept: int
    weights: int

    @property
    def barrier(self) -> float:
        """Between two networks: how far the loss rises above the straight line from one's loss to the other's.

        The largest excess over the points of the grid; 0 if it never rises, which is called linearly connected.
        """
        if not self.between:
            raise ValueError(
                "a barrier is between two networks: use loss_line(to=other); along a direction see rise"
            )
        first, last = self.losses[0], self.losses[-1]
        pairs = zip(self.positions, self.losses, strict=True)
        return _worst(value - ((1 - t) * first + t * last) for t, value in pairs)

    @property
    def rise(self) -> float:
        """The highest loss on the line less the one at position 0: along a direction, its sharpness."""
        return _worst(value - self.losses[self.positions.index(0)] for value in self.losses)

    def table(self) -> list[dict[str, Any]]:
        """A row for each point: `position`, `loss`."""
        return [{"position": t, "loss": v} for t, v in zip(self.positions, self.losses, strict=True)]

    def __str__(self) -> str:
        what = f"barrier {self.barrier:.4g}" if self.between else f"rise {self.rise:.4g}"
        where = (
            f"{self.kept:,} of {self.weights:,} weights move"
            if not self.between
            else (f"{self.kept:,} of {self.weights:,} weights kept between them")
        )
        return f"Loss line, {where}; positions in {self.unit}; {what}\n{table_text(self.table())}"

    def plot(self) -> Figure:
        """The loss against the position; between two networks also the straight line between their losses."""
        figure, axes = new_figure()
        axes.plot(self.positions, self.losses, color=COLORS[0], marker="o", markersize=3, label="loss")
        if self.between:
            ends = (self.losses[0], self.losses[-1])
            axes.plot((0, 1), ends, color=COLORS[1], linestyle="--", label="straight line")
            axes.legend()
        title = f"barrier {self.barrier:.3g}" if self.between else ""
        label(axes, x=f"position ({self.unit})", y="mean loss", title=title)
        return figure


@dataclass(frozen=True, eq=False)
class LossPlane:
    """The loss over a plane.

    Attributes:
        over: which weights random directions move, `"kept"` or `"all"`; `"given"` where the directions were given,
            and `"inputs"` for a plane of inputs.
        xs: positions along the first direction, in `unit`.
        ys: positions along the second direction, in `unit`.
        losses: a row for each of `ys`, with a value for each of `xs`.
        unit: of the positions.
        names: what the two directions are.
        cosine: of the angle between the directions, as one vector each.
        beside: the same over all weights, with `over="both"`.
    """

    over: str
    xs: tuple[float, ...]
    ys: tuple[float, ...]
    losses: tuple[tuple[float, ...], ...] = field(repr=False)
    unit: str
    names: tuple[str, str]
    cosine: float
    beside: LossPlane | None = None

    @property
    def center(self) -> float:
        """The loss of the network, or of the inputs, as given."""
        return self.losses[self.ys.index(0)][self.xs.index(0)]

    @property
    def rise(self) -> float:
        """The highest loss on the plane less the one at its centre."""
        return _worst(value - self.center for row in self.losses for value in row)

    def table(self) -> list[dict[str, Any]]:
        """A row for each point: `over`, `x`, `y`, `loss`."""
        rows = [
            {"over": self.over, "x": x, "y": y, "loss": value}
            for y, row in zip(self.ys, self.losses, strict=True)
            for x, value in zip(self.xs, row, strict=True)
        ]
        return rows + (self.beside.table() if self.beside else [])

    def __str__(self) -> str:
        finite = self._finite()
        span = f"from {min(finite):.4g} to {max(finite):.4g}, " if finite else ""
        text = (
            f"Loss plane over {SPACES[self.over]}, {len(self.xs)} x {len(self.ys)} points; positions in {self.unit}\n"
            f"x: {self.names[0]}; y: {self.names[1]}; cosine {self.cosine:.2g}\n"
            f"loss {self.center:.4g} at the centre, {span}"
            f"{len(self.xs) * len(self.ys) - len(finite)} points not finite"
        )
        return f"{text}\n{self.beside}" if self.beside else text

    def plot(self, *, logarithmic: bool = False) -> Figure:
        """Filled contours of the loss; a cross marks the centre, and points that are not finite stay white.

        Two planes side by side have the same colours.

        Args:
            logarithmic: space the contours evenly in the logarithm of the loss, which must be positive: shows
                the basin where the rim is very high.
        """
        shown = [self, *([self.beside] if self.beside else [])]
        finite = [value for plane in shown for value in plane._finite()]
        if not finite:
            raise ValueError(
                "the loss is finite nowhere on the plane: there is nothing to draw. Take a smaller radius"
            )
        low, high = min(finite), max(finite)
        high = high if high > low else low + 1e-6 * max(abs(low), 1)  # a flat plane has one colour
        if logarithmic and low <= 0:
            raise ValueError(
                f"the loss is {low:.3g} somewhere: it has no logarithm, so leave logarithmic out"
            )
        ends = (math.log(low), math.log(high)) if logarithmic else (low, high)
        levels = torch.linspace(*ends, CONTOURS, dtype=torch.float64)
        figure, panels = new_figure(columns=len(shown), size=(5.5 * len(shown), 4.5))
        panels = list(panels) if len(shown) > 1 else [panels]
        for plane, axes in zip(shown, panels, strict=True):
            filled = axes.contourf(
                plane.xs,
                plane.ys,
                [[value if math.isfinite(value) else math.nan for value in row] for row in plane.losses],
                levels=(levels.exp() if logarithmic else levels).tolist(),
                norm="log" if logarithmic else None,
                cmap=SURFACE_COLORS,
                extend="both",
            )
            axes.plot(0, 0, marker="+", color="white", markersize=10, markeredgewidth=2)
            label(
                axes,
                x=f"{plane.names[0]} ({plane.unit})",
                y=f"{plane.names[1]} ({plane.unit})",
                title=f"over {SPACES[plane.over]}",
            )
        figure.colorbar(filled, ax=panels, label="mean loss", format="%.3g")
        return figure

    def _finite(self) -> list[float]:
        return [value for row in self.losses for value in row if math.isfinite(value)]


def _worst(values: Iterable[float]) -> float:
    """The largest, where nan counts as infinite."""
    return max(math.inf if math.isnan(value) else value for value in values)
