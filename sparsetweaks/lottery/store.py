"""Tickets and finished trainings as files: safetensors with a JSON header, written whole or not at all, never pickled."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsetweaks.lottery.config import LotteryError, Network
from sparsetweaks.lottery.models import build
from sparsetweaks.masks import apply_masks, rewind

HEADER = (
    "identity",
    "channels",
    "classes",
    "data",
    "fingerprint",
    "seed",
    "level",
)  # of a ticket, beside its network
TENSORS = ("masks", "initial", "rewound", "scored")
FORMAT = 1  # of the files; a reader refuses what it does not know
State = dict[str, Tensor]


@dataclass(frozen=True)
class Ticket:
    """A mask and the weights it starts from, with all it takes to rebuild them and to know where they came from."""

    identity: str  # the `key` of everything that determines it
    network: Network
    channels: int
    classes: int
    data: str  # the name of the data set, and ...
    fingerprint: str  # ... what tells it from another of that name
    seed: int
    level: int  # 0 is dense
    masks: State = field(repr=False)  # True = kept
    initial: State = field(repr=False)  # the weights before any training
    rewound: State = field(repr=False)  # those to start from: the initial ones, or those of a rewinding epoch
    scored: State = field(
        repr=False
    )  # those whose magnitudes chose the masks, so that they can be pruned further

    @property
    def sparsity(self) -> float:
        total = sum(mask.numel() for mask in self.masks.values())
        return 1 - self.nonzeros / total if total else 0.0

    @property
    def nonzeros(self) -> int:
        """How many of the masked weights are kept; 0 for a dense ticket, which masks none."""
        return sum(int(mask.sum()) for mask in self.masks.values())

    def model(self) -> nn.Module:
        """The masked network with the rewound weights, on the CPU."""
        model: nn.Module = build(self.network, channels=self.channels, classes=self.classes, seed=self.seed)
        model.load_state_dict(self.rewound)
        return rewind(apply_masks(model, self.masks), self.rewound) if self.masks else model


def save_ticket(ticket: Ticket, path: Path) -> None:
    """Write a ticket as one file that anybody can load.

    Args:
        ticket: to be written.
        path: of the file; its folder is made.

    Raises:
        LotteryError: when the folder cannot be written to.
    """
    header = {name: getattr(ticket, name) for name in HEADER}
    header |= {"network": dataclasses.asdict(ticket.network), "sparsity": ticket.sparsity}
    groups = {name: getattr(ticket, name) for name in TENSORS}
    save(path, "ticket", header, groups)


def load_ticket(path: Path | str) -> Ticket:
    """Read a ticket back.

    Args:
        path: of a file that `save_ticket` wrote.

    Returns:
        The ticket, its tensors on the CPU.

    Raises:
        LotteryError: when the file is missing, broken, or something else than a ticket.

    Example:
        >>> load_ticket("setup.cfg")
        Traceback (most recent call last):
        ...
        sparsetweaks.lottery.config.LotteryError: setup.cfg is not a file of sparsetweaks, or is damaged: ...
    """
    header, groups = load(Path(path), "ticket")
    try:
        known: dict[str, Any] = {name: header[name] for name in HEADER}
        tensors: dict[str, Any] = {name: groups[name] for name in TENSORS}
        ticket = Ticket(network=Network(**header["network"]), **known, **tensors)
        ticket.model()
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise LotteryError(
            f"{path} is a ticket whose content does not fit together: {_first_line(error)}"
        ) from error
    return ticket


def save(path: Path, kind: str, header: Mapping[str, Any], groups: Mapping[str, State]) -> None:
    """Write groups of tensors with a header, so that a file is there whole or not at all.

    Args:
        path: of the file; its folder is made.
        kind: what it is, "ticket" say; `load` asks for it.
        header: anything JSON can hold.
        groups: tensors by group and name.

    Raises:
        LotteryError: when the folder cannot be written to.
    """
    from safetensors.torch import save as to_bytes

    flat = {  # copies, as groups may share tensors: the initial weights are often the rewound ones
        f"{group}/{name}": tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for group, state in groups.items()
        for name, tensor in state.items()
    }
    full = {
        "format": FORMAT,
        "kind": kind,
        "torch": torch.__version__,
        "groups": sorted(groups),
        "digest": _digest(flat),
    }
    payload = to_bytes(flat, metadata={"sparsetweaks": json.dumps({**full, "header": dict(header)})})
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(payload)
        os.replace(partial, path)
    except OSError as error:
        raise LotteryError(f"cannot write {path}: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)


def load(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, State]]:
    """Read what `save` wrote, and check that it is whole and of the right kind.

    Args:
        path: of the file.
        kind: what it must be.

    Returns:
        The header, and the tensors by group and name.

    Raises:
        LotteryError: when the file is missing, broken, or of another kind.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise LotteryError(f"{path} does not exist, or is no file")
    try:
        with safe_open(path, framework="pt") as file:
            full = json.loads((file.metadata() or {})["sparsetweaks"])
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        version, found, digest, header = full["format"], full["kind"], full["digest"], full["header"]
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise LotteryError(
            f"{path} is not a file of sparsetweaks, or is damaged: {_first_line(error)}"
        ) from error
    if (version, found) != (FORMAT, kind):
        raise LotteryError(f"{path} is a {found} of format {version}; wanted is a {kind} of format {FORMAT}")
    if digest != _digest(flat):
        raise LotteryError(f"{path} is damaged: its tensors are not those that were written")
    groups: dict[str, State] = {group: {} for group in full["groups"]}
    for name, tensor in flat.items():
        group, _, rest = name.partition("/")
        groups[group][rest] = tensor
    return header, groups


def check_writable(folder: Path) -> None:
    """Find out before hours of training, not after, that results cannot be written.

    Args:
        folder: to write to; made if it is not there.

    Raises:
        LotteryError: when that is not possible.
    """
    probe = folder / f".{os.getpid()}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise LotteryError(
            f"cannot write to {folder}: {error.strerror}; choose another with --out"
        ) from error


def _digest(flat: State) -> str:
    digest = hashlib.sha256()
    for name in sorted(flat):
        tensor = flat[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
