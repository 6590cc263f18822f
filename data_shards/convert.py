"""From a source in a public format to shards: in parallel, and from where it stopped.

The plan of a conversion is made before anything is read, and written into its folder: units, each a few files of the
source or a stripe of one, whose shards depend on nothing outside. Any number of processes works on them. After each
shard a unit writes down how far it is, so that one that was killed goes on with the next shard, and the result is the
same to the byte as if it had not been. A finished folder has an index; beside it are `account.json`, what became of
everything that was read, and `conversion.json`, the plan and its options.
"""

from __future__ import annotations

import fcntl
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from itertools import islice
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any, Protocol

from einops import rearrange
from PIL import Image as PilImage

from data_shards.account import Account
from data_shards.faults import IMAGE_MARK, NO_IMAGES, NO_TEXT, OF_TURN, UNREADABLE, Fault
from data_shards.sequences import image_marks
from data_shards.shards import INDEX, ShardWriter, write_index
from data_shards.sources import IndexedReader, InstructionReader, Reader, Record
from data_shards.splitting import check_limits, split, token_counter
from data_shards.turns import fit_turns
from flamingo.document import Document, Image, Segment, Text, Video
from flamingo.errors import FlamingoError
from flamingo.files import write_text
from flamingo.images import decode

PLAN, ACCOUNT, JOURNAL, CACHE = "conversion.json", "account.json", ".conversion", ".index"
FORMAT = 1
UNIT_BYTES = 1 << 20
"""Smaller files are taken together, larger ones in stripes where there are few. Images outside come to much more."""
STRIPES = 16
"""The most stripes of a file, which all read over the whole of it."""


@dataclass(frozen=True)
class Options:
    """What is written; another folder for other options."""

    max_tokens: int | None = 256
    """tokens of a document with images, and with its marks; longer ones are split. null: no limit"""
    max_media: int | None = 5
    """images of a document; those with more are split. null: no limit"""
    tokenizer: str | None = None
    """folder or hub id of the tokenizer that counts tokens; default: an estimate on the long side"""
    max_samples: int = 2000
    """documents of a shard"""
    max_bytes: int = 256 << 20
    """bytes of a shard; a single document may be larger"""
    max_edge: int | None = None
    """pixels of an image's longer edge: larger images are scaled down to it and become JPEG, others keep their bytes;
    those that cannot be decoded are dropped. Default: images are not looked at"""
    quality: int = 90
    """JPEG quality of images that are scaled down, 1 to 95"""
    check_images: bool = False
    """decode every image and drop those that are broken; max_edge does so too"""
    stripes: int | None = None
    """parts of one file that processes can share; default: from its size and the number of files"""

    def check(self) -> None:
        """Raise FlamingoError for a number that cannot be, naming the option."""
        check_limits(self.max_tokens, self.max_media)
        for name in ("max_samples", "max_bytes", "max_edge", "stripes"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise FlamingoError(f"{name}={number}: expected a positive number")
        if not 1 <= self.quality <= 95:
            raise FlamingoError(f"quality={self.quality}: expected 1 to 95")


@dataclass(frozen=True)
class InstructionOptions(Options):
    """What is written of a source of instructions, whose turns are never cut: see `data_shards.turns`."""

    max_tokens: int | None = 2048
    """tokens of a document with its marks; turns beyond are left out or become another document. null: no limit"""
    max_media: int | None = None
    """media of a document; turns beyond are left out or become another document. null: no limit"""


class Watcher(Protocol):
    """Is told how far a conversion is."""

    def __call__(self, *, units: int, of: int, documents: int, images: int) -> None:
        """So many units of all are done; documents read and images kept are those of this call of `convert`."""


def convert(
    reader: Reader,
    out: str | Path,
    options: Options = Options(),
    *,
    processes: int = 1,
    skip_unreadable: bool = False,
    strict: bool = False,
    watch: Watcher | None = None,
) -> Account:
    """Write the documents of a source as shards, or go on where that was stopped, and return what became of them.

    Args:
        reader: a dataclass, whose fields are its options.
        out: folder of the shards. The same reader and options find their work there and go on; of a finished one only
            the account is read. The source's files must be what they were.
        processes: that work; one is this process. The shards are the same for any number.
        skip_unreadable: count a file that cannot be read as one dropped document, instead of stopping.
        strict: stop at the first record with a fault, instead of counting it. What options leave out is no fault.
        watch: called every now and then.

    Raises:
        FlamingoError: where `out` holds something else, which is named; where a file of the source cannot be read;
            where a process was killed; where nothing was kept; where `strict` finds a fault.
    """
    options.check()
    if processes < 1:
        raise FlamingoError(f"processes={processes}: expected a positive number")
    token_counter(options.tokenizer)
    folder = Path(out)
    reader, own = _with_cache(reader, folder)
    job = _Job(reader, options, folder, tuple(reader.parts()), skip_unreadable, strict)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        plan = _plan(job)
        if not (folder / INDEX).exists():
            _clean(folder, plan)
            if isinstance(reader, IndexedReader):
                reader.prepare()
            waiting = [unit for unit in plan if not _Progress.load(folder, unit).finished]
            tally = _Tally(_CONTEXT.Array("q", 3), watch, len(plan) - len(waiting), len(plan))
            if processes == 1 or len(waiting) <= 1:
                _work_here(job, waiting, tally)
            else:
                _work_in_processes(job, waiting, tally, min(processes, len(waiting)))
            _finish(folder, plan)
        shutil.rmtree(folder / JOURNAL, ignore_errors=True)
        if own:
            shutil.rmtree(folder / CACHE, ignore_errors=True)
        return Account.from_dict(json.loads((folder / ACCOUNT).read_text(encoding="utf-8")))


def convert_each(
    readers: Sequence[Reader], out: str | Path, options: Options = Options(), **settings: Any
) -> dict[str, Account]:
    """Convert several sources, each into a folder of its own below `out`: name of the source → its account.

    What they look up on disk is kept in one place until all are done, so that files which they share are read once.

    Args:
        settings: as `convert` takes them.

    Raises:
        FlamingoError: where `convert` does.
    """
    cached = [_with_cache(reader, Path(out)) for reader in readers]
    accounts = {reader.name: convert(reader, Path(out, reader.name), options, **settings) for reader, _ in cached}
    if any(own for _, own in cached):
        shutil.rmtree(Path(out, CACHE), ignore_errors=True)
    return accounts


def examine(readers: Sequence[Reader]) -> dict[str, Account]:
    """What would become of everything that sources hold, by their names, without writing shards; in this process.

    Raises:
        FlamingoError: where a file of a source cannot be read.
    """
    accounts = {}
    with tempfile.TemporaryDirectory() as folder:
        for reader, _ in (_with_cache(each, Path(folder)) for each in readers):
            account = accounts[reader.name] = Account()
            for part in reader.parts():
                for record in reader.records(part):
                    account.samples += len(reader.documents(record, account))
    return accounts


def _with_cache(reader: Reader, folder: Path) -> tuple[Reader, bool]:
    """The reader; if it looks things up on disk and was not told where, so that it does in the folder, and True."""
    if isinstance(reader, IndexedReader) and not reader.cache:
        changed: Any = reader
        return replace(changed, cache=str(folder / CACHE)), True
    return reader, False


# -- the plan ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Unit:
    """Files `first` ≤ n < `last` of the source; of one file perhaps every `stripes`-th record from `stripe` on."""

    first: int
    last: int
    stripe: int = 0
    stripes: int = 1

    @property
    def prefix(self) -> str:
        return f"{self.first:05d}-{self.stripe:02d}"


_OURS = re.compile(r"\.?\d{5,}-\d{2,}-\d{5,}\.")
"""The names of shards, of what is beside them, and of unfinished ones."""


@dataclass(frozen=True)
class _Job:
    """What every process needs to know."""

    reader: Reader
    options: Options
    folder: Path
    parts: tuple[str, ...]
    skip_unreadable: bool
    strict: bool

    def described(self) -> dict[str, Any]:
        """What must be the same where a conversion goes on, as JSON gives it back."""
        reader: Any = self.reader
        options = {each.name: getattr(reader, each.name) for each in fields(reader) if each.compare}
        described = {
            "format": FORMAT,
            "reader": {"reader": type(reader).__name__, **options},
            "options": asdict(self.options),
            "parts": self.parts,
        }
        return json.loads(json.dumps(described, default=str))


def _units(parts: Sequence[str], stripes: int | None) -> list[_Unit]:
    """Neighbouring small files together, large ones in stripes where there are fewer than `STRIPES`."""
    sizes = [Path(part).stat().st_size if Path(part).is_file() else UNIT_BYTES for part in parts]
    most = STRIPES // max(len(parts), 1)
    units: list[_Unit] = []
    gathered = 0
    for part, size in enumerate(sizes):
        count = stripes or max(1, min(most, size // UNIT_BYTES))
        if count == 1 and units and units[-1].stripes == 1 and gathered + size <= UNIT_BYTES:
            units[-1] = replace(units[-1], last=part + 1)
            gathered += size
        else:
            units += [_Unit(part, part + 1, stripe, count) for stripe in range(count)]
            gathered = size
    return units


def _plan(job: _Job) -> list[_Unit]:
    """The units that the folder's plan names; a new plan where nothing was done yet."""
    path, described = job.folder / PLAN, job.described()
    begun = (job.folder / INDEX).exists() or any((job.folder / JOURNAL).glob("*.json"))
    if path.exists() and begun:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            units = [_Unit(*each) for each in found["units"]]
        except (ValueError, KeyError, TypeError) as error:
            raise FlamingoError(f"{path}: expected the plan of a conversion ({error})") from error
        _check_same(job.folder, found, described)
        return units
    if not path.exists() and (begun or any(job.folder.glob("*.tar"))):
        raise FlamingoError(f"{job.folder}: holds shards of something else; expected an empty or a new folder")
    units = _units(job.parts, job.options.stripes)
    plan = {**described, "units": [[*vars(unit).values()] for unit in units]}
    (job.folder / JOURNAL).mkdir(exist_ok=True)
    write_text(path, json.dumps(plan, ensure_ascii=False) + "\n")
    return units


def _check_same(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for section in ("reader", "options"):
        was, now = found.get(section, {}), wanted[section]
        for name in {**now, **was}:
            if was.get(name) != now.get(name):
                raise FlamingoError(
                    f"{folder}: holds a conversion with {name}={was.get(name)}, this one has {name}={now.get(name)}; "
                    "expected another folder"
                )
    if found.get("format") != wanted["format"] or found.get("parts") != wanted["parts"]:
        raise FlamingoError(f"{folder}: holds a conversion of other files than there are now; expected another folder")


def _clean(folder: Path, plan: Sequence[_Unit]) -> None:
    """Remove what a killed process left: shards that no unit has written down."""
    known = {Path(entry["file"]).stem for unit in plan for entry in _Progress.load(folder, unit).entries}
    for path in folder.iterdir():
        if _OURS.match(path.name) and (path.name.startswith(".") or path.name.partition(".")[0] not in known):
            path.unlink()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder; the system lets go of it when the process ends, however that happens."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FlamingoError(f"{folder}: another conversion is writing there") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)


def _finish(folder: Path, plan: Sequence[_Unit]) -> None:
    """Account and index of all units; the index last, since it says that the folder is finished."""
    account, entries = Account(), []
    for unit in plan:
        progress = _Progress.load(folder, unit)
        account += progress.account
        entries += progress.entries
    if not account.adds_up:
        raise AssertionError(f"internal error: the account does not add up: {account}")
    if not entries:
        shutil.rmtree(folder / JOURNAL)
        (folder / PLAN).unlink()
        reasons = account.dropped.most_common(5)
        told = "; ".join(
            f"{count:,} × {reason}" + "".join(f", as {place}" for place in account.examples.get(reason, [])[:1])
            for reason, count in reasons
        )
        raise FlamingoError(f"{folder}: no document was kept of {account.documents_read} read ({told or 'no records'})")
    write_text(folder / ACCOUNT, json.dumps(account.as_dict(), indent=1, ensure_ascii=False) + "\n")
    write_index(folder, entries)


# -- one unit ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Progress:
    """How far a unit is: everything before document `documents` of its record `records` is in finished shards.

    The account is of the records before that one, which is read once more.
    """

    entries: list[dict[str, Any]] = field(default_factory=list)
    records: int = 0
    documents: int = 0
    account: Account = field(default_factory=Account)
    finished: bool = False

    @staticmethod
    def load(folder: Path, unit: _Unit) -> _Progress:
        path = folder / JOURNAL / f"{unit.prefix}.json"
        if not path.exists():
            return _Progress()
        content = json.loads(path.read_text(encoding="utf-8"))
        return _Progress(**{**content, "account": Account.from_dict(content["account"])})

    def save(self, folder: Path, unit: _Unit) -> None:
        content = {**vars(self), "account": self.account.as_dict()}
        write_text(folder / JOURNAL / f"{unit.prefix}.json", json.dumps(content, ensure_ascii=False) + "\n")


class _Worker:
    """Writes units, one at a time."""

    def __init__(self, job: _Job, tally: _Tally):
        self.job, self.tally = job, tally

    def write(self, unit: _Unit) -> None:
        """Write what is missing of a unit, and write down after each shard how far it is."""
        job, limits = self.job, self.job.options
        progress = _Progress.load(job.folder, unit)
        account, records, skip = progress.account, progress.records, progress.documents
        shards = ShardWriter(job.folder, unit.prefix, limits.max_samples, limits.max_bytes)
        shards.entries.extend(progress.entries)
        written = finished = 0
        try:
            for part, number, record in islice(self._records(unit), records, None):
                change = Account()
                documents = self._documents(part, number, record, change)
                for place, document in enumerate(documents[skip:], skip):
                    shards.write(document)
                    written += 1
                    if len(shards.entries) > len(progress.entries):
                        finished += sum(entry["samples"] for entry in shards.entries[len(progress.entries) :])
                        # Behind what is in finished shards: this document, if it is the first of an open one.
                        begun = place + 1 - (written - finished)
                        progress = _Progress([*shards.entries], records, begun, account)
                        progress.save(job.folder, unit)
                account += change
                records, skip = records + 1, 0
                self.tally.add(1, change.images_kept)
            shards.close()
        except BaseException:
            shards.abandon()
            raise
        _Progress(shards.entries, records, 0, account, finished=True).save(job.folder, unit)

    def _records(self, unit: _Unit) -> Iterator[tuple[int, int, Record | FlamingoError]]:
        """Part, number in it, and record; the error of a part that cannot be read, where such are to be skipped."""
        for part in range(unit.first, unit.last):
            number = 0
            try:
                for number, record in enumerate(self.job.reader.records(self.job.parts[part])):
                    if number % unit.stripes == unit.stripe:
                        yield part, number, record
            except FlamingoError as error:
                if not self.job.skip_unreadable:
                    raise
                if unit.stripe == 0:
                    yield part, number, error

    def _documents(self, part: int, number: int, record: Record | FlamingoError, account: Account) -> list[Document]:
        """The documents of one record as they are written: with images of bounded size, split, and with keys."""
        if isinstance(record, FlamingoError):
            account.drop(str(record), UNREADABLE)
            return []
        documents = self.job.reader.documents(record, account)
        if not account.adds_up or account.documents_read + account.images_read < 1 or account.documents_read > 1:
            raise AssertionError(f"internal error: {record.place}: the reader's account does not add up: {account}")
        if self.job.options.max_edge is not None or self.job.options.check_images:
            whole = isinstance(self.job.reader, InstructionReader)
            documents = _with_good_images(documents, self.job.options, record.place, account, whole=whole)
        documents = _keep(documents, lambda each: not image_marks(each), IMAGE_MARK, record.place, account)
        pieces = [piece for document in documents for piece in self._split(document, record.place, account)]
        pieces = _keep(pieces, _has_text, NO_TEXT, record.place, account)
        account.samples += len(pieces)
        if self.job.strict:
            _check_faultless(account)
        key = f"{part:05d}-{number:07d}"
        several = len(pieces) > 1
        return [replace(each, key=f"{key}-{place}" if several else key) for place, each in enumerate(pieces)]

    def _split(self, document: Document, place: str, account: Account) -> list[Document]:
        options, reader = self.job.options, self.job.reader
        limits: dict[str, Any] = {"max_tokens": options.max_tokens, "max_media": options.max_media}
        if not isinstance(reader, InstructionReader):
            return split(document, **limits, count_tokens=self._count_tokens)
        fitted = fit_turns(document, reader.long_turns, **limits, count_tokens=self._count_tokens)
        if not fitted.documents:
            return _keep([document], lambda _: False, fitted.left_out[-1], place, account)
        account.leave_out_turns(place, fitted.left_out)
        kept = {id(image) for piece in fitted.documents for image in piece.images}
        _drop_kept_images(place, OF_TURN, sum(id(image) not in kept for image in document.images), account)
        return fitted.documents

    @cached_property
    def _count_tokens(self) -> Callable[[str], int]:
        return token_counter(self.job.options.tokenizer)


# -- what is not written -----------------------------------------------------------------------------------------------


def _keep(
    documents: list[Document], wanted: Callable[[Document], bool], reason: str, place: str, account: Account
) -> list[Document]:
    """The documents that are wanted; the images of the others, and a record of which nothing is left, are dropped."""
    kept = [document for document in documents if wanted(document)]
    lost = {id(image) for document in documents for image in document.images}
    lost -= {id(image) for document in kept for image in document.images}
    _drop_kept_images(place, reason, len(lost), account)
    if documents and not kept:
        account.drop_after_all(place, reason)
    return kept


def _drop_kept_images(place: str, reason: str, number: int, account: Account) -> None:
    """Images that the reader kept are dropped after all."""
    for _ in range(number):
        account.images_kept -= 1
        account.images_read -= 1
        account.drop_image(place, reason)


def _check_faultless(account: Account) -> None:
    """Raise FlamingoError for the first fault in the account of a record: of an image before that of its document."""
    for reason, places in account.examples.items():
        if reason in account.faults:
            raise FlamingoError(f"{places[0]} ({reason})")


def _has_text(document: Document) -> bool:
    return any(isinstance(each, Text) and bool(each.text.strip()) for each in document.segments)


# -- images ------------------------------------------------------------------------------------------------------------


def _with_good_images(
    documents: list[Document], options: Options, place: str, account: Account, *, whole: bool
) -> list[Document]:
    """Documents with images of bounded size, without those that cannot be decoded; one that loses all is dropped.

    Args:
        whole: one that loses any is dropped: a question would stay behind without what it is about.
    """
    good: dict[int, Image | None] = {}  # several documents of a record may share an image
    for image in (image for document in documents for image in document.images):
        if id(image) in good:
            continue
        try:
            good[id(image)] = bounded_image(image, options.max_edge, options.quality)
        except FlamingoError as error:
            good[id(image)] = None
            _drop_kept_images(f"{place}: {error}", Fault.of(error).reason, 1, account)
    replaced = [(document, _replace_images(document, good)) for document in documents]
    kept = [now for was, now in replaced if len(now.media) >= (len(was.media) if whole else min(len(was.media), 1))]
    lost = {id(image) for image in good.values() if image} - {id(image) for each in kept for image in each.images}
    _drop_kept_images(place, NO_IMAGES, len(lost), account)
    if documents and not kept:
        account.drop_after_all(place, NO_IMAGES)
    return kept


def _replace_images(document: Document, found: Mapping[int, Image | None]) -> Document:
    """The document with other images under their names; None takes one away, and a video with it."""
    segments: list[Segment] = []
    gap = False
    for segment in document.segments:
        if isinstance(segment, Text):
            before = segments[-1] if segments else None
            if gap and isinstance(before, Text) and not (before.text[-1:].isspace() or segment.text[:1].isspace()):
                segment = replace(segment, text=" " + segment.text)  # two texts that an image parted
            segments.append(segment)
            gap = False
            continue
        frames = [found[id(frame)] for frame in (segment.frames if isinstance(segment, Video) else [segment])]
        whole = [frame for frame in frames if frame is not None]
        gap = gap or len(whole) < len(frames)
        if len(whole) == len(frames):
            segments.append(Video(tuple(whole)) if isinstance(segment, Video) else whole[0])
    return replace(document, segments=tuple(segments))


def bounded_image(image: Image, max_edge: int | None, quality: int = 90) -> Image:
    """An image that can be decoded: as it is, or, where its longer edge has more pixels, a JPEG scaled down to that.

    It is decoded as training does it: upright as EXIF says, transparency over white.

    Raises:
        ImageError: where it cannot be decoded.
    """
    pixels = decode(image, 3)
    if max_edge is None or max(pixels.shape[1:]) <= max_edge:
        return image
    picture = PilImage.fromarray(rearrange(pixels.numpy(), "c h w -> h w c"))
    picture.thumbnail((max_edge, max_edge), PilImage.Resampling.LANCZOS, reducing_gap=3)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return Image(buffer.getvalue(), f"{image.name}.jpg")


# -- processes ---------------------------------------------------------------------------------------------------------


class _Stopped(Exception):  # noqa: N818
    """Nobody wants this unit any more: another failed, or the user has stopped the conversion."""


class _Tally:
    """How far this call is: documents, images and the sign to stop, in memory that its processes share."""

    def __init__(self, shared: Any, watch: Watcher | None = None, done: int = 0, units: int = 0):
        self.shared, self.watch, self.done, self.units = shared, watch, done, units

    def add(self, documents: int, images: int) -> None:
        """Count; raise `_Stopped` where the sign is set."""
        with self.shared.get_lock():
            self.shared[0] += documents
            self.shared[1] += images
        if self.shared[2]:
            raise _Stopped
        self.show()

    def stop(self) -> None:
        self.shared[2] = 1

    def show(self) -> None:
        if self.watch is not None:
            self.watch(units=self.done, of=self.units, documents=self.shared[0], images=self.shared[1])


def _work_here(job: _Job, units: Sequence[_Unit], tally: _Tally) -> None:
    worker = _Worker(job, tally)
    for unit in units:
        try:
            worker.write(unit)
        except OSError as error:
            raise FlamingoError(f"{job.folder}: {error}") from error
        tally.done += 1
    tally.show()


def _work_in_processes(job: _Job, units: Sequence[_Unit], tally: _Tally, processes: int) -> None:
    _CONTEXT.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(processes, _CONTEXT, initializer=_begin, initargs=(job, tally.shared))
    waiting, running = iter(units), set[Future[None]]()
    try:
        while True:
            running |= {pool.submit(_write, unit) for unit in islice(waiting, 2 * processes - len(running))}
            if not running:
                return
            finished, running = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
            for future in finished:
                future.result()
            tally.done += len(finished)
            tally.show()
    except BrokenProcessPool:
        raise FlamingoError(
            f"{job.folder}: a process was killed (by the system, where memory is short?); finished shards are kept, "
            "the same conversion goes on from there"
        ) from None
    finally:
        tally.stop()
        pool.shutdown(cancel_futures=True)


_CONTEXT = multiprocessing.get_context("forkserver")
"""Of the start methods the one that neither copies threads of this process nor imports everything once a worker."""

_worker: _Worker


def _begin(job: _Job, shared: Any) -> None:
    """In a new process: be ready for units. Ctrl-C is for the parent to hear, whose end is this process's end too."""
    global _worker  # noqa: PLW0603
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = _Worker(job, _Tally(shared))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for([parent.sentinel])
    os._exit(1)  # without a word: nobody is there to hear it, and what is written is as after a kill


def _write(unit: _Unit) -> None:
    try:
        _worker.write(unit)
    except FlamingoError as error:
        raise FlamingoError(str(error)) from None  # errors with other arguments do not survive the way home
    except OSError as error:
        raise FlamingoError(f"{_worker.job.folder}: {error}") from None
