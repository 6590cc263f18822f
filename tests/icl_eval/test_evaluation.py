"""From tasks to results: cells, controls, ties, command line, ranks, report."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from flamingo import FlamingoError
from icl_eval import evaluate, summary, write_report
from icl_eval.diagnostics import CONTROL_SHOTS, CONTROLS
from icl_eval.evaluation import TIE
from icl_eval.metrics import Figure
from icl_eval.outcomes import ranked
from icl_eval.questions import Questions
from icl_eval.run import main, parse_numbers, table
from icl_eval.sources import load_pool
from icl_eval.tasks import load_task
from tests.icl_eval.conftest import lively_flamingo

ROOT = Path(__file__).parents[2]
TASKS = ["glyphs_5way", "digits_2way", "naming"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return lively_flamingo(tmp_path_factory.mktemp("lively"), "lfm2")


@pytest.fixture(scope="module")
def saved(pair, tmp_path_factory):
    """The folder of a saved model, with a recipe beside it."""
    folder = tmp_path_factory.mktemp("run") / "model"
    for part in pair:
        part.save_pretrained(folder)
    (folder.parent / "recipe.yaml").write_text("steps: 20\n")
    return folder


@pytest.fixture(scope="module")
def results(pair):
    torch.set_num_threads(1)
    return evaluate(*pair, TASKS, shots=[0, 1, CONTROL_SHOTS], controls=CONTROLS, queries=12)


def predictions(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def assert_same(found, expected):
    """Demonstrations and prompts byte for byte, scores within 1e-5, predictions wherever the best two differ enough."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for key in ("task", "shots", "control", "query_id", "query", "demonstrations", "labels", "prompt", "target"):
            assert one[key] == other[key], key
        np.testing.assert_allclose(one["scores"], other["scores"], atol=1e-5, rtol=0)
        best, second = sorted(one["scores"], reverse=True)[:2]
        if best - second > TIE:
            assert one["prediction"] == other["prediction"]


def test_results_do_not_depend_on_the_batch_size(pair, results, tmp_path):
    """A query that is scored with its neighbour's pictures, or padding that reaches the scores."""
    results.save(tmp_path / "whole")
    for size in (1, 8):
        part = evaluate(*pair, TASKS, shots=[0, 1, CONTROL_SHOTS], controls=CONTROLS, queries=12, batch_size=size)
        part.save(tmp_path / str(size))
        assert_same(predictions(tmp_path / str(size)), predictions(tmp_path / "whole"))


def test_two_ranks_equal_one(saved, tmp_path):
    """Ranks that draw episodes of their own, or results gathered in another order than that of the queries."""
    arguments = ["--model", str(saved), "--task", "glyphs_5way", "--task", "naming", "--shots", "0,2"]
    arguments += ["--queries", "7", "--controls", "--out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    alone = [sys.executable, "-m", "icl_eval", *arguments, str(tmp_path / "one")]
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ranks += ["-m", "icl_eval", *arguments, str(tmp_path / "two")]
    for command in (alone, ranks):
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        assert "glyphs_5way" in done.stdout
    assert_same(predictions(tmp_path / "two"), predictions(tmp_path / "one"))
    assert "Example prompts" in (tmp_path / "two" / "report.html").read_text()
    written = json.loads((tmp_path / "two" / "results.json").read_text())
    cells = {(cell["task"], cell["shots"], cell["control"]): cell for cell in written["cells"]}
    assert set(cells) == {
        ("glyphs_5way", 0, None),
        ("glyphs_5way", 2, None),
        *(("glyphs_5way", CONTROL_SHOTS, control) for control in CONTROLS),
        ("naming", 0, None),
    }
    assert all(cell["queries"] == 7 for cell in cells.values())
    assert written["facts"]["model"]["recipe"] == "steps: 20\n"
    assert len(written["facts"]["model"]["sha256"]["model.safetensors"]) == 64
    assert written["facts"]["versions"]["torch"] == torch.__version__
    assert written["seeds"] == {"glyphs_5way": 0, "naming": 0}
    assert written["tasks"]["naming"]["ways"] == 60


def test_summary_has_the_form_of_the_quickstart(results):
    """Shots as numbers, or controls under the wrong key: whoever reads summary.json finds nothing."""
    parts = summary(results)
    assert set(parts) == {"tasks", "controls", "chance"}
    assert set(parts["tasks"]["glyphs_5way"]) == {"0", "1", "4"}
    assert set(parts["tasks"]["naming"]) == {"0"}
    assert set(parts["controls"]) == set(CONTROLS)
    assert set(parts["controls"]["random_query"]) == {"glyphs_5way", "digits_2way"}
    assert parts["chance"] == {"glyphs_5way": 0.2, "digits_2way": 0.5, "naming": 1 / 60}


def test_gates_at_zero_sees_no_picture_and_leaves_the_model_as_it_was(pair, results):
    """A control that is run with open gates, or a model that goes on with shut ones."""
    model, processor = pair
    gates = {name: float(value) for name, value in model.gates().items()}
    model.train()
    again = evaluate(model, processor, ["digits_2way"], shots=[CONTROL_SHOTS], controls=CONTROLS, queries=6)
    assert model.training
    model.eval()
    assert {name: float(value) for name, value in model.gates().items()} == gates
    shut = again.cell("digits_2way", CONTROL_SHOTS, "gates_at_zero").outcomes
    opened = again.cell("digits_2way", CONTROL_SHOTS).outcomes
    other = results.cell("digits_2way", CONTROL_SHOTS).outcomes
    for one, two in zip(opened, other, strict=False):
        np.testing.assert_allclose(one.scores, two.scores, atol=1e-5, rtol=0)
    for one, two in zip(shut, opened, strict=True):
        assert one.prompt == two.prompt
        assert np.abs(np.subtract(one.scores, two.scores)).max() > 1e-2


def test_ties_go_to_the_first_label_and_are_counted():
    """A tie that numpy, a batch or a rank breaks in its own way."""
    task = load_task("glyphs_5way")
    questions = Questions(task, load_pool(task), [(0, None)])
    episode = questions.draws.episode(0)
    for scores, expected in (
        ([-5.0, -3.00009, -3.0, -9.0, -3.00005], (1, True)),
        ([-5.0, -3.0002, -3.0, -9.0, -4.0], (2, False)),
    ):
        outcome = ranked(questions, episode, episode.prompt(0), np.array(scores))
        assert (outcome.prediction, outcome.tied) == expected


def test_a_split_for_tuning_keeps_away_from_the_test_classes(pair):
    """Designs that are chosen on the classes they are later tested on."""
    from data_shards.glyphs.pictures import load_world

    tuned = evaluate(*pair, ["glyphs_5way", "scripts_5way", "naming"], shots=[1], queries=4, split="validation")
    validation = {str(kind) for kind in load_world().split("validation")}
    for name in ("glyphs_5way", "scripts_5way"):
        for outcome in tuned.cell(name, 1).outcomes:
            assert {shown.split("/")[1] for shown in (*outcome.demonstrations, outcome.query)} <= validation
    assert tuned.tasks["naming"].split == "known"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--model {none} --out {out}", "--model {none}: expected a folder with a saved Flamingo or another image-text"),
        ("--model {saved} --out {out} --task naming --data {none}", "--data {none}: no such folder"),
        ("--model {saved} --out {out} --task naming --split tset", "split: 'tset', expected one of validation, test, "),
        ("--model {saved} --out {out} --task glyphs_2way --split tset", "{glyphs}: split: 'tset', glyphs has known, "),
        ("--model {saved} --out {out} --task glyphs_2way --zero-shot foo", "zero_shot: 'foo', expected one of honest"),
        ("--model {empty} --out {out}", "--model {empty}: no weights (model.safetensors) in this folder"),
        ("--model {saved}", "the following arguments are required: out"),
        ("--model {saved} --out {out} --shot 1", "unrecognized arguments: --shot"),
        ("--model {saved} --out {out} --task glyph", "task 'glyph' (did you mean 'glyphs_5way'?): expected the path"),
        ("--model {saved} --out {out} --shots 1,x", "--shots 1,x: expected whole numbers from 0, such as 0,1,4"),
        ("--model {saved} --out {out} --task naming --queries 0", "queries: 0, expected at least 1"),
        ("--model {saved} --out {out} --task digits_2way --batch-size 0", "batch_size: 0, expected at least 1"),
        ("--model {saved} --out {out} --task naming --seed -1", "task naming: seed: -1, expected at least 0"),
        ("--model {saved} --out {out} --task ,", "tasks: none, expected at least one"),
        ("--model {saved} --out {out} --device abacus", "--device abacus: expected cpu, cuda or auto"),
        ("--model {saved} --out {out} --task naming --show -1", "--show -1: expected a number of queries"),
        ("--model {saved} --out {out} --task {unlabelled}", "{unlabelled}: names: fixed, but"),
        ("--model {saved} --out {out} --task glyphs_2way --shots 99", "{glyphs}: shots: 99, expected 0 to 15"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, saved, tmp_path, monkeypatch, capsys):
    """A traceback, an exit code of 0, or a message that does not name the culprit."""
    (tmp_path / "empty").mkdir()
    shutil.copy(saved / "config.json", tmp_path / "empty")
    text = Path(load_task("glyphs_5way").file).read_text().replace("names: fresh", "names: fixed")
    (tmp_path / "unlabelled.yaml").write_text(text)
    places = {name: tmp_path / name for name in ("none", "empty", "out")} | {"saved": saved}
    places |= {"unlabelled": tmp_path / "unlabelled.yaml", "glyphs": load_task("glyphs_2way").file}
    monkeypatch.setattr(sys, "argv", ["flamingo-eval", *(word.format(**places) for word in arguments.split())])
    with pytest.raises(SystemExit) as stopped:
        main()
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert stopped.value.code == 2
    assert len(errors) == 1
    assert errors[0].startswith("error: " + message.format(**places))
    assert not (tmp_path / "out").exists()


def test_no_score_is_cut(pair):
    """Intervals that end in an ellipsis, or a cell that is in no block of the table."""
    found = evaluate(*pair, ["glyphs_2way", "naming"], shots=range(8), queries=2)
    for count in (5, 6, 8):
        figures = [Figure(0.1 + n / 64, (0.25 + n / 64, 0.75 + n / 64)) for n in range(len(found.cells))]
        cells = [
            replace(cell, score=replace(cell.score, figures={"accuracy": figure}))
            for cell, figure in zip(found.cells, figures, strict=True)
            if cell.shots < count
        ]
        console = Console(width=80, record=True, file=io.StringIO())
        console.print(table(replace(found, cells=cells), console.width))
        shown = console.export_text()
        assert "…" not in shown and shown.count("score by shots") == (2 if count == 8 else 1)
        for cell in cells:
            low, high = cell.interval
            assert shown.count(f"{cell.value:.3f}") == 1
            assert shown.count(f"{low:.3f}–{high:.3f}".replace("0.", ".")) == 1


def test_shots_are_read_as_they_are_written():
    """A list of shots that is silently cut or sorted out."""
    assert parse_numbers("--shots", "") is None
    assert parse_numbers("--shots", "0,1, 8") == [0, 1, 8]
    for wrong in ("-1", "1;2", "1,,2", "1.5"):
        with pytest.raises(FlamingoError):
            parse_numbers("--shots", wrong)


@pytest.fixture(scope="module")
def report(results, tmp_path_factory):
    rows = [
        {
            "step": n,
            "loss": 3 / n,
            "loss/naming": None if n < 5 else 2 / n,
            "gate/attention.0": n / 50,
            "learning_rate/new": 1e-3,
        }
        for n in range(1, 40)
    ]
    return write_report(
        tmp_path_factory.mktemp("report") / "report.html",
        results=results,
        training_log=rows,
        account={"documents": 26000, "(class, name) pairs": {"recurring": 3}, "note": "<b>& more</b>"},
        timings={"shards": 31.0, "evaluation": 75.5},
        title="A small <run>",
        facts={"seed": 0},
    )


def test_report_is_self_contained_and_complete(report, results):
    """A report that needs the network, that shows right answers only, or into which data can write markup."""
    page = report.read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)|url\(|@import|<script""", page)
    assert page.count('class="card example"') == 12
    assert page.count("✓ right") >= 1
    assert page.count("✗ wrong") >= 6
    assert "A small &lt;run&gt;" in page
    assert "&lt;b&gt;&amp; more&lt;/b&gt;" in page
    for cell in results.cells:
        assert f"{cell.value:.3f}" in page
    for heading in ("Loss", "Gates", "Learning rate", "Controls", "no evidence of few-shot abilities that emerge"):
        assert heading in page
    assert "nan" not in re.sub('base64,[^"]*', "", page)


def test_report_opens_in_a_browser_without_errors(report, browser, tmp_path):
    """A page that stays blank, or an error that only a browser tells of (resources: see the test above)."""
    picture = tmp_path / "report.png"
    done = browser(report, "--enable-logging=stderr", f"--screenshot={picture}", "--window-size=1100,3000")
    assert picture.stat().st_size > 20_000, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
