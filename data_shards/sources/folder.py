"""One's own documents → documents: a folder with `documents.jsonl` and the images that it names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from data_shards.account import Account
from data_shards.sources import Record
from flamingo.document import Document


@dataclass(frozen=True)
class FolderReader:
    """A folder with `documents.jsonl`, one document a line, and its images below."""

    input: str
    """folder that holds documents.jsonl, or a .jsonl file; image names are relative to its folder"""
    name: str = "folder"
    """name of the source in its documents; losses are reported by it"""

    def parts(self) -> Sequence[str]:
        """The one file."""
        raise NotImplementedError

    def records(self, part: str) -> Iterator[Record]:
        """One record a line that is not blank."""
        raise NotImplementedError

    def documents(self, record: Record, account: Account) -> list[Document]:
        """The document of one line; none where it is dropped."""
        raise NotImplementedError
