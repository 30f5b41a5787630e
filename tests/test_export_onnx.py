"""ONNX files compute what the model computes, in another runtime, or are not written."""

from __future__ import annotations

import os

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
    run = onnxruntime.InferenceSession.run
    monkeypatch.setattr(
        onnxruntime.InferenceSession, "run", lambda self, *given: [x + 0.01 for x in run(self, *given)]
    )
    with pytest.raises(sw.SurgeryError, match=r"output 0 differs by up to 0.01"):
        sw.export(nn.Linear(4, 4), tmp_path / "model.onnx", format="onnx", inputs=torch.randn(1, 4))
    assert os.listdir(tmp_path) == []


def test_what_cannot_be_exported_says_why(tmp_path):
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(sw.SurgeryError, match=r"torch\.onnx cannot export this model"):
        sw.export(Branches(), tmp_path / "model.onnx", format="onnx", inputs=torch.randn(4))
    assert os.listdir(tmp_path) == []
