"""The script for a lent GPU, where there is none: it says so, and a dry run takes every piece, and takes none twice."""

from __future__ import annotations

import csv
import importlib
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.py"
VARIANTS = 7


def run(*words: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    refused = run(tmp_path / "out")
    assert refused.returncode == 1
    assert refused.stderr.strip().startswith("no CUDA GPU is here: run this where one is")
    assert not (tmp_path / "out").exists()
    large = run(tmp_path / "out", "--device", "cpu")
    assert large.returncode == 1
    assert "add --tiny" in large.stderr


def test_a_line_that_was_cut_off_counts_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    for name in ("gpu", "paired"):
        monkeypatch.setitem(sys.modules, name, None)  # which puts back what was there
        del sys.modules[name]
    session, _ = importlib.import_module("gpu").session_of([str(tmp_path), "--device", "cpu", "--tiny"])
    session.add("step", "a", milliseconds=[1.0, 2.0])
    session.add("step", "b", milliseconds=3.0)
    whole = session.table.read_text()
    for cut in (1, 5, 50):
        session.table.write_text(whole[:-cut])
        assert not session.todo("step", "a")
        assert session.todo("step", "b")
        session.add("step", "b", milliseconds=3.0)
        assert session.table.read_text() == whole


@pytest.mark.slow
def test_a_dry_run_takes_every_piece_and_none_twice(tmp_path: Path) -> None:
    words = [tmp_path, "--device", "cpu", "--tiny"]
    nothing = run(*words, "--minutes", 0)
    assert nothing.returncode == 0, nothing.stderr
    assert "the time is up in step: the same command goes on from here" in nothing.stdout
    done = run(*words)
    assert done.returncode == 0, done.stderr
    assert "nothing is left of step, loop, prune, sparse, side, grid" in done.stdout
    with (tmp_path / "gpu.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [*dict.fromkeys(row["piece"] for row in rows)] == [
        "step",
        "loop",
        "prune",
        "sparse",
        "side",
        "grid",
    ]
    assert all(math.isfinite(float(row[name])) for row in rows for name in ("median", "least", "most"))
    assert {row["device"] for row in rows} == {"CPU, a dry run"}
    grid = {row["setting"] for row in rows if row["piece"] == "grid"}
    assert len(grid) == 1 + 2 * VARIANTS
    assert all("random images" in setting for setting in grid)
    assert len({(row["piece"], row["setting"], row["measure"]) for row in rows}) == len(rows)
    before = (tmp_path / "gpu.csv").read_bytes()
    again = run(*words)
    assert "nothing is left" in again.stdout
    assert (tmp_path / "gpu.csv").read_bytes() == before
