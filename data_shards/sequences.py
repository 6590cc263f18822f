"""Documents → training sequences: a window of the document, its tokens, the labels that count, how its media are seen.

The rules are those of Flamingo (appendix A) or of OpenFlamingo: at most `max_tokens` tokens and `max_media` media, cut
from the document at a random place. All randomness comes from the generator that the caller seeds by position, and
nothing is drawn that is not wanted: the same seed gives the same windows whatever else is switched on behind them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from torch import Tensor
from transformers import BatchFeature

from data_shards.faults import IMAGE_MARK, NOTHING_SUPERVISED, SampleError
from flamingo.document import Document, Segment, Text
from flamingo.errors import FlamingoError
from flamingo.images import Crop, View
from flamingo.processing import IGNORED, IMAGE_TOKEN, RULES, Encoding, FlamingoProcessor

ASPECTS = (3 / 4, 4 / 3)
"""Between which a crop's width ÷ height is drawn (torchvision's random resized crop)."""


@dataclass(frozen=True)
class Sequences:
    """Makes a training sequence of a document.

    Args:
        processor: of the model.
        max_tokens: tokens of a sequence, with its marks.
        max_media: media of a sequence.
        next_media: probability that the texts of a sequence belong to the medium that comes next, not to the one
            before (Flamingo: ½ on web pages, where texts stand before their pictures as well as after them).
        media_attention: the model's, for the sequences that do not.
        rules: where `<|endofchunk|>` stands and what counts, see `flamingo.processing.render`.
        leading_space: probability that a space is put before the texts of a sequence, where they have none and a
            medium or nothing stands before them (Flamingo: ½).
        flip: probability that left and right of a medium are exchanged.
        crop: least share of its area that is seen of a medium; 1: no crop. The share is drawn from there to 1, width
            ÷ height from `ASPECTS`, evenly in its logarithm, and the place evenly.
        packing: several sequences share a row, for a model built with `packing=True`, see `pack`.
        row_media: media of a packed row; None: any number.
    """

    processor: FlamingoProcessor
    max_tokens: int = 256
    max_media: int = 5
    next_media: float = 0.0
    media_attention: str = "previous"
    rules: Literal["flamingo", "open_flamingo"] = "flamingo"
    leading_space: float = 0.0
    flip: float = 0.0
    crop: float = 1.0
    packing: bool = False
    row_media: int | None = None

    def __post_init__(self) -> None:
        for name in ("next_media", "leading_space", "flip"):
            if not 0 <= getattr(self, name) <= 1:
                raise FlamingoError(f"{name}={getattr(self, name)}: expected a probability")
        if not 0 < self.crop <= 1:
            raise FlamingoError(f"crop={self.crop}: expected a share of the area, above 0")
        if self.max_tokens < 2 or self.max_media < 1:
            raise FlamingoError(
                f"max_tokens={self.max_tokens}, max_media={self.max_media}: expected at least 2 and at least 1"
            )
        if self.row_media is not None and self.row_media < self.max_media:
            raise FlamingoError(f"row_media={self.row_media}: expected at least max_media={self.max_media}")
        if self.rules not in RULES:
            raise FlamingoError(f"rules={self.rules!r}: expected {' or '.join(RULES)}")
        if self.leading_space and self.rules == "open_flamingo":
            raise FlamingoError("leading_space: expected 0 by the rules of open_flamingo, which remove such spaces")

    def __call__(self, document: Document, generator: np.random.Generator) -> Encoding:
        """The sequence of one document; at least one of its tokens counts in the loss.

        Raises:
            SampleError: where no token of the document does, or a text holds `<image>`; it names the document.
        """
        if marks := image_marks(document):
            raise SampleError(IMAGE_MARK, f"document {document.key or '?'}: {marks} {IMAGE_TOKEN} in its texts")
        if self.leading_space and generator.random() < self.leading_space:
            document = _spaced(document)
        asking = asks(document)
        for window, reaches_end in self._windows(document, generator, asking=asking):
            whole = self.processor.encode(window, eos=reaches_end, rules=self.rules)
            encoding = self._cut(whole, generator, asking=asking)
            if encoding is not None:
                break
        else:
            raise SampleError(
                NOTHING_SUPERVISED, f"document {document.key or '?'}: no token of its sequence counts in the loss"
            )
        next_media = bool(self.next_media and generator.random() < self.next_media)
        return replace(encoding, next_media=next_media, views=self._views(len(encoding.media), generator))

    def holds(self, document: Document) -> bool:
        """Whether a sequence has room for the whole document."""
        encoding = self.processor.encode(document, eos=True, rules=self.rules)
        return len(encoding.input_ids) <= self.max_tokens and len(encoding.media) <= self.max_media

    def pack(self, encodings: Sequence[Encoding], sources: Sequence[int]) -> list[list[int]]:
        """Which sequences share a row: the numbers of each row's, rows and numbers in ascending order.

        First fit, by falling length: rows of at most `max_tokens` tokens and `row_media` media, each of one source,
        so that losses stay told apart. Without `packing` every sequence has a row of its own.

        Args:
            sources: number of each sequence's source.
        """
        if not self.packing:
            return [[number] for number in range(len(encodings))]
        most_media = math.inf if self.row_media is None else self.row_media
        rows: list[list[int]] = []
        filled: list[tuple[int, int, int]] = []  # source, tokens and media of each row
        for number in sorted(range(len(encodings)), key=lambda number: -len(encodings[number].input_ids)):
            tokens, media = len(encodings[number].input_ids), len(encodings[number].media)
            for row, (source, used, shown) in enumerate(filled):
                fits = used + tokens <= self.max_tokens and shown + media <= most_media
                if fits and source == sources[number]:
                    rows[row].append(number)
                    filled[row] = (source, used + tokens, shown + media)
                    break
            else:
                rows.append([number])
                filled.append((sources[number], tokens, media))
        return sorted(sorted(row) for row in rows)

    def collate(
        self,
        encodings: Sequence[Encoding],
        *,
        pixels: Sequence[Tensor] | None = None,
        rows: Sequence[Sequence[int]] | None = None,
    ) -> BatchFeature:
        """A batch of sequences, as `FlamingoProcessor.collate` makes it, or `collate_packed` with `packing`.

        Args:
            pixels: of each sequence's media, where they are decoded already.
            rows: with `packing`, what `pack` gave; None: one sequence a row.
        """
        if not self.packing:
            return self.processor.collate(encodings, media_attention=self.media_attention, pixels=pixels)
        rows = [[number] for number in range(len(encodings))] if rows is None else rows
        return self.processor.collate_packed(
            [[encodings[number] for number in row] for row in rows],
            media_attention=self.media_attention,
            pixels=None if pixels is None else [pixels[number] for row in rows for number in row],
        )

    def _windows(
        self, document: Document, generator: np.random.Generator, *, asking: bool
    ) -> Iterator[tuple[Document, bool]]:
        """At most `max_media` media in a row, each with the text up to the next; which ones is drawn.

        With each window comes whether it reaches the end of the document. The first one is used, unless none of its
        tokens counts; then the next, also drawn. Of a document that asks those come first that begin as in `_cut`: a
        question about several pictures would lose some of them.
        """
        segments = document.segments
        at = [i for i, segment in enumerate(segments) if not isinstance(segment, Text)]
        surplus = len(at) - self.max_media
        if surplus <= 0:
            yield document, True
            return

        def window(first: int) -> tuple[Document, bool]:
            begin = 0 if first == 0 else at[first]
            end = at[first + self.max_media] if first < surplus else len(segments)
            return replace(document, segments=segments[begin:end]), first >= surplus

        turns = [first for first, i in enumerate(at) if first == 0 or isinstance(segments[i - 1], Text)]
        for firsts in (turns, range(surplus + 1)) if asking else (range(surplus + 1),):
            drawn = int(generator.integers(len(firsts)))
            yield window(firsts[drawn])
            for other in generator.permutation(len(firsts)):
                if other != drawn:
                    yield window(firsts[other])

    def _cut(self, encoding: Encoding, generator: np.random.Generator, *, asking: bool) -> Encoding | None:
        """At most `max_tokens` tokens in a row, and the media whose `<image>` is among them; None where none counts.

        Of a longer encoding every window in which a token counts is drawn equally often (Flamingo, appendix on M3W: a
        random subsequence of so many tokens). A beginning-of-sequence token stays before it. By the rules of
        OpenFlamingo text that now stands before the first medium does not count any more. `text` stays the whole one.

        Of a document that asks, windows begin where it begins or where media stand after text, if a token counts in any
        of those: an answer without its picture or its question would teach to invent one.
        """
        ids, labels, tokenizer = encoding.input_ids, encoding.labels, self.processor.tokenizer
        # The end alone is nothing to learn from.
        supervised = (np.array(labels) != IGNORED) & (np.array(ids) != tokenizer.eos_token_id)
        if len(ids) <= self.max_tokens:  # the first token has none before it that could predict it
            return encoding if supervised[1:].any() else None
        head = int(tokenizer.bos_token_id is not None)
        size = self.max_tokens - head
        marks = np.flatnonzero(np.array(ids) == self.processor.image_token_id)
        before = np.append(0, np.cumsum(supervised))  # supervised tokens before each place

        def usable(starts: np.ndarray) -> np.ndarray:
            """(start, end, from where on tokens count) of the windows in which one does, for ascending `starts`."""
            ends, counts = (starts + size).clip(max=len(ids)), starts + 1 - head
            if self.rules == "open_flamingo" and len(marks):
                counts = np.append(marks, len(ids))[np.searchsorted(marks, starts)]
            windows = np.stack((starts, ends, counts), axis=1)
            return windows[before[ends] > before[counts.clip(max=ends)]]

        windows = usable(np.arange(head, len(ids) - size + 1))
        if asking:
            turns = usable(np.union1d([head], marks[np.diff(marks, prepend=-1) > 1]))
            windows = turns if len(turns) else windows
        if not len(windows):
            return None
        start, end, counted = windows[generator.integers(len(windows))].tolist()
        first, last = np.searchsorted(marks, (start, end))
        return replace(
            encoding,
            input_ids=ids[:head] + ids[start:end],
            labels=labels[:head] + [IGNORED] * (counted - start) + labels[counted:end],
            media=encoding.media[first:last],
        )

    def _views(self, media: int, generator: np.random.Generator) -> tuple[View, ...] | None:
        if not media or (self.flip == 0 and self.crop == 1):
            return None
        return tuple(self._view(*generator.random(5)) for _ in range(media))

    def _view(self, flip: float, area: float, aspect: float, top: float, left: float) -> View:
        """From five numbers in [0, 1)."""
        least, most = map(math.log, ASPECTS)
        crop = Crop(self.crop + (1 - self.crop) * area, math.exp(least + (most - least) * aspect), top, left)
        return View(flip < self.flip, crop if self.crop < 1 else None)


def asks(document: Document) -> bool:
    """Whether some of its text is never answered for: it is of instructions, not of a web page or a caption."""
    return any(isinstance(segment, Text) and not segment.supervised for segment in document.segments)


def image_marks(document: Document) -> int:
    """How often the texts of a document hold `<image>`, which would be taken for the place of a medium."""
    return sum(segment.text.count(IMAGE_TOKEN) for segment in document.segments if isinstance(segment, Text))


def _spaced(document: Document) -> Document:
    """With a space before each text that begins a chunk, where there is none."""
    segments: list[Segment] = []
    for segment in document.segments:
        begins = not segments or not isinstance(segments[-1], Text)
        if isinstance(segment, Text) and begins and segment.text and not segment.text[0].isspace():
            segment = replace(segment, text=" " + segment.text)
        segments.append(segment)
    return replace(document, segments=tuple(segments))
