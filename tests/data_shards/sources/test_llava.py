"""LLaVA-Instruct and ShareGPT-style conversations."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_shards.account import Account
from data_shards.convert import InstructionOptions, convert
from data_shards.faults import (
    BAD_JSON,
    BAD_RECORD,
    EMPTY_ANSWER,
    IMAGE_MARK,
    MISSING_IMAGE,
    NO_IMAGES,
    OF_DROPPED,
    OF_TURN,
    TOO_LONG,
)
from data_shards.shards import open_shards
from data_shards.sources import Record
from data_shards.sources.llava import LlavaReader
from data_shards.sources.reading import Row
from flamingo import FlamingoError
from tests.data_shards.sources.made import base64_of, image_bytes, outline, read
from tests.data_shards.test_command import run

IMAGES = {"one.png": image_bytes(1), "two.png": image_bytes(2)}


def talk(*texts: str, **more: Any) -> dict[str, Any]:
    """Questions and answers in turn."""
    said = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]
    return {"id": "x", "conversations": said} | more


def source(folder: Path, *records: Any, form: str = "json") -> LlavaReader:
    for name, data in IMAGES.items():
        (folder / name).write_bytes(data)
    path = folder / f"talks.{form}"
    path.write_text(json.dumps(records) if form == "json" else "".join(json.dumps(each) + "\n" for each in records))
    return LlavaReader(str(path))


def asked(question: str) -> str:
    return f"User:{question} GPT:<answer>"


END = "<|endofchunk|>"
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is <image> this?"},
    {"role": "assistant", "content": "One."},
    {"role": "user", "content": "<image>\nAnd this?"},
    {"role": "assistant", "content": "Two."},
]


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_conversations_become_turns(tmp_path: Path, form: str) -> None:
    """Catches an image before another question than the one that marks it, marks and line breaks that stay in the text,
    images without a mark that are lost, and a form of conversations that is not understood.
    """
    reader = source(
        tmp_path,
        talk("<image>\nWhat is it?", "A dog.", "Where?", "Here.", image="one.png"),
        {"messages": MESSAGES, "images": ["one.png", "two.png"]},
        talk("Hello?", "Hello.", images=["one.png", "data:image/png;base64," + base64_of(2)]),
        talk("Only text?", "Yes."),
        form=form,
    )
    documents, account = read(reader)
    one, two = IMAGES.values()
    assert [outline(document) for document in documents] == [
        [one, asked("What is it?"), f"A dog.{END}", asked("Where?"), f"Here.{END}"],
        [one, asked("Be brief.\nWhat is this?"), f"One.{END}", two, asked("And this?"), f"Two.{END}"],
        [one, two, asked("Hello?"), f"Hello.{END}"],
        [asked("Only text?"), f"Yes.{END}"],
    ]
    assert documents[0].metadata == {"id": "x"} and documents[0].source == "llava"
    assert not account.dropped and account.turns_kept == 6 and account.images_kept == 5


def test_images_of_rounds_left_out_go_with_the_next(tmp_path: Path) -> None:
    """Catches a picture that is lost with an unanswered question about it, though later rounds are about it too."""
    reader = source(
        tmp_path,
        talk("<image>What?", " ", "And now?", "A dog.", "Last?", image="one.png"),
        talk("What?", "This.", "<image>Last?", image="one.png"),
    )
    documents, account = read(reader)
    assert [outline(document) for document in documents] == [
        [IMAGES["one.png"], asked("And now?"), f"A dog.{END}"],
        [asked("What?"), f"This.{END}"],
    ]
    assert account.turns_dropped == {EMPTY_ANSWER: 3} and account.images_dropped == {OF_TURN: 1}


@pytest.mark.parametrize(
    ("record", "reason", "images"),
    [
        (talk("<image>What?", "This.", image="gone.png"), NO_IMAGES, {MISSING_IMAGE: 1}),
        (talk("<image><image>What?", "This.", images=["one.png", "gone.png"]), NO_IMAGES,
         {MISSING_IMAGE: 1, OF_DROPPED: 1}),
        (talk("<image><image>What?", "This.", image="one.png"), IMAGE_MARK, {OF_DROPPED: 1}),
        (talk("<image>What?", "This.", images=["one.png", "two.png"]), IMAGE_MARK, {OF_DROPPED: 2}),
        (talk("<image>What?", "This <image>.", image="one.png"), IMAGE_MARK, {OF_DROPPED: 1}),
        (talk("What?", ""), EMPTY_ANSWER, {}),
        (talk(), EMPTY_ANSWER, {}),
        (talk("What?", "This.", video="a.mp4"), BAD_RECORD, {}),
        ({"conversations": [{"from": "gpt", "value": "This."}]}, BAD_RECORD, {}),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]}, BAD_RECORD, {}),
        ({"conversations": [{"from": "human", "value": ["a"]}]}, BAD_RECORD, {}),
        ({"conversations": "a"}, BAD_RECORD, {}),
        (["a"], BAD_RECORD, {}),
    ],
)  # fmt: skip
def test_faulty_conversations_are_told(tmp_path: Path, record: Any, reason: str, images: dict[str, int]) -> None:
    """Catches a conversation about a picture that is not there, and one whose answers belong to other questions."""
    reader = source(tmp_path, record)
    _, account = read(reader)
    assert account.documents_dropped == {reason: 1} and account.images_dropped == images
    assert account.examples[reason][0].startswith(f"{reader.input}:1")


def test_a_long_conversation_becomes_several(tmp_path: Path) -> None:
    """Catches a cut between a question and its answer, rounds without the picture that they are about, rounds that are
    lost because others are long, and an account that counts the picture twice.
    """
    rounds = [each for n in range(5) for each in (f"Question {n}?", "word " * (90 if n == 3 else 20))]
    reader = source(tmp_path, talk(f"<image>{rounds[0]}", *rounds[1:], image="one.png"))
    account = convert(reader, tmp_path / "out", InstructionOptions(max_tokens=80))
    shards = open_shards(tmp_path / "out")
    pieces = [outline(shards[n]) for n in range(len(shards))]
    assert [[text[5:16] for text in piece[1::2]] for piece in pieces] == [
        ["Question 0?", "Question 1?"], ["Question 2?"], ["Question 4?"]
    ]  # fmt: skip
    assert all(piece[0] == IMAGES["one.png"] for piece in pieces)
    assert account.adds_up and (account.documents_kept, account.images_kept, account.samples) == (1, 1, 3)
    assert account.turns_dropped == {TOO_LONG: 1} and account.turns_kept == 4


def test_the_command_converts_and_validates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a reader that the command line does not know, and images that are only found beside the input."""
    (tmp_path / "talks").mkdir()
    reader = source(tmp_path / "talks", talk("<image>\nWhat is it?", "A dog.", image="one.png"))
    (tmp_path / "pictures").mkdir()
    (tmp_path / "talks" / "one.png").rename(tmp_path / "pictures" / "one.png")
    words = ["llava", reader.input, "--images", tmp_path / "pictures"]
    assert run(monkeypatch, "convert", *words, "--out", tmp_path / "out", "--processes", 1, "--spaced") == 0
    assert outline(open_shards(tmp_path / "out")[0])[1:] == ["User: What is it? GPT:<answer>", f" A dog.{END}"]
    assert run(monkeypatch, "validate", *words) == 0
    assert run(monkeypatch, "validate", *words[:2]) == 1
    assert "missing image" in capsys.readouterr().out


def test_files_that_are_no_list_are_named(tmp_path: Path) -> None:
    """Catches a cut file that ends the conversion without its name."""
    (tmp_path / "talks.json").write_text('[{"id": ')
    with pytest.raises(FlamingoError, match="talks.json: expected a JSON list"):
        read(LlavaReader(str(tmp_path / "talks.json")))


messages = st.lists(
    st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "system", ""]), "value": st.text(max_size=3)}
                          | {"value": st.sampled_from(["<image>", "", "a", 1])})
)  # fmt: skip


@given(
    conversations=messages | st.none(),
    images=st.none() | st.lists(st.sampled_from(["data:," + base64.b64encode(image_bytes(0)).decode(), "no", 1])),
    cut=st.booleans(),
)
def test_the_account_adds_up_for_broken_conversations(conversations: Any, images: Any, cut: bool) -> None:
    """Catches a malformed conversation that raises, is counted twice or not at all, or whose images or rounds are."""
    data = json.dumps({"conversations": conversations, "images": images}).encode()
    account = Account()
    documents = LlavaReader("").documents(Record("x:1", Row("nowhere/x", data[: len(data) // (1 + cut)])), account)
    assert account.adds_up and account.documents_read == 1 and account.documents_kept == len(documents)
    assert account.images_kept == sum(len(document.images) for document in documents)
    assert not cut or account.documents_dropped == {BAD_JSON: 1}
