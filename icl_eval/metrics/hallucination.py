"""Yes or no about a picture: POPE's five figures and MME's two, after their authors' scripts.

POPE: Li et al. 2023 (arXiv 2305.10355); each of its splits is a task. MME: Fu et al. 2023 (arXiv 2306.13394), two
questions a picture; its tables show `score` for each subtask, and sums of it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from flamingo.errors import FlamingoError
from icl_eval.metrics.bootstrap import weighted_mean
from icl_eval.metrics.metric import Metric, Prepared


def pope_answer(text: str) -> bool:
    """Whether POPE's script takes an answer as yes: unless its first sentence has one of the words no, No and not.

    So an answer that is neither counts as yes, an empty one too.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"no", "No", "not"} & set(words)


def mme_answer(text: str) -> bool | None:
    """Whether MME's script takes an answer as yes (True) or no (False): by its first four letters; else None."""
    start = text.lower()[:4]
    return True if "yes" in start else False if "no" in start else None


def _prepare_pope(predictions: Sequence[str], targets: Sequence[str], _: Sequence[Any] | None) -> Prepared:
    said, wanted = np.array(list(map(pope_answer, predictions))), _wanted("pope", targets)
    outcomes = np.stack([said & wanted, said & ~wanted, ~said & ~wanted, ~said & wanted], axis=1).astype(np.float64)

    def figures(weights: np.ndarray) -> np.ndarray:
        hit, alarm, quiet, miss = (weights @ outcomes).T
        columns = [
            (hit + quiet) / weights.sum(axis=1),
            _ratio(hit, hit + alarm),
            _ratio(hit, hit + miss),
            _ratio(2 * hit, 2 * hit + alarm + miss),
            (hit + alarm) / weights.sum(axis=1),
        ]
        return np.stack(columns, axis=1)

    neither = sum(re.search(r"\b(yes|no|not)\b", text, re.IGNORECASE) is None for text in predictions)
    details = {
        "rules": "POPE's script: yes unless the first sentence says no or not",
        "neither yes nor no": str(neither),
    }
    names = ("accuracy", "precision", "recall", "f1", "yes_ratio")
    return Prepared(names, figures, (said == wanted).astype(np.float64), details=details)


def _prepare_mme(predictions: Sequence[str], targets: Sequence[str], groups: Sequence[Any] | None) -> Prepared:
    said, wanted = [mme_answer(text) for text in predictions], _wanted("mme", targets)
    right = np.array([answer == bool(truth) for answer, truth in zip(said, wanted, strict=True)], dtype=np.float64)
    details = {"rules": "MME's script: the first four letters decide", "neither yes nor no": str(said.count(None))}
    if groups is None:
        return Prepared(("accuracy",), weighted_mean(right), right, details=details)
    questions = Counter(groups)
    for group, count in questions.items():
        if count != 2:
            raise FlamingoError(f"metric mme: picture {group!r} has {count} queries, expected its two questions")
    points: Counter[Any] = Counter()
    for group, value in zip(groups, right, strict=True):
        points[group] += int(value)
    both = np.array([points[group] == 2 for group in groups], dtype=np.float64)
    means = weighted_mean(np.stack([right, both, 100 * (right + both)], axis=1))
    return Prepared(("accuracy", "accuracy_plus", "score"), means, right, details=details)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """0 where nothing is there to be a part of."""
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def _wanted(metric: str, targets: Sequence[Any]) -> np.ndarray:
    for place, target in enumerate(targets):
        if target not in ("yes", "no"):
            raise FlamingoError(f"metric {metric}: target {place} is {target!r}, expected 'yes' or 'no'")
    return np.array([target == "yes" for target in targets])


POPE = Metric("pope", "text", "'yes' or 'no'", _prepare_pope)
MME = Metric("mme", "text", "'yes' or 'no'", _prepare_mme, grouped=True)
