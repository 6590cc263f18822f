"""Tuning on instructions: `torchrun --nproc-per-node N -m train.tune --config FILE`, or `flamingo-tune`.

It is pretraining (`train.pretrain.run`: the same loop, data, checkpoints and faults) of a model that is there already:
one of ours, or OpenFlamingo's or Otter's. The resampler, the gated blocks and the rows of new tokens train, and of the
LM what the recipe says: nothing, adapters (`train.lora`), or everything. The result is an ordinary model folder, with
the adapters folded in; `flamingo-convert --from flamingo --to otter` gives it Otter's layout.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from flamingo import FlamingoConfig, FlamingoForConditionalGeneration, FlamingoProcessor, backbones
from flamingo.backbones import backbone_identity, backbone_path
from flamingo.convert import Options, loading
from flamingo.convert import load as load_converted
from flamingo.errors import FlamingoError, command_line
from flamingo.files import read_object, sha256
from flamingo.instructions import ANSWER
from flamingo.interop import open_flamingo, otter
from flamingo.packing import check_packing
from flamingo.processing import chat_template
from train import lora
from train.checkpoint import FOLDER, RECORD, read_record
from train.export import find, restore, training_of
from train.parallel import Processes
from train.plan import outline_of_backbones
from train.pretrain import launch, run
from train.recipe import TuneRecipe, from_command_line

MODELS = ("flamingo", "otter")
"""`model_type` in config.json of what tuning begins with."""


@dataclass
class Command(TuneRecipe):
    """A recipe, and what to do with it."""

    dry_run: bool = False
    """build everything without memory for it, print the plan, and train nothing"""


@dataclass(frozen=True)
class Tuning:
    """A model that is there already, of which Flamingo's parts train, and of the LM what the recipe says."""

    recipe: TuneRecipe
    name: str = "tune"

    def build(self) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
        """The model that tuning begins with, made ready (`make_ready`)."""
        model, processor = load_init(self.recipe)
        make_ready(model, processor, self.recipe)
        return model, processor

    def outline(self) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
        """The same, of shapes alone; of an imported checkpoint the tensors are read for theirs."""
        model, processor = outline_init(self.recipe)
        with torch.device("meta"):
            make_ready(model, processor, self.recipe)
        return model, processor

    def identity(self) -> dict[str, Any]:
        """The model that it began with, and what was made of it."""
        described = asdict(self.recipe)
        kept = {name: described[name] for name in ("train_language", "train_new_tokens", "answer_token", "frames")}
        adapted = described["lora"] if self.recipe.train_language == "lora" else None
        return {"init": init_identity(self.recipe), "lora": adapted, **kept}

    def origin(self) -> str:
        """The model that it begins with."""
        return f"{self.recipe.init.path}, with its LM {self.recipe.train_language}"


def tune(recipe: TuneRecipe, processes: Processes) -> Path:
    """As `train.pretrain.run`, for the model that the recipe begins with."""
    return run(Tuning(recipe.alone()), processes)


def make_ready(model: FlamingoForConditionalGeneration, processor: FlamingoProcessor, recipe: TuneRecipe) -> None:
    """Give a model, in place, what the recipe adds to it, and let train what is to train.

    Raises:
        FlamingoError: where its LM keeps no documents apart and is to (`data.packing`), or adapters cannot be added.
    """
    if recipe.answer_token and ANSWER not in processor.tokenizer.get_vocab():
        backbones.add_tokens(model, processor, [ANSWER])
    if recipe.frames and not model.config.resampler_max_frames:
        backbones.add_frames(model, recipe.frames)
    config = model.config
    config.packing = recipe.data.packing
    if config.packing and model.device.type != "meta":
        check_packing(model)
    config.freeze_vision, config.freeze_language = True, recipe.train_language != "full"
    config.open_flamingo_compatible = False  # the output rows of new tokens train too
    model.requires_grad_(True)
    model.prepare_backbones()
    for rows in (model.new_input_rows, model.new_output_rows):
        if rows is not None:
            rows.requires_grad_(recipe.train_new_tokens)
    if recipe.quantised:
        reduced = recipe.parallel.precision == "bfloat16"
        lora.quantise(model, torch.bfloat16 if reduced else torch.float32)
    if recipe.train_language == "lora":
        lora.add_adapters(model, recipe.lora)
    marked = ANSWER in processor.tokenizer.get_vocab()
    processor.chat_template = chat_template(answer_mark=marked, spaced=recipe.spaced)


# -- the model that it begins with -------------------------------------------------------------------------------------


def init_path(recipe: TuneRecipe) -> Path:
    """Where the model is, or its id on the hub."""
    return Path(recipe.place(recipe.init.path))


def init_kind(recipe: TuneRecipe) -> str:
    """What the model is, a value of `InitRecipe.kind` other than auto.

    Raises:
        FlamingoError: where there is nothing; it names the path.
    """
    path, kind = init_path(recipe), recipe.init.kind
    if kind != "auto":
        return kind
    if path.is_file():
        return "open_flamingo"
    try:
        folder = Path(backbone_path(path))
    except FlamingoError:
        raise FlamingoError(f"init.path: {path}: expected a model, a checkpoint, or the folder of a run") from None
    if (folder / RECORD).exists() or (folder / FOLDER).is_dir():
        return "checkpoint"
    config = folder / "config.json"
    if not config.is_file():
        return "flamingo"  # on the hub, or the loader says what is missing
    found = read_object(config).get("model_type")
    if found not in MODELS:
        raise FlamingoError(f"init.path: {path} holds a model of type {found}; expected one of {', '.join(MODELS)}")
    return found


def init_identity(recipe: TuneRecipe) -> str:
    """SHA-256 of the model that tuning begins with: its files, and for imported ones its backbones; or its hub id."""
    path, kind, init = init_path(recipe), init_kind(recipe), recipe.init
    if kind == "checkpoint":
        return hashlib.sha256(json.dumps(read_record(find(path))["files"]).encode()).hexdigest()
    own = sha256(path) if path.is_file() else backbone_identity(path)
    if kind == "flamingo":
        return own
    parts = [own, *(backbone_identity(part) for part in (init.vision, init.language) if part is not None)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def load_init(recipe: TuneRecipe) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
    """The model that tuning begins with, in float32, and its processor.

    Raises:
        FlamingoError: where it cannot be loaded; it names what is wrong with it.
    """
    path, kind, init = init_path(recipe), init_kind(recipe), recipe.init
    if kind == "checkpoint":
        model, processor, _ = restore(find(path), vision=init.vision, language=init.language)
        lora.merge(model)
    else:
        if kind != "flamingo" and (init.vision is None or init.language is None):
            raise FlamingoError(f"init.kind={kind}: expected init.vision and init.language, its backbones")
        options = Options(
            checkpoint=str(path),
            out="",
            vision=init.vision,
            language=init.language,
            new_output_rows=init.new_output_rows,
            trust_remote_code=init.trust_remote_code,
        )
        with loading("init.path", path):
            model, processor = load_converted(options, kind)
    return model.float(), processor


def outline_init(recipe: TuneRecipe) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
    """The same on the meta device, without weights, and its processor.

    Raises:
        FlamingoError: where a configuration or the processor is missing, or an imported checkpoint is.
    """
    path, kind, init = init_path(recipe), init_kind(recipe), recipe.init
    if kind == "checkpoint":
        record = read_record(found := find(path))
        model, processor = training_of(record, found).outline()
        with torch.device("meta"):
            lora.merge(model)
    elif kind == "flamingo":
        with loading("init.path", path):
            config = FlamingoConfig.from_pretrained(path)
            with torch.device("meta"):
                model = FlamingoForConditionalGeneration(config)
            processor = FlamingoProcessor.from_pretrained(path, trust_remote_code=init.trust_remote_code)
    else:
        if init.vision is None or init.language is None:
            raise FlamingoError(f"init.kind={kind}: expected init.vision and init.language, its backbones")
        shapes_of = otter.shape_options if kind == "otter" else open_flamingo.shape_options
        options = shapes_of(otter.read_checkpoint(path), str(path), {})
        model, processor = outline_of_backbones(
            init.vision, init.language, trust_remote_code=init.trust_remote_code, **options
        )
    return model.float(), processor


@command_line
def main() -> None:
    """Entry point of `flamingo-tune`."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    command = from_command_line(Command, description="Tune a Flamingo on instructions.")
    launch(Tuning(command.alone()), dry_run=command.dry_run)


if __name__ == "__main__":
    main()
