"""What is wrong in a data set, found before it is trained on: every tar is walked, every image decoded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_shards.faults import (
    BAD_INDEX,
    CRASHED,
    DUPLICATE_KEY,
    EMPTY,
    IMAGE_MARK,
    MISSING_SHARD,
    NO_INDEX,
    NOTHING_SUPERVISED,
    STALE_INDEX,
    UNLISTED_SHARD,
    WRONG_CHECKSUM,
    Fault,
    SampleError,
)
from data_shards.indexing import Contents, SamplesForm, Span, detect, scan, tars, unreadable
from data_shards.parallel import over_files
from data_shards.report import Report
from data_shards.sequences import image_marks
from data_shards.shards import INDEX, Folder, Shard, load_offsets, make_document, offsets_path, read_index
from flamingo.document import Document, Text
from flamingo.errors import FlamingoError
from flamingo.files import sha256
from flamingo.images import Limits, PixelSettings, decode
from flamingo.processing import IMAGE_TOKEN, FlamingoProcessor


@dataclass
class _Checked:
    """What was found in one shard. `keys` (samples,) uint64 are hashes, `faulty` (samples,) says which have a fault."""

    faults: list[Fault]
    keys: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    faulty: np.ndarray = field(default_factory=lambda: np.empty(0, bool))
    images: int = 0
    faulty_images: int = 0
    text_only: int = 0
    other_members: int = 0


def validate(
    folder: str | Path,
    *,
    samples: SamplesForm | None = None,
    processor: FlamingoProcessor | None = None,
    processes: int | None = None,
) -> Report:
    """Open everything in a folder of shards, and report each fault by shard, key and reason.

    The index, where there is one: checksums, sizes, numbers of samples, offsets. Every tar: whole, members with safe
    names, no links. Every sample: one key over the whole set, a document, with something supervised; the similarity
    matrices of `mmc4`. Every image: decoded, within the bounds of `flamingo.images.decode`. At most one sample and one
    decoded image are held for each process, beside 8 bytes a sample for its key.

    Args:
        folder: of `*.tar`, ours with an index, or anybody's.
        samples: form of the samples; None: as the index says, or told from the first samples.
        processor: of a model, for the channels and the limits of its images; None: RGB within the usual limits.
        processes: None: one for each core, where there are enough data.

    Raises:
        FlamingoError: where there is no tar, or the form of the samples cannot be told.
    """
    folder = Path(folder)
    paths = tars(folder)
    listed, index_faults = _read_index(folder)
    form = samples or form_of(folder, paths)
    if form == "documents" and not (folder / INDEX).exists():
        index_faults = [Fault(INDEX, "", NO_INDEX, "the shards were not written to the end")]
    report = Report(str(folder), form, images=0)
    report.add(index_faults)
    present = {path.name for path in paths}
    report.add(Fault(name, "", MISSING_SHARD, f"{INDEX} lists it") for name in listed if name not in present)
    settings = processor.pixel_settings if processor else None
    check = partial(_check_shard, form=form, settings=settings, indexed=bool(listed))
    entries = [listed.get(path.name) for path in paths]
    results = over_files(check, paths, entries, processes=processes, title="validating")
    keys, faulty, faulty_shards = [], [], []
    for path, result in zip(paths, results, strict=True):
        checked = result or _Checked([Fault(path.name, "", CRASHED)])
        _count(report, checked)
        keys.append(checked.keys)
        faulty.append(checked.faulty)
        faulty_shards.append(bool(checked.faults))
    for number, sample, fault in _shared_keys(paths, keys):
        report.add([fault])
        report.faulty_samples += not faulty[number][sample]
        report.faulty_shards += not faulty_shards[number]
        faulty[number][sample] = faulty_shards[number] = True
    return report


def form_of(folder: Path, paths: Sequence[Path]) -> str:
    """The form of a folder's samples: as its index says, or told from the first samples.

    Raises:
        FlamingoError: where it cannot be told.
    """
    listed, _ = _read_index(folder)
    return next((shard.form for shard in listed.values()), None) or detect(paths)


def _count(report: Report, checked: _Checked) -> None:
    report.shards += 1
    report.faulty_shards += bool(checked.faults)
    report.samples += len(checked.faulty)
    report.faulty_samples += int(checked.faulty.sum())
    report.images = (report.images or 0) + checked.images
    report.faulty_images += checked.faulty_images
    report.text_only += checked.text_only
    report.other_members += checked.other_members
    report.add(checked.faults)


# -- index -------------------------------------------------------------------------------------------------------------


def _read_index(folder: Path) -> tuple[dict[str, Shard], list[Fault]]:
    """The shards that the index lists, by their files, or what is wrong with it; without one, nothing."""
    path = folder / INDEX
    if not path.exists():
        return {}, []
    try:
        return {shard.file: shard for shard in read_index(path.read_bytes(), Folder(str(folder))).shards}, []
    except (OSError, FlamingoError) as error:
        return {}, [Fault(INDEX, "", BAD_INDEX, str(error))]


def _check_index(path: Path, contents: Contents, listed: Shard) -> Iterator[Fault]:
    """What the index says of a shard against what it is."""
    size, samples = path.stat().st_size, len(contents.spans)
    if size != listed.size:
        yield Fault(path.name, "", STALE_INDEX, f"{size:,} bytes, {INDEX} says {listed.size:,}")
        return
    if sha256(path) != listed.sha256:
        yield Fault(path.name, "", WRONG_CHECKSUM, f"other bytes than when it was indexed ({listed.sha256[:12]}…)")
    if samples != listed.samples:
        yield Fault(path.name, "", STALE_INDEX, f"{samples:,} samples, {INDEX} says {listed.samples:,}")
        return
    try:
        same = np.array_equal(load_offsets(offsets_path(path), listed), contents.offsets)
    except SampleError as error:
        yield Fault(path.name, "", STALE_INDEX, error.detail)
        return
    if not same:
        yield Fault(path.name, "", STALE_INDEX, f"samples begin at other bytes than {offsets_path(path).name} says")


# -- one shard ---------------------------------------------------------------------------------------------------------


def _check_shard(
    path: Path, entry: Shard | None, *, form: str, settings: PixelSettings | None, indexed: bool
) -> _Checked:
    """Everything about one shard; `entry` is the index's, `indexed` says whether there is an index."""
    try:
        contents = scan(path)
        checked = _Checked(contents.faults, other_members=contents.other_members)
        checked.keys = np.array([_hash(span.key) for span in contents.spans], np.uint64)
        checked.faulty = np.array([span.faulty for span in contents.spans], bool)
        if entry is not None:
            checked.faults += _check_index(path, contents, entry)
        elif indexed:
            checked.faults.append(Fault(path.name, "", UNLISTED_SHARD))
        if not contents.spans:
            return checked
        with path.open("rb") as file:
            for number, span in enumerate(contents.spans):
                if not span.faulty:
                    faults = list(_check_sample(span, file, path.name, form, settings, checked))
                    checked.faults += faults
                    checked.faulty[number] = bool(faults)
        return checked
    except OSError as error:
        return _Checked([unreadable(path, error)])


def _check_sample(
    span: Span, file: BinaryIO, shard: str, form: str, settings: PixelSettings | None, checked: _Checked
) -> Iterator[Fault]:
    """The faults of a sample whose members are sound; its images are counted."""
    try:
        document = make_document(form, span.key, span.read(file))
    except SampleError as error:
        yield Fault.of(error, span.key, shard)
        return
    yield from (Fault(shard, span.key, *found) for found in _check_text(document))
    channels, limits = (settings.channels, settings.limits) if settings else (3, Limits())
    checked.text_only += not document.media and bool(_texts(document))
    for image in document.images:
        checked.images += 1
        try:
            decode(image, channels, limits)
        except FlamingoError as error:
            checked.faulty_images += 1
            yield Fault.of(error, span.key, shard)


def _check_text(document: Document) -> Iterator[tuple[str, str]]:
    """(reason, detail) of a document from which nothing can be learned."""
    texts = _texts(document)
    if not texts and not document.media:
        yield EMPTY, f"{len(document.segments)} segments"
        return
    if marks := image_marks(document):
        yield IMAGE_MARK, f"{marks} {IMAGE_TOKEN} in its texts"
    elif not any(text.supervised for text in texts):
        yield NOTHING_SUPERVISED, f"{len(texts)} texts, none supervised"


def _texts(document: Document) -> list[Text]:
    return [segment for segment in document.segments if isinstance(segment, Text) and segment.text]


# -- the whole set -----------------------------------------------------------------------------------------------------


def _hash(key: str) -> int:
    return int.from_bytes(blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def _shared_keys(paths: Sequence[Path], keys: Sequence[np.ndarray]) -> Iterator[tuple[int, int, Fault]]:
    """(shard, sample, fault) of each first sample of a key in a shard that an earlier shard has too.

    Hashes say where to look, the names themselves decide. Within a shard `scan` has found them.
    """
    distinct, shards = np.unique(np.concatenate([np.unique(each) for each in keys]), return_counts=True)
    shared = distinct[shards > 1]
    first: dict[str, str] = {}
    for number, path in enumerate(paths):
        suspects = np.flatnonzero(np.isin(keys[number], shared))
        if not len(suspects):
            continue
        spans, seen = scan(path).spans, set[str]()
        for sample in suspects.tolist():
            key = spans[sample].key
            if key not in seen and first.setdefault(key, path.name) != path.name:
                yield number, sample, Fault(path.name, key, DUPLICATE_KEY, f"also in {first[key]}")
            seen.add(key)
