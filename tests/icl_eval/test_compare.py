"""Paired tests of runs: figures, what may be compared, and the command."""

from __future__ import annotations

import json
import sys
from itertools import product

import numpy as np
import pytest

from flamingo import FlamingoError
from icl_eval import run
from icl_eval.compare import MCNEMAR, RANDOMISATION, compare, holm, main, mcnemar_p
from icl_eval.saved import read_results
from tests.icl_eval.runs import lines_of, write_run

TARGETS = [0] * 40


def runs(tmp_path, *several, **options):
    """Runs a, b, … of the lines."""
    return {
        name: read_results(write_run(tmp_path / name, lines, **options))
        for name, lines in zip("abc", several, strict=False)
    }


def test_mcnemar_is_that_of_the_binomial():
    """A one-sided test, or one over all queries instead of those that one run alone gets right."""
    for first, other in product(range(6), repeat=2):
        splits = [[int(bit) for bit in f"{n:0{first + other}b}"] for n in range(2 ** (first + other))]
        as_uneven = [bits for bits in splits if min(sum(bits), len(bits) - sum(bits)) <= min(first, other)]
        expected = len(as_uneven) / len(splits) if first + other else 1.0
        assert mcnemar_p(first, other) == pytest.approx(min(1, expected))


def test_right_and_wrong_answers_are_paired(tmp_path):
    """Runs compared as if each had queries of its own: an advantage on the same queries would be lost in the noise."""
    weak = [0] * 20 + [1] * 20
    strong = [0] * 29 + [1] * 11  # right wherever `weak` is, and in nine more
    rows = compare(runs(tmp_path, lines_of(weak, TARGETS), lines_of(strong, TARGETS))).rows
    (row,) = rows
    name, change = row.headline
    assert (name, change.first, change.value) == ("accuracy", 0.5, 0.725)
    assert change.difference == pytest.approx(0.225)
    assert (row.test, row.only_first, row.only_run) == (MCNEMAR, 0, 9)
    assert row.p == pytest.approx(2 / 2**9)
    low, high = change.interval
    assert 0.08 < low < 0.225 < high < 0.37, "about 1.96 · sqrt(.225 · .775 / 40) = .13 to either side"


def test_corpus_metrics_are_resampled_for_both_runs_at_once(tmp_path):
    """Differences of independent draws, whose interval is as wide as those of both runs together."""
    rng = np.random.default_rng(0)
    targets = rng.integers(2, size=200)
    scores = rng.normal(size=200) + targets
    better = scores + 0.3 * targets  # the same noise
    parts = [lines_of(each.round(6).tolist(), targets.tolist()) for each in (scores, better)]
    found = runs(tmp_path, *parts, metric="roc_auc")
    (row,) = compare(found).rows
    assert row.test == RANDOMISATION and row.only_first is None
    _, change = row.headline
    low, high = change.interval
    own = found["a"].cells["cats", 1, None].score.interval
    assert 0 < low < change.difference < high
    assert high - low < 0.4 * (own[1] - own[0])
    assert row.p == pytest.approx(1 / 2001)


def test_all_figures_of_a_metric_are_compared(tmp_path):
    """A comparison by the headline alone: POPE's precision and recall stay unknown."""
    targets = ["yes", "no"] * 10
    one = lines_of(["yes"] * 20, targets)
    two = lines_of(["yes", "no"] * 9 + ["no", "no"], targets)
    (row,) = compare(runs(tmp_path, one, two, metric="pope")).rows
    assert list(row.figures) == ["accuracy", "precision", "recall", "f1", "yes_ratio"]
    assert row.figures["recall"].difference == pytest.approx(-0.1)
    assert row.figures["yes_ratio"].difference == pytest.approx(9 / 20 - 1)
    assert row.test == MCNEMAR and (row.only_first, row.only_run) == (1, 10)


def test_queries_about_one_picture_are_no_independent_evidence(tmp_path):
    """McNemar's test over twenty questions about two pictures."""
    groups = ["x"] * 20 + ["y"] * 20
    one, two = (lines_of(answers, TARGETS, group=groups) for answers in ([0] * 40, [0] * 20 + [1] * 20))
    (row,) = compare(runs(tmp_path, one, two)).rows
    assert row.test == RANDOMISATION
    assert row.p == 1.0, "one picture's answers alone differ, and might as well be the other run's"
    assert row.headline[1].interval == (-1.0, 0.0)


def test_equal_runs_do_not_differ(tmp_path):
    """p below 1, or not defined, where two runs answer alike."""
    texts = lines_of(["x", "y"], [["a cat"], ["two dogs"]])
    for metric, lines in (("accuracy", lines_of([0, 1], [0, 0])), ("cider", texts)):
        (row,) = compare(runs(tmp_path / metric, lines, lines, metric=metric)).rows
        assert row.p == row.p_holm == 1.0
        assert row.headline[1].interval == (0.0, 0.0)
        assert row.test == (MCNEMAR if metric == "accuracy" else RANDOMISATION), "captions are not right or wrong"


@pytest.mark.parametrize("metric", ["vqa_accuracy", "roc_auc"])
def test_few_queries_are_no_evidence(tmp_path, metric):
    """p of .001 for one question, or for two answers: all bootstrap draws are then on one side of no difference."""
    targets = [["a", "a", "a", "b", "b"]] if metric == "vqa_accuracy" else [0, 1]
    worse, better = (["c"], ["b"]) if metric == "vqa_accuracy" else ([0.2, 0.1], [0.1, 0.2])
    (row,) = compare(runs(tmp_path, *(lines_of(each, targets) for each in (worse, better)), metric=metric)).rows
    assert row.headline[1].difference > 0 and row.test == RANDOMISATION
    assert (row.headline[1].interval is None) == (metric == "vqa_accuracy"), "of one question there is none"
    assert row.p > 0.4


def test_p_is_corrected_for_the_number_of_tests(tmp_path):
    """Twenty cells, one of which is significant by chance."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.5]) == [1.0, 1.0]
    weak, strong = [1] * 8 + [0] * 32, [0] * 40
    cells = [[*lines_of(answers, TARGETS), *lines_of(answers, TARGETS, shots=0)] for answers in (weak, strong)]
    rows = compare(runs(tmp_path, *cells)).rows
    assert [row.p_holm for row in rows] == pytest.approx([2 * row.p for row in rows])


def test_every_run_is_compared_with_the_first(tmp_path):
    """Neighbours compared with one another, and rows that mix up the runs."""
    answers = ([0] * n + [1] * (40 - n) for n in (10, 20, 40))
    several = [[*lines_of(each, TARGETS), *lines_of(each, TARGETS, shots=0)] for each in answers]
    rows = compare(runs(tmp_path, *several)).rows
    assert [(row.run, row.shots, row.headline[1].first, row.headline[1].value) for row in rows] == [
        ("b", 1, 0.25, 0.5),
        ("b", 0, 0.25, 0.5),
        ("c", 1, 0.25, 1.0),
        ("c", 0, 0.25, 1.0),
    ]


def other_seed(lines):
    return [{**line, "query": "photo-" + str(int(line["query"].removeprefix("photo-")) + 1)} for line in lines]


def other_prompts(lines):
    return [{**line, "prompt": "0" * 16} for line in lines]


@pytest.mark.parametrize(
    ("change", "allowed", "message"),
    [
        (lambda lines: lines[:-1], "shared_queries", "not every run has query cats/000039 of a"),
        (other_prompts, "other_prompts", "query cats/000000 was asked by another prompt in b than in a"),
        (other_seed, None, "query cats/000000 is another one in b than in a"),
        (lambda lines: [{**line, "target": 1} for line in lines], None, "is another one in b than in a"),
    ],
)
def test_runs_that_were_asked_otherwise_are_refused(tmp_path, change, allowed, message):
    """Differences of the queries or of the prompts that pass for differences of the models."""
    lines = lines_of([0] * 30 + [1] * 10, TARGETS)
    found = runs(tmp_path, lines, change(lines_of([0] * 40, TARGETS)))
    with pytest.raises(FlamingoError, match=message):
        compare(found)
    both = {"shared_queries": True, "other_prompts": True}
    if allowed is None:
        with pytest.raises(FlamingoError, match=message):
            compare(found, **both)
    else:
        (row,) = compare(found, **{allowed: True}).rows
        assert row.queries == (39 if allowed == "shared_queries" else 40)
        with pytest.raises(FlamingoError, match=message):
            compare(found, **{**both, allowed: False})


@pytest.mark.parametrize("change", [lambda lines: lines[:-1], other_seed])
def test_runs_of_other_seeds_are_told_what_to_do(tmp_path, change):
    """A message about single queries, which leaves open that all are others, and why."""
    lines = lines_of([0] * 40, TARGETS)
    one = read_results(write_run(tmp_path / "a", lines))
    two = read_results(write_run(tmp_path / "b", change(lines), seeds={"cats": 7}))
    with pytest.raises(FlamingoError) as error:
        compare({"a": one, "b": two})
    advice = "queries are drawn by the seed (0 in a, 7 in b): compare runs of the same seed, or, where the task has"
    assert advice in str(error.value) and "--shared_queries true" in str(error.value)
    assert "\n" not in str(error.value)


def test_what_cannot_be_tested_is_refused(tmp_path):
    """Groups of some queries alone, of which the others would pass for one group; no draws at all."""
    found = runs(tmp_path, *([lines_of([0, 1], [0, 0], group=["x", "x"])] * 2))
    with pytest.raises(FlamingoError, match="resamples: 0, expected at least 1"):
        compare(found, resamples=0)
    file = tmp_path / "b" / "predictions.jsonl"
    first, second = file.read_text().splitlines()
    file.write_text(first + "\n" + second.replace('"group": "x"', '"group": null') + "\n")
    with pytest.raises(FlamingoError, match="b: cats at 1 shots: some predictions have no group, expected all or none"):
        compare(found)


def test_candidates_in_another_order_are_the_same_query(tmp_path):
    """Shuffled candidates (under other prompts) taken for another question, or the right one for a wrong one."""
    one = lines_of([0, 1], [0, 1], candidates=[["x", "y"]] * 2, right=["x", "y"])
    two = lines_of([1, 0], [1, 0], candidates=[["y", "x"]] * 2, right=["x", "y"])
    (row,) = compare(runs(tmp_path, one, two)).rows
    assert row.headline[1].difference == 0


def test_predictions_must_give_the_recorded_figure(tmp_path):
    """Predictions of another run beside results.json: a test of other answers than those of the table."""
    found = runs(tmp_path, lines_of([0] * 40, TARGETS), lines_of([0] * 40, TARGETS))
    other = write_run(tmp_path / "other", lines_of([1] * 40, TARGETS))
    (other / "predictions.jsonl").replace(tmp_path / "b" / "predictions.jsonl")
    with pytest.raises(FlamingoError, match="predictions.jsonl gives 0.000000, results.json 1.000000"):
        compare(found)


def test_what_differs_or_is_left_out_is_said(tmp_path):
    """Another rule of scoring, or cells that are silently not compared."""
    first = write_run(tmp_path / "a", [*lines_of([0, 1], [0, 0]), *lines_of([0, 1], [0, 0], shots=4)])
    told = {"normalise": "mean", "inverted": False, "file": "x"}  # a's code did not know of `inverted` yet
    second = write_run(tmp_path / "b", lines_of([0, 0], [0, 0]), tasks={"cats": told})
    found = compare({"a": read_results(first), "b": read_results(second)})
    assert found.notes == (
        "not in every run, though in a: cats at 4 shots",
        "cats: normalise: 'mean' in b, 'sum' in a",
    )
    third = read_results(write_run(tmp_path / "c", lines_of(["x", "y"], [["x"], ["z"]]), metric="exact_match"))
    with pytest.raises(FlamingoError, match="cats: metric: exact_match in c, accuracy in a"):
        compare({"a": read_results(first), "c": third})
    with pytest.raises(FlamingoError, match="no cell in common"):
        other = write_run(tmp_path / "d", lines_of([0], [0], task="dogs"))
        compare({"a": read_results(first), "d": read_results(other)})


def test_controls_are_compared_when_asked_for(tmp_path):
    """Controls that count as tests of the models, and so weaken all others."""
    lines = lines_of([0, 1], [0, 0]) + lines_of([0, 1], [0, 0], control="gates_at_zero")
    found = runs(tmp_path, lines, lines)
    assert [row.control for row in compare(found).rows] == [None]
    assert [row.control for row in compare(found, controls=True).rows] == [None, "gates_at_zero"]


def test_flamingo_eval_has_the_command(tmp_path, capsys, monkeypatch):
    """`compare` taken for an option of an evaluation, or an error that comes as a traceback."""
    folders = [str(write_run(tmp_path / name, lines_of([0, 1], [0, 0]))) for name in ("one", "two")]
    for words, code, shown in ((folders, 0, "two against one"), (folders[:1], 2, "error: compare: 1 run")):
        monkeypatch.setattr(sys, "argv", ["flamingo-eval", "compare", *words])
        with pytest.raises(SystemExit) as stopped:
            run.main()
        assert stopped.value.code == code
        assert shown in "".join(capsys.readouterr())


def test_the_command(tmp_path, capsys):
    """A command that prints no differences, or JSON of another form than the table."""
    one = write_run(tmp_path / "[one]", lines_of([0] * 20 + [1] * 20, TARGETS))
    two = write_run(tmp_path / "two", lines_of([0] * 40, TARGETS))
    main([str(one), str(two), "--json", str(tmp_path / "out.json")])
    shown = capsys.readouterr().out
    assert "two against [one]" in shown and "+0.500" in shown and "0 to 20" in shown
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["first"] == "[one]" and list(content["runs"]) == ["[one]", "two"]
    (row,) = content["rows"]
    assert row["figures"]["accuracy"]["difference"] == 0.5 and row["only_run"] == 20
    for words in ([str(one)], [], [str(one), str(two), "--jsn", "x"], [str(one), str(tmp_path)]):
        with pytest.raises(FlamingoError):
            main(words)
