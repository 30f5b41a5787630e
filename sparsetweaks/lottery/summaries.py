"""What rows say: accuracies that may be compared, with means, deviations and paired 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sparsetweaks.lottery.config import VARIANTS, LotteryError
from sparsetweaks.lottery.rows import check_columns

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
DRAWN = {
    "imp": "iterative magnitude pruning",
    "omp": "one-shot magnitude pruning",
    "file": "masks from a file",
}
_T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


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
    check_columns(rows, SUMMARISED)
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
            for name in ordered(cells):
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


def ordered(names: Iterable[str]) -> list[str]:
    """Names of variants, the known ones first and in their order."""
    known = list(VARIANTS)
    return sorted(names, key=lambda name: (known.index(name) if name in known else len(known), name))


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
