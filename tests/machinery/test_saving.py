"""Copies and files: what comes back is the model that went in, to the bit, in this process and in another."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from machinery.cases import MODELS, SURGERIES, Run, assert_same, assert_same_masks, batch_for, run, ticket_of
from machinery.processes import in_processes
from safetensors.torch import load_model, save_model
from torch import nn

import sparsetweaks as st


def other(name: str, surgery: str) -> nn.Module:
    """The same surgery on a model with other weights and other masks."""
    return SURGERIES[surgery](ticket_of(name, seed=7), name)


@pytest.mark.machinery("copy.deepcopy")
def test_deepcopy(model, name):
    copied = copy.deepcopy(model)
    assert_same(copied, model, name)
    shared = {tensor.data_ptr() for tensor in copied.state_dict().values() if tensor.numel()}
    assert not shared & {tensor.data_ptr() for tensor in model.state_dict().values() if tensor.numel()}


@pytest.mark.machinery("pickle")
@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_pickle(model, name, protocol):
    assert_same(pickle.loads(pickle.dumps(model, protocol)), model, name)


@pytest.mark.machinery("torch.save, whole model")
def test_whole_file(model, name):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert_same(torch.load(file, weights_only=False), model, name)


@pytest.mark.machinery("state_dict, weights_only=True")
def test_state_dict(model, name, surgery, tmp_path):
    torch.save(model.state_dict(), tmp_path / "state.pt")
    loaded = other(name, surgery)
    with pytest.raises(AssertionError):
        assert_same(loaded, model, name)
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_same(loaded, model, name)


@pytest.mark.machinery("state_dict of the original into it and back")
def test_state_dict_across_the_surgery(model, original, name, surgery, tmp_path):
    """Names are kept: what differs is what the surgery added, and nothing else."""
    torch.save(ticket_of(name, seed=7).state_dict(), tmp_path / "earlier.pt")
    earlier = torch.load(tmp_path / "earlier.pt", weights_only=True)
    added = set(model.state_dict()) - set(original.state_dict())
    assert all(".skip." in key for key in added)
    keys = model.load_state_dict(earlier, strict=False)
    assert set(keys.missing_keys) == added
    assert not keys.unexpected_keys
    assert_same_masks(model, ticket_of(name, seed=7))
    keys = original.load_state_dict(model.state_dict(), strict=False)
    assert set(keys.unexpected_keys) == added
    assert not keys.missing_keys
    assert_same(original, ticket_of(name, seed=7), name)


@pytest.mark.machinery("safetensors")
def test_safetensors(model, name, surgery, tmp_path):
    save_model(model, str(tmp_path / "model.safetensors"))
    loaded = other(name, surgery)
    assert load_model(loaded, tmp_path / "model.safetensors") == (set(), [])
    assert_same(loaded, model, name)


def unpickle_and_run(rank: int, folder: Path) -> dict[tuple[str, str], Run]:
    """In a process that has never seen the surgery: what each file's model computes."""
    runs = {}
    for path in sorted(folder.glob("*.pickle")):
        name, surgery = path.stem.split(", ")
        runs[name, surgery] = run(pickle.loads(path.read_bytes()), batch_for(name))
    return runs


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Run]:
    folder = tmp_path_factory.mktemp("pickles")
    for name in MODELS:
        for surgery, operate in SURGERIES.items():
            content = pickle.dumps(operate(ticket_of(name), name))
            (folder / f"{name}, {surgery}.pickle").write_bytes(content)
    return in_processes(unpickle_and_run, 1, folder)[0]


@pytest.mark.machinery("pickle, loaded in another process")
def test_pickle_in_another_process(model, name, surgery, elsewhere):
    here, there = run(model, batch_for(name)), elsewhere[name, surgery]
    assert torch.equal(there.output, here.output)
    assert there.gradients.keys() == here.gradients.keys()
    for key, gradient in here.gradients.items():
        assert torch.equal(there.gradients[key], gradient)
    assert set(st.find_masks(model)) <= {key.removesuffix("_mask") for key in there.buffers}
