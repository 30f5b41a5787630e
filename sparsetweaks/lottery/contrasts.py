"""Numbers of spent tickets across seeds: contrasts of variants, paired by seed, and ratios, as rows and as a table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from sparsetweaks.lottery.smoothness import Look
from sparsetweaks.lottery.summaries import BASELINE, Cell
from sparsetweaks.lottery.tables import grid_of


class Place(NamedTuple):
    """Where a number was measured."""

    sparsity: float
    epoch: int
    space: str
    quantity: str


Readings = dict[Place, dict[str, Cell]]  # by place and variant


class Ratio(NamedTuple):
    """How many times as large: the geometric mean over seeds, and its 95 % interval, None for one seed."""

    mean: float
    low: float | None
    high: float | None
    seeds: int

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{digits(self.mean)} times (one seed)"
        return f"{digits(self.mean)} times ({digits(self.low)} to {digits(self.high)})"

    @property
    def side(self) -> int:
        """1 or -1 where the whole interval lies above or below 1, else 0."""
        if self.low is None or self.high is None:
            return 0
        return 1 if self.low > 1 else -1 if self.high < 1 else 0


def readings(looks: Iterable[Look]) -> Readings:
    """Gather looks by where they were taken.

    Args:
        looks: from `look_at`.

    Returns:
        By place and variant, the numbers by seed.

    Example:
        >>> looks = [Look(0.9, "vanilla", seed, 0, {"kept weights": {"eigenvalue": seed + 1.0}}, {}) for seed in (0, 1)]
        >>> readings(looks)[Place(0.9, 0, "kept weights", "eigenvalue")]["vanilla"].mean
        1.5
    """
    found: Readings = {}
    for look in looks:
        for space, numbers in look.numbers.items():
            for quantity, value in numbers.items():
                cells = found.setdefault(Place(look.sparsity, look.epoch, space, quantity), {})
                cells.setdefault(look.variant, Cell({})).by_seed[look.seed] = value
    return found


def logs(cell: Cell) -> Cell | None:
    """Logarithms, in which ratios are differences.

    Args:
        cell: numbers by seed.

    Returns:
        Their logarithms; None where one is not positive and finite.
    """
    if not all(value > 0 and math.isfinite(value) for value in cell.by_seed.values()):
        return None
    return Cell({seed: math.log(value) for seed, value in cell.by_seed.items()})


def times(contrast: Cell) -> Ratio:
    """A contrast of logarithms as a ratio.

    Args:
        contrast: by seed.

    Returns:
        The ratio.

    Example:
        >>> print(times(Cell({0: 0.0, 1: 0.0})))
        1.00 times (1.00 to 1.00)
    """
    wide = contrast.interval
    low, high = (None if wide is None else math.exp(contrast.mean + sign * wide) for sign in (-1, 1))
    return Ratio(math.exp(contrast.mean), low, high, len(contrast.by_seed))


def ratio(cell: Cell, over: Cell) -> Ratio | None:
    """How many times as large one is as the other, paired by seed.

    Args:
        cell, over: numbers by seed.

    Returns:
        The ratio; None where they share no seed, or a number is not positive and finite.

    Example:
        >>> print(ratio(Cell({0: 2.0, 1: 4.0}), Cell({0: 1.0, 1: 2.0})))
        2.00 times (2.00 to 2.00)
    """
    own, theirs = logs(cell), logs(over)
    found = None if own is None or theirs is None else gain(own, theirs)
    return None if found is None else times(found)


def gain(own: Cell, theirs: Cell) -> Cell | None:
    """What one has more than another, seed by seed; of logarithms, the logarithm of how many times as much.

    Args:
        own, theirs: numbers by seed.

    Returns:
        The difference by seed; None where they share no seed.

    Example:
        >>> gain(Cell({0: 3.0, 1: 4.0}), Cell({1: 3.0, 2: 0.0}))
        Cell(by_seed={1: 1.0})
    """
    return own.over(theirs)


def growth(own: Cell, theirs: Cell, own_before: Cell, theirs_before: Cell) -> Cell | None:
    """How much larger a gain is than it was elsewhere, seed by seed; below zero, how much more the one falls.

    Args:
        own, theirs: numbers by seed.
        own_before, theirs_before: the same elsewhere.

    Returns:
        The difference of the gains by seed; None where there is no common seed.

    Example:
        >>> growth(Cell({0: 5.0}), Cell({0: 2.0}), Cell({0: 7.0}), Cell({0: 6.0}))
        Cell(by_seed={0: 2.0})
    """
    now, before = own.over(theirs), own_before.over(theirs_before)
    return None if now is None or before is None else now.over(before)


def distance(own: Cell, rival: Cell, base: Cell) -> Cell | None:
    """How much farther one is from a base than a rival is, on either side, seed by seed.

    Args:
        own, rival, base: numbers by seed; of logarithms, the distance is that of the ratio from 1.

    Returns:
        The difference of the distances by seed; None where there is no common seed. What noise adds to both distances
        brings them closer to each other.

    Example:
        >>> distance(Cell({0: -3.0}), Cell({0: 1.0}), Cell({0: 0.0}))
        Cell(by_seed={0: 2.0})
    """
    far = [each.over(base) for each in (own, rival)]
    sizes = [Cell({seed: abs(value) for seed, value in each.by_seed.items()}) for each in far if each]
    return sizes[0].over(sizes[1]) if len(sizes) == 2 else None


def mean_of(cells: Sequence[Cell]) -> Cell:
    """The mean over several places, seed by seed.

    Args:
        cells: numbers by seed, which share some.

    Returns:
        The mean of each seed that all have.

    Example:
        >>> mean_of([Cell({0: 1.0, 1: 2.0}), Cell({0: 3.0})])
        Cell(by_seed={0: 2.0})
    """
    common = set.intersection(*(set(cell.by_seed) for cell in cells))
    return Cell({seed: sum(cell.by_seed[seed] for cell in cells) / len(cells) for seed in sorted(common)})


def rows_of(found: Readings, setting: str, over: str = BASELINE) -> list[dict[str, Any]]:
    """The numbers behind a picture: mean, deviation and interval of each cell, its ratio to another variant's, its seeds.

    Args:
        found: readings.
        setting: network, data and recipe, in words.
        over: the variant that ratios are to.

    Returns:
        A row per place and variant; empty where one seed, or a number that is not positive, gives no answer.
    """
    lines = []
    for place, cells in found.items():
        for name, cell in cells.items():
            change = ratio(cell, cells[over]) if name != over and over in cells else None
            lines.append(
                {
                    "setting": setting,
                    "sparsity": place.sparsity,
                    "epoch": place.epoch or "best",
                    "space": place.space,
                    "quantity": place.quantity,
                    "variant": name,
                    "seeds": len(cell.by_seed),
                    "mean": digits(cell.mean),
                    "deviation": digits(cell.deviation),
                    "interval": digits(cell.interval),
                    "over": "" if change is None else over,
                    "ratio": "" if change is None else digits(change.mean),
                    "ratio_low": "" if change is None else digits(change.low),
                    "ratio_high": "" if change is None else digits(change.high),
                    "by_seed": " ".join(
                        f"{seed}:{value:.5g}" for seed, value in sorted(cell.by_seed.items())
                    ),
                }
            )
    return lines


def table_of(found: Readings, quantities: Sequence[str]) -> str:
    """The numbers of some quantities as text (and Markdown): mean ± half of the 95 % interval.

    Args:
        found: readings.
        quantities: which of theirs.

    Returns:
        A row per place, a column per variant.
    """
    names = list(dict.fromkeys(name for cells in found.values() for name in cells))
    lines = [["space", "quantity", "sparsity", "epoch", *names]]
    for place, cells in found.items():
        if place.quantity in quantities:
            sparse = f"{100 * place.sparsity:.4g} %" if place.sparsity else "dense"
            where = [place.space, place.quantity, sparse, str(place.epoch or "best")]
            lines.append(where + [_with(cells[name]) if name in cells else "" for name in names])
    return grid_of(lines)


def geometric(cell: Cell) -> tuple[float, float, float]:
    """The geometric mean and the ends of its 95 % interval, for a logarithmic axis; all three the mean for one seed.

    Args:
        cell: positive numbers by seed.

    Returns:
        Mean, low end, high end.
    """
    logs = Cell({seed: math.log(value) for seed, value in cell.by_seed.items()})
    wide = logs.interval or 0.0
    return math.exp(logs.mean), math.exp(logs.mean - wide), math.exp(logs.mean + wide)


def digits(value: float | None) -> str:
    """A number in three digits or so.

    Args:
        value: any; None is empty.

    Returns:
        The text.

    Example:
        >>> digits(0.123), digits(0.0123), digits(12345), digits(None)
        ('0.12', '0.0123', '12,345', '')
    """
    if value is None:
        return ""
    size = abs(value)
    return f"{value:.2f}" if 0.1 <= size < 10 else f"{value:,.0f}" if size >= 100 else f"{value:.3g}"


def _with(cell: Cell) -> str:
    return digits(cell.mean) + ("" if cell.interval is None else f" ± {digits(cell.interval)}")
