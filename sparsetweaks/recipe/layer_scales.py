"""Layer scales: one learned factor per weight tensor, so that the first training step helps most (paper 3.2).

GradInit (Zhu et al. 2021, arXiv 2102.08098) rescales each tensor of an initialised network so that one
optimizer step on one batch lowers the loss most on another, while the gradient stays bounded. Here it runs on
the masked network: the weights are scale * initial * mask, and the step that is looked ahead to leaves pruned
weights at zero.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsetweaks.calling import LOW_PRECISION, call, device_of, map_tensors, tensors
from sparsetweaks.copying import check_model, copy_model
from sparsetweaks.errors import SurgeryError
from sparsetweaks.masks import find_masks
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
from sparsetweaks.prunable import check_values

Model = TypeVar("Model", bound=nn.Module)

# The defaults: the command in the README of the authors' follow-up (ToST, ICML 2022). That code's own
# defaults are 390 iterations, scale_lr 1e-3, gamma infinite and no normalising; GradInit's launch scripts for
# CIFAR-10 have 390 iterations (DenseNet 780) and a scale_lr of 1e-3 to 1e-1 by network.
ITERATIONS = 180
SCALE_LR = 1e-2
STEP_SIZE = 0.1  # also the learning rate that training then starts with
GAMMA = 1.0
FLOOR = 0.01
GRADIENT_CLIP = 1.0
OVERLAP = 0.5
BETAS = (0.9, 0.999)  # of the Adam that learns the scales, as in the reference
EPSILON = 1e-8

_TWICE_DIFFERENTIABLE = SDPBackend.MATH  # fused attention has no second derivative


@dataclass(frozen=True)
class LayerScales:
    """What `find_layer_scales` learned, and how it went.

    Attributes:
        scales: factor of each parameter tensor by name, for `scale_layers`. A parameter that
            `torch.nn.utils.prune` or a parametrization keeps elsewhere goes by the weight's own name, as in
            `find_masks`. Frozen tensors and tensors that are all zero have no scale.
        losses: loss before the step, at each iteration.
        gradient_norms: norm of the gradient at each iteration; where it exceeds gamma, the iteration lowered
            it.
        look_ahead_losses: loss after the step, at each iteration; nan where the iteration lowered the norm
            instead.
    """

    scales: dict[str, float]
    losses: tuple[float, ...]
    gradient_norms: tuple[float, ...]
    look_ahead_losses: tuple[float, ...]


def learn_layer_scales(
    model: Model,
    batch: Pair | Iterable[Pair],
    *,
    order: int = 1,
    iterations: int = ITERATIONS,
    scale_lr: float = SCALE_LR,
    step_size: float = STEP_SIZE,
    gamma: float = GAMMA,
    floor: float = FLOOR,
    gradient_clip: float = GRADIENT_CLIP,
    algorithm: str = "sgd",
    normalize: bool = True,
    overlap: float = OVERLAP,
    loss: Loss | None = None,
) -> Model:
    """Scale each weight tensor so that the first training step lowers the loss most (paper 3.2, GradInit).

    Minimises L(theta - step_size * d(theta)) / step_size over one positive factor per tensor, where theta is
    factor * given weight * mask and d the direction of the optimizer's first step; whenever the gradient's
    norm exceeds `gamma`, an iteration lowers that norm instead. Adam moves the factors.

    The two orders differ in what they differentiate:

    - `order=1` takes the step d for a constant, as the published GradInit code does (it detaches it). On the
      same batches the learned weights equal that code's bit for bit in float32 on the CPU, for networks of
      convolution, linear and BatchNorm layers, with about a quarter of the extra memory, as no second-order graph is
      built that nothing uses.
    - `order=2` differentiates through the step, as the papers write the objective, for one more pass over the
      step's batch with a second-order graph. On a small network the first order was 10 % off this gradient,
      and after 20 iterations on a ResNet-20 some factors had moved the opposite way: results of the two are
      not interchangeable.

    The norm's bound is differentiated exactly in both. On a masked network both the norm and the step leave
    pruned weights out; the published code, which knows no masks, moves them while it looks ahead. Every
    trainable tensor takes part; the published code steps only convolution, linear and BatchNorm tensors.
    Zeros stay zero.

    Everything runs on a copy, without dropout and with BatchNorm in batch-statistics mode, whatever the
    model's mode. Parameters and buffers in bfloat16 or float16 are learned in float32 and rounded back at the
    end. An active `torch.autocast` is respected. The model, its buffers, modes and gradients, and PyTorch's
    RNG stay untouched.

    The defaults are those of the README of the authors' follow-up (ToST, ICML 2022), `floor` and `overlap` those of
    its code, whose other defaults differ (390 iterations, `scale_lr` 1e-3, no bound `gamma`).

    Args:
        model: the network, masked or dense, at the weights that training will start from. Weights that are
            zero without a mask are ordinary weights: `apply_masks` makes a mask of them.
        batch: one pair (inputs, targets), used whole for the step and for the objective; or an iterable of
            pairs, as a `DataLoader`, of which each iteration takes three: the first two make the step, the
            first and the third the objective. It is iterated again when it ends. The inputs are a tensor, or
            a tuple or mapping of them for a model with several arguments.
        order: 1 as in the published code, 2 for the true gradient; see above.
        iterations: how often the scales are updated, at least 0.
        scale_lr: learning rate of the scales, > 0.
        step_size: learning rate of the step that is looked ahead to, > 0.
        gamma: bound on the gradient's norm, > 0; `float("inf")` for none.
        floor: lowest factor of a tensor, >= 0; biases go down to 0, as in the published code.
        gradient_clip: bound on the objective's derivative with respect to each factor; `float("inf")` for
            none.
        algorithm: `"sgd"` steps along the gradient and bounds its 2-norm; `"adam"` along its sign, bounding
            its 1-norm.
        normalize: divide the gradient by its norm before the step (`"sgd"` only).
        overlap: share of the objective's samples that the step has seen, 0, 0.5 or 1, with an iterable of
            batches; 0.5 is the published default, 0 its option of fresh batches.
        loss: maps (what the model returned, targets) to a scalar; cross entropy if None.

    Returns:
        A new model with scaled weights.

    Raises:
        TypeError: what is given is no module.
        SurgeryError: for a batch that does not fit, a model without values (lazy, meta device) or with nothing to
            scale, and a loss or gradient
            that is not finite (naming the layer first at fault) or zero everywhere.
        ValueError: for an option out of range.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> batch = torch.randn(32, 4), torch.randint(3, (32,))
        >>> scaled = learn_layer_scales(model, batch, iterations=5)
        >>> bool((scaled[0].weight / model[0].weight).std() < 1e-6)
        True
    """
    settings = _Settings(
        order=order,
        iterations=iterations,
        scale_lr=scale_lr,
        step_size=step_size,
        gamma=gamma,
        floor=floor,
        gradient_clip=gradient_clip,
        algorithm=algorithm,
        normalize=normalize,
        overlap=overlap,
        loss=loss,
    )
    search = _Search(model, settings)
    search.run(batch)
    return _with_values(model, search.tensors)


def find_layer_scales(
    model: nn.Module,
    batch: Pair | Iterable[Pair],
    *,
    order: int = 1,
    iterations: int = ITERATIONS,
    scale_lr: float = SCALE_LR,
    step_size: float = STEP_SIZE,
    gamma: float = GAMMA,
    floor: float = FLOOR,
    gradient_clip: float = GRADIENT_CLIP,
    algorithm: str = "sgd",
    normalize: bool = True,
    overlap: float = OVERLAP,
    loss: Loss | None = None,
) -> LayerScales:
    """Learn the layer scales and how the loss went, without scaling: look before `scale_layers` (paper 3.2).

    `scale_layers(model, find_layer_scales(model, batch).scales)` is `learn_layer_scales(model, batch)` up to
    rounding: the latter keeps the weights as they were scaled iteration by iteration, which makes them
    bit-equal to the published code's, the former multiplies once.

    Args:
        model: as in `learn_layer_scales`, and so are `batch` and all options.

    Returns:
        The scales by parameter name, with the losses and gradient norms on the way.

    Raises:
        SurgeryError, ValueError: as `learn_layer_scales`.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> batch = torch.randn(32, 4), torch.randint(3, (32,))
        >>> found = find_layer_scales(model, batch, iterations=5)
        >>> sorted(found.scales)
        ['0.bias', '0.weight', '2.bias', '2.weight']
        >>> found.look_ahead_losses[-1] < found.look_ahead_losses[0]
        True
    """
    settings = _Settings(
        order=order,
        iterations=iterations,
        scale_lr=scale_lr,
        step_size=step_size,
        gamma=gamma,
        floor=floor,
        gradient_clip=gradient_clip,
        algorithm=algorithm,
        normalize=normalize,
        overlap=overlap,
        loss=loss,
    )
    return _Search(model, settings).run(batch)


def scale_layers(model: Model, scales: Mapping[str, float]) -> Model:
    """Multiply each named parameter by its scale (paper 3.2); a scale of 1 changes no bit.

    Args:
        model: the network, masked or dense; it stays as it is.
        scales: factor by parameter name, finite and >= 0, as in `find_layer_scales(...).scales`.

    Returns:
        A new model. Zeros, masks and every parameter that is not named are as before.

    Raises:
        TypeError: what is given is no module.
        ValueError: for a name that the model lacks, and a scale that is negative or not finite.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> torch.equal(scale_layers(layer, {"weight": 2.0}).weight, 2 * layer.weight)
        True
    """
    check_model(model)
    parameters = _floating_parameters(model)
    every_name = _floating_parameters(model, tied=True)
    unknown = sorted(set(scales) - set(every_name))
    if unknown:
        raise ValueError(
            f"the model has no parameter {unknown[0]!r} of real numbers: it has {', '.join(sorted(parameters))}"
        )
    first = {id(parameter): name for name, parameter in reversed(every_name.items())}
    named = {name: first[id(every_name[name])] for name in scales}
    if len(set(named.values())) < len(named):
        raise ValueError("two of the scales are of one tied weight: give it one, under either name")
    scales = {named[name]: scale for name, scale in scales.items()}
    for name, scale in scales.items():
        if not (math.isfinite(scale) and scale >= 0):
            raise ValueError(f"the scale of {name} must be finite and not negative, got {scale}")
    return _with_values(model, {name: parameters[name].detach() * scales[name] for name in scales})


@dataclass(frozen=True, kw_only=True)
class _Settings:
    order: int
    iterations: int
    scale_lr: float
    step_size: float
    gamma: float
    floor: float
    gradient_clip: float
    algorithm: str
    normalize: bool
    overlap: float
    loss: Loss | None

    def __post_init__(self) -> None:
        if self.order not in (1, 2):
            raise ValueError(
                f"order must be 1 (the published code's) or 2 (the true gradient), got {self.order}"
            )
        if self.iterations < 0 or self.iterations != int(self.iterations):
            raise ValueError(f"iterations must be a whole number, at least 0, got {self.iterations}")
        if self.algorithm not in ("sgd", "adam"):
            raise ValueError(f"unknown algorithm {self.algorithm!r}: choose 'sgd' or 'adam'")
        if self.overlap not in (0, 0.5, 1):
            raise ValueError(f"overlap must be 0, 0.5 or 1, got {self.overlap}")
        if not (self.floor >= 0 and math.isfinite(self.floor)):
            raise ValueError(f"floor must be finite and not negative, got {self.floor}")
        for name in ("scale_lr", "step_size"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        for name in ("gamma", "gradient_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"{name} must be positive (float('inf') for no bound), got {getattr(self, name)}"
                )


@dataclass
class _Scale:
    """A tensor's factor and its Adam: a first moment each for objective and bound, one second moment."""

    floor: float
    initial_norm: float
    value: float = 1.0
    square: float = 0.0
    averages: dict[bool, float] = field(default_factory=lambda: {False: 0.0, True: 0.0})
    steps: dict[bool, int] = field(default_factory=lambda: {False: 0, True: 0})

    def update(self, slope: float, *, lr: float, bounding: bool) -> None:
        first, second = BETAS
        self.steps[bounding] += 1
        self.averages[bounding] = self.averages[bounding] * first + slope * (1 - first)
        self.square = self.square * second + (slope * slope) * (1 - second)
        corrected = self.square / (1 - second ** sum(self.steps.values()))
        lr = lr / (1 - first ** self.steps[bounding])
        self.value = max(
            self.value - lr * self.averages[bounding] / (math.sqrt(corrected) + EPSILON), self.floor
        )


class _Search:
    """One run of GradInit, on a copy of the model whose weights it scales in place."""

    def __init__(self, model: nn.Module, settings: _Settings) -> None:
        check_model(model)
        check_values(dict(model.named_parameters()))
        self.settings = settings
        self.model, self.widened = probe_copy(model)
        if unreal := [
            name for name, p in self.model.named_parameters() if p.is_complex() and p.requires_grad
        ]:
            raise SurgeryError(
                f"{unreal[0]!r} is complex, and layer scales are learned of real weights: freeze it to leave it"
            )
        self.tensors = {n: p for n, p in _floating_parameters(self.model).items() if p.requires_grad}
        if not self.tensors:
            raise SurgeryError("the model has no trainable parameter to scale")
        self.parameters = list(self.tensors.values())
        masks = find_masks(self.model)
        every_name = _floating_parameters(self.model, tied=True)
        by_tensor = {id(every_name[name]): mask for name, mask in masks.items() if name in every_name}
        self.masks = [by_tensor.get(id(parameter)) for parameter in self.parameters]
        self.scales = {
            name: _Scale(0.0 if "bias" in name.rpartition(".")[2] else settings.floor, norm)
            for name, tensor in self.tensors.items()
            if (norm := tensor.detach().norm().item()) > 0
        }

    def run(self, batch: Pair | Iterable[Pair]) -> LayerScales:
        batches = _Batches(batch, self.settings.overlap, device_of(self.model), self.widened)
        history: list[tuple[float, float, float]] = []
        with rng_restored(self.model), torch.enable_grad():
            graph = False
            for _ in range(int(self.settings.iterations)):
                history.append(self._iterate(batches, graph))
                graph = history[-1][1] > self.settings.gamma  # the next norm is likely to exceed it as well
        losses, norms, look_ahead_losses = zip(*history, strict=True) if history else ((), (), ())
        scales = {name: scale.value for name, scale in self.scales.items()}
        return LayerScales(scales, losses, norms, look_ahead_losses)

    def _iterate(self, batches: _Batches, graph: bool) -> tuple[float, float, float]:
        """One update of the scales; returns the loss, the gradient's norm, and the loss after the step."""
        pair = batches.for_step()
        graph = graph or self.settings.order == 2
        loss, gradient = self._gradient(pair, graph=graph)
        norm = self._norm(gradient)
        self._check(norm, gradient)
        if norm.item() > self.settings.gamma:
            if not graph:
                _, gradient = self._gradient(pair, graph=True)
            self._update(self._twice(self._norm(gradient)), bounding=True)
            return loss, norm.item(), math.nan
        step = self._step(gradient)
        if self.settings.order == 1:
            del gradient  # and with it the graph, where there is one
            step = [part.detach() for part in step]
        look_ahead_loss, slopes = self._look_ahead([part.detach() for part in step], batches.for_objective())
        if self.settings.order == 2:
            slopes = self._through_the_step(step, slopes)
        self._update(slopes, bounding=False)
        return loss, norm.item(), look_ahead_loss

    def _loss(self, pair: Pair, where: str) -> Tensor:
        torch.clear_autocast_cache()  # which holds the weights as they were before the last change
        loss = (self.settings.loss or cross_entropy)(call(self.model, pair[0]), pair[1])
        if not (isinstance(loss, Tensor) and loss.ndim == 0 and loss.is_floating_point()):
            raise SurgeryError("loss must return a scalar tensor, e.g. a mean over the samples")
        if not loss.requires_grad:
            raise SurgeryError("the loss does not depend on any trainable parameter: was it detached?")
        if not math.isfinite(loss.item()):
            raise SurgeryError(f"the loss is {loss.item()} {where}: {_first_fault(self.model, pair[0])}")
        return loss

    def _gradient(self, pair: Pair, *, graph: bool) -> tuple[float, list[Tensor]]:
        """The loss and its gradient without pruned weights, which with `graph` can be differentiated."""
        kernels: AbstractContextManager[Any] = sdpa_kernel(_TWICE_DIFFERENTIABLE) if graph else nullcontext()
        with kernels:
            loss = self._loss(pair, "before the step")
            gradient = differentiate(loss, self.parameters, graph=graph)
        parts = zip(gradient, self.masks, strict=True)
        return loss.item(), [part if mask is None else part * mask for part, mask in parts]

    def _twice(self, value: Tensor) -> list[Tensor]:
        """Differentiate what was made of a gradient: where the model checkpoints, its forward runs again here."""
        with sdpa_kernel(_TWICE_DIFFERENTIABLE):
            return differentiate(value, self.parameters)

    def _norm(self, gradient: list[Tensor]) -> Tensor:
        if self.settings.algorithm == "adam":
            return torch.as_tensor(sum(part.abs().sum() for part in gradient))
        return torch.as_tensor(sum(part.square().sum() for part in gradient)).sqrt()

    def _step(self, gradient: list[Tensor]) -> list[Tensor]:
        """What the optimizer's first step takes from each tensor."""
        if self.settings.algorithm == "adam":
            return [self.settings.step_size * part.sign() for part in gradient]
        if not self.settings.normalize:
            return [self.settings.step_size * part for part in gradient]
        norm = self._norm(gradient)
        return [self.settings.step_size * (part / norm) for part in gradient]

    def _look_ahead(self, step: list[Tensor], pair: Pair) -> tuple[float, list[Tensor]]:
        """The loss after the step, and the objective's gradient with respect to the weights there."""
        before = [parameter.detach().clone() for parameter in self.parameters]
        # The step's graph, where there is one, holds the parameters: they come back as they were, to the bit.
        with contextlib.ExitStack() as kept:
            for parameter in self.parameters:  # one by one: torch 2.6 takes no tuple
                kept.enter_context(torch.autograd._unsafe_preserve_version_counter(parameter))
            with torch.no_grad():
                for parameter, part in zip(self.parameters, step, strict=True):
                    parameter.sub_(part)
            loss = self._loss(pair, "after the step that is looked ahead to")
            gradient = differentiate(loss / self.settings.step_size, self.parameters)
            with torch.no_grad():
                for parameter, value in zip(self.parameters, before, strict=True):
                    parameter.copy_(value)
        return loss.item(), gradient

    def _through_the_step(self, step: list[Tensor], slopes: list[Tensor]) -> list[Tensor]:
        """Carry the gradient after the step back to the weights before it: subtract (d step)^T slopes."""
        products = [(part * slope).sum() for part, slope in zip(step, slopes, strict=True)]
        through = self._twice(torch.as_tensor(sum(products)))
        return [slope - part for slope, part in zip(slopes, through, strict=True)]

    @torch.no_grad()
    def _update(self, slopes: list[Tensor], *, bounding: bool) -> None:
        """Move the scales, given the gradient with respect to the weights, and rescale the weights."""
        for (name, tensor), slope in zip(self.tensors.items(), slopes, strict=True):
            scale = self.scales.get(name)
            norm = tensor.norm().item()
            if scale is None or norm == 0:
                continue
            # The tensor comes first: its memory layout, and not the gradient's, sets the order of the sum.
            derivative = (tensor * slope).sum().item() * scale.initial_norm / norm
            if not math.isfinite(derivative):
                raise SurgeryError(f"the derivative with respect to the scale of {name} is {derivative}")
            clip = self.settings.gradient_clip
            scale.update(max(min(derivative, clip), -clip), lr=self.settings.scale_lr, bounding=bounding)
            tensor.mul_(scale.value * scale.initial_norm / norm)

    def _check(self, norm: Tensor, gradient: list[Tensor]) -> None:
        if not math.isfinite(norm.item()):
            wrong = [n for n, part in zip(self.tensors, gradient, strict=True) if not part.isfinite().all()]
            raise SurgeryError(
                f"the gradient is not finite, first at fault: {wrong[-1] if wrong else 'its norm'}"
            )
        if norm.item() == 0:
            raise SurgeryError(
                "the gradient is zero everywhere, so no step can be looked ahead to: is a layer all zero?"
            )


class _Batches:
    """The samples of the step and of the objective, drawn in the published code's order."""

    def __init__(
        self, batch: Pair | Iterable[Pair], overlap: float, device: torch.device | None, widen: bool
    ) -> None:
        self.overlap, self.device, self.widen = overlap, device, widen
        check_iterable(batch)
        self.whole = self._checked(batch) if is_pair(batch) else None
        self.stream = self._cycle(batch)

    def for_step(self) -> Pair:
        if self.whole is not None:
            return self.whole
        self.first = next(self.stream)
        self.step = _join(self.first, next(self.stream))
        return self.step

    def for_objective(self) -> Pair:
        if self.whole is not None:
            return self.whole
        if self.overlap == 1:
            return self.step
        last = next(self.stream)
        return _join(next(self.stream) if self.overlap == 0 else self.first, last)

    def _cycle(self, batches: Iterable[Any]) -> Iterator[Pair]:
        count = 0
        while True:
            before = count
            for pair in batches:
                count += 1
                yield self._checked(pair)
            if count == before:
                ended = f"ended after {count} pairs and cannot be iterated again: pass a list or a DataLoader"
                empty = "is empty: pass (inputs, targets), or an iterable of them"
                raise SurgeryError(f"batch {ended if count else empty}")

    def _checked(self, pair: Any) -> Pair:
        inputs, targets = check_pair(pair, self.device)
        if self.widen:
            inputs, targets = map_tensors(
                lambda t: t.float() if t.dtype in LOW_PRECISION else t, (inputs, targets)
            )
        return inputs, targets


def _with_values(model: Model, values: Mapping[str, Tensor]) -> Model:
    """A copy of the model with these values for the named parameters."""
    copied = copy_model(model)
    parameters = _floating_parameters(copied)
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)
        for module in copied.modules():
            for name in [n.removesuffix("_orig") for n in module._parameters if n.endswith("_orig")]:
                if (
                    name in vars(module) and f"{name}_mask" in module._buffers
                ):  # what torch's prune last computed
                    setattr(
                        module, name, module.get_parameter(f"{name}_orig") * module.get_buffer(f"{name}_mask")
                    )
    return copied


def _floating_parameters(model: nn.Module, *, tied: bool = False) -> dict[str, nn.Parameter]:
    """The parameters by the weight's own name, whatever form its mask has; with `tied`, by all its names."""
    buffers = {name for name, _ in model.named_buffers()}
    named = {}
    for name, parameter in model.named_parameters(remove_duplicate=not tied):
        stem = name.removesuffix("_orig")
        if name.endswith("_orig") and f"{stem}_mask" in buffers:
            name = stem
        elif "parametrizations." in name and name.endswith(".original"):
            name = name.removesuffix(".original").replace("parametrizations.", "")
        if parameter.is_floating_point():
            named[name] = parameter
    return named


def _first_fault(model: nn.Module, inputs: Any) -> str:
    """Which layer is the first whose output is not finite."""
    if not all(_finite(tensor) for tensor in tensors(inputs)):
        return "the inputs are not finite"
    faults: list[str] = []

    def watch(name: str, module: nn.Module) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not faults and not all(_finite(tensor) for tensor in tensors(output)):
                wrong = [n for n, p in module.named_parameters(recurse=False) if not _finite(p)]
                because = f", whose {wrong[0]} is not finite either" if wrong else ""
                faults.append(
                    f"first at fault is the output of layer {name!r} ({type(module).__name__}){because}"
                )

        return module.register_forward_hook(hook)

    handles = [watch(name, module) for name, module in model.named_modules()]
    with torch.no_grad():
        call(model, inputs)
    for handle in handles:
        handle.remove()
    return faults[0] if faults else "every layer's output is finite, so it is the loss function"


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _join(first: Any, second: Any) -> Any:
    """Two batches as one."""
    if isinstance(first, Tensor):
        return torch.cat([first, second])
    if isinstance(first, Mapping):
        return {key: _join(first[key], second[key]) for key in first}
    if isinstance(first, tuple):
        joined = [_join(*parts) for parts in zip(first, second, strict=True)]
        return type(first)(*joined) if hasattr(first, "_fields") else tuple(joined)
    if first is None and second is None:
        return None
    if isinstance(first, list):
        return first + second
    raise SurgeryError(
        f"cannot join batches that hold a {type(first).__name__}: pass one pair (inputs, targets)"
    )
