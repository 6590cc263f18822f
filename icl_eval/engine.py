"""Ranking candidate answers and generating free ones, with everything computed once that prompts have in common.

A prompt is a row of chunks, each of any media and texts. Of one query, the prompts of all shot counts are nested (see
`demonstrations`), and many queries may share demonstrations: what was read before them is a tree, of which every node
is read once, from the left, with a cache. A query, and then its candidate answers, are read from forks of that cache.
Every medium is decoded, encoded, resampled and projected to keys and values once a run.

A pass reads equally many tokens in all of its rows; what the rows read before may differ in length. Where rows of
several passes go on together, their caches are filled up on the left. So prompts of any lengths share passes, and no
row ever holds padding between its tokens, which an LM with convolutions or recurrent states could not skip.

The score of a candidate is the log-likelihood, given the prompt, of all its tokens, `<|endofchunk|>` the last.

What an evaluation needs of a model is `Answerer`: to rank and to generate. `Engine` does so for ours.

Legend: B rows of a pass, T tokens of a pass, P pairs of a query and a candidate answer.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from flamingo.document import Document, Image, Medium, Segment, Text, Video
from flamingo.errors import FlamingoError
from flamingo.media import MediaMemory
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.processing import END_OF_CHUNK, FlamingoProcessor
from flamingo.products import fast_products
from icl_eval.ranking import TIE as TIE
from icl_eval.ranking import Search, Trie, best_only

ENCODED_AT_ONCE = 256  # images, or frames of videos, of one pass through the vision tower
KNOWN_CHUNKS = 2**16  # of which the tokens are kept: questions and captions recur, but there may be any number
CACHED_TOKENS = 2**13  # rows × tokens that a cache is copied to, so that candidates are read side by side
KNOWN_TRIES = 2**10  # kept, for queries with the same candidates
LOGITS_AT_ONCE = 2**26  # of candidates; passes are of as many tokens
MASKED = ("eager", "sdpa")  # implementations of attention that take a mask of their caller's
JOINABLE = (DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer, LinearAttentionAndFullAttentionLayer)


class Library(Protocol):
    """Where the media of prompts are: `icl_eval.sources.Pool`, or anything else that has these two."""

    def name(self, index: int) -> str:
        """Id of a medium; unique over all libraries that an engine is given, so that these can share media."""

    def media(self, indices: Sequence[int]) -> Sequence[Medium]:
        """The media at some indices."""


@dataclass(frozen=True)
class Chunk:
    """What is read between two `<|endofchunk|>`: texts, and media as indices into a library, in reading order.

    `separator` is the white space that stands between its `<|endofchunk|>` and the next chunk.
    """

    parts: tuple[int | str, ...]
    separator: str = ""

    @property
    def media(self) -> tuple[int, ...]:
        """Indices of its media."""
        return tuple(part for part in self.parts if not isinstance(part, str))

    @property
    def text(self) -> str:
        """Its texts, for messages."""
        return "".join(part for part in self.parts if isinstance(part, str))

    def segments(self, media: Sequence[Medium], answer: str | None = None) -> list[Segment]:
        """It as segments of a document, its media filled in; with an answer (or "") closed by `<|endofchunk|>`."""
        filled = iter(media)
        parts = (*self.parts, *([answer] if answer else []))
        made: list[Segment] = [Text(part) if isinstance(part, str) else next(filled) for part in parts]
        last = made[-1] if made else None
        if answer is not None and isinstance(last, Text) and last.text and not last.text.endswith(END_OF_CHUNK):
            made.append(Text(END_OF_CHUNK + self.separator))
        return made


@dataclass(frozen=True)
class Query:
    """What is asked after `after` demonstrations: a chunk up to its answer, and the candidate answers, if any.

    An answer is the text that goes on from the chunk's, without `<|endofchunk|>`.
    """

    after: int
    chunk: Chunk
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ladder:
    """A row of demonstrations, and what is asked after some of them.

    Attributes:
        demonstrations: whole chunks, in order.
        queries: in any order.
        key: names it in messages.
    """

    demonstrations: tuple[Chunk, ...]
    queries: tuple[Query, ...]
    key: str

    @property
    def media(self) -> set[int]:
        """Indices of all media."""
        chunks = [*self.demonstrations, *(query.chunk for query in self.queries)]
        return {index for chunk in chunks for index in chunk.media}


class Piece(NamedTuple):
    """Some tokens, and the indices of the media that stand among them."""

    ids: tuple[int, ...] = ()
    media: tuple[int, ...] = ()

    def then(self, other: Piece) -> Piece:
        """Both, one after the other."""
        return Piece(self.ids + other.ids, self.media + other.media)

    def split(self, count: int, image_token_id: int) -> tuple[Piece, Piece]:
        """Its first `count` tokens, and the others."""
        media = self.ids[:count].count(image_token_id)
        return Piece(self.ids[:count], self.media[:media]), Piece(self.ids[count:], self.media[media:])


@dataclass(frozen=True)
class Asked:
    """A query as tokens: how many pieces are read before it, its own, those of its answers, and where it stands."""

    after: int
    piece: Piece
    answers: tuple[tuple[int, ...], ...]
    place: tuple[int, int]
    """number of its ladder, and its number there"""


class Answerer(Protocol):
    """All that an evaluation needs of a model. `Engine` has it for ours, `icl_eval.peers` for those of others."""

    def rank(
        self,
        library: Library,
        ladders: Sequence[Ladder],
        *,
        normalise: str = "sum",
        top_k: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[np.ndarray]]:
        """Log-likelihoods of the answers of every ladder's every query; see `Engine.rank`."""

    def generate(
        self,
        library: Library,
        ladders: Sequence[Ladder],
        *,
        max_new_tokens: int,
        beams: int = 1,
        length_penalty: float = 1.0,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[str]]:
        """What it answers to every ladder's every query; see `Engine.generate`."""


@dataclass(frozen=True)
class Encoded:
    """A ladder as tokens: what is read between one query and the next, and the queries."""

    pieces: tuple[Piece, ...]
    queries: tuple[Asked, ...]
    media: frozenset[int]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of every pass: ladders of the same numbers can be read together to their ends."""
        return tuple(len(piece.ids) for piece in (*self.pieces, *(query.piece for query in self.queries)))


class MediaStore:
    """Keys and values of media for the gated blocks, made once each; bounded.

    Args:
        limit: bytes that may be held; what the queries at hand do not need is given up first.
    """

    def __init__(self, model: FlamingoForConditionalGeneration, processor: FlamingoProcessor, limit: int):
        self.model, self.processor = model, processor
        self.memory = self._encode([])
        held = (*self.memory.keys, *self.memory.values)
        self.capacity = limit // sum(math.prod(each.shape[1:]) * each.element_size() for each in held)
        self.slots: dict[str, int] = {}

    def _encode(self, media: Sequence[Medium]) -> MediaMemory:
        """Media of equally many frames."""
        pixels = self.processor.pixels(media).to(self.model.device)
        return self.model.remember_media(self.model.encode_media(pixels))

    def require(self, library: Library, indices: Iterable[int]) -> None:
        """Hold the media of `library` at `indices`.

        Raises:
            FlamingoError: they do not fit into the limit together.
        """
        wanted = {library.name(index): index for index in indices}
        missing = {name: index for name, index in wanted.items() if name not in self.slots}
        if len(wanted) > self.capacity:
            raise FlamingoError(f"media memory holds {self.capacity} media, but a query alone needs {len(wanted)}")
        if len(self.slots) + len(missing) > self.capacity:
            kept = [name for name in self.slots if name in wanted]
            self.memory = self.memory.select(
                torch.tensor([self.slots[name] for name in kept], dtype=torch.long, device=self.model.device)
            )
            self.slots = {name: slot for slot, name in enumerate(kept)}
        parts, waiting = [self.memory], list(missing.items())
        for start in range(0, len(waiting), ENCODED_AT_ONCE):
            part = waiting[start : start + ENCODED_AT_ONCE]
            for places, media in _by_frames(library.media([index for _, index in part])):
                parts.append(self._encode(media))
                self.slots.update({part[place][0]: slot for slot, place in enumerate(places, start=len(self.slots))})
        if waiting:
            self.memory = MediaMemory.cat(parts)

    def of(self, library: Library, indices: Iterable[int]) -> tuple[int, ...]:
        """Slots of media that are held."""
        return tuple(self.slots[library.name(index)] for index in indices)


def _by_frames(media: Sequence[Medium]) -> Iterator[tuple[list[int], list[Medium]]]:
    """Media of one number of frames, so many that they are encoded at once, and their places among all."""
    places = defaultdict(list)
    for place, medium in enumerate(media):
        places[len(medium.frames) if isinstance(medium, Video) else 1].append(place)
    for frames, group in places.items():
        for part in _split(group, max(1, ENCODED_AT_ONCE // max(1, frames))):
            yield list(part), [media[place] for place in part]


@dataclass
class Prefix:
    """What the rows of a batch have read so far.

    Attributes:
        media: of each row, slots of the media that tokens to come may see.
        length: tokens read, padding included.
        cache: the LM's; None before the first token.
        padding: (B, length) 1 for tokens, 0 for padding, which is on the left; None where there is no padding.
    """

    media: list[tuple[int, ...]]
    length: int = 0
    cache: Any = None
    padding: Tensor | None = None

    def pick(self, rows: Sequence[int]) -> Prefix:
        """A continuation of its own for some rows, with repeats; reading on in it leaves this one as it is."""
        twin = copy.copy(self)
        if self.cache is not None:
            twin.cache = copy.copy(self.cache)
            twin.cache.layers = [_fork_layer(layer) for layer in self.cache.layers]
        if list(rows) == list(range(len(self.media))):
            return twin
        twin.media = [self.media[row] for row in rows]
        if self.cache is not None:
            index = torch.tensor(rows, device=self._device())
            twin.padding = None if self.padding is None else self.padding[index]
            for layer in twin.cache.layers:
                layer.reorder_cache(index)
        return twin

    @staticmethod
    def join(rows: Sequence[tuple[Prefix, int]]) -> Prefix:
        """A continuation of rows of several prefixes, all of which have read something or none; see `pick`."""
        runs = [(group[0][0], [row for _, row in group]) for group in _runs(rows)]
        parts = [prefix.pick(chosen) for prefix, chosen in runs]
        if len(parts) == 1:
            return parts[0]
        joined = Prefix([media for part in parts for media in part.media], max(part.length for part in parts))
        if parts[0].cache is None:
            return joined
        joined.cache = parts[0].cache
        joined.cache.layers = [
            _join_layers(layers) for layers in zip(*(part.cache.layers for part in parts), strict=True)
        ]
        if any(part.padding is not None or part.length < joined.length for part in parts):
            device = parts[0]._device()
            joined.padding = torch.zeros(len(joined.media), joined.length, dtype=torch.long, device=device)
            start = 0
            for part in parts:
                place = joined.padding[start : start + len(part.media), joined.length - part.length :]
                place.copy_(torch.ones_like(place) if part.padding is None else part.padding)
                start += len(part.media)
        return joined

    def _device(self) -> torch.device:
        return next(
            value.device
            for layer in self.cache.layers
            for value in (getattr(layer, "keys", None), *getattr(layer, "conv_states", {}).values())
            if isinstance(value, Tensor)
        )


def _runs(rows: Sequence[tuple[Prefix, int]]) -> list[list[tuple[Prefix, int]]]:
    return [list(group) for _, group in groupby(rows, key=lambda row: id(row[0]))]


def _fork_layer(layer: Any) -> Any:
    """Keys and values of attention are only ever replaced, so they can be shared; other states change in place."""
    twin = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict):
            setattr(twin, name, {k: v.clone() if isinstance(v, Tensor) else v for k, v in value.items()})
    return twin


def _join_layers(layers: Sequence[Any]) -> Any:
    """The rows of several forks of one layer; keys and values are filled up on the left to the longest."""
    joined = layers[0]
    if type(joined) not in JOINABLE:
        raise FlamingoError(f"the LM keeps a cache of {type(joined).__name__}, of which rows cannot be joined")
    for name, value in list(vars(joined).items()):
        each = [getattr(layer, name) for layer in layers]
        if name in ("keys", "values") and isinstance(value, Tensor):
            longest = max(part.shape[-2] for part in each)
            padded = [torch.nn.functional.pad(part, (0, 0, longest - part.shape[-2], 0)) for part in each]
            setattr(joined, name, torch.cat(padded))
        elif name == "cumulative_length":
            setattr(joined, name, max(each))
        elif isinstance(value, dict):
            states = {k: torch.cat([part[k] for part in each]) for k, v in value.items() if isinstance(v, Tensor)}
            setattr(joined, name, {**value, **states})
    return joined


@dataclass(eq=False)
class Node:
    """What some ladders have in common from their beginning on, read.

    Attributes:
        read: all its tokens.
        prefix: of the pass that read the last of them.
        place: number of that pass among those of its depth, and the row there.
    """

    read: Piece
    prefix: Prefix = field(repr=False)
    place: tuple[int, int]


class Waiting(NamedTuple):
    """A query, and the node that it is asked after."""

    asked: Asked
    node: Node

    @property
    def whole(self) -> Piece:
        """The prompt from its beginning on."""
        return self.node.read.then(self.asked.piece)


class Learnt(NamedTuple):
    """The log-likelihoods of the tokens that may follow a node of a row's trie, in order of its children."""

    row: int
    node: int
    likelihoods: list[float]


class Engine:
    """Ranks and generates answers with one model.

    Args:
        model: in evaluation mode.
        processor: the model's.
        batch_size: rows of a pass, and ladders that are read side by side.
        media_bytes: limit of the store of media.

    Raises:
        FlamingoError: the LM keeps its cache to itself.

    Attributes:
        label_tokens, label_tokens_read: tokens of all candidate answers of all queries ranked so far, and how many were
            read for them.
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
        self.known: dict[tuple[Any, ...], tuple[int, ...]] = {}
        self.tried: set[tuple[Any, ...]] = set()
        self.tries: dict[tuple[tuple[int, ...], ...], Trie] = {}
        self.label_tokens = self.label_tokens_read = 0
        self.vocabulary: int = model.get_input_embeddings().weight.shape[0]
        self.filler: int = model.config.end_of_chunk_token_id
        self.opening = tuple(processor.encode(Document(())).input_ids)
        with torch.inference_mode():
            self.store = MediaStore(model, processor, media_bytes)
            self.reads_ahead = True
            self.reads_ahead = self._continues()
            self.reads_trees = self._branches()
        self.label_tokens = self.label_tokens_read = 0

    # -- tokens --------------------------------------------------------------------------------------------------------

    def tokens(self, chunk: Chunk, answer: str | None = None, key: str = "") -> tuple[int, ...]:
        """Ids of a chunk; with an answer (or "") closed by `<|endofchunk|>`. `key` names it in messages."""
        known = (tuple(part if isinstance(part, str) else None for part in chunk.parts), chunk.separator, answer)
        if known not in self.known:
            if len(self.known) >= KNOWN_CHUNKS:
                self.known.clear()
            segments = chunk.segments([Image(b"")] * len(chunk.media), answer)
            document = Document(tuple(segments), complete=False, key=key)
            self.known[known] = tuple(self.processor.encode(document, bos=False).input_ids)
        return self.known[known]

    def encode(self, ladder: Ladder, number: int) -> Encoded:
        """Tokens of a ladder, the `number`th.

        Raises:
            FlamingoError: where the tokens of a prompt are no prefix of those of prompt and answer; it names both.
                Where a query asks nothing, or a text holds `<image>` itself.
        """
        cuts = sorted({query.after for query in ladder.queries})
        pieces: list[Piece] = []
        for start, end in zip([0, *cuts], cuts, strict=False):
            chunks = ladder.demonstrations[start:end]
            ids = tuple(token for chunk in chunks for token in self.tokens(chunk, "", ladder.key))
            media = tuple(index for chunk in chunks for index in chunk.media)
            pieces.append(Piece(ids if pieces else self.opening + ids, media))
        queries = tuple(
            Asked(
                cuts.index(query.after) + 1,
                Piece(self.tokens(query.chunk, None, ladder.key), query.chunk.media),
                tuple(self._answer(ladder.key, query.chunk, answer) for answer in query.answers),
                (number, place),
            )
            for place, query in enumerate(ladder.queries)
        )
        if not all(asked.piece.ids for asked in queries):
            raise FlamingoError(f"{ladder.key}: nothing is asked, expected a query with media or text")
        return Encoded(tuple(pieces), queries, frozenset(ladder.media))

    def _answer(self, key: str, chunk: Chunk, answer: str) -> tuple[int, ...]:
        """Ids of an answer as they stand after its prompt."""
        return answer_tokens(key, chunk, answer, self.tokens(chunk, None, key), self.tokens(chunk, answer, key))

    def check_room(self, ladder: Ladder, encoded: Encoded, new: int) -> None:
        """Refuse prompts for which the LM has too few positions; `new` tokens are to be generated.

        Raises:
            FlamingoError: it names the ladder, and says how many tokens there are and may be.
        """
        config = self.model.config.text_config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None)
        for asked in encoded.queries:
            before = sum(len(piece.ids) for piece in encoded.pieces[: asked.after])
            length = before + len(asked.piece.ids) + max([new, *map(len, asked.answers)])
            if positions is not None and length > positions:
                raise FlamingoError(
                    f"{ladder.key}: a prompt and its answer of {length} tokens, but the LM has {positions} positions; "
                    "expected fewer shots"
                )

    def check_tokens(self, ladder: Ladder) -> None:
        """Refuse a tokenizer that reads chunks differently alone and in a row.

        Only what stands on both sides of a border can make a difference, so each kind of border is tried once.

        Raises:
            FlamingoError: it names the ladder and the chunk that is read differently.
        """
        borders = {_border(*pair): pair for pair in pairwise(ladder.demonstrations)}
        for query in ladder.queries:
            if query.after:
                pair = ladder.demonstrations[query.after - 1], query.chunk
                borders[_border(*pair)] = pair
        for border, (before, after) in borders.items():
            if border in self.tried:
                continue
            segments = [
                part for chunk in (before, after) for part in chunk.segments([Image(b"")] * len(chunk.media), "")
            ]
            whole = self.processor.encode(Document(tuple(segments), complete=False)).input_ids
            if tuple(whole) != self.opening + self.tokens(before, "") + self.tokens(after, ""):
                text = after.text or "<image>"
                raise FlamingoError(f"{ladder.key}: the tokenizer reads {text!r:.80} differently alone and in a row")
            if len(self.tried) >= KNOWN_CHUNKS:
                self.tried.clear()
            self.tried.add(border)

    # -- answers -------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    @fast_products()
    def rank(
        self,
        library: Library,
        ladders: Sequence[Ladder],
        *,
        normalise: str = "sum",
        top_k: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[np.ndarray]]:
        """Log-likelihoods of the answers of every ladder's every query, each (answers,) float64, in nats.

        Args:
            library: where the media are.
            ladders: to score; any order and mixture.
            normalise: "sum" over the tokens of an answer, or their "mean".
            top_k: the scores of the so many best answers are wanted alone, and of what is tied with the last of them
                (`TIE`): those are exact, all others −inf. None: all scores.
            progress: called with the number of queries done since its last call.

        Raises:
            FlamingoError: see `encode`, `check_tokens`, `check_room`, `MediaStore.require` and `best_only`.
        """
        scores = [[np.zeros(0) for _ in ladder.queries] for ladder in ladders]
        for waiting in self._read_ladders(library, ladders):
            for batch, prefix in self._batches([(each.node, each.asked.piece) for each in waiting]):
                asked = [waiting[number].asked for number in batch]
                logits = self._read(library, prefix, [each.piece for each in asked])
                found = self._score(prefix, logits, [each.answers for each in asked], normalise, top_k)
                for each, row in zip(asked, found, strict=True):
                    ladder, place = each.place
                    scores[ladder][place] = row
                if progress is not None:
                    progress(len(batch))
        return scores

    @torch.inference_mode()
    def generate(
        self,
        library: Library,
        ladders: Sequence[Ladder],
        *,
        max_new_tokens: int,
        beams: int = 1,
        length_penalty: float = 1.0,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[str]]:
        """What the model most likely answers to every ladder's every query, up to `<|endofchunk|>`.

        Args:
            library: where the media are.
            ladders: any order and mixture; candidate answers are not looked at.
            max_new_tokens: of an answer, at most.
            beams: 1: each token the most likely one; more: beam search, as transformers has it.
            length_penalty: of beam search: a beam's log-likelihood is divided by its number of tokens to this power, so
                that 0 prefers short answers, as OpenFlamingo's evaluation does.
            progress: called with the number of queries done since its last call.

        Raises:
            FlamingoError: see `encode`, `check_tokens`, `check_room` and `MediaStore.require`.
        """
        for name, value in (("max_new_tokens", max_new_tokens), ("beams", beams)):
            if value < 1:
                raise FlamingoError(f"{name}: {value}, expected at least 1")
        how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "num_beams": beams, "length_penalty": length_penalty}
        texts = [[""] * len(ladder.queries) for ladder in ladders]
        image = self.model.config.image_token_id
        for waiting in self._read_ladders(library, ladders, max_new_tokens):
            # All but the last token, which generation reads: after it, queries of any lengths go on together.
            begun = [(each.node, each.asked.piece.split(-1, image)[0]) for each in waiting]
            ready = list(zip(waiting, self._go_on(library, begun), strict=True))
            # Of a prompt of one token nothing is read: there is no cache to join with others.
            ready.sort(key=lambda each: (each[1].prefix.cache is None, each[1].place))
            groups = [list(group) for _, group in groupby(ready, key=lambda each: each[1].prefix.cache is None)]
            for some in (part for group in groups for part in _split(group, self.batch_size)):
                prefix = Prefix.join([(node.prefix, node.place[1]) for _, node in some])
                found = self._generate(library, prefix, [each.whole for each, _ in some], **how)
                for (each, _), text in zip(some, found, strict=True):
                    ladder, place = each.asked.place
                    texts[ladder][place] = text
                if progress is not None:
                    progress(len(some))
        return texts

    # -- reading the demonstrations ------------------------------------------------------------------------------------

    def _read_ladders(self, library: Library, ladders: Sequence[Ladder], new: int = 0) -> Iterator[list[Waiting]]:
        """Read the demonstrations of all ladders; yields queries of one depth, for which everything is read.

        `new` tokens are to be generated after each.
        """
        encoded = [self.encode(ladder, number) for number, ladder in enumerate(ladders)]
        for ladder, each in zip(ladders, encoded, strict=True):
            self.check_tokens(ladder)
            self.check_room(ladder, each, new)
        for window in self._windows(encoded):
            self.store.require(library, {index for each in window for index in each.media})
            # Those of the same lengths beside one another: the longer the runs, the fewer the passes.
            for group in _split(sorted(window, key=lambda each: each.lengths), self.batch_size):
                yield from self._read_group(library, group)

    def _windows(self, encoded: Sequence[Encoded]) -> Iterator[list[Encoded]]:
        """Runs of ladders whose media fit into the store together."""
        window: list[Encoded] = []
        held: set[int] = set()
        for each in encoded:
            if window and len(held | each.media) > self.store.capacity:
                yield window
                window, held = [], set()
            window.append(each)
            held |= each.media
        if window:
            yield window

    def _read_group(self, library: Library, group: Sequence[Encoded]) -> Iterator[list[Waiting]]:
        """Read the pieces of some ladders, depth by depth, those that several begin with once."""
        reached = [Node(Piece(), Prefix([()]), (0, 0))] * len(group)
        for depth in range(max(len(each.pieces) for each in group)):
            steps = {
                number: (reached[number], each.pieces[depth])
                for number, each in enumerate(group)
                if depth < len(each.pieces)
            }
            different = list(dict.fromkeys(steps.values()))
            nodes = dict(zip(different, self._go_on(library, different), strict=True))
            for number, step in steps.items():
                reached[number] = nodes[step]
            yield [
                Waiting(asked, reached[number])
                for number, each in enumerate(group)
                for asked in each.queries
                if asked.after == depth + 1
            ]

    def _go_on(self, library: Library, steps: Sequence[tuple[Node, Piece]]) -> list[Node]:
        """Read a piece on after each node; the nodes where that leads."""
        reached: dict[int, Node] = {}
        for number, (batch, prefix) in enumerate(self._batches(steps)):
            self._read(library, prefix, [steps[step][1] for step in batch])
            for row, step in enumerate(batch):
                before, piece = steps[step]
                reached[step] = Node(before.read.then(piece), prefix, (number, row))
        return [reached[step] for step in range(len(steps))]

    def _batches(self, steps: Sequence[tuple[Node, Piece]]) -> Iterator[tuple[Sequence[int], Prefix]]:
        """Numbers of steps that one pass can make, of equally many tokens, and what is read before them."""
        alike = defaultdict(list)
        for step, (node, piece) in enumerate(steps):
            alike[len(piece.ids), node.prefix.cache is None].append(step)
        for group in alike.values():
            group.sort(key=lambda step: steps[step][0].place)
            for batch in _split(group, self.batch_size):
                nodes = [steps[step][0] for step in batch]
                yield batch, Prefix.join([(node.prefix, node.place[1]) for node in nodes])

    # -- passes --------------------------------------------------------------------------------------------------------

    def _score(
        self,
        prompt: Prefix,
        logits: Tensor,
        answers: Sequence[tuple[tuple[int, ...], ...]],
        normalise: str = "sum",
        top_k: int | None = None,
    ) -> list[np.ndarray]:
        """Scores of each row's answers after `prompt`, whose last token gave `logits` (B, V); see `rank`."""
        searches = [Search(self._trie(each), normalise, top_k) for each in answers]
        prompts = [(row, row, 0, 0, search.trie) for row, search in enumerate(searches) if search.trie.children[0]]
        for row, node, likelihoods in _likelihoods(logits[:, None], prompts):
            searches[row].learn(node, likelihoods)
        while wanted := {row: nodes for row, search in enumerate(searches) if (nodes := search.wanted())}:
            read = self._read_trees if self.reads_ahead and self.reads_trees else self._read_paths
            for row, node, likelihoods in read(prompt, {row: (searches[row].trie, wanted[row]) for row in wanted}):
                searches[row].learn(node, likelihoods)
        self.label_tokens += sum(int(search.trie.lengths.sum()) for search in searches)
        return [best_only(search.scores, top_k) for search in searches]

    def _trie(self, answers: tuple[tuple[int, ...], ...]) -> Trie:
        if answers not in self.tries:
            if len(self.tries) >= KNOWN_TRIES:
                self.tries.clear()
            self.tries[answers] = Trie(answers)
        return self.tries[answers]

    def _read_trees(self, prompt: Prefix, wanted: Mapping[int, tuple[Trie, list[int]]]) -> Iterator[Learnt]:
        """Read nodes of tries, all those of one row of `prompt` side by side: each sees those before it alone."""
        limit = max(16, LOGITS_AT_ONCE // self.vocabulary)
        for rows in _split(list(wanted), limit):
            each = max(1, limit // len(rows))
            for start in range(0, max(len(wanted[row][1]) for row in rows), each):
                some = {row: (wanted[row][0], wanted[row][1][start : start + each]) for row in rows}
                yield from self._read_tree(prompt, {row: part for row, part in some.items() if part[1]})

    def _read_tree(
        self, prompt: Prefix, wanted: Mapping[int, tuple[Trie, list[int]]], *, hiding: bool = True
    ) -> Iterator[Learnt]:
        """As `_read_trees`, in one pass; without `hiding`, nodes see all others that are read before them."""
        device = self.model.device
        closures = [trie.closure(nodes) for trie, nodes in wanted.values()]
        longest = max(map(len, closures))
        ids = torch.full((len(wanted), longest), self.filler)
        depths = torch.ones(len(wanted), longest, dtype=torch.long)
        seen = torch.eye(longest, dtype=torch.bool).repeat(len(wanted), 1, 1)
        if not hiding:
            seen = torch.ones_like(seen).tril()
        places: list[dict[int, int]] = []
        for row, ((trie, _), closure) in enumerate(zip(wanted.values(), closures, strict=True)):
            ids[row, : len(closure)] = torch.tensor([trie.tokens[node] for node in closure])
            depths[row, : len(closure)] = torch.tensor([trie.depths[node] for node in closure])
            places.append({node: place for place, node in enumerate(closure)})
            for place, node in enumerate(closure):
                if trie.parents[node]:
                    seen[row, place] |= seen[row, places[row][trie.parents[node]]]
        prefix = prompt.pick(list(wanted))
        before = torch.ones(len(wanted), prefix.length, dtype=torch.bool, device=device)
        if prefix.padding is not None:
            before = prefix.padding.bool()
        seen = torch.cat((before[:, None].expand(-1, longest, -1), seen.to(device)), dim=-1)
        mask = torch.zeros(seen.shape, dtype=self.model.dtype, device=device)
        mask = mask.masked_fill(~seen, torch.finfo(mask.dtype).min)[:, None]
        positions = before.sum(dim=1, keepdim=True) - 1 + depths.to(device)
        media: list[tuple[int, ...]] = [()] * len(wanted)
        logits = self._pass(prefix, ids.to(device), media, keep=longest, mask=mask, positions=positions)
        self.label_tokens_read += sum(map(len, closures))
        found = [
            (row, at, place[node], node, trie)
            for at, ((row, (trie, nodes)), place) in enumerate(zip(wanted.items(), places, strict=True))
            for node in nodes
        ]
        yield from _likelihoods(logits, found)

    def _read_paths(self, prompt: Prefix, wanted: Mapping[int, tuple[Trie, list[int]]]) -> Iterator[Learnt]:
        """As `_read_trees`, for any LM: each path through a trie is a row of its own."""
        ends = {row: trie.ends_of(nodes) for row, (trie, nodes) in wanted.items()}
        most = max(map(len, ends.values()))
        # All rows' first paths, then their second ones: the rows of a pass are then often those of the prompt.
        paths = [(row, ends[row][place]) for place in range(most) for row in wanted if place < len(ends[row])]
        missing = {row: set(nodes) for row, (_, nodes) in wanted.items()}
        at_once = len(wanted) * max(1, CACHED_TOKENS // (len(wanted) * max(1, prompt.length)))
        deepest = max(trie.depths[end] for row, (trie, _) in wanted.items() for end in ends[row])
        for some in _split(paths, max(1, min(at_once, LOGITS_AT_ONCE // (self.vocabulary * deepest)))):
            read = [wanted[row][0].path(end) for row, end in some]
            longest = max(map(len, read))
            tokens = [
                [wanted[row][0].tokens[node] for node in nodes] for (row, _), nodes in zip(some, read, strict=True)
            ]
            # Shorter paths are filled up behind: nothing sees that.
            ids = torch.tensor([[*each, *[self.filler] * (longest - len(each))] for each in tokens])
            prefix = prompt.pick([row for row, _ in some])
            logits = self._pass(prefix, ids.to(self.model.device), [()] * len(some), keep=longest)
            self.label_tokens_read += sum(map(len, read))
            found = []
            for at, ((row, _), nodes) in enumerate(zip(some, read, strict=True)):
                found += [
                    (row, at, place, node, wanted[row][0]) for place, node in enumerate(nodes) if node in missing[row]
                ]
                missing[row].difference_update(nodes)
            yield from _likelihoods(logits, found)

    def _generate(
        self, library: Library, prefix: Prefix, whole: Sequence[Piece], *, num_beams: int, **how: Any
    ) -> list[str]:
        """Answers to prompts, of each of which all tokens but the last are read; `how`: options of `generate`."""
        device, length = self.model.device, prefix.length + 1
        # What was read goes along, for all that looks at it: marks are counted, repeats may be forbidden.
        ids = [[self.filler] * (length - len(piece.ids)) + list(piece.ids) for piece in whole]
        mask = torch.ones(len(whole), length, dtype=torch.long, device=device)
        if prefix.padding is not None:
            mask[:, :-1] = prefix.padding
        slots = [slot for piece in whole for slot in self.store.of(library, piece.media)]
        for_beams = prefix.pick([row for row in range(len(whole)) for _ in range(num_beams)])
        found = self.model.generate(
            input_ids=torch.tensor(ids, device=device),
            attention_mask=mask,
            past_key_values=for_beams.cache,
            media_memory=self.store.memory.select(torch.tensor(slots, dtype=torch.long, device=device)),
            do_sample=False,
            num_beams=num_beams,
            eos_token_id=self.filler,
            pad_token_id=self.filler,
            **how,
        )
        return [answer_text(self.processor, row) for row in found[:, length:].tolist()]

    def _read(self, library: Library, prefix: Prefix, pieces: Sequence[Piece]) -> Tensor:
        """Read a piece on in each row, all of equally many tokens; logits (B, V) of the last, (B, 0) of none."""
        if not pieces[0].ids:
            return torch.zeros(len(pieces), 0)
        ids = torch.tensor([piece.ids for piece in pieces], device=self.model.device)
        return self._pass(prefix, ids, [self.store.of(library, piece.media) for piece in pieces])[:, -1]

    def _pass(
        self,
        prefix: Prefix,
        ids: Tensor,
        media: Sequence[tuple[int, ...]],
        keep: int = 1,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Read `ids` (B, T) on from `prefix`, which moves along; logits (B, keep, V) of the last positions.

        Args:
            prefix: what was read before.
            ids: at least one token each.
            media: of each row, slots of the media that stand among `ids`.
            keep: positions, from the last one back, of which logits are wanted.
            mask, positions: (B, 1, T, tokens read) to add to scores of attention, and (B, T), where tokens do not
                follow one another; nothing can be read on from there.
        """
        if prefix.cache is not None and ids.shape[1] > 1 and not self.reads_ahead:
            return self._pass_by_token(prefix, ids, media, keep)
        device = ids.device
        available = [(*before, *new) for before, new in zip(prefix.media, media, strict=True)]
        counts = [len(each) for each in available]
        before = torch.tensor([len(each) for each in prefix.media], device=device)
        last = before[:, None] + (ids == self.model.config.image_token_id).long().cumsum(dim=1)
        if prefix.padding is not None:
            prefix.padding = torch.cat((prefix.padding, torch.ones_like(ids)), dim=1)
        slots = torch.tensor([slot for each in available for slot in each], dtype=torch.long, device=device)
        output = self.model(
            input_ids=ids,
            attention_mask=prefix.padding if mask is None else mask,
            position_ids=positions,
            past_key_values=prefix.cache,
            use_cache=True,
            media_memory=self.store.memory.select(slots),
            media_per_sample=torch.tensor(counts, device=device),
            media_slots=max(counts),
            media_first=last.clamp(max=1) if self.sees_all else last,
            media_last=last,
            logits_to_keep=keep,
        )
        if output.past_key_values is None:
            name = type(self.model.language_model).__name__
            raise FlamingoError(f"{name} gives no past_key_values, from which an evaluation goes on")
        prefix.cache = output.past_key_values
        prefix.length += ids.shape[1]
        prefix.media = available if self.sees_all else [each[-1:] for each in available]
        return output.logits

    def _pass_by_token(self, prefix: Prefix, ids: Tensor, media: Sequence[tuple[int, ...]], keep: int) -> Tensor:
        """As `_pass`, for LMs whose cache goes on by one token at a time only."""
        logits = []
        coming = [list(each) for each in media]
        for token in ids.split(1, dim=1):
            marks = (token[:, 0] == self.model.config.image_token_id).tolist()
            own = [(each.pop(0),) if mark else () for mark, each in zip(marks, coming, strict=True)]
            logits.append(self._pass(prefix, token, own))
        return torch.cat(logits[-keep:], dim=1)

    def _branches(self) -> bool:
        """Whether candidates can be read as a tree, by a mask; some LMs do not heed it, or go by order alone."""
        config = self.model.language_model.config
        windows = [getattr(config, name, None) for name in ("sliding_window", "window_size", "attention_window")]
        if not self.model.takes_positions or config._attn_implementation not in MASKED or any(windows):
            return False
        beginning, *some = [token for token in range(10) if token != self.model.config.image_token_id][:9]
        prompt = Prefix([()])
        logits = self._pass(prompt, torch.tensor([[beginning, *some]], device=self.model.device), [()])[:, -1]
        if not all(type(layer) is DynamicLayer for layer in prompt.cache.layers):
            return False
        trie = Trie([(some[i], some[j], some[i + j], some[0]) for i in range(3) for j in range(3)])
        wanted = {0: (trie, trie.inner)}
        apart, as_tree, unhidden = (
            np.concatenate([each.likelihoods for each in sorted(found, key=lambda each: each.node)])
            for found in (
                self._read_paths(prompt, wanted),
                self._read_tree(prompt, wanted),
                self._read_tree(prompt, wanted, hiding=False),
            )
        )
        noise = 100 * torch.finfo(logits.dtype).eps * np.abs(apart).max()
        if torch.finfo(logits.dtype).bits < 32:  # little beside what siblings would do that are seen
            noise = min(noise, 0.1 * np.abs(unhidden - apart).max())
        return bool(np.abs(as_tree - apart).max() <= noise)

    def _continues(self) -> bool:
        """Whether the LM's cache goes on right by several tokens at once; that of some families does not."""
        some = [token for token in range(10) if token != self.model.config.image_token_id][:9]
        ids = torch.tensor([some], device=self.model.device)
        whole, parts = Prefix([()]), Prefix([()])
        self._pass(parts, ids[:, :-2], [()])
        # The last two: so few that both depend on what the cache kept.
        expected, found = self._pass(whole, ids, [()], keep=2), self._pass(parts, ids[:, -2:], [()], keep=2)
        known = expected.isfinite()  # −inf: ids that no token has
        # In half precision no more than a trained LM's logits change when its cache has lost something.
        noise = min(100 * torch.finfo(expected.dtype).eps, 0.05) * expected[known].abs().max()
        return bool((found - expected)[known].abs().max() <= noise)


def _likelihoods(logits: Tensor, read: Sequence[tuple[int, int, int, int, Trie]]) -> Iterator[Learnt]:
    """What was learnt of nodes.

    Args:
        logits: (B, T, V) after tokens of nodes.
        read: the row whose trie it is, row and place in `logits`, and the node, in its trie.
    """
    logits = _exact(logits)
    if not read:
        return
    edges = [(at, place, trie.tokens[child]) for _, at, place, node, trie in read for child in trie.children[node]]
    at, place, token = torch.tensor(edges, device=logits.device).unbind(dim=1)
    values = iter((logits[at, place, token] - logits.logsumexp(-1)[at, place]).tolist())
    for row, _, _, node, trie in read:
        yield Learnt(row, node, [next(values) for _ in trie.children[node]])


def _border(before: Chunk, after: Chunk) -> tuple[Any, ...]:
    """What the tokens on both sides of the border between two chunks can depend on."""
    lead = after.parts[0] if after.parts and isinstance(after.parts[0], str) else None
    return bool(before.parts) and isinstance(before.parts[-1], str), before.separator, lead


def answer_tokens(key: str, chunk: Chunk, answer: str, prompt: Sequence[int], whole: Sequence[int]) -> tuple[int, ...]:
    """Ids of an answer as they stand after its prompt: what `whole`, prompt and answer, has more than `prompt`.

    Raises:
        FlamingoError: where a prompt is no prefix of the whole; it names both.
    """
    if list(whole[: len(prompt)]) != list(prompt) or len(whole) == len(prompt):
        raise FlamingoError(
            f"{key}: the tokens of the prompt {chunk.text!r} are no prefix of those of prompt and answer "
            f"{chunk.text + answer!r}; end the prompt where a token ends"
        )
    return tuple(whole[len(prompt) :])


def answer_text(processor: FlamingoProcessor, ids: Sequence[int]) -> str:
    """Generated ids up to `<|endofchunk|>` as text, without spaces around it."""
    end = processor.tokenizer.convert_tokens_to_ids(END_OF_CHUNK)
    own = ids[: ids.index(end)] if end in ids else ids
    return processor.decode(own, skip_special_tokens=True).strip()


def _split(group: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (group[start : start + size] for start in range(0, len(group), size))


def _exact(logits: Tensor) -> Tensor:
    """In float32 at least."""
    return logits if logits.dtype == torch.float64 else logits.float()
