"""Which demonstrations a query gets: one ranking of the pool for each query, of which k shots are the beginning.

The ranking comes from (seed, task, query id) alone: never from the batch, the rank, the order of evaluation or the
shot counts that are asked for. It goes in rounds; each round gives one demonstration of every way, in an order of its
own, so k shots per way are the first k rounds: balanced, and nested in every larger k.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from flamingo.errors import FlamingoError
from icl_eval.sources import Pool
from icl_eval.tasks import Task


@dataclass(frozen=True)
class Episode:
    """A query, its candidate classes, and the ranking of its demonstrations.

    Attributes:
        query_id: names it within the task.
        query: index of the query's picture in the pool.
        target: which way is right, 0-based; ways are in random order, so that no position is favoured.
        names: the label of each way.
        ranking: (rounds, ways) indices into the pool; never holds the query.
        ranking_ways: (rounds, ways) the way of each of them.
    """

    query_id: str
    query: int
    target: int
    names: tuple[str, ...]
    ranking: np.ndarray
    ranking_ways: np.ndarray


def generator(*parts: object) -> np.random.Generator:
    """A generator that depends on `parts` alone, through their text and SHA-256."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def draw_episode(task: Task, pool: Pool, seed: int, number: int) -> Episode:
    """Episode `number` of `task`: a pure function of its arguments."""
    query_id = f"{task.name}/{number:06d}"
    rng = generator(seed, task.name, query_id)
    kinds = list(pool.by_kind)
    chosen = [kinds[index] for index in rng.permutation(len(kinds))[: task.ways]]
    target = int(rng.integers(task.ways))
    columns = [rng.permutation(pool.by_kind[kind]) for kind in chosen]
    query, columns[target] = int(columns[target][0]), columns[target][1:]
    rounds = min(map(len, columns))
    by_way = np.stack([column[:rounds] for column in columns], axis=1)
    order = rng.permuted(np.tile(np.arange(task.ways), (rounds, 1)), axis=1)
    return Episode(
        query_id, query, target, _names(task, pool, chosen, rng), np.take_along_axis(by_way, order, axis=1), order
    )


def _names(task: Task, pool: Pool, kinds: list[str], rng: np.random.Generator) -> tuple[str, ...]:
    if task.names == "fixed":
        return tuple(str(pool.label(kind)) for kind in kinds)
    from data_shards.glyphs.words import fresh_names

    return tuple(fresh_names(rng, len(kinds), split="unseen"))


def check_shots(task: Task, pool: Pool, shots: int) -> None:
    """Refuse more shots than the pool has pictures for.

    Raises:
        FlamingoError: it names the task, the shots asked for, and the most there are.
    """
    # One picture of the query's class is the query.
    most = min(map(len, pool.by_kind.values())) - 1
    if not 0 <= shots <= most:
        raise FlamingoError(f"{task.file}: shots: {shots}, expected 0 to {most} (pictures of a class, less the query)")
