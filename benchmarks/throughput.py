"""What the training loop costs over the bare step of the same network, and what its parts cost over those of others.

    python benchmarks/throughput.py --what loop
    python benchmarks/throughput.py --resume       # only what has no row yet of this machine and so many threads

- `loop`: an epoch of `train` (images drawn, cropped, flipped and normalised, masks kept, learning rate set, the loss
  summed; the evaluation after it left out) over the same number of bare steps: forward, loss, backward, SGD on one batch
  that lies ready, without masks. Both in bfloat16 and channels_last.
- `pipeline`: drawing, cropping, flipping and normalising an epoch's images here, over torchvision's RandomCrop,
  RandomHorizontalFlip, ToTensor and Normalize in a DataLoader without workers; and over the time of ResNet-20's steps.
- `resume`: writing a checkpoint and reading it back, over an epoch of 45,000 images (of so many steps as were timed).
- `precision`: a step in bfloat16 and channels_last over one in float32 and contiguous.

Images are random bytes. Times are CPU seconds of one thread, or of all together, so that what else a machine does counts
little. Each repeat measures both sides of a ratio one after the other, in an order that turns; printed and written to
benchmarks/results/throughput.csv are median, least and most of the ratios within the repeats. Rows of other kinds that
are in the file already stay.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import paired
import torch
from torch import nn

from sparsetweaks.lottery import train as loop
from sparsetweaks.lottery.config import Network, Recipe
from sparsetweaks.lottery.data import Data, Images, batches
from sparsetweaks.lottery.models import build
from sparsetweaks.pruning import prune

COLUMNS = (
    "what", "model", "over", "median", "least", "most", "n",
    "seconds", "seconds_over", "threads", "torch", "hardware",
)  # fmt: skip
SAME = ("what", "model", "over", "threads", "hardware")  # what a row stands for
NETWORKS = {"resnet20": 16, "resnet18": 64}  # and their widths
STEPS = {"resnet20": 4, "resnet18": 2}  # per repeat: some seconds each
EPOCHS = {"resnet20": 5, "resnet18": 1}  # of the loop, per repeat
SPARSITY = 0.9
CIFAR_EPOCH = 45_000  # images: what the 9:1 split leaves to train on
RECIPE = Recipe(epochs=1, precision="bfloat16")
Timed = tuple[list[float], list[float]]
clock = time.process_time


def random_data(count: int, *, size: int = 32) -> Data:
    """So many random training images, in the form that `load` gives."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    labels = torch.randint(10, (count,), generator=generator)
    train, few = Images(images, labels), Images(images[:2], labels[:2])
    mean, std = torch.full((3, 1, 1), 127.5), torch.full((3, 1, 1), 73.9)
    return Data("random", train, few, few, tuple("0123456789"), mean, std, True, "random")


def network(name: str, *, masked: bool) -> nn.Module:
    model = build(Network(name, width=NETWORKS[name]), channels=3, classes=10, seed=0)
    return prune(model, SPARSITY) if masked else model


class Bare:
    """Steps on one batch that lies ready: as little as training can be."""

    def __init__(self, name: str, data: Data, recipe: Recipe, *, channels_last: bool = True) -> None:
        form = torch.channels_last if channels_last else torch.contiguous_format
        self.model = network(name, masked=False).to(memory_format=form).train()
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), recipe.learning_rate, recipe.momentum, weight_decay=recipe.weight_decay
        )
        batch = data.train[: recipe.batch_size]
        self.images = data.normalise(batch.images).contiguous(memory_format=form)
        self.labels, self.loss = batch.labels, nn.CrossEntropyLoss()
        self.bfloat16 = loop.computes_in_bfloat16(recipe, data.mean.device)

    def __call__(self, steps: int) -> float:
        """Seconds of so many steps."""
        started = clock()
        for _ in range(steps):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
                logits = self.model(self.images)
            self.optimizer.zero_grad()
            self.loss(logits.float(), self.labels).backward()
            self.optimizer.step()
        return clock() - started


def timed(ours: Callable[[], float], theirs: Callable[[], float], repeats: int) -> Timed:
    """Seconds of each side in each repeat; the first is to warm up."""
    times: Timed = ([], [])
    for repeat in range(repeats + 1):
        for side in (0, 1) if repeat % 2 else (1, 0):
            taken = (ours, theirs)[side]()
            if repeat:
                times[side].append(taken)
    return times


def row(what: str, model: str, over: str, times: Timed) -> dict[str, Any]:
    ratios = [ours / theirs for ours, theirs in zip(*times, strict=True)]
    middle, least, most = (f"{each:.4f}" for each in (statistics.median(ratios), min(ratios), max(ratios)))
    ours, theirs = (f"{statistics.median(side):.4f}" for side in times)
    return {
        "what": what, "model": model, "over": over, "median": middle, "least": least, "most": most,
        "n": len(ratios), "seconds": ours, "seconds_over": theirs, **machine(),
    }  # fmt: skip


def machine() -> dict[str, Any]:
    return {
        "threads": torch.get_num_threads(), "torch": torch.__version__, "hardware": paired.processor(),
    }  # fmt: skip


def measure_loop(what: str, name: str, repeats: int) -> Iterator[dict[str, Any]]:
    """One training, and between its epochs as many bare steps."""
    steps = STEPS[name]
    data = random_data(steps * RECIPE.batch_size)
    model, bare, seen = network(name, masked=True), Bare(name, data, RECIPE), []

    def after_epoch(done: loop.Trained) -> None:
        seen.append((done.seconds, bare(steps)))

    loop.train(model, data, replace(RECIPE, epochs=EPOCHS[name] * repeats + 2), seed=0, on_epoch=after_epoch)
    pairs = [
        (after - before, own) for (before, _), (after, own) in itertools.pairwise(seen[1:])
    ]  # one to warm up
    yield row(what, name, "bare steps", ([ours for ours, _ in pairs], [own for _, own in pairs]))


def measure_pipeline(what: str, name: str, repeats: int) -> Iterator[dict[str, Any]]:
    steps = STEPS[name]
    data = random_data(steps * RECIPE.batch_size)
    loader, bare = torchvision_loader(data), Bare(name, data, RECIPE)

    def ours() -> float:
        started, generator = clock(), torch.Generator().manual_seed(0)
        for images, _ in batches(data.train, data, size=RECIPE.batch_size, padding=4, generator=generator):
            images.contiguous(memory_format=torch.channels_last)
        return clock() - started

    def theirs() -> float:
        started = clock()
        for images, _ in loader:
            images.contiguous(memory_format=torch.channels_last)
        return clock() - started

    yield row(what, "", "torchvision in a DataLoader", timed(ours, theirs, repeats))
    yield row(what, name, "bare steps", timed(ours, lambda: bare(steps), repeats))


def torchvision_loader(data: Data) -> Any:
    """The usual way: images one by one, through PIL, stacked to batches."""
    from PIL import Image
    from torchvision import transforms

    pixels = data.train.images.permute(0, 2, 3, 1).numpy()
    transform = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.5,) * 3, (0.29,) * 3),
        ]
    )

    class Cifar(torch.utils.data.Dataset):
        """As torchvision's CIFAR10 gives its images."""

        def __len__(self) -> int:
            return len(pixels)

        def __getitem__(self, index: int) -> tuple[Any, int]:
            return transform(Image.fromarray(pixels[index])), int(data.train.labels[index])

    return torch.utils.data.DataLoader(Cifar(), RECIPE.batch_size, shuffle=True, drop_last=True)


def measure_resume(what: str, name: str, repeats: int) -> Iterator[dict[str, Any]]:
    """A checkpoint holds weights, momentum, and the best and the rewinding weights: all that a run keeps."""
    steps = STEPS[name]
    data = random_data(steps * RECIPE.batch_size)
    model, bare = network(name, masked=True), Bare(name, data, RECIPE)
    recipe = replace(RECIPE, epochs=2)
    with tempfile.TemporaryDirectory() as folder:
        done = loop.train(model, data, recipe, seed=0, rewind_epoch=1)
        momentum = {key: torch.randn_like(parameter) for key, parameter in model.named_parameters()}
        done.weights["momentum"] = momentum
        file = Path(folder) / "checkpoint"

        def write_and_read() -> float:
            started = clock()
            loop.save_trained(file, done)
            loop.load_trained(file)
            return clock() - started

        epoch = lambda: bare(steps) * CIFAR_EPOCH / (steps * RECIPE.batch_size)
        yield row(what, name, "epoch of 45,000 images", timed(write_and_read, epoch, repeats))


def measure_precision(what: str, name: str, repeats: int) -> Iterator[dict[str, Any]]:
    data, steps = random_data(RECIPE.batch_size), max(1, STEPS[name] // 2)
    ours = Bare(name, data, RECIPE)
    theirs = Bare(name, data, replace(RECIPE, precision="float32"), channels_last=False)
    yield row(
        what, name, "float32, contiguous",
        timed(lambda: ours(steps), lambda: theirs(steps), repeats),
    )  # fmt: skip


MEASURES: dict[str, tuple[str, str, Callable[[str, str, int], Iterator[dict[str, Any]]]]] = {
    "loop": ("training epoch", "resnet20", measure_loop),
    "loop-wide": ("training epoch", "resnet18", measure_loop),
    "pipeline": ("input pipeline", "resnet20", measure_pipeline),
    "resume": ("checkpoint written and read", "resnet20", measure_resume),
    "resume-wide": ("checkpoint written and read", "resnet18", measure_resume),
    "precision": ("step in bfloat16, channels_last", "resnet20", measure_precision),
    "precision-wide": ("step in bfloat16, channels_last", "resnet18", measure_precision),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--what", nargs="+", choices=list(MEASURES), default=list(MEASURES))
    parser.add_argument(
        "--repeats",
        type=int,
        default=9,
        help=f"of each pair, {EPOCHS['resnet20']} times as many of ResNet-20's loop (default: 9)",
    )
    parser.add_argument("--threads", type=int, default=1, help="(default: 1)")
    parser.add_argument("--resume", action="store_true", help="leave out what the table has of this machine")
    parser.add_argument("--out", type=Path, default=paired.RESULTS / "throughput.csv")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    vars(loop)["time"] = types.SimpleNamespace(
        perf_counter=clock
    )  # `train` tells its seconds by the same clock
    for what, model, measure in (MEASURES[each] for each in given.what):
        wanted = {"what": what, "model": model, **machine()}
        one = [name for name in SAME if name != "over"]  # a measure's rows are kept together
        if given.resume and any(paired.agree(line, wanted, one) for line in paired.read(given.out)):
            continue
        rows = list(measure(what, model, given.repeats))
        paired.keep(given.out, COLUMNS, SAME, rows)
        for each in rows:
            print("{what} {model} / {over}: {median} ({least} to {most})".format(**each), flush=True)


if __name__ == "__main__":
    main()
