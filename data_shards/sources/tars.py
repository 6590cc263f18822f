"""Members and samples of tar files, by offset: contents are read when they are wanted."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace

from data_shards.faults import DUPLICATE_KEY, LINK, NOT_A_TAR, TRUNCATED, UNSAFE_NAME, SampleError
from data_shards.members import is_unsafe, split_name
from data_shards.sources import Record
from flamingo.errors import FlamingoError

NOT_A_FILE = "not a regular file"


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
        SampleError: where it is no tar, or, after its whole members, where it breaks off.
    """
    try:
        tar = tarfile.open(path, "r:")  # noqa: SIM115
    except (tarfile.TarError, OSError) as error:
        raise SampleError(NOT_A_TAR, f"{path}: expected an uncompressed tar file ({error})") from error
    with tar:
        try:
            while (info := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # or they pile up
                if not info.isdir():
                    yield Member(info.name, info.offset_data, info.size, _fault(info))
            # On a damaged header tarfile stops as at the end, where it finds zeros or nothing.
            assert tar.fileobj is not None
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError("damaged header")
        except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
            raise SampleError(TRUNCATED, f"{path}: {error}") from error


def _fault(info: tarfile.TarInfo) -> str:
    if info.issym() or info.islnk():
        return LINK
    if is_unsafe(info.name):
        return UNSAFE_NAME
    return "" if info.isreg() and not info.issparse() else NOT_A_FILE


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
        raise SampleError(TRUNCATED, str(error)) from error
    if len(data) != size:
        raise SampleError(TRUNCATED, f"{path}: expected {size} bytes at {offset}, found {len(data)}")
    return data


@dataclass(frozen=True)
class TarSample:
    """Members of one key; their names are what stands behind it."""

    path: str
    key: str
    members: tuple[Member, ...]

    def read(self) -> dict[str, bytes]:
        """Name → content.

        Raises:
            SampleError: where a member is refused, or two have one name.
        """
        for member in self.members:
            if member.fault:
                raise SampleError(member.fault, f"{self.key}.{member.name}")
        if len({member.name for member in self.members}) < len(self.members):
            raise SampleError(DUPLICATE_KEY, f"{self.key}: two members of one name")
        return {member.name: read_range(self.path, member.offset, member.size) for member in self.members}


def sample_records(part: str) -> Iterator[Record]:
    """A record for each run of members of one key (WebDataset's rule: up to the first dot of the last path component).

    Where the tar breaks off, the last record says so in place of the sample that was being read.

    Raises:
        FlamingoError: where the file is no tar.
    """
    key, members = "", list[Member]()
    try:
        for member in tar_members(part):
            split = split_name(member.name)
            if split is None:
                continue  # of no sample
            if members and split[0] != key:
                yield Record(f"{part}:{key}", TarSample(part, key, tuple(members)))
                members = []
            key = split[0]
            members.append(replace(member, name=split[1]))
        if members:
            yield Record(f"{part}:{key}", TarSample(part, key, tuple(members)))
    except SampleError as error:
        if error.reason == NOT_A_TAR:
            raise FlamingoError(error.detail) from error
        yield Record(f"{part}:{key}", error)
