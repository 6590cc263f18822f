"""OBELICS (Laurençon et al. 2023, HuggingFaceM4/OBELICS) and whatever has its layout → documents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from data_shards.account import Account
from data_shards.sources import Record
from flamingo.document import Document


@dataclass(frozen=True)
class ObelicsReader:
    """Parallel lists `images` and `texts`, exactly one of them set at each position."""

    input: str
    """file, folder or glob of .parquet, .jsonl or .jsonl.gz"""
    images: str = ""
    """folder, tar or glob of tars that holds the images, img2dataset's output too; empty: they are files beside the
    input"""
    image_table: str = ""
    """table (parquet, csv, tsv, json, jsonl) with columns url and file"""
    keep_text_only: bool = False
    """keep the text of documents that have no image, or none left"""
    name: str = "obelics"
    """name of the source in its documents; losses are reported by it"""

    def parts(self) -> Sequence[str]:
        """The files, sorted."""
        raise NotImplementedError

    def records(self, part: str) -> Iterator[Record]:
        """One record a row or line."""
        raise NotImplementedError

    def documents(self, record: Record, account: Account) -> list[Document]:
        """The document of one record; none where it is dropped."""
        raise NotImplementedError

    def urls(self) -> Iterator[tuple[str, str]]:
        """(url, "") of every image that the source names, in its order and with its repetitions."""
        raise NotImplementedError
