"""Scores of pruning before training: what a weight means to the loss (SNIP), to the gradient (GraSP), to the flow (SynFlow).

Each is a tensor per weight, higher = more important, from the network as it is: masked where it is masked, on a copy,
without dropout. Where public implementations part from the papers, or let a network's modes into the scores, the
docstrings say what is done here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from sparsetweaks.calling import LOW_PRECISION, call, device_of, map_tensors, tensors
from sparsetweaks.copying import copy_model
from sparsetweaks.errors import SurgeryError
from sparsetweaks.masks import masks_by_parameter
from sparsetweaks.probing import (
    Loss,
    Pair,
    check_iterable,
    check_pair,
    cross_entropy,
    differentiate,
    is_pair,
    probe_copy,
    rng_restored,
)

GRASP_TEMPERATURE = 200.0  # of the logits: GraSP's own code; its paper keeps silent
SYNFLOW_STEPS = 100  # Tanaka et al., algorithm 1 and section 6

Scores = dict[str, Tensor]
_Batches = Pair | Iterable[Pair]

# In SynFlow's network every number is positive, and there each of these is to be the identity, as the ReLU is.
_ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish,
    nn.Softplus, nn.Tanh, nn.Hardtanh, nn.Softsign,
)  # fmt: skip


def snip_scores(
    model: nn.Module, weights: Mapping[str, nn.Parameter], batch: _Batches, loss: Loss | None = None
) -> Scores:
    """Connection sensitivity, |weight * gradient| (Lee et al. 2019, arXiv 1810.02340, equation 5).

    The gradient is that of the mean loss over all batches, summed in float64 before the absolute value is taken, so
    that several batches score as one of their joint size (but for BatchNorm, which sees each batch by itself).
    BatchNorm normalises by the batch, as in the training that follows; public copies in evaluation mode score an
    untrained network by statistics it does not have.

    Args:
        model: any module, masked or not. It is not changed.
        weights: logical name to parameter, from `prunable_weights(model)`.
        batch: one (inputs, targets) pair, or an iterable of them that ends.
        loss: maps (what the model returned, targets) to a scalar, a mean over the samples; cross entropy if None.

    Returns:
        A float64 tensor per weight; 0 where it is pruned.

    Raises:
        SurgeryError: a batch that does not fit, or a loss that is not a finite scalar of the weights.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, -2.0]]))
        >>> batch = torch.tensor([[3.0, 1.0]]), torch.tensor([[0.0]])
        >>> snip_scores(layer, {"weight": layer.weight}, batch, lambda output, _: output.sum())
        {'weight': tensor([[3., 2.]], dtype=torch.float64)}
    """
    probe = _Probe(model, weights, batch, loss)
    gradients = probe.sum(lambda value: differentiate(value, list(probe.weights.values())))
    scored = zip(probe.weights.items(), gradients, strict=True)
    return {name: (weight.detach() * gradient).abs() for (name, weight), gradient in scored}


def grasp_scores(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    batch: _Batches,
    loss: Loss | None = None,
    *,
    temperature: float = GRASP_TEMPERATURE,
) -> Scores:
    """What a weight gives to the gradient's flow, weight * (Hessian @ gradient) (Wang et al. 2020, arXiv 2002.07376).

    The paper scores the removal, S(-w) = -w * Hg (equation 8), and removes the weights whose S is highest, as its
    algorithm 1 and its code do (its text says "bottom"): so what is kept has the highest w * Hg. The signs matter: no
    absolute value is taken. Both g and H are of the mean loss over all batches, not the mean of each batch's own Hg,
    and of the logits divided by `temperature`. The gradient's flow is that of every trainable parameter that is not
    pruned, as in the paper's formula; its code leaves out biases and normalisations.

    Args:
        model, weights, batch, loss: as in `snip_scores`. What the model returns must be a tensor, the logits.
        temperature: what the logits are divided by, positive.

    Returns:
        A float64 tensor per weight; 0 where it is pruned.

    Raises:
        SurgeryError: as `snip_scores`, and for a model that does not return a tensor.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, -2.0]]))
        >>> batch = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0]])
        >>> half_square = lambda output, target: (output - target).square().mean() / 2  # H = x x^T, g = x x^T w
        >>> grasp_scores(layer, {"weight": layer.weight}, batch, half_square, temperature=1.0)
        {'weight': tensor([[1., -0.]], dtype=torch.float64)}
    """

    def cooled(output: Any, targets: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise SurgeryError(
                f"GraSP divides the logits by a temperature, but the model returns a {type(output).__name__}: "
                "wrap it in a module that returns its logits"
            )
        return (loss or cross_entropy)(output / temperature, targets)

    probe = _Probe(model, weights, batch, cooled)
    flow = [parameter for parameter in probe.model.parameters() if parameter.requires_grad]
    kept = [probe.masks.get(parameter) for parameter in flow]

    def surviving(gradient: list[Tensor]) -> list[Tensor]:
        return [part if mask is None else part * mask for part, mask in zip(gradient, kept, strict=True)]

    total = surviving(probe.sum(lambda value: differentiate(value, flow)))

    def along_total(value: Tensor) -> list[Tensor]:
        gradient = surviving(differentiate(value, flow, graph=True))
        product = sum((g.double() * t).sum() for g, t in zip(gradient, total, strict=True))
        return differentiate(torch.as_tensor(product), list(probe.weights.values()))

    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        products = probe.sum(along_total)
    scored = zip(probe.weights.items(), products, strict=True)
    return {name: weight.detach() * product for (name, weight), product in scored}


class SynFlow:
    """Synaptic flow, |weight * dR/dweight| with R the sum of outputs of the all-positive network (Tanaka et al. 2020).

    arXiv 2006.05467, equation 6 and algorithm 1. The network is made linear: parameters and floating buffers by their
    absolute values, all in float64 (in float32 R overflows in a deep network, and small flows vanish), input one
    sample of ones, activations the identity. A normalisation is its affine map alone: by the statistics of what flows
    through it, it would make R a constant, as every flow is divided out again, and a trained running mean would make
    flows negative. Both are so wherever a forward calls torch's functions, in modules of torch, in subclasses or by
    themselves. A normalisation that a forward computes by hand, out of means, cannot be seen, nor can what is inside a
    scripted module: there flows are divided out. Integer inputs, such as tokens, stay as the batch gives them.

    The scores are of the masks given, so that pruning can go in steps (algorithm 1 takes 100, of equal ratio).

    Args:
        model: any module, masked or not. It is not changed.
        weights: logical name to parameter, from `prunable_weights(model)`.
        batch: one (inputs, targets) pair, or an iterable of them: of the first, the shape of one input is used.

    Raises:
        SurgeryError: a batch that does not fit.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, -2.0]]))
        >>> flow = SynFlow(layer, {"weight": layer.weight}, (torch.zeros(1, 2), None))
        >>> flow.scores({"weight": torch.ones(1, 2, dtype=torch.bool)})
        {'weight': tensor([[1., 2.]], dtype=torch.float64)}
    """

    def __init__(self, model: nn.Module, weights: Mapping[str, nn.Parameter], batch: _Batches) -> None:
        self.model = copy_model(model).eval()
        self.weights = _counterparts(model, self.model, weights)
        with torch.no_grad():
            for tensor in {*self.model.parameters(), *self.model.buffers()}:
                if tensor.is_floating_point():
                    tensor.data = tensor.data.double().abs_()
        for module in self.model.modules():
            if isinstance(module, _ACTIVATIONS):
                module.forward = _identity  # type: ignore[method-assign]
        first = next(iter(_checked(batch, device_of(model))))
        self.inputs = map_tensors(_ones, first[0])

    def scores(self, masks: Mapping[str, Tensor]) -> Scores:
        """Score the weights as these masks leave them; masks of a later call may only be tighter.

        Args:
            masks: a bool mask per weight, True = kept.

        Returns:
            A float64 tensor per weight; 0 where it is pruned.

        Raises:
            SurgeryError: the flow is not finite, or no weight has any.
        """
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.mul_(masks[name].to(weight.device))
        with (
            rng_restored(self.model),
            torch.autocast(_device_type(self.model), enabled=False),
            torch.enable_grad(),
            _Linear(),
        ):
            output = call(self.model, self.inputs)
            flow = torch.as_tensor(sum(t.sum() for t in tensors(output) if t.is_floating_point()))
            if not math.isfinite(flow.item()):
                raise SurgeryError(
                    f"the synaptic flow is {flow.item()}: is a weight not finite, or the network too deep?"
                )
            gradients = _differentiate_within(flow, list(self.weights.values()))
        named = zip(self.weights.items(), gradients, strict=True)
        scores = {name: (weight.detach() * gradient).abs() for (name, weight), gradient in named}
        if not any(score.any() for score in scores.values()):
            raise SurgeryError(
                "no weight has any synaptic flow, so nothing tells them apart: does a layer hold zeros only, or the model "
                "return no tensor that its weights lead to?"
            )
        return scores


class _Probe:
    """A copy of the model, with its weights under the given names, and its batches to sum over."""

    def __init__(
        self, model: nn.Module, weights: Mapping[str, nn.Parameter], batch: _Batches, loss: Loss | None
    ) -> None:
        self.model, widened = probe_copy(model)
        self.weights = _counterparts(model, self.model, weights)
        self.loss = loss or cross_entropy
        self.batches = list(_checked(batch, device_of(model)))
        if widened:
            to_float: Any = lambda t: t.float() if t.dtype in LOW_PRECISION else t
            self.batches = [map_tensors(to_float, pair) for pair in self.batches]
        self.masks = masks_by_parameter(self.model)

    def sum(self, function: Callable[[Tensor], list[Tensor]]) -> list[Tensor]:
        """The sum, in float64, of what a function makes of each batch's share of the mean loss."""
        sizes = [_samples(pair) for pair in self.batches]
        total: list[Tensor] = []
        with rng_restored(self.model), torch.enable_grad():
            for pair, size in zip(self.batches, sizes, strict=True):
                parts = [part.double() for part in function(self._value(pair) * (size / sum(sizes)))]
                total = [t + part for t, part in zip(total, parts, strict=True)] if total else parts
        return total

    def _value(self, pair: Pair) -> Tensor:
        value = self.loss(call(self.model, pair[0]), pair[1])
        if not (isinstance(value, Tensor) and value.ndim == 0 and value.is_floating_point()):
            raise SurgeryError("loss must return a scalar tensor, the mean over the samples")
        if not math.isfinite(value.item()):
            raise SurgeryError(f"the loss is {value.item()}: are inputs and weights finite?")
        if not value.requires_grad:
            raise SurgeryError(
                "the loss does not depend on the weights: is something between them detached, or under no_grad?"
            )
        return value


def _counterparts(
    model: nn.Module, copied: nn.Module, weights: Mapping[str, nn.Parameter]
) -> dict[str, nn.Parameter]:
    """The copy's own parameters for the given ones, all of which can be differentiated by."""
    behind = dict(zip(model.parameters(), copied.parameters(), strict=True))
    found = {name: behind[weight] for name, weight in weights.items()}
    for weight in found.values():
        weight.requires_grad_(True)
    return found


def _checked(batch: _Batches, device: torch.device | None) -> Iterator[Pair]:
    check_iterable(batch)
    count = 0
    for pair in [batch] if is_pair(batch) else batch:
        count += 1
        yield check_pair(pair, device)
    if not count:
        raise SurgeryError("batch is empty: pass (inputs, targets), or an iterable of them")


def _samples(pair: Pair) -> int:
    """How many samples a pair holds: a list's length, or the first dimension of its inputs (of its targets without)."""
    for part in pair:
        if isinstance(part, list) and part:
            return len(part)  # of images of several sizes, say
        if sized := [tensor for tensor in tensors(part) if tensor.ndim > 0]:
            return len(sized[0])
    return 1


def _ones(inputs: Tensor) -> Tensor:
    """One sample: ones in float64, or the given one where it counts something, as tokens do."""
    first = inputs[:1] if inputs.ndim else inputs
    return torch.ones_like(first, dtype=torch.float64) if first.is_floating_point() else first


# ------------------------------------------------------------------------------------------------------------
# SynFlow's network, in which everything is linear


class _Linear(TorchFunctionMode):
    """Within, torch's normalisations are their affine maps, and its activations the identity, whoever calls them."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _LINEAR.get(func, func)(*args, **(kwargs or {}))


def _differentiate_within(value: Tensor, by: list[nn.Parameter]) -> list[Tensor]:
    """`differentiate` within the mode, for what a checkpoint computes again; torch's own functions would leave it."""
    if not value.requires_grad:
        return [torch.zeros_like(parameter) for parameter in by]
    run: Any = torch.autograd.graph._engine_run_backward
    found = run((value,), (torch.ones_like(value),), False, False, tuple(by), True, accumulate_grad=False)
    return [torch.zeros_like(each) if part is None else part for each, part in zip(by, found, strict=True)]


def _identity(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return input


def _affine(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    variance: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """What a normalisation does by channel, beyond the mean: scale by weight and running deviation, add the bias."""

    def fit(values: Tensor) -> Tensor:
        return values.reshape(-1, *(1,) * (input.ndim - 2))

    if variance is not None:
        input = input / fit((variance + eps).sqrt())
    if weight is not None:
        input = input * fit(weight)
    return input if bias is None else input + fit(bias)


def _affine_of_batch(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    return _affine(input, weight, bias, None if training else running_var, eps)


def _affine_of_instance(
    input: Tensor, running_mean: Tensor | None = None, running_var: Tensor | None = None, weight: Tensor | None = None,
    bias: Tensor | None = None, use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    return _affine(input, weight, bias, None if use_input_stats else running_var, eps)


def _affine_of_group(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *_: Any,
    **__: Any,
) -> Tensor:
    return _affine(input, weight, bias)


def _affine_of_layer(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *_: Any,
    **__: Any,
) -> Tensor:
    input = input if weight is None else input * weight
    return input if bias is None else input + bias


def _affine_of_rms(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    return _affine_of_layer(input, normalized_shape, weight)


# torch's own spellings take the running statistics after weight and bias
def _affine_of_torch_batch(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    training: bool, momentum: float, eps: float, cudnn_enabled: bool = False,
) -> Tensor:  # fmt: skip
    return _affine(input, weight, bias, None if training else running_var, eps)


_LINEAR: dict[Any, Callable[..., Tensor]] = {
    F.batch_norm: _affine_of_batch,
    F.instance_norm: _affine_of_instance,
    F.group_norm: _affine_of_group,
    F.layer_norm: _affine_of_layer,
    F.rms_norm: _affine_of_rms,
    torch.batch_norm: _affine_of_torch_batch,
    torch.instance_norm: _affine_of_torch_batch,
    torch.group_norm: _affine_of_group,
    torch.layer_norm: _affine_of_layer,
    torch.rms_norm: _affine_of_rms,
    **dict.fromkeys(
        (
            *(
                F.relu6,
                F.selu,
                torch.selu,
                F.gelu,
                F.silu,
                F.mish,
                F.hardswish,
                F.softplus,
                F.hardtanh,
                F.softsign,
            ),
            *(F.tanh, torch.tanh, torch.tanh_, Tensor.tanh, Tensor.tanh_),
        ),
        _identity,
    ),  # the others of `_ACTIVATIONS` are it for what is positive
}


def _device_type(model: nn.Module) -> str:
    device = device_of(model)
    return "cpu" if device is None else device.type
