"""Rows of parquet, csv, tsv, JSON lines and JSON lists, streamed."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_shards.faults import TRUNCATED, SampleError
from data_shards.sources import Record
from data_shards.sources.reading import Row, line_records
from flamingo.errors import FlamingoError

TABLES = (".parquet", ".csv", ".tsv", ".jsonl", ".jsonl.gz", ".json")
"""endings of tables"""
_BATCH = 64
"""rows of a parquet file that are held at once: they may hold images"""
_CELL = 1 << 27
"""bytes of a cell of csv that are read"""


def table_records(part: str, columns: Iterable[str] | None = None) -> Iterator[Record]:
    """A record for each row, its content a `Row`; where the file breaks off, the last record says so.

    Args:
        part: the file; its ending says what it is.
        columns: of a parquet file, those that are read where they are there; None: all.

    Raises:
        FlamingoError: where the file cannot be read at all; it names the file.
    """
    name = part.lower()
    if name.endswith(".parquet"):
        return _parquet_records(part, columns)
    if name.endswith((".csv", ".tsv")):
        return _csv_records(part, "\t" if name.endswith(".tsv") else ",")
    if name.endswith(".json"):
        return row_records(part, read_json(part))
    return line_records(part)


def read_json(part: str) -> Any:
    """The content of one JSON file.

    Raises:
        FlamingoError: where it is none; it names the file.
    """
    try:
        return json.loads(Path(part).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise FlamingoError(f"{part}: expected a JSON file ({error})") from error


def row_records(part: str, content: Any) -> Iterator[Record]:
    """A record for each object of a JSON list.

    Raises:
        FlamingoError: where it is no list; it names the file.
    """
    if not isinstance(content, list):
        raise FlamingoError(f"{part}: expected a list of objects, found {type(content).__name__}")
    for number, row in enumerate(content, 1):
        yield Record(f"{part}:{number}", Row(part, row if isinstance(row, dict) else json.dumps(row).encode()))


def _parquet_records(part: str, columns: Iterable[str] | None) -> Iterator[Record]:
    number = 0
    try:
        with pq.ParquetFile(part) as file:
            there = file.schema_arrow.names
            wanted = there if columns is None else [name for name in columns if name in there]
            if not wanted:
                raise FlamingoError(f"{part}: expected columns {sorted(columns or ())}, found {there}")
            for batch in file.iter_batches(batch_size=_BATCH, columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    yield Record(f"{part}:{number}", Row(part, row))
    except FlamingoError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        if not number:
            raise FlamingoError(f"{part}: expected a parquet file ({error})") from error
        yield Record(f"{part}:{number + 1}", SampleError(TRUNCATED, str(error)))


def _csv_records(part: str, delimiter: str) -> Iterator[Record]:
    csv.field_size_limit(_CELL)
    line = 0
    try:
        # Bytes that are no UTF-8 come through as in file names, and are cleaned where they are text.
        with Path(part).open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            rows = csv.DictReader(file, delimiter=delimiter)
            for row in rows:
                line = rows.line_num
                yield Record(f"{part}:{line}", Row(part, {name: cell for name, cell in row.items() if name}))
    except (csv.Error, OSError) as error:
        if not line:
            raise FlamingoError(f"{part}: expected a table ({error})") from error
        yield Record(f"{part}:{line + 1}", SampleError(TRUNCATED, str(error)))
