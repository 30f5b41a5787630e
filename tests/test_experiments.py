"""The scripts of experiments/: what they would run, without running it."""

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from sparsetweaks.lottery.summaries import Cell

FOLDER = Path(__file__).parent.parent / "experiments"


@pytest.fixture
def where(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(FOLDER))
    yield import_module("where")
    sys.modules.pop("where")


def test_every_level_is_spent_and_the_deciding_one_in_every_form(where: ModuleType) -> None:
    for experiment, deciding in where.comparisons("digits", [], 0, [1.0]):
        found = [
            len(where.variants_at(level, experiment, deciding)) for level in range(experiment.levels + 1)
        ]
        each = [len(where.EACH)] * experiment.levels
        each[deciding - 1] += len(where.FORMS)
        assert found == [1, *each]
        assert not experiment.spent  # so that all levels are drawn


def test_named_variants_alone_are_spent(
    where: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    experiment, deciding = next(where.comparisons("digits", [], 0, [1.0]))
    tickets = [SimpleNamespace(level=level) for level in range(experiment.levels + 1)]
    monkeypatch.setattr(where, "tickets_of", lambda *_: tickets)
    monkeypatch.setattr(where, "run_key", lambda ticket, tweaks, *_, **__: f"{ticket.level} {tweaks}")
    monkeypatch.setattr(
        where,
        "spend_row",
        lambda ticket, name, tweaks, *_, **__: {"run": f"{ticket.level} {tweaks}", "variant": name},
    )
    names = {"vanilla", "gelu"}
    for _ in range(2):  # again: what has a row is left
        where.run(experiment, deciding, names, "digits", tmp_path, "cpu")
    rows = (tmp_path / "where-digits.csv").read_text().splitlines()[1:]
    assert len(rows) == experiment.levels + 2
    assert sum(row.endswith("gelu") for row in rows) == 1


def test_other_lengths_spend_the_deciding_level_alone(where: ModuleType) -> None:
    for experiment, deciding in where.comparisons("digits", [], 0, [1 / 3, 3.0]):
        assert experiment.spent == (deciding,)
        assert not where.variants_at(deciding + 1, experiment, deciding)
        assert list(where.variants_at(deciding, experiment, deciding)) == list(where.EACH)


def test_means_over_places_are_by_seed_and_of_what_is_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    mean = import_module("report")._mean
    sys.modules.pop("report")
    found = mean(
        [
            {"vanilla": Cell({0: 80.0, 1: 90.0, 2: 70.0}), "AT": Cell({0: 81.0}), "mish": Cell({0: 99.0})},
            {"vanilla": Cell({0: 60.0, 1: 50.0}), "AT": Cell({0: 62.0})},
        ]
    )
    assert found == {"vanilla": Cell({0: 70.0, 1: 70.0}), "AT": Cell({0: 71.5})}
