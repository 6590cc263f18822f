"""Every fault that a shard may hold: counted with shard, key and reason, replaced, and nothing else is lost."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from data_shards.faults import (
    BAD_JSON,
    BAD_MATRIX,
    DUPLICATE_KEY,
    LINK,
    MISSING_IMAGE,
    NO_DOCUMENT,
    NO_IMAGE,
    NOT_A_TAR,
    NOTHING_SUPERVISED,
    TOO_LARGE,
    TRUNCATED,
    UNSAFE_NAME,
    Fault,
    described,
)
from data_shards.indexing import index_folder
from data_shards.loader import MicroBatches, Source, rank_batches
from data_shards.sequences import Sequences
from data_shards.shards import open_shards, write_shards
from flamingo import FlamingoProcessor
from tests.data_shards.planted import Member, good, huge_png, mmc4, symlink, write_tar, written
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
        "bare": ([("bare.0.png", b"x")], NO_DOCUMENT),
        "silent": (written("silent", {"text": "nothing counts", "supervised": False}), NOTHING_SUPERVISED),
        "nothing": (written("nothing"), NOTHING_SUPERVISED),
        "twice": (good("twice") + good("twice"), DUPLICATE_KEY),
        "../../escaped": (good("../../escaped"), UNSAFE_NAME),
        "/absolute": (good("/absolute"), UNSAFE_NAME),
        "link": ([symlink("link.0.png", "/etc/passwd"), *written("link", *shown)], LINK),
        "hard": ([hard_link("hard.0.png", "c0.0.png"), *written("hard", *shown)], LINK),
    }
    clean = [f"c{n}" for n in range(40)]
    members = [member for key in clean[:4] for member in good(key, int(key[1:]))]
    for number, (planted_members, _) in enumerate(ours.values()):
        members += [*planted_members, *good(clean[4 + number], number)]
    write_tar(folder / "a.tar", members)
    again = [*good("c19"), *good("again"), *good("c20"), *good("again", 1), *good("c21")]
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
    return faults, {*clean[:22], *clean[22:28], "again"}


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[str, str], str], set[str]]:
    """The planted folder, its faults and its clean keys."""
    folder = tmp_path_factory.mktemp("planted")
    return folder, *planted(folder)


def batches_of(folder: Path, processor: FlamingoProcessor, micro_batch: int = 4) -> MicroBatches:
    sequences = Sequences(processor, max_tokens=60, max_media=2)
    return MicroBatches([Source("planted", open_shards(folder))], sequences, micro_batch=micro_batch, seed=3)


def test_every_fault_is_counted_once_an_epoch_and_every_clean_sample_used(
    bad: tuple[Path, dict[tuple[str, str], str], set[str]], processor: FlamingoProcessor
) -> None:
    """Catches a fault that ends the run, that is not named, or that takes clean samples with it."""
    folder, expected, clean = bad
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


def test_reasons_are_described_by_frequency() -> None:
    """Catches a message of a hundred reasons, or without examples."""
    faults = [Fault("s.tar", f"k{n}", f"reason {n % 12}") for n in range(100)]
    text = described(Counter(fault.reason for fault in faults), faults)
    assert text.startswith("reason 0: 9 (k0 of s.tar, k12 of s.tar, k24 of s.tar); reason 1: 9 (")
    assert text.count("; ") == 9 and "\n" not in text and json.dumps(text)
