"""What the demonstrations contribute, from the cells of `icl_eval.diagnostics`: numbers, and a verdict in words.

All differences are paired: the same queries, with and without a change. An effect counts where its 95 % bootstrap
interval leaves zero out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from icl_eval.diagnostics import CONTROL_SHOTS, CONTROLS, ORDERS
from icl_eval.metrics import bootstrap_interval
from icl_eval.outcomes import Outcome
from icl_eval.results import Cell, Results

BINS = 10
"""of confidence, for the calibration error"""
WORDS = {
    "zero_shot": ("having none", "they help", "they harm", "no sign that they matter"),
    "gates_at_zero": (
        "shutting every picture out",
        "the pictures matter",
        "the pictures disturb",
        "no sign that pictures matter",
    ),
    "labels_permuted": (
        "permuting their answers",
        "it matters which answer belongs to which picture",
        "the right answers mislead",
        "no sign that it matters which answer belongs to which picture",
    ),
    "images_swapped": (
        "permuting their pictures",
        "the pairing with pictures is used",
        "the right pictures mislead",
        "no sign that the pairing with pictures is used",
    ),
    "random_query": (
        "showing another query's picture",
        "the query is looked at",
        "the query's picture misleads",
        "no sign that the query is looked at",
    ),
    "text_only": (
        "leaving their pictures away",
        "their pictures add to their texts",
        "their pictures take from their texts",
        "no sign that their pictures add to their texts",
    ),
}
"""change: what it is; what its cost says where it is positive, negative, or not measurable"""


class Effect(NamedTuple):
    """What a change costs: the score as it is less that under the change, and the 95 % interval where there is one."""

    cost: float
    interval: tuple[float, float] | None

    @property
    def sign(self) -> int:
        """1 or -1 where zero is outside the interval, else 0."""
        if self.interval is None:
            return 0
        return int(self.interval[0] > 0) - int(self.interval[1] < 0)


def diagnoses(results: Results) -> dict[str, dict[str, Any]]:
    """By task: `verdict` in words, and the numbers behind it; of tasks that were run with controls."""
    found = {}
    for name in results.tasks:
        cells = {cell.control: cell for cell in results.cells if cell.task == name and cell.shots == CONTROL_SHOTS}
        zero = next((cell for cell in results.cells if (cell.task, cell.shots) == (name, 0)), None)
        if None in cells and len(cells) > 1:
            found[name] = _diagnosis(cells[None], cells, zero)
    return found


def _diagnosis(plain: Cell, cells: Mapping[str | None, Cell], zero: Cell | None) -> dict[str, Any]:
    others = {control: cells[control] for control in (*CONTROLS, "text_only") if control in cells}
    if zero is not None:
        others = {"zero_shot": zero, **others}
    effects = {control: effect(plain, other) for control, other in others.items()}
    numbers: dict[str, Any] = {
        "shots": plain.shots,
        "score": plain.value,
        "costs": {name: {"cost": each.cost, "interval": each.interval} for name, each in effects.items()},
    }
    orders = [cells[name] for name in ORDERS if name in cells]
    if orders:
        numbers["order"] = order_sensitivity(plain, orders)
    numbers["copying"] = copying(plain.outcomes)
    numbers["recency"] = recency(plain.outcomes)
    if any(outcome.candidates for outcome in plain.outcomes[:1]):
        numbers["calibration"] = calibration(plain.outcomes)
    return {"verdict": _verdict(plain, effects, numbers), **numbers}


def effect(plain: Cell, other: Cell) -> Effect:
    """What the change from one cell to another costs."""
    before, after = plain.score.per_item, other.score.per_item
    interval = None
    if before is not None and after is not None:
        interval = bootstrap_interval(before - after)
    return Effect(plain.value - other.value, interval)


def order_sensitivity(plain: Cell, orders: Sequence[Cell]) -> dict[str, float]:
    """How much hangs on the order of the demonstrations.

    Returns:
        `changed`: share of queries that are answered otherwise in some other order; `std`: of the score over orders.
    """
    rows = zip(*(cell.outcomes for cell in (plain, *orders)), strict=True)
    changed = [len({outcome.answer for outcome in row}) > 1 for row in rows]
    scores = [cell.value for cell in (plain, *orders)]
    return {"changed": float(np.mean(changed)), "std": float(np.std(scores, ddof=1))}


def copying(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """How often answers are taken from a demonstration.

    Returns:
        `answers`: share of answers that are a demonstration's, word for word; `right`: share of queries of which a
        right answer is; `wrong`: share of the wrong answers that are a demonstration's.
    """
    copied, possible, wrong = [], [], []
    for outcome in outcomes:
        shown = set(map(_plain, outcome.labels))
        copied.append(_plain(outcome.answer) in shown)
        possible.append(outcome.right is not None and _plain(outcome.right) in shown)
        if outcome.right is not None and _plain(outcome.answer) != _plain(outcome.right):
            wrong.append(copied[-1])
    return {
        "answers": float(np.mean(copied)),
        "right": float(np.mean(possible)),
        "wrong": float(np.mean(wrong)) if wrong else 0.0,
    }


def recency(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Whether the last demonstration's answer is given more often than others'.

    Returns:
        `last`: share of answers that are the last demonstration's; `others`: the same, the mean over the other places;
        `bias`: their difference, 0 for a model that heeds no places.
    """
    last, others = [], []
    for outcome in outcomes:
        same = [_plain(label) == _plain(outcome.answer) for label in outcome.labels]
        if len(same) > 1:
            last.append(same[-1])
            others.append(np.mean(same[:-1]))
    if not last:
        return {"last": 0.0, "others": 0.0, "bias": 0.0}
    means = float(np.mean(last)), float(np.mean(others))
    return {"last": means[0], "others": means[1], "bias": means[0] - means[1]}


def calibration(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """How far the shares of the candidates' likelihoods are from how often they are right.

    Returns:
        `confidence`: mean share of the chosen candidate; `accuracy`; `error`: expected calibration error over `BINS`
        bins of equal width (Guo et al. 2017, arXiv 1706.04599).
    """
    confidences, right = [], []
    for outcome in outcomes:
        scores = np.array(outcome.scores)
        confidences.append(1 / np.exp(scores - scores.max()).sum())
        right.append(outcome.answer == outcome.right)
    confidence, correct = np.array(confidences), np.array(right, dtype=np.float64)
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = [abs((confidence - correct)[bins == each].sum()) for each in range(BINS)]
    return {
        "confidence": float(confidence.mean()),
        "accuracy": float(correct.mean()),
        "error": float(sum(gaps) / len(confidence)),
    }


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


# -- words -------------------------------------------------------------------------------------------------------------


def _verdict(plain: Cell, effects: Mapping[str, Effect], numbers: Mapping[str, Any]) -> str:
    sentences = [f"At {plain.shots} shots {plain.score.metric} is {plain.value:.3f}."]
    sentences += [_sentence(name, each) for name, each in effects.items()]
    if order := numbers.get("order"):
        sentences.append(
            f"Other orders of the demonstrations change the answer to {order['changed']:.0%} of the queries, and the "
            f"score by a standard deviation of {order['std']:.3f}."
        )
    copied, late = numbers["copying"], numbers["recency"]
    sentences.append(
        f"{copied['answers']:.0%} of the answers are a demonstration's, where {copied['right']:.0%} could rightly be; "
        f"of the wrong ones {copied['wrong']:.0%} are."
    )
    sentences.append(
        f"The last demonstration's answer is given in {late['last']:.0%} of the queries, that of another place in "
        f"{late['others']:.0%}."
    )
    if calibrated := numbers.get("calibration"):
        sentences.append(
            f"The model is {calibrated['confidence']:.0%} sure of answers of which {calibrated['accuracy']:.0%} are "
            f"right (calibration error {calibrated['error']:.3f})."
        )
    return " ".join([*sentences, _conclusion(effects)])


def _sentence(name: str, found: Effect) -> str:
    what, positive, negative, nothing = WORDS[name]
    meaning = {1: positive, -1: negative, 0: nothing}[found.sign]
    if found.interval is None:
        return f"Against {what} the score is {found.cost:+.3f} (no interval for this metric)."
    low, high = found.interval
    return f"{what[0].upper()}{what[1:]} costs {found.cost:.3f} ({low:.3f} – {high:.3f}): {meaning}."


def _conclusion(effects: Mapping[str, Effect]) -> str:
    """The verdict proper: what the demonstrations contribute."""
    helps = effects["zero_shot"].sign if "zero_shot" in effects else 0
    binds = any(effects[name].sign > 0 for name in ("labels_permuted", "images_swapped") if name in effects)
    if binds:
        return "Verdict: the model learns from the demonstrations what belongs to what."
    if helps > 0:
        return (
            "Verdict: the demonstrations help, but not by what belongs to what: they tell the form of the answers, or "
            "which answers there are."
        )
    if helps < 0:
        return "Verdict: the demonstrations harm."
    return "Verdict: that the demonstrations contribute anything cannot be seen here."
