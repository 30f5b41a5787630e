"""Drawing tickets: spend one without tweaks, prune the smallest weights of what came out, rewind the others, repeat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from sparsetweaks.lottery.config import LotteryError, Network, Recipe, Tweaks, key
from sparsetweaks.lottery.data import Data
from sparsetweaks.lottery.models import build
from sparsetweaks.lottery.spend import run_key, spend
from sparsetweaks.lottery.store import State, Ticket, save_ticket
from sparsetweaks.lottery.train import Trained
from sparsetweaks.masks import find_masks
from sparsetweaks.pruning import prune

LEVELS = 16  # the authors' code
FRACTION = 0.2  # of the remaining weights, per level: the authors' code


def dense_ticket(network: Network, data: Data, *, seed: int) -> Ticket:
    """Level 0: the whole network at its initialisation.

    Args:
        network: depth and width.
        data: for the channels and the classes.
        seed: of the initialisation.

    Returns:
        A ticket without masks.

    Example:
        >>> from sparsetweaks.lottery.data import load
        >>> ticket = dense_ticket(Network(depth=8, width=4), load("digits"), seed=0)
        >>> ticket.level, ticket.sparsity
        (0, 0.0)
    """
    classes = len(data.classes)
    initial = build(network, channels=data.channels, classes=classes, seed=seed).state_dict()
    identity = key(network, data.fingerprint, seed)
    return Ticket(
        identity,
        network,
        data.channels,
        classes,
        data.name,
        data.fingerprint,
        seed,
        0,
        {},
        initial,
        initial,
        initial,
    )


def draw(
    data: Data,
    network: Network,
    recipe: Recipe,
    *,
    seed: int,
    folder: Path,
    levels: int = LEVELS,
    fraction: float = FRACTION,
    rewind_epoch: int = 0,
    on_epoch: Callable[[Trained], None] | None = None,
    on_ticket: Callable[[Ticket], None] | None = None,
) -> list[Ticket]:
    """Draw tickets by iterative magnitude pruning with rewinding (the paper, 2; Frankle and Carbin 2019).

    Each level trains the ticket before it and prunes a fraction of what remains, globally by magnitude. Every training
    is kept in `folder`: one that is there is not run again, and a drawing that was cut off goes on where it was.

    Args:
        data: from `load`.
        network: depth and width.
        recipe: how to train each level; the schedule starts anew each time, also after rewinding to a later epoch.
        seed: of the initialisation and of each training.
        folder: for `tickets/`, one file per level, and `runs/`, one per training.
        levels: how often to prune.
        fraction: of the remaining weights to prune per level, in (0, 1).
        rewind_epoch: epoch of the dense training to rewind to; 0 is the initialisation.
        on_epoch: see `train`.
        on_ticket: called with each ticket when it is drawn.

    Returns:
        The tickets of level 0 (dense) to `levels`.

    Raises:
        LotteryError: for a fraction, a number of levels or a rewinding epoch out of range.
    """
    if not 0 < fraction < 1:
        raise LotteryError(f"fraction must lie between 0 and 1, got {fraction}")
    if levels < 1:
        raise LotteryError(f"levels must be at least 1, got {levels}")
    ticket, trained = _dense(data, network, recipe, seed, folder, rewind_epoch, on_epoch)
    tickets = [ticket]
    for level in range(1, levels + 1):
        if level > 1:
            trained = spend(
                ticket, Tweaks(), data, recipe, seed=seed, folder=folder / "runs", on_epoch=on_epoch
            )
        ticket = _pruned(ticket, trained, recipe, fraction, folder, rewind_epoch)
        tickets.append(ticket)
        if on_ticket is not None:
            on_ticket(ticket)
    return tickets


def draw_one_shot(
    data: Data,
    network: Network,
    recipe: Recipe,
    *,
    seed: int,
    folder: Path,
    sparsities: Sequence[float],
    rewind_epoch: int = 0,
    on_epoch: Callable[[Trained], None] | None = None,
    on_ticket: Callable[[Ticket], None] | None = None,
) -> list[Ticket]:
    """Draw a ticket per sparsity by one-shot magnitude pruning: train once, prune once, rewind.

    Args:
        data: from `load`.
        network: depth and width.
        recipe: how to train the dense network.
        seed: of the initialisation and of the training.
        folder: for `tickets/` and `runs/`.
        sparsities: fractions of the weights to remove, each in (0, 1).
        rewind_epoch: epoch of the dense training to rewind to; 0 is the initialisation.
        on_epoch: see `train`.
        on_ticket: called with each ticket when it is drawn.

    Returns:
        The dense ticket, then one per sparsity, all of those of level 1.

    Raises:
        LotteryError: for a sparsity or a rewinding epoch out of range.
    """
    for sparsity in sparsities:
        if not 0 < sparsity < 1:
            raise LotteryError(f"sparsity must lie between 0 and 1, got {sparsity}")
    ticket, trained = _dense(data, network, recipe, seed, folder, rewind_epoch, on_epoch)
    tickets = [_pruned(ticket, trained, recipe, each, folder, rewind_epoch) for each in sparsities]
    if on_ticket is not None:
        for drawn in tickets:
            on_ticket(drawn)
    return [ticket, *tickets]


def ticket_path(folder: Path, ticket: Ticket) -> Path:
    """Where a ticket is kept: a name to read, and a key that makes it the only one.

    Args:
        folder: of the lottery.
        ticket: to be kept.

    Returns:
        The path of its file.
    """
    name = f"{ticket.network.name}w{ticket.network.width}-{ticket.data}-seed{ticket.seed}-level{ticket.level:02d}"
    return folder / "tickets" / f"{name}-{ticket.sparsity:.4f}-{ticket.identity}.safetensors"


def _dense(
    data: Data,
    network: Network,
    recipe: Recipe,
    seed: int,
    folder: Path,
    rewind_epoch: int,
    on_epoch: Callable[[Trained], None] | None,
) -> tuple[Ticket, Trained]:
    if not 0 <= rewind_epoch < recipe.epochs:
        raise LotteryError(f"rewind_epoch must lie between 0 and {recipe.epochs - 1}, got {rewind_epoch}")
    ticket = dense_ticket(network, data, seed=seed)
    save_ticket(ticket, ticket_path(folder, ticket))
    runs = folder / "runs"
    trained = spend(
        ticket, Tweaks(), data, recipe, seed=seed, folder=runs, rewind_epoch=rewind_epoch, on_epoch=on_epoch
    )
    return ticket, trained


def _pruned(
    ticket: Ticket, trained: Trained, recipe: Recipe, fraction: float, folder: Path, rewind_epoch: int
) -> Ticket:
    """The next ticket: `fraction` of the remaining weights pruned by their final magnitudes, the others rewound."""
    scored = trained.weights["last"]
    model = replace(ticket, rewound=_without_masks(scored)).model()
    masks = find_masks(prune(model, fraction, of="remaining"))
    run = run_key(
        ticket, Tweaks(), recipe, seed=ticket.seed, rewind_epoch=rewind_epoch if ticket.level == 0 else 0
    )
    rewound = _without_masks(trained.weights["rewind"]) if ticket.level == 0 else ticket.rewound
    identity = key(ticket.identity, run, fraction)
    drawn = replace(
        ticket,
        identity=identity,
        level=ticket.level + 1,
        masks=masks,
        rewound=rewound,
        scored=_without_masks(scored),
    )
    save_ticket(drawn, ticket_path(folder, drawn))
    return drawn


def _without_masks(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if not name.endswith("_mask")}
