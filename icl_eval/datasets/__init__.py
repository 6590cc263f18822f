"""Data sets to evaluate on, in the files in which they are published: a small reader each, from a local folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

from flamingo.document import Medium


@dataclass(frozen=True)
class Example:
    """One example of a data set: what is shown, what is asked, and what counts as right.

    Attributes:
        id: names it within its split, in results too.
        media: names of its media in reading order, for `DataSet.medium`.
        question: what is asked; empty where the task's template asks.
        answers: reference answers or captions, all of them; the first stands in a demonstration.
        label: its class, which balances demonstrations and is the right one of the candidates.
        candidates: answers to choose among, where each example has its own; else `DataSet.candidates`.
        fields: further texts that a template may name, such as the words written on a meme.
    """

    id: str
    media: tuple[str, ...]
    question: str = ""
    answers: tuple[str, ...] = ()
    label: str | None = None
    candidates: tuple[str, ...] = ()
    fields: Mapping[str, str] = field(default_factory=dict)


class DataSet(Protocol):
    """A published data set in a folder.

    Its examples are texts and names, so that 10⁵ of them fit into memory; media are read when they are needed.
    """

    files: ClassVar[Mapping[str, str]]
    """what it expects below its folder: glob pattern → what it is, for `flamingo-eval tasks`"""
    splits: ClassVar[tuple[str, ...]]

    def __init__(self, folder: Path) -> None:
        """Nothing is read yet."""

    def examples(self, split: str) -> Sequence[Example]:
        """The examples of a split, in the order of the published file.

        Raises:
            FlamingoError: a file is missing or malformed; it names file and entry, and what was expected.
        """

    def candidates(self) -> tuple[str, ...]:
        """The class names to choose among, in the data set's order; () where there are none."""

    def medium(self, name: str) -> Medium:
        """A medium of an example, as the encoded bytes of its file.

        Raises:
            FlamingoError: it is not there; it names the file.
        """
