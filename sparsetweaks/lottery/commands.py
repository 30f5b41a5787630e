"""The commands: `draw` tickets, `spend` them, `show` what came of it, or `demo` it all."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from tqdm import tqdm

from sparsetweaks.lottery import demo as demonstration
from sparsetweaks.lottery.config import VARIANTS, LotteryError, Network, Recipe, variant
from sparsetweaks.lottery.data import Data, load
from sparsetweaks.lottery.draw import FRACTION, LEVELS, draw, draw_one_shot, ticket_path
from sparsetweaks.lottery.results import append_row, plot, read_rows, summarise, table
from sparsetweaks.lottery.spend import row, spend
from sparsetweaks.lottery.store import Ticket, check_writable, load_ticket
from sparsetweaks.lottery.train import Trained

FRACTIONS = click.FloatRange(0, 1, min_open=True, max_open=True)
COUNT = click.IntRange(min=1)
SOME = {"default": None, "show_default": "all"}
_DEFAULT = Recipe()

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def options(*given: Decorator) -> Decorator:
    """Several click options as one decorator, in the order in which they are to be listed."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(given):
            command = option(command)
        return command

    return decorate


DATA_OPTIONS = options(
    click.option("--data", "source", default="digits", help="'digits', or a folder of images."),
    click.option(
        "--size", type=click.IntRange(min=2), help="Pixels to bring the images to.  [default: as they are]"
    ),
    click.option("--limit", type=click.IntRange(min=2), help="Training images per class.  [default: all]"),
    click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="Where to train."),
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
        "--compile/--no-compile", "compiled", default=_DEFAULT.compile, help="torch.compile the network."
    ),
)
OUT_OPTION = click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs"), help="Folder to keep all in."
)


@click.group(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sparsetweaks")
def commands() -> None:
    """Spend sparse networks better: draw lottery tickets, retrain them with and without tweaks, compare."""


@commands.command("draw")
@DATA_OPTIONS
@click.option("--depth", type=int, default=Network.depth, help="Layers of the ResNet, 6n + 2.")
@click.option("--width", type=COUNT, default=Network.width, help="Channels of its first stage.")
@click.option("--levels", type=COUNT, default=LEVELS, help="Rounds of iterative magnitude pruning.")
@click.option(
    "--fraction", type=FRACTIONS, default=FRACTION, help="Of the remaining weights to prune per level."
)
@click.option(
    "--sparsity", "sparsities", type=FRACTIONS, multiple=True, help="Prune to this in one shot instead."
)
@click.option("--rewind-epoch", type=click.IntRange(min=0), default=0, help="0 is the initialisation.")
@RECIPE_OPTIONS
@click.option("--seed", type=click.IntRange(min=0), default=0)
@OUT_OPTION
def draw_command(
    source: str, size: int | None, limit: int | None, device: str, depth: int, width: int, levels: int, fraction: float,
    sparsities: tuple[float, ...], rewind_epoch: int, seed: int, out: Path, **recipe: Any,
) -> None:  # fmt: skip
    """Draw tickets: train, prune the smallest weights, rewind the others, repeat."""
    check_writable(out)
    network, data = Network(depth, width), _data(source, size, limit, device, out)
    plan = _recipe(**recipe)
    trainings = 1 if sparsities else levels
    common: dict[str, Any] = {"seed": seed, "folder": out, "rewind_epoch": rewind_epoch}
    with Progress(trainings * plan.epochs, "epoch") as progress:
        common |= {"on_epoch": progress.epoch, "on_ticket": lambda ticket: progress.line(_describe(ticket))}
        if sparsities:
            tickets = draw_one_shot(data, network, plan, sparsities=sparsities, **common)
        else:
            tickets = draw(data, network, plan, levels=levels, fraction=fraction, **common)
    for ticket in tickets:
        click.echo(ticket_path(out, ticket))


@commands.command("spend")
@click.argument("tickets", nargs=-1, required=True, type=click.Path(path_type=Path))
@DATA_OPTIONS
@click.option(
    "--variant", "names", multiple=True, default=("vanilla", "AT", "TRT", "AT+TRT"),
    help=f"Which tweaks, of: {', '.join(VARIANTS)}.",
)  # fmt: skip
@RECIPE_OPTIONS
@click.option(
    "--seed", "seeds", type=click.IntRange(min=0), multiple=True, help="[default: that of each ticket]"
)
@OUT_OPTION
def spend_command(
    tickets: tuple[Path, ...], source: str, size: int | None, limit: int | None, device: str,
    names: tuple[str, ...], seeds: tuple[int, ...], out: Path, **recipe: Any,
) -> None:  # fmt: skip
    """Retrain TICKETS with tweaks and without; add a row of results per run, and print the table."""
    check_writable(out)
    chosen = {name: variant(name) for name in names}
    loaded = [load_ticket(path) for path in tickets]
    data, plan, rows = _data(source, size, limit, device, out), _recipe(**recipe), out / "results.csv"
    known = {(each["run"], each["variant"]) for each in read_rows(rows)}
    cells = [
        (t, name, seed)
        for t in loaded
        for name in (chosen if t.level else ["vanilla"])
        for seed in seeds or [t.seed]
    ]
    with Progress(len(cells) * plan.epochs, "epoch") as progress:
        for ticket, name, seed in cells:
            tweaks = chosen.get(name, VARIANTS[name])
            trained = spend(
                ticket, tweaks, data, plan, seed=seed, folder=out / "runs", on_epoch=progress.epoch
            )
            result = row(ticket, name, tweaks, data, plan, trained, seed=seed)
            if (result["run"], name) not in known:
                append_row(rows, result)
            progress.line(f"{_describe(ticket)}, {name}, seed {seed}: {100 * result['test']:.1f} % in test")
    _show(out)


@commands.command("show")
@OUT_OPTION
def show_command(out: Path) -> None:
    """Print the table of all results in a folder, and draw the picture."""
    if not (out / "results.csv").is_file():
        raise LotteryError(f"{out / 'results.csv'} does not exist: spend some tickets first")
    _show(out)


@commands.command("demo")
@click.option(
    "--processes", type=COUNT, default=min(2, os.cpu_count() or 1), help="Runs at a time, a thread each."
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("demo"), help="Folder to keep all in.")
@click.option("--epochs", type=COUNT, default=demonstration.RECIPE.epochs)
@click.option("--levels", type=COUNT, default=demonstration.LEVELS)
@click.option("--seeds", type=COUNT, default=len(demonstration.SEEDS), help="How many.")
def demo_command(processes: int, out: Path, epochs: int, levels: int, seeds: int) -> None:
    """Draw and spend tickets of scikit-learn's digits, in about two minutes, and draw the picture."""
    started = time.monotonic()
    with Progress(0, "run") as progress:
        demonstration.demo(
            out, seeds=range(seeds), levels=levels, recipe=replace(demonstration.RECIPE, epochs=epochs),
            processes=processes, on_run=progress.so_far,
        )  # fmt: skip
    _show(out)
    click.echo(f"{time.monotonic() - started:.0f} seconds")


class Progress:
    """A bar with the time left on a terminal, else a line per stage; both on stderr, as stdout is for results."""

    def __init__(self, total: int, unit: str) -> None:
        self.terminal = sys.stderr.isatty()
        self.bar = tqdm(total=total, unit=unit, disable=not self.terminal, leave=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def epoch(self, trained: Trained) -> None:
        self.bar.set_postfix_str(f"validation {100 * trained.validation:.1f} %", refresh=False)
        self.bar.update()

    def so_far(self, done: int, total: int) -> None:
        if not self.terminal:
            print(f"{done} of {total} runs", file=sys.stderr, flush=True)
        self.bar.total = total
        self.bar.update(done - self.bar.n)

    def line(self, text: str) -> None:
        self.bar.write(text, file=sys.stderr)


def _data(source: str, size: int | None, limit: int | None, device: str, out: Path) -> Data:
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise LotteryError(f"cannot train on the device {device!r}: {str(error).splitlines()[0]}") from error
    return load(source, size=size, limit=limit, cache=out / "cache").to(device)


def _recipe(compiled: bool, **given: Any) -> Recipe:
    return Recipe(compile=compiled, **given)


def _describe(ticket: Ticket) -> str:
    return (
        f"{ticket.network.name} on {ticket.data}, level {ticket.level}, {100 * ticket.sparsity:.1f} % sparse"
    )


def _show(out: Path) -> None:
    settings = summarise(read_rows(out / "results.csv"))
    for title, summary in settings.items():
        click.echo(f"\n{title}\n\n{table(summary)}\n")
    click.echo(f"rows: {out / 'results.csv'}")
    if any(sparsity for summary in settings.values() for sparsity in summary):
        plot(settings, out / "results.png")
        click.echo(f"picture: {out / 'results.png'}")
    else:
        click.echo("no picture yet: it needs results of sparse networks")
