"""`flamingo-eval tasks`: the tasks there are, the files that each expects, and whether they are there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser
from rich.box import SIMPLE
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from flamingo.errors import FlamingoError, plain_options
from icl_eval.datasets import folder_of, load_dataset
from icl_eval.datasets.checking import problems
from icl_eval.sources import ROOT
from icl_eval.tasks import Task, available, load_task


@dataclass
class Options:
    """List tasks and the files that they expect; with a folder of data sets, check them.

    Attributes:
        data: folder in which the folders of data sets are; empty: FLAMINGO_EVAL_DATA; without it nothing is checked.
    """

    data: str = ""


def main(words: Sequence[str]) -> None:
    """Print the table.

    Raises:
        FlamingoError: an argument that is unknown or malformed, or a task named that is not ready.
    """
    parser = ArgumentParser(
        prog="flamingo-eval tasks", description=Options.__doc__, exit_on_error=False, allow_abbrev=False
    )
    parser.add_class_arguments(Options)
    parser.add_argument("tasks", nargs="*", help="names or YAML files; none: all of the package")
    try:
        parsed = parser.parse_args(plain_options(words))
    except ArgumentError as error:
        raise FlamingoError(f"tasks: {error}") from None
    root = parsed.data or os.environ.get(ROOT, "")
    tasks = [load_task(name) for name in parsed.tasks or available()]
    found = {task.name: faults(task, Path(root)) for task in tasks} if root else {}
    Console().print(listing(tasks, Path(root), found))
    unready = [task.name for task in tasks if found.get(task.name)]
    if parsed.tasks and unready:
        raise FlamingoError(f"{root}: not ready: {', '.join(unready)}")


def faults(task: Task, root: Path) -> list[str]:
    """What is wrong with a task's files below `root`; empty where it can be run."""
    try:
        return problems(task.dataset, root, tuple(dict.fromkeys((task.split, task.support_split))))
    except FlamingoError as error:
        return [str(error)]


def listing(tasks: Sequence[Task], root: Path, found: dict[str, list[str]]) -> Group:
    """What each task is (splits: of the queries, and of the demonstrations where that is another), what is wrong with
    files that are there, then by data set the files that it expects.

    Args:
        tasks: to list.
        root: folder of data sets, for paths.
        found: what is wrong with each task, by name; without an entry it was not checked.
    """
    shown = Table(
        box=SIMPLE, pad_edge=False, collapse_padding=True, title="tasks", title_justify="left", title_style="bold"
    )
    shown.add_column("task", no_wrap=True)
    for heading in ("data set", "splits", "shots", "metric", *(["state"] if found else [])):
        shown.add_column(heading, overflow="fold")
    for task in tasks:
        row = [
            task.name,
            task.dataset,
            ", ".join(dict.fromkeys((task.split, task.support_split))),
            ",".join(map(str, task.shots)),
            task.metric,
        ]
        shown.add_row(*row, *([_state(task, root, found[task.name])] if found else []))
    files = Table(box=SIMPLE, pad_edge=False, title="files that they expect", title_justify="left", title_style="bold")
    for heading in ("folder", "file", "what it is"):
        files.add_column(heading, overflow="fold")
    for name in dict.fromkeys(task.dataset for task in tasks):
        for place, (pattern, what) in enumerate(load_dataset(name, root).files.items()):
            files.add_row("" if place else str(folder_of(name, root)), pattern, what)
    wrong = {_first(faults): None for task in tasks if (faults := found.get(task.name)) and _is_there(task, root)}
    return Group(shown, *map(Text, wrong), files)


def _state(task: Task, root: Path, faults: Sequence[str]) -> str:
    """In a word: a folder that is not there needs no more, what is wrong with others is told below the table."""
    return "ready" if not faults else "faulty" if _is_there(task, root) else "no folder"


def _is_there(task: Task, root: Path) -> bool:
    return folder_of(task.dataset, root).is_dir()


def _first(faults: Sequence[str]) -> str:
    return faults[0] + (f" (and {len(faults) - 1} more)" if len(faults) > 1 else "")
