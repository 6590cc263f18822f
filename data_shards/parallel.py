"""One function over many files in several processes; one that a file kills takes none of the others with it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Result = TypeVar("Result")

WORTH_PROCESSES = 64 << 20
"""bytes of data below which starting processes takes longer than the work"""


def over_files(
    function: Callable[[Path], Result], paths: Sequence[Path], *, processes: int | None, title: str
) -> Iterator[Result | None]:
    """The function's result for each path, in order; None where its process died (out of memory, a broken decoder).

    A bar is shown on standard error where that is a terminal.

    Args:
        function: can be pickled; what it raises is raised here.
        paths: the files.
        processes: 0 or 1 works in this process; None: one for each core, if there are enough data to be worth it.
        title: of the bar.
    """
    if processes is None:
        size = sum(path.stat().st_size for path in paths if path.is_file())
        processes = os.cpu_count() or 1 if size >= WORTH_PROCESSES else 1
    processes = min(processes, len(paths))
    results = _in_processes(function, paths, processes) if processes > 1 else map(function, paths)
    console = Console(stderr=True)
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
    # Without a thread of its own, which would be forked along.
    with Progress(
        *columns, console=console, transient=True, auto_refresh=False, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(title, total=len(paths))
        for result in results:
            yield result
            bar.advance(task)
            bar.refresh()


def _in_processes(function: Callable[[Path], Result], paths: Sequence[Path], processes: int) -> Iterator[Result | None]:
    with ProcessPoolExecutor(processes, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = [pool.submit(function, path) for path in paths]
        try:
            for path, future in zip(paths, futures, strict=True):
                try:
                    yield future.result()
                except BrokenProcessPool:  # of this file or of any other in work: each is tried alone
                    yield _alone(function, path)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _alone(function: Callable[[Path], Result], path: Path) -> Result | None:
    with ProcessPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            return pool.submit(function, path).result()
        except BrokenProcessPool:
            return None
