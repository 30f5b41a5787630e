"""Numbers across seeds against numbers by hand, and what is said of them."""

from __future__ import annotations

import math

import pytest

from sparsetweaks.lottery.contrasts import (
    Finding,
    Place,
    Ratio,
    findings,
    geometric,
    judged,
    ratio,
    readings,
    rows_of,
    table_of,
)
from sparsetweaks.lottery.figures import Contrast
from sparsetweaks.lottery.results import Cell
from sparsetweaks.lottery.smoothness import ALL, KEPT, Look

HIGHER = {"vanilla": (2.0, 4.0, 8.0), "swish": (1.0, 2.1, 3.9)}


def looks(values: dict[str, tuple[float, ...]], *, more: float = 1.5, epoch: int = 0) -> list[Look]:
    return [
        Look(0.9, name, seed, epoch, {KEPT: {"rise": value}, ALL: {"rise": more * value}}, {})
        for name, each in values.items()
        for seed, value in enumerate(each)
    ]


def contrast(expects: str, **others: str) -> Contrast:
    return Contrast("swish", "vanilla", "is flatter", "rise", expects, KEPT, **others)


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


@pytest.mark.parametrize(
    ("expects", "low", "high", "words"),
    [
        ("lower", 0.5, 0.9, "in agreement"),
        ("lower", 1.1, 2.0, "the opposite, beyond noise"),
        ("higher", 1.1, 2.0, "in agreement"),
        ("higher", 0.5, 0.9, "the opposite, beyond noise"),
        ("higher", 0.5, 1.9, "not settled"),
        ("other", 0.5, 0.9, "in agreement"),
        ("other", 0.5, 1.9, "not settled"),
        ("equal", 0.5, 1.9, "in agreement as far as that goes"),
        ("equal", 1.1, 1.9, "a difference, where the paper finds almost none"),
        ("lower", None, None, "one seed settles nothing"),
    ],
)
def test_verdicts(expects: str, low: float | None, high: float | None, words: str) -> None:
    assert judged(expects, Ratio(1.0, low, high, 3)).startswith(words)


def test_a_finding_names_both_spaces_and_where_they_differ() -> None:
    found = readings(looks(HIGHER))
    told, spaces = findings([contrast("lower")], found, "a setting", 0.9)
    assert told.ours.startswith("the rise of swish (kept weights) is 0.50 times (0.4")
    assert "that of vanilla over 3 seeds at 90 % sparsity (means 2.33 beside 4.67)" in told.ours
    assert told.verdict == "in agreement"
    assert spaces.ours.startswith(
        "the rise of vanilla over all weights, pruned ones too, is 1.50 times (1.50 to 1.50)"
    )
    assert spaces.verdict == "the two spaces differ"
    assert told.line("2").startswith(
        "Figure 2, a setting: the paper says that swish is flatter. Here, the rise"
    )
    apart = looks(HIGHER)
    for look in apart:
        if look.variant == "swish":
            look.numbers[ALL]["rise"] = 100.0
    told, _ = findings([contrast("lower")], readings(apart), "a setting", 0.9)
    assert told.verdict == "in agreement (over all weights: the opposite, beyond noise)"


def test_the_first_and_the_last_epoch_are_found() -> None:
    path = looks(HIGHER, epoch=1) + looks({"vanilla": (1.0, 1.0), "swish": (3.0, 3.0)}, epoch=9)
    first, last = (
        findings([contrast("lower", epoch=epoch)], readings(path), "", 0.9)[0] for epoch in ("first", "last")
    )
    assert "after epoch 1" in first.ours and first.verdict == "in agreement"
    assert "3.00 times" in last.ours and "after epoch 9" in last.ours


def test_numbers_that_have_no_ratio_are_told_as_they_are() -> None:
    told, spaces = findings(
        [contrast("lower")], readings(looks({"vanilla": (1.0, 2.0), "swish": (0.0, 1.0)})), "", 0.9
    )
    assert told == Finding(
        "", "swish is flatter", "the rise of swish (kept weights) is 0.5 beside 1.5 for vanilla at 90 % sparsity",
        "no ratio, as some are not positive",
    )  # fmt: skip
    assert spaces.verdict == "the two spaces differ"


def test_another_space_of_the_same_network() -> None:
    numbers = {"stem": 1.0, "stage 1": 2.0, "stage 2": 4.0}
    seen = [
        Look(
            0.9, "vanilla", seed, 0, {space: {"zeros": value + seed} for space, value in numbers.items()}, {}
        )
        for seed in (0, 1, 2)
    ]
    deeper = Contrast("vanilla", "vanilla", "grows", "zeros", "higher", "last stage", against="stage 1")
    (told,) = findings([deeper], readings(seen), "", 0.9)
    assert "of vanilla (stage 2)" in told.ours and "that of vanilla (stage 1)" in told.ours


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
