"""Ways into a module other than its own forward by `__call__`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from sparsetweaks.testing.blocks.block import Block
from sparsetweaks.testing.blocks.residuals import Plain
from sparsetweaks.testing.specs import BlockSpec


class Child(Block):
    """A block with a second way in."""

    def features(self, x: Tensor) -> Tensor:
        return self.act(self.unit(x)) * 0.5


class ChildMethod(Block):
    """A method of a child that is not its forward."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.child = Child(BlockSpec(activation=spec.activation), self.width, self.rank)

    def forward(self, x: Tensor) -> Tensor:
        return self.child.features(self.unit(x)) + self.child(self.unit(x))


class ChildForward(Block):
    """A child's forward called without `__call__`, so that its hooks do not run."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.child = Child(BlockSpec(activation=spec.activation), self.width, self.rank)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.unit(x)) + self.child.forward(self.unit(x))


class SuperForward(Plain):
    """A forward that calls the parent class's."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


class OwnCall(Plain):
    """A `__call__` of its own around the module's."""

    def __call__(self, x: Tensor) -> Tensor:
        return 0.5 * super().__call__(x)


class CallsOwnCall(Block):
    """A child with a `__call__` of its own."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.child = OwnCall(BlockSpec(activation=spec.activation), self.width, self.rank)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.child(self.unit(x)))


def halving(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A decorator of forwards, as transformers has many."""

    @functools.wraps(forward)
    def wrapper(self: Any, *inputs: Any, **keywords: Any) -> Tensor:
        return 0.5 * forward(self, *inputs, **keywords)

    return wrapper


class Decorated(Block):
    """A forward under a decorator that changes its result."""

    @halving
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.unit(x))


class InnerFunction(Block):
    """A function defined in the forward, which closes over the module."""

    def forward(self, x: Tensor) -> Tensor:
        def body(value: Tensor, factor: float = 0.5) -> Tensor:
            return self.act(self.unit(value) * factor)

        return body(x) + body(x, factor=0.25)


class BackReference(Block):
    """A child that knows its parent, through a list so that it is not registered."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.factor = 0.5
        self.child = KnowsParent(self.act)
        self.child.parent = [self]

    def forward(self, x: Tensor) -> Tensor:
        return self.child(self.unit(x))


class KnowsParent(nn.Module):
    """Asks its parent for a number."""

    parent: list[Any]

    def __init__(self, act: Any) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x * self.parent[0].factor)


class ReplacedForward(Block):
    """A forward that was replaced on the instance, as accelerate's hooks do."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.forward = self.replacement  # type: ignore[method-assign]

    def replacement(self, x: Tensor) -> Tensor:
        return F.relu(self.act(self.unit(x)) - 0.1)
