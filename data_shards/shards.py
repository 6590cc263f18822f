"""Tar shards of documents, in WebDataset's format, with an index of byte offsets beside them.

A sample is `{key}.json`, the document, and its media as raw files `{key}.0.png`, `{key}.1.jpg`, …. The index makes
every sample readable alone: `index.json` lists the shards with their sizes and checksums, `{shard}.offsets.npy` holds
where each sample begins and where the last one ends (8 bytes a sample).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from webdataset import TarWriter

from flamingo.document import Document, Image, Segment, Text, Video
from flamingo.errors import FlamingoError
from flamingo.files import sha256, write_text

INDEX = "index.json"
FORMAT = 2
"""of `index.json`; 1 had no `samples`"""


# -- documents as members ----------------------------------------------------------------------------------------------


def to_sample(document: Document) -> dict[str, Any]:
    """A document as a WebDataset sample: `__key__`, `json`, and one member for each image."""
    if not document.key or "." in document.key or "/" in document.key:
        raise FlamingoError(f"document key {document.key!r}: expected a name without dots and slashes")
    members: dict[str, Any] = {}

    def member(image: Image) -> str:
        name = f"{len(members)}{Path(image.name).suffix.lower() or '.bin'}"
        members[name] = image.data
        return name

    segments: list[dict[str, Any]] = []
    for segment in document.segments:
        if isinstance(segment, Text):
            segments.append({"text": segment.text} | ({} if segment.supervised else {"supervised": False}))
        elif isinstance(segment, Video):
            segments.append({"video": [member(frame) for frame in segment.frames]})
        else:
            segments.append({"image": member(segment)})
    record = {"segments": segments, "source": document.source, "metadata": document.metadata}
    return {"__key__": document.key, "json": json.dumps(record, ensure_ascii=False).encode(), **members}


def from_sample(key: str, members: dict[str, bytes]) -> Document:
    """The document of the members `{name after the key: bytes}`; the inverse of `to_sample`.

    Raises:
        FlamingoError: where the JSON is missing or malformed, or an image that it names is not there.
    """

    def image(name: str) -> Image:
        if name not in members:
            raise FlamingoError(f"sample {key}: the image {key}.{name} that its document names is missing")
        return Image(members[name], f"{key}.{name}")

    if "json" not in members:
        raise FlamingoError(f"sample {key}: expected a member {key}.json")
    try:
        record = json.loads(members["json"])
        listed = record["segments"]
        segments: list[Segment] = []
        for entry in listed:
            if "text" in entry:
                segments.append(Text(entry["text"], entry.get("supervised", True)))
            elif "video" in entry:
                segments.append(Video(tuple(image(name) for name in entry["video"])))
            else:
                segments.append(image(entry["image"]))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise FlamingoError(f"sample {key}: {key}.json is no document ({type(error).__name__}: {error})") from error
    return Document(tuple(segments), key, record.get("source", ""), record.get("metadata", {}))


# -- writing -----------------------------------------------------------------------------------------------------------


@dataclass
class ShardAccount:
    """What was written."""

    shards: int = 0
    documents: int = 0
    media: int = 0
    bytes: int = 0


def write_shards(
    documents: Iterable[Document],
    folder: str | Path,
    *,
    prefix: str = "shard",
    max_samples: int = 2000,
    max_bytes: int = 256 << 20,
) -> ShardAccount:
    """Write documents as `{folder}/{prefix}-00000.tar`, …, and the folder's index of them.

    A shard is bounded by samples and by bytes. It gets its name only when it is whole, and the index is written
    last: a folder without one is not finished.

    Raises:
        FlamingoError: on a key with dots or slashes, or one that occurs twice in a shard.
    """
    shards = ShardWriter(folder, prefix, max_samples, max_bytes)
    try:
        for document in documents:
            shards.write(document)
        shards.close()
    except BaseException:
        shards.abandon()
        raise
    write_index(folder, shards.entries)
    return shards.account


class ShardWriter:
    """Writes one prefix's shards; `entries` describe the finished ones for `write_index`."""

    def __init__(self, folder: str | Path, prefix: str, max_samples: int = 2000, max_bytes: int = 256 << 20):
        self.folder, self.prefix = Path(folder), prefix
        self.max_samples, self.max_bytes = max_samples, max_bytes
        self.account = ShardAccount()
        self.entries: list[dict[str, Any]] = []
        self._tar: TarWriter | None = None
        self._offsets: list[int] = []
        self._keys: set[str] = set()
        self.folder.mkdir(parents=True, exist_ok=True)

    def write(self, document: Document) -> None:
        """Append one document, beginning a new shard where it would not fit."""
        sample = to_sample(document)
        size = sum(len(value) for name, value in sample.items() if name != "__key__")
        if self._tar and (len(self._keys) >= self.max_samples or self._offset() + size > self.max_bytes):
            self.close()
        if self._tar is None:
            # No times, owners or modes of this machine: the same documents give the same bytes.
            self._tar = TarWriter(str(self._unfinished), encoder=False, mtime=0, user="", group="")
        if document.key in self._keys:
            raise FlamingoError(f"document key {document.key!r} occurs twice in {self._name}")
        self._keys.add(document.key)
        self._offsets.append(self._offset())
        self._tar.write(sample)
        self.account.documents += 1
        self.account.media += len(sample) - 2

    def close(self) -> None:
        """Finish the shard that is open, if one is."""
        if self._tar is None:
            return
        self._offsets.append(self._offset())
        self._tar.close()
        path = self.folder / self._name
        os.replace(self._unfinished, path)
        np.save(offsets_path(path), np.asarray(self._offsets, dtype=np.int64))
        size = path.stat().st_size
        self.entries.append({"file": path.name, "samples": len(self._keys), "bytes": size, "sha256": sha256(path)})
        self.account.shards += 1
        self.account.bytes += size
        self._tar, self._offsets, self._keys = None, [], set()

    def abandon(self) -> None:
        """Throw the open shard away; finished ones stay, without an index."""
        if self._tar is not None:
            self._tar.close()
            self._unfinished.unlink()
            self._tar = None

    @property
    def _name(self) -> str:
        return f"{self.prefix}-{len(self.entries):05d}.tar"

    @property
    def _unfinished(self) -> Path:
        return self.folder / f".{self._name}.unfinished"

    def _offset(self) -> int:
        assert self._tar is not None
        return self._tar.tarstream.offset


def offsets_path(shard: Path) -> Path:
    """Where a shard's offsets are."""
    return shard.with_suffix(".offsets.npy")


def write_index(folder: str | Path, entries: Iterable[dict[str, Any]], *, samples: str = "documents") -> None:
    """Write `index.json` of finished shards, in the order of their names.

    Args:
        folder: of the shards.
        entries: of each shard its `file` name, number of `samples`, `bytes` and `sha256`.
        samples: the form of a sample's members, `documents`, `mmc4` or `pairs`.
    """
    listed = sorted(entries, key=lambda entry: entry["file"])
    content = {"format": FORMAT, "samples": samples, "shards": listed}
    write_text(Path(folder) / INDEX, json.dumps(content, indent=1) + "\n")


# -- reading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """One tar file of an indexed folder."""

    path: Path
    samples: int
    bytes: int
    sha256: str

    @cached_property
    def offsets(self) -> np.ndarray:
        """(samples + 1,) int64, mapped from the file."""
        return np.load(offsets_path(self.path), mmap_mode="r")

    @cached_property
    def _file(self) -> io.FileIO:
        return io.FileIO(self.path)

    def __getstate__(self) -> dict[str, Any]:
        """Without the open file, for workers."""
        return {name: value for name, value in vars(self).items() if name not in ("_file", "offsets")}

    def read(self, index: int) -> Document:
        """The document of sample `index`.

        Raises:
            FlamingoError: where the bytes there are no sample; it names the shard.
        """
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
        # pread keeps no position, so that threads and forked workers may share the file
        data = os.pread(self._file.fileno(), end - start, start)
        try:
            members = dict(_members(data))
        except (tarfile.TarError, ValueError) as error:
            raise FlamingoError(f"{self.path}: sample {index} is no part of a tar file ({error})") from error
        keys = {name.partition(".")[0] for name in members}
        if len(keys) != 1:
            raise FlamingoError(f"{self.path}: sample {index} holds {sorted(keys)}: expected one key")
        key = keys.pop()
        try:
            return from_sample(key, {name[len(key) + 1 :]: content for name, content in members.items()})
        except FlamingoError as error:
            raise FlamingoError(f"{self.path}: {error}") from error


def _members(data: bytes) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for member in tar:
            if member.isfile():
                start = member.offset_data
                yield member.name, data[start : start + member.size]


class ShardSet:
    """The documents of a folder of shards, by number, in the order in which they were written."""

    def __init__(self, folder: Path, shards: list[Shard]):
        self.folder, self.shards = folder, shards
        self._starts = np.cumsum([0, *(shard.samples for shard in shards)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, number: int) -> Document:
        if not 0 <= number < len(self):
            raise IndexError(number)
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self.shards[shard].read(number - int(self._starts[shard]))

    @property
    def sizes(self) -> list[int]:
        """Number of samples of each shard."""
        return [shard.samples for shard in self.shards]

    @cached_property
    def sha256(self) -> str:
        """One hash of what the index says, for resuming."""
        lines = "".join(f"{shard.path.name} {shard.sha256}\n" for shard in self.shards)
        return hashlib.sha256(lines.encode()).hexdigest()


def open_shards(folder: str | Path) -> ShardSet:
    """Open an indexed folder of shards; every shard is there, is a tar file, and has its indexed size.

    Raises:
        FlamingoError: otherwise; it names the folder or the shard.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FlamingoError(f"{folder}: there is no such folder of shards")
    if not (folder / INDEX).is_file():
        for path in sorted(folder.glob("*.tar")):
            _check_tar(path)
        raise FlamingoError(f"{folder}: expected an {INDEX}; its shards were not written to the end")
    try:
        index = json.loads((folder / INDEX).read_text())
        entries = [(entry["file"], entry["samples"], entry["bytes"], entry["sha256"]) for entry in index["shards"]]
    except (ValueError, KeyError, TypeError) as error:
        raise FlamingoError(f"{folder / INDEX}: expected a list `shards` of file, samples, bytes, sha256") from error
    shards = []
    for file, samples, size, digest in entries:
        path = folder / file
        _check_tar(path)
        if path.stat().st_size != size or not offsets_path(path).is_file():
            raise FlamingoError(f"{path}: expected {size} bytes and {offsets_path(path).name}, as {INDEX} says")
        shards.append(Shard(path, samples, size, digest))
    if not sum(shard.samples for shard in shards):
        raise FlamingoError(f"{folder}: expected at least one document")
    return ShardSet(folder, shards)


def _check_tar(path: Path) -> None:
    if not path.is_file():
        raise FlamingoError(f"{path}: the shard is missing")
    if not tarfile.is_tarfile(path):
        raise FlamingoError(f"{path}: expected a tar file")
