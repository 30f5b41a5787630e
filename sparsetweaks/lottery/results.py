"""Rows of results: kept as CSV, read as a table with intervals, and seen as a picture."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from sparsetweaks.lottery.config import VARIANTS, LotteryError
from sparsetweaks.lottery.files import hold, write

BASELINE = "vanilla"
SUMMARISED = (
    "data",
    "architecture",
    "width",
    "epochs",
    "image_size",
    "train_images",
    "sparsity",
    "variant",
    "seed",
    "test",
)  # columns that `summarise` needs
COLOURS = 128  # of a picture
DRAWN = {
    "imp": "iterative magnitude pruning",
    "omp": "one-shot magnitude pruning",
    "file": "masks from a file",
}
_T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
_LOOK = {  # colours of Okabe and Ito, told apart by colour-blind readers; markers for those who print in grey
    "vanilla": ("#000000", "o"),
    "AT": ("#0072B2", "s"),
    "TRT": ("#E69F00", "^"),
    "AT+TRT": ("#009E73", "D"),
    "skips": ("#56B4E9", "v"),
    "swish": ("#CC79A7", "P"),
    "mish": ("#D55E00", "X"),
    "scales": ("#8C6BB1", "<"),
    "smoothing": ("#A6761D", ">"),
}
_OTHERS = ("#D55E00", "#56B4E9", "#CC79A7", "#8C6BB1", "#A6761D", "#666666", "#117733", "#882255")  # by place


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add one line to a CSV file, in a single write, so that several processes can add to one file.

    A line that was cut off, by a full disk or a killed process, is no line: it is removed before the next is added, and
    the run it belongs to, which is kept elsewhere, gives it again.

    Args:
        path: of the file; made, with its header, if it is not there.
        row: values by column.

    Raises:
        LotteryError: when the file cannot be written, or has other columns; what it held before stays.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            hold(file)
            file.seek(0)
            content = file.read()
            whole = content[: content.rfind(b"\n") + 1]
            header = _line(row)
            if whole and not whole.startswith(header.encode()):
                raise LotteryError(
                    f"{path} has other columns than these results: move it away, or choose another with --out"
                )
            if len(whole) < len(content):
                file.truncate(len(whole))
            file.write(((header if not whole else "") + _line(row.values())).encode())
    except OSError as error:
        raise LotteryError(
            f"cannot write {path}: {error.strerror}; what was finished before is kept"
        ) from error


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read the rows of a CSV file, each run once; a last line that was cut off is left out.

    Args:
        path: of the file.

    Returns:
        Values by column; empty where there is no such file.

    Raises:
        LotteryError: when it is not a file of results.
    """
    rows = read_table(path) if path.exists() else []
    if any(name not in row for row in rows for name in ("run", "variant")):
        raise LotteryError(f"{path} is not a CSV file of results, or has a broken line")
    return list({(row["run"], row["variant"]): row for row in rows}.values())


def read_table(path: Path) -> list[dict[str, str]]:
    """Read the lines of any CSV file with a header; a last one that was cut off is left out.

    Args:
        path: of the file.

    Returns:
        Values by column.

    Raises:
        LotteryError: when it is no such file.
    """
    try:
        text = path.read_text(encoding="utf-8")
        rows = list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline="")))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise LotteryError(f"{path} is not a CSV file of results: {error}") from error
    if any(None in row or None in row.values() for row in rows):
        raise LotteryError(f"{path} is not a CSV file of results, or has a broken line")
    return rows


class Cell(NamedTuple):
    """Accuracies of one variant at one sparsity, by seed, in percent."""

    by_seed: dict[int, float]

    @property
    def mean(self) -> float:
        return sum(self.by_seed.values()) / len(self.by_seed)

    @property
    def deviation(self) -> float | None:
        """The sample's standard deviation, with n - 1 below; None for a single seed."""
        count = len(self.by_seed)
        if count < 2:
            return None
        return math.sqrt(sum((value - self.mean) ** 2 for value in self.by_seed.values()) / (count - 1))

    @property
    def interval(self) -> float | None:
        """Half the width of the 95 % t-interval of the mean; None for a single seed."""
        count, deviation = len(self.by_seed), self.deviation
        return None if deviation is None else t_quantile(count - 1) * deviation / math.sqrt(count)

    def over(self, other: Cell) -> Cell | None:
        """The gain over another variant, seed by seed, as both start from the same ticket."""
        common = self.by_seed.keys() & other.by_seed.keys()
        return Cell({seed: self.by_seed[seed] - other.by_seed[seed] for seed in common}) if common else None


Summary = dict[float, dict[str, Cell]]  # by sparsity and variant


def summarise(rows: Iterable[Mapping[str, Any]]) -> dict[str, Summary]:
    """Gather rows that may be compared: same data, network and recipe.

    Args:
        rows: from `read_rows`.

    Returns:
        By the setting's title: by sparsity and variant, the test accuracies by seed.

    Raises:
        LotteryError: for rows of another version, which lack a column.

    Example:
        >>> row = {"data": "digits", "architecture": "resnet8", "width": 8, "epochs": 2, "image_size": 8, "train_images": 99}
        >>> rows = [{**row, "sparsity": 0.5, "variant": "AT", "seed": seed, "test": 0.9 + seed / 10} for seed in (0, 1)]
        >>> summarise(rows)["resnet8, width 8, on digits (99 images of 8 x 8, 2 epochs)"][0.5]["AT"].mean
        95.0
    """
    rows = list(rows)
    missing = [name for name in SUMMARISED if any(name not in row for row in rows)]
    if missing:
        raise LotteryError(
            f"these results say no {', '.join(missing)}: another version of sparsetweaks wrote them; choose another folder "
            "with --out, or move results.csv away and give the command again, which reads its runs back"
        )
    recipes: dict[str, set[str]] = {}  # of each title
    ways: dict[
        str, set[str]
    ] = {}  # how its sparse networks were drawn; the dense one belongs to all of these
    for row in rows:
        recipes.setdefault(_title(row), set()).add(row.get("recipe", ""))
        if float(row["sparsity"]):
            ways.setdefault(_title(row) + row.get("recipe", ""), set()).add(row.get("drawn", ""))
    settings: dict[str, Summary] = {}
    for row in rows:
        title = _title(row)
        recipe = f", recipe {row['recipe']}" if len(recipes[title]) > 1 else ""
        own = (
            {row.get("drawn", "")}
            if float(row["sparsity"])
            else ways.get(title + row.get("recipe", ""), {""})
        )
        for drawn in sorted(own):
            way = f", {DRAWN.get(drawn, drawn)}" if drawn else ""
            cells = settings.setdefault(title + way + recipe, {}).setdefault(
                round(float(row["sparsity"]), 4), {}
            )
            cells.setdefault(row["variant"], Cell({})).by_seed[int(row["seed"])] = 100 * float(row["test"])
    return settings


def _title(row: Mapping[str, Any]) -> str:
    width = f", width {row['width']}" if row["width"] != "" else ""
    return (
        f"{row['architecture']}{width}, on {row['data']} "
        f"({int(row['train_images']):,} images of {row['image_size']} x {row['image_size']}, {row['epochs']} epochs)"
    )


def statistics(rows: Iterable[Mapping[str, Any]], *, over: str = BASELINE) -> list[dict[str, Any]]:
    """The numbers behind the tables: mean, deviation and interval of each cell, and of its paired gain.

    Args:
        rows: from `read_rows`.
        over: the variant that gains are over, seed by seed.

    Returns:
        A row per setting, sparsity and variant, in percent and points; empty where one seed gives no answer.

    Example:
        >>> row = {"data": "digits", "architecture": "resnet8", "width": 8, "epochs": 2, "image_size": 8, "train_images": 99}
        >>> row |= {"sparsity": 0.5, "run": ""}
        >>> rows = [{**row, "variant": name, "seed": seed, "test": (seed + gain) / 100}
        ...         for name, gain in (("vanilla", 50), ("AT", 52)) for seed in (0, 2)]
        >>> [(each["variant"], each["mean"], each["deviation"], each["gain"]) for each in statistics(rows)]
        [('vanilla', 51.0, 1.414, ''), ('AT', 53.0, 1.414, 2.0)]
    """
    lines = []
    for title, summary in summarise(rows).items():
        for sparsity in sorted(summary):
            cells = summary[sparsity]
            for name in _ordered(cells):
                gain = cells[name].over(cells[over]) if over in cells and name != over else None
                lines.append(
                    {
                        "setting": title,
                        "sparsity": sparsity,
                        "variant": name,
                        "seeds": len(cells[name].by_seed),
                        **_numbers("", cells[name]),
                        "over": "" if gain is None else over,
                        "pairs": "" if gain is None else len(gain.by_seed),
                        **_numbers("gain_", gain),
                    }
                )
    return lines


def _numbers(prefix: str, cell: Cell | None) -> dict[str, Any]:
    values: dict[str, float | None] = {"mean": None, "deviation": None, "interval": None}
    if cell is not None:
        values = {"mean": cell.mean, "deviation": cell.deviation, "interval": cell.interval}
    names = {"mean": "gain" if prefix else "mean"}
    return {
        names.get(name, prefix + name): "" if value is None else round(value, 3)
        for name, value in values.items()
    }


def table(summary: Summary, *, over: str = BASELINE) -> str:
    """Test accuracy per sparsity and variant with its 95 % interval, and the gains over vanilla, as text (and Markdown).

    Args:
        summary: one setting of `summarise`.
        over: the variant that gains are over.

    Returns:
        Two tables, one below the other; the second only where there is something to compare.

    Example:
        >>> print(table({0.5: {"vanilla": Cell({0: 90.0, 1: 92.0}), "AT": Cell({0: 91.0, 1: 93.0})}}))
        | test accuracy, % | vanilla     | AT          |
        |------------------|-------------|-------------|
        | 50 % sparse      | 91.0 ± 12.7 | 92.0 ± 12.7 |
        <BLANKLINE>
        | points gained | AT         |
        |---------------|------------|
        | 50 % sparse   | +1.0 ± 0.0 |
        <BLANKLINE>
        mean ± half of the 95 % t-interval over 2 seeds; gains are paired by seed
    """
    variants = _ordered({name for cells in summary.values() for name in cells})
    lines = [["test accuracy, %", *variants]]
    gains = [["points gained", *(name for name in variants if name != over)]]
    for sparsity in sorted(summary):
        cells = summary[sparsity]
        title = f"{100 * sparsity:.4g} % sparse" if sparsity else "dense"
        lines.append([title, *(_text(cells.get(name), "") for name in variants)])
        if over in cells and len(cells) > 1:
            gained = [cells[name].over(cells[over]) if name in cells else None for name in gains[0][1:]]
            gains.append([title, *(_text(cell, "+") for cell in gained)])
    seeds = sorted({len(cell.by_seed) for cells in summary.values() for cell in cells.values()})
    count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    note = f"mean ± half of the 95 % t-interval over {count} seeds; gains are paired by seed"
    return "\n\n".join([grid_of(lines), *([grid_of(gains)] if len(gains) > 1 else []), note])


def plot(settings: Mapping[str, Summary], path: Path) -> None:
    """Draw accuracy against sparsity, and the gains over vanilla, a line per variant with its 95 % interval.

    Args:
        settings: from `summarise`; each gets a panel.
        path: of the PNG; its folder is made.

    Raises:
        LotteryError: when there is nothing to draw, or the file cannot be written.
    """
    write(path, picture(settings))


def picture(settings: Mapping[str, Summary]) -> bytes:
    """The picture of `plot`, as the content of a PNG.

    Args:
        settings: from `summarise`; each gets a panel.

    Returns:
        The bytes.

    Raises:
        LotteryError: when there is nothing to draw.
    """
    from matplotlib.figure import Figure

    drawn = {title: summary for title, summary in settings.items() if any(summary)}
    if not drawn:
        raise LotteryError("there are no results of sparse networks to draw yet")
    wide = 8.5 if len(drawn) == 1 else 6.2
    figure = Figure(figsize=(wide * len(drawn), 8), layout="constrained", dpi=120)
    panels = figure.subplots(2, len(drawn), squeeze=False, sharex="col", height_ratios=(3, 2))
    for accuracies, gains, (title, summary) in zip(*panels, drawn.items(), strict=True):
        _panel(accuracies, gains, title, summary)
    return png_of(figure)


def png_of(figure: Any) -> bytes:
    """A figure of matplotlib's as a small PNG: of 128 colours, as flat surfaces and thin lines need no more.

    Args:
        figure: to be drawn.

    Returns:
        The content of the file.
    """
    from PIL import Image

    drawn, content = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    image = Image.open(drawn).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    image.save(content, format="png", optimize=True)
    return content.getvalue()


def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, for 95 % intervals.

    Args:
        freedom: degrees of freedom, at least 1.

    Returns:
        The quantile, to 0.003.

    Example:
        >>> t_quantile(2), round(t_quantile(60), 2)
        (4.303, 2.0)
    """
    if freedom <= len(_T_975):
        return _T_975[freedom - 1]
    z = 1.95996
    return z + (z**3 + z) / (4 * freedom)  # the first terms of its expansion about the normal quantile


def _panel(accuracies: Any, gains: Any, title: str, summary: Summary) -> None:
    """One setting: accuracies above, and below them the gains over vanilla, seed by seed, where noise hides less."""
    sparse = sorted(sparsity for sparsity in summary if sparsity)
    names = _ordered({name for sparsity in sparse for name in summary[sparsity]})
    for place, (name, cell) in enumerate(summary.get(0.0, {}).items()):
        colour = "#666666" if name == BASELINE else appearance(name, place)[0]
        label = "dense" if name == BASELINE else f"dense, {name}"
        accuracies.axhline(cell.mean, color=colour, linestyle="--", linewidth=1.3, zorder=1, label=label)
    gains.axhline(0, color="#000000", linewidth=1.3, zorder=1)
    gap = min(
        ((1 - low) / (1 - high) for low, high in pairwise(sparse)), default=2.0
    )  # on the logarithmic axis
    for place, name in enumerate(names):
        aside = gap ** (0.06 * ((len(names) - 1) / 2 - place))  # so that no interval hides another
        cells = {sparsity: summary[sparsity][name] for sparsity in sparse if name in summary[sparsity]}
        _line_of(accuracies, name, place, aside, cells)
        over = {s: cell.over(summary[s][BASELINE]) for s, cell in cells.items() if BASELINE in summary[s]}
        if name != BASELINE:
            _line_of(gains, name, place, aside, {s: cell for s, cell in over.items() if cell is not None})
    accuracies.set_title(title.replace(", on ", "\non ").replace("), ", "),\n"), fontsize=11)
    accuracies.set_ylabel("test accuracy, %")
    gains.set(
        ylabel="points gained over vanilla", xlabel="sparsity: weights removed, % (log scale of what remains)"
    )
    gains.set_xscale("log")
    gains.invert_xaxis()
    gains.set_xticks(
        [100 * (1 - sparsity) for sparsity in sparse], [f"{100 * sparsity:.3g}" for sparsity in sparse]
    )
    for axes in (accuracies, gains):
        axes.minorticks_off()
        axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    low, high = accuracies.get_ylim()
    accuracies.set_ylim(max(low, -0.5), min(high, 100.5))  # an interval may reach beyond what can be
    handles, labels = accuracies.get_legend_handles_labels()
    place_below: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.17), "ncols": 5}
    gains.legend(handles, labels, title="mean and 95 % interval over seeds", frameon=False, **place_below)


def appearance(name: str, place: int) -> tuple[str, str]:
    """The colour and the marker of a variant, the same in every picture.

    Args:
        name: of the variant.
        place: its number in the picture, for those that have none of their own.

    Returns:
        As matplotlib takes them.
    """
    return _LOOK.get(name, (_OTHERS[place % len(_OTHERS)], "hpd8*"[place % 5]))


def _line_of(axes: Any, name: str, place: int, aside: float, cells: Mapping[float, Cell]) -> None:
    colour, marker = appearance(name, place)
    at = [100 * (1 - sparsity) * aside for sparsity in cells]
    means = [cell.mean for cell in cells.values()]
    widths = [cell.interval or 0.0 for cell in cells.values()]
    low, high = ([mean + sign * width for mean, width in zip(means, widths, strict=True)] for sign in (-1, 1))
    axes.fill_between(at, low, high, color=colour, alpha=0.06, linewidth=0, zorder=2)
    axes.errorbar(at, means, widths, color=colour, elinewidth=1.4, capsize=3, linewidth=0, zorder=3)
    axes.plot(at, means, color=colour, marker=marker, markersize=7, linewidth=2, label=name, zorder=4)


def _text(cell: Cell | None, sign: str) -> str:
    if cell is None:
        return ""
    return f"{round(cell.mean, 1) + 0.0:{sign}.1f}" + (
        "" if cell.interval is None else f" ± {cell.interval:.1f}"
    )


def grid_of(lines: list[list[str]]) -> str:
    """Lines of cells as a table in text (and Markdown), the first its head.

    Args:
        lines: of equal length.

    Returns:
        The text.
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * (width + 2) for width in widths]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    return "\n".join([text[0], "|" + "|".join(rule) + "|", *text[1:]])


def _ordered(names: Iterable[str]) -> list[str]:
    known = list(VARIANTS)
    return sorted(names, key=lambda name: (known.index(name) if name in known else len(known), name))


def csv_of(lines: Iterable[Mapping[str, Any]]) -> str:
    """Rows of equal columns as the text of a CSV file.

    Args:
        lines: from `statistics`, say; at least one.

    Returns:
        The text, with a header.

    Example:
        >>> print(csv_of([{"a": 1, "b": "x"}]), end="")
        a,b
        1,x
    """
    lines = list(lines)
    return "".join([_line(lines[0]), *(_line(line.values()) for line in lines)])


def _line(values: Iterable[Any]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(values)
    return buffer.getvalue()
