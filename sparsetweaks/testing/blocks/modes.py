"""Forwards that do one thing in training and another in evaluation: noise, dropout, gradients, precision."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsetweaks.testing.blocks.block import Block
from sparsetweaks.testing.specs import BlockSpec


class FunctionalDropout(Block):
    """`F.dropout(x, training=self.training)`: a tracer that runs once freezes one mode."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.act(self.unit(x)), 0.3, training=self.training)


class ModuleDropout(Block):
    """`nn.Dropout`, in place."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.drop = nn.Dropout(0.3, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(self.unit(x) * 1.5))


class TrainingBranch(Block):
    """`if self.training`: other code, other noise and other activations in the two modes."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.unit(x)
        if self.training:
            return self.act(out + 0.1 * torch.randn_like(out))
        return F.relu(self.act(out) - 0.1)


class PythonDropPath(Block):
    """Stochastic depth by Python's `random`: drawn anew at each call."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.unit(x))
        return out * 0.25 if self.training and random.random() < 0.5 else out


class TorchDropPath(Block):
    """Stochastic depth by a `torch.rand` that no input goes into."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.unit(x))
        return out * (torch.rand(1, dtype=torch.float32) + 0.5) if self.training else out


class SampleDropPath(Block):
    """Stochastic depth per sample: random numbers shaped by the input."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.unit(x))
        if self.training:
            out = out * (torch.rand((x.shape[0], 1, *self.channels_shape[2:])) > 0.3).to(out.dtype)
        return out


class NoGrad(Block):
    """A part of the forward under `torch.no_grad()`."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.conv2 = self.second()

    def forward(self, x: Tensor) -> Tensor:
        out = self.unit(x)
        with torch.no_grad():
            fixed = self.act(self.conv2(out))
        return self.act(out * 0.5) + fixed


class NoGradMethod(Block):
    """A method of the module that is decorated by `torch.no_grad()`."""

    @torch.no_grad()
    def scale(self, x: Tensor) -> Tensor:
        return F.relu(x).mean() + 1

    def forward(self, x: Tensor) -> Tensor:
        out = self.unit(x)
        return self.act(out * self.scale(out))


class GradMode(Block):
    """A branch on `torch.is_grad_enabled()`."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.unit(x))
        return out if torch.is_grad_enabled() else out * 0.5


class Autocast(Block):
    """A part of the forward under `torch.autocast`."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = self.conv(x)
        out = out.to(x.dtype)
        return self.act(out if self.norm is None else self.norm(out))
