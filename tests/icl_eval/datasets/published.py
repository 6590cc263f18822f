"""Tiny files as data sets are published."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image as PilImage


def picture(path: Path, level: int = 0) -> bytes:
    """Write a small picture of one grey level to a path; its bytes."""
    buffer = io.BytesIO()
    PilImage.new("RGB", (4, 4), (level, level, level)).save(buffer, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())
    return buffer.getvalue()


def write_json(path: Path, content: Any) -> None:
    """Write one JSON value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_lines(path: Path, rows: Sequence[Any]) -> None:
    """Write a JSON value a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
