"""Instruction documents longer than a sequence: turns are left out or parted from one another, never cut.

`data_shards.splitting` cuts between sentences and media, which would part an answer from its question or a question
from its picture. What is done instead depends on what the turns are:

- contexts, examples that stand before a query (MIMIC-IT): the first ones are left out until the others fit. Nothing is
  lost, since each of them is the query of a document of its own.
- rounds of one conversation (LLaVA, ShareGPT): it becomes several, each of as many rounds in a row as fit. Each begins
  with the media that its first round is about, which are repeated for it.

A turn that does not fit alone is left out, and so is a document whose query is one: a window of it would train answers
to questions that cannot be read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from data_shards.faults import SURPLUS, TOO_LONG
from data_shards.splitting import ENDS, check_limits
from flamingo.document import Document, Medium, Segment, Text
from flamingo.instructions import ANSWER
from flamingo.processing import END_OF_CHUNK


@dataclass(frozen=True)
class Fitted:
    """The documents that a document of turns became, and why turns of it are in none of them: a reason each."""

    documents: list[Document]
    left_out: list[str]


def fit_turns(
    document: Document,
    turns: Literal["contexts", "rounds"],
    *,
    max_tokens: int | None,
    max_media: int | None,
    count_tokens: Callable[[str], int],
) -> Fitted:
    """Documents whose turns fit a sequence; one that fits is its own.

    Args:
        document: of `flamingo.instructions.instruction_document`; its metadata may hold `ids`, one for each turn.
        turns: what they are, see above.
        max_tokens: of a document, with its marks and the ends of the sequence; None: any number.
        max_media: of a document; None: any number.
        count_tokens: of a text, without special tokens.

    Raises:
        FlamingoError: for limits that no document could hold.
    """
    check_limits(max_tokens, max_media)
    size = _Size(max_tokens, max_media, count_tokens)
    found = _in_view(document)
    if size.excess(found) is None:
        return Fitted([document], [])
    spans, left_out = _last_turns(found, size) if turns == "contexts" else _rounds(found, size)
    return Fitted([_piece(document, found, *span) for span in spans], left_out)


@dataclass(frozen=True)
class _Turn:
    """A turn's media and texts; `view` are the media that it is about, its own or those that stood last before."""

    media: tuple[Medium, ...]
    texts: tuple[Text, ...]
    view: tuple[Medium, ...]


def _in_view(document: Document) -> list[_Turn]:
    """The turns of a document: each ends with what is answered."""
    turns: list[_Turn] = []
    media: list[Medium] = []
    texts: list[Text] = []
    for segment in document.segments:
        if not isinstance(segment, Text):
            media.append(segment)
            continue
        texts.append(segment)
        if segment.supervised:
            view = tuple(media) or (turns[-1].view if turns else ())
            turns.append(_Turn(tuple(media), tuple(texts), view))
            media, texts = [], []
    return turns


class _Size:
    """What fits a sequence."""

    def __init__(self, max_tokens: int | None, max_media: int | None, count: Callable[[str], int]):
        self.max_tokens, self.max_media, self.count = max_tokens, max_media, count

    def excess(self, turns: Sequence[_Turn]) -> str | None:
        """Why turns in a row, with the media that the first is about, are too much; None where they fit."""
        media = len(turns[0].view) + sum(len(turn.media) for turn in turns[1:])
        if self.max_media is not None and media > self.max_media:
            return SURPLUS
        if self.max_tokens is None:
            return None
        tokens = ENDS + media + sum(self._tokens(text.text) for turn in turns for text in turn.texts)
        return TOO_LONG if tokens > self.max_tokens else None

    def _tokens(self, text: str) -> int:
        marks = 0
        for mark in (ANSWER, END_OF_CHUNK):
            marks += text.count(mark)
            text = text.replace(mark, "")
        return marks + self.count(text)


def _last_turns(turns: Sequence[_Turn], size: _Size) -> tuple[list[tuple[int, int]], list[str]]:
    """The span of the longest end that fits, and the reasons of the turns before; no span where the query does not."""
    reasons: list[str] = []
    for first in range(len(turns)):
        reason = size.excess(turns[first:])
        if reason is None:
            return [(first, len(turns))], reasons
        reasons.append(reason)
    return [], reasons


def _rounds(turns: Sequence[_Turn], size: _Size) -> tuple[list[tuple[int, int]], list[str]]:
    """Spans of as many rounds in a row as fit, and the reasons of those that do not fit alone."""
    spans: list[tuple[int, int]] = []
    reasons: list[str] = []
    first = 0
    while first < len(turns):
        reason, last = size.excess(turns[first : first + 1]), first + 1
        if reason is not None:
            reasons.append(reason)
        else:
            while last < len(turns) and size.excess(turns[first : last + 1]) is None:
                last += 1
            spans.append((first, last))
        first = last
    return spans, reasons


def _piece(document: Document, turns: Sequence[_Turn], first: int, last: int) -> Document:
    segments: list[Segment] = [*turns[first].view, *turns[first].texts]
    for turn in turns[first + 1 : last]:
        segments += [*turn.media, *turn.texts]
    metadata: dict[str, Any] = document.metadata
    if "ids" in metadata:
        metadata = metadata | {"ids": metadata["ids"][first:last]}
    return replace(document, segments=tuple(segments), metadata=metadata)
