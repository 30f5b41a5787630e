"""What a surgery costs, against `copy.deepcopy` of the same model: time, peak memory, and growth with depth.

    python benchmarks/surgery.py --out benchmarks/results/surgery.csv

Times are CPU seconds of one thread; each repeat measures the copy and all surgeries one after the other, and what is
printed is the median (least, most) of the ratios within the repeats. Memory is the largest resident size while the
surgery runs above what was resident before it, as a multiple of the model's own bytes, in a process of its own; the
surgery runs once before on a small model, so that libraries it loads are not counted.
"""

from __future__ import annotations

import argparse
import copy
import csv
import functools
import gc
import multiprocessing
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
    "what",
    "model",
    "surgery",
    "median",
    "least",
    "most",
    "n",
    "seconds_of_deepcopy",
    "torch",
    "hardware",
)


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


def times(what: str, name: str, model: nn.Module, repeats: int) -> Iterator[dict[str, Any]]:
    """The ratio of each surgery's time to a deepcopy's."""
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
        "n": len(values), "torch": torch.__version__, "hardware": hardware(),
    }  # fmt: skip


def hardware() -> str:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, one thread"


def peak(name: str, surgery: str) -> float:
    """Peak memory above the input, in model sizes, measured in this (fresh) process."""
    torch.set_num_threads(1)
    SURGERIES[surgery](torchvision.models.get_model("squeezenet1_1", weights=None))
    model = torchvision.models.get_model(name, weights=None)
    gc.collect()
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    result = SURGERIES[surgery](model)
    above = resident("VmHWM") - before
    del result
    return above / size


def resident(which: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(which):
            return int(line.split()[1]) * 1024
    raise OSError(f"this system does not tell its {which}")


def memory(name: str, repeats: int) -> Iterator[dict[str, Any]]:
    """Peak memory of each surgery, each time in a process of its own."""
    for surgery in SURGERIES:
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            values = [pool.apply(peak, (name, surgery)) for _ in range(repeats)]
        yield row("peak memory / model size", name, surgery, values)


def rows(repeats: int, depths: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    for name in MODELS:
        model = torchvision.models.get_model(name, weights=None)
        yield from times("time / deepcopy", name, model, repeats)
        del model
    for name in MODELS:
        yield from memory(name, min(repeats, 3))
    for make in (chain, plain):
        for depth in depths:
            yield from times("time / deepcopy", f"{make.__name__} of {depth}", make(depth), min(repeats, 3))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "surgery.csv")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("error", st.NoEffectWarning)  # a surgery that does nothing would be quick
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for each in rows(options.repeats, tuple(options.depths)):
            writer.writerow(each)
            file.flush()
            text = "{what}: {model}, {surgery}: {median} ({least} to {most})"
            print(text.format(**each), flush=True)


if __name__ == "__main__":
    main()
