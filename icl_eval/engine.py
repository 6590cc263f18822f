"""Ranking candidate answers by their log-likelihood, with everything computed once that prompts have in common.

Of one query, the prompts of all shot counts are nested (see `demonstrations`), so its demonstrations are read once,
from the left, with a cache; at each shot count that is asked for, the query and then its candidate answers are read
from a fork of that cache. Every picture is decoded, encoded, resampled and projected to keys and values once a run.

The score of a candidate is the log-likelihood, given the prompt, of all its tokens: those of the label, of the text
that the template puts after it, and `<|endofchunk|>`.

Legend: B queries of a batch, T tokens of a pass, N media of a query, A candidate answers, L their longest length.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from flamingo.document import Document, Image, Segment, Text
from flamingo.errors import FlamingoError
from flamingo.media import MediaMemory
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.processing import FlamingoProcessor
from flamingo.products import fast_products
from icl_eval.sources import Pool

ENCODED_AT_ONCE = 256  # images of one pass through the vision tower
CACHED_TOKENS = 2**13  # rows × tokens that a cache is copied to, so that candidates are read side by side


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
            self.memory = self.memory.select(
                torch.tensor([self.slots[name] for name in kept], dtype=torch.long, device=self.model.device)
            )
            self.slots = {name: slot for slot, name in enumerate(kept)}
        parts, waiting = [self.memory], list(missing.items())
        for start in range(0, len(waiting), ENCODED_AT_ONCE):
            part = waiting[start : start + ENCODED_AT_ONCE]
            parts.append(self._encode(pool.images([index for _, index in part])))
            self.slots.update({name: slot for slot, (name, _) in enumerate(part, start=len(self.slots))})
        if waiting:
            self.memory = MediaMemory.cat(parts)

    def table(self, pool: Pool) -> np.ndarray:
        """Pool index → slot of the memory; −1 where the picture is not held."""
        return np.array([self.slots.get(item.id, -1) for item in pool.items])


@dataclass
class Prefix:
    """What a batch has read so far.

    Attributes:
        media: (B, N) slots of the media that tokens to come may see.
        length: tokens read, padding included.
        cache: the LM's; None before the first pass.
        padding: (B, length) 1 for tokens, 0 for padding; None where there is no padding.
    """

    media: Tensor
    length: int = 0
    cache: Any = None
    padding: Tensor | None = None

    def fork(self, repeats: int = 1) -> Prefix:
        """A continuation of its own, `repeats` times for each query; reading on in it leaves this one as it is."""
        twin = copy.copy(self)
        if self.cache is not None:
            twin.cache = copy.copy(self.cache)
            twin.cache.layers = [_fork_layer(layer) for layer in self.cache.layers]
        if repeats > 1:
            rows = torch.arange(len(self.media), device=self.media.device).repeat_interleave(repeats)
            twin.media = self.media[rows]
            twin.padding = None if self.padding is None else self.padding[rows]
            for layer in twin.cache.layers if twin.cache is not None else ():
                layer.reorder_cache(rows)
        return twin


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
        self.filler: int = model.config.end_of_chunk_token_id
        self.opening = tuple(processor.encode(Document(())).input_ids)
        with torch.inference_mode():
            self.store = MediaStore(model, processor, media_bytes)
            self.reads_ahead = True
            self.reads_ahead = self._continues()

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
        segments: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
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
    @fast_products()
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
            pool: where the pictures are.
            ladders: to score; any order and mixture.
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
                    scores[row][column : column + len(rows)] = rows
                if progress is not None:
                    progress(sum(len(each.queries) for each in batch))
        return scores

    def _windows(self, encoded: Sequence[Encoded]) -> Iterator[list[Encoded]]:
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

    def _batches(self, encoded: Sequence[Encoded]) -> Iterator[Sequence[Encoded]]:
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
        """Scores (B, queries, A) of ladders of one shape, but for the length of their first segment."""
        first, device = batch[0], self.model.device
        answers = Answers.of([each.answers for each in batch], self.filler, device)
        query = torch.tensor([each.query for each in batch], device=device)
        scores = torch.zeros(len(batch), len(first.queries), len(first.answers), dtype=torch.float64)
        prefix = Prefix(torch.zeros(len(batch), 0, dtype=torch.long, device=device))
        for count in range(1, len(first.segments) + 1):
            segment = [each.segments[count - 1] for each in batch]
            ids, padding = _left_padded([ids for ids, _ in segment], self.filler, device)
            if ids.shape[1]:  # without a token that begins a sequence, nothing precedes the query at 0 shots
                self._read(prefix, ids, self._slots(table, [images for _, images in segment]), padding)
            for column in (column for column, (when, _) in enumerate(first.queries) if when == count):
                asked = prefix.fork()
                logits = self._read(asked, query, self._slots(table, [(each.queries[column][1],) for each in batch]))
                scores[:, column] = self._score(asked, logits[:, -1], answers).double().cpu()
        if normalise == "mean":
            scores /= answers.lengths.cpu()[:, None]
        return scores.numpy()

    def _score(self, prompt: Prefix, logits: Tensor, answers: Answers) -> Tensor:
        """Summed log-likelihood (B, A) of the answers after `prompt`, whose last token gave `logits` (B, V)."""
        queries, count, length = answers.ids.shape
        scores = _log_likelihood(logits, answers.ids[:, :, 0])
        if length == 1:
            return scores
        at_once = max(1, min(count, CACHED_TOKENS // (queries * prompt.length)))
        for group in torch.arange(count, device=logits.device).split(at_once):
            rows = rearrange(answers.ids[:, group], "b a l -> (b a) l")
            # The last token of an answer is only predicted. Shorter answers are filled up behind: nothing sees that.
            logits = self._read(prompt.fork(len(group)), rows[:, :-1], keep=length - 1)
            tokens = rearrange(_log_likelihood(logits, rows[:, 1:, None]), "(b a) l 1 -> b a l", a=len(group))
            beyond = torch.arange(1, length, device=logits.device) >= answers.lengths[:, group, None]
            scores[:, group] += tokens.masked_fill(beyond, 0.0).sum(-1)
        return scores

    def _read(
        self, prefix: Prefix, ids: Tensor, media: Tensor | None = None, padding: Tensor | None = None, keep: int = 1
    ) -> Tensor:
        """Read `ids` (B, T) on from `prefix`, which moves along; logits (B, keep, V) of the last positions.

        Args:
            prefix: what was read before.
            ids: at least one token each.
            media: (B, N) slots of the media that stand among `ids`.
            padding: (B, T) 1 for tokens, 0 for padding; only in a first pass.
            keep: positions, from the last one back, of which logits are wanted.
        """
        if prefix.cache is not None and ids.shape[1] > 1 and not self.reads_ahead:
            return self._read_by_token(prefix, ids, media, keep)
        available = prefix.media if media is None else torch.cat((prefix.media, media), dim=1)
        is_image = ids == self.model.config.image_token_id
        last = prefix.media.shape[1] + is_image.long().cumsum(dim=1)
        mask = positions = None
        if padding is not None:
            prefix.padding = padding
        elif prefix.padding is not None:
            prefix.padding = torch.cat((prefix.padding, torch.ones_like(ids)), dim=1)
        if prefix.padding is not None:
            mask = prefix.padding
            if self.model.takes_positions:
                positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=prefix.cache,
            use_cache=True,
            media_memory=self.store.memory.select(available.flatten()),
            media_per_sample=torch.full((len(ids),), available.shape[1], device=ids.device),
            media_first=last.clamp(max=1) if self.sees_all else last,
            media_last=last,
            logits_to_keep=keep,
        )
        prefix.cache = output.past_key_values
        prefix.length += ids.shape[1]
        prefix.media = available if self.sees_all else available[:, -1:]
        return output.logits

    def _read_by_token(self, prefix: Prefix, ids: Tensor, media: Tensor | None, keep: int) -> Tensor:
        """As `_read`, for LMs whose cache goes on by one token at a time only."""
        logits = []
        images = [int(count) for count in (ids == self.model.config.image_token_id).sum(dim=0)]
        seen = 0
        for position, token in enumerate(ids.split(1, dim=1)):
            own = media[:, seen : seen + 1] if media is not None and images[position] else None
            seen += own is not None
            logits.append(self._read(prefix, token, own))
        return torch.cat(logits[-keep:], dim=1)

    def _slots(self, table: np.ndarray, images: Sequence[tuple[int, ...]]) -> Tensor:
        return torch.from_numpy(table[np.array(images, dtype=np.int64)]).to(self.model.device)

    def _continues(self) -> bool:
        """Whether the LM's cache goes on right by several tokens at once; that of some families does not."""
        some = [token for token in range(10) if token != self.model.config.image_token_id][:9]
        ids = torch.tensor([some], device=self.model.device)
        whole, parts = (Prefix(torch.zeros(1, 0, dtype=torch.long, device=ids.device)) for _ in range(2))
        self._read(parts, ids[:, :-2])
        # The last two: so few that both depend on what the cache kept.
        expected, found = self._read(whole, ids, keep=2), self._read(parts, ids[:, -2:], keep=2)
        known = expected.isfinite()  # −inf: ids that no token has
        noise = 100 * torch.finfo(expected.dtype).eps * expected[known].abs().max()
        return bool((found - expected)[known].abs().max() <= noise)


@dataclass(frozen=True)
class Answers:
    """Candidate answers of a batch: ids (B, A, L), filled up at the right, and lengths (B, A)."""

    ids: Tensor
    lengths: Tensor

    @staticmethod
    def of(answers: Sequence[tuple[tuple[int, ...], ...]], filler: int, device: torch.device) -> Answers:
        """From the token ids of every query's candidates, as many for each query."""
        longest = max(len(ids) for each in answers for ids in each)
        rows = [[[*ids, *[filler] * (longest - len(ids))] for ids in each] for each in answers]
        lengths = [[len(ids) for ids in each] for each in answers]
        return Answers(torch.tensor(rows, device=device), torch.tensor(lengths, device=device))


def _chunk(text: str) -> tuple[Segment, ...]:
    return (Image(b""), Text(text))


def _images(encoded: Encoded) -> Iterator[int]:
    """Pool indices of all pictures of a ladder."""
    for _, images in encoded.segments:
        yield from images
    for _, image in encoded.queries:
        yield image


def _split(group: Sequence[Encoded], size: int) -> Iterator[Sequence[Encoded]]:
    return (group[start : start + size] for start in range(0, len(group), size))


def _left_padded(rows: Sequence[tuple[int, ...]], filler: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """(B, T) ids, and 1 for tokens, 0 for padding; None where nothing is padded."""
    longest = max(map(len, rows))
    ids = torch.tensor([[filler] * (longest - len(row)) + list(row) for row in rows], dtype=torch.long, device=device)
    if all(len(row) == longest for row in rows):
        return ids, None
    spare = torch.tensor([longest - len(row) for row in rows], device=device)
    return ids, (torch.arange(longest, device=device) >= spare[:, None]).long()


def _log_likelihood(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-likelihood of `ids` (…, K) under `logits` (…, V); in float32 at least."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.gather(-1, ids) - logits.logsumexp(-1, keepdim=True)
