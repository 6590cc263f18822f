"""Every fault that a shard may hold: counted with shard, key and reason, replaced, and nothing else is lost."""

from __future__ import annotations

import errno
import json
import os
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PilImage

from data_shards.faults import (
    BAD_JSON,
    BAD_MATRIX,
    DUPLICATE_KEY,
    IMAGE_MARK,
    LINK,
    MISSING_IMAGE,
    NO_DOCUMENT,
    NO_IMAGE,
    NOT_A_TAR,
    NOTHING_SUPERVISED,
    TOO_LARGE,
    TRUNCATED,
    UNREADABLE,
    UNSAFE_NAME,
    UNUSABLE,
    Fault,
    described,
)
from data_shards.indexing import index_folder
from data_shards.loader import MicroBatches, Source, rank_batches
from data_shards.order import Place, ShuffledOrder
from data_shards.sequences import Sequences
from data_shards.shards import offsets_path, open_shards, write_shards
from flamingo import Document, FlamingoProcessor, Image, Text
from flamingo.images import resize
from flamingo.processing import Encoding
from tests.data_shards.planted import Member, good, huge_png, mmc4, png, symlink, write_tar, written
from tests.flamingo.test_images import COLOURS, KINDS, STORED, exif, save
from tests.tiny import document, tiny_flamingo


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> FlamingoProcessor:
    """Of a tiny Flamingo over llama."""
    return tiny_flamingo(tmp_path_factory.mktemp("tiny"))[1]


def hard_link(name: str, target: str) -> Member:
    """A member that is another one's content."""
    member, header = symlink(name, target)
    assert isinstance(header, tarfile.TarInfo)
    header.type = tarfile.LNKTYPE
    return member, header


def planted(folder: Path) -> tuple[dict[tuple[str, str], str], set[str]]:
    """Shards of all faults among clean samples: (shard, key) → reason, and the keys of the clean ones."""
    shown = {"image": "0.png"}, {"text": "a cat"}
    ours: dict[str, tuple[list[Member], str]] = {
        "html": (written("html", *shown, _0jpg=b"", _0png=b"<!DOCTYPE html><p>404"), NO_IMAGE),
        "empty": (written("empty", *shown, _0png=b""), NO_IMAGE),
        "huge": (written("huge", *shown, _0png=huge_png()), TOO_LARGE),
        "absent": (written("absent", *shown), MISSING_IMAGE),
        "json": ([("json.json", b'{"segments": [')], BAD_JSON),
        "latin": ([("latin.json", b'{"segments": "\xe9"}')], BAD_JSON),
        "list": ([("list.json", b"[1, 2]")], NO_DOCUMENT),
        "still": (written("still", {"video": []}, {"text": "no frame"}), NO_DOCUMENT),
        "bare": ([("bare.0.png", b"x")], NO_DOCUMENT),
        "silent": (written("silent", {"text": "nothing counts", "supervised": False}), NOTHING_SUPERVISED),
        "mark": (written("mark", shown[0], {"text": "an <image> here"}, _0png=png()), IMAGE_MARK),
        "nothing": (written("nothing"), NOTHING_SUPERVISED),
        "twice": (good("twice") + good("twice"), DUPLICATE_KEY),
        "../../escaped": (good("../../escaped"), UNSAFE_NAME),
        "/absolute": (good("/absolute"), UNSAFE_NAME),
        "surrogate": ([("surrogate.json", b'{"segments": [{"text": "\\ud800"}]}')], NO_DOCUMENT),
        "link": ([symlink("link.0.png", "/etc/passwd"), *written("link", *shown)], LINK),
        "hard": ([hard_link("hard.0.png", "c0.0.png"), *written("hard", *shown)], LINK),
    }
    clean = [f"c{n}" for n in range(40)]
    members = [member for key in clean[:4] for member in good(key, int(key[1:]))]
    for number, (planted_members, _) in enumerate(ours.values()):
        members += [*planted_members, *good(clean[4 + number], number)]
    write_tar(folder / "a.tar", members)
    again = [*good("c34"), *good("again"), *good("c35"), *good("again", 1), *good("c36")]
    write_tar(folder / "b.tar", again)
    for name, keys in (("cut.tar", clean[22:30]), ("page.tar", clean[30:34])):
        write_tar(folder / name, [member for key in keys for member in good(key, int(key[1:]))])
    index_folder(folder, "documents")
    cut, offsets = folder / "cut.tar", open_shards(folder).shards[2].offsets
    cut.write_bytes(cut.read_bytes()[: int(offsets[6]) + 600])
    (folder / "page.tar").write_bytes(b"<html>" * 20)
    faults = {("a.tar", key): reason for key, (_, reason) in ours.items()}
    faults |= {("b.tar", "again"): DUPLICATE_KEY}
    faults |= {("cut.tar", f"#{number}"): TRUNCATED for number in (6, 7)}
    faults |= {("page.tar", f"#{number}"): NOT_A_TAR for number in range(4)}
    return faults, {*clean[: 4 + len(ours)], *clean[22:28], *clean[34:37], "again"}


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[str, str], str], set[str]]:
    """The planted folder, its faults and its clean keys."""
    folder = tmp_path_factory.mktemp("planted")
    return folder, *planted(folder)


def batches_of(folder: Path, processor: FlamingoProcessor, micro_batch: int = 4) -> MicroBatches:
    sequences = Sequences(processor, max_tokens=60, max_media=2)
    return MicroBatches([Source("planted", open_shards(folder))], sequences, micro_batch=micro_batch, seed=3)


def test_every_fault_is_counted_once_an_epoch_and_every_clean_sample_used(
    bad: tuple[Path, dict[tuple[str, str], str], set[str]],
    processor: FlamingoProcessor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches a fault that ends the run or makes it wait, that is not named, or that takes clean samples with it."""
    folder, expected, clean = bad
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("waits"))
    data = batches_of(folder, processor, micro_batch=1)
    samples = len(data.sources[0].shards)
    assert samples == len(expected) + len(clean)
    for epoch in range(2):
        batches = [data[number] for number in range(epoch * samples, (epoch + 1) * samples)]
        faults = [fault for batch in batches for fault in batch["faults"]]
        assert {(Path(fault.shard).name, fault.key): fault.reason for fault in faults} == expected
        assert len(faults) == len(expected)
        assert {(Path(fault.shard).parent, fault.source) for fault in faults} == {(folder, "planted")}
        used = Counter(key for batch in batches for key in batch["keys"])
        assert set(used) == clean and used.total() == samples
        own = Counter(key for batch in batches if not batch["faults"] for key in batch["keys"])
        assert own == dict.fromkeys(clean, 1)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_replacements_do_not_depend_on_ranks_and_workers(
    bad: tuple[Path, dict[tuple[str, str], str], set[str]], processor: FlamingoProcessor
) -> None:
    """Catches a replacement that depends on what a process has read before."""
    data = batches_of(bad[0], processor)
    seen = []
    for world, workers in ((1, 0), (2, 2), (4, 0)):
        ranks = [rank_batches(data, batch=16, start_step=1, steps=4, rank=rank, world=world, workers=workers)
                 for rank in range(world)]  # fmt: skip
        batches = [batch for group in zip(*ranks, strict=True) for batch in group]
        seen.append([(batch["keys"], batch["faults"], batch["input_ids"].tolist()) for batch in batches])
    assert seen[0] == seen[1] == seen[2]
    assert sum(len(faults) for _, faults, _ in seen[0]) > 20


def test_bad_similarity_matrices_of_foreign_shards(tmp_path: Path, processor: FlamingoProcessor) -> None:
    """Catches NaN and mis-shaped matrices that are matched all the same, or end the run."""
    nan, inf = [[float("nan"), 0.3], [0.3, 0.3]], [[float("inf"), 0.3], [0.3, 0.3]]
    wrong = {"nan": nan, "infinite": inf, "short": [[0.3, 0.3]], "ragged": [[0.3], [0.3, 0.3]], "text": "none"}
    members = [member for key, matrix in wrong.items() for member in mmc4(key, matrix=matrix)]
    members += [member for number in range(5) for member in mmc4(f"good{number}")]
    write_tar(tmp_path / "m.tar", members)
    index_folder(tmp_path, "mmc4")
    data = batches_of(tmp_path, processor, micro_batch=1)
    faults = [fault for number in range(10) for fault in data[number]["faults"]]
    assert {fault.key: fault.reason for fault in faults} == dict.fromkeys(wrong, BAD_MATRIX)
    assert {key for number in range(10) for key in data[number]["keys"]} == {f"good{number}" for number in range(5)}


def test_clean_data_draw_what_they_drew_before(tmp_path: Path, processor: FlamingoProcessor) -> None:
    """Catches a fault that changes what is drawn for other positions."""
    for name in ("clean", "planted"):
        write_shards((document(n, 3, key=f"d{n}") for n in range(12)), tmp_path / name)
    shard = tmp_path / "planted" / "shard-00000.tar"
    shard.write_bytes(shard.read_bytes().replace(b'"segments"', b'"segment "', 1))
    clean, planted = (batches_of(tmp_path / name, processor, micro_batch=1) for name in ("clean", "planted"))
    pairs = [(clean[number], planted[number]) for number in range(36)]
    same = [one["input_ids"].tolist() == other["input_ids"].tolist() for one, other in pairs]
    assert same == [not other["faults"] for _, other in pairs] and same.count(False) == 3


@pytest.mark.parametrize("what", ["offsets", "tar", "disk"])
def test_what_the_system_does_not_read_is_replaced(
    tmp_path: Path, processor: FlamingoProcessor, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Catches a file that is lost, or a sector of a disk, that ends a run, now and whenever it is resumed."""
    write_shards((document(n, 1, key=f"d{n}") for n in range(12)), tmp_path, max_samples=6)
    data, shard = batches_of(tmp_path, processor, micro_batch=1), tmp_path / "shard-00001.tar"
    pread = os.pread

    def broken(descriptor: int, size: int, place: int) -> bytes:
        if Path(f"/proc/self/fd/{descriptor}").readlink() == shard:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(descriptor, size, place)

    if what == "disk":
        monkeypatch.setattr(os, "pread", broken)
    else:
        (shard if what == "tar" else offsets_path(shard)).unlink()
    batches = [data[number] for number in range(12)]
    faults = [fault for batch in batches for fault in batch["faults"]]
    assert {(fault.shard, fault.key, fault.reason) for fault in faults} == {
        (str(shard), f"#{number}", UNREADABLE) for number in range(6)
    }
    assert {key for batch in batches for key in batch["keys"]} == {f"d{n}" for n in range(6)}


def test_a_damaged_shard_alone_in_its_block_is_replaced(tmp_path: Path, processor: FlamingoProcessor) -> None:
    """Catches a run that ends where all neighbours of a sample are in the one damaged shard."""
    write_shards((Document((Text("x"),), f"d{n}") for n in range(160)), tmp_path, max_samples=150)
    (tmp_path / "shard-00000.tar").write_bytes(b"<html>")
    data = batches_of(tmp_path, processor, micro_batch=1)
    [order] = data.orders = [ShuffledOrder(data.sources[0].shards.sizes, 0, block=1)]
    position = order.position(Place(0, 0, 0)) // 64 * 64 + (64 if order(0).shard else 0)
    assert {order(n).shard for n in range(position, position + 64)} == {0}
    first, again = data[position], data[position]
    assert first["keys"] == again["keys"] and first["keys"][0] in {f"d{n}" for n in range(150, 160)}
    assert [fault.reason for fault in first["faults"]] == [NOT_A_TAR]


def test_an_error_that_nobody_foresaw_is_a_fault(tmp_path: Path, processor: FlamingoProcessor) -> None:
    """Catches one odd sample of millions that ends a run for good: resumed, it would meet it again."""

    class Odd(Sequences):
        def __call__(self, document: Document, generator: np.random.Generator) -> Encoding:
            if document.key == "d3":
                raise KeyError("odd")
            return super().__call__(document, generator)

    write_shards((document(n, 1, key=f"d{n}") for n in range(6)), tmp_path)
    data = MicroBatches([Source("s", open_shards(tmp_path))], Odd(processor), micro_batch=6, seed=0)
    [fault] = data[0]["faults"]
    assert (fault.key, fault.reason, fault.detail) == ("d3", UNUSABLE, "KeyError: 'odd'")


def test_odd_files_are_used_with_the_right_pixels(tmp_path: Path, processor: FlamingoProcessor) -> None:
    """Catches images of any kind that are replaced, or whose colours change on the way through shards and loader."""
    kinds = {f"{number:02d}": case for number, case in enumerate(KINDS.values())}
    kinds |= {
        f"turned{value}": (
            lambda stored=stored, value=value: save(PilImage.fromarray(stored.copy()), "PNG", exif=exif(value)),
            COLOURS,
            0,
        )
        for value, stored in STORED.items()
    }
    odd = ["JPG", "jpeg", "x", "bin", "html", "png", ""]
    documents = [
        Document((Image(make(), f"a.{odd[number % len(odd)]}"), Text("x")), key)
        for number, (key, (make, _, _)) in enumerate(kinds.items())
    ]
    texts = [Document((Text("a short text"),), "short"), Document((Text("a very long text. " * 9000),), "long")]
    write_shards([*documents, *texts], tmp_path, max_samples=9)
    data = batches_of(tmp_path, processor, micro_batch=1)
    settings, seen = processor.pixel_settings, set()
    for number in range(len(data.sources[0].shards)):
        batch = data[number]
        [key] = batch["keys"]
        seen.add(key)
        assert not batch["faults"]
        assert batch["input_ids"].shape[1] == 60 if key == "long" else batch["input_ids"].shape[1] < 60
        if key in kinds:
            _, expected, tolerance = kinds[key]
            pixels = torch.from_numpy(np.asarray(expected, np.float32).round().astype(np.uint8)).permute(2, 0, 1)
            shown = batch["pixel_values"][0, 0].float()
            assert (shown - resize(pixels[None], settings)[0]).abs().max() <= 2 * tolerance + 0.01, key
    assert seen == {*kinds, "short", "long"}


def test_reasons_are_described_by_frequency() -> None:
    """Catches a message of a hundred reasons, or without examples."""
    faults = [Fault("s.tar", f"k{n}", f"reason {n % 12}") for n in range(100)]
    text = described(Counter(fault.reason for fault in faults), faults)
    assert text.startswith("reason 0: 9 (k0 of s.tar, k12 of s.tar, k24 of s.tar); reason 1: 9 (")
    assert text.count("; ") == 9 and "\n" not in text and json.dumps(text)
