"""A comparison: some variants of the same tickets, over levels and seeds, each run kept and none run twice."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sparsetweaks.lottery.config import LotteryError, Network, Recipe, Tweaks, variant
from sparsetweaks.lottery.data import Data, load
from sparsetweaks.lottery.draw import draw, draw_one_shot
from sparsetweaks.lottery.grid import Engine, GridError, run_all, run_each
from sparsetweaks.lottery.layouts import SPLIT_SEED
from sparsetweaks.lottery.pools import pool, pool_row
from sparsetweaks.lottery.rows import append_row, kept_runs
from sparsetweaks.lottery.spend import named, row, spend
from sparsetweaks.lottery.store import Ticket
from sparsetweaks.lottery.summaries import BASELINE
from sparsetweaks.lottery.train import Trained


@dataclass(frozen=True)
class Source:
    """What `load` is called with."""

    source: str = "digits"
    size: int | None = None
    limit: int | None = None
    split_seed: int = SPLIT_SEED


@dataclass(frozen=True)
class Experiment:
    """Everything that determines the rows of a comparison."""

    variants: tuple[str, ...]
    source: Source
    network: Network
    recipe: Recipe
    levels: int
    fraction: float  # of the remaining weights, per level
    seeds: tuple[int, ...]
    drawing: str = "imp"  # or "omp": the same sparsities, each in one shot
    dense: tuple[str, ...] = (BASELINE,)  # variants of the dense network
    spent: tuple[int, ...] = ()  # the levels whose tickets are spent; empty for all
    keep_epochs: tuple[int, ...] = ()  # whose weights each spending keeps, see `train`
    scales: dict[str, Any] | None = None  # options of `learn_layer_scales`, for all variants that use it

    def __post_init__(self) -> None:
        if self.drawing not in ("imp", "omp"):
            raise LotteryError(f"drawing must be imp or omp, got {self.drawing!r}")
        for name in (*self.variants, *self.dense):
            variant(name)
        if not all(1 <= level <= self.levels for level in self.spent):
            raise LotteryError(f"levels to spend must lie between 1 and {self.levels}, got {self.spent}")

    @property
    def sparsities(self) -> tuple[float, ...]:
        """Of the levels, but for rounding."""
        return tuple(1 - (1 - self.fraction) ** level for level in range(1, self.levels + 1))

    @property
    def spendings(self) -> int:
        """How many rows there are to be."""
        return len(self.seeds) * self.spendings_of_a_seed

    @property
    def spendings_of_a_seed(self) -> int:
        """How many of them each seed has."""
        levels = len(self.spent) or self.levels
        return len(self.dense) + levels * len(self.variants)

    def tweaks(self, name: str) -> Tweaks:
        """A variant of this experiment."""
        tweaks = variant(name)
        return tweaks if tweaks.scales is None or self.scales is None else replace(tweaks, scales=self.scales)

    def cells(self, tickets: Sequence[Ticket]) -> list[tuple[Ticket, str]]:
        """What is spent how, of the tickets of one seed, the dense one first."""
        chosen = [tickets[level] for level in self.spent] or tickets[1:]
        dense = [(tickets[0], name) for name in self.dense]
        return dense + [(ticket, name) for ticket in chosen for name in self.variants]


def compare(
    experiment: Experiment,
    folder: Path,
    *,
    device: str = "cpu",
    engine: Engine = run_all,
    on_run: Callable[[int, int], None] | None = None,
    on_epoch: Callable[[Trained], None] | None = None,
) -> list[dict[str, Any]]:
    """Draw the tickets and spend each in every way; what is in the folder already is read back.

    Args:
        experiment: what to compare.
        folder: for `tickets/`, `runs/` and `results.csv`, to which the rows are added.
        device: to train on.
        engine: what runs the stages: `run_all`, here, one after the other; `partial(run_all, processes=2)`, or what
            `on_ray` gives.
        on_run: called with the number of seeds drawn and runs done, and of all; what failed, and what is lost with a seed
            that cannot be drawn, is done.
        on_epoch: see `train`; it must pickle where the stages run elsewhere.

    Returns:
        The rows of this comparison.

    Raises:
        GridError: once all others are done and kept, when runs failed, each for a reason of its own (`RunError`). A seed
            whose drawing fails loses its own runs alone.
        LotteryError: at once, when another version wrote what is in the folder; and as the stages do.
    """
    failed: list[str] = []
    total, done, folder = len(experiment.seeds) + experiment.spendings, 0, folder.resolve()
    csv = folder / "results.csv"
    known = kept_runs(csv)
    spending: list[Callable[[], dict[str, Any]]] = []
    drawing = [partial(tickets_of, experiment, folder, device, seed, on_epoch) for seed in experiment.seeds]
    for tickets in run_each(engine, drawing, failed):
        done += 1 if tickets else 1 + experiment.spendings_of_a_seed
        spending += [
            partial(
                spend_row, ticket, name, experiment.tweaks(name), experiment.source, experiment.recipe,
                seed=ticket.seed, folder=folder, device=device, keep_epochs=experiment.keep_epochs, on_epoch=on_epoch,
            )
            for ticket, name in (experiment.cells(tickets) if tickets else ())
        ]  # fmt: skip
        if on_run is not None:
            on_run(done, total)
    rows = []
    for result in run_each(engine, spending, failed):
        if result is not None:
            if (result["run"], result["variant"]) not in known:
                append_row(csv, result)
            rows.append(result)
        done += 1
        if on_run is not None:
            on_run(done, total)
    if failed:
        raise GridError(*failed)
    return rows


@functools.lru_cache(maxsize=1)
def data_of(source: Source, folder: Path, device: str) -> Data:
    """The data set, read once for all runs of a process.

    Args:
        source: which.
        folder: of the comparison, for its cache of decoded images.
        device: to put it on.

    Returns:
        What `load` gives.
    """
    options: dict[str, Any] = {"size": source.size, "limit": source.limit, "split_seed": source.split_seed}
    return load(source.source, cache=folder / "cache", **options).to(device)


def tickets_of(
    experiment: Experiment,
    folder: Path,
    device: str,
    seed: int,
    on_epoch: Callable[[Trained], None] | None = None,
) -> list[Ticket]:
    """Draw the tickets of one seed; what is in the folder already is read back.

    Args:
        experiment, folder, device, on_epoch: as in `compare`.
        seed: one of the experiment's.

    Returns:
        The dense ticket, and one per sparsity, as far as they are spent.

    Raises:
        RunError: when a training that the drawing needs fails.
    """
    data = data_of(experiment.source, folder, device)
    common: dict[str, Any] = {"seed": seed, "folder": folder, "on_epoch": on_epoch}
    with named(f"no tickets of seed {seed}, and so none of its runs"):
        if experiment.drawing == "omp":
            common["sparsities"] = experiment.sparsities
            return draw_one_shot(data, experiment.network, experiment.recipe, **common)
        common |= {
            "levels": max(experiment.spent, default=experiment.levels),
            "fraction": experiment.fraction,
        }
        return draw(data, experiment.network, experiment.recipe, **common)


def spend_row(
    ticket: Ticket,
    name: str,
    tweaks: Tweaks,
    source: Source,
    recipe: Recipe,
    *,
    seed: int,
    folder: Path,
    device: str,
    keep_epochs: Sequence[int] = (),
    on_epoch: Callable[[Trained], None] | None = None,
) -> dict[str, Any]:
    """Spend a ticket, in whatever process, and give its row.

    Args:
        ticket: what to retrain.
        name: of the variant.
        tweaks: that it stands for.
        source: of the data.
        recipe: how to train.
        seed: of the training.
        folder: for `runs/`.
        device: to train on.
        keep_epochs, on_epoch: see `train`.

    Returns:
        The row, see `row`.
    """
    data, runs = data_of(source, folder, device), folder / "runs"
    trained = spend(
        ticket, tweaks, data, recipe,
        seed=seed, folder=runs, name=name, keep_epochs=keep_epochs, on_epoch=on_epoch,
    )  # fmt: skip
    return row(ticket, name, tweaks, data, recipe, trained, seed=seed)


def pools_row(
    ticket: Ticket, tickets: Sequence[Ticket], source: Source, recipe: Recipe, *, seed: int, folder: Path, device: str
) -> dict[str, Any]:  # fmt: skip
    """The same for Lottery Pools.

    Args:
        ticket, tickets: see `pool`.
        source, recipe, seed, folder, device: as in `spend_row`.

    Returns:
        The row.
    """
    data = data_of(source, folder, device)
    trained = pool(ticket, tickets, data, recipe, seed=seed, folder=folder / "runs")
    return pool_row(ticket, tickets, data, recipe, trained, seed=seed)
