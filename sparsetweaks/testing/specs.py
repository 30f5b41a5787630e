"""What a network of these is made of, as plain data that hypothesis can shrink and print."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

CLASSES = 3


@dataclass(frozen=True)
class BlockSpec:
    """One block: how its forward is written, and the layer, normalisation and activation it is made of."""

    form: str = "plain"
    layer: str = "plain"
    norm: str = "batch"
    activation: str = "ReLU"
    options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Spec:
    """One network. `build(spec)` makes it; equal specs make equal networks."""

    blocks: tuple[BlockSpec, ...] = (BlockSpec(),)
    network: str = "conv"
    width: int = 4
    size: int = 6
    batch: int = 2
    root: str = "tower"
    returns: str = "tensor"
    extras: tuple[str, ...] = ()
    seed: int = 0
