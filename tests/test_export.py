"""What is exported is the model without its masks; a sparse file gives every bit back, or refuses."""

from __future__ import annotations

import copy
import json
import os
import struct
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

import sparsetweaks as sw
from sparsetweaks.export import export, load_sparse, plain_state, remove_masks

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 2),
    )


class Masking(nn.Module):
    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return self.mask * weight


def masked(form: str) -> nn.Sequential:
    model = network()
    if form == "ours":
        return sw.prune(model, 0.5)
    for layer in (model[0], model[3]):
        if form == "torch":
            torch_prune.l1_unstructured(layer, "weight", 0.5)
        else:
            parametrize.register_parametrization(layer, "weight", Masking(layer.weight > 0))
    return model


FORMS = ["ours", "torch", "parametrization"]


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


# ---------------------------------------------------------------------------------------------------------
# Without masks


@pytest.mark.parametrize("form", FORMS)
def test_masks_go_and_the_function_stays(form):
    model = masked(form).train()
    model[1].eval()
    model[0].weight.requires_grad_(False) if form == "ours" else None
    before = copy.deepcopy(model.state_dict())
    masks = sw.find_masks(model)
    ordinary = remove_masks(model)
    assert list(ordinary.state_dict()) == list(network().state_dict())
    assert sw.find_masks(ordinary) == {}
    assert not any(module._forward_pre_hooks for module in ordinary.modules())
    assert not any(parametrize.is_parametrized(module) for module in ordinary.modules())
    for name, mask in masks.items():
        weight = ordinary.get_parameter(name)
        assert isinstance(weight, nn.Parameter)
        assert torch.equal(bits(weight[~mask]), bits(torch.zeros(int((~mask).sum()))))
    assert [m.training for m in ordinary.modules()][:3] == [True, True, False]
    assert torch.equal(ordinary.eval()(IMAGES), copy_of(model)(IMAGES))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert sw.find_masks(model).keys() == masks.keys()


def copy_of(model: nn.Module) -> nn.Module:
    return sw.copy_model(model).eval()


def test_a_copy_without_parametrization_leaves_the_class_it_shares():
    model = masked("parametrization")
    layer = model[0]
    parametrize.register_parametrization(layer, "bias", nn.Softplus())  # no mask: it stays
    wanted = copy_of(model)(IMAGES)
    for _ in range(2):
        ordinary = remove_masks(model)
        assert torch.equal(ordinary.eval()(IMAGES), wanted)
        assert parametrize.is_parametrized(ordinary[0], "bias")
        assert not parametrize.is_parametrized(ordinary[0], "weight")
        assert "weight" in ordinary[0]._parameters
    assert torch.equal(copy_of(model)(IMAGES), wanted)


def test_other_hooks_of_a_pruned_layer_stay():
    model = masked("torch")
    model[0].register_forward_pre_hook(lambda module, args: None)
    assert len(remove_masks(model)[0]._forward_pre_hooks) == 1


def test_what_is_frozen_stays_frozen_and_what_is_dense_is_copied():
    model = sw.prune(network(), 0.5)
    model[0].weight.requires_grad_(False)
    assert [p.requires_grad for p in remove_masks(model).parameters()] == [
        p.requires_grad for p in model.parameters()
    ]
    dense = network()
    again = remove_masks(dense)
    assert again is not dense and torch.equal(again(IMAGES), dense(IMAGES))


# ---------------------------------------------------------------------------------------------------------
# Ordinary checkpoints


@pytest.mark.parametrize("form", FORMS)
def test_a_torch_file_loads_into_the_architecture(form, tmp_path):
    model = masked(form)
    export(model, tmp_path / "weights.pt")
    loaded = network()
    loaded.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(loaded.eval()(IMAGES), copy_of(model)(IMAGES))
    assert os.listdir(tmp_path) == ["weights.pt"]


def test_extra_state_is_refused_unless_it_loads(tmp_path):
    class Extra(nn.Linear):
        extra: object = 3

        def get_extra_state(self) -> object:
            return self.extra

        def set_extra_state(self, state: object) -> None:
            self.extra = state

    layer = Extra(2, 2)
    export(layer, tmp_path / "a.pt")
    assert torch.load(tmp_path / "a.pt", weights_only=True)["_extra_state"] == 3
    layer.extra = Masking
    with pytest.raises(sw.SurgeryError, match="weights_only=True will not load"):
        export(layer, tmp_path / "b.pt")
    with pytest.raises(
        sw.SurgeryError, match="'_extra_state' is a type, and a sparse file holds tensors only"
    ):
        export(layer, tmp_path / "b.pt", format="sparse")
    assert os.listdir(tmp_path) == ["a.pt"]


# ---------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("format", ["torch", "sparse"])
def test_a_file_that_is_there_is_replaced_only_if_told(format, tmp_path):
    path = tmp_path / "model"
    path.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        export(network(), path, format=format)
    assert path.read_bytes() == b"mine"
    export(network(), str(path), format=format, overwrite=True)
    assert path.stat().st_size > 1000
    assert os.listdir(tmp_path) == ["model"]


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    path = tmp_path / "model"
    path.write_bytes(b"mine")

    def full(*args: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(sys.modules["sparsetweaks.export"], "write_sparse", full)
    with pytest.raises(OSError, match="No space left"):
        export(network(), path, format="sparse", overwrite=True)
    assert path.read_bytes() == b"mine" and os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"format": "gguf"}, ValueError, "unknown format 'gguf': choose from 'torch', 'onnx', 'sparse'"),
        ({"format": "onnx"}, ValueError, "needs inputs="),
        ({"inputs": IMAGES}, ValueError, "inputs are for format='onnx'"),
    ],
)
def test_wrong_options_are_told(options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        export(network(), tmp_path / "model", **options)
    with pytest.raises(FileNotFoundError, match="does not exist: make it first"):
        export(network(), tmp_path / "none" / "model")


# ---------------------------------------------------------------------------------------------------------
# Sparse files


@pytest.mark.parametrize("form", FORMS)
def test_a_sparse_file_gives_every_bit_back(form, tmp_path):
    model = masked(form)
    export(model, tmp_path / "small", format="sparse")
    state, wanted = load_sparse(tmp_path / "small"), plain_state(model)
    assert list(state) == list(wanted)
    for name, tensor in wanted.items():
        assert (state[name].dtype, state[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(bits(state[name]), bits(tensor))
    loaded = load_sparse(tmp_path / "small", into=network())
    for name, mask in sw.find_masks(model).items():
        assert torch.equal(sw.find_masks(loaded)[name], mask)
    assert torch.equal(loaded.eval()(IMAGES), copy_of(model)(IMAGES))


def test_the_mask_decides_not_the_values(tmp_path):
    layer = nn.Linear(6, 2, bias=False)
    values = torch.tensor([[0.0, -0.0, float("nan"), float("inf"), 1e-45, 1.0], [1, 2, 3, 4, 5, 6]])
    mask = torch.tensor([[True] * 6, [False] * 5 + [True]])
    layer = sw.apply_masks(layer, {"weight": mask})
    with torch.no_grad():
        layer.weight.copy_(values)  # also beneath the mask
    layer.weight.data[0, 2:3].view(torch.int32).fill_(0x7FC12345)  # a NaN with a message in it
    export(layer, tmp_path / "small", format="sparse")
    loaded = load_sparse(tmp_path / "small", into=nn.Linear(6, 2, bias=False))
    assert torch.equal(loaded.weight_mask, mask)
    wanted = layer.weight.detach().clone()
    wanted[1, :5] = 0
    assert torch.equal(bits(loaded.weight.detach()), bits(wanted))


def test_a_model_to_load_into_may_be_masked_otherwise_and_is_left_alone(tmp_path):
    model, other = sw.prune(network(), 0.9), sw.prune(network(), 0.5)
    before = copy.deepcopy(other.state_dict())
    export(model, tmp_path / "small", format="sparse")
    loaded = load_sparse(tmp_path / "small", into=other)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())


def tied() -> nn.Module:
    model = network()
    model[3] = nn.Conv2d(6, 6, 3, padding=1, bias=False)
    model.register_module("again", nn.Conv2d(6, 6, 3, padding=1, bias=False))
    model.again.weight = model[3].weight
    return model


def untied() -> nn.Module:
    model = tied()
    model.again.weight = nn.Parameter(model[3].weight.detach() + 1)
    return model


def lazy() -> nn.Module:
    model = network()
    model[8] = nn.LazyLinear(2)
    return model


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize(
    ("exported", "into", "message"),
    [
        (
            network,
            lambda: nn.Linear(2, 2),
            "the file lacks 'weight', 'bias', and the model does not know '0.weight'",
        ),
        (
            network,
            lambda: sw.inject_skips(network()),
            r"the file lacks '0\.skip\.strength', .*with the same tweaks",
        ),
        (
            lambda: network()[:4],
            lambda: network()[:3],
            r"lacks nothing, and the model does not know '3\.weight'",
        ),
        (
            network,
            lambda: network().half(),
            r"'0\.weight' is float32 of shape \(6, 3, 3, 3\) in the file, and float16",
        ),
        (
            network,
            lambda: nn.Sequential(*network()[:8], nn.Linear(6, 3)),
            r"'8\.weight' is float32 of shape \(2, 6\) in the file, and float32 of shape \(3, 6\) in the model",
        ),
        (
            network,
            lambda: network().to("meta"),
            r"'0\.weight' of the model is on the meta device: model\.to_empty",
        ),
        (network, lazy, r"'8\.weight' is not initialised yet"),
        (
            untied,
            tied,
            r"'3\.weight' and 'again\.weight' are one tied weight in the model, and two in the file",
        ),
    ],
)
def test_a_file_that_does_not_fit_a_model_is_refused_and_the_model_left_alone(
    exported, into, message, tmp_path
):
    export(exported(), tmp_path / "small", format="sparse")
    model = into()
    before = {name: (value, value._version) for name, value in model.state_dict(keep_vars=True).items()}
    with pytest.raises(sw.SurgeryError, match=message):
        load_sparse(tmp_path / "small", into=model)
    for name, value in model.state_dict(keep_vars=True).items():
        assert value is before[name][0] and value._version == before[name][1]
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got dict"):
        load_sparse(tmp_path / "small", into={})


def test_a_file_of_untied_equal_weights_loads_into_tied_ones(tmp_path):
    model = untied()
    model.again.weight = nn.Parameter(model[3].weight.detach().clone())
    export(model, tmp_path / "small", format="sparse")
    loaded = load_sparse(tmp_path / "small", into=tied())
    assert loaded.again.weight is loaded[3].weight and torch.equal(loaded[3].weight, model[3].weight)


def test_a_dense_model_has_no_masks_after_loading(tmp_path):
    export(network(), tmp_path / "dense", format="sparse")
    assert sw.find_masks(load_sparse(tmp_path / "dense", into=network())) == {}


def test_tied_weights_are_stored_once_and_come_back_as_one(tmp_path):
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    model[1].weight = model[0].weight
    export(model, tmp_path / "tied", format="sparse")
    assert (tmp_path / "tied").stat().st_size < 1.2 * 64 * 64 * 4
    state = load_sparse(tmp_path / "tied")
    assert list(state) == ["0.weight", "1.weight"] and state["0.weight"] is state["1.weight"]
    for include in ("0", "1"):  # a mask under either name
        one = sw.prune(model, 0.9, include=include) if include == "0" else model
        if include == "1":
            one = sw.copy_model(model)
            one[1].register_buffer("weight_mask", torch.eye(64).bool())
        export(one, tmp_path / "tied", format="sparse", overwrite=True)
        loaded = load_sparse(tmp_path / "tied", into=model)
        found, wanted = sw.find_masks(loaded), sw.find_masks(one)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], mask) for name, mask in wanted.items())


def test_it_is_a_safetensors_file_that_others_can_read(tmp_path):
    from safetensors import safe_open

    model = sw.prune(network(), 0.9)
    export(model, tmp_path / "small", format="sparse")
    with safe_open(tmp_path / "small", "pt") as file:
        keys = set(file.keys())
        assert file.metadata()["format"] == "sparsetweaks-sparse"
        assert torch.equal(file.get_tensor("8.weight"), model[8].weight)
        mask = model[3].weight_mask
        assert torch.equal(file.get_tensor("3.weight/values"), model[3].weight.detach()[mask])
    assert {"3.weight/gaps", "1.running_var"} <= keys
    with open(tmp_path / "small", "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        assert length % 8 == 0
        header = json.loads(file.read(length))
    assert max(entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__") == (
        (tmp_path / "small").stat().st_size - 8 - length
    )


@pytest.mark.parametrize("form", ["masks", "plain zeros"])
def test_a_whole_resnet18_at_95_percent_takes_less_than_an_eighth(form, tmp_path):
    from torchvision.models import resnet18

    ticket = sw.prune(resnet18(), 0.95)
    ticket = ticket if form == "masks" else sw.convert_masks(ticket, to="zeros")
    export(ticket, tmp_path / "dense")
    export(ticket, tmp_path / "small", format="sparse")
    dense, small = ((tmp_path / name).stat().st_size for name in ("dense", "small"))
    assert (
        small <= 0.12 * dense
    )  # 0.05 of values and 0.0125 of gaps; the classifier is dense, and 0.044 of it all
    loaded = load_sparse(tmp_path / "small", into=resnet18())
    assert loaded.state_dict().keys() == ticket.state_dict().keys()
    for name, value in ticket.state_dict().items():
        assert torch.equal(bits(loaded.state_dict()[name]), bits(value))


@pytest.mark.parametrize("damage", ["flip", "cut", "grow", "empty", "other", "later", "header"])
def test_a_damaged_file_is_refused(damage, tmp_path):
    path = tmp_path / "small"
    export(sw.prune(network(), 0.5), path, format="sparse")
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    elif damage == "cut":
        del data[-1:]
    elif damage == "grow":
        data += b"\0"
    elif damage == "empty":
        data.clear()
    elif damage == "other":
        from safetensors.torch import save

        data = bytearray(save({"a": torch.zeros(2)}))
    elif damage == "later":
        from sparsetweaks import sparse_file

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sparse_file, "VERSION", 2)
            export(network(), path, format="sparse", overwrite=True)
        data = bytearray(path.read_bytes())
    else:
        data[12] ^= 8
    path.write_bytes(data)
    with pytest.raises(sw.SurgeryError, match=r"damaged|no sparse file|version 2, and this reads version 1"):
        load_sparse(path)


def test_what_a_sparse_file_cannot_hold_is_refused(tmp_path):
    path = tmp_path / "small"
    with pytest.raises(sw.SurgeryError, match="meta device"):
        export(network().to("meta"), path, format="sparse")
    model = network()
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    with pytest.raises(
        sw.SurgeryError, match=r"'sparse' is torch\.float32, torch\.sparse_coo: a sparse file holds"
    ):
        export(model, path, format="sparse")
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------------------------------------------------
# ONNX


def test_onnx_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for kind in (ImportError, sw.SurgeryError):
        with pytest.raises(kind, match=r"needs the package onnx.*: pip install onnx onnxscript onnxruntime"):
            export(network(), tmp_path / "model.onnx", format="onnx", inputs=IMAGES)
    assert os.listdir(tmp_path) == []


class Versioned(nn.Linear):
    """A layer whose loading asks for the version of what it loads, as torchvision's MNASNet does."""

    _version = 2

    def _load_from_state_dict(self, state: dict, prefix: str, metadata: dict, *rest: object) -> None:
        if metadata.get("version") not in (1, 2):
            raise ValueError(f"version should be 1 or 2, not {metadata.get('version')}")
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def test_what_is_written_carries_the_versions_of_its_modules(tmp_path):
    model = sw.prune(nn.Sequential(Versioned(8, 8), nn.Linear(8, 2)), 0.5)
    export(model, tmp_path / "weights.pt")
    export(model, tmp_path / "weights.safetensors", format="sparse")
    fresh = nn.Sequential(Versioned(8, 8), nn.Linear(8, 2))
    fresh.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    again = load_sparse(tmp_path / "weights.safetensors", into=fresh)
    state = load_sparse(tmp_path / "weights.safetensors")
    assert torch.equal(again[0].weight_mask, model[0].weight_mask)
    assert {name: each["version"] for name, each in state._metadata.items()} == {"": 1, "0": 2, "1": 1}
    fresh.load_state_dict(state)


class Renaming(nn.Linear):
    """A layer whose state_dict has another name for its weight."""

    def _save_to_state_dict(self, state: dict, prefix: str, keep: bool) -> None:
        super()._save_to_state_dict(state, prefix, keep)
        state[prefix + "kernel"] = state.pop(prefix + "weight")


def test_a_mask_that_the_sparse_file_has_no_name_for_is_not_lost_in_silence(tmp_path):
    model = sw.prune(nn.Sequential(Renaming(30, 30), nn.Linear(30, 2)), 0.5)
    with pytest.raises(sw.SurgeryError, match=r"'0\.weight' has a mask, and the state_dict has no such name"):
        export(model, tmp_path / "weights.safetensors", format="sparse")
    assert not list(tmp_path.iterdir())


def test_a_recurrent_layer_gets_its_order_back():
    layer = nn.LSTM(4, 4)
    before = list(layer.state_dict())
    torch_prune.random_unstructured(layer, "weight_ih_l0", 0.5)
    ordinary = remove_masks(layer)
    assert list(ordinary.state_dict()) == before
    ordinary(torch.randn(2, 3, 4))
