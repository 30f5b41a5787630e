"""What all blocks have: one unit, a layer and its normalisation, and one activation."""

from __future__ import annotations

from torch import Tensor, nn

from sparsetweaks.testing.activations import ACTIVATIONS
from sparsetweaks.testing.layers import make_layer, make_norm
from sparsetweaks.testing.specs import BlockSpec


class Block(nn.Module):
    """What all blocks have: one unit (a layer and its normalisation) and one activation."""

    adds_input = False  # whether the forward needs the unit to keep the shape
    width: int
    total: Tensor
    steps: Tensor
    scratch: Tensor
    offset: Tensor

    def __init__(self, spec: BlockSpec, width: int, rank: int) -> None:
        super().__init__()
        self.conv, self.width = make_layer(spec.layer, width, rank)
        self.norm = make_norm(spec.norm, self.width, rank)
        self.act = ACTIVATIONS[spec.activation]()
        self.rank = rank
        self.channels_shape = (1, -1, *[1] * rank)
        self.extend(spec, width)

    def extend(self, spec: BlockSpec, width: int) -> None:
        """What a block has besides; `width` channels come in and `self.width` go out."""

    def second(self) -> nn.Module:
        """A further layer that keeps the shape."""
        return make_layer("plain", self.width, self.rank)[0]

    def unit(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x if self.norm is None else self.norm(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.unit(x))
