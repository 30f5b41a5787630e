"""What looks at spent tickets say across seeds: ratios of one variant to another, paired by seed, as rows and in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sparsetweaks.lottery.figures import Contrast
from sparsetweaks.lottery.results import BASELINE, Cell, grid_of
from sparsetweaks.lottery.smoothness import ALL, BEST, KEPT, Look

SPACES = "over all weights"  # of the line that compares the two spaces


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
            return f"{_digits(self.mean)} times (one seed)"
        return f"{_digits(self.mean)} times ({_digits(self.low)} to {_digits(self.high)})"

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
    logs = []
    for each in (cell, over):
        if not all(value > 0 and math.isfinite(value) for value in each.by_seed.values()):
            return None
        logs.append(Cell({seed: math.log(value) for seed, value in each.by_seed.items()}))
    gain = logs[0].over(logs[1])
    if gain is None:
        return None
    wide = gain.interval
    low, high = (None if wide is None else math.exp(gain.mean + sign * wide) for sign in (-1, 1))
    return Ratio(math.exp(gain.mean), low, high, len(gain.by_seed))


def judged(expects: str, found: Ratio) -> str:
    """Whether a ratio bears a claim out, in words.

    Args:
        expects: of a `Contrast`.
        found: the ratio.

    Returns:
        A phrase.

    Example:
        >>> judged("lower", Ratio(0.5, 0.4, 0.6, 5)), judged("lower", Ratio(0.5, 0.2, 1.2, 5))
        ('in agreement', 'not settled: so few seeds show no difference beyond noise')
    """
    if found.low is None:
        return "one seed settles nothing"
    few = "so few seeds show no difference beyond noise"
    if found.side == 0:
        return f"in agreement as far as that goes: {few}" if expects == "equal" else f"not settled: {few}"
    if expects == "equal":
        return "a difference, where the paper finds almost none"
    if expects == "other":
        return "in agreement"
    return (
        "in agreement" if found.side == {"lower": -1, "higher": 1}[expects] else "the opposite, beyond noise"
    )


class Finding(NamedTuple):
    """What the paper says, what came out here, and whether that agrees."""

    setting: str
    paper: str
    ours: str
    verdict: str

    def line(self, figure: str) -> str:
        """All of it as one line of text."""
        says = f"the paper says that {self.paper}. Here, " if self.paper else ""
        return f"Figure {figure}, {self.setting}: {says}{self.ours}; {self.verdict}."


def findings(contrasts: Sequence[Contrast], found: Readings, setting: str, sparsity: float) -> list[Finding]:
    """What came of each contrast, and where the kept weights and all weights differ.

    Args:
        contrasts: of a figure.
        found: its readings.
        setting: network, data and recipe, in words.
        sparsity: at which to look.

    Returns:
        One finding for each contrast, and one for the two spaces where the measure has both.
    """
    told = [_finding(each, found, setting, sparsity) for each in contrasts]
    return told + ([_two_spaces(contrasts[-1], found, setting, sparsity)] if ALL in _spaces(found) else [])


def _finding(contrast: Contrast, found: Readings, setting: str, sparsity: float) -> Finding:
    epoch = _epoch(contrast, found)
    when = "" if epoch == BEST else f" after epoch {epoch}"
    space, against = (_resolved(each, found) for each in (contrast.space, contrast.against or contrast.space))
    said = f"{contrast.variant} {contrast.words}"
    where = f"at {100 * sparsity:.4g} % sparsity{when}"
    own, theirs = (found[Place(sparsity, epoch, each, contrast.quantity)] for each in (space, against))
    change = ratio(own[contrast.variant], theirs[contrast.over])
    of = f"the {contrast.quantity} of {contrast.variant} ({space}) is"
    than = f"that of {contrast.over}" + (f" ({against})" if against != space else "")
    if change is None:
        ours = f"{of} {own[contrast.variant].mean:.3g} beside {theirs[contrast.over].mean:.3g} for {contrast.over} {where}"
        return Finding(setting, said, ours, "no ratio, as some are not positive")
    means = " beside ".join(_digits(cell.mean) for cell in (own[contrast.variant], theirs[contrast.over]))
    ours = f"{of} {change} {than} over {change.seeds} seeds {where} (means {means})"
    verdict = judged(contrast.expects, change)
    if space == KEPT and ALL in _spaces(found):
        whole = found[Place(sparsity, epoch, ALL, contrast.quantity)]
        other = ratio(whole[contrast.variant], whole[contrast.over])
        if other is not None:
            ours += f", over all weights {other}"
            if other.side != change.side:
                verdict += f" (over all weights: {judged(contrast.expects, other)})"
    return Finding(setting, said, ours, verdict)


def _two_spaces(contrast: Contrast, found: Readings, setting: str, sparsity: float) -> Finding:
    """How much larger a quantity is where pruned weights may move too, for the untweaked network."""
    epoch = _epoch(contrast, found)
    kept, whole = (found[Place(sparsity, epoch, space, contrast.quantity)][BASELINE] for space in (KEPT, ALL))
    change = ratio(whole, kept)
    if change is None:
        return Finding(setting, "", f"the {contrast.quantity} has no ratio between spaces", "not comparable")
    ours = f"the {contrast.quantity} of {BASELINE} {SPACES}, pruned ones too, is {change} that over the kept ones"
    verdict = "the two spaces differ" if change.side else "the two spaces do not differ beyond noise"
    when = "" if epoch == BEST else f" after epoch {epoch}"
    return Finding(
        setting, "", f"{ours} over {change.seeds} seeds at {100 * sparsity:.4g} % sparsity{when}", verdict
    )


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
                    "mean": _digits(cell.mean),
                    "deviation": _digits(cell.deviation),
                    "interval": _digits(cell.interval),
                    "over": "" if change is None else over,
                    "ratio": "" if change is None else _digits(change.mean),
                    "ratio_low": "" if change is None else _digits(change.low),
                    "ratio_high": "" if change is None else _digits(change.high),
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


def _with(cell: Cell) -> str:
    return _digits(cell.mean) + ("" if cell.interval is None else f" ± {_digits(cell.interval)}")


def _spaces(found: Readings) -> Mapping[str, None]:
    return dict.fromkeys(place.space for place in found)


def _resolved(space: str, found: Readings) -> str:
    return (
        max(each for each in _spaces(found) if each.startswith("stage")) if space == "last stage" else space
    )


def _epoch(contrast: Contrast, found: Readings) -> int:
    epochs = sorted({place.epoch for place in found})
    return {"": BEST, "first": epochs[0], "last": epochs[-1]}[contrast.epoch]


def _digits(value: float | None) -> str:
    if value is None:
        return ""
    return (
        f"{value:.2f}" if 0.1 <= abs(value) < 10 else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    )
