"""Shards: written whole, indexed, read by number."""

from __future__ import annotations

import contextlib
import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PilImage

from data_shards.faults import (
    BAD_JSON,
    DUPLICATE_KEY,
    LINK,
    MISSING_IMAGE,
    NO_DOCUMENT,
    NOT_A_TAR,
    TRUNCATED,
    UNSAFE_NAME,
    SampleError,
)
from data_shards.members import read_sample
from data_shards.order import SHARDS_AT_ONCE
from data_shards.shards import INDEX, ShardWriter, open_shards, write_shards
from flamingo import Document, FlamingoError, Image, Text, Video
from flamingo.images import decode
from tests.tiny import document, picture


def documents(count: int) -> list[Document]:
    """Documents with 0 to 3 pictures, and one with a video."""
    many = [document(n, n % 4, key=f"d{n:03d}") for n in range(count - 1)]
    video = Document(
        (Video((picture(1), picture(2))), Text("q", supervised=False), Text("ü")), "video", "made", {"n": [1, "a"]}
    )
    return [*many, video]


def contents(read: Document) -> object:
    """A document without the names of its images, which shards give anew."""
    return (
        [
            segment
            if isinstance(segment, Text)
            else segment.data
            if isinstance(segment, Image)
            else [frame.data for frame in segment.frames]
            for segment in read.segments
        ],
        read.key,
        read.source,
        read.metadata,
    )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """Catches lost segments, wrong offsets at the ends of shards, and metadata that change."""
    written = documents(11)
    account = write_shards(written, tmp_path, max_samples=4)
    assert (account.shards, account.documents, account.media) == (3, 11, sum(len(d.media) for d in written) + 1)
    opened = open_shards(tmp_path)
    assert opened.sizes == [4, 4, 3]
    assert [contents(opened[n]) for n in range(11)] == [contents(each) for each in written]


def test_webdataset_reads_the_same_samples(tmp_path: Path) -> None:
    """Catches tars that only this project can read."""
    write_shards(documents(5), tmp_path)
    samples = list(webdataset.WebDataset(str(tmp_path / "shard-00000.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [each.key for each in documents(5)]
    assert samples[1]["0.png"] == documents(5)[1].media[0].data  # type: ignore[union-attr]


def test_the_same_documents_give_the_same_bytes(tmp_path: Path) -> None:
    """Catches times, users or an order of members that would change every checksum."""
    for folder in ("a", "b"):
        write_shards(documents(5), tmp_path / folder)
    assert open_shards(tmp_path / "a").sha256 == open_shards(tmp_path / "b").sha256
    write_shards(documents(6), tmp_path / "c")
    assert open_shards(tmp_path / "a").sha256 != open_shards(tmp_path / "c").sha256


def test_an_interrupted_write_leaves_no_index(tmp_path: Path) -> None:
    """Catches a half-written folder that would be taken for a whole data set."""

    def stops() -> object:
        yield from documents(9)[:6]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(stops(), tmp_path, max_samples=4)  # type: ignore[arg-type]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shard-00000.offsets.npy", "shard-00000.tar"]
    with pytest.raises(FlamingoError, match=f"expected an {INDEX}"):
        open_shards(tmp_path)


def test_faults_are_named(tmp_path: Path) -> None:
    """Catches messages without the folder, the shard, or the sample."""
    with pytest.raises(FlamingoError, match="nowhere: there is no such folder"):
        open_shards(tmp_path / "nowhere")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "x.tar").write_text("<html>not found</html>")
    with pytest.raises(FlamingoError, match=r"x\.tar: expected a tar file"):
        open_shards(tmp_path / "text")

    folder = tmp_path / "good"
    write_shards(documents(5), folder)
    shard, offsets = folder / "shard-00000.tar", folder / "shard-00000.offsets.npy"
    index, whole = (folder / INDEX).read_text(), offsets.read_bytes()
    offsets.write_bytes(whole[:-8])
    with pytest.raises(FlamingoError, match=r"shard-00000\.offsets\.npy: expected 6 rising offsets"):
        open_shards(folder)[0]
    np.save(offsets, np.array([0, 512, 512, 512, 512, 1 << 40]))
    with pytest.raises(FlamingoError, match=r"shard-00000\.offsets\.npy: expected 6 rising offsets"):
        open_shards(folder)[0]
    offsets.unlink()
    with pytest.raises(FlamingoError, match=r"shard-00000\.tar: expected its offsets beside it"):
        open_shards(folder)
    offsets.write_bytes(whole)
    for change in (
        ("shard-00000.tar", "../x.tar"),
        ('"samples": 5', '"samples": "5"'),
        ('"shards"', '"parts"'),
        ("{", ""),
    ):
        (folder / INDEX).write_text(index.replace(*change))
        with pytest.raises(FlamingoError, match=rf"{INDEX}: expected a list `shards`"):
            open_shards(folder)
    (folder / INDEX).write_text(index.replace('"format": 2', '"format": 3'))
    with pytest.raises(FlamingoError, match=r"format 3 .*: expected at most format 2"):
        open_shards(folder)
    entry = index[index.index("  {") : index.index("}") + 1]
    (folder / INDEX).write_text(index.replace(entry, f"{entry}, {entry}"))
    with pytest.raises(FlamingoError, match=rf"{INDEX}: expected each shard once"):
        open_shards(folder)
    (folder / INDEX).write_text(index)
    shard.unlink()
    with pytest.raises(FlamingoError, match="the shard is missing"):
        open_shards(folder)


def test_what_is_wrong_in_a_shard_is_an_error_of_its_samples(tmp_path: Path) -> None:
    """Catches one damaged shard that ends a run at its start, or clean samples that are lost with the others."""
    write_shards(documents(5), tmp_path)
    shard = tmp_path / "shard-00000.tar"
    whole, ends = shard.read_bytes(), open_shards(tmp_path).shards[0].offsets.tolist()

    def reasons(content: bytes) -> list[str]:
        shard.write_bytes(content)
        opened, found = open_shards(tmp_path), []
        for number in range(len(opened)):
            try:
                found.append(opened[number].key)
            except SampleError as error:
                found.append(
                    f"{error.key} {error.reason}" if error.shard == str(shard) and error.detail else "no place"
                )
        return found

    keys = [each.key for each in documents(5)]
    cut = [f"#{number} {TRUNCATED}" for number in range(3, 5)]
    assert reasons(whole) == keys
    assert reasons(whole[: ends[3] + 700]) == [*keys[:3], *cut]
    assert reasons(b"<html>" + whole[6:]) == [f"#0 {NOT_A_TAR}", *keys[1:]]
    assert reasons(b"<html>") == [f"#{number} {NOT_A_TAR}" for number in range(5)]
    named = whole.replace(b'{"image": "0.png"}', b'{"image": "9.png"}')
    assert reasons(named) == [f"{key} {MISSING_IMAGE}" if 0 < n < 4 else key for n, key in enumerate(keys)]
    assert reasons(whole.replace(b'"segments"', b'"fragments')) == [f"{key} {BAD_JSON}" for key in keys]
    assert reasons(whole.replace(b'"segments"', b'"fragment"')) == [f"{key} {NO_DOCUMENT}" for key in keys]
    assert reasons(whole.replace(b'"text": "', b'"text": 4  ').replace(b"d000.json", b"d000.jsoN"))[0] != keys[0]
    index = tmp_path / INDEX
    index.write_text(index.read_text().replace('"samples": 5', '"samples": 5, "repeated": [2]'))
    assert reasons(whole) == [*keys[:2], f"{keys[2]} {DUPLICATE_KEY}", *keys[3:]]


def test_a_set_of_many_shards_keeps_few_files_open(tmp_path: Path) -> None:
    """Catches a run over ten thousand shards that ends at the system's limit of open files."""
    write_shards((document(n, 0, key=f"d{n}") for n in range(SHARDS_AT_ONCE + 9)), tmp_path, max_samples=1)
    opened = open_shards(tmp_path)
    assert [opened[n].key for n in range(len(opened))] == [f"d{n}" for n in range(SHARDS_AT_ONCE + 9)]
    in_use = [str(each.readlink()) for each in Path("/proc/self/fd").iterdir() if each.exists()]
    assert len([each for each in in_use if each.startswith(str(tmp_path))]) == 2 * SHARDS_AT_ONCE


# -- members of foreign tars -------------------------------------------------------------------------------------------


def tar(*members: tuple[str, bytes], form: int = tarfile.GNU_FORMAT, **header: object) -> bytes:
    """A tar of members, without its end; `header` changes the last one's."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as made:
        for number, (name, content) in enumerate(members):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            if number == len(members) - 1:
                vars_of = {"type": tarfile.REGTYPE, **header}
                for field, value in vars_of.items():
                    setattr(info, field, value)
            made.addfile(info, io.BytesIO(content))
        return buffer.getvalue()


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_members_of_any_tar_are_read(form: int) -> None:
    """Catches long names, long folders, and names beyond ASCII that one of the formats writes in its own way."""
    folder = "/".join(["f" * 40] * 3)
    keys = ["k", f"{folder}/k"] if form == tarfile.USTAR_FORMAT else ["k", f"{folder}/k", "n" * 300, "ключ/" * 20 + "k"]
    for key in keys:
        content = {"json": b"{}", "0.png": b"x" * 513, "1.png": b"", "2.png": b"y" * 512}
        data = tar(("README", b"no sample"), *((f"{key}.{name}", each) for name, each in content.items()), form=form)
        assert read_sample(data) == (key, content)
    assert read_sample(tar(("K.JPG", b"1"), ("K.Txt", b"2"))) == ("K", {"jpg": b"1", "txt": b"2"})


@pytest.mark.parametrize(
    ("data", "key", "reason"),
    [
        (tar(("a.json", b""), ("../a.json", b"")), "../a", UNSAFE_NAME),
        (tar(("/etc/a.json", b"")), "/etc/a", UNSAFE_NAME),
        (tar(("a.json", b""), ("a.0.png", b""), type=tarfile.SYMTYPE, linkname="/etc/passwd"), "a", LINK),
        (tar(("a.json", b""), ("a.0.png", b""), type=tarfile.LNKTYPE, linkname="a.json"), "a", LINK),
        (tar(("a.json", b""), ("a.0.png", b""), type=tarfile.CHRTYPE), "a", LINK),
        (tar(("a.json", b""), ("a.json", b"")), "a", DUPLICATE_KEY),
        (tar(("a.json", b""), ("b.json", b"")), "a", NO_DOCUMENT),
        (tar(("README", b"")), "", NO_DOCUMENT),
        (tar(("a.json", b"x" * 2000))[:1024], "", TRUNCATED),
        (tar(("a.json", b""))[:400], "", NOT_A_TAR),
        (b"<html>" * 300, "", NOT_A_TAR),
    ],
)
def test_members_that_are_no_sample_are_named(data: bytes, key: str, reason: str) -> None:
    """Catches a path traversal, a link, or a merged sample that is taken for a sample."""
    with pytest.raises(SampleError) as raised:
        read_sample(data)
    assert (raised.value.key, raised.value.reason) == (key, reason)
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)


@settings(max_examples=300, deadline=None)
@given(at=st.integers(0, 4095), byte=st.integers(0, 255), end=st.integers(0, 5120), pax=st.booleans())
def test_damaged_bytes_raise_nothing_else(at: int, byte: int, end: int, pax: bool) -> None:
    """Catches a parser that loops for ever, or raises what the loader does not expect."""
    form = tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT
    data = bytearray(tar(("n" * 120 + ".json", b"{}"), ("n" * 120 + ".png", b"y"), form=form))
    data[at] = byte
    block = at // 512 * 512
    header = data[block : block + 512]
    data[block + 148 : block + 156] = b"%06o\0 " % (sum(header[:148]) + 256 + sum(header[156:]))  # as if it were meant
    with contextlib.suppress(SampleError):
        read_sample(bytes(data[:end]))


def test_real_photographs(tmp_path: Path, real_data: Path) -> None:
    """Catches JPEG files that change on their way through shards, or do not decode."""
    files = sorted((real_data / "coco_photos" / "images").iterdir())
    photos = [Image(file.read_bytes(), file.name) for file in files]
    write_shards(
        [Document((photo, Text("a photo")), file.stem) for photo, file in zip(photos, files, strict=True)], tmp_path
    )
    opened = open_shards(tmp_path)
    assert len(opened) == len(photos) > 30
    for number, photo in enumerate(photos):
        (read,) = opened[number].media
        assert isinstance(read, Image) and read.data == photo.data
        with PilImage.open(io.BytesIO(read.data)) as expected:
            assert decode(read, 3).shape[1:] == (expected.height, expected.width)


def test_keys_are_checked(tmp_path: Path) -> None:
    """Catches keys that WebDataset would cut at their first dot, and samples that would merge."""
    writer = ShardWriter(tmp_path, "s")
    writer.write(document(1, 1, key="a"))
    with pytest.raises(FlamingoError, match="'a' occurs twice"):
        writer.write(document(1, 1, key="a"))
    for key in ("", "a.b", "../a"):
        with pytest.raises(FlamingoError, match="without dots and slashes"):
            writer.write(Document((Text("x"),), key))


def test_members_have_the_documented_names(tmp_path: Path) -> None:
    """Catches images stored as base64 inside the JSON, or under other names than the format says."""
    write_shards([document(3, 2, key="k")], tmp_path)
    with tarfile.open(fileobj=io.BytesIO((tmp_path / "shard-00000.tar").read_bytes())) as tar:
        assert sorted(tar.getnames()) == ["k.0.png", "k.1.png", "k.json"]
