"""Tasks, pools, demonstrations and controls: everything before a model is asked."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from flamingo import FlamingoError
from icl_eval.demonstrations import check_shots, draw_episode
from icl_eval.diagnostics import CONTROL_SHOTS, plain, under_control
from icl_eval.metrics import bootstrap_interval
from icl_eval.sources import load_pool
from icl_eval.tasks import FOLDER, available, load_task


@pytest.fixture(scope="module")
def glyphs():
    task = load_task("glyphs_5way")
    return task, load_pool(task)


def test_every_task_of_the_package_loads():
    """A shipped task with a key that the code no longer knows, over thirty lines, or without pictures."""
    assert {"glyphs_5way", "glyphs_2way", "scripts_5way", "digits_5way", "digits_2way", "naming"} <= set(available())
    for name in available():
        task = load_task(name)
        assert task.name == name
        assert len((FOLDER / f"{name}.yaml").read_text().splitlines()) <= 30
        assert task.chance == pytest.approx(1 / task.ways, abs=1e-4)
        for shots in task.shots:
            check_shots(task, load_pool(task), shots)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"wyas": 5}, "unknown key 'wyas' (did you mean 'ways'?)"),
        ({"ways": None}, "missing key 'ways'"),
        ({"shots": "0, 1"}, "shots: '0, 1', expected a list of integers"),
        ({"shots": [-1]}, "shots: [-1], expected numbers from 0"),
        ({"episodes": True}, "episodes: True, expected an integer"),
        ({"names": "any"}, "names: 'any', expected one of fresh, fixed"),
        ({"template": "{label}"}, "template: '{label}', expected <image>"),
        ({"source": "web"}, "source: 'web', expected one of glyphs, digits"),
        ({"split": "tset"}, "split: 'tset', glyphs has"),
        ({"ways": 5000}, "ways: 5000, but split 'test' of glyphs has"),
        ({"names": "fixed", "shots": [0]}, "names: fixed, but"),
    ],
)
def test_a_bad_task_names_file_and_key(tmp_path, change, message):
    """A message without the file or the key, or a mistake that only shows as a traceback later."""
    import yaml

    content = yaml.safe_load((FOLDER / "glyphs_5way.yaml").read_text()) | change
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    with pytest.raises(FlamingoError) as raised:
        load_pool(load_task(file))
    assert str(raised.value).startswith(f"{file}: {message}")


def test_episodes_depend_on_seed_task_and_query_alone(glyphs):
    """Draws from one shared generator: then episode 7 changes with how many were drawn before it, or on which rank."""
    task, pool = glyphs
    in_order = [draw_episode(task, pool, 3, number) for number in range(8)]
    alone = draw_episode(dataclasses.replace(task, shots=(1,), episodes=2), pool, 3, 7)
    for field in dataclasses.fields(alone):
        assert np.array_equal(getattr(in_order[7], field.name), getattr(alone, field.name)), field.name
    others = [draw_episode(task, pool, 4, 7), draw_episode(dataclasses.replace(task, name="other"), pool, 3, 7)]
    assert all(not np.array_equal(other.ranking, alone.ranking) for other in others)


def test_shots_are_nested_balanced_and_without_the_query(glyphs):
    """A query among its own demonstrations, a way shown more often than others, k shots that do not begin k + 1."""
    task, pool = glyphs
    for number in range(200):
        episode = draw_episode(task, pool, 0, number)
        prompts = [plain(episode, shots) for shots in (0, 1, 2, 4, 8)]
        longest = prompts[-1]
        assert episode.query not in longest.images
        assert len(set(longest.images)) == len(longest.images) == 40
        for prompt in prompts:
            assert longest.images[: len(prompt.images)] == prompt.images
            assert longest.labels[: len(prompt.labels)] == prompt.labels
            assert {prompt.labels.count(name) for name in episode.names} == {len(prompt.labels) // 5}
        label_of = {}
        for image, label in zip(longest.images, longest.labels, strict=True):
            assert label_of.setdefault(pool.items[image].kind, label) == label
        assert label_of[pool.items[episode.query].kind] == episode.names[episode.target]


def test_neither_position_nor_order_gives_the_answer_away(glyphs):
    """The right way always first, or the query's class always shown last: a model could be right without looking."""
    task, pool = glyphs
    episodes = [draw_episode(task, pool, 0, number) for number in range(2000)]
    targets = np.bincount([episode.target for episode in episodes], minlength=5) / len(episodes)
    lasts = np.mean([episode.ranking_ways[0, -1] == episode.target for episode in episodes])
    assert np.abs(targets - 0.2).max() < 0.04
    assert abs(lasts - 0.2) < 0.04


def test_pictures_are_none_that_training_saw(glyphs):
    """A pool that holds variants which training may draw, or classes of another split."""
    _, pool = glyphs
    from data_shards.glyphs.pictures import load_world

    test_classes = set(load_world().split("test"))
    for item in pool.items:
        _, kind, variant = item.id.split("/")
        assert int(variant) >= 10_000
        assert int(kind) in test_classes
    naming = load_pool(load_task("naming"))
    assert all(int(item.id.split("/")[2]) >= 10_000 for item in naming.items)


def perfect(pool, prompt):
    """The answer of a model without fault: the label seen most often beside pictures of the query's class."""
    kinds = [pool.items[image].kind for image in prompt.images]
    asked = pool.items[prompt.query].kind
    votes = [
        sum(kind == asked and label == name for kind, label in zip(kinds, prompt.labels, strict=True))
        for name in prompt.candidates
    ]
    return int(np.argmax(votes))


@pytest.mark.parametrize("control", ["labels_permuted", "images_swapped", "random_query"])
@pytest.mark.parametrize("name, chance", [("glyphs_5way", 0.2), ("digits_2way", 0.5)])
def test_a_perfect_model_falls_to_chance_under_a_control(name, chance, control):
    """A control that leaves the answer in the prompt, or that excludes the identity and so falls below chance."""
    task = load_task(name)
    pool = load_pool(task)
    episodes = [draw_episode(task, pool, 0, number) for number in range(3000)]
    straight = [perfect(pool, plain(episode, CONTROL_SHOTS)) == episode.target for episode in episodes[:200]]
    assert all(straight)
    right = [perfect(pool, under_control(episode, CONTROL_SHOTS, control, 0)) == episode.target for episode in episodes]
    assert np.mean(right) == pytest.approx(chance, abs=0.03)  # three standard errors


def test_too_many_shots_are_refused(glyphs):
    """A cell of 40 shots that quietly holds the 15 that there are."""
    task, pool = glyphs
    with pytest.raises(FlamingoError, match=r"shots: 40, expected 0 to 15"):
        check_shots(task, pool, 40)


def test_bootstrap_interval_covers_the_truth():
    """An interval of the values instead of their mean, or of the wrong level."""
    rng = np.random.default_rng(0)
    low, high = bootstrap_interval(np.repeat([1.0, 0.0], [160, 40]), resamples=4000)
    assert high - low == pytest.approx(2 * 1.96 * (0.8 * 0.2 / 200) ** 0.5, rel=0.08)
    covered = []
    for trial in range(300):
        low, high = bootstrap_interval((rng.random(200) < 0.8).astype(float), seed=trial, resamples=400)
        covered.append(low <= 0.8 <= high)
    assert 0.91 < np.mean(covered) < 0.98
