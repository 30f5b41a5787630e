"""BatchNorms that do more than normalise: the normalisation is folded, the rest stays, or the norm is named."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsetweaks as st

INPUTS = torch.randn(3, 4, 6, 6, dtype=torch.double, generator=torch.Generator().manual_seed(0))


class Written(nn.BatchNorm2d):
    """The normalisation written out, after a check of the shape, as timm does."""

    def __init__(self, channels: int, act: nn.Module, **options):
        super().__init__(channels, **options)
        self.drop, self.act = nn.Dropout(0.5), act

    def forward(self, x):
        torch._assert(x.ndim == 4, "images, please")
        if self.training:
            self.num_batches_tracked.add_(1)
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps
        )
        return self.act(self.drop(x))


def network(norm: nn.Module, *, after: nn.Module | None = None) -> nn.Module:
    layers = [
        nn.Conv2d(4, 5, 3, padding=1, bias=False),
        norm,
        *([after] if after else []),
        nn.Conv2d(5, 2, 1),
    ]
    model = nn.Sequential(*layers).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            for parameter in module.parameters(recurse=False):
                nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def same(folded: nn.Module, model: nn.Module) -> bool:
    with torch.no_grad():
        expected = st.copy_model(model).eval()(INPUTS)
        return torch.allclose(folded(INPUTS), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"eps": 0.3}], ids=str)
def test_the_normalisation_is_folded_and_its_children_stay(options):
    model = network(Written(5, nn.ReLU(), **options))
    folded = st.fold(model, inputs=INPUTS)
    assert same(folded, model) and not st.changes(folded)[-1].left
    assert type(folded[1]) is nn.Sequential
    assert [name for name, _ in folded[1].named_children()] == ["drop", "act"]
    assert type(folded[1].act) is nn.ReLU and not folded[1].state_dict()
    assert type(model[1]) is Written and "1.running_mean" in model.state_dict()


def test_an_activation_that_was_swapped_stays_as_it_is():
    model = st.swap_activations(network(Written(5, nn.ReLU())), "mish")
    folded = st.fold(model, inputs=INPUTS)
    assert same(folded, model) and type(folded[1].act) is nn.Mish


def test_what_follows_is_folded_too_where_the_norm_applies_nothing():
    for act, left in ((nn.Identity(), []), (nn.ReLU(), ["2"])):
        model = network(Written(5, act), after=nn.BatchNorm2d(5))
        folded = st.fold(model, inputs=INPUTS)
        assert same(folded, model)
        assert [site.path for site in st.changes(folded)[-1].left] == left


class Unread(Written):
    """Torch's own forward raises if the input has not four dimensions, so what calls it depends on its input."""

    def forward(self, x):
        return self.act(nn.BatchNorm2d.forward(self, x))


class Scaled(Written):
    def forward(self, x):
        return 2 * super().forward(x)


class Twice(Written):
    def forward(self, x):
        return self.act(super().forward(x))


class OfWhatItChanged(Written):
    def forward(self, x):
        return super().forward(x + 1)


class Tracked(Written):
    def forward(self, x):
        self.num_batches_tracked.add_(1)
        return super().forward(x)


class OtherEpsilon(Written):
    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=0.1)


class Swapped(Written):
    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.bias, self.weight, eps=self.eps)


class Batches(Written):
    def forward(self, x):
        return F.batch_norm(x, None, None, self.weight, self.bias, True, eps=self.eps)


class Residual(Written):
    def forward(self, x):
        return x + super().forward(x)


@pytest.mark.parametrize(
    "kind", [Unread, Scaled, Twice, OfWhatItChanged, Tracked, OtherEpsilon, Swapped, Batches, Residual]
)
def test_a_norm_that_does_anything_else_stays_and_is_named(kind):
    model = network(kind(5, nn.Hardtanh(-0.3, 0.3)))
    with pytest.warns(st.NoEffectWarning, match="has a forward of its own"):
        folded = st.fold(model, inputs=INPUTS)
    (left,) = st.changes(folded)[-1].left
    assert left.path == "1" and "has a forward of its own" in left.left
    assert type(folded[1]) is kind and same(folded, model)


def test_one_that_is_called_twice_is_folded_into_both_layers():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(4, 5, 1), nn.Conv2d(4, 5, 3, padding=1)
            self.norm = Written(5, nn.Tanh())

        def forward(self, x):
            return self.norm(self.one(x)) + self.norm(self.two(x))

    model = Shared().double()
    model.norm.running_mean.normal_()
    folded = st.fold(model, inputs=INPUTS)
    assert same(folded, model) and type(folded.norm.act) is nn.Tanh


def test_hooks_of_the_children_live_on():
    model = network(Written(5, nn.ReLU()))
    seen = []
    model[1].act.register_forward_hook(lambda *_: seen.append(1))
    st.fold(model)(INPUTS)
    assert seen == [1]
    model[1].register_forward_hook(lambda *_: seen.append(2))
    with pytest.warns(st.NoEffectWarning, match="it has hooks"):
        st.fold(model)


def test_timms_networks_fold_whole():
    timm = pytest.importorskip("timm", reason="timm comes with the extra zoo")
    model = timm.create_model("test_efficientnet", num_classes=3).eval()
    images = torch.randn(2, 3, 32, 32)
    folded = st.fold(model, inputs=images)
    assert not st.changes(folded)[-1].left
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
