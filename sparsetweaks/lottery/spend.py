"""Spending a ticket: retrain it, with tweaks or without, at a number of non-zero weights that is the same for all."""

from __future__ import annotations

import inspect
import itertools
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsetweaks.lottery.config import LotteryError, Recipe, Tweaks, key
from sparsetweaks.lottery.data import Data, batches
from sparsetweaks.lottery.store import Ticket
from sparsetweaks.lottery.train import SEED_STRIDE, Trained, computes_in_bfloat16, load_trained, train
from sparsetweaks.masks import apply_masks, find_masks
from sparsetweaks.pruning import prune
from sparsetweaks.recipe.labels import SoftLabelLoss
from sparsetweaks.recipe.layer_scales import learn_layer_scales
from sparsetweaks.surgery.activations import swap_activations
from sparsetweaks.surgery.skips import inject_skips

Loss = Callable[[Tensor, Tensor], Tensor]


def spend(
    ticket: Ticket,
    tweaks: Tweaks,
    data: Data,
    recipe: Recipe,
    *,
    seed: int,
    folder: Path,
    rewind_epoch: int = 0,
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
        rewind_epoch: see `train`.
        on_epoch: see `train`.

    Returns:
        What the training came to. Its note tells the non-zeros, the times and the machine.

    Raises:
        LotteryError: when the ticket belongs to other data, or the tweaks add more than survives.
    """
    if ticket.fingerprint != data.fingerprint:
        raise LotteryError(
            f"the ticket was drawn on other data ({ticket.data!r}) than was given ({data.name!r})"
        )
    path = folder / f"{run_key(ticket, tweaks, recipe, seed=seed, rewind_epoch=rewind_epoch)}.safetensors"
    if path.is_file() and (trained := load_trained(path)).test is not None:
        return trained
    started = time.perf_counter()
    model, loss, counts = tweaked(ticket, tweaks, data, recipe, seed=seed)
    note = {
        **counts,
        "prepare_seconds": time.perf_counter() - started,
        **surroundings(recipe, data.mean.device),
    }
    return train(
        model,
        data,
        recipe,
        seed=seed,
        loss=loss,
        rewind_epoch=rewind_epoch,
        checkpoint=path,
        note=note,
        on_epoch=on_epoch,
    )


def run_key(ticket: Ticket, tweaks: Tweaks, recipe: Recipe, *, seed: int, rewind_epoch: int = 0) -> str:
    """The name of a run, made of everything that determines it.

    Args:
        ticket: what is retrained.
        tweaks: with what changes.
        recipe: and how.
        seed: of the training.
        rewind_epoch: see `train`.

    Returns:
        16 hexadecimal digits.
    """
    options: dict[str, Any] = {"activation": tweaks.activation, "smoothing": tweaks.smoothing}
    for name, function, given in (
        ("skips", inject_skips, tweaks.skips),
        ("scales", learn_layer_scales, tweaks.scales),
    ):
        options[name] = None if given is None else {**_defaults(function), **given}
    return key(ticket.identity, options, recipe, seed, rewind_epoch)


def tweaked(
    ticket: Ticket, tweaks: Tweaks, data: Data, recipe: Recipe, *, seed: int
) -> tuple[nn.Module, Loss, dict[str, int]]:
    """The masked network with its tweaks, and the loss to train it with, at the ticket's own number of non-zeros.

    What a tweak adds, it pays for: for every non-zero that the skips bring, one more of the ticket's smallest weights
    is pruned. So a variant and the vanilla ticket have the same budget, and a gain is one of the tweak, not of its size.

    Args:
        ticket: with its masks; a dense one (level 0) pays nothing.
        tweaks: to make.
        data: to learn the layer scales on.
        recipe: for the batches of the layer scales.
        seed: of those batches.

    Returns:
        The model, on the device of `data`; the loss; and `nonzeros` (surviving weights), `added` (what tweaks brought),
        `budget` (their sum) and `parameters` (all there are, masked or not).

    Raises:
        LotteryError: when the tweaks add as much as survives, or more.
    """
    device = data.mean.device
    model = ticket.model()
    added = 0
    if tweaks.skips is not None:
        added = _added(inject_skips(model, **tweaks.skips))
        if ticket.masks and added:
            model = apply_masks(model, _pruned_further(ticket, added))
        model = inject_skips(model, **tweaks.skips)
    if tweaks.activation is not None:
        model = swap_activations(model, tweaks.activation)
    model.to(device).to(memory_format=torch.channels_last)
    loss: Loss = SoftLabelLoss(tweaks.smoothing) if tweaks.smoothing else nn.CrossEntropyLoss()
    if tweaks.scales is not None:  # last, as the scales depend on the architecture that is trained
        with torch.autocast(device.type, torch.bfloat16, enabled=computes_in_bfloat16(recipe, device)):
            model = learn_layer_scales(model, _endless(data, recipe, seed), loss=loss, **tweaks.scales)
    survivors = sum(int(mask.sum()) for mask in find_masks(model).values())
    counts = {"nonzeros": survivors, "added": added, "budget": survivors + added}
    return model, loss, {**counts, "parameters": sum(p.numel() for p in model.parameters())}


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
    return {
        "run": run_key(ticket, tweaks, recipe, seed=seed),
        "data": data.name,
        "train_images": len(data.train),
        "image_size": data.train.images.shape[-1],
        "architecture": ticket.network.name,
        "width": ticket.network.width,
        "level": ticket.level,
        "sparsity": round(ticket.sparsity, 6),
        "variant": name,
        "seed": seed,
        "epochs": recipe.epochs,
        "validation": round(trained.validation, 6),
        "test": round(trained.test or 0.0, 6),
        "best_epoch": trained.best_epoch,
        **{column: trained.note[column] for column in ("nonzeros", "added", "budget", "parameters")},
        "train_seconds": round(trained.seconds, 3),
        "step_milliseconds": round(1000 * trained.seconds / trained.steps, 3),
        "prepare_seconds": round(trained.note["prepare_seconds"], 3),
        **{
            column: trained.note[column]
            for column in ("precision", "compiled", "threads", "torch", "hardware")
        },
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
    return {
        "precision": "bfloat16" if computes_in_bfloat16(recipe, device) else "float32",
        "compiled": recipe.compile,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "hardware": hardware,
    }


def processor() -> str:
    """The processor's own name where the system tells it, as Linux does, else its architecture."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return str(capabilities.get("cpu_name") or platform.processor() or platform.machine())


def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """Keyword options with their defaults: a run made before a default changed is not one made after it."""
    options = inspect.signature(function).parameters.values()
    return {option.name: option.default for option in options if option.kind is option.KEYWORD_ONLY}


def _added(model: nn.Module) -> int:
    """How many parameters the tweaks brought, all of them non-zero once trained."""
    found = (module for module in model.modules() if getattr(module, "added_by_tweak", False))
    return sum(parameter.numel() for parameter in {p for module in found for p in module.parameters()})


def _pruned_further(ticket: Ticket, count: int) -> dict[str, Tensor]:
    """The ticket's masks without its `count` smallest weights, by the magnitudes that chose the masks."""
    if count >= ticket.nonzeros:
        raise LotteryError(
            f"the skips add {count} parameters, and only {ticket.nonzeros} weights survive to pay for them: "
            'choose skips that add fewer, such as shortcut="pad"'
        )
    scored = replace(ticket, rewound=ticket.scored).model()
    return find_masks(prune(scored, count / ticket.nonzeros, of="remaining"))


def _endless(data: Data, recipe: Recipe, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Unaugmented batches for as long as they are asked for, of half the size, as two of them make a training step."""
    for epoch in itertools.count():
        generator = torch.Generator(data.mean.device).manual_seed(seed * SEED_STRIDE + epoch)
        yield from batches(data.train, data, size=recipe.batch_size // 2, padding=0, generator=generator)
