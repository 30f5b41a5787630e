"""Where paths part and meet: residuals, branches, gates, parts of a tensor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsetweaks.testing.blocks.block import Block
from sparsetweaks.testing.layers import BATCH_NORMS, CONVS, make_norm
from sparsetweaks.testing.specs import BlockSpec


class Plain(Block):
    """Layer, normalisation, activation."""


class Residual(Block):
    """A residual that spans exactly one unit."""

    adds_input = True

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.unit(x) + x)


class InplaceResidual(Block):
    """`out += x`, as torchvision's ResNet has it."""

    adds_input = True

    def forward(self, x: Tensor) -> Tensor:
        out = self.unit(x)
        out += x
        return self.act(out)


class Basic(Block):
    """A residual that spans two units; one activation called twice."""

    adds_input = True

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.conv2 = self.second()
        self.norm2 = make_norm(spec.norm, self.width, self.rank)

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.unit(x))
        out = self.conv2(out)
        if self.norm2 is not None:
            out = self.norm2(out)
        return self.act(out + x)


class PreActivation(Block):
    """Normalisation and activation before the layer; two units' worth of order changed."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.first_norm = BATCH_NORMS[self.rank](width)

    def forward(self, x: Tensor) -> Tensor:
        return self.unit(self.act(self.first_norm(x)))


class EmptyShortcut(Block):
    """A residual through an empty Sequential, which is an identity."""

    adds_input = True

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.shortcut = nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        out = self.unit(x)
        out += self.shortcut(x)
        return self.act(out)


class AddMethod(Block):
    """`add_` as a method, its result straight into the activation."""

    adds_input = True

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.unit(x).add_(x))


class Tap(Block):
    """The layer's output is used beside the normalisation that follows it."""

    def forward(self, x: Tensor) -> Tensor:
        raw = self.conv(x) * 0.5
        return self.act(raw if self.norm is None else self.norm(raw)) + raw.detach().mean()


class Branches(Block):
    """Two branches joined by `torch.cat`, one activation module for both."""

    adds_input = True

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.conv2 = self.second()
        self.mix = CONVS[self.rank](2 * width, width, 1) if self.rank else nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(torch.cat([self.act(self.unit(x)), self.act(self.conv2(x))], 1))


class Gated(Block):
    """A squeeze-and-excitation gate: the activation also works on pooled values."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.gate = nn.Linear(self.width, self.width)

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.unit(x))
        gate = torch.sigmoid(self.gate(F.relu(out.flatten(2).mean(2) if self.rank else out)))
        return out * gate.view(out.size(0), *self.channels_shape[1:])


class Split(Block):
    """The channels in two parts, of which one is activated (in place, perhaps) and both are joined again."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.unit(x) * 0.5
        first, second = out[:, : self.width // 2], out[:, self.width // 2 :]
        return torch.cat([first, self.act(second) + first], 1)


class Collect(Block):
    """A list that grows while the forward runs, and is joined in the end."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.steps_of = nn.ModuleList([self.second(), self.second()])

    def forward(self, x: Tensor) -> Tensor:
        outputs = [self.unit(x)]
        outputs.extend(self.act(step(outputs[-1])) for step in self.steps_of)
        return torch.stack(outputs).sum(0)
