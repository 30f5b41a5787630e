"""Global magnitude pruning against `torch.nn.utils.prune.global_unstructured` and `torch.kthvalue`: time and memory.

    python benchmarks/pruning.py

The weights are those of a ResNet-18's convolutions, once (11 million) and nine times (100 million). Compared are:

- `select`: from weights to masks, what `prune` does beside copying the model;
- `prune`: the whole of it, which returns a new model and leaves the given one;
- `global_unstructured`: PyTorch's pruning, which changes the model in place;
- `kthvalue`: the shortest way to write it: all magnitudes together, their k-th value, and what lies above it. It
  prunes too many where values are equal.

Memory is what the resident peak of a process of its own rises by, in units of the weights' bytes. The new model that
`prune` returns is in its figure.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator

import paired
import torch
from paired import Row
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from sparsetweaks.copying import copy_model
from sparsetweaks.pruning import prune
from sparsetweaks.selection import keep_highest_globally

SPARSITY = 0.95
STAGES = ((64, 64), (64, 128), (128, 256), (256, 512))
SIZES = {"11 M": 1, "100 M": 9}  # copies of a ResNet-18's convolutions
TARGETS = {"global_unstructured": 0.02, "kthvalue": 0.15}
MEMORY_TARGET = 1.5


def convolutions(copies: int) -> nn.Sequential:
    """The convolutions of so many ResNet-18, never run."""
    layers: list[nn.Module] = []
    for _ in range(copies):
        layers.append(nn.Conv2d(3, 64, 7, bias=False))
        for narrow, wide in STAGES:
            layers += [nn.Conv2d(narrow, wide, 3, bias=False)]
            layers += [nn.Conv2d(wide, wide, 3, bias=False) for _ in range(3)]
            layers += [nn.Conv2d(narrow, wide, 1, bias=False)] if narrow != wide else []
    return nn.Sequential(*layers)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def select(model: nn.Module) -> None:
    weights = weights_of(model)
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    total = sum(weight.numel() for weight in weights.values())
    keep_highest_globally(weights, masks, total - round(SPARSITY * total), absolute=True)


def whole(model: nn.Module) -> None:
    prune(model, SPARSITY, include="*")


def global_unstructured(model: nn.Module) -> None:
    places = [(module, "weight") for module in model.children()]
    torch_prune.global_unstructured(places, torch_prune.L1Unstructured, amount=SPARSITY)


def kthvalue(model: nn.Module) -> None:
    weights = weights_of(model)
    together = torch.cat([weight.abs().flatten() for weight in weights.values()])
    threshold = together.kthvalue(round(SPARSITY * together.numel())).values
    del together
    _ = {name: weight.abs() > threshold for name, weight in weights.items()}


METHODS = {
    "select": select,
    "prune": whole,
    "copy": copy_model,
    "global_unstructured": global_unstructured,
    "kthvalue": kthvalue,
}


def against(size: str, peer: str, options: argparse.Namespace) -> Iterator[Row]:
    model = convolutions(SIZES[size])
    methods = {name: METHODS[name] for name in ("select", "prune", "copy", peer)}
    runs = {name: functools.partial(method, model) for name, method in methods.items() if name != peer}
    fresh = {}
    if peer == "global_unstructured":
        runs[peer], fresh[peer] = global_unstructured, functools.partial(copy_model, model)
    else:
        runs[peer] = functools.partial(methods[peer], model)
    times = paired.interleaved(runs, options.repeats, fresh=fresh)
    what = f"global magnitude pruning, {size} weights"
    share = {
        name: paired.spread("", "", paired.ratios(times, name, "prune")).median for name in ("select", "copy")
    }
    note = f"the selection is {share['select']:.0%} of it, and the copy that it returns {share['copy']:.0%}"
    notes = {"select": "", "prune": note}
    for name, note in notes.items():
        found = paired.ratios(times, name, peer)
        yield paired.spread(what, f"time, {name} / {peer}", found, target=TARGETS[peer], note=note)


def memory(size: str, options: argparse.Namespace) -> Iterator[Row]:
    with torch.device("meta"):
        weights = sum(parameter.nbytes for parameter in convolutions(SIZES[size]).parameters())
    for name in METHODS:
        found = paired.in_new_process(f"{name}:{size}") / weights
        target = MEMORY_TARGET if name in ("select", "prune") else None
        note = "the new model among it" if name == "prune" else ""
        what = f"global magnitude pruning, {size} weights"
        yield Row(what, f"extra memory / weights, {name}", found, n=1, target=target, note=note)


def extra_bytes(options: argparse.Namespace) -> float:
    """What the resident peak of this process rises by."""
    name, _, size = options.task.partition(":")
    METHODS[name](convolutions(1)[:2])  # code that is loaded at the first call
    model = convolutions(SIZES[size])
    return paired.extra_bytes(lambda: METHODS[name](model))


CASES = {
    **{
        f"{size}, {peer}": functools.partial(against, size, peer)
        for size in SIZES
        for peer in ("kthvalue", "global_unstructured")
    },
    **{f"{size}, memory": functools.partial(memory, size) for size in SIZES},
}

if __name__ == "__main__":
    paired.main(__doc__, "pruning", CASES, repeats=9, tasks=extra_bytes)
