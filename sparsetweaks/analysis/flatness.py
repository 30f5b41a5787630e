"""How flat the loss is around a network, in four numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparsetweaks.analysis.evaluation import Data, Loss, table_text
from sparsetweaks.analysis.hessian import (
    PROBES,
    TOLERANCE,
    TopEigenvalues,
    Trace,
    hessian_top_eigenvalues,
    hessian_trace,
)
from sparsetweaks.analysis.landscape import LINE_RADIUS, POINTS, LossLine, loss_line
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
    """

    top: TopEigenvalues = field(repr=False)
    trace: Trace = field(repr=False)
    line: LossLine = field(repr=False)

    def table(self) -> list[dict[str, Any]]:
        """One row: `over`, `weights`, `loss`, `largest_eigenvalue`, `trace` and its error, `mean_eigenvalue`, `rise`."""
        return [
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

    def __str__(self) -> str:
        reach = f"rise: of the loss within {self.line.positions[-1]:g} along the top eigenvector"
        return f"Flatness {self.top.work}\n{table_text(self.table())}\n{reach}"

    def plot(self) -> Figure:
        """The loss along the top eigenvector, with the largest eigenvalue in the title."""
        figure = self.line.plot()
        figure.axes[0].set_title(f"along the top eigenvector, eigenvalue {self.top.values[0]:.3g}")
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
        over: `"kept"` or `"all"`.

    Returns:
        The three results, as one row.

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
    if over not in ("kept", "all"):
        raise ValueError(f"over must be 'kept' or 'all', got {over!r}: call it for each")
    setting: dict[str, Any] = {
        "over": over,
        "where": where,
        "batch_norm": batch_norm,
        "dtype": dtype,
        "chunk_size": chunk_size,
        "keep_graph": keep_graph,
        "generator": generator,
    }
    top = hessian_top_eigenvalues(model, data, loss, tolerance=tolerance, **setting)
    trace = hessian_trace(model, data, loss, probes=probes, **setting)
    line = loss_line(
        model,
        data,
        loss,
        direction=top,
        radius=radius,
        points=points,
        batch_norm=batch_norm,
        dtype=dtype,
        chunk_size=chunk_size,
    )
    return Flatness(top, trace, line)
