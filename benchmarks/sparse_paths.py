"""Whether PyTorch's sparse matrices (CSR, on a CPU) are faster than dense ones, for layers of ResNet-20 and ResNet-18.

    python benchmarks/sparse_paths.py
    python benchmarks/sparse_paths.py --resume     # only what has no row yet of this machine and so many threads

A convolution is the matrix of its kernels times the unfolded images, against PyTorch's own dense convolution: with the
unfolding ("layer", what one would run today), and without it ("unfolded", the best that a sparse convolution could hope
for). A linear layer is one product. "product" is the same product with a dense matrix. Each repeat times all ways in this
process, in an order that turns; what is printed and kept, row by row, are medians of the ratios, sparse time over dense
time: above 1, sparse is slower. 2:4 sparsity needs a GPU and is not measured here.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import paired
import torch
import torch.nn.functional as F
from torch import Tensor

PAIRS = ("layer", "unfolded", "product")  # of a sparse way and a dense one
COLUMNS = (
    "layer", "sparsity", "batch", *(f"{pair}_{part}" for pair in PAIRS for part in ("ratio", "quartiles")),
    "repeats", "threads", "torch", "hardware",
)  # fmt: skip
SAME = ("layer", "sparsity", "batch", "threads", "hardware")  # what a row stands for
SPARSITIES = (0.9, 0.95, 0.98)
# name: channels in, channels out, kernel, height and width; a kernel of 0 is a linear layer
LAYERS = {
    "resnet20 stage 1": (16, 16, 3, 32),
    "resnet20 stage 3": (64, 64, 3, 8),
    "resnet18 stage 1": (64, 64, 3, 32),
    "resnet18 stage 4": (512, 512, 3, 4),
    "linear 512 to 512": (512, 512, 0, 1),
    "linear 2048 to 2048": (2048, 2048, 0, 1),
}


def ways(layer: str, sparsity: float, batch: int) -> dict[str, Callable[[], Tensor]]:
    """The same layer of the same input, computed in each way."""
    narrow, wide, kernel, side = LAYERS[layer]
    generator = torch.Generator().manual_seed(0)
    inner = narrow * max(kernel, 1) ** 2
    matrix = torch.randn(wide, inner, generator=generator)
    kept = torch.rand(matrix.shape, generator=generator) >= sparsity
    matrix = matrix * kept
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CSR says of itself that it is in beta
        csr = matrix.to_sparse_csr()
    if not kernel:
        columns = torch.randn(inner, batch, generator=generator)
        rows = columns.T.contiguous()
        return {
            "csr": lambda: csr @ columns,
            "dense": lambda: F.linear(rows, matrix),
            "dense product": lambda: matrix @ columns,
        }
    images = torch.randn(batch, narrow, side, side, generator=generator)
    weight = matrix.view(wide, narrow, kernel, kernel)

    def unfolding() -> Tensor:
        return F.unfold(images, kernel, padding=kernel // 2).transpose(0, 1).reshape(inner, -1)

    columns = unfolding()
    return {
        "csr": lambda: csr @ columns,
        "csr and unfolding": lambda: csr @ unfolding(),
        "dense": lambda: F.conv2d(images, weight, padding=kernel // 2),
        "dense product": lambda: matrix @ columns,
    }


def measure(layer: str, sparsity: float, *, batch: int, repeats: int) -> dict[str, object]:
    found = ways(layer, sparsity, batch)
    results = {way: call() for way, call in found.items()}
    assert torch.allclose(results["csr"], results["dense product"], atol=1e-3)
    times: dict[str, list[float]] = {way: [] for way in found}
    names = list(found)
    with torch.inference_mode():
        for repeat in range(repeats + 1):
            for way in names[repeat % len(names) :] + names[: repeat % len(names)]:
                started = time.perf_counter()
                found[way]()
                if repeat:  # the first is to warm up
                    times[way].append(time.perf_counter() - started)
    row: dict[str, object] = {"layer": layer, "sparsity": sparsity, "batch": batch}
    whole = "csr and unfolding" if "csr and unfolding" in times else "csr"
    sides = ((whole, "dense"), ("csr", "dense"), ("csr", "dense product"))
    for name, (ours, theirs) in zip(PAIRS, sides, strict=True):
        ratios = [a / b for a, b in zip(times[ours], times[theirs], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        row |= {f"{name}_ratio": round(middle, 3), f"{name}_quartiles": f"{low:.3f} to {high:.3f}"}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description="Sparse matrices against dense ones on a CPU.")
    parser.add_argument("--repeats", type=int, default=15, help="times that each is timed (default: 15)")
    parser.add_argument("--batch-size", type=int, default=32, help="images or rows (default: 32)")
    parser.add_argument("--threads", type=int, default=1, help="default: 1")
    parser.add_argument("--resume", action="store_true", help="leave out what the table has of this machine")
    parser.add_argument("--out", type=Path, default=paired.RESULTS / "sparse_paths.csv")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    surroundings = {
        "repeats": given.repeats,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "hardware": paired.processor(),
    }
    for layer in LAYERS:
        for sparsity in SPARSITIES:
            wanted = {"layer": layer, "sparsity": sparsity, "batch": given.batch_size, **surroundings}
            if given.resume and any(paired.agree(line, wanted, SAME) for line in paired.read(given.out)):
                continue
            row = measure(layer, sparsity, batch=given.batch_size, repeats=given.repeats)
            print(
                f"{layer:<20} {sparsity:.0%}: CSR takes {row['layer_ratio']} of the dense layer's time "
                f"({row['layer_quartiles']}), {row['unfolded_ratio']} without unfolding, "
                f"{row['product_ratio']} of the dense product's"
            )
            paired.keep(given.out, COLUMNS, SAME, [row | surroundings])


if __name__ == "__main__":
    main()
