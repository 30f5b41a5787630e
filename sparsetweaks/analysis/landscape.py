"""The loss around a network, along lines and over planes of weights or of inputs (paper 4.2, figures 5, 10, 11).

Directions lie in the space where a mask lets the weights move, unless asked otherwise: what a landscape looks
like along pruned weights, training never sees.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsetweaks.analysis.evaluation import (
    Batch,
    Batches,
    Chunk,
    Data,
    Loss,
    check_cut,
    check_loss,
    check_numbers,
    chunk_loss,
    mean_loss,
    reestimate_statistics,
    table_text,
    undisturbed,
    working_copy,
)
from sparsetweaks.analysis.figures import COLORS, SURFACE_COLORS, label, new_figure
from sparsetweaks.analysis.hessian import TopEigenvalues
from sparsetweaks.analysis.lanczos import random_signs, random_vector
from sparsetweaks.analysis.options import (
    Progress,
    check_choice,
    check_flag,
    check_odd,
    check_positive,
    check_progress,
    check_whole,
    generator_of,
)
from sparsetweaks.analysis.subspace import Where, check_zeros, named_weights, new_seed, subspace
from sparsetweaks.forms import masked_places
from sparsetweaks.masks import lift_masks
from sparsetweaks.probing import is_pair

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Direction = Mapping[str, Tensor] | TopEigenvalues
Weights = dict[str, Tensor]

POINTS = 21
CONTOURS = 20
LINE_RADIUS = 0.5  # as far as PyHessian's example and the paper's figure 10 go along the top eigenvector
PLANE_RADIUS = 1.0  # as in Li et al. (2018): at 1 every filter has moved by its own norm
INPUT_RADIUS = 0.5  # half a standard deviation of normalised inputs

EUCLIDEAN = "Euclidean distance"
OF_FILTERS = "norms of each filter"
OF_INPUTS = "root mean square change per input element"

_SPACES = {
    "kept": "the kept weights",
    "all": "all weights",
    "given": "given directions",
    "inputs": "inputs",
}


# ------------------------------------------------------------------------------------------------------------
# Results


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
        text = (
            f"Loss plane over {_SPACES[self.over]}, {len(self.xs)} x {len(self.ys)} points; positions in {self.unit}\n"
            f"x: {self.names[0]}; y: {self.names[1]}; cosine {self.cosine:.2g}\n"
            f"loss {self.center:.4g} at the centre, from {min(finite):.4g} to {max(finite):.4g}, "
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
                title=f"over {_SPACES[plane.over]}",
            )
        figure.colorbar(filled, ax=panels, label="mean loss", format="%.3g")
        return figure

    def _finite(self) -> list[float]:
        return [value for row in self.losses for value in row if math.isfinite(value)]


def _worst(values: Iterable[float]) -> float:
    """The largest, where nan counts as infinite."""
    return max(math.inf if math.isnan(value) else value for value in values)


# ------------------------------------------------------------------------------------------------------------
# Lines


def loss_line(
    model: nn.Module,
    data: Data,
    loss: Loss,
    *,
    direction: Direction | None = None,
    to: nn.Module | None = None,
    points: int = POINTS,
    radius: float | None = None,
    scale: str = "plain",
    masks: str = "union",
    batch_norm: str = "eval",
    dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
    progress: Progress | None = None,
) -> LossLine:
    """The loss along a direction in weights (paper, figure 10), or between two networks.

    Along a direction: at weights + t * direction for t from -radius to radius. The direction is taken as it is:
    those of `hessian_top_eigenvalues` leave pruned weights alone.

    Between two networks (linear mode connectivity, Frankle et al. 2020): at (1 - t) * weights + t * others for
    t from 0 to 1. The barrier is the largest excess of the loss over the straight line between the two ends'
    losses. Both masks may be of any form. Complex parameters and floating-point buffers go along, and what is
    equal in both stays to the bit, infinities too.

    Dropout is off. The model, its buffers and modes, and PyTorch's random state stay untouched.

    Args:
        model: any network, masked or not.
        data: one pair (inputs, targets), or something that can be gone through repeatedly for such pairs, as in
            `hessian_top_eigenvalues`. Every point takes one pass.
        loss: of (outputs, targets), a scalar: the mean over the examples of a batch. It need not be
            differentiable: an error rate will do.
        direction: a tensor for each parameter by name, all others staying where they are, or the result of
            `hessian_top_eigenvalues`, whose first vector is taken.
        to: the other network, of the same architecture, in place of a direction.
        points: how many, at least 2; along a direction an odd number, so that the given network is among them.
        radius: how far along the direction, in units of `scale`, > 0; default 0.5. Not between networks.
        scale: `"plain"` makes the direction one of unit length, so that positions are Euclidean distances;
            `"filter"` gives each of its filters (slices of the first dimension; a bias is one) the norm of
            the weights' filter (Li et al. 2018), which makes networks of different scale comparable but bends
            an eigenvector. Not between networks.
        masks: between two networks, `"union"`: straight from one to the other, so that in between both masks'
            weights are there; or `"intersection"`: both first lose what the other one has pruned, so that the
            ends are other networks than those given.
        batch_norm: `"eval"` keeps the running statistics (between two networks they are interpolated as the
            weights are); `"reestimate"` estimates them anew at each point from these data, with one more pass,
            as statistics that fit the ends need not fit between them; `"train"` normalises by each batch.
        dtype: to compute in; default the model's (float32 for half precision).
        chunk_size: at most so many examples go through the network at once; default: batches as they come.
            Only with `batch_norm="eval"`.
        progress: called after each point with (points so far, all).

    Returns:
        Positions and losses, with `barrier` or `rise`.

    Raises:
        ValueError: neither or both of `direction` and `to`; a direction or network that does not fit; parameters or
            buffers that differ and have nothing between them, as they are infinite or whole numbers; a given
            network whose loss is not finite; otherwise as `hessian_top_eigenvalues`.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model, other = nn.Linear(4, 3), nn.Linear(4, 3)
        >>> batch = torch.randn(32, 4), torch.randint(3, (32,))
        >>> line = loss_line(model, batch, nn.functional.cross_entropy, to=other, points=5)
        >>> line.positions, line.barrier  # a convex loss has no barrier
        ((0.0, 0.25, 0.5, 0.75, 1.0), 0.0)
    """
    if (direction is None) == (to is None):
        raise ValueError("give either a direction to go along or, with to=, a network to go to")
    if to is not None and (radius is not None or scale != "plain"):
        raise ValueError(
            "radius and scale belong to a direction: between two networks positions run from 0 to 1"
        )
    check_choice("scale", scale, ("plain", "filter"))
    check_choice("masks", masks, ("union", "intersection"))
    check_progress(progress)
    if to is None and masks != "union":
        raise ValueError("masks= is about two networks: a direction is taken as it is")
    terrain = _Terrain(model, data, loss, batch_norm, dtype, chunk_size)
    if to is not None:
        return _line_between(terrain, to, points, masks, dtype, progress)
    assert direction is not None
    positions = _positions(LINE_RADIUS if radius is None else radius, points)
    along = _scaled(_fitting(direction, terrain), terrain.weights, scale)
    states = (_moved(terrain.weights, (t, along)) for t in positions)
    losses = terrain.losses(states, len(positions), progress)
    return LossLine(
        tuple(positions),
        tuple(losses),
        EUCLIDEAN if scale == "plain" else OF_FILTERS,
        False,
        sum(int((part != 0).sum()) for part in along.values()),
        sum(part.numel() for part in terrain.weights.values()),
    )


def _line_between(
    terrain: _Terrain,
    other: nn.Module,
    points: int,
    masks: str,
    dtype: torch.dtype | None,
    progress: Progress | None,
) -> LossLine:
    check_whole("points", points, least=2)
    second = working_copy(other, dtype=dtype)
    lifted = [(terrain.network, terrain.masks), (second, lift_masks(second))]
    for network, own in lifted:
        check_zeros(network, own)
    kept = [_by_name(network, own) for network, own in lifted]
    ends = [_state(terrain.network), _state(second)]
    _check_same(*ends)
    _check_fixed(terrain.network, second)
    names = set(terrain.weights)
    if masks == "intersection":
        for end in ends:
            for name, mask in [*kept[0].items(), *kept[1].items()]:
                end[name] = end[name] * mask.to(end[name].device)
    positions = torch.linspace(0, 1, points, dtype=torch.float64).tolist()
    states = ({name: _between(end, ends[1][name], t) for name, end in ends[0].items()} for t in positions)
    losses = terrain.losses(states, len(positions), progress)
    return LossLine(
        tuple(positions),
        tuple(losses),
        "of the way",
        True,
        sum(_kept_between(terrain.weights[name], [each.get(name) for each in kept], masks) for name in names),
        sum(part.numel() for part in terrain.weights.values()),
    )


def _between(first: Tensor, second: Tensor, t: float) -> Tensor:
    """What is equal stays so: an attention mask's -inf, which times 0 is nan."""
    return torch.where(first == second, first, (1 - t) * first + t * second)


def _kept_between(weight: Tensor, masks: Sequence[Tensor | None], rule: str) -> int:
    whole = torch.ones_like(weight, dtype=torch.bool)
    first, second = (whole if mask is None else mask for mask in masks)
    return int((first & second if rule == "intersection" else first | second).sum())


# ------------------------------------------------------------------------------------------------------------
# Planes


def loss_plane(
    model: nn.Module,
    data: Data,
    loss: Loss,
    *,
    directions: tuple[Direction, Direction] | None = None,
    over: str = "kept",
    where: Where = None,
    scale: str = "filter",
    one_dimensional: bool = False,
    points: int = POINTS,
    radius: float = PLANE_RADIUS,
    batch_norm: str = "eval",
    dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> LossPlane:
    """The loss over a plane of two random directions in the kept weights (paper, figure 5; Li et al. 2018).

    Each direction is Gaussian, zero at pruned weights, and scaled filter by filter (slices of the first
    dimension) to the norm of the weights' filter, as kept. A filter without any weight stays where it is. The
    two are independent and not made orthogonal, as in the paper of Li et al.; `cosine` says how far from it.

    Args:
        model: as in `loss_line`, and so are `data`, `loss`, `batch_norm`, `dtype`, `chunk_size`.
        directions: a pair of one's own, each as `direction` in `loss_line`, in place of random ones.
        over: random directions in the `"kept"` weights, in `"all"` (of which those in the kept ones are what the masks
            leave), or `"both"`, side by side.
        where: glob pattern(s) on the names of parameters, or of the modules that hold them, that random
            directions move; None for all.
        scale: `"filter"`, or `"plain"` for directions of unit length, with positions as Euclidean distances.
        one_dimensional: whether random directions move biases and BatchNorm's weights and biases too, each
            scaled as one filter. By default they stay, as in Li et al.
        points: how many along each direction, an odd number.
        radius: how far along each, in units of `scale`, > 0; at 1 each filter has moved by its own norm.
        generator: of the directions; default: one seeded with 0. The same one gives networks that are compared the
            same directions, before they are masked and scaled, in every parameter that they share by name and shape,
            whatever else they hold.
        progress: called after each point with (points so far, all).

    Returns:
        The positions and the loss at each point.

    Raises:
        ValueError: as `loss_line`; or no weight is left to move.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> batch = torch.randn(32, 4), torch.randint(3, (32,))
        >>> plane = loss_plane(model, batch, nn.functional.cross_entropy, points=3)
        >>> round(plane.center, 4) == round(nn.functional.cross_entropy(model(batch[0]), batch[1]).item(), 4)
        True
    """
    check_choice("over", over, ("kept", "all", "both"))
    check_flag("one_dimensional", one_dimensional)
    check_progress(progress)
    check_choice("scale", scale, ("plain", "filter"))
    positions = _positions(radius, points)
    terrain = _Terrain(model, data, loss, batch_norm, dtype, chunk_size)
    if directions is None:
        draw = generator_of(generator)
        seeds = new_seed(draw), new_seed(draw)
        pairs = {
            each: terrain.random_directions(each, where, one_dimensional, seeds)
            for each in (("kept", "all") if over == "both" else (over,))
        }
        names = ("first random direction", "second random direction")
    else:
        if over != "kept" or where is not None or one_dimensional:
            raise ValueError("over, where and one_dimensional are about random directions: leave them out")
        pairs = {"given": _fitting_pair(directions, terrain)}
        names = ("first direction", "second direction")
    pairs = {each: [_scaled(part, terrain.weights, scale) for part in pair] for each, pair in pairs.items()}
    states = (
        _moved(terrain.weights, (x, first), (y, second))
        for first, second in pairs.values()
        for y in positions
        for x in positions
    )
    size = len(positions) ** 2
    losses = terrain.losses(states, len(pairs) * size, progress)
    unit = EUCLIDEAN if scale == "plain" else OF_FILTERS
    planes = [
        _plane(each, positions, losses[start : start + size], unit, names, _cosine(*pair))
        for (each, pair), start in zip(pairs.items(), range(0, len(losses), size), strict=True)
    ]
    return planes[0] if len(planes) == 1 else replace(planes[0], beside=planes[1])


def input_loss_plane(
    model: nn.Module,
    batch: Batch,
    loss: Loss,
    *,
    directions: str = "random",
    points: int = POINTS,
    radius: float = INPUT_RADIUS,
    batch_norm: str = "eval",
    dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> LossPlane:
    """The mean loss over a plane in input space, around one batch (paper, figure 11).

    Every example moves along two directions of its own, each with a root mean square of 1 over the example's
    elements, so that the positions are the root mean square change of an input element:

    - `"random"`: two Gaussian directions, orthogonal to each other;
    - `"gradient"`: the sign of the loss's gradient with respect to the input, along which the loss rises
      fastest for a bounded change of each element (FGSM, Goodfellow et al. 2015), and random signs. Elements
      without a gradient do not move along the first.

    Args:
        model: as in `loss_line`, and so are `loss`, `dtype`, `chunk_size`.
        batch: one pair (inputs, targets); the inputs are one floating-point tensor with at least 2 elements
            per example, as they go into the model, so normalised ones where it takes those.
        directions: `"random"` or `"gradient"`.
        points: how many along each direction, an odd number.
        radius: how far along each, > 0; default 0.5, half a standard deviation of normalised inputs.
        batch_norm: `"eval"`, or `"train"` for the batch's own statistics.
        generator: of the random directions; default: one seeded with 0.
        progress: called after each point with (points so far, all).

    Returns:
        The positions and the loss at each point; x is the first direction.

    Raises:
        ValueError: data that are no single pair, or inputs that are no floating-point tensor; otherwise as
            `loss_line`.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> batch = torch.randn(32, 4), torch.randint(3, (32,))
        >>> plane = input_loss_plane(model, batch, nn.functional.cross_entropy, directions="gradient", points=3)
        >>> plane.losses[1][0] < plane.losses[1][1] < plane.losses[1][2]
        True
    """
    check_choice("directions", directions, ("random", "gradient"))
    check_progress(progress)
    if not is_pair(batch):
        raise ValueError("batch must be one pair (inputs, targets): the plane lies around these inputs")
    inputs = batch[0]
    if not (isinstance(inputs, Tensor) and inputs.is_floating_point() and inputs.layout == torch.strided):
        raise ValueError(
            "the inputs must be one floating-point tensor, and no sparse one, as others cannot be moved a little"
        )
    if batch[0].ndim > 0 and len(batch[0]) == 0:
        raise ValueError("a batch holds no example")
    if batch[0].ndim < 2 or batch[0][:1].numel() < 2:
        raise ValueError(f"a plane needs at least 2 elements per input, got shape {tuple(batch[0].shape)}")
    positions = _positions(radius, points)
    network = working_copy(model, batch_norm=batch_norm, dtype=dtype)
    _check_statistics(batch_norm, chunk_size)
    draw = generator_of(generator)
    with undisturbed(network):
        batches = Batches(batch, network, chunk_size=chunk_size)
        check_cut(network, batches, loss)
        chunks = list(batches)
        around = _input_directions(network, chunks, loss, directions, draw)
        losses: list[float] = []
        for y in positions:
            for x in positions:
                total = 0.0
                for chunk, (first, second) in zip(chunks, around, strict=True):
                    moved = chunk._replace(inputs=chunk.inputs + x * first + y * second)
                    with torch.no_grad():
                        total += chunk.examples * chunk_loss(network, moved, loss).item()
                losses.append(total / sum(chunk.examples for chunk in chunks))
                if progress:
                    progress(len(losses), len(positions) ** 2)
    check_loss(losses[len(losses) // 2])
    names = (
        ("gradient's sign", "random signs") if directions == "gradient" else ("first random", "second random")
    )
    whole = [{str(number): pair[which] for number, pair in enumerate(around)} for which in (0, 1)]
    cosine = _cosine(*whole)
    return _plane("inputs", positions, losses, OF_INPUTS, names, cosine)


def _input_directions(
    network: nn.Module, chunks: list[Chunk], loss: Loss, directions: str, draw: torch.Generator
) -> list[tuple[Tensor, Tensor]]:
    """Two directions for each chunk's inputs: the random ones are drawn for the whole batch, however it is cut."""
    whole = torch.cat([chunk.inputs for chunk in chunks])
    counts = [chunk.examples for chunk in chunks]
    if directions == "gradient":
        firsts = [_gradient_sign(network, chunk, loss) for chunk in chunks]
        seconds = random_signs(whole.reshape(-1), draw).reshape(whole.shape).split(counts)
        return list(zip(firsts, seconds, strict=True))
    first, second = (random_vector(whole.reshape(-1), draw).reshape(len(whole), -1) for _ in range(2))
    first = _root_mean_square_of_one(first)
    second = _root_mean_square_of_one(second - (first * second).mean(dim=1, keepdim=True) * first)
    return list(
        zip(first.reshape(whole.shape).split(counts), second.reshape(whole.shape).split(counts), strict=True)
    )


def _gradient_sign(network: nn.Module, chunk: Chunk, loss: Loss) -> Tensor:
    inputs = chunk.inputs.clone().requires_grad_()
    value = chunk_loss(network, chunk._replace(inputs=inputs * 1), loss)  # * 1: it may work in place
    if not value.requires_grad:
        raise ValueError("the loss has no gradient with respect to the inputs: use directions='random'")
    (gradient,) = torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)
    return gradient.sign()


def _root_mean_square_of_one(rows: Tensor) -> Tensor:
    return rows / rows.square().mean(dim=1, keepdim=True).sqrt()


def _plane(
    over: str,
    positions: list[float],
    losses: list[float],
    unit: str,
    names: tuple[str, str],
    cosine: float,
) -> LossPlane:
    side = len(positions)
    rows = tuple(tuple(losses[start : start + side]) for start in range(0, side * side, side))
    return LossPlane(over, tuple(positions), tuple(positions), rows, unit, names, cosine)


# ------------------------------------------------------------------------------------------------------------
# What they share


class _Terrain:
    """A copy of the network that is put at other weights, and its mean loss there."""

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        loss: Loss,
        batch_norm: str,
        dtype: torch.dtype | None,
        chunk_size: int | None,
    ) -> None:
        check_choice("batch_norm", batch_norm, ("eval", "train", "reestimate"))
        _check_statistics(batch_norm, chunk_size)
        self.reestimates = batch_norm == "reestimate"
        self.network = working_copy(model, batch_norm="eval" if self.reestimates else batch_norm, dtype=dtype)
        self.masks = lift_masks(self.network)
        self.weights = {name: p.detach().clone() for name, p in named_weights(self.network).items()}
        self._data, self._loss, self._chunk_size = data, loss, chunk_size

    def losses(self, states: Iterable[Weights], count: int, progress: Progress | None) -> list[float]:
        """The mean loss at each state, after checking that of the given network."""
        found: list[float] = []
        with undisturbed(self.network):
            batches = Batches(self._data, self.network, chunk_size=self._chunk_size)
            check_cut(self.network, batches, self._loss)
            check_loss(mean_loss(self.network, batches, self._loss))
            held = _tensors_of(self.network)
            for state in states:
                with torch.no_grad():
                    for name, value in state.items():
                        held[name].copy_(value)
                if self.reestimates:
                    reestimate_statistics(self.network, batches)
                found.append(mean_loss(self.network, batches, self._loss))
                if progress:
                    progress(len(found), count)
        return found

    def random_directions(
        self, over: str, where: Where, one_dimensional: bool, seeds: Sequence[int]
    ) -> list[Weights]:
        space = subspace(self.network, self.masks, over=over, where=where)
        if not one_dimensional and all(p.ndim <= 1 for p in space.parameters.values()):
            raise ValueError("only biases and the like were chosen: say one_dimensional=True to move them")
        drawn = [space.named(space.random(random_vector, seed)) for seed in seeds]
        return [
            {name: part for name, part in each.items() if one_dimensional or part.ndim > 1} for each in drawn
        ]


def _by_name(network: nn.Module, masks: Mapping[nn.Parameter, Tensor]) -> dict[str, Tensor]:
    return {name: masks[p] for name, p in named_weights(network).items() if p in masks}


def _tensors_of(network: nn.Module) -> Weights:
    """All that is interpolated: real and complex parameters, and buffers such as running statistics."""
    return {**named_weights(network), **{n: b for n, b in _buffers_of(network).items() if _has_between(b)}}


def _fixed_of(network: nn.Module) -> Weights:
    """All that cannot be interpolated, but for counts of batches, which compute nothing here."""
    tensors = {**dict(network.named_parameters()), **_buffers_of(network)}
    return {
        name: tensor
        for name, tensor in tensors.items()
        if not (_has_between(tensor) or name.endswith("num_batches_tracked"))
    }


def _has_between(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _buffers_of(network: nn.Module) -> Weights:
    """All but the masks of weights, in whatever form."""
    masks = {id(mask) for place in masked_places(network) for mask in place.stored_masks()}
    return {name: buffer for name, buffer in network.named_buffers() if id(buffer) not in masks}


def _state(network: nn.Module) -> Weights:
    return {name: tensor.detach().clone() for name, tensor in _tensors_of(network).items()}


def _check_same(first: Weights, second: Weights) -> None:
    apart = sorted(set(first) ^ set(second))
    if apart:
        raise ValueError(f"the two networks are of different architectures: only one has {apart[0]!r}")
    check_numbers(first)
    check_numbers(second)
    for name, tensor in first.items():
        if tensor.is_complex() != second[name].is_complex():
            raise ValueError(
                f"{name!r} is {tensor.dtype} in one network and {second[name].dtype} in the other: give both alike"
            )
        if tensor.shape != second[name].shape:
            raise ValueError(
                f"{name!r} has shape {tuple(tensor.shape)} in one network and {tuple(second[name].shape)} in the other"
            )
        other = second[name] = second[name].to(device=tensor.device, dtype=tensor.dtype)
        if ((tensor != other) & ~(tensor.isfinite() & other.isfinite())).any():
            raise ValueError(
                f"{name!r} is infinite in one network where the other differs: nothing lies between them. Give both "
                "the same"
            )


def _check_fixed(first: nn.Module, second: nn.Module) -> None:
    """Refuse what cannot be interpolated and differs."""
    ours, others = _fixed_of(first), _fixed_of(second)
    for name, tensor in {**ours, **others}.items():
        if name not in ours or name not in others or not _equal(ours[name], others[name]):
            raise ValueError(
                f"{name!r} ({tensor.dtype}) differs between the two networks, and there is nothing between its values: "
                "give both the same"
            )


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other.to(one.device))


def _check_statistics(batch_norm: str, chunk_size: int | None) -> None:
    if chunk_size is not None and batch_norm != "eval":
        raise ValueError(
            f"chunk_size cuts batches, which changes the statistics that batch_norm={batch_norm!r} uses: pass the "
            "data in smaller batches instead"
        )


def _positions(radius: float, points: int) -> list[float]:
    """Evenly from -radius to radius, 0 among them."""
    check_positive("radius", radius)
    check_odd("points", points)
    half = points // 2
    return [radius * step / half for step in range(-half, half + 1)]


def _fitting(direction: Direction, terrain: _Terrain) -> Weights:
    """A direction by parameter name, checked against the network."""
    weights = terrain.weights
    if isinstance(direction, TopEigenvalues):
        direction = direction.vectors[0]
    if not isinstance(direction, Mapping) or not direction:
        raise ValueError(
            "a direction is a dict of parameter name to tensor, or a result of hessian_top_eigenvalues"
        )
    for name, part in direction.items():
        if name not in weights:
            raise ValueError(f"the direction moves {name!r}, which is no parameter of the network")
        if not isinstance(part, Tensor):
            raise ValueError(f"the direction holds a {type(part).__name__} at {name!r}: give a tensor")
        if part.is_complex() or weights[name].is_complex():
            raise ValueError(
                f"the direction is complex at {name!r}, or its weight is: give one of real weights"
            )
        if part.shape != weights[name].shape:
            raise ValueError(
                f"the direction has shape {tuple(part.shape)} at {name!r}, but its weight {tuple(weights[name].shape)}"
            )
        if not part.isfinite().all():
            raise ValueError(f"the direction is not finite at {name!r}")
    return {
        name: part.detach().to(device=weights[name].device, dtype=weights[name].dtype)
        for name, part in direction.items()
    }


def _fitting_pair(directions: object, terrain: _Terrain) -> list[Weights]:
    if not isinstance(directions, (tuple, list)) or len(directions) != 2:
        raise ValueError(
            "directions are a pair, such as hessian_top_eigenvalues(..., k=2).vectors; or leave them out for random ones"
        )
    return [_fitting(each, terrain) for each in directions]


def _scaled(direction: Weights, weights: Weights, scale: str) -> Weights:
    """Of unit length, or each filter of the length of the weights' filter; a filter that is zero stays zero."""
    length = math.sqrt(sum(part.double().square().sum().item() for part in direction.values()))
    if length == 0:
        raise ValueError("the direction is zero everywhere")
    if scale == "plain":
        return {name: part / length for name, part in direction.items()}
    scaled = {}
    for name, part in direction.items():
        own, wanted = _filter_norms(part), _filter_norms(weights[name])
        scaled[name] = part * torch.where(own > 0, wanted / torch.where(own > 0, own, 1), 0)
    if not any(part.any() for part in scaled.values()):
        raise ValueError(
            "every filter along the direction is zero, so that nothing would move: use scale='plain'"
        )
    return scaled


def _filter_norms(tensor: Tensor) -> Tensor:
    if tensor.ndim <= 1:
        return torch.linalg.vector_norm(tensor)
    return torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.ndim)), keepdim=True)


def _moved(weights: Weights, *steps: tuple[float, Weights]) -> Weights:
    moved = {}
    for name, weight in weights.items():
        for distance, direction in steps:
            if name in direction:
                weight = weight + distance * direction[name]
        moved[name] = weight
    return moved


def _cosine(first: Weights, second: Weights) -> float:
    lengths = [sum(part.double().square().sum().item() for part in each.values()) for each in (first, second)]
    common = [(first[name].double() * second[name].double()).sum().item() for name in first if name in second]
    return sum(common) / math.sqrt(lengths[0] * lengths[1]) if all(lengths) else 0.0
