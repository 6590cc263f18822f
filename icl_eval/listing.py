"""`flamingo-eval tasks`: the tasks there are, the files that each expects, and whether they are there."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from flamingo.errors import FlamingoError, plain_options
from icl_eval.datasets import OTHER_FOLDERS, folder_of, load_dataset
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
    if root and not Path(root).is_dir():
        raise FlamingoError(f"{'--data' if parsed.data else ROOT} {root}: expected the folder of data sets")
    tasks = [load_task(name) for name in parsed.tasks or available()]
    found = faults(tasks, Path(root)) if root else {}
    Console().print(listing(tasks, Path(root), found))
    unready = [task.name for task in tasks if found.get(task.name)]
    if parsed.tasks and unready:
        raise FlamingoError(f"{root}: not ready: {', '.join(unready)}")


def faults(tasks: Sequence[Task], root: Path) -> dict[str, list[str]]:
    """What is wrong with the tasks' files below `root`: for each task a line a split, none where it can be run."""
    line = cache(partial(_fault, root))  # several tasks share a data set
    splits = {task.name: dict.fromkeys((task.split, task.support_split)) for task in tasks}
    return {task.name: [*filter(None, (line(task.dataset, split) for split in splits[task.name]))] for task in tasks}


def _fault(root: Path, dataset: str, split: str) -> str:
    try:
        lines = problems(dataset, root, (split,))
    except FlamingoError as error:
        return str(error)
    return f"{lines[0]} (and {len(lines) - 1} more of split {split!r})" if len(lines) > 1 else "".join(lines)


def listing(tasks: Sequence[Task], root: Path, found: dict[str, list[str]]) -> Group:
    """What each task is (splits: of the queries, and of the demonstrations where that is another), what is wrong with
    files that are there, then the folders, the tasks that are about each, and the files that are expected in it.

    Args:
        tasks: to list.
        root: folder of data sets.
        found: what is wrong with each task, by name; without an entry it was not checked.
    """
    shown = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    shown.add_column("task", no_wrap=True)
    shown.add_column("splits", overflow="fold")
    for heading in ("shots", "metric", *(["state"] if found else [])):
        shown.add_column(heading, no_wrap=True)
    for task in tasks:
        splits = ", ".join(dict.fromkeys((task.split, task.support_split)))
        row = [task.name, splits, ",".join(map(str, task.shots)), task.metric]
        shown.add_row(*row, *([_state(task, root, found[task.name])] if found else []))
    wrong = dict.fromkeys(line for task in tasks if _is_there(task, root) for line in found.get(task.name, ()))
    return Group(shown, *(Text(f"\n{line}") for line in wrong), *_expected(tasks, root))


def _expected(tasks: Sequence[Task], root: Path) -> Iterator[Text | Table]:
    """Folders, each with its tasks where they have other names, and the files in it; those with the same ones at once.

    The page is narrow: the folder of all of them is told once.
    """
    about: dict[str, list[str]] = defaultdict(list)
    for task in tasks:
        about[task.dataset].append(task.name)
    together: dict[tuple[tuple[str, str], ...], list[str]] = defaultdict(list)
    for dataset, names in about.items():
        if files := load_dataset(dataset, root).files:
            of = "" if names == [dataset] else f" ({', '.join(names)})"
            together[tuple(files.items())].append(f"{_folder(dataset, root)}{of}")
    if together:
        yield Text(f"\nfiles that they expect below {root if str(root) != '.' else 'the folder --data'}", style="bold")
    for rows, folders in together.items():
        yield Text(f"\n{', '.join(folders)}")
        block = Table(box=None, padding=(0, 0, 0, 2), show_header=False)
        for row in rows:
            block.add_row(*row)
        yield block


def _folder(dataset: str, root: Path) -> str:
    """A data set's folder as it is there, from `root` if it is below, else all that it may be called."""
    folder = folder_of(dataset, root)
    if folder.is_dir():
        return f"{folder.relative_to(root) if folder.is_relative_to(root) else folder}/"
    return " or ".join(f"{name}/" for name in (dataset, *OTHER_FOLDERS.get(dataset, ())))


def _state(task: Task, root: Path, faults: Sequence[str]) -> str:
    """In a word: a folder that is absent needs no more, what is wrong with others is told below the table."""
    return "ready" if not faults else "faulty" if _is_there(task, root) else "absent"


def _is_there(task: Task, root: Path) -> bool:
    return folder_of(task.dataset, root).is_dir()
