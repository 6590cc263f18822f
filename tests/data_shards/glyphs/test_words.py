"""Vocabulary, tokenizer, invented names and the text world."""

import random
import string

import numpy as np
import pytest

from data_shards.glyphs.words import (
    ANSWERS,
    END_OF_CHUNK,
    NAMING_TEMPLATES,
    NUMBERS,
    QUESTIONS,
    SPACED_TURN,
    SPECIAL_TOKENS,
    TURN,
    WORDS,
    TextWorld,
    build_tokenizer,
    fixed_names,
    fresh_names,
    names_of,
    training_questions,
    vocabulary,
)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_ascii_text_survives_the_tokenizer(tokenizer):
    """A lost space or an unknown token would change a prompt without a trace."""
    rng = random.Random(0)
    pieces = [*string.printable[:95], "\n", "\t", *WORDS, *names_of("train")[:200], *[" "] * 150, *SPECIAL_TOKENS[4:]]
    for _ in range(500):
        text = "".join(rng.choices(pieces, k=rng.randint(0, 40)))
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids, text
        assert tokenizer.decode(ids) == text


def test_both_spacings_of_a_turn_stay_apart(tokenizer):
    """Otter's two template spacings are different texts; a tokenizer that strips spaces would merge them."""
    close, spaced = TURN.format(q="what is this?", a="kobu"), SPACED_TURN.format(q="what is this?", a="kobu")
    assert tokenizer(close).input_ids != tokenizer(spaced).input_ids
    assert tokenizer.decode(tokenizer(close).input_ids) == close
    assert tokenizer.decode(tokenizer(spaced).input_ids) == spaced


def test_offsets_point_into_the_text(tokenizer):
    """Label masks are made from offsets: a shifted one would supervise the wrong token."""
    text = f"User: what is this? GPT:<answer>kobu{END_OF_CHUNK}a bold é."
    encoded = tokenizer(text, return_offsets_mapping=True)
    shown = [text[start:end] for start, end in encoded.offset_mapping]
    assert shown[:5] == ["User", ":", " ", "what", "is"]
    assert shown[-8:] == ["<answer>", "ko", "bu", END_OF_CHUNK, "a", "bold", "é", "."]


def test_names_are_two_tokens_and_no_words(tokenizer):
    """A name of one or three tokens, or one that is a word already, would be easier or harder than the others."""
    words = set(vocabulary())
    for split in ("train", "unseen"):
        for name in names_of(split):
            assert tokenizer.tokenize(name) == [name[:2], "##" + name[2:]]
            assert name not in words


def test_names_of_the_splits_are_disjoint():
    """A name of the evaluation, or of a known class, that turns up in training is not fresh."""
    train, unseen, fixed = set(names_of("train")), set(names_of("unseen")), set(fixed_names().values())
    assert not train & unseen
    assert not fixed & (train | unseen)
    assert len(fixed) == 60
    assert len(train) > 3000
    assert len(unseen) > 300


def test_fresh_names_differ_and_follow_their_generator():
    """Twice the same name in one episode would make two classes one."""
    for make in (random.Random, np.random.default_rng):
        drawn = fresh_names(make(4), 50)
        assert len(set(drawn)) == 50
        assert drawn == fresh_names(make(4), 50)
        assert drawn != fresh_names(make(5), 50)
        assert set(fresh_names(make(4), 50, "unseen")) <= set(names_of("unseen"))


def test_vocabulary_holds_what_instruction_tuning_will_say(tokenizer):
    """A word of a template spelt out letter by letter would force a later issue to remake the language model."""
    phrases = [question.format(name="") for wordings in QUESTIONS.values() for question in wordings]
    phrases += [form.format(a="") for forms in ANSWERS.values() for form in forms]
    phrases += [template.format(name="") for template in NAMING_TEMPLATES]
    for phrase in [*phrases, *NUMBERS, "User: GPT:", "same different yes no plain from to"]:
        for word in "".join(c if c.isalnum() else " " for c in phrase).split():
            assert len(tokenizer.tokenize(word)) == 1, word


def test_unseen_wordings_and_names_stay_out_of_the_text_world(tokenizer):
    """An evaluation on unseen wordings and names would measure memory if the language model had read them."""
    world = TextWorld(tokenizer, 7)
    text = "".join(world.document(kind, 128) for kind in ("few_shot", "instructions", "facts") for _ in range(300))
    asked = 0
    for kind, wordings in QUESTIONS.items():
        asked += sum(question.partition("{")[0] in text for question in training_questions(kind))
        for question in set(wordings) - set(training_questions(kind)):
            before, _, after = question.partition("{name}")
            assert not (before in text and not after) or not any(question == q for q in text.split("User:")), question
            assert f"{question} GPT" not in text
    assert asked > 20
    words = set("".join(c if c.isalpha() else " " for c in text).split())
    assert not words & set(names_of("unseen"))
    assert not words & set(fixed_names().values())
    assert len(words & set(names_of("train"))) > 500


def test_text_world_is_a_function_of_its_seed(tokenizer):
    """Language models of one seed must be trained on the same text."""
    shares = {"repeats": 0.3, "few_shot": 0.3, "instructions": 0.2, "facts": 0.2}
    ids, labels = TextWorld(tokenizer, 1).batch(shares, 12, 64)
    again, _ = TextWorld(tokenizer, 1).batch(shares, 12, 64)
    other, _ = TextWorld(tokenizer, 2).batch(shares, 12, 64)
    assert ids.shape == labels.shape == (12, 64)
    assert (ids == again).all()
    assert (ids != other).any()


def test_repeats_are_scored_from_the_second_occurrence_on(tokenizer):
    """Scoring the first, random, occurrence would drown in noise what the repeats teach."""
    ids, labels = TextWorld(tokenizer, 1).sequence({"repeats": 1.0}, 64, vocabulary=90)
    first = labels.count(-100)
    assert 4 <= first <= 17
    assert labels[:first] == [-100] * first
    assert labels[first:] == ids[first:]
    period = first - 1  # and <s>
    assert ids[first:] == ids[first - period : -period]
    assert len(set(ids)) <= 91
