"""Scores against oracles of their own: exact gradients and Hessians by torch.func, and closed formulas."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev
from torch.nn import functional as F
from torch.nn.utils import prune as torch_prune
from torch.utils.checkpoint import checkpoint

from sparsetweaks.errors import SurgeryError
from sparsetweaks.masks import find_masks
from sparsetweaks.prunable import prunable_weights
from sparsetweaks.pruning import prune
from sparsetweaks.scores import GRASP_TEMPERATURE, SynFlow, grasp_scores, snip_scores

METHODS = ["snip", "grasp", "synflow"]


def convolutional(norm: bool = True) -> nn.Sequential:
    """Two convolutions and a classifier in float64, small enough for its whole Hessian."""
    layers: list[nn.Module] = [nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 3), nn.Tanh()]
    if norm:
        layers.insert(1, nn.BatchNorm2d(3))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2 * 4, 3)).double()


def batch_of(count: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 2, 4, 4, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(3, (count,), generator=generator)


def oracle_loss(model: nn.Module, batch: tuple[Tensor, Tensor], temperature: float = 1.0) -> Callable:
    """The loss as a function of all parameters, BatchNorm by the batch, through nothing of the package."""
    model = copy.deepcopy(model).train()
    buffers = {name: b.clone() for name, b in model.named_buffers() if "_mask" not in name}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        output = functional_call(model, (parameters, {n: b.clone() for n, b in buffers.items()}), batch[0])
        return F.cross_entropy(output / temperature, batch[1])

    return loss


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def hessian_times_gradient(
    model: nn.Module, batch: tuple[Tensor, Tensor], temperature: float
) -> dict[str, Tensor]:
    """By the whole Hessian matrix, pruned parameters left out of the gradient."""
    loss, parameters, masks = oracle_loss(model, batch, temperature), parameters_of(model), find_masks(model)
    gradient = {name: g * masks.get(name, 1) for name, g in grad(loss)(parameters).items()}
    blocks = jacrev(grad(loss))(parameters)
    return {
        name: sum(
            (blocks[name][other].reshape(value.numel(), -1) @ gradient[other].flatten()).reshape(value.shape)
            for other in parameters
        )
        for name, value in parameters.items()
    }


# ---------------------------------------------------------------------------------------------------------- SNIP


def test_snip_is_the_absolute_product_of_weight_and_gradient() -> None:
    model, batch = convolutional(), batch_of()
    scores = snip_scores(model, prunable_weights(model), batch)
    parameters = parameters_of(model)
    gradient = grad(oracle_loss(model, batch))(parameters)
    assert list(scores) == ["0.weight", "3.weight"]
    for name, score in scores.items():
        torch.testing.assert_close(score, (parameters[name] * gradient[name]).abs())


def test_snip_equals_the_change_of_loss_that_a_connection_switch_makes() -> None:
    """The paper's own definition, by finite differences in c of weight * c (its equation 3)."""
    model, batch = convolutional(), batch_of()
    loss, parameters = oracle_loss(model, batch), parameters_of(model)
    scores = snip_scores(model, prunable_weights(model), batch)
    for index in [(0, 0, 0, 0), (2, 1, 2, 1)]:
        ends = []
        for sign in (1, -1):
            moved = {name: value.clone() for name, value in parameters.items()}
            moved["0.weight"][index] *= 1 + sign * 1e-5
            ends.append(loss(moved))
        assert float(scores["0.weight"][index]) == pytest.approx(
            abs(float(ends[0] - ends[1])) / 2e-5, rel=1e-5
        )


def test_snip_uses_the_statistics_of_the_batch_and_not_the_running_ones() -> None:
    model, batch = convolutional(), batch_of()
    expected = snip_scores(model, prunable_weights(model), batch)
    model[1].running_mean.fill_(3.0)
    model[1].running_var.fill_(9.0)
    for mode in (True, False):
        for name, score in snip_scores(model.train(mode), prunable_weights(model), batch).items():
            assert torch.equal(score, expected[name])


# --------------------------------------------------------------------------------------------------------- GraSP


@pytest.mark.parametrize("norm", [False, True])
def test_grasp_is_the_weight_times_hessian_times_gradient_at_its_temperature(norm: bool) -> None:
    model, batch = convolutional(norm), batch_of()
    scores = grasp_scores(model, prunable_weights(model), batch)
    products = hessian_times_gradient(model, batch, GRASP_TEMPERATURE)
    for name, score in scores.items():
        expected = model.get_parameter(name).detach() * products[name]
        assert expected.min() < 0 < expected.max()  # the sign is part of it
        torch.testing.assert_close(score, expected, rtol=1e-6, atol=0)


def test_grasp_keeps_the_weights_without_which_the_gradient_would_shrink() -> None:
    """Removing a bit of what is kept lowers the squared norm of the gradient; of what is pruned, raises it."""
    model, batch = convolutional(norm=False), batch_of()
    masks = find_masks(prune(model, 0.5, method="grasp", batch=batch))
    loss, parameters = oracle_loss(model, batch, GRASP_TEMPERATURE), parameters_of(model)

    def flow(values: dict[str, Tensor]) -> float:
        return float(sum(g.square().sum() for g in grad(loss)(values).values()))

    def without(part: dict[str, Tensor]) -> float:
        moved = {n: v * (1 - 1e-3 * part[n]) if n in part else v for n, v in parameters.items()}
        return flow(moved) - flow(parameters)

    assert without(masks) < 0 < without({name: ~mask for name, mask in masks.items()})


def test_grasp_of_a_masked_network_follows_the_gradient_that_is_left() -> None:
    model, batch = convolutional(norm=False), batch_of()
    masked = prune(model, 0.5)
    scores = grasp_scores(masked, prunable_weights(masked), batch)
    products = hessian_times_gradient(masked, batch, GRASP_TEMPERATURE)
    for name, score in scores.items():
        torch.testing.assert_close(
            score, masked.get_parameter(name).detach() * products[name], rtol=1e-6, atol=0
        )


# ------------------------------------------------------------------------------------------------- several batches


@pytest.mark.parametrize("score", [snip_scores, grasp_scores])
@pytest.mark.parametrize("sizes", [(1, 5), (2, 2, 2), (4, 1, 1)])
def test_several_batches_score_as_one(score: Callable, sizes: tuple[int, ...]) -> None:
    model, (inputs, targets) = convolutional(norm=False), batch_of()
    weights = prunable_weights(model)
    parts = zip(inputs.split(sizes), targets.split(sizes), strict=True)
    whole, split = score(model, weights, (inputs, targets)), score(model, weights, parts)
    for name, expected in whole.items():
        torch.testing.assert_close(split[name], expected, rtol=1e-9, atol=1e-18)


# -------------------------------------------------------------------------------------------------------- SynFlow


def test_synflow_of_a_linear_network_is_its_closed_formula() -> None:
    """R = 1^T |W2| |W1| 1, so a weight's score is |w| times what flows into it times what flows on from it."""
    model = nn.Sequential(
        nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 5, bias=False), nn.Linear(5, 2, bias=False)
    )
    first, second, third = (model[i].weight.detach().double().abs() for i in (0, 2, 3))
    weights = prunable_weights(model, include=["0", "2", "3"])
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    scores = SynFlow(model, weights, (torch.randn(7, 3), None)).scores(masks)
    into = [torch.ones(3), first.sum(1), second @ first.sum(1)]
    onward = [(third @ second).sum(0), third.sum(0), torch.ones(2)]
    for name, weight, i, o in zip(scores, (first, second, third), into, onward, strict=True):
        torch.testing.assert_close(scores[name], weight * i.double() * o.double()[:, None])
    flows = [float(score.sum()) for score in scores.values()]
    assert flows == pytest.approx([flows[0]] * 3)  # the conservation law of the paper, theorem 1


def test_synflow_passes_batchnorm_as_the_affine_map_that_it_is_before_training() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2), nn.ReLU6(), nn.Conv2d(2, 1, 1, bias=False)
    )
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([30.0, -40.0]).reshape(2, 1, 1, 1))
        model[1].weight.copy_(torch.tensor([-2.0, 3.0]))
        model[1].running_var.fill_(4.0 - model[1].eps)
        model[1].running_mean.fill_(100.0)
        model[3].weight.copy_(torch.tensor([5.0, 7.0]).reshape(1, 2, 1, 1))
    weights = prunable_weights(model, include=["0", "3"])
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    scores = SynFlow(model, weights, (torch.zeros(3, 1, 1, 1), None)).scores(masks)
    expected = torch.tensor([30 * 1.0 * 5, 40 * 1.5 * 7], dtype=torch.float64)
    for name in ("0.weight", "3.weight"):
        torch.testing.assert_close(scores[name].flatten(), expected, rtol=1e-6, atol=0)


class ChannelsLastLayerNorm(nn.LayerNorm):
    """As in torchvision's and timm's ConvNeXt: a LayerNorm by its class, over the channels of an image."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Called(nn.Module):
    """A function on parameters of its own, in place of a module of torch."""

    def __init__(self, function: Callable, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.values = nn.ParameterList(nn.Parameter(torch.rand(shape)) for shape in shapes)

    def forward(self, input: Tensor) -> Tensor:
        return self.function(input, *self.values)


# Width and channels are equal: a wrong dimension would broadcast without a word.
NORMS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm": lambda: nn.BatchNorm2d(4),
    "BatchNorm without statistics": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "InstanceNorm": lambda: nn.InstanceNorm2d(4, affine=True),
    "InstanceNorm with statistics": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "LayerNorm": lambda: nn.LayerNorm([4, 4, 4]),
    "LayerNorm of the width": lambda: nn.LayerNorm(4),
    "RMSNorm": lambda: nn.RMSNorm([4, 4, 4]),
    "a subclass": lambda: ChannelsLastLayerNorm(4),
    "F.batch_norm": lambda: Called(lambda x, m, v: F.batch_norm(x, m, v), (4,), (4,)),
    "F.batch_norm by the batch": lambda: Called(lambda x, w: F.batch_norm(x, None, None, w, training=True), (4,)),
    "F.instance_norm": lambda: Called(lambda x, w: F.instance_norm(x, weight=w), (4,)),
    "F.group_norm": lambda: Called(lambda x, w: F.group_norm(x, 2, w), (4,)),
    "F.layer_norm": lambda: Called(lambda x, w: F.layer_norm(x, (4,), w), (4,)),
    "F.rms_norm": lambda: Called(lambda x, w: F.rms_norm(x, (4,), weight=w), (4,)),
    "torch.batch_norm": lambda: Called(
        lambda x, w, m, v: torch.batch_norm(x, w, None, m, v, False, 0.1, 1e-5, False), (4,), (4,), (4,)
    ),
    "torch.instance_norm": lambda: Called(
        lambda x, w: torch.instance_norm(x, w, None, None, None, True, 0.1, 1e-5, False), (4,)
    ),
    "torch.layer_norm": lambda: Called(lambda x, w: torch.layer_norm(x, (4,), w), (4,)),
    "torch.group_norm": lambda: Called(lambda x, w: torch.group_norm(x, 2, w), (4,)),
    "torch.rms_norm": lambda: Called(lambda x, w: torch.rms_norm(x, (4,), w), (4,)),
}  # fmt: skip


def flows_of(model: nn.Module, inputs: Tensor) -> list[float]:
    weights = prunable_weights(model, include="*")
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    return [float(score.sum()) for score in SynFlow(model, weights, (inputs, None)).scores(masks).values()]


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
def test_synflow_is_conserved_through_every_normalisation(norm: Callable[[], nn.Module]) -> None:
    """What flows through each layer is the same (theorem 1), and ten times a weight is ten times the flow."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1, bias=False), norm(), nn.Conv2d(4, 4, 1, bias=False), norm(), nn.Conv2d(4, 2, 1, bias=False)
    )  # fmt: skip
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if value.is_floating_point() and not name.endswith("bias"):
                value.uniform_(0.5, 2.0)
    inputs = torch.randn(2, 3, 4, 4)
    flows = flows_of(model, inputs)
    assert flows == pytest.approx([flows[0]] * 3, rel=1e-9)
    model[0].weight.data *= 10
    assert flows_of(model, inputs) == pytest.approx([10 * flows[0]] * 3, rel=1e-6)


def test_synflow_scales_by_the_normalised_dimension_of_a_subclass() -> None:
    """Channels whose gain is 0 pass nothing on, and the others what they get."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1, bias=False), ChannelsLastLayerNorm(4), nn.Conv2d(4, 2, 1, bias=False)
    )
    model[1].weight.data = torch.tensor([0.0, 0.0, 1.0, 3.0])
    weights = prunable_weights(model, include="*")
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    scores = SynFlow(model, weights, (torch.zeros(1, 3, 4, 4), None)).scores(masks)
    first, last = (model[i].weight.detach().double().abs().flatten(1) for i in (0, 2))
    gains = model[1].weight.detach().double() * last.sum(0) * 16
    torch.testing.assert_close(scores["0.weight"].flatten(1), first * gains[:, None])


@pytest.mark.parametrize(
    "activation",
    [F.relu, F.relu6, F.leaky_relu, F.elu, F.celu, F.selu, torch.selu, F.gelu, F.silu, F.mish, F.hardswish, F.softplus],
    ids=lambda function: function.__name__,
)  # fmt: skip
def test_synflow_passes_activations_that_a_forward_calls(activation: Callable) -> None:
    model = nn.Sequential(nn.Linear(3, 4, bias=False), Called(activation), nn.Linear(4, 2, bias=False))
    flows = flows_of(model, torch.zeros(1, 3))
    without = flows_of(nn.Sequential(model[0], model[2]), torch.zeros(1, 3))
    assert flows == pytest.approx(without, rel=1e-12)


def test_synflow_is_conserved_where_a_model_checkpoints() -> None:
    """There the backward pass computes the norms again."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)
            self.norm = nn.LayerNorm(4)

        def block(self, x: Tensor) -> Tensor:
            return F.rms_norm(self.norm(self.a(x)), (4,))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(checkpoint(self.block, x, use_reentrant=False))

    flows = flows_of(Checkpointed(), torch.zeros(1, 3))
    assert flows == pytest.approx([flows[0]] * 2, rel=1e-9)


def test_synflow_of_a_convnext() -> None:
    convnext = pytest.importorskip("torchvision").models.convnext
    blocks = [convnext.CNBlockConfig(8, 16, 1), convnext.CNBlockConfig(16, None, 1)]
    model = convnext.ConvNeXt(blocks, num_classes=5)
    masks = find_masks(prune(model, 0.5, method="synflow", batch=(torch.zeros(1, 3, 32, 32), None)))
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == total - round(0.5 * total)


def test_synflow_is_finite_where_float32_overflows() -> None:
    layers = [nn.Linear(40, 40, bias=False) for _ in range(30)]
    for layer in layers:
        nn.init.constant_(layer.weight, 1.0)
    model = nn.Sequential(*layers)
    assert torch.finfo(torch.float32).max < 40.0**30
    assert find_masks(prune(model, 0.5, method="synflow", batch=(torch.zeros(1, 40), None)))


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.97])
def test_synflow_never_collapses_a_layer_before_it_must(sparsity: float) -> None:
    """Maximal critical compression, the paper's point: while a path can be kept, no layer is emptied."""
    layers = [nn.Conv2d(a, b, 1, bias=False) for a, b in itertools.pairwise((3, 30, 30, 2))]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(2, 2))
    nn.init.normal_(model[1].weight, std=1e-3)  # magnitudes and one-shot scores empty this one
    masks = find_masks(prune(model, sparsity, method="synflow", batch=(torch.zeros(1, 3, 1, 1), None)))
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == total - round(sparsity * total)
    assert all(mask.any() for mask in masks.values())
    if sparsity == 0.97:
        assert not all(mask.any() for mask in find_masks(prune(model, sparsity)).values())


def test_synflow_takes_a_hundred_steps_of_equal_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = convolutional(), []
    scores = SynFlow.scores

    def spy(self: SynFlow, masks: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(sum(int(mask.sum()) for mask in masks.values()))
        return scores(self, masks)

    monkeypatch.setattr(SynFlow, "scores", spy)
    prune(model, 0.9, method="synflow", batch=batch_of())
    total = 2 * 3 * 9 + 3 * 2 * 9
    assert seen == [round(total * (round(0.1 * total) / total) ** (step / 100)) for step in range(100)]


# ------------------------------------------------------------------------------------------------------- in `prune`


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scope", ["global", "layer", "erk"])
def test_masks_only_shrink_and_count_exactly(method: str, scope: str) -> None:
    batch = batch_of()
    once = prune(convolutional(), 0.5, method=method, scope=scope, batch=batch)
    twice = prune(once, 0.8, method=method, scope=scope, batch=batch)
    before, after = find_masks(once), find_masks(twice)
    assert all(not (after[name] & ~before[name]).any() for name in before)
    for masks, share in ((before, 0.5), (after, 0.8)):
        total = sum(mask.numel() for mask in masks.values())
        assert sum(int(mask.sum()) for mask in masks.values()) == total - round(share * total)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("broken", [False, True])
def test_model_statistics_modes_gradients_and_random_state_stay(method: str, broken: bool) -> None:
    model, batch = convolutional(), batch_of()
    model.insert(2, nn.Dropout(0.5))
    model[0].bias.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[1].eval()
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    random_state = torch.get_rng_state()
    if broken:
        with pytest.raises(ValueError):
            prune(
                model,
                0.5,
                method=method,
                batch=(batch[0], batch[1] + 7) if method != "synflow" else 3,
            )
    else:
        prune(model, 0.5, method=method, batch=batch)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert modes == [m.training for m in model.modules()]
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert not model[0].bias.requires_grad
    assert all(p.grad is None for name, p in model.named_parameters() if name != "0.weight")


@pytest.mark.parametrize("method", METHODS)
def test_other_forms_of_masks_give_the_same_masks(method: str) -> None:
    ours, batch = prune(convolutional(), 0.3), batch_of()
    theirs = copy.deepcopy(ours)
    for name in list(find_masks(ours)):
        module = theirs.get_submodule(name.split(".")[0])
        mask = module._buffers.pop("weight_mask")
        module.weight.data.copy_(
            torch.where(mask, module.weight, 9.0)
        )  # what is pruned is there, behind the mask
        torch_prune.custom_from_mask(module, "weight", mask)
    first, second = (find_masks(prune(m, 0.8, method=method, batch=batch)) for m in (ours, theirs))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_and_frozen_weights_are_scored(method: str, dtype: torch.dtype) -> None:
    model = convolutional().to(dtype)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    inputs, targets = batch_of()
    pruned = prune(model, 0.5, method=method, batch=(inputs.to(dtype), targets))
    assert pruned[0].weight.dtype == dtype
    assert sum(int(mask.sum()) for mask in find_masks(pruned).values()) == 54


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_is_asked_for(method: str) -> None:
    with pytest.raises(ValueError, match=f"method='{method}' scores on data: give batch="):
        prune(convolutional(), 0.5, method=method)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(2, 2, 4, 4, dtype=torch.float64), "batch must be .inputs, targets. or an iterable"),
        ([], "batch is empty"),
        (batch_of(0), "needs at least one sample"),
        ((batch_of()[0] * math.nan, batch_of()[1]), "the loss is nan"),
    ],
)
def test_batches_that_do_not_fit_are_named(batch: object, message: str) -> None:
    with pytest.raises(SurgeryError, match=message):
        prune(convolutional(), 0.5, method="snip", batch=batch)


def test_a_loss_must_be_a_scalar() -> None:
    with pytest.raises(SurgeryError, match="must return a scalar tensor"):
        prune(convolutional(), 0.5, method="snip", batch=batch_of(), loss=lambda output, targets: output)


def test_grasp_needs_logits() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = convolutional()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.inner(x)}

    loss = lambda output, targets: F.cross_entropy(output["logits"], targets)
    assert find_masks(prune(Wrapped(), 0.5, method="snip", batch=batch_of(), loss=loss))
    with pytest.raises(SurgeryError, match="the model returns a dict"):
        prune(Wrapped(), 0.5, method="grasp", batch=batch_of(), loss=loss)


def test_synflow_names_a_flow_that_is_not_finite() -> None:
    model = convolutional()
    model[0].weight.data[0, 0, 0, 0] = math.inf
    with pytest.raises(SurgeryError, match=r"the synaptic flow is (inf|nan)"):
        prune(model, 0.5, method="synflow", batch=batch_of())


def test_an_autocast_around_does_not_reach_synflow() -> None:
    model, batch = convolutional().float(), (batch_of()[0].float(), None)
    expected = find_masks(prune(model, 0.9, method="synflow", batch=batch))
    with torch.autocast("cpu", torch.bfloat16):
        found = find_masks(prune(model, 0.9, method="synflow", batch=batch))
    assert all(torch.equal(found[name], mask) for name, mask in expected.items())


# ------------------------------------------------------------------------------------- budgets by published formulas


def test_erk_densities_are_those_of_rigl() -> None:
    """Evci et al., appendix: density = epsilon * (n_in + n_out + kw + kh) / (n_in * n_out * kw * kh), at most 1."""
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.Conv2d(32, 64, 3), nn.Conv2d(64, 64, 1), nn.Flatten(), nn.Linear(64, 10)
    )
    masks = find_masks(
        prune(model, 0.9, method="random", scope="erk", generator=torch.Generator().manual_seed(0))
    )
    shapes = [tuple(mask.shape) for mask in masks.values()]
    raw = [sum(shape) / math.prod(shape) for shape in shapes]
    total, dense = sum(map(math.prod, shapes)), set()
    while True:
        rest = [i for i in range(3) if i not in dense]
        epsilon = (0.1 * total - sum(math.prod(shapes[i]) for i in dense)) / sum(
            raw[i] * math.prod(shapes[i]) for i in rest
        )
        over = [i for i in rest if epsilon * raw[i] >= 1]
        if not over:
            break
        dense |= set(over)
    expected = [1.0 if i in dense else epsilon * raw[i] for i in range(3)]
    for mask, density in zip(masks.values(), expected, strict=True):
        assert int(mask.sum()) == pytest.approx(density * mask.numel(), abs=1)


def test_uniform_densities_are_the_same_in_every_layer() -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 64, 3), nn.Flatten(), nn.Linear(64, 10))
    masks = find_masks(
        prune(model, 0.9, method="random", scope="layer", generator=torch.Generator().manual_seed(0))
    )
    for mask in masks.values():
        assert int(mask.sum()) == mask.numel() - round(0.9 * mask.numel())


def test_two_pairs_in_a_tuple_are_ambiguous() -> None:
    model, pair = convolutional(), batch_of()
    with pytest.raises(SurgeryError, match=r"batch is a tuple of two, and may be one pair"):
        prune(model, 0.5, method="snip", batch=(pair, pair))


@pytest.mark.parametrize("method", ["snip", "grasp"])
def test_a_loss_that_does_not_depend_on_the_weights_is_refused(method: str) -> None:
    def detached(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output.detach(), target)

    with pytest.raises(SurgeryError, match="does not depend on the weights"):
        prune(convolutional(), 0.5, method=method, batch=batch_of(), loss=detached)


def test_synflow_refuses_a_network_through_which_nothing_flows() -> None:
    layers = [nn.Linear(2, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False), nn.Linear(4, 3)]
    for layer in (layers[0], layers[2]):
        nn.init.zeros_(layer.weight)
    with pytest.raises(SurgeryError, match="no weight has any synaptic flow"):
        prune(nn.Sequential(*layers), 0.5, method="synflow", batch=(torch.zeros(1, 2), None))


def test_batches_weigh_by_their_images_not_by_the_boxes_of_the_first() -> None:
    """As a detector's targets are: a list of dicts, and an image without an object."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2, bias=False)

        def forward(self, images: Tensor) -> Tensor:
            return self.layer(images)

    def loss(output: Tensor, targets: list[dict[str, Tensor]]) -> Tensor:
        return torch.stack([out.square().sum() + t["boxes"].sum() for out, t in zip(output, targets)]).mean()

    def pair(boxes: list[int]) -> tuple[Tensor, list[dict[str, Tensor]]]:
        return torch.randn(len(boxes), 3), [{"boxes": torch.ones(count, 4)} for count in boxes]

    model, (first, second) = Flat(), (pair([7, 1]), pair([0, 2]))
    whole = torch.cat([first[0], second[0]]), first[1] + second[1]
    weights = prunable_weights(model, exclude=())
    apart = snip_scores(model, weights, [first, second], loss)
    together = snip_scores(model, weights, [whole], loss)
    torch.testing.assert_close(apart, together)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.Hardtanh, nn.Softsign, nn.Softplus, nn.ReLU6])
@pytest.mark.parametrize("called", ["module", "function"])
def test_synflow_takes_saturating_activations_as_the_identity(activation, called):
    functions = {
        nn.Tanh: torch.tanh,
        nn.Hardtanh: F.hardtanh,
        nn.Softsign: F.softsign,
        nn.Softplus: F.softplus,
    }

    class Called(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return functions.get(activation, F.relu6)(x)

    def network(make: Callable[[], nn.Module]) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 16, 5), make(), nn.Conv2d(16, 8, 5), make(), nn.Flatten(), nn.Linear(128, 3)
        )

    batch = torch.zeros(1, 1, 12, 12), None
    made, plain = network(activation if called == "module" else Called), network(nn.Identity)
    found, expected = (find_masks(prune(each, 0.9, method="synflow", batch=batch)) for each in (made, plain))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
