"""One document as a self-contained HTML page to look at: what training would read, with every image as it is.

Everything is inline, nothing runs: style, and images as data URIs. Text of the document is escaped.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from PIL import Image as PilImage

from data_shards.sources.reading import image_header
from flamingo.document import Document, Image, Segment, Text, Video
from flamingo.errors import FlamingoError
from flamingo.files import whole
from flamingo.images import decode
from flamingo.media import visible_media
from flamingo.processing import IGNORED, FlamingoProcessor

SHOWN_BY_BROWSERS = {
    "JPEG": "image/jpeg",
    "PNG": "image/png",
    "WEBP": "image/webp",
    "GIF": "image/gif",
    "AVIF": "image/avif",
    "BMP": "image/bmp",
}
"""Pillow's name of a format → its media type; images of other formats are shown as PNG"""
COLOURS = 8
"""of the style sheet: `--c0` … `--c7`, by the number of a medium"""


@dataclass(frozen=True)
class Picture:
    """An image as it is shown: a data URI, or, where it cannot be decoded, `fault`."""

    name: str
    about: str
    uri: str = ""
    fault: str = ""


@dataclass(frozen=True)
class Token:
    """A token as it is shown: its text, whether it counts in the loss, and the media that it sees (0, 0: none)."""

    text: str
    id: int
    counts: bool
    first: int
    last: int

    @property
    def colour(self) -> int:
        """Number in the palette, that of its last medium."""
        return (self.last - 1) % COLOURS

    @property
    def sees(self) -> str:
        """In words."""
        if not self.last:
            return "sees no medium"
        return f"sees medium {self.first}" if self.first == self.last else f"sees media {self.first} to {self.last}"


def template(module: str, name: str) -> Template:
    """The template `name` in the folder `templates` beside a module's file; it escapes, and refuses names not given.

    It may extend those in this room's own folder: `charts.html` is head and style of pages of charts.
    """
    return Environment(
        loader=FileSystemLoader([Path(file).parent / "templates" for file in (module, __file__)]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template(name)


def write_page(
    document: Document,
    path: str | Path,
    *,
    processor: FlamingoProcessor | None = None,
    media_attention: str = "previous",
    is_prompt: bool = False,
) -> Path:
    """Write a document as an HTML page to `path`, whose folder must exist.

    Segments stand in their order; text that does not count in the loss is grey. An image that cannot be decoded is a
    marked box with the reason; the others are the original files (as PNG where browsers do not show the format).

    Args:
        document: any; what is broken in it is shown, not raised.
        path: of the HTML file.
        processor: of a model; the page then has the document's tokens too, which of them count, and what each sees.
        media_attention: the model's, "previous" or "all".
        is_prompt: whether it is read and not trained on, so that nothing is said of the loss.

    Raises:
        FlamingoError: where `media_attention` is neither.
    """
    tokens, tokens_fault = _tokens(document, processor, media_attention) if processor else ([], "")
    page = template(__file__, "document.html").render(
        key=document.key or "document without a key",
        source=document.source,
        facts=_facts(document, is_prompt),
        metadata=list(_flat(document.metadata)),
        segments=list(_segments(document.segments)),
        tokens=tokens,
        tokens_fault=tokens_fault,
        counted=sum(token.counts for token in tokens),
        colours=COLOURS,
        is_prompt=is_prompt,
    )
    path = Path(path)
    with whole(path) as unfinished:
        unfinished.write_bytes(page.encode("utf-8", "replace"))  # JSON may hold halves of surrogate pairs
    return path


def _facts(document: Document, is_prompt: bool) -> list[tuple[str, str]]:
    texts = [segment for segment in document.segments if isinstance(segment, Text)]
    characters = f"{sum(len(text.text) for text in texts):,}"
    if not is_prompt:
        characters += f", {sum(len(text.text) for text in texts if text.supervised):,} of them supervised"
    return [
        ("segments", f"{len(document.segments):,}"),
        ("media", f"{len(document.media):,}"),
        ("characters", characters),
        *([] if document.complete or is_prompt else [("complete", "no: its last chunk is open")]),
    ]


def _flat(mapping: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Nested metadata as rows of (label, text)."""
    for name, value in mapping.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{before}{name} · ")
        else:
            yield f"{before}{name}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _segments(segments: tuple[Segment, ...]) -> Iterator[dict[str, Any]]:
    """What the template draws of each segment; media are numbered from 1."""
    medium = 0
    for segment in segments:
        if isinstance(segment, Text):
            yield {"text": segment.text, "supervised": segment.supervised}
            continue
        medium += 1
        frames = segment.frames if isinstance(segment, Video) else (segment,)
        kind = f"video of {len(frames)} frames" if isinstance(segment, Video) else "image"
        pictures = [_picture(frame) for frame in frames]
        yield {"medium": medium, "kind": kind, "colour": (medium - 1) % COLOURS, "pictures": pictures}


def _picture(image: Image) -> Picture:
    header = image_header(image.data)
    size = f"{header.format}, {header.width:,} × {header.height:,} pixels, " if header else ""
    name, about = image.name or "image", f"{size}{len(image.data):,} bytes"
    try:
        pixels = decode(image, 3)
    except FlamingoError as error:
        return Picture(name, about, fault=f"{getattr(error, 'reason', 'not usable')}: {error}")
    kind, data = SHOWN_BY_BROWSERS.get(header.format if header else ""), image.data
    if kind is None:
        buffer = io.BytesIO()
        PilImage.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, "PNG")
        kind, data, about = "image/png", buffer.getvalue(), f"{about}, shown as PNG"
    return Picture(name, about, f"data:{kind};base64,{base64.b64encode(data).decode()}")


def _tokens(document: Document, processor: FlamingoProcessor, media_attention: str) -> tuple[list[Token], str]:
    """The tokens of a training sequence of the whole document, or why there are none."""
    try:
        encoding = processor.encode(document, eos=document.complete)
    except FlamingoError as error:
        return [], str(error)
    ids = torch.tensor([encoding.input_ids])
    first, last = visible_media(ids, processor.image_token_id, media_attention=media_attention)
    columns = (encoding.input_ids, encoding.labels, first[0].tolist(), last[0].tolist())
    return [
        Token(processor.decode([token]), token, label != IGNORED, *seen)
        for token, label, *seen in zip(*columns, strict=True)
    ], ""
