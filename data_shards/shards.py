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
import re
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from webdataset import TarWriter

from data_shards.faults import (
    BAD_JSON,
    DUPLICATE_KEY,
    MISSING_IMAGE,
    NO_DOCUMENT,
    NOT_A_TAR,
    STALE_INDEX,
    TRUNCATED,
    UNREADABLE,
    SampleError,
)
from data_shards.members import BLOCK, check_size, is_header, is_unsafe, read_sample
from data_shards.order import SHARDS_AT_ONCE
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
        SampleError: where the JSON is missing or malformed, or an image that it names is not there.
    """
    if "json" not in members:
        raise SampleError(NO_DOCUMENT, f"expected a member {key}.json, found {', '.join(sorted(members))}")
    try:
        record = json.loads(members["json"])
    except (ValueError, RecursionError) as error:
        raise SampleError(BAD_JSON, f"{key}.json: {error}") from error
    try:
        segments = tuple(_segment(entry, key, members) for entry in record["segments"])
        return Document(segments, key, record.get("source", ""), dict(record.get("metadata", {})))
    except SampleError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise SampleError(NO_DOCUMENT, f"{key}.json is no document ({type(error).__name__}: {error})") from error


def _segment(entry: dict[str, Any], key: str, members: dict[str, bytes]) -> Segment:
    """A segment of the JSON, with the images that it names."""

    def image(name: str) -> Image:
        if name not in members:
            raise SampleError(MISSING_IMAGE, f"{key}.{name}, which the document names")
        return Image(members[name], f"{key}.{name}")

    if "text" in entry:
        if not isinstance(entry["text"], str):
            raise TypeError("a text that is no string")
        entry["text"].encode()  # half of a surrogate pair, which JSON can hold, is no text to a tokenizer
        return Text(entry["text"], bool(entry.get("supervised", True)))
    if "video" in entry:
        if not entry["video"]:
            raise ValueError("a video without frames")
        return Video(tuple(image(name) for name in entry["video"]))
    return image(entry["image"])


def _mmc4_sample(key: str, members: dict[str, bytes]) -> Document:
    from data_shards.sources.mmc4 import sample_document  # sources write shards, so they import this module

    return sample_document(key, members)


def _pairs_sample(key: str, members: dict[str, bytes]) -> Document:
    from data_shards.sources.pairs import sample_document

    return sample_document(key, members)


SAMPLE_FORMATS: dict[str, Callable[[str, dict[str, bytes]], Document]] = {
    "documents": from_sample,
    "mmc4": _mmc4_sample,
    "pairs": _pairs_sample,
}
"""How a key and its members become a document; each raises FlamingoError, which may carry a `reason`, on a bad sample.

`documents` are ours; `mmc4` are OpenFlamingo's tars, JSON with images inside; `pairs` are img2dataset's.
"""


def make_document(form: str, key: str, members: dict[str, bytes]) -> Document:
    """The document of a sample, `form` being a name of `SAMPLE_FORMATS`.

    Raises:
        SampleError: where there is none, whatever the members hold.
    """
    try:
        return SAMPLE_FORMATS[form](key, members)
    except Exception as error:
        raise SampleError.of(error, key) from error


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
        entries: of each shard its `file` name, number of `samples`, `bytes` and `sha256`; `repeated` lists the samples
            whose key an earlier one of the shard has, if there are any.
        samples: the form of a sample's members, a name of `SAMPLE_FORMATS`.
    """
    listed = sorted(entries, key=lambda entry: entry["file"])
    content = {"format": FORMAT, "samples": samples, "shards": listed}
    write_text(Path(folder) / INDEX, json.dumps(content, indent=1) + "\n")


# -- reading -----------------------------------------------------------------------------------------------------------


class Folder:
    """A folder of shards on this machine; `data_shards.remote` has one that is elsewhere.

    Args:
        name: of the folder, for messages.
    """

    def __init__(self, name: str):
        self.name = name
        self.opened = lru_cache(maxsize=SHARDS_AT_ONCE)(self.open)  # two files each, for every source of a mixture

    def __reduce__(self) -> tuple[Any, ...]:
        """Workers open their own files."""
        return type(self), (self.name,)

    def open(self, shard: Shard) -> OpenShard:
        """Open a shard's files; `opened` keeps those that were used last.

        Raises:
            SampleError: where that cannot be done; it names the file.
        """
        path = Path(self.name, shard.file)
        return OpenShard(path, offsets_path(path), shard)


class OpenShard:
    """A shard's open file, and its offsets mapped from theirs.

    Raises:
        SampleError: where the files cannot be read, or the offsets are those of another shard; it names the file.
    """

    def __init__(self, path: Path, offsets: Path, shard: Shard):
        self.path = path
        try:
            self.file = io.FileIO(path)
        except OSError as error:
            raise SampleError(UNREADABLE, f"{path}: {error.strerror}") from error
        self.offsets = load_offsets(offsets, shard)

    def read(self, start: int, size: int) -> bytes:
        """Bytes of the file; fewer where it is shorter."""
        try:
            # pread keeps no position, so that threads and forked workers may share the file
            return os.pread(self.file.fileno(), size, start)
        except OSError as error:
            raise SampleError(UNREADABLE, f"{self.path}: {error.strerror}") from error


@dataclass(frozen=True)
class Shard:
    """One tar file of an indexed folder.

    Attributes:
        folder: where it is.
        file: its name there.
        samples, size, sha256: what the index says of it; the size in bytes.
        form: of its samples, a name of `SAMPLE_FORMATS`.
        repeated: samples whose key an earlier sample of the shard has, which only who indexes it can see.
    """

    folder: Folder
    file: str
    samples: int
    size: int
    sha256: str
    form: str = "documents"
    repeated: frozenset[int] = frozenset()

    @property
    def place(self) -> str:
        """Where it is, for messages."""
        return f"{self.folder.name}/{self.file}"

    @property
    def offsets(self) -> np.ndarray:
        """(samples + 1,) int64: where each sample begins, and where the last one ends."""
        return self.folder.opened(self).offsets

    def read(self, index: int) -> Document:
        """The document of sample `index`.

        Raises:
            SampleError: where the bytes there cannot be read or are no sample; it says where and why.
            FlamingoError: where a shard that is elsewhere cannot be brought here.
        """
        key = f"#{index}"
        try:
            key, members = read_sample(self._bytes(index))
            if index in self.repeated:
                raise SampleError(DUPLICATE_KEY, "an earlier sample of the shard has it")
            return make_document(self.form, key, members)
        except SampleError as error:
            raise SampleError.of(error, key, self.place) from error

    def _bytes(self, index: int) -> bytes:
        """The bytes of a sample, headers included."""
        opened = self.folder.opened(self)
        start, end = (int(offset) for offset in opened.offsets[index : index + 2])
        check_size(end - start)
        data = opened.read(start, end - start)
        if len(data) == end - start:
            return data
        if not is_header(opened.read(0, BLOCK)):
            raise SampleError(NOT_A_TAR, "no header at its beginning")
        raise SampleError(TRUNCATED, f"expected {self.size} bytes, as {INDEX} says")


def load_offsets(path: Path, shard: Shard) -> np.ndarray:
    """Map a shard's offsets from a file.

    Raises:
        SampleError: where the file does not fit the shard; it names it.
    """
    try:
        offsets = np.load(path, mmap_mode="r")
        fits = offsets.shape == (shard.samples + 1,) and offsets.dtype == np.int64
        if not fits or offsets[0] < 0 or offsets[-1] > shard.size or (offsets[1:] < offsets[:-1]).any():
            raise ValueError("others")
    except (OSError, ValueError, EOFError) as error:
        detail = f"{path}: expected {shard.samples + 1} rising offsets within {shard.file}"
        raise SampleError(UNREADABLE if isinstance(error, OSError) else STALE_INDEX, detail) from error
    return offsets


class ShardSet:
    """The documents of a folder of shards, by number, in the order in which they were written."""

    def __init__(self, folder: str, shards: list[Shard]):
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
        lines = "".join(f"{shard.file} {shard.sha256} {shard.form}\n" for shard in self.shards)
        return hashlib.sha256(lines.encode()).hexdigest()


def open_shards(folder: str | Path, *, cache: str | Path | None = None, cache_bytes: int = 64 << 30) -> ShardSet:
    """Open an indexed folder of shards: on this machine, or anything that fsspec opens (`https://…`, `s3://…`).

    The index and the files that it lists have to be there; what is in them is seen when samples are read.

    Args:
        folder: path or URL.
        cache: folder on this machine to which remote shards are brought when they are read; needed for a URL alone.
        cache_bytes: how much of it they may fill (see `data_shards.remote`).

    Raises:
        FlamingoError: where the folder, its index, or a shard is missing; it names it.
    """
    if "://" in str(folder):
        from data_shards.remote import open_remote  # fsspec, for those who need it

        if cache is None:
            raise FlamingoError(f"{folder}: expected a cache, a folder for shards that are brought here")
        return open_remote(str(folder), Path(cache), cache_bytes)
    folder = Path(folder)
    if not folder.is_dir():
        raise FlamingoError(f"{folder}: there is no such folder of shards")
    if not (folder / INDEX).is_file():
        for path in sorted(folder.glob("*.tar")):
            if not tarfile.is_tarfile(path):
                raise FlamingoError(f"{path}: expected a tar file")
        raise FlamingoError(f"{folder}: expected an {INDEX}; its shards were not written to the end")
    opened = read_index((folder / INDEX).read_bytes(), Folder(str(folder)))
    for shard in opened.shards:
        path = folder / shard.file
        if not path.is_file():
            raise FlamingoError(f"{path}: the shard is missing")
        if not offsets_path(path).is_file():
            raise FlamingoError(f"{path}: expected its offsets beside it, {offsets_path(path).name}")
    return opened


def read_index(content: bytes, folder: Folder) -> ShardSet:
    """The shards that an `index.json` lists.

    Raises:
        FlamingoError: where it is none, is of a later format, or lists no document.
    """
    where = f"{folder.name}/{INDEX}"
    try:
        index = json.loads(content)
        version, form = index.get("format", 1), index.get("samples", "documents")
        if version > FORMAT or form not in SAMPLE_FORMATS:
            raise FlamingoError(
                f"{where}: format {version} with samples of form {form!r}: expected at most format {FORMAT}, and "
                f"{', '.join(SAMPLE_FORMATS)}"
            )
        shards = [_listed(entry, folder, form) for entry in index["shards"]]
    except FlamingoError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FlamingoError(f"{where}: expected a list `shards` of file, samples, bytes, sha256") from error
    if len({shard.file for shard in shards}) < len(shards):
        raise FlamingoError(f"{where}: expected each shard once")
    if not sum(shard.samples for shard in shards):
        raise FlamingoError(f"{folder.name}: expected at least one document")
    return ShardSet(folder.name, shards)


def _listed(entry: dict[str, Any], folder: Folder, form: str) -> Shard:
    """A shard as the index lists it."""
    file, digest, samples, size = entry["file"], entry["sha256"], entry["samples"], entry["bytes"]
    counts = isinstance(samples, int) and isinstance(size, int) and samples >= 0
    if is_unsafe(file) or not re.fullmatch(r"[0-9a-f]{64}", digest) or not counts:
        raise ValueError(file)
    return Shard(folder, file, samples, size, digest, form, frozenset(entry.get("repeated", ())))
