"""One's own documents → documents: a folder with `documents.jsonl` and the images that it names.

One document a line; a string is a text, and images and videos stand where they are read:

    {"document": ["A cat.", {"image": "cat.jpg"}, "It sleeps.", {"video": ["1.jpg", "2.jpg"]}], "metadata": {}}

`{"text": "…", "supervised": false}` is a text whose tokens do not count in the loss. Texts that stand together are put
together as they are, without anything between them. What is not understood, a key that is misspelt or an image that is
not there, drops its document and is told with file and line: nothing of one's own documents is guessed at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_shards.account import Account
from data_shards.faults import BAD_RECORD, EMPTY, SampleError
from data_shards.sources import Record
from data_shards.sources.images import FilesBeside
from data_shards.sources.reading import Images, Row, line_records, plain, read_record
from flamingo.document import Document, Image, Segment, Text, Video
from flamingo.errors import FlamingoError

DOCUMENTS = "documents.jsonl"
_EXAMPLE = '{"document": ["a text", {"image": "cat.jpg"}, "its text"]}'


@dataclass(frozen=True)
class FolderReader:
    """A folder with `documents.jsonl`, one document a line, and its images below."""

    input: str
    """folder that holds documents.jsonl, or a .jsonl file; image names are relative to its folder"""
    name: str = "folder"
    """name of the source in its documents; losses are reported by it"""

    def parts(self) -> Sequence[str]:
        """The one file."""
        path = Path(self.input)
        path = path / DOCUMENTS if path.is_dir() else path
        if not path.is_file():
            raise FlamingoError(f"{path}: expected a file with a document a line, such as {_EXAMPLE}")
        return [str(path)]

    def records(self, part: str) -> Iterator[Record]:
        """One record a line that is not blank."""
        return line_records(part)

    def documents(self, record: Record, account: Account) -> list[Document]:
        """The document of one line; none where it is dropped."""
        return read_record(record, account, lambda row, images: [self._document(row, images)])

    def _document(self, row: Row, images: Images) -> Document:
        content = row.mapping()
        entries = content.get("document")
        entries = entries if isinstance(entries, list) else []
        images.named = sum(len(_names(entry)) for entry in entries)
        _expect_keys(content, {"document"}, {"metadata"}, "a document")
        if not isinstance(content["document"], list):
            raise SampleError(BAD_RECORD, f"expected document to be a list, such as {_EXAMPLE}")
        if not isinstance(content.get("metadata", {}), dict):
            raise SampleError(BAD_RECORD, "expected metadata to be an object")
        files = FilesBeside(str(Path(row.file).parent))
        segments = tuple(_segment(entry, number, files) for number, entry in enumerate(entries, 1))
        if all(isinstance(segment, Text) and not segment.text.strip() for segment in segments):
            raise SampleError(EMPTY, "expected at least one text or image")
        return Document(segments, source=self.name, metadata=plain(content.get("metadata", {})))


def _names(entry: Any) -> list[str]:
    """The image files that an entry names."""
    if not isinstance(entry, dict):
        return []
    video = entry.get("video")
    named = [entry.get("image"), *(video if isinstance(video, list) else [])]
    return [name for name in named if isinstance(name, str)]


def _segment(entry: Any, number: int, files: FilesBeside) -> Segment:
    where = f"entry {number} of document"
    if isinstance(entry, str):
        return Text(plain(entry))
    if not isinstance(entry, dict):
        raise SampleError(BAD_RECORD, f'{where}: expected a text, {{"image": …}} or {{"video": […]}}')
    kind = next((kind for kind in ("image", "video", "text") if kind in entry), "image")
    _expect_keys(entry, {kind}, {"supervised"} if kind == "text" else set(), where)
    if kind == "text":
        supervised = entry.get("supervised", True)
        if not isinstance(entry["text"], str) or not isinstance(supervised, bool):
            raise SampleError(BAD_RECORD, f"{where}: expected text to be a string, supervised true or false")
        return Text(plain(entry["text"]), supervised)
    if kind == "image":
        return _image(entry["image"], where, files)
    if not isinstance(entry["video"], list) or not entry["video"]:
        raise SampleError(BAD_RECORD, f"{where}: expected video to be a list of image files, its frames")
    return Video(tuple(_image(frame, where, files) for frame in entry["video"]))


def _image(name: Any, where: str, files: FilesBeside) -> Image:
    if not isinstance(name, str) or not name:
        raise SampleError(BAD_RECORD, f"{where}: expected the name of an image file, found {name!r:.80}")
    try:
        return files.read(name)
    except SampleError as error:
        raise SampleError(error.reason, f"{where}: {error.detail}") from error


def _expect_keys(content: dict[str, Any], needed: set[str], allowed: set[str], where: str) -> None:
    if not needed <= content.keys() <= needed | allowed:
        also = f" and perhaps {', '.join(sorted(allowed))}" if allowed else ""
        raise SampleError(BAD_RECORD, f"{where}: expected {', '.join(needed)}{also}, found {', '.join(content)}")
