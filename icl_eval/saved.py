"""Results as they were saved: `results.json`, whose form is `results.schema.json`, and `predictions.jsonl`.

All that is read is checked, so that a comparison never rests on files that were cut short, edited or mixed up.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import jsonargparse

from flamingo.errors import FlamingoError, plain_options
from icl_eval.metrics import Figure, Score
from icl_eval.tasks import Generation, Task

RESULTS, PREDICTIONS = "results.json", "predictions.jsonl"
SCHEMA = Path(__file__).parent / "results.schema.json"
PROGRAM = "flamingo-eval"

Key = tuple[str, int, str | None]
"""Task, shots, and the control or None: what names a cell."""
Options = TypeVar("Options")


@dataclass(frozen=True)
class SavedCell:
    """One number of the table; `score` has no values of single queries."""

    task: str
    shots: int
    control: str | None
    score: Score
    ties: int

    @property
    def key(self) -> Key:
        """What names it."""
        return self.task, self.shots, self.control


@dataclass(frozen=True)
class SavedResults:
    """A folder of results.

    Attributes:
        folder: where they are.
        facts: versions, commit, machine, model.
        seeds, seconds: of each task.
        tasks: their fields as they were run, by name; those that came later than the results have their defaults.
        cells: by what names them, in the order of the file.
        diagnostics: by task; each has a `verdict`.
    """

    folder: Path
    facts: Mapping[str, Any]
    seeds: Mapping[str, int]
    seconds: Mapping[str, float]
    tasks: Mapping[str, Mapping[str, Any]]
    cells: Mapping[Key, SavedCell] = field(repr=False)
    diagnostics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)


def read_results(folder: str | Path) -> SavedResults:
    """The results in a folder, or in a `results.json` itself.

    Raises:
        FlamingoError: there are none, or they have another form; it names the file and the key.
    """
    path = Path(folder)
    path = path / RESULTS if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FlamingoError(f"{path}: expected the results of flamingo-eval ({error})") from None
    if isinstance(content, dict) and content.get("schema", 2) != 2:
        raise FlamingoError(f"{path}: schema: {content['schema']!r}, expected 2; evaluate again to compare")
    if fault := violation(content, schema()):
        raise FlamingoError(f"{path}: {fault}")
    return SavedResults(
        path.parent,
        content["facts"],
        content["seeds"],
        content["seconds"],
        {name: _with_defaults(task) for name, task in content["tasks"].items()},
        _cells(content, path),
        content.get("diagnostics", {}),
    )


def _with_defaults(task: Mapping[str, Any]) -> dict[str, Any]:
    """A task's fields, with the defaults of those that it lacks: what older code did, which did not know of them."""
    whole = {**_defaults(Task), **task}
    if isinstance(whole["generate"], dict):
        whole["generate"] = {**_defaults(Generation), **whole["generate"]}
    return whole


def _defaults(kind: type[Task] | type[Generation]) -> dict[str, Any]:
    return {each.name: each.default for each in fields(kind) if each.default is not MISSING}


def _cells(content: Mapping[str, Any], path: Path) -> dict[Key, SavedCell]:
    cells: dict[Key, SavedCell] = {}
    for place, each in enumerate(content["cells"]):
        figures = {
            name: Figure(figure["value"], None if figure["interval"] is None else tuple(figure["interval"]))
            for name, figure in each["figures"].items()
        }
        score = Score(each["metric"], figures, None, each["queries"], each["details"])
        cell = SavedCell(each["task"], each["shots"], each["control"], score, each["ties"])
        if cell.task not in content["tasks"]:
            known = ", ".join(content["tasks"])
            raise FlamingoError(f"{path}: cells[{place}].task: {cell.task!r}, expected one of its tasks: {known}")
        if cell.score.metric != (metric := content["tasks"][cell.task]["metric"]):
            raise FlamingoError(f"{path}: cells[{place}].metric: {cell.score.metric!r}, but its task has {metric!r}")
        if cell.key in cells:
            raise FlamingoError(f"{path}: cells[{place}]: {named(cell.key)} for the second time")
        cells[cell.key] = cell
    return cells


def named(key: Key) -> str:
    """A cell in words."""
    task, shots, control = key
    return f"{task} at {shots} shots" + (f" under {control}" if control else "")


# -- single answers ----------------------------------------------------------------------------------------------------


class Predictions:
    """The lines of `predictions.jsonl` of one cell at a time.

    Only where each line is is held, 8 bytes a line, so that files larger than memory can be read.

    Raises:
        FlamingoError: no such file, or a line of another form; it names the file, the line and the key.
    """

    def __init__(self, results: SavedResults) -> None:
        self.path = results.folder / PREDICTIONS
        self._results = results
        self._starts: dict[Key, array[int]] = defaultdict(lambda: array("q"))
        form = schema()["$defs"]["prediction"]
        for number, (start, line) in enumerate(self._lines(), 1):
            try:
                content = json.loads(line)
            except ValueError as error:
                raise FlamingoError(f"{self.path}: line {number}: expected JSON ({error})") from None
            if fault := violation(content, form):
                raise FlamingoError(f"{self.path}: line {number}: {fault}")
            key = content["task"], content["shots"], content["control"]
            if key not in results.cells:
                raise FlamingoError(
                    f"{self.path}: line {number}: {named(key)}, which {RESULTS} beside it does not have"
                )
            self._starts[key].append(start)

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        try:
            with self.path.open("rb") as file:
                start = 0
                for line in file:
                    yield start, line
                    start += len(line)
        except OSError as error:
            raise FlamingoError(f"{self.path}: expected the predictions of {RESULTS} beside it ({error})") from None

    def cell(self, key: Key) -> list[dict[str, Any]]:
        """The lines of a cell, by `query_id`.

        Raises:
            FlamingoError: they are not as many as results.json says, or one query has two.
        """
        lines = []
        with self.path.open("rb") as file:
            for start in self._starts.get(key, ()):
                file.seek(start)
                lines.append(json.loads(file.readline()))
        lines.sort(key=lambda line: line["query_id"])
        for line, following in itertools.pairwise(lines):
            if line["query_id"] == following["query_id"]:
                raise FlamingoError(f"{self.path}: {named(key)}: query {line['query_id']} for the second time")
        expected = self._results.cells[key].score.queries
        if len(lines) != expected:
            raise FlamingoError(f"{self.path}: {named(key)}: {len(lines)} lines, expected {expected} as in {RESULTS}")
        return lines


# -- forms -------------------------------------------------------------------------------------------------------------

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "null": (type(None),),
}
KEYWORDS = {
    "$schema", "$id", "$ref", "$defs", "title", "description", "type", "const", "required", "properties",
    "additionalProperties", "items", "minItems", "maxItems", "minProperties", "minimum",
}  # fmt: skip
"""What `violation` knows of JSON Schema; results.schema.json uses no others."""


@functools.cache
def schema() -> dict[str, Any]:
    """The form of `results.json` as JSON Schema; `$defs/prediction` is that of a line of `predictions.jsonl`."""
    content: dict[str, Any] = json.loads(SCHEMA.read_text(encoding="utf-8"))
    return content


def violation(value: Any, form: Mapping[str, Any], at: str = "") -> str | None:
    """The first place where `value` is not of the form, as "key.key[place]: what was found, expected what", or None."""
    if "$ref" in form:
        form = schema()["$defs"][form["$ref"].removeprefix("#/$defs/")]
    if "const" in form and value != form["const"]:
        return _fault(at, value, f"expected {form['const']!r}")
    kinds = form.get("type", list(_TYPES))
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if not any(_is(value, kind) for kind in kinds):
        return _fault(at, value, f"expected {' or '.join(kinds)}")
    if isinstance(value, dict):
        return _object_violation(value, form, at)
    if isinstance(value, list):
        if not form.get("minItems", 0) <= len(value) <= form.get("maxItems", len(value)):
            return _fault(at, value, f"expected {form['minItems']} entries")
        found = (violation(each, form.get("items", {}), f"{at}[{place}]") for place, each in enumerate(value))
        return next(filter(None, found), None)
    if "minimum" in form and value < form["minimum"]:
        return _fault(at, value, f"expected at least {form['minimum']}")
    return None


def _object_violation(value: Mapping[str, Any], form: Mapping[str, Any], at: str) -> str | None:
    if len(value) < form.get("minProperties", 0):
        return _fault(at, value, f"expected at least {form['minProperties']} keys")
    if missing := [key for key in form.get("required", ()) if key not in value]:
        return f"{at + ': ' if at else ''}missing key {missing[0]!r}"
    known, others = form.get("properties", {}), form.get("additionalProperties", {})
    found = (violation(each, known.get(key, others), f"{at}.{key}" if at else key) for key, each in value.items())
    return next(filter(None, found), None)


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, float) and not math.isfinite(value):
        return False  # Python reads NaN, JSON does not know it
    return isinstance(value, _TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))


def _fault(at: str, value: Any, expected: str) -> str:
    shown = json.dumps(value)
    return f"{at + ': ' if at else ''}{shown if len(shown) <= 60 else shown[:57] + '...'}, {expected}"


# -- command lines -----------------------------------------------------------------------------------------------------


def parse(
    name: str,
    words: Sequence[str],
    kind: type[Options],
    chosen: Callable[[dict[str, Path]], Mapping[str, Path]] = dict,
) -> tuple[dict[str, SavedResults], Options]:
    """The runs and the options of a command over result folders, each given as `FOLDER` or `LABEL=FOLDER`.

    Args:
        name: of the command.
        words: after it.
        kind: dataclass of its options.
        chosen: of the folders that were given, by label, those that are read; default: all.

    Returns:
        The results by label, in the order given; folders without one are called by as little of their paths as tells
        them apart: `a/eval` and `b/eval` are `a` and `b`.

    Raises:
        FlamingoError: an argument that is unknown, missing or malformed; a folder twice; no results in one.
    """
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=f"{PROGRAM} {name}",
        description=(kind.__doc__ or "").partition("\n\n")[0],
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder with results.json, or LABEL=FOLDER")
    parser.add_class_arguments(kind)
    try:
        parsed = parser.parse_args(plain_options(words))
    except (jsonargparse.ArgumentError, TypeError) as error:
        raise FlamingoError(f"{name}: {error}") from None
    options = kind(**{each.name: parsed[each.name] for each in fields(kind)})  # type: ignore[arg-type]
    return {label: read_results(folder) for label, folder in chosen(labelled(parsed.runs)).items()}, options


def labelled(runs: Sequence[str]) -> dict[str, Path]:
    """`FOLDER` or `LABEL=FOLDER` → folders by label.

    Raises:
        FlamingoError: a folder or a label twice.
    """
    pairs = [_labelled(run) for run in runs]
    places = [folder.resolve() for _, folder in pairs]
    _all_different(places)
    return by_label([(label or short, folder) for (label, folder), short in zip(pairs, _short(places), strict=True)])


def by_label(pairs: Sequence[tuple[str, Path]]) -> dict[str, Path]:
    """Folders by label.

    Raises:
        FlamingoError: a folder or a label twice.
    """
    _all_different([folder.resolve() for _, folder in pairs])
    labels = [label for label, _ in pairs]
    for label in labels:
        if labels.count(label) > 1:
            raise FlamingoError(f"label {label!r}: given twice, expected different labels")
    return dict(pairs)


def _all_different(places: Sequence[Path]) -> None:
    for place in places:
        if places.count(place) > 1:
            raise FlamingoError(f"{place}: given twice, expected different folders")


def _labelled(run: str) -> tuple[str, Path]:
    label, equals, folder = run.partition("=")
    if not equals or Path(run).exists():
        return "", Path(run)
    return label, Path(folder)


def _short(places: Sequence[Path]) -> list[str]:
    """Of each of several paths the fewest last parts that no other has, without those that all end in."""
    rows = [place.parts for place in places]
    while len(rows) > 1 and len({row[-1] for row in rows}) == 1 and all(len(row) > 2 for row in rows):
        rows = [row[:-1] for row in rows]

    def tail(row: tuple[str, ...]) -> str:
        others = [other for other in rows if other is not row]
        lengths = range(1, len(row) + 1)
        return "/".join(next(row[-n:] for n in lengths if all(other[-n:] != row[-n:] for other in others)))

    return [tail(row) for row in rows]
