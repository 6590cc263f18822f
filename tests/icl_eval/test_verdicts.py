"""Diagnoses: what they say of models of which it is known what they do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from icl_eval.datasets import Example
from icl_eval.diagnostics import DIAGNOSTICS
from icl_eval.evaluation import evaluate_answerer
from icl_eval.metrics import METRICS
from icl_eval.outcomes import Outcome
from icl_eval.results import Cell, Results
from icl_eval.tasks import Task
from icl_eval.verdicts import calibration, copying, diagnoses, effect, one_answer, order_sensitivity, recency
from tests.icl_eval.made import Made, Stub

CLASSES = ("x", "y", "z")


class Known(Stub):
    """Answers by a rule over (pictures and answers of the demonstrations, the query's picture, candidates)."""

    def __init__(self, rule):
        super().__init__()
        self.rule, self.shut = rule, False

    def rank(self, library, ladders, **_):
        return [[self.scores(library, ladder, query) for query in ladder.queries] for ladder in ladders]

    def scores(self, library, ladder, query):
        shown = []
        for chunk in ladder.demonstrations[: query.after]:
            shown.append((self.seen(library, chunk), chunk.text))
        answer = self.rule(shown, self.seen(library, query.chunk), query.answers)
        return np.array([float(each == answer) for each in query.answers])

    def seen(self, library, chunk):
        return library.media(chunk.media)[0].data.decode()[0] if chunk.media and not self.shut else None

    def closed(self):
        from contextlib import contextmanager

        @contextmanager
        def closed():
            self.shut = True
            yield
            self.shut = False

        return closed()


def looks_up(shown, query, candidates):
    """The answer that stands beside a picture of the query's class, else the first candidate."""
    return next((text for seen, text in shown if seen == query and seen is not None), candidates[0])


def knows(shown, query, candidates):
    """The class, whatever is shown."""
    return {"0": "x", "1": "y", "2": "z"}.get(query, "x")


def repeats_last(shown, query, candidates):
    return shown[-1][1] if shown else candidates[0]


def needs_the_form(shown, query, candidates):
    """The class, once there is any demonstration."""
    return knows(shown, query, candidates) if shown else candidates[0]


@pytest.fixture
def diagnose(monkeypatch):
    def example(number):
        kind = number % 3
        return Example(f"e{number}", (f"{kind}{number}-a",), label=CLASSES[kind], answers=(CLASSES[kind],))

    dataset = Made([example(n) for n in range(60)], [example(100 + n) for n in range(200)], CLASSES)
    monkeypatch.setattr("icl_eval.sources.load_dataset", lambda name, root: dataset)
    task = Task("t", 1, "made", "test", "<image>{label}", (4,), support="train", demonstrations="balanced", file="f")

    def diagnosis(rule):
        model = Known(rule)
        results = evaluate_answerer(model, [task], controls=DIAGNOSTICS, closed=model.closed)
        return results.diagnostics["t"]

    return diagnosis


def signs(found):
    return {name: int(each["interval"][0] > 0) - int(each["interval"][1] < 0) for name, each in found["costs"].items()}


def test_a_model_that_learns_from_its_demonstrations(diagnose):
    """A verdict that misses what every control shows."""
    found = diagnose(looks_up)
    assert found["score"] == 1 and set(signs(found).values()) == {1}
    assert found["verdict"].endswith("Verdict: the model learns from the demonstrations what belongs to what.")
    assert found["order"]["changed"] == 0 and found["copying"]["answers"] == 1


def test_a_model_that_knows_the_answers_already(diagnose):
    """Demonstrations that get the credit for what the model knows."""
    found = diagnose(knows)
    by_name = signs(found)
    assert by_name["gates_at_zero"] == by_name["random_query"] == 1
    assert by_name["zero_shot"] == by_name["labels_permuted"] == by_name["images_swapped"] == by_name["text_only"] == 0
    assert found["verdict"].endswith("that the demonstrations contribute anything cannot be seen here.")


def test_a_model_that_takes_the_form_alone(diagnose):
    """Help of any kind taken for learning what belongs to what."""
    found = diagnose(needs_the_form)
    assert signs(found)["zero_shot"] == 1 and signs(found)["labels_permuted"] == 0
    assert "they may only tell the form of the answers" in found["verdict"]


def test_a_model_that_repeats_the_last_answer(diagnose):
    """Recency and a dependence on order that stay unseen."""
    found = diagnose(repeats_last)
    assert found["recency"]["last"] == 1 and found["recency"]["bias"] > 0.6
    assert found["order"]["changed"] > 0.5


def outcome(answer, right, labels=(), scores=(0.0,), target=0):
    return Outcome("q", "q", (), tuple(labels), "", 0, target, answer, right, scores=tuple(scores))


def cell(predictions, targets, control=None, *, metric="accuracy", shots=4, group=str, zero_shot=None, **fields):
    """A cell of so many queries, each about the picture that `group` gives for its number."""
    outcomes = [
        Outcome(f"q{n}", f"q{n}", (), ("x", "y"), "", prediction, target, "x", "x", group=group(n), **fields)
        for n, (prediction, target) in enumerate(zip(predictions, targets, strict=True))
    ]
    return Cell("t", shots, control, METRICS[metric].score(predictions, targets), 0, outcomes, zero_shot)


def verdict(*cells, metric="accuracy"):
    task = Task("t", 1, "made", "test", "<image>{label}", (4,), support="train", metric=metric, file="f")
    return diagnoses(Results({"t": task}, list(cells), {}, {}))["t"]


def test_few_queries_prove_nothing():
    """A verdict from one query, or from one picture's eight questions: every draw of them is the same."""
    for count, group in ((1, str), (4, str), (12, lambda n: str(n // 6))):
        right, wrong = (cell([answer] * count, [0] * count, group=group) for answer in (0, 1))
        found = effect(right, wrong)
        assert found.cost == 1 and found.interval == (1, 1) and found.sign == 0 and found.p > 0.05
    assert effect(cell([0] * 12, [0] * 12), cell([1] * 12, [0] * 12)).sign == 1


def test_questions_about_one_picture_are_no_independent_evidence():
    """An interval of the cost that is too narrow by the root of six."""
    lucky = [int(n // 6 % 3 == 0) for n in range(60)]
    ends = []
    for group in (str, lambda n: str(n // 6)):
        low, high = effect(cell([0] * 60, [0] * 60, group=group), cell(lucky, [0] * 60, group=group)).interval
        ends.append(high - low)
    assert ends[1] / ends[0] == pytest.approx(6**0.5, rel=0.2)


def test_areas_under_curves_have_effects_too():
    """A metric without values of single queries, of which no verdict is ever given."""
    targets = [0, 1] * 20
    plain = cell([float(target) for target in targets], targets, metric="roc_auc")
    noise = np.random.default_rng(0).normal(size=40).tolist()
    found = verdict(plain, cell(noise, targets, "labels_permuted", metric="roc_auc"), metric="roc_auc")
    cost = found["costs"]["labels_permuted"]
    assert cost["interval"][0] > 0.1 and cost["p"] < 0.01
    assert found["verdict"].endswith("the model learns from the demonstrations what belongs to what.")


def test_verdicts_say_no_more_than_was_tried():
    """Controls that were not run taken for controls that showed nothing; two texts called none at all."""
    targets = [0] * 40
    good, bad = [0] * 40, [1] * 40
    shut, zero = cell(bad, targets, "gates_at_zero"), cell(bad, targets, shots=0, zero_shot="text_only")
    found = verdict(zero, cell(good, targets), shut)["verdict"]
    assert "Having two of their texts alone costs 1.000" in found
    assert found.endswith("the demonstrations help; whether it matters what belongs to what was not tried.")
    found = verdict(cell(good, targets, shots=0), cell(bad, targets), shut)["verdict"]
    assert "Having no demonstrations costs -1.000" in found and found.endswith("Verdict: the demonstrations harm.")
    permuted = [cell(bad, targets, "labels_permuted"), cell([0] * 20 + bad[20:], targets)]
    found = verdict(cell(good, targets, shots=0), *permuted)["verdict"]
    assert found.endswith("what belongs to what, but is better off without them.")


class Counted(list):
    """Outcomes of which it is known how many were read."""

    read = 0

    def __iter__(self):
        for each in super().__iter__():
            self.read += 1
            yield each


def test_a_model_that_says_one_thing_is_found_out():
    """A score below chance that looks like a bug; an answer that is rarer; all of a large file read for nothing."""

    def answered(often, count, **fields):
        plain = cell([0] * count, [0] * count, **fields)
        said = ["false" if n % 100 < often else f"other {n}" for n in range(count)]
        kept = Counted(replace(each, answer=answer) for each, answer in zip(plain.outcomes, said, strict=True))
        return replace(plain, outcomes=kept)

    ranked = {"candidates": ("true", "false"), "scores": (-1.0, 0.0)}
    assert one_answer(answered(100, 989, **ranked)) == ("false", 989)
    assert one_answer(answered(95, 1000, **ranked)) == ("false", 950) and not one_answer(answered(94, 1000, **ranked))
    assert one_answer(answered(100, 40)) is None, "free answers, of a metric that does not classify"
    varied = answered(0, 1000, **ranked)
    assert one_answer(varied) is None and varied.outcomes.read < 60
    shut = cell([1] * 1200, [0] * 1200, "gates_at_zero")
    said = ' The answers hardly vary: "false" 1,200 times of 1,200.'
    assert said in verdict(answered(100, 1200, **ranked), shut)["verdict"]
    assert "hardly vary" not in verdict(answered(90, 1200, **ranked), shut)["verdict"]


def test_controls_that_change_nothing_are_told_at_once():
    """The same sentence, of nothing but zeros, five times; or the one control that does change something among them."""
    plain, *controls = (cell([0] * 20, [0] * 20, name) for name in (None, "gates_at_zero", "random_query", "text_only"))
    said = "No control makes any difference to the score: shutting every picture out, showing another query's picture, "
    found = verdict(plain, *controls)["verdict"]
    assert f" {said}leaving their pictures away. " in found and "costs" not in found
    found = verdict(plain, *controls[:2], cell([1] * 20, [0] * 20, "text_only"))["verdict"]
    assert "Leaving their pictures away costs 1.000" in found and found.count("costs") == 1
    assert "No difference to the score comes from shutting every picture out, showing another query's picture." in found
    assert "Shutting every picture out costs 0.000" in verdict(plain, controls[0])["verdict"]


def test_what_recency_is_compared_with_is_said():
    """A difference of which one cannot tell what is taken from what."""
    plain = cell([0] * 4, [0] * 4)
    labels = [("x", "x", "y"), ("y", "y", "x"), ("x", "x", "y"), ("x", "y", "x")]
    asked = [replace(each, labels=shown, right="y") for each, shown in zip(plain.outcomes, labels, strict=True)]
    found = verdict(replace(plain, outcomes=asked), cell([1] * 4, [0] * 4, "gates_at_zero"))["verdict"]
    assert "the answer of the last demonstration in 50% of the queries, and that of any one before it in 62%" in found
    assert "-12.5 points for the last place. A model that is always right would come to +12.5 points" in found


def test_calibration_needs_all_candidates():
    """Shares of the best five names of a thousand, called how sure the model is."""
    shut = cell([0] * 3, [0] * 3, "gates_at_zero")
    for scores, known in (((-1.0, -2, -3, -4, -5), False), ((-1.0, -2, -3, -5, -4), True), ((0.0, -1), True)):
        plain = cell([0] * 3, [0] * 3, candidates=tuple("xabcd")[: len(scores)], scores=scores)
        assert ("calibration" in verdict(plain, shut)) is known


def test_any_of_several_right_answers_counts():
    """The first annotator's answer alone taken for right: what others said is then a wrong answer that was copied."""
    outcomes = [
        outcome("cat", "dog", ["cat", "a"], target=["dog", "cat"]),
        outcome("cats", "b", ["a"], target=[["cats", "cat"]]),
    ]
    assert copying(outcomes) == {"answers": 0.5, "right": 0.5, "wrong": 0.0}
    assert calibration(outcomes)["accuracy"] == 1


def test_figures_of_single_answers():
    """Shares of the wrong whole, answers that differ by case alone, a calibration error with signs that cancel."""
    outcomes = [
        outcome("A cat", "a dog", ["a cat", "a bird"]),
        outcome("a dog", "a dog", ["a cat", "a dog"]),
        outcome("a fish", "a bird", ["a cat", "a bird"]),
        outcome("a bird", "a dog", ["a bird", "a cat"]),
    ]
    assert copying(outcomes) == {"answers": 0.75, "right": 0.5, "wrong": pytest.approx(2 / 3)}
    assert recency(outcomes) == {"last": 0.25, "others": 0.5, "bias": -0.25, "right": 0.5}
    assert recency([outcome("a", "a", ["a"])]) == dict.fromkeys(("last", "others", "bias", "right"), 0.0)
    sure, half = (np.log(0.9), np.log(0.1)), (np.log(0.5), np.log(0.5))
    found = calibration([outcome("a", "a", scores=half), outcome("a", "b", scores=sure)])
    assert found == {"confidence": pytest.approx(0.7), "accuracy": 0.5, "error": pytest.approx(0.7)}
    certain, surely = (0.0, -np.inf), (np.log(0.85), np.log(0.15))
    found = calibration([outcome("a", "a", scores=surely), outcome("a", "b", scores=certain)])
    assert found["error"] == pytest.approx((0.15 + 1) / 2), "the last bin holds what is certain, and no more"
    orders = [cell(answers, [0] * 4) for answers in ([0, 0, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1])]
    found = order_sensitivity(orders[0], [*orders[1:]])
    assert found == {"changed": 0.0, "std": 0.5}, "over three orders, as a sample"
