"""What `inputs=` means, everywhere: what one call of a model takes, and how that call is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsetweaks.errors import SurgeryError

LOW_PRECISION = (torch.bfloat16, torch.float16)


def call(model: nn.Module, inputs: Any) -> Any:
    """What the model makes of inputs: a tensor, a tuple of arguments or a mapping of keyword arguments.

    Raises:
        SurgeryError: the model fails on them; what it raised is the cause.
    """
    return call_with(model, *arguments(model, inputs))


def call_with(model: nn.Module, positional: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
    """The same with what `arguments` made of the inputs."""
    try:
        return model(*positional, **keywords)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, RuntimeError, TypeError) as error:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors((positional, keywords)))
        raise SurgeryError(
            f"the model fails on inputs of shape {shapes or 'unknown'}: {error}. Inputs are what one call of the model "
            "takes, without labels: a tensor, a tuple of arguments or a mapping of keyword arguments"
        ) from error


def arguments(model: nn.Module, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments of one call: a tuple of the ones, a mapping of the others, or the only one.

    Tensors in them are copies, as a model that works in place must not reach the caller's. They are on the model's
    device and, if they are floating-point, in its dtype, where all its parameters agree on one. What is in low precision
    stays so for a model that is not: such a model casts its weights by itself.
    """
    device, dtypes = device_of(model), {p.dtype for p in model.parameters() if p.is_floating_point()}
    dtype = dtypes.pop() if len(dtypes) == 1 else None

    def arrived(tensor: Tensor) -> Tensor:
        chosen = tensor.is_floating_point() and (tensor.dtype not in LOW_PRECISION or dtype in LOW_PRECISION)
        wanted = dtype if chosen and dtype is not None else tensor.dtype
        return tensor.detach().to(device=device or tensor.device, dtype=wanted, copy=True)

    given = map_tensors(arrived, inputs)
    if isinstance(given, Mapping):
        return (), dict(given)
    return (tuple(given) if isinstance(given, tuple) else (given,)), {}


def device_of(model: nn.Module) -> torch.device | None:
    """The model's device, or None if it has several."""
    devices = {parameter.device for parameter in model.parameters()}
    return devices.pop() if len(devices) == 1 else None


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same tuples, lists and mappings with each tensor mapped."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(function, part) for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(function, part) for part in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(function, part) for part in value)
    return value


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in tuples, lists, mappings and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors(list(value.values()))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from tensors([getattr(value, field.name) for field in dataclasses.fields(value)])
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors(part)
