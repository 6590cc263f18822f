"""The embedded world's instruction set, in MIMIC-IT's files."""

import json
from collections import Counter

import pyarrow.parquet as pq
import pytest

from data_shards.account import Account
from data_shards.glyphs.instructions import (
    CONTEXTS,
    DATASETS,
    KINDS,
    exchanges,
    write_held_out_instructions,
    write_training_instructions,
)
from data_shards.glyphs.pictures import POSITIONS, STYLES, load_world
from data_shards.glyphs.words import ANSWERS, QUESTIONS, held_out_questions, names_of, story, training_questions
from data_shards.sources.mimic_it import MimicItReader
from flamingo.document import Text, Video
from flamingo.errors import FlamingoError
from flamingo.processing import END_OF_CHUNK

TOPICS = {kind: "name" if kind == "naming" else kind for kind in KINDS}
QUERIES = 3


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    write_training_instructions(folder, dict.fromkeys(KINDS, QUERIES), seed=1)
    return folder


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held_out")
    write_held_out_instructions(folder, QUERIES, split="validation", seed=1)
    return folder


def read(folder, kind):
    """The reader of a kind's dataset, and its documents."""
    mixture = MimicItReader(str(folder / "mixture.yaml"), cache=str(folder / "index"))
    reader = next(each for each in mixture.datasets() if each.name == DATASETS[kind].name)
    account = Account()
    records = [record for part in reader.parts() for record in reader.records(part)]
    documents = [document for record in records for document in reader.documents(record, account)]
    return reader, documents


def test_every_query_becomes_a_document_by_the_table_of_subsets(training):
    """A dataset whose name or ids the reader takes for another subset would show other pictures than its text means."""
    pictures = {"naming": {1}, "style": {1}, "position": {1}, "same": {1}, "story": {2, 3}, "sequence": {1}}
    frames = {"same": 2, "sequence": 3}
    for kind in KINDS:
        _, documents = read(training, kind)
        assert len(documents) == QUERIES, kind
        for document in documents:
            turns = len(document.metadata["ids"])
            assert turns == DATASETS[kind].taught_with + 1
            assert min(pictures[kind]) * turns <= len(document.media) <= max(pictures[kind]) * turns
            assert [type(segment) for segment in document.segments if isinstance(segment, Text)] == 2 * turns * [Text]
            for medium in document.media:
                assert (len(medium.frames) if isinstance(medium, Video) else 0) == frames.get(kind, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_held_out_was_never_trained_on(kind):
    """A class, name or wording of training in a held-out query would make its score a memory."""
    parts = {"train": (set(), set(), set()), "validation": (set(), set(), set()), "test": (set(), set(), set())}
    for split, (classes, wordings, answers) in parts.items():
        for turn in (turn for number in range(60) for turn in exchanges(kind, number, split=split)):
            classes.update(key.class_id for key in turn.pictures)
            wordings.add(turn.question)
            answers.update((turn.answer, *turn.candidates))
    for split, (classes, wordings, answers) in parts.items():
        assert classes <= set(load_world().split(split))
        known = training_questions if split == "train" else held_out_questions
        assert wordings == set(known(TOPICS[kind]))
        if kind == "naming":
            assert answers <= set(names_of("train" if split == "train" else "unseen"))
    assert set(training_questions(TOPICS[kind])).isdisjoint(held_out_questions(TOPICS[kind]))
    assert {*training_questions(TOPICS[kind]), *held_out_questions(TOPICS[kind])} == set(QUESTIONS[TOPICS[kind]])


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_what_the_pictures_show(kind):
    """An answer about another picture would teach that pictures mean nothing."""
    for turn in (turn for number in range(100) for turn in exchanges(kind, number)):
        styles, places = [key.style for key in turn.pictures], [key.position for key in turn.pictures]
        classes = {key.class_id for key in turn.pictures}
        if kind == "style":
            assert (turn.answer, places) == (styles[0], [None])
        elif kind == "position":
            assert (turn.answer, styles) == (places[0], [None])
        elif kind == "same":
            assert turn.answer == ("same" if len(classes) == 1 else "different")
            assert len(set(turn.pictures)) == 2  # not one picture twice
        elif kind == "story":
            assert turn.answer == story([f"{style} glyph" for style in styles])
        elif kind == "sequence":
            assert (turn.answer, places[1], len(classes)) == (f"from {places[0]} to {places[2]}", None, 1)


def test_a_name_holds_within_a_context_and_changes_between():
    """A name kept for a class would be learnt by heart; one that its examples do not show could only be guessed."""
    names_of_class: dict[int, set[str]] = {}
    first_example = Counter()
    for number in range(1500):
        *examples, query = exchanges("naming", number)
        shown = {turn.pictures[0].class_id: turn.answer for turn in examples}
        assert [turn.pictures[0].class_id for turn in examples[:2]] == list(shown)  # two shots show both
        assert all(shown[turn.pictures[0].class_id] == turn.answer for turn in examples)
        assert query.answer == shown[query.pictures[0].class_id]
        first_example[query.answer == examples[0].answer] += 1
        for class_id, name in shown.items():
            names_of_class.setdefault(class_id, set()).add(name)
    assert sum(len(names) > 1 for names in names_of_class.values()) > 500
    assert 0.45 < first_example[True] / 1500 < 0.55  # to repeat an example's name is no better than chance


@pytest.mark.parametrize("kind", KINDS)
def test_candidates_hold_the_answer_once_and_at_no_fixed_place(kind):
    """A right answer that stood first would be chosen by a model that knows nothing; a second one would split it."""
    queries = [exchanges(kind, number, split="test")[-1] for number in range(300)]
    places = Counter(query.candidates.index(query.answer) for query in queries)
    numbers = {len(query.candidates) for query in queries}
    assert all(len(set(query.candidates)) == len(query.candidates) for query in queries)
    expected = {"naming": 4, "style": len(STYLES), "position": len(POSITIONS), "same": 2, "story": 6, "sequence": 12}
    assert numbers == {expected[kind]}
    assert len(places) == expected[kind]
    assert max(places.values()) < 1.6 * 300 / expected[kind]


def test_the_concise_form_is_what_is_taught(training):
    """The tuned model is to take up the concise style: a sentence among the answers would teach another one."""
    for kind in ("style", "position", "same", "sequence"):
        _, documents = read(training, kind)
        words = {turn.candidates for number in range(QUERIES) for turn in exchanges(kind, number, seed=1)}
        told = [segment.text for document in documents for segment in document.segments if isinstance(segment, Text)]
        answers = [text.removesuffix(END_OF_CHUNK) for text in told[1::2]]
        assert ANSWERS[kind][0] == "{a}"
        assert set(answers) <= {answer for candidates in words for answer in candidates}


def test_every_held_out_query_has_examples_of_its_kind_with_pictures_of_their_own(held_out):
    """An evaluation without examples of some kind, or with candidates of another query, would compare nothing."""
    candidates = json.loads((held_out / "candidates.json").read_text())
    kinds = json.loads((held_out / "kinds.json").read_text())
    assert Counter(kinds.values()) == dict.fromkeys(KINDS, QUERIES)
    assert list(candidates) == list(kinds)
    for kind in KINDS:
        reader, _ = read(held_out, kind)
        contexts = json.loads((held_out / f"{DATASETS[kind].name}_train.json").read_text())
        assert [query for query, each in kinds.items() if each == kind] == list(contexts)
        for number, (query, examples) in enumerate(contexts.items()):
            made = exchanges(kind, number, split="validation", seed=1)
            turns = [reader.turn(key) for key in (*examples, query)]
            assert [(turn.question, turn.answer) for turn in turns] == [(each.question, each.answer) for each in made]
            assert candidates[query] == list(made[-1].candidates)
            assert len(examples) == CONTEXTS
            assert all(turn.media for turn in turns)


@pytest.mark.parametrize("kind", ["same", "sequence"])
def test_pictures_in_the_file_are_those_of_their_ids(kind, tmp_path):
    """An id that stood for two pictures would put one of them beside the answer of the other, unseen."""
    write_training_instructions(tmp_path, {kind: 40}, seed=1)
    table = pq.read_table(tmp_path / f"{DATASETS[kind].name}_images.parquet")
    assert json.loads(table.schema.metadata[b"pandas"])["index_columns"] == ["__index_level_0__"]
    assert table.column_names == ["base64", "__index_level_0__"]
    reader, _ = read(tmp_path, kind)
    for number, query in enumerate(json.loads((tmp_path / f"{DATASETS[kind].name}_train.json").read_text())):
        shown = [frame.data for medium in reader.turn(query).media for frame in medium.frames]
        assert shown == load_world().pngs(exchanges(kind, number, seed=1)[-1].pictures)


def test_files_are_a_function_of_the_seed_alone(training, tmp_path):
    """Files that depended on the processes, or a seed without effect, would make runs differ, or not differ, unseen."""
    write_training_instructions(tmp_path / "again", dict.fromkeys(KINDS, QUERIES), seed=1, processes=2)
    names = sorted(path.name for path in training.iterdir() if path.is_file())
    assert len(names) == 3 * len(KINDS) + 1
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (training / name).read_bytes()
    other = [exchanges(kind, 0, seed=2) for kind in KINDS]
    assert all(found != exchanges(kind, 0, seed=1) for kind, found in zip(KINDS, other, strict=True))


def test_what_cannot_be_is_named(tmp_path):
    """A number, kind or split that is silently another one would be noticed in the scores, if at all."""
    with pytest.raises(FlamingoError, match="queries of style=0: expected a positive"):
        write_training_instructions(tmp_path, {"style": 0})
    with pytest.raises(FlamingoError, match="kind 'colour': expected one of naming"):
        write_training_instructions(tmp_path, {"colour": 1})
    with pytest.raises(FlamingoError, match="split 'train': expected validation or test"):
        write_held_out_instructions(tmp_path, 1, split="train")
    with pytest.raises(FlamingoError, match="processes=0"):
        write_training_instructions(tmp_path, {"style": 1}, processes=0)
    with pytest.raises(FlamingoError, match="split 'scripts'"):
        exchanges("style", 0, split="scripts")
    assert not list(tmp_path.iterdir())
