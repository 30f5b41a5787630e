"""What the benchmarks share: pairs in turn, rows put in place of older ones, and one table of all."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

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


@pytest.fixture
def benchmark(paired, monkeypatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports benchmarks by name, with those that they import beside them."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    yield importlib.import_module
    for path in BENCHMARKS.glob("*.py"):
        if path.stem not in before:
            sys.modules.pop(path.stem, None)


def run(module: ModuleType, monkeypatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, words)])
    module.main()


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


def test_rows_of_other_threads_stay(paired, tmp_path):
    path, one = tmp_path / "table.csv", {"threads": 1, "versions": "torch", "hardware": "a"}
    paired.put(path, "case", [paired.Row("what", "measure", 1.0)], one, order=["case"])
    assert not paired.done(paired.read(path), "case", one | {"threads": 2}, peer_given=False)
    paired.put(path, "case", [paired.Row("what", "measure", 2.0)], one | {"threads": 2}, order=["case"])
    assert [(line["median"], line["threads"]) for line in paired.read(path)] == [("1", "1"), ("2", "2")]


def test_without_its_peer_no_row_replaces_one_measured_with_it(paired, tmp_path):
    path, machine = tmp_path / "table.csv", {"threads": 1, "versions": "torch", "hardware": "a"}
    own, with_peer, of_peer = (paired.Row("what", name, 1.0) for name in ("own", "own / peer", "peer"))
    put = lambda *rows: paired.put(path, "case", rows, machine, order=["case"])
    found = lambda: [(line["measure"], line["median"]) for line in paired.read(path)]
    put(own, paired.not_given("what", "own / peer"))
    assert found() == [("own", "1"), ("own / peer", "")]
    put(own, with_peer, of_peer)
    assert found() == [("own", "1"), ("own / peer", "1"), ("peer", "1")]
    put(paired.Row("what", "own", 2.0), paired.not_given("what", "own / peer"))
    assert found() == [("own", "2"), ("own / peer", "1"), ("peer", "1")]


def test_to_resume_is_to_measure_what_lacked_its_peer_once_that_is_given(paired, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(paired, "commit", lambda checkout: "abc")
    path, ran = tmp_path / "table.csv", []

    def case(options: Namespace) -> Iterator[object]:
        ran.append(options.peer)
        yield paired.Row("what", "ratio", 1.0) if options.peer else paired.not_given("what", "ratio")

    def main(*words: object) -> None:
        monkeypatch.setattr(sys, "argv", ["benchmark", "--resume", "--out", str(path), *map(str, words)])
        paired.main("", "name", {"case": case}, repeats=1, peers={"peer": "a peer"})

    for words in ((), (), ("--peer", tmp_path), ("--peer", tmp_path), ()):
        main(*words)
    assert ran == [None, tmp_path]
    assert [line["median"] for line in paired.read(path)] == ["1"]


def test_a_table_is_written_whole_or_not_at_all(paired, tmp_path):
    path = tmp_path / "table.csv"
    paired.write(path, ["a"], [{"a": 1}])

    def cut_off() -> Iterator[dict[str, int]]:
        yield {"a": 2}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        paired.write(path, ["a"], cut_off())
    assert paired.read(path) == [{"a": "1"}]


def test_surgery_that_is_cut_off_leaves_its_table_and_goes_on(benchmark, paired, tmp_path, monkeypatch):
    surgery, path, ran = benchmark("surgery"), tmp_path / "surgery.csv", []
    monkeypatch.setattr(surgery, "SURGERIES", {"a": None, "b": None})
    kill = [True]

    def rows(model: str) -> Iterator[dict[str, object]]:
        ran.append(model)
        yield surgery.row("time", model, "a", [1.0])
        if model == "second" and kill:
            raise KeyboardInterrupt
        yield surgery.row("time", model, "b", [2.0])

    measures = [("time", model, lambda model=model: rows(model)) for model in ("first", "second")]
    monkeypatch.setattr(surgery, "measures", lambda repeats, depths: measures)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(surgery, monkeypatch, "--out", path)
        assert [line["model"] for line in paired.read(path)] == ["first", "first"]
    kill.clear()
    run(surgery, monkeypatch, "--resume", "--out", path)
    run(surgery, monkeypatch, "--resume", "--out", path)
    assert ran == ["first", "second", "first", "second", "second"]
    assert [line["model"] for line in paired.read(path)] == ["first", "first", "second", "second"]


def test_each_table_of_a_shape_of_its_own_goes_on_and_tells_its_threads(
    benchmark, paired, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    ran = []

    def ratios(layer: str, sparsity: float, *, batch: int, repeats: int) -> dict[str, object]:
        ran.append(layer)
        return dict.fromkeys(paths.COLUMNS, 0.5) | {"layer": layer, "sparsity": sparsity, "batch": batch}

    paths = benchmark("sparse_paths")
    monkeypatch.setattr(paths, "measure", ratios)
    monkeypatch.setattr(paths, "LAYERS", {"one": (), "two": ()})
    monkeypatch.setattr(paths, "SPARSITIES", (0.95,))

    throughput = benchmark("throughput")

    def pairs(what: str, model: str, repeats: int) -> Iterator[dict[str, object]]:
        ran.append(what)
        yield throughput.row(what, "", "theirs", ([1.0], [2.0]))
        yield throughput.row(what, model, "steps", ([1.0], [2.0]))

    monkeypatch.setattr(throughput, "MEASURES", {"pairs": ("input pipeline", "resnet20", pairs)})
    monkeypatch.setattr(throughput, "loop", ModuleType("train"))  # whose clock `main` sets
    for module in (paths, throughput, paths, throughput):
        run(module, monkeypatch, "--resume", "--out", tmp_path / f"{module.__name__}.csv")
    assert ran == ["one", "two", "input pipeline"]
    for module in (paths, throughput):
        lines = paired.read(tmp_path / f"{module.__name__}.csv")
        assert [line["threads"] for line in lines] == ["3", "3"]


def test_the_table_of_all_tells_the_threads_of_each(paired, monkeypatch):
    bench = load("bench")
    monkeypatch.delitem(sys.modules, "bench")
    line = {"what": "time / deepcopy", "model": "m", "surgery": "s", "median": "1", "least": "1", "most": "1"}
    line |= {"n": "1", "threads": "4", "torch": "2", "hardware": "a"}
    assert [each["threads"] for each in bench.of_surgery([line])] == ["4"]


def test_other_images_have_true_values_of_their_own(benchmark, tmp_path, monkeypatch):
    hessian = benchmark("hessian")
    options, batch = Namespace(work=tmp_path, images=Path("images")), (torch.zeros(2), torch.zeros(2))
    (tmp_path / "reference-these-2-1.json").write_text("[1.0]")
    monkeypatch.setattr(hessian, "hessian_top_eigenvalues", lambda *given, **options: 1 / 0)
    assert hessian.reference(None, batch, 1, "these", options) == [1.0]
    with pytest.raises(ZeroDivisionError):
        hessian.reference(None, batch, 1, "others", options)


def test_both_lotteries_are_warm_before_the_first_is_timed(benchmark, monkeypatch):
    lottery, runs = benchmark("lottery"), []
    monkeypatch.setattr(lottery, "ours", lambda data, precision: runs.append((precision, len(data.train))))
    monkeypatch.setattr(lottery, "theirs", lambda data, checkout: runs.append(("theirs", len(data.train))))
    monkeypatch.setattr(lottery.train, "precision_of", lambda recipe, device: "bfloat16")
    ticks = iter(range(100))
    monkeypatch.setattr(lottery.paired, "clock", lambda: next(ticks))
    measured = list(lottery.against_open_lth(Namespace(open_lth=Path("open_lth"), repeats=1)))
    both = ("bfloat16", "float32", "theirs")
    assert runs == [(name, lottery.BATCH) for name in both] + [(name, lottery.TRAIN) for name in both]
    without = list(lottery.against_open_lth(Namespace(open_lth=None, repeats=1)))
    assert [row.measure for row in without] == [row.measure for row in measured]


def test_all_tables_become_one(paired, monkeypatch):
    bench = load("bench")
    lines = list(bench.collected())
    assert {line["benchmark"] for line in lines} <= set(bench.BENCHMARKS)
    assert all(line["met"] in ("met", "missed") for line in lines if line["target"] and line["median"])
    text = bench.table(lines)
    assert text.splitlines()[0].split()[:3] == ["what", "measure", "median"]
    monkeypatch.delitem(sys.modules, "bench")
