"""Files that are there whole or not at all, and what is in them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flamingo.errors import FlamingoError


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield another name beside `path` for a file or folder to be written; it takes its name when the block ends well.

    What stood under the name before is replaced. A failing block leaves that as it was, and nothing unfinished.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    _remove(unfinished)
    try:
        yield unfinished
        if path.is_dir():
            _remove(path)
        os.replace(unfinished, path)
    finally:
        _remove(unfinished)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FlamingoError: where it cannot be read, or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FlamingoError(f"{path}: expected a JSON object ({error})") from error
    if not isinstance(found, dict):
        raise FlamingoError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
