"""What the benchmarks share: pairs in turn, rows put in place of older ones, and one table of all."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def paired(monkeypatch):
    monkeypatch.setitem(sys.modules, "paired", None)
    return load("paired")


def test_pairs_take_turns(paired):
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    times = paired.interleaved(runs, 3, warm_up=1)
    assert order == list("ba" + "ab" + "ba" + "ab")
    assert [len(taken) for taken in times.values()] == [3, 3]
    assert paired.ratios({"a": [1.0, 6.0], "b": [2.0, 3.0]}, "a", "b") == [0.5, 2.0]


def test_what_is_fresh_is_made_outside_of_the_time(paired, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(paired, "clock", lambda: now[0])

    def spend(seconds: float) -> None:
        now[0] += seconds

    times = paired.interleaved({"a": lambda given: spend(1)}, 2, fresh={"a": lambda: spend(100)})
    assert times == {"a": [1.0, 1.0]}


@pytest.mark.parametrize(
    ("median", "target", "met"), [(0.5, 0.5, "met"), (0.6, 0.5, "missed"), (0.5, None, ""), (None, 0.5, "")]
)
def test_a_target_is_the_most_that_the_median_may_be(paired, median, target, met):
    assert paired.Row("what", "measure", median, target=target).met == met


def test_rows_of_a_case_take_the_place_of_older_ones(paired, tmp_path):
    path, machine = tmp_path / "table.csv", {"threads": 1, "versions": "torch", "hardware": "a, b"}
    row = lambda median: paired.spread("what", "measure", [median, 3 * median], target=4)
    paired.put(path, "second", [row(1), row(2)], machine, order=["first", "second"])
    paired.put(path, "first", [row(5)], machine, order=["first", "second"])
    paired.put(path, "second", [row(3)], machine, order=["first", "second"])
    lines = paired.read(path)
    assert [(line["case"], line["median"], line["met"]) for line in lines] == [
        ("first", "10", "missed"),
        ("second", "6", "missed"),
    ]
    assert paired.text(lines[1]) == "what: measure 6 (3 to 9, n = 2) target 4 missed"
    paired.put(path, "second", [row(7)], machine | {"hardware": "c"}, order=["first", "second"])
    assert [(line["median"], line["hardware"]) for line in paired.read(path)[1:]] == [
        ("6", "a, b"),
        ("14", "c"),
    ]


def test_all_tables_become_one(paired, monkeypatch):
    bench = load("bench")
    lines = list(bench.collected())
    assert {line["benchmark"] for line in lines} <= set(bench.BENCHMARKS)
    assert all(line["met"] in ("met", "missed") for line in lines if line["target"] and line["median"])
    text = bench.table(lines)
    assert text.splitlines()[0].split()[:3] == ["what", "measure", "median"]
    monkeypatch.delitem(sys.modules, "bench")
