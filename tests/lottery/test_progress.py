from __future__ import annotations

import sys

import pytest

from sparsetweaks.lottery import progress
from sparsetweaks.lottery.config import LotteryError
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


def test_event_files_are_written_or_asked_for(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    class Writer:
        def __init__(self, folder: str) -> None:
            written.append(folder)

        def add_scalar(self, *values: object) -> None:
            written.append(values)

        def close(self) -> None:
            written.append("closed")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(progress, "_summary_writer", lambda folder: Writer(folder.name))
    with Progress(2, "epoch", events=tmp_path / "events") as shown:
        shown.epoch(trained(1, "a, b"))
    assert written == ["a--b", ("loss", 0.5, 1), ("best in validation", 0.925, 1), "closed"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LotteryError, match="event files need tensorboard: pip install tensorboard"):
        Progress(2, "epoch", events=tmp_path / "events")
