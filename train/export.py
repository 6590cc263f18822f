"""`flamingo-export CHECKPOINT --out DIR`: a training checkpoint becomes a folder for `from_pretrained`.

The folder has weights, processor, recipe and a model card. How many processes wrote the checkpoint, and how they shared
the parameters out, plays no part.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import jsonargparse
import torch
from transformers.utils import logging

from flamingo.backbones import backbone_identity
from flamingo.errors import FlamingoError, command_line, plain_options
from flamingo.files import whole, write_text
from icl_eval.run import identity as model_identity
from train.card import model_card
from train.checkpoint import RECORD, all_checkpoints, fault_of, load_model, read_record
from train.parallel import Processes, store_frozen_in_bfloat16
from train.pretrain import build_model, save_model
from train.recipe import Recipe, from_dict
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
    record = read_record(path)
    recipe = from_dict(Recipe, record["recipe"], f"{path / RECORD}: recipe")
    for part in ("vision", "language"):
        if (place := getattr(options, part)) is not None:
            setattr(recipe.model, part, place)
        check_backbone(path, part, getattr(recipe.model, part), record["identity"]["backbones"][part])
    torch.manual_seed(recipe.seed)
    model, processor = build_model(recipe)
    if recipe.parallel.frozen_in_bfloat16:
        store_frozen_in_bfloat16(model)
    load_model(model, path)
    with whole(out) as unfinished:
        save_model(model, processor, record, read_rows(path.parent.parent / METRICS_FILE), unfinished, Processes())
        results = find_results(path, options.results, unfinished)
        if results is not None:
            write_text(unfinished / "README.md", model_card(record, results))
    return path


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


def check_backbone(path: Path, part: str, place: str, wanted: str) -> None:
    """Stop where a model would be put over another backbone than the one it was trained over.

    Raises:
        FlamingoError: it names both.
    """
    found = backbone_identity(place)
    if found != wanted:
        raise FlamingoError(f"{path}: the {part} backbone was {wanted}, {place} is {found}; give its place as --{part}")


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
