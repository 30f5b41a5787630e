"""A compact file for pruned weights: which ones are kept, in few bits, and their values.

A valid safetensors file, written and read here with nothing beyond torch. A masked tensor is stored as the values
that its mask keeps, and as where they are, in whichever of two codes is shorter:

- `bitmap`: one bit per weight, the first weight in the lowest bit of the first byte;
- `gaps`: one byte per kept weight, the number of pruned ones before it; 255 stands for 255 pruned ones and no weight
  after them. Shorter than a bitmap where fewer than about one weight in eight is kept.

What has a mask that keeps all is stored whole. The mask decides what is stored, never the values: a kept zero, a
negative zero and a NaN come back bit for bit. What has no mask is stored whole too, unless it is large and mostly
zeros (a ticket without masks): then as above, in place of the mask what has a bit that is set. It comes back without
a mask, as it was. At 95 % sparsity of fp32 weights the gaps cost 0.0125 and the
values 0.05 of the dense bytes; a mask that keeps nearly all costs 1/32 more than none.
"""

from __future__ import annotations

import collections
import ctypes
import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from sparsetweaks.errors import SurgeryError
from sparsetweaks.forms import INTEGERS

FORMAT = "sparsetweaks-sparse"
VERSION = 1
SKIP = 255  # a byte of `gaps` that stands for so many pruned weights and no kept one

_LENGTH = struct.Struct("<Q")  # safetensors: the header's length first, then the header, then the data
_ALIGNMENT = 8
_MOST_HEADER = 100_000_000  # as safetensors itself allows
_NO_CHECKSUM = "0" * hashlib.sha256().digest_size * 2
_CHUNK = 1 << 24
_SMALL = 1024  # bytes of a tensor without a mask that is stored whole, whatever it holds: a code has its names to pay for

# What safetensors calls a dtype. Complex numbers are stored as pairs of real ones.
_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.bool: "BOOL",
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
_COMPLEX = {
    torch.complex128: torch.float64,
    torch.complex64: torch.float32,
}
_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in (*_CODES, *_COMPLEX)}


@dataclass(frozen=True)
class Contents:
    """What a sparse file holds."""

    state: dict[str, Tensor]
    """Weights by their names, exactly zero where the mask prunes; tied ones are one tensor."""
    masks: dict[str, Tensor]
    """Bool masks by their weights' names, True = kept."""


# ------------------------------------------------------------------------------------------------------------
# Writing


def write(file: BinaryIO, state: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Write tensors, and of masked ones what their masks keep.

    Args:
        file: open for writing in binary.
        state: a name to a tensor of any shape, dtype and device.
        masks: names of `state` to bool masks of their shapes, True = kept.

    Raises:
        SurgeryError: something in `state` is no dense tensor with values, or of a dtype that is unknown.
    """
    if lost := sorted(set(masks) - set(state)):
        raise SurgeryError(
            f"{lost[0]!r} has a mask, and the state_dict has no such name (a layer that saves it under another?): its mask "
            "would be lost. Use format='torch', which holds the zeros alone"
        )
    header, parts = _plan(state, masks)
    checksum = hashlib.sha256(header)
    for _, part in parts:
        for piece in _pieces(part):
            checksum.update(piece)
    file.write(_LENGTH.pack(len(header)))
    file.write(header.replace(_NO_CHECKSUM.encode(), checksum.hexdigest().encode(), 1))
    for _, part in parts:
        for piece in _pieces(part):
            file.write(piece)


def size(state: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> int:
    """How many bytes `write` writes, without writing them; arguments and errors are those of `write`."""
    header, parts = _plan(state, masks)
    return _LENGTH.size + len(header) + sum(part.nbytes for _, part in parts)


def _plan(state: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> tuple[bytes, list[tuple[str, Tensor]]]:
    """The header, its checksum still open, and the stored parts in their order."""
    first: dict[Any, str] = {}
    names: dict[str, list[str]] = {}
    for name, tensor in state.items():
        _check(name, tensor)
        names.setdefault(first.setdefault(_identity(tensor), name), []).append(name)
    parts: list[tuple[str, Tensor]] = []
    tensors: dict[str, dict[str, Any]] = {}
    for name, tied in names.items():
        tensor, masked = state[name], [other for other in tied if other in masks]
        coding, stored = _encoded(tensor, masks[masked[0]] if masked else None)
        tensors[name] = {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "coding": coding,
            "tied": tied[1:],
            "masked": masked,
        }
        parts += [(name if part == "dense" else f"{name}/{part}", value) for part, value in stored.items()]
    parts.sort(key=lambda part: -part[1].itemsize)  # aligned, as the longest numbers come first
    versions = {
        name: each["version"] for name, each in getattr(state, "_metadata", {}).items() if "version" in each
    }
    described: dict[str, Any] = {"version": VERSION, "checksum": _NO_CHECKSUM, "order": list(state)}
    described |= {"tensors": tensors, "modules": versions}
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT, FORMAT: json.dumps(described)}}
    begin = 0
    for key, part in parts:
        end = begin + part.nbytes
        if key in header:
            raise SurgeryError(f"{key!r} names two things: rename the tensor, '/' parts a name from its code")
        header[key] = {
            "dtype": _CODES[part.dtype],
            "shape": list(part.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    return encoded.ljust(math.ceil(len(encoded) / _ALIGNMENT) * _ALIGNMENT), parts


def _check(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise SurgeryError(
            f"{name!r} is a {type(tensor).__name__}, and a sparse file holds tensors only: use format='torch'"
        )
    if tensor.layout != torch.strided or tensor.dtype not in (*_CODES, *_COMPLEX):
        raise SurgeryError(
            f"{name!r} is {tensor.dtype}, {tensor.layout}: a sparse file holds dense tensors of {', '.join(_NAMES)}"
        )
    if tensor.is_meta:
        raise SurgeryError(f"{name!r} is on the meta device and has no values: load the weights first")


def _identity(tensor: Tensor) -> Any:
    """The same for names of one tensor; of tensors without memory none is another's."""
    if not tensor.numel():
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _encoded(tensor: Tensor, mask: Tensor | None) -> tuple[str, dict[str, Tensor]]:
    """The shortest code, and its parts."""
    whole = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if whole.dtype in _COMPLEX:
        whole = torch.view_as_real(whole)
    numbers = whole.view(INTEGERS[whole.itemsize]).view(tensor.numel(), 2 if tensor.is_complex() else 1)
    if mask is None:
        kept = numbers.any(1)
        if whole.nbytes <= _SMALL or 2 * kept.count_nonzero() > kept.numel():
            return "dense", {"dense": whole}
    elif mask.dtype != torch.bool or mask.shape != tensor.shape:
        raise SurgeryError(f"a mask of {tuple(mask.shape)}, {mask.dtype}, is none of {tuple(tensor.shape)}")
    else:
        kept = mask.detach().cpu().reshape(-1)
        if kept.all():
            return "all kept", {"dense": whole}
    where = {"bitmap": _bitmap(kept), "gaps": _gaps(kept)}
    coding = min(where, key=lambda name: where[name].nbytes)
    values = numbers[kept].view(whole.dtype)
    return coding, {coding: where[coding], "values": values if tensor.is_complex() else values.view(-1)}


def _bitmap(mask: Tensor) -> Tensor:
    """Eight weights a byte, the first in the lowest bit."""
    padded = torch.zeros(math.ceil(mask.numel() / 8) * 8, dtype=torch.uint8)
    padded[: mask.numel()] = mask
    powers = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
    return (padded.view(-1, 8) * powers).sum(1, dtype=torch.uint8)


def _gaps(mask: Tensor) -> Tensor:
    """One byte per kept weight: how many pruned ones come before it, with `SKIP` for each 255 of them."""
    kept = mask.nonzero().view(-1)
    before = torch.diff(kept, prepend=kept.new_tensor([-1])) - 1
    skips = before // SKIP
    ends = (skips + 1).cumsum(0)
    code = torch.full((int(ends[-1]) if len(ends) else 0,), SKIP, dtype=torch.uint8)
    code[ends - 1] = (before % SKIP).to(torch.uint8)
    return code


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a contiguous tensor on the CPU, without a copy and without NumPy."""
    for begin in range(0, tensor.nbytes, _CHUNK):
        count = min(_CHUNK, tensor.nbytes - begin)
        yield memoryview((ctypes.c_char * count).from_address(tensor.data_ptr() + begin)).cast("B")


# ------------------------------------------------------------------------------------------------------------
# Reading


def read(path: str | os.PathLike[str]) -> Contents:
    """Read a sparse file whole, and refuse one that is damaged.

    Args:
        path: a file that `write` wrote.

    Returns:
        The tensors and their masks, on the CPU.

    Raises:
        SurgeryError: it is no such file, or of a later version, or not one bit as it was written.
    """
    with open(path, "rb") as file:
        data = bytearray(file.read())
    header, begin = _header(path, data)
    described = json.loads(header["__metadata__"][FORMAT])
    if described["version"] != VERSION:
        raise SurgeryError(
            f"{path}: version {described['version']}, and this reads version {VERSION}: update"
        )
    parts = {key: _part(data, begin, entry) for key, entry in header.items() if key != "__metadata__"}
    state: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    for name, entry in described["tensors"].items():
        tensor, mask = _decoded(name, entry, parts)
        state |= dict.fromkeys([name, *entry["tied"]], tensor)
        if mask is not None:
            masks |= dict.fromkeys(entry["masked"], mask)
    ordered = collections.OrderedDict((name, state[name]) for name in described["order"])
    if versions := described.get("modules"):  # files of earlier versions lack them
        ordered._metadata = {name: {"version": each} for name, each in versions.items()}  # type: ignore[attr-defined]
    return Contents(ordered, masks)


def _header(path: Any, data: bytearray) -> tuple[dict[str, Any], int]:
    """The header, once the checksum has shown that every bit is as it was written; and where the data begin."""
    no_file = SurgeryError(
        f"{path} is no sparse file of this package: make one with export(..., format='sparse')"
    )
    if len(data) < _LENGTH.size:
        raise no_file
    begin = _LENGTH.size + _LENGTH.unpack_from(data)[0]
    if begin > min(len(data), _MOST_HEADER):
        raise SurgeryError(f"{path} is no sparse file, or it is cut off or damaged at its start")
    raw = bytes(memoryview(data)[_LENGTH.size : begin])
    try:
        header = json.loads(raw)
        checksum = str(json.loads(header["__metadata__"][FORMAT])["checksum"])
    except (ValueError, KeyError, TypeError):
        raise (no_file if FORMAT.encode() not in raw else _damaged(path)) from None
    actual = hashlib.sha256(raw.replace(checksum.encode(), _NO_CHECKSUM.encode(), 1))
    actual.update(memoryview(data)[begin:])
    if actual.hexdigest() != checksum:
        raise _damaged(path)
    return header, begin


def _damaged(path: Any) -> SurgeryError:
    return SurgeryError(f"{path} is damaged or cut off: its checksum does not fit. Export it again")


def _part(data: bytearray, begin: int, entry: Mapping[str, Any]) -> Tensor:
    """One stored tensor, in memory of its own."""
    dtype, shape, (first, last) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    if first == last:
        return torch.empty(shape, dtype=dtype)
    found = torch.frombuffer(data, dtype=dtype, count=math.prod(shape), offset=begin + first)
    return found.view(shape).clone()


def _decoded(
    name: str, entry: Mapping[str, Any], parts: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor | None]:
    """A tensor and, where it has one, its mask."""
    dtype, shape, coding = _NAMES[entry["dtype"]], entry["shape"], entry["coding"]
    mask = None
    if coding in ("dense", "all kept"):
        stored = parts[name]
        mask = torch.ones(shape, dtype=torch.bool) if coding == "all kept" else None
    else:
        where, values = parts[f"{name}/{coding}"], parts[f"{name}/values"]
        count = math.prod(shape)
        kept = _from_bitmap(where, count) if coding == "bitmap" else _from_gaps(where, count)
        numbers = torch.zeros(count, *values.shape[1:], dtype=INTEGERS[values.itemsize])
        numbers[kept] = values.view(numbers.dtype)
        stored = numbers.view(values.dtype).view([*shape, *values.shape[1:]])
        mask = kept.view(shape)
    return (torch.view_as_complex(stored) if dtype in _COMPLEX else stored), mask


def _from_bitmap(bits: Tensor, count: int) -> Tensor:
    powers = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
    return (bits.view(-1, 1) & powers).ne(0).view(-1)[:count].clone()


def _from_gaps(code: Tensor, count: int) -> Tensor:
    mask = torch.zeros(count, dtype=torch.bool)
    steps = code.long()
    kept = code != SKIP
    mask[((steps + kept).cumsum(0) - 1)[kept]] = True
    return mask
