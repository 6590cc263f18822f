"""Results as they were saved: their form, and that nothing malformed is read."""

from __future__ import annotations

import json
from typing import Any

import pytest

from flamingo import FlamingoError
from icl_eval.saved import KEYWORDS, Predictions, labelled, read_results, schema, violation
from tests.icl_eval.runs import lines_of, write_run


def changed(folder, *path, to):
    """Set the value at a path of keys in results.json; `to=KeyError` takes it out."""
    file = folder / "results.json"
    content = json.loads(file.read_text())
    place: Any = content
    for key in path[:-1]:
        place = place[key]
    if to is KeyError:
        del place[path[-1]]
    else:
        place[path[-1]] = to
    file.write_text(json.dumps(content))


def test_what_was_written_is_read(tmp_path):
    """A figure, an interval or a control that is lost between the file and those who read it."""
    lines = lines_of([0, 1, 1], [0, 1, 0]) + lines_of([0, 0, 0], [0, 1, 0], control="random_query")
    results = read_results(write_run(tmp_path / "a", lines, diagnostics={"cats": {"verdict": "They help."}}))
    assert list(results.cells) == [("cats", 1, None), ("cats", 1, "random_query")]
    score = results.cells["cats", 1, None].score
    assert score.value == pytest.approx(2 / 3) and score.interval is not None and score.queries == 3
    assert results.diagnostics["cats"]["verdict"] == "They help."
    assert results.facts["commit"] == "c0ffee"
    assert read_results(tmp_path / "a" / "results.json").cells.keys() == results.cells.keys()


@pytest.mark.parametrize(
    ("path", "to", "message"),
    [
        (["cells"], KeyError, "missing key 'cells'"),
        (["cells", 0, "ties"], KeyError, "cells[0]: missing key 'ties'"),
        (["cells", 0, "shots"], "1", 'cells[0].shots: "1", expected integer'),
        (["cells", 0, "shots"], True, "cells[0].shots: true, expected integer"),
        (["cells", 0, "shots"], -1, "cells[0].shots: -1, expected at least 0"),
        (["cells", 0, "control"], 3, "cells[0].control: 3, expected string or null"),
        (["cells", 0, "figures"], {}, "cells[0].figures: {}, expected at least 1 keys"),
        (["cells", 0, "figures", "accuracy", "value"], None, "cells[0].figures.accuracy.value: null, expected number"),
        (["cells", 0, "figures", "accuracy", "interval"], [1], "figures.accuracy.interval: [1], expected 2 entries"),
        (["cells", 0, "figures", "accuracy", "value"], float("nan"), "accuracy.value: NaN, expected number"),
        (["cells", 0, "task"], "dogs", "cells[0].task: 'dogs', expected one of its tasks: cats"),
        (["tasks", "cats", "metric"], "cider", "cells[0].metric: 'accuracy', but its task has 'cider'"),
        (["facts", "versions"], KeyError, "facts: missing key 'versions'"),
        (["schema"], 1, "schema: 1, expected 2"),
        (["predictions"], "else.jsonl", "predictions: \"else.jsonl\", expected 'predictions.jsonl'"),
    ],
)
def test_other_forms_are_refused_by_file_and_key(tmp_path, path, to, message):
    """A file of another version, or one that was edited, that is compared as if it were whole."""
    folder = write_run(tmp_path / "a", lines_of([0, 1], [0, 0]))
    changed(folder, *path, to=to)
    with pytest.raises(FlamingoError) as error:
        read_results(folder)
    assert str(error.value).startswith(f"{folder / 'results.json'}: ") and message in str(error.value)


def test_a_cell_twice_is_refused(tmp_path):
    """Two numbers for one cell, of which the last would win."""
    folder = write_run(tmp_path / "a", lines_of([0, 1], [0, 0]))
    cells = json.loads((folder / "results.json").read_text())["cells"]
    changed(folder, "cells", to=cells * 2)
    with pytest.raises(FlamingoError, match=r"cells\[1\]: cats at 1 shots for the second time"):
        read_results(folder)


def test_no_results(tmp_path):
    """A traceback for a wrong folder, or for a file that is cut short."""
    for name, content in (("none", None), ("cut", '{"schema": 2'), ("list", "[]")):
        (tmp_path / name).mkdir()
        if content is not None:
            (tmp_path / name / "results.json").write_text(content)
        with pytest.raises(FlamingoError, match=f"{name}/results.json: "):
            read_results(tmp_path / name)


def test_predictions_come_by_cell_and_query(tmp_path):
    """Lines of another cell, or in the order in which ranks happened to write them."""
    lines = lines_of([0, 1, 2], [0, 0, 0]) + lines_of([2, 1, 0], [0, 0, 0], shots=0)
    folder = write_run(tmp_path / "a", lines)
    file = folder / "predictions.jsonl"
    file.write_text("".join(reversed(file.read_text(encoding="utf-8").splitlines(keepends=True))))
    found = Predictions(read_results(folder))
    assert [line["prediction"] for line in found.cell(("cats", 1, None))] == [0, 1, 2]
    assert [line["prediction"] for line in found.cell(("cats", 0, None))] == [2, 1, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[:-1], "cats at 1 shots: 2 lines, expected 3 as in results.json"),
        (lambda lines: [*lines[:2], lines[1]], "query cats/000001 for the second time"),
        (lambda lines: [*lines[:2], lines[2][:30]], "line 3: expected JSON"),
        (
            lambda lines: [*lines, lines[0].replace('"shots": 1', '"shots": 2')],
            "line 4: cats at 2 shots, which results",
        ),
        (lambda lines: [lines[0].replace('"prompt"', '"prmpt"'), *lines[1:]], "line 1: missing key 'prompt'"),
    ],
)
def test_predictions_that_are_not_those_of_the_results(tmp_path, change, message):
    """A test over the part of the queries that happens to be in the file."""
    folder = write_run(tmp_path / "a", lines_of([0, 1, 2], [0, 0, 0]))
    file = folder / "predictions.jsonl"
    file.write_text("\n".join(change(file.read_text().splitlines())) + "\n")
    with pytest.raises(FlamingoError, match=f"predictions.jsonl: .*{message}"):
        Predictions(read_results(folder)).cell(("cats", 1, None))


def test_the_schema_uses_only_what_is_checked():
    """A keyword in the schema that a reader of it trusts in, and that nothing checks."""

    def keywords(form):
        yield from form
        for several in ("properties", "$defs"):
            for each in form.get(several, {}).values():
                yield from keywords(each)
        for one in ("items", "additionalProperties"):
            if one in form:
                yield from keywords(form[one])

    assert set(keywords(schema())) <= KEYWORDS
    assert violation([1], {"type": "array", "maxItems": 0, "minItems": 0}) == "[1], expected 0 entries"


def test_runs_are_called_by_what_tells_them_apart(tmp_path):
    """Two runs under one name in a table, or paths so long that the table is all names."""
    one, two = str(tmp_path / "small" / "eval"), str(tmp_path / "large" / "eval")
    assert list(labelled([one, two])) == ["small", "large"]
    assert list(labelled([one, two, str(tmp_path / "small")])) == ["small/eval", "large/eval", "small"]
    assert list(labelled([one, f"mine={two}"])) == ["small", "mine"]
    assert list(labelled([one])) == ["eval"]
    with pytest.raises(FlamingoError, match="given twice, expected different folders"):
        labelled([one, f"again={one}/"])
    with pytest.raises(FlamingoError, match="label 'x': given twice"):
        labelled([f"x={one}", f"x={two}"])
