"""The interleaved documents of the embedded world."""

import hashlib
from collections import Counter

import pytest

from data_shards.glyphs.documents import (
    PicturePool,
    episode_documents,
    naming_documents,
    pool_key,
    write_world_shards,
)
from data_shards.glyphs.pictures import load_world
from data_shards.glyphs.words import fixed_names, names_of
from data_shards.shards import open_shards
from flamingo.document import Image, Text
from flamingo.errors import FlamingoError


@pytest.fixture(scope="module")
def pool():
    return PicturePool(seed=0, variants=3)


@pytest.fixture(scope="module")
def episodes(pool):
    return list(episode_documents(200, seed=0, pool=pool))


@pytest.fixture(scope="module")
def naming(pool):
    return list(naming_documents(200, seed=0, pool=pool))


def test_episode_can_be_answered_from_its_context(episodes):
    """An episode whose last class was not shown before would train guessing."""
    for document in episodes:
        classes = document.metadata["classes"]
        assert 4 <= len(classes) <= 18
        assert 3 <= len(set(classes)) <= 9
        assert classes[-1] in classes[:-1]


def test_only_names_that_the_context_can_tell_count(episodes, naming):
    """A first name cannot be known: its loss would be noise. A fixed name can, always."""
    for document in episodes:
        classes = document.metadata["classes"]
        scored = [segment.supervised for segment in document.segments if isinstance(segment, Text)]
        assert scored == [class_id in classes[:i] for i, class_id in enumerate(classes)]
    assert all(s.supervised for document in naming for s in document.segments if isinstance(s, Text))


def test_episode_names_hold_within_it_and_change_between(episodes):
    """Two names for a class in one document contradict; one name in all documents would be learnt by heart."""
    names_of_class: dict[int, set[str]] = {}
    for document in episodes:
        pairs = set(zip(document.metadata["classes"], document.metadata["names"], strict=True))
        assert len({c for c, _ in pairs}) == len({n for _, n in pairs}) == len(pairs)
        for class_id, name in pairs:
            assert name in names_of("train")
            names_of_class.setdefault(class_id, set()).add(name)
    often = [names for names in names_of_class.values() if len(names) >= 2]
    assert len(often) > 50


def test_every_picture_is_followed_by_its_name(episodes, naming):
    """A text beside the wrong picture teaches that names mean nothing."""
    for document in [*episodes, *naming]:
        pictures = [i for i, segment in enumerate(document.segments) if isinstance(segment, Image)]
        assert len(pictures) == len(document.metadata["names"]) == len(document.metadata["classes"])
        for place, name in zip(pictures, document.metadata["names"], strict=True):
            following = document.segments[place + 1]
            assert isinstance(following, Text)
            assert name in following.text
        assert document.complete


def test_pictures_show_the_class_they_are_said_to_show(episodes, pool):
    """Metadata and pictures that drift apart would make every count about the data wrong."""
    document = episodes[0]
    shown = [medium.data for medium in document.media]
    keys = zip(document.metadata["classes"], document.metadata["variants"], strict=True)
    assert shown == load_world().pngs([pool_key(class_id, variant, pool.seed) for class_id, variant in keys])


def test_evaluation_template_is_the_most_frequent(episodes):
    """The evaluation asks `<image>{name}<|endofchunk|>`: training must know that form."""
    plain = sum(document.segments[1].text == document.metadata["names"][0] for document in episodes)
    assert 0.85 < plain / len(episodes) < 1


def test_naming_uses_fixed_names_of_all_known_classes(naming):
    """A known class under a second name, or never named, could not be asked for without examples."""
    fixed = fixed_names()
    seen = Counter()
    for document in naming:
        for class_id, name in zip(document.metadata["classes"], document.metadata["names"], strict=True):
            assert fixed[class_id] == name
            seen[class_id] += 1
    assert set(seen) == set(load_world().known)


def test_only_train_classes_are_shown(episodes, naming):
    """A test class in a training document would make the held-out score a lie."""
    train = set(load_world().split("train"))
    assert {c for document in [*episodes, *naming] for c in document.metadata["classes"]} <= train


def test_document_is_a_function_of_seed_and_number(episodes, pool):
    """Documents that depended on where the generator began would differ between runs, and repeat across processes."""
    assert list(episode_documents(5, seed=0, start=120, pool=pool)) == episodes[120:125]
    other = next(episode_documents(1, seed=1, pool=pool))
    assert other.metadata != episodes[0].metadata
    assert len({document.key for document in episodes}) == len(episodes)


def _sums(folder):
    return {p.relative_to(folder): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def test_shards_do_not_depend_on_the_number_of_processes(tmp_path):
    """A run on another machine would read other data under the same seed."""
    one = write_world_shards(tmp_path / "one", naming=20, episodes=30, seed=5, processes=1, variants=1)
    two = write_world_shards(tmp_path / "two", naming=20, episodes=30, seed=5, processes=2, variants=1)
    assert one == two
    assert _sums(tmp_path / "one") == _sums(tmp_path / "two")
    assert one["naming"]["documents"] == len(open_shards(tmp_path / "one" / "naming")) == 20
    episodes = open_shards(tmp_path / "one" / "episodes")
    assert one["episodes"]["documents"] == len(episodes) == 30
    expected = list(episode_documents(30, seed=5, pool=PicturePool(5, 1)))[17]
    assert episodes[17].metadata == expected.metadata
    assert [medium.data for medium in episodes[17].media] == [medium.data for medium in expected.media]
    assert one["episodes"]["pairs"] >= 30


def test_a_number_below_one_is_named(tmp_path):
    """An empty source would only be noticed when training finds no batch."""
    with pytest.raises(FlamingoError, match="episodes=0"):
        write_world_shards(tmp_path, naming=1, episodes=0)
