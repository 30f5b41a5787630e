"""Reproducing a figure: run what it needs and is not there yet, and write its picture, its numbers and a comparison."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sparsetweaks.lottery.claims import Finding, accuracies, findings
from sparsetweaks.lottery.config import LotteryError
from sparsetweaks.lottery.contrasts import readings, rows_of, table_of
from sparsetweaks.lottery.experiment import Experiment, Source, compare
from sparsetweaks.lottery.figures import (
    DECIDING,
    EARLY,
    FIGURES,
    MOMENTS,
    PRESETS,
    Figure,
    Preset,
)
from sparsetweaks.lottery.files import write
from sparsetweaks.lottery.grid import Engine, GridError, run_all
from sparsetweaks.lottery.pictures import picture_of
from sparsetweaks.lottery.plots import picture
from sparsetweaks.lottery.rows import csv_of
from sparsetweaks.lottery.smoothness import BEST, Look, look_at
from sparsetweaks.lottery.spend import MEASURED_ON
from sparsetweaks.lottery.summaries import Summary, statistics, summarise
from sparsetweaks.lottery.tables import table
from sparsetweaks.lottery.train import Trained


def experiments(figure: str, preset: str, data: Sequence[str] = ()) -> list[Experiment]:
    """What it takes to reproduce a figure.

    Args:
        figure: a name of `FIGURES`.
        preset: a name of `PRESETS`.
        data: folders of images, for presets that bring none.

    Returns:
        A comparison per network and data set.

    Raises:
        LotteryError: for a name that is not there, and where data is missing, or given to a preset that has its own.

    Example:
        >>> [(each.network.name, each.spendings) for each in experiments("4a", "digits")]
        [('resnet8', 51)]
    """
    for kind, name, known in (("figure", figure, FIGURES), ("preset", preset, PRESETS)):
        if name not in known:
            raise LotteryError(f"unknown {kind} {name!r}; choose from {', '.join(known)}")
    drawn, size = FIGURES[figure], PRESETS[preset]
    if size.sources and data:
        raise LotteryError(
            f"the preset {preset!r} brings its data: leave out --data, or choose another preset"
        )
    if not size.sources and not data:
        raise LotteryError(f"the preset {preset!r} needs --data, a folder: {size.words}")
    sources = size.sources or tuple(Source(folder, size.size, size.limit) for folder in data)
    return [
        Experiment(
            drawn.variants,
            source,
            network,
            size.recipe,
            size.levels,
            size.fraction,
            size.seeds,
            drawing=drawn.drawing,
            dense=drawn.dense,
            scales=size.scales,
            spent=(_deciding_level(size),) if drawn.deciding else (),
            keep_epochs=_moments(drawn, size),
        )
        for network in (size.networks if drawn.networks else size.networks[: size.main])
        for source in (sources if drawn.sources else sources[:1])
    ]


def _deciding_level(size: Preset) -> int:
    """The level whose sparsity is nearest to the one at which the paper looks."""
    return min(range(1, size.levels + 1), key=lambda level: abs(1 - (1 - size.fraction) ** level - DECIDING))


def _moments(figure: Figure, size: Preset) -> tuple[int, ...]:
    """The epochs after which a figure looks at networks; none where it looks at the reported ones."""
    epochs = size.recipe.epochs
    early = max(1, round(EARLY * epochs))
    each = {early, *(max(1, round(epochs * part / MOMENTS)) for part in range(1, MOMENTS + 1))}
    return {"best": (), "early": (early,), "each": tuple(sorted(each))}[figure.moments]


def reproduce(
    figure: str,
    preset: str,
    folder: Path,
    *,
    data: Sequence[str] = (),
    device: str = "cpu",
    engine: Engine = run_all,
    on_run: Callable[[int, int], None] | None = None,
    on_epoch: Callable[[Trained], None] | None = None,
) -> str:
    """Run what a figure needs and is not there yet, and write its picture, its numbers, and what the paper says to them.

    Args:
        figure: a name of `FIGURES`.
        preset: a name of `PRESETS`.
        folder: for everything; what figures share in it is run once.
        data: folders of images, for presets that bring none.
        device: to train on.
        engine: what runs the stages; see `compare`.
        on_run: called with the number of stages done and of all.
        on_epoch: see `train`; it must pickle where the stages run elsewhere.

    Returns:
        The tables and the comparison, as text. `figures/FIGURE-PRESET.png`, `.csv` (numbers), `.claims.csv` and `.txt`
        (the comparison) hold the same.

    Raises:
        LotteryError: as `experiments`, and when the folder cannot be written to, or holds runs of another version. When
            runs failed, once all others are done and kept: a figure that lacks some is not drawn.
    """
    parts, measure = experiments(figure, preset, data), FIGURES[figure].measure
    counts = [len(part.seeds) + part.spendings + (_looks(part) if measure else 0) for part in parts]
    rows, looks, failed = [], [], list[str]()
    for number, part in enumerate(parts):

        def so_far(done: int, _: int = 0, before: int = sum(counts[:number])) -> None:
            if on_run is not None:
                on_run(before + done, sum(counts))

        try:
            found = compare(part, folder, device=device, engine=engine, on_run=so_far, on_epoch=on_epoch)
            rows.append(found)
            if measure:
                taken = itertools.count(len(part.seeds) + part.spendings + 1)
                epochs = part.keep_epochs or (BEST,)
                looks.append(
                    look_at(
                        part, folder, measure, epochs=epochs, device=device, engine=engine,
                        on_look=lambda taken=taken, so_far=so_far: so_far(next(taken)),  # type: ignore[misc]
                    )
                )  # fmt: skip
        except GridError as error:
            failed += error.args
            so_far(counts[number])  # its looks are for the figure alone, and so not taken
    if failed:
        raise LotteryError(
            f"figure {figure} ({preset}) is not drawn, as runs are missing: {GridError(*failed)}"
        )
    made = _of_looks(figure, rows, looks) if measure else _of_rows(figure, [r for e in rows for r in e])
    base = folder / "figures" / f"{figure}-{preset}"
    first, text = rows[0][0], "\n".join(finding.line(figure) for finding in made.findings)
    around = {"seed_list": " ".join(map(str, parts[0].seeds)), **{name: first[name] for name in MEASURED_ON}}
    write(base.with_suffix(".png"), made.picture)
    write(base.with_suffix(".csv"), csv_of({**line, **around} for line in made.lines).encode())
    claims = [{"figure": figure, **finding._asdict()} for finding in made.findings]
    write(base.with_suffix(".claims.csv"), csv_of(claims).encode())
    write(base.with_suffix(".txt"), f"{text}\n".encode())
    return "\n\n".join([*made.tables, text])


class _Made(NamedTuple):
    """What a figure comes to."""

    picture: bytes
    lines: list[dict[str, Any]]  # of numbers
    findings: list[Finding]
    tables: list[str]


def _of_rows(figure: str, rows: Sequence[Mapping[str, Any]]) -> _Made:
    """A figure of accuracies."""
    claims, settings = FIGURES[figure].claims, summarise(rows)
    over = list(dict.fromkeys(claim.over for claim in claims if claim.over != claim.variant))
    lines = [line | _by_seed(settings, line) for name in over for line in statistics(rows, over=name)]
    told = [each for title, found in settings.items() for each in findings(claims, accuracies(found), title)]
    tables = [f"{title}\n\n{table(summary, over=over[0])}" for title, summary in settings.items()]
    return _Made(picture(settings), lines, told, tables)


def _by_seed(settings: Mapping[str, Summary], line: Mapping[str, Any]) -> dict[str, str]:
    """The accuracies behind a line of numbers, so that any contrast can be taken of the file."""
    cell = settings[line["setting"]][line["sparsity"]][line["variant"]]
    told = [
        f"{ticket if ticket == training else f'{ticket}/{training}'}:{value:.6g}"
        for (ticket, training), value in sorted(cell.by_seed.items())
    ]
    return {"by_seed": " ".join(told)}


def _of_looks(
    figure: str,
    rows: Sequence[Sequence[Mapping[str, Any]]],
    looks: Sequence[Sequence[Look]],
) -> _Made:
    """A figure of what was measured; its picture is of the first network, its numbers are of all."""
    drawn, lines, told, tables = FIGURES[figure], [], [], []
    quantities = [claim.reading.quantity for claim in drawn.claims]
    for ran, seen in zip(rows, looks, strict=True):
        setting, found = next(iter(summarise(ran))), readings(seen)
        lines += rows_of(found, setting)
        told += findings(drawn.claims, found, setting)
        tables.append(f"{setting}\n\n{table_of(found, quantities)}")
    setting, found = next(iter(summarise(rows[0]))), readings(looks[0])
    shown = picture_of(str(drawn.measure), looks[0], found, f"{drawn.title}\n{setting}")
    return _Made(shown, lines, told, tables)


def _looks(part: Experiment) -> int:
    return part.spendings * max(1, len(part.keep_epochs))


def overview(folder: Path) -> str:
    """Every figure and preset: how many trainings it takes by itself, how long about, and whether it is done.

    Args:
        folder: where results may be.

    Returns:
        A table as text. Trainings that figures share count for each of them here, and are run once.
    """
    lines = [f"{'figure':8}{'preset':16}{'trainings':>10}{'epochs':>9}{'one thread':>14}{'done':>6}  what"]
    for name, figure in FIGURES.items():
        for preset, size in PRESETS.items():
            folders = ("first", "second", "third") if figure.sources else ("first",)
            parts = experiments(name, preset, () if size.sources else folders)
            trainings = len(set().union(*map(_cells, parts)))
            done = "yes" if (folder / "figures" / f"{name}-{preset}.png").is_file() else "no"
            lines.append(
                f"{name:8}{preset:16}{trainings:>10}{trainings * size.recipe.epochs:>9}"
                f"{_duration(trainings * size.seconds):>14}{done:>6}  {figure.title}"
            )
    for preset, size in PRESETS.items():
        parts = [
            part for name in FIGURES for part in experiments(name, preset, () if size.sources else ("",))
        ]
        together = len(set().union(*map(_cells, parts)))
        lines += ["", f"{preset}: {size.words}"]
        lines.append(
            f"    all figures{'' if size.sources else ' of one data set'} together: {together:,} trainings, about "
            f"{_duration(together * size.seconds)} on one thread of an AMD EPYC; looks at spent tickets come on top"
        )
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    """A time in the unit that suits it.

    Example:
        >>> _duration(90), _duration(9_000), _duration(900_000)
        ('2 min', '2.5 h', '10 days')
    """
    if seconds < 3600:
        return f"{math.ceil(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h" if seconds < 2 * 86400 else f"{seconds / 86400:,.0f} days"


def _cells(part: Experiment) -> set[tuple[Any, ...]]:
    """What a comparison trains, for drawing too, in terms that are equal where figures share it."""
    levels = part.spent or range(1, part.levels + 1)
    cells = [(0, "", name) for name in {*part.dense, "vanilla"}]
    cells += [(level, part.drawing, name) for level in levels for name in part.variants]
    cells += [(level, part.drawing, "vanilla") for level in range(1, max(levels)) if part.drawing == "imp"]
    return {(part.source, part.network, seed, *cell) for seed in part.seeds for cell in cells}
