"""One training in two processes: equal weights and masks in both, one that writes, and the same end when cut off."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparsetweaks.lottery import files, ranks
from sparsetweaks.lottery.config import LotteryError, Network, Recipe
from sparsetweaks.lottery.data import Data, load
from sparsetweaks.lottery.models import build
from sparsetweaks.lottery.train import Trained, train
from sparsetweaks.masks import find_masks
from sparsetweaks.pruning import prune

RECIPE = Recipe(epochs=3, batch_size=64, precision="float32")
STATES = ("last", "best", "rewind")


def small() -> Data:
    data = load("digits")
    return replace(data, train=data.train[:256], validation=data.validation[:63], test=data.test[:64])


def resnet(seed: int) -> nn.Module:
    model = build(Network("resnet8", width=4), channels=1, classes=10, seed=seed)
    return prune(model, 0.5)  # of another seed, other masks


def without_norms(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    conv = nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()
    return prune(nn.Sequential(*conv, nn.Flatten(), nn.Linear(8 * 64, 10)), 0.5)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --------------------------------------------------------------------------------------------- what each rank does


def trained_from_other_seeds(folder: Path) -> dict[str, Any]:
    """What a rank ends with that began with a network, and masks, of its own."""
    rank, results = torch.distributed.get_rank(), {}
    for name, make in (("resnet", resnet), ("without norms", without_norms)):
        model = make(seed=rank)
        done = train(model, small(), RECIPE, seed=0, rewind_epoch=1, checkpoint=folder / str(rank) / name)
        results[name] = (done, find_masks(model))
    return results


def cut_off_and_resumed(folder: Path) -> dict[str, Any]:
    """What comes of a training that was cut off after its second epoch and goes on from what the first rank kept."""
    from sparsetweaks.lottery import train as module

    module.SAVING = float("inf")  # after each epoch
    epochs: list[int] = []

    def watch(done: Trained) -> None:
        epochs.append(done.epochs)
        if epochs == [1, 2]:
            raise KeyboardInterrupt

    own = folder / str(torch.distributed.get_rank()) / "run"  # where nothing is on the second rank
    arguments: dict[str, Any] = {"seed": 0, "rewind_epoch": 1, "checkpoint": own, "on_epoch": watch}
    with pytest.raises(KeyboardInterrupt):
        train(resnet(seed=0), small(), RECIPE, **arguments)
    done = train(resnet(seed=0), small(), RECIPE, **arguments)
    assert epochs == [1, 2, 3]
    again = train(resnet(seed=0), small(), RECIPE, **arguments)
    assert epochs == [1, 2, 3]  # finished, and read back
    assert same(again.weights["best"], done.weights["best"])
    return {"resnet": (done, {})}


def what_goes_wrong(folder: Path) -> dict[str, str]:
    told = {}

    def fail() -> None:
        raise LotteryError("the file is damaged")

    def nan_on_one_rank(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return logits.sum() * (float("nan") if torch.distributed.get_rank() else 1e-6)

    attempts: dict[str, Callable[[], Any]] = {
        "reading": lambda: ranks.from_leader(fail),
        "shares": lambda: train(resnet(0), small(), replace(RECIPE, batch_size=33), seed=0),
        "loss": lambda: train(resnet(0), small(), RECIPE, seed=0, loss=nan_on_one_rank),
    }
    for name, attempt in attempts.items():
        with pytest.raises(LotteryError) as caught:
            attempt()
        told[name] = str(caught.value)
    return told


# ------------------------------------------------------------------------------------------------- two processes


def in_two(work: Callable[[Path], Any], folder: Path) -> list[Any]:
    """What `work(folder)` returns on each of two ranks, that know of each other as `torchrun` tells them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_as_rank, args=(rank, port, work, folder)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        process.kill()
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def _as_rank(rank: int, port: int, work: Callable[[Path], Any], folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    with ranks.joined():
        torch.save(work(folder), folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    return folder, in_two(trained_from_other_seeds, folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet", "without norms"])
def test_both_ranks_end_with_the_first_ones_masks_and_equal_weights(both, name: str) -> None:
    folder, (first, second) = both
    (one, masks), (other, other_masks) = first[name], second[name]
    drawn = find_masks({"resnet": resnet, "without norms": without_norms}[name](seed=0))
    assert same(masks, drawn)
    assert same(other_masks, drawn)
    for state in STATES:
        assert same(one.weights[state], other.weights[state])
        if state != "rewind":
            assert not any(one.weights[state][key][~mask].any() for key, mask in masks.items())
    assert (one.test, one.validation, one.loss, one.steps) == (other.test, other.validation, other.loss, 12)
    assert (folder / "0" / name).is_file()
    assert not (folder / "1").exists()  # the second wrote nothing
    _, groups = files.load(folder / "0" / name, "training")
    assert same(groups["best"], one.weights["best"])


@pytest.mark.slow
def test_without_batchnorm_two_processes_are_one_but_for_rounding_and_with_it_they_are_not(both) -> None:
    alone = {}
    for name, make in (("resnet", resnet), ("without norms", without_norms)):
        done, _ = both[1][0][name]
        alone = train(make(seed=0), small(), RECIPE, seed=0, rewind_epoch=1)
        differences = [
            float((alone.weights["last"][key] - value).abs().max())
            for key, value in done.weights["last"].items()
            if value.is_floating_point()
        ]
        if name == "without norms":
            assert max(differences) < 1e-5
            assert done.loss == pytest.approx(alone.loss, abs=1e-5)
        else:
            assert max(differences) > 1e-3


@pytest.mark.slow
def test_cut_off_it_goes_on_from_what_the_first_rank_kept_and_ends_in_the_same_bits(both, tmp_path) -> None:
    first, second = in_two(cut_off_and_resumed, tmp_path)
    whole, _ = both[1][0]["resnet"]
    for results in (first, second):
        done, _ = results["resnet"]
        for state in STATES:
            assert same(done.weights[state], whole.weights[state])
        assert (done.test, done.validation, done.loss) == (whole.test, whole.validation, whole.loss)


@pytest.mark.slow
def test_what_goes_wrong_on_one_rank_is_said_by_both(tmp_path: Path) -> None:
    for told in in_two(what_goes_wrong, tmp_path):
        assert told["reading"] == "the file is damaged"
        assert told["shares"] == "batches of 33 images cannot be shared equally by 2 processes"
        assert told["loss"].startswith("the loss became nan in epoch 1")


@pytest.mark.slow
def test_torchrun_draws_and_spends_a_ticket(tmp_path: Path) -> None:
    small = [
        "--epochs",
        "2",
        "--batch-size",
        "64",
        "--limit",
        "20",
        "--precision",
        "float32",
        "--out",
        tmp_path,
    ]
    draw = ["draw", "--model", "resnet8", "--width", "4", "--levels", "1", "--fraction", "0.5"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        command = [*launch, "-m", "sparsetweaks", *map(str, words)]
        environment = os.environ | ({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {})
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done

    tickets = run(*draw, *small).stdout.split()
    assert len(tickets) == 2  # said once
    spend = run("spend", tickets[1], "--variant", "vanilla", "--variant", "AT+TRT+KD", *small)
    assert spend.stdout.count("| 50 % sparse") == 2  # a line in each of its two tables
    rows = (tmp_path / "results.csv").read_text().splitlines()
    assert len(rows) == 3
    assert all("2 x " in row for row in rows[1:])
    assert len((tmp_path / "commands.jsonl").read_text().splitlines()) == 2
    assert not list(tmp_path.rglob("*.partial"))


# -------------------------------------------------------------------------------------------------------- alone


def test_alone_nothing_is_shared() -> None:
    value = torch.tensor(3.0)
    model = nn.BatchNorm1d(2)
    assert (ranks.count(), ranks.leads(), ranks.share(7)) == (1, True, slice(0, 7))
    assert ranks.total(value) is value
    assert ranks.wrapped(model) is model
    assert ranks.from_leader(lambda: 5) == 5
    ranks.check_batch(33)
    with ranks.joined():
        assert ranks.count() == 1


@pytest.mark.parametrize(("length", "count"), [(8, 2), (7, 2), (7, 3), (1, 2)])
def test_shares_are_the_whole_and_do_not_overlap(monkeypatch, length: int, count: int) -> None:
    monkeypatch.setattr(ranks, "count", lambda: count)
    parts = []
    for rank in range(count):
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        parts += list(range(length))[ranks.share(length)]
    assert parts == list(range(length))
