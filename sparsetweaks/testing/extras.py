"""What befalls a whole network besides: hooks, frozen parts, modes, dtypes, memory formats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsetweaks.testing.blocks.block import Block
from sparsetweaks.testing.blocks.containers import SequentialUnit

_NORM_CLASSES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def halve_output(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output * 0.5


def shift_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0] + 0.125, *inputs[1:])


def shift_input_with_keywords(module: nn.Module, inputs: Any, keywords: Any) -> Any:
    return (inputs[0] - 0.125, *inputs[1:]), keywords


def double_input_gradient(module: nn.Module, gradients: Any, output_gradients: Any) -> Any:
    return tuple(None if gradient is None else 2 * gradient for gradient in gradients)


def double_output_gradient(module: nn.Module, gradients: Any) -> Any:
    return tuple(2 * gradient for gradient in gradients)


@dataclass
class Recorder:
    """An object outside the network that a hook of the network feeds."""

    seen: list[float] = field(default_factory=list)

    def record(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.seen.append(float(output.detach().sum()))


def _first_block(model: nn.Module) -> Block:
    return next(module for module in model.modules() if isinstance(module, Block))


def _hook_activation(model: nn.Module) -> None:
    """On the first activation module, where there is one."""
    for module in model.modules():
        if isinstance(module, (nn.ReLU, nn.ReLU6, nn.LeakyReLU)):
            module.register_forward_hook(halve_output)
            break


def _first_layer(model: nn.Module) -> nn.Module:
    """The layer of the first block, wherever the block keeps it."""
    block = _first_block(model)
    return block.first if isinstance(block, SequentialUnit) else block.conv


def _hook_norm(model: nn.Module) -> None:
    """On the first normalisation, where there is one."""
    for module in model.modules():
        if isinstance(module, (*_NORM_CLASSES, nn.GroupNorm, nn.LayerNorm)):
            module.register_forward_hook(halve_output)
            break


def note_calls(module: nn.Module, state: Any, *rest: Any) -> None:
    """A hook on saving or loading that leaves everything as it is."""


def _hook_state(model: nn.Module) -> None:
    block = _first_block(model)
    block.register_state_dict_post_hook(note_calls)
    block.register_load_state_dict_pre_hook(note_calls)


def _hook_bound(model: nn.Module) -> None:
    """A hook that is a method of a module of this model."""
    block = _first_block(model)
    block.hook_calls = Tally()
    block.register_forward_hook(block.hook_calls.count)


class Tally(nn.Module):
    """Counts in a buffer how often its hook was called."""

    number: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("number", torch.zeros((), dtype=torch.long))

    def count(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.number += 1


def _head(model: nn.Module) -> nn.Linear:
    return next(module for module in reversed(list(model.modules())) if isinstance(module, nn.Linear))


def _hook_head_backward(model: nn.Module) -> None:
    _head(model).register_full_backward_hook(double_input_gradient)


def _hook_head_before_backward(model: nn.Module) -> None:
    _head(model).register_full_backward_pre_hook(double_output_gradient)


def _hook_keywords(model: nn.Module) -> None:
    _first_block(model).register_forward_pre_hook(shift_input_with_keywords, with_kwargs=True)


def _freeze_body(model: nn.Module) -> None:
    for parameter in list(model.parameters())[:-2]:  # the classifier's weight and bias come last
        parameter.requires_grad_(False)


def _norms_in_eval(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, _NORM_CLASSES):
            module.eval()


def _to_channels_last(model: nn.Module) -> None:
    """Convolution weights of two dimensions, and of three, with the channels last in memory."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in model.parameters():
        if parameter.dim() in formats:
            parameter.data = parameter.data.contiguous(memory_format=formats[parameter.dim()])


def _fill_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 0.5)


EXTRAS: dict[str, Callable[[nn.Module], Any]] = {
    "shared_block": lambda model: None,  # the first block is there twice: made in `_parts`
    "frozen_layer": lambda model: _first_layer(model).requires_grad_(False),
    "frozen_body": _freeze_body,
    "eval_mode": lambda model: model.eval(),
    "mixed_mode": _norms_in_eval,
    "double": lambda model: model.double(),
    "channels_last": _to_channels_last,
    "gradients": _fill_gradients,
    "block_hook": lambda model: _first_block(model).register_forward_hook(halve_output),
    "block_pre_hook": lambda model: _first_block(model).register_forward_pre_hook(shift_input),
    "keyword_pre_hook": _hook_keywords,
    "layer_hook": lambda model: _first_layer(model).register_forward_hook(halve_output),
    "activation_hook": _hook_activation,
    "root_hook": lambda model: model.register_forward_pre_hook(shift_input),
    "backward_hook": _hook_head_backward,
    "norm_hook": _hook_norm,
    "state_hooks": _hook_state,
    "bound_hook": _hook_bound,
    "always_called_hook": lambda model: _first_block(model).register_forward_hook(
        halve_output, always_call=True
    ),
    "backward_pre_hook": _hook_head_before_backward,
    "recorder_hook": lambda model: _first_block(model).register_forward_hook(Recorder().record),
}
