"""Control flow that a tracer takes one way for good, by shapes, by values, by exceptions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetweaks.testing.blocks.block import Block


class ShapeBranch(Block):
    """Control flow on the input's shape."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.unit(x)
        if x.shape[0] > 2:
            return self.act(out)
        return self.act(out - 0.1)


class ValueBranch(Block):
    """Control flow on the values."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.unit(x)
        return self.act(out) if out.sum() > 0 else F.relu(out + 0.5)


class ShapeLoop(Block):
    """A Python loop over the batch."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.unit(x)
        return torch.stack([self.act(out[i] * (1 + i)) for i in range(out.size(0))])


class ShapeUnpack(Block):
    """Sizes unpacked and computed with."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.unit(x)
        batch, channels = out.shape[:2]
        return self.act(out.reshape(batch, channels, -1)).reshape(out.shape) / (batch * 0.5)


class Guarded(Block):
    """`try` and `except` around code that a tracer cannot follow."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.unit(x))
        try:
            return out * (1.0 if bool(out.sum() > -1e9) else 2.0)
        except ValueError:
            return out * 0.5
