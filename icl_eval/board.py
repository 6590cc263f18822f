"""`flamingo-eval board RUNS…`: a leader board over result folders, as a page, as Markdown or as JSON.

Runs stand in one table only where they were asked the same: the same task in the same version, with the same settings,
seed and number of queries, on the same examples, as far as results say on which (older ones do not). Else a task has
several tables, and each says in what it differs. The file depends on the results alone, not on the order in which they
are given nor on the time; best first, by the score at the most shots.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from data_shards.page import template
from flamingo.errors import FlamingoError
from flamingo.files import write_text
from icl_eval.charts import COLOURS, Series, line_chart
from icl_eval.compare import NOT_COMPARED
from icl_eval.ledger import written
from icl_eval.saved import RESULTS, SavedCell, SavedResults, by_label, parse, read_results
from icl_eval.seeds import FILE as SEEDS

SCHEMA = 1
TOLD_ANYWAY = ("name", "version")
"""Keys of a task that every heading has."""
SHORT = 12
"""Digits of a hash that are shown."""


@dataclass
class BoardOptions:
    """Make a leader board of runs: each task by shots, the best marked, with intervals and versions."""

    out: str | None = None
    """file to write: .html, .md or .json; default: Markdown on standard output"""
    title: str = "Few-shot scores"
    """heading of the page"""


@dataclass(frozen=True)
class Entry:
    """A run's score in a cell; `best`: no other run of the table has a higher one, and there are others."""

    value: float
    interval: tuple[float, float] | None
    best: bool


@dataclass(frozen=True)
class Row:
    """A run in a table: its entries by shots, None where it was not run."""

    run: str
    entries: Mapping[int, Entry | None]


@dataclass(frozen=True)
class Standing:
    """The runs that were asked one task in the same way, best first.

    Attributes:
        task, version, metric: the task; `figure`: the metric's headline, of which the entries are.
        queries: of a cell.
        settings: in what this table differs from others of its task.
        chance: what guessing gives, where the task says so.
        shots: of the columns.
        rows: of the runs.
    """

    task: str
    version: int
    metric: str
    figure: str
    queries: int
    settings: Mapping[str, Any]
    chance: float | None
    shots: tuple[int, ...]
    rows: tuple[Row, ...]

    @property
    def heading(self) -> str:
        """The task, and what tells this table from others of it."""
        settings = "".join(f", {name} {value}" for name, value in self.settings.items() if value not in (None, ""))
        return f"{self.task} v{self.version}{settings}"

    @property
    def about(self) -> str:
        """What the numbers are."""
        metric = self.figure if self.figure == self.metric else f"{self.figure} of {self.metric}"
        return f"{metric}, {self.queries:,} queries" + ("" if self.chance is None else f", chance {self.chance:.3g}")


@dataclass(frozen=True)
class Board:
    """All tables, and where the runs come from: label → what → text."""

    standings: tuple[Standing, ...]
    runs: Mapping[str, Mapping[str, str]]

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {"schema": SCHEMA, "tasks": [asdict(each) for each in self.standings], "runs": dict(self.runs)}

    def markdown(self, title: str) -> str:
        """A section a table, the best in bold."""
        parts = [f"# {_escaped(title)}"]
        for each in self.standings:
            parts += [f"## {_escaped(each.heading)}", f"{_escaped(each.about)}, by shots."]
            rows = [
                [_escaped(row.run), *(_in_markdown(row.entries[count]) for count in each.shots)] for row in each.rows
            ]
            parts.append(_markdown_table(["run", *map(str, each.shots)], rows))
        columns = list(dict.fromkeys(name for run in self.runs.values() for name in run))
        runs = [[_escaped(label), *(run.get(name, "–") for name in columns)] for label, run in self.runs.items()]
        parts += ["## Runs", _markdown_table(["run", *columns], runs), NOTE]
        return "\n\n".join(parts) + "\n"

    def html(self, title: str) -> str:
        """A page that needs nothing else."""
        labels = list(self.runs)
        return template(__file__, "board.html").render(
            title=title,
            standings=[(each, _chart(each, labels), _legend(each, labels)) for each in self.standings],
            runs=self.runs,
            columns=list(dict.fromkeys(name for run in self.runs.values() for name in run)),
            note=NOTE,
        )


NOTE = (
    "Ranges are 95 % intervals over queries. Runs that overlap may differ all the same, since they answer the same "
    "queries; flamingo-eval compare tests that."
)


def board(runs: Mapping[str, SavedResults]) -> Board:
    """The leader board of some runs.

    Args:
        runs: results by label.

    Raises:
        FlamingoError: no run has a cell without a control.
    """
    asked: dict[str, dict[str, dict[str, list[SavedCell]]]] = defaultdict(lambda: defaultdict(dict))
    for label, run in runs.items():
        for task in run.tasks:
            cells = [cell for cell in run.cells.values() if cell.task == task and cell.control is None]
            for edition, several in _editions(run, task, cells).items():
                asked[task][edition][label] = several
    if not asked:
        raise FlamingoError(f"board: {', '.join(runs)}: expected results without controls, found none")
    tables = {task: _joined(editions) for task, editions in asked.items()}
    standings = [
        _standing(task, json.loads(edition), _differing(editions), cells)
        for task, editions in sorted(tables.items())
        for edition, cells in sorted(editions.items())
    ]
    return Board(tuple(standings), {label: _origin(runs[label]) for label in sorted(runs)})


def _editions(run: SavedResults, task: str, cells: Sequence[SavedCell]) -> dict[str, list[SavedCell]]:
    """A run's cells of a task by all that must be equal for scores to be comparable, as text that can be sorted."""
    found: dict[str, list[SavedCell]] = defaultdict(list)
    definition = {name: value for name, value in run.tasks[task].items() if name not in NOT_COMPARED}
    for cell in cells:
        asked = {"queries": cell.score.queries, "seed": run.seeds.get(task, definition.get("seed"))}
        examples = run.facts.get("examples", {}).get(task)
        edition = {**definition, **asked, "examples": examples and examples[:SHORT]}
        found[json.dumps(edition, sort_keys=True, ensure_ascii=False)].append(cell)
    return found


def _joined(editions: Mapping[str, dict[str, list[SavedCell]]]) -> dict[str, dict[str, list[SavedCell]]]:
    """Editions; one on unknown examples is joined to that which is like it but for them, if there is a single one."""
    contents = {edition: json.loads(edition) for edition in editions}
    joined: dict[str, dict[str, list[SavedCell]]] = defaultdict(dict)
    for edition, cells in editions.items():
        unknown = contents[edition]["examples"] is None
        alike = [
            other
            for other, content in contents.items()
            if content["examples"] is not None and {**content, "examples": None} == contents[edition]
        ]
        joined[alike[0] if unknown and len(alike) == 1 else edition].update(cells)
    return joined


def _differing(editions: Mapping[str, Any]) -> list[str]:
    """Which settings are not the same in all editions of a task."""
    several = [json.loads(edition) for edition in editions]
    names = sorted({name for each in several for name in each} - set(TOLD_ANYWAY))
    return [name for name in names if any(each.get(name) != several[0].get(name) for each in several)]


def _standing(
    task: str, edition: Mapping[str, Any], differing: Sequence[str], cells: Mapping[str, Sequence[SavedCell]]
) -> Standing:
    shots = tuple(sorted({cell.shots for several in cells.values() for cell in several}))
    found = {label: {cell.shots: cell for cell in several} for label, several in cells.items()}
    best = {
        count: max(here)
        for count in shots
        if len(here := [each[count].score.value for each in found.values() if count in each]) > 1
    }
    rows = [
        Row(label, {count: _entry(each.get(count), best.get(count)) for count in shots})
        for label, each in found.items()
    ]
    score = next(iter(cells.values()))[0].score
    return Standing(
        task,
        edition["version"],
        score.metric,
        next(iter(score.figures)),
        score.queries,
        {name: edition.get(name) for name in differing},
        edition.get("chance"),
        shots,
        tuple(sorted(rows, key=_place)),
    )


def _entry(cell: SavedCell | None, best: float | None) -> Entry | None:
    return None if cell is None else Entry(cell.score.value, cell.score.interval, cell.score.value == best)


def _place(row: Row) -> tuple[Any, ...]:
    """Higher scores first, those at more shots before those at fewer; what is missing last; then by name."""
    values = [entry.value if entry is not None else float("-inf") for _, entry in sorted(row.entries.items())]
    return (*(-value for value in reversed(values)), row.run)


def _origin(run: SavedResults) -> dict[str, str]:
    """Where a run's numbers come from."""
    model = run.facts.get("model", {})
    weights = ", ".join(digest[:SHORT] for digest in model.get("sha256", {}).values())
    commit = run.facts["commit"] or "not a git checkout"
    return {
        "model": model.get("folder", "unknown"),
        **({"weights, SHA-256": weights} if weights else {}),
        "commit": commit[:SHORT] + ("-dirty" if commit.endswith("-dirty") else ""),
        **run.facts["versions"],
    }


# -- how it is written -------------------------------------------------------------------------------------------------


def _in_markdown(entry: Entry | None) -> str:
    if entry is None:
        return "–"
    value = f"**{entry.value:.3f}**" if entry.best else f"{entry.value:.3f}"
    return value if entry.interval is None else f"{value} ({entry.interval[0]:.3f}–{entry.interval[1]:.3f})"


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _escaped(text: str) -> str:
    """Text in which Markdown sees no emphasis (names have underscores)."""
    return "".join("\\" + letter if letter in "\\`*_[]<>#" else letter for letter in text)


def _legend(standing: Standing, labels: Sequence[str]) -> list[tuple[str, int]]:
    return [(row.run, labels.index(row.run) % COLOURS) for row in standing.rows]


def _chart(standing: Standing, labels: Sequence[str]) -> Markup:
    """Scores against shots, where there are several."""
    if len(standing.shots) < 2:
        return Markup()
    lines = []
    for row in standing.rows:
        points = [(place, row.entries[count]) for place, count in enumerate(standing.shots)]
        there = [(float(place), entry) for place, entry in points if entry is not None]
        ends = [entry.interval or (entry.value, entry.value) for _, entry in there]
        x, y = [place for place, _ in there], [entry.value for _, entry in there]
        colour = labels.index(row.run) % COLOURS
        lines.append(Series(row.run, x, y, colour, [low for low, _ in ends], [high for _, high in ends], dots=True))
    return Markup(
        line_chart(
            lines,
            title=f"{standing.heading}: {standing.figure} against shots",
            x_label="shots",
            y_label=standing.figure,
            x_names=[str(count) for count in standing.shots],
            references=[] if standing.chance is None else [("chance", standing.chance)],
            size=(560, 300),
        )
    )


def _json(made: Board, _: str) -> str:
    return json.dumps(made.as_dict(), indent=1, ensure_ascii=False) + "\n"


WRITERS: dict[str, Callable[[Board, str], str]] = {".html": Board.html, ".md": Board.markdown, ".json": _json}
"""Ending of the file → board and title → its content."""


def with_results(given: Mapping[str, Path]) -> dict[str, Path]:
    """Of what was given, such as all that is in a folder of runs, that which has results; the rest is told on stderr.

    A folder of several seeds stands for those of its seeds. Results that are malformed stay, as does what does not
    exist, and everything if there are no results at all: reading them says what is wrong.

    Raises:
        FlamingoError: a folder or a label twice.
    """
    pairs, without = [], []
    for label, folder in given.items():
        if _has_results(folder) or not folder.exists():
            pairs.append((label, folder))
            continue
        seeds = sorted(folder.glob(f"seed-*/{RESULTS}")) if (folder / SEEDS).is_file() else []
        pairs += [(f"{label}/{file.parent.name}", file.parent) for file in seeds]
        if not seeds:
            without.append(str(folder))
    if not pairs:
        return dict(given)
    if without:
        print(f"board: skipped, for they have no results: {', '.join(without)}", file=sys.stderr)
    return by_label(pairs)


def _has_results(path: Path) -> bool:
    """Whether there are results, be they malformed; a file of another name than theirs has to be well-formed."""
    if not path.is_file():
        return (path / RESULTS).exists()
    try:
        read_results(path)
    except FlamingoError:
        return path.name == RESULTS
    return True


def main(words: Sequence[str]) -> None:
    """`flamingo-eval board RUNS…`."""
    runs, options = parse("board", words, BoardOptions, with_results)
    if options.out is None:
        print(board(runs).markdown(options.title), end="")
        return
    path = Path(options.out)
    if path.suffix not in WRITERS:
        raise FlamingoError(f"board: --out {path}: expected a file that ends in {', '.join(WRITERS)}")
    if not path.parent.is_dir():
        raise FlamingoError(f"board: --out {path}: no folder {path.parent}")
    content = WRITERS[path.suffix](board(runs), options.title)
    with written(path):
        write_text(path, content)
    print(path)
