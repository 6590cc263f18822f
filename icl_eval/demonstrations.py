"""Which demonstrations a query gets: one ranking of the support for each query, of which k shots are the beginning.

The ranking comes from (seed, task, query id) alone: never from the batch, the rank, the order of evaluation or the
shot counts that are asked for. It is drawn lazily, as far as it is needed, so that k shots cost O(k) however large the
support is. The query itself is never in it, nor an example that shows the content of one of its media.

- random: a ranking of its own for each query; fixed: one for all queries of a seed.
- balanced: in rounds; each gives one demonstration of every class, in an order of its own.
- rices: the most similar media first (`features`); in the prompt the most similar stands last.
- fast binding (`Task.ways`): an episode has classes of its own; a shot is a round over them.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from flamingo.errors import FlamingoError
from icl_eval.datasets import Example
from icl_eval.metrics import METRICS
from icl_eval.prompts import Prompt, Shown
from icl_eval.sources import Pool, by_label
from icl_eval.tasks import Task

TEXT_ONLY = 2
"""demonstrations without media that stand before a query at 0 shots, where a task has `zero_shot: text_only`"""


class Similarity(Protocol):
    """Which examples of the support look like a query (`icl_eval.features.Features`)."""

    def ranking(self, query: Example) -> Iterator[int]:
        """Places in the support, the most similar first."""


@dataclass(frozen=True)
class Demonstration:
    """An example that may be shown, its answer, and in fast binding its way."""

    example: Example
    answer: str
    way: int = 0


@dataclass(frozen=True)
class Episode:
    """A query, its candidate answers, and the ranking of its demonstrations as far as it is needed.

    Attributes:
        query_id: names it within the task.
        query: the example that is asked about.
        candidates: answers to choose among; none where the model answers freely.
        target: which candidate is right; None where there is none, or none is known to be.
        ranking: never holds the query.
        per_shot: demonstrations of a shot.
        nearest_last: whether prompts have them in reverse.
    """

    query_id: str
    query: Example
    candidates: tuple[str, ...]
    target: int | None
    ranking: tuple[Demonstration, ...]
    per_shot: int = 1
    nearest_last: bool = False

    def first(self, shots: int) -> tuple[Demonstration, ...]:
        """The demonstrations of `shots`, in the order in which a prompt has them."""
        chosen = self.ranking[: shots * self.per_shot]
        return chosen[::-1] if self.nearest_last else chosen

    def prompt(self, shots: int, *, text_only: bool = False) -> Prompt:
        """The prompt with `shots`; the demonstrations' media may be left out."""
        shown = (Shown(each.example, each.answer, None if text_only else each.example) for each in self.first(shots))
        return Prompt(tuple(shown), self.query, self.query, self.candidates)


def generator(*parts: object) -> np.random.Generator:
    """A generator that depends on `parts` alone, through their text and SHA-256."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def without_replacement(rng: np.random.Generator, count: int) -> Iterator[int]:
    """0 … count - 1 in random order, drawn as they are asked for (a sparse Fisher-Yates shuffle)."""
    moved: dict[int, int] = {}
    for place in range(count):
        other = int(rng.integers(place, count))
        chosen = moved.get(other, other)
        moved[other] = moved.pop(place, place)
        yield chosen


def orders(episode: Episode, shots: int, seed: int, count: int) -> list[tuple[int, ...]]:
    """Different orders of a prompt's demonstrations, at most `count`, the given one first."""
    number = len(episode.first(shots))
    rng = generator(seed, episode.query_id, "order", shots)
    found = {tuple(range(number)): None}
    while len(found) < min(count, math.factorial(min(number, 10))):
        found[tuple(rng.permutation(number).tolist())] = None
    return list(found)


class Draws:
    """The queries of a task, each with its demonstrations: pure functions of their number.

    Args:
        task, pool: whose.
        seed: of all draws.
        most: shots for which demonstrations will be needed; more never change those of fewer.
        similarity: for `demonstrations: rices`.

    Raises:
        FlamingoError: a query that cannot be scored; also in use: more shots than the support has demonstrations for.
    """

    def __init__(self, task: Task, pool: Pool, seed: int, most: int, similarity: Similarity | None = None):
        self.task, self.pool, self.seed, self.similarity = task, pool, seed, similarity
        check_shots(task, pool, most)
        self.needed = most * task.per_shot
        if task.zero_shot == "text_only" and 0 in task.shots:
            self.needed = max(self.needed, TEXT_ONLY)
        self._chosen = self._choose()
        for place in () if self._chosen is None or task.ways else self._chosen:  # now, not after hours
            query = pool.queries[place]
            self._target(query, self._candidates(query))

    @property
    def by_similarity(self) -> bool:
        """Whether `similarity` is needed: not where nothing is shown, since it looks at the whole support."""
        return self.task.demonstrations == "rices" and self.needed > 0

    @property
    def count(self) -> int:
        """How many queries there are."""
        return self.task.queries if self._chosen is None else len(self._chosen)

    def _choose(self) -> Sequence[int] | None:
        """Places of the queries in their split; None where each episode draws its own."""
        if self.task.ways and not self.task.within:
            return None
        total = len(self.pool.queries)
        if not 0 < self.task.queries < total:
            return range(total)
        stream = without_replacement(generator(self.seed, self.task.name, "queries"), total)
        return list(itertools.islice(stream, self.task.queries))

    def episode(self, number: int) -> Episode:
        """Query `number`, from 0."""
        if self._chosen is None:
            return self._binding(number)
        query = self.pool.queries[self._chosen[number]]
        if self.task.ways:
            return self._binding_within(query)
        candidates = self._candidates(query)
        ranking = tuple(
            Demonstration(example, self._answer(example))
            for example in itertools.islice(self._allowed(query), self.needed)
        )
        self._check(query.id, len(ranking))
        return Episode(
            query.id,
            query,
            candidates,
            self._target(query, candidates),
            ranking,
            nearest_last=self.task.demonstrations == "rices",
        )

    # -- examples with a question --------------------------------------------------------------------------------------

    def _answer(self, example: Example) -> str:
        """What stands for an example in a demonstration."""
        by_class = "{label}" in self.task.template
        found = example.label if by_class else next(iter(example.answers), None)
        if found is None:
            raise FlamingoError(
                f"{self.task.file}: support: example {example.id!r} of {self.task.dataset} has no "
                f"{'class' if by_class else 'answer'} to be shown with"
            )
        return found

    def _candidates(self, query: Example) -> tuple[str, ...]:
        return self.pool.choices(query) if self.task.mode == "rank" else ()

    def _target(self, query: Example, candidates: Sequence[str]) -> int | None:
        for right in (query.label, *query.answers):
            if right is not None and right in candidates:
                return candidates.index(right)
        if METRICS[self.task.metric].takes != "text" or not (query.answers or query.label):
            raise FlamingoError(
                f"{self.task.file}: split: {self.task.split!r}, but query {query.id!r} has no right answer"
                f"{' among its candidates' if candidates else ''}, which metric {self.task.metric} needs"
            )
        return None

    def _allowed(self, query: Example) -> Iterator[Example]:
        """The ranking of a query's support, without itself and what shows its media."""
        own = self.pool.digests(query)

        def usable(place: int) -> bool:
            example = self.pool.support[place]
            if self.pool.same and example.id == query.id:
                return False
            return not own & self.pool.digests(example)

        for place in self._ranking(query, usable):
            yield self.pool.support[place]

    def _ranking(self, query: Example, usable: Callable[[int], bool]) -> Iterator[int]:
        places: Sequence[int] = range(len(self.pool.support))
        if self.task.within:
            places = self.pool.support_within.get(self.pool.group(query), ())
        if self.task.demonstrations == "rices":
            if self.similarity is None:
                raise FlamingoError(f"{self.task.file}: demonstrations: rices, expected features of the media")
            inside = set(places) if self.task.within else places
            return (place for place in self.similarity.ranking(query) if place in inside and usable(place))
        about = "fixed" if self.task.demonstrations == "fixed" else query.id
        rng = generator(self.seed, self.task.name, about)
        if self.task.demonstrations == "balanced":
            classes = by_label(self.pool.support, places) if self.task.within else self.pool.support_by_label
            return self._rounds(rng, classes, about, usable)
        return filter(usable, (places[chosen] for chosen in without_replacement(rng, len(places))))

    def _rounds(
        self,
        rng: np.random.Generator,
        classes: Mapping[str, Sequence[int]],
        about: str,
        usable: Callable[[int], bool],
    ) -> Iterator[int]:
        """One of every class after another, in rounds, each in an order of its own."""
        columns: dict[str, Iterator[int]] = {}
        left = list(classes)
        while left:
            over = set()
            for turn in without_replacement(rng, len(left)):
                label = left[turn]
                if label not in columns:
                    own = generator(self.seed, self.task.name, about, label)
                    columns[label] = filter(usable, self._shuffled(own, classes[label]))
                place = next(columns[label], None)
                if place is None:
                    over.add(label)
                else:
                    yield place
            left = [label for label in left if label not in over]

    @staticmethod
    def _shuffled(rng: np.random.Generator, places: Sequence[int]) -> Iterator[int]:
        return (places[chosen] for chosen in without_replacement(rng, len(places)))

    def _check(self, query_id: str, found: int) -> None:
        if found < self.needed:
            raise FlamingoError(
                f"{self.task.file}: shots: query {query_id} needs {self.needed} demonstrations, but the support has "
                f"{found} for it"
            )

    # -- fast binding --------------------------------------------------------------------------------------------------

    def _binding(self, number: int) -> Episode:
        """An episode of classes, a query of one of them, all drawn."""
        task, pool = self.task, self.pool
        query_id = f"{task.name}/{number:06d}"
        rng = generator(self.seed, task.name, query_id)
        kinds = [kind for kind in pool.queries_by_label if kind in pool.support_by_label]
        chosen = [kinds[index] for index in rng.permutation(len(kinds))[: task.ways]]
        target = int(rng.integers(task.ways))
        columns = [rng.permutation(pool.support_by_label[kind]) for kind in chosen]
        if pool.same:
            asked, columns[target] = int(columns[target][0]), columns[target][1:]
        else:
            asked = int(rng.choice(pool.queries_by_label[chosen[target]]))
        return self._bound(query_id, pool.queries[asked], target, chosen, columns, rng)

    def _binding_within(self, query: Example) -> Episode:
        """A given query, and classes that its group of the support has."""
        task, pool = self.task, self.pool
        rng = generator(self.seed, task.name, query.id)
        classes = by_label(pool.support, pool.support_within.get(pool.group(query), ()))
        others = [kind for kind in classes if kind != query.label]
        if query.label not in classes or len(others) < task.ways - 1:
            raise FlamingoError(
                f"{task.file}: ways: {task.ways}, but of query {query.id!r} the support has the classes "
                f"{', '.join(classes) or 'none'}, and its own is {query.label!r}"
            )
        chosen = [others[index] for index in rng.permutation(len(others))[: task.ways - 1]]
        target = int(rng.integers(task.ways))
        chosen.insert(target, str(query.label))
        columns = [rng.permutation(classes[kind]) for kind in chosen]
        return self._bound(query.id, query, target, chosen, columns, rng)

    def _bound(
        self,
        query_id: str,
        query: Example,
        target: int,
        kinds: Sequence[str],
        columns: Sequence[np.ndarray],
        rng: np.random.Generator,
    ) -> Episode:
        """Rounds of one demonstration of every way, each in an order of its own."""
        rounds = min(map(len, columns))
        order = rng.permuted(np.tile(np.arange(self.task.ways), (rounds, 1)), axis=1)
        names = self._names(kinds, rng)
        own = self.pool.digests(query)
        streams = [self._unlike(query, own, column) for column in columns]
        ranking: list[Demonstration] = []
        for ways in order[: self.needed // self.task.ways].tolist():
            taken = {way: next(streams[way], None) for way in ways}
            if None in taken.values():
                break
            ranking += [Demonstration(example, names[way], way) for way, example in taken.items() if example]
        self._check(query_id, len(ranking))
        return Episode(query_id, query, names, target, tuple(ranking), self.task.ways)

    def _unlike(self, query: Example, own: set[bytes], column: np.ndarray) -> Iterator[Example]:
        for place in column.tolist():
            example = self.pool.support[place]
            if not (self.pool.same and example.id == query.id) and not own & self.pool.digests(example):
                yield example

    def _names(self, kinds: Sequence[str], rng: np.random.Generator) -> tuple[str, ...]:
        if self.task.names == "fixed":
            return tuple(kinds)
        from data_shards.glyphs.words import fresh_names

        return tuple(fresh_names(rng, len(kinds), split="unseen"))


def check_shots(task: Task, pool: Pool, shots: int) -> None:
    """Refuse more shots than the pool can have examples for.

    Raises:
        FlamingoError: it names the task, the shots asked for, and the most there are.
    """
    if task.ways and not task.within:
        # Classes without a query are never shown; one picture of the query's class is the query.
        sizes = [len(places) for label, places in pool.support_by_label.items() if label in pool.queries_by_label]
        most, why = min(sizes, default=0) - pool.same, "pictures of a class, less the query"
    else:
        most, why = len(pool.support) - pool.same, "examples of the support, less the query"
    if not 0 <= shots <= most:
        raise FlamingoError(f"{task.file}: shots: {shots}, expected 0 to {most} ({why})")
