"""What is in a tar of samples: where each begins and ends, and what is wrong with its members' names and kinds.

A tar is walked header by header, so that image bytes are skipped, not read. Members become samples by WebDataset's
rule: neighbours with one key, the key being the name up to the first dot of its last part, directories included.
Links belong to the sample of their name, so that reading it finds them; WebDataset passes over them in silence.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from data_shards.faults import (
    APART,
    DUPLICATE_KEY,
    LINK,
    NOT_A_TAR,
    TRAILING,
    TRUNCATED,
    UNREADABLE,
    UNSAFE_NAME,
    Fault,
    SampleError,
)
from data_shards.members import BLOCK, check_size, is_header, is_unsafe, read_sample, split_name
from data_shards.report import Report
from data_shards.shards import offsets_path, write_index
from flamingo.errors import FlamingoError
from flamingo.files import sha256, whole

SamplesForm = Literal["documents", "mmc4", "pairs"]

NAMES = ("utf-8", "surrogateescape")
"""encoding of names, and what becomes of bytes that are none"""
EXTENSIONS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
LARGEST_EXTENSION = 1 << 20
"""bytes of a header that only extends the next one (long names): a larger one is taken for damage, not read"""
NAMED = 8
"""members or places that a fault's detail names at the most"""
DETECTED = 20
"""samples that are read to tell the form of a set"""


# -- one tar -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Span:
    """One sample: the bytes `start … end` of the tar, headers included. `faulty`: its members alone condemn it."""

    key: str
    start: int
    end: int
    suffixes: list[str] = field(default_factory=list)
    faulty: bool = False

    def read(self, file: BinaryIO) -> dict[str, bytes]:
        """Its members' bytes by suffix.

        Raises:
            SampleError: where they cannot be read, are too many to be held in memory, or not members of one sample.
        """
        size = self.end - self.start
        check_size(size)
        try:
            data = os.pread(file.fileno(), size, self.start)
        except OSError as error:
            raise SampleError(UNREADABLE, str(error.strerror)) from error
        return read_sample(data)[1]


@dataclass
class Contents:
    """What one tar holds: its samples in order, every fault that its headers show, and files that are no samples.

    `repeated` are the samples whose key an earlier one has, which nobody sees who reads them alone.
    """

    shard: str
    spans: list[Span] = field(default_factory=list)
    repeated: list[int] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    other_members: int = 0

    @property
    def offsets(self) -> np.ndarray:
        """(samples + 1,) int64: where each sample begins, and where the last one ends."""
        ends = [self.spans[-1].end if self.spans else 0]
        return np.array([*(span.start for span in self.spans), *ends], dtype=np.int64)

    def add(self, start: int, header: tarfile.TarInfo, end: int) -> None:
        """Put the next member, which lies at `start … end`, to its sample."""
        split = split_name(header.name)
        key = split[0] if split else ""
        reasons = refusals(header)
        if header.isdir() or split is None:
            self.faults += [Fault(self.shard, key, *reason) for reason in reasons.items()]
            self.other_members += not header.isdir()
            return
        if not self.spans or self.spans[-1].key != key:
            self.spans.append(Span(key, start, end))
        span = self.spans[-1]
        span.suffixes.append(split[1])
        span.end = end
        if reasons and not span.faulty:  # one member tells enough of a sample
            self.faults += [Fault(self.shard, key, *reason) for reason in reasons.items()]
            span.faulty = True

    def close(self) -> None:
        """Find members that stand twice, and keys that come again: with the same members anew, or with others."""
        for span, following in pairwise(self.spans):
            span.end = following.start  # as who reads by offsets reads: with files of no sample that stand between
        places: dict[str, list[int]] = defaultdict(list)
        for number, span in enumerate(self.spans):
            places[span.key].append(number)
            if len(set(span.suffixes)) < len(span.suffixes):
                twice = [suffix for suffix, count in Counter(span.suffixes).items() if count > 1]
                detail = f"twice in a row: {', '.join(twice[:NAMED])}"
                self.faults.append(Fault(self.shard, span.key, DUPLICATE_KEY, detail))
                span.faulty = True
        for key, numbers in places.items():
            if len(numbers) == 1:
                continue
            starts = [self.spans[number].start for number in numbers]
            suffixes = [suffix for number in numbers for suffix in self.spans[number].suffixes]
            if len(set(suffixes)) == len(suffixes):
                self.faults.append(Fault(self.shard, key, APART, f"at bytes {', '.join(map(str, starts[:NAMED]))}"))
            else:
                numbers = numbers[1:]
                self.repeated += numbers
                self.faults += [Fault(self.shard, key, DUPLICATE_KEY, f"again at byte {each}") for each in starts[1:]]
            for number in numbers:
                self.spans[number].faulty = True


def scan(path: Path) -> Contents:
    """Walk the headers of a tar. Nothing in the file raises; a damaged one is known up to its last whole sample.

    Raises:
        OSError: where the file cannot be read.
    """
    contents = Contents(path.name)
    if not path.is_file():  # a pipe would wait for ever
        contents.faults.append(Fault(path.name, "", NOT_A_TAR, "no regular file"))
        return contents
    with path.open("rb") as file:
        headers = Headers(file)
        try:
            for header in headers:
                contents.add(headers.start, header, min(headers.end, headers.size))
                headers.check_data(header)
            headers.check_tail()
        except SampleError as error:
            key = ""
            if error.reason == TRUNCATED and headers.start < headers.size and contents.spans:
                key = contents.spans.pop().key  # more of it may have stood in what is lost
            contents.faults.append(Fault(path.name, key, error.reason, error.detail))
    contents.close()
    return contents


class Headers:
    """The member headers of a tar, strictly: tarfile takes a damaged header for the end of the archive.

    `start` and `end` are the bytes of the last one, extensions of its header and data included.
    """

    def __init__(self, file: BinaryIO):
        self.file, self.size = file, os.fstat(file.fileno()).st_size
        self.start = self.end = 0
        # Opened over an empty archive, because opening reads the first header.
        self._tar = tarfile.TarFile(fileobj=io.BytesIO(bytes(2 * BLOCK)), encoding=NAMES[0], errors=NAMES[1])
        self._tar.fileobj = file

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        while (header := self._next()) is not None:
            yield header

    def _next(self) -> tarfile.TarInfo | None:
        """The next header; None at the mark of the end, a block of zeros."""
        self.start = self.end
        self.file.seek(self.start)
        block = self.file.read(BLOCK)
        if len(block) < BLOCK and self.start:
            raise SampleError(TRUNCATED, f"no mark of the end at byte {self.start} of {self.size}")
        if block.count(0) == BLOCK:
            return None
        if not is_header(block):
            if self.start:
                raise SampleError(TRUNCATED, f"no header at byte {self.start} of {self.size}")
            raise SampleError(NOT_A_TAR, _looks_like(block))
        try:
            if block[156:157] in EXTENSIONS and tarfile.TarInfo.frombuf(block, *NAMES).size > LARGEST_EXTENSION:
                raise ValueError("an extension of many bytes")
            self.file.seek(self.start)
            header = tarfile.TarInfo.fromtarfile(self._tar)
            self.end = self._tar.offset
            if header.size < 0 or self.end <= self.start:
                raise ValueError(f"size {header.size}")
        except Exception as error:  # noqa: BLE001  tarfile raises many kinds on forged headers
            raise SampleError(TRUNCATED, f"broken header at byte {self.start} of {self.size}: {error}") from None
        return header

    def check_data(self, header: tarfile.TarInfo) -> None:
        """The bytes of a member are all there, be it without the padding to a whole block."""
        if header.offset_data + header.size > self.size if header.isreg() else self.end >= self.size + BLOCK:
            detail = f"{header.name} has {max(0, self.size - header.offset_data)} of {header.size} bytes"
            raise SampleError(TRUNCATED, detail)

    def check_tail(self) -> None:
        """Behind the mark of the end there are only zeros; tars that were joined end to end hide samples there."""
        self.file.seek(self.start)
        while chunk := self.file.read(1 << 20):
            if chunk.count(0) != len(chunk):
                raise SampleError(TRAILING, f"{self.size - self.end} bytes after byte {self.end}")


def refusals(header: tarfile.TarInfo) -> dict[str, str]:
    """Reason → detail of what forbids to read a member: a name that leads elsewhere, or no plain file."""
    found = {UNSAFE_NAME: header.name} if is_unsafe(header.name) else {}
    if header.issym() or header.islnk():
        found[LINK] = f"{header.name} → {header.linkname}"
    elif not (header.isdir() or (header.isreg() and header.sparse is None)):
        found[LINK] = f"{header.name} is {'a sparse' if header.isreg() else 'no plain'} file"
    return found


def _looks_like(block: bytes) -> str:
    if not block:
        return "empty file"
    packed = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK": "zip"}
    found = next((name for start, name in packed.items() if block.startswith(start)), "")
    return f"{found} data: expected an uncompressed tar" if found else f"begins with {block[:16]!r}"


# -- a folder ----------------------------------------------------------------------------------------------------------


def tars(folder: Path) -> list[Path]:
    """The tar files of a folder, in the order of their names.

    Raises:
        FlamingoError: where there is no such folder, or no tar in it.
    """
    if not folder.is_dir():
        raise FlamingoError(f"{folder}: there is no such folder of shards")
    found = sorted(folder.glob("*.tar"))
    if not found:
        raise FlamingoError(f"{folder}: expected *.tar files")
    return found


def index_folder(folder: str | Path, samples: SamplesForm | None = None) -> Report:
    """Index a folder of WebDataset tars that others wrote, so that `open_shards` opens it; the tars stay as they are.

    Writes `index.json` and each tar's offsets. Image bytes are hashed, but neither held nor decoded. Samples with a
    fault that their headers show are reported and stay in the index, since leaving them out would take a copy: reading
    them fails, and training replaces them.

    Args:
        folder: of `*.tar`.
        samples: form of the samples: `pairs` of image and caption (img2dataset), `mmc4` documents with images inside
            (OpenFlamingo), `documents` (ours); None: told from the first samples.

    Returns:
        The counts and the faults.

    Raises:
        FlamingoError: where there is no tar, or the form of the samples cannot be told.
    """
    folder = Path(folder)
    paths = tars(folder)
    form = samples or detect(paths)
    report = Report(str(folder), form)
    entries: list[dict[str, Any]] = []
    for path in paths:
        try:
            contents, digest = scan(path), sha256(path) if path.is_file() else ""
        except OSError as error:
            contents, digest = Contents(path.name, faults=[unreadable(path, error)]), ""
        count(report, contents)
        if digest:
            with whole(offsets_path(path)) as unfinished, unfinished.open("wb") as file:
                np.save(file, contents.offsets)
            entry = {"file": path.name, "samples": len(contents.spans), "bytes": path.stat().st_size, "sha256": digest}
            entries.append(entry | ({"repeated": contents.repeated} if contents.repeated else {}))
    write_index(folder, entries, samples=form)
    return report


def count(report: Report, contents: Contents) -> None:
    """Put one tar into a report."""
    report.shards += 1
    report.faulty_shards += bool(contents.faults)
    report.samples += len(contents.spans)
    report.faulty_samples += sum(span.faulty for span in contents.spans)
    report.other_members += contents.other_members
    report.add(contents.faults)


def unreadable(path: Path, error: OSError) -> Fault:
    """The fault of a tar that the system does not let us read."""
    return Fault(path.name, "", UNREADABLE, error.strerror or str(error))


def detect(paths: Iterable[Path]) -> SamplesForm:
    """The form of the samples in some tars, told from the first ones; `documents` where there are none.

    Raises:
        FlamingoError: where there are samples, but of no form that is known.
    """
    seen: list[Span] = []
    for path in paths:
        try:
            spans = scan(path).spans[: DETECTED - len(seen)]
            with path.open("rb") if spans else io.BytesIO() as file:
                for span in spans:
                    if form := _form(span, file):
                        return form
        except OSError:
            continue  # reported when its turn comes
        seen += spans
        if len(seen) == DETECTED:
            break
    if not seen:
        return "documents"
    suffixes = sorted({suffix for span in seen for suffix in span.suffixes})
    raise FlamingoError(
        f"samples such as {seen[0].key!r} with members {', '.join(suffixes[:NAMED])}: expected documents, mmc4 or "
        "pairs; say samples=… if they are of one of these forms"
    )


def _form(span: Span, file: BinaryIO) -> SamplesForm | None:
    """The form of one sample, or None where it does not tell."""
    try:
        members = span.read(file)
        record = json.loads(members.get("json", b"null"))
    except (SampleError, ValueError, RecursionError):
        return None
    fields = record.keys() if isinstance(record, dict) else ()
    if "segments" in fields:
        return "documents"
    if "is_gpt" in fields or {"text_list", "image_info"} & set(fields):
        return "mmc4"
    return "pairs" if len(members) > 1 and ("txt" in members or "caption" in fields) else None
