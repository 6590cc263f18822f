"""Statistics against numbers counted by hand."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image as PilImage
from rich.console import Console

from data_shards.faults import BAD_JSON, NO_IMAGE, NOT_A_TAR, TRUNCATED
from data_shards.shards import write_shards
from data_shards.sources.reading import image_header
from data_shards.statistics import Statistics, Summary, statistics, summarise
from flamingo import Document, FlamingoError, Image, Text, Video
from tests.data_shards.planted import good, huge_png, pair, write_tar
from tests.tiny import picture, save_backbones, tokenizer


def image(width: int, height: int, kind: str = "PNG") -> Image:
    buffer = io.BytesIO()
    PilImage.new("RGB", (width, height), "red").save(buffer, kind)
    return Image(buffer.getvalue(), f"x.{kind.lower()}")


def made(folder: Path) -> list[Document]:
    """Four documents in two shards."""
    documents = [
        Document((image(30, 20), Text("abcde"), image(40, 50, "JPEG"), Text("fg")), "a"),
        Document((Text("0123456789"),), "b"),
        Document((Video((image(8, 9, "WEBP"), image(8, 9, "WEBP"))), Text("xyz")), "c"),
        Document((Image(b"<html>", "x.jpg"), Image(huge_png(), "y.png"), Text("")), "d"),
    ]
    write_shards(documents, folder, max_samples=2)
    return documents


def test_counts_are_those_counted_by_hand(tmp_path: Path) -> None:
    """Catches frames of videos, broken images or the second shard being left out, and edges being exchanged."""
    documents = made(tmp_path)
    found = statistics(tmp_path)
    assert (found.shards, found.documents, found.samples_form, found.tokens) == (2, 4, "documents", None)
    assert found.bytes == sum(path.stat().st_size for path in tmp_path.glob("*.tar"))
    assert found.images == {2: 3, 0: 1}
    assert found.characters == {7: 1, 10: 1, 3: 1, 0: 1}
    assert found.formats == {"PNG": 2, "JPEG": 1, "WEBP": 2, NO_IMAGE: 1}
    assert found.shorter_edges == {20: 1, 40: 1, 8: 2, 50_000: 1}
    assert found.longer_edges == {30: 1, 50: 1, 9: 2, 50_000: 1}
    files = [f for d in documents for m in d.media for f in (m.frames if isinstance(m, Video) else (m,))]
    assert found.image_bytes == sum(len(file.data) for file in files) and not found.unread


def test_tokens_are_those_of_the_processor(tmp_path: Path) -> None:
    """Catches marks counted as the many tokens into which a tokenizer that does not know them cuts them."""
    _, language = save_backbones(tmp_path)
    made(tmp_path / "set")
    # characters are tokens; a mark for each medium, and one for each end of a chunk
    assert statistics(tmp_path / "set", str(language)).tokens == Counter([7 + 2 + 2, 10 + 1, 3 + 1 + 1, 2])
    assert len(tokenizer()("<image>").input_ids) > 1
    with pytest.raises(FlamingoError, match="expected a folder or hub id with a tokenizer"):
        statistics(tmp_path / "set", str(tmp_path / "nowhere"))


def test_processes_count_the_same(tmp_path: Path) -> None:
    """Catches shards lost where counts of several processes are added."""
    made(tmp_path)
    assert statistics(tmp_path, processes=2) == statistics(tmp_path, processes=1)


def test_foreign_and_broken_tars_are_counted(tmp_path: Path) -> None:
    """Catches faults that end the count, or samples that vanish from it without a reason."""
    write_tar(tmp_path / "a.tar", [*pair("a"), *pair("b", caption="two")])
    found = statistics(tmp_path)
    assert (found.samples_form, found.documents, found.images, found.characters) == ("pairs", 2, {1: 2}, {5: 1, 3: 1})
    (tmp_path / "a.tar").write_bytes(b"<html>")
    whole = write_tar(tmp_path / "c.tar", [*good("a"), ("b.json", b"{"), *good("c")]).read_bytes()
    (tmp_path / "c.tar").write_bytes(whole[: whole.index(b"c.json") + 520])
    found = statistics(tmp_path, samples="documents")
    assert found.documents == 1 and found.unread == {NOT_A_TAR: 1, TRUNCATED: 1, BAD_JSON: 1}


def test_summaries(tmp_path: Path) -> None:
    """Catches percentiles off by one, and a mean of the values instead of the documents."""
    assert summarise(Counter({1: 3, 5: 1})) == Summary(4, 8, 2.0, 1, 1, 5, 5)
    assert summarise(Counter(dict.fromkeys(range(1, 101), 1))) == Summary(100, 5050, 50.5, 1, 50, 95, 100)
    assert summarise(Counter()) is None


def test_table_and_json(tmp_path: Path) -> None:
    """Catches JSON that cannot be written, and numbers that the table leaves out."""
    made(tmp_path)
    found = statistics(tmp_path)
    content = json.loads(json.dumps(found.as_dict()))
    assert content["documents"] == 4 and content["text_only"] == 1
    assert content["images_per_document"] == {"0": 1, "2": 3}
    assert content["shorter_edge"]["median"] == 20 and content["characters"]["total"] == 20
    screen = Console(file=io.StringIO(), width=120)
    found.print(screen)
    shown = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "4 documents" in shown and "PNG 2" in shown and "50,000" in shown and "1 document without images" in shown


def test_the_plot_is_written_and_repeats(tmp_path: Path) -> None:
    """Catches plots of sets that have no images, one value, or nothing at all, and files that change with the day."""
    made(tmp_path / "set")
    found = statistics(tmp_path / "set")
    alone = Statistics("x", "documents", images=Counter({0: 1}), characters=Counter({1: 1}))
    for name, each in (("full", found), ("alone", alone), ("empty", Statistics("x", "documents"))):
        assert each.plot(tmp_path / f"{name}.svg").read_bytes().startswith(b"<?xml")
    assert found.plot(tmp_path / "again.svg").read_bytes() == (tmp_path / "full.svg").read_bytes()
    with PilImage.open(found.plot(tmp_path / "full.PNG")) as opened:
        assert (opened.format, opened.size) == ("PNG", (1650, 480))
    with pytest.raises(FlamingoError, match=r"ends in \.png or \.svg"):
        found.plot(tmp_path / "x.pdf")


def test_headers_tell_formats(tmp_path: Path) -> None:
    """Catches a header that is taken from the name, and a huge one that is refused or decoded."""
    assert image_header(picture(1, 16, suffix="jpg").data) == ("JPEG", 16, 16)
    assert image_header(huge_png(10_000, 10_000)) == ("PNG", 10_000, 10_000)
    assert image_header(huge_png()) == ("PNG", 50_000, 50_000)
    assert image_header(b"") is None and image_header(b"<html>") is None
