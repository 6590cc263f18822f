"""Made sources: small images, tars of members, and what a reader makes of them."""

from __future__ import annotations

import base64
import tarfile
from typing import Any

from data_shards.account import Account
from data_shards.sources import Reader
from flamingo.document import Document, Image, Text, Video
from tests.tiny import picture


def image_bytes(seed: int, suffix: str = "png") -> bytes:
    """A small image file, another for each seed."""
    return picture(seed, suffix=suffix).data


def base64_of(seed: int) -> str:
    """The same in base64."""
    return base64.b64encode(image_bytes(seed)).decode()


def link(name: str, target: str = "/etc/passwd") -> tarfile.TarInfo:
    """The header of a symbolic link."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    return info


def read(reader: Reader | Any) -> tuple[list[Document], Account]:
    """All documents of a source and their account, which adds up."""
    documents, account = [], Account()
    for part in reader.parts():
        for record in reader.records(part):
            documents += reader.documents(record, account)
    assert account.adds_up
    assert account.images_kept == sum(len(document.images) for document in documents)
    return documents, account


def outline(document: Document) -> list[Any]:
    """Texts as they are, images as their bytes, videos as lists of bytes."""
    shown: list[Any] = []
    for segment in document.segments:
        if isinstance(segment, Text):
            shown.append(segment.text)
        elif isinstance(segment, Video):
            shown.append([frame.data for frame in segment.frames])
        else:
            assert isinstance(segment, Image)
            shown.append(segment.data)
    return shown
