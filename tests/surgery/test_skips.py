"""Skips: where they go, what they add, and that they are what they say."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import sparsetweaks as st
from sparsetweaks.surgery.skips import PROJECTION_INIT, match_channels


def unit(*args, norm: bool = True, **kwargs) -> nn.Sequential:
    conv = nn.Conv2d(*args, **kwargs)
    return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels) if norm else nn.Identity(), nn.ReLU())


def images(channels: int = 4, size: int = 9) -> torch.Tensor:
    return torch.randn(2, channels, size, size)


def test_an_identity_skip_is_input_plus_output():
    model, x = unit(4, 4, 3, padding=1), images()
    skipped = st.inject_skips(model, strength=0.5)
    torch.testing.assert_close(skipped(x), F.relu(model[1](model[0](x)) + 0.5 * x))
    assert len(list(skipped.parameters())) == len(list(model.parameters()))


@pytest.mark.parametrize("size", [7, 8, 9, 12])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": 1, "stride": 2},
        {"kernel_size": 7, "stride": 2, "padding": 3},
        {"kernel_size": 4, "stride": 4},
        {"kernel_size": 3},
        {"kernel_size": 3, "dilation": 2, "padding": 2},
        {"kernel_size": (1, 5), "stride": (1, 2), "padding": (0, 2)},
        {"kernel_size": 2},
        {"kernel_size": 3, "padding": "same", "dilation": 2},
        {"kernel_size": 3, "padding": "valid"},
    ],
    ids=str,
)
def test_a_shortcut_reads_the_positions_the_convolution_is_centred_on(options, size):
    """A convolution that copies its central input is what the shortcut must equal, whatever the geometry."""
    model = nn.Sequential(nn.Conv2d(4, 4, groups=4, bias=False, **options), nn.Identity(), nn.BatchNorm2d(4))
    model = nn.Sequential(model[0], model[2]).eval()
    kernel = model[0].weight.shape[2:]
    nn.init.zeros_(model[0].weight)
    model[0].weight.data[:, :, (kernel[0] - 1) // 2, (kernel[1] - 1) // 2] = 1
    x = images(size=size)
    centre = model[0](x)
    skip = st.inject_skips(model, strength=1.0)(x) - model(x)
    torch.testing.assert_close(skip, centre)


@pytest.mark.parametrize(("channels", "expected"), [(6, 6), (2, 2), (3, 3)])
def test_channels_are_padded_with_zeros_or_averaged(channels, expected):
    x = images(4)
    y = match_channels(x, channels, 2)
    assert y.shape == (2, expected, 9, 9)
    if channels == 6:
        assert torch.equal(y[:, :4], x)
        assert not y[:, 4:].any()
    if channels == 2:
        torch.testing.assert_close(y, torch.stack([x[:, :2].mean(1), x[:, 2:].mean(1)], 1))
    torch.testing.assert_close(y[0], match_channels(x[0], channels, 2))  # without a batch dimension


def test_learned_strength_starts_at_zero_and_gets_a_gradient():
    model, x = unit(4, 4, 3, padding=1), images()
    skipped = st.inject_skips(model)
    assert torch.equal(skipped(x), model(x))
    skipped(x).square().sum().backward()
    (name, strength) = next((n, p) for n, p in skipped.named_parameters() if "skip" in n)
    assert name == "0.skip.strength"
    assert strength.item() == 0
    assert strength.grad.item() != 0


def test_projection_and_its_initialisation_follow_the_authors():
    model = unit(4, 8, 3, stride=2, padding=1)
    rng = torch.random.get_rng_state()
    skipped = st.inject_skips(model, shortcut="projection", strength=1.0)
    assert torch.equal(torch.random.get_rng_state(), rng)
    weight = skipped[0].skip.projection.weight
    assert weight.shape == (8, 4, 1, 1)
    assert (weight == PROJECTION_INIT).all()
    assert isinstance(skipped[0].skip.norm, nn.BatchNorm2d)
    assert skipped(images()).shape == model(images()).shape
    same = unit(4, 4, 3, padding=1)
    assert st.inject_skips(same, shortcut="projection")[0].skip.projection is None
    assert st.inject_skips(same, shortcut="project-all")[0].skip.projection is not None


def test_norm_gives_the_skip_a_batchnorm_of_its_own():
    model, x = unit(4, 4, 3, padding=1), images()
    skipped = st.inject_skips(model, norm=True, strength=1.0)
    expected = F.relu(model[1](model[0](x)) + F.batch_norm(x, None, None, training=True))
    torch.testing.assert_close(skipped(x), expected)
    assert sum(p.numel() for p in skipped[0].skip.parameters()) == 8


def test_what_a_skip_adds_is_counted():
    model = st.prune(unit(4, 8, 3, padding=1), 0.5, include="*")
    report = st.sparsity(st.inject_skips(model, shortcut="projection", strength=1.0))
    assert report.added_parameters == 4 * 8 + 2 * 8


class Residual(nn.Module):
    def __init__(self, span: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.identity = nn.Identity()
        self.span = span

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        z = self.bn2(self.conv2(y))
        z += self.identity(x) if self.span == 2 else self.identity(y)
        return torch.relu(z)


def test_a_residual_that_spans_exactly_the_unit_is_not_doubled():
    assert [site.left for site in st.find_skip_sites(Residual(2))] == [None, None]
    sites = st.find_skip_sites(Residual(1))
    assert [site.left for site in sites] == [None, "a residual already spans exactly this unit"]
    model, x = Residual(1), images()
    skipped = st.inject_skips(model, strength=1.0)
    y = torch.relu(model.bn1(model.conv1(x)) + x)
    torch.testing.assert_close(skipped(x), torch.relu(model.bn2(model.conv2(y)) + y))


def test_a_second_injection_finds_the_skips_that_are_there():
    skipped = st.inject_skips(Residual(2), where="conv1")
    assert [site.left for site in st.find_skip_sites(skipped)] == ["it already has a skip", None]
    both = st.inject_skips(skipped)
    with pytest.warns(st.NoEffectWarning, match="already has a skip"):
        st.inject_skips(both)


class Reasons(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.up_norm = nn.ConvTranspose2d(4, 4, 3), nn.BatchNorm2d(4)
        self.wide, self.wide_norm = nn.Conv2d(4, 4, 1, padding=2), nn.BatchNorm2d(4)
        self.own, self.own_norm = OwnGeometry(4, 4, 3), nn.BatchNorm2d(4)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        x = self.own_norm(self.own(self.wide_norm(self.wide(self.up_norm(self.up(x))))))
        return self.head(x)


class OwnGeometry(nn.Conv2d):
    def forward(self, x):
        return super().forward(F.pad(x, (1, 1, 1, 1)))


def test_units_that_cannot_have_a_skip_are_named_and_heads_are_no_units():
    reasons = {site.name: site.left for site in st.find_skip_sites(Reasons())}
    assert reasons == {
        "up": "it is a transposed convolution",
        "wide": "it pads by more than its kernel covers",
        "own": "OwnGeometry computes its geometry in a forward of its own",
    }


def test_lazy_convolutions_are_left_with_advice():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.BatchNorm2d(4))
    with pytest.warns(st.NoEffectWarning, match="run a batch through"):
        st.inject_skips(model)


def test_a_convolution_without_a_norm_counts_if_an_activation_follows():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    assert [site.path for site in st.find_skip_sites(model)] == ["0"]


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_every_number_of_dimensions(rank):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1]
    model = nn.Sequential(conv(3, 6, 3, stride=2, padding=1), norm(6), nn.ReLU(), conv(6, 4, 3), norm(4))
    x = torch.randn(2, 3, *[9] * rank)
    for shortcut in ("pad", "projection"):
        assert st.inject_skips(model, shortcut=shortcut, strength=1.0)(x).shape == model(x).shape


def test_a_sequential_keeps_its_length_and_layers():
    model = unit(4, 4, 3, padding=1)
    skipped = st.inject_skips(model)
    assert len(skipped) == 3
    assert [type(m).__name__ for m in skipped] == ["Conv2d", "BatchNorm2d", "ReLU"]


def test_autocast_keeps_the_units_dtype():
    model, x = unit(4, 4, 3, padding=1), images()
    with torch.autocast("cpu", torch.bfloat16):
        for options in ({}, {"strength": 1.0}, {"norm": True}, {"shortcut": "project-all"}):
            assert st.inject_skips(model, **options)(x).dtype == model(x).dtype


def test_pruned_weights_stay_pruned_through_training_with_skips():
    model = st.prune(nn.Sequential(unit(4, 4, 3, padding=1), unit(4, 8, 3, padding=1)), 0.7)
    skipped = st.inject_skips(model)
    optimizer = torch.optim.SGD(skipped.parameters(), lr=0.1, momentum=0.9)
    with st.keep_masks(skipped, optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            skipped(images()).square().mean().backward()
            optimizer.step()
    for name, mask in st.find_masks(skipped).items():
        weight = skipped.get_parameter(name)
        assert not weight[~mask].any()
        assert weight[mask].all()
    assert skipped[0][0].skip.strength.item() != 0


def test_bad_options_are_named():
    model = unit(4, 4, 3, padding=1)
    with pytest.raises(ValueError, match="unknown shortcut 'pda'; known: pad,"):
        st.inject_skips(model, shortcut="pda")
    for strength in ("large", [], True):
        with pytest.raises(ValueError, match="a number or 'learned'"):
            st.inject_skips(model, strength=strength)
    with pytest.raises(ValueError, match="matches no site"):
        st.inject_skips(model, where="layer9*")


def test_editing_a_rewritten_sequential_is_refused_and_replacing_a_layer_works():
    model = nn.Sequential(*unit(4, 4, 3, padding=1), *unit(4, 4, 3, padding=1))
    skipped = st.inject_skips(model, strength=1.0)
    with pytest.raises(TypeError, match="slice it before the surgery"):
        skipped[:3]
    for edit in (
        lambda m: m.append(nn.ReLU()),
        lambda m: m.pop(0),
        lambda m: m.__delitem__(0),
        lambda m: m + m,
    ):
        with pytest.raises(TypeError, match="before the surgery"):
            edit(skipped)
    skipped[2] = nn.Tanh()
    x = images()
    assert torch.equal(skipped[2](x), torch.tanh(x))
    first = torch.tanh(model[1](model[0](x)) + x)
    torch.testing.assert_close(skipped(x), torch.relu(model[4](model[3](first)) + first))


def test_a_sequential_that_its_holder_may_slice_or_loop_over_is_left():
    class Slices(nn.Module):
        def __init__(self, slices: bool):
            super().__init__()
            self.body, self.slices = unit(4, 4, 3, padding=1), slices

        def forward(self, x):
            if self.slices:
                return self.body[:2](x)
            for layer in self.body:
                x = layer(x) if x.shape[0] else x
            return x

    reasons = [st.find_skip_sites(Slices(slices))[0].left for slices in (True, False)]
    assert reasons == ["the module that holds it may slice it", "the module that holds it may slice it"]


def test_what_the_authors_skips_add_at_97_percent_is_several_times_what_survives():
    with torch.random.fork_rng():
        model = st.prune(torchvision.models.resnet18(), 0.97)
    report = st.sparsity(st.inject_skips(model, shortcut="project-all", strength=1.0))
    assert 3.5 < report.added_parameters / sum(int(m.sum()) for m in st.find_masks(model).values()) < 4.5


def test_a_skip_of_its_own_and_a_shared_convolution_are_named():
    class Skipping(nn.Conv2d):
        skip = False

    own = nn.Sequential(Skipping(4, 4, 3, padding=1), nn.BatchNorm2d(4))
    assert "named skip of its own" in st.find_skip_sites(own)[0].left
    conv = nn.Conv2d(4, 4, 3, padding=1)
    shared = nn.Sequential(nn.Sequential(conv, nn.BatchNorm2d(4)), nn.Sequential(conv, nn.BatchNorm2d(4)))
    once = st.inject_skips(shared, where="0.*")
    assert [site.left for site in st.find_skip_sites(once)] == [
        "it already has a skip",
        "its layer already has a skip elsewhere",
    ]


def test_wrapped_models_and_strange_options_are_refused():
    model = unit(4, 4, 3, padding=1)
    with pytest.raises(TypeError, match="got str"):
        st.inject_skips("model")
    for options, message in (
        ({"strength": float("nan")}, "finite"),
        ({"norm": "bn"}, "True or False"),
        ({"where": 3}, "glob pattern"),
        ({"where": []}, "glob pattern"),
    ):
        with pytest.raises(ValueError, match=message):
            st.inject_skips(model, **options)


def test_rewritten_sequentials_are_found_again():
    skipped = st.inject_skips(unit(4, 4, 3, padding=1))
    assert [site.left for site in st.find_skip_sites(skipped)] == ["it already has a skip"]
    again = st.swap_activations(skipped, "mish")
    x = images()
    torch.testing.assert_close(again(x), F.mish(again[1](again[0](x))))


class QuickGELU(nn.Module):
    """An activation as other libraries write them."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class FeedForward(nn.Module):
    """The MLP of a Transformer block: a linear layer that an activation follows, and one that nothing follows."""

    def __init__(self, width: int, activation: nn.Module | None):
        super().__init__()
        self.up, self.down, self.activation = nn.Linear(6, width), nn.Linear(width, 6), activation

    def forward(self, x):
        hidden = self.up(x)
        hidden = F.gelu(hidden) if self.activation is None else self.activation(hidden)
        return x + self.down(hidden)


@pytest.mark.parametrize(
    "activation", [nn.GELU(), QuickGELU(), None], ids=["module", "of others", "function"]
)
@pytest.mark.parametrize("width", [3, 6, 8])
@pytest.mark.parametrize("shape", [(6,), (2, 6), (2, 5, 6), (2, 3, 5, 6)], ids=str)
def test_linear_units_get_skips_on_request(activation, width, shape):
    model, x = FeedForward(width, activation), torch.randn(shape)
    assert not st.find_skip_sites(model)
    (site,) = st.find_skip_sites(model, layers="linear")
    assert (site.path, site.kind) == ("up", "kept" if width == 6 else "changed")
    skipped = st.inject_skips(model, layers="linear", strength=0.5)
    kept = F.pad(x, (0, width - 6)) if width >= 6 else x.unflatten(-1, (width, -1)).mean(-1)
    hidden = model.up(x) + 0.5 * kept
    hidden = F.gelu(hidden) if activation is None else activation(hidden)
    torch.testing.assert_close(skipped(x), x + model.down(hidden))
    assert torch.equal(st.inject_skips(model, layers="linear")(x), model(x))


def test_a_linear_unit_ends_after_its_norm_and_projects_as_asked():
    model, x = (
        nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 2)),
        torch.randn(3, 5, 6),
    )
    projected = st.inject_skips(model, layers=["linear"], shortcut="projection", strength=1.0)
    skip = projected[0].skip
    assert isinstance(skip.projection, nn.Linear) and isinstance(skip.norm, nn.LayerNorm)
    expected = model[3](F.relu(model[1](model[0](x)) + skip.norm(skip.projection(x))))
    torch.testing.assert_close(projected(x), expected)
    same = st.inject_skips(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), layers="linear", norm=True)
    assert isinstance(same[0].skip.norm, nn.LayerNorm) and same[0].skip.projection is None


def test_both_kinds_of_layers_at_once_and_wrong_ones():
    model = nn.Sequential(*unit(4, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 81, 8), nn.ReLU())
    assert [site.path for site in st.find_skip_sites(model, layers=("conv", "linear"))] == ["0", "4"]
    skipped = st.inject_skips(model, layers=("conv", "linear"))
    x = images()
    assert torch.equal(skipped(x), model(x))
    for wrong in ("dense", (), ("conv", "dense")):
        with pytest.raises(ValueError, match="'conv', 'linear'"):
            st.find_skip_sites(model, layers=wrong)
        with pytest.raises(ValueError, match="'conv', 'linear'"):
            st.inject_skips(model, layers=wrong)
    with pytest.warns(st.NoEffectWarning, match="layers="):
        st.inject_skips(FeedForward(8, None))


def test_every_mlp_of_a_vision_transformer_gets_a_skip():
    model = torchvision.models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=3
    )
    skipped = st.inject_skips(st.prune(model, 0.5, layers="linear"), layers="linear")
    (change,) = st.changes(skipped)
    assert [site.path for site in change.rewritten] == [
        f"encoder.layers.encoder_layer_{i}.mlp.0" for i in (0, 1)
    ]
    assert sum(parameter.numel() for name, parameter in skipped.named_parameters() if "skip" in name) == 2
