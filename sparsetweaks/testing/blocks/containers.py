"""Modules in modules, in lists, in plain containers that `modules()` does not look into."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from sparsetweaks.testing.blocks.block import Block
from sparsetweaks.testing.blocks.residuals import Residual
from sparsetweaks.testing.specs import BlockSpec


class Nested(Block):
    """Scopes in scopes: a Sequential in a Sequential, with a block in it."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        inside = BlockSpec(form="residual", activation=spec.activation)
        self.body = nn.Sequential(
            nn.Sequential(Residual(inside, self.width, self.rank), nn.ReLU()), self.second()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.body(self.unit(x)))


class Stack(nn.Sequential):
    """A Sequential with its own forward that calls the parent's."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x)) + x


class LoopStack(nn.Sequential):
    """A Sequential with its own loop over the children."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x


class SequentialSubclass(Block):
    """Subclasses of `nn.Sequential`, with and without their own forward."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.stack = Stack(self.second(), nn.ReLU())
        self.loop = LoopStack(self.second(), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.loop(self.stack(self.act(self.unit(x))))


class SequentialSlice(Block):
    """A slice of a Sequential, which is a module that is registered nowhere."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.body = nn.Sequential(self.second(), nn.ReLU(), self.second())

    def forward(self, x: Tensor) -> Tensor:
        return self.body[2:](self.body[:2](self.act(self.unit(x))))


class SequentialUnit(Block):
    """The whole unit in one Sequential, as torchvision's ConvNormActivation has it."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        parts = [self.conv, *([] if self.norm is None else [self.norm])]
        if isinstance(self.act, nn.Module):
            parts.append(self.act)
        for name in ("conv", "norm", "act"):
            self._modules.pop(name, None)
        self.body = nn.Sequential(*parts)

    @property
    def first(self) -> nn.Module:
        return self.body[0]

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        return self.act(out) if "act" in vars(self) else out


class ListLoop(Block):
    """A loop over a ModuleList and one over a ModuleDict."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.layers = nn.ModuleList([self.second(), nn.ReLU()])
        self.named = nn.ModuleDict({"conv": self.second(), "act": nn.ReLU6()})

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.unit(x))
        for layer in self.layers:
            x = layer(x)
        for _, layer in self.named.items():
            x = layer(x)
        return x


class RegisteredInList(Block):
    """Registered modules that the forward reads from a plain list of tuples."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.conv2 = self.second()
        self.pairs = [(self.conv, self.act), (self.conv2, self.act)]

    def forward(self, x: Tensor) -> Tensor:
        for layer, activation in self.pairs:
            x = activation(layer(x))
        return x if self.norm is None else self.norm(x)


class Hidden(Block):
    """An activation module in a plain list, which `modules()` does not see."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.hidden = [nn.ReLU()]

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden[0](self.act(self.unit(x)) - 0.1)


class HiddenInDict(Block):
    """An activation module in a plain dict, which `modules()` does not see."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.hidden = {"act": nn.ReLU()}

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden["act"](self.act(self.unit(x)) - 0.1)
