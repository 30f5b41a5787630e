from __future__ import annotations

import math
import multiprocessing
import os
import time
from functools import partial
from pathlib import Path

import matplotlib
import pytest

from sparsetweaks.lottery.config import LotteryError, Network, Recipe
from sparsetweaks.lottery.experiment import Experiment, Source, compare
from sparsetweaks.lottery.grid import run_all
from sparsetweaks.lottery.plots import picture, plot
from sparsetweaks.lottery.rows import LATER, append_row, kept_runs, read_rows
from sparsetweaks.lottery.summaries import Cell, statistics, summarise, t_quantile
from sparsetweaks.lottery.tables import table


def row(variant: str, sparsity: float, seed: int, test: float) -> dict[str, object]:
    setting = {
        "data": "digits",
        "architecture": "resnet8",
        "width": 8,
        "epochs": 2,
        "image_size": 8,
        "train_images": 9,
    }
    return {
        **setting,
        "run": f"{variant}{sparsity}{seed}",
        "variant": variant,
        "sparsity": sparsity,
        "seed": seed,
        "test": test,
    }


ROWS = [
    row(name, sparsity, seed, base - sparsity / 10 + seed / 100)
    for name, base in (("vanilla", 0.9), ("AT", 0.92))
    for sparsity in (0.5, 0.9)
    for seed in (0, 1, 2)
] + [row("vanilla", 0.0, seed, 0.95) for seed in (0, 1, 2)]


def test_rows_come_back_and_a_run_counts_once(tmp_path: Path) -> None:
    for each in [*ROWS, ROWS[0]]:
        append_row(tmp_path / "new" / "rows.csv", each)
    back = read_rows(tmp_path / "new" / "rows.csv")
    assert [each["run"] for each in back] == [each["run"] for each in ROWS]


def test_no_file_has_no_rows(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "rows.csv") == []


def test_rows_of_other_columns_are_not_mixed_in(tmp_path: Path) -> None:
    append_row(tmp_path / "rows.csv", {"run": 1, "test": 0.5})
    with pytest.raises(LotteryError, match="has other columns than these results"):
        append_row(tmp_path / "rows.csv", {"run": 1, "accuracy": 0.5})
    (tmp_path / "rows.csv").write_bytes(b"\xff\xfe\x00\n")
    with pytest.raises(LotteryError, match="has other columns than these results"):
        append_row(tmp_path / "rows.csv", {"run": 1, "test": 0.5})


def test_a_file_of_an_earlier_version_goes_on_without_the_later_columns(tmp_path: Path) -> None:
    earlier = {"run": "1", "variant": "AT", "test": "0.5"}
    now = {"run": "2", "variant": "AT", **dict.fromkeys(LATER, "7"), "test": "0.6"}
    append_row(tmp_path / "old.csv", earlier)
    append_row(tmp_path / "old.csv", now)
    assert read_rows(tmp_path / "old.csv") == [earlier, {"run": "2", "variant": "AT", "test": "0.6"}]
    append_row(tmp_path / "new.csv", now)
    append_row(tmp_path / "new.csv", now | {"run": "3"})
    assert read_rows(tmp_path / "new.csv") == [now, now | {"run": "3"}]
    with pytest.raises(LotteryError, match="has other columns than these results"):
        append_row(tmp_path / "new.csv", earlier)


@pytest.mark.parametrize(
    "content", [b"run,variant\na\n", b"hello\nworld\n", b"\xff\xfe\x00", b"run,variant\na,b,c\n"]
)
def test_broken_rows_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "rows.csv").write_bytes(content)
    with pytest.raises(LotteryError, match="not a CSV file of results"):
        read_rows(tmp_path / "rows.csv")


def test_the_interval_is_students() -> None:
    cell = Cell({0: 90.0, 1: 92.0, 2: 94.0})
    assert cell.mean == 92
    assert cell.interval == pytest.approx(4.303 * 2 / math.sqrt(3))
    assert Cell({0: 90.0}).interval is None


def test_quantiles_agree_with_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for freedom in (*range(1, 40), 100, 1000):
        assert t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), abs=0.004)


def test_gains_are_paired_by_seed() -> None:
    ours, theirs = Cell({0: 91.0, 1: 81.0, 2: 71.0}), Cell({0: 90.0, 1: 80.0, 3: 0.0})
    gain = ours.over(theirs)
    assert gain is not None
    assert (gain.mean, gain.interval) == (1.0, 0.0)
    assert ours.over(Cell({7: 1.0})) is None


def test_the_table_has_a_line_per_sparsity_and_a_column_per_variant() -> None:
    (text,) = map(table, summarise(ROWS).values())
    accuracy, gain, note = text.split("\n\n")
    lines = [line.split("|")[1:-1] for line in accuracy.splitlines()]
    assert [cell.strip() for cell in lines[0]] == ["test accuracy, %", "vanilla", "AT"]
    assert [line[0].strip() for line in lines[2:]] == ["dense", "50 % sparse", "90 % sparse"]
    assert lines[2][2].strip() == ""  # dense has no AT
    assert lines[3][1].strip() == "86.0 ± 2.5"
    assert "+2.0 ± 0.0" in gain
    assert "3 seeds" in note
    assert len({len(line) for line in accuracy.splitlines()}) == 1  # aligned


def test_settings_are_kept_apart() -> None:
    assert len(summarise([*ROWS, {**ROWS[0], "epochs": 3}])) == 2


def test_the_picture_is_drawn_without_choosing_a_backend(tmp_path: Path) -> None:
    before = (
        matplotlib.rcParams._get_backend_or_none()
        if hasattr(matplotlib.rcParams, "_get_backend_or_none")
        else None
    )
    plot(summarise(ROWS), tmp_path / "new" / "a.png")
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")
    if hasattr(matplotlib.rcParams, "_get_backend_or_none"):
        assert matplotlib.rcParams._get_backend_or_none() == before


def test_nothing_to_draw_says_so(tmp_path: Path) -> None:
    with pytest.raises(LotteryError, match="no results of sparse networks"):
        plot(summarise([row("vanilla", 0.0, 0, 0.9)]), tmp_path / "a.png")


def test_runs_side_by_side_give_what_runs_one_by_one_give() -> None:
    tasks = [partial(math.sqrt, number) for number in range(5)]
    assert list(run_all(tasks)) == sorted(run_all(tasks, processes=2))
    assert not multiprocessing.active_children()


def test_an_error_in_a_process_arrives_here() -> None:
    with pytest.raises(ValueError, match=r"math domain error|nonnegative"):
        list(run_all([partial(math.sqrt, -1.0)], processes=2))
    assert not multiprocessing.active_children()


def test_a_process_that_is_ended_from_outside_is_told() -> None:
    with pytest.raises(LotteryError, match="a process was ended from outside"):
        list(run_all([partial(os._exit, 9)], processes=2))


def test_processes_end_when_nobody_waits_for_them() -> None:
    started = time.monotonic()
    runs = run_all([partial(time.sleep, 0), partial(time.sleep, 600)], processes=2)
    next(runs)
    runs.close()
    assert time.monotonic() - started < 120
    assert not multiprocessing.active_children()


# --------------------------------------------------------------------------------------------------- statistics


def test_statistics_agree_with_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    numpy = pytest.importorskip("numpy")
    rng = numpy.random.default_rng(0)
    seeds = range(7)
    tests = {name: rng.normal(0.9, 0.02, len(seeds)) for name in ("vanilla", "AT")}
    rows = [row(name, 0.5, seed, tests[name][seed]) for name in tests for seed in seeds]
    (vanilla, tweaked) = statistics(rows)
    for line, name in ((vanilla, "vanilla"), (tweaked, "AT")):
        values = 100 * tests[name]
        low, high = stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))
        assert line["mean"] == pytest.approx(values.mean(), abs=1e-3)
        assert line["deviation"] == pytest.approx(numpy.std(values, ddof=1), abs=1e-3)
        assert line["interval"] == pytest.approx((high - low) / 2, abs=2e-3)
    paired = stats.ttest_rel(100 * tests["AT"], 100 * tests["vanilla"])
    low, high = paired.confidence_interval(0.95)
    assert tweaked["gain"] == pytest.approx((low + high) / 2, abs=1e-3)
    assert tweaked["gain_interval"] == pytest.approx((high - low) / 2, abs=2e-3)
    assert (tweaked["over"], tweaked["pairs"], vanilla["gain"]) == ("vanilla", 7, "")


def test_gains_may_be_over_another_variant_and_of_the_seeds_in_common() -> None:
    rows = [row("rewinding", 0.5, seed, 0.8) for seed in (0, 1, 2)]
    rows += [row("AT", 0.5, seed, 0.8 + seed / 100) for seed in (1, 2, 3)]
    line = next(line for line in statistics(rows, over="rewinding") if line["variant"] == "AT")
    assert (line["pairs"], line["gain"], line["seeds"]) == (2, 1.5, 3)


def test_one_seed_gives_no_interval() -> None:
    (line,) = statistics([row("vanilla", 0.5, 0, 0.9)])
    assert (line["mean"], line["deviation"], line["interval"]) == (90.0, "", "")


def test_tickets_drawn_in_different_ways_are_not_mixed_and_share_the_dense_network() -> None:
    rows = [
        {**each, "drawn": "none" if not each["sparsity"] else way} for way in ("imp", "omp") for each in ROWS
    ]
    settings = summarise(rows)
    assert [title.rpartition(", ")[2] for title in settings] == [
        "iterative magnitude pruning",
        "one-shot magnitude pruning",
    ]
    assert all(0.0 in summary and len(summary) == 3 for summary in settings.values())


def test_recipes_that_differ_are_not_mixed() -> None:
    settings = summarise([{**each, "recipe": recipe} for recipe in ("aaa", "bbb") for each in ROWS])
    assert [title.rpartition(", ")[2] for title in settings] == ["recipe aaa", "recipe bbb"]


# ------------------------------------------------------------------------------------- tickets that are not alike


def spent(
    variant: str, ticket: str, seeds: tuple[int, int], test: float, **more: object
) -> dict[str, object]:
    """A row of a ticket with a seed of its own."""
    told = {"ticket": ticket, "ticket_seed": seeds[0], "run": f"{ticket}{seeds}{variant}", "drawn": "random"}
    return {**row(variant, 0.8, seeds[1], test), **told, **more}


def test_two_tickets_never_share_a_cell() -> None:
    one, other = spent("vanilla", "aaa", (0, 0), 0.9), spent("vanilla", "bbb", (0, 0), 0.5)
    with pytest.raises(
        LotteryError, match=r"two tickets in one cell, aaa and bbb .*80 % sparse, seed 0, vanilla"
    ):
        summarise([one, other])
    with pytest.raises(
        LotteryError, match="two tickets in one cell"
    ):  # nor a row, though nothing is overwritten
        summarise([one, spent("AT", "bbb", (0, 0), 0.5)])
    with pytest.raises(LotteryError, match="two tickets in one cell"):
        summarise([one, spent("vanilla", "bbb", (0, 1), 0.5)])
    with pytest.raises(LotteryError, match=r"two runs in one cell, x and y .*--out"):
        summarise([{**one, "run": "x"}, {**one, "run": "y"}])


@pytest.mark.parametrize(
    ("told", "titles"),
    [
        (("drawn", "random", "random by erk"), ["random", "random by erk"]),
        (
            ("drawn", "file a.pt 123456", "file b.pt 654321"),
            ["masks from a.pt 123456", "masks from b.pt 654321"],
        ),
        (("drawing", "abc123", "def456"), ["random (drawing abc123)", "random (drawing def456)"]),
    ],
)
def test_tickets_that_say_what_they_are_are_kept_apart(told: tuple, titles: list[str]) -> None:
    name, *values = told
    rows = [
        spent("vanilla", value, (0, 0), 0.5 + at / 10, **{name: value}) for at, value in enumerate(values)
    ]
    dense = {
        **row("vanilla", 0.0, 0, 0.9),
        "drawn": "none",
        "drawing": "",
        "ticket": "dense",
        "ticket_seed": 0,
    }
    settings = summarise([*rows, dense])
    assert [title.rpartition("), ")[2] for title in settings] == titles
    means = [summary[0.8]["vanilla"].mean for summary in settings.values()]
    assert means == pytest.approx([50, 60])
    assert all(summary[0.0]["vanilla"].mean == 90 for summary in settings.values())
    assert len(statistics([*rows, dense])) == 4


def test_trainings_are_paired_by_ticket_and_seed() -> None:
    """Tickets of two seeds, each trained with three: no number is lost, and each gain is of one ticket."""
    base = {(ticket, seed): 0.5 + ticket / 10 + seed / 100 for ticket in (0, 1) for seed in (7, 8, 9)}
    gains = {0: 0.02, 1: 0.04}
    rows = [spent("vanilla", f"t{seeds[0]}", seeds, test) for seeds, test in base.items()]
    rows += [spent("AT", f"t{seeds[0]}", seeds, test + gains[seeds[0]]) for seeds, test in base.items()]
    (summary,) = summarise(rows).values()
    vanilla, tweaked = summary[0.8]["vanilla"], summary[0.8]["AT"]
    assert len(vanilla.by_seed) == 6
    assert vanilla.mean == pytest.approx(63)
    gain = tweaked.over(vanilla)
    assert gain is not None
    assert gain.sample == pytest.approx([2, 4])  # a ticket's trainings are no independent sample
    assert gain.interval == pytest.approx(12.706 * math.sqrt(2) / math.sqrt(2))
    assert "over 2 tickets (the means of 3 trainings of each)" in table(summary)
    told = {line["variant"]: line for line in statistics(rows)}["AT"]
    assert [told[name] for name in ("seeds", "tickets", "trainings", "pairs")] == [2, 2, 6, 2]


def test_trainings_of_one_ticket_are_called_so() -> None:
    rows = [spent("vanilla", "t", (0, seed), 0.5 + seed / 100) for seed in (0, 1, 2)]
    (summary,) = summarise(rows).values()
    assert "over 3 trainings of one ticket" in table(summary)
    assert summary[0.8]["vanilla"].interval == pytest.approx(4.303 * 1 / math.sqrt(3))
    (line,) = statistics(rows)
    assert (line["seeds"], line["tickets"], line["trainings"]) == (3, 1, 3)


def test_rows_of_another_version_are_found_before_the_training(tmp_path: Path) -> None:
    for each in ROWS[:2]:
        append_row(tmp_path / "results.csv", each)
    with pytest.raises(LotteryError, match=r"say no ticket, .* another version of sparsetweaks wrote them"):
        kept_runs(tmp_path / "results.csv")
    experiment = Experiment(
        ("vanilla",), Source("digits"), Network("resnet8", 4), Recipe(epochs=1), 1, 0.5, (0,)
    )
    with pytest.raises(LotteryError, match=r"say no ticket, .* move results.csv away"):
        compare(experiment, tmp_path, on_epoch=lambda _: pytest.fail("it trained"))
    new = {**ROWS[0], "ticket": "a", "ticket_seed": 0, "drawing": ""}
    append_row(tmp_path / "new.csv", new)
    assert kept_runs(tmp_path / "new.csv") == {(new["run"], "vanilla")}


def test_rows_from_before_tickets_had_names_are_read() -> None:
    """Those that are committed, of one ticket and one training per seed."""
    (summary,) = summarise(
        [{key: value for key, value in each.items() if key != "run"} for each in ROWS]
    ).values()
    assert "over 3 seeds" in table(summary)


def sparse_row(sparsity: float, **more: object) -> dict[str, object]:
    row: dict[str, object] = {"data": "digits", "architecture": "resnet8", "width": 8, "epochs": 2}
    row |= {
        "image_size": 8,
        "train_images": 99,
        "variant": "AT",
        "seed": 0,
        "test": 0.5,
        "sparsity": sparsity,
    }
    return row | {"ticket": f"t{sparsity}", "run": f"r{sparsity}", **more}


def test_many_levels_are_told_apart() -> None:
    rows = [sparse_row(round(1 - 0.8**level, 6)) for level in range(1, 45)]
    (summary,) = summarise(rows).values()
    assert len(summary) == 44 and 0.2 in summary and 0.36 in summary


def test_other_images_of_the_same_name_are_another_setting() -> None:
    rows = [sparse_row(0.5, fingerprint=each, ticket=each, run=each) for each in ("aa", "bb")]
    assert [title.rpartition(", ")[2] for title in summarise(rows)] == ["of images aa", "of images bb"]
    assert all("of images" not in title for title in summarise(rows[:1]))


def test_a_name_with_dollars_is_drawn_as_it_is() -> None:
    rows = [sparse_row(sparsity, drawn=r"file a$\\foo$") for sparsity in (0.5, 0.8)]
    assert picture(summarise(rows))[1:4] == b"PNG"


def test_a_last_line_cut_off_within_a_letter_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    for run in "12":
        append_row(path, {"run": run, "variant": "vanilla", "data": "données"})
    content = path.read_bytes()
    path.write_bytes(content[: content.rfind(b"\xc3") + 1])
    assert [row["run"] for row in read_rows(path)] == ["1"]


def test_the_note_tells_over_how_many_pairs_the_gains_are() -> None:
    vanilla, at = Cell({0: 90.0, 1: 91.0, 2: 92.0}), Cell({1: 92.0, 2: 93.5, 3: 80.0})
    assert table({0.5: {"vanilla": vanilla, "AT": at}}).endswith(
        "over 3 seeds; gains are paired by seed, over 2 seeds"
    )
