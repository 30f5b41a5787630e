"""Signatures and return values beyond one tensor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsetweaks.testing.blocks.block import Block
from sparsetweaks.testing.specs import BlockSpec


class Flags(Block):
    """Arguments with bool, None, int, float and str defaults; `options` of the spec calls it with others."""

    def forward(
        self,
        x: Tensor,
        half: bool = False,
        shift: Tensor | None = None,
        times: int = 1,
        scale: float = 1.0,
        how: str = "act",
    ) -> Tensor:
        out = self.unit(x)
        for _ in range(times):
            out = self.act(out * scale)
        if shift is not None:
            out = out + shift
        if how == "gelu":
            out = F.gelu(out)
        return out * 0.5 if half else out


class KeywordOnly(Block):
    """Keyword-only arguments and `**kwargs`."""

    def forward(self, x: Tensor, *, half: bool = False, **rest: Any) -> Tensor:
        out = self.act(self.unit(x))
        return out * 0.5 if half or rest else out


class VariadicInputs(Block):
    """`forward(*inputs)`."""

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.act(self.unit(inputs[0])) * len(inputs)


class TypeCheck(Block):
    """`isinstance(x, Tensor)`, whose other branch is also valid code."""

    def forward(self, x: Any) -> Tensor:
        out = self.act(self.unit(x))
        return out if isinstance(x, Tensor) else out * 0.5


class ListInput(Block):
    """A tensor or a list of tensors, as DenseNet's layers take."""

    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        parts = [x] if isinstance(x, Tensor) else x
        return self.act(self.unit(torch.cat(list(parts), 1)))


class KeywordCalls(Block):
    """Layers called by keyword."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(input=x)
        return self.act(out if self.norm is None else self.norm(input=out))


class Pair(NamedTuple):
    """What some children return."""

    main: Tensor
    rest: list[Tensor]


class Structured(Block):
    """A child that returns a dict, a tuple or a named tuple."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.as_dict, self.as_tuple = AsDict(self.act), AsPair(self.act)

    def forward(self, x: Tensor) -> Tensor:
        out = self.unit(x) * 0.5
        first, second = self.as_dict(out + 0.1), self.as_tuple(out)
        return first["main"] + first["rest"][0] + second.main + second.rest[0]


class AsDict(nn.Module):
    def __init__(self, act: Any) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"main": F.relu(x), "rest": (self.act(x), 1)}


class AsPair(AsDict):
    def forward(self, x: Tensor) -> Any:
        return Pair(F.relu(x), [self.act(x)])


@dataclass
class Answer:
    """What some children and networks return."""

    main: Tensor
    rest: list[Tensor] = field(default_factory=list)


class AsDataclass(nn.Module):
    """A child that returns a dataclass."""

    def __init__(self, act: Any) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Answer:
        return Answer(main=self.act(x), rest=[F.relu(x)])


class DataclassOutput(Block):
    """A child that returns a dataclass, whose fields the forward reads."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.child = AsDataclass(self.act)

    def forward(self, x: Tensor) -> Tensor:
        answer = self.child(self.unit(x) * 0.5)
        return answer.main + answer.rest[0]
