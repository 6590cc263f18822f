"""Where images are: trees, tars, tables, img2dataset's output."""

from __future__ import annotations

import json
import tracemalloc
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_shards.faults import LINK, MISSING_IMAGE, NO_IMAGE, TOO_LARGE, UNSAFE_NAME, SampleError
from data_shards.sources.images import FilesBeside, ImageStore, open_images
from data_shards.sources.reading import image_file
from flamingo.errors import FlamingoError
from tests.data_shards.planted import write_tar
from tests.data_shards.sources.made import image_bytes, link


def opened(images: Path | str, table: Path | str = "") -> ImageStore:
    store = open_images(str(images), str(table))
    assert store is not None
    return store


def reason(store: ImageStore | FilesBeside, *names: str) -> str:
    with pytest.raises(SampleError) as raised:
        store.read(*names)
    assert names[0] in raised.value.detail
    return raised.value.reason


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_trees_are_searched_by_path_and_by_name(tmp_path: Path) -> None:
    """A path that finds another folder's file of the same name; a name that is found only at the top."""
    for number, path in enumerate(("a/x.png", "b/x.png", "b/c/y.png")):
        put(tmp_path / path, image_bytes(number))
    put(tmp_path / ".hidden" / "z.png", image_bytes(9))
    store = opened(tmp_path)
    for number, name in enumerate(("a/x.png", "./b//x.png", "y.png")):
        assert store.read(name).data == image_bytes(number)
    assert store.read("x.png").data == image_bytes(0)  # the first in the order of paths
    assert store.read("nothing.png", "y.png").data == image_bytes(2)
    assert reason(store, "c/y.png") == reason(store, "z.png") == reason(store, "http://a/x.png") == MISSING_IMAGE
    (tmp_path / "b/c/y.png").unlink()
    assert reason(store, "y.png") == MISSING_IMAGE


def test_no_name_leads_out(tmp_path: Path) -> None:
    """A record that reads files outside of its folder."""
    put(tmp_path / "secret.png", image_bytes(1))
    put(tmp_path / "in" / "a.png", image_bytes(2))
    for store in (opened(tmp_path / "in"), FilesBeside(str(tmp_path / "in"))):
        assert store.read("a.png").data == image_bytes(2)
        for name in ("../secret.png", str(tmp_path / "secret.png"), "b/../../secret.png", "..\\secret.png", "a\0b"):
            assert reason(store, name) == UNSAFE_NAME
        for name in ("\ud800.png", "x" * 5000, ".", "http://a/../../secret.png"):
            assert reason(store, name) == MISSING_IMAGE


def test_tars_are_read_at_offsets(tmp_path: Path) -> None:
    """Another member's bytes; links and unsafe names followed, or missing without their reason."""
    write_tar(tmp_path / "0.tar", [("d/1.png", image_bytes(1)), ("2.png", image_bytes(2)), ("4.png", link("4.png"))])
    write_tar(tmp_path / "1.tar", [("./3.png", image_bytes(3)), ("../5.png", image_bytes(5))])
    for images in (tmp_path, tmp_path / "*.tar"):
        store = opened(images)
        for name, seed in (("d/1.png", 1), ("1.png", 1), ("2.png", 2), ("3.png", 3)):
            assert store.read(name).data == image_bytes(seed)
        assert (reason(store, "4.png"), reason(store, "5.png")) == (LINK, UNSAFE_NAME)
    assert reason(opened(tmp_path / "1.tar"), "2.png") == MISSING_IMAGE


def test_of_a_cut_tar_what_is_whole_is_used(tmp_path: Path) -> None:
    """One cut download ends the conversion; or half an image is taken for one."""
    path = write_tar(tmp_path / "0.tar", [("1.png", image_bytes(1)), ("2.png", image_bytes(2))])
    put(path, path.read_bytes()[: 512 * 2 + 1024 + 100])
    with pytest.warns(UserWarning, match=r"0\.tar"):
        store = opened(path)
    assert store.read("1.png").data == image_bytes(1)
    assert reason(store, "2.png") == MISSING_IMAGE
    put(path, b"no tar" * 200)
    with pytest.raises(FlamingoError, match=r"0\.tar"):
        opened(path)


def test_img2dataset_tars_with_their_tables(tmp_path: Path) -> None:
    """Output of img2dataset that has to be rewritten first; a download that failed taken for one that did not."""
    write_tar(tmp_path / "00000.tar", [("000000000.jpg", image_bytes(1, "jpg")), ("000000000.txt", b"a text")])
    write_tar(tmp_path / "00001.tar", [("000010000.jpg", image_bytes(2, "jpg"))])
    for shard, start in ((0, 0), (1, 10_000)):
        keys = [f"{start:09d}", f"{start + 1:09d}"]
        table = {"url": [f"http://a/{key}?x=.php" for key in keys], "key": keys, "status": ["success", "failed"]}
        pq.write_table(pa.table(table), tmp_path / f"{shard:05d}.parquet")
    store = opened(tmp_path)
    image = store.read("http://a/000000000?x=.php")
    assert image.data == image_bytes(1, "jpg") and Path(image.name).suffix == ".jpg"
    assert store.read("http://a/000010000?x=.php").data == image_bytes(2, "jpg")
    assert reason(store, "http://a/000000001?x=.php") == MISSING_IMAGE


@pytest.mark.parametrize("form", ["tar", "folder"])
def test_img2dataset_without_tables(tmp_path: Path, form: str) -> None:
    """URLs told by the JSON beside each image not found; some other JSON file that ends the search."""
    members = []
    for seed in (1, 2):
        told = json.dumps({"url": f"http://a/{seed}", "status": "success"}).encode()
        members += [(f"00000000{seed}.jpg", image_bytes(seed, "jpg")), (f"00000000{seed}.json", told)]
    members += [("x.jpg", image_bytes(3)), ("x.json", b"[1"), ("stats.json", b"{}")]
    if form == "tar":
        write_tar(tmp_path / "00000.tar", members)
    else:
        for name, content in members:
            put(tmp_path / "00000" / name, content)
    store = opened(tmp_path)
    assert [store.read(f"http://a/{seed}").data for seed in (1, 2)] == [image_bytes(1, "jpg"), image_bytes(2, "jpg")]


@pytest.mark.parametrize("ending", ["parquet", "csv", "tsv", "json", "jsonl"])
def test_tables_tell_the_file_of_a_url(tmp_path: Path, ending: str) -> None:
    """A kind of table that is not read, or whose paths are not found in the tree or the tars."""
    put(tmp_path / "in" / "deep" / "1.png", image_bytes(1))
    write_tar(tmp_path / "in" / "0.tar", [("2.png", image_bytes(2))])
    rows = [{"url": "http://a/1", "file": "deep/1.png"}, {"url": "http://a/2", "file": "2.png"},
            {"url": "http://a/3", "file": "none.png"}]  # fmt: skip
    table = tmp_path / f"table.{ending}"
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), table)
    elif ending == "json":
        put(table, json.dumps(rows))
    elif ending == "jsonl":
        put(table, "".join(json.dumps(row) + "\n" for row in rows))
    else:
        comma = {"csv": ",", "tsv": "\t"}[ending]
        put(table, "".join(comma.join(row) + "\r\n" for row in [("url", "file"), *(row.values() for row in rows)]))
    store = opened(tmp_path / "in", table)
    assert [store.read(f"http://a/{seed}").data for seed in (1, 2)] == [image_bytes(1), image_bytes(2)]
    assert reason(store, "http://a/3") == MISSING_IMAGE


def test_errors_name_what_is_wrong(tmp_path: Path) -> None:
    """A misspelt option that makes every image a missing one."""
    with pytest.raises(FlamingoError, match="nowhere"):
        opened(tmp_path / "nowhere")
    with pytest.raises(FlamingoError, match=r"expected columns url and file, found \['a', 'b'\]"):
        opened("", put(tmp_path / "t.json", '[{"a": 1, "b": 2}]'))
    with pytest.raises(FlamingoError, match=r"t\.parquet"):
        opened("", put(tmp_path / "t.parquet", "none"))
    assert open_images("", "") is None


@pytest.mark.parametrize(
    ("data", "why"),
    [(b"", NO_IMAGE), (b"<!DOCTYPE html>", NO_IMAGE), (b"\xff\xd8\xff", NO_IMAGE), (b"\x89PNG\r\n\x1a\n", NO_IMAGE)],
)
def test_what_is_no_image_is_told(data: bytes, why: str) -> None:
    """HTML named .jpg and empty files that reach the shards."""
    with pytest.raises(SampleError, match=r"a\.jpg") as raised:
        image_file(data, "a.jpg")
    assert raised.value.reason == why


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("edge", [12_000, 50_000])
def test_huge_images_are_refused_by_their_header(edge: int) -> None:
    """A PNG of a few bytes that unpacks to gigabytes: it would reach the shards, or be decoded here."""
    head = image_bytes(1)
    header = head[12:16] + edge.to_bytes(4, "big") * 2 + head[24:29]  # IHDR: width, height, what a pixel is
    huge = head[:12] + header + zlib.crc32(header).to_bytes(4, "big") + head[33:]
    with pytest.raises(SampleError) as raised:
        image_file(huge, "a.png")
    assert raised.value.reason == TOO_LARGE


def test_names_get_the_suffix_of_their_content() -> None:
    """Images of URLs without a suffix that become `.bin` or `.php` in the shards."""
    assert [image_file(image_bytes(1), name).name for name in ("a", "a.php", "a.PNG", "a.jpg")] == [
        "a.png", "a.php.png", "a.PNG", "a.jpg",
    ]  # fmt: skip


def test_an_index_holds_offsets_not_contents(tmp_path: Path) -> None:
    """Tars of images held in memory: 5,000 members of 2 kB are 10 MB, their index is to be a twentieth of it."""
    content = image_bytes(1) + bytes(1500)
    path = write_tar(tmp_path / "0.tar", ((f"{number:08d}.png", content) for number in range(5_000)))

    def memory() -> tuple[int, int]:
        tracemalloc.start()
        store = opened(path)
        measured = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert store.read("00001234.png").data == content
        return measured

    held, peak = map(min, zip(memory(), memory(), strict=True))  # threads that other tests left take some of it
    assert held < 1 << 19 and peak < 3 << 20
