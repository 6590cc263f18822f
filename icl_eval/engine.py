"""Ranking candidate answers by their log-likelihood, with everything computed once that prompts have in common.

Of one query, the prompts of all shot counts are nested (see `demonstrations`), so its demonstrations are read once, from
the left, with a cache; at each shot count that is asked for, the query and then its candidate answers are read from a
fork of that cache. Every picture is decoded, encoded, resampled and projected to keys and values once a run.

The score of a candidate is the log-likelihood, given the prompt, of all its tokens: those of the label, of the text that
the template puts after it, and `<|endofchunk|>`. Nothing is learned about a query from the other queries of its batch.

Legend: B queries of a batch, T tokens of a pass, N media of a query, A candidate answers, L their longest length.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor

from flamingo.document import Document, Image, Segment, Text
from flamingo.errors import FlamingoError
from flamingo.media import MediaMemory
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.processing import FlamingoProcessor
from icl_eval.sources import Pool

ENCODED_AT_ONCE = 256  # images of one pass through the vision tower
CACHED_TOKENS = 2**15  # rows × tokens that a cache may hold when candidates are read side by side


@dataclass(frozen=True)
class Ladder:
    """A row of demonstrations, and the queries asked after some of them.

    Attributes:
        images: pool index of each demonstration's picture.
        texts: the text of each demonstration's chunk, after its picture.
        queries: (demonstrations read before it, pool index of its picture), demonstrations ascending.
        prompt: text between the query's picture and its answer.
        answers: candidate texts of the query's whole chunk, each beginning with `prompt`.
        key: names the query in messages.
    """

    images: tuple[int, ...]
    texts: tuple[str, ...]
    queries: tuple[tuple[int, int], ...]
    prompt: str
    answers: tuple[str, ...]
    key: str


@dataclass(frozen=True)
class Encoded:
    """A ladder as tokens.

    Attributes:
        segments: what is read between one query and the next, as (token ids, pool indices of its pictures).
        queries: (segments read before it, pool index of its picture).
        query: token ids of the query up to its answer.
        answers: token ids of each candidate, the query's left out.
        place: (row, column) of its first score in the result.
    """

    segments: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    queries: tuple[tuple[int, int], ...]
    query: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    place: tuple[int, int]

    @property
    def shape(self) -> tuple[Any, ...]:
        """Encoded ladders of one shape make a batch without padding."""
        segments = tuple((len(ids), len(images)) for ids, images in self.segments)
        return segments, tuple(count for count, _ in self.queries), self.query, len(self.answers)

    def unrolled(self) -> list[Encoded]:
        """The same queries, each with a prompt of its own: one segment that ends with the query."""
        alone = []
        for column, (count, image) in enumerate(self.queries):
            ids = tuple(token for segment, _ in self.segments[:count] for token in segment)
            images = tuple(each for _, segment in self.segments[:count] for each in segment)
            place = (self.place[0], self.place[1] + column)
            alone.append(Encoded(((ids, images),), ((1, image),), self.query, self.answers, place))
        return alone


class MediaStore:
    """Keys and values of pictures for the gated blocks, made once each; bounded.

    Args:
        limit: bytes that may be held; what the queries at hand do not need is given up first.
    """

    def __init__(self, model: FlamingoForConditionalGeneration, processor: FlamingoProcessor, limit: int):
        self.model, self.processor = model, processor
        self.memory = self._encode([])
        held = (*self.memory.keys, *self.memory.values)
        self.capacity = limit // sum(math.prod(each.shape[1:]) * each.element_size() for each in held)
        self.slots: dict[str, int] = {}
        self.encoded = 0

    def _encode(self, images: Sequence[Image]) -> MediaMemory:
        pixels = self.processor.pixels(images).to(self.model.device)
        return self.model.remember_media(self.model.encode_media(pixels))

    def require(self, pool: Pool, indices: Iterable[int]) -> None:
        """Hold the pictures of `pool` at `indices`.

        Raises:
            FlamingoError: they do not fit into the limit together.
        """
        wanted = {pool.items[index].id: index for index in indices}
        missing = {name: index for name, index in wanted.items() if name not in self.slots}
        if len(wanted) > self.capacity:
            raise FlamingoError(f"media memory holds {self.capacity} pictures, but a query alone needs {len(wanted)}")
        if len(self.slots) + len(missing) > self.capacity:
            kept = [name for name in self.slots if name in wanted]
            self.memory = self.memory.select(torch.tensor([self.slots[name] for name in kept], dtype=torch.long))
            self.slots = {name: slot for slot, name in enumerate(kept)}
        parts, waiting = [self.memory], list(missing.items())
        for start in range(0, len(waiting), ENCODED_AT_ONCE):
            part = waiting[start : start + ENCODED_AT_ONCE]
            parts.append(self._encode(pool.images([index for _, index in part])))
            self.slots.update((name, len(self.slots) + place) for place, (name, _) in enumerate(part))
        self.encoded += len(waiting)
        if waiting:
            self.memory = MediaMemory.cat(parts)

    def table(self, pool: Pool) -> np.ndarray:
        """Pool index → slot of the memory; −1 where the picture is not held."""
        return np.array([self.slots.get(item.id, -1) for item in pool.items])


@dataclass
class Prefix:
    """What a batch has read so far.

    Attributes:
        length: tokens read, padding included.
        cache: the LM's, None before the first pass.
        padding: (B, length) 1 for tokens, 0 for padding; None where there is no padding.
        media: (B, N) slots of the media that tokens to come may see.
    """

    length: int
    cache: Any
    padding: Tensor | None
    media: Tensor

    def fork(self, repeats: int = 1) -> Prefix:
        """A continuation of its own, `repeats` times for each query; reading on in it leaves this one as it is."""
        if self.cache is None:
            twin = None
        else:
            twin = copy.copy(self.cache)
            twin.layers = [_fork_layer(layer) for layer in self.cache.layers]
        if repeats > 1:
            rows = torch.arange(self.media.shape[0], device=self.media.device).repeat_interleave(repeats)
            for layer in () if twin is None else twin.layers:
                layer.reorder_cache(rows)
            padding = None if self.padding is None else self.padding[rows]
            return Prefix(self.length, twin, padding, self.media[rows])
        return Prefix(self.length, twin, self.padding, self.media)


def _fork_layer(layer: Any) -> Any:
    """Keys and values of attention are only ever replaced, so they can be shared; other states change in place."""
    twin = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict):
            setattr(twin, name, {k: v.clone() if isinstance(v, Tensor) else v for k, v in value.items()})
    return twin


class Engine:
    """Scores ladders with one model.

    Args:
        model: in evaluation mode.
        processor: the model's.
        batch_size: queries of a batch.
        media_bytes: limit of the store of pictures.
    """

    def __init__(
        self,
        model: FlamingoForConditionalGeneration,
        processor: FlamingoProcessor,
        *,
        batch_size: int = 128,
        media_bytes: int = 2**31,
    ):
        if batch_size < 1:
            raise FlamingoError(f"batch_size: {batch_size}, expected at least 1")
        self.model, self.processor, self.batch_size = model, processor, batch_size
        self.sees_all = model.config.media_attention == "all"
        self.chunks: dict[tuple[str, bool], tuple[int, ...]] = {}
        self.opening = tuple(processor.encode(Document(())).input_ids)
        with torch.inference_mode():
            self.store = MediaStore(model, processor, media_bytes)
            self.reads_ahead = self._reads_ahead()

    # -- tokens --------------------------------------------------------------------------------------------------------

    def chunk(self, text: str, *, complete: bool = True) -> tuple[int, ...]:
        """Ids of `<image>` and `text`; complete: and `<|endofchunk|>`."""
        if (text, complete) not in self.chunks:
            document = Document(_chunk(text), complete=complete)
            self.chunks[text, complete] = tuple(self.processor.encode(document, bos=False).input_ids)
        return self.chunks[text, complete]

    def encode(self, ladder: Ladder, row: int) -> Encoded:
        """Tokens of a ladder whose scores go to `row`.

        Raises:
            FlamingoError: where the tokens of the prompt are no prefix of those of prompt and answer; it names both.
        """
        query = self.chunk(ladder.prompt, complete=False)
        answers = []
        for text in ladder.answers:
            ids = self.chunk(text)
            if ids[: len(query)] != query or len(ids) == len(query):
                raise FlamingoError(
                    f"{ladder.key}: the tokens of the prompt {ladder.prompt!r} are no prefix of those of prompt and "
                    f"answer {text!r}; end the prompt where a token ends"
                )
            answers.append(ids[len(query) :])
        cuts = sorted({count for count, _ in ladder.queries})
        segments = []
        for start, end in zip([0, *cuts], cuts, strict=False):
            ids = tuple(token for text in ladder.texts[start:end] for token in self.chunk(text))
            segments.append(((() if segments else self.opening) + ids, ladder.images[start:end]))
        queries = tuple((cuts.index(count) + 1, image) for count, image in ladder.queries)
        return Encoded(tuple(segments), queries, query, tuple(answers), (row, 0))

    def check_tokens(self, ladder: Ladder, encoded: Encoded) -> None:
        """Refuse a tokenizer that reads chunks differently alone and in a row.

        Raises:
            FlamingoError: it names the ladder and the first token that differs.
        """
        segments: list[Segment] = [part for text in ladder.texts for part in _chunk(text)]
        whole = self.processor.encode(Document((*segments, *_chunk(ladder.answers[0])))).input_ids
        joined = [token for ids, _ in encoded.segments for token in ids] + [*encoded.query, *encoded.answers[0]]
        if whole != joined:
            place = next((i for i, pair in enumerate(zip(whole, joined, strict=False)) if pair[0] != pair[1]), -1)
            raise FlamingoError(
                f"{ladder.key}: the tokenizer reads a chunk differently alone and in a row (first at token {place})"
            )

    # -- ranking -------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def rank(
        self,
        pool: Pool,
        ladders: Sequence[Ladder],
        *,
        normalise: str = "sum",
        progress: Callable[[int], None] | None = None,
    ) -> list[np.ndarray]:
        """Log-likelihoods of every ladder's answers, each (queries, answers) float64, in nats.

        Args:
            normalise: "sum" over the tokens of an answer, or their "mean".
            progress: called with the number of queries done since its last call.

        Raises:
            FlamingoError: see `encode`, `check_tokens` and `MediaStore.require`.
        """
        encoded = [self.encode(ladder, row) for row, ladder in enumerate(ladders)]
        if encoded:
            longest = max(range(len(ladders)), key=lambda row: len(ladders[row].texts))
            self.check_tokens(ladders[longest], encoded[longest])
        scores = [np.full((len(each.queries), len(each.answers)), np.nan) for each in encoded]
        for window in self._windows(encoded):
            self.store.require(pool, {image for each in window for image in _images(each)})
            table = self.store.table(pool)
            for batch in self._batches(window):
                found = self._rank_batch(batch, table, normalise)
                for each, rows in zip(batch, found, strict=True):
                    row, column = each.place
                    scores[row][column : column + len(rows)] = rows[:, : len(each.answers)]
                if progress is not None:
                    progress(sum(len(each.queries) for each in batch))
        return scores

    def _windows(self, encoded: Sequence[Encoded]) -> Iterable[list[Encoded]]:
        """Runs of ladders whose pictures fit into the store together."""
        window: list[Encoded] = []
        held: set[int] = set()
        for each in encoded:
            images = set(_images(each))
            if window and len(held | images) > self.store.capacity:
                yield window
                window, held = [], set()
            window.append(each)
            held |= images
        if window:
            yield window

    def _batches(self, encoded: Sequence[Encoded]) -> Iterable[list[Encoded]]:
        """Batches of equal shape; where a shape is rare, its queries are read alone, padded to similar lengths."""
        by_shape = defaultdict(list)
        for each in encoded:
            by_shape[each.shape].append(each)
        rare = defaultdict(list)
        for group in by_shape.values():
            if len(group) < self.batch_size / 4 and len(by_shape) > 1:
                for each in (alone for ladder in group for alone in ladder.unrolled()):
                    rare[each.query, len(each.answers), len(each.segments[0][1])].append(each)
            else:
                yield from _split(group, self.batch_size)
        for group in rare.values():
            group.sort(key=lambda each: len(each.segments[0][0]))
            yield from _split(group, self.batch_size)

    def _rank_batch(self, batch: Sequence[Encoded], table: np.ndarray, normalise: str) -> np.ndarray:
        """Scores (B, queries, A) of a batch whose ladders differ in nothing but ids, or in the first segment's length."""
        first = batch[0]
        prefix = Prefix(0, None, None, self._ids([[] for _ in batch]))
        answers = Answers.of([each.answers for each in batch], self.model.device)
        scores = torch.zeros(len(batch), len(first.queries), answers.lengths.shape[1], dtype=torch.float64)
        for count in range(1, len(first.segments) + 1):
            segment = [each.segments[count - 1] for each in batch]
            self._read(prefix, [ids for ids, _ in segment], table[self._indices(images for _, images in segment)])
            for column, (when, _) in enumerate(first.queries):
                if when == count:
                    asked = prefix.fork()
                    media = table[self._indices((each.queries[column][1],) for each in batch)]
                    logits = self._read(asked, [each.query for each in batch], media)
                    scores[:, column] = self._score(asked, logits, answers).double().cpu()
        if normalise == "mean":
            scores = scores / answers.lengths.cpu()[:, None]
        return scores.numpy()

    def _score(self, prompt: Prefix, logits: Tensor, answers: Answers) -> Tensor:
        """Summed log-likelihood (B, A) of answers after `prompt`, whose last position gave `logits` (B, 1, V)."""
        scores = _log_likelihood(logits.squeeze(1), answers.ids[:, :, 0])
        queries, count, length = answers.ids.shape
        if length == 1:
            return scores
        at_once = max(1, min(count, CACHED_TOKENS // (queries * prompt.length)))
        for start in range(0, count, at_once):
            ids = answers.ids[:, start : start + at_once]
            side_by_side = ids.shape[1]
            rows = rearrange(ids, "b a l -> (b a) l")
            logits = self._pass(prompt.fork(side_by_side), rows[:, :-1], keep=length - 1)
            steps = _log_likelihood(rearrange(logits, "r l v -> r l v"), rows[:, 1:, None]).squeeze(-1)
            steps = rearrange(steps, "(b a) l -> b a l", a=side_by_side)
            counts = answers.counts[:, start : start + at_once, 1:]
            scores[:, start : start + at_once] += steps.masked_fill(~counts, 0.0).sum(-1)
        return scores
