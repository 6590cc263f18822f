"""Splitting: pieces that fit a sequence, and nothing lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards.splitting import ENDS, estimated_tokens, split, token_counter
from flamingo import Document, FlamingoError, FlamingoProcessor, Image, Text, Video, from_backbones
from flamingo.document import Segment
from tests import tiny


def words(text: str) -> int:
    """A tokenizer whose tokens are words."""
    return len(text.split())


def plain(segments: tuple[Segment, ...]) -> list[object]:
    """Segments with neighbouring texts of one kind joined, since a cut makes two of one."""
    joined: list[Segment] = []
    for segment in segments:
        last = joined[-1] if joined else None
        if isinstance(segment, Text) and isinstance(last, Text) and last.supervised == segment.supervised:
            joined[-1] = replace(last, text=last.text + segment.text)
        elif segment != Text("", getattr(segment, "supervised", True)):
            joined.append(segment)
    return joined  # type: ignore[return-value]


def tokens(piece: Document, count: Callable[[str], int]) -> int:
    """Tokens of a piece as the processor will make them: texts, marks, and the two ends."""
    closed = [isinstance(one, Text) and not isinstance(two, Text) for one, two in pairwise([*piece.segments, None])]
    texts = sum(count(each.text) for each in piece.segments if isinstance(each, Text))
    return texts + sum(closed) + len(piece.media) + ENDS


text = st.builds(Text, st.text("abc .!?\n。é漢", max_size=120), st.booleans())
image = st.builds(lambda n: Image(bytes([n]), f"{n}.png"), st.integers(0, 255))
documents = st.builds(
    lambda segments: Document(tuple(segments), "key", "made", {"a": 1}),
    st.lists(st.one_of(text, image, st.builds(lambda one: Video((one, one)), image)), max_size=25),
)


@settings(max_examples=300, deadline=None)
@given(documents, st.integers(16, 60), st.integers(1, 6), st.sampled_from([len, words, estimated_tokens]))
def test_nothing_is_lost_and_every_piece_fits(
    document: Document, max_tokens: int, max_media: int, count: object
) -> None:
    """Catches lost, repeated or reordered media and characters, and pieces that training would have to cut."""
    pieces = split(document, max_tokens=max_tokens, max_media=max_media, count_tokens=count)
    assert plain(tuple(segment for piece in pieces for segment in piece.segments)) == plain(document.segments)
    for piece in pieces:
        assert len(piece.media) <= max_media
        assert tokens(piece, count) <= max_tokens or not piece.media
        assert (piece.key, piece.source, piece.metadata) == ("key", "made", {"a": 1})
    assert all(piece.segments for piece in pieces) or len(pieces) == 1


def test_a_document_that_fits_is_itself() -> None:
    """Catches a needless copy, and a limit that is off by one: 4 words, 2 images, 2 closed chunks, 2 ends."""
    document = Document((Image(b"1"), Text("a b"), Image(b"2"), Text("c d " + "e " * 6)))
    assert split(document, max_tokens=16, max_media=2, count_tokens=words) == [document]
    assert len(split(document, max_tokens=17, max_media=1, count_tokens=words)) == 2
    more = replace(document, segments=(*document.segments, Text("e")))
    assert len(split(more, max_tokens=16, max_media=2, count_tokens=words)) == 2


def test_cuts_stand_before_a_medium_and_a_lead_stays_with_it() -> None:
    """Catches cuts between an image and its text, and a picture that loses the sentences that lead into it."""
    one, two = Image(b"1"), Image(b"2")
    lead = "It was long ago. " * 5 + "See the first picture:"
    document = Document((Text(lead), one, Text("This is a cat. " * 2), two, Text("And this is a dog.")))
    pieces = split(document, max_tokens=22, max_media=5, count_tokens=words)
    assert [len(piece.media) for piece in pieces] == [0, 1, 1]
    assert pieces[1].segments[0] == Text(" It was long ago. See the first picture:")
    assert pieces[2].segments == (two, Text("And this is a dog."))


def test_long_text_is_cut_before_sentences_then_words() -> None:
    """Catches text parted within words, and an image that gets no text because its first sentence is too long."""
    sentence = " ".join(f"w{n}" for n in range(9)) + "."
    document = Document((Image(b"1"), Text(" ".join([sentence] * 5))))
    pieces = split(document, max_tokens=24, max_media=5, count_tokens=words)
    assert [len(piece.media) for piece in pieces] == [1, 0]
    assert all(piece.segments[-1].text.endswith(".") for piece in pieces)  # type: ignore[union-attr]
    assert words(pieces[0].segments[1].text) == 18  # type: ignore[union-attr]
    endless = Document((Image(b"1"), Text(" ".join(f"w{n}" for n in range(50)))))
    first, other = split(endless, max_tokens=24, max_media=5, count_tokens=words)
    assert words(first.segments[1].text) == 20  # type: ignore[union-attr]
    assert other.segments[0].text.startswith(" w20 ")  # type: ignore[union-attr]


def test_of_too_many_images_most_stay_with_their_text() -> None:
    """Catches galleries whose images land in pieces without text where they need not."""
    document = Document((*(Image(bytes([n])) for n in range(7)), Text("all seven")))
    pieces = split(document, max_tokens=64, max_media=5, count_tokens=words)
    assert [len(piece.media) for piece in pieces] == [2, 5] and pieces[1].segments[-1] == Text("all seven")


def test_very_long_text_takes_linear_time() -> None:
    """Catches a search that counts the whole rest of a text at each step (minutes for a megabyte)."""
    counted = 0

    def count(text: str) -> int:
        nonlocal counted
        counted += len(text)
        return len(text.split())

    for unit in ("a few words. ", "word "):  # without a full stop it is one sentence
        counted, long = 0, unit * 40_000
        document = Document((Text(long), Image(b"1"), Text(long)))
        pieces = split(document, max_tokens=256, max_media=5, count_tokens=count)
        assert [len(piece.media) for piece in pieces] == [0, 1, 0]
        assert counted < 6 * len(long)


def test_no_limits_and_impossible_ones() -> None:
    """Catches limits that are needed, and ones that no piece could hold and that would loop."""
    document = Document((Text("a " * 500), *(Image(b"1") for _ in range(9))))
    assert split(document, max_tokens=None, max_media=None, count_tokens=words) == [document]
    assert [len(p.media) for p in split(document, max_tokens=None, max_media=5, count_tokens=words)] == [4, 5]
    for limits, said in (((8, 5), "max_tokens=8"), ((64, 0), "max_media=0")):
        with pytest.raises(FlamingoError, match=said):
            split(document, max_tokens=limits[0], max_media=limits[1], count_tokens=words)


def test_pieces_fit_the_processors_sequences(tmp_path: Path) -> None:
    """Catches marks that the splitter forgets: the ids of every piece, with both ends, are no more than asked for."""
    vision, language = tiny.save_backbones(tmp_path)
    processor: FlamingoProcessor = from_backbones(vision, language)[1]
    document = Document(tuple(s for n in range(9) for s in (tiny.picture(n), Text("a sentence. " * n), Text("more"))))
    pieces = split(document, max_tokens=64, max_media=3, count_tokens=token_counter(str(language)))
    lengths = [len(processor.encode(piece, eos=True).input_ids) for piece in pieces]
    assert max(length for length, piece in zip(lengths, pieces, strict=True) if piece.media) <= 64
    assert sum(len(piece.media) for piece in pieces) == 9


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    """Catches a traceback of transformers where the folder is wrong."""
    with pytest.raises(FlamingoError, match="nowhere"):
        token_counter(f"{tmp_path}/nowhere")
