"""A sparse file round-trips any tensors under any masks bit for bit, and one that is not as it was written is refused."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsetweaks import sparse_file
from sparsetweaks.errors import SurgeryError

DTYPES = [*sparse_file._CODES, *sparse_file._COMPLEX]


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist()) if tensor.numel() else b""


@st.composite
def tensors(draw: st.DrawFn, dtype: torch.dtype) -> Tensor:
    """Any bits at all, NaNs and negative zeros among them, in any shape and layout."""
    shape = draw(st.one_of(st.lists(st.integers(0, 4), max_size=4), st.tuples(st.integers(0, 3000))))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    count = torch.Size(shape).numel()
    if dtype == torch.bool:
        tensor = torch.randint(0, 2, (count,), generator=generator).bool()
    else:
        raw = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=generator)
        tensor = raw.view(dtype) if count else torch.empty(0, dtype=dtype)
    tensor = tensor.view(shape)
    layout = draw(st.sampled_from(["plain", "transposed", "channels_last", "conjugated"]))
    if layout == "transposed" and tensor.ndim >= 2:
        tensor = tensor.mT
    elif layout == "channels_last" and tensor.ndim == 4:
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    elif layout == "conjugated" and tensor.is_complex():
        tensor = tensor.conj()
    return tensor


@st.composite
def states(draw: st.DrawFn) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    names = draw(st.lists(st.text(max_size=8).filter(lambda n: "/" not in n), max_size=4, unique=True))
    names = [name for name in names if name != "__metadata__" and _encodes(name)]
    state, masks = {}, {}
    for name in names:
        state[name] = draw(tensors(draw(st.sampled_from(DTYPES))))
        density = draw(st.sampled_from([None, 0.0, 0.001, 0.05, 0.5, 0.99, 1.0]))
        if density is not None:
            generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
            masks[name] = torch.rand(state[name].shape, generator=generator) < density
    if names and draw(st.booleans()):
        state["tied to " + names[0]] = state[names[0]]
    return state, masks


def _encodes(name: str) -> bool:
    return name == name.encode("utf-8", "ignore").decode()


def written(state: dict[str, Tensor], masks: dict[str, Tensor]) -> bytes:
    file = io.BytesIO()
    sparse_file.write(file, state, masks)
    return file.getvalue()


def read(data: bytes) -> sparse_file.Contents:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(data)
        return sparse_file.read(path)


@settings(max_examples=120, deadline=None)
@given(states())
def test_every_bit_comes_back(drawn):
    state, masks = drawn
    data = written(state, masks)
    assert len(data) == sparse_file.size(state, masks)
    contents = read(data)
    assert list(contents.state) == list(state)
    assert contents.masks.keys() == masks.keys()
    for name, tensor in state.items():
        found = contents.state[name]
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        tied = name.removeprefix("tied to ") if name not in masks and name.startswith("tied to ") else name
        wanted = bits(tensor.resolve_conj())
        if tied in masks:
            assert tied != name or torch.equal(contents.masks[name], masks[name])
            kept = masks[tied].reshape(-1).repeat_interleave(tensor.itemsize).tolist()
            wanted = bytes(byte if keep else 0 for byte, keep in zip(wanted, kept, strict=True))
        assert bits(found) == wanted
    assert written(contents.state, contents.masks) == data


@settings(max_examples=60, deadline=None)
@given(states())
def test_others_can_read_it(drawn):
    from safetensors.torch import load

    state, masks = drawn
    loaded = load(written(state, masks))
    for name, tensor in state.items():
        if name not in masks and not tensor.is_complex() and not name.startswith("tied to "):
            assert bits(loaded[name]) == bits(tensor)


@settings(max_examples=100, deadline=None)
@given(states(), st.data())
def test_damage_is_refused(drawn, data):
    whole = written(*drawn)
    how = data.draw(st.sampled_from(["flip", "cut", "insert", "delete"]))
    at = data.draw(st.integers(0, len(whole) - 1))
    damaged = bytearray(whole)
    if how == "flip":
        damaged[at] ^= data.draw(st.integers(1, 255))
    elif how == "cut":
        del damaged[at:]
    elif how == "insert":
        damaged.insert(at, data.draw(st.integers(0, 255)))
    else:
        del damaged[at]
    if bytes(damaged) != whole:
        with pytest.raises(SurgeryError, match=r"damaged|no sparse file"):
            read(bytes(damaged))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused(data):
    with pytest.raises(SurgeryError, match=r"damaged|no sparse file"):
        read(data)


@pytest.mark.parametrize("gap", [0, 1, 253, 254, 255, 256, 509, 510, 511, 1000])
def test_gaps_around_a_skip(gap):
    mask = torch.zeros(gap + 2, dtype=torch.bool)
    mask[gap] = True
    code = sparse_file._gaps(mask)
    assert len(code) == gap // 255 + 1
    assert torch.equal(sparse_file._from_gaps(code, len(mask)), mask)


def test_the_shorter_code_is_taken_and_a_mask_is_never_lost():
    weight = torch.ones(8000)
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(8000, generator=generator)
    found = {}
    for density in (0.05, 0.5, 1.0):
        mask = draws < density
        found[density] = len(written({"w": weight}, {"w": mask}))
        kept = int(mask.sum())
        assert torch.equal(read(written({"w": weight}, {"w": mask})).masks["w"], mask)
        where = {0.05: kept, 0.5: 1000, 1.0: 0}[density]
        assert 4 * kept + where <= found[density] <= 4 * kept + where + 500


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_without_a_mask_are_not_stored_and_come_back_without_one(dtype):
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (4000 * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    raw = raw % 2 if dtype == torch.bool else raw
    raw.view(4000, -1)[torch.rand(4000, generator=generator) < 0.95] = 0
    state = {"w": raw.view(dtype).view(40, 100)}
    data = written(state, {})
    assert len(data) < 0.13 * raw.nbytes + 600  # 0.05 of values, and a bit or a byte of where for each
    contents = read(data)
    assert contents.masks == {} and bits(contents.state["w"]) == bits(state["w"])


def test_a_negative_zero_without_a_mask_is_no_zero():
    weight = torch.zeros(1000)
    weight[::10] = -0.0
    assert bits(read(written({"w": weight}, {})).state["w"]) == bits(weight)


def test_small_tensors_and_those_of_few_zeros_are_stored_whole():
    from safetensors.torch import load

    state = {"small": torch.zeros(256), "dense": (torch.arange(1000) % 2 + torch.arange(1000) % 3).float()}
    assert load(written(state, {})).keys() == state.keys()


def test_names_that_would_collide_are_refused():
    state = {"w": torch.ones(64), "w/values": torch.ones(2)}
    with pytest.raises(SurgeryError, match="'w/values' names two things"):
        written(state, {"w": torch.arange(64) < 3})
