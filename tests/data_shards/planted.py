"""Tars made by hand, with faults planted in them."""

from __future__ import annotations

import base64
import io
import json
import struct
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path

from flamingo import Image
from tests.tiny import picture

Member = tuple[str, bytes | tarfile.TarInfo]
"""A name with the bytes of its file, or with a header of its own (a link)."""


def write_tar(path: Path, members: Iterable[Member]) -> Path:
    """A tar of these members, in their order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return path


def png(seed: int = 0, size: int = 16) -> bytes:
    return picture(seed, size).data


def pair(key: str, seed: int = 0, caption: str = "a cat") -> list[Member]:
    """An image and its caption, as img2dataset writes them."""
    about = {"key": key, "caption": caption, "url": f"http://example.org/{key}", "status": "success"}
    return [
        (f"{key}.jpg", picture(seed, 16, suffix="jpg").data),
        (f"{key}.json", json.dumps(about).encode()),
        (f"{key}.txt", caption.encode()),
    ]


def written(key: str, *segments: dict[str, object], **files: bytes) -> list[Member]:
    """A document of ours; files are named `_0png` for `{key}.0.png`."""
    record = json.dumps({"segments": segments, "source": "planted", "metadata": {}}).encode()
    images: list[Member] = [(f"{key}.{name[1]}.{name[2:]}", data) for name, data in files.items()]
    return [*images, (f"{key}.json", record)]


def good(key: str, seed: int = 0) -> list[Member]:
    """A sound document of an image and a text."""
    return written(key, {"image": "0.png"}, {"text": "a cat"}, _0png=png(seed))


def mmc4(key: str, images: int = 2, matrix: object = None, **fields: object) -> list[Member]:
    """A document of OpenFlamingo's MMC4 tars: images of more than 10 kB in base64, one sentence each."""
    pictures: list[Image] = [picture(seed, 80) for seed in range(images)]
    rows = [[0.3 + 0.1 * (row == column) for column in range(images)] for row in range(images)]
    record = {
        "url": f"http://example.org/{key}",
        "text_list": [f"sentence {n}" for n in range(images)],
        "image_info": [
            {
                "image_name": f"{n}.png",
                "raw_url": f"http://example.org/{n}",
                "matched_text_index": n,
                "matched_sim": 0.4,
                "image_base64": base64.b64encode(each.data).decode(),
            }
            for n, each in enumerate(pictures)
        ],
        "similarity_matrix": rows if matrix is None else matrix,
        "could_have_url_duplicate": 0,
    }
    return [(f"{key}.json", json.dumps(record | fields).encode())]


def symlink(name: str, target: str) -> Member:
    header = tarfile.TarInfo(name)
    header.type, header.linkname = tarfile.SYMTYPE, target
    return name, header


def huge_png(width: int = 50_000, height: int = 50_000) -> bytes:
    """A PNG of a few hundred bytes that says it has so many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
