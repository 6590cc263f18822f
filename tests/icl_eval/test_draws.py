"""Demonstrations of any data set: what may be drawn, and what draws depend on."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flamingo import FlamingoError
from flamingo.document import Image, Video
from icl_eval import sources
from icl_eval.datasets import Example
from icl_eval.demonstrations import Draws, check_shots, generator, orders, without_replacement
from icl_eval.sources import Pool
from icl_eval.tasks import Task
from tests.icl_eval.made import Made

BASE = dataclasses.replace(
    Task("made", 1, "made", "test", "<image>{question}{answer}", (2,), support="train", file="f"),
    mode="generate",
    metric="exact_match",
)


class Backwards:
    """Similarity by place, the last ones most similar."""

    def __init__(self, pool: Pool):
        self.pool = pool

    def ranking(self, query: Example):
        return iter(range(len(self.pool.support))[::-1])


def pool_of(task: Task, train: list[Example], test: list[Example] = []) -> Pool:  # noqa: B006  never changed
    return Pool(task, Made(train, test))


def example(number: int, content: int | None = None, label: str = "a", **fields: str) -> Example:
    media = () if content is None else (f"{content}-{number}",)
    return Example(f"e{number}", media, answers=(f"answer {number}",), label=label, fields=fields)


contents = st.lists(st.none() | st.integers(0, 12), min_size=8, max_size=30)


@given(contents, contents, st.sampled_from(["random", "fixed", "balanced", "rices"]), st.booleans(), st.integers(0, 9))
@settings(max_examples=150, deadline=None)
def test_no_demonstration_is_the_query_or_shows_its_picture(train, test, how, same, seed):
    """The query among its own demonstrations: itself, or another example of the same content, under another name."""
    support = [example(number, content, "abc"[number % 3]) for number, content in enumerate(train)]
    queries = [example(100 + number, content) for number, content in enumerate(test)]
    task = dataclasses.replace(BASE, demonstrations=how, split="train" if same else "test")
    pool = pool_of(task, support, queries)
    draws = Draws(task, pool, seed, 2, Backwards(pool))
    for number in range(draws.count):
        query = pool.queries[number]
        usable = [each for each in pool.support if each.id != query.id and not pool.digests(each) & pool.digests(query)]
        if len(usable) < 2:
            with pytest.raises(FlamingoError, match=f"f: shots: query {query.id} needs 2 demonstrations"):
                draws.episode(number)
            continue
        episode = draws.episode(number)
        shown = [each.example for each in episode.ranking]
        assert len({each.id for each in shown}) == len(shown) == 2
        assert all(each in usable for each in shown)


@pytest.mark.parametrize("how", ["random", "fixed", "balanced", "rices"])
def test_fewer_shots_are_the_beginning_of_more(how):
    """Draws that change with how many are needed, so that 2 shots are no part of 8."""
    support = [example(number, number, "abcd"[number % 4]) for number in range(40)]
    task = dataclasses.replace(BASE, demonstrations=how)
    pool = pool_of(task, support, [example(100 + number, 100 + number) for number in range(6)])
    few, many = (Draws(task, pool, 3, most, Backwards(pool)) for most in (2, 8))
    for number in range(6):
        assert few.episode(number).ranking == many.episode(number).ranking[:2]
        longest = many.episode(number).prompt(8).shown
        part = many.episode(number).prompt(2).shown
        assert part == (longest[-2:] if how == "rices" else longest[:2])  # the most similar stand last


def test_each_way_of_drawing_does_what_it_says():
    """Fixed demonstrations that differ, random ones that are the same, unbalanced rounds, another order of classes."""
    support = [example(number, number, "aaaaaabc"[number % 8]) for number in range(80)]
    queries = [example(100 + number, 100 + number) for number in range(30)]

    labels = {each.id: each.label for each in support}

    def rankings(how: str, seed: int = 0) -> list[tuple[str, ...]]:
        task = dataclasses.replace(BASE, demonstrations=how)
        draws = Draws(task, pool_of(task, support, queries), seed, 6)
        return [tuple(each.example.id for each in draws.episode(number).ranking) for number in range(30)]

    assert len(set(rankings("random"))) == 30 and len(set(rankings("fixed"))) == 1
    assert rankings("fixed") != rankings("fixed", seed=1) and rankings("random") != rankings("random", seed=1)
    balanced = rankings("balanced")
    assert all(Counter(map(labels.get, ranking)) == {"a": 2, "b": 2, "c": 2} for ranking in balanced)
    assert len({tuple(map(labels.get, ranking[:3])) for ranking in balanced}) == 6


def test_a_fixed_row_skips_the_query_alone():
    """All queries losing a demonstration because one of them is the query, or the query shown to itself."""
    task = dataclasses.replace(BASE, demonstrations="fixed", split="train")
    pool = pool_of(task, [example(number, number) for number in range(5)])
    rows = [[each.example.id for each in Draws(task, pool, 0, 4).episode(number).ranking] for number in range(5)]
    for number, other in itertools.permutations(range(5), 2):
        assert f"e{number}" not in rows[number] and len(rows[number]) == 4
        both = [each for each in rows[number] if each in rows[other]]
        assert both == [each for each in rows[other] if each in rows[number]]


@pytest.mark.parametrize("how", ["random", "fixed", "balanced", "rices"])
def test_within_a_field(how):
    """Demonstrations of another episode or operator."""
    support = [example(number, number, "abc"[number % 3], operator="+-"[number % 2]) for number in range(20)]
    task = dataclasses.replace(BASE, within="operator", demonstrations=how)
    pool = pool_of(task, support, [example(100, 100, operator="-"), example(101, 101, other="-")])
    draws = Draws(task, pool, 0, 5, Backwards(pool))
    assert {each.example.fields["operator"] for each in draws.episode(0).ranking} == {"-"}
    with pytest.raises(FlamingoError, match="f: within: 'operator', example 'e101' of made has other"):
        draws.episode(1)


def test_draws_of_another_task_are_others():
    """Two tasks on one data set that share their demonstrations, so that their errors go together."""
    support = [example(number, number) for number in range(40)]
    tasks = [BASE, dataclasses.replace(BASE, name="other")]
    one, other = (Draws(task, pool_of(task, support, [example(100, 100)]), 0, 8).episode(0) for task in tasks)
    assert one.ranking != other.ranking


def test_balanced_draws_go_on_without_a_class_that_is_used_up():
    """Demonstrations that end with the smallest class, or one that is shown twice."""
    support = [example(number, number, "aaaab"[number % 5]) for number in range(10)]
    task = dataclasses.replace(BASE, demonstrations="balanced")
    ranking = Draws(task, pool_of(task, support, [example(100, 100)]), 0, 10).episode(0).ranking
    labels = [each.example.label for each in ranking]
    assert {*labels[:2]} == {*labels[2:4]} == {"a", "b"} and labels[4:] == ["a"] * 6
    assert len({each.example.id for each in ranking}) == 10


def test_two_demonstrations_are_drawn_for_the_papers_zero_shot():
    """A query at 0 shots with one text before it, or none."""
    task = dataclasses.replace(BASE, zero_shot="text_only", shots=(0,))
    draws = Draws(task, pool_of(task, [example(number, number) for number in range(9)], [example(100, 100)]), 0, 0)
    assert len(draws.episode(0).prompt(2, text_only=True).shown) == 2


def test_lazy_draws_are_uniform_and_cost_no_more_than_what_is_drawn():
    """A shuffle that is biased, that repeats, or that touches a whole support of 10⁶ for two demonstrations."""
    pairs = Counter(tuple(itertools.islice(without_replacement(generator(n), 4), 2)) for n in range(6000))
    assert len(pairs) == 12 and max(pairs.values()) < 600 and min(pairs.values()) > 400
    assert sorted(without_replacement(generator("whole"), 50)) == list(range(50))
    rng = generator("few")
    list(itertools.islice(without_replacement(rng, 10**12), 3))  # a list of 10¹² would not fit


def test_orders_are_different_and_nested():
    """An order that is averaged twice, or five orders that are not the first five of six."""
    task = dataclasses.replace(BASE, shots=(3,))
    episode = Draws(task, pool_of(task, [example(n, n) for n in range(9)], [example(100, 100)]), 0, 3).episode(0)
    six = orders(episode, 3, 0, 6)
    assert len(set(six)) == 6 and six[0] == (0, 1, 2) and orders(episode, 3, 0, 4) == six[:4]
    assert orders(episode, 1, 0, 6) == [(0,)]
    assert orders(episode, 0, 0, 6) == [()] and len(orders(episode, 2, 0, 6)) == 2


def test_queries_of_a_part_are_the_first_of_more():
    """A smaller evaluation that asks other queries than the larger one."""
    queries = [example(100 + number, None) for number in range(50)]

    def chosen(count: int) -> list[str]:
        task = dataclasses.replace(BASE, queries=count)
        draws = Draws(task, pool_of(task, [example(n, n) for n in range(4)], queries), 0, 1)
        return [draws.episode(number).query_id for number in range(draws.count)]

    assert chosen(5) == chosen(20)[:5] and len(set(chosen(20))) == 20
    assert chosen(0) == chosen(99) == [each.id for each in queries]


def test_an_answer_that_is_missing_is_named():
    """A demonstration whose answer is "None"."""
    pool = pool_of(BASE, [Example(f"e{n}", ()) for n in range(4)], [example(100)])
    with pytest.raises(FlamingoError, match=r"f: support: example 'e\d' of made has no answer to be shown with"):
        Draws(BASE, pool, 0, 2).episode(0)


@pytest.mark.parametrize("mode, metric", [("generate", "exact_match"), ("rank", "accuracy")])
def test_a_query_that_cannot_be_scored_is_named_before_any_is_asked(mode, metric):
    """An hour of answers that ends in "target 1 is []", or a part refused for a query that is not in it."""
    queries = [example(100, label="a"), Example("e101", ())]
    task = dataclasses.replace(BASE, mode=mode, metric=metric)
    pool = Pool(task, Made([example(number) for number in range(4)], queries, ("a", "b")))
    with pytest.raises(FlamingoError, match=f"f: split: 'test', but query 'e101' has no right answer.*{metric} needs"):
        Draws(task, pool, 0, 1)
    assert Draws(dataclasses.replace(task, queries=1), pool, 0, 1).episode(0).query_id == "e100"


def binding(train, test, **keys):
    """A fast-binding task's draws over given examples, the query's names as they are."""
    task = dataclasses.replace(
        Task("made", 1, "made", "test", "<image>{label}", (2,), support="train", file="f"),
        **{"ways": 2, "names": "fixed", "demonstrations": "balanced", "queries": 40, **keys},
    )
    pool = pool_of(task, train, test)
    return task, pool, Draws(task, pool, 0, 2)


def test_binding_takes_queries_and_demonstrations_from_their_own_splits():
    """Queries drawn from the support, classes that only one split has, pictures of the query under another name."""
    support = [example(number, number, "abcd"[number % 4]) for number in range(24)]
    queries = [example(100 + number, number, "bcde"[number % 4]) for number in range(24)]
    _, pool, draws = binding(support, queries)
    seen, orders_of_rounds = set(), set()
    for number in range(40):
        episode = draws.episode(number)
        assert episode.query in queries and episode.query.label in "bcd"
        assert episode.candidates[episode.target] == episode.query.label
        assert [each.example.label for each in episode.ranking] == [each.answer for each in episode.ranking]
        assert {each.answer for each in episode.ranking[:2]} == set(episode.candidates)
        assert all(not pool.digests(each.example) & pool.digests(episode.query) for each in episode.ranking)
        seen.add(episode.candidates)
        orders_of_rounds.add(tuple(each.way for each in episode.ranking))
    assert len(orders_of_rounds) == 4  # two orders, in either round
    assert len(seen) == 6  # of b, c, d, in both orders


def test_a_class_without_a_query_does_not_limit_the_shots():
    """Two shots refused because a class that is never asked for has one picture."""
    support = [*(example(number, number, "ab"[number % 2]) for number in range(8)), example(50, 50, "c")]
    task, pool, _ = binding(support, [example(100, 100, "a"), example(101, 101, "b")])
    check_shots(task, pool, 4)
    with pytest.raises(FlamingoError, match="f: shots: 5, expected 0 to 4"):
        check_shots(task, pool, 5)


def test_binding_within_a_group_keeps_to_it():
    """Another episode's pictures, a class that is not the group's, a query's class that is always the first."""
    support = [example(n, n, "ab"[n % 2] + str(n // 10), episode=str(n // 10)) for n in range(40)]
    queries = [example(100 + n, 100 + n, f"{'ab'[n % 2]}{n % 4}", episode=str(n % 4)) for n in range(40)]
    _, _, draws = binding(support, queries, within="episode", queries=0)
    assert draws.count == 40
    targets = Counter()
    for number in range(40):
        episode = draws.episode(number)
        group = episode.query.fields["episode"]
        assert set(episode.candidates) == {f"a{group}", f"b{group}"}
        assert episode.candidates[episode.target] == episode.query.label
        assert {each.example.fields["episode"] for each in episode.ranking} == {group}
        targets[episode.target] += 1
    assert len(targets) == 2 and min(targets.values()) > 8
    _, _, draws = binding(support, [example(100, 100, "a0", episode="7")], within="episode", queries=0)
    with pytest.raises(
        FlamingoError, match="f: ways: 2, but of query 'e100' the support has the classes none, and its"
    ):
        draws.episode(0)


def test_media_that_are_kept_are_bounded(monkeypatch):
    """10⁵ media in memory after 10⁵ queries, or one that is read again for each of its uses in a row."""
    monkeypatch.setattr(sources, "KEPT_BYTES", 6)
    pool = pool_of(BASE, [example(number, 10 + number) for number in range(9)], [example(100, 10)])
    reads = []
    monkeypatch.setattr(pool.dataset, "medium", lambda name: reads.append(name) or Made.medium(pool.dataset, name))
    for each in pool.support:
        pool.digests(each)
        pool.media(pool.indices(each))
    assert len(reads) == 9
    assert pool.digests(pool.queries[0]) == pool.digests(pool.support[0]), "digests are kept, the media are not"
    pool.media(pool.indices(pool.support[0]))
    pool.media(pool.indices(pool.support[8]))
    assert len(reads) == 9 + 2


def test_a_video_is_told_by_all_its_frames():
    """Two videos that begin alike taken for one, so that neither may be shown before the other."""

    class Clips(Made):
        def medium(self, name):
            return Video(tuple(Image(letter.encode(), letter) for letter in name))

    clips = [Example(name, (name,), answers=("x",)) for name in ("ab", "ac", "a")]
    pool = Pool(BASE, Clips(clips, [Example("q", ("ab",), answers=("x",)), Example("p", ("a",), answers=("x",))]))
    shown = [{each.example.id for each in Draws(BASE, pool, 0, 2).episode(number).ranking} for number in (0, 1)]
    assert shown == [{"ac", "a"}, {"ab", "ac"}]
