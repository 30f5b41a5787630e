"""What measures a network on data without training it: a copy to measure on, and the batches to measure with.

Layer scales and the scores of SNIP, GraSP and SynFlow share it. Nothing here touches the given model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from sparsetweaks.calling import LOW_PRECISION, tensors
from sparsetweaks.copying import copy_model
from sparsetweaks.errors import SurgeryError
from sparsetweaks.recipe.labels import as_targets, check_targets

Pair = tuple[Any, Any]
Loss = Callable[[Any, Any], Tensor]


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


def cross_entropy(output: Any, targets: Any) -> Tensor:
    """The loss where none is given."""
    if not isinstance(output, Tensor) or not isinstance(targets, Tensor):
        raise SurgeryError(
            f"cross entropy needs tensors, got {type(output).__name__} and {type(targets).__name__}: "
            "pass loss=, a function of what the model returns and the targets"
        )
    if output.ndim < 2:
        raise SurgeryError(
            f"cross entropy needs logits (N, C, ...), and the model returned {tuple(output.shape)}: pass loss=, a function "
            "of what it returns and the targets"
        )
    check_targets(output, targets, wait=True)
    return nn.functional.cross_entropy(output, as_targets(targets))


def differentiate(value: Tensor, by: list[nn.Parameter], *, graph: bool = False) -> list[Tensor]:
    """The gradient of `value`; zero for what it does not depend on."""
    if not value.requires_grad:
        return [torch.zeros_like(parameter) for parameter in by]
    return list(torch.autograd.grad(value, by, create_graph=graph, allow_unused=True, materialize_grads=True))


def is_pair(data: Any) -> bool:
    """Whether this is one batch (inputs, targets) rather than a sequence of them.

    It is if either part can be no batch: `(inputs, (classes, boxes))` is one. Tuples and lists in a list are batches.
    """
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        return False
    if not all(isinstance(part, (tuple, list)) for part in data):
        return True
    return isinstance(data, tuple) and any(len(part) != 2 for part in data)


AMBIGUOUS = (
    "is a tuple of two, and may be one pair (inputs, targets) or two of them: write [(inputs, targets)] for the one, "
    "[(inputs, targets), (inputs, targets)] for the other"
)


def check_iterable(batch: Any) -> None:
    """Raise a SurgeryError unless this can be a pair, or an iterable of them."""
    if isinstance(batch, (Tensor, str, bytes, Mapping)) or not isinstance(batch, Iterable):
        raise SurgeryError(
            f"batch must be (inputs, targets) or an iterable of them, got a {type(batch).__name__}"
        )
    if isinstance(batch, tuple) and len(batch) == 2 and not is_pair(batch):
        raise SurgeryError(f"batch {AMBIGUOUS}")


def check_pair(pair: Any, device: torch.device | None) -> Pair:
    """The pair, or a SurgeryError that says what it lacks."""
    if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
        raise SurgeryError(f"each batch must be a pair (inputs, targets), got a {type(pair).__name__}")
    found = list(tensors(pair))
    if not found:
        raise SurgeryError("the batch holds no tensor")
    inputs = tensors(pair[0])  # not the targets: an image may have no objects
    if any(tensor.ndim > 0 and len(tensor) == 0 for tensor in inputs):
        raise SurgeryError("the batch is empty: it needs at least one sample")
    for tensor in found:
        if device is not None and tensor.device != device:
            raise SurgeryError(
                f"the batch is on {tensor.device} but the model on {device}: move one with .to()"
            )
    return pair[0], pair[1]


def rng_restored(model: nn.Module) -> AbstractContextManager[None]:
    """PyTorch's random state, of the CPU and of the model's GPUs, is afterwards what it was."""
    held = (*model.parameters(), *model.buffers())
    devices = {tensor.device.index for tensor in held if tensor.device.type == "cuda"}
    return torch.random.fork_rng(devices=sorted(devices))
