"""Image–text pairs → documents: img2dataset's tars, and tables of images and captions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from data_shards.account import Account
from data_shards.sources import Record
from flamingo.document import Document


@dataclass(frozen=True)
class PairsReader:
    """An image and its caption: `{key}.jpg` and `{key}.txt` in tars, rows of a table, or COCO's captions."""

    input: str
    """file, folder or glob of .tar (img2dataset, WebDataset), else of .parquet, .csv, .tsv, .jsonl or .json (rows, or
    COCO's captions)"""
    images: str = ""
    """of tables: folder, tar or glob of tars that holds the images; empty: they are files beside the table"""
    image_table: str = ""
    """table (parquet, csv, tsv, json, jsonl) with columns url and file, where the rows name images by their URL"""
    image_column: str = ""
    """column of the image's file name or URL; empty: image, image_path, file_name, filename, file, path or url"""
    caption_column: str = ""
    """column of the caption or captions; empty: caption, captions, text or title"""
    captions: Literal["all", "first"] = "all"
    """of an image with several captions, all (a document for each) or the first"""
    name: str = "pairs"
    """name of the source in its documents; losses are reported by it"""

    def parts(self) -> Sequence[str]:
        """The files, sorted."""
        raise NotImplementedError

    def records(self, part: str) -> Iterator[Record]:
        """One record a sample of a tar, or a row."""
        raise NotImplementedError

    def documents(self, record: Record, account: Account) -> list[Document]:
        """A document for each caption; none where the record is dropped."""
        raise NotImplementedError


def sample_document(key: str, members: dict[str, bytes]) -> Document:
    """The document of one sample of an img2dataset tar."""
    raise NotImplementedError
