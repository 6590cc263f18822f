"""Ask a Flamingo about images and videos: `Chat` in Python, `flamingo-chat --model DIR` in a terminal.

A chat is a list of `flamingo.instructions.Turn`; the processor's chat template makes one prompt of them. So a model is
asked in the form in which it was tuned, and one that was never tuned without `<answer>`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser
from PIL import Image as PilImage
from safetensors import SafetensorError
from torch import Tensor
from transformers import LogitsProcessorList, NoRepeatNGramLogitsProcessor
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging as transformers_logging

from flamingo.document import Image, Medium, Video
from flamingo.errors import FlamingoError, command_line, plain_options
from flamingo.images import decode
from flamingo.instructions import Turn
from flamingo.modeling import TRAINED, FlamingoForConditionalGeneration
from flamingo.processing import END_OF_CHUNK, FlamingoProcessor, as_image
from flamingo.video import DEFAULT_FRAMES, is_video, read_video

BEAMS, NO_REPEAT_NGRAM = 3, 3
"""Otter's decoding."""
MAX_NEW_TOKENS = 256
Askable = str | Path | PilImage.Image | Image | Video


class Chat:
    """A conversation with a model: what was said so far stands before what is asked next.

    Args:
        model: over any backbones; where it is on a GPU, it is asked there.
        processor: its own; its chat template says in which form to ask.
        examples: answered turns that stand before the conversation, and survive `reset`.
        frames: of a video given by path; default: as many as the model has frame embeddings, or else
            `flamingo.video.DEFAULT_FRAMES`.
        beams: of beam search; default: 3, and 1 (greedy) where an answer is streamed, which beams cannot be.
        no_repeat_ngram: no run of so many tokens occurs twice in an answer; 0: they may. Otter has 3 too, but counts
            the prompt, so that no answer could take up the wording of the examples.
        max_new_tokens: the longest answer.

    Attributes:
        turns: the conversation, without the examples.
    """

    def __init__(
        self,
        model: FlamingoForConditionalGeneration,
        processor: FlamingoProcessor,
        *,
        examples: Sequence[Turn] = (),
        frames: int | None = None,
        beams: int | None = None,
        no_repeat_ngram: int = NO_REPEAT_NGRAM,
        max_new_tokens: int = MAX_NEW_TOKENS,
    ):
        for name, value, least in (
            ("frames", frames, 1),
            ("beams", beams, 1),
            ("no_repeat_ngram", no_repeat_ngram, 0),
            ("max_new_tokens", max_new_tokens, 1),
        ):
            if value is not None and value < least:
                raise FlamingoError(f"{name}={value}: expected at least {least}")
        self.model, self.processor = model, processor
        self.frames = frames or model.config.resampler_max_frames or DEFAULT_FRAMES
        self.beams, self.no_repeat_ngram, self.max_new_tokens = beams, no_repeat_ngram, max_new_tokens
        self.examples = self._answered(examples)
        self.turns: list[Turn] = []

    def ask(
        self,
        question: str,
        media: Sequence[Askable] = (),
        *,
        examples: Sequence[Turn] = (),
        stream: Callable[[str], object] | None = None,
    ) -> str:
        """The model's answer; both become part of the conversation, if there is one.

        Args:
            question: about the media, or about what was said and shown before.
            media: stand before the question: paths, PIL images, `flamingo.Image` or `flamingo.Video`. Which paths are
                videos, `flamingo.video.is_video` says; `flamingo.video.read_video` takes another number of frames.
            examples: answered turns that become part of the conversation before this one; their media as here.
            stream: is given each piece of the answer as it comes; together they are the answer.

        Raises:
            FlamingoError: where a medium is not to be read, an example has no answer, beams were asked to stream, or
                the prompt and the longest answer are more tokens than the LM has positions.
        """
        beams = self.beams or (BEAMS if stream is None else 1)
        if stream is not None and beams > 1:
            raise FlamingoError(f"beams={beams}: cannot be streamed, the best of them is known at the end; expected 1")
        asked = [*self.turns, *self._answered(examples), Turn(question, None, self._media(media))]
        answer = self._generate([*self.examples, *asked], beams, stream)
        self.turns = [*asked[:-1], replace(asked[-1], answer=answer)]
        return answer

    def reset(self) -> None:
        """Forget the conversation, not the examples given to `Chat`."""
        self.turns = []

    def prompt(self, turns: Sequence[Turn]) -> str:
        """Turns as text with the marks `<image>` and `<video>`, after the processor's chat template.

        The last one may be without an answer; then the model is to give it.
        """
        messages: list[dict[str, Any]] = []
        for turn in turns:
            marks = [{"type": "video" if isinstance(medium, Video) else "image"} for medium in turn.media]
            messages.append({"role": "user", "content": [*marks, {"type": "text", "text": turn.question}]})
            if turn.answer is not None:
                messages.append({"role": "assistant", "content": turn.answer})
        return self.processor.apply_chat_template(messages, add_generation_prompt=turns[-1].answer is None)

    def _media(self, given: Sequence[Askable]) -> tuple[Medium, ...]:
        return tuple(_medium(each, self.frames, f"medium {n}") for n, each in enumerate(given, 1))

    def _answered(self, turns: Sequence[Turn]) -> list[Turn]:
        for turn in turns:
            if turn.answer is None:
                raise FlamingoError(f"examples: {turn.key or turn.question!r} has no answer")
        return [replace(turn, media=self._media(turn.media)) for turn in turns]

    def _generate(self, turns: Sequence[Turn], beams: int, stream: Callable[[str], object] | None) -> str:
        media = [medium for turn in turns for medium in turn.media]
        batch = self.processor(
            text=self.prompt(turns),
            images=[medium for medium in media if isinstance(medium, Image)],
            videos=[medium for medium in media if isinstance(medium, Video)],
        ).to(self.model.device)
        length = batch["input_ids"].shape[1]
        self._check_room(length)
        tokenizer = self.processor.tokenizer
        output = self.model.generate(
            **batch,
            do_sample=False,
            num_beams=beams,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=self._stops(),
            pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            logits_processor=LogitsProcessorList(
                [_NoRepeatInAnswer(self.no_repeat_ngram, length)] if self.no_repeat_ngram else []
            ),
            streamer=None if stream is None else _Streamer(self._decode, stream),
        )
        return self._decode(output[0, length:].tolist())

    def _stops(self) -> list[int]:
        tokenizer = self.processor.tokenizer
        ends = (tokenizer.convert_tokens_to_ids(END_OF_CHUNK), tokenizer.eos_token_id)
        return [end for end in ends if end is not None]

    def _decode(self, ids: list[int]) -> str:
        text = self.processor.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.strip()

    def _check_room(self, length: int) -> None:
        config = self.model.config.text_config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None)
        if positions is not None and length + self.max_new_tokens > positions:
            raise FlamingoError(
                f"a prompt of {length} tokens and an answer of up to {self.max_new_tokens}: the LM has {positions} "
                "positions; expected fewer examples, a shorter conversation or a smaller max_new_tokens"
            )


class _NoRepeatInAnswer(NoRepeatNGramLogitsProcessor):
    """Forbids n-grams that the answer, which begins after `start` tokens, already has."""

    def __init__(self, ngram_size: int, start: int):
        super().__init__(ngram_size)
        self.start = start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return super().__call__(input_ids[:, self.start :], scores)


class _Streamer(BaseStreamer):
    """Gives on what is new of an answer after each token; a character of several tokens when it is whole."""

    def __init__(self, decoded: Callable[[list[int]], str], give: Callable[[str], object]):
        self.decoded, self.give = decoded, give
        self.ids: list[int] | None = None
        self.given = 0

    def put(self, value: Tensor) -> None:
        """Take the prompt, then token after token."""
        if self.ids is None:
            self.ids = []
            return
        self.ids += value.flatten().tolist()
        self._give(self.decoded(self.ids).rstrip("\N{REPLACEMENT CHARACTER}"))

    def end(self) -> None:
        """Give what was held back."""
        self._give(self.decoded(self.ids or []))

    def _give(self, text: str) -> None:
        if len(text) > self.given:
            self.give(text[self.given :])
            self.given = len(text)


def _medium(given: Askable, frames: int, name: str) -> Medium:
    if isinstance(given, Video):
        return given
    if isinstance(given, (str, Path)):
        return read_video(given, frames) if is_video(given) else _read_image(given)
    return as_image(given, name)


def _read_image(path: str | Path) -> Image:
    """An image file that can be decoded."""
    image = as_image(Path(path).expanduser(), "image")
    decode(image, channels=3)
    return image


# -- examples in a file ------------------------------------------------------------------------------------------------

MEDIA_KEYS = ("image", "images", "video")


def read_examples(file: str | Path, frames: int = DEFAULT_FRAMES) -> list[Turn]:
    """Answered turns of a JSON or YAML file: a list of `{image | images | video, question, answer}`.

    Args:
        file: its paths count from its folder; a turn has one of the three, or none.
        frames: of a video.

    Raises:
        FlamingoError: where it is not such a list, or a medium is not to be read; it names the file and the item.
    """
    file = Path(file).expanduser()
    try:
        text = file.read_text(encoding="utf-8")
        items = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, yaml.YAMLError) as error:
        raise FlamingoError(f"{file}: expected a JSON or YAML file of examples: {error}") from error
    if not isinstance(items, list):
        raise FlamingoError(f"{file}: expected a list of examples, got {type(items).__name__}")
    return [_example(item, file, f"{file} example {n}", frames) for n, item in enumerate(items, 1)]


def _example(item: Any, file: Path, where: str, frames: int) -> Turn:
    if not isinstance(item, dict):
        raise FlamingoError(f"{where}: expected question, answer and image, images or video; got {item!r}")
    unknown = [key for key in item if key not in ("question", "answer", *MEDIA_KEYS)]
    given = [key for key in MEDIA_KEYS if key in item]
    if unknown or len(given) > 1:
        raise FlamingoError(f"{where}: expected question, answer and one of {', '.join(MEDIA_KEYS)}; got {[*item]}")
    for key in ("question", "answer", *({"image", "video"} & {*given})):
        if not isinstance(item.get(key), str):
            raise FlamingoError(f"{where}: {key}: expected text, got {item.get(key)!r}")
    images = item.get("images", [item["image"]] if "image" in item else [])
    if not isinstance(images, list) or not all(isinstance(path, str) for path in images):
        raise FlamingoError(f"{where}: images: expected a list of paths, got {images!r}")
    try:
        media: list[Medium] = [_read_image(file.parent / Path(path).expanduser()) for path in images]
        if "video" in item:
            media.append(read_video(file.parent / Path(item["video"]).expanduser(), frames))
    except FlamingoError as error:
        raise FlamingoError(f"{where}: {error}") from error
    return Turn(item["question"], item["answer"], tuple(media), key=where)


# -- the command -------------------------------------------------------------------------------------------------------


@dataclass
class Options:
    """Ask a Flamingo about images and videos.

    Attributes:
        model: folder of a saved Flamingo, whole or only what was trained.
        question: ask this, print the answer and end; unset: a conversation, a question a line.
        frames: of a video; unset: as many as the model has frame embeddings, or 8.
        max_new_tokens: the longest answer.
        beams: of beam search, which cannot be streamed; unset: 3, and 1 where answers are streamed.
        no_repeat_ngram: no run of so many tokens occurs twice in an answer; 0: they may.
        stream: print tokens as they come; unset: in a conversation, unless there are beams.
        vision: folder or hub id of the vision tower, where a model saved without its backbones does not find it.
        language: folder or hub id of the LM, likewise.
        trust_remote_code: run code that comes with a backbone.
        device: "cpu", "cuda", or "auto".
    """

    model: str
    question: str | None = None
    frames: int | None = None
    max_new_tokens: int = MAX_NEW_TOKENS
    beams: int | None = None
    no_repeat_ngram: int = NO_REPEAT_NGRAM
    stream: bool | None = None
    vision: str | None = None
    language: str | None = None
    trust_remote_code: bool = False
    device: str = "auto"

    @property
    def streams(self) -> bool:
        """Whether tokens are printed as they come."""
        return self.stream if self.stream is not None else self.question is None and self.beams in (None, 1)


@dataclass
class Given:
    """Files named on the command line, in order."""

    media: list[tuple[str, str]] = field(default_factory=list)
    """of the first question: ("image" or "video", path)"""
    examples: list[str] = field(default_factory=list)


def parse(arguments: list[str] | None = None) -> tuple[Options, Given]:
    """Options and files of a command line.

    Raises:
        FlamingoError: an argument that is unknown, missing or malformed.
    """
    parser = ArgumentParser(
        prog="flamingo-chat",
        description="Ask a Flamingo about images and videos.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_class_arguments(Options)
    for kind in ("image", "video"):
        said = "path that the first question is about; --image and --video may be repeated, and keep their order"
        parser.add_argument(f"--{kind}", action="append", help=said)
    parser.add_argument("--example", action="append", help="JSON or YAML file of examples, may be repeated")
    words = plain_options(sys.argv[1:] if arguments is None else arguments)
    try:
        parsed = vars(parser.parse_args(words))
    except ArgumentError as error:
        raise FlamingoError(str(error)) from None
    options = Options(**{name: parsed[name] for name in Options.__dataclass_fields__})
    if options.streams and options.beams not in (None, 1):
        raise FlamingoError(f"--beams {options.beams}: beams cannot be streamed; expected --stream false or --beams 1")
    return options, Given(_in_order(words, parsed), parsed["example"] or [])


def _in_order(words: Iterable[str], parsed: dict[str, Any]) -> list[tuple[str, str]]:
    """Images and videos as they stand on the command line, which the parser keeps apart."""
    left = {kind: iter(parsed[kind] or []) for kind in ("image", "video")}
    names = (word.removeprefix("--").partition("=")[0] for word in words if word.startswith("--"))
    return [(name, next(left[name])) for name in names if name in left]


def load(options: Options) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
    """The model and the processor saved in `options.model`.

    Raises:
        FlamingoError: where it is no folder, or holds no Flamingo.
    """
    folder = Path(options.model).expanduser()
    if not (folder / "config.json").is_file():
        raise FlamingoError(f"--model {options.model}: expected a folder with a saved Flamingo")
    kind = FlamingoForConditionalGeneration
    try:
        if (folder / TRAINED).exists():
            backbones = {"vision": options.vision, "language": options.language}
            model = kind.from_trained(folder, **backbones, trust_remote_code=options.trust_remote_code)
        else:
            model = kind.from_pretrained(folder)
        processor = FlamingoProcessor.from_pretrained(folder, trust_remote_code=options.trust_remote_code)
    except FlamingoError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise FlamingoError(f"--model {options.model}: not loadable as a Flamingo: {error}") from error
    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    return model.eval().to(device), processor


COMMANDS = {
    "/image": "PATH: the next question is about this image too",
    "/video": "PATH: the next question is about this video too: a file, an animation or a folder of frames",
    "/reset": "forget the conversation and what the next question is about; examples stay",
    "/help": "this",
}


class Terminal:
    """Reads questions and commands line by line, and prints answers.

    Args:
        chat: asked.
        streams: print answers as they come.
        media: of the first question.
        stops: raise errors, instead of printing them and going on.
    """

    def __init__(self, chat: Chat, *, streams: bool, media: Sequence[Medium] = (), stops: bool = False):
        self.chat, self.streams, self.stops = chat, streams, stops
        self.media = [*media]

    def read(self, lines: Iterable[str]) -> None:
        """Take one line after the other; empty ones say nothing.

        Raises:
            FlamingoError: where a line cannot be followed, or media are left without a question, if errors stop.
        """
        for line in lines:
            try:
                self.take(line.strip())
            except FlamingoError as error:
                if self.stops:
                    raise
                print("error: " + " ".join(str(error).split()), file=sys.stderr)
        if self.stops and self.media:
            raise FlamingoError(f"{len(self.media)} images or videos without a question: expected one after them")

    def take(self, line: str) -> None:
        """Follow a command, or ask a question."""
        command, _, path = line.partition(" ")
        if not line:
            return
        if not command.startswith("/"):
            self.ask(line)
        elif command == "/help":
            print("\n".join(f"{name} {what}" for name, what in COMMANDS.items()))
        elif command == "/reset":
            self.chat.reset()
            self.media = []
        elif command in COMMANDS:
            self.media.append(_read(command.removeprefix("/"), path.strip(), self.chat.frames))
        else:
            raise FlamingoError(f"{command}: expected a question or one of {', '.join(COMMANDS)}")

    def ask(self, question: str) -> None:
        """Print the answer, on a line of its own."""
        if self.streams:
            self.chat.ask(question, self.media, stream=lambda piece: print(piece, end="", flush=True))
            print()
        else:
            print(self.chat.ask(question, self.media), flush=True)
        self.media = []


def _read(kind: str, path: str, frames: int) -> Medium:
    if not path:
        raise FlamingoError(f"{kind}: expected a path")
    return _read_image(path) if kind == "image" else read_video(path, frames)


def _typed() -> Iterator[str]:
    """What a person types, until the end of input."""
    with suppress(ImportError):  # lines that can be edited, where there is such a module
        import readline  # noqa: F401
    with suppress(EOFError):
        while True:
            yield input("> ")
    print()


@command_line
def main() -> None:
    """Entry point of `flamingo-chat`."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    options, given = parse()
    model, processor = load(options)
    settings = {name: getattr(options, name) for name in ("frames", "beams", "no_repeat_ngram", "max_new_tokens")}
    chat = Chat(model, processor, **settings)
    chat.examples = [turn for file in given.examples for turn in read_examples(file, chat.frames)]
    media = [_read(kind, path, chat.frames) for kind, path in given.media]
    person = options.question is None and sys.stdin.isatty()
    terminal = Terminal(chat, streams=options.streams, media=media, stops=not person)
    if options.question is not None:
        terminal.ask(options.question)
        return
    if person:
        print("A question a line; /help names the commands, Ctrl-D ends.")
    terminal.read(_typed() if person else sys.stdin)


if __name__ == "__main__":
    main()
