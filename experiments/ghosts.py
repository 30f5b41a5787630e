"""Tweaks that cost nothing at inference: ghosts, and folding, against tweaks that stay and against none.

One-shot magnitude masks of the dense network, rewound to its initialisation, on an image folder (`train/<class>/`,
`test/<class>/`; CIFAR-10 as JPEGs for the README). Every variant ends with equally many non-zero weights, in the network
that inference runs. The second half of the training, at the low learning rates, is the same for all: in it the
validation images choose the epoch that is reported, so that no ghost is alive there.

    vanilla               the ticket as it is
    AT                    learned skips and Swish, which stay; what the skips add is pruned elsewhere
    AT, folded            that network, folded after training and pruned back to the budget, not trained again
    AT, paid then folded  as many weights as folding will fill are pruned before training
    ghost AT              skips and Swish fade over the first half of the training and are removed

A row is appended after each run. A run that was cut off is run again, and what is there is not:

    python experiments/ghosts.py IMAGES --out runs/ghosts --limit 600     # starts no run after ten minutes
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sparsetweaks as st
from sparsetweaks.lottery.config import Network, Recipe, key
from sparsetweaks.lottery.data import Data, load
from sparsetweaks.lottery.draw import draw_one_shot
from sparsetweaks.lottery.rows import append_row, read_rows
from sparsetweaks.lottery.spend import computed, surroundings
from sparsetweaks.lottery.store import Ticket
from sparsetweaks.lottery.train import Trained, accuracy, computes_in_bfloat16, train
from sparsetweaks.masks import find_masks

NETWORKS = {"resnet20": Network("resnet20", width=16), "vgg16": Network("vgg16", width=16)}
SIZE = 16  # pixels
IMAGES = 600  # training images per class, a tenth of which validate
EPOCHS = 20
HALF = EPOCHS // 2
RECIPE = Recipe(epochs=EPOCHS)
FIRST = Recipe(epochs=HALF, milestones=())
SECOND = Recipe(epochs=HALF, learning_rate=FIRST.learning_rate * FIRST.decay, milestones=(1 / 2,))
SECOND_SEED = 1000  # away from those of the first half, so that its images come in another order
SPARSITIES = (0.9, 0.95, 0.98)
SEEDS = (0, 1, 2)
GHOST_SKIPS: dict[str, Any] = {"ghost": True, "norm": True, "strength": 0.3}

TRAINED = ("vanilla", "AT", "AT, paid then folded", "ghost AT")
FOLDED = {"AT": "AT, folded"}  # what the same training gives a second time


def cells() -> Iterator[tuple[int, str, float, str]]:
    """Seed by seed, so that what is there is always paired."""
    return itertools.product(SEEDS, NETWORKS, SPARSITIES, TRAINED)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", type=Path, help="folder with train/<class>/ and test/<class>/")
    parser.add_argument("--out", type=Path, default=Path("runs/ghosts"))
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no run starts")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--sparsities", type=float, nargs="+", default=SPARSITIES)
    parser.add_argument("--variants", nargs="+", choices=TRAINED, default=TRAINED)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = load(options.images, size=SIZE, limit=IMAGES, cache=options.out / "cache")
    started = time.perf_counter()
    chosen = (options.seeds, options.networks, options.sparsities, options.variants)
    wanted = [
        cell for cell in cells() if all(part in among for part, among in zip(cell, chosen, strict=True))
    ]
    path = options.out / "ghosts.csv"
    for number, cell in enumerate(wanted, 1):
        if run_key(data, *cell) in {row["run"] for row in read_rows(path)}:
            continue
        if time.perf_counter() - started > options.limit:
            print(f"{len(wanted) - number + 1} runs or fewer are left")
            return
        for row in run(data, *cell, options.out):
            append_row(path, row)
            print(
                "{architecture} seed {seed}, {sparsity:.0%}, {variant}: {test:.4f}, {nonzeros} of {budget} non-zeros, "
                "{step_milliseconds} ms a step".format(**row),
                flush=True,
            )
    print("every run is there")


def run_key(data: Data, seed: int, network: str, sparsity: float, variant: str) -> str:
    """The name of a run, made of everything that determines it."""
    return key(
        data.fingerprint, NETWORKS[network], computed(RECIPE, data.mean.device), FIRST, SECOND, seed, sparsity, variant,
        GHOST_SKIPS if "ghost" in variant else {},
    )  # fmt: skip


def run(
    data: Data, seed: int, network: str, sparsity: float, variant: str, out: Path
) -> list[dict[str, Any]]:
    """Train one variant of one ticket; a row for it, or two where it is folded afterwards as well."""
    ticket = draw_one_shot(data, NETWORKS[network], RECIPE, seed=seed, folder=out, sparsities=[sparsity])[1]
    halves = [train_half(tweaked(ticket, variant), data, FIRST, seed=seed)]
    model = halves[0][0]
    if variant == "ghost AT":
        model = st.remove_ghosts(model)
    halves.append(train_half(model, data, SECOND, seed=seed + SECOND_SEED))
    model = halves[1][0]
    inferred = {variant: model}
    if variant == "AT, paid then folded":
        inferred = {variant: st.fold(model, inputs=data.normalise(data.test.images[:64]))}
    elif variant in FOLDED:
        folded = st.fold(model, inputs=data.normalise(data.test.images[:64]))
        inferred[FOLDED[variant]] = st.match_budget(folded, ticket.nonzeros, of="weights")
    steps = sum(trained.steps for _, trained in halves)
    seconds = sum(trained.seconds for _, trained in halves)
    rows = []
    for name, each in inferred.items():
        counts = counts_of(each, data)
        assert counts["budget"] == ticket.nonzeros, f"{name} has {counts['budget']}, not {ticket.nonzeros}"
        rows.append(
            {
                "run": run_key(data, seed, network, sparsity, variant),
                "data": data.name,
                "train_images": len(data.train),
                "image_size": SIZE,
                "architecture": ticket.network.name,
                "width": ticket.network.width,
                "drawn": ticket.drawn,
                "sparsity": round(ticket.sparsity, 3),
                "variant": name,
                "seed": seed,
                "epochs": EPOCHS,
                "validation": round(accuracy_of(each, data.validation, data), 6),
                "test": round(accuracy_of(each, data.test, data), 6),
                "best_epoch": HALF + halves[1][1].best_epoch,
                **counts,
                "train_seconds": round(seconds, 3),
                "step_milliseconds": round(1000 * seconds / steps, 3),
                **surroundings(RECIPE, data.mean.device),
            }
        )
    return rows


def tweaked(ticket: Ticket, variant: str) -> nn.Module:
    """The ticket's network with what the variant changes, at its budget."""
    model = ticket.model()
    if variant == "vanilla":
        return model
    if variant == "ghost AT":
        return st.swap_activations(st.inject_skips(model, **GHOST_SKIPS), "swish", ghost=True)
    if variant == "AT, paid then folded":
        return st.swap_activations(st.inject_skips(paid_for_folding(ticket)), "swish")
    model = st.swap_activations(st.inject_skips(model), "swish")
    return st.match_budget(model, ticket.nonzeros, of="weights", ranked_by=ticket.trained)


def paid_for_folding(ticket: Ticket) -> nn.Module:
    """The ticket without as many weights as folding will fill; those at places that are filled anyway cost nothing."""
    empty = st.inject_skips(ticket.model(), strength=1.0)
    with torch.no_grad():
        for name in ticket.masks:
            empty.get_parameter(name).zero_()
    folded = st.fold(empty)
    filled = {name: folded.get_parameter(name).detach() != 0 for name in ticket.masks}
    free = sum(int((filled[name] & mask).sum()) for name, mask in ticket.masks.items())
    taps = sum(int(each.sum()) for each in filled.values())
    first = {
        name: weight.masked_fill(filled[name], torch.inf) if name in filled else weight
        for name, weight in ticket.trained.items()
    }
    return st.match_budget(ticket.model(), ticket.nonzeros - taps + free, of="weights", ranked_by=first)


def train_half(model: nn.Module, data: Data, recipe: Recipe, *, seed: int) -> tuple[nn.Module, Trained]:
    """Train one half, ghosts fading over the first; the last weights of it, or the best of the second."""

    def fade(done: Trained) -> None:
        if haunted:
            st.anneal_ghosts(model, done.epochs / EPOCHS, until=HALF / EPOCHS)

    haunted = recipe is FIRST and "Ghost" in repr(model)
    trained = train(model, data, recipe, seed=seed, on_epoch=fade)
    if recipe is FIRST:
        model.load_state_dict(trained.weights["last"])  # not the best, which may have live ghosts
        if haunted:
            st.anneal_ghosts(model, HALF / EPOCHS, until=HALF / EPOCHS)
    return model, trained


def counts_of(model: nn.Module, data: Data) -> dict[str, int]:
    """Non-zero weights of those that are pruned among, parameters that tweaks added, and both; and what all of it costs."""
    names = find_masks(model)
    weights = sum(int(model.get_parameter(name).count_nonzero()) for name in names)
    added = st.sparsity(model).added_kept
    whole = st.cost(model, data.normalise(data.test.images[:1]))
    return {
        "nonzeros": weights,
        "added": added,
        "budget": weights + added,
        "parameters": whole.parameters,
        "nonzero_parameters": whole.nonzeros,
        "flops": whole.flops,
        "effective_flops": whole.effective_flops,
    }


def accuracy_of(model: nn.Module, part: Any, data: Data) -> float:
    with torch.autocast("cpu", torch.bfloat16, enabled=computes_in_bfloat16(RECIPE, data.mean.device)):
        return accuracy(model.to(memory_format=torch.channels_last), part, data)


if __name__ == "__main__":
    main()
