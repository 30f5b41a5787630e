"""The options that commands share, and what is made of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from sparsetweaks.lottery.config import LotteryError, Recipe
from sparsetweaks.lottery.data import Data, load
from sparsetweaks.lottery.events import EventFiles
from sparsetweaks.lottery.grid import Engine, run_all
from sparsetweaks.lottery.layouts import SPLIT_SEED
from sparsetweaks.lottery.on_ray import on_ray
from sparsetweaks.lottery.ranks import count, leads

FRACTIONS = click.FloatRange(0, 1, min_open=True, max_open=True)
COUNT = click.IntRange(min=1)
_DEFAULT = Recipe()

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def options(*given: Decorator) -> Decorator:
    """Several click options as one decorator, in the order in which they are to be listed."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(given):
            command = option(command)
        return command

    return decorate


DEVICE_OPTION = click.option(
    "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="Where to train."
)
EVENTS_OPTION = click.option("--tensorboard", is_flag=True, help="Write event files below OUT/events.")
ENGINE_OPTIONS = options(
    click.option("--engine", type=click.Choice(["local", "ray"]), default="local", help="What runs the stages."),
    click.option("--processes", type=COUNT, default=1, help="Runs at a time."),
    click.option("--threads-per-run", type=COUNT, help="[default: 1; with one process, all]"),
    click.option(
        "--gpus-per-run", type=click.FloatRange(0, 1, min_open=True),
        help="With --engine ray: 0.25 has four runs share a GPU.  [default: 1 with --device cuda]",
    ),
    click.option("--ray-address", help="Of a running cluster.  [default: a Ray that runs here, or a new one]"),
)  # fmt: skip
DATA_OPTIONS = options(
    click.option(
        "--data", "source", default="digits", help="'digits', or a folder: CIFAR, Tiny-ImageNet, any images."
    ),
    click.option(
        "--size", type=click.IntRange(min=2), help="Pixels to bring the images to.  [default: as they are]"
    ),
    click.option("--limit", type=click.IntRange(min=2), help="Training images per class.  [default: all]"),
    click.option(
        "--split-seed", type=click.IntRange(min=0), default=SPLIT_SEED, help="Of the random 9:1 splits."
    ),
    DEVICE_OPTION,
)
RECIPE_OPTIONS = options(
    click.option("--epochs", type=COUNT, default=_DEFAULT.epochs),
    click.option("--batch-size", type=click.IntRange(min=2), default=_DEFAULT.batch_size),
    click.option(
        "--learning-rate", type=click.FloatRange(min=0, min_open=True), default=_DEFAULT.learning_rate
    ),
    click.option("--warmup-epochs", type=click.FloatRange(min=0), default=_DEFAULT.warmup_epochs),
    click.option(
        "--precision", type=click.Choice(["auto", "float32", "bfloat16"]), default=_DEFAULT.precision
    ),
    click.option(
        "--compile/--no-compile",
        "compiled",
        default=bool(_DEFAULT.compile),
        help="torch.compile the network.",
    ),
    EVENTS_OPTION,
)
OUT_OPTION = click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs"), help="Folder to keep all in."
)


def split(given: dict[str, Any]) -> tuple[dict[str, Any], bool, Recipe]:
    """The options of a command apart: of the data, whether to write event files, and of the recipe."""
    data = {name: given.pop(name) for name in ("source", "size", "limit", "split_seed", "device")}
    events, compiled = given.pop("tensorboard"), given.pop("compiled")
    return data, events, Recipe(compile=compiled, **given)


def events_of(out: Path, wanted: bool) -> EventFiles | None:
    """TensorBoard's files below a folder, where they are asked for."""
    return EventFiles(out / "events") if wanted and leads() else None


@contextlib.contextmanager
def engine_of(
    device: str,
    *,
    engine: str,
    processes: int,
    threads_per_run: int | None,
    gpus_per_run: float | None,
    ray_address: str | None,
) -> Iterator[Engine]:
    """What runs the stages of a grid, for as long as the context lasts; options that it has no use for are errors."""
    if count() > 1 and (engine, processes) != ("local", 1):
        raise LotteryError(
            "torchrun has several processes share each run: leave out --engine and --processes"
        )
    if engine == "local":
        if gpus_per_run is not None or ray_address is not None:
            raise LotteryError("--gpus-per-run and --ray-address are for --engine ray")
        check_device(device)
        yield partial(run_all, processes=processes, threads=threads_per_run)
        return
    if processes != 1:
        raise LotteryError("--processes is for --engine local: Ray runs as many as its machines hold")
    if device not in ("cpu", "cuda"):
        raise LotteryError(f"with --engine ray, --device is cpu or cuda, and Ray says which: not {device!r}")
    if device == "cpu" and gpus_per_run is not None:
        raise LotteryError("--gpus-per-run is for --device cuda")
    gpus = 0.0 if device == "cpu" else gpus_per_run or 1.0
    with on_ray(address=ray_address, gpus=gpus, threads=threads_per_run or 1) as run:
        yield run


def load_data(
    out: Path, source: str, size: int | None, limit: int | None, split_seed: int, device: str
) -> Data:
    check_device(device)
    data = load(source, size=size, limit=limit, split_seed=split_seed, cache=out / "cache")
    return data.to(device)


def check_device(device: str) -> None:
    """Raise a LotteryError unless tensors can live there."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise LotteryError(
            f"cannot train on the device {device!r}: {str(error).splitlines()[0]}; --device cpu works everywhere"
        ) from error
