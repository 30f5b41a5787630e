"""Soft labels: both forms against their formulas, the losses against PyTorch's and Hinton's, bad input."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from sparsetweaks.recipe.labels import SoftLabelLoss, distillation_loss, smooth_labels


def logits_and_labels(seed: int, size: int, classes: int, dense: tuple[int, ...] = (), dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(size, classes, *dense, generator=generator)
    return logits.to(dtype), torch.randint(classes, (size, *dense), generator=generator)


shapes = {
    "seed": st.integers(0, 2**16),
    "size": st.integers(1, 6),
    "classes": st.integers(2, 12),
    "dense": st.sampled_from([(), (5,), (3, 4)]),
}
form = st.sampled_from(["uniform", "wrong"])


# ----------------------------------------------------------------------------------------------------
# smooth_labels


def by_formula(label: int, classes: int, e: float, form: str) -> list[float]:
    if form == "uniform":
        return [(1 - e) * (c == label) + e / classes for c in range(classes)]
    return [1 - e if c == label else e / (classes - 1) for c in range(classes)]


@settings(max_examples=60, deadline=None)
@given(smoothing=st.floats(0, 0.5), form=form, **shapes)
def test_probabilities_follow_the_formula(smoothing, form, seed, size, classes, dense):
    _, labels = logits_and_labels(seed, size, classes, dense)
    soft = smooth_labels(labels, classes, smoothing=smoothing, form=form, dtype=torch.float64)
    assert soft.shape == (size, classes, *dense)
    rows = soft.movedim(1, -1).reshape(-1, classes)
    for row, label in zip(rows, labels.flatten().tolist(), strict=True):
        assert row.tolist() == pytest.approx(by_formula(label, classes, smoothing, form), abs=1e-12)


def test_no_smoothing_is_one_hot():
    labels = torch.tensor([[0, 2], [1, 1]])
    for form in ("uniform", "wrong"):
        soft = smooth_labels(labels, 3, smoothing=0, form=form)
        assert torch.equal(soft, F.one_hot(labels, 3).movedim(-1, 1).float())


def test_the_dtype_can_be_chosen():
    assert smooth_labels(torch.tensor([0], dtype=torch.uint8), 3).dtype == torch.get_default_dtype()
    assert smooth_labels(torch.tensor([0]), 3, dtype=torch.bfloat16).dtype == torch.bfloat16


# ----------------------------------------------------------------------------------------------------
# SoftLabelLoss


@settings(max_examples=60, deadline=None)
@given(
    smoothing=st.floats(0, 1, exclude_max=True),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    weighted=st.booleans(),
    ignore=st.booleans(),
    **shapes,
)
def test_uniform_is_pytorchs_cross_entropy_bit_for_bit(
    smoothing, reduction, weighted, ignore, seed, size, classes, dense
):
    logits, labels = logits_and_labels(seed, size, classes, dense)
    options = {
        "weight": torch.linspace(0.1, 2, classes) if weighted else None,
        "ignore_index": int(labels.flatten()[0]) if ignore else -100,
        "reduction": reduction,
    }
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = SoftLabelLoss(smoothing, **options)(ours, labels)
    expected = F.cross_entropy(theirs, labels, label_smoothing=smoothing, **options)
    torch.testing.assert_close(loss, expected, rtol=0, atol=0, equal_nan=True)  # nan: every label ignored
    loss.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=0, equal_nan=True)


@settings(max_examples=60, deadline=None)
@given(smoothing=st.floats(0, 0.5), form=form, **shapes)
def test_both_forms_are_cross_entropy_against_the_smoothed_labels(
    smoothing, form, seed, size, classes, dense
):
    logits, labels = logits_and_labels(seed, size, classes, dense, torch.float64)
    soft = smooth_labels(labels, classes, smoothing=smoothing, form=form, dtype=torch.float64)
    expected = -(soft * F.log_softmax(logits, 1)).sum(1).mean()
    torch.testing.assert_close(SoftLabelLoss(smoothing, form)(logits, labels), expected)


def test_the_forms_differ_by_k_over_k_minus_1():
    logits, labels = logits_and_labels(0, 8, 10)
    wrong = SoftLabelLoss(0.1, "wrong")(logits, labels)
    assert wrong == F.cross_entropy(logits, labels, label_smoothing=1 / 9)
    assert wrong != SoftLabelLoss(0.1)(logits, labels)


def test_ignored_labels_weigh_nothing_in_both_forms():
    logits, labels = logits_and_labels(0, 6, 5)
    some = labels.clone()
    some[[1, 4]] = 255
    kept = [0, 2, 3, 5]
    for form in ("uniform", "wrong"):
        loss = SoftLabelLoss(0.2, form, ignore_index=255)
        torch.testing.assert_close(loss(logits, some), loss(logits[kept], labels[kept]))


@pytest.mark.parametrize("form", ["uniform", "wrong"])
def test_mixup_targets_are_smoothed_as_the_mixture_of_their_labels(form):
    logits, first = logits_and_labels(0, 8, 5, dtype=torch.float64)
    second = first.flip(0)
    mixed = 0.3 * F.one_hot(first, 5).double() + 0.7 * F.one_hot(second, 5).double()
    loss = SoftLabelLoss(0.1, form)
    torch.testing.assert_close(loss(logits, mixed), 0.3 * loss(logits, first) + 0.7 * loss(logits, second))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_taken_in_float32(dtype):
    logits, labels = logits_and_labels(0, 8, 10, dtype=dtype)
    logits.requires_grad_()
    loss = SoftLabelLoss()(logits, labels)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, SoftLabelLoss()(logits.float(), labels))
    loss.backward()
    assert logits.grad.dtype == dtype


def test_it_works_under_autocast():
    model = nn.Linear(6, 4)
    inputs, labels = torch.randn(8, 6), torch.randint(4, (8,))
    soft = smooth_labels(labels, 4)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(inputs)
        assert logits.dtype == torch.bfloat16
        losses = [SoftLabelLoss()(logits, labels), SoftLabelLoss(0)(logits, soft)]
        losses.append(distillation_loss(logits, labels, teacher=nn.Linear(6, 4), inputs=inputs))
    for loss in losses:
        assert loss.dtype == torch.float32
        assert loss.isfinite()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=0)


def test_it_moves_saves_and_compiles():
    logits, labels = logits_and_labels(0, 4, 3)
    loss = SoftLabelLoss(0.1, "wrong", weight=torch.tensor([1.0, 2.0, 3.0]))
    again = pickle.loads(pickle.dumps(loss))
    assert again(logits, labels) == loss(logits, labels)
    assert loss.double().weight.dtype == torch.float64
    assert "form='wrong'" in repr(loss)
    compiled = torch.compile(SoftLabelLoss(), backend="eager", fullgraph=True)
    assert compiled(logits, labels) == SoftLabelLoss()(logits, labels)


# ----------------------------------------------------------------------------------------------------
# distillation_loss


@settings(max_examples=60, deadline=None)
@given(temperature=st.floats(0.5, 20), weight=st.floats(0, 1), **shapes)
def test_distillation_is_hintons_formula(temperature, weight, seed, size, classes, dense):
    student, labels = logits_and_labels(seed, size, classes, dense, torch.float64)
    teacher, _ = logits_and_labels(seed + 1, size, classes, dense, torch.float64)
    p, q = (F.softmax(logits / temperature, 1) for logits in (teacher, student))
    soft = (p * (p.log() - q.log())).sum(1).mean()
    expected = weight * temperature**2 * soft + (1 - weight) * F.cross_entropy(student, labels)
    loss = distillation_loss(student, labels, teacher=teacher, temperature=temperature, weight=weight)
    torch.testing.assert_close(loss, expected)


def test_the_gradient_keeps_its_size_at_high_temperature():
    """Hinton et al. 2015: at high temperature it tends to the gradient of matching centred logits."""
    student, _ = logits_and_labels(0, 4, 5, dtype=torch.float64)
    teacher, _ = logits_and_labels(1, 4, 5, dtype=torch.float64)
    student.requires_grad_()
    loss = distillation_loss(student, teacher=teacher, temperature=1e4, weight=1)
    (grad,) = torch.autograd.grad(loss, student)
    centred = lambda x: x - x.mean(1, keepdim=True)
    torch.testing.assert_close(
        grad, (centred(student) - centred(teacher)).detach() / 5 / 4, rtol=1e-3, atol=1e-6
    )


class Teacher(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


@pytest.mark.parametrize("fails", [False, True])
def test_the_teacher_evaluates_and_is_left_as_it_was(fails):
    teacher, inputs, labels = Teacher().train(), torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    teacher[1].eval()
    modes, before = [m.training for m in teacher.modules()], copy.deepcopy(teacher.state_dict())
    student = torch.randn(4, 3, requires_grad=True)
    rng = torch.get_rng_state()
    if fails:
        with pytest.raises(ValueError, match="the model fails on inputs of shape"):
            distillation_loss(student, labels, teacher=teacher, inputs=inputs[:, :2])
    else:
        loss = distillation_loss(student, labels, teacher=teacher, inputs=inputs)
        expected = copy.deepcopy(teacher).eval()(inputs)
        assert torch.equal(loss, distillation_loss(student, labels, teacher=expected))
        loss.backward()
        assert student.grad is not None
        assert all(p.grad is None for p in teacher.parameters())
    assert [m.training for m in teacher.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_a_teacher_that_is_the_student_costs_only_the_labels():
    student, labels = logits_and_labels(0, 4, 5)
    loss = distillation_loss(student, labels, teacher=student.clone(), weight=0.75)
    torch.testing.assert_close(loss, 0.25 * F.cross_entropy(student, labels))


def test_the_true_labels_can_be_smoothed_too():
    student, labels = logits_and_labels(0, 4, 5)
    labels[0] = 255
    loss = distillation_loss(
        student, labels, teacher=student.clone(), weight=0.5, label_loss=SoftLabelLoss(0.2, ignore_index=255)
    )
    torch.testing.assert_close(loss, 0.5 * SoftLabelLoss(0.2, ignore_index=255)(student, labels))


# ----------------------------------------------------------------------------------------------------
# Bad input

LOGITS = torch.zeros(2, 3)
LABELS = torch.tensor([0, 2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SoftLabelLoss(1.0), r"smoothing must be in \[0, 1\), got 1.0"),
        (lambda: SoftLabelLoss(-0.1), "smoothing must be in"),
        (lambda: SoftLabelLoss(math.nan), "smoothing must be in"),
        (
            lambda: SoftLabelLoss(form="paper"),
            "unknown form 'paper' of label smoothing: choose one of uniform, wrong",
        ),
        (lambda: SoftLabelLoss(reduction="all"), "unknown reduction 'all'"),
        (lambda: SoftLabelLoss(0.7, "wrong")(LOGITS, LABELS), "choose at most 0.666667"),
        (
            lambda: SoftLabelLoss()(LOGITS, torch.tensor([0, 3])),
            "label 3 is out of range: 3 classes have labels 0 to 2",
        ),
        (lambda: SoftLabelLoss()(LOGITS, torch.tensor([-1, 1])), "label -1 is out of range"),
        (lambda: SoftLabelLoss()(LOGITS, torch.tensor([0.0, 1.0])), "class labels must be integers"),
        (lambda: SoftLabelLoss()(LOGITS, torch.tensor([True, False])), "class labels must be integers"),
        (lambda: SoftLabelLoss()(LOGITS, LABELS[:1]), r"need class labels \(2,\), got \(1,\)"),
        (lambda: SoftLabelLoss()(torch.zeros(3), LABELS), "at least 2 classes"),
        (lambda: SoftLabelLoss()(torch.zeros(2, 1), LABELS), "at least 2 classes"),
        (lambda: smooth_labels(LABELS, 1), "at least 2 classes"),
        (lambda: smooth_labels(LABELS, 2), "label 2 is out of range"),
        (lambda: smooth_labels(LABELS - 100, 2), "label -100 is out of range"),
        (lambda: smooth_labels(LABELS.float(), 3), "class labels must be integers"),
        (lambda: smooth_labels(LABELS, 3, smoothing=2), "smoothing must be in"),
        (lambda: smooth_labels(LABELS, 3, smoothing=0.7, form="wrong"), "choose at most"),
        (
            lambda: distillation_loss(LOGITS, LABELS, teacher=LOGITS, temperature=0),
            "temperature must be positive",
        ),
        (
            lambda: distillation_loss(LOGITS, LABELS, teacher=LOGITS, temperature=math.inf),
            "temperature must be",
        ),
        (lambda: distillation_loss(LOGITS, LABELS, teacher=LOGITS, weight=1.1), r"in \[0, 1\], got 1.1"),
        (lambda: distillation_loss(LOGITS, teacher=LOGITS), "pass labels, or weight=1"),
        (lambda: distillation_loss(LOGITS, LABELS, teacher=LOGITS[:1]), "logits of one shape"),
        (lambda: distillation_loss(LOGITS, LABELS, teacher=nn.Identity()), "needs inputs="),
        (lambda: distillation_loss(LOGITS, LABELS, teacher=LOGITS, inputs=LOGITS), "leave them out"),
        (lambda: distillation_loss(LOGITS, LABELS + 1, teacher=LOGITS), "label 3 is out of range"),
        (
            lambda: distillation_loss(LOGITS, teacher=nn.LSTM(3, 3), inputs=LOGITS, weight=1),
            "returned a tuple",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ----------------------------------------------------------------------------------------------------
# Distillation beside ignored labels, and its inputs


@pytest.mark.parametrize("loss", [F.cross_entropy, SoftLabelLoss(ignore_index=255)], ids=["-100", "255"])
@pytest.mark.parametrize("weight", [0.6, 1.0])
def test_the_teacher_does_not_count_where_a_label_is_ignored(loss, weight):
    """As if those positions were not there: the padding of a sentence teaches nothing."""
    student, labels = logits_and_labels(0, 4, 5, (6,))
    teacher, _ = logits_and_labels(1, 4, 5, (6,))
    ignored = torch.rand(4, 6, generator=torch.Generator().manual_seed(2)) < 0.4
    padded = labels.masked_fill(ignored, getattr(loss, "ignore_index", -100))
    student.requires_grad_(True)
    found = distillation_loss(student, padded, teacher=teacher, weight=weight, label_loss=loss)
    rows, others = (each.movedim(1, -1)[~ignored] for each in (student, teacher))
    wanted = distillation_loss(rows, labels[~ignored], teacher=others, weight=weight, label_loss=loss)
    torch.testing.assert_close(found, wanted)
    (gradient,) = torch.autograd.grad(found, student)
    assert not gradient.movedim(1, -1)[ignored].any() and gradient.any()


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,), lambda x: {"input": x}, lambda x: x.double()])
def test_a_teachers_inputs_are_what_one_call_takes(wrap):
    teacher, inputs = nn.Linear(3, 4), torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    student, labels = logits_and_labels(0, 2, 4)
    wanted = distillation_loss(student, labels, teacher=teacher(inputs))
    assert distillation_loss(student, labels, teacher=teacher, inputs=wrap(inputs)) == wanted
    with pytest.raises(ValueError, match="without labels"):
        distillation_loss(student, labels, teacher=teacher, inputs=(inputs, labels))


def test_distillation_compiles_whole():
    teacher, inputs = nn.Linear(3, 4), torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    student, labels = logits_and_labels(0, 2, 4)
    labels[0] = -100
    step = torch.compile(
        lambda s, y, x: distillation_loss(s, y, teacher=teacher(x).detach()), backend="eager", fullgraph=True
    )
    assert step(student, labels, inputs) == distillation_loss(student, labels, teacher=teacher(inputs))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_class_labels_may_be_of_any_integer_type(dtype: torch.dtype) -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([0, 2, 1, 2])
    assert torch.equal(SoftLabelLoss(0.1)(logits, labels.to(dtype)), SoftLabelLoss(0.1)(logits, labels))
    taught = dict(teacher=torch.randn(4, 3), weight=0.5)
    assert torch.equal(
        distillation_loss(logits, labels.to(dtype), **taught), distillation_loss(logits, labels, **taught)
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_labels_of_any_integer_type_are_the_numbers_they_are(dtype):
    labels = torch.tensor([3, 100, 100, 7])
    narrow = labels.to(dtype)
    logits, teacher = torch.randn(4, 300), torch.randn(4, 300)
    assert torch.equal(SoftLabelLoss()(logits, narrow), SoftLabelLoss()(logits, labels))
    assert torch.equal(smooth_labels(narrow, 300), smooth_labels(labels, 300))
    expected = distillation_loss(logits, labels, teacher=teacher)
    assert torch.equal(distillation_loss(logits, narrow, teacher=teacher), expected)
    with pytest.raises(ValueError, match="label 100 is out of range: 10 classes"):
        SoftLabelLoss()(torch.zeros(4, 10), narrow)


def test_a_byte_that_reads_as_the_ignored_index_is_a_label():
    logits, teacher, labels = (
        torch.randn(2, 200),
        torch.randn(2, 200),
        torch.tensor([156, 3]),
    )  # -100 modulo 256
    expected = distillation_loss(logits, labels, teacher=teacher)
    assert torch.equal(distillation_loss(logits, labels.byte(), teacher=teacher), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_class_weights_may_be_cast_with_the_model(dtype):
    logits, labels, weight = (
        torch.randn(4, 3, dtype=dtype),
        torch.tensor([0, 1, 2, 0]),
        torch.tensor([0.5, 1.0, 2.0]),
    )
    loss = SoftLabelLoss(weight=weight).to(dtype)(logits, labels)
    assert torch.equal(loss, SoftLabelLoss(weight=weight)(logits.float(), labels))


def test_logits_without_classes_are_refused():
    with pytest.raises(ValueError, match=r"logits must be \(N, C, \.\.\.\), got \(3,\)"):
        distillation_loss(torch.zeros(3), torch.tensor([1, 0, 1]), teacher=torch.zeros(3))
