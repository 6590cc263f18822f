"""Ranking by a trie, and the search for the best alone, against scores of all answers one by one."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flamingo import FlamingoError
from icl_eval import plain
from icl_eval.engine import Chunk, Engine, Ladder, Query
from icl_eval.ranking import TIE, Search, Trie, best_only
from tests.icl_eval.conftest import lively_flamingo
from tests.tiny import picture

answers_of_tokens = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5).map(tuple), min_size=1, max_size=30)


class Likelihoods:
    """Of each token after each beginning: drawn once, from few values, so that there are ties."""

    def __init__(self, seed, spread):
        self.seed, self.spread = seed, spread

    def __call__(self, beginning, token):
        draw = np.random.default_rng([self.seed, len(beginning), *beginning, token]).integers(5)
        return -self.spread * float(draw) - 0.1

    def score(self, answer, normalise):
        total = sum(self(answer[:place], token) for place, token in enumerate(answer))
        return total / len(answer) if normalise == "mean" else total


def search_all(trie, likelihoods, normalise, top_k):
    """Scores, and the nodes that were read, in order."""
    search, read = Search(trie, normalise, top_k), []
    waiting = [0]
    while waiting:
        for node in waiting:
            beginning = tuple(trie.tokens[each] for each in trie.path(node))
            search.learn(node, [likelihoods(beginning, trie.tokens[child]) for child in trie.children[node]])
        waiting = search.wanted()
        read += waiting
    return best_only(search.scores, top_k), read


@settings(max_examples=200, deadline=None)
@given(
    answers_of_tokens, st.integers(0, 99), st.sampled_from([0.0, 1e-5, 1.0]), st.sampled_from(["sum", "mean"]),
    st.one_of(st.none(), st.integers(1, 12)),
)  # fmt: skip
def test_a_search_finds_the_scores_of_the_best(answers, seed, spread, normalise, top_k):
    """A bound that is too low, so that an answer of the best is lost; ties cut; answers that begin or equal others."""
    likelihoods = Likelihoods(seed, spread)
    expected = np.array([likelihoods.score(answer, normalise) for answer in answers])
    found, read = search_all(Trie(answers), likelihoods, normalise, top_k)
    assert len(read) == len(set(read))
    kept = np.isfinite(found)
    np.testing.assert_allclose(found[kept], expected[kept], atol=1e-9, rtol=0)
    if top_k is None or top_k >= len(answers):
        assert kept.all()
    else:
        least = np.sort(expected)[-top_k]
        assert kept[expected >= least - TIE + 1e-9].all() and not kept[expected < least - TIE - 1e-9].any()


@settings(max_examples=100, deadline=None)
@given(answers_of_tokens)
def test_a_trie_holds_the_answers(answers):
    """A beginning that is there twice (and read twice), a child before its parent, an answer of other tokens."""
    trie = Trie(answers)
    for answer, end in zip(answers, trie.ends.tolist(), strict=True):
        assert tuple(trie.tokens[node] for node in trie.path(end)) == answer
    beginnings = {answer[:length] for answer in answers for length in range(len(answer) + 1)}
    assert len(trie.tokens) == len(beginnings)
    assert all(parent < node for node, parent in enumerate(trie.parents) if node)
    assert trie.closure([int(trie.ends[0])]) == trie.path(int(trie.ends[0]))
    chosen = trie.ends_of(range(1, len(trie.tokens)))
    assert {node for end in chosen for node in trie.path(end)} == set(range(1, len(trie.tokens)))
    assert chosen == [node for node in range(1, len(trie.tokens)) if not trie.children[node]]


@pytest.mark.parametrize("normalise", ["sum", "mean"])
def test_what_cannot_reach_the_best_is_not_read(normalise):
    """A search that is exact because it reads everything."""
    answers = [(first, second, third, 9) for first in range(8) for second in range(8) for third in range(8)]

    def peaked(beginning, token):
        likely = token in (9, beginning[-1] if beginning else 3)
        return -0.1 if likely else -6.0 - 0.01 * token - 0.001 * len(beginning)

    trie = Trie(answers)
    found, read = search_all(trie, peaked, normalise, 5)
    assert np.isfinite(found).sum() == 5
    assert len(read) < len(trie.inner) / 5


def test_a_long_answer_can_make_up_for_a_bad_beginning():
    """Means bounded by the tokens read so far: a long answer whose other tokens are all likely is lost."""
    answers = [(0,), *((1, *range(2, length)) for length in range(4, 12))]
    likelihoods = lambda beginning, token: (-1.0, -2.0)[token] if not beginning else -0.001 * token  # noqa: E731
    found, _ = search_all(Trie(answers), likelihoods, "mean", 1)
    assert np.flatnonzero(np.isfinite(found)).tolist() == [8]


def test_what_may_tie_with_the_best_is_read():
    """Answers a hair below the best that are never read, where others of them are: as many ties as a round holds."""
    answers = [(first, 9) for first in range(8)]
    likelihoods = lambda beginning, token: 0.0 if beginning else -1.0 - token * TIE / 8  # noqa: E731
    for normalise in ("sum", "mean"):
        assert np.isfinite(search_all(Trie(answers), likelihoods, normalise, 1)[0]).all()


def test_ties_with_the_last_of_the_best_are_kept():
    """The k-th best chosen among equals by order: another order of candidates, other results."""
    scores = np.array([-3.0, -1.0, -2.0, -2.0 - TIE / 2, -2.0 - 2 * TIE])
    np.testing.assert_array_equal(best_only(scores, 2), [-np.inf, -1.0, -2.0, -2.0 - TIE / 2, -np.inf])
    assert best_only(scores, None) is scores and best_only(scores, 5) is scores


def test_the_best_of_none_are_refused():
    """All scores for `top_k: 0`, or none."""
    with pytest.raises(FlamingoError, match="top_k: 0, expected at least 1"):
        best_only(np.array([-1.0, -2.0]), 0)


# -- the engine --------------------------------------------------------------------------------------------------------

NAMES = ("bado", "badoni", "ba", "badu", "nili", "nilo", "pu", "zozozo", "zo", "bado ba", "x")


class Drawer:
    def name(self, index):
        return str(index)

    def media(self, indices):
        return [picture(index) for index in indices]


def ladders():
    """Prompts of different lengths, with different candidates."""
    return [
        Ladder(
            tuple(Chunk((10 * n + place, f"a:{'la' * (n + 1)}")) for place in range(2)),
            tuple(Query(after, Chunk((n + 40, "a:")), NAMES[n % 3 :: 1 + n % 2]) for after in (0, 2)),
            str(n),
        )
        for n in range(5)
    ]


@pytest.mark.parametrize(
    "family, precision, normalise, atol, trees",
    [
        ("llama", "float", "sum", 1e-5, True),
        ("llama", "double", "mean", 1e-10, True),
        ("opt", "float", "mean", 2e-5, True),
        ("gpt2", "float", "sum", 2e-5, True),
        ("lfm2", "float", "mean", 1e-5, False),
        ("gemma3", "float", "sum", 2e-5, False),
        ("mpt", "float", "sum", 2e-5, False),
        ("gpt_neo", "float", "mean", 2e-5, False),
    ],
)
def test_ranking_equals_the_plain_way(family, precision, normalise, atol, trees, tmp_path):
    """Tokens that see a sibling's, wrong positions behind padding, paths mixed up; an LM of windows read as a tree."""
    model, processor = lively_flamingo(tmp_path, family)
    model = getattr(model, precision)()
    made = ladders()
    plainly = [plain.rank(model, processor, Drawer(), ladder, normalise=normalise) for ladder in made]
    for batch_size, top_k in ((1, None), (3, 3), (8, 1)):
        engine = Engine(model, processor, batch_size=batch_size)
        assert engine.reads_trees == trees
        found = engine.rank(Drawer(), made, normalise=normalise, top_k=top_k)
        for ours, theirs in zip(found, plainly, strict=True):
            for one, other in zip(ours, theirs, strict=True):
                np.testing.assert_allclose(one, best_only(other, top_k), atol=atol, rtol=0)


@pytest.mark.parametrize("top_k", [None, 2])
def test_passes_of_few_tokens_give_the_same_scores(flamingo, top_k, monkeypatch):
    """A trie that is cut between a node and what is below it."""
    import icl_eval.engine

    expected = Engine(*flamingo).rank(Drawer(), ladders(), top_k=top_k)
    monkeypatch.setattr(icl_eval.engine, "LOGITS_AT_ONCE", 1)
    monkeypatch.setattr(icl_eval.engine, "CACHED_TOKENS", 1)
    found = Engine(*flamingo).rank(Drawer(), ladders(), top_k=top_k)
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5, rtol=0)


def test_passes_have_few_logits(tmp_path, monkeypatch):
    """Short prompts before many labels of an LM with a large vocabulary: logits that take all memory there is."""
    import icl_eval.engine

    model, processor = lively_flamingo(tmp_path, "lfm2")
    engine = Engine(model, processor)
    made, forward, sizes = ladders(), model.forward, []

    def noted(**given):
        output = forward(**given)
        sizes.append(output.logits.numel())
        return output

    monkeypatch.setattr(icl_eval.engine, "LOGITS_AT_ONCE", 40 * engine.vocabulary)
    monkeypatch.setattr(model, "forward", noted)
    engine.rank(Drawer(), made)
    assert max(sizes) <= 40 * engine.vocabulary


def test_what_answers_share_is_read_once(tmp_path):
    """Each candidate read for itself, or again in each pass."""
    model, processor = lively_flamingo(tmp_path, "llama")
    engine = Engine(model, processor)
    made = Ladder((), (Query(0, Chunk((1, "a:")), ("bado", "badu", "bada")),), "x")
    engine.rank(Drawer(), [made])
    assert (engine.label_tokens, engine.label_tokens_read) == (15, 6)  # b, a, d, and o, u, a


@pytest.mark.parametrize("family, trees", [("llama", True), ("opt", True), ("gpt_neo", False)])
def test_trees_are_read_in_half_precision_too(family, trees, tmp_path):
    """Rounding taken for siblings that are seen, so that real models read candidates one by one; or the reverse."""
    model, processor = lively_flamingo(tmp_path, family)
    assert Engine(model.bfloat16(), processor).reads_trees == trees


@pytest.mark.parametrize("precision", ["float", "bfloat16"])
def test_an_lm_that_does_not_heed_masks_is_noticed(precision, tmp_path, monkeypatch):
    """Siblings that see one another: quietly wrong scores."""
    model, processor = lively_flamingo(tmp_path, "llama")
    model = getattr(model, precision)()
    expected = Engine(model, processor).rank(Drawer(), ladders())
    forward = model.language_model.forward

    def heedless(*, attention_mask=None, **given):
        return forward(
            attention_mask=None if attention_mask is None or attention_mask.ndim == 4 else attention_mask, **given
        )

    heedless.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(model.language_model, "forward", heedless)
    engine = Engine(model, processor)
    assert not engine.reads_trees
    for ours, theirs in zip(engine.rank(Drawer(), ladders()), expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5 if precision == "float" else 0.5, rtol=0)
