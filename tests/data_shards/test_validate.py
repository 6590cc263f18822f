"""Validation: every planted fault is found, by shard, key and reason, and nothing else."""

from __future__ import annotations

import io
import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import data_shards.report
import data_shards.validate
from data_shards.faults import (
    BAD_INDEX,
    BAD_JSON,
    BAD_MATRIX,
    DUPLICATE_KEY,
    EMPTY,
    IMAGE_MARK,
    LINK,
    MISSING_IMAGE,
    MISSING_SHARD,
    NO_DOCUMENT,
    NO_IMAGE,
    NO_INDEX,
    NOT_A_TAR,
    NOTHING_SUPERVISED,
    OVERSIZED,
    STALE_INDEX,
    TOO_LARGE,
    TRUNCATED,
    UNLISTED_SHARD,
    UNSAFE_NAME,
    WRONG_CHECKSUM,
    SampleError,
)
from data_shards.indexing import index_folder
from data_shards.parallel import over_files
from data_shards.report import Report
from data_shards.shards import INDEX, offsets_path, open_shards, write_shards
from data_shards.validate import validate
from flamingo import Document, FlamingoError, Image, Text
from flamingo.images import Limits
from tests.data_shards.planted import good, huge_png, mmc4, pair, png, symlink, write_tar, written
from tests.tiny import document, tiny_flamingo


def found(report: Report) -> set[tuple[str, str, str]]:
    """The faults, each of which must be there once."""
    faults = [(fault.shard, fault.key, fault.reason) for fault in report.faults]
    assert len(set(faults)) == len(faults) == report.counts.total()
    return set(faults)


def plant(folder: Path) -> set[tuple[str, str, str]]:
    """A folder of tars of ours with faults of every kind that a sample can have; returns what they are."""
    image, text = {"image": "0.png"}, {"text": "a cat"}
    unsupervised = {"text": "a cat", "supervised": False}
    write_tar(
        folder / "a.tar",
        [
            *good("sound0", 0),
            ("badjson.json", b'{"segments": ['),
            *written("html", image, text, _0png=b"<html>404</html>"),
            *written("empty", image, text, _0png=b""),
            *written("huge", image, text, _0png=huge_png()),
            *written("two", image, {"image": "1.png"}, text, _0png=png(1), _1png=b"x"),
            *written("gone", image, text),
            *written("silent", image, unsupervised, _0png=png(2)),
            *written("nothing", {"text": ""}),
            *written("mark", image, {"text": "an <image> in a text"}, _0png=png(3)),
            *written("nodocument", {"sound": "0.wav"}),
            ("deep.json", b"[" * 100_000),
            ("list.json", b"[1, 2]"),
            ("surrogate.json", b'{"segments": [{"text": "\\ud800"}]}'),
            ("image.png", png(4)),
            *written("textonly", text),
            *good("again", 5),
            *good("sound1", 6),
            *good("again", 7),
            *good("../up", 8),
            symlink("link.json", "/etc/hostname"),
            ("README", b"no sample"),
        ],
    )
    whole = write_tar(folder / "b.tar", [*good("sound2"), *good("sound0"), *good("cut")]).read_bytes()
    (folder / "b.tar").write_bytes(whole[: whole.index(b"cut.json") + 550])
    (folder / "c.tar").write_bytes(b"<html>not found</html>")
    write_tar(folder / "d.tar", [*good("sound3"), *good("again")])
    a = [
        ("badjson", BAD_JSON), ("html", NO_IMAGE), ("empty", NO_IMAGE), ("huge", TOO_LARGE), ("two", NO_IMAGE),
        ("gone", MISSING_IMAGE), ("silent", NOTHING_SUPERVISED), ("nothing", EMPTY), ("mark", IMAGE_MARK),
        ("nodocument", NO_DOCUMENT), ("deep", BAD_JSON), ("list", NO_DOCUMENT), ("image", NO_DOCUMENT),
        ("surrogate", NO_DOCUMENT),
        ("again", DUPLICATE_KEY), ("../up", UNSAFE_NAME), ("link", LINK),
    ]  # fmt: skip
    return {
        *(("a.tar", key, reason) for key, reason in a),
        ("b.tar", "cut", TRUNCATED),
        ("b.tar", "sound0", DUPLICATE_KEY),
        ("c.tar", "", NOT_A_TAR),
        ("d.tar", "again", DUPLICATE_KEY),
    }


def test_every_planted_fault_is_found_and_no_other(tmp_path: Path) -> None:
    """Catches a fault that is missed, is given to another sample, is told twice, or ends the validation."""
    planted = plant(tmp_path)
    report = validate(tmp_path)
    assert found(report) == planted | {(INDEX, "", NO_INDEX)}
    assert (report.shards, report.faulty_shards) == (4, 4)
    assert (report.samples, report.faulty_samples) == (21 + 2 + 0 + 2, 17 + 1 + 1)
    # of the sound ones, and of those whose fault is not in their members or their JSON
    assert (report.images, report.faulty_images) == (3 + 7 + 2 + 2, 4)
    assert (report.text_only, report.other_members) == (1, 1)
    index_folder(tmp_path)
    assert found(validate(tmp_path)) == planted


def test_what_cannot_be_read_is_what_is_reported(tmp_path: Path) -> None:
    """Catches a sample that training replaces though validation passed it, or the other way round."""
    plant(tmp_path)
    index_folder(tmp_path)
    readable, refused = set(), set()
    for shard in open_shards(tmp_path).shards:
        for number in range(shard.samples):
            try:
                readable.add((shard.file, shard.read(number).key))
            except SampleError as error:
                refused.add((shard.file, error.key, error.reason))
    reported = found(validate(tmp_path))
    assert len(refused) == 10 and refused <= reported
    in_its_content = {NO_IMAGE, TOO_LARGE, NOTHING_SUPERVISED, EMPTY, IMAGE_MARK}
    across_shards = {("b.tar", "sound0", DUPLICATE_KEY), ("d.tar", "again", DUPLICATE_KEY)}
    not_read = {fault for fault in reported if fault[2] not in {*in_its_content, TRUNCATED, NOT_A_TAR}} - across_shards
    assert not_read == refused


def test_a_link_beside_a_sample_spoils_it(tmp_path: Path) -> None:
    """Catches a sample passed as sound though its bytes, as they are read by offsets, hold somebody else's link."""
    write_tar(tmp_path / "0.tar", [*pair("a"), symlink("README", "/etc/hostname"), *pair("b")])
    assert found(validate(tmp_path)) == {("0.tar", "", LINK), ("0.tar", "a", LINK)}


def test_processes_find_the_same(tmp_path: Path) -> None:
    """Catches results that depend on which process looks at which shard."""
    plant(tmp_path)
    assert validate(tmp_path, processes=2).as_dict() == validate(tmp_path, processes=1).as_dict()


def test_sound_sets_have_no_fault(tmp_path: Path) -> None:
    """Catches false alarms: on documents with videos and odd keys, pairs, MMC4, and sets of one empty shard."""
    for folder in ("ours", "pairs", "mmc4", "empty"):
        (tmp_path / folder).mkdir()
    write_shards([document(n, n % 4) for n in range(9)], tmp_path / "ours", max_samples=4)
    write_tar(tmp_path / "pairs" / "0.tar", [m for n in range(3) for m in pair(f"dir/é{n}", n)])
    write_tar(tmp_path / "mmc4" / "0.tar", [m for n in range(3) for m in mmc4(f"{n}")])
    write_tar(tmp_path / "empty" / "0.tar", [])
    reports = {folder: validate(tmp_path / folder) for folder in ("ours", "pairs", "mmc4")}
    assert all(report.ok and not report.faults for report in reports.values())
    assert {name: (r.samples_form, r.shards, r.samples, r.images) for name, r in reports.items()} == {
        "ours": ("documents", 3, 9, sum(n % 4 for n in range(9))),
        "pairs": ("pairs", 1, 3, 3),
        "mmc4": ("mmc4", 1, 3, 6),
    }
    assert validate(tmp_path / "empty").counts == {NO_INDEX: 1}


def test_similarity_matrices_are_checked(tmp_path: Path) -> None:
    """Catches a matrix of NaN or of another shape: an assignment from it would be noise, or an error in training."""
    nan = float("nan")
    write_tar(
        tmp_path / "0.tar",
        [
            *mmc4("sound"),
            *mmc4("nan", matrix=[[nan, 0.3], [0.3, 0.4]]),
            *mmc4("infinite", matrix=[[0.1, 0.3], [0.3, float("inf")]]),
            *mmc4("row", matrix=[[0.1, 0.3]]),
            *mmc4("column", matrix=[[0.1], [0.3]]),
            *mmc4("ragged", matrix=[[0.1, 0.3], [0.3]]),
            *mmc4("flat", matrix=[0.1, 0.3]),
            *mmc4("words", matrix=[["a", "b"], [0.1, 0.2]]),
        ],
    )
    report = validate(tmp_path)
    bad = ("nan", "infinite", "row", "column", "ragged", "flat", "words")
    assert found(report) == {("0.tar", key, BAD_MATRIX) for key in bad}


def damage_index(folder: Path, change: str) -> None:
    path, shard = folder / INDEX, folder / "shard-00001.tar"
    content: dict[str, Any] = json.loads(path.read_text())
    entry = content["shards"][1]
    match change:
        case "checksum":
            shard.write_bytes(shard.read_bytes().replace(b"made", b"MADE", 1))
        case "longer":
            shard.write_bytes(shard.read_bytes() + bytes(512))
        case "samples":
            entry["samples"] += 1
        case "offsets":
            offsets = np.load(offsets_path(shard))
            offsets[1] += 512
            np.save(offsets_path(shard), offsets)
        case "no offsets":
            offsets_path(shard).unlink()
        case "missing":
            shard.unlink()
        case "unlisted":
            del content["shards"][1]
        case "not json":
            content = {}
        case "twice":
            content["shards"].append(entry)
        case "elsewhere":
            entry["file"] = "../other/shard-00001.tar"
    if change != "not json":
        path.write_text(json.dumps(content))
    else:
        path.write_text("{")


@pytest.mark.parametrize(
    ("change", "shard", "reason"),
    [
        ("checksum", "shard-00001.tar", WRONG_CHECKSUM),
        ("longer", "shard-00001.tar", STALE_INDEX),
        ("samples", "shard-00001.tar", STALE_INDEX),
        ("offsets", "shard-00001.tar", STALE_INDEX),
        ("no offsets", "shard-00001.tar", STALE_INDEX),
        ("missing", "shard-00001.tar", MISSING_SHARD),
        ("unlisted", "shard-00001.tar", UNLISTED_SHARD),
        ("not json", INDEX, BAD_INDEX),
        ("twice", INDEX, BAD_INDEX),
        ("elsewhere", INDEX, BAD_INDEX),
    ],
)
def test_an_index_that_does_not_fit_is_found(tmp_path: Path, change: str, shard: str, reason: str) -> None:
    """Catches shards that were changed, exchanged or lost after they were indexed."""
    texts = (Document((Text("made by hand"),), f"d{n}") for n in range(6))
    write_shards(texts, tmp_path, max_samples=2)
    assert validate(tmp_path).ok
    damage_index(tmp_path, change)
    assert found(validate(tmp_path)) == {(shard, "", reason)}


def test_a_model_may_set_other_limits(tmp_path: Path) -> None:
    """Catches settings that do not reach the decoder, which would pass images that training refuses."""
    write_shards([document(1, 1, key="a")], tmp_path / "set")
    _, processor = tiny_flamingo(tmp_path / "model")
    for pixels, reasons in ((16 * 16, set()), (16 * 16 - 1, {("shard-00000.tar", "a", TOO_LARGE)})):
        processor.pixel_settings = replace(processor.pixel_settings, limits=Limits(pixels=pixels))
        assert found(validate(tmp_path / "set", processor=processor)) == reasons


def test_too_large_a_sample_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches memory that is bounded by what a tar holds instead of by us."""
    write_tar(tmp_path / "0.tar", [*pair("a"), ("b.jpg", bytes(100_000)), ("b.txt", b"x")])
    index_folder(tmp_path)
    monkeypatch.setattr("data_shards.members.LARGEST_SAMPLE", 50_000)
    assert found(validate(tmp_path)) == {("0.tar", "b", OVERSIZED)}
    opened = open_shards(tmp_path)
    assert opened[0].key == "a"
    with pytest.raises(SampleError, match=OVERSIZED):
        opened[1]


def test_a_report_is_a_table_and_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches names of foreign files that steer the terminal or are taken for markup, and JSON that loses faults."""
    write_tar(tmp_path / "0.tar", [("[red]\x1b[2J\udcff.json", b"{"), ("b.json", b"{"), *pair("k")])
    monkeypatch.setattr(data_shards.report, "LISTED", 2)
    report = validate(tmp_path, samples="documents")
    screen = Console(file=io.StringIO(), width=120)
    report.print(screen)
    shown = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "[red]\\x1b[2J\\udcff" in shown and BAD_JSON in shown and "\x1b" not in shown
    assert "1 shard (1 with faults), 3 samples (3 with faults), 0 images" in shown
    content = json.loads(json.dumps(report.as_dict()))
    assert content["counts"] == {BAD_JSON: 2, NO_INDEX: 1, NO_DOCUMENT: 1}
    assert len(content["faults"]) == content["faults_not_listed"] == 2 and content["ok"] is False


def test_a_process_that_dies_costs_one_shard(tmp_path: Path) -> None:
    """Catches a decoder that crashes, or runs out of memory, taking the whole report with it."""
    paths = [tmp_path / name for name in "abcd"]
    results = list(over_files(dies_at_b, paths, processes=2, title="test"))
    assert results == ["a", None, "c", "d"]


def dies_at_b(path: Path) -> str:
    if path.name == "b":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.1)  # so that the others are still in work
    return path.name


def test_a_folder_without_tars_is_an_error(tmp_path: Path) -> None:
    """Catches a mistyped folder that would be reported as sound."""
    with pytest.raises(FlamingoError, match=r"expected \*\.tar files"):
        validate(tmp_path)


def test_real_photographs_are_sound(tmp_path: Path, real_data: Path) -> None:
    """Catches false alarms on real JPEG files."""
    files = sorted((real_data / "coco_photos" / "images").iterdir())
    write_shards([Document((Image(f.read_bytes(), f.name), Text("a photo")), f.stem) for f in files], tmp_path)
    report = validate(tmp_path)
    assert report.ok and report.images == len(files) == len(open_shards(tmp_path))
