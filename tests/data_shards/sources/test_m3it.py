"""M3IT's rows of instruction, input, output and images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_shards.faults import BAD_BASE64, BAD_RECORD, EMPTY_ANSWER, NO_IMAGE, NO_IMAGES, OF_DROPPED
from data_shards.shards import open_shards
from data_shards.sources.m3it import M3itReader
from tests.data_shards.sources.made import base64_of, image_bytes, outline, read
from tests.data_shards.test_command import run

END = "<|endofchunk|>"


def row(*images: str, **more: Any) -> dict[str, Any]:
    return {"instruction": "Look.", "inputs": "What?", "outputs": "This.", "image_base64_str": list(images)} | more


def lines(folder: Path, *rows: Any) -> str:
    (folder / "train.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    return str(folder / "train.jsonl")


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_rows_become_turns(tmp_path: Path, form: str) -> None:
    """Catches an input that is lost, an empty one that leaves a line, and images of another form."""
    rows = [row(base64_of(1), base64_of(2)), row(base64_of(3).rstrip("="), inputs=""), row()]
    path = lines(tmp_path, *rows, row(image_base64_str=base64_of(4)))
    if form == "parquet":
        path = str(tmp_path / "train.parquet")
        pq.write_table(pa.Table.from_pylist([*rows, row(base64_of(4))]), path)
    documents, account = read(M3itReader(path))
    one, two, three, four = map(image_bytes, (1, 2, 3, 4))
    asked, said = "User:Look.\nWhat? GPT:<answer>", f"This.{END}"
    assert [outline(document) for document in documents] == [
        [one, two, asked, said], [three, "User:Look. GPT:<answer>", said], [asked, said], [four, asked, said]
    ]  # fmt: skip
    assert not account.dropped and account.images_kept == 4 and account.turns_kept == 4


def test_frames_become_one_video(tmp_path: Path) -> None:
    """Catches frames as media of their own, and a video that is dropped with one of its frames."""
    documents, account = read(M3itReader(lines(tmp_path, row(*map(base64_of, (1, 2)), "!")), video=True))
    assert outline(documents[0])[0] == [image_bytes(1), image_bytes(2)]
    assert account.images_dropped == {BAD_BASE64: 1}


@pytest.mark.parametrize(
    ("content", "reason", "images"),
    [
        (row(base64_of(1), "!"), NO_IMAGES, {BAD_BASE64: 1, OF_DROPPED: 1}),
        (row("PGh0bWw+"), NO_IMAGES, {NO_IMAGE: 1}),
        (row(base64_of(1), outputs=" "), EMPTY_ANSWER, {OF_DROPPED: 1}),
        (row(outputs=None), EMPTY_ANSWER, {}),
        (row(instruction="", inputs=None), BAD_RECORD, {}),
        ([1], BAD_RECORD, {}),
    ],
)
def test_faulty_rows_are_told(tmp_path: Path, content: Any, reason: str, images: dict[str, int]) -> None:
    """Catches a question about a picture that is not there, and answers that are empty."""
    _, account = read(M3itReader(lines(tmp_path, content)))
    assert account.documents_dropped == {reason: 1} and account.images_dropped == images


def test_the_command_converts_and_validates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a reader that the command line does not know."""
    path = lines(tmp_path, row(base64_of(1)), row("!"))
    assert run(monkeypatch, "convert", "m3it", path, "--out", tmp_path / "out", "--processes", 1) == 0
    assert [outline(each)[0] for each in [open_shards(tmp_path / "out")[0]]] == [image_bytes(1)]
    assert run(monkeypatch, "validate", "m3it", path) == 1
    assert run(monkeypatch, "convert", "m3it", path, "--out", tmp_path / "no", "--processes", 1, "--strict") == 2
