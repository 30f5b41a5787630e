"""torch.func: the model as a function of its parameters, over samples, over models, and along a direction."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from machinery.cases import SURGERIES, assert_same, batch_for, run, ticket_of
from torch import Tensor
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import sparsetweaks as st

# torch has no batching rule for fused attention on the CPU, and says so
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet")

State = dict[str, Tensor]


def parameters_of(model: torch.nn.Module) -> State:
    return {key: value.detach().clone() for key, value in model.named_parameters()}


@pytest.mark.machinery("torch.func.functional_call")
def test_functional_call(model, name, surgery):
    """Called with another model's state it is that model; its own stays."""
    other = SURGERIES[surgery](ticket_of(name, seed=7), name).eval()
    before = st.copy_model(model)
    inputs = batch_for(name)[0]
    output = functional_call(model.eval(), other.state_dict(), (inputs,))
    assert torch.equal(output, other(inputs))
    assert not torch.equal(output, model(inputs))
    assert_same(model.train(), before, name)


@pytest.mark.machinery("torch.func.grad")
def test_grad(model, name):
    inputs, targets = batch_for(name)

    def loss(parameters: State) -> Tensor:
        return F.cross_entropy(functional_call(model, parameters, (inputs,)), targets)

    expected = run(model, (inputs, targets), training=False)
    model.eval()
    gradients = grad(loss)(parameters_of(model))
    for key, gradient in expected.gradients.items():
        torch.testing.assert_close(gradients[key], gradient)


def per_sample_gradients(model: torch.nn.Module, name: str) -> State:
    inputs, targets = batch_for(name)

    def loss(parameters: State, sample: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, parameters, (sample[None],)), target[None])

    each = vmap(grad(loss), (None, 0, 0), randomness="different")
    return each(parameters_of(model), inputs, targets)


@pytest.mark.machinery("vmap over samples")
def test_per_sample_gradients(model, name):
    expected = run(model, batch_for(name), training=False)
    gradients = per_sample_gradients(model.eval(), name)
    for key, gradient in expected.gradients.items():
        torch.testing.assert_close(gradients[key].mean(0), gradient, rtol=1e-4, atol=1e-6)
    inputs, targets = batch_for(name)
    last = run(model, (inputs[-1:], targets[-1:]), training=False)
    for key, gradient in last.gradients.items():
        torch.testing.assert_close(gradients[key][-1], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.machinery("vmap over samples, in training mode")
def test_per_sample_gradients_in_training_mode(original, name, surgery, torch_cannot):
    """BatchNorm changes its statistics in place."""
    with torch_cannot(RuntimeError, "in-place operation"):
        per_sample_gradients(original.train(), name)


@pytest.mark.machinery("vmap over models")
def test_ensemble(model, name, surgery):
    models = [model, *(SURGERIES[surgery](ticket_of(name, seed=seed), name) for seed in (7, 8))]
    parameters, buffers = stack_module_state([each.eval() for each in models])
    skeleton = copy.deepcopy(model).to("meta")
    inputs = batch_for(name)[0]

    def call(parameters: State, buffers: State) -> Tensor:
        return functional_call(skeleton, (parameters, buffers), (inputs,))

    outputs = vmap(call)(parameters, buffers)
    for output, each in zip(outputs, models, strict=True):
        torch.testing.assert_close(output, each(inputs), rtol=1e-4, atol=1e-6)


def check_jvp(model: torch.nn.Module, name: str) -> None:
    """The derivative along a direction, against the backward pass."""
    model.eval()
    inputs, _ = batch_for(name)
    generator = torch.Generator().manual_seed(0)
    parameters = parameters_of(model)
    direction = {key: torch.randn(value.shape, generator=generator) for key, value in parameters.items()}

    def call(parameters: State) -> Tensor:
        return functional_call(model, parameters, (inputs,))

    output, derivative = jvp(call, (parameters,), (direction,))
    torch.testing.assert_close(output, model(inputs))
    weights = torch.randn(output.shape, generator=generator)
    gradients = torch.autograd.grad((model(inputs) * weights).sum(), list(model.parameters()))
    expected = sum((gradient * direction[key]).sum() for key, gradient in zip(parameters, gradients))
    torch.testing.assert_close((derivative * weights).sum(), expected, rtol=1e-3, atol=1e-4)


# torch decomposes some forward derivatives by a TorchScript that it retires
FORWARD_DERIVATIVES = pytest.mark.filterwarnings("ignore:.torch.jit:")


@FORWARD_DERIVATIVES
@pytest.mark.machinery("torch.func.jvp")
def test_jvp(model, original, name, surgery, torch_cannot):
    if name == "transformer":
        with torch_cannot(NotImplementedError, "forward AD with _scaled_dot_product_flash_attention_for_cpu"):
            check_jvp(original, name)
        return
    check_jvp(model, name)


@FORWARD_DERIVATIVES
@pytest.mark.machinery("torch.func.jvp, attention by its formula")
def test_jvp_without_fused_attention(model, name, surgery):
    with sdpa_kernel(SDPBackend.MATH):
        check_jvp(model, name)
