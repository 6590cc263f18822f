"""MMC4 (Zhu et al. 2023, allenai/mmc4) and OpenFlamingo's training forms of it → documents.

A line is a web page: sentences, and images that are each matched to a sentence. An image stands before its sentence,
and sentences are joined by a space, as in OpenFlamingo. Unlike there, images stand in the order of their sentences;
several of one sentence in the order of the record. OpenFlamingo's tars hold `{key}.json`, the same with the images in
base64 (`image_info[i].image_base64`), and pages that ChatGPT wrote (`is_gpt`, `example`, `image_map`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from scipy.optimize import linear_sum_assignment

from data_shards.account import Account
from data_shards.faults import (
    BAD_MATRIX,
    BAD_RECORD,
    DISSIMILAR,
    MISSING_IMAGE,
    NO_DOCUMENT,
    SURPLUS,
    TOO_SMALL,
    UNPLACED,
    SampleError,
)
from data_shards.sources import Record
from data_shards.sources.images import ImageStore, open_images
from data_shards.sources.reading import (
    LINES,
    Images,
    Row,
    checked_segments,
    decode_base64,
    find_files,
    image_file,
    line_records,
    parse_object,
    plain,
    read_record,
)
from data_shards.sources.tars import TarSample, sample_records
from flamingo.document import Document, Image
from flamingo.errors import FlamingoError

_GPT_MARK = re.compile(r"(_!_IMAGE\d+_!_)")


@dataclass(frozen=True)
class _Placed:
    """An image and the sentence before which it stands."""

    sentence: int
    number: int
    similarity: float
    image: Image


@dataclass(frozen=True)
class Mmc4Reader:
    """MMC4 as released or with its images inside, OpenFlamingo's tars of it, and ChatGPT-written sequences."""

    input: str
    """file, folder or glob of .jsonl, .jsonl.gz, .zip (of .jsonl) or .tar (OpenFlamingo's `{key}.json`)"""
    images: str = ""
    """folder, tar or glob of tars that holds the images, img2dataset's output too; empty: they are inside, in base64"""
    image_table: str = ""
    """table (parquet, csv, tsv, json, jsonl) with columns url and file, for images stored under other names"""
    assignment: Literal["stored", "fresh"] = "stored"
    """each image's sentence: the stored match, or a fresh linear assignment of the images that are there"""
    min_similarity: float = 0.24
    """images less similar to their sentence are dropped (0.24: OpenFlamingo's default; Otter's is 0.32)"""
    max_images: int = 0
    """images of a document, the first in reading order; 0: all, since a conversion splits long documents"""
    min_image_bytes: int = 0
    """smaller image files are dropped (OpenFlamingo's reader drops up to 10 kB)"""
    keep_text_only: bool = False
    """keep the text of documents that have no image, or none left"""
    name: str = "mmc4"
    """name of the source in its documents; losses are reported by it"""

    def __post_init__(self) -> None:
        if self.assignment not in ("stored", "fresh"):
            raise FlamingoError(f"assignment={self.assignment!r}: expected stored or fresh")
        if min(self.max_images, self.min_image_bytes) < 0:
            raise FlamingoError("max_images, min_image_bytes: expected numbers from 0 on")

    def parts(self) -> Sequence[str]:
        """The files, sorted. The images are indexed here, once: the reader carries the index to other processes."""
        _ = self._store
        return find_files(self.input, LINES, (".tar",))

    def records(self, part: str) -> Iterator[Record]:
        """One record a line, or a sample of a tar."""
        return sample_records(part) if part.lower().endswith(".tar") else line_records(part)

    def documents(self, record: Record, account: Account) -> list[Document]:
        """The document of one record; none where it is dropped.

        A similarity matrix that is there must have a row an image, a column a sentence and finite numbers, also where
        the matches are stored: they were made of it. Only a fresh assignment needs one.
        """
        return read_record(record, account, lambda content, images: [self.document(_json(content), images)])

    def urls(self) -> Iterator[tuple[str, str]]:
        """(raw_url, image_name) of every image that the source names, in its order and with its repetitions.

        Malformed records are passed over: a conversion counts them.
        """
        for part in find_files(self.input, LINES, (".tar",)):
            for record in self.records(part):
                try:
                    infos = _json(record.content).get("image_info")
                except SampleError:
                    continue
                for info in infos if isinstance(infos, list) else []:
                    if isinstance(info, dict) and isinstance(url := info.get("raw_url"), str):
                        name = info.get("image_name")
                        yield plain(url), plain(name) if isinstance(name, str) else ""

    def document(self, content: dict[str, Any], images: Images) -> Document:
        """The document of one JSON object; `images` is told what it names and what is lost.

        Raises:
            SampleError: where there is none.
        """
        parts = self._chat(content, images) if content.get("is_gpt") else self._page(content, images)
        url = content.get("url")
        return Document(
            checked_segments(parts, " ", keep_text_only=self.keep_text_only),
            source=self.name,
            metadata={"url": plain(url)} if isinstance(url, str) else {},
        )

    def _page(self, content: dict[str, Any], images: Images) -> list[str | Image]:
        """Sentences, each after its images."""
        infos, sentences = content.get("image_info"), content.get("text_list")
        if not isinstance(infos, list):
            raise SampleError(BAD_RECORD, "expected a list image_info")
        images.named = len(infos)
        if not isinstance(sentences, list) or not all(isinstance(sentence, str) for sentence in sentences):
            raise SampleError(BAD_RECORD, "expected text_list, a list of strings")
        matrix = similarity_matrix(content.get("similarity_matrix"), len(infos), len(sentences))
        if matrix is None and self.assignment == "fresh" and infos:
            raise SampleError(BAD_MATRIX, "a fresh assignment needs one")
        found = self._found(infos, images)
        if self.assignment == "fresh" and matrix is not None and found:
            placed = _match(found, matrix, images)
        else:
            placed = _stored(found, infos, matrix, len(sentences), images)
        parts: list[str | Image] = []
        ready = iter(self._wanted(placed, images))
        upcoming = next(ready, None)
        for number, sentence in enumerate(sentences):
            while upcoming is not None and upcoming.sentence == number:
                parts.append(upcoming.image)
                upcoming = next(ready, None)
            parts.append(sentence)
        return parts

    def _found(self, infos: list[Any], images: Images) -> dict[int, Image]:
        """Number → image, of those that are there."""
        found = {}
        for number, info in enumerate(infos):
            try:
                found[number] = self._image(info, number)
            except SampleError as error:
                images.lose(error.reason, error.detail)
        return found

    def _image(self, info: Any, number: int) -> Image:
        if not isinstance(info, dict):
            raise SampleError(BAD_RECORD, f"image_info[{number}]: expected an object")
        names = [info[field] for field in ("image_name", "raw_url") if isinstance(info.get(field), str) and info[field]]
        called = names[0] if names else f"image {number}"
        if info.get("image_base64") is not None:
            image = image_file(decode_base64(info["image_base64"]), called)
        elif names and self._store is not None:
            image = self._store.read(*names)
        else:
            raise SampleError(MISSING_IMAGE, called)
        return self._large_enough(image)

    def _large_enough(self, image: Image) -> Image:
        if len(image.data) < self.min_image_bytes:
            raise SampleError(TOO_SMALL, f"{image.name}: {len(image.data)} bytes")
        return image

    def _wanted(self, placed: list[_Placed], images: Images) -> list[_Placed]:
        """Those that are similar enough, in reading order, up to the maximum."""
        similar = []
        for each in placed:
            if each.similarity < self.min_similarity:
                images.lose(DISSIMILAR, f"{each.image.name}: {each.similarity:.4f}")
            else:
                similar.append(each)
        similar.sort(key=lambda each: (each.sentence, each.number))
        end = self.max_images or len(similar)
        for each in similar[end:]:
            images.lose(SURPLUS, each.image.name)
        return similar[:end]

    def _chat(self, content: dict[str, Any], images: Images) -> list[str | Image]:
        """A page that ChatGPT wrote: text with marks; spaces around them go, as in OpenFlamingo."""
        text, entries = content.get("example"), content.get("image_map")
        entries = entries if isinstance(entries, dict) else {}
        pieces = _GPT_MARK.split(text) if isinstance(text, str) else []
        unused = entries.keys() - set(pieces)
        images.named = len(pieces) // 2 + len(unused)
        if not isinstance(text, str):
            raise SampleError(BAD_RECORD, "expected a string example")
        for mark in sorted(unused):
            images.lose(UNPLACED, mark)
        parts: list[str | Image] = []
        kept = 0
        for piece in pieces:
            if not _GPT_MARK.fullmatch(piece):
                parts.append(piece.strip(" "))
                continue
            try:
                entry = entries.get(piece)
                if not isinstance(entry, dict) or entry.get("base64_image") is None:
                    raise SampleError(MISSING_IMAGE, piece)
                image = self._large_enough(image_file(decode_base64(entry["base64_image"]), piece))
                if self.max_images and kept == self.max_images:
                    raise SampleError(SURPLUS, piece)
            except SampleError as error:
                images.lose(error.reason, error.detail)
                continue
            parts.append(image)
            kept += 1
        return parts

    @cached_property
    def _store(self) -> ImageStore | None:
        return open_images(self.images, self.image_table)


def sample_document(key: str, members: dict[str, bytes]) -> Document:
    """The document of one sample of OpenFlamingo's tars, with the default options of `Mmc4Reader`.

    Raises:
        SampleError: where there is none; it names the key.
    """
    try:
        return replace(Mmc4Reader("").document(_json_member(members), Images()), key=key)
    except SampleError as error:
        raise SampleError.of(error, key) from error
    except RecursionError as error:
        raise SampleError(BAD_RECORD, "nested too deeply", key) from error


def _json(content: Row | TarSample | SampleError) -> dict[str, Any]:
    if isinstance(content, SampleError):
        raise content
    return content.mapping() if isinstance(content, Row) else _json_member(content.read())


def _json_member(members: dict[str, bytes]) -> dict[str, Any]:
    if "json" not in members:
        raise SampleError(NO_DOCUMENT, f"expected a member json, found {sorted(members)}")
    return parse_object(members["json"])


# -- matching ----------------------------------------------------------------------------------------------------------


def similarity_matrix(value: Any, images: int, sentences: int) -> np.ndarray | None:
    """(images, sentences) float64; None where a record has none.

    Raises:
        SampleError: where it has another shape, or holds what is no finite number.
    """
    if value is None:
        return None
    expected = f"expected {images} rows of {sentences} finite numbers"
    rows = value if isinstance(value, list) else [None]
    if len(rows) != images or not all(isinstance(row, list) and len(row) == sentences for row in rows):
        raise SampleError(BAD_MATRIX, f"{expected}, found another shape")
    try:
        matrix = np.array(rows, dtype=np.float64).reshape(images, sentences)
    except (ValueError, TypeError, OverflowError) as error:
        raise SampleError(BAD_MATRIX, f"{expected} ({error})") from error
    if not np.isfinite(matrix).all():
        raise SampleError(BAD_MATRIX, f"{expected}, found NaN, infinity or null")
    return matrix


def assign(similarity: np.ndarray) -> np.ndarray:
    """(images, sentences) similarities → (images,) sentences: the linear assignment of the greatest sum.

    Images beyond the number of sentences go to the sentence that is most similar (MMC4's rule).
    """
    sentences = similarity.argmax(axis=1)
    rows, columns = linear_sum_assignment(similarity, maximize=True)
    sentences[rows] = columns
    return sentences


def _match(found: dict[int, Image], matrix: np.ndarray, images: Images) -> list[_Placed]:
    """A fresh assignment of the images that are there."""
    if not matrix.shape[1]:
        for image in found.values():
            images.lose(UNPLACED, f"{image.name}: there is no sentence")
        return []
    numbers = list(found)
    sentences = assign(matrix[numbers])
    return [
        _Placed(int(sentence), number, float(matrix[number, sentence]), found[number])
        for number, sentence in zip(numbers, sentences, strict=True)
    ]


def _stored(
    found: dict[int, Image], infos: list[Any], matrix: np.ndarray | None, sentences: int, images: Images
) -> list[_Placed]:
    """The stored matches. A similarity that is not stored is the matrix's, or the lowest there is."""
    placed = []
    for number, image in found.items():
        sentence, similarity = infos[number].get("matched_text_index"), _finite(infos[number].get("matched_sim"))
        if not isinstance(sentence, int) or isinstance(sentence, bool) or not 0 <= sentence < sentences:
            images.lose(UNPLACED, f"{image.name}: matched_text_index {sentence!r} of {sentences} sentences")
            continue
        if similarity is None:
            similarity = -1.0 if matrix is None else float(matrix[number, sentence])
        placed.append(_Placed(sentence, number, similarity, image))
    return placed


def _finite(value: Any) -> float | None:
    """A finite number, or None."""
    try:
        number = float(value) if isinstance(value, (int, float)) else math.nan
    except OverflowError:  # an integer beyond all floats
        return None
    return number if math.isfinite(number) else None
