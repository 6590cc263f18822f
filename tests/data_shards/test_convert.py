"""Conversion: the same bytes for any number of processes and any number of kills, and an account that adds up."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import pytest
from PIL import Image as PilImage

from data_shards.account import Account
from data_shards.convert import Options, bounded_image, convert
from data_shards.faults import IMAGE_MARK, NO_IMAGES, NO_TEXT, UNREADABLE
from data_shards.shards import open_shards
from data_shards.sources import Record
from flamingo import Document, FlamingoError, Image, Text

SPAWN = multiprocessing.get_context("forkserver")
SPAWN.set_forkserver_preload([__name__])
SMALL = Options(max_samples=4, max_bytes=20_000, max_tokens=40, max_media=2, stripes=2)


@dataclass(frozen=True)
class MadeReader:
    """Records made on the spot: of `n`, some are dropped, some lose an image, some have several documents."""

    files: int = 3
    records_each: int = 20
    seconds: float = 0.0
    fails_at: str = ""
    dies_at: str = ""
    name: str = "made"

    def parts(self) -> Sequence[str]:
        return [f"file{n}" for n in range(self.files)]

    def records(self, part: str) -> Iterator[Record]:
        for number in range(self.records_each):
            place = f"{part}:{number}"
            if place == self.fails_at:
                raise FlamingoError(f"{part}: cut off")
            yield Record(place, number)

    def documents(self, record: Record, account: Account) -> list[Document]:
        time.sleep(self.seconds)
        if record.place == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        rng = random.Random(record.place)
        seed, images = rng.randrange(1000), rng.randrange(5)
        if seed % 7 == 0:
            account.drop(record.place, "seven", images)
            return []
        if seed % 3 == 0:
            account.drop_image(record.place, "three")
        account.keep(images)
        pairs = ((Image(rng.randbytes(500), "a.png"), Text("words " * rng.randrange(1, 30))) for _ in range(images))
        document = Document((Text("A beginning."), *chain.from_iterable(pairs)), source=self.name)
        return [document, replace(document, metadata={"again": True})] if seed % 11 == 0 else [document]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def converted(out: Path, processes: int = 1, reader: MadeReader = MadeReader()) -> Account:
    return convert(reader, out, SMALL, processes=processes)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed conversion in one process writes."""
    out = tmp_path_factory.mktemp("expected") / "shards"
    converted(out, 1, MadeReader(seconds=0.003))
    return contents(out)


def test_the_account_adds_up_and_the_shards_hold_what_it_says(tmp_path: Path) -> None:
    """Catches records that are read twice or not at all, pieces that share a key, and images that get lost."""
    account = converted(tmp_path)
    assert account.adds_up and account.documents_read == 60 and account.documents_dropped["seven"] > 0
    assert account.images_dropped.keys() - {NO_TEXT} == {"three", "of a dropped document"}
    shards = open_shards(tmp_path)
    documents = [shards[n] for n in range(len(shards))]
    assert len(documents) == account.samples == len({document.key for document in documents})
    images = Counter(image.data for document in documents for image in document.media)  # type: ignore[union-attr]
    assert len(images) == account.images_kept > 0
    assert max(len(document.media) for document in documents) == 2
    assert max(shards.sizes) == 4 and len(shards.sizes) > 6
    assert documents[0].source == "made" and documents[0].key.startswith("00000-")


@pytest.mark.parametrize("processes", [2, 3])
def test_shards_do_not_depend_on_processes(tmp_path: Path, expected: dict[str, bytes], processes: int) -> None:
    """Catches an order of work, a number of processes or a time that gets into the output."""
    converted(tmp_path / "out", processes, MadeReader(seconds=0.003))
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize("processes, most", [(1, 10), (2, 1)])  # several processes take seconds to begin
def test_a_conversion_killed_at_random_moments_ends_with_the_same_bytes(
    tmp_path: Path, expected: dict[str, bytes], processes: int, most: int
) -> None:
    """Catches documents lost or doubled around a kill, half-written shards that stay, and workers that outlive it."""
    rng, out, kills = random.Random(processes), tmp_path / "out", 0
    while True:
        before = len(list(out.glob(".conversion/*"))), len(list(out.glob("*.tar")))
        process = SPAWN.Process(target=converted, args=(out, processes, MadeReader(seconds=0.003)))
        process.start()
        while process.is_alive() and before == (len(list(out.glob(".conversion/*"))), len(list(out.glob("*.tar")))):
            time.sleep(0.001)
        process.join(rng.uniform(0, 0.03) if kills < most else 60)
        if not process.is_alive():
            break
        process.kill()
        process.join()
        kills += 1
    assert process.exitcode == 0 and kills >= min(most, 3)
    assert contents(out) == expected


def killed_at(call: int, out: Path, reader: MadeReader) -> None:
    """Convert, and die before the `call`-th time that a file gets its name."""
    real, calls = os.replace, 0

    def dying(source: object, target: object) -> None:
        nonlocal calls
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        calls += 1
        real(source, target)  # type: ignore[call-overload]

    os.replace = dying  # type: ignore[assignment]
    converted(out, 1, reader)


def test_a_kill_before_any_file_gets_its_name_does_no_harm(tmp_path: Path) -> None:
    """Catches an order of writing in which a shard, its offsets, the journal and the index contradict one another."""
    reader = MadeReader(files=1, records_each=14)
    converted(tmp_path / "expected", 1, reader)
    for call in range(100):
        out = tmp_path / str(call)
        process = SPAWN.Process(target=killed_at, args=(call, out, reader))
        process.start()
        process.join()
        converted(out, 1, reader)
        assert contents(out) == contents(tmp_path / "expected")
        if process.exitcode == 0:
            break
    assert call > 10


def test_a_finished_folder_only_gives_its_account(tmp_path: Path) -> None:
    """Catches a second run that converts again, or changes what is there."""
    account = converted(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert converted(tmp_path) == account
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}


def test_another_conversion_into_the_folder_is_refused(tmp_path: Path) -> None:
    """Catches shards of two conversions in one folder; the option that differs is named."""
    with pytest.raises(FlamingoError, match="cut off"):
        converted(tmp_path, reader=MadeReader(fails_at="file2:11"))
    before = contents(tmp_path)
    for reader, options, said in (
        (MadeReader(fails_at="file2:11"), replace(SMALL, quality=80), "quality=90, this one has quality=80"),
        (MadeReader(name="other", fails_at="file2:11"), SMALL, "name=made, this one has name=other"),
    ):
        with pytest.raises(FlamingoError, match=said):
            convert(reader, tmp_path, options)
    assert contents(tmp_path) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.tar").write_bytes(b"")
    with pytest.raises(FlamingoError, match="holds shards of something else"):
        convert(MadeReader(), tmp_path / "other", SMALL)


def test_options_may_change_while_nothing_is_written(tmp_path: Path) -> None:
    """Catches a folder that is spoilt by a first attempt which failed at once."""
    with pytest.raises(FlamingoError, match="cut off"):
        convert(MadeReader(fails_at="file0:0"), tmp_path, SMALL)
    assert convert(MadeReader(), tmp_path, replace(SMALL, quality=80)).documents_read == 60


def test_a_file_that_cannot_be_read_is_counted_where_that_is_wanted(tmp_path: Path) -> None:
    """Catches one broken file that ends a long conversion for good, or is forgotten."""
    reader = MadeReader(fails_at="file1:5")
    for processes in (1, 2):
        with pytest.raises(FlamingoError, match="^file1: cut off$"):
            converted(tmp_path, processes, reader)
    account = convert(reader, tmp_path, SMALL, skip_unreadable=True)
    assert account.documents_dropped[UNREADABLE] == 1 and account.examples[UNREADABLE] == ["file1: cut off"]
    assert account.documents_read == 20 + 5 + 20 + 1


def test_a_killed_worker_is_noticed(tmp_path: Path) -> None:
    """Catches a conversion that waits for ever for a process which the system has killed."""
    with pytest.raises(FlamingoError, match="was killed"):
        converted(tmp_path, 2, MadeReader(dies_at="file2:11"))
    assert not (tmp_path / "index.json").exists()


def test_two_conversions_at_once_are_refused(tmp_path: Path) -> None:
    """Catches two processes that write the same shards."""
    process = SPAWN.Process(target=converted, args=(tmp_path, 1, MadeReader(seconds=0.1)))
    process.start()
    while process.is_alive() and not (tmp_path / "conversion.json").exists():
        time.sleep(0.01)
    with pytest.raises(FlamingoError, match="another conversion is writing there"):
        converted(tmp_path, reader=MadeReader(seconds=0.1))
    process.kill()
    process.join()


def test_an_interrupt_ends_cleanly(tmp_path: Path, expected: dict[str, bytes]) -> None:
    """Catches Ctrl-C that leaves processes or unfinished files, or loses what was done."""
    reader = MadeReader(seconds=0.02)
    process = SPAWN.Process(target=interrupted, args=(tmp_path / "out", reader))
    process.start()
    while process.is_alive() and not list((tmp_path / "out").glob("*.tar")):
        time.sleep(0.01)
    os.kill(process.pid or 0, signal.SIGINT)
    process.join(30)
    assert process.exitcode == 130
    assert not [name for name in contents(tmp_path / "out") if "unfinished" in name]


def interrupted(out: Path, reader: MadeReader) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        converted(out, 2, reader)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def test_nothing_kept_is_an_error_with_the_reasons(tmp_path: Path) -> None:
    """Catches an empty set of shards, as a wrong folder of images makes it; the right one may be tried in its place."""
    with pytest.raises(FlamingoError, match="no document was kept of 1 read .1 × unreadable file, as file0: cut off"):
        convert(MadeReader(files=1, fails_at="file0:0"), tmp_path, SMALL, skip_unreadable=True)
    assert not contents(tmp_path)


@dataclass(frozen=True)
class GivenReader:
    """One record for each list of documents."""

    given: tuple[tuple[Document, ...], ...]
    name: str = "given"

    def parts(self) -> Sequence[str]:
        return ["all"]

    def records(self, part: str) -> Iterator[Record]:
        return (Record(f"record {n}", documents) for n, documents in enumerate(self.given))

    def documents(self, record: Record, account: Account) -> list[Document]:
        account.keep(len({id(image) for document in record.content for image in document.media}))
        return list(record.content)


def photograph(width: int, height: int, kind: str = "JPEG", orientation: int | None = None) -> Image:
    """A gradient; bright at its left edge."""
    picture = PilImage.linear_gradient("L").rotate(90).resize((width, height)).convert("RGB")
    exif = PilImage.Exif()
    if orientation:
        exif[0x0112] = orientation
    buffer = io.BytesIO()
    picture.save(buffer, kind, exif=exif)
    return Image(buffer.getvalue(), f"photo.{kind.lower()}")


def test_images_are_bounded_upright_and_small_ones_kept_as_they_are() -> None:
    """Catches images that grow, lie on their side or lose quality for nothing."""
    small, large, turned = photograph(40, 30, "PNG"), photograph(80, 20, "PNG"), photograph(80, 20, orientation=6)
    assert bounded_image(small, 40) is small and bounded_image(large, None) is large
    for image, size in ((large, (40, 10)), (turned, (10, 40))):
        bounded = PilImage.open(io.BytesIO(bounded_image(image, 40).data))
        assert (bounded.format, bounded.size, bounded.getexif().get(0x0112)) == ("JPEG", size, None)
    assert len(bounded_image(large, 60, 30).data) < len(bounded_image(large, 60, 95).data)


def test_broken_images_are_dropped_with_a_reason(tmp_path: Path) -> None:
    """Catches broken images that reach training, texts that run into one another, and an account that is wrong then."""
    good, broken = photograph(40, 30), Image(b"<html>", "page.jpg")
    reader = GivenReader(
        (
            (Document((Text("one"), broken, Text("two"), good, Text("three"))),),
            (Document((broken, Text("a caption"))), Document((broken, Text("another caption")))),
            (Document((Text("text alone"),)),),
            (Document((good,)),),
            (Document((good, Text("an <image> mark"))), Document((good, Text("none")))),
            (Document((Text("a mark <image>"),)),),
        )
    )
    account = convert(reader, tmp_path, Options(check_images=True))
    assert account.adds_up and account.samples == account.documents_kept == 3
    assert account.documents_dropped == {NO_IMAGES: 1, NO_TEXT: 1, IMAGE_MARK: 1}
    assert account.images_read == 5 and account.images_kept == 2
    assert account.images_dropped == {"no image file": 2, NO_TEXT: 1}
    assert account.examples["no image file"][0].startswith("record 0: page.jpg: ")
    shards = open_shards(tmp_path)
    assert [each for each in shards[0].segments if isinstance(each, Text)] == [Text("one"), Text(" two"), Text("three")]
    assert [shards[n].key for n in range(3)] == ["00000-0000000", "00000-0000002", "00000-0000004"]
    bounded = convert(reader, tmp_path / "bounded", Options(max_edge=20))
    assert bounded == account
    assert max(PilImage.open(io.BytesIO(open_shards(tmp_path / "bounded")[0].media[0].data)).size) == 20  # type: ignore[union-attr]


def test_without_looking_images_keep_their_bytes(tmp_path: Path) -> None:
    """Catches images that are decoded, or changed, though nobody asked."""
    image = Image(b"not even an image", "a.jpg")
    assert convert(GivenReader(((Document((image, Text("a"))),),)), tmp_path).images_kept == 1
    assert open_shards(tmp_path)[0].media[0].data == image.data  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "options, said",
    [
        (Options(max_edge=0), "max_edge=0"),
        (Options(quality=100), "quality=100"),
        (Options(max_tokens=3), "max_tokens=3"),
    ],
)
def test_impossible_options_are_named(tmp_path: Path, options: Options, said: str) -> None:
    """Catches numbers that only fail hours later."""
    with pytest.raises(FlamingoError, match=said):
        convert(MadeReader(), tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


def test_small_files_are_taken_together_and_large_ones_in_stripes(tmp_path: Path) -> None:
    """Catches a shard for each of many small files, and one process for one large file."""
    from data_shards.convert import _units

    paths = [tmp_path / f"{n}.jsonl" for n in range(5)]
    for path, size in zip(paths, (10, 10, 3 << 20, 10, 10), strict=True):
        path.write_bytes(bytes(size))
    units = _units([str(path) for path in paths], None)
    assert [(unit.first, unit.last, unit.stripe, unit.stripes) for unit in units] == [
        (0, 2, 0, 1), (2, 3, 0, 3), (2, 3, 1, 3), (2, 3, 2, 3), (3, 5, 0, 1)
    ]  # fmt: skip
    assert len(_units([str(paths[2])], 2)) == 2


def test_the_plan_tells_what_was_converted(tmp_path: Path) -> None:
    """Catches shards of which nobody knows how they were made."""
    converted(tmp_path)
    plan = json.loads((tmp_path / "conversion.json").read_text())
    assert plan["reader"]["reader"] == "MadeReader" and plan["options"]["max_media"] == 2
