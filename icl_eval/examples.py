"""Single answers to look at, with their pictures: for the report, and for Weights & Biases."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image as PilImage

from flamingo.document import Image, Video
from flamingo.images import decode
from icl_eval.engine import Chunk
from icl_eval.evaluation import Cell, Results
from icl_eval.outcomes import Outcome
from icl_eval.prompts import Prompt, Shown, Template
from icl_eval.sources import load_pool
from icl_eval.tasks import IMAGE, Task

MOST_PICTURES = 6
"""of a prompt's demonstrations, where there is a choice of shots"""
SIDE = 160
"""pixels of the longer side of a small picture, at most"""
LARGE = 20_000
"""bytes of a picture that is too large to be put into a page"""
SHOWN = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"RIFF": "webp", b"GIF8": "gif"}
"""first bytes of files that every browser shows → their kind"""

T = TypeVar("T")
Part = bytes | str
"""A picture as the bytes of its file, or text"""


@dataclass(frozen=True)
class Answered:
    """A query as it was put, and how it was answered.

    Attributes:
        task, shots, query_id: which query of which cell.
        demonstrations: the parts of each, in the order in which the model reads them; `query`: of the query.
        references: all right answers; `right`: one of them, None where none is known.
        answer: the model's; `value`: of this query under the metric's headline, None where only all queries have one.
        candidates: of ranked ones the best, and the right one, each with its share of the likelihood.
    """

    task: str
    shots: int
    query_id: str
    demonstrations: tuple[tuple[Part, ...], ...]
    query: tuple[Part, ...]
    references: tuple[str, ...]
    right: str | None
    answer: str
    value: float | None
    candidates: tuple[tuple[str, float], ...] = ()

    @property
    def is_right(self) -> bool:
        """Whether it has the whole value, or is the right answer where it has none."""
        return self.answer == self.right if self.value is None else self.value >= 1


class Reader:
    """Fills the pictures and texts of a task's data set into its outcomes.

    Args:
        task: whose outcomes.
        data: the folder in which the folders of data sets are; see `load_pool`.

    Raises:
        FlamingoError: the data set is not there.
    """

    def __init__(self, task: Task, data: str | Path | None = None) -> None:
        self.task, self.pool = task, load_pool(task, data)
        self.template = Template(task, self.pool)
        self.queries = {example.id: example for example in self.pool.queries}
        self.support = {example.id: example for example in self.pool.support}

    def answered(self, cell: Cell, place: int, outcome: Outcome | None = None) -> Answered:
        """A query of a cell whose queries show their own pictures.

        Args:
            cell: the cell.
            place: of the query.
            outcome: the cell's at that place, where it was read already.
        """
        outcome = cell.outcomes[place] if outcome is None else outcome
        *shown, query = map(self._parts, self.template.chunks(self.prompt(cell, outcome)))
        values, example = cell.score.per_item, self.queries[outcome.query]
        return Answered(
            task=cell.task,
            shots=cell.shots,
            query_id=outcome.query_id,
            demonstrations=tuple(shown),
            query=query,
            references=() if self.task.ways else example.answers,
            right=outcome.right,
            answer=outcome.answer,
            value=None if values is None else float(values[place]),
            candidates=shares(outcome),
        )

    def prompt(self, cell: Cell, outcome: Outcome) -> Prompt:
        """The prompt that was answered."""
        # Before a query at 0 shots there is only what the papers have there: text.
        pictured = cell.shots > 0 and cell.control != "text_only"
        examples = [self.support[name] for name in outcome.demonstrations]
        shown = (
            Shown(example, answer, example if pictured else None)
            for example, answer in zip(examples, outcome.labels, strict=True)
        )
        query = self.queries[outcome.query]
        return Prompt(tuple(shown), query, query)

    def _parts(self, chunk: Chunk) -> tuple[Part, ...]:
        parts: list[Part] = []
        for part in chunk.parts:
            if isinstance(part, str):
                parts.append(part)
                continue
            (medium,) = self.pool.media([part])
            parts += [frame.data for frame in (medium.frames if isinstance(medium, Video) else (medium,))]
        return tuple(parts)


def shares(outcome: Outcome, most: int = 5) -> tuple[tuple[str, float], ...]:
    """The best candidates and the right one, best first, each with its likelihood's share of all that are known."""
    if not outcome.candidates:
        return ()
    scores = np.array(outcome.scores)
    likelihoods = np.exp(scores - scores.max())
    likelihoods /= likelihoods.sum()
    order = np.argsort(-scores, kind="stable").tolist()
    kept = [at for rank, at in enumerate(order) if rank < most or outcome.candidates[at] == outcome.right]
    return tuple((outcome.candidates[at], float(likelihoods[at])) for at in kept)


def readable_cell(results: Results, task: str) -> Cell:
    """The plain cell of most shots whose prompts can still be looked at."""
    cells = [cell for cell in results.cells if cell.task == task and cell.control is None]
    cells.sort(key=lambda cell: cell.shots)
    definition = results.tasks[task]
    each = definition.per_shot * max(1, definition.template.count(IMAGE))
    return [cell for cell in cells if cell is cells[0] or cell.shots * each <= MOST_PICTURES][-1]


def examples(results: Results, count: int) -> list[Answered]:
    """`count` answers to look at, if there are: half of them wrong where possible, taken from all tasks in turn."""
    readers = {name: Reader(task, results.data) for name, task in results.tasks.items()}
    cells = {name: readable_cell(results, name) for name in results.tasks}
    found = {name: _first_of_each(cell, count) for name, cell in cells.items()}
    wrong, right = (list(_in_turn({name: each[good] for name, each in found.items()})) for good in (False, True))
    rights = min(len(right), max(count - count // 2, count - len(wrong)))
    chosen = wrong[: count - rights] + right[:rights]
    return [readers[name].answered(cells[name], *each) for name, each in chosen]


def _first_of_each(cell: Cell, count: int) -> dict[bool, list[tuple[int, Outcome]]]:
    """The first queries that were answered well, and those that were not, as many of each as may be needed."""
    values = cell.score.per_item
    # Captions have no right and wrong, and a weak model may have no whole value: what is above the mean counts as good.
    enough = 1.0 if values is None or values.max() in (0, 1) else float(values.mean())
    found: dict[bool, list[tuple[int, Outcome]]] = defaultdict(list)
    for place, outcome in enumerate(cell.outcomes):
        good = outcome.answer == outcome.right if values is None else bool(values[place] >= enough)
        if len(found[good]) < count:
            found[good].append((place, outcome))
        elif len(found[not good]) == count:
            break
    return found


def _in_turn(by_task: Mapping[str, Sequence[T]]) -> Iterator[tuple[str, T]]:
    for place in range(max(map(len, by_task.values()), default=0)):
        yield from ((name, each[place]) for name, each in by_task.items() if place < len(each))


# -- pictures ----------------------------------------------------------------------------------------------------------


def small(data: bytes) -> PilImage.Image:
    """A picture as models see it (upright, on white), its longer side at most `SIDE` pixels."""
    picture = PilImage.fromarray(decode(Image(data), 3).permute(1, 2, 0).numpy())
    picture.thumbnail((SIDE, SIDE))
    return picture


def thumbnail(data: bytes) -> bytes:
    """A picture's file as it is, or, where that is large or browsers do not show it, a small JPEG of it."""
    if len(data) <= LARGE and data.startswith(tuple(SHOWN)):
        return data
    made = io.BytesIO()
    small(data).save(made, "JPEG", quality=85)
    return made.getvalue()


def in_a_row(pictures: Sequence[bytes]) -> PilImage.Image | None:
    """Small pictures side by side on white; None for none."""
    if not pictures:
        return None
    opened = [small(data) for data in pictures]
    gap = 2
    width = sum(picture.width for picture in opened) + gap * (len(opened) - 1)
    row = PilImage.new("RGB", (width, max(picture.height for picture in opened)), "white")
    left = 0
    for picture in opened:
        row.paste(picture, (left, 0))
        left += picture.width + gap
    return row
