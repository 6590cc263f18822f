"""From answers to what metrics take: every kind of metric, many candidates, queries that hang together."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from flamingo import FlamingoError
from icl_eval.datasets import Example
from icl_eval.datasets.vqa import RAW_ANSWERS
from icl_eval.evaluation import evaluate_answerer
from icl_eval.outcomes import BEST, decide, the_best
from icl_eval.saved import Predictions, read_results
from icl_eval.tasks import Generation, Task
from tests.icl_eval.made import Made, Stub

MANY = tuple(f"class {number}" for number in range(150))


class Scoring(Stub):
    """Scores the right answers best, in two of three queries; says them, too."""

    def __init__(self, queries):
        super().__init__()
        self.right = {each.question: each.answers[0] for each in queries}
        self.top_k = None

    def rank(self, library, ladders, *, normalise="sum", top_k=None, progress=None):
        self.top_k = top_k
        return [[self.scores(query, top_k) for query in ladder.queries] for ladder in ladders]

    def scores(self, query, top_k):
        scores = -np.arange(len(query.answers), dtype=float) - 1
        text = query.chunk.text
        if not text.endswith("2"):
            scores[query.answers.index(self.right[text])] = 0
        if top_k is not None:
            scores[np.argsort(-scores)[top_k:]] = -np.inf
        return scores

    def generate(self, library, ladders, **_):
        return [[self.right[query.chunk.text] for query in ladder.queries] for ladder in ladders]


def run(monkeypatch, metric, answers, candidates=(), *, labels=True, out=None, **options):
    """Six queries, two a picture, of which the number n has the answer n modulo how many there are."""

    def example(name, number):
        texts = answers[number % len(answers)]
        fields = {RAW_ANSWERS: "\n".join(texts)}
        return Example(
            f"{name}{number}",
            (f"{number // 2}-{name}",),
            f"{number % 3}",
            texts,
            texts[0] if labels else None,
            (),
            fields,
        )

    queries = [example("q", number) for number in range(6)]
    dataset = Made([example("s", number) for number in range(90, 99)], queries, candidates)
    monkeypatch.setattr("icl_eval.sources.load_dataset", lambda name, root: dataset)
    settings = {"mode": "rank"} if candidates else {"mode": "generate", "generate": Generation(4)}
    template = "<image>{question}{answer}"
    task = Task("t", 1, "made", "test", template, (0,), support="train", metric=metric, file="f", **settings)
    model = Scoring(queries)
    results = evaluate_answerer(model, [task], out=out, **options)
    return results, model


ANSWERS = [("yes",) * 10, ("no",) * 10, ("yes",) * 9 + ("no",)]


@pytest.mark.parametrize(
    "metric, candidates, value",
    [
        ("accuracy", ("no", "yes"), 4 / 6),
        ("roc_auc", ("no", "yes"), 1.0),
        ("pope", ("no", "yes"), 4 / 6),
        ("exact_match", (), 1.0),
        ("vqa_accuracy", (), 1.0),
        ("ok_vqa_accuracy", (), 1.0),
        ("cider", (), None),
    ],
)
def test_every_kind_of_metric_gets_what_it_takes(monkeypatch, tmp_path, metric, candidates, value):
    """Indices for texts, one reference for all, the negative class for the positive one; a file that says otherwise."""
    results, _ = run(monkeypatch, metric, ANSWERS, candidates, out=tmp_path)
    (cell,) = results.cells
    if value is not None:
        assert cell.value == pytest.approx(value, abs=0.02)
    assert [outcome.query_id for outcome in cell.outcomes] == [f"q{number}" for number in range(6)]
    saved = read_results(tmp_path)
    assert saved.cells["t", 0, None].score.figures == dict(cell.score.figures)
    lines = Predictions(saved).cell(("t", 0, None))
    assert [line["prediction"] for line in lines] == [outcome.prediction for outcome in cell.outcomes]
    assert len({line["group"] for line in lines}) == 3 and "groups of queries" in cell.score.details["interval"]


def test_of_many_candidates_the_best_are_kept(monkeypatch, tmp_path):
    """A thousand names in every line, all scores computed where five are asked for, indices into the few kept."""
    answers = [(MANY[140],), (MANY[3],), (MANY[149],)]
    results, model = run(monkeypatch, "top5", answers, MANY, out=tmp_path)
    (cell,) = results.cells
    assert model.top_k == BEST and results.tasks["t"].chance == 5 / 150
    first, second, third = cell.outcomes[:3]
    assert first.prediction == [140, 0, 1, 2, 3] and first.target == 140
    assert first.candidates == (MANY[140], *MANY[:4]) and first.scores[0] == 0
    assert second.answer == second.right == MANY[3] and third.target == 149 and third.answer == MANY[0]
    assert cell.value == pytest.approx(4 / 6)
    assert max(len(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()) < 700


def test_ties_are_told_and_go_to_the_first():
    """The last of the best, or scores that differ in noise only, decided by it."""
    assert decide(np.array([-1.0, 0.0, -5e-5])) == (1, True)
    assert decide(np.array([-5e-5, -3.0, 0.0])) == (0, True)
    assert decide(np.array([-2e-4, -np.inf, 0.0])) == (2, False)
    noise = np.array([0, 1, -1, 1, -1, 1, -1]) * 2e-5
    for scores in (noise, -noise):
        assert the_best(np.array([-9.0, -3, -3, -3, -1, -3, -3]) + scores) == [4, 1, 2, 3, 5]
    assert the_best(np.array([-np.inf, -1.0, -np.inf])) == [1, 0, 2]


def test_a_split_without_right_answers_is_refused_where_they_are_needed(monkeypatch):
    """Test splits whose answers are kept secret, scored as all wrong."""
    with pytest.raises(FlamingoError, match="f: split: 'test', but query 'q0' has no right answer among its candid"):
        run(monkeypatch, "accuracy", [("maybe",)], ("no", "yes"))
    run(monkeypatch, "exact_match", ANSWERS)
    ranked = Task("t", 1, "made", "test", "<image>{label}", (0,), support="train", file="f")
    with pytest.raises(FlamingoError, match="f: mode: rank, but neither made nor its example 'q0' has candidates"):
        evaluate_answerer(Stub(), [ranked])


def test_predictions_are_whole_lines_of_json(monkeypatch, tmp_path):
    """Numbers that JSON does not know, or texts that break a line."""
    results, _ = run(monkeypatch, "exact_match", [("a\nb\u2028c",)], out=tmp_path)
    lines = (tmp_path / "predictions.jsonl").read_bytes().split(b"\n")
    assert [json.loads(line)["answer"] for line in lines if line] == ["a\nb\u2028c"] * 6
    assert results.cells[0].outcomes[5].answer == "a\nb\u2028c"


def test_an_ensemble_is_the_mean_over_orders(monkeypatch):
    """The scores of one order alone, likelihoods averaged twice, or an order that the plain prompt does not have."""
    support = [Example(f"s{number}", (), answers=(str(number),), label="x") for number in range(9)]
    queries = [Example("q", (), "", ("x",), "x")]
    monkeypatch.setattr("icl_eval.sources.load_dataset", lambda name, root: Made(support, queries, ("x", "y")))

    class Ordered(Stub):
        """The score of a prompt is its demonstrations' answers as one number."""

        def rank(self, library, ladders, **_):
            self.orders = sorted(
                "".join(chunk.text for chunk in ladder.demonstrations[: query.after])
                for ladder in ladders
                for query in ladder.queries
            )
            found = ("".join(c.text for c in each.demonstrations[: q.after]) for each in ladders for q in each.queries)
            scores = iter([np.array([float(text or 0), 0.0]) for text in found])
            return [[next(scores) for _ in ladder.queries] for ladder in ladders]

    for count, shots in ((4, 3), (6, 2), (6, 1)):
        task = Task("t", 1, "made", "test", "<image>{answer}", (shots,), support="train", ensemble=count, file="f")
        model = Ordered()
        (outcome,) = evaluate_answerer(model, [task]).cells[0].outcomes
        assert len(set(model.orders)) == len(model.orders) == min(count, (1, 2, 6)[shots - 1])
        assert "".join(outcome.labels) in model.orders
        assert outcome.scores[0] == pytest.approx(np.mean([float(order) for order in model.orders]))


def test_what_counts_of_an_answer_is_cut_as_the_task_says(monkeypatch, tmp_path):
    """A cut that nothing applies, or that loses what the model said."""

    class Talking(Stub):
        def generate(self, library, ladders, *, length_penalty, **_):
            assert length_penalty == 0
            return [["red, I thinkQuestion: what" for _ in ladder.queries] for ladder in ladders]

    queries = [Example(f"q{number}", (), "?", ("red",) * 10) for number in range(3)]
    monkeypatch.setattr("icl_eval.sources.load_dataset", lambda name, root: Made((), queries))
    settings = {"mode": "generate", "generate": Generation(4, 3, 0.0, "short_answer"), "metric": "vqa_accuracy"}
    task = Task("t", 1, "made", "test", "<image>{question}{answer}", (0,), file="f", **settings)
    (cell,) = evaluate_answerer(Talking(), [task]).cells
    assert cell.value == 1.0 and cell.outcomes[0].prediction == "red"
    assert cell.outcomes[0].answer == "red" and cell.outcomes[0].generated == "red, I thinkQuestion: what"
    evaluate_answerer(Talking(), [task], out=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert {line["generated"] for line in lines} == {"red, I thinkQuestion: what"}
    whole = replace(task, generate=Generation(4, 3, 0.0))
    evaluate_answerer(Talking(), [whole], out=tmp_path / "whole")
    assert "generated" not in (tmp_path / "whole" / "predictions.jsonl").read_text(), "where it is the answer"
