"""Which weights may be pruned, and where each of them lives."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.sparse import SparseSemiStructuredTensor

from sparsetweaks.copying import check_model
from sparsetweaks.errors import SurgeryError, UnmaskedZerosWarning
from sparsetweaks.forms import parameter_behind

Selector = str | type | Callable[[str, nn.Module], bool]
Selection = Selector | Iterable[Selector]

_LAYERS = ("conv", "linear")
_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_CLOSE_NAMES = 3
_ZEROS_BY_CHANCE = 1e-4
"""The fraction of exact zeros up to which nobody pruned: a fresh ResNet-152 has 7 of them among 58 million weights."""


class Weight(NamedTuple):
    """One weight of a convolution or of a linear layer."""

    name: str
    """Its logical name, `layer1.0.conv1.weight`, in whatever form it is masked."""
    layer: str
    """`"conv"` or `"linear"`."""
    inside: tuple[tuple[str, nn.Module], ...]
    """The modules that contain it, name and module, outermost first; the last one owns it."""
    parameter: nn.Parameter | None
    """What training updates, or None where a parametrization computes the weight from something else."""


def prunable_weights(
    model: nn.Module,
    *,
    layers: Iterable[str] | None = None,
    include: Selection | None = None,
    exclude: Selection | None = None,
) -> dict[str, nn.Parameter]:
    """Name the weights that pruning chooses among: by default convolutions, as the paper does (4.1).

    By default these are the weights of convolutions (1d, 2d, 3d, transposed or not) where the model has any,
    otherwise those of linear layers, attention's projections among them. Never normalisation, biases,
    embeddings, a linear weight tied to an embedding, what a tweak added, or the classifier. The classifier is
    the convolution or linear layer that was registered last, unless a normalisation was registered after it
    (then the model is a backbone without a head) or it is the model's only one.

    Args:
        model: any module. It is only read.
        layers: kinds to take, from `"conv"` and `"linear"`; `("conv", "linear")` takes both. None is the
            default choice described above.
        include: exactly what is taken of the convolution and linear weights, in place of the default choice:
            a glob pattern on the name of a weight or of a module around it, a module type, a predicate
            `(module name, module) -> bool`, or a list of these. The classifier is taken too if it is named.
        exclude: what is then taken out again, in the same terms.

    Returns:
        Logical name (`layer1.0.conv1.weight`) to parameter, in the order of registration; a tied weight
        once, under its first name. For a layer of `torch.nn.utils.prune` the parameter is its `weight_orig`.

    Raises:
        TypeError: what is given is no module.
        ValueError: an unknown kind, a pattern or type that matches nothing, or nothing is left to prune.
        SurgeryError: a weight has no values yet (lazy, meta device), or a parametrization computes it.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Linear(8, 2))
        >>> list(prunable_weights(model))
        ['0.weight', '2.weight']
        >>> list(prunable_weights(model, include=["2", nn.Linear]))
        ['2.weight', '3.weight']
    """
    chosen = select_weights(model, layers=layers, include=include, exclude=exclude)
    if not chosen:
        raise ValueError(
            "nothing to prune: no convolution or linear weight is left by this choice of layers, include and "
            "exclude (the classifier is left out unless `include` names it)"
        )
    return {weight.name: _checked(weight) for weight in chosen}


def select_weights(
    model: nn.Module,
    *,
    layers: Iterable[str] | None = None,
    include: Selection | None = None,
    exclude: Selection | None = None,
) -> list[Weight]:
    """`prunable_weights` with all that is known about each weight; the list may be empty."""
    check_model(model)
    weights = list(_conv_and_linear_weights(model))
    if layers is not None:
        layers = (layers,) if isinstance(layers, str) else tuple(layers)
        if unknown := [layer for layer in layers if layer not in _LAYERS]:
            raise ValueError(f"unknown layers {unknown}: choose from {list(_LAYERS)}")
    if include is not None:
        chosen = _matching(weights, include, "include")
    else:
        classifier = _classifier(model, weights)
        chosen = [weight for weight in weights if weight.inside[-1][1] is not classifier]
        if layers is None:
            layers = ("conv",) if any(weight.layer == "conv" for weight in chosen) else ("linear",)
    if layers is not None:
        chosen = [weight for weight in chosen if weight.layer in layers]
    if exclude is not None:
        excluded = {weight.name for weight in _matching(weights, exclude, "exclude")}
        chosen = [weight for weight in chosen if weight.name not in excluded]
    return chosen


def added_modules(model: nn.Module) -> list[nn.Module]:
    """Every module that a tweak added to `model`, and every module inside one."""
    return [
        inner
        for module in model.modules()
        if getattr(module, "added_by_tweak", False)
        for inner in module.modules()
    ]


def check_values(named: Mapping[str, Tensor]) -> None:
    """Raise a SurgeryError that names the first of these parameters, buffers or masks that has no values.

    Those of lazy modules that have seen no batch have none, and those on the meta device.
    """
    for name, tensor in named.items():
        if is_lazy(tensor):
            raise SurgeryError(f"{name!r} is not initialised yet: run one batch through the lazy model first")
        if tensor.is_meta:
            raise SurgeryError(
                f"{name!r} is on the meta device and has no values: load the model's weights first"
            )


def check_dense(named: Mapping[str, Tensor]) -> None:
    """Raise a SurgeryError that names the first of these that is stored in another way than number by number."""
    for name, tensor in named.items():
        stored = _other_storage(tensor)
        if stored:
            raise SurgeryError(
                f"{name!r} is {stored}, and masks, counts and files are of dense tensors: give the model as it was before, "
                "or make it dense first (to_dense, dequantize)"
            )


def _other_storage(tensor: Tensor) -> str:
    if tensor.layout != torch.strided:
        return f"stored as {tensor.layout}"
    if tensor.is_quantized:
        return f"quantized to {tensor.dtype}"
    if tensor.is_nested or isinstance(tensor, SparseSemiStructuredTensor):
        return f"a {'nested' if tensor.is_nested else 'semi-structured'} tensor"
    return ""


def plain_zeros(
    weights: Iterable[Weight], masked: Container[nn.Parameter] = frozenset()
) -> dict[nn.Parameter, Tensor]:
    """Of weights that are not `masked`, which are exactly zero, as bool masks, True = not zero.

    Empty where so few are zero that they may be so by chance.
    """
    found = {
        weight.name: weight.parameter
        for weight in weights
        if weight.parameter is not None
        and weight.parameter not in masked
        and not (is_lazy(weight.parameter) or weight.parameter.is_meta)
    }
    check_dense(found)
    total = sum(parameter.numel() for parameter in found.values())
    zeros = total - sum(int(parameter.detach().count_nonzero()) for parameter in found.values())
    if zeros <= _ZEROS_BY_CHANCE * total:
        return {}
    return {parameter: parameter.detach() != 0 for parameter in found.values()}


def about_zeros(zeros: Mapping[nn.Parameter, Tensor]) -> str:
    """What to do about what `plain_zeros` found, for a message."""
    total = sum(mask.numel() for mask in zeros.values())
    count = total - sum(int(mask.count_nonzero()) for mask in zeros.values())
    return (
        f"{count:,} of the {total:,} prunable weights are exactly zero without a mask: if they are pruned, make a mask of "
        "them first, apply_masks(model, find_masks(model, zeros=True))"
    )


def warn_of_zeros(zeros: Mapping[nn.Parameter, Tensor]) -> None:
    """Tell the caller of the public function that calls this what it did with zeros that have no mask."""
    if zeros:
        text = (
            f"{about_zeros(zeros)}; if they are to be trained, one that keeps them. Here they count as pruned"
        )
        warnings.warn(text, UnmaskedZerosWarning, stacklevel=3)


def how_to_mask(model: nn.Module) -> str:
    """What to do with a model that has no masks and should have some, for an error message."""
    zeros = plain_zeros(select_weights(model))
    return about_zeros(zeros) if zeros else "use prune or apply_masks first"


def close_names(name: str, names: Iterable[str]) -> str:
    """The names most like `name`, for an error message."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=_CLOSE_NAMES, cutoff=0.4) or names[:_CLOSE_NAMES]
    return ", ".join(repr(other) for other in close) or "nothing"


def _conv_and_linear_weights(model: nn.Module) -> Iterator[Weight]:
    modules = dict(model.named_modules())
    added = set(added_modules(model))
    seen = {
        id(module.weight)
        for module in modules.values()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
    }
    for name, module in modules.items():
        if module in added:
            continue
        for attribute in _weight_names(module):
            parameter = parameter_behind(module, attribute)
            if id(parameter) in seen:
                continue
            if parameter is not None:
                seen.add(id(parameter))
            layer = "conv" if isinstance(module, _ConvNd) else "linear"
            yield Weight(_join(name, attribute), layer, _inside(name, modules), parameter)


def _weight_names(module: nn.Module) -> tuple[str, ...]:
    if isinstance(module, (_ConvNd, nn.Linear)):
        return ("weight",)
    if isinstance(module, nn.MultiheadAttention):  # it keeps one joint weight, or three; the others are None
        return tuple(name for name in _ATTENTION_WEIGHTS if parameter_behind(module, name) is not None)
    return ()


def _inside(name: str, modules: dict[str, nn.Module]) -> tuple[tuple[str, nn.Module], ...]:
    parts = name.split(".")
    prefixes = [".".join(parts[: count + 1]) for count in range(len(parts))]
    return tuple((prefix, modules[prefix]) for prefix in prefixes if prefix in modules)


def _classifier(model: nn.Module, weights: list[Weight]) -> nn.Module | None:
    added = set(added_modules(model))
    owners = {weight.inside[-1][1] for weight in weights if weight.inside[-1][1] not in added}
    last = None
    for module in model.modules():
        if module in owners:
            last = module
        elif (
            "Norm" in type(module).__name__
            and not any(True for _ in module.children())
            and module not in added
        ):
            last = None
    return last if len(owners) > 1 else None


def _matching(weights: list[Weight], selection: Selection, argument: str) -> list[Weight]:
    selectors: list[Selector]
    if isinstance(selection, (str, type)) or not isinstance(selection, Iterable):
        selectors = [selection]
    else:
        selectors = list(selection)
    matched = set()
    for selector in selectors:
        names = {weight.name for weight in weights if _matches(weight, selector)}
        if not names and isinstance(selector, str):
            known = [weight.name for weight in weights] + [
                name for weight in weights for name, _ in weight.inside
            ]
            raise ValueError(
                f"{argument}: no convolution or linear weight is called or lies inside {selector!r}; "
                f"close: {close_names(selector, dict.fromkeys(known))}"
            )
        if not names and isinstance(selector, type):
            types = sorted({type(weight.inside[-1][1]).__name__ for weight in weights})
            raise ValueError(
                f"{argument}: no convolution or linear weight lies inside a {selector.__name__}; "
                f"they belong to: {', '.join(types) or 'nothing'}"
            )
        matched |= names
    return [weight for weight in weights if weight.name in matched]


def _matches(weight: Weight, selector: Selector) -> bool:
    if isinstance(selector, str):
        return any(
            fnmatchcase(name, selector) for name in (weight.name, *(name for name, _ in weight.inside))
        )
    if isinstance(selector, type):
        return any(isinstance(module, selector) for _, module in weight.inside)
    if callable(selector):
        return bool(selector(*weight.inside[-1]))
    raise ValueError(
        f"include and exclude take a glob pattern, a module type or a predicate (name, module) -> bool, "
        f"or a list of these; got {selector!r}"
    )


def _checked(weight: Weight) -> nn.Parameter:
    parameter = weight.parameter
    if parameter is None:
        raise SurgeryError(
            f"{weight.name!r} is not a parameter: a parametrization computes it (weight_norm, ...). "
            "Remove that first (torch.nn.utils.parametrize.remove_parametrizations), or exclude this layer"
        )
    check_values({weight.name: parameter})
    check_dense({weight.name: parameter})
    return parameter


def _join(module_name: str, attribute: str) -> str:
    return f"{module_name}.{attribute}" if module_name else attribute
