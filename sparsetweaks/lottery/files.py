"""Files that are there whole or not at all: tensors with a JSON header, never pickled, and one process per folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsetweaks.lottery.config import LotteryError
from sparsetweaks.lottery.ranks import leads

FORMAT = 3  # of the files; a reader refuses what it does not know
LOCK = ".lock"
State = dict[str, Tensor]


def save(path: Path, kind: str, header: Mapping[str, Any], groups: Mapping[str, State]) -> None:
    """Write groups of tensors with a header, so that a file is there whole or not at all; of several ranks, the first.

    Args:
        path: of the file; its folder is made.
        kind: what it is, "ticket" say; `load` asks for it.
        header: anything JSON can hold.
        groups: tensors by group and name.

    Raises:
        LotteryError: when the folder cannot be written to, or the disk is full; what was there before stays.
    """
    from safetensors.torch import save as to_bytes

    if not leads():
        return
    flat = {  # copies, as groups may share tensors: the best weights are often the last ones
        f"{group}/{name}": tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for group, state in groups.items()
        for name, tensor in state.items()
    }
    full = {
        "format": FORMAT,
        "kind": kind,
        "torch": torch.__version__,
        "groups": sorted(groups),
        "header": dict(header),
    }
    text = json.dumps(full, sort_keys=True)
    write(path, to_bytes(flat, metadata={"sparsetweaks": text, "digest": digest_of(flat, text)}))


def write(path: Path, content: bytes) -> None:
    """Replace a file's content in one step: whoever reads it, or is killed meanwhile, sees the old or the new.

    Of the processes that `torchrun` starts, the first writes.

    Args:
        path: of the file; its folder is made.
        content: all of it.

    Raises:
        LotteryError: when the folder cannot be written to, or the disk is full; what was there before stays.
    """
    if not leads():
        return
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # so that after a power cut, too, the name never leads to an empty file
        os.replace(partial, path)
    except OSError as error:
        raise LotteryError(
            f"cannot write {path}: {error.strerror}; what was finished before is kept"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def load(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, State]]:
    """Read what `save` wrote, and check that it is whole and of the right kind.

    Args:
        path: of the file.
        kind: what it must be.

    Returns:
        The header, and the tensors by group and name.

    Raises:
        LotteryError: when the file is missing, damaged, or of another kind.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise LotteryError(f"{path} does not exist, or is no file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        text, digest = metadata["sparsetweaks"], metadata["digest"]
        full = json.loads(text)
        version, found, header = full["format"], full["kind"], full["header"]
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise LotteryError(
            f"{path} is not a file of sparsetweaks, or is damaged: {first_line(error)}"
        ) from error
    if (version, found) != (FORMAT, kind):
        raise LotteryError(
            f"{path} holds: {found}, format {version}; wanted: {kind}, format {FORMAT}. If another version of sparsetweaks "
            "wrote it, choose another folder with --out, or delete it to have it made anew"
        )
    if digest != digest_of(flat, text):
        raise LotteryError(
            f"{path} is damaged: its content is not what was written; delete it to have it made anew"
        )
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
    probe = folder / f"probe.{os.getpid()}.partial"  # named as `alone` clears away, should this be killed
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"0")  # a full disk still takes empty files
    except OSError as error:
        raise LotteryError(
            f"cannot write to {folder}: {error.strerror}; choose another with --out"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder for this process, as two that train the same runs would undo each other's work.

    Of the processes that `torchrun` starts, which share one training, the first holds it.

    The lock is the operating system's on the file `.lock`, which also says who holds it. It ends with its process,
    however that ends, so that a lock file that was left behind stops nobody.

    Args:
        folder: to hold; made if it is not there.

    Raises:
        LotteryError: when another process holds it, or it cannot be written to.
    """
    if not leads():
        yield
        return
    check_writable(folder)
    with (folder / LOCK).open("a+") as file:
        try:
            hold(file, wait=False)
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise LotteryError(
                f"{folder} is in use by {holder}: wait for it to end, or choose another folder with --out"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        for partial in folder.rglob("*.partial"):
            if not _lives(partial.with_suffix("").suffix):
                partial.unlink(missing_ok=True)
        yield
        file.truncate(0)


def _lives(suffix: str) -> bool:
    """Whether the process of a partial file's `.PID` is still at work on it."""
    if not suffix[1:].isdigit() or os.name == "nt":  # there, asking would end it
        return True
    try:
        os.kill(int(suffix[1:]), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def hold(file: Any, *, wait: bool = True) -> None:
    """Lock an open file for this process until it is closed, by whatever end.

    Args:
        file: open.
        wait: for another process to give it back; otherwise OSError is raised.
    """
    if os.name == "nt":
        import msvcrt

        file.seek(1 << 30)  # beyond the content, which stays readable to others
        msvcrt.locking(file.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        return
    import fcntl

    fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error) or type(error).__name__).splitlines()[0]


def digest_of(tensors: State, text: str = "") -> str:
    """A fingerprint of tensors by name, and of a text.

    Args:
        tensors: on the CPU, contiguous.
        text: of any length.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
