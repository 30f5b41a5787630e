"""Drawing tickets: spend one without tweaks, prune the smallest weights of what came out, rewind the others, repeat.

Or in one shot, or before any training, or by masks that somebody brings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from sparsetweaks.lottery.config import LotteryError, Network, Recipe, Tweaks, key
from sparsetweaks.lottery.data import Data
from sparsetweaks.lottery.files import State
from sparsetweaks.lottery.spend import computed, rewinding_epoch, run_key, spend
from sparsetweaks.lottery.store import Ticket, dense_ticket, read_masks, save_ticket, ticket_path
from sparsetweaks.lottery.train import Trained
from sparsetweaks.lottery.tweaking import SCORED_PER_CLASS, narrowed, pruned_untrained

UNTRAINED = ("random", "snip", "grasp", "synflow")  # what `prune` can do with an untrained network
SCOPES = ("global", "layer", "erk")
LEVELS = 16  # the authors' code
FRACTION = 0.2  # of the remaining weights, per level: the authors' code


def draw(
    data: Data,
    network: Network,
    recipe: Recipe,
    *,
    seed: int,
    folder: Path,
    levels: int = LEVELS,
    fraction: float = FRACTION,
    scope: str = "global",
    rewind_epoch: int = 0,
    on_epoch: Callable[[Trained], None] | None = None,
    on_ticket: Callable[[Ticket], None] | None = None,
) -> list[Ticket]:
    """Draw tickets by iterative magnitude pruning with rewinding (the paper, 2; Frankle and Carbin 2019).

    Each level trains the ticket before it and prunes a fraction of what remains, by magnitude. Every training
    is kept in `folder`: one that is there is not run again, and a drawing that was cut off goes on where it was.

    Args:
        data: from `load`.
        network: depth and width.
        recipe: how to train each level; the schedule starts anew each time, also after rewinding to a later epoch.
        seed: of the initialisation and of each training.
        folder: for `tickets/`, one file per level, and `runs/`, one per training.
        levels: how often to prune.
        fraction: of the remaining weights to prune per level, in (0, 1).
        scope: how many weights each layer keeps, one of `SCOPES`; "global", the default, is the paper's.
        rewind_epoch: epoch of the dense training to start from; 0 is the initialisation. (Variants with "rewinding"
            start a ticket that was drawn from 0 at `rewinding_epoch`, under the same masks.)
        on_epoch: see `train`.
        on_ticket: called with each ticket when it is drawn.

    Returns:
        The tickets of level 0 (dense) to `levels`.

    Raises:
        LotteryError: for a fraction, a number of levels or a rewinding epoch out of range, or a scope that is not there.
    """
    _check_scope(scope)
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
        ticket = _pruned(ticket, trained, data, recipe, fraction, folder, "imp", scope, rewind_epoch)
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
    scope: str = "global",
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
        scope: how many weights each layer keeps, one of `SCOPES`.
        rewind_epoch: epoch of the dense training to start from; 0 is the initialisation. (Variants with "rewinding"
            start a ticket that was drawn from 0 at `rewinding_epoch`, under the same masks.)
        on_epoch: see `train`.
        on_ticket: called with each ticket when it is drawn.

    Returns:
        The dense ticket, then one per sparsity, all of those of level 1.

    Raises:
        LotteryError: for a sparsity or a rewinding epoch out of range, or a scope that is not there.
    """
    _check_scope(scope)
    _check_sparsities(sparsities)
    ticket, trained = _dense(data, network, recipe, seed, folder, rewind_epoch, on_epoch)
    tickets = [
        _pruned(ticket, trained, data, recipe, each, folder, "omp", scope, rewind_epoch)
        for each in sparsities
    ]
    if on_ticket is not None:
        for drawn in tickets:
            on_ticket(drawn)
    return [ticket, *tickets]


def draw_untrained(
    data: Data,
    network: Network,
    *,
    method: str,
    sparsities: Sequence[float],
    seed: int,
    folder: Path,
    scope: str = "global",
    on_ticket: Callable[[Ticket], None] | None = None,
) -> list[Ticket]:
    """Draw a ticket per sparsity from the untrained network: at random, or by SNIP, GraSP or SynFlow.

    Args:
        data: from `load`; ten training images per class are scored on.
        network: which.
        method: one of `UNTRAINED`, see `sparsetweaks.prune`.
        sparsities: fractions of the weights to remove, each in (0, 1).
        seed: of the initialisation, and of what is drawn at random.
        folder: for `tickets/`.
        scope: how many weights each layer keeps, one of `SCOPES`.
        on_ticket: called with each ticket when it is drawn.

    Returns:
        The dense ticket, then one per sparsity, all of those of level 1.

    Raises:
        LotteryError: for a sparsity out of range, or a method or scope that is not there.
    """
    if method not in UNTRAINED:
        raise LotteryError(f"unknown method {method!r}; choose from {', '.join(UNTRAINED)}")
    _check_scope(scope)
    _check_sparsities(sparsities)
    dense = dense_ticket(network, data, seed=seed)
    save_ticket(dense, ticket_path(folder, dense))
    tickets = [dense]
    for sparsity in sparsities:
        masks = pruned_untrained(dense.model(), dense, data, method, sparsity, scope=scope)
        identity = key(dense.identity, method, scope, sparsity, SCORED_PER_CLASS)
        ticket = replace(dense, identity=identity, method=method, scope=scope, masks=masks)
        tickets.append(_kept(ticket, folder, on_ticket))
    return tickets


def draw_by_masks(
    data: Data,
    network: Network,
    masks: Path | str,
    *,
    seed: int,
    folder: Path,
    name: str | None = None,
    on_ticket: Callable[[Ticket], None] | None = None,
) -> list[Ticket]:
    """Make a ticket of any mask: a file that some other pruner wrote, on our initialisation.

    Results are told apart by the masks' name. Masks of several files that one pruner drew, one for each seed, belong
    together once they have the same name and keep equally many weights.

    Args:
        data: from `load`.
        network: which the masks are for.
        masks: a file, see `read_masks`.
        seed: of the initialisation.
        folder: for `tickets/`.
        name: of the masks, or of what drew them. Default: the file's name, and six digits that only these masks have.
        on_ticket: called with the ticket.

    Returns:
        The dense ticket and that one, which is of level 1.

    Raises:
        LotteryError: when the file holds no masks of this network.
    """
    dense = dense_ticket(network, data, seed=seed)
    found = read_masks(masks, dense.model())
    save_ticket(dense, ticket_path(folder, dense))
    kept = {name: mask.flatten().nonzero().flatten().tolist() for name, mask in sorted(found.items())}
    source = f"{Path(masks).name} {key(kept)[:6]}" if name is None else " ".join(name.split())
    if not source:
        raise LotteryError("the name of the masks is empty: say what drew them, or leave it out")
    identity = key(dense.identity, kept, *(() if name is None else (source,)))
    ticket = replace(dense, identity=identity, method="file", source=source, masks=found)
    return [dense, _kept(ticket, folder, on_ticket)]


def _check_scope(scope: str) -> None:
    if scope not in SCOPES:
        raise LotteryError(f"unknown scope {scope!r}; choose from {', '.join(SCOPES)}")


def _check_sparsities(sparsities: Sequence[float]) -> None:
    for sparsity in sparsities:
        if not 0 < sparsity < 1:
            raise LotteryError(f"sparsity must lie between 0 and 1, got {sparsity}")


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
    at = rewind_epoch or rewinding_epoch(recipe)
    runs = folder / "runs"
    return ticket, spend(
        ticket, Tweaks(), data, recipe, seed=seed, folder=runs, rewind_epoch=at, on_epoch=on_epoch
    )


def _pruned(
    ticket: Ticket,
    trained: Trained,
    data: Data,
    recipe: Recipe,
    fraction: float,
    folder: Path,
    method: str,
    scope: str,
    rewind_epoch: int,
) -> Ticket:
    """The next ticket: `fraction` of the remaining weights pruned by their final magnitudes, the others rewound."""
    device = data.mean.device
    if ticket.level == 0:
        at = rewind_epoch or rewinding_epoch(recipe)
        late = _without_masks(trained.weights["rewind"], ticket) if at else {}
        run = run_key(ticket, Tweaks(), recipe, seed=ticket.seed, device=device, rewind_epoch=at)
        ticket = replace(ticket, late=late, late_epoch=at, starts_late=rewind_epoch > 0)
    else:
        run = run_key(ticket, Tweaks(), recipe, seed=ticket.seed, device=device)
    steps = fraction if method == "imp" else None  # that of one shot is the ticket's sparsity
    ticket = replace(
        ticket,
        identity=key(ticket.identity, run, fraction, method, scope, ticket.starts_late),
        method=method,
        scope=scope,
        drawing=key(computed(recipe, device), steps)[:6],
        trained=_without_masks(trained.weights["last"], ticket),
    )
    narrower = replace(ticket, masks=narrowed(ticket, data, fraction))
    if narrower.sparsity == ticket.sparsity:
        raise LotteryError(
            f"{fraction:.3g} of what is left at level {ticket.level} is less than one weight: there is no level after it"
        )
    return _kept(narrower, folder, None)


def _kept(ticket: Ticket, folder: Path, on_ticket: Callable[[Ticket], None] | None) -> Ticket:
    """The ticket as one of the next level, saved.

    Raises:
        LotteryError: for one that keeps no weight.
    """
    if ticket.sparsity == 1:
        raise LotteryError(
            "no weight of the network would be left: choose a lower sparsity, or a wider network"
        )
    drawn = replace(ticket, level=ticket.level + 1)
    save_ticket(drawn, ticket_path(folder, drawn))
    if on_ticket is not None:
        on_ticket(drawn)
    return drawn


def _without_masks(state: State, ticket: Ticket) -> State:
    masks = {f"{name}_mask" for name in ticket.masks}
    return {name: tensor for name, tensor in state.items() if name not in masks}
