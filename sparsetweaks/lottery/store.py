"""Tickets: a mask and the weights it starts from, as one file that anybody can load."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsetweaks.lottery.config import LotteryError, Network, RunError, key
from sparsetweaks.lottery.data import Data
from sparsetweaks.lottery.files import State, first_line, load, save
from sparsetweaks.lottery.models import build, code_of
from sparsetweaks.masks import apply_masks

TENSORS = ("masks", "initial", "late", "trained")
UNDRAWN: dict[str, Any] = {
    "level": 0, "method": "none", "scope": "global", "source": "", "drawing": "", "late_epoch": 0, "starts_late": False,
}  # of a dense ticket's header  # fmt: skip


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
    method: (
        str  # what chose the masks: "imp", "omp", another of `prune`'s, "file"; "none" where there are none
    )
    scope: str  # how many weights each layer kept, as `prune` says it; "global" where there are no masks
    source: str  # the name of masks from elsewhere, for the tables; "" for our own
    drawing: str  # a short `key` of how it was drawn beyond that: by what training, in what steps; may be ""
    late_epoch: int  # of the dense training, whose weights are `late`; 0 where there are none
    starts_late: bool  # whether the ticket starts from them, or from the initial weights
    masks: State = field(repr=False)  # True = kept
    initial: State = field(repr=False)  # the weights before any training
    late: State = field(repr=False)  # those of an early epoch, to rewind to; may be empty
    trained: State = field(repr=False)  # those whose magnitudes chose the masks; empty for other methods

    @property
    def sparsity(self) -> float:
        total = sum(mask.numel() for mask in self.masks.values())
        return 1 - self.nonzeros / total if total else 0.0

    @property
    def nonzeros(self) -> int:
        """How many of the masked weights are kept; 0 for a dense ticket, which masks none."""
        return sum(int(mask.sum()) for mask in self.masks.values())

    @property
    def drawn(self) -> str:
        """How it was drawn, in words that tell it from others of its sparsity."""
        shares = "" if self.scope == "global" else f"by {self.scope}"
        late = f"from epoch {self.late_epoch}" if self.starts_late else ""
        return " ".join(filter(None, (self.method, self.source, shares, late)))

    def weights(self, start: str = "ticket") -> State:
        """The dense network's weights to start from: the ticket's own choice, `late` or `trained`."""
        own = self.late if self.starts_late else self.initial
        state = {"ticket": own, "late": self.late, "trained": self.trained}[start]
        if not state:
            reason = (
                f"one that was drawn by {self.method} and never trained"
                if self.method not in ("imp", "omp", "none")
                else "one that was drawn with too few epochs, or is dense"
            )
            raise RunError(f"this ticket has no {start} weights to start from, as {reason}")
        return state

    def model(self, start: str = "ticket") -> nn.Module:
        """The masked network with its weights, on the CPU."""
        model = self.unmasked(start)
        return apply_masks(model, self.masks) if self.masks else model

    def unmasked(self, start: str = "ticket") -> nn.Module:
        """The network with its weights and no masks, on the CPU."""
        state = self.weights(start)
        model = build(self.network, channels=self.channels, classes=self.classes, seed=self.seed)
        model.load_state_dict(state)
        return model

    def dense(self) -> Ticket:
        """Level 0 of the same network, data and seed."""
        identity = _dense_identity(self.network, self.channels, self.classes, self.fingerprint, self.seed)
        return replace(self, identity=identity, masks={}, late={}, trained={}, **UNDRAWN)


HEADER = tuple(
    spec.name for spec in dataclasses.fields(Ticket) if spec.name not in (*TENSORS, "network")
)  # of a ticket's file, beside its network


def dense_ticket(network: Network, data: Data, *, seed: int) -> Ticket:
    """Level 0: the whole network at its initialisation.

    Args:
        network: which.
        data: for the channels and the classes.
        seed: of the initialisation.

    Returns:
        A ticket without masks.

    Example:
        >>> from sparsetweaks.lottery.data import load
        >>> ticket = dense_ticket(Network("resnet8", width=4), load("digits"), seed=0)
        >>> ticket.level, ticket.sparsity
        (0, 0.0)
    """
    classes = len(data.classes)
    initial = build(network, channels=data.channels, classes=classes, seed=seed).state_dict()
    identity = _dense_identity(network, data.channels, classes, data.fingerprint, seed)
    where = (identity, network, data.channels, classes, data.name, data.fingerprint, seed)
    return Ticket(*where, **UNDRAWN, masks={}, initial=initial, late={}, trained={})


def _dense_identity(network: Network, channels: int, classes: int, fingerprint: str, seed: int) -> str:
    code = code_of(network, channels=channels, classes=classes, seed=seed)
    return key(network, fingerprint, seed, *code)


def ticket_path(folder: Path, ticket: Ticket) -> Path:
    """Where a ticket is kept: a name to read, and a key that makes it the only one.

    Args:
        folder: of the lottery.
        ticket: to be kept.

    Returns:
        The path of its file.
    """
    words = re.sub(r"[^\w.+-]+", "-", ticket.drawn).strip("-")[
        :80
    ]  # masks from elsewhere may be called anything
    method = "" if ticket.method == "none" else f"-{words}"
    name = f"{ticket.network.slug}-{ticket.data}{method}-seed{ticket.seed}-level{ticket.level:02d}"
    return folder / "tickets" / f"{name}-{ticket.sparsity:.4f}-{ticket.identity}.safetensors"


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
    save(path, "ticket", header, {name: getattr(ticket, name) for name in TENSORS})


def load_ticket(path: Path | str, *, model: str | None = None) -> Ticket:
    """Read a ticket back.

    Args:
        path: of a file that `save_ticket` wrote.
        model: the `MODULE:FUNCTION` that you allow to be imported, where the ticket's network is a user's: a file from
            elsewhere is not to choose what runs here. Default: none.

    Returns:
        The ticket, its tensors on the CPU.

    Raises:
        LotteryError: when the file is missing, damaged, or something else than a ticket, or when its tensors are not
            those of the network it names.

    Example:
        >>> load_ticket("setup.cfg")
        Traceback (most recent call last):
        ...
        sparsetweaks.lottery.config.LotteryError: setup.cfg is not a file of sparsetweaks, or is damaged: ...
    """
    header, groups = load(Path(path), "ticket")
    try:
        network = Network(**header["network"])
        if network.family == "user" and network.name != model:
            raise LotteryError(
                f"{path} is a ticket of the network {network.name!r}, code that is not ours: if you trust it, allow it "
                f"by --model {network.name} (load_ticket(..., model={network.name!r}))"
            )
        known: dict[str, Any] = {name: header[name] for name in HEADER}
        tensors: dict[str, Any] = {name: groups[name] for name in TENSORS}
        ticket = Ticket(network=network, **known, **tensors)
        ticket.model()
    except LotteryError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise LotteryError(
            f"{path} is a ticket whose content does not fit together: {first_line(error)}"
        ) from error
    return ticket


def read_masks(path: Path | str, model: nn.Module) -> State:
    """Read "any mask" for a network, from a file of safetensors or of `torch.save`, by the names of its parameters.

    A mask is named as its parameter, or with `_mask` after it, and is bool or holds zeros and other numbers, as those
    of `torch.nn.utils.prune` do. Other tensors of the file are left alone, so the state of a masked model will do.

    Args:
        path: of the file. Nothing in it is run: `torch.load` gets `weights_only=True`.
        model: whose masks they are; it is only read.

    Returns:
        Bool masks by parameter, True = kept.

    Raises:
        LotteryError: when the file cannot be read, or holds no mask of these parameters' names and shapes.
    """
    path = Path(path)
    if not path.is_file():
        raise LotteryError(f"{path} does not exist, or is no file")
    tensors = _tensors_of(path)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    masks = {}
    for name, tensor in tensors.items():
        stem = name.removesuffix("_mask")
        if stem in shapes and (stem != name or tensor.dtype == torch.bool):
            if tensor.shape != shapes[stem]:
                raise LotteryError(
                    f"{path}: the mask of {stem!r} is {tuple(tensor.shape)}, its weight {tuple(shapes[stem])}: is it of "
                    "another network?"
                )
            masks[stem] = tensor != 0
    if not masks:
        raise LotteryError(
            f"{path} holds no mask of this network: it holds {', '.join(list(tensors)[:3]) or 'nothing'}, the network "
            f"{', '.join(list(shapes)[:3])}, ...; a mask is named as its parameter, or with _mask after it"
        )
    return masks


def _tensors_of(path: Path) -> State:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError:
        pass
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the unpickler stumbles over
        raise LotteryError(
            f"{path} is neither safetensors nor a file of torch.save: {first_line(error)}"
        ) from error
    if not isinstance(found, dict):
        raise LotteryError(f"{path} holds a {type(found).__name__}, not tensors by name")
    return {str(name): tensor for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}
