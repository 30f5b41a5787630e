"""What a network does, and what it is: two of them compared."""

from __future__ import annotations

import dataclasses
import random
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparsetweaks.testing.networks import Batch, isolated_rng


class Observation(NamedTuple):
    """All that a network did: by name, the values that a rewrite may not change."""

    values: dict[str, Any]


def observe(
    model: nn.Module, batch: Batch, *, training: bool | None = None, seed: int = 0, calls: int = 2
) -> Observation:
    """Run `model` forward and backward and record outputs, gradients, buffers and attributes.

    This changes the model. It runs `calls` times with gradients, and once without. The loss weighs every
    element of the outputs differently, so that no gradient cancels.

    Args:
        model: any module; its gradients, buffers and mode change, so pass a twin made for this.
        batch: what to run it on.
        training: the mode to run in; None keeps the modes as they are.
        seed: where torch's and Python's global generators start; both are put back afterwards.
        calls: forward and backward passes.

    Example:
        >>> from sparsetweaks.testing import Spec, build, example_batch, observe
        >>> spec = Spec()
        >>> seen = observe(build(spec), example_batch(spec), training=True)
        >>> "output 0.0" in seen.values, "gradient of head.weight" in seen.values
        (True, True)
    """
    values: dict[str, Any] = {}
    if training is not None:
        model.train(training)
    model.zero_grad()
    with isolated_rng(seed):
        for call in range(calls):
            inputs = batch.inputs.clone(memory_format=torch.preserve_format).requires_grad_()
            outputs = _leaves(model(inputs))
            loss = sum(_weighted_sum(output) for output in outputs if isinstance(output, Tensor))
            if isinstance(loss, Tensor) and loss.requires_grad:
                loss.backward()
            values |= {f"output {call}.{i}": _frozen(output) for i, output in enumerate(outputs)}
            values[f"input gradient {call}"] = _frozen(inputs.grad)
        with torch.no_grad():
            outputs = _leaves(model(batch.inputs.clone()))
            values |= {f"output without gradients {i}": _frozen(output) for i, output in enumerate(outputs)}
    values |= {f"gradient of {name}": _frozen(each.grad) for name, each in model.named_parameters()}
    values |= {f"buffer {name}": _frozen(buffer) for name, buffer in model.named_buffers()}
    for name, module in model.named_modules():
        for attribute in ("calls", "seen", "history"):
            if attribute in vars(module):
                values[f"attribute {name}.{attribute}"] = _frozen(vars(module)[attribute])
    return Observation(values)


def _leaves(outputs: Any) -> list[Any]:
    """What is in a network's outputs, the fields of dataclasses too."""
    parts = vars(outputs) if dataclasses.is_dataclass(outputs) else outputs
    return pytree.tree_leaves(parts)


def _weighted_sum(output: Tensor) -> Tensor:
    weights = torch.cos(torch.arange(output.numel(), dtype=output.dtype)).view(output.shape)
    return (output * weights).sum()


def _frozen(value: Any) -> Any:
    """A value that later steps of the network cannot change."""
    if isinstance(value, Tensor):
        return value.detach().clone(memory_format=torch.preserve_format)
    if isinstance(value, (list, tuple)):
        return [_frozen(each) for each in value]
    return value


def snapshot(model: nn.Module) -> Observation:
    """Record all that a network is: tensors, gradients, tying, hooks, modes, classes and attributes.

    Two snapshots of one model, before and after a call, have no `differences` where the call was pure.

    Args:
        model: any module.

    Example:
        >>> from sparsetweaks.testing import Spec, build, differences, snapshot
        >>> model = build(Spec())
        >>> before = snapshot(model)
        >>> _ = model.eval()
        >>> differences(before, snapshot(model))[0]
        'training of : True, now False'
    """
    values: dict[str, Any] = {"random": random.getstate(), "torch random": torch.get_rng_state()}
    for name, module in model.named_modules(remove_duplicate=False):
        values |= {f"training of {name}": module.training, f"class of {name}": type(module)}
        values[f"identity of {name}"] = id(module)
        for attribute, value in vars(module).items():
            here = f"{attribute} of {name}"
            if attribute in ("_parameters", "_buffers"):
                for key, tensor in value.items():
                    values |= _tensor_facts(f"{name}.{key}", tensor)
            elif isinstance(value, Tensor):
                values |= _tensor_facts(f"{name}.{attribute}", value)
            elif "hooks" in attribute and isinstance(value, dict):
                values[here] = [(key, id(getattr(hook, "__func__", hook))) for key, hook in value.items()]
            elif attribute == "_modules":
                values[here] = list(value)
            else:
                values[here] = _frozen(value)
    return Observation(values)


def _tensor_facts(name: str, tensor: Tensor | None) -> dict[str, Any]:
    if tensor is None:
        return {f"value of {name}": None}
    return {
        f"value of {name}": _frozen(tensor),
        f"identity of {name}": id(tensor),
        f"memory of {name}": (tensor.data_ptr(), tensor.stride(), tensor.dtype, tensor.device, type(tensor)),
        f"requires_grad of {name}": (tensor.requires_grad, tensor.is_leaf),
        f"gradient of {name}": _frozen(tensor.grad) if tensor.is_leaf else None,
    }


def differences(
    expected: Observation, found: Observation, *, tolerance: float = 0.0, added: bool = False
) -> list[str]:
    """What differs between two observations, one line each; an empty list where nothing does.

    Args:
        expected: what it should be.
        found: what it is.
        tolerance: the largest gap between floating-point values that counts as none, relative to the largest
            expected value or to 1; 0 asks for equal values (NaN equals NaN).
        added: whether `found` may have more names, as a rewrite that adds parameters has.

    Example:
        >>> from sparsetweaks.testing import Observation, differences
        >>> differences(Observation({"a": 1}), Observation({"a": 2, "b": 0}))
        ['a: 1, now 2', 'b: not there before']
    """
    lines = []
    for name, value in expected.values.items():
        if name not in found.values:
            lines.append(f"{name}: gone")
        elif line := _difference(value, found.values[name], tolerance):
            lines.append(f"{name}: {line}")
    if not added:
        lines += [f"{name}: not there before" for name in found.values if name not in expected.values]
    return lines


def _difference(a: Any, b: Any, tolerance: float) -> str:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
            return f"{a.dtype} {tuple(a.shape)}, now {b.dtype} {tuple(b.shape)}"
        if torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num()):
            return ""
        gap = float((a.double() - b.double()).abs().max())
        scale = max(1.0, float(a.double().abs().max()))
        return "" if gap <= tolerance * scale else f"differs by up to {gap:.2g}"
    if isinstance(a, list) and isinstance(b, list):
        if len(a) != len(b):
            return f"{len(a)} entries, now {len(b)}"
        found = (_difference(x, y, tolerance) for x, y in zip(a, b, strict=True))
        return next((line for line in found if line), "")
    if isinstance(a, weakref.ref) and isinstance(b, weakref.ref):
        return "" if a() is b() else "refers to another object"  # their own comparison would ask the tensors
    if isinstance(a, Tensor) or isinstance(b, Tensor) or a != b:
        return f"{a!r:.40}, now {b!r:.40}"
    return ""
