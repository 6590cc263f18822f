"""The page of one document: complete, self-contained, and safe to open."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image as PilImage

from data_shards.page import write_page
from flamingo import Document, FlamingoError, Image, Text, Video
from tests.data_shards.planted import huge_png
from tests.tiny import picture, tiny_flamingo


class Parsed(HTMLParser):
    """Tags, attributes of a kind, and the text by class of the innermost element that has one."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.classes: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        named = dict(attrs)
        if tag == "img":
            self.sources.append(named["src"] or "")
        self.classes.append(named.get("class") or "")

    def handle_data(self, data: str) -> None:
        if data.strip() and self.tags[-1] != "style":
            self.texts.append((self.classes[-1], data))


def page_of(tmp_path: Path, *segments: Text | Image | Video, **options: object) -> tuple[str, Parsed]:
    document = Document(segments, "k1", "made", {"url": "http://example.org/?a=1&b=<i>", "deep": {"n": [1, None]}})
    page = write_page(document, tmp_path / "page.html", **options).read_text()  # type: ignore[arg-type]
    return page, Parsed(page)


def test_the_page_holds_everything_in_order(tmp_path: Path) -> None:
    """Catches segments, frames, metadata or whole images that are missing, and text out of its order."""
    files = [picture(n, 16, suffix=suffix) for n, suffix in enumerate(("png", "jpg", "png", "png"))]
    segments = (Text("first"), files[0], Text("grey", supervised=False), Video((files[1], files[2])), files[3])
    page, parsed = page_of(tmp_path, *segments)
    kinds = ["png", "jpeg", "png", "png"]
    assert parsed.sources == [
        f"data:image/{kind};base64,{base64.b64encode(file.data).decode()}"
        for kind, file in zip(kinds, files, strict=True)
    ]
    assert page.index("first") < page.index(parsed.sources[0]) < page.index("grey") < page.index(parsed.sources[1])
    said = [text for _, text in parsed.texts]
    for expected in (
        "k1",
        "of made",
        "http://example.org/?a=1&b=<i>",
        "deep · n",
        "[1, null]",
        "9, 5 of them supervised",
    ):
        assert expected in said
    assert ("text", "first") in parsed.texts and ("text silent", "grey") in parsed.texts
    assert "medium 2, video of 2 frames" in said


def test_of_a_prompt_nothing_is_said_about_training(tmp_path: Path) -> None:
    """Catches a reader of evaluation prompts who wonders which part of them is trained on."""
    _, processor = tiny_flamingo(tmp_path)
    segments = (Text("first"), Text("grey", supervised=False))
    page, parsed = page_of(tmp_path, *segments, processor=processor, is_prompt=True)
    assert ("text", "grey") in parsed.texts
    assert "supervised" not in page and "loss" not in page


def test_nothing_in_a_document_becomes_markup(tmp_path: Path) -> None:
    """Catches a web page's script or image link that would run, or be fetched, when a document is looked at."""
    evil = "</div><script>alert(1)</script><img src=http://example.org/x.png> & \x00\x1b \ud800"
    name = '"><script>alert(2)</script>'
    document = Document((Text(evil), Image(picture().data, name), Image(b"", name)), f"<b>{name}", name, {name: evil})
    page = write_page(document, tmp_path / "page.html").read_text()
    parsed = Parsed(page)
    assert not {"script", "b"} & set(parsed.tags) and parsed.tags.count("img") == 1
    assert not re.search(r"(?:src|href)=\"(?!data:)", page) and "default-src 'none'" in page
    assert any("<script>alert(1)</script>" in text for _, text in parsed.texts)


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"<html>404</html>", "no image file"), (b"", "no image file"), (huge_png(), "image too large")],
)
def test_a_broken_image_is_a_box_with_its_reason(tmp_path: Path, data: bytes, reason: str) -> None:
    """Catches an image that breaks the page, is left out, or that the browser would have to refuse."""
    _, parsed = page_of(tmp_path, Image(data, "x.jpg"), Text("a"), picture())
    (box,) = [text for kind, text in parsed.texts if kind == "broken"]
    assert box.startswith(f"{reason}: x.jpg") and len(parsed.sources) == 1


def test_formats_that_browsers_do_not_show_become_png(tmp_path: Path) -> None:
    """Catches an empty frame where a TIFF should be."""
    buffer = io.BytesIO()
    PilImage.new("RGB", (5, 4), (10, 200, 30)).save(buffer, "TIFF")
    page, parsed = page_of(tmp_path, Image(buffer.getvalue(), "x.tif"), Text("a"))
    data = base64.b64decode(parsed.sources[0].removeprefix("data:image/png;base64,"))
    with PilImage.open(io.BytesIO(data)) as shown:
        assert (shown.format, shown.size, shown.getpixel((0, 0))) == ("PNG", (5, 4), (10, 200, 30))
    assert "TIFF, 5 × 4 pixels" in page and "shown as PNG" in page


def test_tokens_say_what_counts_and_what_they_see(tmp_path: Path) -> None:
    """Catches tokens beside another document's labels, and media counted from 0."""
    _, processor = tiny_flamingo(tmp_path)
    segments = (Text("a"), picture(1), Text("b", supervised=False), picture(2), Text("c"))
    page, _ = page_of(tmp_path, *segments, processor=processor)
    spans = re.findall(r'<span class="([^"]*)" title="id \d+, ([^,"]*), ([^"]*)">([^<]*)</span>', page)
    shown = [(text.replace("&lt;", "<").replace("&gt;", ">"), said, sees) for _, said, sees, text in spans]
    yes, no = "supervised", "not supervised"
    assert shown == [
        ("<s>", no, "sees no medium"),
        ("a", yes, "sees no medium"),
        ("<|endofchunk|>", yes, "sees no medium"),
        ("<image>", no, "sees medium 1"),
        ("b", no, "sees medium 1"),
        ("<|endofchunk|>", no, "sees medium 1"),
        ("<image>", no, "sees medium 2"),
        ("c", yes, "sees medium 2"),
        ("<|endofchunk|>", yes, "sees medium 2"),
        ("</s>", yes, "sees medium 2"),
    ]
    assert "10 tokens of the whole document, 5 of them supervised" in page
    page, _ = page_of(tmp_path, *segments, processor=processor, media_attention="all")
    assert "sees media 1 to 2" in page
    page, parsed = page_of(tmp_path, Text("an <image> mark"), processor=processor)
    assert any("found 1 image tokens but received 0 images" in text for kind, text in parsed.texts if "broken" in kind)
    with pytest.raises(FlamingoError, match="media_attention='none'"):
        page_of(tmp_path, *segments, processor=processor, media_attention="none")


def test_an_empty_document_has_a_page(tmp_path: Path) -> None:
    """Catches the one document that one most wants to look at being the one that cannot be shown."""
    page = write_page(Document(()), tmp_path / "page.html").read_text()
    assert "document without a key" in page and "no segments" in page
