"""Answers as they come, kept so that a killed evaluation goes on where it stopped.

In a folder, each rank appends the answers to a query, in all of its task's cells, to a file of its own:

    unfinished/evaluation.json   what is evaluated: another evaluation does not go on from this one
    unfinished/before.jsonl      whole lines of an earlier start
    unfinished/rank-0.jsonl …    of this one

Only where each line begins is held in memory. Without a folder the answers themselves are, and ranks exchange them.
Nothing is gone on with, and no results are written over, but those of the same evaluation.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar, overload

import numpy as np
from torch import distributed

from flamingo.errors import FlamingoError
from flamingo.files import read_object, whole, write_text
from icl_eval.outcomes import Outcome
from icl_eval.questions import CellKey
from icl_eval.results import identity_of
from icl_eval.saved import RESULTS

UNFINISHED = "unfinished"
SAID = 200  # characters of a value that is shown whole, such as all controls of a task; longer ones are not shown
T = TypeVar("T")
Answers = Mapping[CellKey, Outcome]
"""A query's outcome in each cell"""


def is_distributed() -> bool:
    """Whether there is a process group."""
    return distributed.is_available() and distributed.is_initialized()


def rank_and_ranks() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    return (distributed.get_rank(), distributed.get_world_size()) if is_distributed() else (0, 1)


def wait() -> None:
    """Until all ranks are here."""
    if is_distributed():
        distributed.barrier()


def exchanged(own: T) -> list[T]:
    """What each rank has, by ranks; every rank calls this."""
    if not is_distributed():
        return [own]
    shares: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(shares, own)
    return shares


class Lines(Sequence[Outcome]):
    """Outcomes in files, read when they are asked for.

    Args:
        places: (file, offset) of each line.
        read: takes the outcome out of a line.
    """

    def __init__(self, files: Sequence[Path], places: np.ndarray, read: Callable[[dict[str, Any]], Outcome]):
        self.files, self.places, self.read = files, places, read

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, place: int) -> Outcome: ...
    @overload
    def __getitem__(self, place: slice) -> list[Outcome]: ...
    def __getitem__(self, place: int | slice) -> Outcome | list[Outcome]:
        found = list(self._outcomes(self.places[place] if isinstance(place, slice) else self.places[[place]]))
        return found if isinstance(place, slice) else found[0]

    def __iter__(self) -> Iterator[Outcome]:
        return self._outcomes(self.places)

    def _outcomes(self, places: np.ndarray) -> Iterator[Outcome]:
        opened: dict[int, IO[bytes]] = {}
        try:
            for number, offset in places.tolist():
                if number not in opened:
                    opened[number] = self.files[number].open("rb")
                opened[number].seek(offset)
                yield self.read(json.loads(opened[number].readline()))
        finally:
            for file in opened.values():
                file.close()


class MemoryLedger:
    """Answers in memory."""

    def __init__(self) -> None:
        self.answers: dict[str, dict[int, Answers]] = {}

    def done(self, task: str, count: int) -> np.ndarray:
        """(count,) bool: which of a task's queries were answered before."""
        return np.zeros(count, dtype=bool)

    def add(self, task: str, answers: Mapping[int, Answers]) -> None:
        """Note down answers to some queries by their numbers."""
        self.answers.setdefault(task, {}).update(answers)

    def collect(self, task: str, keys: Sequence[CellKey]) -> dict[CellKey, Sequence[Outcome]]:
        """All ranks' outcomes of each cell, in the order of queries; every rank calls this."""
        shares = exchanged(self.answers.pop(task, {}))
        found = {number: answers for share in shares for number, answers in share.items()}
        return {key: tuple(found[number][key] for number in sorted(found)) for key in keys}

    def close(self, *, keep: bool = False) -> None:
        """Nothing is left behind."""


class FolderLedger:
    """Answers in a folder that all ranks see.

    Args:
        folder: of the results.
        identity: what is evaluated, see `identity_of`: an unfinished evaluation is gone on with where it is the same.
        commit: of the code that goes on.

    Attributes:
        commit: of all code that had a part, joined by commas.

    Raises:
        FlamingoError: the folder holds an unfinished evaluation, or results, of something else; it cannot be written.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], commit: str | None = None):
        self.folder = folder / UNFINISHED
        self._file: IO[str] | None = None
        self._counts: dict[str, int] = {}
        about, results, now = self.folder / "evaluation.json", folder / RESULTS, json.loads(json.dumps(identity))
        goes_on = about.exists()
        before = read_object(about) if goes_on else now
        commits = dict.fromkeys([*before.pop("commits", ()), commit])
        self.commit = commit if len(commits) == 1 else ", ".join(str(each) for each in commits)
        _check_same(f"{self.folder}: holds an unfinished evaluation", before, now)
        if results.exists():
            _check_same(f"{results}: holds results", identity_of(read_object(results)), now)
        wait()  # until all have seen it as it was
        if rank_and_ranks()[0] == 0:
            with written(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                if not goes_on:  # a finished evaluation that was killed while it tidied up may have left answers
                    for part in self._parts():
                        part.unlink()
                content = {**now, "commits": list(commits)}
                write_text(about, json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
                self._join()
        wait()

    def _join(self) -> None:
        """Whole lines of earlier starts into one file: a killed process leaves a part of one."""
        parts = self._parts()
        with whole(self.folder / "before.jsonl") as unfinished, unfinished.open("wb") as joined:
            for part in parts:
                with part.open("rb") as file:
                    joined.writelines(line for line in file if line.endswith(b"\n"))
        for part in parts:
            if part.name != "before.jsonl":
                part.unlink()

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("*.jsonl"))

    def _lines(self, task: str) -> tuple[list[Path], dict[int, tuple[int, int]]]:
        """Files, and by number of a query where its line is."""
        files, found = self._parts(), {}
        start = f'{{"task":{json.dumps(task, ensure_ascii=False)},"number":'.encode()
        for number, path in enumerate(files):
            offset = 0
            with path.open("rb") as file:
                for line in file:
                    if line.startswith(start):
                        found[int(line[len(start) : line.index(b",", len(start))])] = (number, offset)
                    offset += len(line)
        return files, found

    def done(self, task: str, count: int) -> np.ndarray:
        """See `MemoryLedger`."""
        self._counts[task] = count
        answered = np.zeros(count, dtype=bool)
        answered[list(self._lines(task)[1])] = True
        wait()  # until all have read what was there
        return answered

    def add(self, task: str, answers: Mapping[int, Answers]) -> None:
        """See `MemoryLedger`; they are on disk when it returns, as far as a killed process goes."""
        path = self.folder / f"rank-{rank_and_ranks()[0]}.jsonl"
        with written(path):
            if self._file is None:
                self._file = path.open("a", encoding="utf-8")
            for number, found in answers.items():
                cells = [[*key, vars(outcome)] for key, outcome in found.items()]
                line = {"task": task, "number": number, "cells": cells}
                self._file.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n")
            self._file.flush()

    def collect(self, task: str, keys: Sequence[CellKey]) -> dict[CellKey, Sequence[Outcome]]:
        """See `MemoryLedger`.

        Raises:
            FlamingoError: answers of other ranks are not there, or somebody took them away.
        """
        wait()
        files, found = self._lines(task)
        if len(found) != self._counts[task]:
            raise FlamingoError(
                f"{self.folder}: {len(found)} of the {self._counts[task]} queries of {task} in it, expected a folder "
                "that all ranks see, and no other evaluation in it at the same time"
            )
        places = np.array([found[number] for number in sorted(found)], dtype=np.int64).reshape(-1, 2)
        return {key: Lines(files, places, _reader(key)) for key in keys}

    def close(self, *, keep: bool = False) -> None:
        """Remove what is kept of an evaluation that is finished, unless it is to be kept; every rank calls this."""
        if self._file is not None:
            self._file.close()
        if keep:
            wait()
        else:
            discard(self.folder.parent)


def discard(folder: Path) -> None:
    """Remove what a folder of results keeps of a finished evaluation; every rank calls this."""
    wait()
    if rank_and_ranks()[0] == 0:
        shutil.rmtree(folder / UNFINISHED)
    wait()


@contextmanager
def written(place: Path) -> Iterator[None]:
    """Within it a file or folder is written.

    Raises:
        FlamingoError: it cannot be, since the disk is full, say.
    """
    try:
        yield
    except OSError as error:
        raise FlamingoError(f"{place}: {error.strerror or error}, expected a folder with room to write in") from error


def _check_same(holds: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse what a folder holds of another evaluation."""
    if other := difference(_cells_by_task(before), _cells_by_task(now)):
        raise FlamingoError(
            f"{holds} of another model, other data, tasks or options ({other}); give another folder, or remove it"
        )


def difference(before: Any, now: Any, at: str = "") -> str | None:
    """The first key in which two pieces of plain data differ, with both values if they are short; None: they are equal.

    Keys come in the order of `now`.
    """
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*now, *before]):
            place = f"{at}.{key}" if at else key
            if (key in now) != (key in before):
                return f"{place}: only {'here' if key in now else 'there'}"
            if other := difference(before[key], now[key], place):
                return other
        return None
    if before == now:
        return None
    there, here = _said(before), _said(now)
    return f"{at}: {there} there, {here} here" if max(len(there), len(here)) <= SAID else f"{at}: another"


def _said(value: Any) -> str:
    if not isinstance(value, list):
        return repr(value)
    return ", ".join(str(each) for each in value) or "none"


def _cells_by_task(identity: Mapping[str, Any]) -> dict[str, Any]:
    """For whoever is told how two differ: "4 random_query" of each task's cells instead of all in one list."""
    found: dict[str, list[str]] = {}
    for task, shots, control in identity.get("cells", ()):
        found.setdefault(task, []).append(f"{shots} {control}" if control else str(shots))
    return {**identity, "cells": found}


def _reader(key: CellKey) -> Callable[[dict[str, Any]], Outcome]:
    def read(line: dict[str, Any]) -> Outcome:
        return next(Outcome.of(outcome) for shots, control, outcome in line["cells"] if (shots, control) == key)

    return read
