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

from sparsetweaks.lottery.config import LotteryError, RunError

Result = TypeVar("Result")
Engine = Callable[[Sequence[Callable[[], Any]]], Iterator[Any]]
"""Runs tasks that do not depend on one another and yields their results; `run_all`, or what `on_ray` gives."""
ENDED = "a process was ended from outside, perhaps for lack of memory"
SHOWN = 3  # of the runs that failed, with their reasons


class GridError(LotteryError):
    """Some runs of a grid failed, and all others were run and are kept. Its arguments are the names and reasons.

    Example:
        >>> str(GridError("seed 0, AT: the loss became nan"))[:73]
        '1 run failed, and all others are kept: seed 0, AT: the loss became nan. `'
    """

    def __str__(self) -> str:
        count, told = len(self.args), "; ".join(self.args[:SHOWN])
        more = f"; and {count - SHOWN} more" if count > SHOWN else ""
        return (
            f"{count} run{'s' if count > 1 else ''} failed, and all others are kept: {told}{more}. `sparsetweaks show` has "
            "the results of the others; the same command tries these again, and runs nothing else"
        )


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


def run_each(
    engine: Engine, tasks: Sequence[Callable[[], Result]], failed: list[str]
) -> Iterator[Result | None]:
    """Run tasks by an engine, and go on where one raises a RunError; any other error ends the rest, as ever.

    Args:
        engine: what runs them.
        tasks: as the engine takes them.
        failed: to which the reasons of those that fail are added; the caller raises a GridError of them at the end.

    Yields:
        Results as the engine does, and None, once its reason is added, for a task that failed.

    Example:
        >>> def diverge():
        ...     raise RunError("the loss became nan")
        >>> failed = []
        >>> list(run_each(run_all, [diverge, lambda: 2], failed)), failed
        ([None, 2], ['the loss became nan'])
    """
    for result in engine([partial(_attempt, task) for task in tasks]):
        if isinstance(result, RunError):
            failed.append(str(result))
            yield None
        else:
            yield result


def _attempt(task: Callable[[], Result]) -> Result | RunError:
    """A task's result or, as a result like any other whatever the engine, what was wrong with it."""
    try:
        return task()
    except RunError as error:
        return RunError(str(error))  # the error itself would hold the network by its traceback


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
