"""FlamingoProcessor: documents → input_ids, labels and media. The one place where that happens.

Legend: B samples, T text tokens, N media, F frames, M frames of all media, C channels, H height, W width.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from PIL import Image as PilImage
from PIL import ImageOps
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from flamingo.document import Document, Image, Medium, Text, Video
from flamingo.errors import FlamingoError
from flamingo.images import PixelSettings, View, media_frames, media_pixels, plain, rows_and_frames
from flamingo.media import visible_media

IMAGE_TOKEN = "<image>"
VIDEO_MARK = "<video>"
"""Where a video stands in a text given to the processor; to the model it is `<image>`, a video being one medium."""
END_OF_CHUNK = "<|endofchunk|>"
ANSWER = "<answer>"
"""Otter's third token: it stands before what is answered."""


def chat_template(answer_mark: bool, spaced: bool) -> str:
    """Jinja that renders a chat as `flamingo.instructions.instruction_document` and `render` do its turns.

    A user's message is its media, then `User:{question}`; what the assistant says is ` GPT:{answer}<|endofchunk|>`. A
    system message is a chunk of its own, without a name before it: Otter has none. Turns are a user's message and the
    assistant's; only the last may be without an answer.

    Args:
        answer_mark: put `<answer>` before each answer, for models that were tuned.
        spaced: a space after `User:` and before the answer, as models released through July 2023 were tuned.
    """
    space, mark = " " if spaced else "", ANSWER if answer_mark else ""
    return (
        "{% for message in messages %}"
        "{% if message.role == 'user' and not loop.last and loop.nextitem.role != 'assistant' %}"
        "{{ raise_exception('a user message before the last: expected an answer of the assistant after it') }}"
        "{% endif %}"
        "{% set parts = [{'type': 'text', 'text': message.content}] "
        "if message.content is string else message.content %}"
        "{% for part in parts if part.type in ('image', 'video') %}<{{ part.type }}>{% endfor %}"
        f"{{{{ {{'user': 'User:{space}', 'assistant': ' GPT:{mark}{space}'}}.get(message.role, '') }}}}"
        "{% for part in parts if part.type == 'text' %}{{ part.text }}{% endfor %}"
        "{% if message.role != 'user' %}<|endofchunk|>{% endif %}"
        "{% endfor %}"
        f"{{% if add_generation_prompt %}} GPT:{mark}{{% endif %}}"
    )


CHAT_TEMPLATE = chat_template(answer_mark=False, spaced=False)
"""The default, for models that were never tuned: `<image>User:{question} GPT:{answer}<|endofchunk|>`."""
IGNORED = -100
"""Label of a position that does not count in the loss (PyTorch's `ignore_index`)."""
RULES = ("flamingo", "open_flamingo")
"""How the media and texts of a document become one text, see `render`."""


@dataclass(frozen=True)
class Encoding:
    """A document as the model reads it: ids and labels of one length (−100: no loss), its media, and its text.

    With `next_media` its texts belong to the medium that comes next (training only, see `flamingo.media`). `views` are
    of its media, where training flips or crops them.
    """

    input_ids: list[int]
    labels: list[int]
    media: tuple[Medium, ...]
    text: str
    next_media: bool = False
    views: tuple[View, ...] | None = None


def render(document: Document, rules: str = "flamingo") -> tuple[str, list[tuple[int, int, bool]]]:
    """A document as text with marks, and the spans (start, end, supervised) of which it consists.

    Every medium becomes `<image>`. The mark `<|endofchunk|>` counts in the loss where the text before it does; a text
    that already ends with it, white space behind it aside, gets no second one.

    Args:
        rules: "flamingo": a chunk of text is closed by `<|endofchunk|>` where a medium follows, and at the end of a
            complete document (Flamingo, appendix A.2). "open_flamingo" (its `train/data.py` and `train_utils.py`):
            the mark stands before every medium but the first, and at the end of a complete document; spaces next to
            marks are removed; text before the first medium does not count, unless there is no medium at all.

    Raises:
        FlamingoError: where there are no such rules.
    """
    if rules not in RULES:
        raise FlamingoError(f"rules={rules!r}: expected {' or '.join(RULES)}")
    parts = _parts(document) if rules == "flamingo" else _open_flamingo_parts(document)
    spans, start = [], 0
    for text, counts in parts:
        spans.append((start, start + len(text), counts))
        start += len(text)
    return "".join(text for text, _ in parts), spans


def _parts(document: Document) -> list[tuple[str, bool]]:
    """Texts and marks, and whether they count, by Flamingo's rules."""
    parts: list[tuple[str, bool]] = []
    chunk_open = False
    supervised = False
    for segment in document.segments:
        if isinstance(segment, Text):
            if segment.text:
                parts.append((segment.text, segment.supervised))
                chunk_open, supervised = not segment.text.rstrip().endswith(END_OF_CHUNK), segment.supervised
            continue
        if chunk_open:
            parts.append((END_OF_CHUNK, supervised))
        parts.append((IMAGE_TOKEN, False))
        chunk_open = False
    if document.complete and chunk_open:
        parts.append((END_OF_CHUNK, supervised))
    return parts


def _open_flamingo_parts(document: Document) -> list[tuple[str, bool]]:
    """Texts and marks, and whether they count, by OpenFlamingo's rules."""
    parts: list[tuple[str, bool]] = []
    leads = bool(document.media)  # what is read so far stands before the first medium
    supervised = True

    def strip() -> None:
        while parts and parts[-1][0].endswith(" "):
            text, counts = parts.pop()
            if text := text.rstrip(" "):
                parts.append((text, counts))

    def close() -> None:
        strip()
        if parts and not parts[-1][0].endswith(END_OF_CHUNK):
            parts.append((END_OF_CHUNK, supervised))

    for segment in document.segments:
        if isinstance(segment, Text):
            text = segment.text.lstrip(" ") if parts and parts[-1][0] == IMAGE_TOKEN else segment.text
            if text:
                supervised = segment.supervised and not leads
                parts.append((text, supervised))
            continue
        strip()
        if not leads:
            close()
        parts.append((IMAGE_TOKEN, False))
        leads, supervised = False, True
    if document.complete:
        close()
    return parts


class FlamingoProcessor(ProcessorMixin):
    """An image processor's settings and a tokenizer that knows `<image>` and `<|endofchunk|>`.

    Args:
        image_processor: of the vision tower; its sizes and normalisation are used, its code is not (see `images`).
        tokenizer: a fast tokenizer (character offsets are needed).
        channels: of the vision tower's images.
        chat_template: Jinja; default `CHAT_TEMPLATE`.
    """

    def __init__(self, image_processor: Any, tokenizer: Any, channels: int = 3, chat_template: str | None = None):
        if not tokenizer.is_fast:
            raise FlamingoError(f"tokenizer {type(tokenizer).__name__}: expected a fast one, which gives offsets")
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
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

    def encode(self, document: Document, *, bos: bool = True, eos: bool = False, rules: str = "flamingo") -> Encoding:
        """Tokens, labels and media of one document.

        Args:
            bos: put the tokenizer's beginning-of-sequence token first, where it has one.
            eos: put its end-of-sequence token last (training). It counts where other tokens do; by the rules of
                OpenFlamingo, where nothing between `<|endofchunk|>` and the next `<image>` counts, only in documents
                without media.
            rules: see `render`.

        Raises:
            FlamingoError: where text holds `<image>` itself, so that marks and media differ in number.
        """
        text, spans = render(document, rules)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        input_ids: list[int] = encoded.input_ids
        labels = []
        span = 0
        for token, (start, end) in zip(input_ids, encoded.offset_mapping, strict=True):
            # A token belongs to the span in which it ends: a leading space may still be part of the one before.
            while span < len(spans) - 1 and end > spans[span][1]:
                span += 1
            labels.append(token if spans[span][2] and end > start else IGNORED)
        end_counts = rules == "flamingo" or not document.media
        return self._finish(
            input_ids, labels, document.media, text, document.key, bos=bos, eos=eos, end_counts=end_counts
        )

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
        end_counts: bool = True,
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
            # the end alone is nothing to learn from
            supervised = end_counts and any(label != IGNORED for label in labels)
            input_ids, labels = [*input_ids, end], [*labels, end if supervised else IGNORED]
        return Encoding(input_ids, labels, media, text)

    def pixels(
        self, media: Sequence[Medium], views: Sequence[View | None] | None = None, *, normalised: bool = True
    ) -> Tensor:
        """Decode media → (N, F, C, H, W) float32, as the vision tower wants them; N may be 0.

        Where they differ in their numbers of frames: (M, 1, C, H, W), all frames in order; `media_frames` says so.

        Args:
            views: of each medium, where it is to be flipped or cropped.
            normalised: False: uint8, a quarter as much to send, for `pixel_settings.normalise` elsewhere.

        Raises:
            ImageError: where one is no image file, or too large for `pixel_settings.limits`; it names it.
            FlamingoError: where a video has no frames.
        """
        pixels = media_pixels(media, self.pixel_settings, views)
        return self.pixel_settings.normalise(pixels) if normalised else pixels

    def media_frames(self, media: Sequence[Medium]) -> Tensor | None:
        """(N,) the number of frames of each medium, for `encode_media` beside `pixels`; None where all have as many."""
        return media_frames(media)

    def collate(
        self,
        encodings: Sequence[Encoding],
        padding_side: str = "right",
        *,
        media_attention: str = "previous",
        pixels: Sequence[Tensor] | None = None,
    ) -> BatchFeature:
        """A batch of one encoding a row.

        Args:
            encodings: at least one.
            padding_side: "right" or "left".
            media_attention: the model's; only read where some of the encodings have `next_media`.
            pixels: what `pixels` gave for the media of each encoding, where that is done already; None: do it here.

        Returns:
            `input_ids`, `attention_mask`, `labels` (B, T), `pixel_values` (N, F, C, H, W), `media_per_sample` (B,);
            where media differ in their numbers of frames also `media_frames` (N,), and `pixel_values` is
            (M, 1, C, H, W); where an encoding has `next_media` also `media_first`, `media_last` (B, T).

        Raises:
            FlamingoError: where there is no encoding, media cannot be decoded, or `pixels` are not those of the
                encodings' media.
        """
        rows = [[encoding] for encoding in encodings]
        return self._collate(rows, "attention_mask", padding_side, media_attention, pixels)

    def collate_packed(
        self,
        rows: Sequence[Sequence[Encoding]],
        *,
        media_attention: str = "previous",
        pixels: Sequence[Tensor] | None = None,
    ) -> BatchFeature:
        """A batch of several encodings a row, one after the other, for a model built with `packing=True`.

        As `collate`, padded on the right, but with `documents` (B, T) instead of `attention_mask`: the number of each
        token's encoding in its row, from 1; 0 for padding. `media_per_sample` counts the media of a whole row;
        `pixels` are those of each encoding, row by row.
        """
        return self._collate(rows, "documents", "right", media_attention, pixels)

    def _collate(
        self,
        rows: Sequence[Sequence[Encoding]],
        numbers: str,
        padding_side: str,
        media_attention: str,
        pixels: Sequence[Tensor] | None,
    ) -> BatchFeature:
        """`numbers`: name of the output that numbers the encodings of a row; of a single one that is its mask."""
        if not rows or not all(rows):
            raise FlamingoError("collate: expected at least one encoding in each row")
        length = max(sum(len(encoding.input_ids) for encoding in row) for row in rows)

        def padded(values: Callable[[int, Encoding], list[int]], fill: int) -> Tensor:
            filled = torch.full((len(rows), length), fill)
            for line, row in zip(filled, rows, strict=True):
                flat = [value for place, encoding in enumerate(row, 1) for value in values(place, encoding)]
                start = 0 if padding_side == "right" else length - len(flat)
                line[start : start + len(flat)] = torch.tensor(flat)
            return filled

        tokenizer = self.tokenizer
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        input_ids = padded(lambda _, encoding: encoding.input_ids, pad or 0)
        documents = padded(lambda place, encoding: [place] * len(encoding.input_ids), 0)
        flat = [encoding for row in rows for encoding in row]
        frames = media_frames([medium for encoding in flat for medium in encoding.media])
        batch = {
            "input_ids": input_ids,
            numbers: documents,
            "labels": padded(lambda _, encoding: encoding.labels, IGNORED),
            "pixel_values": self._join_pixels(flat, pixels, ragged=frames is not None),
            "media_per_sample": torch.tensor([sum(len(encoding.media) for encoding in row) for row in rows]),
        }
        if frames is not None:
            batch["media_frames"] = frames
        if any(encoding.next_media for row in rows for encoding in row):
            reads_next = padded(lambda _, encoding: [encoding.next_media] * len(encoding.input_ids), 0).bool()
            ahead, behind = (
                visible_media(input_ids, self.image_token_id, media_attention=attention, documents=documents)
                for attention in ("next", media_attention)
            )
            for name, next_one, usual in zip(("media_first", "media_last"), ahead, behind, strict=True):
                batch[name] = torch.where(reads_next, next_one, usual)
        return BatchFeature(batch)

    def _join_pixels(self, encodings: Sequence[Encoding], pixels: Sequence[Tensor] | None, *, ragged: bool) -> Tensor:
        """The (N, F, C, H, W) of all encodings, `ragged` (M, 1, C, H, W), decoded here or given for each of them."""
        if pixels is None:
            views = [view for each in encodings for view in each.views or [None] * len(each.media)]
            return self.pixels([medium for encoding in encodings for medium in encoding.media], views)
        found = [tuple(each.shape[:2]) for each in pixels]
        expected = [rows_and_frames(encoding.media) for encoding in encodings]
        if found != expected:
            raise FlamingoError(f"collate: pixels of {found} media and frames a sequence: expected {expected}")
        if ragged:
            return torch.cat([rearrange(each, "n f c h w -> (n f) 1 c h w") for each in pixels])
        # No media have no number of frames.
        return torch.cat([each for each in pixels if len(each)] or [*pixels])

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        *,
        documents: Document | Sequence[Document] | None = None,
        padding_side: str = "left",
        padding: bool | str = True,
        truncation: bool = False,
        add_special_tokens: bool = True,
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """A batch for `generate` or `forward`, from documents, or from text with marks and its media.

        Args:
            images: for each text the list of what fills its `<image>` marks: PIL images, paths, bytes of image files or
                `flamingo.Image`; None or an empty list for a text without. A flat list belongs to the one text, or
                gives one image to each of several.
            text: one text or several, taken as they are.
            videos: likewise for `<video>` marks; a video is a `flamingo.Video` or the list of its frames.
            documents: instead of these three.
            padding_side: "left" for generation.
            padding: True or "longest"; False where all rows are of one length.
            truncation: False: a text that is cut would lose media.
            add_special_tokens: put the tokenizer's beginning-of-sequence token first, where it has one.
            return_tensors: "pt".

        Returns:
            As `collate`; from text without `labels`, since a prompt has none.

        Raises:
            FlamingoError: where a text has another number of marks than media, or a medium is no image; it names the
                sample. Where an argument is not one of these.
        """
        for name, value, expected in (
            ("padding", padding, (True, False, "longest")),
            ("truncation", truncation, (False, None)),
            ("return_tensors", return_tensors, ("pt", None)),
        ):
            if value not in expected:
                raise FlamingoError(f"processor: {name}={value!r}: expected {' or '.join(map(repr, expected))}")
        for name, value in kwargs.items():  # pipelines and chat templates pass arguments that they do not use as None
            if value is not None:
                raise FlamingoError(f"processor: unexpected argument {name!r}")
        if (documents is None) == (text is None) or (text is None and (images is not None or videos is not None)):
            raise FlamingoError("processor: expected either documents, or text with images and videos")
        if text is not None:
            texts = [text] if isinstance(text, str) else list(text)
            nested = zip(
                _for_each_text("images", images, len(texts), _is_image),
                _for_each_text("videos", videos, len(texts), _is_video),
                strict=True,
            )
            encodings = [
                self._encode_text(each, *media, sample, bos=add_special_tokens)
                for sample, (each, media) in enumerate(zip(texts, nested, strict=True))
            ]
        else:
            several = [documents] if isinstance(documents, Document) else list(documents or ())
            encodings = [self.encode(document, bos=add_special_tokens) for document in several]
        lengths = sorted({len(encoding.input_ids) for encoding in encodings})
        if not padding and len(lengths) > 1:
            raise FlamingoError(f"processor: padding=False: expected rows of one length, got {lengths} tokens")
        batch = self.collate(encodings, padding_side)
        if text is not None:
            del batch["labels"]
        return batch

    def _encode_text(self, text: str, images: list[Any], videos: list[Any], sample: int, *, bos: bool) -> Encoding:
        """A text as it is; its marks are filled in order."""
        marks = re.findall(f"{IMAGE_TOKEN}|{VIDEO_MARK}", text)
        for kind, mark, given in (("image", IMAGE_TOKEN, images), ("video", VIDEO_MARK, videos)):
            if marks.count(mark) != len(given):
                raise FlamingoError(
                    f"found {marks.count(mark)} {kind} tokens but received {len(given)} {kind}s (sample {sample})"
                )
        where = f"of sample {sample}"
        media: dict[str, Iterator[Medium]] = {
            IMAGE_TOKEN: iter([as_image(image, f"image {n} {where}") for n, image in enumerate(images)]),
            VIDEO_MARK: iter([_as_video(video, f"video {n} {where}") for n, video in enumerate(videos)]),
        }
        text = text.replace(VIDEO_MARK, IMAGE_TOKEN)
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        in_order = tuple(next(media[mark]) for mark in marks)
        return self._finish(ids, [IGNORED] * len(ids), in_order, text, str(sample), bos=bos, eos=False)

    @property
    def model_input_names(self) -> list[str]:
        """What `forward` and `generate` take from a batch of prompts; `media_frames` only some have, see `collate`."""
        return ["input_ids", "attention_mask", "pixel_values", "media_frames", "media_per_sample"]

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """As the tokenizer's."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> str:
        """As the tokenizer's."""
        return self.tokenizer.decode(*args, **kwargs)


def _is_image(given: Any) -> bool:
    return isinstance(given, (Image, PilImage.Image, str, Path, bytes))


def _is_video(given: Any) -> bool:
    return isinstance(given, Video) or (
        isinstance(given, (list, tuple)) and len(given) > 0 and all(_is_image(frame) for frame in given)
    )


def _for_each_text(name: str, given: Any, texts: int, is_medium: Callable[[Any], bool]) -> list[list[Any]]:
    """A list of media for each text, from none at all, one medium, a flat list, or one list or None a text."""
    if given is None or given in ([], ()):
        return [[] for _ in range(texts)]
    several = [given] if is_medium(given) or not isinstance(given, (list, tuple)) else list(given)
    if all(is_medium(each) for each in several):
        several = [several] if texts == 1 else [[each] for each in several]
    if len(several) != texts or not all(each is None or isinstance(each, (list, tuple)) for each in several):
        raise FlamingoError(f"processor: {name}: expected a list for each of {texts} texts")
    return [list(each or []) for each in several]


def as_image(given: Any, name: str) -> Image:
    """An image given as `flamingo.Image`, bytes of a file, its path, or a PIL image; `name` is for messages.

    Raises:
        FlamingoError: where it is none of these, or there is no such file.
    """
    if isinstance(given, Image):
        return given
    if isinstance(given, bytes):
        return Image(given, name)
    if isinstance(given, (str, Path)):
        try:
            return Image(Path(given).read_bytes(), str(given))
        except OSError as error:
            raise FlamingoError(f"{name}: {given}: expected the path of an image file ({error.strerror})") from error
    if not isinstance(given, PilImage.Image):
        raise FlamingoError(
            f"{name}: expected a PIL image, a path, bytes or flamingo.Image, got {type(given).__name__}"
        )
    buffer = io.BytesIO()
    plain(ImageOps.exif_transpose(given), "RGB").save(buffer, "PNG")  # PNG keeps neither all modes nor orientation
    return Image(buffer.getvalue(), name)


def _as_video(given: Any, name: str) -> Video:
    if isinstance(given, Video):
        return given
    if not _is_video(given):
        raise FlamingoError(f"{name}: expected flamingo.Video or a list of frames, got {type(given).__name__}")
    return Video(tuple(as_image(frame, f"frame {n} of {name}") for n, frame in enumerate(given)))
