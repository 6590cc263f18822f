"""OBELICS (Laurençon et al. 2023, HuggingFaceM4/OBELICS) and whatever has its layout → documents.

Texts that stand together, also where the image between them is lost, are joined by a blank line, which is how OBELICS
separates the paragraphs of one text. `general_metadata` is carried along, what is said of each position is not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data_shards.account import Account
from data_shards.faults import BAD_RECORD, SampleError
from data_shards.sources import Record
from data_shards.sources.images import FilesBeside, ImageSource, ImageStore, open_images
from data_shards.sources.reading import Images, Row, checked_segments, find_files, plain, read_record
from data_shards.sources.tables import table_records
from flamingo.document import Document, Image

_ENDINGS = (".parquet", ".jsonl", ".jsonl.gz")
_COLUMNS = ("images", "texts", "general_metadata")


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
        """The files, sorted. The images are indexed here, once: the reader carries the index to other processes."""
        found = find_files(self.input, _ENDINGS)
        _ = self._index
        return found

    def records(self, part: str) -> Iterator[Record]:
        """One record a row or line."""
        return table_records(part, _COLUMNS)

    def documents(self, record: Record, account: Account) -> list[Document]:
        """The document of one record; none where it is dropped."""
        return read_record(record, account, lambda content, images: [self._document(content, images)])

    def urls(self) -> Iterator[tuple[str, str]]:
        """(url, "") of every image that the source names by a URL, in its order and with its repetitions.

        Malformed records are passed over: a conversion counts them.
        """
        for part in find_files(self.input, _ENDINGS):
            for record in table_records(part, ("images",)):
                try:
                    if isinstance(record.content, SampleError):
                        raise record.content
                    images = record.content.mapping().get("images")
                except SampleError:
                    continue
                for url in images if isinstance(images, list) else []:
                    if isinstance(url, str) and "://" in url:
                        yield plain(url), ""

    def _document(self, row: Row, images: Images) -> Document:
        content = row.mapping()
        parts = self._parts(content, self._store(row.file), images)
        metadata = content.get("general_metadata")
        if isinstance(metadata, str):
            metadata = _parsed(metadata)
        return Document(
            checked_segments(parts, "\n\n", keep_text_only=self.keep_text_only),
            source=self.name,
            metadata=plain(metadata) if isinstance(metadata, dict) else {},
        )

    def _parts(self, content: dict[str, Any], store: ImageSource, images: Images) -> list[str | Image]:
        """Texts, and the images that are there."""
        named, texts = content.get("images"), content.get("texts")
        if not isinstance(named, list) or not isinstance(texts, list) or len(named) != len(texts):
            images.named = sum(name is not None for name in named) if isinstance(named, list) else 0
            raise SampleError(BAD_RECORD, "expected lists images and texts of one length")
        images.named = sum(name is not None for name in named)
        for place, (name, text) in enumerate(zip(named, texts, strict=True)):
            if (name is None) == (text is None) or not isinstance(text if name is None else name, str):
                raise SampleError(BAD_RECORD, f"position {place}: expected an image or a text, one of them null")
        parts: list[str | Image] = []
        for name, text in zip(named, texts, strict=True):
            if name is None:
                parts.append(text)
                continue
            try:
                parts.append(store.read(name))
            except SampleError as error:
                images.lose(error.reason, error.detail)
        return parts

    @cached_property
    def _index(self) -> ImageStore | None:
        return open_images(self.images, self.image_table)

    def _store(self, file: str) -> ImageSource:
        return FilesBeside(str(Path(file).parent)) if self._index is None else self._index


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return {"general_metadata": text}
