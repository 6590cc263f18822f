"""Documents longer than a sequence → pieces, so that training sees every image, and each with its text.

A document is a row of chunks: one or more media that stand together, and the text up to the next medium; before the
first medium there may be text alone, its lead. Whole chunks are put into a piece as long as they fit a sequence.

- Cuts stand right before a medium, so a text stays behind the medium that it follows. The media that share one text are
  parted only where they are more than a piece may have: then the last ones stay with the text.
- A chunk that is too long keeps its media and as much of its text as fits, cut before a sentence, or else a word.
- Text alone that does not fit beside the next chunk leaves it its last sentences, which lead into the medium, and is a
  piece of its own for the rest. It may be longer than a sequence: training draws a window of it each time. Were it cut
  into sequences, long texts would outnumber the images; were it left beside its medium, windows would rarely show that.

Nothing is repeated and nothing is lost: the pieces one after the other are the document.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

from flamingo.document import Document, Medium, Segment, Text
from flamingo.errors import FlamingoError

LEAST_TOKENS = 16
"""No sequence is shorter."""
ENDS = 2
"""The beginning-of-sequence and end-of-sequence tokens, which a tokenizer may add to a piece."""

_SENTENCE_END = re.compile(r"(?<=[.!?…])[\"'”’»)\]]*(?=\s+\S)|(?<=[。！？])(?=\s*\S)|(?<=\S)(?=\n\s*\S)")
_WORD_END = re.compile(r"(?<=\S)(?=\s+\S)")
_TOKEN = re.compile(r"[A-Za-z]{1,5}|[^\sA-Za-z]|\s(?=\s)|\n(?!\s)")


def estimated_tokens(text: str) -> int:
    """Tokens of a text without its tokenizer, on the long side: one for every five letters of a word, one for every
    digit, sign and further space, and more for characters of several bytes.
    """
    return len(_TOKEN.findall(text)) + (len(text.encode(errors="replace")) - len(text)) // 2


def token_counter(tokenizer: str | None) -> Callable[[str], int]:
    """What counts the tokens of a text: the tokenizer of a folder or hub id; without one, an estimate.

    Raises:
        FlamingoError: where there is no such tokenizer.
    """
    if tokenizer is None:
        return estimated_tokens
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError, KeyError) as error:
        raise FlamingoError(f"tokenizer {tokenizer}: expected a folder or hub id with a tokenizer ({error})") from error
    return lambda text: len(loaded(text, add_special_tokens=False, verbose=False).input_ids)


def check_limits(max_tokens: int | None, max_media: int | None) -> None:
    """Raise FlamingoError for limits that no piece could hold."""
    if max_tokens is not None and max_tokens < LEAST_TOKENS:
        raise FlamingoError(f"max_tokens={max_tokens}: expected at least {LEAST_TOKENS}")
    if max_media is not None and max_media < 1:
        raise FlamingoError(f"max_media={max_media}: expected at least 1")


def split(
    document: Document, *, max_tokens: int | None, max_media: int | None, count_tokens: Callable[[str], int]
) -> list[Document]:
    """The pieces of a document, in order; a document that fits is its own one piece.

    Args:
        max_tokens: of a piece with media, with one for each medium, for each `<|endofchunk|>`, and for the ends of the
            sequence; None: any number.
        max_media: of a piece; None: any number.
        count_tokens: of a text, without special tokens.

    Raises:
        FlamingoError: for limits that no piece could hold.
    """
    check_limits(max_tokens, max_media)
    pieces = _Pieces(max_tokens, max_media, count_tokens)
    for chunk in _chunks(document.segments, pieces.longest_run):
        pieces.add(chunk)
    found = list(pieces.finish())
    return [document] if len(found) <= 1 else [replace(document, segments=segments) for segments in found]


@dataclass(frozen=True)
class _Chunk:
    """Media that stand together, and the text after them."""

    media: tuple[Medium, ...]
    texts: tuple[Text, ...]

    @property
    def segments(self) -> tuple[Segment, ...]:
        return *self.media, *self.texts


def _chunks(segments: Iterable[Segment], longest_run: int | None) -> Iterator[_Chunk]:
    media: list[Medium] = []
    texts: list[Text] = []

    def finished() -> Iterator[_Chunk]:
        # Of too many media the last ones stay with the text, so that most of them have one.
        while longest_run is not None and len(media) > longest_run:
            surplus = len(media) % longest_run or longest_run
            yield _Chunk(tuple(media[:surplus]), ())
            del media[:surplus]
        if media or texts:
            yield _Chunk(tuple(media), tuple(texts))

    for segment in segments:
        if isinstance(segment, Text):
            texts.append(segment)
            continue
        if texts:
            yield from finished()
            media, texts = [], []
        media.append(segment)
    yield from finished()


class _Pieces:
    """The pieces so far, and the one that is open."""

    def __init__(self, max_tokens: int | None, max_media: int | None, count_tokens: Callable[[str], int]):
        self.max_media, self.count = max_media, count_tokens
        self.room = None if max_tokens is None else max_tokens - ENDS
        self.done: list[tuple[Segment, ...]] = []
        self.open: list[_Chunk] = []
        self.used = 0

    @property
    def longest_run(self) -> int | None:
        """Media that may stand together and leave half of the tokens to their text."""
        limits = [limit for limit in (self.max_media, self.room and self.room // 2) if limit is not None]
        return min(limits, default=None)

    def add(self, chunk: _Chunk) -> None:
        """Put a chunk into the open piece, or close that one first."""
        size = self._size(chunk)
        if self.open and not self._fits(chunk, size):
            self._close(leave=size)
        if not self._fits(chunk, size) and chunk.media:
            whole, chunk = self._cut(chunk)
            self.done.append(whole.segments)
            size = self._size(chunk)
        self.open.append(chunk)
        self.used += size

    def finish(self) -> Iterator[tuple[Segment, ...]]:
        """The segments of each piece."""
        self._close(leave=None)
        yield from self.done

    def _size(self, chunk: _Chunk) -> int:
        """Tokens of a chunk with its marks; without a limit nobody asks."""
        if self.room is None:
            return 0
        return len(chunk.media) + sum(self.count(text.text) for text in chunk.texts) + bool(chunk.texts)

    def _fits(self, chunk: _Chunk, size: int) -> bool:
        media = sum(len(each.media) for each in self.open) + len(chunk.media)
        return (self.max_media is None or media <= self.max_media) and (
            self.room is None or self.used + size <= self.room
        )

    def _close(self, leave: int | None) -> None:
        """Close the open piece; of text alone the last sentences stay open if a chunk of `leave` tokens fits behind."""
        lead: _Chunk | None = None
        if leave is not None and self.room is not None and not any(chunk.media for chunk in self.open):
            self.open, lead = self._lead(self.open, self.room - leave - 1)
        if self.open:
            self.done.append(tuple(segment for chunk in self.open for segment in chunk.segments))
        self.open, self.used = ([lead], self._size(lead)) if lead else ([], 0)

    def _lead(self, chunks: list[_Chunk], budget: int) -> tuple[list[_Chunk], _Chunk | None]:
        """Text alone without its last sentences of at most `budget` tokens, and these."""
        *before, last = (text for chunk in chunks for text in chunk.texts)
        text = last.text
        starts = [start for start, _ in _spans(_SENTENCE_END, text, 0, len(text)) if start or before][::-1]
        reach = _reach(len(starts), lambda place: self.count(text[starts[place] :]) <= budget)
        if not reach:
            return chunks, None
        cut = starts[reach - 1]
        kept = (*before, replace(last, text=text[:cut])) if cut else tuple(before)
        return [_Chunk((), kept)], _Chunk((), (replace(last, text=text[cut:]),))

    def _cut(self, chunk: _Chunk) -> tuple[_Chunk, _Chunk]:
        """A chunk that is too long: its media with as much text as fits, and the rest."""
        assert self.room is not None, "only tokens make a chunk too long"
        left, place = self.room - len(chunk.media) - 1, 0
        while (size := self.count(chunk.texts[place].text)) <= left:
            left, place = left - size, place + 1
        before, text, after = chunk.texts[:place], chunk.texts[place], chunk.texts[place + 1 :]
        ends = list(islice(self._ends(text.text, left), left + 1))
        reach = _reach(len(ends), lambda end: self.count(text.text[: ends[end]]) <= left)
        cut = ends[reach - 1] if reach else 0
        head, tail = (replace(text, text=part) for part in (text.text[:cut], text.text[cut:]))
        return _Chunk(chunk.media, (*before, head) if cut else before), _Chunk((), (tail, *after))

    def _ends(self, text: str, budget: int) -> Iterator[int]:
        """Where a text may be cut: behind its sentences; behind the words, or characters, of what is too long.

        Not much further than the budget reaches.
        """
        used = 0
        for start, end in _spans(_SENTENCE_END, text, 0, len(text)):
            size = self.count(text[start:end])
            if size <= budget:
                yield end
                used += size
            else:
                for begin, stop in _spans(_WORD_END, text, start, end):
                    size = self.count(text[begin:stop])
                    yield from (stop,) if size <= budget else range(begin + 1, stop + 1)
                    used += size
            if used > 2 * budget:
                return


def _spans(ends: re.Pattern[str], text: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
    for found in ends.finditer(text, start, stop):
        if start < found.end() < stop:
            yield start, found.end()
            start = found.end()
    yield start, stop


def _reach(count: int, fits: Callable[[int], bool]) -> int:
    """How many of the places 0, 1, … up to `count` fit, each implying those before it.

    Steps are doubled, then halved, so that of a long text little more than what fits is looked at.
    """
    low, high = 0, 1  # `low` places fit, `high` are too many or not known
    while high <= count and fits(high - 1):
        low, high = high, high * 2
    high = min(high, count + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle - 1) else (low, middle)
    return low
