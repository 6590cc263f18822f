"""Several models on one held-out set of instructions, beside one another: for the terminal and for the report."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE
from rich.console import Group
from rich.table import Table

from flamingo.document import Video
from flamingo.errors import FlamingoError
from flamingo.instructions import Turn
from icl_eval.charts import COLOURS, Series, line_chart
from icl_eval.instructions import Cell, InstructionResults, Item, Mean, Outcome

Runs = Mapping[str, InstructionResults]
"""What a model is called, such as "untuned" or "tuned" → its results"""

EVERY_KIND = "mean of kinds"
CONTROL_NAMES = {
    "gates_at_zero": ("gates at zero", "no medium reaches the language model"),
    "random_query": ("random query", "the query shows the media of any item of its kind"),
}
EXAMPLES = 6
MOST_PICTURES = 8  # of an example's prompt


@dataclass(frozen=True)
class Row:
    """A row of a table: what it is about, the model, and its cells as (number, interval), None where it was not run."""

    name: str
    model: str
    cells: tuple[tuple[str, str] | None, ...]
    last: str = ""


def check_alike(runs: Runs) -> None:
    """Refuse results that are not of the same items, candidates and shots.

    Raises:
        FlamingoError: it names the model that differs from the first.
    """
    (first, expected), *others = [(name, _asked(results)) for name, results in runs.items()]
    for name, found in others:
        if found != expected:
            raise FlamingoError(
                f"instructions: {name} was asked otherwise than {first}: expected the same items and shots"
            )


def _asked(results: InstructionResults) -> list[tuple[int, str, tuple[str, ...]]]:
    plain = (cell for cell in results.cells if cell.control is None)
    return [(cell.shots, outcome.id, outcome.candidates) for cell in plain for outcome in cell.outcomes]


# -- numbers -----------------------------------------------------------------------------------------------------------


def _first(runs: Runs) -> InstructionResults:
    return next(iter(runs.values()))


def accuracy_rows(runs: Runs) -> list[Row]:
    """Accuracy of the ranked candidates by shots: of each kind, then of their mean; `last` is chance."""
    first = _first(runs)
    return [
        Row(kind or EVERY_KIND, name, _by_shots(results, kind, None, lambda cell: cell.accuracy), f"{chance:.3f}")
        for kind in (*first.kinds, None)
        for chance in [first.cell(kind, first.shots[0]).chance]
        for name, results in runs.items()
    ]


def control_rows(runs: Runs) -> list[Row]:
    """Accuracy under the controls that were run, the mean of kinds, by shots."""
    return [
        Row(CONTROL_NAMES[control][0], name, _by_shots(results, None, control, lambda cell: cell.accuracy))
        for control in CONTROL_NAMES
        for name, results in runs.items()
        if control in results.controls
    ]


def free_rows(runs: Runs) -> list[Row]:
    """Exact matches and words of the free answers, the means of kinds, by shots; none where nothing was generated."""
    if not all(cell.words for results in runs.values() for cell in results.cells if cell.control is None):
        return []
    right = f"{_first(runs).cell(None, _first(runs).shots[0]).right_words:.1f}"
    return [
        *(
            Row("exact match", name, _by_shots(each, None, None, lambda cell: cell.exact))
            for name, each in runs.items()
        ),
        *(
            Row(
                "words",
                name,
                _by_shots(each, None, None, lambda cell: cell.words, "{:.1f}"),
                f"{right} in right answers",
            )
            for name, each in runs.items()
        ),
    ]


def _by_shots(
    results: InstructionResults,
    kind: str | None,
    control: str | None,
    mean: Callable[[Cell], Mean | None],
    form: str = "{:.3f}",
) -> tuple[tuple[str, str] | None, ...]:
    found = {cell.shots: mean(cell) for cell in results.cells if (cell.kind, cell.control) == (kind, control)}
    return tuple(_shown(found.get(shots), form) for shots in results.shots)


def _shown(mean: Mean | None, form: str) -> tuple[str, str] | None:
    if mean is None:
        return None
    low, high = map(form.format, mean.interval)
    return form.format(mean.value), f"{low} – {high}"


def comparison_table(runs: Runs) -> Group:
    """For the terminal: accuracy by kind and shots, controls and free answers, each with its 95 % interval.

    Raises:
        FlamingoError: see `check_alike`.
    """
    check_alike(runs)
    shots = _first(runs).shots
    parts: list[Table | str] = [_table("accuracy of ranked answers by examples", accuracy_rows(runs), shots, "chance")]
    if controls := control_rows(runs):
        parts.append(_table(f"under controls, {EVERY_KIND}", controls, shots))
    if free := free_rows(runs):
        parts.append(_table(f"free answers, {EVERY_KIND}", free, shots, " "))
    if ties := sum(cell.ties for results in runs.values() for cell in results.cells if cell.kind is not None):
        parts.append(f"{ties} tied queries went to the first candidate")
    return Group(*parts)


def _table(title: str, rows: Sequence[Row], shots: Sequence[int], last: str = "") -> Table:
    shown = Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE, pad_edge=False, collapse_padding=True
    )
    shown.add_column("", no_wrap=True)
    shown.add_column("model", no_wrap=True)
    for count in shots:
        shown.add_column(str(count), justify="right")
    if last:
        shown.add_column(last, justify="right", style="dim")
    before = ""
    for row in rows:
        cells = ["–" if cell is None else f"{cell[0]}\n[dim]{_tight(cell[1])}[/dim]" for cell in row.cells]
        shown.add_row("" if row.name == before else row.name, row.model, *cells, *([row.last] if last else []))
        before = row.name
    return shown


def _tight(interval: str) -> str:
    """Without spaces and zeros before a point: a table of five columns fits a terminal of 80."""
    return re.sub(r"(?<!\d)0\.", ".", interval.replace(" ", ""))


# -- charts ------------------------------------------------------------------------------------------------------------


def charts(runs: Runs) -> list[tuple[str, str]]:
    """Accuracy against examples with intervals, as (kind, SVG): the mean of kinds, then each kind."""
    first = _first(runs)
    return [(kind or EVERY_KIND, _chart(runs, kind)) for kind in (None, *first.kinds)]


def _chart(runs: Runs, kind: str | None) -> str:
    first = _first(runs)
    lines = []
    for place, (name, results) in enumerate(runs.items()):
        means = [results.cell(kind, shots).accuracy for shots in results.shots]
        lows, highs = zip(*(mean.interval for mean in means), strict=True)
        x = [float(at) for at in range(len(means))]
        lines.append(Series(name, x, [mean.value for mean in means], place % COLOURS, lows, highs, dots=True))
    return line_chart(
        lines,
        title=f"accuracy against examples: {kind or EVERY_KIND}",
        x_label="examples in context",
        y_range=(0.0, 1.0),
        x_names=[str(count) for count in first.shots],
        references=[("chance", first.cell(kind, first.shots[0]).chance)],
        size=(440, 240),
    )


def legend(runs: Runs) -> list[tuple[str, int]]:
    """(model, number of its colour)."""
    return [(name, place % COLOURS) for place, name in enumerate(runs)]


# -- examples ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """A turn as it is shown: bytes of its pictures, frames of videos among them, question and answer."""

    pictures: tuple[bytes, ...]
    question: str
    answer: str

    @staticmethod
    def of(turn: Turn) -> Asked:
        """A turn's."""
        frames = [medium.frames if isinstance(medium, Video) else (medium,) for medium in turn.media]
        return Asked(tuple(image.data for each in frames for image in each), turn.question, turn.answer or "")


@dataclass(frozen=True)
class Example:
    """An item as the models answered it: `answers` are (model, free answer or choice, whether the choice is right)."""

    about: str
    contexts: tuple[Asked, ...]
    query: Asked
    answers: tuple[tuple[str, str, bool], ...]


def examples(runs: Runs, items: Sequence[Item], count: int = EXAMPLES) -> list[Example]:
    """Items to look at, from all kinds in turn: first those of which the models differ in what they chose."""
    by_id = {item.id: item for item in items}
    by_kind: dict[str, list[Example]] = defaultdict(list)
    for kind in _first(runs).kinds:
        outcomes = [results.cell(kind, _shots(runs, by_id, kind)).outcomes for results in runs.values()]
        rows = sorted(zip(*outcomes, strict=True), key=lambda row: len({each.prediction for each in row}), reverse=True)
        by_kind[kind] = [_example(by_id[row[0].id], row, list(runs)) for row in rows[:count]]
    return list(_in_turn(by_kind))[:count]


def _shots(runs: Runs, by_id: Mapping[str, Item], kind: str) -> int:
    """The most shots at which the prompts of a kind are still to be looked at."""
    first = _first(runs)
    item = by_id[first.cell(kind, first.shots[0]).outcomes[0].id]

    def pictures(shots: int) -> int:
        return sum(len(Asked.of(turn).pictures) for turn in (*item.contexts[:shots], item.query))

    return max((shots for shots in first.shots if pictures(shots) <= MOST_PICTURES), default=first.shots[0])


def _example(item: Item, row: Sequence[Outcome], models: Sequence[str]) -> Example:
    shots = len(row[0].contexts)
    return Example(
        about=f"{item.kind}, {item.id}, {shots} example{'' if shots == 1 else 's'}",
        contexts=tuple(map(Asked.of, item.contexts[:shots])),
        query=Asked.of(item.query),
        answers=tuple(
            (
                name,
                each.candidates[each.prediction] if each.answer is None else each.answer,
                each.prediction == each.target,
            )
            for name, each in zip(models, row, strict=True)
        ),
    )


def _in_turn(by_kind: Mapping[str, Sequence[Example]]) -> Iterator[Example]:
    for place in range(max(map(len, by_kind.values()), default=0)):
        yield from (each[place] for each in by_kind.values() if place < len(each))
