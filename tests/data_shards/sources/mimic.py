"""MIMIC-IT's files made on the spot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_shards.sources.mimic_it import MimicItReader
from tests.data_shards.sources.made import base64_of


def instruction(
    question: str, answer: Any, image_ids: Any = None, rel_ins_ids: Sequence[str] | None = None
) -> dict[str, Any]:
    """One entry of `data`."""
    return {"instruction": question, "answer": answer, "image_ids": image_ids, "rel_ins_ids": rel_ins_ids}


def pictures(*ids: str) -> dict[str, str]:
    """An image in base64 for each id, another for each."""
    return {key: base64_of(number) for number, key in enumerate(ids)}


Entries = Mapping[str, Any] | Sequence[tuple[str, Any]]
"""Values by their ids; as pairs an id may stand twice."""


def as_object(entries: Entries) -> str:
    """A JSON object."""
    pairs = entries.items() if isinstance(entries, Mapping) else entries
    return "{" + ", ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in pairs) + "}"


def write_instructions(folder: Path, name: str, data: Entries) -> Path:
    """`{name}_instructions.json`."""
    path = folder / f"{name}_instructions.json"
    path.write_text('{"meta": {"version": "0.0.1"}, "data": ' + as_object(data) + "}")
    return path


def write_images(path: Path, images: Entries, index: str = "") -> Path:
    """`{ID: base64}` as JSON, or as parquet with the ids as its index."""
    if path.suffix == ".json":
        path.write_text(as_object(images))
    else:
        keys, values = zip(*(images.items() if isinstance(images, Mapping) else images), strict=True)
        pq.write_table(pa.table({"base64": pa.array(values), index or "__index_level_0__": pa.array(keys)}), path)
    return path


def mimic_it(
    folder: Path,
    name: str,
    data: Entries,
    images: Entries | None = None,
    train: Mapping[str, Any] | None = None,
    form: str = "parquet",
    **options: Any,
) -> MimicItReader:
    """A dataset in a folder, and its reader."""
    path = write_instructions(folder, name, data)
    if images is not None:
        options["images"] = str(write_images(folder / f"{name}_images.{form}", images))
    if train is not None:
        (folder / f"{name}_train.json").write_text(json.dumps(train))
        options["train"] = str(folder / f"{name}_train.json")
    return MimicItReader(str(path), **options)
