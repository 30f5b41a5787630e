"""One training in several processes, each with its share of every batch: `torchrun --nproc-per-node 2 -m sparsetweaks draw`.

All processes do the same, but for three things: each trains on its share of every batch, the first one alone writes
files and says anything, and what it reads from files the others get from it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel

from sparsetweaks.lottery.config import LotteryError

Value = TypeVar("Value")


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Join the processes that `torchrun` started, if it did; all but the first are silent within."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))  # which "cuda" means from here on
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        with contextlib.ExitStack() as stack:
            if not leads():
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            yield
    finally:
        dist.destroy_process_group()


def count() -> int:
    """How many processes share the training."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is, from 0."""
    return 0 if count() == 1 else dist.get_rank()


def leads() -> bool:
    """Whether this process is the one that reads and writes."""
    return rank() == 0


def share(length: int) -> slice:
    """The part of a batch, or of any list of that length, that is this process's.

    Example:
        >>> share(128)  # alone
        slice(0, 128, None)
    """
    return slice(rank() * length // count(), (rank() + 1) * length // count())


def check_batch(size: int) -> None:
    """Raise a LotteryError unless a batch has equal shares: the mean of their gradients is to be that of the batch."""
    if size % count():
        raise LotteryError(f"batches of {size} images cannot be shared equally by {count()} processes")


def total(value: Tensor) -> Tensor:
    """The sum of all processes' values."""
    if count() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def from_leader(make: Callable[[], Value]) -> Value:
    """What the first process makes, or raises, in all of them."""
    if count() == 1:
        return make()
    content: list = [None, None]
    if leads():
        try:
            content[0] = make()
        except Exception as error:
            content[1] = error
    dist.broadcast_object_list(content)
    if content[1] is not None:
        raise content[1]
    return content[0]


def wrapped(model: nn.Module) -> nn.Module:
    """The model as the first process has it, masks included, with gradients that are the mean over all processes."""
    if count() == 1:
        return model
    for tensor in (*model.parameters(), *model.buffers()):
        dist.broadcast(tensor.detach(), src=0)
    return DistributedDataParallel(model, broadcast_buffers=False)


def average_statistics(model: nn.Module) -> None:
    """BatchNorm's running statistics become the mean of what the processes have seen."""
    for module in model.modules() if count() > 1 else ():
        if isinstance(module, _NormBase) and module.track_running_stats:
            for statistic in (module.running_mean, module.running_var):
                assert statistic is not None
                statistic.copy_(total(statistic) / count())
