"""Spending a ticket: retrain it, with tweaks or without; one row of results per run."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsetweaks.errors import SurgeryError
from sparsetweaks.lottery import ranks
from sparsetweaks.lottery.config import LotteryError, Recipe, RunError, Tweaks, key
from sparsetweaks.lottery.data import Data
from sparsetweaks.lottery.models import code_of
from sparsetweaks.lottery.rows import COUNTED_LATER
from sparsetweaks.lottery.store import Ticket
from sparsetweaks.lottery.train import Trained, load_trained, precision_of, train
from sparsetweaks.lottery.tweaking import tweaked
from sparsetweaks.recipe.labels import distillation_loss
from sparsetweaks.recipe.layer_scales import learn_layer_scales
from sparsetweaks.surgery.skips import inject_skips

REWINDING = 33 / 180  # of the epochs: the paper, 4.1, where it says "18 %"
AVERAGING = 0.75  # of the epochs, after which weights are averaged (Izmailov et al. 2018, 4.1)
COUNTED = ("nonzeros", "added", "budget", "parameters", "nonzero_parameters", "flops", "effective_flops")
MEASURED_ON = ("precision", "compiled", "threads", "torch", "hardware")


def spend(
    ticket: Ticket,
    tweaks: Tweaks,
    data: Data,
    recipe: Recipe,
    *,
    seed: int,
    folder: Path,
    name: str = "vanilla",
    rewind_epoch: int | None = None,
    keep_epochs: Sequence[int] = (),
    on_epoch: Callable[[Trained], None] | None = None,
) -> Trained:
    """Retrain a ticket with tweaks; a run that is already in `folder` is read back, one that was cut off goes on.

    Args:
        ticket: what to retrain.
        tweaks: what to change about it first.
        data: the data set it was drawn on.
        recipe: how to train.
        seed: of the order of the images and their augmentation.
        folder: to keep the run in, under a name made of everything that determines it.
        name: of the tweaks, for whoever watches.
        rewind_epoch: see `train`; the default is the one of `rewinding_epoch` for a dense ticket, 0 for others.
        keep_epochs: see `train`. A run that is there without them is run again, under the same name.
        on_epoch: see `train`.

    Returns:
        What the training came to. Its note tells the non-zeros, the times and the machine.

    Raises:
        RunError: named as the run: as `train`; when the tweaks add more than survives, or do not go with the network; or
            when the ticket has no weights of the kind that they start from.
        LotteryError: when the ticket belongs to other data, or another version has kept a run of this name that says too
            little.
    """
    if ticket.fingerprint != data.fingerprint:
        raise LotteryError(
            f"the ticket was drawn on other data ({ticket.data!r}) than was given ({data.name!r}): give the same images, "
            "and the same --size, --limit and --split-seed, as when it was drawn"
        )
    if rewind_epoch is None:
        rewind_epoch = 0 if ticket.level else rewinding_epoch(recipe)
    device = data.mean.device
    run = run_key(ticket, tweaks, recipe, seed=seed, device=device, rewind_epoch=rewind_epoch)
    path = folder / f"{run}.safetensors"
    kept = ranks.from_leader(lambda: load_run(path) if path.is_file() else None)
    if kept is not None and kept.test is not None and not kept.lacks(keep_epochs):
        return kept
    title = title_of(ticket, name, seed)
    with named(title):
        teacher = None
        if tweaks.distillation:
            at = ticket.late_epoch or rewinding_epoch(recipe)
            teacher = _dense_network(ticket.dense(), data, recipe, folder, at, on_epoch)
        started = time.perf_counter()
        model, loss, counts = tweaked(ticket, tweaks, data, recipe, seed=seed)
        note = {
            **counts,
            "prepare_seconds": time.perf_counter() - started,
            **surroundings(recipe, device),
        }
        return train(
            model,
            data,
            replace(recipe, average_from=AVERAGING) if tweaks.averaging else recipe,
            seed=seed,
            loss=loss,
            teacher=teacher,
            rewind_epoch=rewind_epoch,
            keep_epochs=keep_epochs,
            checkpoint=path,
            note=note,
            title=title,
            on_epoch=on_epoch,
        )


@contextlib.contextmanager
def named(title: str) -> Iterator[None]:
    """Whatever is wrong with a run is said with its name, also where it was a tweak that did not go with its network.

    Args:
        title: the name.

    Example:
        >>> with named("seed 0, AT"):
        ...     raise RunError("the loss became nan")
        Traceback (most recent call last):
        sparsetweaks.lottery.config.RunError: seed 0, AT: the loss became nan
    """
    try:
        yield
    except (RunError, SurgeryError) as error:
        raise RunError(f"{title}: {error}") from error


def load_run(path: Path) -> Trained:
    """Read a run that `spend` keeps, finished or not, and check that it says what a row of results needs.

    Args:
        path: of its file.

    Returns:
        What the training came to.

    Raises:
        LotteryError: as `load_trained`; and for a run of a version that noted less, as what it took cannot be told later.
    """
    trained = load_trained(path)
    missing = [name for name in (*COUNTED, "prepare_seconds", *MEASURED_ON) if name not in trained.note]
    if missing:
        raise LotteryError(
            f"{path} was kept by another version of sparsetweaks, which noted no {', '.join(missing)}: choose another "
            "folder with --out, or delete this file to have it run anew"
        )
    return trained


def rewinding_epoch(recipe: Recipe) -> int:
    """The epoch of the dense training that "rewinding" goes back to: 33 of 180 in the paper, at least the first.

    Args:
        recipe: for the number of its epochs.

    Returns:
        An epoch before the last; 0, which is none, where there is only one.

    Example:
        >>> rewinding_epoch(Recipe(epochs=180)), rewinding_epoch(Recipe(epochs=2)), rewinding_epoch(Recipe(epochs=1))
        (33, 1, 0)
    """
    return min(max(1, round(REWINDING * recipe.epochs)), recipe.epochs - 1)


def run_key(
    ticket: Ticket,
    tweaks: Tweaks,
    recipe: Recipe,
    *,
    seed: int,
    device: torch.device,
    rewind_epoch: int | None = None,
) -> str:
    """The name of a run, made of everything that determines it.

    Of the device that is what it computes in: a folder that moves to a machine where "auto" means something else holds
    both kinds of runs, each under its own name.

    Args:
        ticket: what is retrained.
        tweaks: with what changes.
        recipe: and how.
        seed: of the training.
        device: to train on.
        rewind_epoch: see `spend`.

    Returns:
        16 hexadecimal digits.
    """
    if rewind_epoch is None:
        rewind_epoch = 0 if ticket.level else rewinding_epoch(recipe)
    options = dataclasses.asdict(tweaks)
    for name, function in (("skips", inject_skips), ("scales", learn_layer_scales)):
        given = options[name]
        options[name] = None if given is None else {**defaults_of(function), **given}
    if tweaks.distillation:
        taught = defaults_of(distillation_loss)
        options["distillation"] = [taught["temperature"], taught["weight"]]
    if tweaks.averaging:
        options["averaging"] = AVERAGING
    code = code_of(ticket.network, channels=ticket.channels, classes=ticket.classes, seed=ticket.seed)
    return key(ticket.identity, options, computed(recipe, device), seed, rewind_epoch, *code)


def computed(recipe: Recipe, device: torch.device) -> Recipe:
    """A recipe with the precision that it is really computed in, for whatever is keyed by it.

    Args:
        recipe: whose precision may be "auto".
        device: to compute on.

    Returns:
        The recipe with "float32" or "bfloat16".
    """
    return replace(recipe, precision=precision_of(recipe, device))


def row(
    ticket: Ticket, name: str, tweaks: Tweaks, data: Data, recipe: Recipe, trained: Trained, *, seed: int
) -> dict[str, Any]:
    """One line of the results: what was run, what it came to, what it cost, and on what.

    Args:
        ticket: what was retrained.
        name: of the variant.
        tweaks: that it stands for.
        data: trained on.
        recipe: trained by.
        trained: what came of it.
        seed: of the training.

    Returns:
        Values by column.
    """
    device = data.mean.device
    return {
        "run": run_key(ticket, tweaks, recipe, seed=seed, device=device),
        "data": data.name,
        "train_images": len(data.train),
        "image_size": data.train.images.shape[-1],
        "fingerprint": ticket.fingerprint[:6],
        "architecture": ticket.network.name,
        "width": ticket.network.width or "",
        "drawn": ticket.drawn,
        "drawing": ticket.drawing,
        "ticket": ticket.identity,
        "ticket_seed": ticket.seed,
        "level": ticket.level,
        "sparsity": round(ticket.sparsity, 6),
        "variant": name,
        "seed": seed,
        "epochs": recipe.epochs,
        "recipe": key(computed(recipe, device))[:6],
        "validation": round(trained.validation, 6),
        "test": round(trained.test or 0.0, 6),
        "best_epoch": trained.best_epoch,
        **{column: trained.note[column] for column in COUNTED},
        **{column: trained.note.get(column, "") for column in COUNTED_LATER},
        "train_seconds": round(trained.seconds, 3),
        "step_milliseconds": round(1000 * trained.seconds / trained.steps, 3),
        "prepare_seconds": round(trained.note["prepare_seconds"], 3),
        **{column: trained.note[column] for column in MEASURED_ON},
    }


def surroundings(recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """What a time was measured on, and a result computed with.

    Args:
        recipe: for its precision and whether it compiles.
        device: trained on.

    Returns:
        Values by column.
    """
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    if ranks.count() > 1:
        hardware = f"{ranks.count()} x {hardware}"
    return {
        "precision": precision_of(recipe, device),
        "compiled": recipe.compile,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "hardware": hardware,
    }


def processor() -> str:
    """The processor's own name where the system tells it, as Linux does, else its architecture."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return str(capabilities.get("cpu_name") or platform.processor() or platform.machine())


def defaults_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Keyword options with their defaults: a run made before a default changed is not one made after it.

    Args:
        function: whose.

    Returns:
        Values by name.
    """
    options = inspect.signature(function).parameters.values()
    return {option.name: option.default for option in options if option.kind is option.KEYWORD_ONLY}


def _dense_network(
    ticket: Ticket,
    data: Data,
    recipe: Recipe,
    folder: Path,
    rewind_epoch: int,
    on_epoch: Callable[[Trained], None] | None,
) -> nn.Module:
    """The dense network as it was trained, which is read back where drawing has trained it already."""
    trained = spend(
        ticket,
        Tweaks(),
        data,
        recipe,
        seed=ticket.seed,
        folder=folder,
        rewind_epoch=rewind_epoch,
        on_epoch=on_epoch,
    )
    model = ticket.model()
    model.load_state_dict(trained.weights["best"])
    return model


def title_of(ticket: Ticket, name: str, seed: int) -> str:
    """The name of a run, for people.

    Args:
        ticket: what is retrained.
        name: of the tweaks.
        seed: of the training.

    Returns:
        Network, data, seeds, level, sparsity and tweaks.
    """
    level = f"{ticket.drawn}, level {ticket.level}, {100 * ticket.sparsity:.1f} % sparse"
    sparse = level if ticket.level else "dense"
    return f"{ticket.network.name} on {ticket.data}, {seeds_of(ticket.seed, seed)}, {sparse}, {name}"


def seeds_of(ticket: int, training: int) -> str:
    """The seed of a ticket and that of a training of it, in words.

    Example:
        >>> seeds_of(0, 0), seeds_of(0, 7)
        ('seed 0', 'ticket of seed 0, seed 7')
    """
    return f"seed {training}" if ticket == training else f"ticket of seed {ticket}, seed {training}"
