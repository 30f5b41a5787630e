"""The loss around a network, along lines and over planes of weights or of inputs (paper 4.2, figures 5, 10, 11).

Directions lie in the space where a mask lets the weights move, unless asked otherwise: what a landscape looks
like along pruned weights, training never sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from sparsetweaks.analysis.directions import (
    Direction,
    cosine_of,
    fitting,
    fitting_pair,
    input_directions,
    move,
    rescale,
)
from sparsetweaks.analysis.evaluation import (
    Batch,
    Batches,
    Data,
    Loss,
    check_cut,
    check_loss,
    chunk_loss,
    undisturbed,
    working_copy,
)
from sparsetweaks.analysis.loss_shapes import EUCLIDEAN, OF_FILTERS, OF_INPUTS, LossLine, LossPlane
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
from sparsetweaks.analysis.subspace import Where, check_zeros, new_seed
from sparsetweaks.analysis.terrain import (
    Terrain,
    check_fixed,
    check_same,
    check_statistics,
    masks_by_name,
    state_of,
)
from sparsetweaks.masks import lift_masks
from sparsetweaks.probing import is_pair

POINTS = 21
LINE_RADIUS = 0.5  # as far as PyHessian's example and the paper's figure 10 go along the top eigenvector
PLANE_RADIUS = 1.0  # as in Li et al. (2018): at 1 every filter has moved by its own norm
INPUT_RADIUS = 0.5  # half a standard deviation of normalised inputs


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
    terrain = Terrain(model, data, loss, batch_norm, dtype, chunk_size)
    if to is not None:
        return _line_between(terrain, to, points, masks, dtype, progress)
    assert direction is not None
    positions = _positions(LINE_RADIUS if radius is None else radius, points)
    along = rescale(fitting(direction, terrain.weights), terrain.weights, scale)
    states = (move(terrain.weights, (t, along)) for t in positions)
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
    terrain: Terrain,
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
    kept = [masks_by_name(network, own) for network, own in lifted]
    ends = [state_of(terrain.network), state_of(second)]
    check_same(*ends)
    check_fixed(terrain.network, second)
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
    terrain = Terrain(model, data, loss, batch_norm, dtype, chunk_size)
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
        pairs = {"given": fitting_pair(directions, terrain.weights)}
        names = ("first direction", "second direction")
    pairs = {each: [rescale(part, terrain.weights, scale) for part in pair] for each, pair in pairs.items()}
    states = (
        move(terrain.weights, (x, first), (y, second))
        for first, second in pairs.values()
        for y in positions
        for x in positions
    )
    size = len(positions) ** 2
    losses = terrain.losses(states, len(pairs) * size, progress)
    unit = EUCLIDEAN if scale == "plain" else OF_FILTERS
    planes = [
        _plane(each, positions, losses[start : start + size], unit, names, cosine_of(*pair))
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
    check_statistics(batch_norm, chunk_size)
    draw = generator_of(generator)
    with undisturbed(network):
        batches = Batches(batch, network, chunk_size=chunk_size)
        check_cut(network, batches, loss)
        chunks = list(batches)
        around = input_directions(network, chunks, loss, directions, draw)
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
    cosine = cosine_of(*whole)
    return _plane("inputs", positions, losses, OF_INPUTS, names, cosine)


def _plane(
    over: str, positions: list[float], losses: list[float], unit: str, names: tuple[str, str], cosine: float
) -> LossPlane:
    side = len(positions)
    rows = tuple(tuple(losses[start : start + side]) for start in range(0, side * side, side))
    return LossPlane(over, tuple(positions), tuple(positions), rows, unit, names, cosine)


def _positions(radius: float, points: int) -> list[float]:
    """Evenly from -radius to radius, 0 among them."""
    check_positive("radius", radius)
    check_odd("points", points)
    half = points // 2
    return [radius * step / half for step in range(-half, half + 1)]
