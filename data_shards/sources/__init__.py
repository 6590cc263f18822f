"""Public formats → documents: a small reader each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from data_shards.account import Account
from flamingo.document import Document


@dataclass(frozen=True)
class Record:
    """One document of a source before it is read: where it is, for messages, and its raw content."""

    place: str
    content: Any


class Reader(Protocol):
    """A source in a public format.

    A conversion splits it by parts and records, and reads in any process: a reader can be pickled, and what `records`
    yields depends on nothing but the part.
    """

    @property
    def name(self) -> str:
        """Becomes `Document.source`."""

    def parts(self) -> Sequence[str]:
        """The source's files, in a fixed order; each can be read alone."""

    def records(self, part: str) -> Iterator[Record]:
        """The records of one part in their order, cheaply: what can be left to `documents` is not done here.

        Raises:
            FlamingoError: where the file cannot be read at all; it names the file.
        """

    def documents(self, record: Record, account: Account) -> list[Document]:
        """The documents of one record, without keys, in full length; none where it is dropped.

        Every record and each of its images enters the account exactly once. Nothing that a record holds raises.
        """


@runtime_checkable
class InstructionReader(Reader, Protocol):
    """A reader whose documents, one a record, are turns of question and answer: see `flamingo.instructions`.

    No cut may part an answer from its question, or a question from what it is about: see `data_shards.turns`.
    """

    long_turns: ClassVar[Literal["contexts", "rounds"]]
    """what to do with a document that is too long: turns before the last are examples, each the last of a document of
    its own, and may be left out; or rounds of one conversation, which becomes several"""


@runtime_checkable
class IndexedReader(Reader, Protocol):
    """A reader that looks things up in files on disk, which it makes of its source."""

    @property
    def cache(self) -> str:
        """Their folder. It changes nothing in what is read."""

    def prepare(self) -> None:
        """Make them, where they are not there or of another state of the source."""
