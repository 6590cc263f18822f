"""Image–text pairs → documents of an image and its caption: img2dataset's tars, tables, and COCO's captions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from data_shards.account import Account
from data_shards.faults import BAD_RECORD, MISSING_IMAGE, NO_CAPTION, SampleError
from data_shards.sources import Record
from data_shards.sources.images import FilesBeside, ImageSource, ImageStore, open_images
from data_shards.sources.reading import (
    IMAGE_SUFFIXES,
    Images,
    Row,
    find_files,
    image_file,
    parse_object,
    plain,
    read_record,
)
from data_shards.sources.tables import TABLES, read_json, row_records, table_records
from data_shards.sources.tars import TarSample, sample_records
from flamingo.document import Document, Image, Text
from flamingo.errors import FlamingoError

_IMAGE_COLUMNS = ("image", "image_path", "file_name", "filename", "file", "path", "url")
_CAPTION_COLUMNS = ("caption", "captions", "text", "title")


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

    def __post_init__(self) -> None:
        if self.captions not in ("all", "first"):
            raise FlamingoError(f"captions={self.captions!r}: expected all or first")

    def parts(self) -> Sequence[str]:
        """The files, sorted. The images are indexed here, once: the reader carries the index to other processes."""
        found = find_files(self.input, (".tar",), TABLES)
        if not found[0].lower().endswith(".tar"):
            _ = self._index
        return found

    def records(self, part: str) -> Iterator[Record]:
        """One record a sample of a tar, a row, or an image of COCO's."""
        if part.lower().endswith(".tar"):
            return sample_records(part)
        if part.lower().endswith(".json"):
            content = read_json(part)
            return row_records(part, content) if isinstance(content, list) else _coco_records(part, content)
        return table_records(part)

    def documents(self, record: Record, account: Account) -> list[Document]:
        """A document for each caption; none where the record is dropped."""
        return read_record(record, account, self._documents)

    def _documents(self, content: Row | TarSample, images: Images) -> list[Document]:
        if isinstance(content, TarSample):
            images.named = sum(map(_is_image, content.span.suffixes))
            image, captions = _sample(content.span.key, content.read())
        else:
            image, captions = self._row(content, images)
        chosen = captions[:1] if self.captions == "first" else captions
        images.named = len(chosen)  # an image counts as often as it is kept
        return [Document((image, Text(plain(caption))), source=self.name) for caption in chosen]

    def _row(self, row: Row, images: Images) -> tuple[Image, list[str]]:
        columns = row.mapping()
        named = _column(columns, self.image_column, _IMAGE_COLUMNS)
        images.named = 1
        captions = _captions(_column(columns, self.caption_column, _CAPTION_COLUMNS))
        if isinstance(named, dict):  # Hugging Face's image column
            data, path = named.get("bytes"), named.get("path")
            named = path if data is None else data
        else:
            path = None
        if isinstance(named, bytes):
            return image_file(named, Path(path).name if isinstance(path, str) and path else "image"), captions
        if not isinstance(named, str) or not named:
            raise SampleError(MISSING_IMAGE, f"expected a file name, a URL or bytes, found {type(named).__name__}")
        return self._store(row.file).read(named), captions

    @cached_property
    def _index(self) -> ImageStore | None:
        return open_images(self.images, self.image_table)

    def _store(self, file: str) -> ImageSource:
        return FilesBeside(str(Path(file).parent)) if self._index is None else self._index


def sample_document(key: str, members: dict[str, bytes]) -> Document:
    """The document of one sample of img2dataset's tars: `jpg`, `png`, `webp`, … and `txt`, or a caption in `json`.

    Raises:
        SampleError: where the image or the caption is not there or not usable; it names the key.
    """
    try:
        image, captions = _sample(key, members)
    except SampleError as error:
        raise SampleError.of(error, key) from error
    return Document((image, Text(plain(captions[0]))), key=key)


def _sample(key: str, members: dict[str, bytes]) -> tuple[Image, list[str]]:
    names = [name for name in members if _is_image(name)]
    if not names:
        raise SampleError(MISSING_IMAGE, f"expected a member jpg, png, webp, …, found {sorted(members)}")
    if len(names) > 1:
        raise SampleError(BAD_RECORD, f"expected one image, found {sorted(names)}")
    if "txt" in members:
        captions: Any = members["txt"].decode("utf-8", "replace")
    else:
        captions = _column(parse_object(members.get("json", b"{}")), "", _CAPTION_COLUMNS)
    return image_file(members[names[0]], f"{Path(key).name}.{names[0]}"), _captions(captions)


def _is_image(name: str) -> bool:
    return name.lower() in IMAGE_SUFFIXES


def _column(columns: dict[str, Any], name: str, usual: Sequence[str]) -> Any:
    """A column's value: of the one that is named, else of the first of the usual ones that is there and not empty."""
    if name and name not in columns:
        raise SampleError(BAD_RECORD, f"expected a column {name}, found {sorted(columns)}")
    return columns[name] if name else next((columns[each] for each in usual if columns.get(each)), None)


def _captions(value: Any) -> list[str]:
    """One caption or several, without space around them and without empty ones.

    Raises:
        SampleError: where there is none.
    """
    values = value if isinstance(value, list) else [value]
    captions = [caption.strip() for caption in values if isinstance(caption, str) and caption.strip()]
    if not captions:
        raise SampleError(NO_CAPTION, f"found {value!r:.80}")
    return captions


def _coco_records(part: str, content: Any) -> Iterator[Record]:
    """COCO's captions: a record for each image, with all its captions, and for each caption that is of no image.

    Raises:
        FlamingoError: where it has another layout; it names the file.
    """
    images, annotations = (
        content.get(name) if isinstance(content, dict) else None for name in ("images", "annotations")
    )
    if not isinstance(images, list) or not isinstance(annotations, list):
        raise FlamingoError(f"{part}: expected a list of rows, or COCO's object with lists images and annotations")
    captions: dict[str, list[Any]] = {str(image.get("id")): [] for image in images if isinstance(image, dict)}
    for annotation in annotations:
        of = str(annotation.get("image_id")) if isinstance(annotation, dict) else ""
        if of in captions:
            captions[of].append(annotation.get("caption"))
        else:
            yield Record(f"{part}:{of}", SampleError(BAD_RECORD, "an annotation of no image"))
    for number, image in enumerate(images):
        if isinstance(image, dict):
            yield Record(f"{part}:{image.get('id')}", Row(part, {**image, "caption": captions[str(image.get("id"))]}))
        else:
            yield Record(f"{part}:images[{number}]", SampleError(BAD_RECORD, "expected an object"))
