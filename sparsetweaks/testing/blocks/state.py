"""What a module keeps between its calls, and tensors of its own that are no layer's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsetweaks.testing.blocks.block import Block
from sparsetweaks.testing.specs import BlockSpec


class Counter(Block):
    """A Python attribute that every call changes, and that the result depends on."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.act(self.unit(x)) * (1 + self.calls / 8)


class Remembers(Block):
    """The module keeps a tensor of its last call."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.unit(x))
        self.seen = out.detach().clone()
        return out


class AppendsToList(Block):
    """The module keeps a list of what its calls saw."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.history: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.unit(x))
        self.history.append(out.detach().mean())
        return out


class BufferInplace(Block):
    """A buffer that the forward updates in place in training."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.register_buffer("total", torch.zeros(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        out = self.unit(x)
        if self.training:
            self.total.add_(out.detach().mean())
            self.steps += 1
        return self.act(out + self.total)


class BufferAssigned(Block):
    """A buffer that the forward replaces."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        out = self.unit(x)
        self.total = 0.5 * self.total + out.detach().mean()
        return self.act(out + self.total)


class BufferViews(Block):
    """A buffer that is a view of another one, and is written to."""

    table: Tensor
    first_row: Tensor

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.register_buffer("table", torch.zeros(2, self.width))
        self.register_buffer("first_row", self.table[0])

    def forward(self, x: Tensor) -> Tensor:
        out = self.unit(x)
        if self.training:
            self.first_row.add_(0.5)
        return self.act(out + self.table.sum(0).view(self.channels_shape))


class OwnParameters(Block):
    """Parameters and buffers of the module's own, used directly; one buffer is not saved."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.gamma = nn.Parameter(torch.full((self.width,), 0.5))
        self.betas = nn.ParameterList([nn.Parameter(torch.full((self.width,), 0.1))])
        self.register_buffer("offset", torch.full((), 0.25))
        self.register_buffer("scratch", torch.ones(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.unit(x) * self.gamma.view(self.channels_shape) * self.scratch
        return self.act(out + self.betas[0].view(self.channels_shape)) + self.offset


class BuffersOnly(Block):
    """A child with a buffer and no parameter, whose forward has the activation."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.shift = Shift(self.act)

    def forward(self, x: Tensor) -> Tensor:
        return self.shift(self.unit(x))


class Shift(nn.Module):
    """No parameters: one buffer and an activation."""

    by: Tensor

    def __init__(self, act: Any) -> None:
        super().__init__()
        self.register_buffer("by", torch.full((), 0.1))
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.by)


class FunctionalLayer(Block):
    """A child's weight used by `F.conv2d` or `F.linear`, not by calling the child."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.conv2 = self.second()

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.unit(x))
        weight: Any = self.conv2.weight
        functions: Any = (F.linear, F.conv1d, F.conv2d, F.conv3d)
        return F.relu(functions[self.rank](out, weight, **({"padding": 1} if self.rank else {})))


class Constant(Block):
    """A tensor made in the forward from constants alone."""

    def forward(self, x: Tensor) -> Tensor:
        ramp = torch.linspace(0.5, 1.5, self.width).view(self.channels_shape)
        return self.act(self.unit(x)) * ramp


class TensorAttribute(Block):
    """A tensor that is a plain attribute, neither parameter nor buffer."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.ramp = torch.linspace(0.5, 1.5, self.width).view(self.channels_shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.unit(x) * self.ramp)
