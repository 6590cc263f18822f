"""Foreign tars: where their samples are, and what their headers say is wrong."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards.faults import APART, DUPLICATE_KEY, LINK, NOT_A_TAR, TRAILING, TRUNCATED, UNSAFE_NAME
from data_shards.indexing import detect, index_folder, scan
from data_shards.shards import INDEX, SAMPLE_FORMATS, offsets_path, open_shards, write_shards
from flamingo import FlamingoError, Image, Text
from tests.data_shards.planted import good, mmc4, pair, picture, symlink, write_tar
from tests.tiny import document


def faults(path: Path) -> list[tuple[str, str]]:
    return [(fault.key, fault.reason) for fault in scan(path).faults]


def members(path: Path) -> list[dict[str, bytes]]:
    """The members of each sample, read by the scanned byte ranges."""
    with path.open("rb") as file:
        return [span.read(file) for span in scan(path).spans]


def test_our_own_shards_are_scanned_as_they_were_written(tmp_path: Path) -> None:
    """Catches byte ranges of another convention than the writer's: every shard of ours would look stale."""
    write_shards([document(n, n % 3, key=f"{'long' * 40 if n == 3 else ''}{n}") for n in range(6)], tmp_path)
    path = tmp_path / "shard-00000.tar"
    contents = scan(path)
    assert not contents.faults and len(contents.spans) == 6
    assert np.array_equal(contents.offsets, np.load(offsets_path(path)))


def test_samples_are_those_of_webdataset(tmp_path: Path) -> None:
    """Catches another key rule: directories, several dots, names that belong to no sample, suffixes in capitals."""
    names = [
        "a/x.jpg",
        "a/x.txt",
        "b/x.JPG",
        "b/x.Txt",
        "LICENSE",
        "k.seg.png",
        "k.cls",
        ".hidden.jpg",
        "__meta__/a.txt",
    ]
    path = write_tar(tmp_path / "x.tar", [(name, name.encode()) for name in names])
    theirs = [
        (sample["__key__"], {name: data for name, data in sample.items() if not name.startswith("__")})
        for sample in webdataset.WebDataset(str(path), shardshuffle=False)
    ]
    assert list(zip([span.key for span in scan(path).spans], members(path), strict=True)) == theirs
    assert len(theirs) == 3 and scan(path).other_members == 3 and not scan(path).faults


def test_index_of_pairs_opens(tmp_path: Path) -> None:
    """Catches an index of img2dataset's tars that `open_shards` does not read, or reads shifted."""
    write_tar(tmp_path / "00000.tar", [m for n in range(3) for m in pair(f"00000{n}", n, f"caption {n}")])
    write_tar(tmp_path / "00001.tar", [m for n in range(3, 5) for m in pair(f"00001{n}", n, f"caption {n}")])
    report = index_folder(tmp_path)
    assert (report.ok, report.samples_form, report.shards, report.samples, report.images) == (True, "pairs", 2, 5, None)
    opened = open_shards(tmp_path)
    for number in range(5):
        read = opened[number]
        (image,), texts = read.media, [each.text for each in read.segments if isinstance(each, Text)]
        assert isinstance(image, Image) and image.data == picture(number, 16, suffix="jpg").data
        assert texts == [f"caption {number}"]


def test_index_of_mmc4_opens(tmp_path: Path) -> None:
    """Catches OpenFlamingo's MMC4 tars being taken for ours or for pairs."""
    write_tar(tmp_path / "a.tar", [m for n in range(4) for m in mmc4(f"doc{n}")])
    report = index_folder(tmp_path)
    assert (report.ok, report.samples_form, report.samples) == (True, "mmc4", 4)
    assert [each.data for each in open_shards(tmp_path)[3].media if isinstance(each, Image)] == [
        picture(seed, 80).data for seed in range(2)
    ]


def test_index_of_ours_is_the_one_that_was_written(tmp_path: Path) -> None:
    """Catches an index made anew that differs from the first: a run could not be resumed."""
    write_shards([document(n, n % 3) for n in range(9)], tmp_path, max_samples=4)
    before = (tmp_path / INDEX).read_text()
    assert index_folder(tmp_path).ok
    assert (tmp_path / INDEX).read_text() == before


def test_a_truncated_tar_keeps_its_whole_samples(tmp_path: Path) -> None:
    """Catches whole samples being lost with the cut one, a cut one being indexed, or the cut passing in silence."""
    path = write_tar(tmp_path / "x.tar", [m for n in range(3) for m in pair(f"k{n}", n)])
    whole, spans = path.read_bytes(), scan(path).spans
    cuts = {
        "within data": spans[1].start + 700,
        "within the next header": spans[1].end - 1024 + 100,
        "before the end mark": spans[2].end,
        "in the last padding": spans[2].end - 100,
    }
    found = {}
    for name, size in cuts.items():
        path.write_bytes(whole[:size])
        found[name] = [(len(scan(path).spans), *faults(path))]
    assert found == {
        "within data": [(1, ("k1", TRUNCATED))],
        "within the next header": [(1, ("k1", TRUNCATED))],
        "before the end mark": [(3, ("", TRUNCATED))],
        "in the last padding": [(3, ("", TRUNCATED))],
    }
    path.write_bytes(whole[: cuts["within data"]])
    report = index_folder(tmp_path)
    assert (report.samples, report.counts) == (1, {TRUNCATED: 1})
    assert open_shards(tmp_path)[0].key == "k0"


def test_damage_in_the_middle_is_no_end(tmp_path: Path) -> None:
    """Catches tarfile's habit: a damaged header ends the archive without a word."""
    path = write_tar(tmp_path / "x.tar", [m for n in range(3) for m in good(f"k{n}", n)])
    data, start = bytearray(path.read_bytes()), scan(path).spans[1].start
    data[start + 10] ^= 1
    path.write_bytes(data)
    with tarfile.open(path) as tar:
        assert len(tar.getnames()) == 2
    assert [(key, reason) for key, reason in faults(path)] == [("k0", TRUNCATED)]


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"\x1f\x8b" + bytes(600), bytes(range(256)) * 10])
def test_what_is_no_tar_has_no_samples(tmp_path: Path, content: bytes) -> None:
    """Catches an error page saved as a shard ending the whole indexing, or counting as an empty tar."""
    write_tar(tmp_path / "a.tar", pair("k"))
    (tmp_path / "b.tar").write_bytes(content)
    (tmp_path / "c.tar").mkdir()
    report = index_folder(tmp_path)
    assert [(fault.shard, fault.reason) for fault in report.faults] == [("b.tar", NOT_A_TAR), ("c.tar", NOT_A_TAR)]
    assert (report.shards, report.faulty_shards, report.samples) == (3, 2, 1)
    assert open_shards(tmp_path).sizes == [1, 0]


def test_faults_that_headers_show(tmp_path: Path) -> None:
    """Catches duplicate keys, links, names that leave the folder, and scattered samples passing for sound."""
    path = write_tar(
        tmp_path / "x.tar",
        [
            *pair("a"),
            *pair("b"),
            *pair("a"),  # again
            *pair("c"), *pair("c"),  # twice in a row: one sample to WebDataset
            ("d.jpg", b"1"), ("e.jpg", b"2"), ("d.txt", b"3"), ("e.txt", b"4"),
            ("../up.txt", b"5"),
            ("/etc/abs.txt", b"6"),
            symlink("s.jpg", "/etc/hostname"),
        ],
    )  # fmt: skip
    assert sorted(faults(path)) == sorted(
        [
            ("a", DUPLICATE_KEY),
            ("c", DUPLICATE_KEY),
            ("d", APART),
            ("e", APART),
            ("../up", UNSAFE_NAME),
            ("/etc/abs", UNSAFE_NAME),
            ("s", LINK),
        ]
    )
    report = index_folder(tmp_path)
    assert report.samples == len(scan(path).spans) == 11 and report.faulty_samples == 9
    opened = open_shards(tmp_path)
    read = {}
    for number in range(len(opened)):
        try:
            read[number] = opened[number].key
        except FlamingoError:
            continue
    assert read == {0: "a", 1: "b"}, "every faulty sample fails when it is read, every sound one is read"


def test_data_after_the_end_are_reported(tmp_path: Path) -> None:
    """Catches `cat a.tar b.tar`: everything after the first end mark would be lost in silence."""
    first, second = (write_tar(tmp_path / name, pair(name[0])) for name in ("a.tar", "b.tar"))
    first.write_bytes(first.read_bytes() + second.read_bytes())
    assert faults(first) == [("", TRAILING)] and len(scan(first).spans) == 1


def test_the_form_is_told_or_asked_for(tmp_path: Path) -> None:
    """Catches a guess: samples of an unknown form indexed as pairs would all fail in training."""
    ours = write_tar(tmp_path / "ours.tar", good("k"))
    theirs = write_tar(tmp_path / "theirs.tar", [("a.png", b"x"), ("a.cls", b"1")])
    empty = write_tar(tmp_path / "empty.tar", [])
    assert [detect([ours]), detect([empty, ours]), detect([empty])] == ["documents"] * 3
    with pytest.raises(FlamingoError, match=r"'a' with members cls, png: expected documents, mmc4 or pairs"):
        detect([theirs])
    folder = tmp_path / "forced"
    folder.mkdir()
    theirs.rename(folder / "theirs.tar")
    index_folder(folder, "pairs")
    assert json.loads((folder / INDEX).read_text())["samples"] == "pairs"
    assert set(SAMPLE_FORMATS) == {"documents", "mmc4", "pairs"}


def test_a_folder_without_tars_is_an_error(tmp_path: Path) -> None:
    """Catches a mistyped folder that would be reported as sound."""
    with pytest.raises(FlamingoError, match="there is no such folder"):
        index_folder(tmp_path / "nowhere")
    with pytest.raises(FlamingoError, match=r"expected \*\.tar files"):
        index_folder(tmp_path)


@pytest.mark.timeout(30)
def test_a_pipe_is_no_tar(tmp_path: Path) -> None:
    """Catches a wait without end for somebody to write into a pipe named like a shard."""
    os.mkfifo(tmp_path / "a.tar")
    assert faults(tmp_path / "a.tar") == [("", NOT_A_TAR)]


def forged(kind: bytes = b"0", size: bytes = b"%011o\0" % 0, name: bytes = b"x.txt") -> bytes:
    """A header with a right checksum, whatever it says."""
    block = bytearray(name.ljust(124, b"\0") + size.ljust(12, b"\0") + bytes(12 + 8) + kind + bytes(100 + 255))
    block[148:156] = b"%06o\0 " % (sum(block) + 8 * 32)
    return bytes(block)


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "header",
    {
        "negative": forged(size=(-512).to_bytes(12, "big", signed=True)),
        "endless": forged(size=b"\x80" + bytes(3) + b"\x7f" + bytes(7)),
        "endless of no kind": forged(b"Z", size=b"\x80" + bytes(3) + b"\x7f" + bytes(7)),
        "nested": forged(b"L") * 5000,
        "extension": forged(b"x", b"%011o\0" % (2 << 20)) + bytes(2 << 20),
        "lost pax": forged(b"x", b"%011o\0" % 512) + b"99999999999999999999 path=x\n".ljust(512, b"\0"),
    }.items(),
    ids=lambda case: case[0],
)
def test_forged_headers_end_the_walk(tmp_path: Path, header: tuple[str, bytes]) -> None:
    """Catches headers that lead backwards and so round and round, nest without end, or ask for memory that is not."""
    path = write_tar(tmp_path / "x.tar", [*pair("a"), *pair("b")])
    start = scan(path).spans[1].start
    path.write_bytes(path.read_bytes()[:start] + header[1] + path.read_bytes()[start:])
    assert faults(path)[-1][1] == TRUNCATED
    assert [span.key for span in scan(path).spans] in ([], ["a"])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_damage_breaks_the_walk(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Catches headers that end the walk with an error, make it go round in circles, or point outside of the file."""
    path = tmp_path_factory.getbasetemp() / "damaged.tar"
    write_tar(path, [*pair("a"), ("n" * 150 + ".txt", b"long"), *pair("é")])
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        header = data.draw(st.integers(0, len(content) // 512 - 1)) * 512
        place = header + data.draw(st.integers(100, 260))  # sizes, checksums and kinds of headers among them
        content[place] = data.draw(st.integers(0, 255))
        if data.draw(st.booleans()):  # the checksum holds all the same
            block = content[header : header + 512]
            checksum = sum(block[:148]) + 8 * 32 + sum(block[156:])
            content[header + 148 : header + 156] = b"%06o\0 " % checksum
    path.write_bytes(content)
    offsets = scan(path).offsets
    assert (np.diff(offsets) >= 0).all() and offsets[0] >= 0 and offsets[-1] <= len(content)
