"""OBELICS, and real documents of its layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards.account import Account
from data_shards.faults import BAD_JSON, BAD_RECORD, EMPTY, MISSING_IMAGE, NO_IMAGES, TRUNCATED, UNSAFE_NAME
from data_shards.sources import Record
from data_shards.sources.obelics import ObelicsReader
from data_shards.sources.reading import Row
from flamingo.errors import FlamingoError
from tests.data_shards.planted import write_tar
from tests.data_shards.sources.made import image_bytes, outline, read

METADATA = json.dumps({"url": "http://page", "warc_filename": "x"})


def record(*parts: tuple[str | None, str | None], **more: Any) -> dict[str, Any]:
    """Pairs of (image, text)."""
    return {
        "images": [image for image, _ in parts],
        "texts": [text for _, text in parts],
        "metadata": "[]",
        "general_metadata": METADATA,
    } | more


def lines(folder: Path, *records: Any) -> str:
    (folder / "docs.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    return str(folder / "docs.jsonl")


RECORDS = [
    record((None, "before"), ("http://a/1", None), (None, "after"), ("http://a/2", None), (None, "last")),
    record(("http://a/1", None), ("http://a/3", None), (None, "its text"), (None, "more")),
]


def downloaded(folder: Path) -> Path:
    """img2dataset's output for two of the three URLs."""
    keys = [f"{seed:09d}" for seed in (1, 2, 3)]
    told = {"url": [f"http://a/{seed}" for seed in (1, 2, 3)], "key": keys, "status": ["success", "failed", "success"]}
    write_tar(folder / "00000.tar", [(f"{keys[seed - 1]}.jpg", image_bytes(seed, "jpg")) for seed in (1, 3)])
    pq.write_table(pa.table(told), folder / "00000.parquet")
    return folder


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_documents_by_url_from_img2dataset(tmp_path: Path, form: str) -> None:
    """Texts run together or out of order, rows of several row groups lost, coverage not told."""
    path = lines(tmp_path, *RECORDS)
    if form == "parquet":
        path = str(tmp_path / "train.parquet")
        pq.write_table(pa.Table.from_pylist(RECORDS), path, row_group_size=1)
    reader = ObelicsReader(path, images=str(downloaded(tmp_path / "images")))
    documents, account = read(reader)
    one, three = image_bytes(1, "jpg"), image_bytes(3, "jpg")
    assert [outline(document) for document in documents] == [
        ["before", one, "after\n\nlast"],
        [one, three, "its text\n\nmore"],
    ]
    assert (account.images_read, account.images_kept, account.images_dropped) == (4, 3, {MISSING_IMAGE: 1})
    assert documents[0].metadata == {"url": "http://page", "warc_filename": "x"} and documents[0].source == "obelics"
    assert list(reader.urls()) == [(f"http://a/{seed}", "") for seed in (1, 2, 1, 3)]


def test_urls_without_images_are_missing_ones(tmp_path: Path) -> None:
    """A URL looked up as a path, and told as an unsafe name."""
    _, account = read(ObelicsReader(lines(tmp_path, *RECORDS)))
    assert account.images_dropped == {MISSING_IMAGE: 4} and account.documents_dropped == {NO_IMAGES: 2}


def test_text_alone_is_kept_on_request(tmp_path: Path) -> None:
    """Text of documents that lost their images kept unasked, or not kept though it was; empty ones kept."""
    path = lines(tmp_path, record((None, "text"), ("no.jpg", None)), record((None, "text")), record((None, " ")))
    assert read(ObelicsReader(path))[1].documents_dropped == {NO_IMAGES: 3}
    _, account = read(ObelicsReader(path, keep_text_only=True))
    assert account.documents_kept == 2 and account.documents_dropped == {EMPTY: 1}


@pytest.mark.parametrize(
    ("content", "reason", "images"),
    [
        (record((None, "a"), (None, None)), BAD_RECORD, 0),
        (record((None, "a"), ("x.jpg", "b"), ("y.jpg", None)), BAD_RECORD, 2),
        (record((None, "a"), ("x.jpg", None)) | {"texts": ["a"]}, BAD_RECORD, 1),
        (record((None, "a")) | {"images": None}, BAD_RECORD, 0),
        (record((None, 3)), BAD_RECORD, 0),  # type: ignore[arg-type]
        (["images", "texts"], BAD_RECORD, 0),
        (record(("../../x.jpg", None), (None, "a")), NO_IMAGES, 1),
    ],
)
def test_malformed_records_are_told(tmp_path: Path, content: Any, reason: str, images: int) -> None:
    """A position with both or neither read as one of them; a record that ends the conversion."""
    _, account = read(ObelicsReader(lines(tmp_path, content)))
    assert account.documents_dropped == {reason: 1} and account.images_read == images
    assert account.examples[reason][0].startswith(f"{tmp_path / 'docs.jsonl'}:1")


@pytest.mark.parametrize("metadata", ['{"a": ' + "[" * 800 + "]" * 800 + "}", json.dumps("[" * 100_000)])
def test_deep_metadata_is_told(metadata: str) -> None:
    """Nesting that ends the conversion with a RecursionError."""
    line = f'{{"images": [null], "texts": ["a"], "general_metadata": {metadata}}}'
    account = Account()
    reader = ObelicsReader("", keep_text_only=True)
    assert reader.documents(Record("x:1", Row("x", line.encode())), account) == []
    assert account.adds_up and account.documents_dropped == {BAD_RECORD: 1}


def test_unsafe_names_are_told(tmp_path: Path) -> None:
    """A document that reads files above its folder."""
    _, account = read(ObelicsReader(lines(tmp_path, record(("../x.jpg", None), (None, "a")))))
    assert account.images_dropped == {UNSAFE_NAME: 1}


def test_broken_files(tmp_path: Path) -> None:
    """A parquet file of other columns read as empty documents; a file that cannot be read without its name."""
    pq.write_table(pa.table({"url": ["a"]}), tmp_path / "other.parquet")
    (tmp_path / "none.parquet").write_bytes(b"PAR1 none")
    for name in ("other", "none"):
        with pytest.raises(FlamingoError, match=rf"{name}\.parquet"):
            read(ObelicsReader(str(tmp_path / f"{name}.parquet")))
    pq.write_table(pa.Table.from_pylist(RECORDS * 200), tmp_path / "cut.parquet", row_group_size=100, compression=None)
    data = bytearray((tmp_path / "cut.parquet").read_bytes())
    group = pq.read_metadata(tmp_path / "cut.parquet").row_group(2).column(0)
    data[group.data_page_offset : group.data_page_offset + 40] = bytes(40)
    (tmp_path / "cut.parquet").write_bytes(data)
    _, account = read(ObelicsReader(str(tmp_path / "cut.parquet"), keep_text_only=True))
    assert account.documents_kept > 0 and account.documents_dropped == {TRUNCATED: 1}


anything = st.none() | st.text(max_size=3) | st.integers() | st.lists(st.none() | st.text(max_size=2), max_size=3)


@settings(max_examples=150, deadline=None)
@given(
    st.fixed_dictionaries({"images": anything, "texts": anything, "general_metadata": anything | st.just("{\"a\": 1}")})
    | st.builds(record, st.tuples(st.none() | st.text(max_size=2), st.none() | st.text(max_size=2))),
    st.booleans(),
    st.booleans(),
)  # fmt: skip
def test_the_account_adds_up_for_broken_records(content: dict[str, Any], text_only: bool, cut: bool) -> None:
    """A malformed record that raises, is counted twice or not at all, or whose images are."""
    data = json.dumps(content).encode()
    reader, account = ObelicsReader("", keep_text_only=text_only), Account()
    documents = reader.documents(Record("x:1", Row("nowhere/x", data[: len(data) // (1 + cut)])), account)
    assert account.adds_up and account.documents_read == 1 and account.documents_kept == len(documents)
    assert not cut or account.documents_dropped == {BAD_JSON: 1}


@pytest.mark.parametrize(
    ("name", "documents", "images"), [("openstax_astronomy", 175, 589), ("based_cooking", 92, 112)]
)
def test_real_documents_with_their_images(real_data: Path, name: str, documents: int, images: int) -> None:
    """Real pages that lose an image, or text, on the way; images of another folder than the document's not found."""
    beside, account = read(ObelicsReader(str(real_data / name)))
    assert (account.documents_kept, account.images_kept) == (documents, images)
    assert not account.documents_dropped and not account.images_dropped
    content = json.loads((real_data / name / "docs.jsonl").read_text().splitlines()[3])
    assert "\n\n".join(each for each in outline(beside[3]) if isinstance(each, str)) == "\n\n".join(
        text for text in content["texts"] if text
    )
    indexed, _ = read(ObelicsReader(str(real_data / name), images=str(real_data / name)))
    assert [outline(document) for document in indexed] == [outline(document) for document in beside]
