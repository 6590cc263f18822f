"""Documents → training sequences: a window of the document, its tokens, and the labels that count.

The rules are those of Flamingo (appendix A.3) and OpenFlamingo: at most `max_tokens` tokens and `max_media` media, cut
from the document at a random place. All randomness comes from the generator that the caller seeds by position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from transformers import BatchFeature

from flamingo.document import Document, Text
from flamingo.errors import FlamingoError
from flamingo.processing import IGNORED, Encoding, FlamingoProcessor


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
    """

    processor: FlamingoProcessor
    max_tokens: int = 256
    max_media: int = 5
    next_media: float = 0.0
    media_attention: str = "previous"

    def __post_init__(self) -> None:
        if not 0 <= self.next_media <= 1:
            raise FlamingoError(f"next_media={self.next_media}: expected a probability")

    def __call__(self, document: Document, generator: np.random.Generator) -> Encoding:
        """The sequence of one document.

        Raises:
            FlamingoError: where no token of it would count in the loss; it names the document.
        """
        windowed, reaches_end = self._window(document, generator)
        encoding = self._cut(self.processor.encode(windowed, eos=reaches_end))
        if all(label == IGNORED for label in encoding.labels):
            raise FlamingoError(f"document {document.key or '?'}: no token of its sequence counts in the loss")
        # Not drawn where it is never wanted, so that the windows above stay those of the same seed.
        return replace(encoding, next_media=bool(self.next_media and generator.random() < self.next_media))

    def collate(self, encodings: Sequence[Encoding]) -> BatchFeature:
        """A batch of sequences, as `FlamingoProcessor.collate` makes it."""
        return self.processor.collate(encodings, media_attention=self.media_attention)

    def _window(self, document: Document, generator: np.random.Generator) -> tuple[Document, bool]:
        """At most `max_media` media in a row, each with the text up to the next; which ones is drawn.

        With it comes whether the window reaches the end of the document.
        """
        at = [i for i, segment in enumerate(document.segments) if not isinstance(segment, Text)]
        surplus = len(at) - self.max_media
        if surplus <= 0:
            return document, True
        first = int(generator.integers(surplus + 1))
        begin = 0 if first == 0 else at[first]
        end = at[first + self.max_media] if first < surplus else len(document.segments)
        return replace(document, segments=document.segments[begin:end]), first == surplus

    def _cut(self, encoding: Encoding) -> Encoding:
        """The first `max_tokens` tokens, and the media whose `<image>` is among them."""
        ids = encoding.input_ids[: self.max_tokens]
        media = encoding.media[: ids.count(self.processor.image_token_id)]
        return replace(encoding, input_ids=ids, labels=encoding.labels[: self.max_tokens], media=media)
