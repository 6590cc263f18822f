"""Real documents and photographs: converted, validated, and trained on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from data_shards.convert import Options, convert
from data_shards.shards import open_shards
from data_shards.sources import Reader
from data_shards.sources.mmc4 import Mmc4Reader
from data_shards.sources.obelics import ObelicsReader
from data_shards.sources.pairs import PairsReader
from data_shards.validate import validate
from tests.tiny import save_backbones
from train.parallel import Processes
from train.pretrain import pretrain
from train.recipe import DataRecipe, ModelRecipe, OptimizerRecipe, Recipe, SourceRecipe, TrackingRecipe

STEPS, BATCH = 50, 4


def reader_of(name: str, folder: Path) -> Reader:
    if name == "mmc4_shard151":  # released without its images
        return Mmc4Reader(str(folder), keep_text_only=True)
    if name == "coco_photos":
        return PairsReader(str(folder), images=str(folder / "images"))
    return ObelicsReader(str(folder))


@pytest.mark.parametrize("name", ["openstax_astronomy", "based_cooking", "coco_photos", "mmc4_shard151"])
def test_real_data_are_converted_validated_and_trained_on(real_data: Path, tmp_path: Path, name: str) -> None:
    """Catches what a source writes and validation or training refuses: a fault, a loss that is none, a stop."""
    shards, out = tmp_path / "shards", tmp_path / "run"
    account = convert(reader_of(name, real_data / name), shards, Options(check_images=True))
    assert account.adds_up and not account.documents_dropped
    report = validate(shards)
    assert report.ok and report.samples == account.samples
    assert name != "coco_photos" or (report.samples, report.images) == (195, 195)
    vision, language = save_backbones(tmp_path)
    recipe = Recipe(
        out=str(out),
        steps=STEPS,
        batch=BATCH,
        micro_batch=BATCH,
        save_every=STEPS,
        model=ModelRecipe(
            str(vision), str(language), cross_attention_heads=2, cross_attention_head_dim=8,
            resampler_depth=1, resampler_latents=4, resampler_heads=2, resampler_head_dim=8,
        ),
        data=DataRecipe({name: SourceRecipe(str(shards))}, workers=0, max_media=3),
        optimizer=OptimizerRecipe(learning_rate=0.01, warmup_steps=5),
        tracking=TrackingRecipe("disabled", log_every=1),
    )  # fmt: skip
    assert (pretrain(recipe, Processes()) / "config.json").is_file()
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(map(math.isfinite, losses)) and sum(losses[-10:]) < sum(losses[:10])
    assert rows[-1][f"faults/{name}"] == 0
    assert rows[-1][f"epoch/{name}"] == pytest.approx(STEPS * BATCH / len(open_shards(shards)))
