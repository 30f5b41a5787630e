"""The whole story on scikit-learn's digits: draw tickets, spend them with and without tweaks, look at the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from sparsetweaks.lottery.config import Network, Recipe
from sparsetweaks.lottery.experiment import Experiment, Source, compare
from sparsetweaks.lottery.files import check_writable
from sparsetweaks.lottery.grid import Engine, run_all
from sparsetweaks.lottery.plots import plot
from sparsetweaks.lottery.rows import read_rows
from sparsetweaks.lottery.summaries import summarise

NETWORK = Network("resnet8", width=8)  # small enough for 17 runs per seed in about two minutes
RECIPE = Recipe(epochs=12, batch_size=64, precision="float32", warmup_epochs=1)
"""bfloat16 gains nothing at this size; without the warm-up a MobileNet of 4 channels diverges in one seed of three."""
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
    engine: Engine = run_all,
    on_run: Callable[[int, int], None] | None = None,
) -> tuple[Path, Path]:
    """Draw tickets of digits by iterative magnitude pruning, spend each as it is and with the tweaks, and draw the picture.

    Args:
        folder: for everything that is kept; a demo that was cut off goes on from there.
        seeds: each with a network, tickets and trainings of its own.
        levels: of pruning, three fifths of what remains each.
        recipe: of every training.
        engine: what runs the stages; see `compare`.
        on_run: called with the number of runs done and of all runs.

    Returns:
        The paths of the rows (CSV) and of the picture (PNG).

    Raises:
        LotteryError: when the folder cannot be written to, before anything is trained.
    """
    check_writable(folder)
    experiment = Experiment(
        NAMES, Source("digits"), NETWORK, recipe, levels, FRACTION, tuple(seeds), scales=SCALES
    )
    compare(experiment, folder, engine=engine, on_run=on_run)
    csv, png = folder / "results.csv", folder / "results.png"
    plot(summarise(read_rows(csv)), png)
    return csv, png
