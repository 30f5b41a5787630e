"""The one training loop: any model, any loss, masked or dense, on a CPU or a GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsetweaks.keeping import keep_masks
from sparsetweaks.lottery import store
from sparsetweaks.lottery.config import LotteryError, Recipe
from sparsetweaks.lottery.data import Data, Images, batches
from sparsetweaks.masks import find_masks

SEED_STRIDE = 1_000_003  # no two epochs of two seeds share a generator


@dataclass
class Trained:
    """What a training has come to, finished or not."""

    epochs: int = 0  # done so far
    validation: float = -1.0  # accuracy of the best epoch, in [0, 1]
    best_epoch: int = 0
    test: float | None = (
        None  # accuracy of that epoch's weights, as the authors report it; None while unfinished
    )
    seconds: float = 0.0  # of training alone
    steps: int = 0
    note: dict[str, Any] = field(default_factory=dict)  # of the caller's
    weights: dict[str, store.State] = field(default_factory=dict, repr=False)  # "last", "best", "rewind"


def train(
    model: nn.Module,
    data: Data,
    recipe: Recipe,
    *,
    seed: int,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    rewind_epoch: int = 0,
    checkpoint: Path | None = None,
    note: dict[str, Any] | None = None,
    on_epoch: Callable[[Trained], None] | None = None,
) -> Trained:
    """Train `model` in place, its masks kept, and report the test accuracy of its best epoch in validation.

    Args:
        model: any classifier; moved to the device of `data`; left with the weights of the best epoch.
        data: from `load`.
        recipe: how long, how fast, how precise.
        seed: of the order of the images and their augmentation.
        loss: of logits and labels; default cross-entropy.
        rewind_epoch: after how many epochs to remember the weights; 0, the start, is the original lottery ticket (k = 0).
        checkpoint: a file to keep the state of each epoch in; a training that was cut off goes on from there, a finished
            one is read back. Default: none.
        note: anything JSON can hold, kept with the result.
        on_epoch: called after each epoch with what it has come to.

    Returns:
        Accuracies, weights and times.

    Raises:
        LotteryError: when the loss is not finite, at the end of the epoch in which that happened.

    Example:
        >>> from sparsetweaks.lottery.config import Network
        >>> from sparsetweaks.lottery.data import load
        >>> from sparsetweaks.lottery.models import build
        >>> data, model = load("digits"), build(Network(depth=8, width=4), channels=1, classes=10, seed=0)
        >>> train(model, data, Recipe(epochs=1), seed=0).best_epoch
        1
    """
    device = data.mean.device
    loss = nn.CrossEntropyLoss() if loss is None else loss
    model.to(device).to(memory_format=torch.channels_last)
    forward = torch.compile(model) if recipe.compile else model
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
    )
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=computes_in_bfloat16(recipe, device))
    padding = round(recipe.crop_padding * data.train.images.shape[-1])
    steps = max(1, len(data.train) // recipe.batch_size)  # per epoch
    done = _resumed(checkpoint, model, optimizer) or Trained(
        note=note or {}, weights={"rewind": _copy(model)}
    )

    with keep_masks(model, optimizer) if find_masks(model) else contextlib.nullcontext():
        for epoch in range(done.epochs, recipe.epochs):
            started, total = time.perf_counter(), torch.zeros((), device=device)
            # seeded for each epoch, so that a training cut off goes on exactly as it would have
            generator = torch.Generator(device).manual_seed(seed * SEED_STRIDE + epoch)
            model.train()
            for step, (images, labels) in enumerate(
                batches(data.train, data, size=recipe.batch_size, padding=padding, generator=generator)
            ):
                for group in optimizer.param_groups:
                    group["lr"] = recipe.learning_rate * schedule(epoch + step / steps, recipe)
                with autocast:
                    logits = forward(images.contiguous(memory_format=torch.channels_last))
                value = loss(logits.float(), labels)
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                total += value.detach()
            if not math.isfinite(total.item()):  # asked once an epoch, as the answer waits for the device
                raise LotteryError(
                    f"the loss became {total.item()} in epoch {epoch + 1}: lower the learning rate, or warm up"
                )
            done.seconds += time.perf_counter() - started
            done.epochs, done.steps = epoch + 1, done.steps + steps
            with autocast:
                validation = accuracy(model, data.validation, data)
            done.weights["last"] = _copy(model)
            if validation > done.validation:
                done.validation, done.best_epoch = validation, epoch + 1
                done.weights["best"] = done.weights["last"]
            if epoch + 1 == rewind_epoch:
                done.weights["rewind"] = done.weights["last"]
            _save(checkpoint, done, optimizer, model)
            if on_epoch is not None:
                on_epoch(done)
    model.load_state_dict(done.weights["best"])
    if done.test is None:
        with autocast:
            done.test = accuracy(model, data.test, data)
        _save(checkpoint, done)
    return done


def schedule(epoch: float, recipe: Recipe) -> float:
    """The learning rate at a point of the training, as a fraction of the highest.

    Args:
        epoch: how many epochs are done; fractions count.
        recipe: with its warm-up, its milestones and their decay.

    Returns:
        A factor in (0, 1].

    Example:
        >>> [schedule(epoch, Recipe(epochs=180)) for epoch in (0, 90, 135)]
        [1.0, 0.1, 0.010000000000000002]
    """
    passed = sum(epoch >= milestone * recipe.epochs for milestone in recipe.milestones)
    warmup = min(1.0, (epoch + 1e-3) / recipe.warmup_epochs) if recipe.warmup_epochs else 1.0
    return warmup * recipe.decay**passed


def accuracy(model: nn.Module, part: Images, data: Data, *, size: int = 1000) -> float:
    """The fraction of images that a model gets right, in evaluation mode.

    Args:
        model: a classifier; its train or eval mode is put back.
        part: the images, `data.test` say.
        data: the data set they belong to.
        size: images per batch.

    Returns:
        A number in [0, 1].

    Example:
        >>> from sparsetweaks.lottery.data import load
        >>> data = load("digits")
        >>> 0 <= accuracy(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), data.test, data) <= 1
        True
    """
    was_training = model.training
    model.eval()
    with torch.no_grad():
        right = sum(
            (
                model(data.normalise(images).contiguous(memory_format=torch.channels_last)).argmax(1)
                == labels
            ).sum()
            for images, labels in zip(part.images.split(size), part.labels.split(size), strict=True)
        )
    model.train(was_training)
    return float(right) / len(part)


def computes_in_bfloat16(recipe: Recipe, device: torch.device) -> bool:
    """Whether to compute in bfloat16: as told, or where the hardware multiplies it natively (elsewhere it is slower).

    Args:
        recipe: with its `precision`.
        device: to compute on.

    Returns:
        The answer.

    Example:
        >>> computes_in_bfloat16(Recipe(precision="float32"), torch.device("cpu"))
        False
    """
    if recipe.precision != "auto":
        return recipe.precision == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # an older torch: none
    return device.type == "cpu" and any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def load_trained(checkpoint: Path) -> Trained:
    """Read what a training has come to.

    Args:
        checkpoint: the file given to `train`.

    Returns:
        Accuracies, weights and times; `test` is None where the training was cut off.

    Raises:
        LotteryError: when the file is missing, broken, or something else.
    """
    header, groups = store.load(checkpoint, "training")
    groups.pop("momentum", None)
    return Trained(weights=groups, **header)


def _save(
    checkpoint: Path | None,
    done: Trained,
    optimizer: torch.optim.Optimizer | None = None,
    model: nn.Module | None = None,
) -> None:
    if checkpoint is None:
        return
    header = {
        spec.name: getattr(done, spec.name) for spec in dataclasses.fields(done) if spec.name != "weights"
    }
    groups = dict(done.weights)
    if optimizer is not None and model is not None:
        groups["momentum"] = {
            name: optimizer.state[parameter]["momentum_buffer"]
            for name, parameter in model.named_parameters()
            if parameter in optimizer.state
        }
    store.save(checkpoint, "training", header, groups)


def _resumed(checkpoint: Path | None, model: nn.Module, optimizer: torch.optim.Optimizer) -> Trained | None:
    """Put weights and momentum back as they were after the last epoch that was finished."""
    if checkpoint is None or not checkpoint.is_file():
        return None
    done = load_trained(checkpoint)
    model.load_state_dict(done.weights["last"])
    momentum = store.load(checkpoint, "training")[1].get("momentum", {})
    for name, parameter in model.named_parameters():
        if name in momentum:
            optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(momentum[name])
    return done


def _copy(model: nn.Module) -> store.State:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
