"""One's own documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_shards.faults import BAD_JSON, BAD_RECORD, EMPTY, MISSING_IMAGE, NO_IMAGE, UNSAFE_NAME
from data_shards.sources.folder import FolderReader
from flamingo.document import Text
from flamingo.errors import FlamingoError
from tests.data_shards.sources.made import image_bytes, outline, read


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    for seed in (1, 2):
        (tmp_path / "pictures" / f"{seed}.png").write_bytes(image_bytes(seed))
    (tmp_path / "page.jpg").write_bytes(b"<html>")
    return tmp_path


def write(folder: Path, *lines: Any) -> None:
    shown = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "documents.jsonl").write_text("\n".join(shown), encoding="utf-8")


def test_a_document_by_hand(folder: Path) -> None:
    """The form that the documentation shows not read: blank lines, a byte order mark, videos, text without loss."""
    one, two = {"image": "pictures/1.png"}, {"video": ["pictures/1.png", "pictures/2.png"]}
    line = {"document": ["a", one, {"text": "b", "supervised": False}, two, "c"], "metadata": {"of": "me"}}
    write(folder, "\ufeff" + json.dumps(line), "", {"document": ["text alone"]})
    for given in (folder, folder / "documents.jsonl"):
        documents, account = read(FolderReader(str(given), name="mine"))
        assert outline(documents[0]) == ["a", image_bytes(1), "b", [image_bytes(1), image_bytes(2)], "c"]
        assert documents[0].segments[2] == Text("b", supervised=False)
        assert (documents[0].metadata, documents[0].source) == ({"of": "me"}, "mine")
        assert outline(documents[1]) == ["text alone"]
        assert (account.documents_kept, account.images_kept) == (2, 3)


@pytest.mark.parametrize(
    ("line", "reason", "said"),
    [
        ("{", BAD_JSON, ""),
        ("[]", BAD_RECORD, "expected a JSON object"),
        ({"documents": ["a"]}, BAD_RECORD, "expected document and perhaps metadata, found documents"),
        ({"document": "a"}, BAD_RECORD, "expected document to be a list"),
        ({"document": ["a"], "metadata": 3}, BAD_RECORD, "metadata"),
        ({"document": ["a"], "title": "b"}, BAD_RECORD, "found document, title"),
        ({"document": []}, EMPTY, ""),
        ({"document": [" "]}, EMPTY, ""),
        ({"document": ["a", 3]}, BAD_RECORD, "entry 2"),
        (
            {"document": ["a", {"imge": "pictures/1.png"}]},
            BAD_RECORD,
            "entry 2 of document: expected image, found",
        ),
        ({"document": [{"image": "pictures/1.png", "text": "a"}]}, BAD_RECORD, "entry 1"),
        ({"document": [{"image": ["pictures/1.png"]}]}, BAD_RECORD, "the name of an image file"),
        ({"document": [{"text": "a", "supervised": "no"}]}, BAD_RECORD, "true or false"),
        ({"document": [{"text": None}]}, BAD_RECORD, "string"),
        ({"document": ["a", {"video": []}]}, BAD_RECORD, "frames"),
        ({"document": ["a", {"video": "pictures/1.png"}]}, BAD_RECORD, "frames"),
        ({"document": ["a", {"image": "pictures/3.png"}]}, MISSING_IMAGE, "pictures/3.png"),
        ({"document": ["a", {"image": "pictures/1.png"}, {"image": "no.png"}]}, MISSING_IMAGE, "entry 3"),
        ({"document": ["a", {"image": "../1.png"}]}, UNSAFE_NAME, "../1.png"),
        ({"document": ["a", {"video": ["pictures/1.png", "/etc/passwd"]}]}, UNSAFE_NAME, "/etc/passwd"),
        ({"document": ["a", {"image": "page.jpg"}]}, NO_IMAGE, "page.jpg"),
    ],
)
def test_what_is_not_understood_is_told_with_its_line(folder: Path, line: Any, reason: str, said: str) -> None:
    """A misspelt key passed over, half a document kept, a message that does not lead to the line."""
    write(folder, {"document": ["fine"]}, line)
    documents, account = read(FolderReader(str(folder)))
    assert len(documents) == 1 and account.documents_dropped == {reason: 1}
    [place] = account.examples[reason]
    assert place.startswith(f"{folder / 'documents.jsonl'}:2") and said in place
    assert account.images_kept == 0


def test_a_folder_without_documents_says_what_to_write(tmp_path: Path) -> None:
    """A newcomer who is not told what the file is called and what it holds."""
    with pytest.raises(FlamingoError, match=r'documents\.jsonl: expected .* such as \{"document"'):
        FolderReader(str(tmp_path)).parts()
