"""What holding pruned weights at zero costs per training step: `keep_masks` against others' upkeep.

    python benchmarks/keep_masks.py --open-lth PATH    # PATH is a checkout of github.com/facebookresearch/open_lth

A step takes a thousand times as long as its upkeep, so the difference of two steps tells nothing about it. Timed is
the upkeep by itself, called as training calls it, on the same weights at 95 % sparsity:

- `keep_masks`: its hooks on each gradient, and after the step on each weight and its momentum; and of these the
  weights alone, which is all that open_lth holds;
- open_lth: its `PrunedModel` multiplies each weight by its mask before each forward (its gradients, and the momentum,
  stay dense);
- `nn.utils.prune`: multiplies each weight by its mask into a new tensor before each forward, and its gradient in the
  backward pass;
- ToST, written out: works the mask out from the weights that are not zero, and multiplies each gradient by it.

Shares are of a plain training step of the same network, batch 128 at 32x32, float32, channels last.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import open_lth
import paired
import torch
import torch.nn.functional as F
from paired import Row
from torch import nn
from torch.nn.utils import prune as torch_prune

from sparsetweaks.copying import copy_model
from sparsetweaks.forms import masked_parameters
from sparsetweaks.keeping import _Held, keep_masks
from sparsetweaks.lottery.config import Network
from sparsetweaks.lottery.models import build
from sparsetweaks.masks import find_masks
from sparsetweaks.pruning import prune

SPARSITY = 0.95
BATCH = 128
CALLS = 20  # of an upkeep in a row
NETWORKS = {"ResNet-20": Network("resnet20"), "ResNet-18": Network("resnet18")}
OPEN_LTH = {"ResNet-20": "cifar_resnet_20_16"}  # the same network there
OF_OPEN_LTH, OF_A_STEP = 0.25, 0.003
THREE_TENSORS = "holds gradients and momentum too: three tensors, of which one is 0.2 of open_lth's"


def trainer(model: nn.Module) -> tuple[Callable[[], None], torch.optim.Optimizer]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=2e-4)
    images = torch.randn(BATCH, 3, 32, 32).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (BATCH,))

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step, optimizer


def ours(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Within `keep_masks`: the hooks themselves."""
    masked = [(p, list(p._backward_hooks.values())) for p in model.parameters() if p._backward_hooks]
    after = list(optimizer._optimizer_step_post_hooks.values())

    def upkeep() -> None:
        for parameter, hooks in masked:
            for hook in hooks:
                hook(parameter.grad)
        for hook in after:
            hook(optimizer, (), {})

    return upkeep


def ours_on_weights(model: nn.Module) -> Callable[[], None]:
    """The part of it that open_lth does as well."""
    held = [_Held(place) for place in masked_parameters(model).values()]

    @torch.no_grad()
    def upkeep() -> None:
        for each in held:
            each.zero_weight_(each.bits())

    return upkeep


def of_open_lth(name: str, checkout: Path) -> Callable[[], None]:
    """`PrunedModel._apply_mask` of its own network, at the same sparsity."""
    hparams, registry, masks, pruned = open_lth.modules(
        checkout, "foundations.hparams", "models.registry", "pruning.mask", "pruning.pruned_model"
    )
    model = registry.get(hparams.ModelHparams(OPEN_LTH[name], "kaiming_normal", "uniform"))
    mask = masks.Mask.ones_like(model)
    for key, each in mask.items():
        mask[key] = (torch.rand_like(each) > SPARSITY).float()
    return pruned.PrunedModel(model.to(memory_format=torch.channels_last), mask)._apply_mask


def of_torch(model: nn.Module) -> Callable[[], None]:
    """The hooks before each forward, and the way of the gradient through the product."""
    masks = find_masks(model)
    model = copy_model(model)
    layers = [model.get_submodule(name.rpartition(".")[0]) for name in masks]
    for layer, mask in zip(layers, masks.values(), strict=True):
        del layer._buffers["weight_mask"]
        torch_prune.custom_from_mask(layer, "weight", mask)
    gradients = [torch.randn_like(layer.weight) for layer in layers]

    def upkeep() -> None:
        for layer in layers:
            layer.weight_orig.grad = None
            for hook in layer._forward_pre_hooks.values():
                hook(layer, ())
        torch.autograd.backward([layer.weight for layer in layers], gradients)

    return upkeep


def of_tost(model: nn.Module) -> Callable[[], None]:
    weights = [model.get_parameter(name) for name in find_masks(model)]

    @torch.no_grad()
    def upkeep() -> None:
        for weight in weights:
            weight.grad.mul_(weight.abs().gt(0).float())

    return upkeep


def measure(name: str, options: argparse.Namespace) -> Iterator[Row]:
    torch.manual_seed(0)
    dense = build(NETWORKS[name], channels=3, classes=10, seed=0).to(memory_format=torch.channels_last)
    model = prune(dense, SPARSITY)
    step, optimizer = trainer(model)
    with keep_masks(model, optimizer):
        step()
        upkeeps = {
            "keep_masks": ours(model, optimizer),
            "weights alone": ours_on_weights(model),
            "nn.utils.prune": of_torch(model),
            "ToST": of_tost(model),
        }
        if options.open_lth and name in OPEN_LTH:
            upkeeps["open_lth"] = of_open_lth(name, options.open_lth)
        runs = {who: functools.partial(repeated, upkeep) for who, upkeep in upkeeps.items()}
        times = paired.interleaved(runs, options.repeats)
    steps = paired.interleaved({"step": step}, min(options.repeats, 3))["step"]
    plain = paired.spread("", "", steps).median
    assert plain is not None
    what = f"keeping masks, {name}"
    for who, taken in times.items():
        shares = [each / CALLS / plain for each in taken]
        note = f"{1e6 * min(taken) / CALLS:.0f} us at best, of a step of {1e3 * plain:.0f} ms"
        yield paired.spread(what, f"share of a step, {who}", shares, note=note)
        if who == "keep_masks":  # the target is of every repeat
            size = sum(mask.numel() for mask in find_masks(model).values()) * 3 * 4 / 1e6
            passes = f"weights, gradients and momentum, {size:.0f} MB, are read and written once in a step"
            yield Row(
                what,
                f"highest share of a step, {who}",
                max(shares),
                n=len(shares),
                target=OF_A_STEP,
                note=passes,
            )
    for peer in ("nn.utils.prune", "ToST"):
        yield paired.spread(what, f"time, keep_masks / {peer}", paired.ratios(times, "keep_masks", peer))
    for who, note in (("keep_masks", THREE_TENSORS), ("weights alone", "what open_lth holds")):
        if "open_lth" in times:
            found = paired.ratios(times, who, "open_lth")
            yield paired.spread(what, f"time, {who} / open_lth", found, target=OF_OPEN_LTH, note=note)
        elif name in OPEN_LTH:
            yield paired.not_given(what, f"time, {who} / open_lth", target=OF_OPEN_LTH)


def repeated(upkeep: Callable[[], None]) -> None:
    for _ in range(CALLS):
        upkeep()


CASES = {name: functools.partial(measure, name) for name in NETWORKS}

if __name__ == "__main__":
    peers = {"open-lth": "github.com/facebookresearch/open_lth"}
    paired.main(__doc__, "keep_masks", CASES, repeats=15, peers=peers)
