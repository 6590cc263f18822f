"""Values by their ids in a file on disk: what is too large for memory, read once in its order, then found by id.

The images of MIMIC-IT are one table or one JSON object of many gigabytes, its instructions one object of hundreds of
megabytes. Each becomes an SQLite database in one streaming pass, which any number of processes read at once. A store
carries the size and the time of the file that it was made of, and is made again where these differ.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import ijson
import pyarrow as pa
import pyarrow.parquet as pq

from data_shards.faults import SampleError
from data_shards.sources.reading import decode_base64, plain
from flamingo.errors import FlamingoError
from flamingo.files import whole

FORMAT = 1
ROWS = 16
"""rows of a parquet file that are held at once: images"""
_BUFFER = 1 << 20
"""bytes of a parquet file that are read ahead: with them a row group is streamed, without it is read as a whole"""
_SETTINGS = "PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA page_size=16384; PRAGMA cache_size=-16384;"
"""until it is whole a store has another name, so that it needs no journal"""
_TABLES = """
CREATE TABLE entries (number INTEGER PRIMARY KEY, id TEXT UNIQUE NOT NULL, value NOT NULL);
CREATE TABLE again (id TEXT NOT NULL);
CREATE TABLE source (state TEXT NOT NULL);
"""

Value = bytes | str
"""of an image its bytes, or in words why there are none; of anything else its JSON"""
Rows = Callable[[str], Iterator[tuple[str, Value]]]
"""Reads a file: ids and values in its order, ids perhaps several times."""


class Store:
    """A finished store. It may be sent to other processes, which open it for themselves."""

    def __init__(self, path: str):
        self.path = path
        self._opened: sqlite3.Connection | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_opened": None}

    def get(self, key: str) -> Value | None:
        """The value of an id; of an id that stands several times the first; None where it is not there."""
        found = self._connection.execute("SELECT value FROM entries WHERE id = ?", (plain(key),)).fetchone()
        return None if found is None else found[0]

    def __contains__(self, key: str) -> bool:
        return self._connection.execute("SELECT 1 FROM entries WHERE id = ?", (plain(key),)).fetchone() is not None

    def ids(self) -> Iterator[str]:
        """Each id once, in the order of the source."""
        return (key for (key,) in self._connection.execute("SELECT id FROM entries ORDER BY number"))

    def again(self) -> Iterator[str]:
        """Ids that stood in the source before, in its order, as often as they came again."""
        return (key for (key,) in self._connection.execute("SELECT id FROM again ORDER BY rowid"))

    @property
    def _connection(self) -> sqlite3.Connection:
        if self._opened is None:
            self._opened = sqlite3.connect(f"file:{quote(self.path)}?mode=ro&immutable=1", uri=True)
        return self._opened


def store_of(source: str, rows: Rows, folder: str) -> Store:
    """The store of a file: the one that is in the folder, or a new one.

    Args:
        source: the file.
        rows: reads it; of one file always the same function.
        folder: made where it is not there.

    Raises:
        FlamingoError: where the file cannot be read, or the store not be written.
    """
    try:
        status = Path(source).stat()
    except OSError as error:
        raise FlamingoError(f"{source}: expected a file ({error.strerror})") from error
    place = os.path.realpath(source)
    state = json.dumps([FORMAT, place, status.st_size, status.st_mtime_ns])
    name = hashlib.blake2b(f"{rows.__name__}:{place}".encode(errors="surrogateescape"), digest_size=8).hexdigest()
    path = Path(folder, f"{Path(source).stem}-{name}.sqlite")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path.with_suffix(".lock")):
            if _state(path) != state:
                _write(path, rows(source), state)
    except (OSError, sqlite3.Error) as error:
        raise FlamingoError(f"{path}: cannot hold the index of {source} ({error})") from error
    return Store(str(path))


def _write(path: Path, rows: Iterator[tuple[str, Value]], state: str) -> None:
    with whole(path) as unfinished, closing(sqlite3.connect(unfinished)) as connection:
        connection.executescript(_SETTINGS + _TABLES)
        for key, value in rows:
            entry = (plain(key), value)
            if not connection.execute("INSERT OR IGNORE INTO entries (id, value) VALUES (?, ?)", entry).rowcount:
                connection.execute("INSERT INTO again VALUES (?)", entry[:1])
        connection.execute("INSERT INTO source VALUES (?)", (state,))
        connection.commit()


def _state(path: Path) -> str | None:
    """What a store says of its source; None where there is none."""
    if not path.exists():
        return None
    with closing(sqlite3.connect(path)) as connection:
        try:
            return str(connection.execute("SELECT state FROM source").fetchone()[0])
        except sqlite3.DatabaseError:  # some other file
            return None


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock; who comes second waits for what the first one makes."""
    with path.open("w") as file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# -- what is read ------------------------------------------------------------------------------------------------------


def instruction_rows(path: str) -> Iterator[tuple[str, Value]]:
    """The entries of `data` in an instruction file, as JSON.

    Raises:
        FlamingoError: where it is no JSON file or has none.
    """
    found = False
    for key, value in _members(path, "data"):
        found = True
        yield key, _json(value)
    if not found:
        raise FlamingoError(f'{path}: expected instructions, {{"data": {{ID: {{"instruction": …, "answer": …}}}}}}')


def mapping_rows(path: str) -> Iterator[tuple[str, Value]]:
    """The members of a JSON object, as JSON.

    Raises:
        FlamingoError: where it is no JSON file.
    """
    for key, value in _members(path, ""):
        yield key, _json(value)


def image_rows(path: str) -> Iterator[tuple[str, Value]]:
    """The images of `{ID: base64}` in JSON, or of a parquet file with a column `base64` and the ids as its index.

    Raises:
        FlamingoError: where it is neither.
    """
    if path.lower().endswith(".parquet"):
        return _parquet_images(path)
    if path.lower().endswith(".json"):
        return ((key, _image(value)) for key, value in _members(path, ""))
    raise FlamingoError(f"images {path}: expected a .parquet or .json file of base64 images by their ids")


def _members(path: str, prefix: str) -> Iterator[tuple[str, Any]]:
    """The members of an object in a JSON file, one by one."""
    try:
        with Path(path).open("rb") as file:
            yield from ijson.kvitems(file, prefix)
    except (ijson.JSONError, OSError, ValueError) as error:
        raise FlamingoError(f"{path}: expected a JSON object ({error})") from error


def _json(value: Any) -> str:
    return json.dumps(plain(value), ensure_ascii=False)


def _image(value: Any) -> Value:
    """Bytes of base64, alone or as the one member of a list; or what is wrong with it."""
    if isinstance(value, list) and len(value) == 1:
        (value,) = value
    try:
        return decode_base64(value.decode("ascii", "replace") if isinstance(value, bytes) else value)
    except SampleError as error:
        return error.detail


def _parquet_images(path: str) -> Iterator[tuple[str, Value]]:
    try:
        with pq.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False) as file:
            index = _index_column(path, file.schema_arrow)
            for batch in file.iter_batches(batch_size=ROWS, columns=[index, "base64"], use_threads=False):
                columns = (batch.column(name).to_pylist() for name in (index, "base64"))
                yield from ((str(key), _image(value)) for key, value in zip(*columns, strict=True))
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, FlamingoError):
            raise
        raise FlamingoError(f"{path}: expected a parquet file of images ({error})") from error


def _index_column(path: str, schema: pa.Schema) -> str:
    """The column of the ids: pandas' index, by whatever name, else the only other column of strings."""
    told = (schema.pandas_metadata or {}).get("index_columns", [])
    usual = [name for name in (*told, "__index_level_0__") if isinstance(name, str) and name in schema.names]
    strings = [
        field.name
        for field in schema
        if field.name != "base64" and (pa.types.is_string(field.type) or pa.types.is_large_string(field.type))
    ]
    if "base64" not in schema.names or not (usual or len(strings) == 1):
        raise FlamingoError(f"{path}: expected a column base64 and the image ids as index, found {schema.names}")
    return usual[0] if usual else strings[0]
