"""Masks are read, set, rewound beneath, counted, and held through training by every optimizer."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

from sparsetweaks.masks import apply_masks, find_masks, keep_masks, rewind, sparsity
from sparsetweaks.pruning import prune

STEPS = 3


class Block(nn.Module):
    """A residual block with batch normalisation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm(self.conv(x)))


def small_model(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), Block(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
        )


def a_batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 2, 5, 5, generator=generator), torch.randint(3, (6,), generator=generator)


def loss_of(model: nn.Module, seed: int = 0) -> Tensor:
    inputs, targets = a_batch(seed)
    return F.cross_entropy(model(inputs), targets)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------------------------------------------------
# find_masks and apply_masks


def random_masks(model: nn.Module, *names: str, density: float = 0.4, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(model.get_parameter(name).shape, generator=generator) < density for name in names
    }


def test_what_is_applied_is_found_and_the_model_is_left_alone():
    model = small_model()
    before = snapshot(model)
    masks = random_masks(model, "0.weight", "1.conv.weight", "4.bias")
    masked = apply_masks(model, masks)
    assert same(snapshot(model), before)
    assert same(find_masks(masked), masks)
    assert find_masks(model) == {}
    for name, mask in masks.items():
        assert torch.equal(masked.get_parameter(name), torch.where(mask, before[name], 0))
        assert torch.equal(masked.get_buffer(name + "_mask"), mask)
    assert torch.equal(masked[1].norm.weight, before["1.norm.weight"])


def test_found_masks_are_not_views_of_the_models():
    masked = prune(small_model(), 0.5)
    find_masks(masked)["0.weight"].fill_(True)
    assert not masked[0].weight_mask.all()


def test_masks_survive_a_save_and_a_load(tmp_path):
    masked = prune(small_model(), 0.5)
    torch.save(masked.state_dict(), tmp_path / "ticket.pt")
    other = apply_masks(
        small_model(seed=9), {name: torch.ones_like(m) for name, m in find_masks(masked).items()}
    )
    other.load_state_dict(torch.load(tmp_path / "ticket.pt"))
    assert same(find_masks(other), find_masks(masked))
    assert same(find_masks(pickle.loads(pickle.dumps(masked))), find_masks(masked))
    assert same(find_masks(copy.deepcopy(masked)), find_masks(masked))


def test_a_mask_has_the_memory_format_and_dtype_of_its_weight_and_moves_with_it():
    model = small_model().to(memory_format=torch.channels_last)
    masked = prune(model, 0.5)
    assert masked[1].conv.weight_mask.stride() == masked[1].conv.weight.stride() != (36, 9, 3, 1)
    assert masked.half()[0].weight_mask.dtype == torch.bool


def mask_parametrization(mask: Tensor) -> nn.Module:
    class Masking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", mask)

        def forward(self, weight: Tensor) -> Tensor:
            return weight * self.mask

    return Masking()


def in_form(form: str, model: nn.Module, name: str, mask: Tensor) -> nn.Module:
    """The model masked at one weight by the means of another pruner."""
    module_name, _, attribute = name.rpartition(".")
    module = model.get_submodule(module_name)
    if form == "torch.nn.utils.prune":
        torch_prune.custom_from_mask(module, attribute, mask)
    else:
        parametrize.register_parametrization(module, attribute, mask_parametrization(mask.float()))
    loss_of(model)  # from here on torch.nn.utils.prune holds a tensor that is not a leaf
    return model


FORMS = ["torch.nn.utils.prune", "parametrization"]


@pytest.mark.parametrize("form", FORMS)
def test_masks_of_other_pruners_are_found_and_kept_in_their_form(form):
    mask = random_masks(small_model(), "1.conv.weight")["1.conv.weight"]
    model = in_form(form, small_model(), "1.conv.weight", mask)
    original = small_model()[1].conv.weight
    assert same(find_masks(model), {"1.conv.weight": mask})

    smaller = mask & (torch.arange(mask.numel()).view(mask.shape) % 2 == 0)
    other = apply_masks(model, {"1.conv.weight": smaller})
    assert same(find_masks(other), {"1.conv.weight": smaller})
    assert same(find_masks(model), {"1.conv.weight": mask})
    assert list(other.state_dict()) == list(model.state_dict())
    assert torch.equal(other[1].conv.weight, original * smaller)
    loss_of(other).backward()
    assert torch.equal(other[1].conv.weight, original * smaller)


@pytest.mark.parametrize("form", FORMS)
def test_prune_goes_on_from_the_masks_of_other_pruners_in_their_form(form):
    names = {"0.weight", "1.conv.weight"}
    mask = random_masks(small_model(), "1.conv.weight")["1.conv.weight"]
    pruned = prune(in_form(form, small_model(), "1.conv.weight", mask), 0.9)
    masks = find_masks(pruned)
    assert set(masks) == names
    assert not (masks["1.conv.weight"] & ~mask).any()
    assert sum(int((~m).sum()) for m in masks.values()) == round(0.9 * sum(m.numel() for m in masks.values()))
    assert torch.equal(pruned[1].conv.weight, small_model()[1].conv.weight * masks["1.conv.weight"])


def test_plain_zeros_are_read_only_when_asked_for():
    model = small_model()
    with torch.no_grad():
        model[0].weight[0] = 0
    assert find_masks(model) == {}
    masks = find_masks(model, zeros=True)
    assert set(masks) == {"0.weight", "1.conv.weight"}
    assert torch.equal(masks["0.weight"], model[0].weight != 0)
    assert masks["1.conv.weight"].all()


def tied_model() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight = model[0].weight
    return model


def test_a_tied_weight_has_one_mask_and_stays_tied():
    masks = random_masks(tied_model(), "0.weight")
    masked = apply_masks(tied_model(), masks)
    assert masked[0].weight is masked[1].weight
    assert sparsity(masked).kept == int(masks["0.weight"].sum())
    both = apply_masks(tied_model(), {"0.weight": masks["0.weight"], "1.weight": masks["0.weight"].clone()})
    assert len(sparsity(both).layers) == 1
    second = apply_masks(tied_model(), {"1.weight": masks["0.weight"]})  # from its other name, too
    for model in (masked, both, second):
        further = prune(model, 0.9)
        for mask in find_masks(further).values():
            assert not (mask & ~masks["0.weight"]).any()
            assert torch.equal(further[0].weight, model[0].weight * mask)
    with pytest.raises(ValueError, match="nothing is left to revive"):
        apply_masks(second, {"0.weight": torch.ones(4, 4, dtype=torch.bool)})
    with pytest.raises(ValueError, match="one tied weight"):
        apply_masks(tied_model(), {"0.weight": masks["0.weight"], "1.weight": ~masks["0.weight"]})


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({}, "no masks given"),
        ({"1.conv.wieght": torch.ones(4, 4, 3, 3, dtype=torch.bool)}, "close: '1.conv.weight'"),
        ({"0.weight": torch.ones(4, 2, 3, 3)}, r"float32.*use mask.bool\(\)"),
        ({"0.weight": torch.ones(4, 2, 3, dtype=torch.bool)}, r"shape \(4, 2, 3\).*\(4, 2, 3, 3\)"),
        ({"0.weight": [True]}, "pass a bool tensor"),
    ],
)
def test_wrong_masks_are_refused(masks, message):
    model = small_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        apply_masks(model, masks)
    assert same(snapshot(model), before)


def test_pruned_weights_are_not_revived():
    masked = prune(small_model(), 0.5)
    with pytest.raises(ValueError, match="nothing is left to revive"):
        apply_masks(masked, {"0.weight": torch.ones(4, 2, 3, 3, dtype=torch.bool)})


def test_a_mask_of_ours_that_is_not_bool_is_refused():
    model = small_model()
    model[0].register_buffer("weight_mask", torch.ones(4, 2, 3, 3))
    with pytest.raises(ValueError, match=r"0.weight_mask is torch.float32"):
        find_masks(model)


# ---------------------------------------------------------------------------------------------------------
# rewind


@torch.no_grad()
def trained(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.add_(1)
    model(torch.ones(2, 2, 5, 5))
    return model


def test_rewind_brings_everything_back_beneath_the_masks():
    initial = small_model()
    masked = prune(trained(initial), 0.5)
    before = snapshot(masked)
    masks = find_masks(masked)
    for state in (initial, initial.state_dict()):
        ticket = rewind(masked, state)
        assert same(find_masks(ticket), masks)
        for name, value in initial.state_dict().items():
            wanted = torch.where(masks[name], value, 0) if name in masks else value
            assert torch.equal(ticket.state_dict()[name], wanted), name
    assert ticket[1].norm.num_batches_tracked == 0 < masked[1].norm.num_batches_tracked
    assert same(snapshot(masked), before)


def test_rewind_takes_a_masked_state_too_and_keeps_the_models_own_masks():
    masked = prune(small_model(), 0.5)
    further = prune(trained(masked), 0.8)
    ticket = rewind(further, masked.state_dict())
    assert same(find_masks(ticket), find_masks(further))
    assert torch.equal(ticket[0].weight, small_model()[0].weight * find_masks(further)["0.weight"])


@pytest.mark.parametrize("form", FORMS)
def test_rewind_beneath_the_masks_of_other_pruners(form):
    mask = random_masks(small_model(), "1.conv.weight")["1.conv.weight"]
    masked = in_form(form, small_model(seed=5), "1.conv.weight", mask)
    ticket = rewind(masked, small_model())
    assert torch.equal(ticket[1].conv.weight, small_model()[1].conv.weight * mask)
    assert same(find_masks(ticket), {"1.conv.weight": mask})
    assert list(ticket.state_dict()) == list(masked.state_dict())
    back = rewind(prune(small_model(seed=5), 0.5), ticket)  # and such a state may be rewound to
    assert torch.equal(back[0].weight, small_model()[0].weight * find_masks(back)["0.weight"])


class Added(nn.Linear):
    added_by_tweak = True


def test_rewind_keeps_what_a_tweak_added():
    masked = prune(small_model(), 0.5)
    masked[1].add_module("skip", Added(2, 2))
    ticket = rewind(masked, small_model())
    assert torch.equal(ticket[1].skip.weight, masked[1].skip.weight)


def test_rewind_names_what_does_not_fit():
    masked = prune(small_model(), 0.5)
    state = small_model().state_dict()
    with pytest.raises(ValueError, match="no masks"):
        rewind(small_model(), state)
    with pytest.raises(ValueError, match=r"it lacks '4.bias'.*not know 'head.bias'"):
        rewind(masked, {("head.bias" if name == "4.bias" else name): value for name, value in state.items()})
    with pytest.raises(ValueError, match=r"'4.bias' has shape \(5,\) in the state, but \(3,\)"):
        rewind(masked, state | {"4.bias": torch.zeros(5)})


# ---------------------------------------------------------------------------------------------------------
# sparsity


def test_sparsity_counts_the_prunable_weights_all_parameters_and_what_tweaks_added():
    model = small_model()
    report = sparsity(prune(model, 0.75))
    weights = 4 * 2 * 9 + 4 * 4 * 9
    everything = sum(p.numel() for p in model.parameters())
    assert [layer.name for layer in report.layers] == ["0.weight", "1.conv.weight"]
    assert report.weights == weights
    assert report.overall == report.overall_with_added == 0.75
    assert report.of_all_parameters == pytest.approx(0.75 * weights / everything)
    assert sum(layer.zeros for layer in report.layers) == report.weights - report.kept

    tweaked = prune(model, 0.75)
    tweaked[1].add_module("skip", Added(3, 3))
    added = sparsity(tweaked)
    assert (added.added_parameters, added.added_kept) == (12, 12)
    assert added.overall == 0.75
    assert added.of_all_parameters == report.of_all_parameters
    assert added.overall_with_added == pytest.approx(1 - (report.kept + 12) / weights)
    assert added.of_all_parameters_with_added == pytest.approx(1 - (report.parameters_kept + 12) / everything)
    assert "added by tweaks" in str(added)
    assert "added by tweaks" not in str(report)


def test_a_layer_without_a_mask_counts_as_dense_and_shows_its_zeros():
    model = small_model()
    nn.init.zeros_(model[0].weight)
    first = sparsity(model).layers[0]
    assert (first.sparsity, first.masked, first.zeros) == (0.0, False, 72)
    assert "no mask" in str(sparsity(model))


def test_a_masked_weight_counts_even_if_it_is_not_prunable_by_default():
    report = sparsity(prune(small_model(), 0.5, include="4"))
    assert [layer.name for layer in report.layers] == ["0.weight", "1.conv.weight", "4.weight"]
    assert report.layers[-1].sparsity == 0.5


def test_the_sparsity_of_a_model_without_weights_is_zero():
    report = sparsity(nn.ReLU())
    assert (report.layers, report.overall, report.of_all_parameters) == ((), 0.0, 0.0)


# ---------------------------------------------------------------------------------------------------------
# keep_masks: every optimizer against the same optimizer on the survivors alone

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "sgd dampening": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5),
    "sgd nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2, foreach=True),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=1e-2),
    "adam foreach": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=1e-2, foreach=True),
    "adam fused": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=1e-2, fused=True),
    "adamw amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.9, centered=True, weight_decay=1e-2),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, weight_decay=1e-2),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3, history_size=4),
    "lbfgs wolfe": lambda p: torch.optim.LBFGS(p, max_iter=3, history_size=4, line_search_fn="strong_wolfe"),
}


class Survivors(nn.Module):
    """The model as a function of its surviving weights, which are its only parameters: the reference."""

    def __init__(self, masked: nn.Module) -> None:
        super().__init__()
        self.model = [copy.deepcopy(masked)]
        self.masks = find_masks(masked)
        self.names = [name for name, _ in masked.named_parameters()]
        self.values = nn.ParameterList(
            value.detach()[self.masks[name]] if name in self.masks else value.detach().clone()
            for name, value in masked.named_parameters()
        )

    def weights(self) -> dict[str, Tensor]:
        weights = dict(zip(self.names, self.values, strict=True))
        for name, mask in self.masks.items():
            weights[name] = torch.zeros(mask.shape).masked_scatter(mask, weights[name])
        return weights

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.func.functional_call(self.model[0], self.weights(), (inputs,))


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, clip: float | None = None, steps: int = STEPS
) -> Iterator[int]:
    """Train on another batch per step, and yield after each."""
    for step in range(steps):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, seed=step)
            loss.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            return loss

        optimizer.step(closure)
        yield step


def assert_held(model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    """Pruned weights, their gradients and all state of their shape are exactly zero; survivors are not."""
    for name, mask in find_masks(model).items():
        parameter = model.get_parameter(name)
        assert (parameter[~mask] == 0).all(), name
        assert parameter[mask].isfinite().all(), name
        assert (parameter[mask] != 0).any(), name
        assert parameter.grad is None or (parameter.grad[~mask] == 0).all(), name
        for optimizer in optimizers:
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    assert (value[~mask] == 0).all(), (name, key)
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            assert_lbfgs_held(model, optimizer)


def assert_lbfgs_held(model: nn.Module, optimizer: torch.optim.LBFGS) -> None:
    masks = find_masks(model)
    kept = torch.cat(
        [masks.get(n, torch.ones_like(p, dtype=torch.bool)).flatten() for n, p in model.named_parameters()]
    )
    state = optimizer.state[next(iter(model.parameters()))]
    vectors = [state["d"], state["prev_flat_grad"], *state["old_dirs"], *state["old_stps"]]
    assert len(vectors) > 2
    assert all((vector[~kept] == 0).all() for vector in vectors)
    for y, s, rho in zip(state["old_dirs"], state["old_stps"], state["ro"], strict=True):
        torch.testing.assert_close(rho, 1 / y.dot(s))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_holds_and_trains_the_survivors_as_if_nothing_else_were_there(name):
    ticket = prune(small_model(), 0.6)
    reference = Survivors(ticket)
    optimizer = OPTIMIZERS[name](ticket.parameters())
    beside = train(reference, OPTIMIZERS[name](reference.parameters()))
    close = {"rtol": 1e-4, "atol": 1e-6} if "lbfgs" in name else {"rtol": 1e-6, "atol": 1e-8}
    with keep_masks(ticket, optimizer):
        for _ in train(ticket, optimizer):
            assert_held(ticket, optimizer)
            next(beside)
            for key, value in reference.weights().items():
                torch.testing.assert_close(ticket.get_parameter(key), value, **close)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_from_before_the_masks_is_zeroed_on_entry(name):
    """IMP without rewinding: train dense, put the masks on the very model, go on with the same optimizer."""
    model = small_model()
    optimizer = OPTIMIZERS[name](model.parameters())
    list(train(model, optimizer))
    for place, mask in find_masks(prune(model, 0.6)).items():
        module, _, _ = place.rpartition(".")
        model.get_submodule(module).register_buffer("weight_mask", mask)
    with keep_masks(model, optimizer):
        assert_held(model, optimizer)
        for _ in train(model, optimizer):
            assert_held(model, optimizer)


def test_masked_sgd_by_hand_bit_for_bit():
    lr, momentum, decay = 0.1, 0.9, 1e-2
    ticket = prune(small_model(), 0.6)
    masks = find_masks(ticket)
    hand = copy.deepcopy(ticket)
    buffers = {name: torch.zeros_like(p) for name, p in hand.named_parameters()}
    optimizer = torch.optim.SGD(
        ticket.parameters(), lr=lr, momentum=momentum, weight_decay=decay, foreach=False
    )
    with keep_masks(ticket, optimizer):
        for step in train(ticket, optimizer):
            hand.zero_grad()
            loss_of(hand, seed=step).backward()
            with torch.no_grad():
                for name, p in hand.named_parameters():
                    mask = masks.get(name, torch.ones_like(p, dtype=torch.bool))
                    gradient = torch.where(mask, p.grad, 0).add(p, alpha=decay)
                    buffers[name].mul_(momentum).add_(gradient)
                    p.add_(buffers[name], alpha=-lr)
            for name, p in hand.named_parameters():
                assert torch.equal(ticket.get_parameter(name), p), (step, name)


def test_clipping_sees_the_survivors_alone():
    ticket = prune(small_model(), 0.9)
    reference = Survivors(ticket)
    optimizer = OPTIMIZERS["sgd momentum"](ticket.parameters())
    beside = train(reference, OPTIMIZERS["sgd momentum"](reference.parameters()), clip=0.05)
    with keep_masks(ticket, optimizer):
        for _ in train(ticket, optimizer, clip=0.05):
            assert_held(ticket, optimizer)
            next(beside)
            for key, value in reference.weights().items():
                torch.testing.assert_close(ticket.get_parameter(key), value, rtol=1e-5, atol=1e-7)


def test_amp_with_a_scaler_and_an_overflow_in_the_pruned_places():
    ticket = prune(small_model(), 0.6)
    mask = find_masks(ticket)["0.weight"]
    optimizer = OPTIMIZERS["adam"](ticket.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    # Registered first, so it runs before the hook of keep_masks: an overflow where nothing is left to train.
    ticket[0].weight.register_hook(lambda g: g.masked_fill(~mask, float("inf")))
    with keep_masks(ticket, optimizer):
        for step in range(STEPS):
            optimizer.zero_grad()
            inputs, targets = a_batch(step)
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(ticket(inputs), targets)
            before = ticket[0].weight.detach().clone()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(ticket.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
            assert_held(ticket, optimizer)
            assert not torch.equal(before, ticket[0].weight)
    assert scaler.get_scale() == 2.0**10


def test_gradient_accumulation_and_gradients_from_before():
    ticket = prune(small_model(), 0.6)
    loss_of(ticket).backward()
    assert (ticket[0].weight.grad[~ticket[0].weight_mask] != 0).any()
    optimizer = OPTIMIZERS["sgd momentum"](ticket.parameters())
    with keep_masks(ticket, optimizer):
        assert_held(ticket)
        for seed in range(4):
            loss_of(ticket, seed=seed).backward()
            assert_held(ticket)
        optimizer.step()
        assert_held(ticket, optimizer)


class Reckless(torch.optim.Optimizer):
    """Throws NaN, infinity and minus zero about, in weights and state."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            mask = parameter.mask_of_test
            state = self.state[parameter]
            state["same"] = torch.full_like(parameter, float("nan"))
            state["wide"] = torch.full_like(parameter, float("inf"), dtype=torch.float64)
            state["whole"] = torch.full_like(parameter, 7, dtype=torch.int32)
            state["steps"] = torch.tensor(3.0)
            parameter.masked_fill_(~mask, float("nan"))
            parameter.view(-1)[(~mask).flatten().nonzero()[0]] = float("-inf")
            parameter.view(-1)[(~mask).flatten().nonzero()[1]] = -0.0


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64]
)
def test_nan_and_infinity_leave_exact_zeros_in_every_precision(dtype):
    layer = nn.Linear(8, 8, bias=False, dtype=dtype)
    ticket = apply_masks(layer, random_masks(layer, "weight"))
    ticket.weight.mask_of_test = ticket.weight_mask
    optimizer = Reckless(ticket.parameters())
    survivors = ticket.weight.detach()[ticket.weight_mask].clone()
    with keep_masks(ticket, optimizer):
        optimizer.step()
        assert (ticket.weight[~ticket.weight_mask] == 0).all()
        assert torch.equal(ticket.weight[ticket.weight_mask], survivors)
        state = optimizer.state[ticket.weight]
        for key in ("same", "wide", "whole"):
            assert (state[key][~ticket.weight_mask] == 0).all(), key
            assert (state[key][ticket.weight_mask] != 0).all(), key
        assert state["steps"] == 3


def test_two_optimizers_each_with_a_part():
    ticket = prune(small_model(), 0.6)
    one = OPTIMIZERS["sgd momentum"](ticket[0].parameters())
    two = OPTIMIZERS["adam"](ticket[1].parameters())
    with keep_masks(ticket, one, two):
        for seed in range(STEPS):
            ticket.zero_grad()
            loss_of(ticket, seed=seed).backward()
            one.step()
            two.step()
            assert_held(ticket, one, two)


def test_a_parameter_group_added_later_is_held():
    ticket = prune(small_model(), 0.6)
    optimizer = OPTIMIZERS["sgd momentum"](ticket[1].parameters())
    with keep_masks(ticket, optimizer):
        list(train(ticket, optimizer))
        optimizer.add_param_group({"params": ticket[0].parameters()})
        optimizer.state[ticket[0].weight]["momentum_buffer"] = torch.ones_like(ticket[0].weight)
        for _ in train(ticket, optimizer):
            assert_held(ticket, optimizer)


def test_frozen_parameters_stay_frozen_and_are_held_once_unfrozen():
    ticket = prune(small_model(), 0.6)
    ticket[0].weight.requires_grad_(False)
    optimizer = OPTIMIZERS["sgd momentum"](ticket.parameters())
    with keep_masks(ticket, optimizer):
        before = ticket[0].weight.detach().clone()
        list(train(ticket, optimizer))
        assert not ticket[0].weight.requires_grad
        assert torch.equal(ticket[0].weight, before)
        ticket[0].weight.requires_grad_(True)
        for _ in train(ticket, optimizer):
            assert_held(ticket, optimizer)
        assert not torch.equal(ticket[0].weight, before)


def test_tied_weights_are_held():
    ticket = apply_masks(tied_model(), random_masks(tied_model(), "0.weight"))
    optimizer = OPTIMIZERS["adam"](ticket.parameters())
    with keep_masks(ticket, optimizer):
        for _ in range(STEPS):
            optimizer.zero_grad()
            ticket(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
            assert_held(ticket, optimizer)


@pytest.mark.parametrize("form", FORMS)
def test_other_forms_are_held_in_gradients_and_state(form):
    mask = random_masks(small_model(), "1.conv.weight")["1.conv.weight"]
    model = in_form(form, small_model(), "1.conv.weight", mask)
    behind = next(p for n, p in model.named_parameters() if n.endswith(("weight_orig", "weight.original")))
    optimizer = OPTIMIZERS["sgd momentum"](model.parameters())
    with keep_masks(model, optimizer):
        for _ in train(model, optimizer):
            assert (behind.grad[~mask] == 0).all()
            assert (optimizer.state[behind]["momentum_buffer"][~mask] == 0).all()
            assert (optimizer.state[behind]["momentum_buffer"][mask] != 0).all()
    loss_of(model)
    assert (model[1].conv.weight[~mask] == 0).all()


def test_channels_last_weights_are_held():
    ticket = prune(small_model().to(memory_format=torch.channels_last), 0.6)
    reference = Survivors(prune(small_model(), 0.6))
    optimizer = OPTIMIZERS["adam"](ticket.parameters())
    beside = train(reference, OPTIMIZERS["adam"](reference.parameters()))
    with keep_masks(ticket, optimizer):
        for _ in train(ticket, optimizer):
            assert_held(ticket, optimizer)
            next(beside)
            torch.testing.assert_close(
                ticket[0].weight, reference.weights()["0.weight"], rtol=1e-3, atol=1e-4
            )


def test_higher_derivatives_pass_through_the_gradient_hook():
    ticket = prune(small_model(), 0.6)
    mask = ticket[0].weight_mask
    with keep_masks(ticket, OPTIMIZERS["sgd"](ticket.parameters())):
        (gradient,) = torch.autograd.grad(loss_of(ticket), ticket[0].weight, create_graph=True)
        assert (gradient[~mask] == 0).all()
        (second,) = torch.autograd.grad(gradient.square().sum(), ticket[0].weight)
    dense_gradient = torch.autograd.grad(loss_of(ticket), ticket[0].weight, create_graph=True)[0]
    (wanted,) = torch.autograd.grad((dense_gradient * mask).square().sum(), ticket[0].weight)
    torch.testing.assert_close(second, wanted * mask)


def test_masks_loaded_or_changed_within_are_honoured():
    ticket = prune(small_model(), 0.5)
    further = prune(ticket, 0.8)
    optimizer = OPTIMIZERS["adam"](ticket.parameters())
    with keep_masks(ticket, optimizer):
        list(train(ticket, optimizer))
        ticket.load_state_dict(further.state_dict())
        for _ in train(ticket, optimizer):
            assert_held(ticket, optimizer)
    assert same(find_masks(ticket), find_masks(further))


@pytest.mark.parametrize("raises", [False, True])
def test_nothing_is_left_behind(raises):
    ticket = prune(small_model(), 0.5)
    optimizer = OPTIMIZERS["sgd"](ticket.parameters())
    keys = list(ticket.state_dict())
    try:
        with keep_masks(ticket, optimizer):
            copy.deepcopy(ticket)
            pickle.dumps(ticket)
            pickle.dumps(optimizer)
            if raises:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert not any(parameter._backward_hooks for parameter in ticket.parameters())
    assert not optimizer._optimizer_step_post_hooks
    assert list(ticket.state_dict()) == keys
    list(train(ticket, optimizer))
    assert (ticket[0].weight[~ticket[0].weight_mask] != 0).any()


def test_mistakes_are_told():
    model = small_model()
    ticket = prune(model, 0.5)
    with (
        pytest.raises(ValueError, match="no masks to keep"),
        keep_masks(model, OPTIMIZERS["sgd"](model.parameters())),
    ):
        pass
    with (
        pytest.raises(ValueError, match="of this very model"),
        keep_masks(ticket, OPTIMIZERS["sgd"](model.parameters())),
    ):
        pass
    with pytest.raises(ValueError, match="of this very model"), keep_masks(ticket):
        pass
    with pytest.raises(ValueError, match=r"expected torch\.optim optimizers"), keep_masks(ticket, "sgd"):
        pass


# ---------------------------------------------------------------------------------------------------------
# keep_masks: compiled and distributed


@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)], ids=["aot_eager", "inductor"]
)
@pytest.mark.parametrize("compiled_before", [False, True])
def test_a_compiled_model_and_a_compiled_optimizer_step(backend, compiled_before):
    torch._dynamo.reset()
    ticket = prune(small_model(), 0.6)
    eager = copy.deepcopy(ticket)
    optimizer, plain = (OPTIMIZERS["sgd momentum"](model.parameters()) for model in (ticket, eager))
    compiled = torch.compile(ticket, backend=backend)
    update = torch.compile(optimizer.step, backend=backend)
    if compiled_before:
        loss_of(compiled).backward()
        update()
        loss_of(eager).backward()
        plain.step()
    with keep_masks(compiled, optimizer), keep_masks(eager, plain):
        for seed in range(STEPS):
            for model, optim, step in ((compiled, optimizer, update), (eager, plain, plain.step)):
                optim.zero_grad()
                loss_of(model, seed=seed).backward()
                with torch.no_grad():  # what only the hook after the step can undo
                    model.get_submodule("_orig_mod" if model is compiled else "")[0].weight.sub_(1e-3)
                step()
            assert_held(ticket, optimizer)
            for name, value in eager.named_parameters():
                torch.testing.assert_close(ticket.get_parameter(name), value, rtol=1e-4, atol=1e-6)


# torch's own tracer looks at the gradient of the loss, which is no leaf
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_whole_step_in_one_compiled_function():
    torch._dynamo.reset()
    ticket = prune(small_model(), 0.6)
    optimizer = OPTIMIZERS["sgd momentum"](ticket.parameters())

    def step(inputs: Tensor, targets: Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(ticket(inputs), targets).backward()
        optimizer.step()

    with keep_masks(ticket, optimizer):
        compiled = torch.compile(step, backend="aot_eager")
        for seed in range(STEPS):
            compiled(*a_batch(seed))
            assert_held(ticket, optimizer)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed")
def test_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        ticket = prune(small_model(), 0.6)
        wrapped = nn.parallel.DistributedDataParallel(ticket)
        optimizer = OPTIMIZERS["sgd momentum"](wrapped.parameters())
        with keep_masks(wrapped, optimizer):
            for _ in train(wrapped, optimizer):
                assert_held(ticket, optimizer)
    finally:
        torch.distributed.destroy_process_group()
