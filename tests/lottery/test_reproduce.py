from __future__ import annotations

import csv
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sparsetweaks.lottery.claims import EXPECTATIONS, KINDS, accuracies, findings
from sparsetweaks.lottery.config import LotteryError, Network, Recipe, RunError, variant
from sparsetweaks.lottery.experiment import Experiment, Source, compare
from sparsetweaks.lottery.figures import FIGURES, PRESETS
from sparsetweaks.lottery.files import save
from sparsetweaks.lottery.report import report
from sparsetweaks.lottery.reproduce import experiments, overview, reproduce
from sparsetweaks.lottery.rows import read_rows
from sparsetweaks.lottery.summaries import summarise
from sparsetweaks.lottery.train import load_trained, save_trained
from sparsetweaks.lottery.train import train as real_train

RECIPE = Recipe(epochs=2, batch_size=64, precision="float32")
NETWORK = Network("resnet8", width=4)
DIGITS = Source("digits", limit=20)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The digits preset, in no time."""
    preset = replace(
        PRESETS["digits"],
        networks=(NETWORK, Network("plain8", width=4)),
        recipe=RECIPE,
        levels=1,
        seeds=(0, 1),
        sources=(DIGITS, Source("digits", limit=25)),
        scales={"iterations": 1},
    )
    monkeypatch.setitem(PRESETS, "digits", preset)


# ------------------------------------------------------------------------------------------------- comparisons


def test_one_shot_and_iterative_reach_the_same_sparsities(tmp_path: Path) -> None:
    both = {}
    for drawing in ("imp", "omp"):
        experiment = Experiment(("vanilla",), DIGITS, NETWORK, RECIPE, 2, 0.5, (0,), drawing=drawing)
        both[drawing] = compare(experiment, tmp_path / drawing)
    for rows in both.values():
        assert [row["sparsity"] for row in rows] == pytest.approx([0, 0.5, 0.75], abs=2e-3)
    assert [row["level"] for row in both["imp"]] == [0, 1, 2]
    assert {row["drawn"] for row in both["omp"][1:]} == {"omp"}


def test_stages_that_comparisons_share_are_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []

    def watch(*given: object, title: str, **options: object) -> object:
        trained.append(title)
        return real_train(*given, title=title, **options)

    monkeypatch.setattr("sparsetweaks.lottery.spend.train", watch)
    one = Experiment(("vanilla", "swish"), DIGITS, NETWORK, RECIPE, 2, 0.5, (0,))
    first = compare(one, tmp_path)
    assert len(trained) == len(set(trained)) == one.spendings == 5
    compare(replace(one, variants=("vanilla", "mish")), tmp_path)
    assert [title.rpartition(" ")[2] for title in trained[5:]] == ["mish", "mish"]
    assert compare(one, tmp_path) == first
    assert len(read_rows(tmp_path / "results.csv")) == 7


def test_what_an_experiment_says_is_checked() -> None:
    with pytest.raises(LotteryError, match="drawing must be imp or omp"):
        Experiment((), DIGITS, NETWORK, RECIPE, 1, 0.5, (0,), drawing="lot")
    with pytest.raises(LotteryError, match="unknown variant 'magic'"):
        Experiment(("magic",), DIGITS, NETWORK, RECIPE, 1, 0.5, (0,))


# ----------------------------------------------------------------------------------------------------- figures


def test_every_figure_is_there() -> None:
    assert list(FIGURES) == (
        ["1a", "1b", "1c", "1d", "2", "4a", "4b", "5", "6", "7", "8", "9", "10", "11", "A1", "A12", "A13"]
    )
    for figure in FIGURES.values():
        for claim in figure.claims:
            assert {claim.variant, claim.over, *claim.rivals} <= set(figure.variants)
            assert claim.expects in EXPECTATIONS and claim.kind in KINDS
            assert (claim.kind == "distance") <= bool(claim.rivals)
            assert (claim.kind == "growth") <= (claim.since is not None)
            assert (claim.at == "dense") <= (claim.variant in figure.dense)
            assert (claim.since == "dense") <= (claim.over in figure.dense)
            assert (figure.measure is None) == (claim.reading.quantity == "accuracy")
        assert all(variant(name) is not None for name in figure.variants)


@pytest.mark.parametrize("figure", FIGURES)
def test_figures_say_what_they_need(figure: str) -> None:
    assert experiments(figure, "digits")
    with pytest.raises(LotteryError, match="the preset 'paper' needs --data"):
        experiments(figure, "paper")
    parts = experiments(figure, "paper", ["CIFAR-100", "CIFAR-10", "tiny"])
    assert len(parts) == (4 if figure == "6" else 3 if figure == "7" else 1)
    assert len(experiments(figure, "cifar10-small", ["images"])) == 2  # with residuals and without
    assert all(part.recipe == Recipe() and part.levels == 16 for part in parts)
    if FIGURES[figure].deciding:
        assert parts[0].spent == (11,)  # 91.4 % sparse
        assert 0.9 < parts[0].sparsities[10] < 0.92
    assert parts[0].network == Network("resnet18")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("3", "digits"), "unknown figure '3'; choose from 1a, 1b"),
        (("4a", "huge"), "unknown preset 'huge'; choose from digits, cifar10-small, paper"),
        (("4a", "digits", ["folder"]), "brings its data: leave out --data"),
    ],
)
def test_what_there_is_not_is_named(given: tuple, message: str) -> None:
    with pytest.raises(LotteryError, match=message):
        experiments(*given)


@pytest.mark.parametrize("figure", ["1a", "7", "9"])
def test_a_figure_leaves_picture_numbers_and_a_comparison(small: None, figure: str, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    told = reproduce(figure, "digits", tmp_path, on_run=lambda *call: calls.append(call))
    assert (tmp_path / "figures" / f"{figure}-digits.png").read_bytes().startswith(b"\x89PNG")
    assert calls[-1][0] == calls[-1][1] == len(calls)
    lines = (tmp_path / "figures" / f"{figure}-digits.txt").read_text().splitlines()
    settings = 2 if figure == "7" else 1
    assert len(lines) == settings * len(FIGURES[figure].claims)
    for line in lines:
        assert re.search(
            r"the paper says that .*\. Here, .* over .*: [+-][\d.]+ ± [\d.]+ points over 2 seeds; ",
            line,
        )
        assert line in told
    with (tmp_path / "figures" / f"{figure}-digits.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    over = {claim.over for claim in FIGURES[figure].claims}
    assert {row["variant"] for row in rows} == set(FIGURES[figure].variants)
    assert {row["over"] for row in rows} - {""} == over
    for row in rows:
        values = [float(each.split(":")[1]) for each in row["by_seed"].split()]
        assert sum(values) / len(values) == pytest.approx(float(row["mean"]), abs=1e-3)
    dense = {row["variant"] for row in rows if float(row["sparsity"]) == 0}
    assert dense == set(FIGURES[figure].dense)
    shown = overview(tmp_path)
    assert re.search(rf"^{figure} +digits +\d+ +\d+ +[\d.]+ \w+ +yes ", shown, flags=re.MULTILINE)
    assert shown.count("  yes  ") == 1


@pytest.mark.parametrize(
    ("figure", "spaces", "quantity"),
    [
        ("2", {"kept weights", "all weights"}, "eigenvalue"),
        pytest.param("5", {"kept weights", "all weights"}, "median rise", marks=pytest.mark.slow),
        ("10", {"kept weights", "all weights"}, "rise"),
        pytest.param("11", {"inputs"}, "rise", marks=pytest.mark.slow),
        ("A1", {"stem", "stage 1", "stage 2", "stage 3", "all stages"}, "near zeros"),
        ("A12", {"kept weights", "all weights"}, "eigenvalue"),
    ],
)
def test_a_figure_of_looks_leaves_the_same(
    small: None, figure: str, spaces: set[str], quantity: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int]] = []
    told = reproduce(figure, "digits", tmp_path, on_run=lambda *call: calls.append(call))
    assert calls == [(done, len(calls)) for done in range(1, len(calls) + 1)]
    base = tmp_path / "figures" / f"{figure}-digits"
    picture = base.with_suffix(".png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) < 150_000
    with base.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["space"] for row in rows} == spaces
    assert quantity in {row["quantity"] for row in rows}
    assert {row["variant"] for row in rows} == set(FIGURES[figure].variants)
    assert {(row["seeds"], row["seed_list"]) for row in rows} == {("2", "0 1")}
    assert all(row["torch"] and row["hardware"] for row in rows)
    if FIGURES[figure].moments != "best":
        assert {row["epoch"] for row in rows} == ({"1"} if figure == "5" else {"1", "2"})
    lines = base.with_suffix(".txt").read_text().splitlines()
    assert len(lines) == len(FIGURES[figure].claims) + ("all weights" in spaces)
    for line, claim in zip(lines, FIGURES[figure].claims, strict=False):
        assert (
            f"the paper says that {claim.variant} {claim.words}. Here, the {claim.reading.quantity} of"
            in line
        )
        assert line in told
    monkeypatch.setattr(
        "sparsetweaks.lottery.spend.train", pytest.fail
    )  # nothing is trained again, nor looked at
    monkeypatch.setattr("sparsetweaks.lottery.smoothness.spent_network", pytest.fail)
    assert reproduce(figure, "digits", tmp_path) == told


@pytest.mark.parametrize("figure", ["7", "A1"])
def test_a_figure_that_lacks_a_run_is_not_drawn_and_all_else_is_run(
    small: None, figure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int]] = []
    parts, failing = experiments(figure, "digits"), f"{FIGURES[figure].variants[-1]}"

    def train(*given: object, title: str, **options: object) -> object:
        if title.startswith("resnet8") and title.endswith(f" {failing}") and "seed 1" in title:
            raise RunError("the loss became nan")
        return real_train(*given, title=title, **options)

    monkeypatch.setattr("sparsetweaks.lottery.spend.train", train)
    with pytest.raises(LotteryError) as caught:
        reproduce(figure, "digits", tmp_path, on_run=lambda *call: calls.append(call))
    assert re.match(
        rf"figure {figure} \(digits\) is not drawn, as runs are missing: \d runs? failed, and all others are kept: "
        rf"resnet8 on digits, seed 1, .*, {re.escape(failing)}: the loss became nan",
        str(caught.value),
    )
    assert not (tmp_path / "figures").exists()
    rows, failed = read_rows(tmp_path / "results.csv"), str(caught.value).count("the loss became nan")
    assert len(rows) == sum(part.spendings for part in parts) - failed
    assert calls[-1][0] == calls[-1][1]
    monkeypatch.setattr("sparsetweaks.lottery.spend.train", real_train)
    assert f"Figure {figure}" in reproduce(figure, "digits", tmp_path)


def test_runs_of_another_version_are_named_and_not_a_key_error(small: None, tmp_path: Path) -> None:
    reproduce("1c", "digits", tmp_path)
    run = next((tmp_path / "runs").iterdir())
    trained = load_trained(run)
    del trained.note["nonzero_parameters"]
    save_trained(run, trained)
    with pytest.raises(
        LotteryError, match=r"another version .* noted no nonzero_parameters: .*--out, or delete"
    ):
        reproduce("1c", "digits", tmp_path)
    run.unlink()
    assert "Figure 1c" in reproduce("1c", "digits", tmp_path)


def test_looks_of_another_version_are_named(small: None, tmp_path: Path) -> None:
    reproduce("A1", "digits", tmp_path)
    look = next((tmp_path / "analyses").iterdir())
    save(look, "ticket", {}, {})
    with pytest.raises(LotteryError, match=r"holds: ticket, .*; wanted: analysis, .*--out"):
        reproduce("A1", "digits", tmp_path)


def test_each_preset_says_how_long_it_takes(tmp_path: Path) -> None:
    shown = overview(tmp_path)
    assert re.search(r"^4a +cifar10-small +54 +864 +1\.\d h +no ", shown, flags=re.MULTILINE)
    hours = re.search(r"cifar10-small: .*\n.* 252 trainings, about ([\d.]+) h on one thread", shown)
    assert float(hours[1]) <= 6  # at most three hours on two cores
    assert re.search(r"digits: .*\n.* 369 trainings, about \d+ min", shown)


def rows_of_accuracies(accuracy: dict[str, dict[float, tuple[float, ...]]]) -> list[dict[str, object]]:
    setting = {"data": "d", "architecture": "a", "width": 4, "epochs": 1, "image_size": 8, "train_images": 9}
    return [
        {**setting, "sparsity": sparsity, "variant": name, "seed": seed, "test": test / 100}
        for name, levels in accuracy.items()
        for sparsity, tests in levels.items()
        for seed, test in enumerate(tests)
    ]


def verdicts(figure: str, accuracy: dict[str, dict[float, tuple[float, ...]]]) -> dict[str, str]:
    """By what the paper says, what is said of made-up accuracies."""
    ((title, summary),) = summarise(rows_of_accuracies(accuracy)).items()
    told = findings(FIGURES[figure].claims, accuracies(summary), title)
    return {each.paper: each.verdict for each in told}


def test_the_parts_of_a_sentence_have_their_own_verdicts() -> None:
    found = verdicts(
        "1a",
        {
            "vanilla": {0.0: (90, 91), 0.5: (80, 81), 0.9: (60, 61)},
            "skips": {0.0: (92, 93.1), 0.5: (83, 84.1), 0.9: (62, 63)},
        },
    )
    assert found == {
        "skips hurt the dense network": "the opposite, beyond noise",
        "skips help sparse networks": "in agreement",
        "skips help most at high sparsity": "the opposite, beyond noise",
    }


def test_the_best_is_better_than_each_and_a_fall_is_its_own() -> None:
    accuracy = {
        "vanilla": {0.5: (80, 81), 0.9: (60, 61)},
        "rewinding": {0.5: (81, 82), 0.9: (65, 66.1)},
        "AT+rewinding": {0.5: (81.2, 82.2), 0.9: (65.2, 66.31)},
        "TRT+rewinding": {0.5: (88, 89.1), 0.9: (88, 89.1)},
        "AT+TRT+rewinding": {0.5: (85, 86), 0.9: (84.8, 85.81)},
    }
    found = verdicts("8", accuracy)
    assert found == {
        "AT+rewinding is better than rewinding": "in agreement, but by less than counts as a difference",
        "AT+rewinding differs marginally from rewinding": "in agreement",
        "TRT+rewinding is better than rewinding": "in agreement",
        "AT+TRT+rewinding is the best of all": "not as in the paper, beyond noise",
        "AT+TRT+rewinding hardly falls with sparsity": "in agreement",
        "AT+TRT+rewinding falls less with sparsity than vanilla": "in agreement",
    }
    accuracy["TRT+rewinding"] = {0.5: (82, 83), 0.9: (70, 71)}
    assert verdicts("8", accuracy)["AT+TRT+rewinding is the best of all"] == "in agreement"
    accuracy["TRT+rewinding"] = {0.5: (80, 90), 0.9: (70, 95)}
    assert verdicts("8", accuracy)["AT+TRT+rewinding is the best of all"] == "not settled"


def test_no_difference_beyond_noise_is_no_agreement() -> None:
    """Figure 9 as it came out: half a width of 2.9 points says nothing of "marginal"."""
    wide = {"AT+TRT": {0.9: (93.0, 93.0, 93.0)}, "AT+TRT+KD": {0.9: (93.2, 95.5, 94.8)}}
    narrow = {"AT+TRT": {0.9: (93.0, 93.0, 93.0)}, "AT+TRT+KD": {0.9: (93.1, 93.2, 93.3)}}
    far = {"AT+TRT": {0.9: (93.0, 93.0, 93.0)}, "AT+TRT+KD": {0.9: (94.1, 94.2, 94.3)}}
    told = [*verdicts("9", wide).values(), *verdicts("9", narrow).values(), *verdicts("9", far).values()]
    different = "not as in the paper: a difference, where it finds almost none"
    assert told == ["not settled", "in agreement", different]


# ------------------------------------------------------------------------------------------------------ report


class Page(HTMLParser):
    """The text of a page, and what it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.fetched, self.open = "", [], []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report_is_one_page_with_everything(small: None, tmp_path: Path) -> None:
    reproduce("A13", "digits", tmp_path)
    (tmp_path / "commands.jsonl").write_text('{"command": "<script>"}\n{"command": "cut o')
    page = Page(report(tmp_path).read_text(encoding="utf-8"))
    assert not page.open
    assert len(page.fetched) == 2
    assert all(value.startswith("data:image/png;base64,") for value in page.fetched)
    for words in (
        "one-shot magnitude pruning",
        "AT+TRT",
        "Figure A13-digits",
        "the paper says that",
        "effective flops",
        "sparse file bytes",
    ):
        assert words in page.text
    rows = read_rows(tmp_path / "results.csv")
    for name in ("torch", "hardware", "recipe"):
        assert rows[0][name] in page.text
    assert '{"command": "<script>"}' in page.text  # as text, not as a script
    assert len(re.findall(r"2 seeds\d+\.\d\d ± \d", page.text)) == 1 + 4


def test_a_folder_without_results_has_no_report(tmp_path: Path) -> None:
    with pytest.raises(LotteryError, match="holds no results: spend some tickets first"):
        report(tmp_path)
