"""The whole story on scikit-learn's digits: draw tickets, spend them with and without tweaks, look at the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sparsetweaks.lottery.config import VARIANTS, Network, Recipe, Tweaks
from sparsetweaks.lottery.data import load
from sparsetweaks.lottery.draw import draw
from sparsetweaks.lottery.grid import run_all
from sparsetweaks.lottery.results import BASELINE, append_row, plot, read_rows, summarise
from sparsetweaks.lottery.spend import row, spend
from sparsetweaks.lottery.store import Ticket, check_writable

NETWORK = Network(depth=8, width=8)  # small enough for 17 runs per seed in about two minutes
RECIPE = Recipe(epochs=12, batch_size=64, precision="float32")  # bfloat16 gains nothing at this size
LEVELS = 4
FRACTION = 0.6  # per level, not 0.2, so that four levels reach 97 % sparsity
SEEDS = (0, 1, 2)
SCALES = {"iterations": 60}  # the usual 180 would take longer than the training, of 240 steps
NAMES = ("vanilla", "AT", "TRT", "AT+TRT")


def demo(
    folder: Path,
    *,
    seeds: Sequence[int] = SEEDS,
    levels: int = LEVELS,
    recipe: Recipe = RECIPE,
    processes: int = 1,
    on_run: Callable[[int, int], None] | None = None,
) -> tuple[Path, Path]:
    """Draw tickets of digits by iterative magnitude pruning, spend each as it is and with the tweaks, and draw the picture.

    Args:
        folder: for everything that is kept; a demo that was cut off goes on from there.
        seeds: each with a network, tickets and trainings of its own.
        levels: of pruning, three fifths of what remains each.
        recipe: of every training.
        processes: how many runs at a time.
        on_run: called with the number of runs done and of all runs.

    Returns:
        The paths of the rows (CSV) and of the picture (PNG).

    Raises:
        LotteryError: when the folder cannot be written to, before anything is trained.
    """
    check_writable(folder)
    csv, png = folder / "results.csv", folder / "results.png"
    drawing = [partial(_draw, folder, seed, levels, recipe) for seed in seeds]
    per_seed = 1 + levels * len(NAMES)
    done, total = 0, len(seeds) * per_seed
    spending: list[Callable[[], dict[str, Any]]] = []
    for tickets in run_all(drawing, processes=processes):
        cells = [(tickets[0], BASELINE), *((ticket, name) for ticket in tickets[1:] for name in NAMES)]
        spending += [partial(_spend, folder, ticket, name, recipe) for ticket, name in cells]
        done += levels  # drawing trains all levels but the last, as they are: those runs need not be repeated
        if on_run is not None:
            on_run(done, total)
    known = {(each["run"], each["variant"]) for each in read_rows(csv)}
    for result in run_all(spending, processes=processes):
        if (result["run"], result["variant"]) not in known:
            append_row(csv, result)
        if on_run is not None and not (result["variant"] == BASELINE and result["level"] < levels):
            done += 1
            on_run(done, total)
    plot(summarise(read_rows(csv)), png)
    return csv, png


def _draw(folder: Path, seed: int, levels: int, recipe: Recipe) -> list[Ticket]:
    return draw(load("digits"), NETWORK, recipe, seed=seed, folder=folder, levels=levels, fraction=FRACTION)


def _spend(folder: Path, ticket: Ticket, name: str, recipe: Recipe) -> dict[str, Any]:
    data, tweaks = load("digits"), VARIANTS[name]
    if tweaks.scales is not None:
        tweaks = Tweaks(tweaks.skips, tweaks.activation, SCALES, tweaks.smoothing)
    trained = spend(ticket, tweaks, data, recipe, seed=ticket.seed, folder=folder / "runs")
    return row(ticket, name, tweaks, data, recipe, trained, seed=ticket.seed)
