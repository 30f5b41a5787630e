"""Time and extra memory of learning layer scales: ours against GradInit as published, on CIFAR's ResNet-18.

    python benchmarks/layer_scales.py                              # against the algorithm written out plainly
    python benchmarks/layer_scales.py --reference PATH             # and the published code, a checkout of
                                                                   # github.com/zhuchen03/gradinit

All variants see the same weights and batches, and whether they arrive at the same weights is checked. Times are
interleaved, one run of each variant after the other, and given per iteration as median and range. Extra memory is
the peak above what was held before the call, each in a process of its own (on the CPU: resident memory, on Linux).
"""

from __future__ import annotations

import argparse
import copy
import importlib
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torchvision.models import resnet18

from sparsetweaks.recipe.layer_scales import BETAS, EPSILON, FLOOR, SCALE_LR, STEP_SIZE, learn_layer_scales

Batches = list[tuple[Tensor, Tensor]]
MIB = 2**20


def cifar_resnet18() -> nn.Module:
    model = resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def random_batches(count: int, size: int, device: str) -> Batches:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, size, 3, 32, 32, generator=generator).to(device)
    labels = torch.randint(10, (count, size), generator=generator).to(device)
    return list(zip(images, labels, strict=True))


# ----------------------------------------------------------------------------------------------------
# The variants: each takes a model and batches, and returns the scaled model.


def ours(order: int, model: nn.Module, batches: Batches, options: argparse.Namespace) -> nn.Module:
    return learn_layer_scales(model, batches, order=order, iterations=options.iterations, gamma=options.gamma)


def plain(model: nn.Module, batches: Batches, options: argparse.Namespace) -> nn.Module:
    """The published algorithm written out: a detached step, and yet a second-order graph every time."""
    net = copy.deepcopy(model).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.training, module.track_running_stats = True, False
    tensors = dict(net.named_parameters())
    scales = {name: [1.0, p.norm().item(), 0.0, 0.0, 0.0, 0, 0] for name, p in tensors.items()}
    drawn = 0
    for _ in range(options.iterations):
        first, second, third = (batches[(drawn + k) % len(batches)] for k in range(3))
        images, labels = (torch.cat(parts) for parts in zip(first, second, strict=True))
        loss = F.cross_entropy(net(images), labels)
        gradient = torch.autograd.grad(loss, list(tensors.values()), create_graph=True)
        norm = sum(part.square().sum() for part in gradient).sqrt()
        net.zero_grad()
        bounding = norm.item() > options.gamma
        drawn += 2 if bounding else 3
        if bounding:
            norm.backward()
        else:
            steps = [STEP_SIZE * (part / norm) for part in gradient]
            ahead = {n: p - step.detach() for (n, p), step in zip(tensors.items(), steps, strict=True)}
            images, labels = (torch.cat(parts) for parts in zip(first, third, strict=True))
            (F.cross_entropy(functional_call(net, ahead, (images,)), labels) / STEP_SIZE).backward()
        for name, tensor in tensors.items():
            move(tensor, scales[name], bounding, 0.0 if "bias" in name else FLOOR)
    return net


@torch.no_grad()
def move(tensor: nn.Parameter, state: list[float], bounding: bool, floor: float) -> None:
    """One step of the scales' Adam; the state is scale, first norm, square, two averages, two step counts."""
    norm = tensor.norm().item()
    if state[1] == 0 or norm == 0:
        return
    slope = max(min(torch.sum(tensor.grad * tensor).item() * state[1] / norm, 1.0), -1.0)
    average, steps = 3 + bounding, 5 + bounding
    state[steps] += 1
    state[average] = state[average] * BETAS[0] + slope * (1 - BETAS[0])
    state[2] = state[2] * BETAS[1] + slope * slope * (1 - BETAS[1])
    root = math.sqrt(state[2] / (1 - BETAS[1] ** (state[5] + state[6]))) + EPSILON
    state[0] = max(state[0] - SCALE_LR / (1 - BETAS[0] ** state[steps]) * state[average] / root, floor)
    tensor.mul_(state[0] * state[1] / norm)


def published(model: nn.Module, batches: Batches, options: argparse.Namespace) -> nn.Module:
    """The published code itself, from its checkout; only its moving of batches to a GPU is replaced."""
    gradinit_utils = load_published(options.reference)
    net = copy.deepcopy(model)
    arguments = types.SimpleNamespace(
        gradinit_resume="", gradinit_min_scale=FLOOR, gradinit_lr=SCALE_LR, gradinit_grad_clip=1,
        gradinit_eta=STEP_SIZE, gradinit_alg="sgd", gradinit_normalize_grad=True,
        gradinit_gamma=options.gamma, gradinit_iters=options.iterations, batch_no_overlap=False, expname="benchmark",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, chdir(folder), open(os.devnull, "w") as quiet:
        printed, sys.stdout = sys.stdout, quiet  # it prints, and saves the model in the working directory
        try:
            gradinit_utils.gradinit(net, batches, arguments)
        finally:
            sys.stdout = printed
    return net


def load_published(reference: str) -> types.ModuleType:
    sys.path.insert(0, reference)
    package = types.ModuleType("models")  # its `models/__init__.py` imports all its networks
    package.__path__ = [str(Path(reference) / "models")]
    sys.modules["models"] = package
    module = importlib.import_module("gradinit_utils")

    def get_batch(iterator, loader):
        batch = next(iterator, None)
        if batch is None:
            iterator = iter(loader)
            batch = next(iterator)
        return iterator, *batch

    module.get_batch = get_batch
    return module


def variants(
    options: argparse.Namespace,
) -> dict[str, Callable[[nn.Module, Batches, argparse.Namespace], nn.Module]]:
    found = {
        "ours, order 1": lambda *given: ours(1, *given),
        "plain": plain,
        "ours, order 2": lambda *given: ours(2, *given),
    }
    return found | ({"published": published} if options.reference else {})


# ----------------------------------------------------------------------------------------------------
# Measuring


def set_up(options: argparse.Namespace) -> tuple[nn.Module, Batches]:
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    model = cifar_resnet18().to(options.device)
    return model, random_batches(3 * options.iterations, options.batch_size // 2, options.device)


def seconds(run: Callable[[], nn.Module], device: str) -> tuple[float, nn.Module]:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def extra_memory(name: str, options: argparse.Namespace) -> float:
    """Peak memory above what was held before, in MiB; in this process, so call it once."""
    model, batches = set_up(options)
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        variants(options)[name](model, batches, options)
        return (torch.cuda.max_memory_allocated() - before) / MIB
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    variants(options)[name](model, batches, options)
    return (resident("VmHWM") - before) / MIB


def resident(field: str) -> int:
    """A field of this process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure_memory(name: str, options: argparse.Namespace) -> float:
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    options = parsed()
    if options.memory_of:
        print(extra_memory(options.memory_of, options))
        return
    model, batches = set_up(options)
    runs = variants(options)
    taken: dict[str, list[float]] = {name: [] for name in runs}
    results: dict[str, nn.Module] = {}
    for repeat in range(options.repeats + 1):
        for name, run in runs.items():
            took, results[name] = seconds(lambda run=run: run(model, batches, options), options.device)
            if repeat > 0:  # the first is a warm-up
                taken[name].append(took / options.iterations)
    report(
        runs,
        taken,
        {name: [measure_memory(name, options) for _ in range(options.repeats)] for name in runs},
        options,
    )
    compare(results)


def report(runs, taken, memory, options) -> None:
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()} CPU"
    print(
        f"ResNet-18 for CIFAR, {options.batch_size} images a pass, {options.iterations} iterations,", end=" "
    )
    print(f"gamma {options.gamma}, {options.repeats} repeats")
    print(f"{where}, {options.threads} threads, torch {torch.__version__}")
    row("", ["s/iteration", "range", "of plain", "extra MiB", "range", "of plain"])
    for name in runs:
        columns = []
        for values, digits in ((taken, 3), (memory, 0)):
            middle = statistics.median(values[name])
            spread = f"{min(values[name]):.{digits}f}-{max(values[name]):.{digits}f}"
            columns += [f"{middle:.{digits}f}", spread, f"{middle / statistics.median(values['plain']):.2f}"]
        row(name, columns)


def row(name: str, columns: list[str]) -> None:
    print(f"{name:16}" + "".join(f"{column:>14}" for column in columns))


def compare(results: dict[str, nn.Module]) -> None:
    """How far each variant's weights are from the first order's, relative to the largest of the tensor."""
    expected = dict(results["ours, order 1"].named_parameters())
    for name in [name for name in results if name != "ours, order 1"]:
        apart = max(
            ((p - expected[n]).abs().max() / expected[n].abs().max().clamp_min(1e-30)).item()
            for n, p in results[name].named_parameters()
        )
        print(f"{name!r} and 'ours, order 1': {f'{apart:.1e} apart' if apart else 'bit-equal'}")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reference", help="path of a checkout of the published code")
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64, help="images of the step, and of the objective")
    parser.add_argument(
        "--gamma", type=float, default=math.inf, help="the default measures unbounded iterations"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
