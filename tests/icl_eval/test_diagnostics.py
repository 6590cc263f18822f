"""Controls and variants of tasks without ways, and ladders that ask exactly the prompts of their cells."""

from __future__ import annotations

from collections import Counter

import pytest

from icl_eval.datasets import Example
from icl_eval.diagnostics import CONTROL_SHOTS, DIAGNOSTICS, ORDERS, under_control
from icl_eval.engine import Chunk
from icl_eval.prompts import rendered
from icl_eval.questions import Questions, cell_keys
from icl_eval.sources import Pool
from icl_eval.tasks import Task
from tests.icl_eval.made import Made

TRAIN = [Example(f"t{n}", (f"{n}-t",), f"q{n}?", (f"a{n}",), f"l{n % 3}") for n in range(8)]
TEST = [Example(f"e{n}", (f"{50 + n}-e",), f"which {n}?", (f"a{n % 3}",)) for n in range(60)]
TASK = Task(
    "made", 1, "made", "test", "<image>{question} {answer}", (0, 2, 4, 6), support="train", separator="\n", file="f"
)


@pytest.fixture(scope="module")
def pool():
    return Pool(TASK, Made(TRAIN, TEST, ("a0", "a1", "a2")))


@pytest.fixture(scope="module")
def episodes(pool):
    draws = Questions(TASK, pool, cell_keys(TASK, DIAGNOSTICS)).draws
    return [draws.episode(number) for number in range(draws.count)]


def of(control, episode, pool):
    plain = episode.prompt(CONTROL_SHOTS)
    changed = under_control(episode, CONTROL_SHOTS, control, 0, pool)
    assert changed == under_control(episode, CONTROL_SHOTS, control, 0, pool)
    return plain, changed


def uniform(counts, kinds):
    """Each of `kinds` occurs about equally often."""
    share = sum(counts.values()) / kinds
    return len(counts) == kinds and all(share / 2 < count < 2 * share for count in counts.values())


def test_labels_are_permuted_over_their_places(episodes, pool):
    """Answers that stay, that are lost, or that drag their questions and pictures along."""
    came = Counter()
    for episode in episodes:
        plain, changed = of("labels_permuted", episode, pool)
        assert [(e.example, e.pictured) for e in changed.shown] == [(e.example, e.pictured) for e in plain.shown]
        assert sorted(changed.answers) == sorted(plain.answers)
        came[plain.answers.index(changed.answers[0])] += 1
        assert (changed.query, changed.pictured) == (plain.query, plain.pictured)
    assert uniform(came, CONTROL_SHOTS)


def test_pictures_are_swapped_over_their_places(episodes, pool):
    """Pictures that stay, or that drag their texts along."""
    came = Counter()
    for episode in episodes:
        plain, changed = of("images_swapped", episode, pool)
        assert [(e.example, e.answer) for e in changed.shown] == [(e.example, e.answer) for e in plain.shown]
        assert sorted(changed.demonstrations) == sorted(plain.demonstrations)
        came[plain.demonstrations.index(changed.demonstrations[0])] += 1
        assert changed.pictured is plain.pictured
    assert uniform(came, CONTROL_SHOTS)


def test_a_random_query_shows_any_picture_under_its_own_question(episodes, pool):
    """A picture that hangs together with the query, or a question that goes with the picture."""
    same, shown = 0, set()
    for episode in episodes:
        plain, changed = of("random_query", episode, pool)
        assert (changed.shown, changed.query, changed.candidates) == (plain.shown, plain.query, plain.candidates)
        same += changed.pictured is changed.query
        shown.add(changed.pictured.id)
    assert same < 6 and len(shown) > 25


def test_variants_change_what_they_say(episodes, pool):
    """Text-only demonstrations that take the query's picture too; orders that are one order, or lose something."""
    for episode in episodes[:10]:
        plain, changed = of("text_only", episode, pool)
        assert [each.pictured for each in changed.shown] == [None] * CONTROL_SHOTS
        assert (changed.answers, changed.pictured) == (plain.answers, plain.pictured)
        found = [of(control, episode, pool)[1] for control in ORDERS]
        assert len({plain.demonstrations, *(each.demonstrations for each in found)}) == 4
        assert all(sorted(each.demonstrations) == sorted(plain.demonstrations) for each in found)
        assert all(each.answers == tuple(shown.example.answers[0] for shown in each.shown) for each in found)


@pytest.mark.parametrize("options", [{}, {"ensemble": 3}, {"zero_shot": "text_only"}])
def test_ladders_ask_the_prompts_of_their_cells(options, pool):
    """A prompt that is no beginning of the one whose ladder it shares; an order that is not asked; cells mixed up."""
    task = Task(**{**TASK.definition(), **options})
    keys = cell_keys(task, [control for control in DIAGNOSTICS if control != "gates_at_zero"])
    questions = Questions(task, pool, keys)
    for number in range(5):
        episode = questions.draws.episode(number)
        asked = questions.asked(episode, keys)
        found: dict[object, list[tuple[Chunk, ...]]] = {key: [] for key in keys}
        for each in asked:
            for key, query in zip(each.keys, each.ladder.queries, strict=True):
                found[key].append((*each.ladder.demonstrations[: query.after], query.chunk))
                assert query.answers == ("a0", "a1", "a2")
        for key in keys:
            expected = [questions.chunks(prompt) for prompt in questions.prompts(episode, key)]
            assert list(map(rendered, found[key])) == list(map(rendered, expected)) and found[key] == expected
    shared = [each.keys for each in asked if len(each.keys) > 1]
    assert shared == [asked[0].keys] and {(2, None), (4, "random_query"), (6, None)} < set(shared[0])
