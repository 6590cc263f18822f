"""FlamingoProcessor: documents → input_ids, labels and media. The one place where that happens.

Legend: B samples, T text tokens, N media, F frames, C channels, H height, W width.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image as PilImage
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from flamingo.document import Document, Image, Medium, Text
from flamingo.errors import FlamingoError
from flamingo.images import PixelSettings, media_pixels

IMAGE_TOKEN = "<image>"
END_OF_CHUNK = "<|endofchunk|>"
IGNORED = -100
"""Label of a position that does not count in the loss (PyTorch's `ignore_index`)."""


@dataclass(frozen=True)
class Encoding:
    """A document as the model reads it: ids and labels of one length (−100: no loss), its media, and its text."""

    input_ids: list[int]
    labels: list[int]
    media: tuple[Medium, ...]
    text: str


def render(document: Document) -> tuple[str, list[tuple[int, int, bool]]]:
    """A document as text with marks, and the spans (start, end, supervised) of which it consists.

    Every medium becomes `<image>`. A chunk of text is closed by `<|endofchunk|>` where a medium follows, and at the end
    of a complete document; a text that already ends with the mark gets no second one. The mark counts in the loss where
    the text before it does.
    """
    parts: list[tuple[str, bool]] = []
    chunk_open = False
    supervised = False
    for segment in document.segments:
        if isinstance(segment, Text):
            if segment.text:
                parts.append((segment.text, segment.supervised))
                chunk_open, supervised = not segment.text.endswith(END_OF_CHUNK), segment.supervised
            continue
        if chunk_open:
            parts.append((END_OF_CHUNK, supervised))
        parts.append((IMAGE_TOKEN, False))
        chunk_open = False
    if document.complete and chunk_open:
        parts.append((END_OF_CHUNK, supervised))
    spans, start = [], 0
    for text, counts in parts:
        spans.append((start, start + len(text), counts))
        start += len(text)
    return "".join(text for text, _ in parts), spans


class FlamingoProcessor(ProcessorMixin):
    """An image processor's settings and a tokenizer that knows `<image>` and `<|endofchunk|>`.

    Args:
        image_processor: of the vision tower; its sizes and normalisation are used, its code is not (see `images`).
        tokenizer: a fast tokenizer (character offsets are needed).
        channels: of the vision tower's images.
    """

    def __init__(self, image_processor: Any, tokenizer: Any, channels: int = 3, chat_template: str | None = None):
        if not tokenizer.is_fast:
            raise FlamingoError(f"tokenizer {type(tokenizer).__name__}: expected a fast one, which gives offsets")
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.channels = channels
        self.pixel_settings = PixelSettings.of(image_processor, channels)
        self.image_token_id: int = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        for mark in (IMAGE_TOKEN, END_OF_CHUNK):
            if len(tokenizer(mark, add_special_tokens=False).input_ids) != 1:
                raise FlamingoError(f"tokenizer: expected {mark} as one token")

    def to_dict(self) -> dict[str, Any]:
        """What is saved: the processor's own arguments, beside those of its two parts."""
        saved = super().to_dict()
        saved.pop("pixel_settings", None)
        saved.pop("image_token_id", None)
        return saved

    def encode(self, document: Document, *, bos: bool = True, eos: bool = False) -> Encoding:
        """Tokens, labels and media of one document.

        Args:
            bos: put the tokenizer's beginning-of-sequence token first, where it has one.
            eos: put its end-of-sequence token last, supervised where other tokens are (training).

        Raises:
            FlamingoError: where text holds `<image>` itself, so that marks and media differ in number.
        """
        text, spans = render(document)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        input_ids: list[int] = encoded.input_ids
        labels = []
        span = 0
        for token, (start, end) in zip(input_ids, encoded.offset_mapping, strict=True):
            # A token belongs to the span in which it ends: a leading space may still be part of the one before.
            while span < len(spans) - 1 and end > spans[span][1]:
                span += 1
            labels.append(token if spans[span][2] and end > start else IGNORED)
        return self._finish(input_ids, labels, document.media, text, document.key, bos=bos, eos=eos)

    def _finish(
        self,
        input_ids: list[int],
        labels: list[int],
        media: tuple[Medium, ...],
        text: str,
        key: str,
        *,
        bos: bool,
        eos: bool,
    ) -> Encoding:
        marks = input_ids.count(self.image_token_id)
        if marks != len(media):
            raise FlamingoError(
                f"found {marks} image tokens but received {len(media)} images (sample key={key or '?'})"
            )
        if bos and self.tokenizer.bos_token_id is not None:
            input_ids, labels = [self.tokenizer.bos_token_id, *input_ids], [IGNORED, *labels]
        if eos and self.tokenizer.eos_token_id is not None:
            end = self.tokenizer.eos_token_id
            supervised = any(label != IGNORED for label in labels)  # the end alone is nothing to learn from
            input_ids, labels = [*input_ids, end], [*labels, end if supervised else IGNORED]
        return Encoding(input_ids, labels, media, text)

    def pixels(self, media: Sequence[Medium]) -> Tensor:
        """Decode media → (N, F, C, H, W) float32, as the vision tower wants them; N may be 0."""
        return media_pixels(tuple(media), self.pixel_settings)

    def collate(self, encodings: Sequence[Encoding], padding_side: str = "right") -> BatchFeature:
        """A batch: input_ids, attention_mask, labels (B, T), pixel_values (N, F, C, H, W), media_per_sample (B,)."""
        length = max(len(encoding.input_ids) for encoding in encodings)
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad

        def padded(rows: list[list[int]], value: int) -> Tensor:
            filled = torch.full((len(rows), length), 0 if value is None else value)
            for row, ids in zip(filled, rows, strict=True):
                where = slice(0, len(ids)) if padding_side == "right" else slice(length - len(ids), length)
                row[where] = torch.tensor(ids)
            return filled

        return BatchFeature(
            {
                "input_ids": padded([encoding.input_ids for encoding in encodings], pad),
                "attention_mask": padded([[1] * len(encoding.input_ids) for encoding in encodings], 0),
                "labels": padded([encoding.labels for encoding in encodings], IGNORED),
                "pixel_values": self.pixels([medium for encoding in encodings for medium in encoding.media]),
                "media_per_sample": torch.tensor([len(encoding.media) for encoding in encodings]),
            }
        )

    def __call__(
        self,
        images: Sequence[Any] | None = None,
        text: str | Sequence[str] | None = None,
        *,
        documents: Document | Sequence[Document] | None = None,
        padding_side: str = "left",
        **kwargs: Any,
    ) -> BatchFeature:
        """A batch for `generate` or `forward`, from documents, or from text with `<image>` marks and its images.

        Args:
            images: for each text its list of images (PIL images, or `Image`); one flat list for one text.
            text: one text or several, taken as they are.
            documents: instead of both.
            padding_side: "left" for generation.

        Raises:
            FlamingoError: where a text has another number of marks than images; it names the sample.
        """
        kwargs.pop("return_tensors", None)
        if kwargs:
            raise FlamingoError(f"processor: unexpected argument {sorted(kwargs)[0]!r}")
        if (documents is None) == (text is None):
            raise FlamingoError("processor: expected either documents, or text with images")
        if documents is not None:
            documents = [documents] if isinstance(documents, Document) else documents
            return self.collate([self.encode(document) for document in documents], padding_side)
        texts = [text] if isinstance(text, str) else list(text or [])
        nested = list(images or [])
        if isinstance(text, str) and not (nested and isinstance(nested[0], (list, tuple))):
            nested = [nested]
        if not nested:
            nested = [[] for _ in texts]
        if len(nested) != len(texts) or not all(isinstance(each, (list, tuple)) for each in nested):
            raise FlamingoError(f"processor: expected a list of images for each of the {len(texts)} texts")
        encodings = []
        for sample, (each, pictures) in enumerate(zip(texts, nested, strict=True)):
            ids = self.tokenizer(each, add_special_tokens=False).input_ids
            media = tuple(_as_image(picture) for picture in pictures)
            encodings.append(self._finish(ids, [IGNORED] * len(ids), media, each, str(sample), bos=True, eos=False))
        return self.collate(encodings, padding_side)

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """As the tokenizer's."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> str:
        """As the tokenizer's."""
        return self.tokenizer.decode(*args, **kwargs)


def _as_image(picture: Any) -> Image:
    if isinstance(picture, Image):
        return picture
    if not isinstance(picture, PilImage.Image):
        raise FlamingoError(f"processor: expected a PIL image or flamingo.Image, got {type(picture).__name__}")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return Image(buffer.getvalue(), "image.png")
