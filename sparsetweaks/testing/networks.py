"""From a specification to its network, always the same one, and to a batch that it takes."""

from __future__ import annotations

import collections
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsetweaks.testing.blocks import BLOCKS
from sparsetweaks.testing.blocks.arguments import Answer, Pair
from sparsetweaks.testing.extras import EXTRAS
from sparsetweaks.testing.layers import CONVS
from sparsetweaks.testing.specs import CLASSES, Spec

NETWORKS = {"conv": 2, "mlp": 0, "conv1d": 1, "conv3d": 3}
"""Kinds of networks, and in how many dimensions they convolve; 0: linear layers."""
ROOTS = ("tower", "sequential", "staged")
RETURNS = ("tensor", "tuple", "list", "dict", "named_tuple", "dataclass", "ordered_dict")


class Pool(nn.Module):
    """The mean over all positions; a vector stays."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2) if x.dim() > 2 else x


class Tower(nn.Module):
    """A stem, blocks in a loop, pooling, a classifier; the root has an activation of its own."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.stem, blocks, head = _parts(spec)
        self.blocks = nn.ModuleList(blocks)
        self.pool = Pool()
        self.head = head
        self.returns = spec.returns
        self.options = [dict(block.options) for block in spec.blocks]
        if "shared_block" in spec.extras:
            self.options.insert(0, self.options[0])

    def forward(self, inputs: Tensor) -> Any:
        x = F.relu(self.stem(inputs))
        for block, options in zip(self.blocks, self.options, strict=True):
            x = block(x, **options)
        pooled = self.pool(x)
        logits = self.head(pooled)
        if self.returns == "tuple":
            return logits, pooled
        if self.returns == "list":
            return [logits, [pooled]]
        if self.returns == "dict":
            return {"logits": logits, "features": {"pooled": pooled, "count": len(self.blocks)}}
        if self.returns == "named_tuple":
            return Pair(logits, [pooled])
        if self.returns == "dataclass":
            return Answer(main=logits, rest=[pooled])
        if self.returns == "ordered_dict":
            return collections.OrderedDict(logits=logits, pooled=pooled)
        return logits


class Staged(Tower):
    """A tower whose blocks are two Sequential stages, called one after the other."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        blocks, head = list(self.blocks), self.head
        half = len(blocks) // 2
        del self.blocks, self.head
        self.stages = nn.Sequential(nn.Sequential(*blocks[:half]), nn.Sequential(*blocks[half:]))
        self.head = head

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.pool(self.stages(F.relu_(self.stem(inputs)))))


def _parts(spec: Spec) -> tuple[nn.Module, list[nn.Module], nn.Module]:
    rank, width = NETWORKS[spec.network], spec.width
    stem = CONVS[rank](3, width, 3, padding=1) if rank else nn.Linear(spec.size, width)
    blocks: list[nn.Module] = []
    for block in spec.blocks:
        made = BLOCKS[block.form](block, width, rank)
        blocks.append(made)
        width = made.width
    if "shared_block" in spec.extras:
        blocks.insert(0, blocks[0])
    return stem, blocks, nn.Linear(width, CLASSES)


@contextmanager
def isolated_rng(seed: int) -> Iterator[None]:
    """Start torch's CPU generator and Python's `random` from `seed`, and put both back afterwards.

    Args:
        seed: any integer in [0, 2**63).

    Example:
        >>> from sparsetweaks.testing import isolated_rng
        >>> state = torch.get_rng_state()
        >>> with isolated_rng(3):
        ...     _ = torch.rand(2)
        >>> torch.equal(state, torch.get_rng_state())
        True
    """
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            yield
    finally:
        random.setstate(state)


def build(spec: Spec) -> nn.Module:
    """Make the network that `spec` describes: always the same one, in a few milliseconds.

    Every parameter and running statistic is drawn from `spec.seed`, so that normalisations are not at their
    trivial start. The network carries its specification as `model.spec`.

    Args:
        spec: what to build, as drawn by `specs()` or written by hand.

    Returns:
        A network in train mode, unless the specification says otherwise. It takes what `example_batch` makes.

    Raises:
        KeyError: the specification names a form, layer or activation that is not there.

    Example:
        >>> from sparsetweaks.testing import BlockSpec, Spec, build, example_batch
        >>> model = build(Spec(blocks=(BlockSpec(form="alias", activation="x.relu_()"),)))
        >>> inputs, targets = example_batch(model.spec)
        >>> model(inputs).shape
        torch.Size([2, 3])
    """
    with isolated_rng(spec.seed):
        model: nn.Module
        if spec.root == "sequential":
            stem, blocks, head = _parts(spec)
            model = nn.Sequential(stem, *blocks, Pool(), head)
        else:
            model = {"tower": Tower, "staged": Staged}[spec.root](spec)
        _shake(model)
        for extra in spec.extras:
            EXTRAS[extra](model)
    model.spec = spec  # type: ignore[assignment]
    return model


@torch.no_grad()
def _shake(model: nn.Module) -> None:
    """Move normalisations and running statistics away from ones and zeros."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and "norm" in name and "parametrizations" not in name:
            parameter.add_(torch.empty_like(parameter).uniform_(-0.5, 0.5))
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.add_(torch.empty_like(buffer).uniform_(0, 0.3))


class Batch(NamedTuple):
    """Inputs of shape (batch, 3, size, ...) or (batch, size), and targets of shape (batch,)."""

    inputs: Tensor
    targets: Tensor


def example_batch(spec: Spec, *, seed: int = 0) -> Batch:
    """A batch that the network of `spec` takes, in its dtype and memory format.

    Args:
        spec: the network's specification.
        seed: which batch; the same seed gives the same one.

    Example:
        >>> from sparsetweaks.testing import Spec, example_batch
        >>> example_batch(Spec(network="mlp", batch=4)).inputs.shape
        torch.Size([4, 6])
    """
    generator = torch.Generator().manual_seed(seed)
    rank = NETWORKS[spec.network]
    shape = (spec.batch, *([3] if rank else []), *[spec.size] * max(1, rank))
    inputs = torch.randn(shape, generator=generator)
    if "double" in spec.extras:
        inputs = inputs.double()
    if "channels_last" in spec.extras and inputs.dim() in (4, 5):
        last = torch.channels_last if inputs.dim() == 4 else torch.channels_last_3d
        inputs = inputs.to(memory_format=last)
    return Batch(inputs, torch.randint(CLASSES, (spec.batch,), generator=generator))
