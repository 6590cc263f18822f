"""The interleaved document: the one record that sources become, training reads, and prompts are.

A document is an ordered list of text and media segments. Media are kept as the encoded bytes of their files, so that a
document travels through shards, loaders and evaluations without being decoded before its pixels are needed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Text:
    """A run of text. `supervised` says whether its tokens count in the loss."""

    text: str
    supervised: bool = True


@dataclass(frozen=True)
class Image:
    """One image: the bytes of an encoded file (PNG, JPEG, WebP, …) and its file name, for messages and its suffix."""

    data: bytes = field(repr=False)
    name: str = ""


@dataclass(frozen=True)
class Video:
    """Several frames that a token sees as one medium, in order of time."""

    frames: tuple[Image, ...]


Medium = Image | Video
Segment = Text | Image | Video


@dataclass(frozen=True)
class Document:
    """An interleaved document.

    `key` names it in messages and shards, `source` says where it came from (losses are reported by source), and
    `metadata` is carried along. `complete=False` makes it a prompt: its last chunk stays open for the model.
    """

    segments: tuple[Segment, ...]
    key: str = ""
    source: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    complete: bool = True

    @property
    def media(self) -> tuple[Medium, ...]:
        """The media segments, in reading order."""
        return tuple(segment for segment in self.segments if not isinstance(segment, Text))

    @property
    def images(self) -> tuple[Image, ...]:
        """The images, in reading order, the frames of videos among them."""
        return tuple(
            image for medium in self.media for image in (medium.frames if isinstance(medium, Video) else (medium,))
        )
