"""Training's machinery: checkpointing, averaged weights, optimizers that resume, hooks, and a second surgery."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from machinery.cases import (
    CLASSES,
    ONE_MODEL,
    SURGERIES,
    Block,
    Layer,
    assert_held,
    assert_same,
    assert_same_masks,
    assert_same_runs,
    batch_for,
    run,
    ticket_of,
    trained,
)
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint

import sparsetweaks as st

# ---------------------------------------------------------------------------------------- gradient checkpointing


class Checkpointed(nn.Sequential):
    """Blocks that are computed again in the backward pass instead of remembered."""

    reentrant = False

    def forward(self, input: Tensor) -> Tensor:
        for block in self:
            input = checkpoint(block, input, use_reentrant=self.reentrant)
        return input


class Reentrant(Checkpointed):
    reentrant = True


def checkpointed(model: nn.Module, kind: type[Checkpointed]) -> nn.Module:
    """The model with its blocks checkpointed, in place."""
    model.blocks = kind(*model.blocks).train(model.training)
    return model


def assert_same_but_statistics(actual: nn.Module, expected: nn.Module, name: str) -> None:
    """Equal outputs and gradients. (The statistics of BatchNorm are updated twice, by torch's design.)

    To the bit, except that reentrant checkpointing hands on gradients in another memory layout.
    """
    mine, theirs = run(actual, batch_for(name)), run(expected, batch_for(name))
    assert any("block" in key for key in mine.gradients)
    close = {"rtol": 1e-5, "atol": 1e-6} if type(actual.blocks) is Reentrant else {}
    assert_same_runs(mine._replace(buffers={}), theirs._replace(buffers={}), **close)


@pytest.mark.machinery("checkpointing around rewritten blocks")
@pytest.mark.parametrize("kind", [Checkpointed, Reentrant])
def test_checkpointing_after_the_surgery(model, name, kind):
    result = checkpointed(st.copy_model(model), kind)
    assert_same_but_statistics(result, model, name)
    assert_same_masks(result, model)


@pytest.mark.machinery("checkpointing in the model, before the surgery")
def test_checkpointing_before_the_surgery(model, original, name, surgery):
    """The loop that checkpoints is left as it is; the blocks within it are rewritten all the same."""
    result = SURGERIES[surgery](checkpointed(original, Checkpointed), name)
    assert [key for key, _ in result.named_modules()] == [key for key, _ in model.named_modules()]
    assert type(result.blocks) is Checkpointed
    assert_same_but_statistics(result, model, name)
    assert_same_masks(result, model)


@pytest.mark.machinery("reentrant checkpointing in the model, before the surgery")
def test_reentrant_checkpointing_before_the_surgery(model, original, name, surgery, torch_cannot):
    checkpointed(original, Reentrant)
    if surgery in ("scale", "all"):  # scales are learned from torch.autograd.grad
        with torch_cannot(RuntimeError, "incompatible with .grad"):
            output = original(batch_for(name)[0])
            torch.autograd.grad(output.sum(), list(original.parameters()))
        return
    result = SURGERIES[surgery](original, name)
    assert_same_but_statistics(result, model, name)
    assert_same_masks(result, model)


@pytest.mark.parametrize("gamma", [1.0, 1e-3], ids=["step", "bound"])
def test_second_derivatives_through_checkpoints(original, name, gamma):
    """Attention computed again in a second derivative is the attention of the first pass."""
    options = {"order": 2, "iterations": 2, "gamma": gamma}
    expected = st.find_layer_scales(original, batch_for(name), **options)
    scales = st.find_layer_scales(checkpointed(original, Checkpointed), batch_for(name), **options)
    assert scales.scales == pytest.approx(expected.scales, rel=1e-5)


# ---------------------------------------------------------------------------------------------- averaged weights


def averaged_by_hand(states: list[dict[str, Tensor]], weights: list[float]) -> dict[str, Tensor]:
    return {
        key: sum(weight * state[key].double() for weight, state in zip(weights, states)) for key in states[0]
    }


def train_and_average(
    model: nn.Module, averaged: AveragedModel, name: str, steps: int = 3
) -> list[dict[str, Tensor]]:
    """The parameters after each step, each of which was averaged in."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    states = []
    for seed in range(steps):
        trained(model, optimizer, name, [seed])
        averaged.update_parameters(model)
        states.append({key: value.detach().clone() for key, value in model.named_parameters()})
    return states


def assert_average(averaged: AveragedModel, model: nn.Module, expected: dict[str, Tensor]) -> None:
    for key, value in averaged.module.named_parameters():
        torch.testing.assert_close(value, expected[key], check_dtype=False)
    assert_same_masks(averaged.module, model)
    assert st.changes(averaged.module) == st.changes(model)


@pytest.mark.machinery("AveragedModel, SWA and update_bn")
def test_stochastic_weight_averaging(model, name):
    averaged = AveragedModel(model)
    states = train_and_average(model, averaged, name)
    assert_average(averaged, model, averaged_by_hand(states, [1 / len(states)] * len(states)))
    torch.manual_seed(3)  # dropout is on
    update_bn([batch_for(name, seed) for seed in range(3)], averaged)
    by_hand = st.copy_model(averaged.module).train()
    norms = [each for each in by_hand.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]
    for each in norms:
        each.reset_running_stats()
        each.momentum = None  # a plain mean over the batches
    torch.manual_seed(3)
    for seed in range(3):
        by_hand(batch_for(name, seed)[0])
    for key, value in by_hand.named_buffers():
        torch.testing.assert_close(averaged.module.get_buffer(key), value)
    assert norms


@pytest.mark.machinery("AveragedModel, EMA")
@pytest.mark.parametrize("use_buffers", [False, True])
def test_exponential_moving_average(model, name, use_buffers):
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)
    states = train_and_average(model, averaged, name)
    assert_average(averaged, model, averaged_by_hand(states, [0.81, 0.09, 0.1]))
    output = averaged.eval()(batch_for(name)[0])
    assert output.shape == (len(batch_for(name)[0]), CLASSES)
    assert torch.equal(output, averaged.module(batch_for(name)[0]))


# ----------------------------------------------------------------------------------------------------- optimizers

OPTIMIZERS: dict[str, Callable[[Iterable[Tensor]], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
}


@pytest.mark.machinery("optimizers rebuilt and resumed (SGD, Adam, AdamW)", fast=ONE_MODEL)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resuming(model, name, surgery, optimizer, tmp_path):
    """Training that was cut off goes on, with model and optimizer built anew, as if nothing had happened."""
    undisturbed = st.copy_model(model)
    steps = OPTIMIZERS[optimizer](undisturbed.parameters())
    trained(undisturbed, steps, name, range(4))

    first = OPTIMIZERS[optimizer](model.parameters())
    trained(model, first, name, range(2))
    torch.save({"model": model.state_dict(), "optimizer": first.state_dict()}, tmp_path / "cut.pt")

    saved = torch.load(tmp_path / "cut.pt", weights_only=True)
    resumed = SURGERIES[surgery](ticket_of(name, seed=7), name)
    resumed.load_state_dict(saved["model"])
    again = OPTIMIZERS[optimizer](resumed.parameters())
    again.load_state_dict(saved["optimizer"])
    trained(resumed, again, name, range(2, 4))

    assert_same(resumed, undisturbed, name)
    for mine, theirs in zip(again.state.values(), steps.state.values(), strict=True):
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    for key, value in undisturbed.named_parameters():
        if key.endswith("skip.strength"):
            assert not torch.equal(value, model.get_parameter(key))  # it was trained


# ---------------------------------------------------------------------------------------------------------- hooks


@pytest.mark.machinery("forward hooks")
def test_forward_hooks(original, name, surgery):
    """Hooks of before the surgery fire on the new model, in the same order, and see what its modules see."""
    calls: list[tuple[str, str]] = []
    seen: dict[str, Tensor] = {}

    def watch(key: str, module: nn.Module) -> None:
        def before(module: nn.Module, inputs: Any) -> None:
            calls.append(("before", key))

        def after(module: nn.Module, inputs: Any, output: Tensor) -> None:
            calls.append(("after", key))
            seen[key] = output.detach().clone()

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    for key, module in original.named_modules():
        watch(key, module)
    run(original, batch_for(name))
    expected, before = list(calls), dict(seen)
    calls.clear()
    result = SURGERIES[surgery](original, name)
    learning = list(calls)
    calls.clear()
    actual = run(result, batch_for(name))
    assert calls == expected
    assert learning == expected * (len(learning) // len(expected))
    assert torch.equal(seen[""], actual.output)
    assert seen.keys() == before.keys()
    if surgery != "none":
        assert not torch.equal(seen[""], before[""])

    handle = result.blocks[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    assert not torch.equal(run(result, batch_for(name)).output, actual.output)
    handle.remove()
    assert torch.equal(run(result, batch_for(name)).output, actual.output)


FIRST = {"convolutional": "conv", "transformer": "stem.0"}
"""The layer whose input needs no gradient."""


@pytest.mark.machinery("backward hooks")
def test_backward_hooks(original, name, surgery):
    """Wherever torch allows them: not on what is then overwritten in place, nor on the first layer."""
    calls: list[tuple[str, str]] = []
    seen: dict[str, Tensor] = {}

    def watch(key: str, module: nn.Module) -> None:
        def before(module: nn.Module, gradients: Any) -> None:
            calls.append(("before", key))

        def after(module: nn.Module, inputs: Any, outputs: Any) -> None:
            calls.append(("after", key))
            seen[key] = outputs[0].clone()

        module.register_full_backward_pre_hook(before)
        module.register_full_backward_hook(after)

    kinds = (nn.Linear, nn.modules.conv._ConvNd, Block, Layer)
    for key, module in original.named_modules():
        if isinstance(module, kinds) and key != FIRST[name]:
            watch(key, module)
    run(original, batch_for(name))
    expected = sorted(calls)
    result = SURGERIES[surgery](original, name)
    calls.clear()
    seen.clear()
    actual = run(result, batch_for(name))
    assert sorted(calls) == expected
    torch.testing.assert_close(seen["head"].sum(0), actual.gradients["head.bias"])


# ------------------------------------------------------------------------------------------------ a second surgery

SECOND: dict[str, Callable[[nn.Module], nn.Module]] = {
    "skips": lambda model: st.inject_skips(model, strength=0.5),
    "swap": lambda model: st.swap_activations(model, "mish", kinds=("relu", "silu")),
    "scale": lambda model: st.scale_layers(model, {"head.weight": 0.5}),
}


def neutral_second(model: nn.Module, second: str) -> nn.Module:
    """The second surgery at a setting that changes nothing, or there and back."""
    if second == "skips":
        return st.inject_skips(model, strength=0.0)
    if second == "scale":
        return st.scale_layers(model, {"head.weight": 1.0})
    (kind,) = {site.kind for site in st.find_activations(model, kinds=("relu", "silu"))}
    return st.swap_activations(SECOND[second](model), kind, kinds=("mish",))


@pytest.mark.machinery("a second surgery", fast=ONE_MODEL)
@pytest.mark.parametrize("second", SECOND)
def test_second_surgery(model, original, name, surgery, second):
    given = copy.deepcopy(model)
    if second == "skips" and surgery in ("learned skips", "fixed skips", "all"):
        with pytest.warns(st.NoEffectWarning, match="already has a skip"):
            again = SECOND[second](model)
        assert_same_runs(run(again, batch_for(name)), run(model, batch_for(name)))
        return
    result = SECOND[second](model)
    assert_same(model, given, name)
    assert_same_masks(result, model)
    assert len(st.changes(result)) == len(st.changes(model)) + (second != "scale")
    assert not torch.equal(run(result, batch_for(name)).output, run(model, batch_for(name)).output)
    for training in (True, False):
        neutral = run(neutral_second(model, second), batch_for(name), training=training)
        expected = run(model, batch_for(name), training=training)
        assert torch.equal(neutral.output, expected.output)
        for key, gradient in expected.gradients.items():
            assert torch.equal(neutral.gradients[key], gradient)
    # on what came back from a file, as on the model itself
    assert_same(SECOND[second](pickle.loads(pickle.dumps(model))), result, name)
    if (surgery, second) in (("learned skips", "swap"), ("fixed skips", "swap")):  # in either order
        exchanged = SURGERIES[surgery](SECOND[second](original), name)
        assert_same_runs(run(exchanged, batch_for(name)), run(result, batch_for(name)))
    trained(result, torch.optim.SGD(result.parameters(), lr=0.1, momentum=0.9), name, range(2))
    assert_held(result)
