"""A whole small lottery: ours against open_lth's, at equal work.

    python benchmarks/lottery.py --open-lth PATH     # PATH is a checkout of github.com/facebookresearch/open_lth

Both draw tickets of CIFAR's ResNet-20 by iterative magnitude pruning from the initialisation: equal data (random images
of 32x32), augmentation, batches, iterations, levels and pruned fractions, and equal evaluations of as many test images.
Ours runs as it comes, in bfloat16 where the processor multiplies that natively, and in float32, which is open_lth's only
precision on a CPU. Before anything is timed each draws tickets of one batch of images: what it imports, and the compiler
that PyTorch loads when a process makes its first optimizer, are in no time of either.

The parts of a run of ours that compute nothing are measured by themselves: writing files, building networks, drawing and
augmenting images, pruning, and copying weights. The keeping of masks in every step is not among them: it happens within
the steps, and `keep_masks.py` measures it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import tempfile
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import open_lth
import paired
import torch
from paired import Row

from sparsetweaks.lottery import draw as drawing
from sparsetweaks.lottery import spend, store, train
from sparsetweaks.lottery.config import Network, Recipe
from sparsetweaks.lottery.data import Data, Images

BATCH = 128
TRAIN, TEST = 16 * BATCH, 512  # images
EPOCHS, TRAININGS = 2, 3  # of each level; the first is dense
FRACTION = 0.2  # pruned per level
WEIGHT_DECAY, LEARNING_RATE = 1e-4, 0.1
OF_THE_TIME, NOT_COMPUTE = 0.55, 0.02
Lottery = Callable[[Data], None]


def random_data(train: int = TRAIN, test: int = TEST) -> Data:
    generator = torch.Generator().manual_seed(0)

    def part(count: int) -> Images:
        images = torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
        return Images(images, torch.randint(10, (count,), generator=generator))

    mean, std = torch.full((3, 1, 1), 127.5), torch.full((3, 1, 1), 73.9)
    tested = part(test)  # ours validates after each epoch, and open_lth tests
    return Data("random", part(train), tested, tested, tuple("0123456789"), mean, std, True, "random")


def ours(data: Data, precision: str) -> None:
    recipe = Recipe(
        epochs=EPOCHS,
        batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        milestones=(1 / EPOCHS,),
        precision=precision,
    )
    with tempfile.TemporaryDirectory() as folder:
        drawing.draw(
            data,
            Network("resnet20"),
            recipe,
            seed=0,
            folder=Path(folder),
            levels=TRAININGS,
            fraction=FRACTION,
        )


def theirs(data: Data, checkout: Path) -> None:
    hparams, registry, cifar, desc, runner, pruning, local = open_lth.modules(
        checkout,
        "foundations.hparams",
        "datasets.registry",
        "datasets.cifar10",
        "lottery.desc",
        "lottery.runner",
        "pruning.sparse_global",
        "platforms.local",
    )
    registry.registered_datasets["cifar10"] = types.SimpleNamespace(
        Dataset=dataset(cifar, data), DataLoader=cifar.DataLoader
    )
    described = desc.LotteryDesc(
        model_hparams=hparams.ModelHparams("cifar_resnet_20_16", "kaiming_normal", "uniform"),
        dataset_hparams=hparams.DatasetHparams(dataset_name="cifar10", batch_size=BATCH),
        training_hparams=hparams.TrainingHparams(
            optimizer_name="sgd",
            momentum=0.9,
            lr=LEARNING_RATE,
            milestone_steps="1ep",
            gamma=0.1,
            training_steps=f"{EPOCHS}ep",
            weight_decay=WEIGHT_DECAY,
        ),
        pruning_hparams=pruning.PruningHparams(pruning_strategy="sparse_global", pruning_fraction=FRACTION),
    )
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(local.Platform, "root", folder):
        lottery = runner.LotteryRunner(1, TRAININGS - 1, described, verbose=False)
        with contextlib.redirect_stdout(io.StringIO()):
            lottery.run()


def dataset(cifar: Any, data: Data) -> type:
    """Its CIFAR-10 with our images, which it would download."""

    def of(part: Images, transforms: list[Any]) -> Any:
        return cifar.Dataset(part.images.permute(0, 2, 3, 1).numpy(), part.labels.numpy(), transforms)

    class Random(cifar.Dataset):
        num_train_examples = staticmethod(lambda: len(data.train))
        num_test_examples = staticmethod(lambda: len(data.test))

        @staticmethod
        def get_train_set(use_augmentation: bool) -> Any:
            vision = cifar.torchvision.transforms
            augment = [vision.RandomHorizontalFlip(), vision.RandomCrop(32, 4)]  # as its own
            return of(data.train, augment if use_augmentation else [])

        get_test_set = staticmethod(lambda: of(data.test, []))

    return Random


def warm_up(lotteries: Iterable[Lottery]) -> None:
    """A lottery of one batch each, after which nothing is imported any more."""
    data = random_data(BATCH, BATCH)
    for lottery in lotteries:
        lottery(data)


def against_open_lth(options: argparse.Namespace) -> Iterator[Row]:
    what, data = "a whole lottery, ResNet-20", random_data()
    precisions = dict.fromkeys((train.precision_of(Recipe(), data.mean.device), "float32"))
    measures = {precision: f"time, ours in {precision} / open_lth in float32" for precision in precisions}
    if not options.open_lth:
        for measure in measures.values():
            yield paired.not_given(what, measure, target=OF_THE_TIME)
        return
    lotteries: dict[str, Lottery] = {
        precision: functools.partial(ours, precision=precision) for precision in precisions
    }
    lotteries["open_lth"] = functools.partial(theirs, checkout=options.open_lth)
    warm_up(lotteries.values())
    runs = {name: functools.partial(lottery, data) for name, lottery in lotteries.items()}
    times = paired.interleaved(runs, options.repeats, warm_up=0)
    steps = TRAININGS * EPOCHS * (TRAIN // BATCH)
    note = f"{TRAININGS} trainings, {steps} iterations of {BATCH}, {TRAININGS * (EPOCHS + 1)} evaluations of {TEST} images"
    for precision, measure in measures.items():
        found = paired.ratios(times, precision, "open_lth")
        yield paired.spread(what, measure, found, target=OF_THE_TIME, note=note)


def not_compute(options: argparse.Namespace) -> Iterator[Row]:
    """The share of a run of ours that its parts take which compute nothing, but for the keeping of masks in its steps."""
    warm_up([functools.partial(ours, precision="auto")])
    data, shares = random_data(), []
    for _ in range(options.repeats):
        spent: dict[str, float] = {}
        with contextlib.ExitStack() as patches:
            for module, name, part in (
                (train, "_save", "files"),
                (store, "save", "files"),
                (train, "_copy", "copies of weights"),
                (drawing, "narrowed", "pruning"),
                (spend, "tweaked", "building"),
            ):
                clocked = functools.partial(timed, getattr(module, name), spent, part)
                patches.enter_context(mock.patch.object(module, name, clocked))
            fetched = functools.partial(timed_iterator, train.batches, spent)
            patches.enter_context(mock.patch.object(train, "batches", fetched))
            whole = paired.seconds(lambda: ours(data, "auto"))
        shares.append(sum(spent.values()) / whole)
    note = ", ".join(
        f"{part} {each / whole:.2%}" for part, each in sorted(spent.items(), key=lambda x: -x[1])
    )
    yield paired.spread(
        "a whole lottery, ResNet-20",
        "share of all but compute and masks",
        shares,
        target=NOT_COMPUTE,
        note=note,
    )


def timed(
    function: Callable[..., Any], spent: dict[str, float], part: str, *given: Any, **options: Any
) -> Any:
    started = paired.clock()
    try:
        return function(*given, **options)
    finally:
        spent[part] = spent.get(part, 0.0) + paired.clock() - started


def timed_iterator(
    function: Callable[..., Iterator[Any]], spent: dict[str, float], *given: Any, **options: Any
):
    iterator = function(*given, **options)
    end = object()
    while (item := timed(next, spent, "data", iterator, end)) is not end:
        yield item


CASES = {"against open_lth": against_open_lth, "all but compute and masks": not_compute}

if __name__ == "__main__":
    peers = {"open-lth": "github.com/facebookresearch/open_lth"}
    paired.main(__doc__, "lottery", CASES, repeats=3, peers=peers)
