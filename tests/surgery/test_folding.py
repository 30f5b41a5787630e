"""Folding: one convolution that computes what convolution, BatchNorm and skip computed, or a reason."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

import sparsetweaks as st
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
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    for name, parameter in model.named_parameters():
        if "norm" in name or ".1." in name or "skip" in name:
            nn.init.uniform_(parameter, -1, 1.5)
    return model


def unit(*args, rank: int = 2, norm: bool = True, **kwargs) -> nn.Sequential:
    conv = CONVS[rank](*args, **kwargs)
    layers = [conv, NORMS[rank](conv.out_channels)] if norm else [conv]
    return nn.Sequential(*layers, nn.ReLU())


def fold_and_compare(model: nn.Module, x: torch.Tensor, **options) -> nn.Module:
    """The oracle is the model itself in eval mode, in float64; the comparison is this file's own."""
    folded = st.fold(model, **options)
    reference = copy.deepcopy(model).eval()
    with torch.no_grad():
        torch.testing.assert_close(folded(x), reference(x), rtol=1e-10, atol=1e-10)
    return folded


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


def reasons(model: nn.Module) -> list[str]:
    return [site.left for site in st.changes(st.fold(model))[-1].left]


def test_a_skip_that_cannot_be_folded_stays_and_its_norm_is_folded():
    crossing = st.inject_skips(unit(4, 8, 3, padding=1, groups=4).double(), strength=1.0)
    no_tap = st.inject_skips(unit(4, 4, 2, dilation=2, padding=1).double(), strength=1.0)
    batch = st.inject_skips(unit(4, 4, 3, padding=1).double(), strength=1.0, norm=True)
    batch[0].skip.norm = nn.BatchNorm2d(4, track_running_stats=False).double()
    for model, reason in (
        (crossing, "its skip crosses the groups of its convolution"),
        (no_tap, "its kernel has no tap at the position that its skip reads"),
        (batch, "in its skip, its BatchNorm2d keeps no running statistics"),
    ):
        folded = fold_and_compare(shaken(model), torch.randn(2, 4, 6, 6, dtype=torch.double))
        assert isinstance(folded[0].skip, Skip) and isinstance(folded[1], nn.Identity)
        (site,) = st.changes(folded)[-1].left
        assert (site.path, site.left) == ("0.skip", reason)
        neutral = copy.deepcopy(model)
        neutral[0].skip.strength = 0.0
        assert not any(isinstance(each, Skip) for each in st.fold(neutral).modules())


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
    report = st.changes(folded)[-1]
    assert [each.name for each in report.layers] == ["conv1", "conv2", "alike"]
    assert [(site.path, site.left) for site in report.left] == [
        ("twice", "it is called in several places, and not followed by the same layers")
    ]


def test_a_norm_that_is_also_called_elsewhere_is_kept():
    class Elsewhere(Shared):
        def forward(self, x):
            return self.norm(self.conv1(self.norm(x)))

    with pytest.warns(st.NoEffectWarning, match="also called elsewhere"):
        st.fold(Elsewhere())
    with pytest.warns(st.NoEffectWarning, match="also called elsewhere"):
        st.fold(Shared(), where="conv1")


class Used(nn.Module):
    def __init__(self, how: str):
        super().__init__()
        self.conv, self.norm, self.how = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), how

    def forward(self, x):
        y = self.conv(x)
        if self.how == "output":
            return self.norm(y) + y
        if self.how == "weight":
            return self.norm(y) + self.conv.weight.sum()
        if self.how == "overwritten":
            z = x.mul_(2)
            return self.norm(y) + z
        if self.how == "unread" and x.sum() > 0:
            return y
        return self.norm(y)


def test_what_cannot_be_folded_is_named():
    class Own(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) + 1

    hooked = unit(4, 4, 3)
    hooked[0].register_forward_hook(lambda module, given, output: output * 2)
    hooked_norm = unit(4, 4, 3)
    hooked_norm[1].register_forward_pre_hook(lambda module, given: None)
    with torch.device("meta"):
        meta = unit(4, 4, 3)
    for model, reason in {
        Used("output"): None,
        Used("weight"): "a forward reads what its Conv2d holds",
        Used("overwritten"): "a tensor is overwritten between its layers",
        Used("unread"): "its control flow depends on its inputs",
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4)): "GroupNorm is no BatchNorm",
        nn.Sequential(
            nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)
        ): "no running statistics",
        nn.Sequential(nn.ConvTranspose2d(4, 4, 3), nn.BatchNorm2d(4)): "it is a transposed convolution",
        nn.Sequential(Own(4, 4, 3), nn.BatchNorm2d(4)): "Own has a forward of its own",
        nn.Sequential(nn.LazyConv2d(4, 3), nn.BatchNorm2d(4)): "it is lazy",
        hooked: "it has hooks",
        hooked_norm: "its normalisation has hooks",
        meta: "on the meta device",
    }.items():
        with pytest.warns(st.NoEffectWarning, match=reason or "nothing that can be folded"):
            folded = st.fold(model)
        assert [type(a) for a in folded.modules()] == [type(a) for a in model.modules()]
        assert all(reason in site.left for site in st.changes(folded)[-1].left)


# --- What it keeps ------------------------------------------------------------------------------------------


def test_the_given_model_is_untouched_and_the_result_is_in_eval_mode():
    model = st.inject_skips(unit(4, 4, 3, padding=1), strength=1.0)
    state = copy.deepcopy(model.state_dict())
    rng = torch.random.get_rng_state()
    folded = st.fold(model, inputs=torch.zeros(1, 4, 5, 5))
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
    model = st.inject_skips(unit(4, 4, 3, padding=1, bias=False), strength=0.5)
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
    skipped = st.inject_skips(model, strength=0.3)
    folded = st.fold(skipped, inputs=x)
    report = st.changes(folded)[-1]
    assert len(report.layers) == 12 and report.left == () and report.error < 1e-5
    assert [type(a) for a in folded.modules() if not isinstance(a, nn.Identity)] == [
        type(a) for a in model.modules() if not isinstance(a, nn.BatchNorm2d)
    ]
    with torch.no_grad():
        expected = folded(x)
        assert torch.equal(pickle.loads(pickle.dumps(folded))(x), expected)
        torch.testing.assert_close(torch.export.export(folded, (x,)).module()(x), expected)
        torch.testing.assert_close(torch.compile(folded, backend="eager")(x), expected)
    file = io.BytesIO()
    torch.save(folded.state_dict(), file)
    torch._dynamo.reset()


# --- The check ----------------------------------------------------------------------------------------------


class Sideways(nn.Module):
    """Calls a layer in a way that no forward shows."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.hidden = [lambda x, body=self.body: body[1](x)]

    def forward(self, x):
        return self.body(x)


def test_inputs_that_do_not_agree_raise():
    model = shaken(Sideways())
    x = torch.randn(2, 4, 3, 3)
    st.fold(model, inputs=(x,))
    with pytest.raises(st.SurgeryError, match="differs from the model by"):
        st.fold(model, inputs=x, tolerance=0.0)
    broken = shaken(unit(4, 4, 1))
    broken[0].weight.data[0] = float("nan")
    assert st.changes(st.fold(broken, inputs=x))[-1].error < 1e-5


def test_a_pattern_that_matches_nothing_and_wrapped_models_are_refused():
    model = unit(4, 4, 3)
    with pytest.raises(ValueError, match="matches no site"):
        st.fold(model, where="layer9*")
    with pytest.raises(TypeError):
        st.fold("model")
    with pytest.warns(st.NoEffectWarning, match="nothing that can be folded"):
        st.fold(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
