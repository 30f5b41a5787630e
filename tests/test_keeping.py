"""Pruned weights stay zero through training by every optimizer."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import FORMS, a_batch, in_form, loss_of, random_masks, same, small_model, tied_model
from torch import Tensor, nn

from sparsetweaks.converting import convert_masks
from sparsetweaks.keeping import keep_masks
from sparsetweaks.masks import apply_masks, find_masks, rewind
from sparsetweaks.pruning import prune

STEPS = 3


# ---------------------------------------------------------------------------------------------------------
# Every optimizer against the same optimizer on the survivors alone

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


def test_lbfgs_holds_complex_weights_among_real_ones():
    model = apply_masks(nn.Linear(6, 4, dtype=torch.complex64), {"weight": torch.rand(4, 6) < 0.5})
    model.shift = nn.Parameter(torch.zeros(3))  # real numbers after complex ones, which take two places each
    optimizer = OPTIMIZERS["lbfgs"](model.parameters())
    x, y = torch.randn(2, 8, 6, dtype=torch.complex64)

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - y[:, :4]).abs().pow(2).mean() + (model.shift - 1).pow(2).sum()
        loss.backward()
        return loss

    before = closure().item()
    with keep_masks(model, optimizer):
        for _ in range(3):
            optimizer.step(closure)
    assert closure().item() < before
    assert (model.weight[~model.weight_mask] == 0).all()
    assert (model.weight[model.weight_mask] != 0).all()
    assert (model.shift != 0).all()
    state = optimizer.state[next(iter(model.parameters()))]
    for vector in (state["d"], *state["old_dirs"], *state["old_stps"]):
        places = dict(zip(dict(model.named_parameters()), vector.split([48, 8, 3]), strict=False))
        weight = torch.view_as_complex(places["weight"].view(4, 6, 2))
        assert (weight[~model.weight_mask] == 0).all()
        assert (weight[model.weight_mask] != 0).any()


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
    swapped = OPTIMIZERS["sgd"](ticket.parameters())
    with (
        pytest.raises(TypeError, match="model first, then the optimizers; got SGD"),
        keep_masks(swapped, ticket),
    ):
        pass


def test_plain_zeros_are_named_where_masks_are_missing():
    """Pruned, but by zeros: to prune it again would be wrong."""
    model = small_model()
    zeros = convert_masks(prune(model, 0.5), to="zeros")
    advice = r"prunable weights are exactly zero.*apply_masks\(model, find_masks\(model, zeros=True\)\)"
    with (
        pytest.raises(ValueError, match=advice),
        keep_masks(zeros, OPTIMIZERS["sgd"](zeros.parameters())),
    ):
        pass
    with pytest.raises(ValueError, match=advice):
        rewind(zeros, model)
    with pytest.raises(ValueError, match="use prune or apply_masks first"):
        rewind(model, model)
    found = find_masks(apply_masks(zeros, find_masks(zeros, zeros=True)))
    assert all(torch.equal(mask, found[name]) for name, mask in find_masks(prune(model, 0.5)).items())


# ---------------------------------------------------------------------------------------------------------
# Compiled and distributed


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


@pytest.mark.parametrize("make", [torch.optim.SparseAdam, lambda p: torch.optim.SGD(p, 0.1)])
def test_sparse_gradients_are_held_too(make):
    torch.manual_seed(0)
    mask = torch.rand(10, 4) > 0.5
    model = apply_masks(nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 3)), {"0.weight": mask})
    before = model[0].weight.detach().clone()
    optimizer = make([model[0].weight])
    with keep_masks(model, optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.tensor([1, 2, 3, 1])).square().sum().backward()
            assert not model[0].weight.grad.to_dense()[~mask].any()
            optimizer.step()
    moved = (model[0].weight.detach() != before).nonzero()[:, 0].unique().tolist()
    assert moved == [1, 2, 3]
    assert not model[0].weight.detach()[~mask].any()
