"""A network's loss for the analyses: on a copy, in a stated mode, as the mean over any amount of data."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from sparsetweaks.analysis.options import DTYPES, check_choice, check_dtype, check_whole
from sparsetweaks.calling import map_tensors, tensors
from sparsetweaks.copying import check_model, copy_model
from sparsetweaks.probing import AMBIGUOUS, is_pair
from sparsetweaks.prunable import check_dense

Batch = tuple[Any, Any]
Data = Batch | Iterable[Batch]
Loss = Callable[[Any, Any], Tensor]

_LOW_PRECISION = (torch.bfloat16, torch.float16)
_COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}
_CONVERTED = "_converted_to"  # what a working copy notes about itself
_MISTAKES = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)
"""What code that is given here raises on what it cannot take."""


# ------------------------------------------------------------------------------------------------------------
# The network


def working_copy(
    model: nn.Module, *, batch_norm: str = "eval", dtype: torch.dtype | None = None, widen: bool = True
) -> nn.Module:
    """A copy to analyse: dropout off, BatchNorm by its running statistics or by the batch's.

    With `batch_norm="train"` it normalises by the batch and leaves its running statistics alone. Parameters
    and buffers in bfloat16 and float16 become float32 (unless `widen` is False, where nothing small is to be told
    apart), or all floating-point ones `dtype`, with complex ones of its precision.
    """
    check_values(model)
    check_choice("batch_norm", batch_norm, ("eval", "train"))
    check_dtype(dtype)
    with torch.inference_mode(False):  # within it tensors could not be differentiated by
        copied = copy_model(model).eval()
    if batch_norm == "train":
        for module in copied.modules():
            if isinstance(module, _NormBase):
                module.training = True
                module.track_running_stats = False
    for tensor in (*copied.parameters(), *copied.buffers()):
        wanted = torch.float32 if dtype is None and widen and tensor.dtype in _LOW_PRECISION else dtype
        converted = _in_precision(tensor.data, wanted)
        if converted.dtype != tensor.dtype:
            tensor.data = converted
            vars(copied)[_CONVERTED] = wanted
    return copied


def _in_precision(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Real numbers in `dtype`, complex ones in its complex counterpart if there is one, others as they are."""
    if dtype is not None and tensor.is_floating_point():
        return tensor.to(dtype)
    if dtype in _COMPLEX and tensor.is_complex():
        return tensor.to(_COMPLEX[dtype])
    return tensor


def check_values(model: nn.Module) -> None:
    """Refuse what is no module, and a module whose parameters have no values, or some that are not finite.

    Raises:
        TypeError: it is no module.
        ValueError: a parameter is lazy, on the meta device, stored in another way than number by number, of 8 bits or
            fewer, or holds NaN or infinity; it is named.
    """
    check_model(model)
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(
                f"the parameter {name!r} is not initialised yet: run one batch through the lazy model first"
            )
        if parameter.is_meta:
            raise ValueError(
                f"the parameter {name!r} is on the meta device and has no values: load the model first"
            )
        check_numbers({name: parameter})
        if not parameter.detach().isfinite().all():
            raise ValueError(
                f"the parameter {name!r} holds values that are not finite: nothing to analyse there"
            )


def check_numbers(named: Mapping[str, Tensor]) -> None:
    """Refuse by name what cannot be computed with: sparse layouts, quantized numbers, floats of 8 bits or fewer."""
    check_dense(named)
    for name, tensor in named.items():
        if tensor.is_floating_point() and tensor.dtype not in DTYPES:
            raise ValueError(
                f"{name!r} is {tensor.dtype}, which torch stores but does not compute in: convert the model first, "
                "as by model.float()"
            )


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Gradients on, autocast off, and PyTorch's random state as it was when this is left."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    with ExitStack() as stack:
        cuda = sorted(device.index for device in devices if device.type == "cuda")
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in {"cpu", *(device.type for device in devices)}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


# ------------------------------------------------------------------------------------------------------------
# The data


class Chunk(NamedTuple):
    """A piece of the data that the network takes at once."""

    inputs: Any
    targets: Any
    examples: int
    """How many examples it holds."""
    left: int = 0
    """How many of its batch come after it, in other chunks."""


class Batches:
    """The data as chunks on the network's device, the same ones in the same order at each iteration.

    A pair (inputs, targets) is one batch; anything else is iterated over for such pairs, anew each time. Two pairs in
    a list are two batches; in a tuple they may as well be inputs and targets, and are refused. The random state is set
    back before each iteration, and that of a loader's own generators after it, so that a shuffled loader shuffles the
    same way and the mean over the data is one function. PyTorch's random state is the caller's to protect
    (`undisturbed`).
    """

    def __init__(self, data: Data, model: nn.Module, *, chunk_size: int | None = None) -> None:
        if chunk_size is not None:
            check_whole("chunk_size", chunk_size)
        if isinstance(data, (Tensor, str, bytes, Mapping)) or not isinstance(data, Iterable):
            raise ValueError(
                f"data must be (inputs, targets) or an iterable of such pairs, got a {type(data).__name__}"
            )
        if isinstance(data, Iterator):
            raise ValueError(
                f"data is a {type(data).__name__}, which can be gone through only once: pass a list or a DataLoader"
            )
        if isinstance(data, tuple) and len(data) == 2 and not is_pair(data):
            raise ValueError(f"data {AMBIGUOUS}")
        if chunk_size is not None and (name := _normalised_by_the_batch(model)):
            raise ValueError(
                f"chunk_size cuts batches, and BatchNorm {name!r} uses the statistics of its batch (batch_norm='train', or "
                "it keeps none): pass the data in smaller batches instead"
            )
        self.chunk_size = chunk_size
        self.single = is_pair(data)
        self._data: Iterable[Any] = [data] if self.single else data
        devices = {parameter.device for parameter in model.parameters()}
        self._device = devices.pop() if len(devices) == 1 else None
        numbers = [p for p in model.parameters() if p.is_floating_point() or p.is_complex()]
        dtypes = {parameter.dtype.to_real() for parameter in numbers}
        self._dtype = dtypes.pop() if len(dtypes) == 1 else None
        self._random_state = torch.get_rng_state()

    def __iter__(self) -> Iterator[Chunk]:
        torch.set_rng_state(self._random_state)
        states = [(generator, generator.get_state()) for generator in _generators(self._data)]
        try:
            yield from self._chunks()
        finally:
            for generator, state in states:
                generator.set_state(state)

    def _chunks(self) -> Iterator[Chunk]:
        found = False
        for pair in self._data:
            count = self._check(pair)
            size = self.chunk_size or count
            for start in range(0, count, size):
                found = True
                part = pair if size >= count else map_tensors(lambda t: t[start : start + size], pair)  # noqa: B023
                inputs, targets = map_tensors(self._arrived, part)
                yield Chunk(inputs, targets, min(size, count - start), max(count - start - size, 0))
        if not found:
            raise ValueError("the data hold no batch: pass (inputs, targets), or an iterable of such pairs")

    def _check(self, pair: Any) -> int:
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
            raise ValueError(f"each batch must be a pair (inputs, targets), got a {type(pair).__name__}")
        if not (inputs := list(tensors(pair[0]))):
            raise ValueError(f"the inputs must be tensors, or hold them, got a {type(pair[0]).__name__}")
        if any(tensor.ndim == 0 for tensor in inputs):
            raise ValueError("the inputs must have a first dimension of examples, got a tensor without any")
        if any(tensor.is_meta for tensor in tensors(pair)):
            raise ValueError("a batch is on the meta device and has no values: load the data first")
        count = len(inputs[0])
        if count == 0:
            raise ValueError("a batch holds no example")
        wrong = {len(t) if t.ndim else 0 for t in tensors(pair)} - {count}
        targets = pair[1]
        if isinstance(targets, Tensor) and targets.ndim > 0 and len(targets) != count:
            raise ValueError(f"a batch has {count} inputs but {len(targets)} targets")
        if wrong and self.chunk_size is not None and self.chunk_size < count:
            raise ValueError(
                f"cannot cut a batch of {count} examples that also holds a tensor of first size {wrong.pop()}: "
                "leave chunk_size out, or pass smaller batches"
            )
        return count

    def _arrived(self, tensor: Tensor) -> Tensor:
        """A copy of our own, as a network that works in place must not reach the caller's batch."""
        arrived = tensor.detach().to(device=self._device or tensor.device, copy=True)
        return _in_precision(arrived, self._dtype)


def _normalised_by_the_batch(model: nn.Module) -> str | None:
    """The first BatchNorm whose output depends on which examples come together."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            return name or type(module).__name__
    return None


def _generators(data: Any) -> Iterator[torch.Generator]:
    """Those that a DataLoader, its samplers and theirs draw from, where they have their own."""
    owners = [data]
    for owner in owners:
        if isinstance(generator := getattr(owner, "generator", None), torch.Generator):
            yield generator
        inner = [getattr(owner, name, None) for name in ("batch_sampler", "sampler")]
        owners += [each for each in inner if each is not None and not any(each is known for known in owners)]


def call(model: nn.Module, inputs: Any) -> Any:
    """The model's output for a tensor, a tuple of arguments or a mapping of named ones."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


# ------------------------------------------------------------------------------------------------------------
# The loss


def run(model: nn.Module, chunk: Chunk) -> Any:
    """The model's output, or an error that says that the chunk's inputs do not fit."""
    try:
        return call(model, chunk.inputs)
    except torch.OutOfMemoryError:
        raise
    except _MISTAKES as error:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors(chunk.inputs))
        raise ValueError(
            f"the model fails on these inputs (shape {shapes}): {error}{_about(model, error)}"
        ) from error


def _about(model: nn.Module, error: Exception) -> str:
    """What to do where the forward casts by itself to a dtype that the working copy's weights no longer have."""
    wanted = vars(model).get(_CONVERTED)
    if wanted is None or "type" not in str(error):
        return ""
    return (
        f". The weights were converted to {wanted} to compute in: if the forward casts to the dtype that they had, let it "
        "cast to the one that they have, as in x.to(self.layer.weight.dtype)"
    )


def chunk_loss(model: nn.Module, chunk: Chunk, loss: Loss) -> Tensor:
    """The loss of one chunk, checked to be a scalar."""
    return loss_of(loss, run(model, chunk), chunk.targets)


def loss_of(loss: Loss, outputs: Any, targets: Any) -> Tensor:
    """The loss, checked to be a scalar."""
    if not callable(loss):
        raise ValueError(f"the loss must be a function of (outputs, targets), got {loss!r}")
    try:
        value = loss(outputs, targets)
    except torch.OutOfMemoryError:
        raise
    except _MISTAKES as error:
        raise ValueError(f"the loss fails on these outputs and targets: {error}") from error
    if not isinstance(value, Tensor) or value.ndim != 0 or not value.is_floating_point():
        got = (
            f"a {value.dtype} tensor of shape {tuple(value.shape)}"
            if isinstance(value, Tensor)
            else type(value).__name__
        )
        raise ValueError(
            f"the loss must be a scalar, the mean over the examples of a batch, in floating point; got {got}"
        )
    return value


def reestimate_statistics(network: nn.Module, batches: Batches) -> None:
    """Make BatchNorm's running statistics, in place, the means over the examples of each batch's statistics.

    As after a change of weights, which leaves the old ones wrong. Each batch is normalised by its own on the way. Of a
    module that is called several times each call counts.
    """
    norms = [module for module in network.modules() if _has_statistics(module)]
    if not norms:
        return
    seen = dict.fromkeys(norms, 0)

    def weigh(norm: Any, inputs: Any) -> None:
        if not seen[norm]:  # what diverged must go altogether: 0 times infinity is no number
            norm.running_mean.zero_()
            norm.running_var.fill_(1)
        seen[norm] += chunk.examples
        norm.momentum = chunk.examples / seen[norm]

    hooks = [norm.register_forward_pre_hook(weigh) for norm in norms]
    for norm in norms:
        norm.training = True
    with torch.no_grad():
        for chunk in batches:
            run(network, chunk)
    for norm in norms:
        norm.training = False
    for hook in hooks:
        hook.remove()


def _has_statistics(module: nn.Module) -> TypeGuard[_NormBase]:
    return isinstance(module, _NormBase) and module.track_running_stats and module.running_mean is not None


def mean_loss(model: nn.Module, batches: Batches, loss: Loss) -> float:
    """The mean loss over all examples, however the batches are cut; nan or infinite where the network diverges."""
    total, examples = 0.0, 0
    with torch.no_grad():
        for chunk in batches:
            total += chunk.examples * chunk_loss(model, chunk, loss).item()
            examples += chunk.examples
    return total / examples


def check_cut(model: nn.Module, batches: Batches, loss: Loss) -> None:
    """Refuse a loss whose value over a batch is not the mean over its chunks, where `chunk_size` cuts batches."""
    if batches.chunk_size is None:
        return
    pairs: list[tuple[Any, Any]] = []
    counts: list[int] = []
    with torch.no_grad():
        for chunk in batches:
            if pairs or chunk.left:  # not a whole batch
                pairs.append((run(model, chunk), chunk.targets))
                counts.append(chunk.examples)
            if pairs and not chunk.left:
                _check_mean(pairs, counts, loss, batches.chunk_size)
                pairs, counts = [], []


def _check_mean(pairs: list[tuple[Any, Any]], counts: list[int], loss: Loss, chunk_size: int) -> None:
    whole = loss_of(loss, *_joined(pairs, counts))
    parts = sum(n * loss_of(loss, *pair).item() for n, pair in zip(counts, pairs, strict=True)) / sum(counts)
    rounding = math.sqrt(torch.finfo(whole.dtype).eps)  # half of its digits
    if abs(whole.item() - parts) > rounding * max(abs(whole.item()), abs(parts)):
        raise ValueError(
            f"with chunk_size={chunk_size} the loss would be {parts:.6g}, and over whole batches it is {whole.item():.6g}: "
            "it is no mean over examples, as where classes have weights or a sum is taken. Leave chunk_size out, or give "
            "one that is, such as cross_entropy(outputs, targets, weight=weight, reduction='sum') / len(targets)"
        )


def _joined(pairs: list[tuple[Any, Any]], counts: list[int]) -> Any:
    """Outputs and targets of the chunks as those of the batch; what has no examples is as in the first."""
    leaves = [pytree.tree_flatten(pair) for pair in pairs]
    joined = [
        torch.cat(column)
        if all(
            isinstance(each, Tensor) and each.shape[:1] == (n,)
            for each, n in zip(column, counts, strict=True)
        )
        else column[0]
        for column in zip(*(flat for flat, _ in leaves), strict=True)
    ]
    return pytree.tree_unflatten(joined, leaves[0][1])


def check_loss(value: float) -> None:
    """Refuse to go on from a network whose own loss is not finite."""
    if not math.isfinite(value):
        raise ValueError(f"the loss of the given network is {value}: nothing to analyse there")


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the line that called into the package, however deep in it this is."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("sparsetweaks."):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def table_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as aligned text, numbers to the right with four digits."""
    if not rows:
        return ""
    cells = [[_cell(value) for value in row.values()] for row in rows]
    head = list(rows[0])
    widths = [max(len(line[i]) for line in [head, *cells]) for i in range(len(head))]
    numbers = [isinstance(value, (int, float)) for value in rows[0].values()]
    lines = [
        "  ".join(
            text.rjust(width) if number else text.ljust(width)
            for text, width, number in zip(line, widths, numbers, strict=True)
        ).rstrip()
        for line in [head, ["-" * width for width in widths], *cells]
    ]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
