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


def write_instructions(folder: Path, name: str, data: Mapping[str, Any]) -> Path:
    """`{name}_instructions.json`."""
    path = folder / f"{name}_instructions.json"
    path.write_text(json.dumps({"meta": {"version": "0.0.1"}, "data": data}))
    return path


def write_images(path: Path, images: Mapping[str, Any] | Sequence[tuple[str, Any]], index: str = "") -> Path:
    """`{ID: base64}` as JSON, or as parquet with the ids as its index; pairs may hold an id twice."""
    pairs = list(images.items()) if isinstance(images, Mapping) else list(images)
    if path.suffix == ".json":
        members = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in pairs)
        path.write_text("{" + ", ".join(members) + "}")
    else:
        keys, values = zip(*pairs, strict=True)
        pq.write_table(pa.table({"base64": pa.array(values), index or "__index_level_0__": pa.array(keys)}), path)
    return path


def mimic_it(
    folder: Path,
    name: str,
    data: Mapping[str, Any],
    images: Mapping[str, Any] | Sequence[tuple[str, Any]] | None = None,
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
