"""The commands: `draw` tickets, `spend` them, `show` or `report` what came of it, `reproduce` a figure; or `demo` it all."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from click.core import ParameterSource

from sparsetweaks.lottery import demo as demonstration
from sparsetweaks.lottery.config import PARTS, LotteryError, Network, Recipe, variant
from sparsetweaks.lottery.draw import (
    FRACTION,
    LEVELS,
    SCOPES,
    UNTRAINED,
    draw,
    draw_by_masks,
    draw_one_shot,
    draw_untrained,
    ticket_path,
)
from sparsetweaks.lottery.experiment import Source, pools_row, spend_row
from sparsetweaks.lottery.files import alone
from sparsetweaks.lottery.grid import GridError, run_all, run_each
from sparsetweaks.lottery.options import (
    COUNT,
    DATA_OPTIONS,
    DEVICE_OPTION,
    ENGINE_OPTIONS,
    EVENTS_OPTION,
    FRACTIONS,
    OUT_OPTION,
    RECIPE_OPTIONS,
    engine_of,
    events_of,
    load_data,
    split,
)
from sparsetweaks.lottery.plots import plot
from sparsetweaks.lottery.pools import NAME as POOLS
from sparsetweaks.lottery.progress import Progress
from sparsetweaks.lottery.ranks import joined, leads
from sparsetweaks.lottery.report import report
from sparsetweaks.lottery.reproduce import PRESETS, experiments, overview, reproduce
from sparsetweaks.lottery.rows import append_row, kept_runs, read_rows
from sparsetweaks.lottery.spend import seeds_of
from sparsetweaks.lottery.store import Ticket, load_ticket
from sparsetweaks.lottery.summaries import summarise
from sparsetweaks.lottery.tables import table

_TRAINING = {  # those of its trainings
    "epochs": "--epochs",
    "batch_size": "--batch-size",
    "learning_rate": "--learning-rate",
    "warmup_epochs": "--warmup-epochs",
    "precision": "--precision",
    "compiled": "--compile",
    "rewind_epoch": "--rewind-epoch",
}
_DRAWING = {  # options of `draw` by parameter, of which some exclude others
    "method": "--method",
    "levels": "--levels",
    "fraction": "--fraction",
    "sparsities": "--sparsity",
    "scope": "--scope",
    "masks": "--masks",
    "masks_name": "--masks-name",
    **_TRAINING,
}


@click.group(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sparsetweaks")
def commands() -> None:
    """Spend sparse networks better: draw lottery tickets, retrain them with and without tweaks, compare."""


@commands.command("draw")
@DATA_OPTIONS
@click.option("--model", "name", default=Network.name, help="Ours, torchvision:NAME, or MODULE:FUNCTION.")
@click.option("--width", type=COUNT, help="Channels of its first stage.  [default: as published]")
@click.option(
    "--method",
    type=click.Choice(["magnitude", *UNTRAINED]),
    default="magnitude",
    help="What chooses the weights.",
)
@click.option("--levels", type=COUNT, default=LEVELS, help="Rounds of iterative magnitude pruning.")
@click.option(
    "--fraction", type=FRACTIONS, default=FRACTION, help="Of the remaining weights to prune per level."
)
@click.option(
    "--sparsity", "sparsities", type=FRACTIONS, multiple=True, help="Prune to this in one shot instead."
)
@click.option(
    "--scope", type=click.Choice(SCOPES), default="global", help="How many weights each layer keeps."
)
@click.option(
    "--masks", type=click.Path(path_type=Path), help="A file of masks from elsewhere to take instead."
)
@click.option(
    "--masks-name",
    help="What drew them, the same for the masks of several seeds, which keep equally many.  [default: the file]",
)
@click.option("--rewind-epoch", type=click.IntRange(min=0), default=0, help="0 is the initialisation.")
@RECIPE_OPTIONS
@click.option("--seed", type=click.IntRange(min=0), default=0)
@OUT_OPTION
@click.pass_context
def draw_command(
    context: click.Context, name: str, width: int | None, method: str, levels: int, fraction: float,
    sparsities: tuple[float, ...], scope: str, masks: Path | None, masks_name: str | None, rewind_epoch: int, seed: int,
    out: Path, **given: Any,
) -> None:  # fmt: skip
    """Draw tickets: train, prune the smallest weights, rewind the others, repeat; or without training."""
    _check_drawing(context, method)
    network, (data, events, plan) = Network(name, width), split(given)
    if method != "magnitude" and not sparsities:
        raise LotteryError(f"--method {method} prunes once, before any training: say to which --sparsity")
    with joined(), alone(out):
        images = load_data(out, **data)
        trainings = 0 if masks or method != "magnitude" else 1 if sparsities else levels
        with Progress(trainings * plan.epochs, "epoch", events=events_of(out, events)) as progress:

            def kept(ticket: Ticket) -> None:
                progress.reach(ticket.level * plan.epochs)
                progress.line(_describe(ticket))

            common: dict[str, Any] = {"seed": seed, "folder": out, "on_ticket": kept}
            trained: dict[str, Any] = {
                "scope": scope,
                "rewind_epoch": rewind_epoch,
                "on_epoch": progress.epoch,
            }
            if masks is not None:
                tickets = draw_by_masks(images, network, masks, name=masks_name, **common)
            elif method != "magnitude":
                tickets = draw_untrained(
                    images, network, method=method, scope=scope, sparsities=sparsities, **common
                )
            elif sparsities:
                tickets = draw_one_shot(images, network, plan, sparsities=sparsities, **common, **trained)
            else:
                tickets = draw(images, network, plan, levels=levels, fraction=fraction, **common, **trained)
        _log(
            out,
            "draw",
            {"model": name, "width": network.width, "seed": seed, **data},
            plan if trainings else None,
        )
        for ticket in tickets:
            click.echo(ticket_path(out, ticket))


def _check_drawing(context: click.Context, method: str) -> None:
    """Raise a LotteryError for options of `draw` that another one leaves without effect."""
    given = {each for each in _DRAWING if context.get_parameter_source(each) is ParameterSource.COMMANDLINE}
    if "masks" in given:
        says, useless = "--masks brings the masks", given - {"masks", "masks_name"}
    elif "masks_name" in given:
        says, useless = "--masks-name is for --masks", {"masks_name"}
    elif method != "magnitude":
        says = f"--method {method} prunes once and trains nothing"
        useless = given & {"levels", "fraction", *_TRAINING}
    else:
        says = "--sparsity prunes in one shot"
        useless = given & {"levels", "fraction"} if "sparsities" in given else set()
    if useless:
        raise LotteryError(f"{says}: leave out {', '.join(sorted(_DRAWING[each] for each in useless))}")


@commands.command("spend")
@click.argument("tickets", nargs=-1, required=True, type=click.Path(path_type=Path))
@DATA_OPTIONS
@click.option("--model", help="The MODULE:FUNCTION to allow, where tickets are of a network of yours.")
@click.option(
    "--variant", "names", multiple=True, default=("vanilla", "AT", "TRT", "AT+TRT"),
    help=f"Which tweaks, joined by +, of: {', '.join(PARTS)}; or {POOLS}, which interpolates the tickets.",
)  # fmt: skip
@RECIPE_OPTIONS
@ENGINE_OPTIONS
@click.option(
    "--seed", "seeds", type=click.IntRange(min=0), multiple=True, help="[default: that of each ticket]"
)
@OUT_OPTION
def spend_command(
    tickets: tuple[Path, ...], model: str | None, names: tuple[str, ...], seeds: tuple[int, ...], out: Path,
    engine: str, processes: int, threads_per_run: int | None, gpus_per_run: float | None, ray_address: str | None,
    **given: Any,
) -> None:  # fmt: skip
    """Retrain TICKETS with tweaks and without; add a row of results per run, and print the table."""
    (data, events, plan), chosen = split(given), dict.fromkeys(names)
    tweaks = {name: variant(name) for name in (*chosen, "vanilla") if name != POOLS}
    how: dict[str, Any] = {
        "engine": engine, "processes": processes, "threads_per_run": threads_per_run, "gpus_per_run": gpus_per_run,
        "ray_address": ray_address,
    }  # fmt: skip
    with joined(), engine_of(data["device"], **how) as run, alone(out):
        loaded = [load_ticket(path, model=model) for path in tickets]
        known = kept_runs(out / "results.csv")
        cells = [
            (ticket, name, seed)
            for ticket in loaded
            for name in (chosen if ticket.level else ["vanilla"])
            for seed in seeds or [ticket.seed]
        ]
        untweaked = [name for name in chosen if name != "vanilla"]
        with Progress(len(cells) * plan.epochs, "epoch", events=events_of(out, events)) as progress:
            if untweaked and not all(ticket.level for ticket in loaded):
                progress.line(
                    f"the dense network is trained as vanilla alone, without {', '.join(untweaked)}"
                )
            common: dict[str, Any] = {
                "source": Source(data["source"], data["size"], data["limit"], data["split_seed"]),
                "recipe": plan, "folder": out.resolve(), "device": data["device"],
            }  # fmt: skip
            here = engine == "local" and processes == 1
            watch = progress.epoch if here else progress.events

            def task(ticket: Ticket, name: str, seed: int) -> Callable[[], dict[str, Any]]:
                if name == POOLS:
                    return partial(pools_row, ticket, loaded, seed=seed, **common)
                return partial(spend_row, ticket, name, tweaks[name], seed=seed, on_epoch=watch, **common)

            done, failed = 0, list[str]()
            for first in (True, False):  # what is plain first, as pools are made of it
                tasks = [task(*cell) for cell in cells if (cell[1] == "vanilla") is first]
                for result in run_each(run, tasks, failed):
                    if leads() and result and (result["run"], result["variant"]) not in known:
                        append_row(out / "results.csv", result)
                    done += 1
                    progress.reach(done * plan.epochs)
                    told = _describe_row(result) if result else f"failed: {failed[-1]}"
                    progress.line(f"{told}; {progress.left()}")
        _log(out, "spend", {"variants": list(names), **data}, plan)
        if failed:
            raise GridError(*failed)
        _show(out)


@commands.command("show")
@OUT_OPTION
def show_command(out: Path) -> None:
    """Print the table of all results in a folder, and draw the picture."""
    if not (out / "results.csv").is_file():
        raise LotteryError(f"{out / 'results.csv'} does not exist: spend some tickets first")
    _show(out)


@commands.command("report")
@click.argument("folder", type=click.Path(path_type=Path))
def report_command(folder: Path) -> None:
    """Write FOLDER/report.html: all results there on one page that needs no other file."""
    click.echo(report(folder))


@commands.command("reproduce")
@click.argument("figure", required=False, metavar="[FIGURE]")
@click.option("--list", "listed", is_flag=True, help="What there is, what each costs, and what is done.")
@click.option("--preset", default="digits", help=f"How large: {', '.join(PRESETS)}.")
@click.option("--data", multiple=True, help="Folders of images, for presets that bring none.")
@DEVICE_OPTION
@ENGINE_OPTIONS
@EVENTS_OPTION
@OUT_OPTION
def reproduce_command(
    figure: str | None, listed: bool, preset: str, data: tuple[str, ...], device: str, tensorboard: bool, out: Path,
    **given: Any,
) -> None:  # fmt: skip
    """Reproduce a FIGURE of the paper: picture, numbers, and a line of comparison. What figures share runs once."""
    if listed or figure is None:
        click.echo(overview(out))
        return
    experiments(figure, preset, data)
    events, here = events_of(out, tensorboard), given["engine"] == "local" and given["processes"] == 1
    with engine_of(device, **given) as engine, alone(out), Progress(0, "stage", events=events) as progress:
        watch: dict[str, Any] = {"on_run": progress.so_far, "on_epoch": progress.within if here else events}
        told = reproduce(figure, preset, out, data=data, device=device, engine=engine, **watch)
        _log(out, "reproduce", {"figure": figure, "preset": preset, "data": data}, PRESETS[preset].recipe)
    click.echo(f"{told}\n\npicture: {out / 'figures' / f'{figure}-{preset}.png'}")


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
    with alone(out), Progress(0, "run") as progress:
        demonstration.demo(
            out, seeds=range(seeds), levels=levels, recipe=replace(demonstration.RECIPE, epochs=epochs),
            engine=partial(run_all, processes=processes), on_run=progress.so_far,
        )  # fmt: skip
    _show(out)
    click.echo(f"{time.monotonic() - started:.0f} seconds")


def _log(out: Path, command: str, options: dict[str, Any], recipe: Recipe | None) -> None:
    """Add what was asked for to a file beside the results, for `report`."""
    if not leads():
        return
    context = click.get_current_context(silent=True)
    given = {} if context is None else {k: v for k, v in context.params.items() if v not in (None, (), False)}
    told = {
        "command": command,
        **given,
        **options,
        "recipe": asdict(recipe) if recipe else None,
        "torch": torch.__version__,
    }
    line = json.dumps({"time": time.strftime("%Y-%m-%d %H:%M:%S"), **told}, default=str)
    path = out / "commands.jsonl"
    try:
        cut = path.is_file() and not path.read_bytes().endswith(b"\n")  # a line before this one was cut off
        with path.open("a", encoding="utf-8") as file:
            file.write("\n" * cut + line + "\n")
    except OSError as error:
        raise LotteryError(f"cannot write {path}: {error.strerror}; the results before are kept") from error


def _describe(ticket: Ticket) -> str:
    sparse = f"level {ticket.level}, {100 * ticket.sparsity:.1f} % sparse" if ticket.level else "dense"
    return f"{ticket.network.name} on {ticket.data}, {sparse}"


def _describe_row(row: dict[str, Any]) -> str:
    sparse = f"level {row['level']}, {100 * row['sparsity']:.1f} % sparse" if row["level"] else "dense"
    cell = f"{row['architecture']} on {row['data']}, {sparse}, {row['variant']}"
    cell += f", {seeds_of(row['ticket_seed'], row['seed'])}"
    return f"{cell}: {100 * row['test']:.1f} % in test"


def _show(out: Path) -> None:
    if not leads():
        return
    settings = summarise(read_rows(out / "results.csv"))
    for title, summary in settings.items():
        click.echo(f"\n{title}\n\n{table(summary)}\n")
    click.echo(f"rows: {out / 'results.csv'}")
    if any(sparsity for summary in settings.values() for sparsity in summary):
        plot(settings, out / "results.png")
        click.echo(f"picture: {out / 'results.png'}")
    else:
        click.echo("no picture yet: it needs results of sparse networks")
