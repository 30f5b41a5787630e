"""A forward in which paths can be counted: it lets everything through, and nothing cancels.

What can stop or cancel a value is replaced by what cannot: activations and normalisations by the identity, differences
by sums, the largest of several by their mean. What is known to add up with positive factors, and what moves values
about, stays as it is. Everything else is opened: all that enters reaches all that leaves, number by number where the
operator works so. It then counts at least the paths that there are, and says what was opened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from sparsetweaks.analysis.pointwise import works_number_by_number


class Passing(TorchFunctionMode):
    """Calls of functions, each replaced so that paths can be counted.

    Attributes:
        starts: where paths start, by name: the inputs, and what is looked up in embeddings.
        opened: the names of the operators that are not known, in the order in which they were met.
    """

    def __init__(self, starts: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.starts = dict(starts)
        self.opened: dict[str, None] = {}
        self._stand_ins: Any = (
            WeakTensorKeyDictionary()
        )  # for each tensor met: what is computed with in its place
        self._hooks: list[Any] = []

    def close(self) -> None:
        """Let go of the graph, once the derivatives are taken."""
        for hook in self._hooks:
            hook.remove()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "").partition(".")[0]  # an overload is called `relu.default`
        args, kwargs = _mapped(self._arrived, (args, kwargs or {}))
        result = self._computed(name, func, args, kwargs)
        if name == "__iter__":
            result = list(result)
        result = _mapped(_in_double, result)
        for each in _tensors((args, result)):  # an argument may have been written to
            if each.requires_grad:
                self._stand_ins.setdefault(each, None)
        return iter(result) if name == "__iter__" else result

    def _computed(
        self, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if name == "embedding":
            start = torch.ones_like(func(*args, **kwargs)).requires_grad_(True)
            self.starts[f"embedding {len(self.starts)}"] = start
            return start.clone()  # no leaf: a forward may work in place
        entering = [each for each in _tensors((args, kwargs)) if each.requires_grad]
        complex_too = any(each.is_complex() for each in entering)
        if name in _REPLACEMENTS and not complex_too:
            result = _REPLACEMENTS[name](*args, **kwargs)
            return _levelled(result) if name in _LEVELLED and isinstance(result, Tensor) else result
        if name in _MULTILINEAR and not complex_too:
            args, kwargs = _mapped(_constant_tensor, (args, kwargs))
            return _levelled(func(*args, **kwargs))
        if func == torch.Tensor.data.__get__:  # type: ignore[attr-defined]
            return args[0]
        if name in _EXACT or not entering or (name == "interpolate" and kwargs.get("mode") != "bicubic"):
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
            return _levelled(entering[0]) if result.requires_grad and not result.is_complex() else result
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


def _in_double(value: Any) -> Any:
    """Everything is computed in double precision, also what a forward makes anew or casts."""
    single = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
    return value.double() if single else value


def _tensors(value: Any) -> list[Tensor]:
    return [each for each in pytree.tree_leaves(value) if isinstance(each, Tensor)]


def _works_in_place(name: str) -> bool:
    return name in ("__ipow__", "__ifloordiv__", "__imod__") or (
        name.endswith("_") and not name.endswith("__")
    )


def _reached(like: Tensor, entering: Iterable[Tensor], by_number: bool) -> Tensor:
    """A tensor of this shape that depends on all that enters, and on all products of it."""
    total: Any = 1
    for each in entering:
        real = each.real + each.imag if each.is_complex() else each
        total = total * (1 + _levelled(real if by_number else real.mean()))
    reached = _levelled(total - 1).expand(like.shape)
    return torch.complex(reached, reached).to(like.dtype) if like.is_complex() else reached.to(like.dtype)


def _levelled(value: Tensor) -> Tensor:
    """1 wherever the value is positive, with a positive derivative there, so that no depth overflows or vanishes."""
    return value * torch.where(value > 0, 1 / value, 1).detach()


def _constant_tensor(value: Any) -> Any:
    return _constant(value) if isinstance(value, Tensor) else value


def _same(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return input


def _open(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A gate: open whatever enters, and yet dependent on it."""
    return 1 + input


def _sum(input: Any, other: Any, *, alpha: float = 1, **kwargs: Any) -> Tensor:
    return _constant(input) + abs(alpha) * _constant(other)


def _product(input: Any, other: Any, *args: Any, **kwargs: Any) -> Tensor:
    return _constant(input) * _constant(other)


def _constant(value: Any) -> Any:
    """Constants without sign or infinity (masks are added); what depends on an input or a weight as it is."""
    if not isinstance(value, Tensor):
        return abs(value)
    if value.requires_grad or not value.is_floating_point():
        return value
    return value.abs().nan_to_num(posinf=0)


def _in_place(replacement: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda input, *args, **kwargs: input.copy_(replacement(input, *args, **kwargs))


def _mean_pool(pool: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def replaced(
        input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
        ceil_mode: bool = False, return_indices: bool = False, **_: Any,
    ) -> Tensor:  # fmt: skip
        if return_indices or any(step != 1 for step in pytree.tree_leaves(dilation)):
            raise ValueError("cannot follow paths through a max pooling with dilation or indices")
        return pool(input, kernel_size, stride or kernel_size, padding, ceil_mode)

    return replaced


def _adaptive_mean_pool(pool: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def replaced(input: Tensor, output_size: Any, return_indices: bool = False) -> Tensor:
        if return_indices:
            raise ValueError("cannot follow paths through a max pooling with indices")
        return pool(input, output_size)

    return replaced


def _mean_of(input: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    return input.mean() if dim is None else input.mean(dim, keepdim)


def _largest(input: Tensor, dim: Any = None, keepdim: bool = False, *, other: Any = None) -> Any:
    if other is not None or isinstance(dim, Tensor):
        return _sum(input, dim if other is None else other)
    if dim is None:
        return input.mean()
    return torch.return_types.max((input.mean(dim, keepdim), input.argmax(dim, keepdim)))


def _attention(
    query: Tensor, key: Tensor, value: Tensor, *args: Any, enable_gqa: bool = False, **kwargs: Any
) -> Tensor:
    """Every position attends to every one, masks or not; paths also go through the scores."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (each.repeat_interleave(groups, -3) for each in (key, value))
    return _levelled((1 + _levelled(query @ key.transpose(-2, -1))) @ value)


def _joint_attention(
    query: Tensor, key: Tensor, value: Tensor, embed_dim: int, heads: int, in_weight: Tensor | None, in_bias: Tensor | None,
    bias_k: Any, bias_v: Any, add_zero_attn: bool, dropout: float, out_weight: Tensor, out_bias: Tensor | None,
    q_proj_weight: Tensor | None = None, k_proj_weight: Tensor | None = None, v_proj_weight: Tensor | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """`torch.nn.MultiheadAttention`'s function, sequence first."""
    weights = (q_proj_weight, k_proj_weight, v_proj_weight) if in_weight is None else in_weight.chunk(3)
    biases = (None, None, None) if in_bias is None else in_bias.chunk(3)
    parts = []
    for each, weight, bias in zip((query, key, value), weights, biases):
        assert weight is not None
        projected = _levelled(F.linear(each, weight, bias)).unflatten(-1, (heads, -1))
        parts.append(projected.movedim(-2, 0).movedim(1, -2))  # heads, (batch,) sequence, head's width
    mixed = _attention(*parts).movedim(-2, 1).movedim(0, -2).flatten(-2)
    return _levelled(F.linear(mixed, out_weight, out_bias)), None


_SAME = (
    "batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm", "local_response_norm", "normalize", "dropout",
    "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "detach", "prelu", "hardswish",
    "hardswish_", "softsign", "tanhshrink", "logsigmoid", "log_sigmoid",
)  # fmt: skip
"""And every operator that PyTorch calls pointwise, given one tensor."""
_OPEN = ("sigmoid", "sigmoid_", "hardsigmoid", "softmax", "log_softmax", "softmin", "gumbel_softmax")
_SUMS = ("add", "__add__", "__radd__", "sub", "subtract", "__sub__", "rsub", "__rsub__", "maximum", "minimum")
_PRODUCTS = ("mul", "multiply", "__mul__", "__rmul__", "div", "true_divide", "__truediv__")
_SUMS_IN_PLACE = ("add_", "__iadd__", "sub_", "__isub__")
_PRODUCTS_IN_PLACE = ("mul_", "__imul__", "div_", "__itruediv__")

_REPLACEMENTS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(_SAME, _same),
    **dict.fromkeys(_OPEN, _open),
    **dict.fromkeys(_SUMS, _sum),
    **dict.fromkeys(_PRODUCTS, _product),
    **dict.fromkeys(_SUMS_IN_PLACE, _in_place(_sum)),
    **dict.fromkeys(_PRODUCTS_IN_PLACE, _in_place(_product)),
    "max": _largest,
    "min": _largest,
    "max_pool1d": _mean_pool(F.avg_pool1d),
    "max_pool2d": _mean_pool(F.avg_pool2d),
    "max_pool3d": _mean_pool(F.avg_pool3d),
    "adaptive_max_pool1d": _adaptive_mean_pool(F.adaptive_avg_pool1d),
    "adaptive_max_pool2d": _adaptive_mean_pool(F.adaptive_avg_pool2d),
    "adaptive_max_pool3d": _adaptive_mean_pool(F.adaptive_avg_pool3d),
    "amax": _mean_of,
    "amin": _mean_of,
    "logsumexp": _mean_of,
    "masked_fill": _same,
    "masked_fill_": _same,
    "scaled_dot_product_attention": _attention,
    "multi_head_attention_forward": _joint_attention,
}
_LEVELLED = frozenset((*_SAME, *_SUMS))
_MULTILINEAR = frozenset(
    (*(f"conv{kind}{positions}d" for kind in ("", "_transpose") for positions in (1, 2, 3)), "linear", "bilinear",
     "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "dot", "inner", "outer", "einsum", "tensordot", "addmm",
     "baddbmm", "addbmm", "addcmul")
)  # fmt: skip
"""Sums of products: nothing cancels if no factor is negative."""
_EXACT = frozenset(
    ("view", "reshape", "view_as", "reshape_as", "flatten", "unflatten", "ravel", "squeeze", "squeeze_", "unsqueeze",
     "unsqueeze_", "permute", "transpose", "transpose_", "t", "swapaxes", "swapdims", "movedim", "moveaxis", "adjoint",
     "contiguous", "clone", "to", "type", "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda", "expand",
     "expand_as", "broadcast_to", "broadcast_tensors", "repeat", "repeat_interleave", "tile", "chunk", "split",
     "split_with_sizes", "tensor_split", "unbind", "__iter__", "narrow", "select", "index_select", "gather", "take",
     "take_along_dim", "masked_select", "__getitem__", "__setitem__", "__get__", "index_put", "index_put_", "index_add",
     "index_add_", "index_copy", "index_copy_", "scatter", "scatter_", "scatter_add", "scatter_add_", "masked_scatter",
     "masked_scatter_", "select_scatter", "slice_scatter", "cat", "concat", "concatenate", "stack", "hstack", "vstack",
     "dstack", "atleast_1d", "atleast_2d", "atleast_3d", "flip", "fliplr", "flipud", "roll", "rot90", "pad", "unfold",
     "fold", "as_strided", "diagonal", "diag", "diag_embed", "tril", "triu", "pixel_shuffle", "pixel_unshuffle",
     "channel_shuffle", "native_channel_shuffle", "meshgrid", "copy_", "requires_grad_", "zero_", "fill_", "positive",
     "view_as_real", "view_as_complex", "real", "imag", "sum", "mean", "nansum", "nanmean", "cumsum", "trace", "glu",
     *(f"{adaptive}avg_pool{positions}d" for adaptive in ("", "adaptive_") for positions in (1, 2, 3)))
)  # fmt: skip
"""These move values, or add them up with positive factors."""
