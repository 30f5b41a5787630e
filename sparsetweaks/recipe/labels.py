"""Label smoothing and distillation: the soft targets of the paper's recipe (3.2).

There are two forms of label smoothing, both with a strength `smoothing`, called e here, over K classes:

- `"uniform"`, the paper's formula and PyTorch's `label_smoothing`: (1 - e) * one_hot + e / K.
- `"wrong"`, what the paper's authors' code computes: 1 - e on the right class, e / (K - 1) on each wrong one.

The second is the first with strength e * K / (K - 1), so 0.1 there means 0.111 here with 10 classes and 0.101
with 100. Both therefore run through PyTorch's own cross entropy, class weights and ignored labels included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetweaks.calling import call
from sparsetweaks.copying import check_model

IGNORE_INDEX = -100  # PyTorch's
FORMS = ("uniform", "wrong")
SMOOTHING = 0.1  # the paper's, and its authors' code's
# The paper published neither. These are of the CIFAR benchmark of Tian et al. 2020 (arXiv 1910.10699, its
# code); Hinton et al. 2015 tried temperatures from 1 to 20.
TEMPERATURE = 4.0
WEIGHT = 0.9


def smooth_labels(
    labels: Tensor,
    classes: int,
    *,
    smoothing: float = SMOOTHING,
    form: str = "uniform",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Turn class labels into smoothed probabilities, so that certainty is not rewarded (paper 3.2).

    Args:
        labels: integer class labels in [0, classes), of any shape (N, ...).
        classes: number of classes K, at least 2.
        smoothing: probability taken from the right class, in [0, 1); 0.1 is the paper's.
        form: `"uniform"` gives (1 - e) * one_hot + e / K (the paper, PyTorch); `"wrong"` gives 1 - e on the
            right class and e / (K - 1) on each wrong one (the authors' code).
        dtype: of the result; PyTorch's default dtype if None.

    Returns:
        Probabilities (N, K, ...), classes in dimension 1 as `torch.nn.functional.cross_entropy` takes them.

    Raises:
        ValueError: for labels that are not integers or out of range, and for a wrong option.

    Example:
        >>> smooth_labels(torch.tensor([0, 2]), 4, smoothing=0.3, form="wrong")
        tensor([[0.7000, 0.1000, 0.1000, 0.1000],
                [0.1000, 0.1000, 0.7000, 0.1000]])
    """
    if classes < 2:
        raise ValueError(f"label smoothing needs at least 2 classes, got {classes}")
    uniform = _as_uniform(_checked_smoothing(smoothing), _checked_form(form), classes)
    _check_labels(labels, classes)
    one_hot = F.one_hot(labels.long(), classes).movedim(-1, 1).to(dtype or torch.get_default_dtype())
    return one_hot * (1 - uniform) + uniform / classes


class SoftLabelLoss(nn.Module):
    """Cross entropy against smoothed labels (paper 3.2), a drop-in for `torch.nn.CrossEntropyLoss`.

    With `form="uniform"` it equals `torch.nn.functional.cross_entropy(..., label_smoothing=smoothing)` bit
    for bit. bfloat16 and float16 logits are taken to float32 first, as CUDA autocast does it, on every
    device.

    Args:
        smoothing: probability taken from the right class, in [0, 1); 0.1 is the paper's, 0 is plain cross
            entropy.
        form: `"uniform"` (the paper's formula) or `"wrong"` (its authors' code), see `smooth_labels`.
        weight: one weight per class, (C,), or None.
        ignore_index: a label that does not count towards the loss.
        reduction: `"mean"`, `"sum"` or `"none"`.

    Raises:
        ValueError: for a wrong option.

    Example:
        >>> loss = SoftLabelLoss(smoothing=0.1)
        >>> logits, labels = torch.zeros(2, 10), torch.tensor([3, 7])
        >>> loss(logits, labels)
        tensor(2.3026)
    """

    weight: Tensor | None

    def __init__(
        self,
        smoothing: float = SMOOTHING,
        form: str = "uniform",
        *,
        weight: Tensor | None = None,
        ignore_index: int = IGNORE_INDEX,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"unknown reduction {reduction!r}: choose 'mean', 'sum' or 'none'")
        self.smoothing = _checked_smoothing(smoothing)
        self.form = _checked_form(form)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.register_buffer("weight", weight)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of `logits` against `labels`.

        Args:
            logits: (N, C), or dense (N, C, ...) as in segmentation.
            labels: class labels in [0, C) or `ignore_index`, (N) or (N, ...); or probabilities shaped like
                `logits`, as mixup gives them, which are smoothed too.

        Returns:
            A scalar, or with `reduction="none"` one loss per label.

        Raises:
            ValueError: for shapes or dtypes that do not fit, and for labels out of range. The range is
                checked on the CPU only: on an accelerator that would wait for the device at every step, and
                there a wrong label fails the device's own assertion; in compiled code it would break the
                graph.
        """
        if logits.ndim < 2 or logits.shape[1] < 2:
            raise ValueError(f"logits must be (N, C, ...) with at least 2 classes, got {tuple(logits.shape)}")
        check_targets(logits, labels, ignore_index=self.ignore_index)
        wide = _at_least_float32(logits)
        return F.cross_entropy(
            wide,
            _at_least_float32(as_targets(labels)),
            weight=None if self.weight is None else self.weight.to(wide.dtype),
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=_as_uniform(self.smoothing, self.form, logits.shape[1]),
        )

    def extra_repr(self) -> str:
        return f"smoothing={self.smoothing}, form={self.form!r}, reduction={self.reduction!r}"


def distillation_loss(
    student_logits: Tensor,
    labels: Tensor | None = None,
    *,
    teacher: nn.Module | Tensor,
    inputs: Any = None,
    temperature: float = TEMPERATURE,
    weight: float = WEIGHT,
    label_loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> Tensor:
    """Learn from the teacher's soft labels as well as from the true ones (paper 3.2; Hinton et al. 2015).

    weight * T^2 * KL(softmax(teacher / T) || softmax(student / T)) + (1 - weight) * label_loss(student,
    labels). The factor T^2 keeps the two parts' gradients in proportion whatever T is. The paper's teacher is
    the dense network; it published neither temperature nor weight: the defaults are those of the usual
    CIFAR benchmark (Tian et al. 2020). Where a class label is `label_loss.ignore_index` (-100 if it has none),
    the teacher does not count either.

    A teacher that is a module runs without gradient and in eval mode; afterwards every one of its modules is
    in the mode it was in.

    Args:
        student_logits: (N, C) or dense (N, C, ...).
        labels: class labels (N) or (N, ...), or probabilities like the logits; may be left out if `weight` is
            1.
        teacher: a module that maps `inputs` to logits, or the logits themselves, shaped as `student_logits`.
        inputs: what one call of the teacher module takes, without labels: a tensor, a tuple of arguments or a
            mapping of keyword arguments; left out for precomputed logits.
        temperature: T > 0; higher values show more of how the teacher ranks the wrong classes.
        weight: share of the teacher's part, in [0, 1].
        label_loss: loss of the true labels; `SoftLabelLoss()` smooths them too.

    Returns:
        The loss, a scalar: a mean over the samples (and positions) that are not ignored.

    Raises:
        TypeError: the teacher is neither.
        ValueError: for shapes that do not fit, a teacher that fails on the inputs, missing inputs or labels, and
            values out of range.

    Example:
        >>> student, labels = torch.zeros(2, 3), torch.tensor([0, 1])
        >>> distillation_loss(student, labels, teacher=torch.zeros(2, 3), weight=0.5)
        tensor(0.5493)
    """
    if not (temperature > 0 and temperature != float("inf")):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if not 0 <= weight <= 1:
        raise ValueError(f"weight, the teacher's share of the loss, must be in [0, 1], got {weight}")
    if labels is None and weight < 1:
        raise ValueError(f"weight={weight} leaves {1 - weight:g} to the labels: pass labels, or weight=1")
    teacher_logits = _teacher_logits(teacher, inputs)
    if teacher_logits.shape != student_logits.shape:
        raise ValueError(
            f"teacher and student must give logits of one shape, "
            f"got {tuple(teacher_logits.shape)} and {tuple(student_logits.shape)}"
        )
    student = _at_least_float32(student_logits)
    counted = None
    if labels is not None:
        ignore_index = getattr(label_loss, "ignore_index", IGNORE_INDEX)
        check_targets(student, labels, ignore_index=ignore_index)
        counted = None if labels.is_floating_point() else as_targets(labels) != ignore_index
    divergence = _divergence(_at_least_float32(teacher_logits) / temperature, student / temperature, counted)
    soft = divergence * temperature**2  # the factor undoes what the temperature takes from the gradient
    if labels is None or weight == 1:
        return soft * weight
    return soft * weight + label_loss(student, as_targets(labels)) * (1 - weight)


def as_targets(labels: Tensor) -> Tensor:
    """Class labels of any integer type in the one that torch's losses take; probabilities as they are."""
    return labels if labels.is_floating_point() else labels.long()


def _divergence(teacher: Tensor, student: Tensor, counted: Tensor | None) -> Tensor:
    """KL(softmax(teacher) || softmax(student)) over dimension 1, a mean over all else that is counted."""
    terms = F.kl_div(F.log_softmax(student, 1), F.log_softmax(teacher, 1), reduction="none", log_target=True)
    each = terms.sum(1)
    return each.mean() if counted is None else each.masked_fill(~counted, 0).sum() / counted.sum()


def _teacher_logits(teacher: nn.Module | Tensor, inputs: Any) -> Tensor:
    if isinstance(teacher, Tensor):
        if inputs is not None:
            raise ValueError("inputs are for a teacher that is a module: leave them out with its logits")
        return teacher.detach()
    check_model(teacher)
    if inputs is None:
        raise ValueError("a teacher that is a module needs inputs=, what the student was called with")
    with _evaluating(teacher), torch.no_grad():
        logits = call(teacher, inputs)
    if not isinstance(logits, Tensor):
        raise ValueError(f"the teacher returned a {type(logits).__name__}: pass its logits as teacher=")
    return logits


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """All of `model` in eval mode; afterwards each of its modules in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _as_uniform(smoothing: float, form: str, classes: int) -> float:
    """The strength at which PyTorch's `label_smoothing` gives this form."""
    if form == "uniform":
        return smoothing
    uniform = smoothing * classes / (classes - 1)
    if uniform > 1:
        raise ValueError(
            f"smoothing={smoothing} with form='wrong' makes the right class the least likely of {classes}: "
            f"choose at most {(classes - 1) / classes:g}"
        )
    return uniform


def _checked_smoothing(smoothing: float) -> float:
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing must be in [0, 1), got {smoothing}")
    return float(smoothing)


def _checked_form(form: str) -> str:
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r} of label smoothing: choose one of {', '.join(FORMS)}")
    return form


def check_targets(
    logits: Tensor, targets: Tensor, *, ignore_index: int = IGNORE_INDEX, wait: bool = False
) -> None:
    """Raise a ValueError unless `targets` are class labels or probabilities that fit `logits`.

    Labels on an accelerator are checked for their range only with `wait`, as this waits for the device.
    """
    if logits.ndim < 2:
        raise ValueError(f"logits must be (N, C, ...), got {tuple(logits.shape)}")
    if targets.is_floating_point():
        if targets.shape != logits.shape:
            raise ValueError(
                f"labels that are probabilities must have the logits' shape {tuple(logits.shape)}, "
                f"got {tuple(targets.shape)}; class labels must be integers"
            )
        return
    expected = logits.shape[:1] + logits.shape[2:]
    if targets.shape != expected:
        raise ValueError(
            f"logits {tuple(logits.shape)} need class labels {tuple(expected)}, got {tuple(targets.shape)}"
        )
    _check_labels(targets, logits.shape[1], ignore_index, wait=wait)


def _check_labels(
    labels: Tensor, classes: int, ignore_index: int | None = None, *, wait: bool = False
) -> None:
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"class labels must be integers, got {labels.dtype}")
    # In a narrow type the number of classes, or what is ignored, would be another number
    labels = as_targets(labels)
    if torch.compiler.is_compiling() or not (wait or labels.device.type == "cpu"):
        return
    wrong = (labels < 0) | (labels >= classes)
    if ignore_index is not None:
        wrong &= labels != ignore_index
    if wrong.any():
        first = int(labels[wrong][0])
        raise ValueError(f"label {first} is out of range: {classes} classes have labels 0 to {classes - 1}")


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
