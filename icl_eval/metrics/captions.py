"""Captions: CIDEr, BLEU, ROUGE-L, and METEOR where Java is, as COCO's evaluation computes them.

CIDEr-D (Vedantam et al. 2015, arXiv 1411.5726), BLEU (Papineni et al. 2002), ROUGE-L (Lin 2004), METEOR 1.5 (Denkowski
and Lavie 2014); as in Chen et al. 2015 (arXiv 1504.00325), whose code lives on as pycocoevalcap. The first three are
written anew, tested equal to it: it brings 100 MB of Java archives, needs Java to split words, and gives corpus figures
without the counts from which a bootstrap could be made. METEOR is left to its own Java archive.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from icl_eval.metrics.bootstrap import Figures, weighted_mean
from icl_eval.metrics.metric import Metric, Prepared, string_lists
from icl_eval.metrics.tokenizer import NAME, tokenize

ORDERS = 4
"""n-grams of 1 to 4 words."""

Words = Sequence[str]
Ngrams = Counter[tuple[str, ...]]


def ngrams(words: Words) -> list[Ngrams]:
    """How often each n-gram occurs, for n from 1 to `ORDERS`."""
    return [
        Counter(tuple(words[start : start + order]) for start in range(len(words) - order + 1))
        for order in range(1, ORDERS + 1)
    ]


# -- CIDEr -------------------------------------------------------------------------------------------------------------


def cider(candidates: Sequence[Words], references: Sequence[Sequence[Words]], *, sigma: float = 6.0) -> np.ndarray:
    """CIDEr-D of each picture.

    n-grams are weighed by their rarity among these pictures' references, so that a score depends on the set: a few
    pictures give no meaningful one, a single one always 0.

    Args:
        candidates: (Q,) captions in words.
        references: (Q,) the references of each picture in words.
        sigma: width in words of the penalty for another length.

    Returns:
        (Q,) from 0 to 10; the corpus figure is their mean.
    """
    counted = [[ngrams(words) for words in several] for several in references]
    frequency: Counter[tuple[str, ...]] = Counter()
    for several in counted:
        frequency.update({gram for one in several for counts in one for gram in counts})
    total = math.log(len(references))
    rarity = {gram: total - math.log(count) for gram, count in frequency.items()}

    def vectors(counts: list[Ngrams]) -> list[dict[tuple[str, ...], float]]:
        return [{gram: count * rarity.get(gram, total) for gram, count in each.items()} for each in counts]

    scores = []
    for candidate, several in zip(map(ngrams, candidates), counted, strict=True):
        own = vectors(candidate)
        similarities = [_similarity(own, vectors(one), _length(candidate) - _length(one), sigma) for one in several]
        scores.append(10 * math.fsum(similarities) / len(several))
    return np.array(scores)


def _length(counts: list[Ngrams]) -> int:
    """In pairs of words, as the authors' code has it."""
    return counts[1].total()


def _similarity(
    own: list[dict[tuple[str, ...], float]], other: list[dict[tuple[str, ...], float]], longer: int, sigma: float
) -> float:
    """Mean over n of the clipped cosine, with the length penalty."""
    cosines = []
    for mine, theirs in zip(own, other, strict=True):
        shared = math.fsum(min(weight, theirs[gram]) * theirs[gram] for gram, weight in mine.items() if gram in theirs)
        norm = math.hypot(*mine.values()) * math.hypot(*theirs.values())
        cosines.append(shared / norm if norm else 0.0)
    return math.fsum(cosines) / len(cosines) * math.exp(-(longer**2) / (2 * sigma**2))


# -- BLEU --------------------------------------------------------------------------------------------------------------


def bleu(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> Figures:
    """BLEU of 1 to `ORDERS` words of the whole corpus as a function of weights of its Q pictures: see `Figures`.

    Counts are summed over the corpus, so that it is no mean of values of pictures. The reference length is the one
    closest to the candidate's, the shorter of two.
    """
    pairs = zip(candidates, references, strict=True)
    counts = np.array([_bleu_counts(candidate, several) for candidate, several in pairs], dtype=np.float64)

    def figures(weights: np.ndarray) -> np.ndarray:
        summed = weights @ counts  # lengths, then matches and n-grams of each order
        length, wanted = summed[:, :1], summed[:, 1:2]
        matched, present = summed[:, 2 : 2 + ORDERS], summed[:, 2 + ORDERS :]
        # The two smallest numbers keep a quotient of nothing at 0, and are those of the COCO code.
        precisions = np.cumprod((matched + 1e-15) / (present + 1e-9), axis=1) ** (1 / np.arange(1, ORDERS + 1))
        brevity = np.minimum(1, np.exp(1 - (wanted + 1e-9) / (length + 1e-15)))
        return precisions * brevity

    return figures


def _bleu_counts(candidate: Words, references: Sequence[Words]) -> list[int]:
    most: Ngrams = Counter()
    for reference in references:
        for counts in ngrams(reference):
            most |= counts
    own = ngrams(candidate)
    closest = min((abs(len(reference) - len(candidate)), len(reference)) for reference in references)[1]
    matched = [sum(min(count, most[gram]) for gram, count in counts.items()) for counts in own]
    return [len(candidate), closest, *matched, *(counts.total() for counts in own)]


# -- ROUGE-L -----------------------------------------------------------------------------------------------------------


def rouge_l(candidates: Sequence[Words], references: Sequence[Sequence[Words]], *, beta: float = 1.2) -> np.ndarray:
    """ROUGE-L of each picture, (Q,) from 0 to 1; the corpus figure is their mean.

    The F-measure of the best precision and the best recall of the longest common subsequence, which need not come from
    the same reference; recall weighs `beta` times as much.
    """
    scores = []
    for candidate, several in zip(candidates, references, strict=True):
        common = [_common_subsequence(candidate, reference) for reference in several]
        precision = max(common) / max(1, len(candidate))
        recall = max(length / max(1, len(reference)) for length, reference in zip(common, several, strict=True))
        whole = recall + beta**2 * precision
        scores.append((1 + beta**2) * precision * recall / whole if whole else 0.0)
    return np.array(scores)


def _common_subsequence(one: Words, other: Words) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(other) + 1)
    for word in one:
        before = 0  # the entry to the upper left
        for place, another in enumerate(other, 1):
            before, row[place] = row[place], before + 1 if word == another else max(row[place], row[place - 1])
    return row[-1]


# -- METEOR ------------------------------------------------------------------------------------------------------------


def meteor(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> tuple[float | None, str]:
    """METEOR of the corpus by its own Java program, which the package pycocoevalcap brings.

    Returns:
        The figure and how it came about; None and why not, where Java or the package is missing or the program fails.
    """
    if shutil.which("java") is None:
        return None, "absent: it needs Java, and no program java was found"
    try:
        from pycocoevalcap.meteor.meteor import Meteor
    except ImportError:
        return None, "absent: it needs the package pycocoevalcap (pip install 'flamingo-icl[meteor]')"
    try:
        program = Meteor()
        wanted = {place: [" ".join(words) for words in several] for place, several in enumerate(references)}
        figure, _ = program.compute_score(wanted, {place: [" ".join(words)] for place, words in enumerate(candidates)})
    except (OSError, ValueError) as error:
        return None, f"absent: its program failed: {error}"
    return float(figure), "METEOR 1.5 of pycocoevalcap, without an interval: its figure is no mean over pictures"


# -- the metric --------------------------------------------------------------------------------------------------------


def prepare_captions(
    predictions: Sequence[str],
    targets: Sequence[Sequence[str]],
    *,
    split: Callable[[str], str] = tokenize,
    tokenizer: str = NAME,
    with_meteor: bool = True,
) -> Prepared:
    """All figures of captions.

    Args:
        predictions: (Q,) captions.
        targets: (Q,) the references of each picture.
        split: a caption → its words joined by spaces; `str` for captions that are split already.
        tokenizer: how results call it.
        with_meteor: whether to run Java for METEOR.
    """
    candidates = [split(caption).split() for caption in predictions]
    references = [[split(reference).split() for reference in several] for several in targets]
    of_cider = cider(candidates, references)
    means = weighted_mean(np.stack([of_cider, rouge_l(candidates, references)], axis=1))
    of_bleu = bleu(candidates, references)
    details = {
        "tokenizer": tokenizer,
        "cider": f"CIDEr-D, rarity of n-grams among the references of these {len(targets)} pictures, "
        "the same in all draws of the bootstrap",
    }
    figure, details["meteor"] = meteor(candidates, references) if with_meteor else (None, "absent: not asked for")
    whole = {} if figure is None else {"meteor": figure}
    names = ("cider", "rouge_l", *(f"bleu_{order}" for order in range(1, ORDERS + 1)))
    return Prepared(names, lambda weights: np.hstack([means(weights), of_bleu(weights)]), of_cider, whole, details)


def _metric(name: str, with_meteor: bool) -> Metric:
    def prepare(predictions: Sequence[Any], targets: Sequence[Any], _: Sequence[Any] | None) -> Prepared:
        string_lists(name, targets)
        return prepare_captions(predictions, targets, with_meteor=with_meteor)

    return Metric(name, "text", "the references of the picture", prepare)


CIDER = _metric("cider", with_meteor=False)
CAPTIONS = _metric("captions", with_meteor=True)
