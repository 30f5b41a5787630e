"""Layers of torch and of libraries that do more than one thing inside."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sparsetweaks.testing.blocks.block import Block
from sparsetweaks.testing.layers import CONVS
from sparsetweaks.testing.specs import BlockSpec


class LowRank(nn.Module):
    """A layer with a low-rank correction beside it (LoRA), and the layer's attributes as its own (peft)."""

    def __init__(self, base_layer: nn.Module, rank: int, width: int, out: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        kind: Any = CONVS[rank] if rank else nn.Linear
        size = (1,) if rank else ()
        self.lora_a, self.lora_b = kind(width, 1, *size, bias=False), kind(1, out, *size, bias=False)
        self.dropout = nn.Dropout(0.1)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or name.startswith("__"):  # copying and pickling ask for such names
                raise
            return getattr(self.base_layer, name)

    def forward(self, input: Tensor, *rest: Any, **keywords: Any) -> Tensor:
        return self.base_layer(input, *rest, **keywords) + 0.5 * self.lora_b(self.lora_a(self.dropout(input)))


class Lora(Block):
    """A layer that is wrapped as LoRA wraps it."""

    adds_input = True  # so that the correction fits whatever the geometry

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.conv = LowRank(self.conv, self.rank, width, self.width)


class Attention(Block):
    """A transformer's layer of torch: a fused kernel takes over in eval mode without gradients."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.layer = nn.TransformerEncoderLayer(
            self.width, 1, self.width, dropout=0.1, batch_first=True, norm_first=True
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.unit(x))
        tokens = out.flatten(2).transpose(1, 2) if self.rank else out.unsqueeze(1)
        return self.layer(tokens).transpose(1, 2).reshape(out.shape)


class Recurrent(Block):
    """A recurrent layer of torch, whose ReLUs are inside its kernel."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.layer = nn.RNN(self.width, self.width, nonlinearity="relu", batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.unit(x))
        pooled = out.flatten(2).mean(2) if self.rank else out
        return out + self.layer(pooled.unsqueeze(1))[0].squeeze(1).view(out.size(0), *self.channels_shape[1:])
