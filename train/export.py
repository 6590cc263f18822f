"""`flamingo-export CHECKPOINT --out DIR`: a training checkpoint becomes a folder for `from_pretrained`.

The folder has weights, processor, recipe and a model card. How many processes wrote the checkpoint, and how they shared
the parameters out, plays no part.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import jsonargparse
import torch
from transformers.utils import logging

from flamingo import FlamingoForConditionalGeneration, FlamingoProcessor
from flamingo.errors import FlamingoError, command_line, plain_options
from flamingo.files import whole, write_text
from icl_eval.run import identity as model_identity
from train.card import model_card
from train.checkpoint import RECORD, all_checkpoints, fault_of, load_model, read_record
from train.parallel import Processes, store_frozen_in_bfloat16
from train.pretrain import Pretraining, Training, save_model
from train.recipe import Recipe, TuneRecipe, from_dict
from train.tracking import METRICS_FILE, read_rows


@dataclass
class Export:
    """What is exported, and where to."""

    out: str
    """folder that is written; it must not exist"""
    vision: str | None = None
    """where the vision tower is now, if not where it was"""
    language: str | None = None
    """where the LM is now, if not where it was"""
    init: str | None = None
    """of a tuned model: where the model that it was tuned from is now, if not where it was"""
    results: str | None = None
    """results.json of an evaluation, for the model card; default: that of the run's folder, if it is of this model"""


def export(checkpoint: Path, options: Export) -> Path:
    """Write the folder, and return the checkpoint that it was made from.

    Args:
        checkpoint: `…/checkpoints/step-000500`, or a run's folder: its newest good one.

    Raises:
        FlamingoError: where the checkpoint is damaged, a backbone is not the one it was trained over, `out` exists, or
            the results are of another model.
    """
    out = Path(options.out)
    if out.exists():
        raise FlamingoError(f"--out {out}: expected a folder that does not exist yet")
    path = find(checkpoint)
    model, processor, record = restore(path, vision=options.vision, language=options.language, init=options.init)
    with whole(out) as unfinished:
        save_model(model, processor, record, read_rows(path.parent.parent / METRICS_FILE), unfinished, Processes())
        results = find_results(path, options.results, unfinished)
        if results is not None:
            write_text(unfinished / "README.md", model_card(record, results))
    return path


def restore(
    path: Path, *, vision: str | None = None, language: str | None = None, init: str | None = None
) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor, dict[str, Any]]:
    """The model of a checkpoint as it trained (adapters beside the LM), its processor, and its `run.json`.

    Args:
        path: of the checkpoint.
        vision, language, init: where the backbones, or the model that it was tuned from, are now, if not where they
            were.

    Raises:
        FlamingoError: where they are not those that it was trained over, or the checkpoint cannot be loaded.
    """
    record = read_record(path)
    training = training_of(record, path)
    move(training, path, vision=vision, language=language, init=init)
    check_origins(path, training, record["identity"])
    torch.manual_seed(training.recipe.seed)
    model, processor = training.build()
    if training.recipe.parallel.frozen_in_bfloat16:
        store_frozen_in_bfloat16(model)
    load_model(model, path)
    return model, processor, record


def training_of(record: Mapping[str, Any], path: Path) -> Training:
    """What made a checkpoint.

    Raises:
        FlamingoError: where its recipe is not one.
    """
    source = f"{path / RECORD}: recipe"
    if record.get("training") == "tune":
        from train.tune import Tuning  # tuning may begin with a checkpoint, of tuning even

        return Tuning(from_dict(TuneRecipe, record["recipe"], source))
    return Pretraining(from_dict(Recipe, record["recipe"], source))


def move(training: Training, path: Path, *, init: str | None, **backbones: str | None) -> None:
    """Write into a recipe where things are now.

    Raises:
        FlamingoError: where `init` is given and the checkpoint at `path` is not of tuning.
    """
    recipe = training.recipe
    if init is not None and not isinstance(recipe, TuneRecipe):
        raise FlamingoError(f"--init {init}: expected with the checkpoint of a tuned model; {path} is of pretraining")
    places = {name: place for name, place in {**backbones, "path": init}.items() if place is not None}
    for name, place in places.items():
        setattr(recipe.init if isinstance(recipe, TuneRecipe) else recipe.model, name, place)  # type: ignore[attr-defined]


def find(checkpoint: Path) -> Path:
    """The checkpoint itself, or the newest good one of a run's folder.

    Raises:
        FlamingoError: where there is none, or it is damaged.
    """
    found = [checkpoint] if (checkpoint / RECORD).exists() else all_checkpoints(checkpoint)
    faults: list[str] = []
    for path in reversed(found):
        if (fault := fault_of(path)) is None:
            for damaged in faults:
                print(f"passed over: {damaged}")
            return path
        faults.append(f"{path}: {fault}")
    raise FlamingoError("; ".join(faults) or f"{checkpoint}: expected a checkpoint, or the folder of a run with one")


def check_origins(path: Path, training: Training, wanted: Mapping[str, Any]) -> None:
    """Stop where a checkpoint would be put over other backbones, or another model, than it was trained over.

    Args:
        wanted: the checkpoint's identity.

    Raises:
        FlamingoError: it names both.
    """
    found = training.identity()
    if "init" in found:
        place = training.origin()
        if found["init"] != wanted["init"]:
            raise FlamingoError(
                f"{path}: it was tuned from {wanted['init']}, {place} is {found['init']}; give its place as --init"
            )
        return
    for part, identity in found["backbones"].items():
        if identity != (before := wanted["backbones"][part]):
            raise FlamingoError(
                f"{path}: the {part} backbone was {before}, {found['model'][part]} is {identity}; "
                f"give its place as --{part}"
            )


def find_results(path: Path, given: str | None, model: Path) -> dict[str, Any] | None:
    """The results that were measured on the weights in the folder `model`, if there are any.

    Raises:
        FlamingoError: where those that were `given` are of other weights.
    """
    file = Path(given) if given else path.parent.parent / "results.json"
    if not given and not file.exists():
        return None
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        measured = results["facts"]["model"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FlamingoError(f"{file}: expected results of flamingo-eval or flamingo-quickstart") from error
    if measured == model_identity(str(model))["sha256"]:
        return results
    if given:
        raise FlamingoError(f"--results {file}: measured on other weights than those of {path}")
    print(f"{file} is not in the model card: measured on other weights")
    return None


@command_line
def main() -> None:
    """Entry point of `flamingo-export`."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    parser = jsonargparse.ArgumentParser(exit_on_error=False, description=__doc__)
    parser.add_argument("checkpoint", type=str, help="folder of a checkpoint, or of a run: its newest good one")
    parser.add_class_arguments(Export)
    try:
        parsed = parser.parse_args(plain_options(sys.argv[1:]))
    except jsonargparse.ArgumentError as error:
        raise FlamingoError(" ".join(str(error).split())) from error
    options = Export(**{field.name: parsed[field.name] for field in fields(Export)})
    path = export(Path(parsed.checkpoint), options)
    print(f"{path} → {options.out}")


if __name__ == "__main__":
    main()
