"""What the demonstrations contribute, from the cells of `icl_eval.diagnostics`: numbers, and a verdict in words.

All differences are paired: the same queries, with and without a change. An effect counts where its 95 % bootstrap
interval leaves zero out and a randomisation test agrees (p < .05): the interval alone is too narrow for few queries.
Queries about one picture count as one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from icl_eval.diagnostics import CONTROL_SHOTS, CONTROLS, ORDERS
from icl_eval.engine import TIE
from icl_eval.metrics import METRICS
from icl_eval.metrics.bootstrap import Figures, bootstrap, weighted_mean
from icl_eval.metrics.paired import SIGNIFICANT, Difference, of_scores, of_values, randomisation_p
from icl_eval.outcomes import BEST, Outcome
from icl_eval.results import Cell, Results

BINS = 10
"""of confidence, for the calibration error"""
NEARLY_ALL = 0.95
"""of the answers of a cell: where so many are the same, it is said"""
CLASSIFYING = ("exact_match", "pope", "mme")
"""metrics of tasks that classify though their answers are not ranked"""
WORDS = {
    "zero_shot": ("having no demonstrations", "they help", "they harm", "no sign that they matter"),
    "two_texts": ("having two of their texts alone", "they help", "they harm", "no sign that they matter"),
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
    """What a change costs: the score as it is less that under the change, its 95 % interval, and p of no difference."""

    cost: float
    interval: tuple[float, float]
    p: float

    @property
    def sign(self) -> int:
        """1 or -1 where the cost is no chance, else 0."""
        if self.p >= SIGNIFICANT:
            return 0
        return int(self.interval[0] > 0) - int(self.interval[1] < 0)


def diagnoses(results: Results) -> dict[str, dict[str, Any]]:
    """By task: `verdict` in words, and the numbers behind it; of tasks that were run with controls."""
    found = {}
    for name in results.tasks:
        cells = {cell.control: cell for cell in results.cells if cell.task == name and cell.shots == CONTROL_SHOTS}
        zero = next((cell for cell in results.cells if (cell.task, cell.shots, cell.control) == (name, 0, None)), None)
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
        "costs": {name: each._asdict() for name, each in effects.items()},
    }
    orders = [cells[name] for name in ORDERS if name in cells]
    if orders:
        numbers["order"] = order_sensitivity(plain, orders)
    numbers["copying"] = copying(plain.outcomes)
    numbers["recency"] = recency(plain.outcomes)
    if plain.outcomes[0].candidates and not _cut(plain.outcomes):
        numbers["calibration"] = calibration(plain.outcomes)
    two_texts = zero is not None and zero.zero_shot == "text_only"
    return {"verdict": _verdict(plain, effects, numbers, two_texts=two_texts), **numbers}


def effect(plain: Cell, other: Cell) -> Effect:
    """What the change from one cell to another costs."""
    groups = [outcome.group for outcome in plain.outcomes]
    together = groups if len(set(groups)) < len(groups) and None not in groups else None
    costs, swapped = _costs(plain, other)
    ((low, high),) = bootstrap(costs, len(groups), groups=together).tolist()
    p = randomisation_p(swapped, len(groups), groups=together)
    return Effect(plain.value - other.value, (low, high), p)


def _costs(plain: Cell, other: Cell) -> tuple[Figures, Difference]:
    """The cost under weights of the queries, and where answers are exchanged."""
    before, after = plain.score.per_item, other.score.per_item
    if before is not None and after is not None:
        return weighted_mean(before - after), of_values(after, before)
    metric = METRICS[plain.score.metric]
    targets = [outcome.target for outcome in plain.outcomes]
    one, two = ([outcome.prediction for outcome in cell.outcomes] for cell in (plain, other))
    first, second = (metric.prepared(predictions, targets).figures for predictions in (one, two))
    return lambda weights: (first(weights) - second(weights))[:, :1], of_scores(metric, two, one, targets)


def one_answer(cell: Cell) -> tuple[str, int] | None:
    """The answer that nearly all queries of a cell get, and how many; None where there is none, or answers are free.

    No more outcomes are read than it takes to know that there is none: a tenth, of answers of two kinds alike.
    """
    counts: Counter[str] = Counter()
    most, queries = "", len(cell.outcomes)
    for place, outcome in enumerate(cell.outcomes, start=1):
        if place == 1 and not outcome.candidates and cell.score.metric not in CLASSIFYING:
            return None
        counts[outcome.answer] += 1
        most = max(most, outcome.answer, key=counts.__getitem__)
        if place - counts[most] > (1 - NEARLY_ALL) * queries:
            return None
    return most, counts[most]


def in_words(cell: Cell, found: tuple[str, int]) -> str:
    """What `one_answer` found: "false" 989 times of 989."""
    answer, times = found
    return f'"{answer}" {times:,} times of {len(cell.outcomes):,}'


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
        shown, right, answer = set(map(_plain, outcome.labels)), _right(outcome), _plain(outcome.answer)
        copied.append(answer in shown)
        possible.append(bool(right & shown))
        if right and answer not in right:
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
        `bias`: their difference; `right`: the difference for a model that is always right. That is 0, and so is the
        bias of a model that heeds no places, where demonstrations are drawn at random; with RICES, which puts the most
        similar one last, it is not.
    """
    rows = [np.zeros(4)]
    for outcome in outcomes:
        labels = list(map(_plain, outcome.labels))
        if len(labels) > 1:
            answers = {_plain(outcome.answer)}, _right(outcome)
            given, right = ([label in several for label in labels] for several in answers)
            rows.append(np.array([given[-1], np.mean(given[:-1]), right[-1], np.mean(right[:-1])]))
    last, others, right_last, right_others = (np.sum(rows, axis=0) / max(1, len(rows) - 1)).tolist()
    return {"last": last, "others": others, "bias": last - others, "right": right_last - right_others}


def calibration(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """How far candidates' shares of the likelihoods, as the task normalises them, are from how often they are right.

    Returns:
        `confidence`: mean share of the chosen candidate; `accuracy`; `error`: expected calibration error over `BINS`
        bins of equal width (Guo et al. 2017, arXiv 1706.04599).
    """
    confidences, right = [], []
    for outcome in outcomes:
        scores = np.array(outcome.scores)
        confidences.append(1 / np.exp(scores - scores.max()).sum())
        right.append(_plain(outcome.answer) in _right(outcome))
    confidence, correct = np.array(confidences), np.array(right, dtype=np.float64)
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = [abs((confidence - correct)[bins == each].sum()) for each in range(BINS)]
    return {
        "confidence": float(confidence.mean()),
        "accuracy": float(correct.mean()),
        "error": float(sum(gaps) / len(confidence)),
    }


def _cut(outcomes: Sequence[Outcome]) -> bool:
    """Whether the best of many candidates alone were kept: then all stand in order, and their shares are unknown."""
    return all(len(outcome.scores) == BEST and bool((np.diff(outcome.scores) <= TIE).all()) for outcome in outcomes)


def _right(outcome: Outcome) -> set[str]:
    """All right answers that are known: where answers are compared as texts, the target's (OK-VQA's are in pairs)."""
    listed = outcome.target if isinstance(outcome.target, list | tuple) else []
    texts = [text for each in listed for text in ([each] if isinstance(each, str) else each)]
    return {_plain(text) for text in (outcome.right, *texts) if text is not None}


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


# -- words -------------------------------------------------------------------------------------------------------------


def _verdict(plain: Cell, effects: Mapping[str, Effect], numbers: Mapping[str, Any], *, two_texts: bool) -> str:
    sentences = [f"At {plain.shots} shots {plain.score.metric} is {plain.value:.3f}."]
    if found := one_answer(plain):
        sentences.append(f"The answers hardly vary: {in_words(plain, found)}.")
    sentences += _costs_in_words(
        {"two_texts" if two_texts and name == "zero_shot" else name: each for name, each in effects.items()}
    )
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
        f"The model gives the answer of the last demonstration in {late['last']:.0%} of the queries, and that of any "
        f"one before it in {late['others']:.0%} on average: {100 * late['bias']:+.1f} points for the last place. A "
        f"model that is always right would come to {100 * late['right']:+.1f} points on the same queries."
    )
    if calibrated := numbers.get("calibration"):
        sentences.append(
            f"The model is {calibrated['confidence']:.0%} sure of answers of which {calibrated['accuracy']:.0%} are "
            f"right (calibration error {calibrated['error']:.3f})."
        )
    return " ".join([*sentences, _conclusion(effects)])


def _costs_in_words(effects: Mapping[str, Effect]) -> list[str]:
    """A sentence for each change, but one for all those, if there are several, under which no score changes."""
    nothing = [name for name, each in effects.items() if not np.round([each.cost, *each.interval], 3).any()]
    if len(nothing) < 2:
        return [_sentence(name, each) for name, each in effects.items()]
    sentences = [_sentence(name, each) for name, each in effects.items() if name not in nothing]
    start = "No difference to the score comes from" if sentences else "No control makes any difference to the score:"
    return [*sentences, f"{start} {', '.join(WORDS[name][0] for name in nothing)}."]


def _sentence(name: str, found: Effect) -> str:
    what, positive, negative, nothing = WORDS[name]
    meaning = {1: positive, -1: negative, 0: nothing}[found.sign]
    low, high = found.interval
    return f"{what[0].upper()}{what[1:]} costs {found.cost:.3f} ({low:.3f} – {high:.3f}; p {found.p:.2g}): {meaning}."


def _conclusion(effects: Mapping[str, Effect]) -> str:
    """The verdict proper: what the demonstrations contribute."""
    helps = effects["zero_shot"].sign if "zero_shot" in effects else 0
    links = [effects[name].sign for name in ("labels_permuted", "images_swapped") if name in effects]
    if max(links, default=0) > 0:
        but = ", but is better off without them" if helps < 0 else ""
        return f"Verdict: the model learns from the demonstrations what belongs to what{but}."
    if helps > 0:
        return "Verdict: the demonstrations help; " + (
            "that it matters what belongs to what cannot be seen here: they may only tell the form of the answers, or "
            "which answers there are."
            if links
            else "whether it matters what belongs to what was not tried."
        )
    if helps < 0:
        return "Verdict: the demonstrations harm."
    return "Verdict: that the demonstrations contribute anything cannot be seen here."
