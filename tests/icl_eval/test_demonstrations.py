"""Tasks, pools, demonstrations and controls: everything before a model is asked."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from flamingo import FlamingoError
from icl_eval.datasets import load_dataset
from icl_eval.demonstrations import Draws, check_shots
from icl_eval.diagnostics import CONTROL_SHOTS, under_control
from icl_eval.metrics import bootstrap_interval
from icl_eval.sources import load_pool
from icl_eval.tasks import FOLDER, available, load_task, needing_no_files


@pytest.fixture(scope="module")
def glyphs():
    task = load_task("glyphs_5way")
    return task, load_pool(task)


EMBEDDED = {"glyphs_5way", "glyphs_2way", "scripts_5way", "digits_5way", "digits_2way", "naming"}


def test_every_task_of_the_package_loads():
    """A shipped task with a key that the code no longer knows, over thirty lines, or without pictures."""
    assert set(needing_no_files()) == EMBEDDED < set(available())
    for name in available():
        task = load_task(name)
        assert task.name == name
        assert len((FOLDER / f"{name}.yaml").read_text().splitlines()) <= 30
        assert {task.split, task.support_split} <= set(load_dataset(task.dataset, Path()).splits)
    for name in EMBEDDED:
        task = load_task(name)
        for shots in task.shots:
            check_shots(task, load_pool(task), shots)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"wyas": 5}, "unknown key 'wyas' (did you mean 'ways'?)"),
        ({"split": None}, "missing key 'split'"),
        ({"shots": "0, 1"}, "shots: '0, 1', expected a list of integers"),
        ({"shots": [-1]}, "shots: [-1], expected numbers from 0"),
        ({"queries": True}, "queries: True, expected an integer"),
        ({"queries": 0}, "queries: 0, expected at least 1"),
        ({"generate": {"beams": 2}}, "generate: {'beams': 2}, expected max_new_tokens and beams"),
        ({"mode": "generate"}, "generate: None, expected max_new_tokens and beams"),
        ({"demonstrations": "random"}, "demonstrations: 'random', expected balanced where there are ways"),
        ({"name": "../mine"}, "name: '../mine', expected text that a file's name may begin with"),
        ({"features": "clip"}, "features: 'clip', expected nothing where demonstrations are not rices"),
        ({"ensemble": 7}, "ensemble: 7, expected 1 to 6"),
        ({"separator": "|"}, "separator: '|', expected white space"),
        ({"metric": "acc"}, "metric: 'acc', expected one of accuracy, top1"),
        ({"include": "no.yaml"}, "include: 'no.yaml', expected a file beside it"),
        ({"support": "tset"}, "support: 'tset', glyphs has"),
        ({"names": "any"}, "names: 'any', expected one of fresh, fixed"),
        ({"template": "<image>"}, "template: '<image>', expected {answer} or {label} once"),
        ({"template": "{label}<image>"}, "template: '{label}<image>', expected each <image> before the answer"),
        ({"dataset": "glyhps"}, "dataset: data set 'glyhps' (did you mean 'glyphs'?)"),
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


def test_a_key_that_is_there_twice_is_refused(tmp_path):
    """The first of two lines that is lost without a word."""
    file = tmp_path / "mine.yaml"
    file.write_text((FOLDER / "glyphs_5way.yaml").read_text() + "shots: [1]\n")
    with pytest.raises(FlamingoError, match=r"mine\.yaml: .*'shots' is there twice\s+in .* line 15"):
        load_task(file)


def test_what_is_included_counts_unless_a_file_says_otherwise(tmp_path):
    """Keys of the included file that win, files that include one another for ever, a fault told of the wrong file."""
    (tmp_path / "_base.yaml").write_text((FOLDER / "glyphs_5way.yaml").read_text())
    (tmp_path / "mine.yaml").write_text("include: _base.yaml\nname: mine\nshots: [1]\n")
    assert load_task(tmp_path / "mine.yaml") == dataclasses.replace(
        load_task("glyphs_5way"), name="mine", shots=(1,), file=str(tmp_path / "mine.yaml")
    )
    (tmp_path / "_base.yaml").write_text("include: mine.yaml\n")
    with pytest.raises(FlamingoError, match=r"mine\.yaml: include: it includes itself"):
        load_task(tmp_path / "mine.yaml")
    (tmp_path / "_base.yaml").write_text((FOLDER / "glyphs_5way.yaml").read_text() + "generate: {max_new_tokens: 3}\n")
    told = r"mine\.yaml: of \S*_base\.yaml, which it includes: generate: .*, expected nothing \(generate: null\)"
    with pytest.raises(FlamingoError, match=told):
        load_task(tmp_path / "mine.yaml")
    (tmp_path / "_base.yaml").write_text("wyas: 2\n")
    with pytest.raises(FlamingoError, match=r"_base\.yaml: unknown key 'wyas'"):
        load_task(tmp_path / "mine.yaml")


def test_episodes_depend_on_seed_task_and_query_alone(glyphs):
    """Draws from one shared generator: then episode 7 changes with how many were drawn before it, or on which rank."""
    task, pool = glyphs
    draws = Draws(task, pool, 3, 8)
    in_order = [draws.episode(number) for number in range(8)]
    fewer = Draws(dataclasses.replace(task, shots=(1,), queries=2), load_pool(task), 3, 1).episode(7)
    assert dataclasses.replace(in_order[7], ranking=in_order[7].ranking[:5]) == fewer
    others = [Draws(task, pool, 4, 8), Draws(dataclasses.replace(task, name="other"), pool, 3, 8)]
    assert all(other.episode(7).ranking != in_order[7].ranking for other in others)


def test_shots_are_nested_balanced_and_without_the_query(glyphs):
    """A query among its own demonstrations, a way shown more often than others, k shots that do not begin k + 1."""
    task, pool = glyphs
    draws = Draws(task, pool, 0, 8)
    for number in range(200):
        episode = draws.episode(number)
        prompts = [episode.prompt(shots) for shots in (0, 1, 2, 4, 8)]
        longest = prompts[-1]
        assert episode.query.id not in longest.demonstrations
        assert len(set(longest.demonstrations)) == len(longest.demonstrations) == 40
        for prompt in prompts:
            assert longest.shown[: len(prompt.shown)] == prompt.shown
            assert {prompt.answers.count(name) for name in episode.candidates} == {len(prompt.shown) // 5}
        label_of = {}
        for each in longest.shown:
            assert label_of.setdefault(each.example.label, each.answer) == each.answer
        assert label_of[episode.query.label] == episode.candidates[episode.target]


def test_neither_position_nor_order_gives_the_answer_away(glyphs):
    """The right way always first, or the query's class always shown last: a model could be right without looking."""
    task, pool = glyphs
    draws = Draws(task, pool, 0, 1)
    episodes = [draws.episode(number) for number in range(2000)]
    targets = np.bincount([episode.target for episode in episodes], minlength=5) / len(episodes)
    lasts = np.mean([episode.ranking[4].way == episode.target for episode in episodes])
    assert np.abs(targets - 0.2).max() < 0.04
    assert abs(lasts - 0.2) < 0.04


def test_pictures_are_none_that_training_saw(glyphs):
    """A pool that holds variants which training may draw, or classes of another split."""
    _, pool = glyphs
    from data_shards.glyphs.pictures import load_world

    test_classes = set(load_world().split("test"))
    for example in pool.support:
        _, kind, variant = example.id.split("/")
        assert int(variant) >= 10_000
        assert int(kind) in test_classes
    naming = load_pool(load_task("naming"))
    assert all(int(example.id.split("/")[2]) >= 10_000 for example in naming.queries)


def perfect(prompt):
    """The answer of a model without fault: the label seen most often beside pictures of the query's class."""
    votes = [
        sum(each.pictured.label == prompt.pictured.label and each.answer == name for each in prompt.shown)
        for name in prompt.candidates
    ]
    return int(np.argmax(votes))


@pytest.mark.parametrize("control", ["labels_permuted", "images_swapped", "random_query"])
@pytest.mark.parametrize("name, chance", [("glyphs_5way", 0.2), ("digits_2way", 0.5)])
def test_a_perfect_model_falls_to_chance_under_a_control(name, chance, control):
    """A control that leaves the answer in the prompt, or that excludes the identity and so falls below chance."""
    task = load_task(name)
    pool = load_pool(task)
    draws = Draws(task, pool, 0, CONTROL_SHOTS + 1)
    episodes = [draws.episode(number) for number in range(3000)]
    assert all(perfect(episode.prompt(CONTROL_SHOTS)) == episode.target for episode in episodes[:200])
    controlled = (under_control(episode, CONTROL_SHOTS, control, 0, pool) for episode in episodes)
    right = [perfect(prompt) == episode.target for prompt, episode in zip(controlled, episodes, strict=True)]
    assert np.mean(right) == pytest.approx(chance, abs=0.03)  # three standard errors


def test_too_many_shots_are_refused(glyphs):
    """A cell of 40 shots that quietly holds the 15 that there are."""
    task, pool = glyphs
    with pytest.raises(FlamingoError, match=r"shots: 40, expected 0 to 15"):
        check_shots(task, pool, 40)


def test_shots_before_images_chosen_by_similarity_are_no_zero_shot():
    """The names of the two most similar images before a query "at 0 shots", which are its own name most often."""
    assert all(task.zero_shot == "honest" for task in map(load_task, available()) if task.demonstrations == "rices")


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
