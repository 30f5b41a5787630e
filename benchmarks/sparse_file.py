"""What the compact sparse file saves and costs: bytes, and time to write and to read, against `torch.save` of dense weights.

    python benchmarks/sparse_file.py

Networks of torchvision with random weights, pruned by magnitude, whole state in float32: BatchNorms and classifier are in
the files as well. The dense file holds the same weights, with zeros where they were pruned.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import paired
import torch
from paired import Row
from torchvision.models import get_model

import sparsetweaks as st

MODELS = ("resnet18", "mobilenet_v2")
SPARSITY = 0.95
OF_THE_BYTES = 0.12


def measure(model: str, options: argparse.Namespace) -> Iterator[Row]:
    torch.manual_seed(0)
    pruned = st.prune(get_model(model), SPARSITY, include="*")
    plain = st.remove_masks(pruned)
    what = f"sparse file, {model}, {100 * SPARSITY:.0f} % sparse"
    with tempfile.TemporaryDirectory() as folder:
        sparse, dense = Path(folder) / "sparse.safetensors", Path(folder) / "dense.pt"
        runs: dict[str, Callable[[], object]] = {
            "write, sparse": lambda: st.export(pruned, sparse, format="sparse", overwrite=True),
            "write, dense": lambda: torch.save(plain.state_dict(), dense),
            "read, sparse": lambda: st.load_sparse(sparse),
            "read, dense": lambda: torch.load(dense),
        }
        for act in ("write, sparse", "write, dense"):
            runs[act]()
        times = paired.interleaved(runs, options.repeats)
        ratio = sparse.stat().st_size / dense.stat().st_size
    note = f"{len(plain.state_dict())} tensors"
    yield Row(what, "bytes / dense", ratio, n=1, target=OF_THE_BYTES, note=note)
    for act in ("write", "read"):
        found = paired.ratios(times, f"{act}, sparse", f"{act}, dense")
        yield paired.spread(what, f"time to {act} / dense", found)


CASES = {model: functools.partial(measure, model) for model in MODELS}

if __name__ == "__main__":
    paired.main(__doc__, "sparse_file", CASES, repeats=9)
