"""One function over many files in several processes; one that a file kills takes none of the others with it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Result = TypeVar("Result")

WORTH_PROCESSES = 64 << 20
"""bytes of data below which starting processes takes longer than the work"""


def over_files(
    function: Callable[..., Result],
    paths: Sequence[Path],
    *further: Sequence[Any],
    processes: int | None,
    title: str,
) -> Iterator[Result | None]:
    """The function's result for each path, in order; None where its process died (out of memory, a broken decoder).

    A bar is shown on standard error where that is a terminal.

    Args:
        function: can be pickled; what it raises is raised here.
        paths: the files.
        further: more arguments, one for each path, as `map` takes them.
        processes: 0 or 1 works in this process; None: one for each core, if there are enough data to be worth it.
        title: of the bar.
    """
    if processes is None:
        size = sum(path.stat().st_size for path in paths if path.is_file())
        processes = os.cpu_count() or 1 if size >= WORTH_PROCESSES else 1
    processes = min(processes, len(paths))
    jobs = list(zip(paths, *further, strict=True))
    results = _in_processes(function, jobs, processes) if processes > 1 else (function(*job) for job in jobs)
    console = Console(stderr=True)
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
    shown = console.is_terminal
    # Without a thread of its own, which would be forked along.
    with Progress(*columns, console=console, transient=True, auto_refresh=False, disable=not shown) as bar:
        task = bar.add_task(title, total=len(jobs))
        for result in results:
            yield result
            bar.advance(task)
            bar.refresh()


def _in_processes(
    function: Callable[..., Result], jobs: Sequence[tuple[Any, ...]], processes: int
) -> Iterator[Result | None]:
    with ProcessPoolExecutor(processes, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = [_submit(pool, function, job) for job in jobs]
        try:
            for job, future in zip(jobs, futures, strict=True):
                try:
                    yield future.result()
                except BrokenProcessPool:  # of this file or of any other in work: each is tried alone
                    yield _alone(function, job)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _submit(pool: ProcessPoolExecutor, function: Callable[..., Result], job: tuple[Any, ...]) -> Future[Result]:
    """A job's future, which is broken already where an earlier job has broken the pool."""
    try:
        return pool.submit(function, *job)
    except BrokenProcessPool as error:
        future: Future[Result] = Future()
        future.set_exception(error)
        return future


def _alone(function: Callable[..., Result], job: tuple[Any, ...]) -> Result | None:
    with ProcessPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            return pool.submit(function, *job).result()
        except BrokenProcessPool:
            return None
