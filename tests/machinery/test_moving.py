"""Devices, dtypes, memory formats and autocast: masks move along, zeros stay zero, and neutral stays neutral."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from machinery.cases import (
    NEUTRAL,
    OF_THE_VALUES,
    SURGERIES,
    assert_held,
    assert_same,
    assert_same_masks,
    assert_same_runs,
    batch_for,
    run,
    ticket_of,
)
from torch import Tensor, nn

import sparsetweaks as st

STEPS = 3
LOW_PRECISION = {torch.bfloat16: 0.05, torch.float16: 0.02}
"""Relative distance to float32 that is expected of outputs: a few units in the last place."""

GRADIENTS = 3
"""So many times as far may gradients be: rounding switches some rectifiers."""


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """The relative distance of two tensors as vectors."""
    distance = (actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-6)
    assert distance < tolerance, f"{distance:.3g}"


def flat(gradients: dict[str, Tensor | None]) -> Tensor:
    return torch.cat([gradient.flatten().float() for gradient in gradients.values() if gradient is not None])


@pytest.mark.machinery('.to(device="meta") and back')
def test_meta(model, name):
    state = {key: value.clone() for key, value in model.state_dict().items()}
    meta = st.copy_model(model).to(device="meta")
    assert all(tensor.is_meta for tensor in meta.state_dict().values())
    output = meta(batch_for(name)[0].to("meta"))
    assert output.is_meta
    assert output.shape == model(batch_for(name)[0]).shape
    back = st.copy_model(meta).to_empty(device="cpu")
    back.load_state_dict(state)
    assigned = st.copy_model(meta)
    assigned.load_state_dict(state, assign=True)
    model.load_state_dict(state)  # its statistics, which the forward has moved
    assert_same(back, model, name)
    assert_same(assigned, model, name)


@pytest.mark.machinery(".to(torch.float64)")
def test_double(model, original, name, surgery):
    double = st.copy_model(model).to(torch.float64)
    inputs, targets = batch_for(name)
    assert_same_masks(double, model)
    assert {value.dtype for value in double.state_dict().values()} <= {torch.float64, torch.bool, torch.int64}
    for training in (True, False):
        wide = run(double, (inputs.double(), targets), training=training)
        assert wide.output.dtype == torch.float64
        assert_same_runs(wide, run(model, (inputs, targets), training=training), rtol=1e-3, atol=1e-5)
    if surgery not in OF_THE_VALUES:
        after = SURGERIES[surgery](original.to(torch.float64), name)
        assert after(inputs.double()).dtype == torch.float64
        for key, value in after.state_dict().items():
            if "skip" in key:
                assert value.dtype == torch.float64
    assert_same(double.to(torch.float32), model, name)


@pytest.mark.machinery(".to(torch.bfloat16) and .to(torch.float16)")
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_low_precision(model, original, name, surgery, dtype):
    inputs, targets = batch_for(name)
    low = st.copy_model(model).to(dtype)
    assert_same_masks(low, model)
    actual, expected = run(low, (inputs.to(dtype), targets)), run(model, (inputs, targets))
    assert actual.output.dtype == dtype
    assert_near(actual.output, expected.output, LOW_PRECISION[dtype])
    assert all(gradient.dtype == dtype for gradient in actual.gradients.values())
    assert_near(flat(actual.gradients), flat(expected.gradients), GRADIENTS * LOW_PRECISION[dtype])
    neutral = NEUTRAL[surgery](original.to(dtype))
    assert torch.equal(
        run(neutral, (inputs.to(dtype), targets)).output, run(original, (inputs.to(dtype), targets)).output
    )


@pytest.mark.machinery(".to(memory_format=torch.channels_last)")
def test_channels_last(model, name):
    inputs, targets = batch_for(name)
    last = st.copy_model(model).to(memory_format=torch.channels_last)
    assert_same_masks(last, model)
    for key, value in last.named_parameters():
        if value.dim() == 4:
            assert value.is_contiguous(memory_format=torch.channels_last)
            mask = dict(last.named_buffers()).get(f"{key}_mask", value)
            assert mask.is_contiguous(memory_format=torch.channels_last)
    if inputs.dim() == 4:
        inputs = inputs.to(memory_format=torch.channels_last)
    for training in (True, False):
        actual = run(last, (inputs, targets), training=training)
        assert_same_runs(actual, run(model, (inputs, targets), training=training), rtol=1e-3, atol=1e-5)
    if inputs.dim() == 4:
        hidden: list[Tensor] = []
        handle = last.blocks.register_forward_hook(lambda module, inputs, output: hidden.append(output))
        last(inputs)
        handle.remove()
        assert hidden[0].is_contiguous(memory_format=torch.channels_last)


def train_with_autocast(
    model: nn.Module, name: str, dtype: torch.dtype | None, scaler: torch.amp.GradScaler
) -> list[float]:
    """A few masked steps as the AMP recipe has them; the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    losses = []
    with st.keep_masks(model, optimizer):
        for seed in range(STEPS):
            inputs, targets = batch_for(name, seed)
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                loss = F.cross_entropy(model(inputs), targets)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
            assert_held(model)
            for key, mask in st.find_masks(model).items():
                assert not model.get_parameter(key).grad[~mask].any()
    return losses


@pytest.mark.machinery("autocast bfloat16")
def test_autocast_bfloat16(model, original, name, surgery):
    check_autocast(model, original, name, surgery, torch.bfloat16)


@pytest.mark.machinery("autocast float16 and GradScaler")
def test_autocast_float16(model, original, name, surgery):
    check_autocast(model, original, name, surgery, torch.float16)


def check_autocast(
    model: nn.Module, original: nn.Module, name: str, surgery: str, dtype: torch.dtype
) -> None:
    batch = batch_for(name)
    with torch.autocast("cpu", dtype):
        actual = run(model, batch)
        neutral, plain = run(NEUTRAL[surgery](original), batch), run(original, batch)
    assert actual.output.dtype == plain.output.dtype == dtype
    assert torch.equal(neutral.output, plain.output)
    for key, gradient in plain.gradients.items():
        assert torch.equal(neutral.gradients[key], gradient), key
    expected = run(model, batch)
    assert_near(actual.output, expected.output, LOW_PRECISION[dtype])
    assert all(gradient.dtype == torch.float32 for gradient in actual.gradients.values())
    assert_near(flat(actual.gradients), flat(expected.gradients), GRADIENTS * LOW_PRECISION[dtype])

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=dtype == torch.float16)
    same = st.copy_model(model)
    losses = train_with_autocast(model, name, dtype, scaler)
    scale = 1024.0 if scaler.is_enabled() else 1.0
    assert scaler.get_scale() == scale  # no step was skipped
    # without autocast the same steps have nearly the same losses
    wide = train_with_autocast(same, name, None, torch.amp.GradScaler("cpu", enabled=False))
    assert losses == pytest.approx(wide, rel=0.1)
    assert not any(torch.equal(a, b) for a, b in zip(masked(model), masked(ticket_of(name))))


def masked(model: nn.Module) -> list[Tensor]:
    return [model.get_parameter(key) for key in st.find_masks(model)]
