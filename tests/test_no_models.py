"""Every public function with what is no model, and with a model that has no values: an error that says so."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

import sparsetweaks as st

INPUTS, TARGETS = torch.zeros(2, 3, 4, 4), torch.tensor([0, 1])
MASKS = {"0.weight": torch.ones(8, 3, 3, 3, dtype=torch.bool)}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 4))


def keep(model):
    optimizer = torch.optim.SGD(network().parameters(), 0.1)
    with st.keep_masks(model, optimizer):
        pass


TAKE_A_MODEL = {
    "anneal_ghosts": lambda model, folder: st.anneal_ghosts(model, 1.0),
    "apply_masks": lambda model, folder: st.apply_masks(model, MASKS),
    "changes": lambda model, folder: st.changes(model),
    "convert_masks": lambda model, folder: st.convert_masks(model, to="zeros"),
    "copy_model": lambda model, folder: st.copy_model(model),
    "cost": lambda model, folder: st.cost(model, INPUTS),
    "diff": lambda model, folder: st.diff(model, network()),
    "diff after": lambda model, folder: st.diff(network(), model),
    "distillation_loss": lambda model, folder: st.distillation_loss(
        torch.zeros(2, 4), TARGETS, teacher=model, inputs=INPUTS
    ),
    "export": lambda model, folder: st.export(model, folder / "file"),
    "export sparse": lambda model, folder: st.export(model, folder / "file", format="sparse"),
    "export onnx": lambda model, folder: st.export(model, folder / "file", format="onnx", inputs=INPUTS),
    "find_activations": lambda model, folder: st.find_activations(model),
    "find_layer_scales": lambda model, folder: st.find_layer_scales(model, (INPUTS, TARGETS)),
    "find_masks": lambda model, folder: st.find_masks(model),
    "find_masks zeros": lambda model, folder: st.find_masks(model, zeros=True),
    "find_skip_sites": lambda model, folder: st.find_skip_sites(model),
    "fold": lambda model, folder: st.fold(model),
    "inject_skips": lambda model, folder: st.inject_skips(model),
    "keep_masks": lambda model, folder: keep(model),
    "learn_layer_scales": lambda model, folder: st.learn_layer_scales(model, (INPUTS, TARGETS)),
    "match_budget": lambda model, folder: st.match_budget(model, 100),
    "prunable_weights": lambda model, folder: st.prunable_weights(model),
    "prune": lambda model, folder: st.prune(model, 0.5),
    "remove_ghosts": lambda model, folder: st.remove_ghosts(model),
    "remove_masks": lambda model, folder: st.remove_masks(model),
    "rewind": lambda model, folder: st.rewind(model, network()),
    "scale_layers": lambda model, folder: st.scale_layers(model, {"0.weight": 1.0}),
    "sparsity": lambda model, folder: st.sparsity(model),
    "summary": lambda model, folder: st.summary(model),
    "swap_activations": lambda model, folder: st.swap_activations(model, "swish"),
    "tweak": lambda model, folder: st.tweak(model, (INPUTS, TARGETS)),
    "verify": lambda model, folder: st.verify(model, network()),
    "verify after": lambda model, folder: st.verify(network(), model),
}
OTHERS = {"is_semi_structured", "load_sparse", "smooth_labels"}
"""They take no model, or one among other things."""

NEED_VALUES = (
    "cost", "export", "export sparse", "export onnx", "find_layer_scales", "learn_layer_scales", "match_budget", "prune",
    "sparsity", "verify",
)  # fmt: skip


def test_every_public_function_is_here():
    functions = {name for name in st.__all__ if not inspect.isclass(getattr(st, name))}
    assert {name.split()[0] for name in TAKE_A_MODEL} | OTHERS == functions


@pytest.mark.parametrize("name", TAKE_A_MODEL)
@pytest.mark.parametrize(
    "given", [[network()], network().state_dict(), "model"], ids=["list", "state", "text"]
)
def test_what_is_no_model(name, given, tmp_path):
    with pytest.raises(TypeError, match=rf"expected a torch\.nn\.Module, got {type(given).__name__}"):
        TAKE_A_MODEL[name](given, tmp_path)


@pytest.mark.parametrize("name", NEED_VALUES)
def test_masks_and_weights_on_the_meta_device(name, tmp_path):
    model = st.prune(network(), 0.5).to("meta")
    with pytest.raises(
        ValueError, match=r"'0\.weight' is on the meta device and has no values: load the model's"
    ):
        TAKE_A_MODEL[name](model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_buffer_alone_without_values_is_not_exported(tmp_path):
    model = network()
    model[1].running_mean = model[1].running_mean.to("meta")
    with pytest.raises(st.SurgeryError, match=r"'1\.running_mean' is on the meta device"):
        st.export(model, tmp_path / "file")


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("name", ["find_layer_scales", "match_budget", "prune", "sparsity"])
def test_lazy_weights(name, tmp_path):
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))
    with pytest.raises(ValueError, match=r"'0\.weight' is not initialised yet: run one batch"):
        TAKE_A_MODEL[name](model, tmp_path)


def semi_structured(weight):
    from torch.sparse.semi_structured import SparseSemiStructuredTensorCUTLASS

    fields = {"packed_t": None, "meta_t": None, "compressed_swizzled_bitmask": None}
    meta = torch.zeros(2, dtype=torch.int16)
    return SparseSemiStructuredTensorCUTLASS(weight.shape, packed=weight[:, ::2], meta=meta, **fields)


OTHER_STORAGE = {
    "stored as torch.sparse_csr": lambda weight: weight.to_sparse_csr(),
    "stored as torch.sparse_coo": lambda weight: weight.to_sparse(),
    "stored as torch._mkldnn": lambda weight: weight.to_mkldnn(),
    "quantized to torch.qint8": lambda weight: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8),
    "a nested tensor": lambda weight: torch.nested.nested_tensor([weight[0], weight[1, :2]]),
    "a semi-structured tensor": semi_structured,
}
COUNT_OR_WRITE = (
    "cost",
    "export",
    "export sparse",
    "export onnx",
    "match_budget",
    "prune",
    "sparsity",
    "summary",
)


@pytest.mark.filterwarnings(
    "ignore:(The PyTorch API|Sparse CSR|.*quantized tensor creation|.*nested tensors)"
)
@pytest.mark.parametrize("name", COUNT_OR_WRITE)
@pytest.mark.parametrize("stored", OTHER_STORAGE)
@pytest.mark.parametrize("masked", [False, True])
def test_weights_that_are_stored_otherwise(name, stored, masked, tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    model = st.prune(model, 0.5) if masked else model
    weight = OTHER_STORAGE[stored](model[0].weight.detach().clone())
    model[0].weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(st.SurgeryError, match=rf"'0\.weight' is {stored}, and masks, counts and files"):
        TAKE_A_MODEL[name](model, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
def test_a_buffer_that_is_stored_otherwise(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8))
    model.register_buffer("graph", torch.eye(4).to_sparse())
    with pytest.raises(st.SurgeryError, match=r"'graph' is stored as torch\.sparse_coo"):
        st.cost(model, torch.zeros(1, 8))
    st.export(model, tmp_path / "file")
    loaded = torch.load(tmp_path / "file", weights_only=True)
    assert torch.equal(loaded["graph"].to_dense(), torch.eye(4))


def test_meta_models_without_masks_still_verify():
    model = network().to("meta")
    assert st.verify(model, st.copy_model(model)).ok
