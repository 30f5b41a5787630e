"""A forward in which paths can be counted: it lets everything through, and nothing cancels.

What can stop or cancel a value is replaced by what cannot (`stand_ins`): activations by the identity, normalisations by
their weights and biases, differences by sums, the largest of several by their mean. What is known to add up with positive
factors, and what moves values about, stays as it is. Everything else is opened: all that enters reaches all that leaves,
number by number where the operator works so. It then counts at least the paths that there are, and says what was opened.

Paths start at the inputs and at what is looked up in embeddings. What a parameter adds on the way (biases, embeddings of
positions, a token of a class) is a source: paths of its own begin there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from sparsetweaks.analysis.pointwise import works_number_by_number
from sparsetweaks.analysis.stand_ins import (
    ADDING,
    EXACT,
    LEVELLED,
    LOOKING_UP,
    MULTILINEAR,
    NO_WEIGHTS,
    OPERATORS_IN_PLACE,
    PRODUCTS_ADDED,
    REPLACEMENTS,
    constant_tensor,
    levelled,
)

_LITTLE = 1e-3  # what a source counts: no depth hides what passes beside it


class Passing(TorchFunctionMode):
    """Calls of functions, each replaced so that paths can be counted.

    Attributes:
        starts: where paths start, by name: the inputs, and what is looked up in embeddings.
        sources: what parameters add on the way.
        opened: the names of the operators that are not known, in the order in which they were met.
    """

    def __init__(self) -> None:
        super().__init__()
        self.starts: dict[str, Tensor] = {}
        self.sources: list[Tensor] = []
        self.opened: dict[str, None] = {}
        self._stand_ins: Any = (
            WeakTensorKeyDictionary()
        )  # for each tensor met: what is computed with in its place
        self._hooks: list[Any] = []
        self._carrying: dict[Any, bool] = {}  # for each node of the graph met: does a path lead to it

    def start(self, name: str, value: Tensor) -> Tensor:
        """Let paths start at a leaf; what comes back goes on from it, and a forward may write to it in place."""
        self.starts[name] = value
        with torch.enable_grad():
            entering = value.clone()
        self._carrying[entering.grad_fn] = True
        self._stand_ins[entering] = None
        return entering

    def close(self) -> None:
        """Let go of the graph, once the derivatives are taken."""
        for hook in self._hooks:
            hook.remove()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch._C._set_grad_enabled:
            return None  # values flow under torch.no_grad too
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                return self.__torch_function__(func, types, args, kwargs)
        name = getattr(func, "__name__", "").partition(".")[0]  # an overload is called `relu.default`
        args, kwargs = _mapped(self._arrived, (args, kwargs or {}))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not _writes_to_parameter(name, args)):
            result = self._computed(name, func, args, kwargs)
        if name == "__iter__":
            result = list(result)
        result = _mapped(in_double, result)
        for each in _tensors((args, result)):  # an argument may have been written to
            if each.requires_grad:
                self._stand_ins.setdefault(each, None)
        return iter(result) if name == "__iter__" else result

    def _computed(
        self, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if func is torch.embedding:  # which takes the weight first
            func, args = F.embedding, (args[1], args[0])
        if func in LOOKING_UP and not self._carries(kwargs["weight"] if "weight" in kwargs else args[1]):
            factor = LOOKING_UP[func](*args, **kwargs)
            return factor * self.start(
                f"embedding {len(self.starts)}", torch.ones_like(factor).requires_grad_()
            )
        if name in ("batch_norm", "instance_norm") and func not in (F.batch_norm, F.instance_norm):
            args = (args[0], *args[3:5], *args[1:3])  # torch's own take weight and bias first
        args, kwargs = self._begin(name, args, kwargs)
        entering = [each for each in _tensors((args, kwargs)) if each.requires_grad]
        complex_too = any(each.is_complex() for each in entering)
        if name in REPLACEMENTS and not complex_too:
            result = REPLACEMENTS[name](*args, **kwargs)
            return levelled(result) if name in LEVELLED and isinstance(result, Tensor) else result
        if name in MULTILINEAR and not complex_too:
            args, kwargs = _mapped(constant_tensor, (args, kwargs))
            return levelled(func(*args, **kwargs))
        if func == torch.Tensor.data.__get__:  # type: ignore[attr-defined]
            return args[0]
        if name in EXACT or not entering or (name == "interpolate" and kwargs.get("mode") != "bicubic"):
            return func(*args, **kwargs)
        return self._open(name, func, args, kwargs, entering)

    def _open(
        self,
        name: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        entering: list[Tensor],
    ) -> Any:
        """Everything that enters an operator that is not known reaches everything that leaves it."""
        by_number = works_number_by_number(name)
        if by_number and len(_tensors((args, kwargs))) == 1 and not entering[0].is_complex():
            if _works_in_place(name):
                return entering[0]
            result = func(*args, **kwargs)
            return levelled(entering[0]) if result.requires_grad and not result.is_complex() else result
        if any(map(self._carries, entering)):  # vectors may be biases, as those of recurrent layers
            entering = [
                self._begun(each) if each.numel() == max(each.shape, default=1) else each for each in entering
            ]
        if _works_in_place(name):
            self.opened[name] = None
            return args[0].copy_(_reached(args[0], entering, by_number))
        result = func(*args, **kwargs)
        if not any(each.requires_grad for each in _tensors(result)):
            return result  # sizes, comparisons, new tensors of the same shape
        self.opened[name] = None
        return _mapped(
            lambda each: (
                _reached(each, entering, by_number)
                if isinstance(each, Tensor) and each.requires_grad
                else each
            ),
            result,
        )

    def _begin(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Let paths begin at what a parameter adds here, or puts into a layer."""
        if name in NO_WEIGHTS:
            places = (*NO_WEIGHTS[name], "input", "query", "key", "value", "attn_mask", "bias")
            kwargs = {key: self._begun(each) if key in places else each for key, each in kwargs.items()}
            return tuple(self._begun(each) if i in places else each for i, each in enumerate(args)), kwargs
        if name not in ADDING or not any(map(self._carries, _tensors((args, kwargs)))):
            return args, kwargs
        if name in PRODUCTS_ADDED:
            return (self._begun(args[0]), *args[1:]), kwargs
        first, others, kwargs = _mapped(self._begun, (args[0], args[1:], kwargs))
        if _works_in_place(name) and first is not args[0]:
            first = args[0].copy_(first)
        return (first, *others), kwargs

    def _begun(self, value: Any) -> Any:
        """A source, if this depends on parameters alone. It weighs little, so that no depth hides what passes beside it."""
        if not isinstance(value, Tensor) or not value.requires_grad or not torch.is_grad_enabled():
            return value
        if self._carries(value):
            return value
        source = _LITTLE * value
        self.sources.append(source)
        self._carrying[source.grad_fn] = True
        return source

    def _carries(self, value: Tensor) -> bool:
        """Whether a tensor depends on a start or a source, rather than on parameters alone."""
        left = [value.grad_fn]
        while left:
            node = left.pop()
            if node in self._carrying:
                continue
            before = [] if node is None else [each for each, _ in node.next_functions if each is not None]
            unknown = [each for each in before if each not in self._carrying]
            if unknown:
                left += [node, *unknown]
            else:
                self._carrying[node] = any(self._carrying[each] for each in before)
        return self._carrying[value.grad_fn]

    def _arrived(self, value: Any) -> Any:
        """Let an argument in: what an autograd function of its own has computed is opened now."""
        if not isinstance(value, Tensor) or not value.requires_grad or value.is_leaf:
            return value
        if value in self._stand_ins:
            stand_in = self._stand_ins[value]
            return value if stand_in is None else stand_in
        made = value.grad_fn
        if not isinstance(made, torch.autograd.function.BackwardCFunction):
            raise ValueError(
                f"cannot follow paths through {type(made).__name__}, which was not seen being called: pass the model as it "
                "is before torch.jit.script or torch.compile, or a part of it"
            )
        self.opened[type(made).__name__.removesuffix("Backward")] = None
        reached = 1 + (value - value.detach()).real.mean()  # 1, and depends on all that enters the function

        def open_backward(entering: tuple[Any, ...], leaving: tuple[Any, ...]) -> tuple[Any, ...]:
            total = sum(each.mean() for each in leaving if each is not None) * reached
            return tuple(each if each is None else total.expand_as(each).to(each.dtype) for each in entering)

        self._hooks.append(made.register_hook(open_backward))  # type: ignore[union-attr]
        self._stand_ins[value] = opened = 1 + (value - value.detach())
        self._stand_ins[opened] = None
        return opened


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """A function of everything inside a value; sizes stay sizes."""
    return pytree.tree_map(function, value, is_leaf=lambda each: isinstance(each, torch.Size))


def in_double(value: Any) -> Any:
    """Everything is computed in double precision, also what a forward makes anew or casts."""
    if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
        return value.to(torch.complex128 if value.is_complex() else torch.float64)
    return value


def _tensors(value: Any) -> list[Tensor]:
    return [each for each in pytree.tree_leaves(value) if isinstance(each, Tensor)]


def _works_in_place(name: str) -> bool:
    return name in OPERATORS_IN_PLACE or (name.endswith("_") and not name.endswith("__"))


def _writes_to_parameter(name: str, args: tuple[Any, ...]) -> bool:
    """Whether a parameter is written to in place, which a forward may do under `torch.no_grad`."""
    if not _works_in_place(name) or not args or not isinstance(args[0], Tensor):
        return False
    written = args[0] if args[0]._base is None else args[0]._base
    return written.is_leaf and written.requires_grad


def _reached(like: Tensor, entering: Iterable[Tensor], by_number: bool) -> Tensor:
    """A tensor of this shape that depends on all that enters, and on all products of it."""
    total: Any = 1
    for each in entering:
        real = each.real + each.imag if each.is_complex() else each
        total = total * (1 + levelled(real if by_number else real.mean()))
    reached = levelled(total - 1).expand(like.shape)
    return torch.complex(reached, reached).to(like.dtype) if like.is_complex() else reached.to(like.dtype)
