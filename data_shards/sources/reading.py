"""What all readers share: finding files, records that add up, text, base64 and image files that may be broken."""

from __future__ import annotations

import base64
import binascii
import glob
import gzip
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from PIL import Image as PilImage

from data_shards.account import Account
from data_shards.faults import BAD_BASE64, BAD_JSON, BAD_RECORD, EMPTY, NO_IMAGE, NO_IMAGES, TRUNCATED, SampleError
from data_shards.sources import Record
from flamingo.document import Document, Image, Segment, Text
from flamingo.errors import FlamingoError
from flamingo.images import FORMATS, ImageError, Limits

LINES = (".jsonl", ".jsonl.gz", ".zip")
"""endings of files that hold a record a line"""


# -- finding -----------------------------------------------------------------------------------------------------------


def find_files(source: str, *groups: tuple[str, ...]) -> list[str]:
    """The files of a file, folder (anywhere below it; hidden ones are not taken) or glob, sorted.

    Args:
        source: of one of the three.
        groups: endings; those of a later group count only where nothing has one of an earlier group, so that images
            in tars may stand beside what names them.

    Raises:
        FlamingoError: where there are none.
    """
    path, endings = Path(source), tuple(ending for group in groups for ending in group)
    found: Iterable[Path] = [path]
    if source and path.is_dir():
        found = (file for file in path.rglob("*") if not _is_hidden(file.relative_to(path)))
    elif not path.is_file():
        found = map(Path, glob.glob(source, recursive=True))  # noqa: PTH207  of any root
    files = sorted(str(file) for file in found if file.name.lower().endswith(endings) and file.is_file())
    for group in groups:
        if chosen := [file for file in files if file.lower().endswith(group)]:
            return chosen
    raise FlamingoError(f"{source or 'input'}: expected a file, folder or glob of {', '.join(endings)}")


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


# -- records -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """The content of a record that is a line or a row: the file that it is in, and its JSON or its columns."""

    file: str
    value: bytes | dict[str, Any] = field(repr=False)

    def mapping(self) -> dict[str, Any]:
        """Its columns.

        Raises:
            SampleError: where it is no JSON object.
        """
        return self.value if isinstance(self.value, dict) else parse_object(self.value)


def parse_object(data: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        SampleError: where the bytes are none.
    """
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise SampleError(BAD_JSON, str(error)) from error
    if not isinstance(value, dict):
        raise SampleError(BAD_RECORD, f"expected a JSON object, found {type(value).__name__}")
    return value


def line_records(part: str) -> Iterator[Record]:
    """A record for each line that is not blank, of a .jsonl, .jsonl.gz or .zip of .jsonl; it is streamed.

    Where the file breaks off, the last record says so.

    Raises:
        FlamingoError: where not even the first line can be read; it names the file.
    """
    for place, opened in _streams(part):
        number = 0
        try:
            with opened() as file, io.BufferedReader(cast(io.RawIOBase, file)) as stream:
                for number, line in enumerate(stream, 1):
                    if line.strip():
                        yield Record(f"{place}:{number}", Row(part, line))
        except _BROKEN as error:
            if not number:
                raise FlamingoError(f"{place}: expected JSON lines ({error})") from error
            yield Record(f"{place}:{number + 1}", SampleError(TRUNCATED, str(error)))


_BROKEN = (OSError, EOFError, zlib.error, zipfile.BadZipFile, RuntimeError)
"""what gzip and zipfile raise on files that are cut, changed or encrypted"""


def _streams(part: str) -> Iterator[tuple[str, Callable[[], IO[bytes]]]]:
    """The names of a file's streams of lines, and what opens each."""
    if part.lower().endswith(".zip"):
        try:
            archive = zipfile.ZipFile(part)
        except _BROKEN as error:
            raise FlamingoError(f"{part}: expected a zip file ({error})") from error
        with archive:
            for member in archive.infolist():
                if member.filename.lower().endswith(".jsonl"):
                    yield f"{part}/{member.filename}", partial(archive.open, member)
    else:
        opening = cast(Callable[..., IO[bytes]], gzip.open if part.lower().endswith(".gz") else open)
        yield part, partial(opening, part, "rb")


@dataclass
class Images:
    """The images of one record, and its turns where it has such: how many it names, where and why some were lost."""

    named: int = 0
    lost: list[tuple[str, str]] = field(default_factory=list)
    turns: int = 0
    left_out: list[tuple[str, str]] = field(default_factory=list)

    def lose(self, reason: str, detail: str) -> None:
        """One image is not used."""
        self.lost.append((detail, reason))

    def leave_out(self, reason: str, detail: str) -> None:
        """One turn is not used."""
        self.left_out.append((detail, reason))

    @property
    def left(self) -> int:
        """Images that are not lost."""
        return self.named - len(self.lost)


def read_record(record: Record, account: Account, read: Callable[[Any, Images], Iterable[Document]]) -> list[Document]:
    """The documents that `read` makes of a record's content, entered into the account; none where it raises.

    `read` tells the images that the record names, and those that it loses, before it raises.
    """
    images = Images()
    dropped = None
    documents: list[Document] = []
    try:
        if isinstance(record.content, SampleError):
            raise record.content
        documents = list(read(record.content, images))
    except SampleError as error:
        dropped = error
    except RecursionError as error:
        dropped = SampleError(BAD_RECORD, f"nested too deeply ({error})")
    for detail, reason in images.lost:
        account.drop_image(f"{record.place}: {detail}", reason)
    for detail, reason in images.left_out:
        account.drop_turn(f"{record.place}: {detail}", reason)
    turns = images.turns - len(images.left_out)
    if dropped is None:
        account.keep(images.left, turns)
        return documents
    place = f"{record.place}: {dropped.detail}" if dropped.detail else record.place
    account.drop(place, dropped.reason, images.left, turns)
    return []


# -- text --------------------------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """Data of a source as JSON can hold it; halves of surrogate pairs, which are no text, become U+FFFD."""
    if isinstance(value, str):
        try:
            value.encode()
            return value
        except UnicodeEncodeError:
            return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {plain(str(name)): plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)


def interleave(parts: Iterable[str | Image], joint: str) -> tuple[Segment, ...]:
    """Segments of texts and images in their order; texts that stand together are joined, empty ones left out."""
    segments: list[Segment] = []
    run: list[str] = []
    for part in parts:
        if isinstance(part, str):
            run += [plain(part)] if part else []
            continue
        segments += [Text(joint.join(run))] if run else []
        segments.append(part)
        run = []
    return (*segments, Text(joint.join(run))) if run else tuple(segments)


def checked_segments(parts: Iterable[str | Image], joint: str, *, keep_text_only: bool) -> tuple[Segment, ...]:
    """`interleave`, where something remains.

    Raises:
        SampleError: where there is no image and text alone is not wanted, or nothing at all.
    """
    segments = interleave(parts, joint)
    if not any(isinstance(segment, Image) for segment in segments):
        if not keep_text_only:
            raise SampleError(NO_IMAGES)
        if not any(isinstance(segment, Text) and segment.text.strip() for segment in segments):
            raise SampleError(EMPTY)
    return segments


# -- images ------------------------------------------------------------------------------------------------------------

IMAGE_SUFFIXES = frozenset("jpg jpeg jpe png webp gif bmp tif tiff avif heic jp2 ppm ico".split())
"""endings of image files, without the dot"""
_SUFFIXES = {"JPEG": "jpg", "JPEG2000": "jp2", "TIFF": "tif"}


def decode_base64(text: Any) -> bytes:
    """Bytes of standard or url-safe base64, with or without padding, line breaks and a `data:` head.

    Raises:
        SampleError: where it is none.
    """
    if not isinstance(text, str):
        raise SampleError(BAD_BASE64, f"expected a string, found {type(text).__name__}")
    body = text.partition(",")[2] if text.startswith("data:") else text
    body = "".join(body.split()).rstrip("=").replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(body + "=" * (-len(body) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise SampleError(BAD_BASE64, str(error)) from error


class Header(NamedTuple):
    """What an image file says of itself: Pillow's name of its format, and its size in pixels, as stored."""

    format: str
    width: int
    height: int


def image_header(data: bytes) -> Header | None:
    """What an image file's first bytes say, without decoding; None where they do not begin as an image does."""
    PilImage.init()
    for kind in FORMATS:
        open_it, accepts = PilImage.OPEN.get(kind, (None, None))
        if open_it is None or accepts is None or accepts(data[:16]) is not True:
            continue
        try:  # Not PIL.Image.open, which refuses large sizes: they are what is asked for.
            with open_it(io.BytesIO(data), "") as picture:
                return Header(kind, *picture.size)
        except Exception:  # noqa: BLE001  Pillow's plugins raise many kinds
            return None
    return None


def image_file(data: bytes, name: str) -> Image:
    """An image of encoded bytes whose header says that they are one; its name gets a suffix where it has none.

    Pixels are not decoded: downloads that are HTML, empty or too large for the processor are found, broken pixels are
    not.

    Raises:
        SampleError: where they are no image that the processor reads, or one beyond its limits.
    """
    limits, header = Limits(), image_header(data)
    if header is None:
        raise SampleError(NO_IMAGE, f"{name}: {len(data)} bytes that begin with {data[:16]!r}")
    try:
        limits.check_bytes(data, name)
        limits.check_pixels(header.width, header.height, name)
    except ImageError as error:
        raise SampleError(error.reason, error.detail) from error
    if Path(name).suffix.lower()[1:] not in IMAGE_SUFFIXES:
        name = f"{name}.{_SUFFIXES.get(header.format, header.format.lower())}"
    return Image(data, plain(name))
