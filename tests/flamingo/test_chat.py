"""Chats: the prompt is what tuning saw, answers stream, and the terminal does what a person or a pipe says."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2 import TemplateError
from PIL import Image as PilImage
from transformers import AutoProcessor

from flamingo import (
    Document,
    FlamingoError,
    FlamingoForConditionalGeneration,
    FlamingoProcessor,
    Image,
    Text,
    Video,
    from_backbones,
)
from flamingo import chat as chatting
from flamingo.chat import Chat, main, parse, read_examples
from flamingo.instructions import ANSWER, Turn, instruction_document
from flamingo.interop import otter
from flamingo.processing import CHAT_TEMPLATE, END_OF_CHUNK, VIDEO_MARK, chat_template, render
from tests.tiny import picture, save_backbones, tiny_flamingo

Tiny = tuple[FlamingoForConditionalGeneration, FlamingoProcessor]
PACKAGED = "package:data_shards/glyphs/assets/"
A, B, C = picture(1), picture(2), picture(3)
FORMS = [(False, False), (False, True), (True, False), (True, True)]
CONVERSATIONS = {
    "one question": [Turn("what?", None, (A,))],
    "examples with images of their own": [
        Turn("what?", "cat", (A,)),
        Turn("what?", "dog", (B,)),
        Turn("?", None, (C,)),
    ],
    "rounds about one image": [Turn("what?", "a cat", (A,)), Turn("which colour?", "red"), Turn("why?")],
    "several images": [Turn("a story?", "once", (A, B, C)), Turn("and?", None, (B, A))],
    "videos among images": [Turn("what?", "it runs", (Video((A, B)), C)), Turn("then?", None, (A, Video((C,))))],
    "text alone": [Turn("who?", "me"), Turn("and?")],
    "all answered": [Turn("what?", "cat", (A,)), Turn("and?", "", (B,))],
    "blanks and quotes": [Turn(" 'what'\n{{ x }}? ", ' "yes" {% ', (A,)), Turn("")],
}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A random Flamingo that knows `<answer>`."""
    return tiny_flamingo(tmp_path_factory.mktemp("tuned"), extra_tokens=(ANSWER,))


@pytest.fixture(scope="module")
def embedded() -> Tiny:
    """Over the embedded world's backbones, its gates closed: the LM answers in words."""
    model, processor = from_backbones(
        PACKAGED + "vision", PACKAGED + "language", resampler_depth=1, resampler_latents=4
    )
    return model.eval(), processor


@pytest.fixture(scope="module")
def saved(embedded: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `whole` and `trained` of the embedded model."""
    folder = tmp_path_factory.mktemp("saved")
    model, processor = embedded
    model.save_pretrained(folder / "whole")
    model.save_trained(folder / "trained")
    for name in ("whole", "trained"):
        processor.save_pretrained(folder / name)
    return folder


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What every call of `generate` was given, and its `output`."""
    seen: list[dict[str, Any]] = []
    generate = FlamingoForConditionalGeneration.generate

    def spied(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(dict(kwargs))
        seen[-1]["output"] = generate(self, *args, **kwargs)
        return seen[-1]["output"]

    monkeypatch.setattr(FlamingoForConditionalGeneration, "generate", spied)
    return seen


def with_template(processor: FlamingoProcessor, answer_mark: bool, spaced: bool) -> FlamingoProcessor:
    """The same processor in another form."""
    template = chat_template(answer_mark, spaced)
    return FlamingoProcessor(processor.image_processor, processor.tokenizer, chat_template=template)


# -- templates ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize(("answer_mark", "spaced"), FORMS)
def test_a_prompt_is_the_document_that_tuning_saw(tuned: Tiny, name: str, answer_mark: bool, spaced: bool) -> None:
    """Catches a template that differs from tuning's documents in a space, a mark, or the order of media."""
    model, processor = tuned[0], with_template(tuned[1], answer_mark, spaced)
    turns = CONVERSATIONS[name]
    document = instruction_document(turns, answer_mark=answer_mark, spaced=spaced)
    assert Chat(model, processor).prompt(turns).replace(VIDEO_MARK, "<image>") == render(document)[0]


def test_a_system_message_is_a_chunk_of_its_own(tuned: Tiny) -> None:
    """Catches a system message that runs into the first question, or is dropped."""
    processor = with_template(tuned[1], True, False)
    turns = [Turn("what?", "cat"), Turn("and?")]
    rendered = instruction_document(turns)
    chunk = Text(f"Be brief.{END_OF_CHUNK}")
    expected = render(Document((chunk, *rendered.segments), complete=False))[0]
    messages = [
        dict(role="system", content="Be brief."),
        dict(role="user", content="what?"),
        dict(role="assistant", content=[dict(type="text", text="cat")]),
        dict(role="user", content="and?"),
    ]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == expected
    assert expected.startswith(f"Be brief.{END_OF_CHUNK}User:what?")


def test_an_unanswered_question_is_refused_by_the_template_too(tuned: Tiny) -> None:
    """Catches two questions that run into one chunk, which no document of tuning has."""
    twice = [dict(role="user", content="what?"), dict(role="user", content="and?")]
    with pytest.raises(TemplateError, match="expected an answer of the assistant"):
        tuned[1].apply_chat_template(twice)


def test_the_form_travels_with_the_processor(tuned: Tiny, tmp_path: Path) -> None:
    """Catches a tuned model that is asked without `<answer>` after loading, and an untuned one asked with it."""
    with_template(tuned[1], True, True).save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert Chat(tuned[0], loaded).prompt([Turn("what?", None, (A,))]) == f"<image>User: what? GPT:{ANSWER}"
    assert tuned[1].chat_template == CHAT_TEMPLATE == chat_template(answer_mark=False, spaced=False)
    assert ANSWER not in Chat(*tuned).prompt([Turn("what?", "cat"), Turn("and?")])


def test_an_otter_is_asked_as_it_was_tuned(tuned: Tiny, tmp_path: Path) -> None:
    """Catches a checkpoint of Otter, which was tuned elsewhere, that is asked without `<answer>`."""
    backbones = save_backbones(tmp_path)
    otter.save(tuned[0], tmp_path / "otter")
    model, processor = otter.from_otter(tmp_path / "otter", *backbones)
    assert Chat(model, processor).prompt([Turn("what?")]) == f"User:what? GPT:{ANSWER}"


# -- Chat --------------------------------------------------------------------------------------------------------------


def test_the_tokens_are_those_of_the_document(tuned: Tiny, calls: list[dict[str, Any]]) -> None:
    """Catches media or tokens that reach the model in another order than tuning gave them, images before videos."""
    model, processor = tuned[0], with_template(tuned[1], True, False)
    turns = CONVERSATIONS["videos among images"]
    Chat(model, processor, max_new_tokens=2).ask(turns[1].question, turns[1].media, examples=turns[:1])
    expected = processor(documents=instruction_document(turns))
    for name in set(expected) - {"labels"}:
        assert torch.equal(calls[0][name], expected[name]), name


def test_what_was_said_stands_before_what_is_asked(tuned: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches answers or media that are forgotten, a reset that forgets examples, and a failure that is remembered."""
    chat = Chat(*tuned, examples=[Turn("what?", "cat", (A,))], max_new_tokens=2)
    first = chat.ask("and this?", [B])
    second = chat.ask("sure?", examples=[Turn("why?", "so")])
    said = [Turn("and this?", first, (B,)), Turn("why?", "so"), Turn("sure?", second)]
    assert chat.turns == said
    prompts: list[str] = []
    monkeypatch.setattr(Chat, "_decode", lambda self, ids: "yes")
    prompt = Chat.prompt
    monkeypatch.setattr(Chat, "prompt", lambda self, turns: prompts.append(prompt(self, turns)) or prompts[-1])
    chat.ask("again?")
    example = f"<image>User:what? GPT:cat{END_OF_CHUNK}"
    assert prompts[0] == example + prompt(chat, [*said, Turn("again?")])
    kept = chat.turns
    with pytest.raises(FlamingoError, match="broken"):
        chat.ask("what?", [Image(b"broken", "broken.png")])
    assert chat.turns == kept
    chat.reset()
    chat.ask("now?")
    assert prompts[-1] == f"{example}User:now? GPT:"


def test_a_streamed_answer_is_the_greedy_one(embedded: Tiny) -> None:
    """Catches pieces that overlap, lose a space, or hold marks; and an answer that comes in one piece at the end."""
    pieces: list[str] = []
    streamed = Chat(*embedded).ask("what is this?", [A], stream=pieces.append)
    assert streamed == "".join(pieces) == Chat(*embedded, beams=1).ask("what is this?", [A])
    assert len(pieces) >= 3 and END_OF_CHUNK not in streamed


def test_pieces_hold_no_half_characters() -> None:
    """Catches a replacement character printed for the first bytes of a character, or a space before the end."""
    pieces: list[str] = []
    words = ["", "caf\N{REPLACEMENT CHARACTER}", "café", "café", "café au\N{REPLACEMENT CHARACTER}"]
    streamer = chatting._Streamer(lambda ids: words[len(ids)], pieces.append)
    streamer.put(torch.tensor([[7, 8]]))  # the prompt
    for token in range(4):
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert pieces == ["caf", "é", " au", "\N{REPLACEMENT CHARACTER}"]  # at the end it is what there is


def test_an_answer_has_no_blanks_around_it(tuned: Tiny) -> None:
    """Catches the space that the spaced form puts before an answer, which the template would then put twice."""
    ids = tuned[1].tokenizer(f" a cat {END_OF_CHUNK}", add_special_tokens=False).input_ids
    assert Chat(*tuned)._decode(ids) == "a cat"


def test_an_answer_ends_at_the_end_of_its_chunk(embedded: Tiny, calls: list[dict[str, Any]]) -> None:
    """Catches a model that goes on to ask and answer itself, as it does where it may."""
    model, processor = embedded
    chat = Chat(model, processor)
    chat.ask("what is this?", [A])
    end = processor.tokenizer.convert_tokens_to_ids(END_OF_CHUNK)
    assert calls[0]["output"][0].tolist()[-1] == end
    assert len(calls[0]["output"][0]) < 40


def test_decoding_is_otters(tuned: Tiny, calls: list[dict[str, Any]]) -> None:
    """Catches other defaults than 3 beams, beams that are dropped without a word, and sampling."""
    chat = Chat(*tuned, max_new_tokens=2)
    chat.ask("what?")
    chat.ask("what?", stream=str)
    assert [call["num_beams"] for call in calls] == [3, 1]
    assert not any(call["do_sample"] for call in calls)
    assert all(call["logits_processor"][0].ngram_size == 3 for call in calls)
    with pytest.raises(FlamingoError, match="beams=2: cannot be streamed"):
        Chat(*tuned, beams=2).ask("what?", stream=str)
    for name in ("frames", "beams", "no_repeat_ngram", "max_new_tokens"):
        with pytest.raises(FlamingoError, match=f"{name}=-1: expected at least"):
            Chat(*tuned, **{name: -1})


def test_an_answer_may_take_up_the_wording_of_the_examples() -> None:
    """Catches n-grams counted from the prompt on, under which no answer could be phrased as the examples are."""
    forbids = chatting._NoRepeatInAnswer(3, start=3)
    scores = torch.zeros(1, 10)
    assert forbids(torch.tensor([[5, 6, 7, 5, 6]]), scores).eq(0).all()
    again = forbids(torch.tensor([[1, 2, 3, 5, 6, 7, 5, 6]]), scores)
    assert again.isinf().nonzero().tolist() == [[0, 7]]


def test_media_are_taken_as_they_come(tuned: Tiny, tmp_path: Path) -> None:
    """Catches a path, a PIL image or an animation that is refused, and a number of frames that is not the model's."""
    (tmp_path / "a.png").write_bytes(A.data)
    frames = [PilImage.new("RGB", (16, 16), (20 * n,) * 3) for n in range(12)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    chat = Chat(*tuned, max_new_tokens=1)
    chat.ask("what?", [str(tmp_path / "a.png"), frames[0], B, Video((A, B)), tmp_path / "a.gif"])
    path, pil, given, video, animation = chat.turns[0].media
    assert path == Image(A.data, str(tmp_path / "a.png")) and given == B and video == Video((A, B))
    assert isinstance(pil, Image) and isinstance(animation, Video) and len(animation.frames) == 8
    assert len(Chat(*tuned, frames=3)._media([tmp_path / "a.gif"])[0].frames) == 3  # type: ignore[union-attr]
    with pytest.raises(FlamingoError, match="examples: 'what\\?' has no answer"):
        chat.ask("what?", examples=[Turn("what?")])


def test_what_the_lm_has_no_positions_for_is_refused(tuned: Tiny) -> None:
    """Catches a prompt that runs past the LM's positions, into an error deep within it or into nonsense."""
    with pytest.raises(FlamingoError, match=r"a prompt of \d+ tokens and an answer of up to 500: the LM has 512"):
        Chat(*tuned, max_new_tokens=500).ask("what is this?")


# -- examples in a file ------------------------------------------------------------------------------------------------

EXAMPLES = [
    {"image": "a.png", "question": "what is this?", "answer": "dalo"},
    {"images": ["b.png", "a.png"], "question": "a story?", "answer": "it is mire."},
    {"video": "clip", "question": "what moves?", "answer": "a dalo"},
    {"question": "who?", "answer": "me"},
]


def write_examples(folder: Path) -> tuple[Path, Path]:
    """The same examples as JSON and as YAML, in a folder beside their media."""
    (folder / "clip").mkdir(parents=True)
    for name, image in (("a.png", A), ("b.png", B), ("clip/1.png", B), ("clip/2.png", A), ("clip/3.png", C)):
        (folder / name).write_bytes(image.data)
    (folder / "examples.json").write_text(json.dumps(EXAMPLES))
    lines = [f"- {json.dumps(example)}" for example in EXAMPLES]
    (folder / "examples.yaml").write_text("# shots\n" + "\n".join(lines))
    return folder / "examples.json", folder / "examples.yaml"


def test_examples_of_a_file(tmp_path: Path) -> None:
    """Catches paths that count from elsewhere, images out of order, and the two formats read differently."""
    as_json, as_yaml = (read_examples(path, frames=1) for path in write_examples(tmp_path / "shots"))
    names = [[image.name for image in Document(turn.media).images] for turn in as_json]
    folder = tmp_path / "shots"
    expected = [["a.png"], ["b.png", "a.png"], ["clip/1.png"], []]
    assert names == [[str(folder / name) for name in several] for several in expected]
    assert [(turn.question, turn.answer, turn.media) for turn in as_json] == [
        (turn.question, turn.answer, turn.media) for turn in as_yaml
    ]
    assert [isinstance(turn.media[0], Video) for turn in as_json[:3]] == [False, False, True]
    assert [turn.answer for turn in as_json] == [example["answer"] for example in EXAMPLES]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[", "expected a JSON or YAML file of examples"),
        ("a: b", "expected a list of examples, got dict"),
        ("- what?", "example 1: expected question, answer and image"),
        ("- {question: q, answer: yes}", "example 1: answer: expected text, got True"),
        ("- {question: q}", "example 1: answer: expected text, got None"),
        ("- {question: q, answer: a}\n- {question: q, answer: a, picture: b.png}", "example 2: .* got .*picture"),
        ("- {question: q, answer: a, image: b, video: c}", "one of image, images, video"),
        ("- {question: q, answer: a, image: 3}", "example 1: image: expected text"),
        ("- {question: q, answer: a, images: b.png}", "example 1: images: expected a list of paths"),
        ("- {question: q, answer: a, image: none.png}", "example 1: .*none.png: expected the path of an image file"),
        ("- {question: q, answer: a, image: examples.yaml}", "example 1: .*examples.yaml: expected an image file"),
        ("- {question: q, answer: a, video: none.mp4}", "example 1: .*none.mp4: expected a video file"),
    ],
)
def test_examples_that_cannot_be_followed_are_named(tmp_path: Path, text: str, said: str) -> None:
    """Catches an example that is skipped or half read, and a message without the file and the item."""
    (tmp_path / "examples.yaml").write_text(text)
    with pytest.raises(FlamingoError, match=rf"(?s)examples\.yaml.*{said}"):
        read_examples(tmp_path / "examples.yaml")


# -- the command -------------------------------------------------------------------------------------------------------

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`flamingo-chat` with words and piped lines → exit code, stdout, stderr."""

    def command(*words: object, lines: Sequence[str] = ()) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["flamingo-chat", *map(str, words)])
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr()
        return int(end.value.code or 0), said.out, said.err

    return command


def test_a_conversation_through_a_pipe(
    run: Run, saved: Path, embedded: Tiny, calls: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Catches commands that are asked, images that stay for the next question, and a prompt mark among the answers."""
    (tmp_path / "a b.png").write_bytes(A.data)
    lines = [f"/image {tmp_path}/a b.png", "what is this?", "", "where is it?", "/reset", "what is it?"]
    code, out, err = run("--model", saved / "trained", "--max-new-tokens", 20, lines=lines)
    assert (code, err) == (0, "")
    chat = Chat(*embedded, max_new_tokens=20, beams=1)
    answers = [chat.ask("what is this?", [A]), chat.ask("where is it?")]
    chat.reset()
    assert out.splitlines() == [*answers, chat.ask("what is it?")]
    assert [call["media_per_sample"].tolist() for call in calls] == [[1], [1], [0]] * 2
    assert all(call["streamer"] is not None for call in calls[:3])


def test_one_question_is_asked_with_beams(run: Run, saved: Path, embedded: Tiny, tmp_path: Path) -> None:
    """Catches a one-shot answer that is not the beams', and one that differs between the two kinds of folders."""
    (tmp_path / "a.png").write_bytes(A.data)
    words = ("--image", tmp_path / "a.png", "--question", "what is this?", "--max-new-tokens", 12)
    expected = Chat(*embedded, max_new_tokens=12).ask("what is this?", [A])
    for name in ("whole", "trained"):
        assert run("--model", saved / name, *words) == (0, f"{expected}\n", "")
    greedy = Chat(*embedded, max_new_tokens=12, beams=1).ask("what is this?", [A])
    for more in (("--stream",), ("--stream", "false", "--beams", 1)):
        assert run("--model", saved / "whole", *words, *more) == (0, f"{greedy}\n", "")


def test_examples_come_first_and_in_order(
    run: Run, saved: Path, embedded: Tiny, calls: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Catches examples in another order, behind the question, or gone after `/reset`; and media sorted by kind."""
    file, _ = write_examples(tmp_path / "shots")
    more = tmp_path / "shots" / "more.yaml"
    more.write_text('- {question: "which?", answer: the last}')
    clip, image = tmp_path / "shots" / "clip", tmp_path / "shots" / "b.png"
    words = (
        "--example",
        file,
        "--example",
        more,
        "--video",
        clip,
        "--image",
        image,
        "--frames",
        2,
        "--max-new-tokens",
        3,
    )
    code, _, err = run("--model", saved / "whole", *words, lines=["what is it?", "/reset", "who?"])
    assert (code, err) == (0, "")
    chat = Chat(*embedded)
    examples = [*read_examples(file), Turn("which?", "the last")]
    asked = [Turn("what is it?", None, (Video((B, C)), B))], [Turn("who?")]
    texts = [chat.prompt([*examples, *turns]).replace(VIDEO_MARK, "<image>") for turns in asked]
    ids = embedded[1].tokenizer(texts, add_special_tokens=False).input_ids
    assert [call["input_ids"][0][1:].tolist() for call in calls] == ids
    assert calls[0]["media_frames"].tolist() == [1, 1, 1, 2, 2, 1]


def test_a_video_file(run: Run, saved: Path, calls: list[dict[str, Any]], tmp_path: Path) -> None:
    """Catches a video file that does not reach the model as one medium of the frames asked for."""
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for shade in range(20):
            frame = av.VideoFrame.from_image(PilImage.new("RGB", (64, 64), (12 * shade,) * 3))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    lines = [f"/video {tmp_path}/a.mp4", "what is this?"]
    code, _, err = run("--model", saved / "whole", "--frames", 5, "--max-new-tokens", 2, lines=lines)
    assert (code, err) == (0, "")
    pixels = calls[0]["pixel_values"]
    assert pixels.shape[:2] == (1, 5) and calls[0]["media_per_sample"].tolist() == [1]
    brightness = pixels.mean(dim=(0, 2, 3, 4))
    assert brightness.diff().min() > 0


def test_help_lists_every_command(run: Run, saved: Path) -> None:
    """Catches a command that nobody can find out about."""
    code, out, err = run("--model", saved / "whole", lines=["/help"])
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == ["/image", "/video", "/reset", "/help"]


@pytest.mark.parametrize(
    ("words", "lines", "said"),
    [
        (["--model", "{}", "--image", "none.png"], [], "none.png: expected the path of an image file"),
        (["--model", "{}", "--example", "none.yaml"], [], "none.yaml: expected a JSON or YAML file"),
        (["--model", "{}"], ["/image none.png", "what?"], "none.png: expected the path of an image file"),
        (["--model", "{}"], ["/video"], "video: expected a path"),
        (["--model", "{}"], ["/undo"], "/undo: expected a question or one of /image, /video, /reset, /help"),
        (["--model", "{}"], ["/image {}/../a.png"], "1 images or videos without a question"),
        (["--model", "none"], [], "--model none: expected a folder with a saved Flamingo"),
        (["--model", "{}", "--beams", "3", "--stream"], [], "--beams 3: beams cannot be streamed"),
        (["--model", "{}", "--beams", "0"], [], "beams=0: expected at least 1"),
        (["--model", "{}", "--picture", "a.png"], [], "--picture"),
        ([], [], "model"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(
    run: Run, saved: Path, words: list[str], lines: list[str], said: str
) -> None:
    """Catches a traceback, an error that a script does not notice, and a question asked about the wrong picture."""
    (saved / "a.png").write_bytes(A.data)
    here = str(saved / "whole")
    code, out, err = run(*[w.format(here) for w in words], lines=[line.format(here) for line in lines])
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and said in err and err.count("\n") == 1


def test_a_folder_that_is_no_flamingo_is_named(run: Run, tmp_path: Path) -> None:
    """Catches transformers' traceback for a folder of another model, or of a broken one."""
    (tmp_path / "config.json").write_text('{"model_type": "flamingo"}')
    code, _, err = run("--model", tmp_path)
    assert (
        code == 2 and err.startswith(f"error: --model {tmp_path}: not loadable as a Flamingo") and err.count("\n") == 1
    )


def test_an_error_does_not_end_a_persons_conversation(
    embedded: Tiny, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a conversation lost to a mistyped path, and one that does not end with its input."""
    typed = iter(["/image none.png", "what is this?"])

    def typing(prompt: str) -> str:
        assert prompt == "> "
        if (line := next(typed, None)) is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", typing)
    chat = Chat(*embedded)
    chatting.Terminal(chat, streams=True).read(chatting._typed())
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1
    assert said.out.splitlines()[0] == chat.turns[0].answer


def test_when_answers_stream() -> None:
    """Catches a script that gets greedy answers, and a person who asks for beams and gets none."""
    streams = {
        (): True,
        ("--question", "what?"): False,
        ("--question", "what?", "--stream"): True,
        ("--beams", "3"): False,
        ("--beams", "1"): True,
        ("--stream", "false"): False,
    }
    assert {words: parse(["--model", "m", *words])[0].streams for words in streams} == streams
