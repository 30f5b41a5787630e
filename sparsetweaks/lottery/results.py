"""Rows of results: kept as CSV, read as a table with intervals, and seen as a picture."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
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
OF_TICKETS = ("ticket", "ticket_seed", "drawing")  # columns that rows to be added to must have
COUNTED_LATER = ("peak_activation_bytes", "sparse_file_bytes")
LATER = ("fingerprint", *COUNTED_LATER)  # columns that rows of earlier versions lack
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
    the run it belongs to, which is kept elsewhere, gives it again. A file that an earlier version began without the
    columns of `LATER` goes on without them.

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
            held = whole[: whole.find(b"\n")].decode(errors="replace").split(",")
            row = {
                name: value for name, value in row.items() if name not in LATER or not whole or name in held
            }
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


def kept_runs(path: Path) -> set[tuple[str, str]]:
    """Which runs have a row already: to be asked before any training, as a file of another version takes no more rows.

    Args:
        path: of the file, as for `read_rows`.

    Returns:
        Pairs of run and variant.

    Raises:
        LotteryError: as `read_rows`, and for rows that do not say which ticket they are of.
    """
    rows = read_rows(path)
    _check_columns(rows, OF_TICKETS)
    return {(row["run"], row["variant"]) for row in rows}


def _check_columns(rows: Iterable[Mapping[str, Any]], columns: Iterable[str]) -> None:
    missing = [name for name in columns if any(name not in row for row in rows)]
    if missing:
        raise LotteryError(
            f"these results say no {', '.join(missing)}: another version of sparsetweaks wrote them; choose another folder "
            "with --out, or move results.csv away and give the command again, which reads its runs back"
        )


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
    """Accuracies of one variant at one sparsity, by seed, in percent.

    Trainings of one ticket are more alike than those of several: where there are several tickets, the mean of each
    one's trainings counts once, and only of a single ticket its trainings are what varies.
    """

    by_seed: dict[Any, float]  # by the seeds of ticket and training, or by one where these are the same

    @property
    def by_ticket(self) -> dict[int, list[float]]:
        """What each ticket's trainings came to, by its seed."""
        found: dict[int, list[float]] = {}
        for seed, value in self.by_seed.items():
            found.setdefault(seed[0] if isinstance(seed, tuple) else seed, []).append(value)
        return found

    @property
    def sample(self) -> list[float]:
        """What the mean, the deviation and the interval are of: a number per ticket, or per training of the only one."""
        tickets = list(self.by_ticket.values())
        return tickets[0] if len(tickets) == 1 else [sum(each) / len(each) for each in tickets]

    @property
    def mean(self) -> float:
        return sum(self.sample) / len(self.sample)

    @property
    def deviation(self) -> float | None:
        """The sample's standard deviation, with n - 1 below; None for a single seed."""
        count = len(self.sample)
        if count < 2:
            return None
        return math.sqrt(sum((value - self.mean) ** 2 for value in self.sample) / (count - 1))

    @property
    def interval(self) -> float | None:
        """Half the width of the 95 % t-interval of the mean; None for a single seed."""
        count, deviation = len(self.sample), self.deviation
        return None if deviation is None else t_quantile(count - 1) * deviation / math.sqrt(count)

    def over(self, other: Cell) -> Cell | None:
        """The gain over another variant, seed by seed: `summarise` sees to it that both start from the same ticket."""
        common = self.by_seed.keys() & other.by_seed.keys()
        return Cell({seed: self.by_seed[seed] - other.by_seed[seed] for seed in common}) if common else None


Summary = dict[float, dict[str, Cell]]  # by sparsity and variant


def summarise(rows: Iterable[Mapping[str, Any]]) -> dict[str, Summary]:
    """Gather rows that may be compared: same data, network and recipe.

    Tickets that were drawn in other ways are other settings. Within one, a sparsity has one ticket per seed, from which
    all variants start, and one run per variant and training: no row is ever overwritten by another.

    Args:
        rows: from `read_rows`.

    Returns:
        By the setting's title: by sparsity and variant, the test accuracies by the seeds of ticket and training.

    Raises:
        LotteryError: for rows of another version, which lack a column; and for two tickets, or two runs, that nothing in
            their rows tells apart.

    Example:
        >>> row = {"data": "digits", "architecture": "resnet8", "width": 8, "epochs": 2, "image_size": 8, "train_images": 99}
        >>> rows = [{**row, "sparsity": 0.5, "variant": "AT", "seed": seed, "test": 0.9 + seed / 10} for seed in (0, 1)]
        >>> summarise(rows)["resnet8, width 8, on digits (99 images of 8 x 8, 2 epochs)"][0.5]["AT"].mean
        95.0
    """
    rows = list(rows)
    _check_columns(rows, SUMMARISED)
    settings: dict[str, Summary] = {}
    found: dict[tuple[Any, ...], str] = {}  # the ticket of each seed, and the run of each number
    for title, row in titled_rows(rows):
        sparsity, ticket, training = (
            _rounded(float(row["sparsity"])),
            int(row.get("ticket_seed", row["seed"])),
            int(row["seed"]),
        )
        place = (title, sparsity, ticket)
        for kind, where in (("ticket", place), ("run", (*place, training, row["variant"]))):
            _check_alone(kind, found.setdefault(where, row.get(kind, "")), row, title)
        cell = settings.setdefault(title, {}).setdefault(sparsity, {}).setdefault(row["variant"], Cell({}))
        cell.by_seed[ticket, training] = 100 * float(row["test"])
    return settings


def _rounded(sparsity: float) -> float:
    """Four digits behind the point, or as many as tell what remains to two."""
    remains = 1 - sparsity
    return round(sparsity, max(4, 1 - math.floor(math.log10(remains))) if remains > 0 else 4)


def titled_rows(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each row with the title of its setting: how it was drawn always, what else tells it apart where there are several.

    A dense network belongs to all ways in which its sparse ones were drawn.

    Args:
        rows: from `read_rows`.

    Returns:
        Pairs of title and row.
    """
    images: dict[str, set[str]] = {}  # of each title
    for row in rows:
        images.setdefault(_title(row), set()).add(row.get("fingerprint", ""))

    def titled(row: Mapping[str, Any]) -> str:
        title = _title(row)
        return f"{title}, of images {row['fingerprint']}" if len(images[title]) > 1 else title

    recipes: dict[str, set[str]] = {}  # of each title
    ways: dict[str, set[tuple[str, str]]] = {}  # of each title and recipe, and in what trainings and steps
    for row in rows:
        recipes.setdefault(titled(row), set()).add(row.get("recipe", ""))
        if float(row["sparsity"]):
            ways.setdefault(titled(row) + row.get("recipe", ""), set()).add(_way(row))
    for row in rows:
        title = titled(row)
        recipe = f", recipe {row['recipe']}" if len(recipes[title]) > 1 else ""
        of = ways.get(title + row.get("recipe", ""), {("", "")})
        for drawn, drawing in sorted({_way(row)} if float(row["sparsity"]) else of):
            several = len([each for each, _ in of if each == drawn]) > 1
            steps = f" (drawing {drawing or 'unknown'})" if several else ""
            yield title + (f", {_in_words(drawn)}{steps}" if drawn else "") + recipe, row


def _way(row: Mapping[str, Any]) -> tuple[str, str]:
    return row.get("drawn", ""), row.get("drawing", "")


def _in_words(drawn: str) -> str:
    """How tickets were drawn, for a title.

    Example:
        >>> _in_words("imp"), _in_words("omp by erk from epoch 2"), _in_words("file a.pt 1f2e3d")
        ('iterative magnitude pruning', 'one-shot magnitude pruning by erk from epoch 2', 'masks from a.pt 1f2e3d')
    """
    method, _, rest = drawn.partition(" ")
    if method == "file" and rest:
        return f"masks from {rest}"
    return " ".join(filter(None, (DRAWN.get(method, method), rest)))


def _check_alone(kind: str, before: str, row: Mapping[str, Any], title: str) -> None:
    """Two of a kind in one place would overwrite each other, or be compared as if they were one."""
    if before != row.get(kind, ""):
        sparse = f"{100 * float(row['sparsity']):.4g} % sparse, seed {row['seed']}, {row['variant']}"
        raise LotteryError(
            f"two {kind}s in one cell, {before or 'unknown'} and {row.get(kind) or 'unknown'} ({title}; {sparse}): "
            f"nothing in their rows tells them apart. Remove those of one from results.csv (column {kind!r}), and spend it "
            "into a folder of its own with --out; masks from elsewhere are told apart by draw --masks-name"
        )


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
                        "seeds": len(cells[name].sample),
                        "tickets": len(cells[name].by_ticket),
                        "trainings": len(cells[name].by_seed),
                        **_numbers("", cells[name]),
                        "over": "" if gain is None else over,
                        "pairs": "" if gain is None else len(gain.sample),
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
    count = counted([cell for cells in summary.values() for cell in cells.values()])
    note = f"mean ± half of the 95 % t-interval over {count}; gains are paired by seed"
    return "\n\n".join([grid_of(lines), *([grid_of(gains)] if len(gains) > 1 else []), note])


def counted(cells: Sequence[Cell]) -> str:
    """What the intervals of some cells are over, in words.

    Args:
        cells: at least one.

    Returns:
        Seeds, where every ticket was trained once; else tickets and their trainings.

    Example:
        >>> counted([Cell({0: 1.0, 1: 2.0}), Cell({0: 1.0})])
        '1 to 2 seeds'
        >>> counted([Cell({(0, 5): 1.0, (0, 6): 2.0})])
        '2 trainings of one ticket'
        >>> counted([Cell({(0, 5): 1.0, (0, 6): 2.0, (1, 5): 3.0, (1, 6): 4.0})])
        '2 tickets (the means of 2 trainings of each)'
    """
    tickets = {len(cell.by_ticket) for cell in cells}
    each = {len(values) for cell in cells for values in cell.by_ticket.values()}
    if each == {1}:
        return f"{_range(tickets)} seeds"
    if tickets == {1}:
        return f"{_range(each)} trainings of one ticket"
    return f"{_range(tickets)} tickets (the means of {_range(each)} trainings of each)"


def _range(counts: Collection[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low}" if low == high else f"{low} to {high}"


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
    accuracies.set_title(
        title.replace("$", r"\$").replace(", on ", "\non ").replace("), ", "),\n"), fontsize=11
    )
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
    number = counted([cell for cells in summary.values() for cell in cells.values()])
    place_below: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.17), "ncols": 5}
    gains.legend(handles, labels, title=f"mean and 95 % interval over {number}", frameon=False, **place_below)


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
