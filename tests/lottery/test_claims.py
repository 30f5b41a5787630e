"""Each kind of claim on numbers by hand, and what is said of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sparsetweaks.lottery.claims import POINTS, TIMES, Finding, accuracies, findings, verdict
from sparsetweaks.lottery.contrasts import Readings, readings
from sparsetweaks.lottery.figures import Claim, Reading
from sparsetweaks.lottery.smoothness import ALL, KEPT, Look
from sparsetweaks.lottery.summaries import Cell

RISE = Reading("rise", KEPT)
HIGHER = {"vanilla": (2.0, 4.0, 8.0), "swish": (1.0, 2.1, 3.9)}
OPPOSITE = "the opposite, beyond noise"
DIFFERENT = "not as in the paper: a difference, where it finds almost none"
ALIKE = "not as in the paper: almost no difference, where it finds one"
SLIGHTLY = ", but by less than counts as a difference"


def between(low: float, high: float) -> Cell:
    """Two seeds whose 95 % interval has these ends."""
    half = (
        (high - low) / 2 / 12.706
    )  # t of one degree of freedom; for two seeds the standard error is half of their gap
    return Cell({0: (low + high) / 2 - half, 1: (low + high) / 2 + half})


@pytest.mark.parametrize(
    ("expects", "low", "high", "words"),
    [
        ("higher", 0.1, 2.0, "in agreement"),
        ("higher", -2.0, -0.1, OPPOSITE),
        ("higher", -0.1, 2.0, "not settled"),
        ("lower", -2.0, -0.1, "in agreement"),
        ("lower", 0.1, 2.0, OPPOSITE),
        ("lower", -0.1, 0.1, "not settled"),
        ("higher", 0.1, 0.4, f"in agreement{SLIGHTLY}"),
        ("lower", 0.1, 0.4, f"{OPPOSITE}{SLIGHTLY}"),
        ("no lower", -0.4, 3.0, "in agreement"),
        ("no lower", -3.0, -0.6, OPPOSITE),
        ("no lower", -0.6, 3.0, "not settled"),
        ("equal", -0.4, 0.4, "in agreement"),
        ("equal", 0.1, 0.4, "in agreement"),  # a difference beyond noise, but a small one
        ("equal", 0.6, 0.9, DIFFERENT),
        ("equal", -0.9, -0.6, DIFFERENT),
        ("equal", 0.4, 0.6, "not settled"),
        ("equal", -1.4, 4.4, "not settled"),  # figure 9
        ("other", 0.6, 0.9, "in agreement"),
        ("other", -0.9, -0.6, "in agreement"),
        ("other", -0.4, 0.4, ALIKE),
        ("other", 0.1, 0.4, ALIKE),  # beyond noise, but small
        ("other", -0.6, 0.4, "not settled"),
    ],
)
def test_verdicts(expects: str, low: float, high: float, words: str) -> None:
    assert verdict(expects, [between(low, high)], POINTS) == words


def test_ratios_have_their_own_margin() -> None:
    within, above, below = (between(*ends) for ends in ((-0.1, 0.09), (0.1, 0.2), (-0.3, -0.11)))
    assert [verdict("equal", [each], TIMES) for each in (within, above, below)] == [
        "in agreement",
        DIFFERENT,
        DIFFERENT,
    ]
    assert verdict("higher", [between(0.01, 0.09)], TIMES) == f"in agreement{SLIGHTLY}"


def test_several_contrasts_have_to_hold_all() -> None:
    yes, no, open_ = between(1.0, 2.0), between(-2.0, -1.0), between(-1.0, 1.0)
    assert verdict("higher", [yes, yes], POINTS) == "in agreement"
    assert verdict("higher", [yes, open_], POINTS) == "not settled"
    assert verdict("higher", [yes, open_, no], POINTS) == "not as in the paper, beyond noise"
    assert verdict("higher", [yes, Cell({0: 1.0})], POINTS) == "one seed settles nothing"


# ------------------------------------------------------------------------------------------------- accuracies


@pytest.fixture
def summary() -> Readings:
    vanilla = {0.0: (90.0, 91.0), 0.5: (88.0, 89.0), 0.6: (86.0, 87.0), 0.9: (70.0, 71.0)}
    better = {0.0: (89.0, 90.0), 0.5: (89.0, 90.0), 0.6: (88.0, 89.0), 0.9: (76.0, 77.0)}
    named = {"vanilla": vanilla, "AT": better}
    return accuracies(
        {
            level: {name: Cell(dict(enumerate(levels[level]))) for name, levels in named.items()}
            for level in vanilla
        }
    )


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"at": "dense"}, "AT over vanilla in the dense network: -1.00 ± 0.00"),
        ({"at": "lowest"}, "AT over vanilla at 50 % sparsity: +1.00 ± 0.00"),
        ({"at": 0.62}, "AT over vanilla at 60 % sparsity: +2.00 ± 0.00"),
        ({"at": "highest"}, "AT over vanilla at 90 % sparsity: +6.00 ± 0.00"),
        ({}, "AT over vanilla on average over 3 sparsities: +3.00 ± 0.00"),
        (
            {"at": 0.6, "since": "dense"},
            "AT at 60 % sparsity over vanilla in the dense network: -2.00 ± 0.00",
        ),
        (
            {"kind": "growth", "at": "highest", "since": "lowest"},
            "AT over vanilla, its gain at 90 % sparsity less that at 50 % sparsity: +5.00 ± 0.00",
        ),
        (
            {"kind": "growth", "since": "dense"},
            "AT over vanilla, its gain on average over 3 sparsities less that in the dense network: +4.00 ± 0.00",
        ),
        (
            {"over": "AT", "at": "highest", "since": "lowest"},
            "AT at 90 % sparsity less that at 50 % sparsity: -13.00 ± 0.00",
        ),
    ],
)
def test_what_is_compared_is_what_is_claimed(given: dict[str, object], told: str, summary: Readings) -> None:
    claim = Claim("AT", **{"over": "vanilla", "words": "is better", **given})
    (found,) = findings([claim], summary, "a setting")
    assert found.ours == f"{told} points over 2 seeds"
    assert found.verdict == ("in agreement" if "+" in told else OPPOSITE)
    assert (
        found.line("4a")
        == f"Figure 4a, a setting: the paper says that AT is better. Here, {found[2]}; {found[3]}."
    )


def test_who_is_over_several_is_told_of_each(summary: Readings) -> None:
    for cells in summary.values():
        cells["TRT"] = Cell({seed: value + 1 for seed, value in cells["vanilla"].by_seed.items()})
    best = Claim("AT", "vanilla", "is the best", at="highest", rivals=("TRT",))
    (found,) = findings([best], summary, "")
    assert found.ours == (
        "AT at 90 % sparsity: +6.00 ± 0.00 points over vanilla, +5.00 ± 0.00 points over TRT, over 2 seeds"
    )
    assert found.verdict == "in agreement"


# ------------------------------------------------------------------------------------------------------ looks


def looks(values: dict[str, tuple[float, ...]], *, epoch: int = 0) -> list[Look]:
    return [
        Look(0.9, name, seed, epoch, {KEPT: {"rise": value}, ALL: {"rise": 1.5 * value}}, {})
        for name, each in values.items()
        for seed, value in enumerate(each)
    ]


def claim(expects: str, reading: Reading = RISE, **others: object) -> Claim:
    return Claim("swish", "vanilla", "is flatter", expects, at=0.91, reading=reading, **others)


def test_a_finding_names_both_spaces_and_where_they_differ() -> None:
    told, spaces = findings([claim("lower")], readings(looks(HIGHER)), "a setting")
    assert told.ours.startswith("the rise of swish (kept weights) is 0.50 times (0.4")
    assert "that of vanilla over 3 seeds at 90 % sparsity (means 2.33 beside 4.67)" in told.ours
    assert told.verdict == "in agreement"
    assert spaces.ours.startswith(
        "the rise of vanilla over all weights, pruned ones too, is 1.50 times (1.50 to 1.50)"
    )
    assert spaces.verdict == "the two spaces differ"
    assert spaces.line("2") == f"Figure 2, a setting: {spaces.ours}; the two spaces differ."
    apart = looks(HIGHER)
    for look in apart:
        if look.variant == "swish":
            look.numbers[ALL]["rise"] = 100.0
    told, _ = findings([claim("lower")], readings(apart), "a setting")
    assert told.verdict == "in agreement (over all weights: the opposite, beyond noise)"


def test_who_differs_least_differs_less_than_each() -> None:
    """Figure 5: halved is far from the base on its own side, farther than a tenth more, less far than a third."""
    values = {"vanilla": (2.0, 4.0, 8.0), "skips": (2.2, 4.3, 8.9), "scales": (0.7, 1.3, 2.7)}
    values |= {"smoothing": (1.0, 2.1, 3.9)}
    found = readings(looks(values))
    least, most = (
        Claim("smoothing", "vanilla", "", expects, kind="distance", at=0.9, rivals=rivals, reading=RISE)
        for expects, rivals in (("lower", ("skips", "scales")), ("higher", ("skips",)))
    )
    told, told_most, _ = findings([least, most], found, "")
    assert told.ours.startswith(
        "the rise of smoothing (kept weights) is a factor of 1.98 from that of vanilla, which is 1.81 times (1."
    )
    assert "that of skips, 0.67 times (0.5" in told.ours and "that of scales, over 3 seeds" in told.ours
    assert told.verdict == "not as in the paper, beyond noise"
    assert told_most.verdict == "in agreement"


def test_the_first_and_the_last_epoch_are_found() -> None:
    path = looks(HIGHER, epoch=1) + looks({"vanilla": (1.0, 1.0), "swish": (3.0, 3.0)}, epoch=9)
    first, last, _ = findings(
        [claim("lower", replace(RISE, epoch=epoch)) for epoch in ("first", "last")], readings(path), ""
    )
    assert "after epoch 1" in first.ours and first.verdict == "in agreement"
    assert "3.00 times" in last.ours and "after epoch 9" in last.ours and last.verdict == OPPOSITE


def test_numbers_that_have_no_ratio_are_told_as_they_are() -> None:
    seen = looks({"vanilla": (1.0, 2.0), "swish": (0.0, 1.0)})
    told, spaces = findings([claim("lower")], readings(seen), "")
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
    reading = Reading("zeros", "last stage", against="stage 1")
    (told,) = findings([Claim("vanilla", "vanilla", "grows", at=0.9, reading=reading)], readings(seen), "")
    assert "of vanilla (stage 2)" in told.ours and "that of vanilla (stage 1)" in told.ours
    assert "(means 5.00 beside 3.00)" in told.ours
