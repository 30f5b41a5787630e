"""Operations of every kind on a path, in networks whose paths are known: exact, or opened and named, or refused."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import sparsetweaks as st
from sparsetweaks.analysis.collapse import layer_collapse


class Network(nn.Module):
    """Two linear layers of 2 units and a head of one, with a function between the layers."""

    def __init__(self, function):
        super().__init__()
        self.first, self.second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.head, self.function = nn.Linear(2, 1, bias=False), function

    def forward(self, x):
        return self.head(self.second(self.function(self.first(x))))


FIRST_UNIT_DEAD = {"first.weight": torch.tensor([[False, False], [True, True]])}


def paths(function, masks=FIRST_UNIT_DEAD):
    """How many weights of each layer are on a path, and what was opened."""
    found = layer_collapse(st.apply_masks(Network(function), masks), torch.zeros(1, 2))
    return [layer.on_path for layer in found.layers], found.opened


EXACT = [2, 2, 2]
"""Of the second layer the weights that look at the first unit are on no path."""
AT_MOST = [2, 4, 2]
"""If every unit may reach every other."""


class Twice(torch.autograd.Function):
    """With a backward that must not be asked for a second derivative, and negative values."""

    @staticmethod
    def forward(context, x):
        return -2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context, gradient):
        return -2 * gradient


class Nothing(torch.autograd.Function):
    """A step with a backward of zeros."""

    @staticmethod
    def forward(context, x):
        return torch.zeros_like(x)

    @staticmethod
    def backward(context, gradient):
        return torch.zeros_like(gradient)


class Affine(torch.autograd.Function):
    """A linear layer of one's own: the weight enters the function itself."""

    @staticmethod
    def forward(context, x, weight):
        return x @ weight.t()

    @staticmethod
    def backward(context, gradient):
        return torch.zeros(1, 2), torch.zeros(2, 2)


KNOWN = {
    "einsum": lambda x: torch.einsum("ni,ij->nj", x, torch.eye(2)),
    "einsum with a negative constant": lambda x: torch.einsum("ni,ij->nj", x, -torch.eye(2)),
    "constant product": lambda x: x @ -torch.eye(2),
    "gather": lambda x: x.gather(1, torch.tensor([[0, 1]])),
    "index": lambda x: x[:, [0, 1]],
    "rounded": torch.round,
    "sign": torch.sign,
    "overloads": lambda x: torch.ops.aten.relu.default(torch.ops.aten.tanh(x)),
    "cosine": torch.cos,
    "sine in place": lambda x: x.sin_(),
    "power": lambda x: x**2 + 2**x - x.pow(3),
    "data": lambda x: x.data,
    "each row": lambda x: torch.stack(list(x)),
    "stacked by hand": lambda x: torch.stack([row * 1 for row in x]),
    "complex and back": lambda x: torch.view_as_real(torch.view_as_complex(x.view(1, 1, 2))).view(1, 2),
    "written to": lambda x: (lambda y: (y.copy_(x), y.add_(x), y)[2])(torch.zeros(1, 2)),
    "written in part": lambda x: (
        lambda y: (y.__setitem__((0, 0), x[0, 0]), y.__setitem__((0, 1), x[0, 1]), y)[2]
    )(torch.zeros(1, 2)),
    "cast": lambda x: x.float(),
    "sizes": lambda x: x.view(x.size()).reshape(torch.Size([x.shape.numel()])).view_as(x),
    "gated unit": lambda x: F.glu(torch.cat([x, x], 1)),
    "interpolated": lambda x: F.interpolate(x[None, :, :, None], (2, 1), mode="nearest")[0, :, :, 0].view(
        1, 2
    ),
}


@pytest.mark.parametrize("case", KNOWN)
def test_what_is_known_is_exact_and_not_named(case):
    assert paths(KNOWN[case]) == (EXACT, ())


OPENED = {
    "fft": (lambda x: torch.fft.irfft(torch.fft.rfft(x), n=2), ("fft_rfft", "fft_irfft")),
    "real part": (lambda x: torch.fft.fft(x).real, ("fft_fft",)),
    "absolute values": (lambda x: torch.fft.fft(x).abs(), ("fft_fft", "abs")),
    "sorted": (lambda x: x.sort().values, ("sort",)),
    "the best": (lambda x: x.topk(1).values.expand(1, 2), ("topk",)),
    "spread": (lambda x: x / x.std(-1, keepdim=True), ("std",)),
    "product of all": (lambda x: x + x.prod(-1, keepdim=True), ("prod",)),
    "cumulative product in place": (lambda x: x.cumprod_(-1), ("cumprod_",)),
    "function of one's own": (Twice.apply, ("Twice",)),
    "function without a gradient": (Nothing.apply, ("Nothing",)),
    "functions in a row": (lambda x: Twice.apply(Nothing.apply(x)), ("Nothing", "Twice")),
    "function that is multiplied": (lambda x: Nothing.apply(x) * x + x, ("Nothing",)),
    "function used twice": (lambda x: (lambda y: y * y)(Nothing.apply(x)), ("Nothing",)),
}


@pytest.mark.parametrize("case", OPENED)
def test_what_is_not_known_is_named_and_hides_no_path(case):
    function, names = OPENED[case]
    found, opened = paths(function)
    assert opened == names
    assert all(exact <= here <= most for exact, here, most in zip(EXACT, found, AT_MOST, strict=True))


NUMBER_BY_NUMBER = {
    "either": (lambda x: torch.where(x < 0, x, 0 * x), ("where",)),
    "between": (lambda x: torch.lerp(x, x, torch.ones(1)), ("lerp",)),
    "power of itself": (lambda x: x**x, ("pow",)),
    "within itself": (lambda x: x.clamp(max=x), ("clamp",)),
}


@pytest.mark.parametrize("case", NUMBER_BY_NUMBER)
def test_what_works_number_by_number_mixes_no_units(case):
    function, names = NUMBER_BY_NUMBER[case]
    assert paths(function) == (EXACT, names)


def test_what_collapsed_is_collapsed_behind_what_is_not_known():
    everything = {"first.weight": torch.zeros(2, 2, dtype=torch.bool)}
    for case, (function, _) in OPENED.items():
        assert paths(function, everything)[0] == [0, 0, 0], case


def test_weights_inside_what_is_not_known_are_on_paths():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2, bias=False)
            self.head = nn.Linear(2, 1)

        def forward(self, x):
            return self.head(Affine.apply(x, self.layer.weight))

    found = layer_collapse(st.apply_masks(Own(), {"layer.weight": torch.eye(2).bool()}), torch.zeros(1, 2))
    assert [layer.on_path for layer in found.layers] == [2, 2] and found.opened == ("Affine",)

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.core, self.head = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 1)

        def forward(self, x):
            return self.head(self.core(x)[0])

    weights = st.apply_masks(Recurrent(), {"core.weight_ih_l0": torch.arange(24).view(12, 2) % 2 == 0})
    found = layer_collapse(weights, torch.zeros(1, 4, 2))
    assert found.opened == ("lstm",) and found.layers[0].on_path == 12


@pytest.mark.parametrize("without", [torch.no_grad, torch.enable_grad])
def test_functions_of_ones_own_are_opened_without_gradients_too(without):
    def function(x):
        with without():
            return Twice.apply(x)

    assert paths(function) == paths(Twice.apply)


def test_a_learned_mask_of_attention_is_a_source():
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.bias = nn.Linear(2, 2), nn.Parameter(torch.zeros(3, 3))

        def forward(self, x):
            y = self.layer(x)
            return F.scaled_dot_product_attention(y, y, y, attn_mask=self.bias)

    found = layer_collapse(st.apply_masks(Attending(), {"bias": torch.eye(3).bool()}), torch.zeros(1, 3, 2))
    assert {layer.name: layer.on_path for layer in found.layers} == {"layer.weight": 4, "bias": 3}


def test_depth_hides_no_path_beside_biases():
    layers = [each for _ in range(1500) for each in (nn.Linear(2, 2), nn.LayerNorm(2))]
    masks = {"0.bias": torch.tensor([True, False])}
    found = layer_collapse(st.apply_masks(nn.Sequential(*layers), masks), torch.zeros(1, 2))
    assert [layer.on_path for layer in found.layers] == [4, 1] + [4] * 1499


def test_the_report_says_what_was_opened_and_to_which_side_it_errs():
    found = layer_collapse(Network(lambda x: torch.fft.fft(x).real), torch.zeros(1, 2))
    assert found.opened == ("fft_fft",)
    assert (
        "not known, and taken to let everything through: fft_fft; the effective sparsity is at least this"
        in str(found)
    )
    assert "not known" not in str(layer_collapse(Network(torch.relu), torch.zeros(1, 2)))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
def test_what_is_not_seen_is_refused():
    @torch.jit.script
    def scripted(x):
        return x * torch.sigmoid(x)

    with pytest.raises(
        ValueError, match=r"MulBackward0, which was not seen being called.*before torch.jit.script"
    ):
        paths(lambda x: scripted(x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_are_refused(reentrant):
    with pytest.raises(ValueError, match="if the model checkpoints activations, switch that off"):
        paths(lambda x: checkpoint(torch.relu, x, use_reentrant=reentrant))


@pytest.mark.parametrize("error", [AssertionError, KeyError, AttributeError, ZeroDivisionError])
def test_whatever_a_model_raises_is_told_as_its_failing(error):
    def function(x):
        raise error("of its own")

    with pytest.raises(
        ValueError, match=rf"the model fails on inputs of shape \(1, 2\): {error.__name__}: .*of its own"
    ):
        paths(function)


def test_an_output_that_was_read_out_as_numbers_is_refused():
    class Read(nn.Linear):
        def forward(self, x):
            return torch.tensor(super().forward(x).tolist())

    with pytest.raises(ValueError, match="depends on nothing by any function of torch"):
        layer_collapse(Read(2, 2), torch.zeros(1, 2))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_without_weights_is_passed_over():
    found = layer_collapse(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 0)), torch.zeros(1, 2))
    assert [layer.name for layer in found.layers] == ["0.weight"] and str(found)


def test_the_graph_is_let_go():
    model = Network(Twice.apply)
    alive = []
    model.first.register_forward_hook(lambda *given: alive.append(weakref.ref(given[2])))
    layer_collapse(model, torch.zeros(1, 2))
    gc.collect()
    assert alive and alive[0]() is None
