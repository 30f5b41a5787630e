"""The one training loop: any model, any loss, masked or dense, on a CPU or a GPU, in one process or several."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from sparsetweaks.keeping import keep_masks
from sparsetweaks.lottery import ranks
from sparsetweaks.lottery.config import LotteryError, Recipe, RunError
from sparsetweaks.lottery.data import Data, Images, batches
from sparsetweaks.lottery.files import State, load, save
from sparsetweaks.masks import find_masks
from sparsetweaks.probing import rng_restored
from sparsetweaks.recipe.labels import distillation_loss
from sparsetweaks.surgery.skips import Skip

SEED_STRIDE = 1_000_003  # no two epochs of two seeds share a generator
SAVING = 0.01  # the most of the time that may go into checkpoints


@dataclass
class Trained:
    """What a training has come to, finished or not."""

    epochs: int = 0  # done so far
    validation: float = -1.0  # accuracy of the best epoch, in [0, 1]
    best_epoch: int = 0
    test: float | None = (
        None  # accuracy of that epoch's weights, as the authors report it; None while unfinished
    )
    loss: float = math.nan  # mean over the last epoch
    seconds: float = 0.0  # of training alone
    steps: int = 0
    averaged: int = 0  # epochs whose weights are in the average
    note: dict[str, Any] = field(default_factory=dict)  # of the caller's
    weights: dict[str, State] = field(
        default_factory=dict, repr=False
    )  # "last", "best", "rewind", `after(3)`
    title: str = field(default="", compare=False)  # of this training, for whoever watches
    total: int = field(default=0, compare=False)  # epochs that it is to have

    def lacks(self, epochs: Sequence[int]) -> bool:
        """Whether one of these epochs is over and its weights were not kept."""
        return any(epoch <= self.epochs and after(epoch) not in self.weights for epoch in epochs)


def after(epoch: int) -> str:
    """What the weights after an epoch are kept as, where a training was asked to keep them."""
    return f"epoch {epoch}"


def train(
    model: nn.Module,
    data: Data,
    recipe: Recipe,
    *,
    seed: int,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    teacher: nn.Module | None = None,
    rewind_epoch: int = 0,
    keep_epochs: Sequence[int] = (),
    checkpoint: Path | None = None,
    note: dict[str, Any] | None = None,
    title: str = "",
    on_epoch: Callable[[Trained], None] | None = None,
) -> Trained:
    """Train `model` in place, its masks kept, and report the test accuracy of its best epoch in validation.

    Under `torchrun` (see `ranks.joined`) each process takes its share of every batch, the same images as one process
    would, and all end with equal weights and masks. A gradient is then the mean of the shares' gradients: without
    BatchNorm that of one process, but for rounding; with it not, as each share is normalised by its own statistics.

    Args:
        model: any classifier; moved to the device of `data`; left with the weights of the best epoch.
        data: from `load`.
        recipe: how long, how fast, how precise; with `average_from`, the weights that are reported are the mean of those
            after each epoch from there on, with BatchNorm's statistics taken anew.
        seed: of the order of the images, their augmentation, and what the model draws (dropout). PyTorch's own random
            state is left as it was.
        loss: of logits and labels; default cross-entropy.
        teacher: a network to learn from as well, by `distillation_loss`.
        rewind_epoch: after how many epochs to remember the weights; 0, the start, is the original lottery ticket (k = 0).
        keep_epochs: after which epochs to keep the weights as well, for whoever looks at the path of the training: numbers
            from 1 to the last. A checkpoint that has passed one of them without is begun anew, to the same end.
        checkpoint: a file to keep the state in, so often that it takes a hundredth of the time at most; a training that
            was cut off goes on from there, a finished one is read back. Default: none.
        note: anything JSON can hold, kept with the result.
        title: to tell this training from others while it runs.
        on_epoch: called after each epoch with what it has come to.

    Returns:
        Accuracies, weights and times.

    Raises:
        RunError: when the loss is not finite, at the end of the epoch in which that happened.
        LotteryError: when batches cannot be shared equally; or for an epoch to keep that there is not.

    Example:
        >>> from sparsetweaks.lottery.config import Network
        >>> from sparsetweaks.lottery.data import load
        >>> from sparsetweaks.lottery.models import build
        >>> data, model = load("digits"), build(Network("resnet8", width=4), channels=1, classes=10, seed=0)
        >>> train(model, data, Recipe(epochs=1), seed=0).best_epoch
        1
    """
    if not all(1 <= epoch <= recipe.epochs for epoch in keep_epochs):
        raise LotteryError(
            f"keep_epochs must lie between 1 and {recipe.epochs}, the last, got {list(keep_epochs)}"
        )
    device = data.mean.device
    loss = nn.CrossEntropyLoss() if loss is None else loss
    memory_format = _memory_format(model, device, recipe)
    model.to(device).to(memory_format=memory_format)
    ranks.check_batch(min(recipe.batch_size, len(data.train)))
    parallel = ranks.wrapped(model)
    mode = recipe.compile if isinstance(recipe.compile, str) else None
    forward = torch.compile(parallel, mode=mode) if recipe.compile else parallel
    teach = None if teacher is None else teacher.to(device).to(memory_format=memory_format).eval()
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
    )
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=computes_in_bfloat16(recipe, device))
    padding = round(recipe.crop_padding * data.train.images.shape[-1])
    steps = max(1, len(data.train) // recipe.batch_size)  # per epoch
    kept = ranks.from_leader(lambda: _kept(checkpoint, keep_epochs))
    if kept is None:
        done = Trained(note=note or {}, weights={"rewind": _copy(model)})
    else:
        done = _resumed(*kept, model, optimizer)
    done.title, done.total = title, recipe.epochs
    save_if_due = _saver(checkpoint, done, optimizer, model)

    with keep_masks(model, optimizer) if find_masks(model) else contextlib.nullcontext():
        for epoch in range(done.epochs, recipe.epochs):
            started, total = time.perf_counter(), torch.zeros((), device=device)
            # seeded for each epoch, so that a training cut off goes on exactly as it would have
            generator = torch.Generator(device).manual_seed(seed * SEED_STRIDE + epoch)
            model.train()
            with rng_restored(model):  # what dropout draws is the epoch's too, and each process's own
                torch.manual_seed((seed * SEED_STRIDE + epoch) * ranks.count() + ranks.rank())
                for step, (images, labels) in enumerate(
                    batches(data.train, data, size=recipe.batch_size, padding=padding, generator=generator)
                ):
                    for group in optimizer.param_groups:
                        group["lr"] = recipe.learning_rate * schedule(epoch + step / steps, recipe)
                    ours = ranks.share(len(labels))
                    images, labels = images[ours].contiguous(memory_format=memory_format), labels[ours]
                    with autocast:
                        logits = forward(images)
                    value = _objective(loss, teach, logits, labels, images, autocast)
                    optimizer.zero_grad()
                    value.backward()
                    optimizer.step()
                    total += value.detach()
            done.loss = (
                ranks.total(total).item() / ranks.count() / steps
            )  # once an epoch: it waits for the device
            if not math.isfinite(done.loss):
                raise RunError(
                    f"the loss became {done.loss} in epoch {epoch + 1}: lower the learning rate, or warm up"
                )
            done.seconds += time.perf_counter() - started
            done.epochs, done.steps = epoch + 1, done.steps + steps
            ranks.average_statistics(model)
            with autocast:
                validation = _accuracy_of_all(model, data.validation, data)
            done.weights["last"] = _copy(model)
            if validation > done.validation:
                done.validation, done.best_epoch = validation, epoch + 1
                done.weights["best"] = done.weights["last"]
            if epoch + 1 == rewind_epoch:
                done.weights["rewind"] = done.weights["last"]
            if epoch + 1 in keep_epochs:
                done.weights[after(epoch + 1)] = done.weights["last"]
            if epoch >= first_averaged(recipe):
                _add_to_average(done)
            save_if_due()
            if on_epoch is not None:
                on_epoch(done)
    if done.test is None:
        if "average" in done.weights:
            _use_average(done, model, data, recipe, autocast)
        model.load_state_dict(done.weights["best"])
        with autocast:
            done.test = _accuracy_of_all(model, data.test, data)
        done.weights.pop("average", None)
        _save(checkpoint, done)
    model.load_state_dict(done.weights["best"])
    return done


def _memory_format(model: nn.Module, device: torch.device, recipe: Recipe) -> torch.memory_format:
    """Channels last, in which convolutions are quickest, but where the gradients of skips spoil that.

    A skip that changes the shape hands on gradients with the channels first. On a CPU in float32 a step of ResNet-20 with
    skips and Swish takes 2.7 plain steps so, and 1.6 with all channels first (`benchmarks/activations.py`).
    """
    skips = any(isinstance(module, Skip) for module in model.modules())
    spoiled = skips and device.type == "cpu" and not computes_in_bfloat16(recipe, device)
    return torch.contiguous_format if spoiled else torch.channels_last


def _objective(
    loss: Callable[[Tensor, Tensor], Tensor],
    teacher: nn.Module | None,
    logits: Tensor,
    labels: Tensor,
    images: Tensor,
    autocast: torch.autocast,
) -> Tensor:
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise RunError(
            f"the network returned {got}, not logits of shape (images, classes): wrap it in one that does"
        )
    if teacher is None:
        return loss(logits.float(), labels)
    with torch.no_grad(), autocast:
        taught = teacher(images)
    return distillation_loss(logits.float(), labels, teacher=taught.float(), label_loss=loss)


def _add_to_average(done: Trained) -> None:
    """Take the last weights into the mean of those before."""
    mean, done.averaged = done.weights.get("average", done.weights["last"]), done.averaged + 1
    done.weights["average"] = {
        name: mean[name] + (last - mean[name]) / done.averaged if last.is_floating_point() else last
        for name, last in done.weights["last"].items()
    }


def _use_average(
    done: Trained, model: nn.Module, data: Data, recipe: Recipe, autocast: torch.autocast
) -> None:
    """Make the averaged weights the ones that are reported."""
    model.load_state_dict(done.weights["average"])
    with autocast:
        refresh_statistics(model, data, size=recipe.batch_size)
        done.validation, done.best_epoch = _accuracy_of_all(model, data.validation, data), done.epochs
    done.weights["best"] = _copy(model)


def refresh_statistics(model: nn.Module, data: Data, *, size: int) -> None:
    """Take BatchNorm's statistics anew, as weights that were averaged have none of their own (Izmailov et al., 3.2).

    Args:
        model: changed in place; left in evaluation mode.
        data: whose training images the statistics are of, as they are.
        size: images per batch.
    """
    norms = [
        module for module in model.modules() if isinstance(module, _NormBase) and module.track_running_stats
    ]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
        norm.momentum = None  # the mean over all batches
    with torch.no_grad():
        parts = list(data.train.images.split(size))
        if len(parts) > 1 and len(parts[-1]) == 1:  # a single image has no statistics where it is one pixel
            parts[-2:] = [torch.cat(parts[-2:])]
        for images in parts:
            model(data.normalise(images).contiguous(memory_format=torch.channels_last))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def schedule(epoch: float, recipe: Recipe) -> float:
    """The learning rate at a point of the training, as a fraction of the highest.

    Args:
        epoch: how many epochs are done; fractions count.
        recipe: with its warm-up, its milestones and their decay.

    Returns:
        A factor in (0, 1]; constant while weights are averaged.

    Example:
        >>> [schedule(epoch, Recipe(epochs=180)) for epoch in (0, 90, 135)]
        [1.0, 0.1, 0.010000000000000002]
    """
    if epoch >= first_averaged(recipe):
        return recipe.average_rate
    passed = sum(epoch >= milestone * recipe.epochs for milestone in recipe.milestones)
    warmup = min(1.0, (epoch + 1e-3) / recipe.warmup_epochs) if recipe.warmup_epochs else 1.0
    return warmup * recipe.decay**passed


def first_averaged(recipe: Recipe) -> float:
    """How many epochs are done before the first whose weights are averaged; at least the last is, if any are to be.

    Example:
        >>> [first_averaged(Recipe(epochs=epochs, average_from=3 / 4)) for epochs in (1, 2, 10, 16)]
        [0, 1, 8, 12]
    """
    if recipe.average_from is None:
        return math.inf
    return min(math.ceil(recipe.average_from * recipe.epochs), recipe.epochs - 1)


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
    return float(_right(model, part, data, size)) / len(part)


def _accuracy_of_all(model: nn.Module, part: Images, data: Data) -> float:
    """The same, of which each process does its share."""
    right = _right(model, part[ranks.share(len(part))], data, 1000)
    return float(ranks.total(right)) / len(part)


def _right(model: nn.Module, part: Images, data: Data, size: int) -> Tensor:
    """How many images a model gets right."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        right = torch.zeros((), dtype=torch.long, device=part.labels.device)
        for images, labels in zip(part.images.split(size), part.labels.split(size), strict=True):
            logits = model(data.normalise(images).contiguous(memory_format=torch.channels_last))
            right += (logits.argmax(1) == labels).sum()
    model.train(was_training)
    return right


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


def precision_of(recipe: Recipe, device: torch.device) -> str:
    """What a recipe is computed in on a device, in the words of its `precision`: never "auto".

    Args:
        recipe: with its `precision`.
        device: to compute on.

    Returns:
        "bfloat16" or "float32".

    Example:
        >>> precision_of(Recipe(precision="float32"), torch.device("cpu"))
        'float32'
    """
    return "bfloat16" if computes_in_bfloat16(recipe, device) else "float32"


def load_trained(checkpoint: Path) -> Trained:
    """Read what a training has come to.

    Args:
        checkpoint: the file given to `train`.

    Returns:
        Accuracies, weights and times; `test` is None where the training was cut off.

    Raises:
        LotteryError: when the file is missing, broken, or something else.
    """
    done, _ = _read(checkpoint)
    return done


def _read(checkpoint: Path) -> tuple[Trained, State]:
    """What a training has come to, and its momentum."""
    header, groups = load(checkpoint, "training")
    momentum = groups.pop("momentum", {})
    return Trained(weights=groups, **header), momentum


def save_trained(checkpoint: Path, done: Trained) -> None:
    """Keep what a training has come to.

    Args:
        checkpoint: the file, for `load_trained`.
        done: all of it.
    """
    _save(checkpoint, done)


def _saver(
    checkpoint: Path | None, done: Trained, optimizer: torch.optim.Optimizer, model: nn.Module
) -> Callable[[], None]:
    """A function that saves unless that would take more than its share of the time since it last did."""
    saved, cost = time.perf_counter(), 0.0

    def save_if_due() -> None:
        nonlocal saved, cost
        now = time.perf_counter()
        if now - saved >= cost / SAVING:
            _save(checkpoint, done, optimizer, model)
            saved = time.perf_counter()
            cost = saved - now

    return save_if_due


def _save(
    checkpoint: Path | None,
    done: Trained,
    optimizer: torch.optim.Optimizer | None = None,
    model: nn.Module | None = None,
) -> None:
    if checkpoint is None:
        return
    header = {
        spec.name: getattr(done, spec.name)
        for spec in dataclasses.fields(done)
        if spec.name not in ("weights", "title", "total")
    }
    groups = dict(done.weights)
    if optimizer is not None and model is not None:
        groups["momentum"] = {
            name: optimizer.state[parameter]["momentum_buffer"]
            for name, parameter in model.named_parameters()
            if parameter in optimizer.state
        }
    save(checkpoint, "training", header, groups)


def _kept(checkpoint: Path | None, keep_epochs: Sequence[int]) -> tuple[Trained, State] | None:
    """What a training that was cut off, or is finished, has left, if that has the weights of all epochs to keep."""
    if checkpoint is None or not checkpoint.is_file():
        return None
    done, momentum = _read(checkpoint)
    return None if done.lacks(keep_epochs) else (done, momentum)


def _resumed(done: Trained, momentum: State, model: nn.Module, optimizer: torch.optim.Optimizer) -> Trained:
    """Put weights and momentum back as they were after the last epoch that was kept."""
    model.load_state_dict(done.weights["last"])
    for name, parameter in model.named_parameters():
        if name in momentum:
            optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(momentum[name])
    return done


def _copy(model: nn.Module) -> State:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
