"""Along which dimension the units of a layer lie, in every tensor that a forward makes of its output.

A linear or embedding layer has its units last, a convolution before its positions, whatever the shape of the input.
From there they are followed through what computes number by number or keeps the dimensions in order, and through
permutations. Behind anything else nothing is known, and nothing is said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from sparsetweaks.analysis.pointwise import works_number_by_number

_LAST = ("linear", "embedding")
_BEFORE_POSITIONS = {
    f"conv{kind}{positions}d": positions for kind in ("", "_transpose") for positions in (1, 2, 3)
}
_SECOND_IF_NEW = ("batch_norm", "group_norm", "instance_norm")
_PRODUCTS = ("matmul", "mm", "__matmul__", "addmm")
_IN_ORDER = ("view", "reshape", "view_as", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze")
_PERMUTED = ("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis")
_JOINED = ("cat", "concat", "concatenate")
_CUT = ("chunk", "split", "tensor_split")
_KEPT = frozenset(
    (*_SECOND_IF_NEW, *_CUT, "layer_norm", "rms_norm", "local_response_norm", "normalize", "softmax", "log_softmax",
     "softmin", "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "contiguous",
     "clone", "detach", "detach_", "to", "type_as", "float", "double", "half", "bfloat16", "cumsum", "flip", "roll", "pad",
     "interpolate", "prelu", "softsign", "tanhshrink", "hardswish", "hardswish_", "log_sigmoid", "lp_pool1d", "lp_pool2d",
     *(f"{adaptive}{kind}_pool{n}d" for adaptive in ("", "adaptive_") for kind in ("max", "avg") for n in (1, 2, 3)))
)  # fmt: skip


class Units:
    """The dimension of units of each tensor, as far as it is known."""

    def __init__(self) -> None:
        self._known: Any = WeakTensorKeyDictionary()

    def of(self, tensor: Tensor) -> int | None:
        """The dimension, at least 0, or None where it is not known."""
        found: int | None = self._known.get(tensor)
        return found

    def same(self, result: Tensor, given: Iterable[Any]) -> None:
        """`result` was computed number by number from the first tensor among these that has its shape."""
        if self.of(result) is None:
            alike = [each for each in given if isinstance(each, Tensor) and each.shape == result.shape]
            self._set(result, self.of(alike[0]) if alike else None)

    def follow(self, function: Any, given: tuple[Any, ...], named: Mapping[str, Any], result: Any) -> None:
        """`function` has computed `result` from these arguments."""
        name = getattr(function, "__name__", "")
        tensors = [each for each in pytree.tree_leaves((given, dict(named))) if isinstance(each, Tensor)]
        for each in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(each, Tensor) and each.ndim > 0:
                self._set(each, self._dimension(name, function, given, named, tensors, each))

    def _set(self, tensor: Tensor, dimension: int | None) -> None:
        if dimension is not None:
            self._known[tensor] = dimension
        else:
            self._known.pop(tensor, None)

    def _dimension(
        self,
        name: str,
        function: Callable[..., Any],
        given: tuple[Any, ...],
        named: Mapping[str, Any],
        tensors: list[Tensor],
        result: Tensor,
    ) -> int | None:
        if name in _LAST:
            return result.ndim - 1
        if name in _BEFORE_POSITIONS:
            return result.ndim - 1 - _BEFORE_POSITIONS[name]
        if not tensors:
            return None
        first, known = tensors[0], self.of(tensors[0])
        if name in _PRODUCTS:
            return _of_product(tensors[-1], self.of(tensors[-1]), result)
        if name in _SECOND_IF_NEW and known is None:
            return 1 if result.ndim > 1 else None
        if name in _JOINED:
            dimensions = {self.of(each) for each in tensors}
            return dimensions.pop() if len(dimensions) == 1 else None
        if name in _IN_ORDER:
            return None if known is None else _in_order(first.shape, known, result.shape)
        if name in _PERMUTED:
            return None if known is None else _permuted(function, first, known, given, named)
        if name in _KEPT:
            tensors = [first]
        elif not works_number_by_number(name):
            return None
        places = [(each, at) for each in tensors if (at := self.of(each)) is not None]
        if len({at - each.ndim for each, at in places}) != 1:
            return None
        place = places[0][1] - places[0][0].ndim
        whole = all(each.shape[place] == result.shape[place] for each, _ in places)
        return result.ndim + place if whole or name in _CUT else None


def _of_product(right: Tensor, known: int | None, result: Tensor) -> int | None:
    """A matrix on the right has a column for each unit."""
    return result.ndim - 1 if right.ndim == 2 and known in (None, 1) and result.ndim > 1 else None


def _in_order(before: torch.Size, dimension: int, after: torch.Size) -> int | None:
    """Where a dimension is after a reshaping, which keeps the order of numbers; None if it was merged or cut."""
    size, ahead = before[dimension], math.prod(before[:dimension])
    places = (i for i, other in enumerate(after) if other == size and math.prod(after[:i]) == ahead)
    return next(places, None)


def _permuted(
    function: Callable[..., Any],
    tensor: Tensor,
    dimension: int,
    given: tuple[Any, ...],
    named: Mapping[str, Any],
) -> int:
    """Where a dimension is after a permutation: the same permutation of a tensor with that dimension alone."""
    probe = torch.empty([2 if i == dimension else 1 for i in range(tensor.ndim)], device="meta")
    swapped = pytree.tree_map(lambda each: probe if each is tensor else each, (given, dict(named)))
    return list(function(*swapped[0], **swapped[1]).shape).index(2)
