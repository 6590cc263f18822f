"""Similarity by the model's own tower: what is most similar, how ties go, and what is kept on disk."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from flamingo import FlamingoError
from flamingo.backbones import load_vision
from flamingo.document import Video
from flamingo.modeling import patch_tokens
from icl_eval.datasets import Example
from icl_eval.evaluation import evaluate_answerer
from icl_eval.features import Features, tower_hash
from icl_eval.sources import Pool
from icl_eval.tasks import Generation, Task
from tests.icl_eval.made import Made, Stub
from tests.tiny import picture, save_backbones, tiny_flamingo

TASK = Task("made", 1, "made", "test", "<image>{answer}", (2,), support="train", mode="generate", file="f")


class Pictures(Made):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.read = 0

    def medium(self, name):
        self.read += 1
        content = int(name.partition("-")[0])
        return picture(content) if content < 90 else Video((picture(content), picture(content + 1)))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return tiny_flamingo(tmp_path_factory.mktemp("tiny"))


def example(identifier, *contents):
    return Example(identifier, tuple(f"{content}-{identifier}" for content in contents), answers=("x",))


SUPPORT = [example("d", 7), example("b", 3), example("a", 7), example("c", 90), example("e", 1, 2), example("none")]


def test_the_most_similar_come_first_and_ties_by_id(pair, tmp_path):
    """Least similar first, an order of ties that depends on the data set's, a medium that is left out."""
    pool = Pool(TASK, Pictures(SUPPORT, [example("q", 7)]))
    features = Features(*pair, pool, tmp_path)
    ranking = [SUPPORT[place].id for place in features.ranking(pool.queries[0])]
    assert ranking[:2] == ["a", "d"] and sorted(ranking) == ["a", "b", "c", "d", "e", "none"]
    assert np.allclose(np.linalg.norm(features.support[:5], axis=1), 1) and not features.support[5].any()
    features.support[0] *= 1 + 1e-6  # noise of another machine
    assert [SUPPORT[place].id for place in features.ranking(pool.queries[0])] == ranking
    model, processor = pair
    with torch.inference_mode():
        tokens = model.vision_tower(pixel_values=processor.pixels([picture(7)])[0]).last_hidden_state[0, 1:]
    mean = torch.nn.functional.normalize(tokens, dim=-1).mean(0)
    np.testing.assert_allclose(features.support[0], (mean / mean.norm()).numpy(), atol=1e-5)


def test_a_long_ranking_is_whole(pair, tmp_path):
    """Places that are lost or repeated where more than the first few are asked for, at ties above all."""
    support = [example(f"{number:04d}", number % 7) for number in range(300)]
    pool = Pool(TASK, Pictures(support, [example("q", 3)]))
    features = Features(*pair, pool, tmp_path)
    ranking = list(features.ranking(pool.queries[0]))
    assert sorted(ranking) == list(range(300))
    similar = np.round(features.support @ features.support[3], 5)
    assert ranking == sorted(range(300), key=lambda place: (-similar[place], support[place].id))
    assert list(itertools.islice(features.ranking(pool.queries[0]), 5)) == ranking[:5]


def test_features_are_kept_for_this_tower_and_these_examples_alone(pair, tmp_path, monkeypatch):
    """Pictures encoded anew in every run; features of another tower, of other preparation or examples taken."""
    first = Features(*pair, Pool(TASK, Pictures(SUPPORT, [])), tmp_path)
    again = Pictures(SUPPORT, [])
    with monkeypatch.context() as patched:
        patched.setattr(Features, "_encoded", None)
        assert np.array_equal(Features(*pair, Pool(TASK, again), tmp_path).support, first.support)
    assert again.read == 6, "each medium once, for its content"
    Features(*pair, Pool(TASK, Pictures(SUPPORT[:-1], [])), tmp_path)
    assert len(list(tmp_path.rglob("*.npy"))) == 2
    model, processor = pair
    before = tower_hash(model.vision_tower, processor.image_processor)
    with torch.no_grad():
        weight = next(model.vision_tower.parameters())
        weight.view(-1)[0] += 1
        assert tower_hash(model.vision_tower, processor.image_processor) != before
        weight.view(-1)[0] -= 1
    (path,) = [path for path in tmp_path.rglob("*.npy") if np.load(path).shape[0] == 6]
    np.save(path, np.zeros((2, 3)))
    with pytest.raises(FlamingoError, match="expected 6 rows; remove the file"):
        Features(*pair, Pool(TASK, Pictures(SUPPORT, [])), tmp_path)


def test_a_query_of_the_support_is_not_encoded_again(pair, tmp_path):
    """Every query read and encoded, though its features are at hand."""
    task = dataclasses.replace(TASK, split="train")
    dataset = Pictures(SUPPORT, [])
    features = Features(*pair, Pool(task, dataset), tmp_path)
    read = dataset.read
    assert SUPPORT[next(features.ranking(SUPPORT[0]))].id == "a"
    assert dataset.read == read


def test_features_of_other_pictures_under_the_same_names_are_not_taken(pair, tmp_path):
    """Two data sets of one's own with the same names and ids, the second ranked by the first one's pictures."""

    class Others(Pictures):
        def medium(self, name):
            return picture(40 + int(name.partition("-")[0]))

    first = Features(*pair, Pool(TASK, Pictures(SUPPORT, [])), tmp_path)
    assert not np.allclose(Features(*pair, Pool(TASK, Others(SUPPORT, [])), tmp_path).support, first.support)


def test_a_task_may_name_another_tower(pair, tmp_path):
    """The model's own tower all the same, or features of the one taken for the other's."""
    folder, _ = save_backbones(tmp_path / "other")
    tower, _ = load_vision(folder)
    with torch.no_grad():
        next(tower.parameters()).mul_(-1)
    tower.save_pretrained(folder)
    task = dataclasses.replace(TASK, features=str(folder))
    own = Features(*pair, Pool(TASK, Pictures(SUPPORT, [])), tmp_path / "cache")
    other = Features(*pair, Pool(task, Pictures(SUPPORT, [])), tmp_path / "cache")
    with torch.inference_mode():
        tokens = patch_tokens(tower.eval(), pair[1].pixels([picture(3)])[0])[0]
    mean = torch.nn.functional.normalize(tokens, dim=-1).mean(0)
    np.testing.assert_allclose(other.support[1], (mean / mean.norm()).numpy(), atol=1e-5)
    assert not np.allclose(own.support, other.support)
    with pytest.raises(FlamingoError, match=r"no/tower: expected a folder"):
        Features(*pair, Pool(dataclasses.replace(TASK, features="./no/tower"), Pictures(SUPPORT, [])), tmp_path)


def test_a_cache_that_cannot_be_used_is_named(pair, tmp_path):
    """A file that breaks off, or a folder that is none, that ends in a traceback of numpy's."""
    pool = Pool(TASK, Pictures(SUPPORT, []))
    Features(*pair, pool, tmp_path)
    (path,) = tmp_path.rglob("*.npy")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(FlamingoError, match=r"made-train-\w+\.npy: expected features .*; remove the file"):
        Features(*pair, pool, tmp_path)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(FlamingoError, match=r"file/features/\S+: expected a folder to keep features in"):
        Features(*pair, pool, tmp_path / "file")


def test_a_query_is_no_example_of_the_support_with_its_id(pair, tmp_path):
    """Numbers that both splits begin from 1 with, where a query is ranked by another example's picture."""
    pool = Pool(TASK, Pictures([example("1", 3), example("2", 7)], [example("1", 7)]))
    assert next(Features(*pair, pool, tmp_path).ranking(pool.queries[0])) == 1


def test_models_of_others_get_similar_demonstrations_by_a_tower_that_is_named(tmp_path, monkeypatch):
    """A task of similar demonstrations that other models cannot be compared on."""
    folder, _ = save_backbones(tmp_path / "other")
    support, queries = [example(str(content), content) for content in range(6)], [example("near", 3), example("far", 9)]
    monkeypatch.setattr("icl_eval.sources.load_dataset", lambda name, root: Pictures(support, queries))
    monkeypatch.setenv("FLAMINGO_CACHE", str(tmp_path / "cache"))
    task = dataclasses.replace(TASK, features=str(folder), generate=Generation(4), metric="exact_match")
    task = dataclasses.replace(task, demonstrations="rices")
    (cell,) = evaluate_answerer(Stub(), [task]).cells
    features = Features(None, None, Pool(task, Pictures(support, queries)))
    for outcome in cell.outcomes:
        query = next(each for each in queries if each.id == outcome.query)
        ranking = [support[place].id for place in features.ranking(query)]
        if query.id == "near":
            assert ranking.pop(0) == "3"  # the query's own picture
        assert list(outcome.demonstrations) == ranking[:2][::-1]
    with pytest.raises(FlamingoError, match="f: features: none, expected the vision tower"):
        evaluate_answerer(Stub(), [dataclasses.replace(task, features="")])


@pytest.mark.parametrize("support", [[], [example("a", 3), example("b", 7)]])
def test_where_nothing_is_shown_nothing_is_compared(support, monkeypatch):
    """A million pictures of a support encoded for 0 shots, or a traceback where there is none."""
    queries = [example("near", 3)]
    monkeypatch.setattr("icl_eval.sources.load_dataset", lambda name, root: Pictures(support, queries))
    task = dataclasses.replace(TASK, generate=Generation(4), metric="exact_match", demonstrations="rices", shots=(0,))
    compared = []
    evaluate_answerer(Stub(), [task], similarity=compared.append)
    assert not compared
