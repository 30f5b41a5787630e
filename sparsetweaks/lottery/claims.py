"""What the paper says and what came out: the contrast that each claim asks for, and one verdict for all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from sparsetweaks.lottery.contrasts import (
    Place,
    Readings,
    digits,
    distance,
    gain,
    growth,
    logs,
    mean_of,
    ratio,
    times,
)
from sparsetweaks.lottery.figures import Claim, Reading
from sparsetweaks.lottery.smoothness import ALL, BEST, KEPT
from sparsetweaks.lottery.summaries import BASELINE, Cell, Summary

KINDS: dict[str, Callable[..., Cell | None]] = {"gain": gain, "growth": growth, "distance": distance}
EXPECTATIONS = {  # what is told where a contrast is beyond noise, and not what is expected
    "higher": "the opposite, beyond noise",
    "lower": "the opposite, beyond noise",
    "no lower": "the opposite, beyond noise",
    "equal": "not as in the paper: a difference, where it finds almost none",
    "other": "not as in the paper: almost no difference, where it finds one",
}
POINTS = (
    -0.5,
    0.5,
)  # of accuracy; what differs by less counts as equal. The paper names no margin: our choice
TIMES = (math.log(0.9), math.log(1.1))  # the same for ratios
ACCURACY = Reading().quantity


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


def verdict(expects: str, contrasts: Sequence[Cell], margin: tuple[float, float]) -> str:
    """Whether contrasts bear a claim out, by their 95 % intervals.

    "higher" and "lower" hold where the interval lies above or below zero, "equal" where it lies within the margin, and
    "other" where it lies outside; "no lower" holds where it lies above the margin's lower end. A difference that is beyond
    noise and yet within the margin is told as such: a few seeds that happen to agree make any interval narrow.

    Args:
        expects: a name of `EXPECTATIONS`.
        contrasts: by seed, in points or logarithms. Of several, each has to hold: the best is better than every other.
        margin: within which two count as equal, `POINTS` or `TIMES`.

    Returns:
        "in agreement" where all hold; what it is instead where one holds beyond noise that should not; else that it is
        not settled.

    Example:
        >>> better, about = Cell({0: 1.0, 1: 1.2, 2: 1.1}), Cell({0: -1.0, 1: 1.0, 2: 0.2})
        >>> verdict("higher", [better], POINTS), verdict("equal", [about], POINTS)
        ('in agreement', 'not settled')
    """
    ranges = [
        (each.mean - each.interval, each.mean + each.interval)
        for each in contrasts
        if each.interval is not None
    ]
    if len(ranges) < len(contrasts):
        return "one seed settles nothing"
    holds = [_holds(expects, low, high, margin) for low, high in ranges]
    if not all(holds) and False not in holds:
        return "not settled"
    least, most = margin
    slight = expects in ("higher", "lower") and all(least <= low and high <= most for low, high in ranges)
    words = (
        "in agreement"
        if all(holds)
        else EXPECTATIONS[expects]
        if len(holds) == 1
        else "not as in the paper, beyond noise"
    )
    return f"{words}, but by less than counts as a difference" if slight else words


def _holds(expects: str, low: float, high: float, margin: tuple[float, float]) -> bool | None:
    """Whether an interval lies where it should; None where it lies on both sides."""
    least, most = margin
    within, outside = least <= low and high <= most, high < least or low > most
    yes, no = {
        "higher": (low > 0, high < 0),
        "lower": (high < 0, low > 0),
        "no lower": (low >= least, high < least),
        "equal": (within, outside),
        "other": (outside, within),
    }[expects]
    return True if yes else False if no else None


def accuracies(summary: Summary) -> Readings:
    """Accuracies as readings, so that claims of them are judged like those of looks.

    Args:
        summary: of one setting, from `summarise`.

    Returns:
        By place and variant, percent by seed.

    Example:
        >>> accuracies({0.5: {"AT": Cell({0: 90.0})}})[Place(0.5, 0, "", "accuracy")]["AT"].mean
        90.0
    """
    return {Place(sparsity, BEST, "", ACCURACY): dict(cells) for sparsity, cells in summary.items()}


def findings(claims: Sequence[Claim], found: Readings, setting: str) -> list[Finding]:
    """What came of each claim, and where the kept weights and all weights differ.

    Args:
        claims: of a figure.
        found: its readings.
        setting: network, data and recipe, in words.

    Returns:
        One finding for each claim, and one for the two spaces where the measure has both.

    Example:
        >>> found = accuracies({0.5: {"vanilla": Cell({0: 90.0, 1: 91.0}), "AT": Cell({0: 92.0, 1: 93.0})}})
        >>> (told,) = findings([Claim("AT", "vanilla", "is better", at="highest")], found, "a setting")
        >>> told.ours, told.verdict
        ('AT over vanilla at 50 % sparsity: +2.00 ± 0.00 points over 2 seeds', 'in agreement')
    """
    told = [_finding(claim, found, setting) for claim in claims]
    return told + ([_two_spaces(claims[-1], found, setting)] if ALL in _spaces(found) else [])


def _finding(claim: Claim, found: Readings, setting: str) -> Finding:
    said, reading = f"{claim.variant} {claim.words}", claim.reading
    contrasts = _contrasts(claim, found, reading.space)
    if contrasts is None:
        return Finding(setting, said, _as_they_are(claim, found), "no ratio, as some are not positive")
    if reading.quantity == ACCURACY:
        ours = _in_points(claim, found, contrasts)
        return Finding(setting, said, ours, verdict(claim.expects, list(contrasts.values()), POINTS))
    ours = _in_times(claim, found, contrasts)
    judged = verdict(claim.expects, list(contrasts.values()), TIMES)
    whole = _contrasts(claim, found, ALL) if reading.space == KEPT and ALL in _spaces(found) else None
    if whole is not None:
        ours += f", over all weights {', '.join(str(times(each)) for each in whole.values())}"
        other = verdict(claim.expects, list(whole.values()), TIMES)
        judged += f" (over all weights: {other})" if other != judged else ""
    return Finding(setting, said, ours, judged)


def _contrasts(claim: Claim, found: Readings, space: str) -> dict[str, Cell] | None:
    """What a claim asks for, by whom it is over; None where a number has no logarithm."""
    at, since, against = claim.at, _since(claim), claim.reading.against or space
    made = {}
    for name in claim.rivals if claim.kind == "distance" else (claim.over, *claim.rivals):
        own, theirs = (claim.variant, at, space), (name, at, against)
        before = (claim.variant, since, space), (name, since, against)
        wanted = {
            "gain": (own, before[1]),
            "growth": (own, theirs, *before),
            "distance": (own, theirs, (claim.over, at, against)),
        }[claim.kind]
        cells = [_cell(found, claim.reading, *each) for each in wanted]
        if None in cells:
            return None
        contrast = KINDS[claim.kind](*cells)
        assert contrast is not None, "each variant has each seed"
        made[name] = contrast
    return made


def _cell(found: Readings, reading: Reading, name: str, at: str | float, space: str) -> Cell | None:
    """A variant's numbers by seed, as points or logarithms; None where one has no logarithm."""
    cells = _numbers(found, reading, name, at, space)
    if reading.quantity == ACCURACY:
        return mean_of(cells)
    scaled = [logs(cell) for cell in cells]
    known = [cell for cell in scaled if cell is not None]
    return mean_of(known) if len(known) == len(scaled) else None


def _numbers(found: Readings, reading: Reading, name: str, at: str | float, space: str) -> list[Cell]:
    """A variant's numbers by seed, of each sparsity that is meant."""
    epoch, space = _epoch(reading, found), _resolved(space, found)
    return [found[Place(level, epoch, space, reading.quantity)][name] for level in _levels(found, at)]


def _levels(found: Readings, at: str | float) -> list[float]:
    sparse = sorted({place.sparsity for place in found} - {0.0})
    if isinstance(at, float):
        return [min(sparse, key=lambda level: abs(level - at))]
    return {"dense": [0.0], "lowest": sparse[:1], "highest": sparse[-1:], "sparse": sparse}[at]


def _since(claim: Claim) -> str | float:
    return claim.at if claim.since is None else claim.since


def _spaces(found: Readings) -> dict[str, None]:
    return dict.fromkeys(place.space for place in found)


def _resolved(space: str, found: Readings) -> str:
    deepest = max((each for each in _spaces(found) if each.startswith("stage")), default="")
    return deepest if space == "last stage" else space


def _epoch(reading: Reading, found: Readings) -> int:
    epochs = sorted({place.epoch for place in found})
    return {"": BEST, "first": epochs[0], "last": epochs[-1]}[reading.epoch]


def _seeds(number: int) -> str:
    return f"{number} seed{'' if number == 1 else 's'}"


def _where(found: Readings, at: str | float, reading: Reading) -> str:
    levels, epoch = _levels(found, at), _epoch(reading, found)
    when = "" if epoch == BEST else f" after epoch {epoch}"
    if at == "dense":
        return f"in the dense network{when}"
    if len(levels) > 1:
        return f"on average over {len(levels)} sparsities{when}"
    return f"at {100 * levels[0]:.4g} % sparsity{when}"


def _in_points(claim: Claim, found: Readings, contrasts: Mapping[str, Cell]) -> str:
    """Contrasts of accuracies in words."""
    at, since = (_where(found, each, claim.reading) for each in (claim.at, _since(claim)))
    seeds = len(contrasts[claim.over].by_seed)
    told = {name: f"{each.mean:+.2f}{_width(each)}" for name, each in contrasts.items()}
    if claim.rivals:
        over = ", ".join(f"{each} points over {name}" for name, each in told.items())
        return f"{claim.variant} {at}: {over}, over {_seeds(seeds)}"
    if claim.kind == "growth":
        pair = f"{claim.variant} over {claim.over}, its gain {at} less that {since}"
    elif claim.since is None:
        pair = f"{claim.variant} over {claim.over} {at}"
    elif claim.variant == claim.over:
        pair = f"{claim.variant} {at} less that {since}"
    else:
        pair = f"{claim.variant} {at} over {claim.over} {since}"
    return f"{pair}: {told[claim.over]} points over {_seeds(seeds)}"


def _in_times(claim: Claim, found: Readings, contrasts: Mapping[str, Cell]) -> str:
    """Contrasts of logarithms in words: ratios, or those of the factors by which two differ from a third."""
    reading = claim.reading
    assert claim.kind != "growth", "no claim is about how a ratio changes"
    ratios = {name: times(each) for name, each in contrasts.items()}
    seeds = next(iter(ratios.values())).seeds
    where = f"over {_seeds(seeds)} {_where(found, claim.at, reading)}"
    if claim.kind == "distance":
        own, base = (
            _cell(found, reading, name, claim.at, reading.space) for name in (claim.variant, claim.over)
        )
        assert own is not None and base is not None, "there are contrasts"
        sizes = [abs(own.by_seed[seed] - base.by_seed[seed]) for seed in contrasts[claim.rivals[0]].by_seed]
        factor = digits(math.exp(sum(sizes) / seeds))
        others = ", ".join(f"{each} that of {name}" for name, each in ratios.items())
        return f"{_subject(claim, found)} a factor of {factor} from that of {claim.over}, which is {others}, {where}"
    space, against = (_resolved(each, found) for each in (reading.space, reading.against or reading.space))
    there = f" ({against})" if against != space else ""
    others = ", ".join(f"{each} that of {name}{there}" for name, each in ratios.items())
    means = " beside ".join(digits(mean) for mean in _means(claim, found))
    return f"{_subject(claim, found)} {others} {where} (means {means})"


def _as_they_are(claim: Claim, found: Readings) -> str:
    own, theirs = _means(claim, found)
    where = _where(found, claim.at, claim.reading)
    return f"{_subject(claim, found)} {own:.3g} beside {theirs:.3g} for {claim.over} {where}"


def _means(claim: Claim, found: Readings) -> tuple[float, float]:
    reading = claim.reading
    own = _numbers(found, reading, claim.variant, claim.at, reading.space)
    theirs = _numbers(found, reading, claim.over, _since(claim), reading.against or reading.space)
    return mean_of(own).mean, mean_of(theirs).mean


def _subject(claim: Claim, found: Readings) -> str:
    return f"the {claim.reading.quantity} of {claim.variant} ({_resolved(claim.reading.space, found)}) is"


def _width(cell: Cell) -> str:
    return "" if cell.interval is None else f" ± {cell.interval:.2f}"


def _two_spaces(claim: Claim, found: Readings, setting: str) -> Finding:
    """How much larger a quantity is where pruned weights may move too, for the untweaked network."""
    reading = claim.reading
    whole, kept = (mean_of(_numbers(found, reading, BASELINE, claim.at, space)) for space in (ALL, KEPT))
    change = ratio(whole, kept)
    if change is None:
        return Finding(setting, "", f"the {reading.quantity} has no ratio between spaces", "not comparable")
    ours = (
        f"the {reading.quantity} of {BASELINE} over all weights, pruned ones too, is {change} that over the kept ones "
        f"over {_seeds(change.seeds)} {_where(found, claim.at, reading)}"
    )
    differ = "the two spaces differ" if change.side else "the two spaces do not differ beyond noise"
    return Finding(setting, "", ours, differ)
