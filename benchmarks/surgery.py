"""What a surgery costs, against `copy.deepcopy` of the same model: time, peak memory, and growth with depth.

    python benchmarks/surgery.py
    python benchmarks/surgery.py --resume          # only what has no row yet of this machine

Times are CPU seconds of one thread; each repeat measures the copy and all surgeries one after the other, and what is
printed is the median (least, most) of the ratios within the repeats. Memory is the largest resident size while the
surgery runs above what was resident before it, as a multiple of the model's own bytes, in a process of its own; the
surgery runs once before on a small model, so that libraries it loads are not counted. Each model's rows take the place of
its older ones when it is measured, so a run that was cut off leaves a whole table.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import paired
import torch
import torchvision
from torch import nn

import sparsetweaks as st

MODELS = ("resnet18", "resnet152", "densenet201", "efficientnet_b7")
DEPTHS = (100, 300, 1_000, 3_000, 10_000)
SURGERIES: dict[str, Callable[[nn.Module], Any]] = {
    "inject_skips": st.inject_skips,
    "swap_activations": functools.partial(st.swap_activations, to="mish", kinds=("relu", "silu")),
}
COLUMNS = (
    "what", "model", "surgery", "median", "least", "most", "n",
    "seconds_of_deepcopy", "threads", "torch", "hardware",
)  # fmt: skip
SAME = ("what", "model", "surgery", "threads", "hardware")  # what a row stands for


class Block(nn.Module):
    """A block of a class of its own, as people write them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(self.conv(x)))


def chain(depth: int) -> nn.Module:
    """`depth` blocks in one container."""
    return nn.Sequential(*(Block() for _ in range(depth)))


def plain(depth: int) -> nn.Module:
    """`depth` units written out in one container: one forward of 3 x depth calls."""
    layers = ((nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(depth))
    return nn.Sequential(*(layer for unit in layers for layer in unit))


def seconds(operate: Callable[[nn.Module], Any], model: nn.Module) -> float:
    gc.collect()
    start = time.process_time()
    result = operate(model)
    spent = time.process_time() - start
    del result
    return spent


def times(what: str, name: str, make: Callable[[], nn.Module], repeats: int) -> Iterator[dict[str, Any]]:
    """The ratio of each surgery's time to a deepcopy's."""
    model = make()
    for operate in SURGERIES.values():
        operate(model)  # warm: what is loaded or compiled once
    rounds = []
    for _ in range(repeats):
        own = seconds(copy.deepcopy, model)
        rounds.append({"deepcopy": own} | {key: seconds(f, model) / own for key, f in SURGERIES.items()})
    own = statistics.median(each["deepcopy"] for each in rounds)
    for surgery in SURGERIES:
        ratios = [each[surgery] for each in rounds]
        yield row(what, name, surgery, ratios) | {"seconds_of_deepcopy": f"{own:.4f}"}


def row(what: str, name: str, surgery: str, values: list[float]) -> dict[str, Any]:
    middle, least, most = (f"{each:.3f}" for each in (statistics.median(values), min(values), max(values)))
    return {
        "what": what, "model": name, "surgery": surgery, "median": middle, "least": least, "most": most,
        "n": len(values), **machine(),
    }  # fmt: skip


def machine() -> dict[str, Any]:
    return {
        "threads": torch.get_num_threads(), "torch": torch.__version__, "hardware": paired.processor(),
    }  # fmt: skip


def peak(name: str, surgery: str) -> float:
    """Peak memory above the input, in model sizes, measured in this (fresh) process."""
    torch.set_num_threads(1)
    SURGERIES[surgery](torchvision.models.get_model("squeezenet1_1", weights=None))
    model = torchvision.models.get_model(name, weights=None)
    gc.collect()
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    return paired.extra_bytes(lambda: SURGERIES[surgery](model)) / size


def memory(what: str, name: str, repeats: int) -> Iterator[dict[str, Any]]:
    """Peak memory of each surgery, each time in a process of its own."""
    for surgery in SURGERIES:
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            values = [pool.apply(peak, (name, surgery)) for _ in range(repeats)]
        yield row(what, name, surgery, values)


Measure = Callable[[], Iterator[dict[str, Any]]]


def measures(repeats: int, depths: Sequence[int]) -> Iterator[tuple[str, str, Measure]]:
    """What there is to measure, of which model, and what gives its rows, one for each surgery."""
    ratio, space = "time / deepcopy", "peak memory / model size"
    for name in MODELS:
        make: Callable[[], nn.Module] = functools.partial(torchvision.models.get_model, name, weights=None)
        yield ratio, name, functools.partial(times, ratio, name, make, repeats)
    for name in MODELS:
        yield space, name, functools.partial(memory, space, name, min(repeats, 3))
    for build in (chain, plain):
        for depth in depths:
            name, make = f"{build.__name__} of {depth}", functools.partial(build, depth)
            yield ratio, name, functools.partial(times, ratio, name, make, min(repeats, 3))


def done(lines: list[dict[str, Any]], what: str, model: str) -> bool:
    """Whether a table has every surgery's row of this."""
    wanted = [{"what": what, "model": model, "surgery": surgery, **machine()} for surgery in SURGERIES]
    return all(any(paired.agree(line, each, SAME) for line in lines) for each in wanted)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=paired.RESULTS / "surgery.csv")
    parser.add_argument("--resume", action="store_true", help="leave out what the table has of this machine")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("error", st.NoEffectWarning)  # a surgery that does nothing would be quick
    for what, name, measure in measures(options.repeats, options.depths):
        if options.resume and done(paired.read(options.out), what, name):
            continue
        rows = list(measure())
        paired.keep(options.out, COLUMNS, SAME, rows)
        for each in rows:
            text = "{what}: {model}, {surgery}: {median} ({least} to {most})"
            print(text.format(**each), flush=True)


if __name__ == "__main__":
    main()
