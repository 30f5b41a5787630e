"""Global magnitude pruning against `torch.nn.utils.prune.global_unstructured` and `torch.kthvalue`: time and memory.

    python benchmarks/pruning.py --repeats 5

The weights are those of a ResNet-18's convolutions, once (11 million) and nine times (100 million). Each repeat times
all of them in this process, in an order that turns, and compares pairs of one repeat:

- `select`: from weights to masks, what `prune` does beside copying the model;
- `prune`: the whole of it, which returns a new model and leaves the given one;
- `global_unstructured`: PyTorch's pruning, which changes the model in place;
- `kthvalue`: the shortest way to write it: all magnitudes together, their k-th value, and what lies above it. It
  prunes too many where values are equal.

Memory is what the resident peak of a process of its own rises by, in units of the weights' bytes. The new model that
`prune` returns is in its figure. Written to benchmarks/results/pruning.csv.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from sparsetweaks.pruning import prune
from sparsetweaks.selection import keep_highest_globally

SPARSITY = 0.95
RESULTS = Path(__file__).resolve().parent / "results" / "pruning.csv"
STAGES = ((64, 64), (64, 128), (128, 256), (256, 512))
PAIRS = [
    ("select", "kthvalue"),
    ("select", "global_unstructured"),
    ("prune", "kthvalue"),
    ("prune", "global_unstructured"),
]


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


METHODS: dict[str, Callable[[nn.Module], None]] = {
    "select": select,
    "prune": whole,
    "global_unstructured": global_unstructured,
    "kthvalue": kthvalue,
}


def seconds(method: str, copies: int, model: nn.Module) -> float:
    """Wall time of one call; what changes the model gets a new one."""
    given = convolutions(copies) if method == "global_unstructured" else model
    started = time.perf_counter()
    METHODS[method](given)
    return time.perf_counter() - started


def memory_line(key: str) -> int:
    """Bytes that Linux tells of this process: `VmRSS`, resident now, or `VmHWM`, the most since it was reset."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(key):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"this system does not tell {key}: memory is measured on Linux only")


def extra_bytes(method: str, copies: int) -> int:
    """What the resident peak of this process rises by; call it in a process of its own."""
    METHODS[method](convolutions(1)[:2])  # code that is loaded at the first call
    model = convolutions(copies)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
    before = memory_line("VmRSS")
    METHODS[method](model)
    return memory_line("VmHWM") - before


def extra_memory(method: str, copies: int) -> float:
    """The same, measured in a new process, in units of the weights' bytes."""
    command = [sys.executable, __file__, "--memory-of", method, "--copies", str(copies)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    with torch.device("meta"):
        weights = sum(parameter.nbytes for parameter in convolutions(copies).parameters())
    return int(done.stdout) / weights


def measure(copies: int, repeats: int) -> list[dict[str, object]]:
    model = convolutions(copies)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{count:,} weights, {SPARSITY:.0%} sparse, {repeats} repeats")
    times: dict[str, list[float]] = {method: [] for method in METHODS}
    methods = list(METHODS)
    for repeat in range(repeats + 1):
        for method in methods[repeat % len(methods) :] + methods[: repeat % len(methods)]:
            taken = seconds(method, copies, model)
            if repeat:  # the first is to warm up
                times[method].append(taken)
    memory = {method: extra_memory(method, copies) for method in METHODS}
    for method, taken in times.items():
        print(
            f"  {method:<20} {1e3 * statistics.median(taken):9.1f} ms, extra memory {memory[method]:.2f} x weights"
        )
    rows: list[dict[str, object]] = []
    for ours, peer in PAIRS:
        ratios = sorted(a / b for a, b in zip(times[ours], times[peer], strict=True))
        print(f"  {ours} / {peer}: {statistics.median(ratios):.4f}, from {ratios[0]:.4f} to {ratios[-1]:.4f}")
        rows.append(
            {
                "weights": count,
                "sparsity": SPARSITY,
                "ours": ours,
                "peer": peer,
                "ratio_median": round(statistics.median(ratios), 4),
                "ratio_lowest": round(ratios[0], 4),
                "ratio_highest": round(ratios[-1], 4),
                "repeats": repeats,
                "extra_memory_ours": round(memory[ours], 3),
                "extra_memory_peer": round(memory[peer], 3),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "hardware": processor(),
            }
        )
    return rows


def processor() -> str:
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return str(capabilities.get("cpu_name") or platform.processor() or platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description="Global magnitude pruning against its peers.")
    parser.add_argument("--repeats", type=int, default=5, help="times that each is timed (default: 5)")
    parser.add_argument("--copies", type=int, nargs="+", default=[1, 9], help="of the 11 million weights")
    parser.add_argument("--memory-of", choices=list(METHODS), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.memory_of:
        print(extra_bytes(given.memory_of, given.copies[0]))
        return
    rows = [row for copies in given.copies for row in measure(copies, given.repeats)]
    RESULTS.parent.mkdir(exist_ok=True)
    with open(RESULTS, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"written to {RESULTS.relative_to(Path(__file__).resolve().parent.parent)}")


if __name__ == "__main__":
    main()
