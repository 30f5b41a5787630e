"""What stands in for each operator where paths are counted, and which operators stand for themselves.

A stand-in lets everything through and lets nothing cancel. Where many add up, the sum is levelled to 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree


def levelled(value: Tensor) -> Tensor:
    """1 wherever the value is positive, with a positive derivative there, so that no depth overflows or vanishes."""
    return value * torch.where(value > 0, 1 / value, 1).detach()


def constant_tensor(value: Any) -> Any:
    return _constant(value) if isinstance(value, Tensor) else value


def _same(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return input


def _open(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A gate: open whatever enters, and yet dependent on it."""
    return 1 + input


def _affine(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """A normalisation: its weight is a factor, and its bias is added."""
    scaled = input if weight is None else input * _constant(weight)
    return scaled if bias is None else levelled(scaled) + _constant(bias)


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
    return levelled(_constant(weight).mean(0)).expand(*input.shape, -1)


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
    return levelled(held) * levelled(_constant(weight).mean(0))


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


def _softmax(input: Tensor, dim: int | None = None, *_: Any, **__: Any) -> Tensor:
    """Each share depends on all scores, which its denominator adds up."""
    if dim is None:  # torch's own guess
        dim = 0 if input.ndim in (0, 1, 3) else 1
    return 1 + levelled(input.mean(dim, keepdim=True)).expand_as(input)


def _gumbel_softmax(logits: Tensor, *args: Any, dim: int = -1, **_: Any) -> Tensor:
    return _softmax(logits, args[3] if len(args) > 3 else dim)


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
    scores = _scores(query, key)
    if attn_mask is not None and attn_mask.requires_grad:
        scores = scores + attn_mask
    return levelled(scores @ value)


def _scores(query: Tensor, key: Tensor) -> Tensor:
    return 1 + levelled(query @ key.transpose(-2, -1))


def _joint_attention(
    query: Tensor, key: Tensor, value: Tensor, embed_dim: int, heads: int, in_weight: Tensor | None, in_bias: Tensor | None,
    bias_k: Any, bias_v: Any, add_zero_attn: bool, dropout: float, out_weight: Tensor, out_bias: Tensor | None,
    q_proj_weight: Tensor | None = None, k_proj_weight: Tensor | None = None, v_proj_weight: Tensor | None = None,
    attn_mask: Tensor | None = None, need_weights: bool = True, average_attn_weights: bool = True, **_: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
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
        projected = levelled(F.linear(each, weight, bias))
        if further is not None:  # one more position
            projected = torch.cat([projected, further.flatten().expand(1, *projected.shape[1:])])
        projected = projected.unflatten(-1, (heads, -1))
        parts.append(projected.movedim(-2, 0).movedim(1, -2))  # heads, (batch,) sequence, head's width
    mixed = _attention(*parts).movedim(-2, 1).movedim(0, -2).flatten(-2)
    shares = None
    if need_weights:
        shares = F.pad(
            _scores(*parts[:2]), (0, int(add_zero_attn)), value=1
        )  # heads, (batch,) positions, positions
        shares = shares.mean(0) if average_attn_weights else shares.movedim(0, -3)
    return levelled(F.linear(mixed, out_weight, out_bias)), shares


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
_OPEN = ("sigmoid", "sigmoid_", "hardsigmoid")
_SOFTMAX = ("softmax", "log_softmax", "softmin")
_SUMS = ("add", "__add__", "__radd__", "sub", "subtract", "__sub__", "rsub", "__rsub__", "maximum", "minimum")
_PRODUCTS = ("mul", "multiply", "__mul__", "__rmul__", "div", "true_divide", "__truediv__")
_SUMS_IN_PLACE = ("add_", "__iadd__", "sub_", "__isub__")
_PRODUCTS_IN_PLACE = ("mul_", "__imul__", "div_", "__itruediv__")
OPERATORS_IN_PLACE = (
    "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__", "__ifloordiv__", "__imod__", "__setitem__"
)  # fmt: skip

REPLACEMENTS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(_SAME, _same),
    **_SCALED,
    **dict.fromkeys(_OPEN, _open),
    **dict.fromkeys(_SOFTMAX, _softmax),
    "gumbel_softmax": _gumbel_softmax,
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
LEVELLED = frozenset((*_SAME, *_SCALED, *_SUMS))
MULTILINEAR = frozenset(
    (*(f"conv{kind}{positions}d" for kind in ("", "_transpose") for positions in (1, 2, 3)), "linear", "bilinear",
     "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "dot", "inner", "outer", "einsum", "tensordot", "addmm",
     "baddbmm", "addbmm", "addcmul")
)  # fmt: skip
"""Sums of products: nothing cancels if no factor is negative."""
EXACT = frozenset(
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

LOOKING_UP: dict[Any, Callable[..., Tensor]] = {F.embedding: _embedding, F.embedding_bag: _embedding_bag}
PRODUCTS_ADDED = ("addmm", "baddbmm", "addbmm", "addmv", "addcmul")
"""Products that are added to what is given first."""
ADDING = frozenset(
    (*_SUMS, *_SUMS_IN_PLACE, *PRODUCTS_ADDED, "max", "min", "cat", "concat", "concatenate", "stack", "hstack", "vstack",
     "dstack", "__setitem__", "index_put", "index_put_", "index_add", "index_add_", "index_copy", "index_copy_", "scatter",
     "scatter_", "scatter_add", "scatter_add_", "masked_scatter", "masked_scatter_", "select_scatter", "slice_scatter")
)  # fmt: skip
"""Where something that a path leads to enters these, whatever else enters stands beside it rather than scaling it."""
NO_WEIGHTS: dict[str, tuple[int, ...]] = {
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
