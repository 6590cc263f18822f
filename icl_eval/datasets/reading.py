"""What the data sets share: entries of their files that say where they stand, and media in folders, zips and tars."""

from __future__ import annotations

import io
import json
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import ijson
import numpy as np
from PIL import Image as PilImage

from data_shards.faults import SampleError
from data_shards.members import is_unsafe
from data_shards.sources.reading import IMAGE_SUFFIXES
from data_shards.sources.tars import Member, read_range, tar_members
from flamingo.document import Image, Medium
from flamingo.errors import FlamingoError
from icl_eval.datasets import Example


class LocalDataSet:
    """What all of them do alike (`icl_eval.datasets.DataSet`); a data set's own class gives `read`.

    Attributes:
        folder: where it is.
    """

    files: ClassVar[Mapping[str, str]] = {}
    splits: ClassVar[tuple[str, ...]] = ()
    roots: ClassVar[tuple[str, ...]] = ("",)
    """folders, from the data set's own, in which its media are looked for, in this order"""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def read(self, split: str) -> Iterable[Example]:
        """The examples of one of `splits`, in the order of the published file."""
        raise NotImplementedError

    def examples(self, split: str) -> Sequence[Example]:
        """See `DataSet`; moreover the id of each is its own, since draws depend on it.

        Raises:
            FlamingoError: also where there is no such split, it is empty, or two examples have one id.
        """
        if split not in self.splits:
            raise FlamingoError(
                f"{self.folder}: split {split!r}, {type(self).__name__} has {', '.join(self.splits) or 'none'}"
            )
        examples = tuple(self.read(split))
        if not examples:
            raise FlamingoError(f"{self.folder}: no examples in split {split!r}, expected at least one")
        seen: set[str] = set()
        for example in examples:
            if example.id in seen:
                raise FlamingoError(f"{self.folder}: split {split!r} has two examples {example.id!r}, expected one")
            seen.add(example.id)
        return examples

    def candidates(self) -> tuple[str, ...]:
        """See `DataSet`."""
        return ()

    def medium(self, name: str) -> Medium:
        """See `DataSet`."""
        path = self.path(name, "an image")
        return Image(_bytes(path), name)

    def path(self, name: str, expected: str) -> Path:
        """Where a medium is, in the first of `roots` that has it.

        Raises:
            FlamingoError: it is in none of them, or the name leads out of them.
        """
        if is_unsafe(name):
            raise FlamingoError(f"{self.folder}: medium {name!r}, expected a path below this folder")
        tried = [Path(os.path.normpath(self.folder / root / name)) for root in self.roots]
        for path in tried:
            if path.exists():
                return path
        raise FlamingoError(f"{' or '.join(map(str, tried))}: no such file, expected {expected}")

    def first(self, *names: str) -> Path:
        """The first of several files or folders of the data set that is there.

        Raises:
            FlamingoError: none is; it names them all.
        """
        paths = [self.folder / name for name in names]
        for path in paths:
            if path.exists():
                return path
        raise FlamingoError(f"{' or '.join(map(str, paths))}: no such file or folder")


# -- entries -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Entry:
    """An object of a JSON file, and where it stands: "FILE: images[3]"."""

    place: str
    values: Mapping[str, Any]

    def error(self, key: str, expected: str) -> FlamingoError:
        """What to raise where a value is not as expected."""
        found = f"{self.values[key]!r:.80}" if key in self.values else "no such key"
        return FlamingoError(f"{self.place}: {key}: {found}, expected {expected}")

    def text(self, key: str, default: str | None = None) -> str:
        """A text; the default where it is missing or null."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self.error(key, "a text")
        return value

    def name(self, key: str, default: str | None = None) -> str:
        """A text, or an integer as one: ids, and answers that are numbers."""
        value = self.values.get(key)
        if type(value) is int:
            return str(value)
        return self.text(key, default)

    def number(self, key: str) -> int:
        """An integer."""
        value = self.values.get(key)
        if type(value) is not int:
            raise self.error(key, "an integer")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts or integers, or a single one of them."""
        value = self.values.get(key)
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(each, str) or type(each) is int for each in values):
            raise self.error(key, "a text or a list of texts")
        return tuple(map(str, values))

    def mapping(self, key: str) -> Entry:
        """An object within it."""
        value = self.values.get(key)
        if not isinstance(value, dict):
            raise self.error(key, "an object")
        return Entry(f"{self.place}: {key}", value)

    def entries(self, key: str) -> list[Entry]:
        """A list of objects."""
        value = self.values.get(key)
        if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
            raise self.error(key, "a list of objects")
        return [Entry(f"{self.place}: {key}[{number}]", each) for number, each in enumerate(value)]


def json_entries(path: Path, key: str = "") -> Iterator[Entry]:
    """The objects of a list in a JSON file, streamed: at the given key of the file's object, or the file itself.

    Raises:
        FlamingoError: it is no JSON file that holds such a list with at least one entry, or an entry is no object.
    """
    number = 0
    try:
        with path.open("rb") as file:
            for number, value in enumerate(ijson.items(file, f"{key}.item" if key else "item", use_float=True), 1):
                place = f"{path}: {key}[{number - 1}]"
                if not isinstance(value, dict):
                    raise FlamingoError(f"{place}: {value!r:.80}, expected an object")
                yield Entry(place, value)
    except FlamingoError:
        raise
    except (ijson.JSONError, OSError, ValueError) as error:
        raise _unreadable(path, "a JSON file", error) from error
    if not number:
        raise FlamingoError(f"{path}: nothing in {f'the list {key!r}' if key else 'it'}, expected a list of objects")


def json_lines(path: Path) -> Iterator[Entry]:
    """The objects of a file that has one a line; blank lines may stand between them.

    Raises:
        FlamingoError: it cannot be read, or a line is no object.
    """
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    value = json.loads(line)
                    if not isinstance(value, dict):
                        raise FlamingoError(f"{path}:{number}: {value!r:.80}, expected an object")
                    yield Entry(f"{path}:{number}", value)
    except FlamingoError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, "a JSON object a line", error, number) from error


def json_object(path: Path) -> Entry:
    """The object that is the whole of a JSON file.

    Raises:
        FlamingoError: it is none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, "a JSON file", error) from error
    if not isinstance(value, dict):
        raise FlamingoError(f"{path}: {value!r:.80}, expected an object")
    return Entry(str(path), value)


def _unreadable(path: Path, expected: str, error: Exception, line: int = 0) -> FlamingoError:
    if isinstance(error, FileNotFoundError):
        return FlamingoError(f"{path}: no such file, expected {expected}")
    return FlamingoError(f"{path}{f':{line}' if line else ''}: expected {expected} ({error})")


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FlamingoError(f"{path}: expected a file that can be read ({error.strerror})") from error


# -- media in trees ----------------------------------------------------------------------------------------------------


class Tree(Protocol):
    """Files by their paths, in a folder or packed."""

    def names(self) -> list[str]:
        """Paths of its images, sorted, with "/" between parts."""

    def read(self, name: str) -> bytes:
        """The bytes of one of them.

        Raises:
            FlamingoError: it is not there or cannot be read.
        """


def open_tree(path: Path) -> Tree:
    """A folder, zip or tar, by its name's ending.

    Raises:
        FlamingoError: it is none.
    """
    if path.is_dir():
        return FolderTree(path)
    return ZipTree(path) if path.suffix.lower() == ".zip" else TarTree(path)


BROKEN_ZIP = (KeyError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""what zipfile raises where a file is not in a zip, or one is cut, changed or encrypted"""


@dataclass(frozen=True)
class FolderTree:
    """The images below a folder."""

    path: Path

    def names(self) -> list[str]:
        """See `Tree`."""
        found = (
            os.path.relpath(os.path.join(place, name), self.path)  # noqa: PTH118  a million: no Path for each
            for place, _, names in os.walk(self.path, followlinks=True)
            for name in names
        )
        return sorted(name.replace(os.sep, "/") for name in found if _is_image(name))

    def read(self, name: str) -> bytes:
        """See `Tree`."""
        return _bytes(self.path / name)


@dataclass(frozen=True)
class ZipTree:
    """The images in a zip."""

    path: Path

    @cached_property
    def _file(self) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(self.path)
        except BROKEN_ZIP as error:
            raise FlamingoError(f"{self.path}: expected a zip file ({error})") from error

    def names(self) -> list[str]:
        """See `Tree`."""
        return sorted(filter(_is_image, self._file.namelist()))

    def read(self, name: str) -> bytes:
        """See `Tree`."""
        try:
            return self._file.read(name)
        except BROKEN_ZIP as error:
            raise FlamingoError(f"{self.path}/{name}: expected a whole file in this zip ({error})") from error


@dataclass(frozen=True)
class TarTree:
    """The images in an uncompressed tar, found by their offsets."""

    path: Path

    @cached_property
    def _members(self) -> dict[str, Member]:
        try:
            return {member.name.removeprefix("./"): member for member in tar_members(str(self.path))}
        except SampleError as error:
            raise FlamingoError(f"{self.path}: expected a whole, uncompressed tar file ({error})") from error

    def names(self) -> list[str]:
        """See `Tree`."""
        return sorted(filter(_is_image, self._members))

    def read(self, name: str) -> bytes:
        """See `Tree`."""
        member = self._members.get(name)
        if member is None or member.fault:
            found = "no such file" if member is None else member.fault
            raise FlamingoError(f"{self.path}/{name}: {found}, expected a file in this tar")
        try:
            return read_range(str(self.path), member.offset, member.size)
        except SampleError as error:
            raise FlamingoError(f"{self.path}/{name}: expected a whole file in this tar ({error})") from error


def _is_image(name: str) -> bool:
    stem, _, suffix = name.rpartition("/")[2].rpartition(".")
    return not stem.startswith(".") and bool(stem) and suffix.lower() in IMAGE_SUFFIXES


def png(levels: np.ndarray) -> bytes:
    """Levels uint8 (H, W) or (H, W, 3) as a PNG file."""
    buffer = io.BytesIO()
    PilImage.fromarray(levels).save(buffer, "PNG")
    return buffer.getvalue()
