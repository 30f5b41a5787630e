from __future__ import annotations

import pickle
import sys
from pathlib import Path

import pytest

from sparsetweaks.lottery import progress
from sparsetweaks.lottery.config import LotteryError
from sparsetweaks.lottery.events import EventFiles
from sparsetweaks.lottery.progress import Progress
from sparsetweaks.lottery.train import Trained


def trained(epoch: int, title: str = "resnet8 on digits, seed 0, level 2, 75.0 % sparse, AT") -> Trained:
    return Trained(epochs=epoch, validation=0.925, loss=0.5, title=title, total=4)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def test_a_log_file_gets_a_line_now_and_then(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(8, "epoch") as shown:
        for epoch in range(1, 5):
            clock[0] += progress.LOG_SECONDS / 2
            shown.epoch(trained(epoch))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "\r" not in captured.err
    assert captured.err.splitlines() == [
        "resnet8 on digits, seed 0, level 2, 75.0 % sparse, AT, epoch 2 of 4, best in validation 92.5 %; 30 s left",
        "resnet8 on digits, seed 0, level 2, 75.0 % sparse, AT, epoch 4 of 4, best in validation 92.5 %; 20 s left",
    ]


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress(2, "epoch") as shown:
        shown.epoch(trained(1))
        shown.bar.refresh()
        shown.line("a ticket")
        assert shown.bar.n == 1
    error = capsys.readouterr().err
    assert "50%" in error
    assert "level 2, 75.0 % sparse, AT, epoch 1 of 4, best in validation 92.5 %" in error
    assert "a ticket\n" in error


def test_what_was_there_already_counts_as_done_but_not_as_time(clock: list[float]) -> None:
    with Progress(10, "epoch") as shown:
        assert shown.left() == "time left not known yet"
        shown.reach(4)
        clock[0] += 6
        shown.epoch(trained(1))
        assert shown.left() == "30 s left"  # five more of six seconds
        shown.reach(3)  # never back
        assert shown.done == 5
        for _ in range(9):
            shown.epoch(trained(2))
        assert shown.done == 10


def test_runs_are_counted(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(0, "run") as shown:
        clock[0] += 100
        shown.so_far(1, 5)
        clock[0] += 100
        shown.so_far(5, 5)
    assert capsys.readouterr().err.splitlines() == ["1 of 5 runs; 7 min left", "5 of 5 runs; 0 s left"]


def test_the_run_under_way_counts_by_its_epochs(clock: list[float]) -> None:
    with Progress(0, "run") as shown:
        clock[0] += 10
        shown.so_far(1, 3)
        for epoch in (1, 2):
            clock[0] += 5
            shown.within(trained(epoch))
        assert shown.left() == "20 s left"  # a run and a half took twenty
        shown.so_far(1, 3)  # asked again, nothing new
        assert shown.left() == "20 s left"
        clock[0] += 10
        shown.so_far(2, 3)
        assert shown.left() == "15 s left"


# TensorBoard's own code warns of what newer versions of its libraries will not have
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_event_files_are_read_back_by_tensorboard(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with Progress(8, "epoch", events=EventFiles(tmp_path / "events")) as shown:
        for epoch in (1, 2):
            shown.epoch(trained(epoch, "a, b"))
        pickle.loads(pickle.dumps(shown.events))(trained(1, "elsewhere"))  # open files are not sent
        for epoch in (3, 4):
            shown.epoch(trained(epoch, "a, b"))
        shown.epoch(trained(1, "cut off"))
    assert sorted(folder.name for folder in (tmp_path / "events").iterdir()) == [
        "a--b",
        "cut-off",
        "elsewhere",
    ]
    for name, epochs in (("a--b", [1, 2, 3, 4]), ("cut-off", [1]), ("elsewhere", [1])):
        read = accumulator.EventAccumulator(str(tmp_path / "events" / name)).Reload()
        assert [event.step for event in read.Scalars("loss")] == epochs
        assert {event.value for event in read.Scalars("loss")} == {0.5}
        assert [event.value for event in read.Scalars("best in validation")] == pytest.approx(
            [0.925] * len(epochs)
        )


def test_without_tensorboard_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LotteryError, match=r'pip install "sparsetweaks\[tensorboard\]"'):
        EventFiles(tmp_path / "events")


def test_a_notebook_gets_a_bar_as_well(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    with Progress(2, "epoch") as shown:
        shown.epoch(trained(1))
        assert not shown.bar.disable
        assert shown.bar.n == 1
    capsys.readouterr()
