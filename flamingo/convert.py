"""Convert checkpoints: `flamingo-convert`, or `python -m flamingo.convert`. What each format is: `flamingo.interop`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentError, ArgumentParser
from safetensors import SafetensorError
from transformers import CLIPImageProcessorPil
from transformers.utils import logging as transformers_logging

from flamingo import FlamingoForConditionalGeneration, FlamingoProcessor
from flamingo.errors import FlamingoError, command_line, plain_options
from flamingo.interop import open_clip, open_flamingo, otter
from flamingo.modeling import TRAINED

READ = ("open_flamingo", "otter", "open_clip", "flamingo")
WRITTEN = ("flamingo", "open_flamingo", "otter")


@dataclass
class Options:
    """Convert a checkpoint of OpenFlamingo or Otter, or a vision tower of open_clip, and back.

    Attributes:
        checkpoint: file or folder to read.
        out: folder to write; a file for `--to open_flamingo`.
        vision: folder or hub id of the vision tower that the checkpoint stands on; for `--from flamingo` only where a
            model saved without its backbones does not find them.
        language: folder or hub id of the LM that it stands on, likewise.
        new_output_rows: where to start the new tokens' output rows where the checkpoint has none.
        trained_only: write what Flamingo trained and the names of the backbones, instead of everything.
        trust_remote_code: run code that comes with a backbone.
        hidden_act: of an open_clip tower: quick_gelu for OpenAI's weights.
        heads: attention heads of an open_clip tower; default: 64 channels each.
    """

    checkpoint: str
    out: str
    vision: str | None = None
    language: str | None = None
    new_output_rows: Literal["mean", "input", "random"] | None = None
    trained_only: bool = False
    trust_remote_code: bool = False
    hidden_act: Literal["gelu", "quick_gelu"] = "gelu"
    heads: int | None = None


def parse(arguments: list[str] | None = None) -> tuple[Options, str, str]:
    """Options of a command line, the format read and the format written.

    Raises:
        FlamingoError: an argument that is unknown, missing or malformed.
    """
    parser = ArgumentParser(
        prog="flamingo-convert", description="Convert checkpoints.", exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--from", choices=READ, required=True, help="format of the checkpoint")
    parser.add_argument("--to", choices=WRITTEN, default=WRITTEN[0], help="format to write")
    parser.add_class_arguments(Options)
    try:
        parsed = vars(parser.parse_args(plain_options(sys.argv[1:] if arguments is None else arguments)))
    except ArgumentError as error:
        raise FlamingoError(str(error)) from None
    return Options(**{key: parsed[key] for key in Options.__dataclass_fields__}), parsed["from"], parsed["to"]


def convert(options: Options, read: str, written: str) -> None:
    """Read, and write `options.out`.

    Raises:
        FlamingoError: where the formats do not go together, a backbone is not named, or the checkpoint is refused.
    """
    if options.trained_only and written != "flamingo":
        raise FlamingoError(f"--trained-only: expected with --to flamingo, found --to {written}")
    if read == "open_clip":
        if written != "flamingo" or options.trained_only:
            raise FlamingoError("--from open_clip: is a vision tower, which is written as one; expected no other --to")
        convert_tower(options)
        return
    with loading("--checkpoint", Path(options.checkpoint)):
        model, processor = load(options, read)
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    if written == "open_flamingo":
        open_flamingo.save(model, options.out)
    elif written == "otter":
        otter.save(model, options.out)
    else:
        save = model.save_trained if options.trained_only else model.save_pretrained
        save(options.out)
        processor.save_pretrained(options.out)


def load(options: Options, read: str) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
    """The model that stands in `options.checkpoint`, and its processor."""
    if read == "flamingo":
        kind, path = FlamingoForConditionalGeneration, options.checkpoint
        if (Path(path) / TRAINED).exists():
            backbones = {"vision": options.vision, "language": options.language}
            model = kind.from_trained(path, **backbones, trust_remote_code=options.trust_remote_code)
        else:
            model = kind.from_pretrained(path)
        return model, FlamingoProcessor.from_pretrained(path, trust_remote_code=options.trust_remote_code)
    if options.vision is None or options.language is None:
        raise FlamingoError(f"--from {read}: expected --vision and --language, the backbones of the checkpoint")
    loader = open_flamingo.from_open_flamingo if read == "open_flamingo" else otter.from_otter
    return loader(
        options.checkpoint,
        options.vision,
        options.language,
        new_output_rows=options.new_output_rows,
        trust_remote_code=options.trust_remote_code,
    )


@contextmanager
def loading(option: str, path: Path) -> Iterator[None]:
    """Errors of transformers as one that names the option and the model that it gave."""
    try:
        yield
    except FlamingoError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        said = " ".join(str(error).split())
        missing = "" if path.exists() else "is not on this machine, and "
        raise FlamingoError(f"{option}: {path}: {missing}cannot be loaded as a model: {said}") from error


def convert_tower(options: Options) -> None:
    """An open_clip ViT as a folder that `from_backbones` takes as `vision`, with CLIP's image processor."""
    tensors = open_flamingo.read_checkpoint(options.checkpoint)
    tower = open_clip.to_hugging_face(
        tensors, heads=options.heads, hidden_act=options.hidden_act, source=options.checkpoint
    )
    tower.save_pretrained(options.out)
    side = tower.config.image_size
    crop = {"height": side, "width": side}
    CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=crop).save_pretrained(options.out)


@command_line
def main() -> None:
    """Entry point of `flamingo-convert`."""
    transformers_logging.disable_progress_bar()
    options, read, written = parse()
    convert(options, read, written)
    print(options.out)


if __name__ == "__main__":
    main()
