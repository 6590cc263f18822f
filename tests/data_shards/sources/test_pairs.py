"""Image–text pairs: tars, tables, COCO's captions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_shards.faults import (
    BAD_JSON,
    BAD_RECORD,
    DUPLICATE_KEY,
    LINK,
    MISSING_IMAGE,
    NO_CAPTION,
    NO_IMAGE,
    UNSAFE_NAME,
    SampleError,
)
from data_shards.sources.pairs import PairsReader, sample_document
from flamingo.errors import FlamingoError
from tests.data_shards.planted import write_tar
from tests.data_shards.sources.made import image_bytes, link, outline, read


def test_img2dataset_tars(tmp_path: Path) -> None:
    """A form of image or caption that is not read; a faulty sample that ends the tar or is lost without a reason."""
    write_tar(
        tmp_path / "00000.tar",
        [
            *(("1.jpg", image_bytes(1, "jpg")), ("1.json", b"{broken"), ("1.txt", b" a caption \n")),
            *(("2.PNG", image_bytes(2)), ("2.json", json.dumps({"caption": "by json"}).encode())),
            *(("3.jpg", image_bytes(3)), ("3.txt", b" ")),
            *(("4.txt", b"no image"),),
            *(("5.jpg", b"<html>"), ("5.txt", b"a page")),
            *(("6.jpg", link("6.jpg")), ("6.txt", b"a link")),
            *(("../7.jpg", image_bytes(7)), ("../7.txt", b"outside")),
            *(("8.jpg", image_bytes(8)), ("8.jpg", image_bytes(9)), ("8.txt", b"twice")),
            *(("9.jpg", image_bytes(8)), ("9.png", image_bytes(9)), ("9.txt", b"two")),
            *(("dir/10.webp", image_bytes(10)), ("dir/10.txt", "größer".encode())),
        ],
    )
    reader = PairsReader(str(tmp_path))
    documents, account = read(reader)
    assert [outline(document) for document in documents] == [
        [image_bytes(1, "jpg"), "a caption"],
        [image_bytes(2), "by json"],
        [image_bytes(10), "größer"],
    ]
    assert account.documents_dropped == {
        NO_CAPTION: 1, MISSING_IMAGE: 1, NO_IMAGE: 1, LINK: 1, UNSAFE_NAME: 1, DUPLICATE_KEY: 1, BAD_RECORD: 1,
    }  # fmt: skip
    assert account.images_read == 11 and account.images_kept == 3
    assert account.examples[NO_IMAGE][0].startswith(f"{tmp_path / '00000.tar'}:5")


def test_samples_of_foreign_tars() -> None:
    """Training on img2dataset's tars as they are: another document than a conversion makes, faults without a key."""
    document = sample_document("00001", {"jpg": image_bytes(1, "jpg"), "txt": b"a", "json": b"{}"})
    assert (outline(document), document.key) == ([image_bytes(1, "jpg"), "a"], "00001")
    assert document.media[0].name == "00001.jpg"  # type: ignore[union-attr]
    for members, reason in (
        ({"txt": b"a"}, MISSING_IMAGE),
        ({"jpg": image_bytes(1)}, NO_CAPTION),
        ({"jpg": image_bytes(1), "json": b"{"}, BAD_JSON),
        ({"jpg": b"", "txt": b"a"}, NO_IMAGE),
    ):
        with pytest.raises(SampleError, match="00001") as raised:
            sample_document("00001", members)
        assert raised.value.reason == reason


ROWS = [{"file_name": "in/1.png", "text": "one"}, {"file_name": "2.png", "text": " two "}]


def table(folder: Path, ending: str, rows: list[dict[str, Any]] = ROWS) -> Path:
    path = folder / f"pairs.{ending}"
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif ending == "json":
        path.write_text(json.dumps(rows))
    elif ending == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        comma = {"csv": ",", "tsv": "\t"}[ending]
        path.write_text(
            "\ufeff" + "".join(comma.join(row) + "\n" for row in [[*rows[0]], *(row.values() for row in rows)])
        )
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "1.png").write_bytes(image_bytes(1))
    (tmp_path / "2.png").write_bytes(image_bytes(2))
    return tmp_path


@pytest.mark.parametrize("ending", ["parquet", "csv", "tsv", "json", "jsonl"])
def test_tables_beside_their_images(folder: Path, ending: str) -> None:
    """A kind of table that is not read or not found in its folder."""
    table(folder, ending)
    documents, account = read(PairsReader(str(folder)))
    assert [outline(document) for document in documents] == [[image_bytes(1), "one"], [image_bytes(2), "two"]]
    assert account.images_kept == 2


def test_columns_and_stores(folder: Path) -> None:
    """Columns that were named passed over for the usual ones; images searched beside the table in spite of a store."""
    (folder / "table").mkdir()
    path = table(folder / "table", "jsonl", [{"picture": "1.png", "caption": "no", "said": ["a", "b", " "]}])
    options: dict[str, Any] = dict(images=str(folder), image_column="picture", caption_column="said")
    documents, account = read(PairsReader(str(path), **options))
    assert [outline(document) for document in documents] == [[image_bytes(1), "a"], [image_bytes(1), "b"]]
    assert (account.documents_kept, account.images_kept) == (1, 2)
    assert len(read(PairsReader(str(path), captions="first", **options))[0]) == 1
    _, account = read(PairsReader(str(path), images=str(folder)))
    assert account.documents_dropped == {MISSING_IMAGE: 1}
    _, account = read(PairsReader(str(path), images=str(folder), image_column="none"))
    assert account.documents_dropped == {BAD_RECORD: 1}


def test_images_inside_a_table(tmp_path: Path) -> None:
    """Hugging Face's image columns, and plain bytes, not read."""
    path = table(tmp_path, "parquet", [{"image": {"bytes": image_bytes(1), "path": "x/1.png"}, "caption": "one"}])
    documents, _ = read(PairsReader(str(path)))
    assert outline(documents[0]) == [image_bytes(1), "one"]
    path = table(tmp_path, "parquet", [{"image": image_bytes(2), "caption": "two"}, {"image": None, "caption": "none"}])
    documents, account = read(PairsReader(str(path)))
    assert outline(documents[0]) == [image_bytes(2), "two"] and account.documents_dropped == {MISSING_IMAGE: 1}


@pytest.mark.parametrize("row", ['{"file_name": "../2.png", "text": "a"}', "{", "3", '{"file_name": 3, "text": "a"}',
                                 '{"file_name": "2.png", "text": ""}', '{"file_name": "3.png", "text": "a"}',
                                 '{"text": "a"}', "{}"])  # fmt: skip
def test_malformed_rows_are_told(folder: Path, row: str) -> None:
    """A malformed row that raises, or is passed over in silence."""
    (folder / "in" / "pairs.jsonl").write_text(row + "\n")
    _, account = read(PairsReader(str(folder / "in")))
    assert account.documents_read == account.documents_dropped.total() == 1


def test_broken_tables_are_errors(tmp_path: Path) -> None:
    """A JSON file of another layout converted to nothing."""
    for text in ("{", "3", '{"images": []}'):
        (tmp_path / "t.json").write_text(text)
        with pytest.raises(FlamingoError, match=r"t\.json"):
            read(PairsReader(str(tmp_path / "t.json")))
    with pytest.raises(FlamingoError, match="captions"):
        PairsReader("x", captions="some")  # type: ignore[arg-type]


def test_coco_layout_with_faults(folder: Path) -> None:
    """Captions given to another image; images without captions, and captions without an image, lost silently."""
    content = {
        "images": [*({"id": number, "file_name": f"{number % 4}.png"} for number in (2, 3, 6)), 4],
        "annotations": [{"image_id": 3, "caption": "x"}, {"image_id": 2, "caption": "y"}, {"image_id": 1}, 5],
    }
    (folder / "captions.json").write_text(json.dumps(content))
    documents, account = read(PairsReader(str(folder)))
    assert [outline(document) for document in documents] == [[image_bytes(2), "y"]]
    assert account.documents_dropped == {MISSING_IMAGE: 1, NO_CAPTION: 1, BAD_RECORD: 3}


def test_real_coco_photos(real_data: Path) -> None:
    """Real photographs or captions lost."""
    folder = real_data / "coco_photos"
    documents, account = read(PairsReader(str(folder), images=str(folder / "images")))
    assert (account.documents_kept, account.images_kept, len(documents)) == (39, 195, 195)
    assert all(len(document.segments) == 2 and document.source == "pairs" for document in documents)
