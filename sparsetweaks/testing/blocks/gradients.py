"""Backwards of one's own, which a tracer that looks inside loses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sparsetweaks.testing.blocks.block import Block


class Rounded(torch.autograd.Function):
    """Rounding with a straight-through gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(4 * x) / 4

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class CustomGradient(Block):
    """An `autograd.Function`: a tracer that looks inside loses its backward."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(Rounded.apply(self.unit(x)))


class Checkpointed(Block):
    """Gradient checkpointing: the body runs again in the backward, and moves its statistics again."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


def double_gradient(gradient: Tensor) -> Tensor:
    return 2 * gradient


class TensorHook(Block):
    """A hook on a tensor of the forward."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.unit(x)
        if out.requires_grad:
            out.register_hook(double_gradient)
        return self.act(out * 0.5)
