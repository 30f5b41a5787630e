"""Numbers across seeds against numbers by hand."""

from __future__ import annotations

import math

import pytest

from sparsetweaks.lottery.contrasts import (
    Place,
    Ratio,
    digits,
    distance,
    gain,
    geometric,
    growth,
    logs,
    mean_of,
    ratio,
    readings,
    rows_of,
    table_of,
    times,
)
from sparsetweaks.lottery.smoothness import ALL, KEPT, Look
from sparsetweaks.lottery.summaries import Cell

HIGHER = {"vanilla": (2.0, 4.0, 8.0), "swish": (1.0, 2.1, 3.9)}


def looks(values: dict[str, tuple[float, ...]]) -> list[Look]:
    return [
        Look(0.9, name, seed, 0, {KEPT: {"rise": value}, ALL: {"rise": 1.5 * value}}, {})
        for name, each in values.items()
        for seed, value in enumerate(each)
    ]


def test_ratios_are_geometric_and_paired_by_seed() -> None:
    found = ratio(Cell({0: 1.0, 1: 8.0, 2: 2.0}), Cell({0: 2.0, 1: 4.0, 3: 9.0}))
    assert found.seeds == 2
    assert found.mean == pytest.approx(1.0)  # halved for one seed, doubled for the other
    half = 12.706 * math.log(2) * math.sqrt(2) / math.sqrt(2)
    assert math.log(found.high) == pytest.approx(half)
    assert math.log(found.low) == pytest.approx(-half)
    assert ratio(Cell({0: 1.0}), Cell({1: 1.0})) is None
    assert ratio(Cell({0: 0.0}), Cell({0: 1.0})) is None
    assert ratio(Cell({0: math.inf}), Cell({0: 1.0})) is None
    assert str(ratio(Cell({0: 1.0}), Cell({0: 2.0}))) == "0.50 times (one seed)"


def test_a_ratio_has_a_side_where_its_interval_has_one() -> None:
    assert [Ratio(1.0, *ends, 3).side for ends in ((0.5, 0.9), (1.1, 2.0), (0.5, 2.0), (None, None))] == [
        -1,
        1,
        0,
        0,
    ]


def test_contrasts_are_taken_seed_by_seed() -> None:
    own, theirs = Cell({0: 5.0, 1: 9.0, 2: 1.0}), Cell({0: 2.0, 1: 10.0, 3: 7.0})
    assert gain(own, theirs).by_seed == {0: 3.0, 1: -1.0}
    assert gain(own, Cell({7: 1.0})) is None
    before, theirs_before = Cell({0: 8.0, 1: 8.0}), Cell({0: 9.0, 1: 7.0})
    assert growth(own, theirs, before, theirs_before).by_seed == {0: 4.0, 1: -2.0}
    assert growth(own, theirs, before, Cell({7: 1.0})) is None
    fall = Cell({0: 5.0 - 8.0, 1: 9.0 - 8.0})
    theirs_fall = Cell({0: 2.0 - 9.0, 1: 10.0 - 7.0})
    assert growth(own, theirs, before, theirs_before) == gain(fall, theirs_fall)  # who falls less gains


def test_a_distance_counts_on_both_sides() -> None:
    base = Cell({0: 1.0, 1: 1.0})
    assert distance(Cell({0: -2.0, 1: 4.0}), Cell({0: 2.0, 1: 0.0}), base).by_seed == {0: 2.0, 1: 2.0}
    assert distance(base, Cell({0: 2.0, 1: -1.0}), base).by_seed == {0: -1.0, 1: -2.0}
    assert distance(base, Cell({7: 1.0}), base) is None
    twice, half = (logs(Cell({0: value, 1: value})) for value in (2.0, 0.5))
    assert times(distance(twice, half, logs(base))).mean == pytest.approx(1.0)  # doubled is as far as halved


def test_means_and_logarithms() -> None:
    assert mean_of([Cell({0: 1.0, 1: 5.0}), Cell({0: 3.0, 1: 7.0, 2: 0.0})]).by_seed == {0: 2.0, 1: 6.0}
    assert logs(Cell({0: math.e})).by_seed == {0: pytest.approx(1.0)}
    assert logs(Cell({0: 1.0, 1: 0.0})) is None
    assert digits(0.0) == "0" and digits(999.9) == "1,000" and digits(1234.5) == "1,234"


def test_rows_and_table_hold_every_number() -> None:
    found = readings(looks(HIGHER))
    rows = rows_of(found, "a setting")
    assert len(rows) == 4
    row = next(row for row in rows if row["variant"] == "swish" and row["space"] == KEPT)
    assert (row["mean"], row["seeds"], row["over"], row["ratio"]) == ("2.33", 3, "vanilla", "0.50")
    assert row["by_seed"] == "0:1 1:2.1 2:3.9"
    assert row["epoch"] == "best"
    table = table_of(found, ["rise"])
    assert len(table.splitlines()) == 4
    assert "| kept weights | rise     | 90 %     | best  |" in table
    assert geometric(Cell({0: 1.0, 1: 4.0}))[0] == pytest.approx(2.0)
    assert geometric(Cell({0: 3.0})) == (pytest.approx(3.0),) * 3
    assert Place(0.9, 0, KEPT, "rise") in found
