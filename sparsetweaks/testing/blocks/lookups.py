"""Activations that the forward looks up or makes: by name, in tables, behind properties."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from sparsetweaks.testing.blocks.block import Block
from sparsetweaks.testing.specs import BlockSpec


class PropertyActivation(Block):
    """The activation behind a property."""

    @property
    def activation(self) -> Any:
        return self.act

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.unit(x))


class ByName(Block):
    """An activation looked up by its name in `torch.nn.functional`."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.how = "relu"

    def forward(self, x: Tensor) -> Tensor:
        return getattr(F, self.how)(self.act(self.unit(x)) - 0.1)


class ByNameInABranch(ByName):
    """The same, in a forward that cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.unit(x)) - 0.1
        return getattr(F, self.how)(out) if out.sum() > 0 else out


class FunctionTable(Block):
    """Activation functions in a dict of the module's."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.table: dict[str, Any] = {"relu": F.relu, "gelu": F.gelu}
        self.how = "relu"

    def forward(self, x: Tensor) -> Tensor:
        return self.table[self.how](self.act(self.unit(x)) - 0.1)


class FunctionTableInABranch(FunctionTable):
    """The same, in a forward that cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.unit(x)) - 0.1
        return self.table[self.how](out) if out.sum() > 0 else out


ACT2FN: dict[str, Any] = {"relu": F.relu, "gelu": F.gelu, "relu6": nn.ReLU6}


class GlobalTable(Block):
    """Activations looked up in a global table in the forward (transformers' ACT2FN)."""

    def forward(self, x: Tensor) -> Tensor:
        return ACT2FN["relu"](self.act(self.unit(x)) - 0.1)


class GlobalTableInABranch(Block):
    """The same, in a forward that cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.unit(x)) - 0.1
        return ACT2FN["relu"](out) if out.sum() > 0 else out


class FromTable(Block):
    """An activation module made from a global table, as transformers' `self.act_fn = ACT2FN[...]`."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.act_fn = ACT2FN["relu6"]()

    def forward(self, x: Tensor) -> Tensor:
        return self.act_fn(self.act(self.unit(x)) - 0.1)


class MadeInForward(Block):
    """An activation module that is made in the forward."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.ReLU()(self.act(self.unit(x)) - 0.1)
