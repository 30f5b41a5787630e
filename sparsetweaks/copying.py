"""The one copy that every function here makes, so that the caller's model is never touched.

`copy.deepcopy` is nearly it, with three exceptions that matter for masked models. It refuses tensors that are
not leaves, and a `torch.nn.utils.prune` model holds one per pruned layer once it has run forward. And it
copies the object behind a bound-method hook, so that a recorder the caller holds would silently stop
recording. And its copies of parametrized modules share a class with the originals, so that to remove a
parametrization from the copy breaks the original.
"""

from __future__ import annotations

import copy
import types
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

Model = TypeVar("Model", bound=nn.Module)

_HOOK_DICTS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def copy_model(model: Model) -> Model:
    """Copy `model` whole: parameters, buffers, tying, hooks, modes and classes, on the same device.

    A tensor that is not a leaf (the `weight` that `torch.nn.utils.prune` computes at each forward) is copied
    by value, outside the autograd graph. A hook that is a bound method keeps its object, unless that object
    is a module of this model, of which the copy gets its own. Gradients are not copied, as in
    `copy.deepcopy`.

    Args:
        model: any module.

    Returns:
        A new module that shares no tensor with `model`.

    Raises:
        TypeError: what is given is no module.

    Example:
        >>> import torch
        >>> from torch.nn.utils import prune
        >>> layer = prune.random_unstructured(torch.nn.Linear(4, 4), "weight", amount=0.5)
        >>> _ = layer(torch.ones(1, 4))
        >>> torch.equal(copy_model(layer).weight_mask, layer.weight_mask)
        True
    """
    check_model(model)
    modules = list(model.modules())
    memo: dict[int, Any] = {}
    keep: list[Any] = []  # memo is keyed by id: what it names must outlive it
    own = {id(module) for module in modules}
    for module in modules:
        for tensor in _non_leaf_tensors(vars(module).items()):
            memo[id(tensor)] = tensor.detach().clone()
            keep.append(tensor)
        for hook in _hooks(module):
            if isinstance(hook, types.MethodType) and id(hook.__self__) not in own:
                memo[id(hook.__self__)] = hook.__self__
    copied = _copied(model, memo)
    for module in copied.modules():
        if parametrize.is_parametrized(module) and _has_properties(module):
            own_class(module)
    return copied


def _copied(module: Any, memo: dict[int, Any]) -> Any:
    """What `copy.deepcopy` would return, in less than half of its time: most of what a module holds is nothing."""
    if id(module) in memo:
        return memo[id(module)]
    if not _is_plain(type(module)):  # type: ignore[arg-type]
        return copy.deepcopy(module, memo)
    made = memo[id(module)] = object.__new__(type(module))
    attributes = vars(made)
    for name, value in vars(module).items():
        if name == "_modules":
            attributes[name] = {
                key: None if each is None else _copied(each, memo) for key, each in value.items()
            }
        elif name in ("_parameters", "_buffers"):
            attributes[name] = {key: _copied_tensor(each, memo) for key, each in value.items()}
        elif type(value) in _CONSTANTS:
            attributes[name] = value
        elif type(value) in _EMPTY and not value and id(value) not in memo:
            attributes[name] = memo[id(value)] = type(value)()
        else:
            attributes[name] = copy.deepcopy(value, memo)
    return made


def _copied_tensor(tensor: Any, memo: dict[Any, Any]) -> Any:
    """The same for a tensor: one that is plain and fills a storage of its own is cloned.

    torch copies storages, once each, under this key of the memo: that way views of one storage stay that.
    """
    if type(tensor) is not torch.Tensor or id(tensor) in memo or not _fills_its_storage(tensor):
        return copy.deepcopy(tensor, memo)
    storage, copied = tensor.untyped_storage(), memo.setdefault("torch", {})
    if storage._cdata in copied:
        return copy.deepcopy(tensor, memo)
    made = memo[id(tensor)] = tensor.detach().clone(memory_format=torch.preserve_format)
    copied[storage._cdata] = made.untyped_storage()
    return made.requires_grad_(tensor.requires_grad)


def _fills_its_storage(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a leaf of ordinary numbers, without anything attached, as large as its storage."""
    return (
        tensor.layout is torch.strided
        and tensor.device.type in ("cpu", "cuda")
        and tensor.is_contiguous()
        and tensor.is_leaf
        and tensor.grad is None
        and not (vars(tensor) or tensor.is_quantized or tensor.is_complex())
        and tensor.untyped_storage().nbytes() == tensor.nbytes
    )


_CONSTANTS = (bool, int, float, str, bytes, type, type(None), torch.dtype, torch.device, types.FunctionType)
_EMPTY = (dict, OrderedDict, list, set)
_COPYING = (
    "__deepcopy__",
    "__reduce__",
    "__reduce_ex__",
    "__getstate__",
    "__setstate__",
    "__new__",
    "__slots__",
)


_PLAIN: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()
"""What `_says_nothing` answered for a class, as long as the class lives: parametrized modules have one each."""


def _is_plain(cls: Any) -> bool:
    plain = _PLAIN.get(cls)
    if plain is None:
        plain = _PLAIN[cls] = _says_nothing(cls)
    return plain


def _says_nothing(cls: Any) -> bool:
    """Whether a module's `__dict__` is all there is to copy: its class says nothing else about how it is copied.

    What torch's own layers say there is for old pickles only, and what a class says that is marked `plain_to_copy`,
    for all pickles.
    """
    bases = [
        base
        for base in cls.__mro__
        if not base.__module__.startswith("torch.nn.modules.") and "plain_to_copy" not in vars(base)
    ]
    own = {name for base in bases if base is not object for name in vars(base)}
    return own.isdisjoint(_COPYING) and not issubclass(cls, torch.jit.ScriptModule)


def own_class(module: nn.Module, *, without: str = "") -> None:
    """Give a parametrized module a class of its own, in which it may lose the property `without`.

    torch keeps the properties that compute parametrized tensors in a class per module, and a copy shares that
    class: to register or remove a parametrization on the copy would do it to the original as well.
    """
    cls: Any = type(module)
    left_out = ("__dict__", "__weakref__", without)
    members = {name: value for name, value in vars(cls).items() if name not in left_out}
    module.__class__ = type(cls)(cls.__name__, cls.__bases__, members)


def _has_properties(module: nn.Module) -> bool:
    """Whether the module's own class computes its parametrized tensors; above a rewritten one, its base does."""
    return any(name in vars(type(module)) for name in module.parametrizations)  # type: ignore[union-attr]


def check_model(model: object) -> None:
    """Raise a `TypeError` that says what is expected if this is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")


def _hooks(module: nn.Module) -> Iterator[Any]:
    for name in _HOOK_DICTS:
        for hook in getattr(module, name, {}).values():
            yield getattr(hook, "hook", hook)  # state_dict hooks are wrapped


def _non_leaf_tensors(items: Iterable[tuple[Any, Any]]) -> Iterator[torch.Tensor]:
    """Tensors with a history among the values, also in plain containers; parameters are always leaves."""
    for name, value in items:
        if name in ("_parameters", "_buffers", "_modules"):
            value = value if name == "_buffers" else {}
        if isinstance(value, torch.Tensor):
            if not value.is_leaf:
                yield value
        elif isinstance(value, dict):
            yield from _non_leaf_tensors(value.items())
        elif isinstance(value, (list, tuple, set)):
            yield from _non_leaf_tensors(enumerate(value))
