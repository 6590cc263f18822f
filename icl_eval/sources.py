"""The examples of a task: its queries, what demonstrations are drawn from, and the media of both."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from flamingo.document import Image, Medium, Video
from flamingo.errors import FlamingoError
from flamingo.images import decode
from icl_eval.datasets import DataSet, Example, load_dataset
from icl_eval.datasets.reading import png
from icl_eval.tasks import Task

ROOT = "FLAMINGO_EVAL_DATA"
"""environment variable: the folder in which the folders of data sets are, where none is given"""
KEPT_BYTES = 2**26
"""of encoded media: a medium is hashed when it is drawn and read again soon after, to be shown"""


class Pool:
    """The examples of a task, in a fixed order, and their media, each under a number (`icl_eval.engine.Library`).

    Attributes:
        task: whose they are.
        queries: the examples of its split.
        support: those that demonstrations are drawn from; the same object where the splits are the same.
        candidates: answers to choose among, for examples that have none of their own.
    """

    def __init__(self, task: Task, dataset: DataSet):
        self.task, self.dataset = task, dataset
        self.queries = dataset.examples(task.split)
        same = task.support_split == task.split
        self.support = self.queries if same else dataset.examples(task.support_split)
        self.candidates = dataset.candidates() if task.mode == "rank" and not task.ways else ()
        self._names: list[str] = []
        self._numbers: dict[str, int] = {}
        self._digests: dict[int, bytes] = {}
        self._kept: OrderedDict[int, Medium] = OrderedDict()
        self._kept_bytes = 0

    # -- media ---------------------------------------------------------------------------------------------------------

    def indices(self, example: Example) -> tuple[int, ...]:
        """Numbers of an example's media, for this object's other methods."""
        found = []
        for name in example.media:
            if name not in self._numbers:
                self._numbers[name] = len(self._names)
                self._names.append(name)
            found.append(self._numbers[name])
        return tuple(found)

    def name(self, index: int) -> str:
        """Id of a medium, unique over all data sets and what tasks make of them."""
        return f"{self.task.dataset}{' inverted' if self.task.inverted else ''}/{self._names[index]}"

    def media(self, indices: Sequence[int]) -> list[Medium]:
        """The media at some numbers.

        Raises:
            FlamingoError: one cannot be read; it names the file.
        """
        return [self._medium(index) for index in indices]

    def _medium(self, index: int) -> Medium:
        if index in self._kept:
            self._kept.move_to_end(index)
            return self._kept[index]
        medium = self.dataset.medium(self._names[index])
        if self.task.inverted:
            medium = _inverted(medium)
        self._kept[index] = medium
        self._kept_bytes += _size(medium)
        while self._kept_bytes > KEPT_BYTES and len(self._kept) > 1:
            self._kept_bytes -= _size(self._kept.popitem(last=False)[1])
        return medium

    def digests(self, example: Example) -> set[bytes]:
        """SHA-256 of the content of each of an example's media."""
        found = set()
        for index in self.indices(example):
            if index not in self._digests:
                self._digests[index] = _digest(self._medium(index))
            found.add(self._digests[index])
        return found

    # -- indices of examples -------------------------------------------------------------------------------------------

    @cached_property
    def queries_by_label(self) -> Mapping[str, Sequence[int]]:
        """Places among the queries by class, both in the order of the split."""
        return by_label(self.queries, range(len(self.queries)))

    @cached_property
    def support_by_label(self) -> Mapping[str, Sequence[int]]:
        """Places in the support by class."""
        return self.queries_by_label if self.same else by_label(self.support, range(len(self.support)))

    @cached_property
    def support_within(self) -> Mapping[str, Sequence[int]]:
        """Places in the support by the task's field `within`."""
        found: dict[str, list[int]] = defaultdict(list)
        for place, example in enumerate(self.support):
            found[self.group(example)].append(place)
        return found

    def group(self, example: Example) -> str:
        """An example's field `within`.

        Raises:
            FlamingoError: it has no such field.
        """
        if self.task.within not in example.fields:
            raise FlamingoError(
                f"{self.task.file}: within: {self.task.within!r}, example {example.id!r} of {self.task.dataset} has "
                f"{', '.join(example.fields) or 'no fields'}"
            )
        return example.fields[self.task.within]

    @property
    def same(self) -> bool:
        """Whether queries and support are the same examples."""
        return self.queries is self.support

    def choices(self, example: Example) -> tuple[str, ...]:
        """The candidate answers to an example.

        Raises:
            FlamingoError: there are none.
        """
        found = example.candidates or self.candidates
        if not found:
            raise FlamingoError(
                f"{self.task.file}: mode: rank, but neither {self.task.dataset} nor its example {example.id!r} has "
                "candidates"
            )
        return found


def by_label(examples: Sequence[Example], places: Sequence[int]) -> dict[str, list[int]]:
    """Some places in a row of examples, by class; those without a class are left out."""
    found: dict[str, list[int]] = defaultdict(list)
    for place in places:
        label = examples[place].label
        if label is not None:
            found[label].append(place)
    return dict(found)


def load_pool(task: Task, root: str | Path | None = None) -> Pool:
    """The pool of `task`.

    Args:
        task: whose data set it is.
        root: the folder in which the folders of data sets are; default: `FLAMINGO_EVAL_DATA`, or the present folder.

    Raises:
        FlamingoError: the data set is unknown, missing or malformed, it does not fit the task, or an example asked for
            by its class has none.
    """
    try:
        dataset = load_dataset(task.dataset, Path(root or os.environ.get(ROOT, ".")))
    except FlamingoError as error:
        raise FlamingoError(f"{task.file}: dataset: {error}") from None
    for key in ("split", "support_split"):
        split = getattr(task, key)
        if split not in dataset.splits:
            raise FlamingoError(
                f"{task.file}: {key.partition('_')[0]}: {split!r}, {task.dataset} has {', '.join(dataset.splits)}"
            )
    pool = Pool(task, dataset)
    if task.ways:
        _check_classes(task, pool)
    return pool


def _check_classes(task: Task, pool: Pool) -> None:
    """Fast binding needs classes enough, and names for them where it asks for their own."""
    classes = [label for label in pool.queries_by_label if label in pool.support_by_label]
    if len(classes) < task.ways:
        raise FlamingoError(
            f"{task.file}: ways: {task.ways}, but split {task.split!r} of {task.dataset} has {len(classes)} classes"
        )
    nameless = [
        label for label, places in pool.queries_by_label.items() if label not in pool.queries[places[0]].answers
    ]
    if task.names == "fixed" and nameless:
        raise FlamingoError(
            f"{task.file}: names: fixed, but {len(nameless)} classes in split {task.split!r} of {task.dataset} have "
            f"no names (first: class {nameless[0]}), and without names there is nothing to ask at 0 shots"
        )


def _inverted(medium: Medium) -> Medium:
    """With light and dark exchanged, as PNGs."""
    if isinstance(medium, Video):
        return replace(medium, frames=tuple(_inverted_image(frame) for frame in medium.frames))
    return _inverted_image(medium)


def _inverted_image(image: Image) -> Image:
    return Image(png(255 - decode(image, 3).permute(1, 2, 0).numpy()), image.name)


def _frames(medium: Medium) -> tuple[Image, ...]:
    return medium.frames if isinstance(medium, Video) else (medium,)


def _size(medium: Medium) -> int:
    return sum(len(frame.data) for frame in _frames(medium))


def _digest(medium: Medium) -> bytes:
    """Of an image, of its file; of a video, of all its frames."""
    hashed = hashlib.sha256()
    for frame in _frames(medium):
        hashed.update(frame.data)
    return hashed.digest()
