"""Each tweak on real images at equal numbers of non-zero weights: the table in the README.

ResNet-20 on an image folder (`train/<class>/`, `test/<class>/`), CIFAR-10 as JPEGs for the README. Masks by one-shot
magnitude pruning of the dense network, trained with the same recipe and rewound to its initialisation. What skips add is
pruned elsewhere, so that all variants of a sparsity hold equally many non-zeros. A row is appended after each run; started
again, it goes on where it was.

    python experiments/real_images.py IMAGES --out runs/real --threads 1

`--grid shortcuts` compares instead the kinds of skips, whose default this decides.

Several processes share the grid by its seeds, `--seeds 0` and `--seeds 1 2`, with the same `--out`.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from sparsetweaks.lottery.config import VARIANTS, Network, Recipe, Tweaks
from sparsetweaks.lottery.data import Data, load
from sparsetweaks.lottery.draw import draw_one_shot
from sparsetweaks.lottery.rows import append_row, read_rows
from sparsetweaks.lottery.spend import row, run_key, spend
from sparsetweaks.lottery.store import Ticket, dense_ticket

NETWORK = Network("resnet20", width=16)
RECIPE = Recipe(epochs=24)
SIZE = 16  # pixels
LIMIT = 1000  # training images per class, a tenth of which validate
SPARSITIES = (0.95, 0.9)
SEEDS = (0, 1, 2)
NAMES = ("vanilla", "skips", "swish", "scales", "smoothing", "AT+TRT")

SKIPS = {
    "learned, pad": Tweaks(skips={"strength": "learned", "shortcut": "pad"}),
    "learned, none": Tweaks(skips={"strength": "learned", "shortcut": "none"}),
    "learned, projection": Tweaks(skips={"strength": "learned", "shortcut": "projection"}),
    "1, pad, norm": Tweaks(skips={"strength": 1.0, "shortcut": "pad", "norm": True}),
}
"""Skips by strength, shortcut and norm, each at the same number of non-zeros.

Two kinds are not among them. The authors' own, "project-all", adds more dense weights than survive at 90 % sparsity.
Identities of strength 1 without a norm make the loss infinite in the first epoch.
"""
GRIDS = {
    "tweaks": ("real_images.csv", SPARSITIES, {name: VARIANTS[name] for name in NAMES}),
    "shortcuts": ("shortcuts.csv", (0.9,), {"vanilla": VARIANTS["vanilla"], **SKIPS}),
}


def grid(
    seeds: Sequence[int], sparsities: Sequence[float], names: Sequence[str]
) -> list[tuple[int, float, str]]:
    """Each seed's dense network, then every variant at the first sparsity, then at the next."""
    cells = [(0.0, "vanilla"), *itertools.product(sparsities, names)]
    return [(seed, sparsity, name) for seed in seeds for sparsity, name in cells]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", type=Path, help="folder with train/<class>/ and test/<class>/")
    parser.add_argument("--out", type=Path, default=Path("runs/real"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--grid", choices=GRIDS, default="tweaks")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    data = load(arguments.images, size=SIZE, limit=LIMIT, cache=arguments.out / "cache").to(arguments.device)

    file, sparsities, variants = GRIDS[arguments.grid]
    cells = grid(arguments.seeds, sparsities, list(variants))
    for number, cell in enumerate(cells):
        print(f"[{number + 1}/{len(cells)}]", end=" ")
        run(data, *cell, variants, arguments.out, arguments.out / file)


def run(
    data: Data, seed: int, sparsity: float, name: str, variants: dict[str, Tweaks], out: Path, rows: Path
) -> None:
    """One cell of the grid, unless its row is there."""
    ticket = _ticket(data, seed, sparsity, out)
    tweaks = variants[name]
    done = {(each["run"], each["variant"]) for each in read_rows(rows)}
    if (run_key(ticket, tweaks, RECIPE, seed=seed, device=data.mean.device), name) in done:
        return
    started = time.strftime("%H:%M:%S")
    trained = spend(ticket, tweaks, data, RECIPE, seed=seed, folder=out / "runs")
    append_row(rows, row(ticket, name, tweaks, data, RECIPE, trained, seed=seed))
    print(
        f"{started} seed {seed}, {sparsity:.0%}, {name}: {trained.test:.4f} in {trained.seconds:.0f} s",
        flush=True,
    )


def _ticket(data: Data, seed: int, sparsity: float, out: Path) -> Ticket:
    if not sparsity:
        return dense_ticket(NETWORK, data, seed=seed)
    return draw_one_shot(data, NETWORK, RECIPE, seed=seed, folder=out, sparsities=[sparsity])[1]


if __name__ == "__main__":
    main()
