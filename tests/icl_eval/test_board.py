"""The leader board: what stands in one table, who is first, and its three forms."""

from __future__ import annotations

import itertools
import json
import re

import pytest

from flamingo import FlamingoError
from icl_eval.board import board, main
from icl_eval.saved import read_results
from tests.icl_eval.runs import lines_of, write_run


def right(count, of=10, **options):
    """Lines of a cell with so many right answers."""
    return lines_of([0] * count + [1] * (of - count), [0] * of, **options)


def read(folders):
    return {folder.name: read_results(folder) for folder in folders}


@pytest.fixture
def folders(tmp_path):
    """Three runs of two tasks; `c` has no zero shots, `b` a task of its own."""
    facts = {"model": {"folder": "/models/a", "sha256": {"model.safetensors": "ab" * 32}, "recipe": None}}
    dogs = lines_of(["yes", "no"] * 5, ["yes"] * 10, task="dogs")
    return [
        write_run(tmp_path / "b", [*right(5, shots=0), *right(9), *dogs], metric={"cats": "accuracy", "dogs": "pope"}),
        write_run(tmp_path / "c", right(9)),
        write_run(tmp_path / "a", [*right(6, shots=0), *right(7), *right(2, control="random_query")], facts=facts),
    ]


def test_the_best_of_each_column_is_marked(folders):
    """The best run of a task marked instead of a column's, one of two equals, or the only run of a column."""
    cats, dogs = board(read(folders)).standings
    marked = {
        row.run: {n: entry and (entry.value, entry.best) for n, entry in row.entries.items()} for row in cats.rows
    }
    assert marked == {
        "a": {0: (0.6, True), 1: (0.7, False)},
        "b": {0: (0.5, False), 1: (0.9, True)},
        "c": {0: None, 1: (0.9, True)},
    }
    assert [row.run for row in cats.rows] == ["b", "c", "a"], "by most shots; then by fewer, where nothing is last"
    assert not dogs.rows[0].entries[1].best
    assert (dogs.metric, dogs.figure, dogs.about) == ("pope", "accuracy", "accuracy of pope, 10 queries")


def test_the_order_of_the_arguments_does_not_matter(folders):
    """A file that changes whenever it is made, so that its changes say nothing."""
    orders = itertools.permutations(folders)
    pages = {(made.html("x"), made.markdown("x"), str(made.as_dict())) for made in (board(read(f)) for f in orders)}
    assert len(pages) == 1


def test_runs_that_were_asked_otherwise_stand_in_other_tables(tmp_path):
    """Scores of other settings, versions or numbers of queries ranked against one another."""
    folders = [
        write_run(tmp_path / "a", right(5), tasks={"cats": {"normalise": "sum", "file": "here.yaml"}}),
        write_run(tmp_path / "b", right(6), tasks={"cats": {"normalise": "sum", "file": "there.yaml"}}),
        write_run(tmp_path / "c", right(7), tasks={"cats": {"normalise": "mean"}}),
        write_run(tmp_path / "d", right(8), tasks={"cats": {"normalise": "sum", "version": 2}}),
        write_run(tmp_path / "e", right(9, of=20), tasks={"cats": {"normalise": "sum"}}),
        write_run(tmp_path / "f", right(10), tasks={"cats": {"normalise": "sum"}}, seeds={"cats": 3}),
    ]
    made = board(read(folders))
    tables = {each.heading: [row.run for row in each.rows] for each in made.standings}
    assert tables == {
        "cats v1, normalise sum, queries 10, seed 0": ["b", "a"],
        "cats v1, normalise mean, queries 10, seed 0": ["c"],
        "cats v2, normalise sum, queries 10, seed 0": ["d"],
        "cats v1, normalise sum, queries 20, seed 0": ["e"],
        "cats v1, normalise sum, queries 10, seed 3": ["f"],
    }


def test_runs_on_other_examples_stand_in_other_tables(tmp_path):
    """Scores on another edition of a data set, under the same name and of as many queries, ranked together."""
    for name, digest in (("a", "1" * 64), ("b", "2" * 64), ("c", "1" * 64)):
        write_run(tmp_path / name, right(5), facts={"examples": {"cats": digest}})
    write_run(tmp_path / "unknown", right(5))
    made = board(read([tmp_path / name for name in ("a", "c", "unknown")]))
    assert {each.heading: [row.run for row in each.rows] for each in made.standings} == {
        "cats v1": ["a", "c", "unknown"],  # older results do not say on which examples
    }
    made = board(read([tmp_path / name for name in ("a", "b", "c", "unknown")]))
    assert {each.heading: [row.run for row in each.rows] for each in made.standings} == {
        "cats v1, examples 111111111111": ["a", "c"],
        "cats v1, examples 222222222222": ["b"],
        "cats v1": ["unknown"],
    }


def test_runs_of_older_code_stand_beside_those_of_newer(tmp_path):
    """A table of its own for each version of the code, since results of older ones lack fields of tasks."""
    old = {"mode": "generate", "generate": {"max_new_tokens": 4}}
    new = {**old, "generate": {**old["generate"], "beams": 1, "keep": ""}, "inverted": False, "features": ""}
    for name, task in (("old", old), ("new", new), ("other", {**new, "inverted": True, "features": "tower"})):
        write_run(tmp_path / name, right(5), tasks={"cats": task})
    made = board(read([tmp_path / name for name in ("old", "new", "other")]))
    assert {each.heading: [row.run for row in each.rows] for each in made.standings} == {
        "cats v1, inverted False": ["new", "old"],
        "cats v1, features tower, inverted True": ["other"],
    }


def test_markdown(folders, tmp_path, capsys):
    """Numbers without intervals, cells of other columns, or names that Markdown takes for emphasis."""
    main([*map(str, folders), "--out", str(tmp_path / "board.md"), "--title", "Scores_of_today"])
    text = (tmp_path / "board.md").read_text()
    assert text.startswith("# Scores\\_of\\_today\n")
    assert "## cats v1\n\naccuracy, 10 queries, by shots." in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    low, high = read(folders)["a"].cells["cats", 0, None].score.interval
    assert f"| a | **0.600** ({low:.3f}–{high:.3f}) | 0.700 (" in rows[4]
    assert rows[3].startswith("| c | – | **0.900** (")
    assert any("/models/a | abababababab | c0ffee | 3.11.7" in row for row in rows)
    main([f"*x|y*={folders[0]}"])
    assert capsys.readouterr().out.count("| \\*x\\|y\\* |") == 3, "in two tables, and where it comes from"
    main(list(map(str, folders)))
    assert "| c | – | **0.900** (" in capsys.readouterr().out


def test_json(folders, tmp_path):
    """A file that others cannot read, or that says less than the page."""
    main([*map(str, folders), "--out", str(tmp_path / "board.json")])
    content = json.loads((tmp_path / "board.json").read_text())
    cats = content["tasks"][0]
    assert cats["rows"][0]["entries"]["1"]["value"] == 0.9 and cats["rows"][0]["entries"]["1"]["best"] is True
    assert content["runs"]["a"]["weights, SHA-256"] == "abababababab"


def test_page(folders, tmp_path):
    """A page that needs the network, or into which names can write markup."""
    main([f"<b>={folders[0]}", *map(str, folders[1:]), "--out", str(tmp_path / "board.html")])
    page = (tmp_path / "board.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)|url\(|@import|<script""", page)
    assert "&lt;b&gt;" in page and "<td><b></td>" not in page
    assert page.count('class="best"') == 3
    assert page.count("<svg") == 1, "a line of cats; dogs have one point"
    assert "nan" not in page and "random_query" not in page


def test_a_phone_shows_the_whole_page(phone, tmp_path):
    """Labels of charts too small to be read, and tables of which half is beyond the card."""
    lines = [line for shots in (0, 1, 2, 4, 8) for line in right(5, shots=shots, task="a_task_of_a_long_name" * 3)]
    model = {"folder": "/models/of/a/long/name" * 4, "sha256": {"model.safetensors": "ab" * 32}, "recipe": None}
    runs = [str(write_run(tmp_path / f"{'a_run_of_a_long_name' * 3}{n}", lines, facts={"model": model})) for n in "ab"]
    main([*runs, "--out", str(tmp_path / "board.html")])
    measure = """
        const wide = [document.documentElement, ...document.querySelectorAll(".card, .scroll")];
        const beyond = wide.filter((each) => each.scrollWidth > each.clientWidth).map((each) => each.tagName);
        const [label, chart] = [document.querySelector(".tick"), document.querySelector("svg")];
        const size = parseFloat(getComputedStyle(label).fontSize) * chart.clientWidth / chart.viewBox.baseVal.width;
        parent.postMessage(`${wide.length} boxes, too narrow: [${beyond}], labels of ${size} pixels`, "*");
    """
    told = phone(tmp_path / "board.html", measure)
    ((boxes, beyond, size),) = re.findall(r"(\d+) boxes, too narrow: \[(.*?)\], labels of ([\d.]+) pixels", told)
    assert int(boxes) == 4 and not beyond and float(size) > 9.5


def test_all_that_is_in_a_folder_of_runs_can_be_given(folders, tmp_path, capsys):
    """A board that fails for a stray file, leaves out seeds, or passes over results without a word."""
    runs = tmp_path / "runs"
    for place in (runs / "a", runs / "x" / "seed-0", runs / "x" / "seed-1"):
        write_run(place, right(5))
    (runs / "x" / "seeds.json").write_text("{}")
    (runs / "prompts").mkdir()
    for name in ("notes.txt", "prompts/cats.html", "x/seed-note"):
        (runs / name).write_text("{}")
    (runs / "kept.json").write_text((runs / "a" / "results.json").read_text())
    words = [*map(str, sorted(runs.iterdir())), "--out", str(tmp_path / "board.json")]
    main(words)
    assert list(json.loads((tmp_path / "board.json").read_text())["runs"]) == ["a", "kept.json", "x/seed-0", "x/seed-1"]
    told = capsys.readouterr().err
    assert told == f"board: skipped, for they have no results: {runs / 'notes.txt'}, {runs / 'prompts'}\n"
    with pytest.raises(FlamingoError, match="seed-1: given twice"):
        main([str(runs / "x"), str(runs / "x" / "seed-1")])
    with pytest.raises(FlamingoError, match="prompts/results.json: expected the results"):
        main([str(runs / "prompts"), str(runs / "notes.txt")])
    with pytest.raises(FlamingoError, match="mistyped: expected the results"):
        main([str(runs / "a"), str(runs / "mistyped")])
    (runs / "prompts" / "results.json").write_text("{}")
    for path in (runs / "prompts", runs / "prompts" / "results.json"):
        with pytest.raises(FlamingoError, match="prompts/results.json: missing key"):
            main([str(runs / "a"), str(path)])
    assert not capsys.readouterr().err


def test_what_cannot_be_made_is_refused(folders, tmp_path):
    """A board of nothing, or one that is written nowhere."""
    only_control = write_run(tmp_path / "only", right(2, control="gates_at_zero"))
    for words, message in (
        ([str(only_control)], "expected results without controls"),
        ([str(folders[0]), "--out", "board.txt"], "expected a file that ends in .html, .md, .json"),
        ([str(folders[0]), "--out", str(tmp_path / "none" / "x.md")], "no folder"),
        ([str(folders[0]), "--out", str(folders[0] / "results.json" / "x.md")], "no folder"),
        ([str(folders[0]), "--out", str(tmp_path / ("x" * 300 + ".md"))], "File name too long"),
        ([str(tmp_path)], "results.json: expected the results"),
        ([], "board: "),
    ):
        with pytest.raises(FlamingoError, match=message):
            main(words)
