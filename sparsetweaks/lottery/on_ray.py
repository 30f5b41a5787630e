"""Independent runs on Ray: side by side on one machine or a cluster, several to a GPU where networks are small."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from sparsetweaks.lottery.config import LotteryError
from sparsetweaks.lottery.files import first_line
from sparsetweaks.lottery.grid import ENDED, Engine

CONNECT_SECONDS = 10.0


@contextlib.contextmanager
def on_ray(*, address: str | None = None, gpus: float = 0.0, threads: int = 1) -> Iterator[Engine]:
    """Connect to Ray, or start it on this machine, for as long as the context lasts.

    Small networks leave most of a large GPU idle: with `gpus=0.25`, four runs share one. The runs are the same as those
    of `run_all`, on a CPU to the bit at equal threads. On a cluster, all machines must see the folder of the runs and
    the data under the same path, and have this package.

    Args:
        address: of a running cluster, as `ray.init` takes it. The default is the Ray that this process is connected to,
            else the one that `RAY_ADDRESS` names or `ray start` has started here, else a new one on this machine.
        gpus: per run, fractions included; 0 for runs on a CPU.
        threads: per run, and so many cores.

    Yields:
        A function that runs tasks, for `compare`.

    Raises:
        LotteryError: when Ray is not installed or not to be reached, or no machine has so many cores or GPUs. From the
            function: whatever a task raises, which ends the others; or when a run is ended from outside.

    Example:
        >>> with on_ray(gpus=0.25) as engine:  # doctest: +SKIP
        ...     compare(experiment, folder, device="cuda", engine=engine)
    """
    try:
        import ray
    except ImportError:
        raise LotteryError('runs on Ray need it: pip install "sparsetweaks[ray]"') from None
    ours = address is not None or not ray.is_initialized()
    if ours:
        _start(ray, address)
    try:
        _check_resources(ray.nodes(), {"CPU": threads, "GPU": gpus})
        yield partial(_run_all, ray, gpus=gpus, threads=threads)
    finally:
        if ours:
            ray.shutdown()


def _start(ray: Any, address: str | None) -> None:
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    try:
        if host and port.isdigit():  # Ray itself tries for minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # Ray raises Exception itself when it is not up in time
        where = f"at {address}" if address else "on this machine"
        raise LotteryError(f"cannot reach or start Ray {where}: {first_line(error)}") from error


def _check_resources(nodes: Sequence[dict[str, Any]], wanted: dict[str, float]) -> None:
    """Ray waits for ever for a machine that is not there."""
    machines = [node["Resources"] for node in nodes if node["Alive"]]
    if not any(
        all(machine.get(name, 0) >= amount for name, amount in wanted.items()) for machine in machines
    ):
        most = {name: max((machine.get(name, 0) for machine in machines), default=0) for name in wanted}
        asked, there = (
            ", ".join(f"{amount:g} {name}" for name, amount in amounts.items()) for amounts in (wanted, most)
        )
        raise LotteryError(f"a run is to have {asked}, and no machine of Ray's has them (at most {there})")


def _run_all(ray: Any, tasks: Sequence[Callable[[], Any]], *, gpus: float, threads: int) -> Iterator[Any]:
    """Results in the order of their ends; when one fails, or nobody waits for them, the others are ended."""
    remote = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=0)(_run)
    running = [remote.remote(task, threads, os.getcwd()) for task in tasks]
    try:
        while running:
            (ended,), running = ray.wait(running)
            yield _result(ray, ended)
    finally:
        for each in running:
            ray.cancel(each, force=True)


def _result(ray: Any, ended: Any) -> Any:
    try:
        return ray.get(ended)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None  # as it was raised there
    except ray.exceptions.RayError as error:
        raise LotteryError(
            f"{ENDED}: give each run more --threads-per-run, so that fewer share a machine"
        ) from error


def _run(task: Callable[[], Any], threads: int, folder: str) -> Any:
    """One task, in a process of Ray's."""
    try:
        os.chdir(folder)
    except OSError as error:
        raise LotteryError(
            f"a machine of the cluster cannot see {folder} ({error.strerror}): runs need a file system that all share"
        ) from error
    torch.set_num_threads(threads)
    return task()
