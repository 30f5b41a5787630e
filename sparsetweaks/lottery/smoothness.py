"""What the networks of spent tickets look like: curvature, the loss around them, activations. Each look is kept and keyed.

A run keeps its best weights, and those after the epochs it was asked for (`train`, `keep_epochs`): a look puts the network
together again and takes it to `sparsetweaks.analysis`. Where that has the choice, it is taken both ways: over the kept
weights, in which training moves, and over all of them.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsetweaks.analysis import (
    TopEigenvalues,
    activation_sparsity,
    gradient_flow,
    hessian_top_eigenvalues,
    input_loss_plane,
    loss_line,
    loss_plane,
)
from sparsetweaks.lottery.config import LotteryError, Recipe, Tweaks, key
from sparsetweaks.lottery.data import SPLIT_SEED, Data, Images
from sparsetweaks.lottery.experiment import Experiment, data_of, tickets_of
from sparsetweaks.lottery.files import State, load, save
from sparsetweaks.lottery.grid import Engine, GridError, run_all, run_each
from sparsetweaks.lottery.spend import defaults_of, run_key, spend, tweaked
from sparsetweaks.lottery.store import Ticket
from sparsetweaks.lottery.train import after
from sparsetweaks.masks import find_masks

KEPT, ALL = "kept weights", "all weights"  # the spaces that a mask makes two of
INPUTS = "inputs"
EVERYTHING = "all stages"
BEST = 0  # in place of an epoch: the weights that are reported
LOSS = nn.CrossEntropyLoss()  # for all alike, whatever labels they were trained with
Numbers = dict[str, dict[str, float]]  # by space and quantity


class Look(NamedTuple):
    """What one measure found of one spent ticket."""

    sparsity: float
    variant: str
    seed: int
    epoch: int  # after which; `BEST` for the one that is reported
    numbers: Numbers
    drawn: dict[str, Any]  # by space what a picture needs beside the numbers


def look_at(
    experiment: Experiment,
    folder: Path,
    measure: str,
    *,
    epochs: tuple[int, ...] = (BEST,),
    device: str = "cpu",
    engine: Engine = run_all,
    on_look: Callable[[], None] | None = None,
) -> list[Look]:
    """Take a measure of every spent ticket of a comparison; what is in the folder already is read back.

    Args:
        experiment: the comparison; what it has not spent yet is spent.
        folder: of the comparison; looks are kept in `analyses/` there.
        measure: a name of `MEASURES`.
        epochs: after which epochs to look, of those that the experiment keeps; `BEST` is the network that is reported.
        device: to compute on.
        engine: what runs the looks; see `compare`.
        on_look: called after each.

    Returns:
        Looks in the order of seeds, levels, variants and epochs.

    Raises:
        GridError: once all others are taken and kept, when runs failed; see `compare`.
        LotteryError: for a measure that is not there, or an epoch that the experiment does not keep.
    """
    if measure not in MEASURES:
        raise LotteryError(f"unknown measure {measure!r}; choose from {', '.join(MEASURES)}")
    missing = sorted(set(epochs) - {BEST, *experiment.keep_epochs})
    if missing:
        raise LotteryError(
            f"the experiment keeps no weights after epoch {missing[0]}: name it in its keep_epochs, which are now "
            f"{experiment.keep_epochs or 'none'}"
        )
    failed: list[str] = []
    drawing = [partial(tickets_of, experiment, folder, device, seed) for seed in experiment.seeds]
    places = [
        (ticket, name, epoch)
        for tickets in run_each(run_all, drawing, failed)
        for ticket, name in (experiment.cells(tickets) if tickets else ())
        for epoch in epochs
    ]
    tasks = [partial(_look, experiment, folder, device, measure, *place) for place in places]
    looks = []
    for look in run_each(engine, tasks, failed):
        if look is not None:
            looks.append(look)
        if on_look is not None:
            on_look()
    if failed:
        raise GridError(*dict.fromkeys(failed))  # a run that failed failed for each of its epochs
    order = {(t.seed, round(t.sparsity, 4), name, epoch): at for at, (t, name, epoch) in enumerate(places)}
    return sorted(looks, key=lambda each: order[each.seed, each.sparsity, each.variant, each.epoch])


def _look(
    experiment: Experiment, folder: Path, device: str, measure: str, ticket: Ticket, name: str, epoch: int
) -> Look:
    tweaks, recipe, function = experiment.tweaks(name), experiment.recipe, MEASURES[measure]
    run = run_key(ticket, tweaks, recipe, seed=ticket.seed, device=torch.device(device))
    identity = key(measure, defaults_of(function), run, epoch)
    path = folder / "analyses" / f"{measure}-{identity}.safetensors"
    if not path.is_file():
        data = data_of(experiment.source, folder, device)
        trained = spend(
            ticket,
            tweaks,
            data,
            recipe,
            seed=ticket.seed,
            folder=folder / "runs",
            name=name,
            keep_epochs=experiment.keep_epochs,
        )
        state = trained.weights["best" if epoch == BEST else after(epoch)]
        numbers, drawn = function(spent_network(ticket, tweaks, data, recipe, state), data, ticket.seed)
        save(path, "analysis", {"numbers": numbers, "drawn": drawn}, {})
    found, _ = load(path, "analysis")
    return Look(
        round(ticket.sparsity, 4), name, ticket.seed, epoch, _in_order(found["numbers"]), found["drawn"]
    )


def _in_order(numbers: Numbers) -> Numbers:
    """Spaces with the kept weights first, and the stages in their order."""
    return {space: numbers[space] for space in sorted(numbers, key=lambda name: (name != KEPT, name))}


def spent_network(ticket: Ticket, tweaks: Tweaks, data: Data, recipe: Recipe, state: State) -> nn.Module:
    """The network of a spent ticket: the ticket's, tweaked again, with the weights that training left.

    Args:
        ticket: that was spent.
        tweaks: with what; layer scales are in the weights, and are not learned again.
        data: the data set it was spent on.
        recipe: by which.
        state: `Trained.weights["best"]`, or those of a kept epoch.

    Returns:
        The masked network, in evaluation mode, on the device of `data`.

    Raises:
        LotteryError: when these weights are not of this ticket with these tweaks.
    """
    model, _, _ = tweaked(ticket, replace(tweaks, scales=None), data, recipe, seed=ticket.seed)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise LotteryError(
            f"these weights are not of this ticket spent with these tweaks: {' '.join(str(error).split())[:200]}"
        ) from error
    return model.eval()


# ---------------------------------------------------------------------------------------------------- measures


def curvature(
    model: nn.Module, data: Data, seed: int, *, images: int = 256, tolerance: float = 1e-2
) -> tuple[Numbers, dict[str, Any]]:
    """The largest Hessian eigenvalue of the training loss, and the effective gradient flow (figures 2 and A12).

    Args:
        model: a spent network.
        data: whose training images, unaugmented, the loss is of.
        seed: unused, as nothing is random here.
        images: how many of them.
        tolerance: of the eigenvalue, relative: far below what seeds differ by.

    Returns:
        Numbers by space; nothing to draw beside.
    """
    batch = some(data.train, data, images)
    numbers = {
        space: {"eigenvalue": each.values[0], "loss": each.work.loss}
        for space, each in _tops(model, batch, tolerance).items()
    }
    flow = gradient_flow(model, batch, LOSS)
    numbers[KEPT]["gradient flow"] = flow.effective
    return numbers, {}


def along_eigenvector(
    model: nn.Module, data: Data, seed: int, *, images: int = 256, tolerance: float = 1e-2, points: int = 21
) -> tuple[Numbers, dict[str, Any]]:
    """The test loss along the top eigenvector of the training loss (figure 10).

    Args:
        model: a spent network.
        data: its training images give the direction, its test images the loss.
        seed: unused.
        images: how many of either.
        tolerance: see `curvature`.
        points: along the line, from -0.5 to 0.5, a Euclidean distance as in the paper.

    Returns:
        Numbers by space, and the line; an eigenvector has no sign, so it is turned to where the loss rises more.
    """
    numbers, drawn, test = {}, {}, some(data.test, data, images)
    for space, top in _tops(model, some(data.train, data, images), tolerance).items():
        line = loss_line(model, test, LOSS, direction=top, points=points)
        turn = -1 if line.losses[0] > line.losses[-1] else 1
        middle = line.losses[len(line.losses) // 2]
        numbers[space] = {"rise": line.rise, "eigenvalue": top.values[0], "loss": middle}
        drawn[space] = {"x": line.positions, "y": line.losses[::turn]}
    return numbers, drawn


def around_weights(
    model: nn.Module, data: Data, seed: int, *, images: int = 256, points: int = 13, radius: float = 1.0
) -> tuple[Numbers, dict[str, Any]]:
    """The training loss over a plane of two random directions, scaled filter by filter (figure 5).

    Args:
        model: a spent network, or one that is being spent.
        data: whose training images, unaugmented, the loss is of.
        seed: of the directions.
        images: how many of them.
        points: along each direction.
        radius: in norms of each filter.

    Returns:
        Numbers by space, and the plane. The median rise is that of the loss over its centre, over the points of the plane.
    """
    numbers, drawn, batch = {}, {}, some(data.train, data, images)
    for space, over in ((KEPT, "kept"), (ALL, "all")):
        generator = torch.Generator().manual_seed(seed)
        plane = loss_plane(model, batch, LOSS, over=over, points=points, radius=radius, generator=generator)
        numbers[space], drawn[space] = _of_plane(plane)
    return numbers, drawn


def around_inputs(
    model: nn.Module, data: Data, seed: int, *, images: int = 256, points: int = 13, radius: float = 0.5
) -> tuple[Numbers, dict[str, Any]]:
    """The test loss over a plane of inputs: against the gradient's sign and across random signs (figure 11).

    Args:
        model: a spent network.
        data: whose test images are moved.
        seed: of the random signs.
        images: how many of them.
        points: along each direction.
        radius: in standard deviations of the images.

    Returns:
        Numbers, and the plane; inputs have no mask, so there is one space.
    """
    generator, batch = torch.Generator().manual_seed(seed), some(data.test, data, images)
    plane = input_loss_plane(
        model, batch, LOSS, directions="gradient", points=points, radius=radius, generator=generator
    )
    numbers, drawn = _of_plane(plane)
    return {INPUTS: numbers}, {INPUTS: drawn}


def activations(
    model: nn.Module, data: Data, seed: int, *, images: int = 512, threshold: float = 1e-2
) -> tuple[Numbers, dict[str, Any]]:
    """How many activations are zero, in percent, stage by stage (table A1).

    Args:
        model: a spent network.
        data: whose test images it is shown.
        seed: unused.
        images: how many of them.
        threshold: up to which absolute value the authors' code counts zeros.

    Returns:
        Numbers by stage and for all of them: exact zeros, and those within the threshold.
    """
    stages: dict[str, list[tuple[int, int, int]]] = {}
    for site in activation_sparsity(model, some(data.test, data, images), threshold=threshold).sites:
        counts = (site.values, site.zeros, site.near_zeros)
        for stage in (stage_of(site.site), EVERYTHING):
            stages.setdefault(stage, []).append(counts)
    numbers = {}
    for stage in sorted(stages):
        values, zeros, near = (sum(column) for column in zip(*stages[stage], strict=True))
        numbers[stage] = {"exact zeros": 100 * zeros / values, "near zeros": 100 * near / values}
    return numbers, {}


MEASURES: dict[str, Callable[..., tuple[Numbers, dict[str, Any]]]] = {
    "curvature": curvature,
    "line": along_eigenvector,
    "plane": around_weights,
    "inputs": around_inputs,
    "activations": activations,
}


def some(part: Images, data: Data, count: int) -> tuple[Tensor, Tensor]:
    """A fixed random choice of images, normalised and not augmented, as one batch.

    Args:
        part: of the data set.
        data: all of it.
        count: how many; all where there are fewer.

    Returns:
        Images and labels.
    """
    order = torch.randperm(len(part), generator=torch.Generator().manual_seed(SPLIT_SEED))[:count]
    chosen = part[order.to(part.labels.device)]
    return data.normalise(chosen.images), chosen.labels


def stage_of(site: str) -> str:
    """The stage of a network that an activation belongs to, counted from 1; what is before the stages is the stem.

    Example:
        >>> stage_of("stages.0.1.act2"), stage_of("act"), stage_of("layer3.0.relu")
        ('stage 1', 'stem', 'stage 3')
    """
    if found := re.match(r"stages\.(\d+)\.", site):
        return f"stage {int(found[1]) + 1}"
    if found := re.match(r"layer(\d+)\.", site):
        return f"stage {found[1]}"
    return "stem" if "." not in site else site.split(".")[0]


def _tops(model: nn.Module, batch: tuple[Tensor, Tensor], tolerance: float) -> dict[str, TopEigenvalues]:
    """The largest eigenvalue by space; a network without masks has one space under both names."""
    over = "both" if find_masks(model) else "kept"
    top = hessian_top_eigenvalues(model, batch, LOSS, over=over, tolerance=tolerance)
    return {KEPT: top, ALL: top.beside or top}


def _of_plane(plane: Any) -> tuple[dict[str, float], dict[str, Any]]:
    losses = [value for row in plane.losses for value in row]
    rise = statistics.median(value - plane.center for value in losses)
    numbers = {"median rise": rise, "rise": plane.rise, "loss": plane.center}
    return numbers, {"x": plane.xs, "y": plane.ys, "losses": plane.losses, "names": plane.names}
