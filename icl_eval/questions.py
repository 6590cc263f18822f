"""What a model is asked: for every query of a task the prompts of all cells, as ladders for the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from icl_eval.demonstrations import TEXT_ONLY, Draws, Episode, Similarity, orders
from icl_eval.diagnostics import CONTROL_SHOTS, VARIANTS, reordered, under_control
from icl_eval.engine import Chunk, Ladder, Query
from icl_eval.prompts import Prompt, Template
from icl_eval.sources import Pool
from icl_eval.tasks import Task

CellKey = tuple[int, str | None]
"""shots, and the control or None"""


@dataclass(frozen=True)
class Asked:
    """A ladder, and the cell that each of its queries belongs to."""

    ladder: Ladder
    keys: tuple[CellKey, ...]


class Questions:
    """The queries of a task, and how they are put; every method is a pure function of its arguments.

    Args:
        task, pool: whose.
        keys: cells that will be asked for.
        similarity: for `demonstrations: rices`.

    Raises:
        FlamingoError: more shots than the support has demonstrations for; see `Draws` and `Template` too.
    """

    def __init__(self, task: Task, pool: Pool, keys: Sequence[CellKey], similarity: Similarity | None = None):
        self.task, self.pool, self.seed = task, pool, task.seed
        spare = bool(task.ways)  # under `random_query` one more round than is shown
        most = max(shots + (control == "random_query" and spare) for shots, control in keys)
        self.draws = Draws(task, pool, task.seed, most, similarity)
        self.template = Template(task, pool)

    def prompts(self, episode: Episode, key: CellKey) -> list[Prompt]:
        """The prompts of a query in a cell: one for each order of the demonstrations that is averaged over."""
        shots, control = key
        if control is not None:
            first = under_control(episode, shots, control, self.seed, self.pool)
        elif self.is_text_only(key):
            return [episode.prompt(TEXT_ONLY, text_only=True)]
        else:
            first = episode.prompt(shots)
        if self.task.ensemble == 1:
            return [first]
        return [reordered(first, order) for order in orders(episode, shots, self.seed, self.task.ensemble)]

    def is_text_only(self, key: CellKey) -> bool:
        """Whether a cell's prompts have two demonstrations that do not count as shots."""
        return key == (0, None) and self.task.zero_shot == "text_only"

    def chunks(self, prompt: Prompt) -> tuple[Chunk, ...]:
        """A prompt as the engine reads it."""
        return self.template.chunks(prompt)

    def asked(self, episode: Episode, keys: Sequence[CellKey]) -> list[Asked]:
        """Ladders for a query's cells; those whose prompts are nested in one another share one."""
        nested: list[tuple[CellKey, Prompt]] = []
        alone: list[tuple[CellKey, Prompt]] = []
        for key in keys:
            first, *others = self.prompts(episode, key)
            nests = key[1] in (None, "random_query") and not episode.nearest_last and not self.is_text_only(key)
            (nested if nests else alone).append((key, first))
            alone += [(key, prompt) for prompt in others]
        nested.sort(key=lambda each: len(each[1].shown))
        return [self._ladder(episode, group) for group in ([nested] if nested else []) + [[each] for each in alone]]

    def _ladder(self, episode: Episode, group: Sequence[tuple[CellKey, Prompt]]) -> Asked:
        longest = group[-1][1]  # they come in order of their shots
        queries = (
            Query(len(prompt.shown), self.template.query(prompt), self.template.answers(prompt.candidates))
            for _, prompt in group
        )
        demonstrations = tuple(map(self.template.demonstration, longest.shown))
        return Asked(Ladder(demonstrations, tuple(queries), episode.query_id), tuple(key for key, _ in group))


def cell_keys(task: Task, controls: Sequence[str]) -> list[CellKey]:
    """A task's cells: plain ones by shots, then controls, for tasks with demonstrations.

    Variants are nothing without what they vary: with them the plain cells at 0 and `CONTROL_SHOTS` are run too.
    """
    if not any(task.shots):
        return [(count, None) for count in task.shots]
    compared = {0, CONTROL_SHOTS} if set(VARIANTS) & set(controls) else set()
    plain: list[CellKey] = [(count, None) for count in sorted({*task.shots, *compared})]
    return [*plain, *((CONTROL_SHOTS, control) for control in controls)]
