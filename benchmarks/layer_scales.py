"""Learning layer scales: ours against GradInit as published, in plain training steps, time, memory and result.

    python benchmarks/layer_scales.py --gradinit PATH      # PATH is a checkout of github.com/zhuchen03/gradinit

An iteration of each, all from the same weights and batches; a plain step is forward, backward and SGD on as many images.
Without the checkout the algorithm of the published code, written out here, stands in its place. Times are interleaved.
Extra memory is the peak above what was held before the call, each in a process of its own (resident memory, on Linux).

Order 2 is compared with double backward through the step, written out, and there is a row on what central differences in
its place would come to.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib
import math
import os
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import chdir
from pathlib import Path

import paired
import torch
from paired import Row
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from sparsetweaks.lottery.config import Network
from sparsetweaks.lottery.models import build
from sparsetweaks.recipe import layer_scales
from sparsetweaks.recipe.layer_scales import (
    BETAS,
    EPSILON,
    FLOOR,
    GRADIENT_CLIP,
    OVERLAP,
    SCALE_LR,
    STEP_SIZE,
    find_layer_scales,
    learn_layer_scales,
)

Batches = list[tuple[Tensor, Tensor]]
NETWORKS = {"ResNet-18": Network("resnet18"), "ResNet-20": Network("resnet20")}
IMAGES = 64  # of the step, and of the objective
ITERATIONS = {"ResNet-18": 2, "ResNet-20": 5}
LONG = 20  # iterations, where results are compared
OF_A_STEP, OF_THE_TIME, OF_THE_MEMORY = 2.1, 0.80, 0.6
IN_BF16, OF_THE_MOVE = 0.4, 1e-2
SECOND_ORDER, EXACT_ENOUGH = 1.0, 0.1
DISTANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # of central differences, relative to the weights' norm


def network(name: str) -> nn.Module:
    return build(NETWORKS[name], channels=3, classes=10, seed=0)


def random_batches(count: int, *, images: int = IMAGES) -> Batches:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, images // 2, 3, 32, 32, generator=generator)
    labels = torch.randint(10, (count, images // 2), generator=generator)
    return list(zip(inputs, labels, strict=True))


# ----------------------------------------------------------------------------------------------------
# What is compared: each takes a model and batches, and returns the scaled model


def ours(model: nn.Module, batches: Batches, options: argparse.Namespace, order: int = 1) -> nn.Module:
    return learn_layer_scales(model, batches, order=order, iterations=options.iterations, gamma=options.gamma)


def ours_in_bf16(model: nn.Module, batches: Batches, options: argparse.Namespace) -> nn.Module:
    with torch.autocast("cpu", torch.bfloat16):
        return ours(model, batches, options)


def steps(model: nn.Module, batches: Batches, options: argparse.Namespace) -> nn.Module:
    """As many plain training steps as there are iterations, on as many images each."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for number in range(options.iterations):
        pair = batches[2 * number], batches[2 * number + 1]
        images, labels = (torch.cat(parts) for parts in zip(*pair, strict=True))
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model


def plain(
    model: nn.Module, batches: Batches, options: argparse.Namespace, *, detach: bool = True
) -> nn.Module:
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
            taken = [step.detach() if detach else step for step in steps]
            ahead = {n: p - step for (n, p), step in zip(tensors.items(), taken, strict=True)}
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
    gradinit_utils = load_published(str(options.gradinit))
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


def double_backward(model: nn.Module, batches: Batches, options: argparse.Namespace) -> nn.Module:
    """The objective as the papers write it, in the shortest way: through the step, by autograd."""
    return plain(model, batches, options, detach=False)


# ----------------------------------------------------------------------------------------------------
# Measuring


def setting(name: str, options: argparse.Namespace) -> tuple[nn.Module, Batches]:
    torch.manual_seed(0)
    options.iterations, options.gamma = ITERATIONS[name], math.inf  # every iteration looks ahead
    return network(name), random_batches(3 * options.iterations)


def first_order(name: str, options: argparse.Namespace) -> Iterator[Row]:
    model, batches = setting(name, options)
    peer, reference = ("reference", published) if options.gradinit else ("reference, written out", plain)
    kept: dict[str, nn.Module] = {}
    runs = {
        who: functools.partial(keeping, kept, who, run, model, batches, options)
        for who, run in {"ours": ours, "step": steps, "reference": reference}.items()
    }
    times = paired.interleaved(runs, options.repeats)
    what = f"layer scales, order 1, {name}"
    yield paired.spread(what, "time / a plain step", paired.ratios(times, "ours", "step"), target=OF_A_STEP)
    theirs = paired.spread(what, f"time, {peer} / a plain step", paired.ratios(times, "reference", "step"))
    yield theirs
    assert theirs.median is not None
    note = (
        f"both compute two gradients, which are 2 plain steps; what ours leaves out, a second-order graph that nothing "
        f"uses, is {theirs.median - 2:.2f} of the reference's {theirs.median:.2f}"
    )
    found, target = paired.ratios(times, "ours", "reference"), OF_THE_TIME if name == "ResNet-18" else None
    yield paired.spread(what, f"time / {peer}", found, target=target, note=note)
    yield Row(
        what, f"weights apart from {peer}, float32", apart(kept["ours"], kept["reference"]), n=1, target=0.0
    )


def keeping(kept: dict[str, nn.Module], who: str, run: Callable[..., nn.Module], *given: object) -> None:
    kept[who] = run(*given)


def apart(ours: nn.Module, other: nn.Module) -> float:
    """The largest difference of a weight, relative to the largest of its tensor; 0 only if all bits are equal."""
    expected = dict(other.named_parameters())
    return max(
        ((p - expected[name]).abs().max() / expected[name].abs().max().clamp_min(1e-30)).item()
        for name, p in ours.named_parameters()
    )


def in_bf16(name: str, options: argparse.Namespace) -> Iterator[Row]:
    model, batches = setting(name, options)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    laid_out = [(images.contiguous(memory_format=torch.channels_last), labels) for images, labels in batches]
    peer, reference = ("reference", published) if options.gradinit else ("reference, written out", plain)
    runs = {
        "ours": functools.partial(ours_in_bf16, last, laid_out, options),
        "reference": functools.partial(reference, model, batches, options),
    }
    times = paired.interleaved(runs, options.repeats)
    what = f"layer scales, order 1 in bf16 channels last, {name}"
    yield paired.spread(
        what, f"time / {peer} in float32", paired.ratios(times, "ours", "reference"), target=IN_BF16
    )


def scales_in_bf16(name: str, options: argparse.Namespace) -> Iterator[Row]:
    """How far the scales are from those of float32; and how far float32 is from itself in another memory format."""
    model = network(name)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    found: dict[str, list[float]] = {"bfloat16": [], "float32": []}
    for images in (32, 64):
        batches = random_batches(3 * LONG, images=images)
        exact = find_layer_scales(model, batches, iterations=LONG, gamma=math.inf).scales
        moved = math.hypot(*(exact[key] - 1 for key in exact))
        for precision, distances in found.items():
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
                scales = find_layer_scales(last, batches, iterations=LONG, gamma=math.inf).scales
            distances.append(math.hypot(*(scales[key] - exact[key] for key in exact)) / moved)
    what = f"layer scales, order 1, channels last, {name}"
    note = (
        "the derivative of a BatchNorm's weight before another normalised convolution is 0 but for rounding, of which Adam "
        "makes whole steps, in float32 too; and bfloat16 turns the sign of others, whose sums cancel"
    )
    for precision, target in (("bfloat16", OF_THE_MOVE), ("float32", None)):
        measure = f"scales in {precision} apart / their move"
        yield paired.spread(
            what, measure, found[precision], target=target, note=note if target else f"{LONG} iterations"
        )


def second_order(name: str, options: argparse.Namespace) -> Iterator[Row]:
    model, batches = setting(name, options)
    kept: dict[str, nn.Module] = {}
    variants = {
        "ours": functools.partial(ours, order=2),
        "order 1": ours,
        "step": steps,
        "double": double_backward,
    }
    runs = {
        who: functools.partial(keeping, kept, who, run, model, batches, options)
        for who, run in variants.items()
    }
    times = paired.interleaved(runs, options.repeats)
    what = f"layer scales, order 2, {name}"
    yield paired.spread(
        what, "time / double backward", paired.ratios(times, "ours", "double"), target=SECOND_ORDER
    )
    for who, title in (("ours", "time / a plain step"), ("double", "time, double backward / a plain step")):
        yield paired.spread(what, title, paired.ratios(times, who, "step"))
    yield paired.spread(what, "time / order 1", paired.ratios(times, "ours", "order 1"))
    distance = apart(kept["ours"], kept["double"])
    yield Row(
        what, "weights apart from double backward", distance, n=1, note="float32 rounds the two differently"
    )


def memory(name: str, options: argparse.Namespace) -> Iterator[Row]:
    what = f"layer scales, {name}"
    peer, reference = ("reference", "published") if options.gradinit else ("reference, written out", "plain")
    for order, against, title, target in (
        ("order 1", reference, peer, OF_THE_MEMORY),
        ("order 2", "double backward", "double backward", OF_THE_MEMORY),
    ):
        found = [
            [paired.in_new_process(f"{who}:{name}") / paired.MIB for who in (order, against)]
            for _ in range(min(options.repeats, 3))
        ]
        ratios = [mine / theirs for mine, theirs in found]
        note = f"{found[0][0]:.0f} of {found[0][1]:.0f} MiB"
        yield paired.spread(what, f"extra memory, {order} / {title}", ratios, target=target, note=note)


def extra_bytes(options: argparse.Namespace) -> float:
    who, _, name = options.task.partition(":")
    model, batches = setting(name, options)
    runs: Mapping[str, Callable[..., nn.Module]] = {
        "order 1": ours,
        "order 2": functools.partial(ours, order=2),
        "published": published,
        "plain": plain,
        "double backward": double_backward,
    }
    return paired.extra_bytes(lambda: runs[who](model, batches, options))


def differences(name: str, options: argparse.Namespace) -> Iterator[Row]:
    """What central differences of the gradient would make of order 2's last pass, on a dense network, as all rows here."""
    model, batches = setting(name, options)
    search = layer_scales._Search(
        model,
        layer_scales._Settings(
            order=2,
            iterations=1,
            scale_lr=SCALE_LR,
            step_size=STEP_SIZE,
            gamma=math.inf,
            floor=FLOOR,
            gradient_clip=GRADIENT_CLIP,
            algorithm="sgd",
            normalize=True,
            overlap=OVERLAP,
            loss=None,
        ),
    )
    drawn = layer_scales._Batches(batches, OVERLAP, None, False)
    pair = drawn.for_step()
    _, gradient = search._gradient(pair, graph=True)
    step = search._step(gradient)
    _, slopes = search._look_ahead([part.detach() for part in step], drawn.for_objective())
    exact = [s - e for s, e in zip(slopes, search._through_the_step(step, slopes), strict=True)]
    gradient = [part.detach() for part in gradient]
    norm = search._norm(gradient)
    along = sum((s * g).sum() for s, g in zip(slopes, gradient, strict=True)) / norm
    direction = [STEP_SIZE * (s - g / norm * along) / norm for s, g in zip(slopes, gradient, strict=True)]
    weights = [p.detach().clone() for p in search.parameters]
    reach = norm_of(weights) / norm_of(direction)
    errors = []
    for distance in DISTANCES:
        ahead, behind = (
            moved_gradient(search, pair, weights, direction, sign * distance * reach) for sign in (1, -1)
        )
        found = [(a - b) / (2 * distance * reach) for a, b in zip(ahead, behind, strict=True)]
        derivatives = [
            [(w * part).sum().item() for w, part in zip(weights, parts, strict=True)]
            for parts in (found, exact)
        ]
        wrong = math.hypot(*(a - b for a, b in zip(*derivatives, strict=True)))
        errors.append(wrong / math.hypot(*derivatives[1]))
    note = (
        f"the best of {len(DISTANCES)} distances, of the scales' derivatives through the step: ReLU's kinks are crossed "
        "by long steps and float32 drowns short ones, so there is no such variant"
    )
    yield Row(
        f"layer scales, order 2, {name}", "error of central differences", min(errors), min(errors), max(errors),
        len(errors), EXACT_ENOUGH, note,
    )  # fmt: skip


def moved_gradient(search, pair, weights, direction, distance) -> list[Tensor]:
    with torch.no_grad():
        for parameter, start, part in zip(search.parameters, weights, direction, strict=True):
            parameter.copy_(start + distance * part)
    _, gradient = search._gradient(pair, graph=False)
    with torch.no_grad():
        for parameter, start in zip(search.parameters, weights, strict=True):
            parameter.copy_(start)
    return gradient


def norm_of(parts: list[Tensor]) -> float:
    return math.sqrt(sum(part.square().sum().item() for part in parts))


CASES = {
    **{f"order 1, {name}": functools.partial(first_order, name) for name in NETWORKS},
    "bf16, ResNet-18": functools.partial(in_bf16, "ResNet-18"),
    "bf16 scales, ResNet-20": functools.partial(scales_in_bf16, "ResNet-20"),
    "order 2, ResNet-20": functools.partial(second_order, "ResNet-20"),
    "order 2, ResNet-18": functools.partial(second_order, "ResNet-18"),
    "differences, ResNet-20": functools.partial(differences, "ResNet-20"),
    **{f"memory, {name}": functools.partial(memory, name) for name in NETWORKS},
}

if __name__ == "__main__":
    peers = {"gradinit": "github.com/zhuchen03/gradinit"}
    paired.main(__doc__, "layer_scales", CASES, repeats=3, peers=peers, tasks=extra_bytes)
