"""Activation swaps: every form, in place or not, shared or not, and what it must not break."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_models import Call
from torch import nn

import sparsetweaks as st
from sparsetweaks.surgery.activations import Function, InPlace, copied
from sparsetweaks.surgery.kinds import KINDS

FORMS = {
    "F.relu": lambda x: F.relu(x),
    "F.relu inplace": lambda x: F.relu(x, inplace=True),
    "F.relu positional inplace": lambda x: F.relu(x, True),
    "F.relu_": lambda x: F.relu_(x),
    "torch.relu": lambda x: torch.relu(x),
    "torch.relu_": lambda x: torch.relu_(x),
    "x.relu": lambda x: x.relu(),
    "x.relu_": lambda x: x.relu_(),
    "F.relu6": lambda x: F.relu6(x),
    "F.leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "F.leaky_relu_": lambda x: F.leaky_relu_(x, 0.2),
    "nn.ReLU": nn.ReLU(),
    "nn.ReLU inplace": nn.ReLU(inplace=True),
    "nn.ReLU6 inplace": nn.ReLU6(inplace=True),
    "nn.LeakyReLU": nn.LeakyReLU(0.3),
}
TARGETS = {
    "silu": ("silu", F.silu),
    "gelu": ("gelu", F.gelu),
    "factory": (lambda: nn.Softplus(beta=2), lambda x: F.softplus(x, beta=2)),
    "function": (torch.sin, torch.sin),
    "module": (nn.Hardtanh(), F.hardtanh),
}


@pytest.mark.parametrize("seen", [False, True], ids=["alone", "seen"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_every_target(form, target, seen):
    """The oracle: apply the target function by hand, overwriting the input exactly where the original does."""
    model = Call(FORMS[form], seen).double()
    to, function = TARGETS[target]
    swapped = st.swap_activations(model, to)
    x = torch.randn(3, 4, dtype=torch.double)
    with torch.no_grad():
        inner = model.inner(x)
        value = function(inner)
        overwritten = "inplace" in form or form.endswith("_")
        expected = (value if overwritten else inner, value) if seen else value
    torch.testing.assert_close(swapped(x), expected, rtol=0, atol=0)
    sum(t.sum() for t in ([swapped(x)] if not seen else swapped(x))).backward()
    assert swapped.inner.weight.grad is not None


def test_in_place_is_dropped_only_where_nobody_looks():
    seen, alone = Call(nn.ReLU(inplace=True), True), Call(nn.ReLU(inplace=True), False)
    assert st.swap_activations(seen, "silu").call.inplace
    assert not st.swap_activations(alone, "silu").call.inplace
    assert isinstance(st.swap_activations(seen, "gelu").call, InPlace)
    assert isinstance(st.swap_activations(alone, "gelu").call, nn.GELU)


def test_shared_activation_is_one_site_and_stays_shared():
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(4, 4), relu, nn.Linear(4, 4), relu)
    assert len(st.find_activations(model)) == 1
    swapped = st.swap_activations(model, nn.PReLU)
    assert swapped[1] is swapped[3]
    assert list(dict(swapped.named_parameters())) == ["0.weight", "0.bias", "1.weight", "2.weight", "2.bias"]


def test_each_site_gets_parameters_of_its_own():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.ReLU())
    given = nn.PReLU()
    swapped = st.swap_activations(model, given)
    assert {id(swapped[1].weight), id(swapped[2].weight)} != {id(given.weight)}
    assert swapped[1].weight is not swapped[2].weight


def test_new_parameters_follow_dtype_and_function_sites_get_names():
    model = Call(FORMS["F.relu"], False).to(torch.bfloat16)
    swapped = st.swap_activations(model, nn.PReLU)
    assert swapped.relu.weight.dtype == torch.bfloat16
    assert list(dict(swapped.named_parameters())) == ["inner.weight", "inner.bias", "relu.weight"]


def test_references_outside_the_module_tree_follow():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()
            self.steps = [self.act]

        def forward(self, x):
            return self.steps[0](x)

    swapped = st.swap_activations(Listed(), "silu")
    x = torch.randn(3)
    torch.testing.assert_close(swapped(x), F.silu(x))


def test_hooks_and_modes_of_a_swapped_module_stay():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model[1].register_forward_hook(lambda module, inputs, output: output * 2)
    model[1].eval()
    swapped = st.swap_activations(model, "mish")
    x = torch.randn(2, 4)
    torch.testing.assert_close(swapped(x), F.mish(model[0](x)) * 2)
    assert not swapped[1].training
    assert swapped[0].training


def test_where_selects():
    model = nn.Sequential(nn.ReLU(), nn.Sequential(nn.ReLU(), nn.ReLU6()))
    types = lambda m: [type(x).__name__ for x in (m[0], *m[1])]
    assert types(st.swap_activations(model, "mish", where="1.*")) == ["ReLU", "Mish", "Mish"]
    assert types(st.swap_activations(model, "mish", where=["0", "1.0"])) == ["Mish", "Mish", "ReLU6"]
    assert types(st.swap_activations(model, "mish", where=lambda s: s.kind == "relu6"))[2] == "Mish"
    assert types(st.swap_activations(model, "mish", kinds=["relu6"])) == ["ReLU", "ReLU", "Mish"]
    with pytest.raises(ValueError, match="matches no site"):
        st.swap_activations(model, "mish", where="nope*")


def test_where_selects_one_of_two_calls():
    class Two(nn.Module):
        def forward(self, x):
            return F.relu(x) + F.relu(x - 1)

    swapped = st.swap_activations(Two(), "silu", where="relu_1")
    x = torch.randn(4)
    torch.testing.assert_close(swapped(x), F.relu(x) + F.silu(x - 1))


def test_functions_held_in_attributes_of_a_forward_that_cannot_be_traced():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x = torch.randn(2, 3, 8)
    swapped = st.swap_activations(layer, "silu")
    reference = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, activation=F.silu)
    reference.load_state_dict(layer.state_dict())
    for train in (True, False):
        torch.testing.assert_close(swapped.train(train)(x), reference.train(train)(x))


def test_same_kind_keeps_its_own_parameters():
    model = nn.Sequential(nn.LeakyReLU(0.3))
    assert st.swap_activations(model, "leaky_relu")[0].negative_slope == 0.3


def test_the_model_itself_may_be_the_activation():
    assert type(st.swap_activations(nn.ReLU(), "mish")) is nn.Mish


def test_swish_is_silu_and_names_are_listed():
    assert type(st.swap_activations(nn.Sequential(nn.ReLU()), "swish")[0]) is nn.SiLU
    with pytest.raises(
        ValueError, match=r"unknown activation 'mihs' \(did you mean 'mish'\?\); known: relu,"
    ):
        st.swap_activations(nn.ReLU(), "mihs")
    with pytest.raises(ValueError, match="unknown activation"):
        st.swap_activations(nn.ReLU(), "mish", kinds=["rulu"])
    with pytest.raises(ValueError, match="give a name, a module, a factory or a function"):
        st.swap_activations(nn.ReLU(), 3)
    with pytest.raises(ValueError, match="returned a int"):
        st.swap_activations(nn.Sequential(nn.ReLU()), lambda: 3)


def test_no_site_warns_and_returns_a_copy():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.warns(st.NoEffectWarning, match="no activation of these kinds"):
        result = st.swap_activations(model, "mish")
    assert result is not model
    assert torch.equal(result[0].weight, model[0].weight)


@pytest.mark.parametrize("name", KINDS)
def test_every_known_name_is_a_target_and_found_again(name):
    swapped = st.swap_activations(nn.Sequential(nn.Linear(2, 2), nn.ReLU6()), name)
    assert [site.kind for site in st.find_activations(swapped, kinds=[name])] == [name]
    x = torch.randn(3, 2)
    torch.testing.assert_close(swapped(x), KINDS[name].function(swapped[0](x)))


def test_function_prints_its_name():
    assert "sin" in repr(Function(torch.sin))


def test_an_input_that_is_overwritten_later_is_kept_for_the_backward_pass():
    class Twice(nn.Module):
        def __init__(self, first):
            super().__init__()
            self.inner, self.first = nn.Linear(4, 4), first

        def forward(self, x):
            x = self.inner(x)
            return self.first(x) + x.relu_()

    for first in (F.relu, nn.ReLU()):
        for to, function in (("silu", F.silu), ("gelu", F.gelu), (nn.Hardtanh, F.hardtanh)):
            model = Twice(first)
            swapped = st.swap_activations(model, to)
            x = torch.randn(3, 4)
            swapped(x).sum().backward()
            inner = model.inner(x)
            torch.testing.assert_close(swapped(x), 2 * function(inner))
            expected = torch.autograd.grad(2 * function(inner).sum(), model.inner.weight)[0]
            torch.testing.assert_close(swapped.inner.weight.grad, expected)


@pytest.mark.parametrize("overwrites", [False, True])
@pytest.mark.parametrize("kind", [nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus])
def test_an_input_with_gaps_in_memory_is_swapped_to_the_bit(kind, overwrites):
    class Trimmed(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = kind()

        def forward(self, x):
            x = (2 * x)[..., :-3]
            return self.act(x) + x.mul_(2).sum()

    class Looked(Trimmed):
        def forward(self, x):
            x = (2 * x)[..., :-3]
            return F.elu(x, inplace=True) + x.sum()

    model = Looked() if overwrites else Trimmed()
    name = "elu" if overwrites else next(name for name, each in KINDS.items() if each.module is kind)
    same = st.swap_activations(model, nn.ELU if overwrites else kind, kinds=(name,))
    assert st.changes(same)[-1].rewritten
    for seed in range(5):
        x = torch.randn(2, 8, 51, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(model(x), same(x))


@pytest.mark.parametrize(
    "laid_out",
    [
        lambda x: x,
        lambda x: x.transpose(0, 1),
        lambda x: x[:, ::2],
        lambda x: x[:, None].expand(-1, 3, -1),
        lambda x: x.unfold(1, 3, 1),
        lambda x: x[:0, ::2],
        lambda x: x.to_sparse(),
    ],
)
def test_a_copy_holds_the_same_values_in_memory_of_its_own(laid_out):
    x = laid_out(torch.randn(4, 6))
    copy = copied(x)
    assert torch.equal(copy.to_dense(), x.to_dense())
    copy.zero_()
    assert x.numel() == 0 or x.to_dense().any()


def test_subclasses_without_a_forward_of_their_own_are_found_and_unregistered_ones_named():
    class Own(nn.ReLU):
        pass

    class Hides(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden = [nn.ReLU()]

        def forward(self, x):
            return self.hidden[0](x)

    sites = st.find_activations(nn.Sequential(Own(), Hides()))
    assert [(site.path, site.left) for site in sites] == [("0", None), ("1.hidden", "it is not registered")]


def test_a_function_that_a_forward_looks_for_by_vars_is_left():
    # a module in its place would be held elsewhere, and the forward would go on without it
    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = torch.Tensor.relu

        def forward(self, x):
            return self.act(x) if "act" in vars(self) else x

    model, x = Asks(), torch.randn(8)
    (site,) = st.find_activations(model)
    assert (site.path, site.left) == ("act", "its code asks for attributes by vars")
    for to in (nn.PReLU, lambda x: F.relu(x)):
        with pytest.warns(st.NoEffectWarning):
            assert torch.equal(st.swap_activations(model, to)(x), model(x))


def test_a_helper_held_by_a_forward_that_cannot_be_traced_is_named():
    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            self.helper = lambda x: F.relu6(x, inplace=True)

        def forward(self, x):
            return self.helper(x) if x.sum() > 0 else x

    (site,) = st.find_activations(Holds())
    assert "control flow" in site.left


def test_parameters_of_a_new_activation_are_counted_as_added_and_survive_a_rewind():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    swapped = st.swap_activations(st.prune(model, 0.5), nn.PReLU)
    assert st.sparsity(swapped).added_parameters == 1
    assert torch.equal(st.rewind(swapped, model.state_dict())[1].weight, swapped[1].weight)


class OwnGradient(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return torch.tanh(x)

    @staticmethod
    def backward(context, gradient):
        return gradient


class CallsOwnGradient(nn.Module):
    def forward(self, x):
        return OwnGradient.apply(x)


def test_an_activation_inside_a_custom_gradient_is_named():
    (site,) = st.find_activations(CallsOwnGradient(), kinds=["tanh"])
    assert site.kind == "tanh" and site.left
