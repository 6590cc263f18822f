"""Shards: written whole, indexed, read by number."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
import webdataset
from PIL import Image as PilImage

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

    write_shards(documents(5), tmp_path / "good")
    shard = tmp_path / "good" / "shard-00000.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1024])
    with pytest.raises(FlamingoError, match=r"shard-00000\.tar: expected \d+ bytes"):
        open_shards(tmp_path / "good")
    shard.write_bytes(b"x" * len(whole))
    with pytest.raises(FlamingoError, match=r"shard-00000\.tar: expected a tar file"):
        open_shards(tmp_path / "good")
    shard.write_bytes(whole.replace(b'{"image": "0.png"}', b'{"image": "9.png"}'))
    with pytest.raises(FlamingoError, match=r"shard-00000\.tar: sample d001: the image d001\.9\.png .* is missing"):
        open_shards(tmp_path / "good")[1]
    shard.unlink()
    with pytest.raises(FlamingoError, match="the shard is missing"):
        open_shards(tmp_path / "good")


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
