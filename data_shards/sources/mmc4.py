"""MMC4 (Zhu et al. 2023, allenai/mmc4) and OpenFlamingo's training forms of it → documents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from data_shards.account import Account
from data_shards.sources import Record
from flamingo.document import Document


@dataclass(frozen=True)
class Mmc4Reader:
    """MMC4 as released or with its images inside, OpenFlamingo's tars of it, and ChatGPT-written sequences."""

    input: str
    """file, folder or glob of .jsonl, .jsonl.gz, .zip (of .jsonl) or .tar (OpenFlamingo's `{key}.json`)"""
    images: str = ""
    """folder, tar or glob of tars that holds the images, img2dataset's output too; empty: they are inside, in base64"""
    image_table: str = ""
    """table (parquet, csv, tsv, json, jsonl) with columns url and file, for images stored under other names"""
    assignment: Literal["stored", "fresh"] = "stored"
    """each image's sentence: the stored match, or a fresh linear assignment of the images that are there"""
    min_similarity: float = 0.24
    """images less similar to their sentence are dropped (0.24: OpenFlamingo's default; Otter's is 0.32)"""
    max_images: int = 0
    """images of a document, the first in reading order; 0: all, since a conversion splits long documents"""
    min_image_bytes: int = 0
    """smaller image files are dropped (OpenFlamingo's reader drops up to 10 kB)"""
    keep_text_only: bool = False
    """keep the text of documents that have no image, or none left"""
    name: str = "mmc4"
    """name of the source in its documents; losses are reported by it"""

    def parts(self) -> Sequence[str]:
        """The files, sorted."""
        raise NotImplementedError

    def records(self, part: str) -> Iterator[Record]:
        """One record a line, or a sample of a tar."""
        raise NotImplementedError

    def documents(self, record: Record, account: Account) -> list[Document]:
        """The document of one record; none where it is dropped."""
        raise NotImplementedError

    def urls(self) -> Iterator[tuple[str, str]]:
        """(raw_url, image_name) of every image that the source names, in its order and with its repetitions."""
        raise NotImplementedError


def sample_document(key: str, members: dict[str, bytes]) -> Document:
    """The document of one sample of OpenFlamingo's tars."""
    raise NotImplementedError
