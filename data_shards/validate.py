"""What is wrong in a data set, found before it is trained on: every tar is walked, every image decoded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_shards.faults import DUPLICATE_KEY, NOTHING_SUPERVISED, UNUSABLE, Fault
from data_shards.indexing import Contents, SamplesForm, Span, detect, scan, tars, unreadable
from data_shards.parallel import over_files
from data_shards.report import Report
from data_shards.shards import INDEX, SAMPLE_FORMATS, offsets_path
from data_shards.sources.reading import EMPTY
from flamingo.document import Document, Image, Text, Video
from flamingo.errors import FlamingoError
from flamingo.files import sha256
from flamingo.images import Limits, PixelSettings, decode
from flamingo.processing import IMAGE_TOKEN, FlamingoProcessor

NO_INDEX = "no index"
BAD_INDEX = "bad index"
STALE_INDEX = "index of another shard"
WRONG_CHECKSUM = "wrong checksum"
MISSING_SHARD = "missing shard"
UNLISTED_SHARD = "shard not in the index"
IMAGE_MARK = "image mark in a text"
CRASHED = "reading it ended the process"


@dataclass(frozen=True)
class _Index:
    """What `index.json` says: the form of the samples, and of each shard its entry."""

    form: SamplesForm | None = None
    entries: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    faults: tuple[Fault, ...] = ()


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
    index = _read_index(folder)
    form = samples or index.form or detect(paths)
    if form == "documents" and not (folder / INDEX).exists():
        index = _Index(faults=(Fault(INDEX, "", NO_INDEX, "the shards were not written to the end"),))
    report = Report(str(folder), form, images=0)
    report.add(index.faults)
    present = {path.name for path in paths}
    report.add(Fault(name, "", MISSING_SHARD, f"{INDEX} lists it") for name in index.entries if name not in present)
    settings = processor.pixel_settings if processor else None
    check = partial(_check_shard, form=form, settings=settings, indexed=bool(index.entries))
    entries = [index.entries.get(path.name) for path in paths]
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


def form_of(folder: Path, paths: Sequence[Path]) -> SamplesForm:
    """The form of a folder's samples: as its index says, or told from the first samples.

    Raises:
        FlamingoError: where it cannot be told.
    """
    return _read_index(folder).form or detect(paths)


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


def _read_index(folder: Path) -> _Index:
    """What the index says, as far as it can be read; without one, nothing."""
    path = folder / INDEX
    if not path.exists():
        return _Index()
    try:
        content = json.loads(path.read_bytes())
        form, listed = content.get("samples", "documents"), content["shards"]
        entries = {entry["file"]: entry for entry in listed}
        for entry in listed:
            if Path(entry["file"]).name != entry["file"] or not isinstance(entry["sha256"], str):
                raise ValueError(f"entry of {entry['file']!r}")
            _ = entry["samples"] + 0, entry["bytes"] + 0
        if len(entries) != len(listed) or form not in SAMPLE_FORMATS:
            raise ValueError(f"a shard twice, or samples={form!r}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return _Index(faults=(Fault(INDEX, "", BAD_INDEX, f"{type(error).__name__}: {error}"),))
    return _Index(form, entries)


def _check_index(path: Path, contents: Contents, entry: Mapping[str, Any]) -> Iterator[Fault]:
    """What the index says of a shard against what it is."""
    size = path.stat().st_size
    if size != entry["bytes"]:
        yield Fault(path.name, "", STALE_INDEX, f"{size:,} bytes, {INDEX} says {entry['bytes']:,}")
        return
    if sha256(path) != entry["sha256"]:
        yield Fault(path.name, "", WRONG_CHECKSUM, f"other bytes than when it was indexed ({entry['sha256'][:12]}…)")
    offsets = offsets_path(path)
    try:
        same = np.array_equal(np.load(offsets, mmap_mode="r"), contents.offsets)
    except (OSError, ValueError, EOFError) as error:
        yield Fault(path.name, "", STALE_INDEX, f"{offsets.name}: {error}")
        return
    if len(contents.spans) != entry["samples"]:
        detail = f"{len(contents.spans):,} samples, {INDEX} says {entry['samples']:,}"
        yield Fault(path.name, "", STALE_INDEX, detail)
    elif not same:
        yield Fault(path.name, "", STALE_INDEX, f"samples begin at other bytes than {offsets.name} says")


# -- one shard ---------------------------------------------------------------------------------------------------------


def _check_shard(
    path: Path, entry: Mapping[str, Any] | None, *, form: str, settings: PixelSettings | None, indexed: bool
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
        document = SAMPLE_FORMATS[form](span.key, span.read(file))
        yield from (Fault(shard, span.key, *found) for found in _check_text(document))
    except FlamingoError as error:
        yield Fault.of(error, span.key, shard)
        return
    except Exception as error:  # noqa: BLE001  whatever a sample holds is its fault, and the others are still looked at
        yield Fault(shard, span.key, UNUSABLE, f"{type(error).__name__}: {error}")
        return
    channels, limits = (settings.channels, settings.limits) if settings else (3, Limits())
    checked.text_only += not document.media and bool(_texts(document))
    for image in images(document):
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
    marks = sum(text.text.count(IMAGE_TOKEN) for text in texts)
    if marks:
        yield IMAGE_MARK, f"{marks} {IMAGE_TOKEN} in its texts"
    elif not any(text.supervised for text in texts):
        yield NOTHING_SUPERVISED, f"{len(texts)} texts, none supervised"


def _texts(document: Document) -> list[Text]:
    return [segment for segment in document.segments if isinstance(segment, Text) and segment.text]


def images(document: Document) -> Iterator[Image]:
    """The images of a document, the frames of its videos among them."""
    for medium in document.media:
        yield from medium.frames if isinstance(medium, Video) else (medium,)


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
