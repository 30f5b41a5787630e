"""Hessian eigenvalues: ours against PyHessian, on CIFAR's ResNet-20 and 512 images.

    pip install pyhessian
    python benchmarks/hessian.py --images PATH --work FOLDER      # PATH holds train/<class>/ and test/<class>/
    python benchmarks/hessian.py --work FOLDER                    # random images and labels

The network is trained for some epochs first, so that its spectrum is that of a trained network, and both look
at the same weights and images, in evaluation mode and float32, at their default tolerance of 1e-3. The true
value comes from float64 (see `reference`) and is kept in FOLDER, as the network is. Both look for eigenvalues
by magnitude. Times are from one process, one run of each after the other, and only their ratio is reported.
Extra memory is the peak above what was held before, each in a process of its own (resident memory, on Linux).
The last lines show that more data do not take more memory. Everything goes to benchmarks/results/hessian.csv.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetweaks.analysis import NotConvergedWarning, hessian_top_eigenvalues, hessian_trace
from sparsetweaks.analysis.curvature import Curvature
from sparsetweaks.analysis.evaluation import Batches, undisturbed, working_copy
from sparsetweaks.analysis.lanczos import value_errors
from sparsetweaks.analysis.subspace import subspace
from sparsetweaks.lottery.config import Network, Recipe
from sparsetweaks.lottery.data import Data, Images, load
from sparsetweaks.lottery.models import build
from sparsetweaks.lottery.train import train

RESULTS = Path(__file__).parent / "results" / "hessian.csv"
LIMIT = 500  # images per class
EPOCHS = 8
BATCH = 128
TIGHT = 1e-6
MIB = 2**20
Pair = tuple[Tensor, Tensor]


class Found(NamedTuple):
    values: list[float]
    products: int
    seconds: float


# ----------------------------------------------------------------------------------------------------
# The network and its images


def data_of(options: argparse.Namespace) -> Data:
    if options.images is not None:
        return load(options.images, limit=LIMIT, cache=options.work / "cache")
    generator = torch.Generator().manual_seed(0)
    count = 10 * LIMIT
    images = torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    part = Images(images, torch.randint(10, (count,), generator=generator))
    mean, std = torch.full((3, 1, 1), 127.5), torch.full((3, 1, 1), 73.9)
    return Data("random", part, part[:LIMIT], part[:LIMIT], tuple("0123456789"), mean, std, True, "random")


def images_of(data: Data) -> Pair:
    return data.normalise(data.train.images).contiguous(), data.train.labels


def trained(data: Data, options: argparse.Namespace) -> nn.Module:
    model = build(Network("resnet20", width=16), channels=3, classes=10, seed=0)
    kept = options.work / f"resnet20-{data.name}.pt"
    if kept.is_file():
        model.load_state_dict(torch.load(kept))
    else:
        recipe = Recipe(epochs=EPOCHS, precision="float32")
        done = train(model, data, recipe, seed=0, on_epoch=lambda t: print(f"epoch {t.epochs}", flush=True))
        print(f"trained to {done.test:.1%} test accuracy", flush=True)
        torch.save(model.state_dict(), kept)
    return model.to(memory_format=torch.contiguous_format).eval()


# ----------------------------------------------------------------------------------------------------
# The two


def ours(model: nn.Module, batch: Pair, k: int, seed: int, iterations: int = 200) -> Found:
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConvergedWarning)  # where memory is measured, after two products
        top = hessian_top_eigenvalues(
            model,
            batch,
            F.cross_entropy,
            k=k,
            which="magnitude",
            iterations=iterations,
            chunk_size=BATCH,
            keep_graph=True,
            generator=torch.Generator().manual_seed(seed),
        )
    return Found(list(top.values), top.work.products, time.perf_counter() - start)


def pyhessian(model: nn.Module, batch: Pair, k: int, seed: int, iterations: int = 100) -> Found:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it makes a reference cycle, of which torch warns
        importlib.import_module("pyhessian")
        peer: Any = sys.modules["pyhessian.hessian"]
        taken, product = [], peer.hessian_vector_product

        def counted(*given: Any) -> Any:
            taken.append(1)
            return product(*given)

        peer.hessian_vector_product = counted
        torch.manual_seed(seed)
        try:
            start = time.perf_counter()
            curvature = peer.hessian(model, F.cross_entropy, data=batch, cuda=False)
            values, _ = curvature.eigenvalues(maxIter=iterations, top_n=k)
            took = time.perf_counter() - start
        finally:
            peer.hessian_vector_product = product
            curvature = None
            model.zero_grad()  # its graph hangs on the gradients
    return Found(list(values), len(taken), took)


RUNS: dict[str, Callable[..., Found]] = {"ours": ours, "PyHessian": pyhessian}


def reference(model: nn.Module, batch: Pair, k: int, options: argparse.Namespace) -> list[float]:
    """The true values: tight vectors in float32, then their Rayleigh-Ritz values in float64 from one pass.

    Those are off by the square of what the vectors are off by; a bound on it is checked.
    """
    kept = (
        options.work / f"reference-{'random' if options.images is None else 'cifar'}-{len(batch[1])}-{k}.json"
    )
    if kept.is_file():
        return json.loads(kept.read_text())
    tight = hessian_top_eigenvalues(
        model,
        batch,
        F.cross_entropy,
        k=k + 1,
        which="magnitude",
        tolerance=TIGHT,
        chunk_size=BATCH,
        keep_graph=True,
    )
    network = working_copy(model, dtype=torch.float64)
    space = subspace(network, {})
    with undisturbed(network):
        batches = Batches(batch, network, chunk_size=64)
        curvature = Curvature(
            network, list(space.parameters.values()), batches, F.cross_entropy, keep_graph=False
        )
        flat = [space.flat([each[name].double() for name in space.parameters]) for each in tight.vectors]
        basis = torch.linalg.qr(torch.stack(flat, dim=1)).Q
        products = torch.stack(curvature.products(space, list(basis.T)), dim=1)
    values, inner = torch.linalg.eigh(basis.T @ products)
    residuals = (products @ inner - basis @ inner * values).norm(dim=0)
    errors = value_errors(values, residuals) / values.abs()
    wanted = values.abs().argsort(descending=True)[:k]
    assert errors[wanted].max() < 1e-5, f"a hundredth of what is measured, but {errors}"
    print(f"true values to within {errors[wanted].max():.1e} of themselves", flush=True)
    kept.write_text(json.dumps(values[wanted].tolist()))
    return json.loads(kept.read_text())


# ----------------------------------------------------------------------------------------------------
# Measuring


def compare(model: nn.Module, batch: Pair, k: int, repeats: int, options: argparse.Namespace) -> list[dict]:
    true = reference(model, batch, k, options)
    print(f"{len(batch[1])} images, true values: {', '.join(f'{value:.6g}' for value in true)}")
    rows = []
    for seed in range(repeats):
        found = {name: run(model, batch, k, seed) for name, run in RUNS.items()}
        row = {"images": len(batch[1]), "k": k, "seed": seed}
        for name, each in found.items():
            apart = [abs(value / known - 1) for value, known in zip(each.values, true, strict=True)]
            row |= {f"{name}: relative error": f"{max(apart):.2e}", f"{name}: products": each.products}
        row["products, ratio"] = round(found["ours"].products / found["PyHessian"].products, 3)
        row["time, ratio"] = round(found["ours"].seconds / found["PyHessian"].seconds, 3)
        rows.append(row)
        print(row, flush=True)
    return rows


def extra_memory(name: str, options: argparse.Namespace) -> float:
    """Peak memory above what was held before, in MiB; in this process, so call it once."""
    data = data_of(options)
    images, labels = images_of(data)
    model = trained(data, options)
    kind, _, count = name.partition(":")
    batch = images[: int(count)].clone(), labels[: int(count)].clone()
    F.cross_entropy(model(batch[0][:8]), batch[1][:8]).backward()  # what torch sets up at its first use
    model.zero_grad()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    if kind == "pass":
        hessian_trace(model, batch, F.cross_entropy, probes=2, chunk_size=BATCH)
    else:  # the peak is reached by the second product
        RUNS[kind](model, batch, 1, 0, iterations=2)
    return (resident("VmHWM") - before) / MIB


def resident(field: str) -> int:
    """A field of this process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measured_memory(name: str) -> float:
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def memory(options: argparse.Namespace) -> Iterator[dict]:
    many = 9 * LIMIT  # all that it was trained on
    for name in (
        f"ours:{options.count}",
        f"PyHessian:{options.count}",
        f"pass:{options.count}",
        f"pass:{many}",
    ):
        kind, _, count = name.partition(":")
        what = f"{kind}, k = 1" if kind in RUNS else f"ours, a pass in chunks of {BATCH}"
        row = {"images": int(count), "memory of": what, "extra MiB": round(measured_memory(name))}
        print(row, flush=True)
        yield row


def hardware() -> dict[str, str]:
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "network": "ResNet-20, 3 x 32 x 32",
        "hardware": f"{models[0] if models else platform.machine()}, {torch.get_num_threads()} thread",
        "versions": f"torch {torch.__version__}, pyhessian {version('pyhessian')}",
    }


def write(rows: list[dict], options: argparse.Namespace) -> None:
    """All rows so far, as a run may be cut off."""
    name = "random images" if options.images is None else "CIFAR-10 as JPEGs"
    described = [{**row, "data": name, **hardware()} for row in rows]
    with open(options.out, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in described for key in row)))
        writer.writeheader()
        writer.writerows(described)


def main() -> None:
    options = parsed()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    if options.memory_of:
        print(extra_memory(options.memory_of, options))
        return
    data = data_of(options)
    images, labels = images_of(data)
    model = trained(data, options)
    rows: list[dict] = []
    for k, count, repeats in ((1, options.count, options.repeats), (5, options.count // 8, options.repeats)):
        rows += compare(model, (images[:count].clone(), labels[:count].clone()), k, repeats, options)
        write(rows, options)
    for row in memory(options):
        rows.append(row)
        write(rows, options)
    for k in (1, 5):
        for what in ("products, ratio", "time, ratio"):
            print(f"k = {k}, {what}: median {statistics.median(r[what] for r in rows if r.get('k') == k)}")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, help="folder with train/<class>/ and test/<class>/")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/hessian"), help="keeps the network and the true values"
    )
    parser.add_argument(
        "--count", type=int, default=512, help="images that the Hessian is of; an eighth for k = 5"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", 1)))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
