"""Every analysis with input that cannot be right: a clear error; or, where the input is only unusual, a right answer."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparsetweaks as st
from sparsetweaks import analysis

DRAW = torch.Generator().manual_seed(0)
INPUTS, TARGETS = torch.randn(6, 2, 5, 5, generator=DRAW), torch.randint(3, (6,), generator=DRAW)
DATA = INPUTS, TARGETS
ALONG = {"0.weight": torch.ones(4, 2, 3, 3)}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    convolutions = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)
    return nn.Sequential(*convolutions, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


BY_LOSS = {
    "hessian_top_eigenvalues": analysis.hessian_top_eigenvalues,
    "hessian_trace": lambda *given: analysis.hessian_trace(*given, probes=2),
    "hessian_density": lambda *given: analysis.hessian_density(*given, probes=1, steps=3),
    "flatness": lambda *given: analysis.flatness(*given, probes=2, points=3),
    "loss_line": lambda *given: analysis.loss_line(*given, direction=ALONG, points=3),
    "loss_line between": lambda *given: analysis.loss_line(*given, to=network(), points=3),
    "loss_plane": lambda *given: analysis.loss_plane(*given, points=3),
    "input_loss_plane": lambda *given: analysis.input_loss_plane(*given, points=3),
    "gradient_flow": analysis.gradient_flow,
    "compare": lambda model, *given: analysis.compare({"it": model}, *given),
}
BY_DATA = {
    **BY_LOSS,
    "activation_sparsity": lambda model, data, loss: analysis.activation_sparsity(model, data),
    "calibration": lambda model, data, loss: analysis.calibration(model, data),
}
ALL = {
    **BY_DATA,
    "layer_collapse": lambda model, data, loss: analysis.layer_collapse(model, data[0]),
    "effective_sparsity": lambda model, data, loss: analysis.effective_sparsity(model, data[0]),
}


def test_every_analysis_is_here():
    functions = {
        name for name in analysis.__all__ if not isinstance(getattr(analysis, name), type)
    }  # the others are results and a warning
    assert functions == {name.removesuffix(" between") for name in ALL}


def refused(analyse, message, *, model=None, data=DATA, loss=F.cross_entropy, error=ValueError):
    with pytest.raises(error, match=message):
        analyse(network() if model is None else model, data, loss)


@pytest.fixture(params=ALL.values(), ids=ALL.keys())
def each(request):
    return request.param


@pytest.fixture(params=BY_DATA.values(), ids=BY_DATA.keys())
def each_by_data(request):
    return request.param


@pytest.fixture(params=BY_LOSS.values(), ids=BY_LOSS.keys())
def each_by_loss(request):
    return request.param


# ------------------------------------------------------------------------------------------------------------
# Models


def test_what_is_no_model(each):
    refused(
        each, "expected a torch.nn.Module, got OrderedDict", model=network().state_dict(), error=TypeError
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_named(each, value):
    model = network()
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] = value
    refused(each, r"the parameter '3\.weight' holds values that are not finite", model=model)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_model_without_values(each):
    lazy = nn.Sequential(nn.Flatten(), nn.LazyLinear(3), nn.ReLU())
    refused(each, r"'1\.weight' is not initialised yet: run one batch", model=lazy)
    refused(each, r"'0\.weight' is on the meta device and has no values: load", model=network().to("meta"))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_a_weight_that_is_only_stored_is_named(each):
    model = network()
    model[7].weight = nn.Parameter(model[7].weight.detach().to_sparse_csr())
    refused(each, r"'7\.weight' is stored as torch\.sparse_csr.*to_dense", model=model)
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        message = rf"'7\.weight' is {dtype}, which torch stores but does not compute in: .*model\.float\(\)"
        model[7].weight = nn.Parameter(network()[7].weight.detach().to(dtype))
        refused(each, message, model=model)


# ------------------------------------------------------------------------------------------------------------
# Data


def test_inputs_that_do_not_fit_the_model(each):
    refused(each, r"the model fails on .*inputs.*shape \(\d, 1, 5, 5\)", data=(INPUTS[:, :1], TARGETS))


def test_a_batch_of_no_example(each):
    refused(each, "no example", data=(INPUTS[:0], TARGETS[:0]))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "no batch"),
        (INPUTS, "got a Tensor"),
        (None, "got a NoneType"),
        ([INPUTS], "must be a pair.*got a Tensor"),
        ([(INPUTS, TARGETS, TARGETS)], "must be a pair.*got a tuple"),
        ((INPUTS, TARGETS[:3]), "6 inputs but 3 targets"),
    ],
    ids=["zero batches", "inputs alone", "none", "no pair", "three", "fewer targets"],
)
def test_wrong_data(each_by_data, data, message):
    if each_by_data is BY_DATA["input_loss_plane"] and "targets" not in message:
        message = r"must be one pair \(inputs, targets\)"  # it takes no other
    refused(each_by_data, message, data=data)


def test_data_that_are_gone_after_one_pass(each_by_data):
    message = "only once|must be one pair"
    refused(each_by_data, message, data=iter([DATA]))


@pytest.mark.parametrize("inputs", [[], None, "text"], ids=repr)
def test_inputs_without_a_tensor(inputs):
    for analyse in (analysis.layer_collapse, analysis.effective_sparsity):
        with pytest.raises(ValueError, match=f"got a {type(inputs).__name__} without any tensor"):
            analyse(network(), inputs)


def test_inputs_that_are_not_finite(each_by_data):
    refused(each_by_data, "is nan|not finite|not numbers", data=(INPUTS * math.nan, TARGETS))


def test_data_without_values(each_by_data):
    refused(each_by_data, "on the meta device and has no values", data=(INPUTS.to("meta"), TARGETS))


# ------------------------------------------------------------------------------------------------------------
# Options

COUNTS = (0, -1, 2.5, 3.0, math.nan, math.inf, True, "3", None, [3], torch.tensor(3.0))
SIZES = (0, -1.0, math.nan, math.inf, True, "1", None, [1.0])
NAMES = ("mean", "", None, 1, True, ["kept"], {})
FUNCTIONS = ("tqdm", 1, [print])
DTYPES = (torch.long, torch.cfloat, torch.float8_e4m3fn, torch.float8_e5m2, "float64", float, 64)
OPTIONS = [
    ("hessian_top_eigenvalues", "k", COUNTS, "k must be a whole number, at least 1"),
    ("hessian_top_eigenvalues", "iterations", COUNTS, "iterations must be a whole number, at least 1"),
    ("hessian_top_eigenvalues", "tolerance", SIZES, "tolerance must be positive"),
    ("hessian_top_eigenvalues", "which", NAMES, "which must be 'largest', 'smallest' or 'magnitude'"),
    ("hessian_top_eigenvalues", "over", NAMES, "over must be 'kept', 'all' or 'both'"),
    ("hessian_top_eigenvalues", "where", (1, [1], [], b"0", 2.5), "where must be a glob pattern on names"),
    ("hessian_top_eigenvalues", "batch_norm", NAMES, "batch_norm must be 'eval' or 'train'"),
    ("hessian_top_eigenvalues", "dtype", DTYPES, "dtype must be a floating-point one"),
    ("hessian_top_eigenvalues", "chunk_size", COUNTS, "chunk_size must be a whole number, at least 1"),
    ("hessian_top_eigenvalues", "keep_graph", (1, "no", [True]), "keep_graph must be True or False"),
    ("hessian_top_eigenvalues", "generator", (0, 7, "seed", {}), r"generator must be a torch\.Generator"),
    ("hessian_top_eigenvalues", "progress", FUNCTIONS, "progress must be a function"),
    ("hessian_trace", "probes", (1, *COUNTS), "probes must be a whole number, at least 2"),
    ("hessian_trace", "progress", FUNCTIONS, "progress must be a function"),
    ("hessian_density", "probes", COUNTS, "probes must be a whole number, at least 1"),
    ("hessian_density", "steps", COUNTS, "steps must be a whole number, at least 1"),
    ("hessian_density", "grid", (1, *COUNTS), "grid must be a whole number, at least 2"),
    ("hessian_density", "width", SIZES, "width must be positive"),
    ("flatness", "points", (4, *COUNTS), "points must be"),
    ("flatness", "radius", SIZES, "radius must be positive"),
    ("flatness", "generator", (0, "seed"), r"generator must be a torch\.Generator"),
    ("loss_line", "direction", ({}, [1], {"0.bias": [1.0]}, {0: INPUTS}), "direction"),
    ("loss_line", "points", (4, *COUNTS), "points must be"),
    ("loss_line", "radius", SIZES, "radius must be positive"),
    ("loss_line", "scale", NAMES, "scale must be 'plain' or 'filter'"),
    ("loss_line", "progress", FUNCTIONS, "progress must be a function"),
    ("loss_plane", "directions", (1, "random", ALONG, (ALONG,), [1, 2]), "direction"),
    ("loss_plane", "one_dimensional", (1, None, "yes"), "one_dimensional must be True or False"),
    ("loss_plane", "over", NAMES, "over must be 'kept', 'all' or 'both'"),
    ("input_loss_plane", "directions", NAMES, "directions must be 'random' or 'gradient'"),
    ("input_loss_plane", "points", (4, *COUNTS), "points must be"),
    ("compare", "analyses", (None, 1, ("hessian",), [1]), "unknown analyses"),
    ("compare", "progress", FUNCTIONS, "progress must be a function"),
]


@pytest.mark.parametrize(
    ("name", "option", "values", "message"), OPTIONS, ids=[f"{each[0]}-{each[1]}" for each in OPTIONS]
)
def test_wrong_options(name, option, values, message):
    given = {"direction": ALONG} if name == "loss_line" else {}
    model = {"it": network()} if name == "compare" else network()
    analyse = getattr(analysis, name)
    default = inspect.signature(analyse).parameters[option].default
    for value in values:
        if value is None and default is None:
            continue
        with pytest.raises(ValueError, match=message):
            analyse(model, DATA, F.cross_entropy, **{**given, option: value})


# ------------------------------------------------------------------------------------------------------------
# Code that is given
# ------------------------------------------------------------------------------------------------------------


class Failing(nn.Module):
    def __init__(self, error: type[Exception]) -> None:
        super().__init__()
        self.layer, self.error = nn.Linear(50, 3), error

    def forward(self, inputs):
        raise self.error("its own words")


ERRORS = [KeyError, AttributeError, AssertionError, NotImplementedError, ValueError, IndexError]


@pytest.mark.parametrize("error", ERRORS)
def test_what_a_network_or_a_loss_raises_is_told_as_theirs(error):
    def failing(outputs, targets):
        raise error("its own words")

    for name in ("hessian_top_eigenvalues", "hessian_trace", "loss_line between", "loss_plane"):
        refused(BY_LOSS[name], "the loss fails on .*its own words", loss=failing)
        if "between" not in name:
            refused(BY_LOSS[name], "the model fails on .*its own words", model=Failing(error))


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs):
        return inputs.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient.clone()


def test_a_function_without_a_second_derivative_is_no_function_without_curvature():
    once = lambda outputs, targets: F.cross_entropy(Once.apply(outputs), targets)
    for name in ("hessian_top_eigenvalues", "hessian_trace", "hessian_density", "flatness"):
        refused(BY_LOSS[name], "can be differentiated only once", loss=once)
    analysis.gradient_flow(network(), DATA, once)  # which is once


# ------------------------------------------------------------------------------------------------------------
# Losses


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            lambda outputs, targets: F.cross_entropy(outputs, targets, reduction="none"),
            r"must be a scalar.*got a torch\.float32 tensor of shape \(6,\)",
        ),
        (lambda outputs, targets: (outputs.argmax(1) == targets).sum(), r"got a torch\.int64 tensor"),
        (lambda outputs, targets: None, "got NoneType"),
        (lambda outputs, targets: 0.5, "got float"),
        (lambda outputs, targets: outputs @ targets, "the loss fails on these outputs and targets"),
        (lambda outputs, targets: F.cross_entropy(outputs, targets) * math.nan, "loss .* is nan"),
        ("cross_entropy", r"must be a function of \(outputs, targets\), got 'cross_entropy'"),
    ],
    ids=["a vector", "a count", "nothing", "a number", "one that fails", "nan", "a name"],
)
def test_wrong_losses(each_by_loss, loss, message):
    refused(each_by_loss, message, loss=loss)


CUT = {
    "hessian_top_eigenvalues": analysis.hessian_top_eigenvalues,
    "hessian_trace": lambda *given, **by: analysis.hessian_trace(*given, probes=2, **by),
    "hessian_density": lambda *given, **by: analysis.hessian_density(*given, probes=1, steps=3, **by),
    "flatness": lambda *given, **by: analysis.flatness(*given, probes=2, points=3, **by),
    "loss_line": lambda *given, **by: analysis.loss_line(*given, direction=ALONG, points=3, **by),
    "loss_plane": lambda *given, **by: analysis.loss_plane(*given, points=3, **by),
    "input_loss_plane": lambda *given, **by: analysis.input_loss_plane(*given, points=3, **by),
    "gradient_flow": analysis.gradient_flow,
}


@pytest.mark.parametrize("analyse", CUT.values(), ids=CUT)
def test_a_result_does_not_depend_on_the_chunk_size(analyse):
    numbers = lambda found: [v for row in found.table() for v in row.values() if isinstance(v, float)]
    weight = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    mean = lambda outputs, targets: F.cross_entropy(outputs, targets, weight, reduction="sum") / len(targets)
    whole = numbers(analyse(network(), DATA, mean, dtype=torch.float64))
    for chunk_size in (1, 4, 6):
        cut = analyse(network(), DATA, mean, dtype=torch.float64, chunk_size=chunk_size)
        assert numbers(cut) == pytest.approx(whole, rel=1e-6, abs=1e-12)
    with pytest.raises(ValueError, match="no mean over examples"):
        by_batch = nn.CrossEntropyLoss(weight)
        analyse(network(), DATA, by_batch, dtype=torch.float64, chunk_size=4)


def test_targets_out_of_range(each_by_loss):
    refused(each_by_loss, "the loss fails on these outputs and targets", data=(INPUTS, TARGETS + 5))
    with pytest.raises(ValueError, match="class numbers from 0 to 2"):
        analysis.calibration(network(), (INPUTS, TARGETS + 5))


# ------------------------------------------------------------------------------------------------------------
# Masks: unusual, and no mistake


def finite(result) -> bool:
    rows = [row for row in result.table() if row.get("examples") != 0]  # a bin that holds nothing has no mean
    return all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))


def test_a_model_without_a_mask_has_all_its_weights_kept(each):
    result = each(network(), DATA, F.cross_entropy)
    assert finite(result) and str(result)
    for found in (result, getattr(result, "top", None)):
        work = getattr(found, "work", None)
        if work is not None:
            assert work.dimension == work.weights and "the model has no masks" in str(work)


def test_plain_zeros_are_no_mask_and_every_analysis_in_its_space_says_so():
    model = network()
    with torch.no_grad():
        model[3].weight[:2] = 0
    names = ("hessian_top_eigenvalues", "hessian_trace", "hessian_density", "flatness", "loss_plane")
    for name in (*names, "loss_line between"):
        with pytest.warns(st.UnmaskedZerosWarning, match="72 of the 216 prunable weights") as caught:
            BY_LOSS[name](model, DATA, F.cross_entropy)
        assert {each.filename for each in caught} == {__file__}


@pytest.mark.parametrize("layer", ["0", "3", "7"])
def test_a_layer_that_is_pruned_completely(each, layer):
    weight = f"{layer}.weight"
    model = st.apply_masks(network(), {weight: torch.zeros_like(network().get_parameter(weight)).bool()})
    result = each(model, DATA, F.cross_entropy)
    assert finite(result) and str(result)
    vectors = getattr(result, "vectors", ())
    assert all(vector[weight].count_nonzero() == 0 for vector in vectors)
    if isinstance(result, analysis.LayerPathsReport):
        assert [found.name for found in result.layers if found.kept == 0] == [weight]
        assert len(result.collapsed) == 3 and not result.connected  # nothing passes the others either
    if isinstance(result, analysis.GradientFlow):
        assert [found.norm for found in result.layers if found.name == weight] == [0.0]


def test_everything_pruned_leaves_nothing_to_move():
    names = dict(network().named_parameters())
    model = st.apply_masks(network(), {name: torch.zeros_like(p).bool() for name, p in names.items()})
    for name in ("hessian_top_eigenvalues", "hessian_trace", "hessian_density", "flatness", "loss_plane"):
        refused(ALL[name], "every weight that was chosen is pruned", model=model)
    assert analysis.gradient_flow(model, DATA, F.cross_entropy).effective == 0
    assert analysis.layer_collapse(model, INPUTS).effective_sparsity == 1
