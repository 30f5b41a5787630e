"""How flat the loss is around a network, in four numbers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparsetweaks.analysis.evaluation import Data, Loss, table_text
from sparsetweaks.analysis.figures import COLORS, label, new_figure
from sparsetweaks.analysis.hessian import (
    ITERATIONS,
    PROBES,
    TOLERANCE,
    TopEigenvalues,
    Trace,
    hessian_top_eigenvalues,
    hessian_trace,
)
from sparsetweaks.analysis.landscape import LINE_RADIUS, POINTS, loss_line
from sparsetweaks.analysis.loss_shapes import LossLine
from sparsetweaks.analysis.options import (
    Progress,
    check_choice,
    check_odd,
    check_positive,
    check_progress,
    check_whole,
    generator_of,
)
from sparsetweaks.analysis.subspace import Where

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Flatness:
    """What `flatness` found; smaller is flatter.

    Attributes:
        top: the largest eigenvalue of the loss's Hessian, with its vector.
        trace: of that Hessian.
        line: the loss along that eigenvector.
        beside: the same over all weights, with `over="both"`.
    """

    top: TopEigenvalues = field(repr=False)
    trace: Trace = field(repr=False)
    line: LossLine = field(repr=False)
    beside: Flatness | None = None

    def table(self) -> list[dict[str, Any]]:
        """One row: `over`, `weights`, `loss`, `largest_eigenvalue`, `trace` and its error, `mean_eigenvalue`, `rise`."""
        rows = [
            {
                "over": self.top.work.over,
                "weights": self.top.work.dimension,
                "loss": self.top.work.loss,
                "largest_eigenvalue": self.top.values[0],
                "trace": self.trace.value,
                "trace_standard_error": self.trace.standard_error,
                "mean_eigenvalue": self.trace.mean_eigenvalue,
                "rise": self.line.rise,
            }
        ]
        return rows + (self.beside.table() if self.beside else [])

    def __str__(self) -> str:
        reach = f"rise: of the loss within {self.line.positions[-1]:g} along the top eigenvector"
        works = [str(each.top.work) for each in (self, self.beside) if each]
        return "\n".join([f"Flatness {works[0]}", *works[1:], table_text(self.table()), reach])

    def plot(self) -> Figure:
        """The loss along the top eigenvector, with the largest eigenvalue beside it."""
        figure, axes = new_figure()
        for each, color in zip([self, *([self.beside] if self.beside else [])], COLORS, strict=False):
            space = "all" if each.top.work.over == "all" else "kept"
            name = f"{space} weights, eigenvalue {each.top.values[0]:.3g}"
            axes.plot(
                each.line.positions, each.line.losses, color=color, marker="o", markersize=3, label=name
            )
        axes.legend()
        label(axes, x=f"position along the top eigenvector ({self.line.unit})", y="mean loss")
        return figure


def flatness(
    model: nn.Module,
    data: Data,
    loss: Loss,
    *,
    radius: float = LINE_RADIUS,
    points: int = POINTS,
    probes: int = PROBES,
    tolerance: float = TOLERANCE,
    over: str = "kept",
    where: Where = None,
    batch_norm: str = "eval",
    dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
    keep_graph: bool | None = None,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> Flatness:
    """Summarise how flat the loss is over the kept weights: curvature at the top and in all, and how far it holds.

    The largest eigenvalue and the trace of the Hessian are of the second order and at the point itself; the
    rise of the loss within `radius` along the top eigenvector sees what lies around it (paper, figure 10). A
    network of smaller weights looks sharper in all of these, though it computes the same: compare networks of
    one architecture and recipe.

    Args:
        model: as in `hessian_top_eigenvalues`, and so are `data`, `loss` and the options not named here.
        radius: how far along the eigenvector to go to both sides, a Euclidean distance.
        points: on that line, an odd number.
        probes: of the trace.
        over: `"kept"`, `"all"`, or `"both"`, side by side.
        progress: called after each product and point with (steps so far, at most so many).

    Returns:
        The three results, as one row for each space.

    Raises:
        ValueError: as `hessian_top_eigenvalues` and `loss_line`.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> batch = torch.randn(32, 4), torch.randint(3, (32,))
        >>> row = flatness(model, batch, nn.functional.cross_entropy, probes=10).table()[0]
        >>> row["largest_eigenvalue"] > row["mean_eigenvalue"] > 0, row["rise"] > 0
        (True, True)
    """
    check_choice("over", over, ("kept", "all", "both"))
    check_positive("radius", radius)
    check_odd("points", points)
    check_whole("probes", probes, least=2)
    check_progress(progress)
    draw, spaces = generator_of(generator), ("kept", "all") if over == "both" else (over,)
    state, steps = draw.get_state(), ITERATIONS + probes + points
    common: dict[str, Any] = {"batch_norm": batch_norm, "dtype": dtype, "chunk_size": chunk_size}
    curved: dict[str, Any] = {**common, "where": where, "keep_graph": keep_graph}

    def same() -> torch.Generator:  # for each analysis in each space, as if it were called alone
        return draw.set_state(state)

    def after(before: int) -> Progress:
        return lambda done, _: progress(before + done, steps * len(spaces)) if progress else None

    found = []
    for number, space in enumerate(spaces):
        start = number * steps
        there = {"over": space, **curved}
        top = hessian_top_eigenvalues(
            model, data, loss, tolerance=tolerance, generator=same(), progress=after(start), **there
        )
        start += ITERATIONS
        trace = hessian_trace(
            model, data, loss, probes=probes, generator=same(), progress=after(start), **there
        )
        start += probes
        line = loss_line(
            model, data, loss, direction=top, radius=radius, points=points, progress=after(start), **common
        )
        found.append(Flatness(top, trace, line))
    return found[0] if len(found) == 1 else replace(found[0], beside=found[1])
