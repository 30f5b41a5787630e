"""What measures a network on data without training it: a copy to measure on, and how to call it.

Layer scales and the scores of SNIP, GraSP and SynFlow share it. Nothing here touches the given model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from sparsetweaks.copying import copy_model
from sparsetweaks.errors import SurgeryError
from sparsetweaks.recipe.labels import check_targets

Pair = tuple[Any, Any]
Loss = Callable[[Any, Any], Tensor]

LOW_PRECISION = (torch.bfloat16, torch.float16)


def probe_copy(model: nn.Module) -> tuple[nn.Module, bool]:
    """A copy without dropout, BatchNorm by the batch, in float32 at least; and whether that widened it."""
    copied = copy_model(model).eval()
    for module in copied.modules():
        if isinstance(module, _NormBase):
            module.training = True
            module.track_running_stats = False
    low = [t for t in (*copied.parameters(), *copied.buffers()) if t.dtype in LOW_PRECISION]
    for tensor in low:
        tensor.data = tensor.data.float()
    return copied, bool(low)


def call(model: nn.Module, inputs: Any) -> Any:
    """What the model makes of inputs: a tensor, or a tuple or mapping of them for several arguments."""
    inputs = map_tensors(torch.clone, inputs)  # a model that works in place must not reach the caller's batch
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def cross_entropy(output: Any, targets: Any) -> Tensor:
    """The loss where none is given."""
    if not isinstance(output, Tensor) or not isinstance(targets, Tensor):
        raise SurgeryError(
            f"cross entropy needs tensors, got {type(output).__name__} and {type(targets).__name__}: "
            "pass loss=, a function of what the model returns and the targets"
        )
    check_targets(output, targets, wait=True)
    return nn.functional.cross_entropy(output, targets)


def is_pair(batch: Any) -> bool:
    """Whether this is one (inputs, targets) pair, and not an iterable of them."""
    return isinstance(batch, (tuple, list)) and len(batch) == 2 and not isinstance(batch[1], (tuple, list))


def check_iterable(batch: Any) -> None:
    """Raise a SurgeryError unless this can be a pair, or an iterable of them."""
    if isinstance(batch, (Tensor, str, bytes, Mapping)) or not isinstance(batch, Iterable):
        raise SurgeryError(
            f"batch must be (inputs, targets) or an iterable of them, got a {type(batch).__name__}"
        )


def check_pair(pair: Any, device: torch.device | None) -> Pair:
    """The pair, or a SurgeryError that says what it lacks."""
    if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
        raise SurgeryError(f"each batch must be a pair (inputs, targets), got a {type(pair).__name__}")
    found = list(tensors(pair))
    if not found:
        raise SurgeryError("the batch holds no tensor")
    if any(tensor.ndim > 0 and len(tensor) == 0 for tensor in found):
        raise SurgeryError("the batch is empty: it needs at least one sample")
    for tensor in found:
        if device is not None and tensor.device != device:
            raise SurgeryError(
                f"the batch is on {tensor.device} but the model on {device}: move one with .to()"
            )
    return pair[0], pair[1]


def device_of(model: nn.Module) -> torch.device | None:
    """The model's device, or None if it has several."""
    devices = {parameter.device for parameter in model.parameters()}
    return devices.pop() if len(devices) == 1 else None


def rng_restored(model: nn.Module) -> AbstractContextManager[None]:
    """PyTorch's random state, of the CPU and of the model's GPUs, is afterwards what it was."""
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    return torch.random.fork_rng(devices=sorted(devices))


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same tuples, lists and mappings with each tensor mapped."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(function, part) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(function, part) for part in value)
    return value


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors(list(value.values()))
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors(part)
