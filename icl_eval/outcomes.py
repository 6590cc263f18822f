"""What a model answered to one query, as its task's metric takes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from icl_eval.datasets import Example
from icl_eval.datasets.vqa import raw_and_stemmed
from icl_eval.demonstrations import Episode
from icl_eval.engine import TIE
from icl_eval.metrics import METRICS
from icl_eval.prompts import Prompt, fingerprint
from icl_eval.questions import Questions
from icl_eval.tasks import Task

MANY = 100
"""with more candidates than this, only the best `BEST` are searched for and kept"""
BEST = 5
DECIMALS = 6
"""that are kept of a score, unless it was computed in float64"""
DECIMALS_OF_FLOAT64 = 12


@dataclass(frozen=True)
class Outcome:
    """What a model was asked in one query of a cell, and what it answered.

    Attributes:
        query_id: names the query within its task; the same for all shots and controls.
        query: id of the example whose media are shown in the query.
        demonstrations: ids of the examples whose media are shown before it, in order; `labels`: their answers.
        prompt: SHA-256 of the rendered prompt and of these ids, 16 hexadecimal digits.
        prediction, target: as the metric of the task takes them.
        answer: the answer in words; `right`: a right one, where one is known; `generated`: all that the model said,
            where the task keeps a part of it (`icl_eval.metrics.kept`).
        group: the media that it asks about, where several queries may ask about the same; queries of a group are no
            independent evidence.
        candidates: the answers to choose among, with `scores`, the log-likelihood of each in nats; of more than `MANY`
            the best ones alone, the best first. None for free answers.
        tied: whether the two best scores are at most `TIE` apart; then the first of the best is chosen.
    """

    query_id: str
    query: str
    demonstrations: tuple[str, ...]
    labels: tuple[str, ...]
    prompt: str
    prediction: Any
    target: Any
    answer: str
    right: str | None = None
    generated: str | None = None
    group: str | None = None
    candidates: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    tied: bool = False

    @staticmethod
    def of(line: dict[str, Any]) -> Outcome:
        """From plain data, as JSON gives it."""
        known = {field.name for field in fields(Outcome)}
        lists = ("demonstrations", "labels", "candidates", "scores")
        values: dict[str, Any] = {key: each for key, each in line.items() if key in known}
        return Outcome(**{**values, **{key: tuple(values[key]) for key in lists if key in values}})


def decide(scores: np.ndarray) -> tuple[int, bool]:
    """The first of the candidates whose scores are at most `TIE` below the best, and whether there are several."""
    best = scores >= scores.max() - TIE
    return int(best.argmax()), bool(best.sum() > 1)


def the_best(scores: np.ndarray) -> list[int]:
    """The `BEST` best candidates, each decided among those left, so that noise orders none that are tied."""
    left, found = list(range(len(scores))), list[int]()
    while left and len(found) < BEST:
        place, _ = decide(scores[left])
        found.append(left.pop(place))
    return found


def top_k(task: Task, candidates: Sequence[str]) -> int | None:
    """How many of the best candidates are needed; None: all scores."""
    if len(candidates) <= MANY or task.ensemble > 1 or METRICS[task.metric].takes not in ("index", "ranking"):
        return None
    return BEST


def ranked(
    questions: Questions, episode: Episode, prompt: Prompt, scores: np.ndarray, decimals: int = DECIMALS
) -> Outcome:
    """The outcome of a query with candidates.

    Args:
        questions: whose query it is.
        episode, prompt: the query.
        scores: (candidates,) log-likelihoods; −inf where one was never needed.
        decimals: that are kept of each score.
    """
    chosen, tied = decide(scores)
    best = the_best(scores)
    takes = METRICS[questions.task.metric].takes
    prediction: Any = {
        "index": lambda: chosen,
        "ranking": lambda: best,
        "score": lambda: round(_log_odds(scores), decimals),
        "text": lambda: episode.candidates[chosen],
    }[takes]()
    kept = range(len(scores)) if len(scores) <= MANY else best
    return _outcome(
        questions,
        episode,
        prompt,
        prediction,
        answer=episode.candidates[chosen],
        candidates=tuple(episode.candidates[place] for place in kept),
        scores=tuple(round(float(scores[place]), decimals) for place in kept),
        tied=tied,
    )


def generated(questions: Questions, episode: Episode, prompt: Prompt, text: str) -> Outcome:
    """The outcome of a query that is answered freely."""
    decoding = questions.task.generate
    kept = text if decoding is None else decoding.kept(text)
    return _outcome(questions, episode, prompt, kept, answer=kept, generated=None if kept == text else text)


def _outcome(questions: Questions, episode: Episode, prompt: Prompt, prediction: Any, **answer: Any) -> Outcome:
    right = None if episode.target is None else episode.candidates[episode.target]
    return Outcome(
        query_id=episode.query_id,
        query=prompt.pictured.id,
        demonstrations=prompt.demonstrations,
        labels=prompt.answers,
        prompt=fingerprint(questions.chunks(prompt), prompt),
        prediction=prediction,
        target=_target(questions.task, episode),
        right=right if right is not None else next(iter(episode.query.answers), episode.query.label),
        group=None if questions.task.ways else "|".join(episode.query.media) or episode.query_id,
        **answer,
    )


def _target(task: Task, episode: Episode) -> Any:
    """What the metric compares with."""
    metric, query = METRICS[task.metric], episode.query
    if metric.takes in ("index", "ranking"):
        return episode.target
    if metric.takes == "score":  # of the positive class, which is the last candidate
        return int(episode.target == len(episode.candidates) - 1)
    return TARGETS.get(metric.name, _answers)(query)


def _answers(query: Example) -> list[str]:
    return list(query.answers)


def _label(query: Example) -> str | None:
    return query.label


def _raw_and_stemmed(query: Example) -> list[list[str]]:
    return [list(pair) for pair in raw_and_stemmed(query)]


TARGETS = {"pope": _label, "mme": _label, "ok_vqa_accuracy": _raw_and_stemmed}
"""What metrics of texts compare with, where it is not all right answers"""


def _log_odds(scores: np.ndarray) -> float:
    """Of the last candidate against all others."""
    return float(scores[-1] - np.logaddexp.reduce(scores[:-1]))
