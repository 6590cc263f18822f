"""LLaVA-Instruct (Liu et al. 2023, arXiv 2304.08485) and ShareGPT-style conversations with images → documents.

`{"id", "image", "conversations": [{"from": "human"|"gpt", "value"}]}` in a JSON list or in lines; an image stands where
`<image>` does. Beside that: `images` (a list) for `image`, and `messages` of `role` and `content`. As in Otter's form
an image stands before the question that it is marked in; one without a mark before the first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import ijson

from data_shards.account import Account
from data_shards.faults import BAD_RECORD, EMPTY_ANSWER, IMAGE_MARK, NO_IMAGES, OF_TURN, SampleError
from data_shards.sources import Record
from data_shards.sources.images import FilesBeside, ImageSource, ImageStore, open_images
from data_shards.sources.reading import (
    LINES,
    Images,
    Row,
    decode_base64,
    find_files,
    image_file,
    line_records,
    plain,
    read_record,
)
from flamingo.document import Document, Image
from flamingo.errors import FlamingoError
from flamingo.instructions import Turn, instruction_document
from flamingo.processing import IMAGE_TOKEN

_ASKS, _ANSWERS, _SETS = ("human", "user"), ("gpt", "assistant"), "system"
_OTHER_MEDIA = ("video", "videos", "audio", "audios")


class _Message(NamedTuple):
    role: str
    text: str


@dataclass(frozen=True)
class LlavaReader:
    """Conversations about images, as LLaVA-Instruct and ShareGPT-style data have them."""

    input: str
    """file, folder or glob of .json (a list), .jsonl or .jsonl.gz"""
    images: str = ""
    """folder, tar or glob of tars that holds the images; empty: they are files beside the input"""
    spaced: bool = False
    """a space after `User:` and before the answer, as models released through July 2023 were tuned"""
    name: str = "llava"
    """name of the source in its documents; losses are reported by it"""

    long_turns: ClassVar[Literal["rounds"]] = "rounds"

    def parts(self) -> Sequence[str]:
        """The files, sorted. The images are indexed here, once: the reader carries the index to other processes."""
        found = find_files(self.input, (".json", *LINES))
        _ = self._index
        return found

    def records(self, part: str) -> Iterator[Record]:
        """One record a conversation; a JSON list is streamed."""
        return line_records(part) if part.lower().endswith(LINES) else _json_records(part)

    def documents(self, record: Record, account: Account) -> list[Document]:
        """The document of one conversation; none where it is dropped."""
        return read_record(record, account, lambda row, images: [self._document(row, images)])

    def _document(self, row: Row, images: Images) -> Document:
        content = row.mapping()
        named = _named_images(content)
        images.named = len(named)
        rounds, system = _rounds(_messages(content))
        images.turns = len(rounds)
        media = _media_of_rounds(rounds, self._read(named, row.file, images))
        turns: list[Turn] = []
        waiting: tuple[Image, ...] = ()  # of rounds that are left out: later ones are about them
        for place, ((question, answer), shown) in enumerate(zip(rounds, media, strict=True)):
            if not answer.strip():
                images.leave_out(EMPTY_ANSWER, f"round {place + 1}: expected a text as answer")
                waiting += shown
                continue
            turns.append(Turn(_unmarked(question), answer.strip(), waiting + shown, str(place)))
            waiting = ()
        if not turns:
            raise SampleError(EMPTY_ANSWER, "expected a question that is answered")
        for image in waiting:
            images.lose(OF_TURN, f"image {image.name}")
        if system:
            turns[0] = replace(turns[0], question=f"{system}\n{turns[0].question}")
        metadata = {"id": plain(content["id"])} if "id" in content else {}
        return instruction_document(turns, spaced=self.spaced, source=self.name, metadata=metadata)

    def _read(self, named: list[Any], file: str, images: Images) -> list[Image]:
        """The images of a conversation.

        Raises:
            SampleError: where one is not there: rounds would be about nothing.
        """
        found = []
        for place, each in enumerate(named, 1):
            try:
                found.append(self._image(each, file))
            except SampleError as error:
                images.lose(error.reason, f"image {place}: {error.detail}")
        if len(found) < len(named):
            raise SampleError(NO_IMAGES, f"expected {len(named)} images, found {len(found)}")
        return found

    def _image(self, named: Any, file: str) -> Image:
        """An image by its path, as Hugging Face's `{bytes, path}`, or in base64."""
        if isinstance(named, dict):
            named = named.get("path") if named.get("bytes") is None else named["bytes"]
        if isinstance(named, bytes):
            return image_file(named, "image")
        if not isinstance(named, str) or not named:
            raise SampleError(BAD_RECORD, f"expected a path or base64, found {type(named).__name__}")
        if named.startswith("data:"):
            return image_file(decode_base64(named), "image")
        return self._store(file).read(named)

    @cached_property
    def _index(self) -> ImageStore | None:
        return open_images(self.images, "")

    def _store(self, file: str) -> ImageSource:
        return FilesBeside(str(Path(file).parent)) if self._index is None else self._index


def _json_records(part: str) -> Iterator[Record]:
    """A record for each member of a JSON list, which is streamed.

    Raises:
        FlamingoError: where the file is none; it names it.
    """
    try:
        with Path(part).open("rb") as file:
            for number, row in enumerate(ijson.items(file, "item"), 1):
                yield Record(
                    f"{part}:{number}", Row(part, row if isinstance(row, dict) else json.dumps(plain(row)).encode())
                )
    except (ijson.JSONError, OSError, ValueError) as error:
        raise FlamingoError(f"{part}: expected a JSON list of conversations ({error})") from error


def _named_images(content: dict[str, Any]) -> list[Any]:
    """What `image` or `images` name: none, one or several."""
    value = content.get("images", content.get("image"))
    if value in (None, ""):
        return []
    return value if isinstance(value, list) else [value]


def _messages(content: dict[str, Any]) -> list[_Message]:
    """The messages in their order.

    Raises:
        SampleError: where they have another form, or are about videos or sound.
    """
    if other := [key for key in _OTHER_MEDIA if content.get(key)]:
        raise SampleError(BAD_RECORD, f"expected images, found {', '.join(other)}")
    found = content.get("conversations", content.get("messages"))
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise SampleError(BAD_RECORD, "expected a list conversations or messages")
    messages = [_Message(each.get("from", each.get("role")), each.get("value", each.get("content"))) for each in found]
    for place, (role, text) in enumerate(messages, 1):
        if role not in (*_ASKS, *_ANSWERS, _SETS) or not isinstance(text, str):
            raise SampleError(BAD_RECORD, f"message {place}: expected a text from human, gpt or system, found {role!r}")
    return [_Message(role, plain(text)) for role, text in messages]


def _rounds(messages: list[_Message]) -> tuple[list[tuple[str, str]], str]:
    """Questions and answers, and what the system says before; a question at the end without an answer has "".

    Raises:
        SampleError: where question and answer do not alternate.
    """
    system = ""
    if messages and messages[0].role == _SETS:
        system, messages = messages[0].text.strip(), messages[1:]
    rounds: list[tuple[str, str]] = []
    open_question = False
    for place, (role, text) in enumerate(messages, 1):
        if (role in _ANSWERS) != open_question or role == _SETS:
            raise SampleError(BAD_RECORD, f"message {place}: expected questions and answers in turn, found {role}")
        if role in _ASKS:
            rounds.append((text, ""))
        else:
            if IMAGE_TOKEN in text:
                raise SampleError(IMAGE_MARK, f"message {place}: expected {IMAGE_TOKEN} in questions alone")
            rounds[-1] = (rounds[-1][0], text)
        open_question = role in _ASKS
    return rounds, system


def _media_of_rounds(rounds: list[tuple[str, str]], images: list[Image]) -> list[tuple[Image, ...]]:
    """The images of each round: as many as its question has marks; without any mark all stand before the first.

    Raises:
        SampleError: where there are marks, but not as many as images.
    """
    marks = [question.count(IMAGE_TOKEN) for question, _ in rounds]
    if rounds and not any(marks):
        return [tuple(images), *[()] * (len(rounds) - 1)]
    if sum(marks) != len(images):
        raise SampleError(IMAGE_MARK, f"expected a mark for each image, found {sum(marks)} for {len(images)}")
    rest = iter(images)
    return [tuple(next(rest) for _ in range(mark)) for mark in marks]


def _unmarked(question: str) -> str:
    """A question without the marks of its images, nor the line breaks and spaces that set them off."""
    return " ".join(part.strip() for part in question.split(IMAGE_TOKEN) if part.strip())
