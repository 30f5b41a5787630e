"""A forward in which paths can be counted: it lets everything through, and nothing cancels.

What can stop or cancel a value is replaced by what cannot: activations and normalisations by the identity, differences
by sums, the largest of several by their mean. What is known to add up with positive factors, and what moves values
about, stays as it is. Everything else is opened: all that enters reaches all that leaves, number by number where the
operator works so. It then counts at least the paths that there are, and says what was opened.

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
        if func in _LOOKING_UP and not self._carries(kwargs["weight"] if "weight" in kwargs else args[1]):
            factor = _LOOKING_UP[func](*args, **kwargs)
            return factor * self.start(
                f"embedding {len(self.starts)}", torch.ones_like(factor).requires_grad_()
            )
        if name in ("batch_norm", "instance_norm") and func not in (F.batch_norm, F.instance_norm):
            args = (args[0], *args[3:5], *args[1:3])  # torch's own take weight and bias first
        args, kwargs = self._begin(name, args, kwargs)
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
        if name in _NO_WEIGHTS:
            places = (*_NO_WEIGHTS[name], "input", "query", "key", "value", "attn_mask", "bias")
            kwargs = {key: self._begun(each) if key in places else each for key, each in kwargs.items()}
            return tuple(self._begun(each) if i in places else each for i, each in enumerate(args)), kwargs
        if name not in _ADDING or not any(map(self._carries, _tensors((args, kwargs)))):
            return args, kwargs
        if name in _PRODUCTS_ADDED:
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
    return name in _OPERATORS_IN_PLACE or (name.endswith("_") and not name.endswith("__"))


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


def _affine(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """A normalisation: its weight is a factor, and its bias is added."""
    scaled = input if weight is None else input * _constant(weight)
    return scaled if bias is None else _levelled(scaled) + _constant(bias)


def _batch_norm(
    input: Tensor,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    *_: Any,
    **__: Any,
) -> Tensor:
    return _affine(input, _by_channel(weight, input), _by_channel(bias, input))


def _group_norm(
    input: Tensor, num_groups: int, weight: Any = None, bias: Any = None, *_: Any, **__: Any
) -> Tensor:
    return _affine(input, _by_channel(weight, input), _by_channel(bias, input))


def _layer_norm(
    input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, *_: Any, **__: Any
) -> Tensor:
    return _affine(input, weight, bias)


def _rms_norm(input: Tensor, normalized_shape: Any, weight: Any = None, *_: Any, **__: Any) -> Tensor:
    return _affine(input, weight, None)


def _prelu(input: Tensor, weight: Tensor) -> Tensor:
    """What is positive passes by itself, what is negative by the slope."""
    return input * (1 + (_by_channel(weight, input) if weight.numel() > 1 else weight))


def _by_channel(value: Any, input: Tensor) -> Any:
    return value if value is None else value.reshape(-1, *[1] * (input.ndim - 2))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * g


def _embedding(input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What is looked up may be any row: only shapes matter."""
    return _levelled(_constant(weight).mean(0)).expand(*input.shape, -1)


def _embedding_bag(
    input: Tensor, weight: Tensor, offsets: Any = None, *args: Any, per_sample_weights: Any = None, **kwargs: Any
) -> Tensor:  # fmt: skip
    """As `_embedding`; a bag without anything in it stays empty."""
    one = torch.ones_like(weight[:, :1], requires_grad=False)
    held = F.embedding_bag(input, one, offsets, *args, **kwargs)
    if per_sample_weights is not None:  # summed by hand: torch's own sum has no second derivative
        places = torch.arange(input.numel(), device=input.device)
        bags = (
            places // input.shape[-1]
            if offsets is None
            else torch.searchsorted(offsets, places, right=True) - 1
        )
        held = torch.zeros_like(held).index_add(0, bags, _constant(per_sample_weights).reshape(-1, 1))
    return _levelled(held) * _levelled(_constant(weight).mean(0))


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
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *args: Any, enable_gqa: bool = False, **kwargs: Any
) -> Tensor:  # fmt: skip
    """Every position attends to every one, masks or not; paths also go through the scores, and what is learned of a mask."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (each.repeat_interleave(groups, -3) for each in (key, value))
    scores = 1 + _levelled(query @ key.transpose(-2, -1))
    if attn_mask is not None and attn_mask.requires_grad:
        scores = scores + attn_mask
    return _levelled(scores @ value)


def _joint_attention(
    query: Tensor, key: Tensor, value: Tensor, embed_dim: int, heads: int, in_weight: Tensor | None, in_bias: Tensor | None,
    bias_k: Any, bias_v: Any, add_zero_attn: bool, dropout: float, out_weight: Tensor, out_bias: Tensor | None,
    q_proj_weight: Tensor | None = None, k_proj_weight: Tensor | None = None, v_proj_weight: Tensor | None = None,
    attn_mask: Tensor | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """`torch.nn.MultiheadAttention`'s function, sequence first."""
    if attn_mask is not None and attn_mask.requires_grad:
        raise ValueError(
            "cannot follow paths through a multi-head attention whose attn_mask is learned or computed"
        )
    weights = (q_proj_weight, k_proj_weight, v_proj_weight) if in_weight is None else in_weight.chunk(3)
    biases = (None, None, None) if in_bias is None else in_bias.chunk(3)
    parts = []
    for each, weight, bias, further in zip((query, key, value), weights, biases, (None, bias_k, bias_v)):
        assert weight is not None
        projected = _levelled(F.linear(each, weight, bias))
        if further is not None:  # one more position
            projected = torch.cat([projected, further.flatten().expand(1, *projected.shape[1:])])
        projected = projected.unflatten(-1, (heads, -1))
        parts.append(projected.movedim(-2, 0).movedim(1, -2))  # heads, (batch,) sequence, head's width
    mixed = _attention(*parts).movedim(-2, 1).movedim(0, -2).flatten(-2)
    return _levelled(F.linear(mixed, out_weight, out_bias)), None


_SAME = (
    "local_response_norm", "normalize", "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout",
    "feature_alpha_dropout", "detach", "hardswish", "hardswish_", "softsign", "tanhshrink", "logsigmoid", "log_sigmoid",
)  # fmt: skip
"""And every operator that PyTorch calls pointwise, given one tensor."""
_SCALED: dict[str, Callable[..., Tensor]] = {
    "batch_norm": _batch_norm,
    "instance_norm": _batch_norm,
    "group_norm": _group_norm,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "prelu": _prelu,
    "_weight_norm": _weight_norm,
}
_OPEN = ("sigmoid", "sigmoid_", "hardsigmoid", "softmax", "log_softmax", "softmin", "gumbel_softmax")
_SUMS = ("add", "__add__", "__radd__", "sub", "subtract", "__sub__", "rsub", "__rsub__", "maximum", "minimum")
_PRODUCTS = ("mul", "multiply", "__mul__", "__rmul__", "div", "true_divide", "__truediv__")
_SUMS_IN_PLACE = ("add_", "__iadd__", "sub_", "__isub__")
_PRODUCTS_IN_PLACE = ("mul_", "__imul__", "div_", "__itruediv__")
_OPERATORS_IN_PLACE = (
    "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__", "__ifloordiv__", "__imod__", "__setitem__"
)  # fmt: skip

_REPLACEMENTS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(_SAME, _same),
    **_SCALED,
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
_LEVELLED = frozenset((*_SAME, *_SCALED, *_SUMS))
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

_LOOKING_UP: dict[Any, Callable[..., Tensor]] = {F.embedding: _embedding, F.embedding_bag: _embedding_bag}
_LITTLE = 1e-3
_PRODUCTS_ADDED = ("addmm", "baddbmm", "addbmm", "addmv", "addcmul")
"""Products that are added to what is given first."""
_ADDING = frozenset(
    (*_SUMS, *_SUMS_IN_PLACE, *_PRODUCTS_ADDED, "max", "min", "cat", "concat", "concatenate", "stack", "hstack", "vstack",
     "dstack", "__setitem__", "index_put", "index_put_", "index_add", "index_add_", "index_copy", "index_copy_", "scatter",
     "scatter_", "scatter_add", "scatter_add_", "masked_scatter", "masked_scatter_", "select_scatter", "slice_scatter")
)  # fmt: skip
"""Where something that a path leads to enters these, whatever else enters stands beside it rather than scaling it."""
_NO_WEIGHTS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys((f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3)), (0, 2)),
    "linear": (0, 2),
    "bilinear": (0, 1, 3),
    "batch_norm": (0, 4),
    "instance_norm": (0, 4),
    "layer_norm": (0, 3),
    "group_norm": (0, 3),
    "rms_norm": (0,),
    "scaled_dot_product_attention": (0, 1, 2, 3),
    "multi_head_attention_forward": (0, 1, 2, 6, 7, 8, 12),
}
"""Layers, and which arguments are no weights: what goes in, and biases."""
