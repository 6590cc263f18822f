"""Where a source's images are: beside it, in a folder tree, in tars, or in img2dataset's output, found by name or URL.

An index of a tree or of tars holds hashes and offsets, never contents: some 60 bytes an image and, of loose files,
their paths. A reader keeps it and is sent to other processes with it.
"""

from __future__ import annotations

import glob
import hashlib
import os
import warnings
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_shards.faults import LINK, MISSING_IMAGE, TRUNCATED, UNSAFE_NAME, SampleError
from data_shards.members import is_unsafe
from data_shards.sources.reading import image_file, parse_object
from data_shards.sources.tables import TABLES, table_records
from data_shards.sources.tars import Member, read_range, tar_members
from flamingo.document import Image
from flamingo.errors import FlamingoError

_NOT_IMAGES = (".tar", ".txt", ".zip", ".gz", ".md", *TABLES)
_LOOSE = -1
"""container of a file that is in no tar: its path is `size` bytes at `offset` of `ImageStore.paths`"""
_FAULTS = (LINK, UNSAFE_NAME)
"""−1, −2 as the size of a refused member"""
_FILE_COLUMNS = ("file", "path", "image", "file_name", "filename", "image_name")


class ImageSource(Protocol):
    """Finds the images that records name."""

    def read(self, *names: str) -> Image:
        """The image of the first of several names (a path, a file name, a URL) that is known.

        Raises:
            SampleError: where there is none (`MISSING_IMAGE`), or what is there is refused or no image.
        """


@dataclass(frozen=True)
class FilesBeside:
    """Files below a folder, by their paths relative to it; no path leads out of it. Links that lie in it are followed.

    Nothing is indexed.
    """

    folder: str

    def read(self, *names: str) -> Image:
        """See `ImageSource`."""
        for name in names:
            if "://" in name:
                continue
            if is_unsafe(name):
                raise SampleError(UNSAFE_NAME, f"{name}: expected a path below {self.folder}")
            try:
                data = Path(self.folder, name).read_bytes()
            except (OSError, ValueError):  # ValueError: a name that no file can have
                continue
            return image_file(data, PurePosixPath(name).name)
        raise SampleError(MISSING_IMAGE, f"{' or '.join(names)} in {self.folder or '.'}")


@dataclass(frozen=True, eq=False)
class ImageStore:
    """An index of the images in a folder tree or in tars, made by `open_images`.

    A path relative to the tree or within a tar is found; a name without folders is found anywhere, and where several
    files have it, the first in the order of their paths is meant; a URL is found where img2dataset's output or a table
    tells its file.

    Legend: K keys, E entries (images).
    """

    root: str
    tars: tuple[str, ...]
    keys: np.ndarray = field(repr=False)
    """(K,) uint64, hashes, sorted"""
    targets: np.ndarray = field(repr=False)
    """(K,) int32, the entry of each key"""
    containers: np.ndarray = field(repr=False)
    """(E,) int32, the number of the tar, or −1"""
    offsets: np.ndarray = field(repr=False)
    """(E,) int64"""
    sizes: np.ndarray = field(repr=False)
    """(E,) int64"""
    paths: bytes = field(repr=False)

    def read(self, *names: str) -> Image:
        """See `ImageSource`."""
        for name in names:
            if "://" not in name and is_unsafe(name):
                raise SampleError(UNSAFE_NAME, f"{name}: expected a path below {self.root}")
            entry = self.find(name)
            if entry is not None:
                return image_file(self._load(entry, name), PurePosixPath(name).name)
        raise SampleError(MISSING_IMAGE, f"{' or '.join(names)} in {self.root}")

    def find(self, name: str) -> int | None:
        """The entry that a path, name or URL means."""
        for key in _keys_of(name):
            place = int(np.searchsorted(self.keys, np.uint64(key)))
            if place < len(self.keys) and int(self.keys[place]) == key:
                return int(self.targets[place])
        return None

    def _load(self, entry: int, name: str) -> bytes:
        container, offset, size = int(self.containers[entry]), int(self.offsets[entry]), int(self.sizes[entry])
        if size < 0:
            raise SampleError(_FAULTS[-1 - size], f"{name} in {self.tars[container]}")
        if container != _LOOSE:
            try:
                return read_range(self.tars[container], offset, size)
            except SampleError as error:
                raise SampleError(error.reason, f"{name}: {error.detail}") from error
        path = Path(self.root, os.fsdecode(self.paths[offset : offset + size]))
        try:
            return path.read_bytes()
        except OSError as error:
            raise SampleError(MISSING_IMAGE, f"{path}: {error.strerror}") from error


def open_images(images: str, table: str) -> ImageStore | None:
    """What a reader's options `images` and `image_table` mean; None where both are empty.

    Args:
        images: a folder tree, a tar or a glob of tars; "" for files beside the table.
        table: a table (parquet, csv, tsv, json, jsonl) of `url` and `file` (a path or a name that is found in
            `images`); "" for none. img2dataset's own tables and JSON files are found without being named.

    Raises:
        FlamingoError: where there is no such folder, tar or table, or one cannot be read.
    """
    if not images and not table:
        return None
    images = images or str(Path(table).parent)
    index = _Index(images)
    path = Path(images)
    if path.is_dir():
        index.add_tree(path)
    else:
        tars = [images] if path.is_file() else sorted(glob.glob(images, recursive=True))  # noqa: PTH207  absolute too
        if not tars:
            raise FlamingoError(f"images {images}: expected a folder, a tar file or a glob of tar files")
        for tar in tars:
            index.add_tar(tar)
    if table:
        index.add_table(table)
    return index.store()


def _hash(kind: str, name: str) -> int:
    encoded = f"{kind}:{name}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "little")


def _keys_of(name: str) -> Iterator[int]:
    """The keys under which an asked name may stand, the best first."""
    if "://" in name:
        yield _hash("url", name)
        return
    path = str(PurePosixPath(name))  # without "./" and doubled slashes
    yield _hash("path", path)
    yield _hash("name", path)


class _Index:
    """Collects entries and their keys; of equal keys the first counts."""

    def __init__(self, root: str):
        self.root = root
        self.tars: list[str] = []
        self.keys, self.targets = array("Q"), array("i")
        self.containers, self.offsets, self.sizes = array("i"), array("q"), array("q")
        self.paths = bytearray()

    def store(self) -> ImageStore:
        keys, first = np.unique(np.frombuffer(self.keys, dtype=np.uint64), return_index=True)
        return ImageStore(
            root=self.root,
            tars=tuple(self.tars),
            keys=keys,
            targets=np.frombuffer(self.targets, dtype=np.int32)[first],
            containers=np.array(self.containers, dtype=np.int32),
            offsets=np.array(self.offsets, dtype=np.int64),
            sizes=np.array(self.sizes, dtype=np.int64),
            paths=bytes(self.paths),
        )

    def add_tree(self, root: Path) -> None:
        """All images below a folder, and in the tars below it; hidden files are not taken, links to folders neither."""
        for folder, below, names in os.walk(root):
            below[:] = sorted(name for name in below if not name.startswith("."))
            stems: dict[str, int] = {}
            sidecars = []
            for name in sorted(name for name in names if not name.startswith(".")):
                path = os.path.join(folder, name)  # noqa: PTH118  there may be millions
                if name.lower().endswith(".tar"):
                    self.add_tar(path)
                elif name.lower().endswith(".json"):
                    sidecars.append((path, _stem(name)))
                elif not name.lower().endswith(_NOT_IMAGES):
                    stems.setdefault(_stem(name), self._add_loose(os.path.relpath(path, root)))
            self._add_urls(folder, stems, ((stem, Path(path).read_bytes) for path, stem in sidecars))

    def add_tar(self, path: str) -> None:
        """All images in a tar; of one that breaks off, those before."""
        number = len(self.tars)
        self.tars.append(path)
        stems: dict[str, int] = {}
        sidecars: list[Member] = []
        try:
            for member in tar_members(path):
                name = member.name.lower()
                if name.endswith(".json"):
                    sidecars.append(member)
                elif not name.endswith(_NOT_IMAGES):
                    size = -1 - _FAULTS.index(member.fault) if member.fault else member.size
                    entry = self._add(str(PurePosixPath(member.name)), number, member.offset, size)
                    stems.setdefault(_stem(member.name), entry)
        except SampleError as error:
            if error.reason != TRUNCATED:
                raise FlamingoError(f"images {error.detail}") from error
            warnings.warn(f"images {error.detail}: those before are used", stacklevel=2)
        whole = (member for member in sidecars if not member.fault)
        contents = ((_stem(each.name), partial(read_range, path, each.offset, each.size)) for each in whole)
        self._add_urls(path.removesuffix(".tar"), stems, contents)

    def add_table(self, path: str) -> None:
        """URLs, by a table that tells the path or name of each one's file.

        Raises:
            FlamingoError: where no row of it does, or one is malformed.
        """
        known, told, columns = self.store(), False, set[str]()
        try:
            for record in table_records(path, ("url", *_FILE_COLUMNS)):
                if isinstance(record.content, SampleError):
                    raise record.content
                row = record.content.mapping()
                columns |= set(row)
                url, file = row.get("url"), next((row[name] for name in _FILE_COLUMNS if row.get(name)), None)
                if isinstance(url, str) and isinstance(file, str):
                    told = True
                    entry = known.find(file)
                    if entry is not None:
                        self._key("url", url, entry)
        except SampleError as error:
            raise FlamingoError(f"{record.place}: {error}") from error
        if not told:
            raise FlamingoError(f"{path}: expected columns url and file, found {sorted(columns)}")

    def _add_urls(self, shard: str, stems: dict[str, int], sidecars: Iterable[tuple[str, Callable[[], bytes]]]) -> None:
        """img2dataset's URLs of one shard: by `{shard}.parquet`, else by the JSON beside each image."""
        if not stems:
            return
        table = f"{shard}.parquet"
        if Path(table).is_file() and {"url", "key"} <= set(_parquet_columns(table)):
            for record in table_records(table, ("url", "key")):
                if isinstance(record.content, SampleError):
                    raise FlamingoError(f"{record.place}: {record.content}")
                row = record.content.mapping()
                if row["key"] in stems and isinstance(row["url"], str):
                    self._key("url", row["url"], stems[row["key"]])
            return
        for stem, read in sidecars:
            if stem in stems:
                try:
                    url = parse_object(read()).get("url")
                except (SampleError, OSError):
                    continue  # some other JSON file; the images that it might have told are counted as missing
                if isinstance(url, str):
                    self._key("url", url, stems[stem])

    def _add_loose(self, path: str) -> int:
        encoded = os.fsencode(path)
        offset = len(self.paths)
        self.paths += encoded
        return self._add(Path(path).as_posix(), _LOOSE, offset, len(encoded))

    def _add(self, path: str, container: int, offset: int, size: int) -> int:
        """Enter an image under its path and its name."""
        entry = len(self.sizes)
        self.containers.append(container)
        self.offsets.append(offset)
        self.sizes.append(size)
        self._key("path", path, entry)
        self._key("name", path.rpartition("/")[2], entry)
        return entry

    def _key(self, kind: str, name: str, entry: int) -> None:
        self.keys.append(_hash(kind, name))
        self.targets.append(entry)


def _stem(name: str) -> str:
    """A name up to the first dot of its last component."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _parquet_columns(path: str) -> list[str]:
    try:
        return list(pq.read_schema(path).names)
    except (pa.ArrowException, OSError) as error:
        raise FlamingoError(f"{path}: expected a parquet file ({error})") from error
