"""Lottery Pools, the bar without any tweak: a trained ticket interpolated with those of neighbouring levels.

Yin et al. 2022 (arXiv 2208.10842). No training beyond that of the plain tickets, and no more non-zeros than the ticket.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsetweaks.lottery.config import Recipe, RunError, Tweaks, key
from sparsetweaks.lottery.data import Data
from sparsetweaks.lottery.files import State
from sparsetweaks.lottery.spend import load_run, named, row, run_key, spend, title_of
from sparsetweaks.lottery.store import Ticket
from sparsetweaks.lottery.train import (
    Trained,
    accuracy,
    computes_in_bfloat16,
    refresh_statistics,
    save_trained,
)
from sparsetweaks.lottery.tweaking import largest
from sparsetweaks.masks import apply_masks
from sparsetweaks.selection import keep_highest_per_layer

NAME = "pools"  # of the variant
NEIGHBOURS = 2  # the authors' code: three tickets, with the ticket itself
SHARES = tuple(
    tenths / 10 for tenths in range(1, 10)
)  # of the neighbour, of which the best in validation is taken


def pool(
    ticket: Ticket, tickets: Sequence[Ticket], data: Data, recipe: Recipe, *, seed: int, folder: Path
) -> Trained:
    """Interpolate a ticket's trained weights with its neighbours', one after the other, as long as validation gains.

    After each interpolation the smallest weights are pruned until there are as many as before, in each layer where the
    ticket's scope gave each its number and in all together where it is global; and BatchNorm's
    statistics are taken anew. The shares are chosen on the validation images, where the authors' code takes the test
    images; these are looked at once, at the end.

    Args:
        ticket: whose numbers of non-zeros are kept.
        tickets: all levels of its drawing; the nearest `NEIGHBOURS` of other levels are taken.
        data: the data set they were drawn on.
        recipe: how they are trained, unless they are already.
        seed: of the trainings.
        folder: of the runs.

    Returns:
        What came of it, kept like a training.

    Raises:
        RunError: as `spend`, and when no other ticket is of the same network, initialisation and data.
    """
    with named(title_of(ticket, NAME, seed)):
        pooled = (ticket, *_neighbours(ticket, tickets))
        path = folder / f"{pool_key(ticket, tickets, recipe, seed=seed, device=data.mean.device)}.safetensors"
        if path.is_file():
            return load_run(path)
        own, *others = (spend(each, Tweaks(), data, recipe, seed=seed, folder=folder) for each in pooled)
    started, device = time.perf_counter(), data.mean.device
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=computes_in_bfloat16(recipe, device))
    best, validation = own.weights["best"], own.validation
    for other in others:
        current = best
        for share in SHARES:
            model = _interpolated(ticket, current, other.weights["best"], share).to(device)
            with autocast:
                refresh_statistics(model, data, size=recipe.batch_size)
                found = accuracy(model, data.validation, data)
            if found > validation:
                best, validation = {name: t.clone() for name, t in model.state_dict().items()}, found
    model = _loaded(ticket, best).to(device)
    with autocast:
        test = accuracy(model, data.test, data)
    done = replace(own, validation=validation, test=test, weights={"best": best, "last": best})
    done.note = {**own.note, "prepare_seconds": time.perf_counter() - started}
    save_trained(path, done)
    return done


def pool_row(
    ticket: Ticket, tickets: Sequence[Ticket], data: Data, recipe: Recipe, trained: Trained, *, seed: int
) -> dict[str, Any]:
    """The line of the results, as `row` gives it for a training; its preparation is the interpolating.

    Args:
        ticket, tickets, data, recipe, seed: as given to `pool`.
        trained: what it gave.

    Returns:
        Values by column.
    """
    told = row(ticket, NAME, Tweaks(), data, recipe, trained, seed=seed)
    return {**told, "run": pool_key(ticket, tickets, recipe, seed=seed, device=data.mean.device)}


def pool_key(
    ticket: Ticket, tickets: Sequence[Ticket], recipe: Recipe, *, seed: int, device: torch.device
) -> str:
    """The name of an interpolation, made of everything that determines it.

    Args:
        ticket, tickets, recipe, seed: as given to `pool`.
        device: of its data.

    Returns:
        16 hexadecimal digits.
    """
    pooled = (ticket, *_neighbours(ticket, tickets))
    runs = [run_key(each, Tweaks(), recipe, seed=seed, device=device) for each in pooled]
    by_layer = (
        () if ticket.scope == "global" else ("by layer",)
    )  # before, these were pruned as if they were global
    return key(NAME, runs, SHARES, *by_layer)


def _neighbours(ticket: Ticket, tickets: Sequence[Ticket]) -> list[Ticket]:
    """The nearest of the same drawing, of which the dense network is one: by level, and within one by what remains."""
    same = (ticket.network, ticket.fingerprint, ticket.seed)
    drawing = (ticket.drawn, _steps(ticket))
    others = [
        each
        for each in tickets
        if (each.network, each.fingerprint, each.seed) == same
        and each.identity != ticket.identity
        and (not (each.level and ticket.level) or (each.drawn, _steps(each)) == drawing)
    ]
    if not others:
        raise RunError(
            f"{NAME} interpolates a ticket with others of the same drawing: give the tickets of several levels"
        )

    def distance(other: Ticket) -> tuple[float, float, float]:
        apart = abs(math.log((1 - other.sparsity) / (1 - ticket.sparsity)))
        return (abs(other.level - ticket.level) if ticket.method == "imp" else 0, apart, other.sparsity)

    return sorted(others, key=distance)[:NEIGHBOURS]


def _steps(ticket: Ticket) -> str:
    """What of the drawing all levels of it share: iterative pruning's training and fraction."""
    return ticket.drawing if ticket.method == "imp" else ""


def _interpolated(ticket: Ticket, own: State, other: State, share: float) -> nn.Module:
    """The network between two sets of weights, pruned to the ticket's number of non-zeros."""
    model = ticket.unmasked()
    names = model.state_dict()
    model.load_state_dict(
        {
            name: torch.lerp(own[name].cpu(), other[name].cpu(), share)
            if own[name].is_floating_point()
            else own[name].cpu()
            for name in names
        }
    )
    return _pruned(model, ticket)


def _pruned(model: nn.Module, ticket: Ticket) -> nn.Module:
    """The largest weights of all, as many as the ticket keeps; where its scope gave layers their numbers, of each layer."""
    if not ticket.masks:
        return model
    dense = {name: torch.ones_like(mask) for name, mask in ticket.masks.items()}
    if ticket.scope == "global":
        return apply_masks(model, largest(model, dense, ticket.nonzeros))
    weights = {name: model.get_parameter(name).detach() for name in ticket.masks}
    counts = {name: int(mask.sum()) for name, mask in ticket.masks.items()}
    return apply_masks(model, keep_highest_per_layer(weights, dense, counts, absolute=True))


def _loaded(ticket: Ticket, state: State) -> nn.Module:
    """The network with these weights; what is pruned is zero in them."""
    model = ticket.unmasked()
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    return model
