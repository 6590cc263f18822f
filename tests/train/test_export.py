"""flamingo-export: a checkpoint becomes a model folder with a card, whoever wrote it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from flamingo import FlamingoError, FlamingoForConditionalGeneration, FlamingoProcessor
from tests.tiny import document, save_backbones
from tests.train.runs import forked, prepare_folder, recipe_of, saved
from train.card import model_card
from train.checkpoint import read_record
from train.export import Export, export, main
from train.parallel import Processes
from train.pretrain import pretrain
from train.quickstart import Quickstart
from train.recipe import ParallelRecipe


def weights(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / "model.safetensors")


def test_an_export_is_the_model_that_training_left(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an export that lacks what was trained, or that cannot be loaded and run."""
    monkeypatch.setattr(sys, "argv", ["flamingo-export", str(whole), "--out", str(tmp_path / "model")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0 and "step-000012 → " in capsys.readouterr().out
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()
    model = FlamingoForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    processor = FlamingoProcessor.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        assert model(**processor(documents=[document(1, 1)])).loss.isfinite()


def test_an_older_checkpoint_is_exported_as_it_was(whole: Path, tmp_path: Path) -> None:
    """Catches an export of another step than the one that was asked for."""
    export(whole / "checkpoints" / "step-000008", Export(str(tmp_path / "model")))
    before, after = weights(tmp_path / "model"), weights(whole / "model")
    assert before.keys() == after.keys()
    trained = [name for name in before if not name.startswith(("vision_tower.", "language_model."))]
    assert any(not torch.equal(before[name], after[name]) for name in trained)
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - set(trained))
    assert "Trained for 8 of 12 steps" in (tmp_path / "model" / "README.md").read_text()


def test_a_run_of_the_quickstart_is_exported(folder: Path, tmp_path: Path) -> None:
    """Catches a checkpoint whose recipe holds what a command adds, which no recipe is read back from."""
    pretrain(Quickstart(**vars(recipe_of(folder, tmp_path / "run", steps=2))), Processes())
    export(tmp_path / "run", Export(str(tmp_path / "model")))
    assert weights(tmp_path / "model").keys() == weights(tmp_path / "run" / "model").keys()


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen2"])  # untied, untied, tied
def test_shards_of_two_processes_become_one_model(tmp_path: Path, family: str) -> None:
    """Catches an export or a final model that holds the shard of one process, or loses a tied tensor."""
    folder = prepare_folder(tmp_path)
    shutil.rmtree(folder / "language")
    save_backbones(folder, family)

    def run(processes: Processes) -> None:
        recipe = recipe_of(folder, tmp_path / "run", steps=4, parallel=ParallelRecipe("fsdp", timeout=30))
        pretrain(recipe, processes)

    assert forked(run, world=2) == [(0, None)] * 2
    assert saved(tmp_path / "run") == [4] and read_record(tmp_path / "run/checkpoints/step-000004")["processes"] == 2
    export(tmp_path / "run", Export(str(tmp_path / "model")))
    exported, left = weights(tmp_path / "model"), weights(tmp_path / "run" / "model")
    assert exported.keys() == left.keys() and all(torch.equal(exported[name], left[name]) for name in exported)
    FlamingoForConditionalGeneration.from_pretrained(tmp_path / "model")


def test_the_card_says_what_the_model_was_made_of(whole: Path, tmp_path: Path) -> None:
    """Catches a model of which nobody knows the data, the faults or the scores."""
    record = read_record(whole / "checkpoints" / "step-000012")
    record["faults"] = {"counts": {"pages": {"missing image": 3}}, "examples": []}
    record["accounts"] = {
        "pages": {
            "documents_read": 30, "documents_kept": 23, "documents_dropped": {"empty": 7},
            "images_read": 60, "images_kept": 60, "images_dropped": {},
        }
    }  # fmt: skip
    record["recipe"]["model"] |= {"language": "org/lm", "vision": "runs/vision"}
    record["identity"]["backbones"]["language"] = "org/lm"
    results = {
        "facts": {"commit": "abc"},
        "tasks": {"digits": {"metric": "accuracy"}},
        "cells": [
            {
                "task": "digits",
                "shots": shots,
                "control": control,
                "figures": {"accuracy": {"value": score, "interval": [0.1, 0.9]}},
            }
            for shots, control, score in ((0, None, 0.25), (4, None, 0.75), (4, "gates_zero", 0.2))
        ],
    }
    card = model_card(record, results)
    _, header, text = card.split("---\n", 2)
    assert yaml.safe_load(header)["base_model"] == ["org/lm"], "the hub knows no folder of ours"
    assert "| digits | 0.250 (0.100–0.900) | 0.750 (0.100–0.900) |" in text
    assert "| gates_zero | digits | 4 | 0.200 (0.100–0.900) |" in text
    assert "| pages | missing image | 3 |" in text
    assert "of 30 documents 23 were kept (dropped: empty: 7); of 60 images 60 were kept" in text
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()]
    used = {row[1]: int(row[5]) for row in rows if len(row) == 9 and row[5].isdigit()}
    assert used.keys() == {"pairs", "pages"} and sum(used.values()) == 12 * 8
    assert yaml.safe_load(text.split("```yaml\n")[1].split("```")[0]) == record["recipe"]
    log = [{"step": 8, "fewshot/digits/4": 0.5}, {"step": 12, "fewshot/digits/4": 0.6}, {"step": 16, "loss": 1.0}]
    assert "| digits | 4 | 12 | 0.600 |" in model_card(record, log=log)
    assert "Few-shot" not in (whole / "model" / "README.md").read_text(), "none are known yet"


def results_of(model: Path, **facts: Any) -> dict[str, Any]:
    from icl_eval.run import identity

    return {
        "facts": {"model": identity(str(model)), **facts},
        "tasks": {"t": {"metric": "accuracy"}},
        "cells": [
            {"task": "t", "shots": 1, "control": None, "figures": {"accuracy": {"value": 0.5, "interval": [0.4, 0.6]}}}
        ],
    }


def test_scores_of_other_weights_stay_out_of_the_card(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a card that boasts of another model's scores."""
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    (run / "results.json").write_text(json.dumps(results_of(run / "model")))
    export(run, Export(str(tmp_path / "own")))
    assert "| t | 0.500 (0.400–0.600) |" in (tmp_path / "own" / "README.md").read_text()
    older = run / "checkpoints" / "step-000008"
    export(older, Export(str(tmp_path / "older")))
    assert "Few-shot" not in (tmp_path / "older" / "README.md").read_text()
    assert "is not in the model card: measured on other weights" in capsys.readouterr().out
    with pytest.raises(FlamingoError, match="measured on other weights"):
        export(older, Export(str(tmp_path / "given"), results=str(run / "results.json")))
    assert not list(tmp_path.glob("*given*")), "the same command, mended, may write there"


def test_mistakes_are_named(whole: Path, folder: Path, tmp_path: Path) -> None:
    """Catches an export over another backbone, of a damaged checkpoint, or over somebody's files."""
    with pytest.raises(FlamingoError, match="expected a folder that does not exist"):
        export(whole, Export(str(tmp_path)))
    with pytest.raises(FlamingoError, match="expected a checkpoint, or the folder of a run"):
        export(tmp_path, Export(str(tmp_path / "model")))
    other, _ = save_backbones(tmp_path / "other", "gpt_neox")
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    with pytest.raises(FlamingoError, match=r"the vision backbone was \w+, .* give its place as --vision"):
        export(whole, Export(str(tmp_path / "model"), vision=str(other)))
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    (run / "checkpoints" / "step-000012" / "__0_0.distcp").unlink()
    with pytest.raises(FlamingoError, match="step-000012: __0_0.distcp"):
        export(run / "checkpoints" / "step-000012", Export(str(tmp_path / "model")))
    export(run, Export(str(tmp_path / "model")))
    assert "Trained for 8 of 12" in (tmp_path / "model" / "README.md").read_text()
