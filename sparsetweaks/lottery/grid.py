"""Independent runs, one after the other in this process or side by side in several, each with its share of the threads."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any, TypeVar

import torch

from sparsetweaks.lottery.config import LotteryError

Result = TypeVar("Result")
Engine = Callable[[Sequence[Callable[[], Any]]], Iterator[Any]]
"""Runs tasks that do not depend on one another and yields their results; `run_all`, or what `on_ray` gives."""
ENDED = "a process was ended from outside, perhaps for lack of memory"


def run_all(
    tasks: Sequence[Callable[[], Result]], *, processes: int = 1, threads: int | None = None
) -> Iterator[Result]:
    """Run tasks that do not depend on one another, and yield each result as it comes.

    Small networks leave most of a second thread idle, and two processes of two threads on two cores are many times
    slower than of one: so each process gets one thread, unless told otherwise. When the caller is interrupted, or a
    task raises, the processes are ended at once; whatever a task keeps is to be written whole or not at all.

    Args:
        tasks: functions without arguments; with several processes, they and their results must pickle.
        processes: how many at a time; 1 runs them here.
        threads: of each run. The default is 1 where there are several processes, and for one those it has already.

    Yields:
        Results, in the order of the tasks for one process, else in that of their ends.

    Raises:
        LotteryError: when a process is ended from outside, for lack of memory say; and whatever a task raises.

    Example:
        >>> from functools import partial
        >>> list(run_all([partial(max, 1, 2), partial(min, 1, 2)]))
        [2, 1]
    """
    if processes == 1:
        for task in tasks:
            with _threads(threads):
                result = task()
            yield result
        return
    before = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")  # forking a process that runs threads can hang
    start = partial(_become_worker, 1 if threads is None else threads)
    pool = ProcessPoolExecutor(min(processes, max(1, len(tasks))), mp_context=context, initializer=start)
    finished = False
    try:
        for future in as_completed([pool.submit(task) for task in tasks]):
            yield future.result()
        finished = True
    except BrokenProcessPool:
        raise LotteryError(f"{ENDED}: try --processes 1") from None
    finally:
        for process in () if finished else set(multiprocessing.active_children()) - before:
            process.terminate()
        pool.shutdown(cancel_futures=True)


def _become_worker(threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it, and ends this process
    torch.set_num_threads(threads)


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """So many threads for a while; None leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
