"""Compilers and exporters: what they make computes what the model computes, in one graph, compiled once."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from machinery.cases import (
    OF_THE_VALUES,
    ONE_MODEL,
    SURGERIES,
    assert_held,
    assert_same_masks,
    assert_same_runs,
    batch_for,
    run,
)
from torch import Tensor, nn

import sparsetweaks as st

STEPS = 3
TWO_CELLS = ["convolutional, all", "transformer, all"]


@pytest.fixture
def one_compilation() -> Iterator[None]:
    """A fresh compiler that fails if it must compile anything twice, and draws random numbers as eager code does."""
    torch._dynamo.reset()
    import torch._inductor.config as inductor

    with torch._dynamo.config.patch(error_on_recompile=True), inductor.patch(fallback_random=True):
        yield
    torch._dynamo.reset()


def check_compiled(model: nn.Module, name: str, backend: str) -> None:
    """Outputs, gradients and statistics in training mode, then masked steps that move every parameter."""
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    expected = run(model, batch_for(name))
    assert_same_runs(run(model, batch_for(name), call=compiled), expected, rtol=1e-3, atol=1e-5)
    eager = st.copy_model(model)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9) for each in (model, eager)]
    model.train(), eager.train()
    with st.keep_masks(compiled, optimizers[0]), st.keep_masks(eager, optimizers[1]):
        for seed in range(STEPS):
            inputs, targets = batch_for(name, seed)
            for call, optimizer in zip((compiled, eager), optimizers):
                torch.manual_seed(seed)
                optimizer.zero_grad()
                F.cross_entropy(call(inputs), targets).backward()
                optimizer.step()
            assert_held(model)
    for key, value in eager.named_parameters():
        torch.testing.assert_close(model.get_parameter(key), value, rtol=1e-3, atol=1e-5)
        assert value.grad is not None
    strengths = [value for key, value in eager.named_parameters() if key.endswith("skip.strength")]
    assert len({float(value.detach()) for value in strengths}) == len(strengths)  # each was trained


@pytest.mark.machinery("torch.compile, aot_eager, one graph, compiled once", fast=TWO_CELLS)
@pytest.mark.usefixtures("one_compilation")
def test_ahead_of_time(model, name):
    check_compiled(model, name, "aot_eager")


@pytest.mark.machinery("torch.compile, inductor, one graph, compiled once", fast=["transformer, all"])
@pytest.mark.usefixtures("one_compilation")
def test_inductor(model, name):
    check_compiled(model, name, "inductor")


@pytest.mark.machinery("torch.compile, inductor, inference", fast=["convolutional, learned skips"])
@pytest.mark.usefixtures("one_compilation")
def test_inductor_inference(model, name):
    inputs = batch_for(name)[0]
    model.eval()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(compiled(inputs), model(inputs))
        torch.testing.assert_close(compiled(-inputs), model(-inputs))


# --------------------------------------------------------------------------------------------------------- export


def check_exported(
    model: nn.Module, name: str, *, training: bool, strict: bool
) -> torch.export.ExportedProgram:
    """The program gives what the model gives, for a batch of another size too."""
    model.train(training)
    size = torch.export.Dim("size", min=2, max=64)
    program = torch.export.export(model, (batch_for(name)[0],), dynamic_shapes=({0: size},), strict=strict)
    exported = program.module()
    for batch in (batch_for(name), batch_for(name, seed=1, size=7)):
        expected = run(model, batch, training=training)
        torch.manual_seed(2)
        output = exported(batch[0])
        torch.testing.assert_close(output.detach(), expected.output)
        F.cross_entropy(output, batch[1]).backward()
        gradients = {key: value.grad for key, value in exported.named_parameters()}
        assert gradients.keys() == expected.gradients.keys()
        for key, gradient in expected.gradients.items():
            torch.testing.assert_close(gradients[key], gradient)
        exported.zero_grad()
    return program


@pytest.mark.machinery("torch.export and run", fast=ONE_MODEL)
def test_export(model, name):
    program = check_exported(model, name, training=False, strict=False)
    masks = st.find_masks(model)
    assert {key.removesuffix("_mask") for key in program.state_dict if key.endswith("_mask")} == set(masks)
    for key, mask in masks.items():
        assert torch.equal(program.state_dict[f"{key}_mask"], mask)
        assert not program.state_dict[key][~mask].any()


@pytest.mark.machinery("torch.export, strict", fast=TWO_CELLS)
def test_strict_export(model, name):
    check_exported(model, name, training=False, strict=True)


@pytest.mark.machinery("torch.export, in training mode", fast=TWO_CELLS)
def test_export_in_training_mode(model, name):
    check_exported(model, name, training=True, strict=False)


@pytest.mark.machinery("torch.export, saved, loaded and run", fast=TWO_CELLS)
def test_export_saved(model, name):
    inputs = batch_for(name)[0]
    model.eval()
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (inputs,)), file)
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(inputs), model(inputs))


# ----------------------------------------------------------------------------------------------------------- ONNX


def run_onnx(path: Path, inputs: Tensor) -> Tensor:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (name,) = [each.name for each in session.get_inputs()]
    return torch.from_numpy(session.run(None, {name: inputs.numpy()})[0])


def check_onnx(path: Path, model: nn.Module, name: str) -> None:
    for batch in (batch_for(name), batch_for(name, seed=1, size=7)):
        torch.testing.assert_close(run_onnx(path, batch[0]), model(batch[0]), rtol=1e-4, atol=1e-6)
    assert_held(model)


@pytest.mark.machinery("ONNX, in onnxruntime", fast=TWO_CELLS)
def test_onnx(model, name, tmp_path):
    pytest.importorskip("onnxscript")
    model.eval()
    size = torch.export.Dim("size", min=2, max=64)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    program = torch.onnx.export(
        model, (batch_for(name)[0],), dynamo=True, dynamic_shapes=({0: size},), verbose=False
    )
    program.save(tmp_path / "model.onnx")
    check_onnx(tmp_path / "model.onnx", model, name)


def export_by_torchscript(model: nn.Module, inputs: Tensor, path: Path) -> None:
    options = {"input_names": ["inputs"], "dynamic_axes": {"inputs": {0: "size"}}}
    torch.onnx.export(model.eval(), (inputs,), path, dynamo=False, **options)


@pytest.mark.machinery("ONNX by the TorchScript exporter, in onnxruntime")
# torch says that this exporter retires, that it does not fold strided slices, and that it fixes the numbers of
# channels, by which a skip chooses how to match them
@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python boolean:torch.jit.TracerWarning")
@pytest.mark.filterwarnings(
    "ignore:You are using the legacy TorchScript-based ONNX export:DeprecationWarning"
)
@pytest.mark.filterwarnings("ignore:The feature will be removed:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Constant folding - Only steps=1 can be constant folded:UserWarning")
def test_onnx_by_torchscript(model, name, tmp_path, torch_cannot):
    pytest.importorskip("onnx")
    inputs, path = batch_for(name)[0], tmp_path / "model.onnx"
    if averages_channels(model):
        with torch_cannot(
            torch.onnx.errors.SymbolicValueError, "adaptive_avg_pool1d, output size that are not factor"
        ):
            export_by_torchscript(nn.AdaptiveAvgPool1d(4), torch.ones(2, 3, 6), path)
        return
    export_by_torchscript(model, inputs, path)
    check_onnx(path, model, name)


def averages_channels(model: nn.Module) -> bool:
    """Whether a skip leads to fewer channels, by torch's adaptive pooling."""
    skips = [module for module in model.modules() if hasattr(module, "geometry")]
    return any(skip.geometry.out_channels < skip.geometry.in_channels for skip in skips)


# ------------------------------------------------------------------------------------------ surgery after compiling


COMPILED_FAST = ["convolutional, swap", "convolutional, scale", "transformer, all"]


@pytest.mark.machinery("the surgery of a compiled model", fast=COMPILED_FAST)
def test_surgery_of_a_compiled_model(model, original, name, surgery, torch_cannot):
    """What was compiled is the model of before; the result is compiled anew."""
    torch._dynamo.reset()
    compiled = torch.compile(original, backend="aot_eager", fullgraph=True)
    inputs = batch_for(name)[0]
    if surgery in OF_THE_VALUES:  # scales are learned with second derivatives
        with torch_cannot(RuntimeError, "create_graph=False|double backward"):
            parameters = list(original.parameters())
            gradients = torch.autograd.grad(compiled(inputs).sum(), parameters, create_graph=True)
            torch.autograd.grad(gradients[0].sum(), parameters)
        return
    original.eval()
    torch.testing.assert_close(compiled(inputs), original(inputs))
    result = SURGERIES[surgery](compiled, name)
    torch.testing.assert_close(result(inputs), model.eval()(inputs), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(compiled(inputs), original(inputs))
    assert_same_masks(result._orig_mod, model)
