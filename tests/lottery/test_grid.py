"""Engines: whatever runs the stages of a grid, they come to the same."""

from __future__ import annotations

import ast
import importlib
import os
import pickle
import socket
import subprocess
import sys
import time
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsetweaks.lottery import files
from sparsetweaks.lottery.config import LotteryError, Network, Recipe, RunError
from sparsetweaks.lottery.experiment import Experiment, Source, compare
from sparsetweaks.lottery.grid import GridError, run_all, run_each
from sparsetweaks.lottery.on_ray import on_ray
from sparsetweaks.lottery.rows import read_rows
from sparsetweaks.lottery.train import Trained

RECIPE = Recipe(epochs=2, batch_size=64, precision="float32")
EXPERIMENT = Experiment(
    ("vanilla", "AT"), Source("digits", limit=20), Network("resnet8", width=4), RECIPE, 1, 0.5, (0, 1)
)
TIMES = {"train_seconds", "step_milliseconds", "prepare_seconds"}


def fail(message: str, error: type[Exception] = LotteryError) -> None:
    raise error(message)


def content(out: Path) -> tuple[dict[str, Any], dict[tuple[str, str], dict[str, str]]]:
    """All tickets and trainings as digests, and all rows but for the times."""
    stored = {}
    for path in sorted(out.rglob("*.safetensors")):
        _, groups = files.load(path, {"tickets": "ticket", "runs": "training"}[path.parent.name])
        stored[str(path.relative_to(out))] = {
            group: files.digest_of(state) for group, state in groups.items() if group != "momentum"
        }
    rows = read_rows(out / "results.csv")
    return stored, {
        (row["run"], row["variant"]): {name: value for name, value in row.items() if name not in TIMES}
        for row in rows
    }


@pytest.fixture(scope="module")
def in_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    out = tmp_path_factory.mktemp("in_process")
    compare(EXPERIMENT, out, engine=partial(run_all, threads=1))
    return content(out)


# ------------------------------------------------------------------------------------------------------- threads


def test_each_process_of_a_grid_has_one_thread_unless_told_otherwise() -> None:
    tasks = [torch.get_num_threads] * 3
    assert list(run_all(tasks, processes=2)) == [1, 1, 1]
    assert list(run_all(tasks, processes=2, threads=2)) == [2, 2, 2]


def test_in_this_process_threads_are_set_for_the_runs_and_put_back() -> None:
    before = torch.get_num_threads()
    runs = run_all([torch.get_num_threads] * 2, threads=before + 1)
    assert next(runs) == before + 1
    assert torch.get_num_threads() == before
    assert list(runs) == [before + 1]
    with pytest.raises(LotteryError, match="wrong"):
        list(run_all([partial(fail, "wrong")], threads=before + 1))
    assert torch.get_num_threads() == before
    assert list(run_all([torch.get_num_threads])) == [before]


@pytest.mark.slow
def test_a_grid_in_two_processes_ends_in_the_same_bits(in_process: tuple[Any, Any], tmp_path: Path) -> None:
    compare(EXPERIMENT, tmp_path, engine=partial(run_all, processes=2))
    assert content(tmp_path) == in_process
    assert len(in_process[1]) == EXPERIMENT.spendings == 6


# ------------------------------------------------------------------------------------------------------ failures

DIVERGING = replace(  # scales so large that the first loss is not finite
    EXPERIMENT, variants=("TRT", "vanilla", "AT"), scales={"iterations": 1, "floor": 1e38}
)


@dataclass(frozen=True)
class Watch:
    """Writes down each epoch of each run, in whatever process, and ends those of some runs."""

    file: Path
    failing: str = "none"
    error: type[Exception] = RunError

    def __call__(self, trained: Trained) -> None:
        with self.file.open("a") as file:
            file.write(f"{trained.title}\n")
        if self.failing in trained.title:
            raise self.error("the run ended")

    def seen(self) -> list[str]:
        seen = self.file.read_text().splitlines() if self.file.exists() else []
        self.file.unlink(missing_ok=True)
        return seen


def cells(rows: list[dict[str, Any]]) -> list[tuple[int, int, str]]:
    return sorted((int(row["seed"]), int(row["level"]), row["variant"]) for row in rows)


def check_a_grid_with_a_variant_that_diverges(out: Path, engine: Any) -> None:
    watch, done = Watch(out / "epochs"), []
    options = {"engine": engine, "on_epoch": watch, "on_run": lambda *call: done.append(call)}
    with pytest.raises(GridError) as caught:
        compare(DIVERGING, out, **options)
    assert sorted(caught.value.args) == [
        f"resnet8 on digits, seed {seed}, imp, level 1, 50.0 % sparse, TRT: the loss became nan in epoch 1: lower the "
        "learning rate, or warm up"
        for seed in (0, 1)
    ]
    left = [
        (seed, level, name) for seed in (0, 1) for level, name in ((0, "vanilla"), (1, "AT"), (1, "vanilla"))
    ]
    assert cells(read_rows(out / "results.csv")) == left
    assert done == [(number, 10) for number in range(1, 11)]
    assert len(watch.seen()) == 2 * len(left)
    rows = (out / "results.csv").read_text()
    with pytest.raises(GridError):
        compare(DIVERGING, out, **options)
    assert watch.seen() == []  # what is kept is not run again, and what diverges does so in its first epoch
    assert (out / "results.csv").read_text() == rows
    assert len(compare(replace(DIVERGING, variants=("vanilla", "AT")), out, on_epoch=watch)) == 6
    assert watch.seen() == []


def test_a_grid_goes_on_without_a_run_that_diverges(tmp_path: Path) -> None:
    check_a_grid_with_a_variant_that_diverges(tmp_path, run_all)


@pytest.mark.slow
def test_a_grid_in_two_processes_goes_on_too(tmp_path: Path) -> None:
    check_a_grid_with_a_variant_that_diverges(tmp_path, partial(run_all, processes=2))


def test_a_seed_that_cannot_be_drawn_loses_its_own_runs_alone(tmp_path: Path) -> None:
    watch, done = Watch(tmp_path / "epochs", failing="seed 0, dense"), []
    with pytest.raises(
        GridError,
        match=r"^1 run failed, and all others are kept: no tickets of seed 0, and so none of its runs: resnet8 on digits, "
        r"seed 0, dense, vanilla: the run ended\. `sparsetweaks show` has .*; the same command tries these again",
    ):
        compare(EXPERIMENT, tmp_path, on_epoch=watch, on_run=lambda *call: done.append(call))
    assert done == [(4, 8), (5, 8), (6, 8), (7, 8), (8, 8)]  # a drawing and three runs are lost
    rows = read_rows(tmp_path / "results.csv")
    assert cells(rows) == [(1, 0, "vanilla"), (1, 1, "AT"), (1, 1, "vanilla")]
    watch.seen()
    assert len(compare(EXPERIMENT, tmp_path, on_epoch=Watch(tmp_path / "epochs"))) == 6
    assert all("seed 0" in title for title in watch.seen())
    assert read_rows(tmp_path / "results.csv")[:3] == rows


@pytest.mark.parametrize("error", [LotteryError, RuntimeError, KeyboardInterrupt])
def test_what_is_wrong_with_more_than_one_run_stops_at_once(tmp_path: Path, error: type[Exception]) -> None:
    watch = Watch(tmp_path / "epochs", failing="AT", error=error)
    with pytest.raises(error, match=r"^the run ended$"):
        compare(EXPERIMENT, tmp_path, on_epoch=watch)
    assert [title for title in watch.seen() if "AT" in title] == [
        "resnet8 on digits, seed 0, imp, level 1, 50.0 % sparse, AT"
    ]


@pytest.mark.parametrize("engine", ["one process", "two processes", "Ray"])
def test_whatever_runs_them_each_task_is_run_and_a_reason_takes_the_place_of_a_result(
    engine: str, fake_ray: types.ModuleType
) -> None:
    tasks = [partial(max, 1, 2), partial(fail, "the loss became nan", RunError), partial(min, 1, 2)]
    failed: list[str] = []
    with (
        on_ray()
        if engine == "Ray"
        else nullcontext(partial(run_all, processes=1 + (engine != "one process"))) as run
    ):
        assert sorted(run_each(run, tasks, failed), key=str) == [1, 2, None]
        assert failed == ["the loss became nan"]


def test_failures_are_told_whole_as_long_as_they_are_few() -> None:
    assert str(GridError("a: 1", "b: 2", "c: 3")).startswith(
        "3 runs failed, and all others are kept: a: 1; b: 2; c: 3. `"
    )
    many = GridError(*"abcdef")
    assert str(many).startswith("6 runs failed, and all others are kept: a; b; c; and 3 more. `")
    assert str(pickle.loads(pickle.dumps(many))) == str(many)


def test_a_failure_holds_no_network_for_as_long_as_the_grid() -> None:
    class Network:
        pass

    held = []

    def diverge() -> None:
        network = Network()
        held.append(weakref.ref(network))
        raise RunError("the loss became nan")

    assert list(run_each(run_all, [diverge, lambda: held[0]()], [])) == [None, None]


# ----------------------------------------------------------------------------------------------------------- Ray


class TaskError(Exception):
    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


@pytest.fixture
def fake_ray(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """What of Ray is used here, in this process, on a machine of 4 cores and one GPU; the last task ends first."""
    ray = types.ModuleType("ray")
    ray.calls = calls = []
    ray.is_initialized = lambda: False
    ray.nodes = lambda: [
        {"Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0}},
        {"Alive": False, "Resources": {"CPU": 64.0}},
    ]
    ray.init = lambda **options: calls.append(("init", options["address"]))
    ray.shutdown = lambda: calls.append("shutdown")
    ray.cancel = lambda each, force: calls.append(("cancel", each.args[0]))
    ray.wait = lambda running: ([running[-1]], running[:-1])
    ray.exceptions = types.SimpleNamespace(RayError=RuntimeError, RayTaskError=TaskError)

    def remote(**options: Any) -> Any:
        calls.append(options)
        return lambda function: types.SimpleNamespace(remote=partial(partial, function))

    def get(ended: Any) -> Any:
        try:
            return ended()
        except LotteryError as error:
            raise TaskError(error) from error

    ray.remote, ray.get = remote, get
    monkeypatch.setitem(sys.modules, "ray", ray)
    return ray


def test_ray_gets_the_share_of_a_run_and_is_ended(fake_ray: types.ModuleType) -> None:
    before = torch.get_num_threads()
    with on_ray(gpus=0.25, threads=2, address="auto") as engine:
        assert list(engine([partial(max, 1, 2), partial(min, 1, 2), torch.get_num_threads])) == [2, 1, 2]
    torch.set_num_threads(before)
    assert fake_ray.calls == [
        ("init", "auto"),
        {"num_cpus": 2, "num_gpus": 0.25, "max_retries": 0},
        "shutdown",
    ]


def test_a_ray_that_was_there_is_used_and_left_running(fake_ray: types.ModuleType) -> None:
    fake_ray.is_initialized = lambda: True
    with on_ray() as engine:
        assert list(engine([])) == []
    assert len(fake_ray.calls) == 1


def test_on_ray_too_the_first_error_ends_the_rest(fake_ray: types.ModuleType) -> None:
    tasks = [partial(max, 1, 2), partial(fail, "the loss became nan"), partial(min, 1, 2)]
    got = []
    with pytest.raises(LotteryError, match=r"^the loss became nan$"), on_ray() as engine:
        got += list(engine(tasks[2:]))
        got += list(engine(tasks[:2]))
    assert got == [1]
    assert fake_ray.calls[-2:] == [("cancel", tasks[0]), "shutdown"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"gpus": 2.0},
            r"a run is to have 1 CPU, 2 GPU, and no machine of Ray's has them \(at most 4 CPU, 1 GPU\)",
        ),
        ({"threads": 5}, "5 CPU, 0 GPU, and no machine"),
    ],
)
def test_what_no_machine_has_is_said_before_ray_waits_for_it(fake_ray, options, message: str) -> None:
    with pytest.raises(LotteryError, match=message), on_ray(**options):
        pass
    assert fake_ray.calls[-1] == "shutdown"


def test_a_process_that_ray_loses_is_told(fake_ray: types.ModuleType) -> None:
    def lost(ended: object) -> None:
        raise RuntimeError("the worker died")

    fake_ray.get = lost
    with pytest.raises(LotteryError, match="a process was ended from outside"), on_ray() as engine:
        list(engine([partial(max, 1, 2)]))


def test_a_folder_that_a_machine_does_not_see_is_told(fake_ray, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("os.getcwd", lambda: str(tmp_path / "elsewhere"))
    with (
        pytest.raises(LotteryError, match=r"cannot see .*elsewhere .*: runs need a file system"),
        on_ray() as engine,
    ):
        list(engine([partial(max, 1, 2)]))


def test_without_ray_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(LotteryError, match=r'pip install "sparsetweaks\[ray\]"'), on_ray():
        pass


@pytest.mark.parametrize("address", ["127.0.0.1:{}", "ray://127.0.0.1:{}"])
def test_an_address_where_nobody_listens_is_told_at_once(fake_ray: types.ModuleType, address: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = address.format(free.getsockname()[1])
        with (
            pytest.raises(LotteryError, match=f"cannot reach or start Ray at {address}: "),
            on_ray(address=address),
        ):
            pass
    assert fake_ray.calls == []


def test_a_ray_that_does_not_start_is_told(fake_ray: types.ModuleType) -> None:
    def timed_out(**_: object) -> None:
        raise Exception("The current node timed out during startup.\nThis could happen because ...")

    fake_ray.init = timed_out
    with (
        pytest.raises(
            LotteryError, match=r"^cannot reach or start Ray on this machine: .* during startup\.$"
        ),
        on_ray(),
    ):
        pass


def patient(ask: Callable[..., Any]) -> Callable[..., Any]:
    """Ray gives its own start half a minute, which a busy machine exceeds."""

    def asked(*given: Any) -> Any:
        end = time.monotonic() + 150
        while True:
            try:
                return ask(*given)
            except RuntimeError:
                if time.monotonic() > end:
                    raise

    return asked


@pytest.fixture(scope="module")
def real_ray() -> Iterator[Any]:
    """Ray on two cores of this machine, for all tests of this module."""
    ray = pytest.importorskip("ray")
    options = {
        "address": "local",
        "num_cpus": 2,
        "include_dashboard": False,
        "object_store_memory": 100 * 2**20,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")  # others join by the address alone
        services = importlib.import_module("ray._private.services")
        patch.setattr(services, "get_node", patient(services.get_node))
        ray.init(log_to_driver=False, **options)
        yield ray
        ray.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:::ray")
def test_a_grid_on_a_real_ray_ends_in_the_same_bits(real_ray, in_process, tmp_path: Path) -> None:
    done: list[tuple[int, int]] = []
    with on_ray() as engine:
        compare(EXPERIMENT, tmp_path, engine=engine, on_run=lambda *call: done.append(call))
        assert content(tmp_path) == in_process
        assert done[-1] == (8, 8)
        assert set(engine([torch.get_num_threads] * 3)) == {1}
        with pytest.raises(GridError, match=r"^1 run failed, .* 50.0 % sparse, TRT: the loss became nan"):
            compare(replace(DIVERGING, seeds=(0,)), tmp_path, engine=engine)
        assert content(tmp_path)[1] == in_process[1]
        wrong = Experiment(("vanilla",), Source("nowhere"), Network("resnet8", width=4), RECIPE, 1, 0.5, (0,))
        with pytest.raises(LotteryError, match=r"^unknown data set 'nowhere'"):
            compare(wrong, tmp_path, engine=engine)
        with pytest.raises(LotteryError, match="a process was ended from outside"):
            list(engine([partial(os._exit, 9)]))
        with pytest.raises(LotteryError, match="no machine of Ray's has them"), on_ray(threads=64):
            pass


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:::ray")
def test_another_process_joins_a_ray_by_its_address(real_ray, tmp_path: Path) -> None:
    code = (
        "import os, sys; from functools import partial; from sparsetweaks.lottery.on_ray import on_ray\n"
        "with on_ray(address=sys.argv[1]) as engine: print([*engine([partial(str, 2), os.getcwd])])"
    )
    address = real_ray.get_runtime_context().gcs_address
    done = subprocess.run(
        [sys.executable, "-c", code, address], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert set(ast.literal_eval(done.stdout.splitlines()[-1])) == {
        "2",
        str(tmp_path),
    }  # runs see the same folder


def test_ray_and_tensorboard_are_there_when_they_are_used_and_not_before() -> None:
    code = (
        "import sys, sparsetweaks.lottery.commands; "
        "assert not {'ray', 'tensorboard', 'torch.utils.tensorboard'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
