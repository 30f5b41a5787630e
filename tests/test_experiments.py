"""The scripts of experiments/: what they would run, without running it."""

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

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


def test_other_lengths_spend_the_deciding_level_alone(where: ModuleType) -> None:
    for experiment, deciding in where.comparisons("digits", [], 0, [1 / 3, 3.0]):
        assert experiment.spent == (deciding,)
        assert not where.variants_at(deciding + 1, experiment, deciding)
        assert list(where.variants_at(deciding, experiment, deciding)) == list(where.EACH)
