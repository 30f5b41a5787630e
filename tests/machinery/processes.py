"""Fresh processes with one thread each and a bounded time, and a gloo world of them on this machine."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 120.0
"""How long processes may take: on a busy machine a world of two takes about ten."""


def in_processes(
    work: Callable[..., Any], count: int, *arguments: Any, seconds: float = SECONDS
) -> list[Any]:
    """What `work(rank, *arguments)` returns in each of `count` fresh processes.

    Raises:
        RuntimeError: with the traceback of the process that failed, or after `seconds`. No process survives.
    """
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    processes = [
        context.Process(target=_send_result, args=(sender, work, rank, *arguments), daemon=True)
        for rank, (_, sender) in enumerate(pipes)
    ]
    for process, (_, sender) in zip(processes, pipes):
        process.start()
        sender.close()  # so that the end of the process ends the pipe
    end = time.monotonic() + seconds
    try:
        return [_receive(receiver, rank, end) for rank, (receiver, _) in enumerate(pipes)]
    finally:
        for process in processes:
            process.join(timeout=2)
            process.kill()
            process.join()


def _receive(receiver: Connection, rank: int, end: float) -> Any:
    if not receiver.poll(max(0.0, end - time.monotonic())):
        raise RuntimeError(f"process {rank} did not finish in time")
    try:
        failed, content = pickle.loads(receiver.recv_bytes())
    except EOFError:
        raise RuntimeError(f"process {rank} died") from None
    if failed:
        raise RuntimeError(f"process {rank} failed:\n{content}")
    return content


def _send_result(sender: Connection, work: Callable[..., Any], *arguments: Any) -> None:
    torch.set_num_threads(1)
    try:
        content = pickle.dumps((False, work(*arguments)))  # by value: no memory is shared with the parent
    except BaseException:
        content = pickle.dumps((True, traceback.format_exc()))
    sender.send_bytes(content)


def in_world(work: Callable[..., Any], count: int, *arguments: Any, seconds: float = SECONDS) -> list[Any]:
    """As `in_processes`, with gloo between the processes, on a port of 127.0.0.1 that is free just now."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return in_processes(_join_world, count, count, store.port, work, *arguments, seconds=seconds)


def _join_world(rank: int, count: int, port: int, work: Callable[..., Any], *arguments: Any) -> Any:
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=count, timeout=timedelta(seconds=SECONDS / 2)
    )
    try:
        return work(rank, *arguments)
    finally:
        dist.destroy_process_group()
