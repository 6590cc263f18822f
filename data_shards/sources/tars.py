"""Files and samples in tars, by offset: contents are read when they are wanted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_shards.faults import NOT_A_TAR, TRAILING, TRUNCATED, UNREADABLE, SampleError
from data_shards.indexing import Headers, Span, refusals, scan
from data_shards.sources import Record
from flamingo.errors import FlamingoError


@dataclass(frozen=True)
class Member:
    """A file in a tar: `size` bytes at `offset`, or why it is refused."""

    name: str
    offset: int
    size: int
    fault: str = ""


def tar_members(path: str) -> Iterator[Member]:
    """The members of an uncompressed tar in their order; folders are left out, links and unsafe names have a fault.

    Raises:
        SampleError: where it is no tar or cannot be read, or, after its whole members, where it breaks off.
    """
    try:
        with Path(path).open("rb") as file:
            headers = Headers(file)
            for header in headers:
                headers.check_data(header)
                if not header.isdir():
                    yield Member(header.name, header.offset_data, header.size, next(iter(refusals(header)), ""))
    except OSError as error:
        raise SampleError(UNREADABLE, f"{path}: {error.strerror}") from error
    except SampleError as error:
        raise SampleError(error.reason, f"{path}: {error.detail}") from error


def read_range(path: str, offset: int, size: int) -> bytes:
    """So many bytes of a file.

    Raises:
        SampleError: where there are fewer.
    """
    try:
        with open(path, "rb") as file:  # noqa: PTH123  many are opened: no Path for each
            file.seek(offset)
            data = file.read(size)
    except OSError as error:
        raise SampleError(UNREADABLE, f"{path}: {error.strerror}") from error
    if len(data) != size:
        raise SampleError(TRUNCATED, f"{path}: expected {size} bytes at {offset}, found {len(data)}")
    return data


@dataclass(frozen=True)
class TarSample:
    """A sample of a tar."""

    path: str
    span: Span

    def read(self) -> dict[str, bytes]:
        """Its members' bytes by suffix.

        Raises:
            SampleError: where a member is refused, two have one name, or they cannot be read.
        """
        try:
            with open(self.path, "rb") as file:  # noqa: PTH123
                return self.span.read(file)
        except OSError as error:
            raise SampleError(UNREADABLE, f"{self.path}: {error.strerror}") from error


def sample_records(part: str) -> Iterator[Record]:
    """A record for each sample of a tar, and one that says so where it breaks off, or where something stands behind it.

    A sample that was being read where it breaks off is not among the others.

    Raises:
        FlamingoError: where the file is no tar, or cannot be read.
    """
    try:
        contents = scan(Path(part))
    except OSError as error:
        raise FlamingoError(f"{part}: expected a file that can be read ({error.strerror})") from error
    lost = [fault for fault in contents.faults if fault.reason in (NOT_A_TAR, TRUNCATED, TRAILING)]
    for fault in lost:
        if fault.reason == NOT_A_TAR:
            raise FlamingoError(f"{part}: expected a tar file ({fault.detail})")
    for span in contents.spans:
        yield Record(f"{part}:{span.key}", TarSample(part, span))
    for fault in lost:
        yield Record(f"{part}:{fault.key}", SampleError(fault.reason, fault.detail))
