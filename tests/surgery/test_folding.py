"""Folding: one convolution that computes what convolution, BatchNorm and skip computed, or a reason."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import fx, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

import sparsetweaks as st
from sparsetweaks.surgery.folding import TOLERANCES
from sparsetweaks.surgery.programs import Rewritten
from sparsetweaks.surgery.skips import Skip

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
SKIPS = {
    "number": {"strength": -0.7},
    "learned": {},
    "ghost": {"ghost": True, "strength": 0.6},
    "norm": {"strength": 0.5, "norm": True},
    "projection": {"strength": 1.0, "shortcut": "projection"},
    "project-all": {"strength": 1.0, "shortcut": "project-all", "norm": True},
}


def shaken(model: nn.Module) -> nn.Module:
    """Trained-looking statistics, affine parameters and skips, so that nothing is 0 or 1 by accident."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.running_mean is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
            for parameter in module.parameters():
                nn.init.uniform_(parameter, 0.5, 1.5)
        elif isinstance(module, Skip):
            for parameter in module.parameters():
                nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def unit(*args, rank: int = 2, norm: bool = True, **kwargs) -> nn.Sequential:
    conv = CONVS[rank](*args, **kwargs)
    layers = [conv, NORMS[rank](conv.out_channels)] if norm else [conv]
    return nn.Sequential(*layers, nn.ReLU())


def fold_and_compare(model: nn.Module, x: torch.Tensor, **options) -> nn.Module:
    """The oracle is the model itself in eval mode, in double precision; the comparison is this file's own."""
    folded = st.fold(model, **options)
    reference = st.copy_model(model).eval()
    with torch.no_grad():
        torch.testing.assert_close(folded(x), reference(x), rtol=1e-10, atol=1e-10)
    account_for_everything(model, folded)
    return folded


def account_for_everything(model: nn.Module, folded: nn.Module) -> None:
    """Every BatchNorm and every skip of the model is either gone or named."""
    named = left_of(folded)
    for path, module in model.named_modules():
        if isinstance(module, Skip):
            assert isinstance(dict(folded.named_modules()).get(path), Skip) == (path in named), path
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and ".skip." not in path:
            kept = folded.get_submodule(path)
            assert type(kept) is (type(module) if path in named else nn.Identity), path


def left_of(folded: nn.Module) -> dict[str, str]:
    """What `fold` says that stays, and why."""
    left = st.changes(folded)[-1].left
    assert len({site.path for site in left}) == len(left)
    return {site.path: site.left for site in left}


def test_what_is_compared_differs_by_much():
    """Shaken statistics, affine parameters and skips all matter, so that no comparison here holds by accident."""
    x = torch.randn(2, 4, 9, 9, dtype=torch.double)
    plain = unit(4, 4, 3, padding=1).double().eval()
    for options in SKIPS.values():
        skipped = shaken(st.inject_skips(plain, **options))
        without = copy.deepcopy(skipped)
        without[1] = nn.Identity()
        neutral = copy.deepcopy(plain)
        neutral.load_state_dict(skipped.state_dict(), strict=False)
        for other in (without, neutral):
            assert (skipped(x) - other(x)).abs().max() > 0.1


GEOMETRIES = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 1},
    {"kernel_size": 3},
    {"kernel_size": 2},
    {"kernel_size": 4, "stride": 3, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 3, "dilation": 2, "padding": 2},
    {"kernel_size": 5, "dilation": 2, "stride": 2, "padding": 3},
    {"kernel_size": 3, "padding": "same", "dilation": 2},
    {"kernel_size": 2, "padding": "same"},
    {"kernel_size": 3, "padding": "valid"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "bias": False},
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_every_geometry_and_every_skip_folds(geometry, skip):
    for inputs, outputs in ((4, 4), (4, 6), (6, 4)):
        model = unit(inputs, outputs, **geometry).double()
        skipped = shaken(st.inject_skips(model, **SKIPS[skip]))
        folded = fold_and_compare(skipped, torch.randn(2, inputs, 9, 9, dtype=torch.double))
        assert [type(each) for each in folded] == [nn.Conv2d, nn.Identity, nn.ReLU]
        assert not isinstance(folded, Rewritten)
        assert not any(isinstance(each, Skip) for each in folded.modules())
        assert st.changes(folded)[-1].left == ()


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "bare"])
def test_every_number_of_dimensions_with_and_without_norm_and_bias(rank, norm):
    for bias in (True, False):
        layers = [
            *unit(3, 6, 3, stride=2, padding=1, bias=bias, rank=rank, norm=norm),
            *unit(6, 4, (1, 3, 5)[:rank], padding=(0, 1, 2)[:rank], bias=bias, rank=rank, norm=norm),
        ]
        model = shaken(st.inject_skips(nn.Sequential(*layers), strength=0.8).double())
        folded = fold_and_compare(model, torch.randn(2, 3, *[9] * rank, dtype=torch.double))
        assert (folded[0].bias is None) == (not bias and not norm)
        assert len(st.changes(folded)[-1].layers) == 2


@pytest.mark.parametrize("skip", ["number", "norm"])
def test_grouped_and_depthwise_convolutions_fold(skip):
    layers = [*unit(8, 8, 3, padding=1, groups=4), *unit(8, 8, 3, stride=2, padding=1, groups=8)]
    model = shaken(st.inject_skips(nn.Sequential(*layers).double(), **SKIPS[skip]))
    folded = fold_and_compare(model, torch.randn(2, 8, 6, 6, dtype=torch.double))
    assert [each.groups for each in folded if isinstance(each, nn.Conv2d)] == [4, 8]
    assert st.changes(folded)[-1].left == ()


def test_a_skip_that_cannot_be_folded_stays_and_its_norm_is_folded():
    crossing = st.inject_skips(unit(4, 8, 3, padding=1, groups=4).double(), strength=1.0)
    no_tap = st.inject_skips(unit(4, 4, 2, dilation=2, padding=1).double(), strength=1.0)
    batch = st.inject_skips(unit(4, 4, 3, padding=1).double(), strength=1.0, norm=True)
    batch[0].skip.norm = nn.BatchNorm2d(4, track_running_stats=False).double()
    for model, reason in (
        (crossing, "it crosses the groups of its convolution"),
        (no_tap, "the kernel has no tap at the position that it reads"),
        (batch, "its BatchNorm2d keeps no running statistics"),
    ):
        x = torch.randn(2, 4, 6, 6, dtype=torch.double)
        folded = fold_and_compare(shaken(model), x)
        assert isinstance(folded[0].skip, Skip) and isinstance(folded[1], nn.Identity)
        assert left_of(folded) == {"0.skip": reason}
        with pytest.warns(st.NoEffectWarning):
            again = st.fold(folded)
        assert left_of(again) == {"0.skip": reason}
        neutral = copy.deepcopy(model)
        neutral[0].skip.strength = 0.0
        assert not any(isinstance(each, Skip) for each in fold_and_compare(neutral, x).modules())


class Shared(nn.Module):
    """One convolution under two norms, one norm over two convolutions, and one that is called twice alike."""

    def __init__(self):
        super().__init__()
        self.twice, self.norm1, self.norm2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.conv1, self.conv2, self.norm = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.alike, self.norm3 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.norm1(self.twice(x)) + self.norm2(self.twice(x))
        x = self.norm(self.conv1(x)) + self.norm(self.conv2(x))
        return self.norm3(self.alike(self.norm3(self.alike(x))))


def test_sharing_is_folded_where_all_calls_agree():
    folded = fold_and_compare(shaken(Shared().double()), torch.randn(2, 4, 5, 5, dtype=torch.double))
    assert [each.name for each in st.changes(folded)[-1].layers] == ["conv1", "conv2", "alike"]
    differ = "its Conv2d is called in several places, and not followed by the same layers"
    assert left_of(folded) == {"norm1": differ, "norm2": differ}


def test_what_follows_a_shared_layer_is_folded_as_far_as_all_calls_agree():
    class Alike(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.other = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.other(self.norm(self.conv(x))) + self.norm(self.conv(x))

    folded = fold_and_compare(shaken(Alike().double()), torch.randn(2, 4, 5, 5, dtype=torch.double))
    assert list(left_of(folded)) == ["other"]


def test_a_norm_that_is_also_called_elsewhere_is_kept():
    class Elsewhere(Shared):
        def forward(self, x):
            return self.norm(self.conv1(self.norm(x)))

    elsewhere = "it is also called elsewhere"
    for model, where, left in (
        (Elsewhere(), "conv1", {"norm": elsewhere}),
        (Shared(), "conv1", {"norm": elsewhere}),
    ):
        with pytest.warns(st.NoEffectWarning, match=elsewhere):
            folded = st.fold(model, where=where)
        assert left_of(folded) == left


class Used(nn.Module):
    """A convolution and its norm, with something about them that folding must see."""

    def __init__(self, how: str):
        super().__init__()
        self.conv, self.norm, self.how = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), how

    def forward(self, x):
        y = self.conv(x)
        if self.how == "output":
            return self.norm(y) + y
        if self.how == "weight":
            return self.norm(y) + self.conv.weight.sum()
        if self.how == "scale":
            return self.norm(y) + self.norm.weight.sum()
        if self.how == "activation":
            return self.norm(torch.relu(y))
        if self.how == "training":
            return self.norm(y) if self.training else y
        if self.how == "overwritten":
            z = x.mul_(2)
            return self.norm(y) + z
        if self.how == "unread" and x.sum() > 0:
            return y
        return self.norm(y)


class OwnForward(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + 1


class OwnConvolution(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


class AlwaysTraining(nn.BatchNorm2d):
    def train(self, mode: bool = True):
        return super().train(True)


def hooked(index: int) -> nn.Sequential:
    model = unit(4, 4, 3)
    model[index].register_forward_hook(lambda module, given, output: output * 2)
    return model


def patched(index: int) -> nn.Sequential:
    model = unit(4, 4, 3)
    forward = model[index].forward
    model[index].forward = lambda x: forward(x) * 2
    return model


def on_meta() -> nn.Sequential:
    with torch.device("meta"):
        return unit(4, 4, 3)


class Sliced(nn.Module):
    """A forward that cannot be read and calls one layer of a Sequential by its index."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x):
        return self.body[0](x) if x.sum() > 0 else self.body(x)


def before_and_after(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(4, 4, 3), *between, nn.BatchNorm2d(4))


NORM_STAYS = {
    "output": (Used("output"), "norm", "what the Conv2d before it computes is also used elsewhere"),
    "weight": (Used("weight"), "norm", "a forward reads what its Conv2d holds"),
    "scale": (Used("scale"), "norm", "a forward reads what it holds"),
    "activation": (Used("activation"), "norm", "it follows relu, not a convolution"),
    "only in training": (Used("training"), "norm", "no forward that can be read calls it in eval mode"),
    "unread": (Used("unread"), "norm", "its control flow depends on its inputs"),
    "indexed": (Sliced(), "body.1", "its control flow depends on its inputs"),
    "module between": (before_and_after(nn.ReLU()), "2", "it follows a ReLU, not a convolution"),
    "softmax between": (before_and_after(nn.Softmax(1)), "2", "it follows a Softmax, not a convolution"),
    "first": (
        nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)),
        "0",
        "it follows the input of its forward",
    ),
    "alone": (nn.BatchNorm2d(4), "", "no forward that can be read calls it"),
    "group norm": (nn.Sequential(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4)), "1", "it is no BatchNorm of torch"),
    "no statistics": (
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
        "1",
        "it keeps no running statistics",
    ),
    "training": (
        nn.Sequential(nn.Conv2d(4, 4, 3), AlwaysTraining(4)),
        "1",
        "it stays in training mode when the model is in eval mode",
    ),
    "own forward": (
        nn.Sequential(OwnForward(4, 4, 3), nn.BatchNorm2d(4)),
        "1",
        "its OwnForward has a forward of",
    ),
    "own convolution": (
        nn.Sequential(OwnConvolution(4, 4, 3), nn.BatchNorm2d(4)),
        "1",
        "its OwnConvolution has a forward of its own",
    ),
    "own norm": (nn.Sequential(nn.Conv2d(4, 4, 3), OwnNorm(4)), "1", "it has a forward of its own"),
    "lazy": (nn.Sequential(nn.LazyConv2d(4, 3), nn.BatchNorm2d(4)), "1", "its LazyConv2d has no values yet"),
    "meta": (on_meta(), "1", "its Conv2d has no values yet"),
    "hooks": (hooked(0), "1", "its Conv2d has hooks"),
    "hooks of the norm": (hooked(1), "1", "it has hooks"),
    "patched": (patched(0), "1", "its Conv2d has a forward of its own"),
    "patched norm": (patched(1), "1", "it has a forward of its own"),
    "channels": (
        nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(5)),
        "1",
        "it normalises 5 channels, and its Linear gives 6",
    ),
}


@pytest.mark.parametrize("case", NORM_STAYS)
def test_a_norm_that_is_not_folded_is_named(case):
    model, path, reason = NORM_STAYS[case]
    with pytest.warns(st.NoEffectWarning, match="nothing that can be folded"):
        folded = st.fold(model)
    left = left_of(folded)
    assert list(left) == [path] and reason in left[path]
    assert [type(a) for a in folded.modules()] == [type(a) for a in model.modules()]
    assert all(
        torch.equal(a, b)
        for a, b in zip(folded.parameters(), model.parameters())
        if not (is_lazy(a) or a.is_meta)
    )


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is")
def test_a_scripted_norm_is_named():
    model = nn.Sequential(torch.jit.script(before_and_after()), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    folded = st.fold(model)
    assert left_of(folded) == {"0.1": "no forward that can be read calls it in eval mode"}


def test_an_input_that_is_overwritten_stops_the_skip_and_not_the_norm():
    x = torch.randn(2, 4, 5, 5, dtype=torch.double)

    def outputs(model):
        with torch.no_grad():
            return model.eval()(x.clone())

    model = shaken(Used("overwritten").double())
    folded = st.fold(model)
    torch.testing.assert_close(outputs(folded), outputs(model), rtol=1e-10, atol=1e-10)
    assert left_of(folded) == {}
    skipped = fx.symbolic_trace(Used("").double())
    skipped.conv.add_module("skip", st.inject_skips(skipped, strength=0.5).conv.skip)
    conv, norm = (node for node in skipped.graph.nodes if node.op == "call_module")
    with skipped.graph.inserting_after(conv):
        skipped.graph.call_method("mul_", (conv.args[0], 2))
    with skipped.graph.inserting_after(norm):
        skip = skipped.graph.call_module("conv.skip")
    norm.replace_all_uses_with(skip)
    skip.args = (conv.args[0], norm)
    skipped.recompile()
    folded = st.fold(shaken(skipped))
    torch.testing.assert_close(outputs(folded), outputs(skipped), rtol=1e-10, atol=1e-10)
    assert list(left_of(folded)) == ["conv.skip"] and "overwritten" in left_of(folded)["conv.skip"]


@pytest.mark.parametrize(
    ("name", "left"),
    {
        "resnet18": 0,
        "densenet121": 62,
        "googlenet": 0,
        "inception_v3": 0,
        "mobilenet_v3_small": 0,
        "efficientnet_b0": 0,
        "fasterrcnn_resnet50_fpn": 0,
    }.items(),
)
def test_in_torchvision_every_norm_is_folded_or_named(name, left):
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    options = {"weights_backbone": None} if "rcnn" in name else options
    model = torchvision.models.get_model(name, weights=None, **options)
    folded = st.fold(shaken(model))
    account_for_everything(model, folded)
    assert len(left_of(folded)) == left


# --- What else it folds -------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [True, False])
def test_a_norm_after_a_linear_layer_folds_with_its_skip(affine):
    layers = (
        nn.Linear(6, 4),
        nn.BatchNorm1d(4, affine=affine),
        nn.ReLU(),
        nn.Linear(4, 4, bias=False),
        nn.BatchNorm1d(4),
    )
    model = shaken(nn.Sequential(*layers).double())
    x = torch.randn(5, 6, dtype=torch.double)
    assert left_of(fold_and_compare(model, x)) == {}
    assert left_of(fold_and_compare(shaken(st.inject_skips(model, layers="linear", strength=0.7)), x)) == {}


def test_a_norm_over_positions_is_refused_by_its_number_or_by_the_inputs():
    model = shaken(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)))
    with pytest.raises(
        st.SurgeryError, match=r"output 0 of the folded model, torch.float32, differs by .* where="
    ):
        st.fold(model, inputs=torch.randn(2, 4, 6))
    assert st.changes(st.fold(model, inputs=torch.randn(2, 6)))[-1].error < 1e-5


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_transposed_convolutions_take_in_their_norm(rank, groups, bias):
    transposed = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[rank]
    conv = transposed(4, 6, 3, stride=2, padding=1, output_padding=1, groups=groups, bias=bias)
    model = shaken(nn.Sequential(conv, NORMS[rank](6)).double())
    folded = fold_and_compare(model, torch.randn(2, 4, *[5] * rank, dtype=torch.double))
    assert type(folded[0]) is transposed


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(F.dropout2d(F.dropout(self.conv(x), 0.5, self.training), training=self.training))


class Forever(Dropping):
    def forward(self, x):
        return self.norm(F.dropout(self.conv(x), 0.5))


def test_dropout_and_identity_are_nothing_in_eval_mode():
    x = torch.randn(2, 4, 5, 5, dtype=torch.double)
    between = nn.Dropout(0.9), nn.Identity(), nn.Dropout2d(0.9, inplace=True), nn.AlphaDropout(0.9)
    for model in (before_and_after(*between), Dropping()):
        assert left_of(fold_and_compare(shaken(model.double()), x)) == {}
    hooked_dropout = before_and_after(nn.Dropout())
    hooked_dropout[1].register_forward_hook(lambda module, given, output: output * 2)
    for model, word in ((Forever(), "dropout"), (hooked_dropout, "Dropout")):
        with pytest.warns(st.NoEffectWarning, match=f"it follows .*{word}, not"):
            st.fold(model)


def test_several_norms_in_a_row_fold():
    model = shaken(
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.BatchNorm2d(4)).double()
    )
    folded = fold_and_compare(model, torch.randn(2, 4, 5, 5, dtype=torch.double))
    assert left_of(folded) == {} and isinstance(folded[3], nn.Identity)
    stays = shaken(
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.BatchNorm2d(4)).double()
    )
    folded = fold_and_compare(stays, torch.randn(2, 4, 5, 5, dtype=torch.double))
    assert list(left_of(folded)) == ["2", "3"]
    assert left_of(folded)["3"].startswith("what it follows stays: it is no BatchNorm")


@pytest.mark.parametrize("skip", ["number", "learned", "project-all"])
def test_complex_layers_keep_their_imaginary_parts(skip):
    options = {**SKIPS[skip], "norm": False}
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, dtype=torch.cdouble), nn.Tanh())
    skipped = st.inject_skips(model, **options)
    if skip == "project-all":
        skipped[0].skip.norm = None
    shaken(skipped)
    x = torch.randn(2, 4, 5, 5, dtype=torch.cdouble)
    folded = fold_and_compare(skipped, x)
    assert folded[0].weight.imag.abs().max() > 0.01 and left_of(folded) == {}
    assert st.changes(st.fold(skipped, inputs=x))[-1].error < 1e-10


def test_channels_cut_after_the_surgery_are_those_that_count():
    model = shaken(st.inject_skips(unit(4, 6, 3, padding=1, bias=False).double(), strength=0.5))
    model[0].weight = nn.Parameter(model[0].weight[:5].detach())
    model[1] = shaken(nn.BatchNorm2d(5)).double()
    fold_and_compare(model, torch.randn(2, 4, 5, 5, dtype=torch.double))


# --- What no dtype can hold ---------------------------------------------------------------------------------


def test_numbers_that_would_not_be_finite_are_not_written():
    x = torch.randn(2, 4, 5, 5)
    for spoil, dtype in (
        (lambda norm: norm.weight.data.fill_(3e4), torch.float16),
        (lambda norm: norm.weight.data.fill_(3e38), torch.float32),
        (lambda norm: norm.running_mean.fill_(3e38), torch.float32),
        (lambda norm: norm.running_var.fill_(-1), torch.float32),
    ):
        model = shaken(unit(4, 4, 3, padding=1)).to(dtype)
        nn.init.constant_(model[0].weight, 3.0)
        spoil(model[1])
        with pytest.warns(st.NoEffectWarning, match=f"numbers that are not finite in {dtype}"):
            folded = st.fold(model)
        assert torch.equal(folded[0].weight, model[0].weight) and isinstance(folded[1], nn.BatchNorm2d)
        assert folded[0].weight.isfinite().all() and list(left_of(folded)) == ["1"]
    big = shaken(st.inject_skips(unit(4, 4, 3, padding=1), strength=1e39))
    folded = st.fold(big)
    assert folded[0].weight.isfinite().all() and isinstance(folded[1], nn.Identity)
    assert list(left_of(folded)) == ["0.skip"]
    both = shaken(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)))
    (
        both[1].weight.data.fill_(3e38),
        both[1].running_var.fill_(1e-9),
        both[1].bias.data.zero_(),
        both[1].running_mean.zero_(),
    )
    both[2].weight.data.fill_(1e-38), both[2].running_mean.zero_()
    assert left_of(st.fold(both)) == {}
    assert st.fold(both)(x).isfinite().all()


@pytest.mark.parametrize("form", ["plain", "prune", "parametrized"])
def test_frozen_layers_fold_and_stay_frozen(form):
    model = shaken(unit(4, 4, 3, padding=1, bias=False).double())
    if form == "prune":
        torch_prune.random_unstructured(model[0], "weight", 0.5)
    elif form == "parametrized":
        parametrizations.weight_norm(model[0])
    model.requires_grad_(False)
    folded = fold_and_compare(model, torch.randn(2, 4, 5, 5, dtype=torch.double))
    assert dict(folded.named_parameters()).keys() == {"0.weight", "0.bias"}
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    model[1].requires_grad_(True)
    assert not any(parameter.requires_grad for parameter in st.fold(model).parameters())


def test_a_mask_that_was_stepped_past_counts_as_in_the_next_forward():
    model = shaken(unit(4, 4, 3, padding=1).double())
    torch_prune.random_unstructured(model[0], "weight", 0.5)
    model[0].weight_orig.data.mul_(3)
    fold_and_compare(model, torch.randn(2, 4, 5, 5, dtype=torch.double))


# --- What it keeps ------------------------------------------------------------------------------------------


def test_the_given_model_is_untouched_and_the_result_is_in_eval_mode():
    model = shaken(st.inject_skips(unit(4, 4, 3, padding=1), strength=1.0))
    state, x = copy.deepcopy(model.state_dict()), torch.randn(1, 4, 5, 5)
    rng = torch.random.get_rng_state()
    folded = st.fold(model, inputs=x)
    assert torch.equal(torch.random.get_rng_state(), rng)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(module.training for module in folded.modules())
    assert isinstance(model[0].skip, Skip) and isinstance(model, Rewritten)


@pytest.mark.parametrize("form", ["ours", "prune", "parametrized", "none"])
def test_masks_become_ordinary_and_keep_what_the_skip_fills(form):
    model = unit(4, 4, 3, padding=1).double()
    mask = torch.rand(4, 4, 3, 3) < 0.2
    mask[:, :, 1, 1] = False
    if form == "ours":
        model = st.apply_masks(model, {"0.weight": mask})
    elif form == "prune":
        torch_prune.custom_from_mask(model[0], "weight", mask)
    elif form == "parametrized":
        from torch.ao.pruning.sparsifier.utils import FakeSparsity

        nn.utils.parametrize.register_parametrization(model[0], "weight", FakeSparsity(mask.double()))
    skipped = shaken(st.inject_skips(model, strength=0.5))
    before = skipped[0].weight.detach().clone()
    folded = fold_and_compare(skipped, torch.randn(2, 4, 5, 5, dtype=torch.double))
    assert torch.equal(skipped[0].weight, before)
    if form == "none":
        assert st.find_masks(folded) == {}
        return
    assert list(folded.state_dict()) == ["0.weight", "0.bias", "0.weight_mask"]
    assert type(folded[0]) is nn.Conv2d
    expected = mask.clone()
    expected[range(4), range(4), 1, 1] = True
    found = st.find_masks(folded)["0.weight"]
    assert torch.equal(found, expected)
    assert torch.equal(folded[0].weight != 0, expected)
    (layer,) = st.changes(folded)[-1].layers
    assert (layer.own, layer.skip, layer.after) == (int(mask.sum()), 0, int(mask.sum()) + 4)


def test_the_non_zeros_of_an_identity_and_of_a_projection_are_as_promised():
    channels = 8
    empty = {"0.weight": torch.zeros(channels, channels, 3, 3, dtype=torch.bool)}
    for options, filled in (
        ({"strength": 1.0}, channels),
        ({"strength": 1.0, "shortcut": "project-all"}, channels**2),
    ):
        model = st.inject_skips(st.apply_masks(unit(channels, channels, 3, padding=1), empty), **options)
        report = st.changes(st.fold(shaken(model)))[-1]
        assert (report.layers[0].own, report.layers[0].after) == (0, filled)
        assert f"{filled}" in str(report) and "all parameters" in str(report)


def test_weight_norm_and_the_class_it_shares_with_the_given_model():
    model = unit(4, 4, 3, padding=1).double()
    parametrizations.weight_norm(model[0])
    x = torch.randn(2, 4, 5, 5, dtype=torch.double)
    folded = fold_and_compare(shaken(st.inject_skips(model, strength=0.5)), x)
    assert type(folded[0]) is nn.Conv2d
    assert model(x).isfinite().all()


def test_tied_weights_stay_right():
    layers = [*unit(4, 4, 3, padding=1), *unit(4, 4, 3, padding=1)]
    layers[3].weight = layers[0].weight
    folded = fold_and_compare(
        shaken(nn.Sequential(*layers).double()), torch.randn(2, 4, 5, 5, dtype=torch.double)
    )
    assert folded[3].weight is not folded[0].weight


def test_dtype_memory_format_and_requires_grad_are_kept():
    model = shaken(st.inject_skips(unit(4, 4, 3, padding=1, bias=False), strength=0.5))
    model = model.to(torch.bfloat16, memory_format=torch.channels_last)
    model[0].weight.requires_grad_(False)
    folded = st.fold(model, inputs=torch.randn(1, 4, 5, 5, dtype=torch.bfloat16))
    weight = folded[0].weight
    assert weight.dtype == folded[0].bias.dtype == torch.bfloat16
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.requires_grad


def test_other_surgeries_stay_and_what_skips_rewrote_comes_back():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

        def forward(self, x):
            return torch.relu(self.norm(self.conv(x)))

    x = torch.randn(2, 4, 5, 5, dtype=torch.double)
    skipped = shaken(st.inject_skips(Block().double(), strength=0.5))
    assert type(fold_and_compare(skipped, x)) is Block
    swapped = st.swap_activations(skipped, "mish")
    assert isinstance(fold_and_compare(swapped, x), Rewritten)
    ghost = st.swap_activations(skipped, "swish", ghost=True)
    folded = fold_and_compare(ghost, x)
    back = st.remove_ghosts(folded, force=True)
    assert isinstance(folded, Rewritten) and type(back) is Block
    assert list(back.state_dict()) == ["conv.weight", "conv.bias"]


def test_a_whole_network_folds_exports_compiles_and_pickles():
    block = torchvision.models.resnet.BasicBlock
    model = shaken(torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=10))
    x = torch.randn(1, 3, 32, 32)
    skipped = shaken(st.inject_skips(model, strength=0.3))
    folded = st.fold(skipped, inputs=x)
    report = st.changes(folded)[-1]
    assert len(report.layers) == 12 and report.left == () and report.error < 1e-5
    assert [type(a) for a in folded.modules() if not isinstance(a, nn.Identity)] == [
        type(a) for a in model.modules() if not isinstance(a, nn.BatchNorm2d)
    ]
    with torch.no_grad():
        expected = folded(x)
        torch.testing.assert_close(expected, skipped.eval()(x))
        assert not torch.allclose(expected, model.eval()(x), rtol=0.1, atol=0.1)
        assert torch.equal(pickle.loads(pickle.dumps(folded))(x), expected)
        torch.testing.assert_close(torch.export.export(folded, (x,)).module()(x), expected)
        torch.testing.assert_close(torch.compile(folded, backend="eager")(x), expected)
    fresh = st.fold(shaken(st.inject_skips(model, strength=0.3)))
    fresh.load_state_dict(folded.state_dict())
    assert torch.equal(fresh(x), expected)
    torch._dynamo.reset()


# --- The check ----------------------------------------------------------------------------------------------


class Sideways(nn.Module):
    """A norm is called again by a hook, which no forward shows."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.body.register_forward_hook(lambda body, given, output: body[1](output))

    def forward(self, x):
        return self.body(x)


def test_outputs_that_do_not_agree_raise():
    model, x = shaken(Sideways()), torch.randn(2, 4, 3, 3)
    with pytest.raises(
        st.SurgeryError, match=r"torch\.float32, differs by .*more than 0\.0001\. Leave out with where="
    ):
        st.fold(model, inputs=(x,))
    assert st.changes(st.fold(model, inputs=x, tolerance=10))[-1].error > 0.1
    model.body.register_forward_hook(lambda body, given, output: 1 / (body[1](output) - output))
    with pytest.raises(st.SurgeryError, match="differs in where it is finite"):
        st.fold(model, inputs=x)
    good = shaken(unit(4, 4, 1))
    x[0, 0, 0, 0] = float("nan")
    assert 0 < st.changes(st.fold(good, inputs=x))[-1].error < 1e-5


def test_tolerances():
    x = torch.randn(2, 4, 9, 9)
    for dtype, tolerance in TOLERANCES.items():
        model = shaken(nn.Sequential(*unit(4, 4, 3, padding=1), *unit(4, 4, 3, padding=1)).to(dtype))
        error = st.changes(st.fold(model, inputs=x.to(dtype)))[-1].error
        assert torch.finfo(dtype).eps / 100 < error < tolerance / 2
        with pytest.raises(st.SurgeryError, match=f"{dtype}, differs by .* more than 0"):
            st.fold(model, inputs=x.to(dtype), tolerance=0.0)
        forgetful = nn.Sequential(model, Sideways().to(dtype))
        with pytest.raises(st.SurgeryError, match=f"{dtype}, differs by .* more than {tolerance:g}"):
            st.fold(shaken(forgetful), inputs=x.to(dtype))
    for wrong in (
        {"inputs": x, "tolerance": -1},
        {"inputs": x, "tolerance": float("nan")},
        {"inputs": x, "tolerance": "tight"},
        {"tolerance": 0.1},
    ):
        with pytest.raises(ValueError, match="tolerance is at least 0 and for the check with inputs="):
            st.fold(unit(4, 4, 3), **wrong)


def test_an_output_in_another_dtype_than_the_layers_has_their_tolerance():
    class Upcast(nn.Sequential):
        def forward(self, x):
            return super().forward(x).float()

    model = shaken(Upcast(*unit(4, 4, 3, padding=1)).bfloat16())
    folded = st.fold(model, inputs=torch.randn(2, 4, 9, 9))
    assert 1e-4 < st.changes(folded)[-1].error < 1e-1


def test_a_pattern_that_matches_nothing_and_wrapped_models_are_refused():
    model = unit(4, 4, 3)
    with pytest.raises(ValueError, match="matches no site"):
        st.fold(model, where="layer9*")
    with pytest.warns(st.NoEffectWarning, match="follows the input of its forward"):
        st.fold(nn.Sequential(nn.BatchNorm2d(4), *model), where="0")
    with pytest.raises(TypeError):
        st.fold("model")
    with pytest.warns(st.NoEffectWarning, match="nothing that can be folded"):
        st.fold(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))


@dataclasses.dataclass
class Output:
    scores: torch.Tensor


class Wrapped(nn.Module):
    """Puts out an object of its own."""

    def __init__(self, wrap):
        super().__init__()
        self.body, self.wrap = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), wrap

    def forward(self, x):
        return self.wrap(self.body(x))


def test_outputs_of_a_dataclass_are_compared_and_others_are_refused():
    positions = torch.randn(2, 4, 4)  # of which the BatchNorm normalises the second dimension
    with pytest.raises(st.SurgeryError, match="differs by"):
        st.fold(shaken(Wrapped(Output)), inputs=positions)
    assert st.changes(st.fold(shaken(Wrapped(Output)), inputs=torch.randn(2, 4)))[-1].error < 1e-5
    with pytest.raises(st.SurgeryError, match="puts out no tensor to compare, but a str"):
        st.fold(shaken(Wrapped(str)), inputs=torch.randn(2, 4))


def test_pruned_weights_are_no_non_zeros_whatever_the_form_of_the_masks():
    for to in ("buffers", "torch_prune", "parametrization"):
        model = st.convert_masks(st.prune(nn.Sequential(*unit(3, 8, 3), *unit(8, 8, 3)), 0.9), to=to)
        report = st.changes(st.fold(model, where="0"))[-1]
        assert (
            report.before == st.cost(model, torch.zeros(1, 3, 8, 8)).nonzeros - 2 * 8
        )  # zeros of BatchNorms
        assert report.after < report.before + 16


class Unreadable(nn.Module):
    """A forward that no tracer follows, and that uses the convolution inside a block beside the block."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.block = ConvAndNorm()
        self.blocks = nn.ModuleList([self.block])
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.block(x)
        if x.sum().item() > 1e9:
            return y
        if self.how == "calls":
            return y + self.block.conv(x)
        if self.how == "loops":
            for block in self.blocks:
                y = y + block.conv(x)
            return y
        if self.how == "reads":
            return y + F.conv2d(x, self.block.conv.weight, padding=1)
        return y + next(self.block.children())(x)


class ConvAndNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x))


@pytest.mark.parametrize("how", ["calls", "loops", "reads", "children"])
def test_a_convolution_that_an_unreadable_forward_reaches_into_a_block_for_stays(how):
    model, x = shaken(Unreadable(how)).eval(), torch.randn(2, 4, 5, 5)
    with pytest.warns(st.NoEffectWarning, match="nothing was merged"):
        folded = st.fold(model)
    assert torch.equal(folded(x), model(x))
    (left,) = st.changes(folded)[-1].left
    assert "may be called by a forward that cannot be read" in left.left


def test_a_projection_under_torchs_prune_is_merged_as_it_is_now():
    net = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    model = st.inject_skips(net, shortcut="projection", strength=1.0).eval()
    projection = model[0].skip.projection
    torch_prune.random_unstructured(projection, "weight", 0.5)
    with torch.no_grad():
        projection.weight_orig.fill_(1.0)  # an optimizer's step; no forward since
    folded, x = st.fold(model), torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(folded(x), model(x))
