"""Where does each tweak help? One table of gains over length of training, sparsity, residuals, and forms of each tweak.

Iterative magnitude pruning of a preset of `sparsetweaks reproduce`, rewound to initialisation, with equal numbers of
non-zero weights: what a tweak adds is pruned elsewhere. At the preset's length every level is spent with each tweak, and
the deciding one with every form of it as well; a third and three times as long, the deciding one with each tweak.

    python experiments/where.py --out runs/digits --seeds 0 1 2 3 4
    python experiments/where.py --preset cifar10-small --data IMAGES --out runs/small
    python experiments/where.py --preset cifar10-small --data IMAGES --out runs/small --lengths 1 --variants vanilla gelu

What is in the folder, by this or by `reproduce`, is read back, so it goes on where it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Container, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from sparsetweaks.lottery.config import RunError, Tweaks, variant
from sparsetweaks.lottery.experiment import Experiment, spend_row, tickets_of
from sparsetweaks.lottery.figures import PRESETS
from sparsetweaks.lottery.reproduce import experiments
from sparsetweaks.lottery.rows import append_row, read_rows
from sparsetweaks.lottery.spend import run_key
from sparsetweaks.lottery.train import Trained

EACH = ("vanilla", "skips", "swish", "scales", "smoothing", "AT", "TRT", "AT+TRT")
LENGTHS = (1.0, 1 / 3, 3.0)  # of the preset's training
NETWORKS = 2  # with residuals and without
FORMS: dict[str, Tweaks] = {
    "skips only where the shape stays": Tweaks(skips={"shortcut": "none"}),
    "skips, projected where it changes": Tweaks(skips={"shortcut": "projection"}),
    "skips of strength 0.3": Tweaks(skips={"strength": 0.3}),
    "skips of strength 1": Tweaks(skips={"strength": 1.0}),
    "skips of strength 1 with a norm": Tweaks(skips={"strength": 1.0, "norm": True}),
    "the authors' skips, unpaid": variant("authors-skips+unmatched"),
    "mish": variant("mish"),
    "gelu": Tweaks(activation="gelu"),
    "smoothing 0.05": Tweaks(smoothing=0.05),
    "smoothing 0.2": Tweaks(smoothing=0.2),
    "scales, 180 iterations": Tweaks(scales={"iterations": 180}),
    "scales, the gradient unbounded": Tweaks(scales={"gamma": float("inf")}),
    "scales, the true gradient": Tweaks(scales={"order": 2}),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="digits")
    parser.add_argument("--data", action="append", default=[], help="a folder, where the preset brings none")
    parser.add_argument("--out", type=Path, required=True, help="folder of the lottery")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: the preset's")
    parser.add_argument("--lengths", type=float, nargs="+", default=LENGTHS, help="of the preset's epochs")
    parser.add_argument("--variants", nargs="+", choices=(*EACH, *FORMS), help="only these; default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    names = frozenset(options.variants or (*EACH, *FORMS))
    for seed in options.seeds or PRESETS[options.preset].seeds:
        for experiment, deciding in comparisons(options.preset, options.data, seed, options.lengths):
            run(experiment, deciding, names, options.preset, options.out.resolve(), options.device)
    print("every run is there")


def comparisons(
    name: str, data: Sequence[str], seed: int, lengths: Sequence[float]
) -> Iterator[tuple[Experiment, int]]:
    """A seed's experiments, a length after the other, each with the deciding level; other lengths spend that one only."""
    preset, (whole, *_) = PRESETS[name], experiments("10", name, data)
    (deciding,) = whole.spent
    for length in lengths:
        for network in preset.networks[:NETWORKS]:
            recipe = replace(preset.recipe, epochs=round(length * preset.recipe.epochs))
            spent = () if recipe.epochs == preset.recipe.epochs else whole.spent
            yield replace(whole, network=network, recipe=recipe, seeds=(seed,), spent=spent), deciding


def variants_at(level: int, experiment: Experiment, deciding: int) -> dict[str, Tweaks]:
    """What the ticket of a level is spent with: every form of the tweaks at the deciding level and the preset's length."""
    if not level:
        return {"vanilla": Tweaks()}
    if experiment.spent and level not in experiment.spent:
        return {}
    each = {name: experiment.tweaks(name) for name in EACH}
    if level != deciding or experiment.spent:
        return each
    return each | {name: _brief(form, experiment) for name, form in FORMS.items()}


def _brief(form: Tweaks, experiment: Experiment) -> Tweaks:
    """A form with as many iterations of the layer scales as the experiment's, unless it says how many."""
    if form.scales is None:
        return form
    return replace(form, scales={**(experiment.scales or {}), **form.scales})


def run(
    experiment: Experiment, deciding: int, names: Container[str], preset: str, out: Path, device: str
) -> None:
    """The named cells of a seed, network and length that have no row yet; one that fails has its reason in another file."""
    (seed,), recipe = experiment.seeds, experiment.recipe
    show = partial(_show, last=recipe.epochs)
    rows, failed = out / f"where-{preset}.csv", out / f"where-{preset}.failed.csv"
    for ticket in tickets_of(experiment, out, device, seed, show):
        for name, tweaks in variants_at(ticket.level, experiment, deciding).items():
            if name not in names:
                continue
            key = run_key(ticket, tweaks, recipe, seed=seed, device=torch.device(device))
            if (key, name) in {(row["run"], row["variant"]) for row in read_rows(rows) + read_rows(failed)}:
                continue
            try:
                row = spend_row(
                    ticket, name, tweaks, experiment.source, recipe,
                    seed=seed, folder=out, device=device, on_epoch=show,
                )  # fmt: skip
            except RunError as error:
                told = {"run": key, "variant": name, "architecture": ticket.network.name, "seed": seed}
                append_row(failed, {**told, "epochs": recipe.epochs, "reason": str(error)})
            else:
                append_row(rows, row)


def _show(done: Trained, last: int) -> None:
    if done.epochs == last:
        print(f"{done.title}: {done.validation:.1%} in validation, {done.seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
