"""Documents to training sequences: marks, labels, windows, views, packed rows."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards.faults import NOTHING_SUPERVISED, SampleError
from data_shards.sequences import Sequences
from flamingo import Document, FlamingoError, FlamingoProcessor, Text, Video
from flamingo.document import Segment
from flamingo.images import View
from flamingo.instructions import Turn, instruction_document
from flamingo.media import visible_media
from flamingo.processing import IGNORED, RULES, Encoding
from tests.tiny import picture, tiny_flamingo

A, B, C = picture(1), picture(2), picture(3)
EOC = "<|endofchunk|>"


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> FlamingoProcessor:
    """Of a tiny Flamingo over llama: one token a character."""
    return tiny_flamingo(tmp_path_factory.mktemp("tiny"))[1]


@pytest.fixture(scope="module")
def without_bos(processor: FlamingoProcessor) -> FlamingoProcessor:
    """The same whose tokenizer begins with nothing, as GPT-NeoX's."""
    other = copy.deepcopy(processor)
    other.tokenizer.bos_token = None
    return other


def shown(encoding: Encoding, processor: FlamingoProcessor) -> str:
    """The tokens, in square brackets those that do not count."""
    runs = groupby(
        zip(encoding.input_ids, encoding.labels, strict=True), lambda pair: "[{}]" if pair[1] == IGNORED else "{}"
    )
    text = "".join(
        how.format("".join(processor.tokenizer.decode([token]) for token, _ in pairs)) for how, pairs in runs
    )
    return text.replace(EOC, "|").replace("<image>", "#")


def generator(seed: int = 0) -> np.random.Generator:
    """A fresh one."""
    return np.random.default_rng(seed)


# -- rules -------------------------------------------------------------------------------------------------------------

QUESTION = Text("Q:", supervised=False)
TABLE: list[tuple[tuple[Segment, ...], str, str]] = [  # segments, flamingo, open_flamingo; # <image>, | <|endofchunk|>
    ((A, Text("cat")), "[<s>#]cat|</s>", "[<s>#]cat|[</s>]"),
    ((A, Text("cat "), B, Text(" dog")), "[<s>#]cat |[#] dog|</s>", "[<s>#]cat|[#]dog|[</s>]"),
    ((Text("lead "), A, Text("cat")), "[<s>]lead |[#]cat|</s>", "[<s>lead#]cat|[</s>]"),
    ((Text("le"), Text(" "), A, Text(" "), Text(" cat")), "[<s>]le |[#]  cat|</s>", "[<s>le#]cat|[</s>]"),
    ((A, B, Text("two")), "[<s>##]two|</s>", "[<s>#]|[#]two|[</s>]"),
    ((A, Text("cat"), B), "[<s>#]cat|[#]</s>", "[<s>#]cat|[#]|[</s>]"),
    ((A, QUESTION, Text("yes"), B, QUESTION), "[<s>#Q:]yes|[#Q:|]</s>", "[<s>#Q:]yes|[#Q:|</s>]"),
    ((A, Text(f"x{EOC}"), B, Text("y")), "[<s>#]x|[#]y|</s>", "[<s>#]x|[#]y|[</s>]"),
    ((Text("only"),), "[<s>]only|</s>", "[<s>]only|</s>"),
    ((QUESTION, Text("a")), "[<s>Q:]a|</s>", "[<s>Q:]a|</s>"),
    ((Video((A, B)), Text("run")), "[<s>#]run|</s>", "[<s>#]run|[</s>]"),
]


@pytest.mark.parametrize("row", TABLE)
def test_marks_and_what_counts(processor: FlamingoProcessor, row: tuple[tuple[Segment, ...], str, str]) -> None:
    """Catches a mark in the wrong place, a space beside it, and loss on a lead, a question, a mark or an end."""
    segments, *expected = row
    for rules, tokens in zip(("flamingo", "open_flamingo"), expected, strict=True):
        encoding = Sequences(processor, rules=rules)(Document(segments), generator())
        assert shown(encoding, processor) == tokens, rules


TEXTS = st.text("ab .", min_size=1, max_size=30).filter(str.strip)
SEGMENTS = st.lists(
    st.one_of(st.builds(Text, TEXTS, st.sampled_from([True, True, False])), st.sampled_from([A, B, C])),
    min_size=1,
    max_size=12,
)
DOCUMENTS = st.builds(lambda segments: Document(tuple(segments), "k"), SEGMENTS)


@given(DOCUMENTS)
@settings(deadline=None, max_examples=60)
def test_open_flamingo_counts_what_its_own_trainer_counts(processor: FlamingoProcessor, document: Document) -> None:
    """Catches labels that differ from a reading of the ids alone: nothing before the first medium, on it, or between
    the end of a chunk and the next medium; and texts that lose more than spaces.
    """
    document = Document(tuple(Text(s.text) if isinstance(s, Text) else s for s in document.segments))
    encoding = processor.encode(document, eos=True, rules="open_flamingo")
    image, end = (processor.tokenizer.convert_tokens_to_ids(mark) for mark in ("<image>", EOC))
    counts = not document.media
    for token, label in zip(encoding.input_ids[1:], encoding.labels[1:], strict=True):
        assert label == (token if counts and token != image else IGNORED)
        counts = (counts or token == image) and (token != end or not document.media)
    plain = "".join(segment.text for segment in document.segments if isinstance(segment, Text))
    assert encoding.text.replace("<image>", "").replace(EOC, "").replace(" ", "") == plain.replace(" ", "")


def test_a_space_comes_before_texts_with_a_probability(processor: FlamingoProcessor) -> None:
    """Catches a space that is doubled, put inside a chunk, drawn text by text, or drawn where it is not wanted."""
    document = Document((Text("a"), Text("b"), A, Text("c"), B, Text(" d"), C, Text("\ne")))
    plain, spaced = "[<s>]ab|[#]c|[#] d|[#]\ne|</s>", "[<s>] ab|[#] c|[#] d|[#]\ne|</s>"
    assert shown(Sequences(processor, leading_space=1)(document, generator()), processor) == spaced
    half = [shown(Sequences(processor, leading_space=0.5)(document, generator(n)), processor) for n in range(60)]
    assert set(half) == {plain, spaced} and 15 < half.count(spaced) < 45
    unused = generator()
    assert shown(Sequences(processor)(document, unused), processor) == plain
    assert unused.random() == generator().random(), "what is not wanted is not drawn"


# -- windows -----------------------------------------------------------------------------------------------------------


@given(DOCUMENTS, st.integers(4, 40), st.integers(1, 4), st.integers(0, 9), st.sampled_from(RULES))
@settings(deadline=None, max_examples=150)
def test_every_window_is_a_training_sequence(
    processor: FlamingoProcessor,
    without_bos: FlamingoProcessor,
    document: Document,
    max_tokens: int,
    max_media: int,
    seed: int,
    rules: Any,
) -> None:
    """Catches marks without media, media without marks, windows too long or that train nothing, labels of other
    tokens, an end that is none, and windows that another run would not draw.
    """
    for used in (processor, without_bos):
        sequences = Sequences(used, max_tokens, max_media, rules=rules)
        whole = used.encode(document, eos=True, rules=rules)
        fits = len(whole.input_ids) <= max_tokens and len(document.media) <= max_media
        end = used.tokenizer.eos_token_id
        try:
            encoding = sequences(document, generator(seed))
        except SampleError:
            assert not fits or set(whole.labels[1:]) <= {IGNORED, end}
            continue
        assert encoding == sequences(document, generator(seed))
        ids, labels = encoding.input_ids, encoding.labels
        assert len(ids) == len(labels) <= max_tokens
        assert set(labels[1:]) - {IGNORED, end}, "more to learn than that it ends"
        assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
        assert ids.count(used.image_token_id) == len(encoding.media) <= max_media
        head = used.tokenizer.bos_token_id is not None
        assert not head or ids[0] == used.tokenizer.bos_token_id
        runs = [document.media[n : n + len(encoding.media)] for n in range(len(document.media) + 1)]
        assert encoding.media in runs
        if len(document.media) <= max_media:  # else an end may be closed that is none in the whole document
            at = [i for i in range(len(whole.input_ids)) if whole.input_ids[i : i + len(ids) - head] == ids[head:]]
            marks = [whole.input_ids[:i].count(used.image_token_id) for i in at]
            assert encoding.media in [runs[n] for n in marks], "the media of its marks"
        assert not fits or encoding == whole


def test_every_window_of_a_long_text_is_drawn_equally_often(processor: FlamingoProcessor) -> None:
    """Catches long documents of which the beginning alone is ever read, or whose ends are never or too often."""
    text = "".join(chr(ord("a") + n) for n in range(20))
    sequences = Sequences(processor, max_tokens=9)
    drawn = [shown(sequences(Document((Text(text),)), generator(n)), processor) for n in range(1500)]
    every = [text[n : n + 8] for n in range(13)] + [text[13:] + "|", text[14:] + "|</s>"]
    counted = [drawn.count("[<s>]" + window) for window in every]
    assert sum(counted) == 1500 and min(counted) > 60 and max(counted) < 150


def test_windows_of_open_flamingo_have_their_medium(processor: FlamingoProcessor) -> None:
    """Catches loss on text whose medium was cut off, windows in which no text has one, and another window's medium."""
    document = Document((A, Text("a" * 30), B, Text("b" * 30)))
    make = Sequences(processor, 12, rules="open_flamingo")
    windows = {shown(each, processor): each.media for each in (make(document, generator(n)) for n in range(300))}
    assert {window for window in windows if "[<s>#]" in window} == {"[<s>#]" + "a" * 10, "[<s>#]" + "b" * 10}
    assert "[<s>aaaaaaaa|#]b" in windows and "[<s>aa|#]bbbbbbb" in windows and len(windows) == 11
    assert all(media == ((A,) if "#]a" in window else (B,)) for window, media in windows.items())
    assert all("#]a" in window or "#]b" in window for window in windows)
    flamingo = {shown(Sequences(processor, 12)(document, generator(n)), processor) for n in range(300)}
    assert "[<s>]" + "a" * 11 in flamingo and "[<s>]aaaaaaaa|[#]b" in flamingo and len(flamingo) == 17


def test_windows_find_what_counts(processor: FlamingoProcessor, without_bos: FlamingoProcessor) -> None:
    """Catches sequences thrown away though another window of their document trains something."""
    silent = Text("-" * 50, supervised=False)
    needle = Document((silent, Text("x"), silent, A, silent), complete=False)
    for seed in range(40):
        encoding = Sequences(processor, max_tokens=10)(needle, generator(seed))
        assert "]x" in shown(encoding, processor)
    chunks = Document(sum(((A, silent) for _ in range(5)), ()) + (B, Text("x")) + (A, silent) * 3, complete=False)
    for seed in range(40):
        assert B in Sequences(processor, max_tokens=200, max_media=2)(chunks, generator(seed)).media
    first = Document((Text("x"), silent), complete=False)  # has nothing before it from which it could be predicted
    assert shown(Sequences(processor, 10)(first, generator()), processor).startswith("[<s>]x[-")
    for max_tokens in (10, 100):
        with pytest.raises(SampleError, match="document [?]: no token of its sequence counts in the loss") as error:
            Sequences(without_bos, max_tokens)(first, generator())
        assert error.value.reason == NOTHING_SUPERVISED


ROUNDS = [Turn(f"question {n}", f"answer {n}") for n in range(6)]


@pytest.mark.parametrize(
    ("turns", "begins"),
    [
        ([replace(ROUNDS[0], media=(A,)), *ROUNDS[1:]], 1),  # a conversation about one picture
        ([replace(turn, media=(A,)) for turn in ROUNDS], 6),  # a picture in every example
        ([replace(turn, media=(A, Video((B, C)))) for turn in ROUNDS], 6),  # stories
        (ROUNDS, 1),  # no picture at all
    ],
)
@pytest.mark.parametrize("without_beginning", [False, True])
def test_an_answer_keeps_its_question_and_its_media(
    processor: FlamingoProcessor,
    without_bos: FlamingoProcessor,
    turns: list[Turn],
    begins: int,
    without_beginning: bool,
) -> None:
    """Catches windows that begin behind the picture or the question, so that the model learns to invent, and examples
    that are never read.
    """
    used = without_bos if without_beginning else processor
    document = instruction_document(turns, answer_mark=False)
    sequences = Sequences(used, max_tokens=90, max_media=12)
    assert len(used.encode(document, eos=True).input_ids) > 150
    drawn = [sequences(document, generator(seed)) for seed in range(120)]
    starts = {used.tokenizer.decode(each.input_ids).removeprefix("<s>") for each in drawn}
    assert len(starts) == begins
    marks = "<image>" * len(turns[0].media)
    assert all(each.startswith(f"{marks}User:question") for each in starts)
    assert all(len(each.input_ids) <= 90 for each in drawn)
    for each in drawn:
        _, last = visible_media(torch.tensor([each.input_ids]), used.image_token_id)
        supervised = torch.tensor([each.labels]) != IGNORED
        assert not marks or (last[supervised] > 0).all()
    if begins > 1:
        assert any(each.input_ids[-1] == used.tokenizer.eos_token_id for each in drawn), "the last one too"


def test_a_question_keeps_all_its_media(processor: FlamingoProcessor) -> None:
    """Catches windows of so many media that begin among those of one question, and a story that is never read."""
    stories = [replace(turn, media=(A, Video((B, C)))) for turn in ROUNDS]
    sequences = Sequences(processor, max_tokens=1000, max_media=5)
    document = instruction_document(stories, answer_mark=False)
    drawn = [sequences(document, generator(seed)) for seed in range(120)]
    texts = [processor.tokenizer.decode(each.input_ids).removeprefix("<s>") for each in drawn]
    begun = [text.split("User:") for text in texts]
    assert all(before.endswith("<image><image>") for before, *others in begun for before in (before, *others[:-1]))
    assert {first for _, first, *_ in begun} >= {f"question {n} GPT:answer {n}{EOC}<image><image>" for n in range(5)}
    assert all(len(each.media) <= 5 for each in drawn)
    assert {len(each.media) for each in drawn if each.input_ids[-1] == processor.tokenizer.eos_token_id} == {2, 4}
    alone = replace(stories[0], media=(A, B, C, A, B, C))
    assert len(sequences(instruction_document([alone]), generator()).media) == 5, "more than there is room for"


def test_short_documents_draw_nothing(processor: FlamingoProcessor) -> None:
    """Catches numbers drawn where there is nothing to choose, which move all that are drawn after them."""
    for document in (Document((A, Text("cat"))), Document((Text("cat"),))):
        used = generator()
        Sequences(processor, max_tokens=9, max_media=1)(document, used)
        assert used.random() == generator().random()


# -- views -------------------------------------------------------------------------------------------------------------


def test_views_are_drawn_for_each_medium(processor: FlamingoProcessor) -> None:
    """Catches views out of their bounds, equal for all media, unequal for the frames of one, or lost on the way."""
    film = Document((A, Text("x"), A, Text("y")))
    assert Sequences(processor)(film, generator()).views is None
    assert Sequences(processor, flip=1)(Document((Text("x"),)), generator()).views is None
    assert Sequences(processor, flip=1)(film, generator()).views == (View(flip=True), View(flip=True))
    sequences = Sequences(processor, flip=0.5, crop=0.25)
    views = [view for n in range(50) for view in sequences(film, generator(n)).views or ()]
    assert len(set(views)) == 100 and 30 < sum(view.flip for view in views) < 70
    crops = np.array([view.crop for view in views])
    assert (crops.min(0) >= [0.25, 0.75, 0, 0]).all() and (crops.max(0) <= [1, 4 / 3, 1, 1]).all()
    assert (crops.min(0) < [0.35, 0.8, 0.1, 0.1]).all() and (crops.max(0) > [0.9, 1.25, 0.9, 0.9]).all()
    encodings = [sequences(film, generator(1)), sequences(Document((B, Text("z"))), generator(2))]
    batch = sequences.collate(encodings)
    ready = [processor.pixels(each.media, each.views) for each in encodings]
    assert torch.equal(batch["pixel_values"], torch.cat(ready))
    assert torch.equal(sequences.collate(encodings, pixels=ready)["pixel_values"], batch["pixel_values"])
    assert not torch.equal(batch["pixel_values"], processor.pixels([A, A, B]))
    assert Sequences(processor)(film, generator(3)).input_ids == encodings[0].input_ids


# -- packing -----------------------------------------------------------------------------------------------------------

LENGTHS = st.lists(st.tuples(st.integers(1, 20), st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=30)


@given(LENGTHS, st.sampled_from([None, 3, 5]))
@settings(deadline=None, max_examples=200)
def test_packed_rows_are_bounded_and_lose_nothing(
    processor: FlamingoProcessor, given: list[tuple[int, int, int]], row_media: int | None
) -> None:
    """Catches lost or doubled sequences, rows that are too long or mix sources, and rows that could have been one."""
    sequences = Sequences(processor, 20, 3, packing=True, row_media=row_media)
    encodings = [Encoding([5] * tokens, [5] * tokens, (A,) * media, "") for tokens, media, _ in given]
    rows = sequences.pack(encodings, [source for _, _, source in given])
    assert sorted(number for row in rows for number in row) == list(range(len(given)))
    assert rows == sorted(rows) and all(row == sorted(row) for row in rows)
    sizes = []
    for row in rows:
        tokens, media = (sum(given[number][field] for number in row) for field in (0, 1))
        (source,) = {given[number][2] for number in row}
        assert tokens <= 20 and media <= (row_media or 100)
        sizes.append((source, tokens))
    for source in range(3) if row_media is None else ():
        least = sorted(tokens for each, tokens in sizes if each == source)[:2]
        assert len(least) < 2 or sum(least) > 20
    assert rows == sequences.pack(encodings, [source for _, _, source in given])
    assert Sequences(processor, 20, 3).pack(encodings, [0] * len(given)) == [[n] for n in range(len(given))]


def test_long_sequences_are_placed_first(processor: FlamingoProcessor) -> None:
    """Catches packing in the order of arrival, which fills rows worse."""
    encodings = [Encoding([5] * tokens, [5] * tokens, (), "") for tokens in (4, 4, 6, 6)]
    assert Sequences(processor, 10, packing=True).pack(encodings, [0] * 4) == [[0, 2], [1, 3]]


def test_packed_batches_hold_the_rows(processor: FlamingoProcessor) -> None:
    """Catches pixels in the order of arrival beside rows in another, and packing that is not collated as such."""
    sequences = Sequences(processor, max_tokens=30, packing=True)
    documents = [Document((A, Text("a" * 20))), Document((B, Text("b" * 15))), Document((C, Text("c")))]
    encodings = [sequences(document, generator()) for document in documents]
    rows = sequences.pack(encodings, [0, 0, 0])
    assert rows == [[0, 2], [1]]
    ready = [processor.pixels(each.media) for each in encodings]
    batch = sequences.collate(encodings, rows=rows, pixels=ready)
    expected = processor.collate_packed([[encodings[0], encodings[2]], [encodings[1]]])
    assert batch.keys() == expected.keys() and "documents" in batch
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
    assert torch.equal(sequences.collate(encodings, rows=rows)["pixel_values"], processor.pixels([A, C, B]))
    assert sequences.collate(encodings)["documents"].max() == 1
    assert "attention_mask" in Sequences(processor).collate(encodings, pixels=ready)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(flip=1.1), r"flip=1\.1: expected a probability"),
        (dict(leading_space=-1), "leading_space=-1: expected a probability"),
        (dict(crop=0), "crop=0: expected a share of the area, above 0"),
        (dict(max_tokens=1), "max_tokens=1, max_media=5: expected at least 2 and at least 1"),
        (dict(max_media=0), "max_tokens=256, max_media=0: expected at least 2 and at least 1"),
        (dict(row_media=4), "row_media=4: expected at least max_media=5"),
        (dict(rules="otter"), "rules='otter': expected flamingo or open_flamingo"),
        (dict(rules="open_flamingo", leading_space=0.5), "leading_space: expected 0 by the rules of open_flamingo"),
    ],
)
def test_what_cannot_be_made_is_named(processor: FlamingoProcessor, options: dict[str, Any], message: str) -> None:
    """Catches settings that fail, or do nothing, in the middle of a run."""
    with pytest.raises(FlamingoError, match=message):
        Sequences(processor, **options)
