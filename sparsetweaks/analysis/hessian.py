"""The curvature of the loss where a sparse network can move: eigenvalues, trace and density of its Hessian.

The Hessian is that of the mean loss over all the data, known by its products with vectors alone (Pearlmutter
1994; Yao et al. 2020 for neural networks). By default it is restricted to the kept weights: a direction that
training can never take says nothing about training.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from sparsetweaks.analysis.curvature import Curvature
from sparsetweaks.analysis.evaluation import (
    Batches,
    Data,
    Loss,
    table_text,
    undisturbed,
    warn,
    working_copy,
)
from sparsetweaks.analysis.figures import COLORS, label, new_figure
from sparsetweaks.analysis.lanczos import (
    MISSED,
    WHICH,
    quadrature,
    random_signs,
    random_vector,
    top_eigenpairs,
)
from sparsetweaks.analysis.options import (
    Progress,
    check_choice,
    check_flag,
    check_positive,
    check_progress,
    check_share,
    check_whole,
    generator_of,
)
from sparsetweaks.analysis.subspace import Subspace, Where, new_seed, subspace
from sparsetweaks.masks import lift_masks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Result = TypeVar("Result")

TOLERANCE = 1e-3  # PyHessian's default too, which however compares two iterates and not an error
ITERATIONS = 200
PROBES = 100  # of the trace, as in PyHessian
DENSITY_PROBES = 4
STEPS = 80  # of each probe; Ghorbani et al. (2019) have 90
GRID = 1024
WIDTH_OF_RANGE = 0.01
DECADES = 100  # a larger ratio of eigenvalues is drawn logarithmically
BLOCK = 8  # probes that share one pass over the data


class NotConvergedWarning(UserWarning):
    """An iteration was stopped before its result was as exact as asked for."""


# ------------------------------------------------------------------------------------------------------------
# Results


@dataclass(frozen=True, eq=False)
class Work:
    """Where a Hessian was looked at, and what it cost."""

    over: str
    """`"kept"` or `"all"`."""
    dimension: int
    """How many weights the Hessian is over."""
    weights: int
    """How many trainable weights were chosen, pruned ones counted."""
    masked: bool
    """Whether the model has masks; without any, all its weights are kept."""
    loss: float
    """The mean loss there."""
    products: int
    """How many products of the Hessian, over all the data, with a vector it took."""
    gradients: int
    """How many times the gradient over all the data was built."""

    def __str__(self) -> str:
        which = "all trainable weights" if self.over == "all" else "the kept weights"
        mask = "" if self.masked else " (the model has no masks)"
        return (
            f"over {which}, {self.dimension:,} of {self.weights:,}{mask}; loss {self.loss:.6g}; "
            f"{self.products} products, {self.gradients} gradients"
        )


@dataclass(frozen=True, eq=False)
class TopEigenvalues:
    """The top of a Hessian's spectrum; `print` it, `plot()` it, or take its `table()`.

    Attributes:
        values: the eigenvalues, in the order that was asked for.
        errors: for each value how far some eigenvalue is from it at most, from the residual |H v - value v|, and no
            less than the rounding of the products. It does not say which eigenvalue: see `converged`.
        vectors: for each value its eigenvector, of unit length, as a tensor for each parameter by name:
            exactly zero at pruned weights. `loss_line(direction=)` takes one.
        converged: whether every error is within the tolerance, and the values are those asked for: that another
            eigenvalue belongs among them, and lies further than the tolerance from each, has a chance of at most about
            `missed`, 1 % by default, over the random starts, for each such eigenvalue.
        work: where and at what cost.
        beside: the same over all weights, with `over="both"`.
    """

    values: tuple[float, ...]
    errors: tuple[float, ...]
    vectors: tuple[dict[str, Tensor], ...] = field(repr=False)
    converged: bool
    work: Work
    beside: TopEigenvalues | None = None

    def table(self) -> list[dict[str, Any]]:
        """A row for each eigenvalue: `over`, `number` from 1, `eigenvalue`, `error`."""
        rows = [
            {"over": self.work.over, "number": number, "eigenvalue": value, "error": error}
            for number, (value, error) in enumerate(zip(self.values, self.errors, strict=True), 1)
        ]
        return rows + (self.beside.table() if self.beside else [])

    def __str__(self) -> str:
        note = "" if self.converged else "not converged: raise iterations\n"
        lines = [f"Hessian eigenvalues {self.work}", *([str(self.beside.work)] if self.beside else [])]
        return "\n".join([*lines, note + table_text(self.table())])

    def plot(self) -> Figure:
        """Bars of the eigenvalues by their number, with the bounds on their errors; logarithmic over decades of size."""
        figure, axes = new_figure()
        shown = [self, *([self.beside] if self.beside else [])]
        for index, (each, color) in enumerate(zip(shown, COLORS, strict=False)):
            width = 0.8 / len(shown)
            places = [n + 1 + (index - (len(shown) - 1) / 2) * width for n in range(len(each.values))]
            axes.bar(places, each.values, width, yerr=each.errors, color=color, label=_space_label(each.work))
        axes.set_xticks(range(1, len(self.values) + 1))
        values = [value for each in shown for value in each.values]
        if 0 < DECADES * min(values) < max(values):
            axes.set_yscale("log")
        else:
            axes.axhline(0, color="black", linewidth=0.8)
        axes.legend()
        label(axes, x="number of the eigenvalue", y="eigenvalue of the loss's Hessian (loss / weight²)")
        return figure


@dataclass(frozen=True, eq=False)
class Trace:
    """An estimate of a Hessian's trace, the sum of its eigenvalues.

    Attributes:
        value: the mean over the probes.
        standard_error: of that mean.
        samples: v^T H v of each probe.
        work: where and at what cost.
        beside: the same over all weights, with `over="both"`.
    """

    value: float
    standard_error: float
    samples: tuple[float, ...] = field(repr=False)
    work: Work
    beside: Trace | None = None

    @property
    def mean_eigenvalue(self) -> float:
        """The trace by the number of weights: comparable between sparsities."""
        return self.value / self.work.dimension

    def table(self) -> list[dict[str, Any]]:
        """One row: `over`, `trace`, `standard_error`, `mean_eigenvalue`, `probes`."""
        row = {
            "over": self.work.over,
            "trace": self.value,
            "standard_error": self.standard_error,
            "mean_eigenvalue": self.mean_eigenvalue,
            "probes": len(self.samples),
        }
        return [row] + (self.beside.table() if self.beside else [])

    def __str__(self) -> str:
        lines = [f"Hessian trace {self.work}", *([str(self.beside.work)] if self.beside else [])]
        return "\n".join([*lines, table_text(self.table())])

    def plot(self) -> Figure:
        """The estimate as probes are added, with twice its standard error."""
        figure, axes = new_figure()
        for each, color in zip([self, *([self.beside] if self.beside else [])], COLORS, strict=False):
            samples = torch.tensor(each.samples, dtype=torch.float64)
            counts = range(2, len(samples) + 1)
            means = [samples[:count].mean().item() for count in counts]
            spread = [2 * samples[:count].std().item() / math.sqrt(count) for count in counts]
            axes.plot(counts, means, color=color, label=_space_label(each.work))
            lower = [mean - by for mean, by in zip(means, spread, strict=True)]
            upper = [mean + by for mean, by in zip(means, spread, strict=True)]
            axes.fill_between(counts, lower, upper, color=color, alpha=0.2, linewidth=0)
        axes.legend()
        label(axes, x="probes", y="trace of the loss's Hessian (± 2 standard errors)")
        return figure


@dataclass(frozen=True, eq=False)
class Density:
    """An estimate of how a Hessian's eigenvalues are spread.

    Attributes:
        nodes: for each probe those of its quadrature, in units of eigenvalues.
        weights: for each probe those of its nodes, which sum to 1.
        grid: where the density is evaluated, in units of eigenvalues.
        density: there, per unit of eigenvalue; its integral is 1.
        width: standard deviation of the Gaussian that each node is spread to, in units of eigenvalues.
        work: where and at what cost.
        beside: the same over all weights, with `over="both"`.
    """

    nodes: tuple[tuple[float, ...], ...] = field(repr=False)
    weights: tuple[tuple[float, ...], ...] = field(repr=False)
    grid: tuple[float, ...] = field(repr=False)
    density: tuple[float, ...] = field(repr=False)
    width: float
    work: Work
    beside: Density | None = None

    def moment(self, power: int) -> float:
        """The mean of the eigenvalues to this power, as the probes estimate it."""
        pairs = zip(self.nodes, self.weights, strict=True)
        each = [sum(w * n**power for n, w in zip(nodes, weights, strict=True)) for nodes, weights in pairs]
        return sum(each) / len(each)

    def table(self) -> list[dict[str, Any]]:
        """A row for each point of the grid: `over`, `eigenvalue`, `density`."""
        rows: list[dict[str, Any]] = [
            {"over": self.work.over, "eigenvalue": value, "density": density}
            for value, density in zip(self.grid, self.density, strict=True)
        ]
        return rows + (self.beside.table() if self.beside else [])

    def __str__(self) -> str:
        lines = [f"Hessian density {self.work}", *([str(self.beside.work)] if self.beside else [])]
        rows = [
            {
                "over": each.work.over,
                "lowest": min(map(min, each.nodes)),
                "highest": max(map(max, each.nodes)),
                "mean": each.moment(1),
                "root mean square": math.sqrt(each.moment(2)),
                "kernel width": each.width,
                "probes": len(each.nodes),
            }
            for each in [self, *([self.beside] if self.beside else [])]
        ]
        return "\n".join([*lines, table_text(rows)])

    def plot(self) -> Figure:
        """The density, logarithmic; the width of its kernel is in the title."""
        figure, axes = new_figure()
        shown = [self, *([self.beside] if self.beside else [])]
        for each, color in zip(shown, COLORS, strict=False):
            axes.semilogy(each.grid, each.density, color=color, label=_space_label(each.work))
        top = max(max(each.density) for each in shown)
        least = min(1 / (each.work.dimension * each.width) for each in shown)  # about one eigenvalue's height
        axes.set_ylim(bottom=min(least, top) / 10, top=2 * top)
        axes.legend()
        widths = " and ".join(f"{each.width:.3g}" for each in shown)
        label(
            axes,
            x="eigenvalue of the loss's Hessian",
            y="density (per unit of eigenvalue)",
            title=f"Gaussian kernel of standard deviation {widths}",
        )
        return figure


def _space_label(work: Work) -> str:
    return f"{'all' if work.over == 'all' else 'kept'} weights ({work.dimension:,})"


# ------------------------------------------------------------------------------------------------------------
# Analyses


def hessian_top_eigenvalues(
    model: nn.Module,
    data: Data,
    loss: Loss,
    *,
    k: int = 1,
    which: str = "largest",
    over: str = "kept",
    where: Where = None,
    tolerance: float = TOLERANCE,
    missed: float = MISSED,
    iterations: int = ITERATIONS,
    batch_norm: str = "eval",
    dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
    keep_graph: bool | None = None,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> TopEigenvalues:
    """The top eigenvalues of the loss's Hessian over the kept weights, with vectors (paper 4.2, figure 2).

    By Lanczos' method with full reorthogonalisation, from a random start. Two tests stop it. The residual
    r = |H v - value v| says that some eigenvalue lies within r of the value, and within r^2 / gap where the
    neighbours are far: so the tolerance bounds the error of each value, and a vector is good to about the root of
    it. That no other eigenvalue belongs among the k, a residual cannot say. It follows from how little the newest
    direction has grown: an eigenvalue that lies further than the tolerance from all values, and belongs among them,
    is missed only where the start holds so little of its vector as one random start in a hundred does (`missed`). What
    lies closer together than the tolerance may be found once.

    Dropout is off. The model, its buffers, modes and gradients, and PyTorch's random state stay untouched.
    Besides the graph it holds up to 2 * k + 60 vectors of as many numbers as weights are kept.

    Args:
        model: any network, masked in any form or not at all (then all its weights are kept). For one that
            holds plain zeros give `apply_masks(model, find_masks(model, zeros=True))`; there is an
            `UnmaskedZerosWarning` otherwise.
        data: one pair (inputs, targets), or something that can be gone through repeatedly for such pairs, a
            list or a `DataLoader` say, of any length: one batch is held at a time. The inputs are a tensor, or
            a tuple or mapping of them, and targets whatever the loss takes: `(inputs, (classes, boxes))` is one
            pair. Where both are tuples, write `[(inputs, targets)]`: two pairs in a tuple may be either, and are
            refused. Batches go to the model's device and precision.
        loss: of (outputs, targets), a scalar: the mean over the examples of a batch. Batches of different
            sizes are weighted, so that the loss is the mean over all examples. One that is no such mean (classes
            have weights, say) is a mean over batches as they come, and is refused where `chunk_size` cuts them.
        k: how many, at least 1.
        which: `"largest"`, `"smallest"` (most negative) or largest `"magnitude"`.
        over: `"kept"` weights, `"all"` of them (as if nothing had been pruned, at the same point), or
            `"both"`, side by side. All trainable parameters count, also of BatchNorm, and biases; complex ones
            are refused.
        where: glob pattern(s) on the names of parameters, or of the modules that hold them, to restrict it
            to; None for all.
        tolerance: bound on the relative error of each value, > 0, and how far apart eigenvalues are told. Below
            about 1e-5, ask for `dtype=torch.float64`: float32 products are no better than that.
        missed: the chance, over the random start, that an eigenvalue which belongs among the k is missed for another,
            in (0, 1]. At 1 the residual alone decides, as elsewhere: that saves a product or two, and takes the
            second for the first in half of all runs where these are within 2 %.
        iterations: at most so many products, at least k. Where they do not suffice there is a
            `NotConvergedWarning`, and `converged` is False.
        batch_norm: `"eval"` normalises by the running statistics, `"train"` by each batch as it is given.
        dtype: to compute in; default the model's (float32 for half precision).
        chunk_size: at most so many examples go through the network at once; default: batches as they come. It
            changes no result: one more pass over the data checks that of the loss, and with `batch_norm="train"` it
            is refused, as cutting a batch changes its statistics.
        keep_graph: whether to build the gradient's graph once and keep it for all products, which saves a
            third of the time and takes memory for all the data. Default: only if the data are one pair and no
            `chunk_size` is given.
        generator: of the random start; default: one seeded with 0, so that the same call gives the same numbers.
            Of it comes one seed, and with that each parameter's part is drawn by the parameter's name: networks that
            are compared start alike in what they share, whatever else differs.
        progress: called after each product with (products so far, at most so many).

    Returns:
        Values, error bounds, vectors, and what it cost.

    Raises:
        ValueError: an option out of range; nothing trainable, something complex, everything pruned, or fewer than k weights;
            weights or a loss that are not finite; data without a batch, or that do not fit; a loss that is
            no scalar, or with `chunk_size` no mean over examples.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> batch = torch.randn(32, 4), torch.randint(3, (32,))
        >>> top = hessian_top_eigenvalues(model, batch, nn.functional.cross_entropy, k=2)
        >>> top.converged, top.values[0] > top.values[1] > 0
        (True, True)
        >>> list(top.vectors[0])
        ['0.bias', '0.weight', '2.bias', '2.weight']
    """
    check_whole("k", k)
    check_whole("iterations", iterations, least=k)
    check_choice("which", which, WHICH)
    check_positive("tolerance", tolerance)
    check_share("missed", missed)
    check_progress(progress)

    def analyse(curvature: Curvature, space: Subspace, draw: torch.Generator) -> _Eigen:
        if k > space.dimension:
            raise ValueError(f"k={k} eigenvalues were asked for, but only {space.dimension} weights are kept")
        found = top_eigenpairs(
            lambda vector: curvature.product(space, vector),
            space.random(random_vector, new_seed(draw)),
            k=k,
            which=which,
            tolerance=tolerance,
            missed=missed,
            iterations=iterations,
            generator=draw,
            on_step=lambda step: progress(step, iterations) if progress else None,
        )
        if not found.converged:
            warn(
                f"after {iterations} products the bounds on the errors are up to {max(found.errors):.2g}, and larger "
                "eigenvalues may be hidden: raise iterations, or tolerance",
                NotConvergedWarning,
            )
        vectors = tuple(space.named(vector) for vector in found.vectors)
        return _Eigen(tuple(found.values), tuple(found.errors), vectors, found.converged)

    setting = _Setting(over, where, batch_norm, dtype, chunk_size, keep_graph, generator)
    parts = _by_space(model, data, loss, setting, analyse)
    return _beside([TopEigenvalues(*found, work) for found, work in parts])


class _Eigen(NamedTuple):
    values: tuple[float, ...]
    errors: tuple[float, ...]
    vectors: tuple[dict[str, Tensor], ...]
    converged: bool


def hessian_trace(
    model: nn.Module,
    data: Data,
    loss: Loss,
    *,
    probes: int = PROBES,
    over: str = "kept",
    where: Where = None,
    batch_norm: str = "eval",
    dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
    keep_graph: bool | None = None,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> Trace:
    """The trace of the loss's Hessian over the kept weights, with its standard error.

    By Hutchinson's method: the mean of v^T H v over vectors v of random signs, which has the trace as its
    expectation. Its error falls with the root of the number of probes.

    Args:
        model: as in `hessian_top_eigenvalues`, and so are `data`, `loss` and the options not named here.
        probes: how many random vectors, at least 2.
        progress: called with (products so far, all).

    Returns:
        The estimate, its standard error and the samples behind it.

    Raises:
        ValueError: as `hessian_top_eigenvalues`.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Linear(4, 1, bias=False)
        >>> batch = torch.eye(4), torch.zeros(4, 1)  # the Hessian is the identity times 2 / 4
        >>> trace = hessian_trace(model, batch, nn.functional.mse_loss, probes=8)
        >>> trace.value, trace.standard_error
        (2.0, 0.0)
    """
    check_whole("probes", probes, least=2)
    check_progress(progress)

    def analyse(curvature: Curvature, space: Subspace, draw: torch.Generator) -> list[float]:
        samples = list[float]()
        while len(samples) < probes:
            signs = [
                space.random(random_signs, new_seed(draw)) for _ in range(min(BLOCK, probes - len(samples)))
            ]
            for sign, product in zip(signs, curvature.products(space, signs), strict=True):
                samples.append(torch.dot(sign.double(), product.double()).item())
            if progress:
                progress(len(samples), probes)
        return samples

    setting = _Setting(over, where, batch_norm, dtype, chunk_size, keep_graph, generator)
    return _beside([_trace(s, work) for s, work in _by_space(model, data, loss, setting, analyse)])


def _trace(samples: list[float], work: Work) -> Trace:
    found = torch.tensor(samples, dtype=torch.float64)
    return Trace(found.mean().item(), found.std().item() / math.sqrt(len(samples)), tuple(samples), work)


def hessian_density(
    model: nn.Module,
    data: Data,
    loss: Loss,
    *,
    probes: int = DENSITY_PROBES,
    steps: int = STEPS,
    width: float | None = None,
    grid: int = GRID,
    over: str = "kept",
    where: Where = None,
    batch_norm: str = "eval",
    dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
    keep_graph: bool | None = None,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> Density:
    """The density of the Hessian's eigenvalues over the kept weights (Ghorbani et al. 2019).

    By stochastic Lanczos quadrature: each probe, a vector of random signs, sees the spectrum through the nodes
    and weights of its own Lanczos run, whose moments below the power 2 * steps are exact for that probe. The
    mean over probes is then smoothed with a Gaussian.

    Args:
        model: as in `hessian_top_eigenvalues`, and so are `data`, `loss` and the options not named here.
        probes: how many random vectors, at least 1.
        steps: Lanczos steps of each, at least 1; as many vectors of the kept weights are held.
        width: standard deviation of the Gaussian, in units of eigenvalues, > 0; default: 1 % of the range
            that the nodes span.
        grid: how many points, at least 2, spread evenly from 4 widths below the lowest node to 4 above the
            highest.
        progress: called with (products so far, at most so many).

    Returns:
        Nodes and weights, and the smoothed density with the width that was used.

    Raises:
        ValueError: as `hessian_top_eigenvalues`.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> batch = torch.randn(32, 4), torch.randint(3, (32,))
        >>> density = hessian_density(model, batch, nn.functional.cross_entropy, steps=20)
        >>> spacing = density.grid[1] - density.grid[0]
        >>> round(spacing * sum(density.density), 3)
        1.0
    """
    check_whole("probes", probes)
    check_whole("steps", steps)
    check_whole("grid", grid, least=2)
    if width is not None:
        check_positive("width", width)
    check_progress(progress)

    def analyse(curvature: Curvature, space: Subspace, draw: torch.Generator) -> list[tuple[Tensor, Tensor]]:
        return [
            quadrature(
                lambda vector: curvature.product(space, vector),
                space.random(random_signs, new_seed(draw)),
                steps=steps,
                generator=draw,
                on_step=lambda step, done=number * steps: (  # type: ignore[misc]
                    progress(done + step, probes * steps) if progress else None
                ),
            )
            for number in range(probes)
        ]

    setting = _Setting(over, where, batch_norm, dtype, chunk_size, keep_graph, generator)
    parts = _by_space(model, data, loss, setting, analyse)
    return _beside([_density(runs, work, width, grid) for runs, work in parts])


def _density(runs: list[tuple[Tensor, Tensor]], work: Work, width: float | None, points: int) -> Density:
    low = min(nodes.min().item() for nodes, _ in runs)
    high = max(nodes.max().item() for nodes, _ in runs)
    # one single eigenvalue has no range: take its size, and 1 if it is 0
    sigma = width or WIDTH_OF_RANGE * ((high - low) or abs(high) or 1.0)
    grid = torch.linspace(low - 4 * sigma, high + 4 * sigma, points, dtype=torch.float64)
    density = torch.zeros_like(grid)
    for nodes, weights in runs:
        bells = torch.exp(-0.5 * ((grid[:, None] - nodes[None, :]) / sigma).square())
        density += (bells @ weights) / (sigma * math.sqrt(2 * math.pi) * len(runs))
    return Density(
        tuple(tuple(nodes.tolist()) for nodes, _ in runs),
        tuple(tuple(weights.tolist()) for _, weights in runs),
        tuple(grid.tolist()),
        tuple(density.tolist()),
        sigma,
        work,
    )


# ------------------------------------------------------------------------------------------------------------
# What they share


class _Setting(NamedTuple):
    over: str
    where: Where
    batch_norm: str
    dtype: torch.dtype | None
    chunk_size: int | None
    keep_graph: bool | None
    generator: torch.Generator | None


def _by_space(
    model: nn.Module,
    data: Data,
    loss: Loss,
    setting: _Setting,
    analyse: Callable[[Curvature, Subspace, torch.Generator], Result],
) -> list[tuple[Result, Work]]:
    """What `analyse` finds over the kept weights, over all, or over each."""
    check_choice("over", setting.over, ("kept", "all", "both"))
    if setting.keep_graph is not None:
        check_flag("keep_graph", setting.keep_graph)
    network = working_copy(model, batch_norm=setting.batch_norm, dtype=setting.dtype)
    draw = generator_of(setting.generator)
    found: list[tuple[Result, Work]] = []
    with undisturbed(network):
        masks = lift_masks(network)
        spaces = {
            over: subspace(network, masks, over=over, where=setting.where)
            for over in ("kept", "all")
            if setting.over in (over, "both")
        }
        whole = subspace(network, masks, over="all", where=setting.where)
        batches = Batches(data, network, chunk_size=setting.chunk_size)
        once = batches.single and setting.chunk_size is None
        keep_graph = once if setting.keep_graph is None else setting.keep_graph
        curvature = Curvature(network, list(whole.parameters.values()), batches, loss, keep_graph=keep_graph)
        state = draw.get_state()
        for over, space in spaces.items():
            draw.set_state(state)  # both spaces are seen by the same random vectors
            before = curvature.products_taken, curvature.gradients_taken
            result = analyse(curvature, space, draw)
            products = curvature.products_taken - before[0]
            gradients = curvature.gradients_taken - (before[1] if found else 0)
            work = Work(
                over, space.dimension, whole.dimension, bool(masks), curvature.loss, products, gradients
            )
            found.append((result, work))
    return found


def _beside(results: list[Any]) -> Any:
    """One result, with the one over all weights beside it."""
    return results[0] if len(results) == 1 else replace(results[0], beside=results[1])
