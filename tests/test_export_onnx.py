"""ONNX files compute what the model computes, in another runtime, or are not written."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from torch import Tensor, nn

import sparsetweaks as sw

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

# torch's exporter and onnxscript warn about themselves
pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_tweaked_ticket(tmp_path):
    units = [nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(150, 2)]
    model = sw.swap_activations(
        sw.inject_skips(sw.prune(nn.Sequential(*units), 0.5), strength=0.5), "swish"
    ).train()
    images = torch.randn(2, 3, 5, 5)
    sw.export(model, tmp_path / "model.onnx", format="onnx", inputs=images)
    assert model.training and os.listdir(tmp_path) == ["model.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        wanted = sw.copy_model(model).eval()(images)
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1.3e-5, atol=1e-4)
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert not any("mask" in initial.name for initial in graph.initializer)


class Named(nn.Module):
    """Takes keywords and returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Tensor]:
        return {"out": self.layer(x) * scale, "mean": x.mean()}


def test_keywords_in_and_a_dict_out(tmp_path):
    inputs = {"scale": torch.tensor([2.0]), "x": torch.randn(3, 4)}
    sw.export(Named(), tmp_path / "model.onnx", format="onnx", inputs=inputs)
    assert onnxruntime.InferenceSession(tmp_path / "model.onnx").get_outputs()[1].shape == []


def test_what_computes_something_else_there_is_not_written(tmp_path, monkeypatch):
    of = sys.modules["sparsetweaks.export"]
    run = of._run_onnx
    monkeypatch.setattr(of, "_run_onnx", lambda *given: [x + 0.01 for x in run(*given)])
    with pytest.raises(sw.SurgeryError, match=r"output 0 differs by up to 0.01"):
        sw.export(nn.Linear(4, 4), tmp_path / "model.onnx", format="onnx", inputs=torch.randn(1, 4))
    assert os.listdir(tmp_path) == []


def units(dtype: torch.dtype) -> nn.Module:
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(150, 2)]
    return sw.prune(nn.Sequential(*layers), 0.5).to(dtype)


class InBfloat16(nn.Module):
    """Computes in float32 what it takes and gives in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.float()).bfloat16()


@pytest.mark.parametrize(
    ("model", "inputs", "allowed"),
    [
        (units(torch.float16), torch.randn(2, 3, 5, 5), 1e-2),
        (InBfloat16(), torch.randn(2, 4).bfloat16(), 8e-2),
        (nn.Softplus(), torch.randn(2, 4), 1e-4),
        (nn.ReLU(), torch.randn(2, 4, dtype=torch.float64), 1e-6),
    ],
    ids=["float16", "bfloat16", "float32", "float64"],
)
def test_the_tolerance_is_that_of_the_precision(model, inputs, allowed, tmp_path, monkeypatch):
    of = sys.modules["sparsetweaks.export"]
    run = of._run_onnx

    def off_by(share: float) -> None:
        def run_off(*given: object) -> list[Tensor]:
            return [
                (x.double() + share * allowed * (1 + 2 * x.double().abs())).to(x.dtype) for x in run(*given)
            ]

        monkeypatch.setattr(of, "_run_onnx", run_off)
        sw.export(model, tmp_path / "model.onnx", format="onnx", inputs=inputs, overwrite=True)

    off_by(0.1)
    assert os.listdir(tmp_path) == ["model.onnx"]
    with pytest.raises(sw.SurgeryError, match=rf"output 0 differs by up to .*, and {allowed:g} plus"):
        off_by(1.5)


def test_whole_numbers_must_be_equal(tmp_path, monkeypatch):
    class Most(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.argmax(-1)

    sw.export(Most(), tmp_path / "model.onnx", format="onnx", inputs=torch.randn(2, 4))
    of = sys.modules["sparsetweaks.export"]
    for found, message in (
        (torch.tensor([1, 9]), "output 0 differs by up to"),
        (torch.tensor([1, 2, 3]), r"gives int64 of shape \(3,\) where the model gives int64 of shape \(2,\)"),
        (torch.tensor([1.0, 2.0]), r"gives float32 of shape \(2,\) where the model gives int64"),
    ):
        monkeypatch.setattr(of, "_run_onnx", lambda *given, found=found: [found])
        with pytest.raises(sw.SurgeryError, match=message):
            sw.export(Most(), tmp_path / "other.onnx", format="onnx", inputs=torch.randn(2, 4))
    assert os.listdir(tmp_path) == ["model.onnx"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_what_the_runtime_has_no_operators_for_is_not_written(dtype, tmp_path):
    model = nn.Linear(8, 8).to(dtype) if dtype.itemsize == 1 else units(dtype)
    inputs = torch.randn(1, 8) if dtype.itemsize == 1 else torch.randn(2, 3, 5, 5)
    path = tmp_path / "model.onnx"
    path.write_bytes(b"mine")
    with pytest.raises(
        sw.SurgeryError, match=rf"for {dtype}: export it in torch\.float32, or export the weights"
    ):
        sw.export(model, path, format="onnx", inputs=inputs, overwrite=True)
    assert path.read_bytes() == b"mine" and os.listdir(tmp_path) == ["model.onnx"]


def test_an_operator_without_counterpart_is_named(tmp_path):
    class Eigenvalues(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.eigvals(x).real

    with pytest.raises(
        sw.SurgeryError, match=r"No ONNX function found for .*linalg_eig.*export the weights alone"
    ):
        sw.export(Eigenvalues(), tmp_path / "model.onnx", format="onnx", inputs=torch.randn(3, 3))
    assert os.listdir(tmp_path) == []


def test_chance_is_told_and_the_random_state_kept(tmp_path):
    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand_like(x)

    before = torch.get_rng_state()
    with pytest.raises(sw.SurgeryError, match="Does the model draw random numbers"):
        sw.export(
            Noise(),
            tmp_path / "model.onnx",
            format="onnx",
            inputs=torch.randn(4, generator=torch.Generator()),
        )
    assert torch.equal(torch.get_rng_state(), before)


def test_what_cannot_be_exported_says_why(tmp_path):
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(
        sw.SurgeryError, match=r"torch\.onnx cannot export this model: Could not guard on data"
    ):
        sw.export(Branches(), tmp_path / "model.onnx", format="onnx", inputs=torch.randn(4))
    assert os.listdir(tmp_path) == []
