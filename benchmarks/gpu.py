"""Everything that wants a GPU, in pieces that can be cut off: speed, pruning, 2:4 weights, and the paper's recipe.

    python benchmarks/gpu.py OUT --data CIFAR --minutes 9.5     # again and again, until nothing is left
    python benchmarks/gpu.py OUT --device cpu --tiny            # a dry run of every piece, in under a minute

- `step`: a training step of ResNet-18 and ResNet-20 (batch 128, CIFAR's size) in float32, bfloat16 and channels_last,
  compiled, and compiled with CUDA graphs. The quickest way is the one that later pieces train in.
- `loop`: an epoch of `train`, masks kept, evaluation left out, over the same number of bare steps between its epochs.
- `prune`: global magnitude pruning of 100 million weights on the device, over torch's; and the memory of both.
- `sparse`: linear layers with 2:4 weights in torch's semi-structured form, over dense ones.
- `side`: the total throughput of several processes side by side, over that of one.
- `grid`: ResNet-18 by the paper's recipe: dense, timed alone (the goal: 180 epochs in 5 minutes or less), then one-shot
  tickets of 91 and 97 %, with the tweaks of this package and with their authors', several side by side.

What is measured goes to OUT/gpu.csv, all rows of a setting at once; what is there is not measured again, and a last line
that lacks its end counts for nothing. Checkpoints go to --scratch:
with the same one, trainings go on where they were cut off. No new piece of work begins after --minutes, and trainings
then stop. Without --data the images are random bytes, which do for the times; their accuracies mean nothing and the
rows say so.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import paired
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from sparsetweaks.lottery.config import Network, Recipe, variant
from sparsetweaks.lottery.data import Data, Images, load
from sparsetweaks.lottery.draw import draw_one_shot
from sparsetweaks.lottery.grid import run_all
from sparsetweaks.lottery.models import build
from sparsetweaks.lottery.spend import spend
from sparsetweaks.lottery.store import load_ticket, ticket_path
from sparsetweaks.lottery.train import Trained, train
from sparsetweaks.pruning import prune

COLUMNS = ("piece", "setting", "measure", "median", "least", "most", "n", "device", "torch")
WAYS: dict[str, dict[str, Any]] = {  # of computing a step: precision, and how to compile
    "float32": {"precision": "float32", "compile": False},
    "bfloat16": {"precision": "bfloat16", "compile": False},
    "bfloat16, compiled": {"precision": "bfloat16", "compile": "default"},
    "bfloat16, CUDA graphs": {"precision": "bfloat16", "compile": "reduce-overhead"},
}
VARIANTS = (
    "vanilla", "AT", "TRT", "AT+TRT",
    "authors-AT+unmatched", "authors-TRT", "authors-AT+authors-TRT+unmatched",  # their skips outweigh the survivors
)  # fmt: skip
SPARSITIES = (0.91, 0.97)
LINEAR = (
    (512, 512),
    (2048, 2048),
    (4096, 4096),
    (4096, 11008),
)  # features in and out; the last two of language models
STEP = ": milliseconds"  # of what is measured of a step
CIFAR_STEPS = 45_000 // 128  # of an epoch


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    networks: tuple[Network, ...] = (Network("resnet18"), Network("resnet20"))
    images: int = 50_000
    pixels: int = 32
    batch: int = 128
    epochs: int = 180
    steps: int = 50  # per timing
    repeats: int = 9
    copies: int = 9  # of ResNet-18's weights, to prune
    side: tuple[int, ...] = (1, 2, 4)
    seconds: float = 15.0  # side by side
    rows: int = 4096  # through linear layers
    linear: tuple[tuple[int, int], ...] = LINEAR
    scales: int | None = None  # iterations; None for the usual


TINY = Size(
    networks=(Network("resnet8", 4),), images=64, pixels=8, batch=16, epochs=2, steps=2, repeats=2, copies=1,
    side=(1, 2), seconds=0.2, rows=32, linear=((64, 64),), scales=1,
)  # fmt: skip


class OutOfTime(Exception):
    """Not an error: the rest is for another call."""


@dataclass(frozen=True)
class Deadline:
    """An `on_epoch` that ends a training when the time is up; what it keeps meanwhile is where the next call goes on."""

    at: float  # by time.time(), which all processes share

    def __call__(self, _: Trained | None = None) -> None:
        if time.time() >= self.at:
            raise OutOfTime


@dataclass(frozen=True)
class Session:
    """Where to measure, how much, and what has been measured."""

    out: Path
    scratch: Path
    device: torch.device
    size: Size
    tiny: bool
    data: str | None
    side: int
    deadline: Deadline

    @property
    def table(self) -> Path:
        return self.out / "gpu.csv"

    def rows(self) -> list[dict[str, str]]:
        """What was measured; a last line that was cut off is none."""
        if not self.table.is_file():
            return []
        lines = self.table.read_text(encoding="utf-8").splitlines(keepends=True)
        return list(csv.DictReader(line for line in lines if line.endswith("\n")))

    def todo(self, piece: str, setting: str) -> bool:
        """Whether something is still to be measured; raises when there is no time left for it."""
        if any((row["piece"], row["setting"]) == (piece, setting) for row in self.rows()):
            return False
        self.deadline()
        return True

    def add(self, piece: str, setting: str, **measures: float | list[float]) -> None:
        """Write down what came out, a line per measure: all of them, or none when this is killed."""
        rows: list[dict[str, Any]] = [*self.rows()]
        where = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU, a dry run"
        for measure, found in measures.items():
            values = found if isinstance(found, list) else [found]
            numbers = [f"{each:.6g}" for each in (statistics.median(values), min(values), max(values))]
            told = dict(zip(("median", "least", "most"), numbers), n=len(values), device=where)
            named = {"piece": piece, "setting": setting, "measure": measure}
            rows.append({**named, **told, "torch": torch.__version__})
            print(f"{piece}: {setting}: {measure} {numbers[0]} ({numbers[1]} to {numbers[2]})", flush=True)
        paired.write(self.table, COLUMNS, rows)

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], Any]) -> float:
        self.wait()
        started = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - started


# ----------------------------------------------------------------------------------------------------- training


@lru_cache(maxsize=1)
def data_of(source: str | None, size: Size, device: torch.device) -> Data:
    """The images, on the device: those asked for, or random bytes."""
    if source is not None:
        return load(source).to(device)
    generator = torch.Generator().manual_seed(0)
    shape = (size.images, 3, size.pixels, size.pixels)
    images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    everything = Images(images, torch.randint(10, (size.images,), generator=generator))
    held_out = size.images // 10
    parts = everything[2 * held_out :], everything[:held_out], everything[held_out : 2 * held_out]
    mean, std = torch.full((3, 1, 1), 127.5), torch.full((3, 1, 1), 73.9)
    return Data("random", *parts, tuple("0123456789"), mean, std, True, f"random {size.images}").to(device)


def recipe_of(size: Size, way: str, *, tiny: bool, **more: Any) -> Recipe:
    """The paper's, computed in one of the ways; a dry run compiles nothing."""
    options = {"epochs": size.epochs, "batch_size": size.batch, **WAYS[way], **more}
    return Recipe(**options | ({"compile": False} if tiny else {}))


class Bare:
    """Steps on one batch that lies ready: as little as training can be."""

    def __init__(self, network: Network, size: Size, way: str, device: torch.device, *, tiny: bool) -> None:
        recipe, form = recipe_of(size, way, tiny=tiny), torch.channels_last
        if way == "float32":
            form = torch.contiguous_format
        self.model = build(network, channels=3, classes=10, seed=0).to(device).to(memory_format=form).train()
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), recipe.learning_rate, recipe.momentum, weight_decay=recipe.weight_decay
        )
        compiled = WAYS[way]["compile"]
        how = {"backend": "eager"} if tiny else {"mode": compiled}  # a dry run has no compiler
        self.forward = torch.compile(self.model, **how) if compiled else self.model
        shape = (size.batch, 3, size.pixels, size.pixels)
        self.images = torch.randn(shape, device=device).contiguous(memory_format=form)
        self.labels = torch.randint(10, (size.batch,), device=device)
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=way != "float32")

    def __call__(self, steps: int) -> None:
        for _ in range(steps):
            with self.autocast:
                logits = self.forward(self.images)
            self.optimizer.zero_grad()
            F.cross_entropy(logits.float(), self.labels).backward()
            self.optimizer.step()


def step(session: Session) -> None:
    size = session.size
    for network in size.networks:
        if not session.todo("step", network.name):
            continue
        bare = {way: Bare(network, size, way, session.device, tiny=session.tiny) for way in WAYS}
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        for each in bare.values():
            each(3)  # compiles, and records CUDA graphs
        for _ in range(size.repeats):
            for way, each in bare.items():
                times[way].append(session.seconds(partial(each, size.steps)) / size.steps)
        found: dict[str, Any] = {f"{way}{STEP}": [1000 * each for each in times[way]] for way in WAYS}
        for way in list(WAYS)[1:]:
            found[f"{way} / float32"] = [ours / plain for ours, plain in zip(times[way], times["float32"])]
        for way in WAYS:
            found[f"{way}: minutes of 180 epochs"] = statistics.median(times[way]) * CIFAR_STEPS * 180 / 60
        session.add("step", network.name, **found)


def quickest(session: Session) -> str:
    """The way of the quickest step of the first network, or plain bfloat16 where that is not measured."""
    network, found = session.size.networks[0].name, {}
    for row in session.rows():
        if (row["piece"], row["setting"]) == ("step", network) and row["measure"].endswith(STEP):
            found[row["measure"].removesuffix(STEP)] = float(row["median"])
    return min(found, key=found.__getitem__) if found else "bfloat16"


def loop(session: Session) -> None:
    size, way = session.size, quickest(session)
    for network in size.networks:
        setting = f"{network.name}, {way}"
        if not session.todo("loop", setting):
            continue
        every = data_of(None, size, session.device)
        count = min(size.steps * size.batch, len(every.train))
        data = Data(**{**vars(every), "train": every.train[:count]})
        bare = Bare(network, size, way, session.device, tiny=session.tiny)
        bare(3)
        model = prune(build(network, channels=3, classes=10, seed=0), 0.9)
        steps, times = count // size.batch, []

        def after_epoch(done: Trained) -> None:
            times.append((done.seconds, session.seconds(partial(bare, steps))))  # noqa: B023

        recipe = recipe_of(size, way, tiny=session.tiny, **{"epochs": size.repeats + 2})
        train(model, data, recipe, seed=0, on_epoch=after_epoch)
        ratios = [(this - before) / own for (before, _), (this, own) in itertools.pairwise(times[1:])]
        session.add("loop", setting, **{"epoch / bare steps": ratios})


# ------------------------------------------------------------------------------------------- pruning and 2:4


def prune_piece(session: Session) -> None:
    """`prune` copies the model and leaves the given one; torch's changes it in place, and gets a new one each time."""
    size = session.size
    if not session.todo("prune", "95 % of all convolutions"):
        return

    def weights() -> nn.Sequential:
        pairs = ((64, 64), (64, 128), (128, 256), (256, 512), (512, 512), (512, 512)) * size.copies
        with torch.device(session.device):
            return nn.Sequential(*(nn.Conv2d(a, b, 3, bias=False) for a, b in pairs))

    def torchs(model: nn.Sequential) -> None:
        places = [(layer, "weight") for layer in model]
        torch_prune.global_unstructured(places, torch_prune.L1Unstructured, amount=0.95)

    methods = {"ours": lambda model: prune(model, 0.95, include="*"), "torch's": torchs}
    times: dict[str, list[float]] = {name: [] for name in methods}
    memory: dict[str, float] = {}
    for repeat in range(size.repeats + 1):
        for name, method in methods.items():
            model = weights()
            taken = session.seconds(partial(method, model))
            if repeat:
                times[name].append(taken)
            elif session.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                method(weights())
                own = sum(parameter.nbytes for parameter in model.parameters())
                memory[f"{name}: extra memory / weights"] = (
                    torch.cuda.max_memory_allocated() - before
                ) / own - 1
    found: dict[str, Any] = {f"{name}: milliseconds": [1000 * t for t in times[name]] for name in methods}
    found["ours / torch's"] = [a / b for a, b in zip(*times.values(), strict=True)]
    session.add("prune", "95 % of all convolutions", **found, **memory)


def sparse(session: Session) -> None:
    """A GPU multiplies 2:4 weights in a form of their own; a dry run takes the same weights in the dense form."""
    size, device = session.size, session.device
    for inputs, outputs in size.linear:
        setting = f"linear {inputs} to {outputs}, {size.rows} rows"
        if not session.todo("sparse", setting):
            continue
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        weight, rows = (
            torch.randn(outputs, inputs),
            torch.randn(size.rows, inputs, device=device, dtype=dtype),
        )
        keep = (
            weight.abs().view(outputs, -1, 4).argsort(dim=-1).argsort(dim=-1) >= 2
        )  # the larger two of four
        weight = (weight * keep.view(outputs, inputs)).to(device, dtype)
        semi: Any = weight
        if device.type == "cuda":
            semi = torch.sparse.to_sparse_semi_structured(weight)
        torch.testing.assert_close(F.linear(rows, semi), F.linear(rows, weight), rtol=1e-2, atol=0.5)
        times: tuple[list[float], list[float]] = ([], [])
        with torch.inference_mode():
            for repeat in range(size.repeats + 1):
                for side, matrix in enumerate((semi, weight)):
                    taken = session.seconds(partial(multiply, rows, matrix, size.steps))
                    if repeat:
                        times[side].append(taken / size.steps)
        ratios = [ours / dense for ours, dense in zip(*times, strict=True)]
        session.add(
            "sparse", setting, **{"2:4 / dense": ratios, "dense: milliseconds": [1000 * t for t in times[1]]}
        )


def multiply(rows: Tensor, matrix: Tensor, times: int) -> None:
    for _ in range(times):
        F.linear(rows, matrix)


# ------------------------------------------------------------------------------------------------- side by side


def one_of(
    network: Network, size: Size, way: str, device: str, tiny: bool, meeting: Path, count: int
) -> float:
    """Images per second of one process, while all of them run."""
    bare = Bare(network, size, way, torch.device(device), tiny=tiny)
    bare(3)
    meeting.mkdir(parents=True, exist_ok=True)
    (meeting / f"{time.time_ns()}-{id(bare)}").touch()
    while len(list(meeting.iterdir())) < count:
        time.sleep(0.01)
    started, steps = time.perf_counter(), 0
    while time.perf_counter() - started < size.seconds:
        bare(5)
        steps += 5
        if device != "cpu":
            torch.cuda.synchronize()
    return steps * size.batch / (time.perf_counter() - started)


def side(session: Session) -> None:
    size, way = session.size, quickest(session)
    for network in reversed(size.networks):  # the small one first: it leaves more of the device idle
        setting = f"{network.name}, {way}"
        if not session.todo("side", setting):
            continue
        totals = {}
        for count in size.side:
            meeting = session.scratch / f"meeting-{time.time_ns()}"
            own = partial(one_of, network, size, way, session.device.type, session.tiny, meeting, count)
            totals[count] = sum(run_all([own] * count, processes=max(count, 2)))
        found = {f"{count} at a time: images per second": total for count, total in totals.items()}
        found |= {f"{count} at a time / 1": total / totals[1] for count, total in totals.items() if count > 1}
        session.add("side", setting, **found)


# --------------------------------------------------------------------------------------------- the paper's recipe


def grid(session: Session) -> None:
    size, network = session.size, session.size.networks[0]
    recipe = recipe_of(size, quickest(session), tiny=session.tiny)
    runs, images = session.scratch / "grid", "" if session.data else ", random images"
    cells = {
        f"{network.name}, {100 * sparsity:.0f} %, {name}{images}": (sparsity, name)
        for sparsity in SPARSITIES
        for name in VARIANTS
    }
    dense = f"{network.name}, dense, {size.epochs} epochs{images}"
    missing = [setting for setting in (dense, *cells) if session.todo("grid", setting)]
    if not missing:
        return
    data = data_of(session.data, size, session.device)
    common: dict[str, Any] = {
        "seed": 0,
        "folder": runs,
        "sparsities": SPARSITIES,
        "on_epoch": session.deadline,
    }
    tickets = draw_one_shot(data, network, recipe, **common)
    if dense in missing:
        session.add("grid", dense, **measures_of(trained_dense(tickets[0], data, recipe, runs)))
    paths = {sparsity: ticket_path(runs, ticket) for sparsity, ticket in zip(SPARSITIES, tickets[1:])}
    tasks = [
        partial(one_run, setting, paths[cells[setting][0]], cells[setting][1], session.data, size, recipe, session.device,
                runs, session.deadline)
        for setting in missing if setting != dense
    ]  # fmt: skip
    for setting, trained in run_all(tasks, processes=session.side):
        session.add("grid", setting, **measures_of(trained))


def trained_dense(ticket: Any, data: Data, recipe: Recipe, runs: Path) -> Trained:
    """What drawing trained, read back."""
    return spend(ticket, variant("vanilla"), data, recipe, seed=ticket.seed, folder=runs / "runs")


def one_run(
    setting: str, path: Path, name: str, source: str | None, size: Size, recipe: Recipe, device: torch.device,
    runs: Path, deadline: Deadline,
) -> tuple[str, Trained]:  # fmt: skip
    ticket, tweaks = load_ticket(path), variant(name)
    if tweaks.scales is not None and size.scales is not None:
        tweaks = replace(tweaks, scales={"iterations": size.scales})
    data, folder = data_of(source, size, device), runs / "runs"
    done = spend(ticket, tweaks, data, recipe, seed=ticket.seed, folder=folder, name=name, on_epoch=deadline)
    done.weights.clear()  # large, and kept in the folder
    return setting, done


def measures_of(trained: Trained) -> dict[str, float | list[float]]:
    assert trained.test is not None, "it was trained to its end"
    return {
        "test accuracy, %": 100 * trained.test,
        "minutes of training": trained.seconds / 60,
        "milliseconds per step": 1000 * trained.seconds / trained.steps,
        "non-zeros": trained.note["nonzeros"],
        "added": trained.note["added"],
    }


PIECES: dict[str, Callable[[Session], None]] = {
    "step": step, "loop": loop, "prune": prune_piece, "sparse": sparse, "side": side, "grid": grid,
}  # fmt: skip


def session_of(arguments: list[str]) -> tuple[Session, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder for gpu.csv")
    parser.add_argument("--pieces", nargs="+", choices=list(PIECES), default=list(PIECES))
    parser.add_argument("--data", help="CIFAR's folder, or any that `sparsetweaks draw` takes")
    parser.add_argument("--scratch", type=Path, help="folder for checkpoints (default: OUT/scratch)")
    parser.add_argument(
        "--minutes", type=float, default=9.5, help="after which nothing is begun (default: 9.5)"
    )
    parser.add_argument(
        "--side", type=int, help="trainings of the grid at a time (default: 4; 2 in a dry run)"
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="the smallest of everything, to see that it runs")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA GPU is here: run this where one is, or try all of it with --device cpu --tiny")
    if given.device == "cpu" and not given.tiny:
        sys.exit("on a CPU this would take weeks: add --tiny for a dry run, or take --device cuda")
    given.out.mkdir(parents=True, exist_ok=True)
    deadline = Deadline(time.time() + 60 * given.minutes)
    scratch, side = given.scratch or given.out / "scratch", given.side or (2 if given.tiny else 4)
    size, device = TINY if given.tiny else Size(), torch.device(given.device)
    return Session(given.out, scratch, device, size, given.tiny, given.data, side, deadline), given.pieces


def main() -> None:
    session, pieces = session_of(sys.argv[1:])
    torch.set_float32_matmul_precision("high")
    if session.device.type == "cpu":
        torch.set_num_threads(1)
    for piece in pieces:
        torch.compiler.reset()  # it gives up on a forward that it has compiled too often
        try:
            PIECES[piece](session)
        except OutOfTime:
            print(f"the time is up in {piece}: the same command goes on from here", flush=True)
            return
    print(f"nothing is left of {', '.join(pieces)}: {session.table}", flush=True)


if __name__ == "__main__":
    main()
