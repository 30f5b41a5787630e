from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sparsetweaks.lottery import cli
from sparsetweaks.lottery.config import LotteryError, Recipe
from sparsetweaks.lottery.grid import run_all
from sparsetweaks.lottery.options import engine_of
from sparsetweaks.lottery.reproduce import PRESETS
from sparsetweaks.lottery.rows import read_rows
from sparsetweaks.lottery.store import load_ticket

SMALL = ["--model", "resnet8", "--width", "4", "--epochs", "1", "--batch-size", "64", "--limit", "20"]


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """The command line's exit code, run in this process."""
    monkeypatch.setattr(sys, "argv", ["sparsetweaks", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code or 0


def one_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    assert len(lines) == 1, text
    assert "Traceback" not in text
    return lines[0]


def test_from_tickets_to_a_picture(monkeypatch, tmp_path: Path, capsys) -> None:
    assert run(monkeypatch, "draw", *SMALL, "--levels", 2, "--fraction", 0.5, "--out", tmp_path) == 0
    captured = capsys.readouterr()
    tickets = captured.out.split()
    assert len(tickets) == 3
    assert all(Path(ticket).is_file() for ticket in tickets)
    assert "level 2, 75.0 % sparse" in captured.err

    spend = ["spend", *tickets, *SMALL[4:], "--variant", "vanilla", "--variant", "AT", "--out", tmp_path]
    assert run(monkeypatch, *spend) == 0
    printed = capsys.readouterr().out
    assert "| 75 % sparse" in printed
    assert "points gained" in printed
    rows = (tmp_path / "results.csv").read_text().splitlines()
    assert len(rows) == 1 + 1 + 2 * 2  # a header, dense, two variants of two levels
    assert (tmp_path / "results.png").is_file()

    assert run(monkeypatch, *spend) == 0  # again: nothing is run or written twice
    assert (tmp_path / "results.csv").read_text().splitlines() == rows
    capsys.readouterr()
    assert run(monkeypatch, "show", "--out", tmp_path) == 0
    assert "| 75 % sparse" in capsys.readouterr().out


def test_one_shot_on_a_folder_of_images(monkeypatch, image_folder: Path, tmp_path: Path, capsys) -> None:
    words = [
        "--data",
        image_folder,
        "--size",
        8,
        *SMALL[:6],
        "--batch-size",
        4,
        "--sparsity",
        0.8,
        "--sparsity",
        0.9,
    ]
    assert run(monkeypatch, "draw", *words, "--out", tmp_path / "out") == 0
    assert "80.0 % sparse" in capsys.readouterr().err


def test_the_demo_ends_with_table_rows_and_picture(monkeypatch, tmp_path: Path, capsys) -> None:
    words = ["--epochs", 1, "--levels", 1, "--seeds", 1, "--processes", 1, "--out", tmp_path / "demo"]
    monkeypatch.setattr("sparsetweaks.lottery.demo.SCALES", {"iterations": 1})
    assert run(monkeypatch, "demo", *words) == 0
    captured = capsys.readouterr()
    for name in ("vanilla", "AT", "TRT", "AT+TRT", "dense", "60 % sparse", "results.csv", "results.png"):
        assert name in captured.out
    assert "6 of 6 runs" in captured.err
    assert len((tmp_path / "demo" / "results.csv").read_text().splitlines()) == 6


def test_tickets_without_training_and_of_masks_from_elsewhere(monkeypatch, tmp_path: Path, capsys) -> None:
    draw = ["draw", "--model", "resnet8", "--width", "4", "--limit", 20, "--out", tmp_path]
    assert run(monkeypatch, *draw, "--method", "synflow", "--sparsity", 0.5) == 0
    ticket = capsys.readouterr().out.split()[1]
    assert "synflow" in Path(ticket).name
    masks = tmp_path / "masks"
    save_file(load_ticket(ticket).masks, masks)
    assert run(monkeypatch, *draw, "--masks", masks) == 0
    same = capsys.readouterr().out.split()[1]
    assert all(torch.equal(load_ticket(same).masks[n], mask) for n, mask in load_ticket(ticket).masks.items())
    spend = ["spend", same, ticket, "--variant", "vanilla", *SMALL[4:], "--out", tmp_path]
    assert run(monkeypatch, *spend) == 0
    printed = capsys.readouterr().out
    assert "masks from masks " in printed
    assert "synflow" in printed
    assert run(monkeypatch, "report", tmp_path) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")


def test_masks_that_differ_are_compared_and_not_mixed(monkeypatch, tmp_path: Path, capsys) -> None:
    """Any mask, compared: two files and two scopes at one sparsity and one seed are four networks, four numbers."""
    draw = ["draw", "--model", "resnet8", "--width", "4", "--limit", 20, "--out", tmp_path]
    tickets, dense = [], None
    for scope in ("global", "layer"):
        assert run(monkeypatch, *draw, "--method", "random", "--sparsity", 0.8, "--scope", scope) == 0
        dense, ticket = capsys.readouterr().out.split()
        save_file(load_ticket(ticket).masks, tmp_path / f"{scope}.masks")
        assert run(monkeypatch, *draw, "--masks", tmp_path / f"{scope}.masks") == 0
        tickets += [ticket, capsys.readouterr().out.split()[1]]
    spend = [
        "spend",
        dense,
        *tickets,
        *SMALL[4:],
        "--variant",
        "vanilla",
        "--variant",
        "swish",
        "--out",
        tmp_path,
        "--tensorboard",
    ]
    assert run(monkeypatch, *spend) == 0
    captured = capsys.readouterr()
    assert captured.err.count("the dense network is trained as vanilla alone, without swish") == 1
    rows = read_rows(tmp_path / "results.csv")
    assert len(rows) == 1 + 4 * 2
    assert len({row["ticket"] for row in rows}) == 5
    shown = re.findall(r"^\| 80 % sparse +\| ([\d.]+) +\| ([\d.]+) ", captured.out, flags=re.MULTILINE)
    ours = {
        tuple(f"{100 * float(row['test']):.1f}" for row in rows if row["ticket"] == ticket and row["variant"] == name)
        for ticket in {row["ticket"] for row in rows if row["variant"] == "swish"} for name in ("vanilla", "swish")
    }  # fmt: skip
    assert len(shown) == 4
    assert {(number,) for pair in shown for number in pair} == ours
    for title in (
        "random",
        "random by layer",
        r"masks from global.masks \w{6}",
        r"masks from layer.masks \w{6}",
    ):
        assert re.search(rf"epochs\), {title}$", captured.out, flags=re.MULTILINE)
    assert run(monkeypatch, "report", tmp_path) == 0
    costs = (tmp_path / "report.html").read_text().partition("What each run cost")[2]
    assert costs.count("<td>swish</td>") == 4  # a line for each, as their sizes may differ
    assert len(list(tmp_path.glob("events/*"))) == 1 + 4 * 2


def test_trainings_of_several_tickets_are_told_from_those_of_one(monkeypatch, tmp_path: Path, capsys) -> None:
    draw = [
        "draw",
        "--model",
        "resnet8",
        "--width",
        "4",
        "--limit",
        20,
        "--method",
        "random",
        "--sparsity",
        0.5,
    ]
    tickets = []
    for seed in (0, 1):
        assert run(monkeypatch, *draw, "--seed", seed, "--out", tmp_path) == 0
        tickets.append(capsys.readouterr().out.split()[1])
    spend = ["spend", *SMALL[4:], "--variant", "vanilla", "--seed", 7, "--seed", 8, "--out", tmp_path]
    assert run(monkeypatch, *spend, tickets[0]) == 0
    assert "over 2 trainings of one ticket" in capsys.readouterr().out
    assert run(monkeypatch, *spend, tickets[1]) == 0
    captured = capsys.readouterr()
    assert "over 2 tickets (the means of 2 trainings of each)" in captured.out
    assert "vanilla, ticket of seed 1, seed 8: " in captured.err
    rows = read_rows(tmp_path / "results.csv")
    assert [(row["ticket_seed"], row["seed"]) for row in rows] == [
        ("0", "7"),
        ("0", "8"),
        ("1", "7"),
        ("1", "8"),
    ]
    assert run(monkeypatch, "report", tmp_path) == 0
    assert "<td>2 tickets, 4 trainings</td>" in (tmp_path / "report.html").read_text()


def test_the_scope_of_magnitudes_is_honoured(monkeypatch, tmp_path: Path, capsys) -> None:
    shares = {}
    for scope in ("global", "layer", "erk"):
        words = [*SMALL, "--sparsity", 0.8, "--scope", scope, "--out", tmp_path]
        assert run(monkeypatch, "draw", *words) == 0
        ticket = load_ticket(capsys.readouterr().out.split()[1])
        assert ticket.scope == scope
        shares[scope] = tuple(int(mask.sum()) for mask in ticket.masks.values())
    assert len(set(shares.values())) == 3


def test_pools_by_the_command_line(monkeypatch, tmp_path: Path, capsys) -> None:
    assert run(monkeypatch, "draw", *SMALL, "--levels", 2, "--fraction", 0.5, "--out", tmp_path) == 0
    tickets = capsys.readouterr().out.split()
    spend = ["spend", *tickets, *SMALL[4:], "--variant", "vanilla", "--variant", "pools", "--out", tmp_path]
    assert run(monkeypatch, *spend) == 0
    assert re.search(r"\| points gained \| pools +\|", capsys.readouterr().out)
    rows = (tmp_path / "results.csv").read_text()
    assert run(monkeypatch, *spend) == 0
    assert (tmp_path / "results.csv").read_text() == rows


@pytest.mark.parametrize("more", [[], pytest.param(["--processes", 2], marks=pytest.mark.slow)])
def test_spending_goes_on_without_a_run_that_fails(monkeypatch, tmp_path: Path, capsys, more: list) -> None:
    """The authors' skips have more parameters than survive in one of these tickets."""
    words = ["draw", *SMALL[:4], *SMALL[8:], "--method", "random", "--out", tmp_path, "--sparsity", 0.5]
    assert run(monkeypatch, *words, "--sparsity", 0.99) == 0
    tickets = capsys.readouterr().out.split()
    spend = ["spend", *tickets, *SMALL[4:], "--out", tmp_path, *more]
    spend += [word for name in ("authors-skips", "vanilla", "mish") for word in ("--variant", name)]
    assert run(monkeypatch, *spend) == 1
    captured = capsys.readouterr()
    cell = "resnet8 on digits, seed 0, random, level 1, 99.0 % sparse, authors-skips: the skips add"
    *lines, last = captured.err.splitlines()
    assert len(lines) == 1 + 7 and sum(line.startswith(f"failed: {cell}") for line in lines) == 1
    assert last.startswith(f"sparsetweaks: 1 run failed, and all others are kept: {cell}")
    rows = (tmp_path / "results.csv").read_text()
    assert len(rows.splitlines()) == 1 + 1 + 2 * 3 - 1
    monkeypatch.setattr("sparsetweaks.lottery.spend.train", lambda *_, **__: pytest.fail("it trained"))
    assert run(monkeypatch, *spend) == 1
    assert (tmp_path / "results.csv").read_text() == rows
    capsys.readouterr()
    assert run(monkeypatch, "show", "--out", tmp_path) == 0
    assert "authors-skips" in capsys.readouterr().out


def test_a_figure_by_the_command_line(monkeypatch, tmp_path: Path, capsys) -> None:
    preset = replace(PRESETS["digits"], recipe=Recipe(epochs=1, batch_size=64), levels=1, seeds=(0,))
    monkeypatch.setitem(PRESETS, "digits", preset)
    assert run(monkeypatch, "reproduce", "--list", "--out", tmp_path / "out") == 0
    assert "  yes  " not in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert run(monkeypatch, "reproduce", "1b", "--device", "cpu", "--out", tmp_path / "out") == 0
    captured = capsys.readouterr()
    assert "Figure 1b, resnet8, width 8" in captured.out
    assert "one seed settles nothing" in captured.out
    assert "7 of 7 stages" in captured.err  # one drawing, three variants of two networks
    assert run(monkeypatch, "reproduce", "--list", "--out", tmp_path / "out") == 0
    assert capsys.readouterr().out.count("  yes  ") == 1


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["draw", "--data", "nowhere"], 1, "unknown data set 'nowhere'"),
        (["draw", "--model", "resnet9"], 1, "depth must be 6n + 2"),
        (["draw", "--device", "cuda:99"], 1, "cannot train on the device 'cuda:99'"),
        (["draw", "--device", "toaster"], 1, "cannot train on the device 'toaster'"),
        (["draw", "--rewind-epoch", "500", *SMALL], 1, "rewind_epoch must lie between 0 and 0"),
        (["draw", "--learning-rate", "1e30", *SMALL], 1, "the loss became"),
        (["spend", "nowhere.safetensors"], 1, "nowhere.safetensors does not exist"),
        (["show"], 1, "does not exist: spend some tickets first"),
        (["draw", "--model", "lenet"], 1, "unknown network 'lenet'"),
        (["draw", "--method", "snip"], 1, "say to which --sparsity"),
        (["draw", "--masks", "nowhere"], 1, "nowhere does not exist"),
        (
            ["draw", "--masks", "a", "--method", "snip", "--sparsity", "0.5", "--scope", "erk"],
            1,
            "--masks brings the masks: leave out --method, --scope, --sparsity",
        ),
        (["draw", "--masks", "a", "--levels", "2"], 1, "--masks brings the masks: leave out --levels"),
        (
            ["draw", "--method", "random", "--sparsity", "0.5", "--learning-rate", "5", "--compile"],
            1,
            "trains nothing: leave out --compile, --learning-rate",
        ),
        (
            ["draw", "--warmup-epochs", "inf"],
            1,
            "warmup_epochs must lie between 0 and the 180 epochs, got inf",
        ),
        (["draw", "--device", "meta"], 1, "cannot train on the device 'meta'"),
        (["draw", "--masks-name", "a"], 1, "--masks-name is for --masks: leave out --masks-name"),
        (
            ["draw", "--sparsity", "0.5", "--levels", "2", "--fraction", "0.2"],
            1,
            "--sparsity prunes in one shot: leave out --fraction, --levels",
        ),
        (
            ["draw", "--method", "snip", "--sparsity", "0.5", "--levels", "16", "--rewind-epoch", "1"],
            1,
            "--method snip prunes once and trains nothing: leave out --levels, --rewind-epoch",
        ),
        (["reproduce", "3"], 1, "unknown figure '3'; choose from 1a"),
        (["reproduce", "4a", "--preset", "paper"], 1, "needs --data"),
        (["reproduce", "4a", "--device", "cuda:99"], 1, "cannot train on the device 'cuda:99'"),
        (
            ["reproduce", "4a", "--gpus-per-run", "0.25"],
            1,
            "--gpus-per-run and --ray-address are for --engine",
        ),
        (
            ["reproduce", "4a", "--ray-address", "auto"],
            1,
            "--gpus-per-run and --ray-address are for --engine",
        ),
        (["reproduce", "4a", "--engine", "ray", "--processes", "2"], 1, "--processes is for --engine local"),
        (["reproduce", "4a", "--engine", "ray", "--device", "cuda:1"], 1, "Ray says which: not 'cuda:1'"),
        (
            ["reproduce", "4a", "--engine", "ray", "--device", "cpu", "--gpus-per-run", "0.5"],
            1,
            "--gpus-per-run is for --device cuda",
        ),
    ],
)
def test_what_a_user_can_put_right_is_one_line(monkeypatch, tmp_path, capsys, words, code, message) -> None:
    assert run(monkeypatch, *words, "--out", tmp_path / "out") == code
    assert message in one_line(capsys.readouterr().err)


@pytest.mark.slow
def test_tickets_are_spent_in_processes_as_in_one(monkeypatch, tmp_path: Path, capsys) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(monkeypatch, "draw", *SMALL, "--levels", 2, "--fraction", 0.5, "--out", one) == 0
    tickets = capsys.readouterr().out.split()
    words = [
        *tickets,
        *SMALL[4:],
        "--variant",
        "pools",
        "--variant",
        "vanilla",
        "--variant",
        "mish",
        "--threads-per-run",
        1,
    ]
    both = {}
    for out, more in ((one, []), (two, ["--processes", 2, "--tensorboard"])):
        assert run(monkeypatch, "spend", *words, "--out", out, *more) == 0
        captured = capsys.readouterr()
        assert "level 2, 75.0 % sparse, pools, seed 0: " in captured.err
        both[out] = {(row["run"], row["variant"]): row["test"] for row in read_rows(out / "results.csv")}
    assert both[one] == both[two]
    assert len(both[one]) == 1 + 2 * 3
    assert len(list(two.glob("events/*"))) == 5  # pools train nothing of their own


def test_torchrun_and_several_runs_at_a_time_are_not_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsetweaks.lottery.options.count", lambda: 2)
    rest = {"threads_per_run": None, "gpus_per_run": None, "ray_address": None}
    for engine, processes in (("local", 2), ("ray", 1)):
        with (
            pytest.raises(LotteryError, match="torchrun has several processes share each run"),
            engine_of("cpu", engine=engine, processes=processes, **rest),
        ):
            pass


def test_a_figure_runs_on_the_engine_that_is_asked_for(monkeypatch, tmp_path: Path, capsys) -> None:
    asked = []

    @contextlib.contextmanager
    def on_ray(**options: object) -> Iterator[object]:
        asked.append(options)
        yield run_all

    preset = replace(PRESETS["digits"], recipe=Recipe(epochs=1, batch_size=64), levels=1, seeds=(0,))
    monkeypatch.setitem(PRESETS, "digits", preset)
    monkeypatch.setattr("sparsetweaks.lottery.options.on_ray", on_ray)
    words = [
        "reproduce",
        "1c",
        "--engine",
        "ray",
        "--ray-address",
        "auto",
        "--threads-per-run",
        1,
        "--out",
        tmp_path,
    ]
    assert run(monkeypatch, *words, "--device", "cpu", "--tensorboard") == 0
    assert asked == [{"address": "auto", "gpus": 0.0, "threads": 1}]
    assert "Figure 1c, resnet8" in capsys.readouterr().out
    assert len(list(tmp_path.glob("events/*/events.out.tfevents.*"))) == 4  # one per training


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["draw", "--sparsity", "1.0"], "1.0 is not in the range 0<x<1"),
        (["draw", "--sparsity", "0"], "0.0 is not in the range 0<x<1"),
        (["draw", "--fraction", "-1"], "-1.0 is not in the range 0<x<1"),
        (["draw", "--levels", "0"], "0 is not in the range x>=1"),
        (["draw", "--epochs", "many"], "'many' is not a valid integer"),
        (["spend"], "Missing argument 'TICKETS...'"),
        (["sell"], "No such command 'sell'"),
        (["draw", "--size", "1"], "1 is not in the range x>=2"),
    ],
)
def test_a_command_line_that_makes_no_sense_ends_with_2(monkeypatch, capsys, words, message) -> None:
    assert run(monkeypatch, *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_unknown_variants_and_foreign_files_are_found_before_training(monkeypatch, tmp_path, capsys) -> None:
    (tmp_path / "a").write_text("no ticket")
    assert run(monkeypatch, "spend", tmp_path / "a", "--variant", "magic", "--out", tmp_path) == 1
    assert "unknown variant 'magic'" in one_line(capsys.readouterr().err)
    assert run(monkeypatch, "spend", tmp_path / "a", "--out", tmp_path) == 1
    assert "is not a file of sparsetweaks" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize("command", [["draw"], ["demo"], ["spend", "a"]])
def test_an_output_folder_that_cannot_be_written_to_is_found_before_training(
    monkeypatch, tmp_path: Path, capsys, command: list[str]
) -> None:
    (tmp_path / "file").write_text("")
    started = time.process_time()
    assert run(monkeypatch, *command, "--out", tmp_path / "file" / "out") == 1
    assert "cannot write to" in one_line(capsys.readouterr().err)
    assert time.process_time() - started < 5


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_read_only_folder_is_found_before_training(monkeypatch, tmp_path: Path, capsys) -> None:
    tmp_path.chmod(0o500)
    assert run(monkeypatch, "draw", "--out", tmp_path / "out") == 1
    assert "Permission denied" in one_line(capsys.readouterr().err)


def test_a_missing_extra_says_how_to_install_it(monkeypatch, capsys) -> None:
    monkeypatch.setattr(cli, "EXTRA", ("click", "no_such_library"))
    assert run(monkeypatch, "demo") == 1
    assert one_line(capsys.readouterr().err).endswith(
        "needs no_such_library: pip install 'sparsetweaks[lottery]'"
    )


def test_the_module_is_the_command() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "sparsetweaks", "--help"], capture_output=True, text=True, check=True
    )
    for name in ("draw", "spend", "show", "demo", "report", "reproduce"):
        assert name in shown.stdout


def heed_interrupts() -> None:
    """In a new process: SIGINT as in a terminal, also if these tests run in the background, where it is ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_an_interrupted_drawing_loses_nothing_and_goes_on(tmp_path: Path) -> None:
    words = ["--levels", "3", "--epochs", "20", *SMALL[:4], *SMALL[6:], "--out", str(tmp_path)]
    command = [sys.executable, "-m", "sparsetweaks", "draw", *words]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts
    )
    wait_for(lambda: list(tmp_path.glob("tickets/*level01*.safetensors")), process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert error.strip().endswith(
        "interrupted: all that was finished is kept; the same command goes on from there"
    )

    drawn = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*.safetensors")}
    first = min(drawn, key=drawn.__getitem__)
    assert not list(tmp_path.glob("tickets/*level03*"))
    again = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert len(again.stdout.split()) == 4
    assert first.stat().st_mtime_ns == drawn[first]  # the finished level was not trained again
    assert not list(tmp_path.rglob("*.partial"))


def test_an_error_that_an_interrupt_brought_about_is_an_interrupt(monkeypatch, capsys) -> None:
    """As in a library that releases, in `finally`, the lock that the interrupt kept it from acquiring."""
    lock = threading.RLock()

    def interrupted(**_: object) -> None:
        try:
            raise KeyboardInterrupt
        finally:
            lock.release()

    monkeypatch.setattr("sparsetweaks.lottery.commands.commands", interrupted)
    assert run(monkeypatch, "demo") == 130
    assert one_line(capsys.readouterr().err).startswith("sparsetweaks: interrupted: ")


def test_an_interrupted_demo_ends_its_processes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sparsetweaks", "demo", "--processes", "2", "--out", str(tmp_path)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts
    )
    wait_for(lambda: list(tmp_path.glob("runs/*.safetensors")), process)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)  # ends only when no child holds the pipes
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert time.monotonic() - started < 30


def wait_for(condition, process: subprocess.Popen[str], seconds: float = 100) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.02)
