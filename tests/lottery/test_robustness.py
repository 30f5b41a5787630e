"""Killed at any moment, a full disk, two at once: nothing is lost, nothing half-written is read, and the end is the same."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsetweaks.lottery import cli, commands, files
from sparsetweaks.lottery.config import LotteryError, Recipe
from sparsetweaks.lottery.data import Data
from sparsetweaks.lottery.draw import draw
from sparsetweaks.lottery.rows import append_row, read_rows

posix = pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
SMALL = ["--epochs", "4", "--batch-size", "64", "--limit", "20", "--precision", "float32"]
DRAW = ["draw", "--model", "resnet8", "--width", "4", "--levels", "2", "--fraction", "0.5", *SMALL]
SPEND = ["spend", *SMALL, "--variant", "vanilla", "--variant", "AT+rewinding", "--variant", "smoothing+SWA"]
TIMES = {"train_seconds", "step_milliseconds", "prepare_seconds"}
WRITES = 17  # of an undisturbed campaign


def command(*words: object) -> int:
    sys.argv = ["sparsetweaks", *map(str, words)]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            cli.main()
        except SystemExit as ended:
            return int(ended.code or 0)
    return 0


def campaign(out: Path, die_at_write: int | None = None) -> None:
    """Draw tickets and spend them, in a process of its own; it may kill itself in the middle of its n-th write."""
    torch.set_num_threads(1)
    commands._show = lambda out: None  # the picture takes longer than all else
    if die_at_write is not None:
        countdown, replace = iter(range(die_at_write, -1, -1)), os.replace

        def dying(partial: Path, path: Path) -> None:
            left = next(countdown)
            if left == 0:
                os.truncate(partial, os.path.getsize(partial) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            replace(partial, path)

        os.replace = dying
    assert command(*DRAW, "--out", out) == 0
    tickets = sorted((out / "tickets").glob("*.safetensors"))
    assert command(*SPEND, *tickets, "--out", out) == 0


def context() -> Any:
    """Processes forked from one that has imported everything and trained nothing."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(
        ["sparsetweaks.lottery.commands", "sklearn.datasets", "torch._dynamo", __name__]
    )
    return server


def content(out: Path) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """All tickets and trainings, bit for bit, and all rows but for the times."""
    stored = {}
    for path in sorted(out.rglob("*.safetensors")):
        header, groups = files.load(path, {"tickets": "ticket", "runs": "training"}[path.parent.name])
        header = {name: value for name, value in header.items() if name not in ("seconds", "note")}
        stored[str(path.relative_to(out))] = (header, groups)
    rows = read_rows(out / "results.csv")
    return stored, [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def assert_same(one: Path, other: Path) -> None:
    (files_one, rows_one), (files_other, rows_other) = content(one), content(other)
    assert rows_one == rows_other
    assert len(rows_one) == 1 + 2 * 3
    assert files_one.keys() == files_other.keys()
    assert_same_files(files_one, files_other)


def assert_same_files(some: dict[str, Any], others: dict[str, Any]) -> None:
    for name, (header, groups) in some.items():
        assert header == others[name][0], name
        for group, tensors in groups.items():
            for key, tensor in tensors.items():
                assert torch.equal(tensor, others[name][1][group][key]), (name, group, key)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    out = tmp_path_factory.mktemp("undisturbed")
    started = time.monotonic()
    process = context().Process(target=campaign, args=(out,))
    process.start()
    process.join()
    assert process.exitcode == 0
    return out, time.monotonic() - started


def killed(out: Path, seconds: float, generator: random.Random, *, in_write: bool) -> bool:
    """Run a campaign and kill it, in a write or at a random moment; whether it was still running then."""
    writes = generator.randrange(WRITES) if in_write else None
    process = context().Process(target=campaign, args=(out, writes))
    process.start()
    process.join(None if in_write else generator.uniform(0, seconds))
    if process.exitcode is None:
        process.kill()
        process.join()
    for path in out.rglob("*.safetensors"):  # whatever has its name is whole
        files.load(path, {"tickets": "ticket", "runs": "training"}[path.parent.name])
    return process.exitcode == -signal.SIGKILL


def kill_and_resume(undisturbed: tuple[Path, float], folder: Path, moments: int, seed: int) -> None:
    """Several times over: kill a campaign at up to three moments, let it end, and compare."""
    whole, seconds = undisturbed
    generator, left, campaigns = random.Random(seed), moments, 0
    while left > 0:
        out, campaigns = folder / str(campaigns), campaigns + 1
        for _ in range(min(left, 3)):
            left -= killed(out, seconds, generator, in_write=left % 2 == 0)
        process = context().Process(target=campaign, args=(out,))
        process.start()
        process.join()
        assert process.exitcode == 0
        assert not list(out.rglob("*.partial"))
        assert_same(out, whole)


@posix
def test_killed_at_a_few_moments_it_ends_in_the_same_bits(undisturbed, tmp_path: Path) -> None:
    kill_and_resume(undisturbed, tmp_path, 3, seed=0)


@posix
@pytest.mark.slow
def test_killed_at_fifty_moments_it_ends_in_the_same_bits(undisturbed, tmp_path: Path) -> None:
    kill_and_resume(undisturbed, tmp_path, 50, seed=1)


# ------------------------------------------------------------------------------------------------- two at once


def test_a_second_process_on_a_folder_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from sparsetweaks.lottery.files import alone\n"
        "with alone(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with (
        pytest.raises(LotteryError, match=rf"is in use by process {holder.pid} on .*: wait for it"),
        files.alone(tmp_path),
    ):
        pass
    error = io.StringIO()
    with contextlib.redirect_stderr(error), pytest.raises(SystemExit) as ended:
        sys.argv = ["sparsetweaks", "draw", "--out", str(tmp_path)]
        cli.main()
    assert ended.value.code == 1
    assert f"in use by process {holder.pid}" in error.getvalue()
    holder.kill()  # and so leaves its lock file behind
    holder.communicate()
    assert (tmp_path / files.LOCK).read_text().startswith(f"process {holder.pid} ")
    with files.alone(tmp_path):  # which stops nobody
        assert (tmp_path / files.LOCK).read_text().startswith(f"process {os.getpid()} ")
    with files.alone(tmp_path):
        pass


def test_what_dead_processes_left_half_written_is_cleared_away(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for pid in (dead.pid, os.getpid()):
        (tmp_path / f"a.safetensors.{pid}.partial").write_bytes(b"half")
    with files.alone(tmp_path):
        left = [path.name for path in tmp_path.glob("*.partial")]
    assert left == [f"a.safetensors.{os.getpid()}.partial"]


def test_a_probe_that_was_left_behind_is_cleared_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    with monkeypatch.context() as killed:
        killed.setattr(os, "getpid", lambda: dead.pid)
        killed.setattr(Path, "unlink", lambda *_, **__: None)
        files.check_writable(tmp_path)
    assert len(list(tmp_path.glob("*.partial"))) == 1
    with files.alone(tmp_path):
        assert not list(tmp_path.glob("*.partial"))


# -------------------------------------------------------------------------------------------------- a full disk


def full_disk(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """From the n-th write on, there is no space left."""
    left = iter(range(after, -1, -1))

    def fsync(descriptor: int) -> None:
        if next(left, 0) == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", fsync)


def test_a_full_disk_loses_nothing(digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsetweaks.lottery.config import Network

    recipe = Recipe(epochs=2, batch_size=64, precision="float32")
    plan: dict[str, Any] = {"seed": 0, "folder": tmp_path, "levels": 2, "fraction": 0.5}
    for after in (0, 1, 2):
        with monkeypatch.context() as patch:
            full_disk(patch, after)
            with pytest.raises(
                LotteryError, match="No space left on device; what was finished before is kept"
            ):
                draw(digits, Network("resnet8", width=4), recipe, **plan)
        assert not list(tmp_path.rglob("*.partial"))
        for path in tmp_path.rglob("*.safetensors"):
            files.load(path, {"tickets": "ticket", "runs": "training"}[path.parent.name])
    after = draw(digits, Network("resnet8", width=4), recipe, **plan)
    whole = draw(digits, Network("resnet8", width=4), recipe, **{**plan, "folder": tmp_path / "whole"})
    for one, other in zip(after, whole, strict=True):
        assert one.identity == other.identity
        assert all(torch.equal(one.masks[name], other.masks[name]) for name in other.masks)


def test_what_was_there_stays_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.save(tmp_path / "a", "ticket", {}, {"masks": {"x": torch.ones(3)}})
    before = (tmp_path / "a").read_bytes()
    full_disk(monkeypatch, 0)
    with pytest.raises(LotteryError, match="No space left"):
        files.save(tmp_path / "a", "ticket", {}, {"masks": {"x": torch.zeros(3)}})
    assert (tmp_path / "a").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system itself refuses what goes beyond so many bytes, in the middle of a write, as a full disk does."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@posix
def test_what_the_system_refuses_to_write_is_said_and_written_later(
    undisturbed, tmp_path: Path, capsys
) -> None:
    whole, _ = undisturbed
    with largest_file(50_000):  # enough for the dense ticket, and not for a training
        sys.argv = ["sparsetweaks", *map(str, [*DRAW, "--out", tmp_path])]
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert ended.value.code == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.fullmatch(
        r"sparsetweaks: cannot write .*/runs/.*: File too large; what was finished before is kept", last
    )
    assert not list(tmp_path.rglob("*.partial"))
    assert len(list(tmp_path.glob("tickets/*"))) == 1
    assert not list(tmp_path.glob("runs/*"))
    assert command(*DRAW, "--out", tmp_path) == 0
    drawn, _ = content(tmp_path)
    assert len(drawn) == 3 + 2  # tickets, and trainings of the first two
    assert_same_files(drawn, content(whole)[0])


@posix
def test_a_row_that_the_system_cuts_off_is_no_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    rows = [{"run": f"{i}", "variant": "AT", "test": "0.5"} for i in range(2)]
    append_row(path, rows[0])
    with (
        largest_file(path.stat().st_size + 3),
        pytest.raises(LotteryError, match=r"cannot write .*rows.csv: File too large; what was finished"),
    ):
        append_row(path, rows[1])
    assert path.read_bytes()[-3:] == b"1,A"
    assert read_rows(path) == rows[:1]
    append_row(path, rows[1])
    assert read_rows(path) == rows


@posix
def test_a_disk_that_is_full_before_the_start_is_found_before_the_training(tmp_path: Path) -> None:
    with largest_file(0), pytest.raises(LotteryError, match=r"cannot write to .*: File too large"):
        files.check_writable(tmp_path)
    assert not list(tmp_path.iterdir())
    files.check_writable(tmp_path)
    assert not list(tmp_path.iterdir())


@posix
def test_the_list_of_commands_too_says_what_it_could_not_write(tmp_path: Path) -> None:
    with (
        largest_file(10),
        pytest.raises(LotteryError, match=r"cannot write .*commands.jsonl: File too large"),
    ):
        commands._log(tmp_path, "draw", {}, Recipe())


@pytest.mark.parametrize("cut", [1, 5])
def test_a_row_that_was_cut_off_is_no_row_and_is_written_over(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "rows.csv"
    rows = [{"run": f"{i}", "variant": "AT, or so", "test": "0.5"} for i in range(3)]
    for row in rows[:2]:
        append_row(path, row)
    path.write_bytes(path.read_bytes()[:-cut])
    assert read_rows(path) == rows[:1]
    for row in rows[1:]:
        append_row(path, row)
    assert read_rows(path) == rows
    with path.open(newline="") as file:
        assert list(csv.DictReader(file)) == rows


# ---------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("where", [0.2, 0.5, 0.9])
def test_a_flipped_bit_is_found_wherever_it_is(tmp_path: Path, where: float) -> None:
    path = tmp_path / "a"
    files.save(path, "ticket", {"seed": 0, "words": "x" * 400}, {"masks": {"x": torch.randn(100)}})
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 2
    path.write_bytes(content)
    with pytest.raises(LotteryError, match="damaged"):
        files.load(path, "ticket")


def test_cuda_without_a_gpu_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    sys.argv = ["sparsetweaks", "draw", "--device", "cuda", "--out", str(tmp_path)]
    with pytest.raises(SystemExit):
        cli.main()
    assert "cannot train on the device 'cuda'" in capsys.readouterr().err
