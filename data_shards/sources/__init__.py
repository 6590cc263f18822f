"""Public formats → documents: a small reader each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

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
