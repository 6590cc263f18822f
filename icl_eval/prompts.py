"""From examples to what a model reads: a task's template filled in, as chunks for the engine, as text or document."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from flamingo.document import Document, Segment, Text
from flamingo.errors import FlamingoError
from flamingo.processing import END_OF_CHUNK
from icl_eval.datasets import Example
from icl_eval.engine import Chunk, Library
from icl_eval.sources import Pool
from icl_eval.tasks import IMAGE, SLOTS, Task

_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Shown:
    """A demonstration as a prompt has it.

    Attributes:
        example: whose texts they are.
        answer: what stands at the template's `{answer}` or `{label}`.
        pictured: whose media are shown: its own, unless a control swaps them; None: text only.
    """

    example: Example
    answer: str
    pictured: Example | None


@dataclass(frozen=True)
class Prompt:
    """What a model is shown and asked.

    Attributes:
        shown: the demonstrations, in order.
        query: whose question it is.
        pictured: whose media the query shows.
        candidates: answers to choose among; none where the model answers freely.
    """

    shown: tuple[Shown, ...]
    query: Example
    pictured: Example
    candidates: tuple[str, ...] = ()

    @property
    def demonstrations(self) -> tuple[str, ...]:
        """Ids of the examples that are shown."""
        return tuple((each.pictured or each.example).id for each in self.shown)

    @property
    def answers(self) -> tuple[str, ...]:
        """The demonstrations' answers."""
        return tuple(each.answer for each in self.shown)


class Template:
    """A task's template.

    Raises:
        FlamingoError: it has a field after its answer. In use, where an example lacks a field that it names, or has
            other media than it has marks; the message names the task's file and the example.
    """

    def __init__(self, task: Task, pool: Pool):
        self.task, self.pool = task, pool
        slot = next(f"{{{slot}}}" for slot in SLOTS if f"{{{slot}}}" in task.template)
        before, _, self.after = task.template.partition(slot)
        self.texts = before.split(IMAGE)
        if field := _FIELD.search(self.after):
            raise FlamingoError(
                f"{task.file}: template: {field[0]} after {slot}, expected nothing to be filled in there"
            )
        self._answers: dict[tuple[str, ...], tuple[str, ...]] = {}

    def demonstration(self, shown: Shown) -> Chunk:
        """A whole chunk."""
        parts = self._parts(shown.example, shown.pictured)
        return Chunk(_joined([*parts, self.answer(shown.answer)]), self.task.separator)

    def query(self, prompt: Prompt) -> Chunk:
        """The chunk that stays open."""
        return Chunk(_joined(self._parts(prompt.query, prompt.pictured)))

    def answer(self, text: str) -> str:
        """An answer as it goes on from an open chunk."""
        return text + self.after

    def answers(self, candidates: tuple[str, ...]) -> tuple[str, ...]:
        """Those of all candidates; made once where queries share them."""
        if candidates is not self.pool.candidates:
            return tuple(map(self.answer, candidates))
        if candidates not in self._answers:
            self._answers[candidates] = tuple(map(self.answer, candidates))
        return self._answers[candidates]

    def chunks(self, prompt: Prompt) -> tuple[Chunk, ...]:
        """The whole prompt."""
        return (*map(self.demonstration, prompt.shown), self.query(prompt))

    def _parts(self, example: Example, pictured: Example | None) -> list[int | str]:
        media = () if pictured is None else self.pool.indices(pictured)
        marks = len(self.texts) - 1
        if pictured is not None and marks != 1 and marks != len(media):
            raise FlamingoError(
                f"{self.task.file}: template: {marks} times {IMAGE}, but example {pictured.id!r} of "
                f"{self.task.dataset} has {len(media)} media"
            )
        places: list[tuple[int, ...]] = [media] if marks == 1 else [(index,) for index in media] or [()] * marks
        parts: list[int | str] = [self._filled(self.texts[0], example)]
        for place, text in zip(places, self.texts[1:], strict=True):
            parts += [*place, self._filled(text, example)]
        return parts

    def _filled(self, text: str, example: Example) -> str:
        def value(match: re.Match[str]) -> str:
            if match[1] == "question":
                return example.question
            if match[1] not in example.fields:
                raise FlamingoError(
                    f"{self.task.file}: template: {match[0]}, but example {example.id!r} of {self.task.dataset} has "
                    f"question, {', '.join(example.fields) or 'and no fields'}"
                )
            return example.fields[match[1]]

        return _FIELD.sub(value, text)


def _joined(parts: Sequence[int | str]) -> tuple[int | str, ...]:
    """Neighbouring texts as one, empty ones left out."""
    joined: list[int | str] = []
    for part in parts:
        last = joined[-1] if joined else 0
        if isinstance(part, str) and isinstance(last, str):
            joined[-1] = last + part
        elif part != "":
            joined.append(part)
    return tuple(joined)


def rendered(chunks: Sequence[Chunk]) -> str:
    """A prompt as the tokenizer reads it, media as `<image>`."""
    *shown, query = ["".join(IMAGE if isinstance(part, int) else part for part in chunk.parts) for chunk in chunks]
    ends = (END_OF_CHUNK + chunk.separator for chunk in chunks)
    return "".join(text + end for text, end in zip(shown, ends, strict=False)) + query


def fingerprint(chunks: Sequence[Chunk], prompt: Prompt) -> str:
    """SHA-256 of the rendered prompt and of the ids of what it shows, 16 hexadecimal digits."""
    shown = "\n".join((rendered(chunks), *prompt.demonstrations, prompt.pictured.id))
    return hashlib.sha256(shown.encode()).hexdigest()[:16]


def prompt_document(library: Library, chunks: Sequence[Chunk]) -> Document:
    """A prompt as the document that a model goes on from."""
    *shown, query = chunks
    segments: list[Segment] = []
    for chunk in shown:
        segments += chunk.segments(library.media(chunk.media), "")
    segments += query.segments(library.media(query.media))
    return Document(tuple(each for each in segments if each != Text("")), complete=False)
