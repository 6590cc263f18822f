"""VQA accuracy with the normalisation of the official script, and OK-VQA's with its stems.

The rule (Antol et al. 2015, arXiv 1505.00468; visualqa.org/evaluation): an answer counts min(matching annotators / 3,
1), averaged over all ways to leave one annotator out. What the official script does beyond its description is kept,
since published numbers hold it: see `normalise` and `UNANIMOUS`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from flamingo.errors import FlamingoError
from icl_eval.metrics.bootstrap import weighted_mean
from icl_eval.metrics.classification import mean_metric
from icl_eval.metrics.metric import Metric, Prepared
from icl_eval.metrics.stems import stem

UNANIMOUS = ("as they are", "normalised")
"""How answers are compared where all annotators wrote the same: the official script leaves both sides as they are, so
that "Yes." misses ten times "yes"; OpenFlamingo's copy of it normalises them here too."""

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = "none zero one two three four five six seven eight nine ten"
_ARTICLES = frozenset(["a", "an", "the"])
_CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't "
    "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've "
    "we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's "
    "who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've "
    "you'll you're you've"
)


def _respelled() -> dict[str, str]:
    """Words that are spelled otherwise: numbers in digits, contractions that lack one of their apostrophes."""
    words = {word: str(max(0, place - 1)) for place, word in enumerate(_NUMBERS.split())}
    for contraction in _CONTRACTIONS.split():
        for place in (found.start() for found in re.finditer("'", contraction)):
            words[contraction[:place] + contraction[place + 1 :]] = contraction
    words["somebody'd"] = "somebodyd"  # the script's one entry that takes an apostrophe away
    return words


_RESPELLED = _respelled()


def normalise(answer: str) -> str:
    """An answer as the official script compares it.

    Punctuation but apostrophes and colons becomes a space, or nothing where it stands beside one, or where a comma
    stands between two digits anywhere in the answer; full stops go unless a digit follows (the first 32 of them: the
    script hands a flag over as a count); lower case; number words up to ten in digits; no articles; contractions with
    apostrophes.
    """
    text = _trimmed(answer)
    tight = re.search(r"\d,\d", text)
    spaced = text
    for mark in _PUNCTUATION:
        beside = f"{mark} " in text or f" {mark}" in text
        spaced = spaced.replace(mark, "" if beside or tight else " ")
    words = re.sub(r"\.(?!\d)", "", spaced, count=32).lower().split()
    return " ".join(_RESPELLED.get(word, word) for word in words if word not in _ARTICLES)


def _trimmed(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def vqa_accuracy(
    predictions: Sequence[str], targets: Sequence[Sequence[str]], *, unanimous: str = UNANIMOUS[0]
) -> np.ndarray:
    """The official accuracy of each question.

    Args:
        predictions: (Q,) answers.
        targets: (Q,) the answers of each question's annotators, ten in VQA, as the annotation file has them.
        unanimous: one of `UNANIMOUS`.

    Returns:
        (Q,) from 0 to 1.
    """
    rows = zip(predictions, targets, strict=True)
    return np.array([_accuracy(prediction, answers, unanimous) for prediction, answers in rows])


def _accuracy(prediction: str, answers: Sequence[str], unanimous: str) -> float:
    given = [_trimmed(answer) for answer in answers]
    said = _trimmed(prediction)
    if unanimous == "normalised" or len(set(given)) > 1:
        given, said = [normalise(answer) for answer in given], normalise(said)
    matches = [answer == said for answer in given]
    return sum(min(1, (sum(matches) - match) / 3) for match in matches) / len(matches)


def ok_vqa_accuracy(prediction: str, answers: Sequence[tuple[str, str]]) -> float:
    """OK-VQA's accuracy of one question (Marino et al. 2019, arXiv 1906.00067, annotations 1.1).

    Annotations hold each answer as it was given (`raw_answer`) and stemmed (`answer`); they are compared by stems. A
    prediction that an annotator gave word for word has that annotator's stem; others are stemmed by `stems.stem`, since
    the procedure behind the annotations is not published.

    Args:
        prediction: an answer.
        answers: (raw answer, stemmed answer) of each annotator.
    """
    published = {normalise(raw): stemmed for raw, stemmed in answers}
    said = normalise(prediction)
    stemmed = published.get(said) or stem(said)
    return _accuracy(stemmed, [answer for _, answer in answers], "normalised")


def _pairs(place: int, target: Any) -> list[tuple[str, str]]:
    """A target of OK-VQA as pairs; answers without their raw form stand for themselves."""
    listed = isinstance(target, Sequence) and not isinstance(target, str)
    pairs = [(answer, answer) if isinstance(answer, str) else tuple(answer) for answer in target] if listed else []
    if len(pairs) < 2 or not all(len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in pairs):
        expected = "the answers of at least two annotators, each a text or a pair (raw, stemmed)"
        raise FlamingoError(f"metric ok_vqa_accuracy: target {place} is {target!r}, expected {expected}")
    return pairs


def _prepare_ok_vqa(predictions: Sequence[str], targets: Sequence[Any], _: Sequence[Any] | None) -> Prepared:
    rows = zip(predictions, (_pairs(place, target) for place, target in enumerate(targets)), strict=True)
    per_item = np.array([ok_vqa_accuracy(prediction, answers) for prediction, answers in rows])
    details = {
        "rules": "official normalisation, leave one out; where unanimous: normalised",
        "stems": "annotators' own where they gave the answer, else flamingo-icl stems 2",
    }
    return Prepared(("ok_vqa_accuracy",), weighted_mean(per_item), per_item, details=details)


def _checked(unanimous: str, predictions: Sequence[str], targets: Sequence[Sequence[str]]) -> np.ndarray:
    for place, answers in enumerate(targets):
        if len(answers) < 2:
            expected = "of at least two annotators, since one is left out; exact_match compares with a single answer"
            raise FlamingoError(f"vqa_accuracy: target {place} holds {len(answers)} answer, expected those {expected}")
    return vqa_accuracy(predictions, targets, unanimous=unanimous)


def _vqa_metric(name: str, unanimous: str) -> Metric:
    rules = f"official normalisation, leave one out; where unanimous: {unanimous}"
    return mean_metric(name, "text", "the answers of all annotators", partial(_checked, unanimous), rules=rules)


VQA_ACCURACY = _vqa_metric("vqa_accuracy", UNANIMOUS[0])
VQA_ACCURACY_OPEN_FLAMINGO = _vqa_metric("vqa_accuracy_open_flamingo", UNANIMOUS[1])
OK_VQA_ACCURACY = Metric("ok_vqa_accuracy", "text", "(raw answer, stemmed answer) of all annotators", _prepare_ok_vqa)
