"""POPE's five figures and MME's two."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import precision_recall_fscore_support

from flamingo import FlamingoError
from icl_eval.metrics import METRICS
from icl_eval.metrics.hallucination import mme_answer, pope_answer


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        ("Yes, there is.", True),
        ("No, there is none.", False),
        ("there is not", False),
        ("I see one. It is not red", True),  # the first sentence alone counts
        ("nothing", True),  # whole words count
        ("NO", True),
        ("", True),
    ],
)
def test_popes_script_reads_answers_so(text: str, yes: bool) -> None:
    """A more sensible reading, under which the figures are not those of the paper."""
    assert pope_answer(text) is yes


def test_popes_figures_are_those_of_scikit_learn() -> None:
    """Precision and recall exchanged, or the share of yes taken from the labels."""
    rng = np.random.default_rng(0)
    said, wanted = rng.choice(["yes", "no"], size=(2, 50), p=[0.7, 0.3]).tolist()
    score = METRICS["pope"].score(said, wanted)
    precision, recall, f1, _ = precision_recall_fscore_support(wanted, said, pos_label="yes", average="binary")
    values = {name: figure.value for name, figure in score.figures.items()}
    share = np.mean([one == other for one, other in zip(said, wanted, strict=True)])
    expected = {
        "accuracy": share,
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "yes_ratio": said.count("yes") / 50,
    }
    assert values == pytest.approx(expected)
    assert all(low <= value <= high for value, (low, high) in score.figures.values())


def test_answers_that_are_neither_are_counted() -> None:
    """An answer that counts as neither for the comma behind its yes, or none at all as an answer."""
    said = ["Yes, there is.", "no!", "It is not", "nothing", "", "YES"]
    assert METRICS["pope"].score(said, ["yes"] * 6).details["neither yes nor no"] == "2"


def test_a_model_that_never_says_yes_has_figures() -> None:
    """A division by zero, which ends a whole evaluation."""
    score = METRICS["pope"].score(["no", "no"], ["yes", "no"])
    assert [figure.value for figure in score.figures.values()] == [0.5, 0, 0, 0, 0]


def test_mme_counts_a_picture_when_both_its_questions_are_right() -> None:
    """Accuracy+ taken over questions, or a picture's questions told apart by their order."""
    said, wanted = ["Yes.", "yes", "no", "hmm"], ["yes", "yes", "no", "yes"]
    score = METRICS["mme"].score(said, wanted, groups=["a", "b", "a", "b"])
    values = {name: figure.value for name, figure in score.figures.items()}
    assert values == {"accuracy": 0.75, "accuracy_plus": 0.5, "score": 125}
    assert score.details["neither yes nor no"] == "1"
    assert METRICS["mme"](said, wanted).tolist() == [1, 1, 1, 0]
    assert mme_answer("I say no") is None


def test_mme_needs_the_pictures_of_its_questions() -> None:
    """Accuracy+ of pictures of which a question is missing: too high without a word."""
    with pytest.raises(FlamingoError, match="no groups, expected the picture of each query"):
        METRICS["mme"].score(["yes", "no"], ["yes", "no"])
    with pytest.raises(FlamingoError, match="picture 'a' has 1 queries, expected its two questions"):
        METRICS["mme"].score(["yes", "no"], ["yes", "no"], groups=["a", "b"])
    for name in ("pope", "mme"):
        with pytest.raises(FlamingoError, match="target 1 is 'maybe', expected 'yes' or 'no'"):
            METRICS[name](["yes", "no"], ["yes", "maybe"])
