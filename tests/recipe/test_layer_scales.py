"""Layer scales: against the published algorithm written out, against finite differences, and as surgery."""

from __future__ import annotations

import copy
import math
import pickle
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

from sparsetweaks.errors import SurgeryError
from sparsetweaks.masks import apply_masks, find_masks
from sparsetweaks.recipe import layer_scales
from sparsetweaks.recipe.labels import SoftLabelLoss
from sparsetweaks.recipe.layer_scales import LayerScales, find_layer_scales, learn_layer_scales, scale_layers

CLASSES = 4
QUICK = {"iterations": 3}


def small_network(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
            nn.Conv2d(6, 5, 3, stride=2, bias=False),
            nn.BatchNorm2d(5),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Flatten(),
            nn.Linear(5 * 9, CLASSES),
        )
        for name in ("1.weight", "1.bias", "4.weight", "4.bias"):
            nn.init.uniform_(model.get_parameter(name), 0.5, 1.5)
    return model.to(dtype)


def pairs(count: int, size: int = 6, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[tuple]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 3, 8, 8, generator=generator).to(dtype),
            torch.randint(CLASSES, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def masked_network(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = small_network(seed, dtype)
    generator = torch.Generator().manual_seed(seed)
    masks = {
        name: torch.rand(model.get_parameter(name).shape, generator=generator) > 0.6
        for name in ("0.weight", "3.weight")
    }
    return apply_masks(model, masks)


def assert_same(one: nn.Module, other: nn.Module) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert list(first) == list(second)
    for name in first:
        assert torch.equal(first[name], second[name]), name


# ----------------------------------------------------------------------------------------------------
# The published algorithm, written out plainly: the step detached, the second-order graph built all the same.


class PlainScaleAdam:
    """Adam on one number per tensor, with the gradient's two sources sharing the second moment."""

    def __init__(self, parameters: dict[str, nn.Parameter], lr: float, floor: float, clip: float) -> None:
        self.parameters, self.lr, self.floor, self.clip = parameters, lr, floor, clip
        self.alpha = dict.fromkeys(parameters, 1.0)
        self.norm = {name: p.norm().item() for name, p in parameters.items()}
        self.first = {name: [0.0, 0.0] for name in parameters}
        self.second = dict.fromkeys(parameters, 0.0)
        self.count = {name: [0, 0] for name in parameters}

    @torch.no_grad()
    def step(self, kind: int) -> None:
        for name, p in self.parameters.items():
            now = p.norm().item()
            if self.norm[name] == 0 or now == 0:
                continue
            slope = torch.sum(p.grad * p).item() * self.norm[name] / now
            slope = max(min(slope, self.clip), -self.clip)
            self.count[name][kind] += 1
            self.first[name][kind] = 0.9 * self.first[name][kind] + slope * (1 - 0.9)
            self.second[name] = 0.999 * self.second[name] + slope * slope * (1 - 0.999)
            rate = self.lr / (1 - 0.9 ** self.count[name][kind])
            root = math.sqrt(self.second[name] / (1 - 0.999 ** sum(self.count[name]))) + 1e-8
            floor = 0 if "bias" in name else self.floor
            self.alpha[name] = max(self.alpha[name] - rate * self.first[name][kind] / root, floor)
            p.mul_(self.alpha[name] * self.norm[name] / now)


def published(
    model,
    batches,
    *,
    iterations,
    scale_lr=1e-2,
    step_size=0.1,
    gamma=1.0,
    floor=0.01,
    gradient_clip=1.0,
    algorithm="sgd",
    normalize=True,
    overlap=0.5,
):
    net = copy.deepcopy(model).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.training, module.track_running_stats = True, False
    parameters = dict(net.named_parameters())
    adam = PlainScaleAdam(parameters, scale_lr, floor, gradient_clip)
    drawn, bounded = 0, 0

    def draw():
        nonlocal drawn
        drawn += 1
        return batches[(drawn - 1) % len(batches)]

    for _ in range(iterations):
        (x0, y0), (x1, y1) = draw(), draw()
        loss = F.cross_entropy(net(torch.cat([x0, x1])), torch.cat([y0, y1]))
        grads = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
        if algorithm == "adam":
            norm = sum(g.abs().sum() for g in grads)
            direction = [g.sign() for g in grads]
        else:
            norm = sum(g.square().sum() for g in grads).sqrt()
            direction = [g / norm for g in grads] if normalize else grads
        net.zero_grad()
        if norm.item() > gamma:
            norm.backward()
            adam.step(1)
            bounded += 1
            continue
        x2, y2 = draw()
        if overlap == 0:
            x0, y0 = draw()
        ahead = {
            n: p - (step_size * d).detach() for (n, p), d in zip(parameters.items(), direction, strict=True)
        }
        output = functional_call(net, ahead, (torch.cat([x0, x2]),))
        (F.cross_entropy(output, torch.cat([y0, y2])) / step_size).backward()
        adam.step(0)
    return net, adam.alpha, bounded


def assert_equals_published(model: nn.Module, batches: list, **options) -> int:
    expected, alpha, bounded = published(model, batches, **options)
    assert_same_parameters(learn_layer_scales(model, batches, **options), expected)
    found = find_layer_scales(model, batches, **options)
    for name, scale in found.scales.items():
        assert scale == alpha[name]
    assert sum(norm > options["gamma"] for norm in found.gradient_norms) == bounded
    assert sum(math.isnan(loss) for loss in found.look_ahead_losses) == bounded
    return bounded


def assert_same_parameters(one: nn.Module, other: nn.Module) -> None:
    expected = dict(other.named_parameters())
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, expected[name]), name


@pytest.mark.parametrize(
    "options",
    [
        {"gamma": math.inf},
        {"gamma": math.inf, "overlap": 0},
        {"gamma": math.inf, "normalize": False, "step_size": 0.5},
        {"gamma": math.inf, "algorithm": "adam", "step_size": 1e-3},
        {"gamma": math.inf, "gradient_clip": 1e-3, "scale_lr": 0.3, "floor": 0.5},
    ],
    ids=str,
)
def test_order_1_equals_the_published_code(options):
    assert assert_equals_published(small_network(), pairs(7), iterations=12, **options) == 0


@pytest.mark.parametrize("options", [{}, {"algorithm": "adam", "step_size": 1e-3}, {"overlap": 0}], ids=str)
def test_order_1_equals_the_published_code_where_the_gradient_is_bounded(options):
    model, batches = small_network(), pairs(7)
    norms = find_layer_scales(model, batches, iterations=12, gamma=math.inf, **options).gradient_norms
    gamma = sorted(norms)[6]
    assert 0 < assert_equals_published(model, batches, iterations=12, gamma=gamma, **options) < 12


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    count=st.integers(1, 5),
    scale_lr=st.floats(1e-3, 0.5),
    step_size=st.floats(1e-2, 1.0),
    gamma=st.floats(0.3, 3.0),
    normalize=st.booleans(),
)
def test_order_1_equals_the_published_code_on_random_networks(seed, count, **options):
    assert_equals_published(small_network(seed), pairs(count, size=4, seed=seed), iterations=4, **options)


# ----------------------------------------------------------------------------------------------------
# The true objective


def network_without_kinks(masked: bool) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, CLASSES)
        ).double()
    return (
        apply_masks(
            model, {"0.weight": torch.rand(4, 3, 3, 3, generator=torch.Generator().manual_seed(2)) > 0.5}
        )
        if masked
        else model
    )


def objective(model: nn.Module, batch: tuple, **options) -> float:
    found = find_layer_scales(model, batch, iterations=1, gamma=math.inf, **options)
    return found.look_ahead_losses[0] / options["step_size"]


def slopes(model: nn.Module, batch: tuple, monkeypatch, **options) -> dict[str, float]:
    """The derivative by each scale, as it reaches the scales' Adam in the first iteration."""
    seen: dict[int, float] = {}
    update = layer_scales._Scale.update

    def record(self, slope, **keywords):
        seen.setdefault(id(self), slope)
        update(self, slope, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(layer_scales._Scale, "update", record)
        found = find_layer_scales(model, batch, iterations=1, gradient_clip=math.inf, **options)
    return dict(zip(found.scales, seen.values(), strict=True))


def central_difference(model: nn.Module, name: str, value, width: float = 1e-3) -> float:
    """To the fourth order in the width."""

    def at(scale):
        return value(scale_layers(model, {name: scale}))

    near = at(1 + width) - at(1 - width)
    far = at(1 + 2 * width) - at(1 - 2 * width)
    return (8 * near - far) / (12 * width)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("normalize", [True, False])
def test_order_2_is_the_true_gradient(masked, normalize, monkeypatch):
    model, (batch,) = network_without_kinks(masked), pairs(1, dtype=torch.float64)
    options = {"step_size": 0.1, "normalize": normalize}
    second = slopes(model, batch, monkeypatch, gamma=math.inf, order=2, **options)
    first = slopes(model, batch, monkeypatch, gamma=math.inf, order=1, **options)
    for name in second:
        true = central_difference(model, name, lambda m: objective(m, batch, **options))
        assert second[name] == pytest.approx(true, rel=1e-8, abs=1e-8), name
    assert max(abs(first[n] - second[n]) / abs(second[n]) for n in ("0.weight", "4.weight")) > 1e-3


@pytest.mark.parametrize("algorithm", ["sgd", "adam"])
@pytest.mark.parametrize("order", [1, 2])
def test_the_bound_on_the_gradient_is_differentiated_exactly(order, algorithm, monkeypatch):
    model, (batch,) = network_without_kinks(True), pairs(1, dtype=torch.float64)

    def norm(scaled):
        return find_layer_scales(scaled, batch, iterations=1, algorithm=algorithm).gradient_norms[0]

    found = slopes(model, batch, monkeypatch, gamma=1e-6, order=order, algorithm=algorithm)
    for name, slope in found.items():
        true = central_difference(
            model, name, norm, width=1e-3 if algorithm == "sgd" else 1e-6
        )  # |g| has kinks
        assert slope == pytest.approx(true, rel=1e-8 if algorithm == "sgd" else 1e-6, abs=1e-8), name


def test_orders_differ_where_the_step_matters_and_agree_for_adam():
    model, batches = masked_network(), pairs(6)
    options = {"iterations": 8, "gamma": math.inf, "step_size": 0.5}
    assert find_layer_scales(model, batches, **options) != find_layer_scales(
        model, batches, order=2, **options
    )
    options |= {"algorithm": "adam", "step_size": 1e-3}  # the derivative of a sign is zero
    first = find_layer_scales(model, batches, **options)
    second = find_layer_scales(model, batches, order=2, **options)
    assert first.scales == pytest.approx(second.scales, rel=1e-5)


@pytest.mark.parametrize("order", [1, 2])
def test_learning_lowers_the_objective(order):
    model, (batch,) = masked_network(), pairs(1, size=16)
    found = find_layer_scales(model, batch, order=order, iterations=25, gamma=math.inf, scale_lr=0.05)
    assert found.look_ahead_losses[-1] < 0.9 * found.look_ahead_losses[0]


def test_the_bound_lowers_the_gradient():
    model, (batch,) = masked_network(), pairs(1, size=16)
    found = find_layer_scales(model, batch, iterations=25, gamma=0.1, scale_lr=0.05)
    assert found.gradient_norms[-1] < 0.7 * found.gradient_norms[0]


# ----------------------------------------------------------------------------------------------------
# Neutral settings, and what stays as it was


def test_no_iterations_and_scales_of_one_change_no_bit():
    model = masked_network()
    found = find_layer_scales(model, pairs(1)[0], iterations=0)
    assert found == LayerScales(dict.fromkeys(found.scales, 1.0), (), (), ())
    assert_same(learn_layer_scales(model, pairs(1)[0], iterations=0), model)
    assert_same(scale_layers(model, found.scales), model)


def test_learn_is_find_then_scale_up_to_rounding():
    model, batches = masked_network(), pairs(5)
    once = scale_layers(model, find_layer_scales(model, batches, iterations=20).scales)
    learned = learn_layer_scales(model, batches, iterations=20)
    torch.testing.assert_close(once.state_dict(), learned.state_dict(), rtol=1e-5, atol=0)


@settings(max_examples=15, deadline=None)
@given(factors=st.lists(st.floats(0, 100), min_size=3, max_size=3), seed=st.integers(0, 100))
def test_scale_layers_multiplies_the_named_and_nothing_else(factors, seed):
    model = masked_network(seed)
    scales = dict(zip(["0.weight", "4.bias", "8.weight"], factors, strict=True))
    scaled = scale_layers(model, scales).state_dict()
    for name, value in model.state_dict().items():
        expected = value * scales[name] if name in scales else value
        assert torch.equal(scaled[name], expected), name


class Recorder:
    def __init__(self):
        self.calls = 0

    def __call__(self, *_):
        self.calls += 1


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_given_model_and_the_rng_are_untouched(order, fails, training):
    model, batches = masked_network().train(training), pairs(4)
    model[6].train(not training)
    model[8].bias.requires_grad_(False)
    model[0].register_forward_hook(Recorder())
    F.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
    if fails:
        batches[2] = (batches[2][0] * math.nan, batches[2][1])
    before, grads = (
        copy.deepcopy(model.state_dict()),
        {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
    )
    modes = [m.training for m in model.modules()]
    versions = [p._version for p in model.parameters()]
    inputs = [x.clone() for x, _ in batches]
    rng = torch.get_rng_state()
    loader = torch.utils.data.DataLoader(batches, batch_size=None, shuffle=True)
    if fails:
        with pytest.raises(SurgeryError, match="inputs are not finite"):
            learn_layer_scales(model, loader, order=order, **QUICK)
    else:
        learned = learn_layer_scales(model, loader, order=order, **QUICK)
        assert [m.training for m in learned.modules()] == modes
        assert [p.requires_grad for p in learned.parameters()] == [
            p.requires_grad for p in model.parameters()
        ]
        assert learned[1].track_running_stats
        assert len(learned[0]._forward_hooks) == 1
        assert all(p.grad is None for p in learned.parameters())
        pickle.loads(pickle.dumps(copy.deepcopy(learned)))
    assert torch.equal(torch.get_rng_state(), rng)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert [m.training for m in model.modules()] == modes
    assert [p._version for p in model.parameters()] == versions
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(grads)
    assert all(torch.equal(model.get_parameter(n).grad, g) for n, g in grads.items())
    for (x, _), value in zip(batches, inputs, strict=True):
        assert torch.equal(x, value) or fails


def test_statistics_and_buffers_of_the_result_are_the_given_ones():
    model = masked_network()
    learned = learn_layer_scales(model, pairs(5), **QUICK)
    parameters = set(dict(model.named_parameters()))
    for name, value in model.state_dict().items():
        if name not in parameters:
            assert torch.equal(learned.state_dict()[name], value), name


def test_a_model_that_works_in_place_does_not_reach_the_batch():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(3 * 64, CLASSES))
    batch = pairs(1)[0]
    before = batch[0].clone()
    learn_layer_scales(model, batch, **QUICK)
    assert torch.equal(batch[0], before)


def test_it_works_inside_no_grad():
    batches = pairs(4)
    with torch.no_grad():
        inside = learn_layer_scales(masked_network(), batches, **QUICK)
    assert_same(inside, learn_layer_scales(masked_network(), batches, **QUICK))


def test_the_models_mode_makes_no_difference():
    batches = pairs(4)
    assert_same(
        learn_layer_scales(masked_network().train(), batches, **QUICK),
        learn_layer_scales(masked_network().eval(), batches, **QUICK),
    )


# ----------------------------------------------------------------------------------------------------
# Masks


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("gamma", [0.1, math.inf])
def test_zeros_stay_zero_and_masks_stay(order, gamma):
    model = masked_network()
    learned = learn_layer_scales(model, pairs(5), order=order, gamma=gamma, iterations=6)
    masks = find_masks(learned)
    assert set(masks) == {"0.weight", "3.weight"}
    for name, mask in masks.items():
        assert torch.equal(mask, find_masks(model)[name])
        weight = learned.get_parameter(name)
        assert (weight[~mask] == 0).all()
        assert (weight[mask] != model.get_parameter(name)[mask]).any()


def as_torch_prune(masked: nn.Module) -> nn.Module:
    """The same masked weights in the form of torch.nn.utils.prune, with other values beneath the mask."""
    model = copy.deepcopy(masked)
    for name, mask in find_masks(masked).items():
        module = model.get_submodule(name.rpartition(".")[0])
        del module.weight_mask
        with torch.no_grad():
            module.weight[~mask] = 7.0
        prune.custom_from_mask(module, "weight", mask.float())
    return model


class Mask(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight):
        return weight * self.mask


def as_parametrization(masked: nn.Module) -> nn.Module:
    model = copy.deepcopy(masked)
    for name, mask in find_masks(masked).items():
        module = model.get_submodule(name.rpartition(".")[0])
        del module.weight_mask
        parametrize.register_parametrization(module, "weight", Mask(mask))
    return model


@pytest.mark.parametrize("form", [as_torch_prune, as_parametrization])
@pytest.mark.parametrize("order", [1, 2])
def test_every_form_of_mask_learns_the_same_scales(form, order):
    ours, batches = masked_network(), pairs(5)
    theirs = form(ours).eval()  # a forward: torch's prune then holds weights that are not leaves
    theirs(batches[0][0])
    options = {"order": order, "iterations": 6}
    expected = find_layer_scales(ours, batches, **options).scales
    assert find_layer_scales(theirs, batches, **options).scales == pytest.approx(expected, rel=1e-4)
    learned, reference = (
        learn_layer_scales(theirs, batches, **options),
        learn_layer_scales(ours, batches, **options),
    )
    for layer in (0, 3):  # before any forward, so the plain `weight` of torch's prune must be up to date
        torch.testing.assert_close(learned[layer].weight, reference[layer].weight, rtol=1e-4, atol=1e-6)
    one = learned.eval()(batches[1][0])
    torch.testing.assert_close(one, reference.eval()(batches[1][0]), rtol=1e-3, atol=1e-4)


def test_the_step_leaves_pruned_weights_alone():
    """With everything pruned but one path, the objective must not see the pruned ones come back."""
    model = apply_masks(
        nn.Linear(2, 2, bias=False), {"weight": torch.tensor([[True, False], [False, False]])}
    )
    batch = torch.tensor([[1.0, 2.0], [0.5, -1.0]]), torch.tensor([0, 1])
    found = find_layer_scales(model, batch, iterations=1, gamma=math.inf, step_size=0.3)
    (grad,) = torch.autograd.grad(F.cross_entropy(model(batch[0]), batch[1]), model.weight)
    kept = grad[0, 0]
    ahead = torch.zeros(2, 2)
    ahead[0, 0] = model.weight[0, 0].detach() - 0.3 * kept.sign()
    assert found.gradient_norms[0] == pytest.approx(abs(kept.item()))
    assert found.look_ahead_losses[0] == pytest.approx(
        F.cross_entropy(F.linear(batch[0], ahead), batch[1]).item()
    )


def test_a_layer_without_survivors_has_no_scale():
    model = small_network()
    nn.init.zeros_(model[4].bias)
    masked = apply_masks(model, {"3.weight": torch.zeros_like(model[3].weight, dtype=torch.bool)})
    found = find_layer_scales(masked, pairs(3), **QUICK)
    assert "3.weight" not in found.scales
    assert "4.bias" not in found.scales
    assert "8.weight" in found.scales


# ----------------------------------------------------------------------------------------------------
# Which tensors


def test_frozen_parameters_are_not_scaled_and_not_stepped():
    model, batches = small_network(), pairs(5)
    model[3].weight.requires_grad_(False)
    found = find_layer_scales(model, batches, **QUICK)
    assert "3.weight" not in found.scales
    assert torch.equal(learn_layer_scales(model, batches, **QUICK)[3].weight, model[3].weight)
    assert find_layer_scales(small_network(), batches, **QUICK).gradient_norms[0] > found.gradient_norms[0]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(2, 2)
        self.second.weight = self.first.weight
        self.register_parameter("nothing", None)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def test_tied_tensors_are_scaled_once_and_stay_tied():
    model, batch = Tied(), (torch.randn(8, 6), torch.randint(6, (8,)))
    found = find_layer_scales(model, batch, **QUICK)
    assert "first.weight" in found.scales
    assert "second.weight" not in found.scales
    learned = learn_layer_scales(model, batch, **QUICK)
    assert learned.first.weight is learned.second.weight
    torch.testing.assert_close(learned.first.weight, model.first.weight * found.scales["first.weight"])


def test_a_mask_beside_the_second_name_of_a_tied_tensor_counts():
    mask = torch.rand(6, 6, generator=torch.Generator().manual_seed(0)) > 0.5
    batch = torch.randn(8, 6), torch.randint(6, (8,))
    first = apply_masks(Tied(), {"first.weight": mask})
    second = copy.deepcopy(first)
    del second.first.weight_mask
    second.second.register_buffer("weight_mask", mask)
    assert find_layer_scales(first, batch, **QUICK) == find_layer_scales(second, batch, **QUICK)


@pytest.mark.parametrize("order", [1, 2])
def test_uninvolved_parameters_keep_every_bit(order):
    model, batch = Tied(), (torch.randn(8, 6), torch.randint(6, (8,)))
    found = find_layer_scales(model, batch, order=order, **QUICK)
    assert found.scales["unused.weight"] == 1
    assert torch.equal(
        learn_layer_scales(model, batch, order=order, **QUICK).unused.weight, model.unused.weight
    )


def test_biases_may_vanish_and_weights_keep_to_the_floor():
    model = small_network()
    found = find_layer_scales(model, pairs(3), iterations=8, scale_lr=1.0, floor=0.25)
    weights = [scale for name, scale in found.scales.items() if name.endswith("weight")]
    biases = [scale for name, scale in found.scales.items() if name.endswith("bias")]
    assert min(weights) >= 0.25
    assert 0 <= min(biases) < 0.25
    scale_layers(model, found.scales)


# ----------------------------------------------------------------------------------------------------
# Precisions and layouts


def test_bfloat16_learns_in_float32():
    half, full = masked_network(dtype=torch.bfloat16), masked_network(dtype=torch.bfloat16).float()
    batches = [(x.bfloat16(), y) for x, y in pairs(5)]
    wide = [(x.float(), y) for x, y in batches]
    assert find_layer_scales(half, batches, **QUICK) == find_layer_scales(full, wide, **QUICK)
    learned = learn_layer_scales(half, batches, **QUICK)
    assert {p.dtype for p in learned.parameters()} == {torch.bfloat16}
    assert_same(learned, learn_layer_scales(full, wide, **QUICK).bfloat16())


def test_channels_last():
    model, batches = masked_network(), pairs(5)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    wide = [(x.to(memory_format=torch.channels_last), y) for x, y in batches]
    learned = learn_layer_scales(last, wide, **QUICK)
    assert learned[0].weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(learned.state_dict(), learn_layer_scales(model, batches, **QUICK).state_dict())


@pytest.mark.parametrize("order", [1, 2])
def test_autocast_sees_every_change_of_the_weights(order):
    model, batches = masked_network(), pairs(5)
    options = {"order": order, "iterations": 5, "scale_lr": 0.1, "step_size": 0.5, "gamma": math.inf}
    full = find_layer_scales(model, batches, **options)
    with torch.autocast("cpu", torch.bfloat16):  # it caches the weights as it cast them
        mixed = find_layer_scales(model, batches, **options)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        assert find_layer_scales(model, batches, **options) == mixed
    assert mixed != full
    assert mixed.look_ahead_losses == pytest.approx(full.look_ahead_losses, rel=0.05)


@pytest.mark.parametrize("options", [{"order": 2}, {"gamma": 1e-3}], ids=str)
def test_attention_can_be_differentiated_twice(options):
    model = nn.Sequential(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten(), nn.Linear(40, 3)
    )
    batch = torch.randn(4, 5, 8), torch.randint(3, (4,))
    found = find_layer_scales(model, batch, **QUICK, **options)
    assert found.scales["0.self_attn.in_proj_weight"] != 1


# ----------------------------------------------------------------------------------------------------
# Batches, outputs and losses


def test_one_pair_is_used_whole():
    model, (batch,) = small_network(), pairs(1)
    found = find_layer_scales(model, batch, iterations=1, gamma=math.inf)
    net = copy.deepcopy(model).train()
    net[6].eval()
    assert found.losses[0] == pytest.approx(F.cross_entropy(net(batch[0]), batch[1]).item())


@pytest.mark.parametrize(("overlap", "draws"), [(0, 4), (0.5, 3), (1, 2)])
def test_overlap_decides_how_many_batches_an_iteration_draws(overlap, draws):
    drawn = []

    def stream():
        for index, pair in enumerate(pairs(40)):
            drawn.append(index)
            yield pair

    find_layer_scales(small_network(), stream(), iterations=3, gamma=math.inf, overlap=overlap)
    assert len(drawn) == 3 * draws


def test_a_list_is_cycled_and_a_generator_that_ends_says_so():
    model, batches = small_network(), pairs(4)
    options = {"iterations": 4, "gamma": math.inf}
    assert find_layer_scales(model, batches, **options) == find_layer_scales(model, batches * 3, **options)
    with pytest.raises(SurgeryError, match="ended after 4 pairs and cannot be iterated again"):
        find_layer_scales(model, iter(batches), **options)


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, CLASSES)

    def forward(self, image, scale):
        return {"logits": self.inner(image) * scale}


@pytest.mark.parametrize("kind", [dict, tuple])
def test_models_of_several_inputs_that_return_a_dict(kind):
    image, scale, labels = torch.randn(6, 3), torch.rand(6, 1), torch.randint(CLASSES, (6,))
    inputs = {"image": image, "scale": scale} if kind is dict else (image, scale)
    model = Named()
    loss = lambda output, targets: SoftLabelLoss()(output["logits"], targets)
    one = learn_layer_scales(model, (inputs, labels), loss=loss, **QUICK)
    many = find_layer_scales(model, [(inputs, labels)] * 2, loss=loss, **QUICK)
    assert not torch.equal(one.inner.weight, model.inner.weight)
    assert len(many.losses) == 3
    with pytest.raises(SurgeryError, match="pass loss="):
        learn_layer_scales(model, (inputs, labels), **QUICK)


# ----------------------------------------------------------------------------------------------------
# Bad input


class Poison(nn.Module):
    def forward(self, x):
        return x / 0 if x.shape[0] > 0 else x


def test_a_loss_that_is_not_finite_names_the_layer():
    model = small_network()
    model.insert(4, Poison())
    with pytest.raises(
        SurgeryError, match=r"before the step: first at fault is the output of layer '4' \(Poison\)"
    ):
        learn_layer_scales(model, pairs(1)[0])


def test_a_weight_that_is_not_finite_is_named():
    model = small_network()
    with torch.no_grad():
        model[3].weight[0] = math.nan
    with pytest.raises(SurgeryError, match=r"layer '3' \(Conv2d\), whose weight is not finite"):
        learn_layer_scales(model, pairs(1)[0])


def test_a_step_that_overshoots_says_so():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Linear(8, CLASSES))
    with pytest.raises(
        SurgeryError, match=r"after the step that is looked ahead to: .*layer '[12]' \(Linear\)"
    ):
        learn_layer_scales(model, pairs(1)[0], step_size=1e30, gamma=math.inf)


def test_a_loss_function_at_fault_is_named():
    with pytest.raises(SurgeryError, match="it is the loss function"):
        learn_layer_scales(small_network(), pairs(1)[0], loss=lambda output, _: output.mean() * math.inf)


def test_a_gradient_that_is_not_finite_is_named():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES))
    with pytest.raises(SurgeryError, match=r"gradient is not finite.*1\.bias"):
        learn_layer_scales(model, pairs(1)[0], loss=lambda output, _: (output - output).sum().sqrt())


def test_a_gradient_that_is_zero_everywhere_raises():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES))
    with pytest.raises(SurgeryError, match="zero everywhere"):
        learn_layer_scales(model, pairs(1)[0], loss=lambda output, _: output.sum() * 0)


X, Y = pairs(1)[0]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (X, "got a Tensor"),
        ({"inputs": X, "targets": Y}, "got a dict"),
        (7, "got a int"),
        ([], "batch is empty"),
        ([X, Y, X], "each batch must be a pair"),
        ([(X, Y, Y)], "each batch must be a pair"),
        ((X[:0], Y[:0]), "at least one sample"),
        ((X, Y + CLASSES), "out of range"),
        ((X, Y[:3]), "need class labels"),
        ((X, Y.float()), "class labels must be integers"),
        ((X.to("meta"), Y), "is on meta but the model on cpu"),
        ((None, None), "holds no tensor"),
    ],
)
def test_bad_batches(batch, message):
    with pytest.raises(ValueError, match=message):
        learn_layer_scales(small_network(), batch, **QUICK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 3}, "order must be"),
        ({"iterations": -1}, "iterations"),
        ({"iterations": 1.5}, "iterations"),
        ({"scale_lr": 0}, "scale_lr"),
        ({"step_size": math.nan}, "step_size"),
        ({"gamma": 0}, "gamma"),
        ({"floor": -1}, "floor"),
        ({"gradient_clip": -1}, "gradient_clip"),
        ({"algorithm": "lion"}, "choose 'sgd' or 'adam'"),
        ({"overlap": 0.3}, "overlap"),
        ({"loss": lambda output, _: output}, "scalar"),
        ({"loss": lambda output, _: 3.0}, "scalar"),
        ({"loss": lambda output, _: output.sum().detach()}, "does not depend"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else value,
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        learn_layer_scales(small_network(), (X, Y), **{**QUICK, **options})


def test_a_model_without_trainable_parameters():
    for model in (nn.ReLU(), nn.Linear(2, 2).requires_grad_(False)):
        with pytest.raises(SurgeryError, match="no trainable parameter"):
            learn_layer_scales(model, (X, Y))


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ({"9.weight": 1.0}, "no parameter '9.weight' of real numbers: it has 0.weight, 1.bias"),
        ({"0.weight": -1.0}, "0.weight must be finite and not negative"),
        ({"0.weight": math.nan}, "0.weight must be finite"),
        ({"0.weight": math.inf}, "0.weight must be finite"),
    ],
)
def test_bad_scales(scales, message):
    with pytest.raises(ValueError, match=message):
        scale_layers(small_network(), scales)


def test_batches_of_named_tuples_and_of_nothing_are_joined_as_they_are() -> None:
    class Targets(NamedTuple):
        labels: torch.Tensor
        weights: None

    def loss(output: torch.Tensor, targets: Targets) -> torch.Tensor:
        assert targets.weights is None
        return torch.nn.functional.cross_entropy(output, targets.labels)

    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    batches = [(torch.randn(6, 4), Targets(torch.randint(3, (6,)), None)) for _ in range(2)]
    scaled = learn_layer_scales(model, batches, loss=loss, iterations=2)
    assert not torch.equal(scaled[0].weight, model[0].weight)


def test_complex_weights_are_refused_by_name():
    model = nn.Linear(4, 3, dtype=torch.complex64)
    batch = (torch.randn(8, 4, dtype=torch.complex64), torch.randint(3, (8,)))
    with pytest.raises(SurgeryError, match="'weight' is complex"):
        find_layer_scales(model, batch, iterations=1, loss=lambda output, targets: output.abs().mean())
    with pytest.raises(ValueError, match="no parameter 'weight' of real numbers"):
        scale_layers(model, {"weight": 2.0})


def test_a_tied_weight_is_scaled_under_either_name_and_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    scaled = scale_layers(model, {"1.weight": 2.0})
    assert torch.equal(scaled[0].weight, 2 * model[0].weight)
    assert scaled[1].weight is scaled[0].weight
    with pytest.raises(ValueError, match="of one tied weight"):
        scale_layers(model, {"0.weight": 2.0, "1.weight": 2.0})


def test_a_parameter_may_be_called_original():
    model = nn.Module()
    model.original = nn.Parameter(torch.ones(2))
    assert scale_layers(model, {"original": 3.0}).original.tolist() == [3, 3]


def test_integer_targets_of_any_width_do_where_no_loss_is_given():
    inputs, targets = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    narrow, wide = (
        find_layer_scales(model, (inputs, t), iterations=2).scales for t in (targets.int(), targets)
    )
    assert narrow == wide
    with pytest.raises(SurgeryError, match=r"the model returned \(5,\): pass loss="):
        find_layer_scales(nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)), (inputs, targets), iterations=1)
