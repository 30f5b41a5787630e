"""In-place operations whose result is seen through another name."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sparsetweaks.testing.blocks.block import Block
from sparsetweaks.testing.specs import BlockSpec


class Alias(Block):
    """The result of an in-place activation is also seen through the name that was there before."""

    def forward(self, x: Tensor) -> Tensor:
        before = self.unit(x) * 0.5
        return self.act(before) + before


class View(Block):
    """An in-place activation on a part of a tensor, whose result nobody takes."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.unit(x) * 0.5
        self.act(out[:, :1])
        return out


class Inner(nn.Module):
    """A child whose first step may write into the tensor it was given."""

    def __init__(self, act: Any, layer: nn.Module) -> None:
        super().__init__()
        self.act = act
        self.conv = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.act(x))


class InplaceAcross(Block):
    """A child changes its input in place and the parent adds that input afterwards."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.inner = Inner(self.act, self.second())

    def forward(self, x: Tensor) -> Tensor:
        x = self.unit(x) + 0.125
        return self.inner(x) + x
