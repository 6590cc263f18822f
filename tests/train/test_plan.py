"""Plans of recipes, made from folders with configurations and without weights."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from data_shards.shards import write_shards
from flamingo import Document, FlamingoError, Text, Video
from tests.tiny import document, picture, save_backbones
from train.plan import Plan, dry_run
from train.plan import plan as plan_of
from train.pretrain import Pretraining, build_model, main
from train.recipe import EMBEDDED, DataRecipe, ModelRecipe, Recipe, SourceRecipe, from_command_line, packaged

FAMILIES = ("llama", "opt", "gpt_neox")


def recipe(folder: Path, family: str = "llama", **data: object) -> Recipe:
    """Tiny backbones of a family under `folder`, and a recipe over them with two sources."""
    save_backbones(folder / family, family)
    model = ModelRecipe(
        vision=str(folder / family / "vision"), language=str(folder / family / "language"), cross_attention_heads=2,
        cross_attention_head_dim=8, resampler_depth=1, resampler_latents=4, resampler_heads=2, resampler_head_dim=8,
    )  # fmt: skip
    sources = {
        "pairs": SourceRecipe(str(folder / "pairs"), share=3.0, loss_weight=0.2),
        "pages": SourceRecipe(str(folder / "pages"), share=1.0),
    }
    read = DataRecipe(sources=sources, max_tokens=64, **data)  # type: ignore[arg-type]
    return Recipe(out=str(folder / "out"), steps=10, batch=8, micro_batch=2, model=model, data=read)


def plan(recipe: Recipe, world: int = 1) -> Plan:
    """Of pretraining."""
    return plan_of(Pretraining(recipe), world)


def without_weights(folder: Path) -> None:
    """Take the weights out of what `save_backbones` wrote."""
    found = list(folder.rglob("*.safetensors"))
    assert found
    for path in found:
        path.unlink()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("train_new_tokens", [True, False])
def test_what_is_planned_is_what_is_built(tmp_path: Path, family: str, train_new_tokens: bool) -> None:
    """Catches a plan of another model than the one that trains: shapes, what trains, ids of new tokens."""
    wanted = recipe(tmp_path, family)
    wanted.model.train_new_tokens = train_new_tokens
    built, processor = build_model(wanted)
    without_weights(tmp_path)
    planned = plan(wanted)
    shapes = {name: (each.shape, each.dtype, each.requires_grad) for name, each in planned.model.named_parameters()}
    assert shapes == {name: (each.shape, each.dtype, each.requires_grad) for name, each in built.named_parameters()}
    assert {each.device.type for each in planned.model.parameters()} == {"meta"}
    assert planned.model.config.new_token_ids == built.config.new_token_ids
    assert planned.processor.image_token_id == processor.image_token_id


def test_sources_are_measured_or_reported(tmp_path: Path) -> None:
    """Catches epochs and lengths that are not the source's, and a missing folder that ends a dry run or is not said."""
    wanted = recipe(tmp_path)
    write_shards((document(n, 1, key=f"pair{n}") for n in range(24)), tmp_path / "pairs", max_samples=5)
    planned = plan(wanted)
    pairs, pages = planned.sources
    assert pairs.samples + pages.samples == 80 and 50 < pairs.samples < 70  # three of four
    assert (pairs.documents, pairs.measured, pairs.lengths.media) == (24, True, 1)
    assert 5 < pairs.lengths.supervised < pairs.lengths.tokens < 30
    assert pairs.lengths.squared >= pairs.lengths.tokens**2
    assert (pages.documents, pages.measured, pages.lengths.tokens) == (None, False, 64)
    (fault,) = planned.faults
    assert fault.startswith("data.sources.pages: ") and str(tmp_path / "pages") in fault
    assert re.search(rf"pairs +{pairs.samples} +{pairs.samples / 24:.3g} +0\.2 .* measured", planned.text())
    assert re.search(rf"pages +{pages.samples} +\? +1 +64 +5\.0 +at most", planned.text())


def test_videos_are_planned_for_by_their_frames(tmp_path: Path) -> None:
    """Catches a plan that takes a video for an image, of which the tower has a fraction of the work."""
    wanted, plans = recipe(tmp_path), []
    for name, frames in (("stills", 1), ("films", 8)):
        film = Video(tuple(picture(n) for n in range(frames)))
        write_shards((Document((film, Text("see")), key=f"{name}{n}") for n in range(4)), tmp_path / name)
        wanted.data.sources["pairs"].shards = str(tmp_path / name)
        plans.append(plan(wanted))
    stills, films = (each.sources[0].lengths for each in plans)
    assert (stills.media, stills.frames, films.media, films.frames) == (1, 1, 1, 8)
    assert plans[1].operations() > 1.15 * plans[0].operations()


def test_nothing_is_brought_here_for_a_plan(tmp_path: Path) -> None:
    """Catches shards that are fetched to be planned with, and a cache in the run's folder."""
    wanted = recipe(tmp_path)
    write_shards((document(n, 1, key=f"pair{n}") for n in range(24)), tmp_path / "pairs", max_samples=5)
    wanted.data.sources["pairs"].shards = f"file://{tmp_path / 'pairs'}"
    pairs = plan(wanted).sources[0]
    assert (pairs.documents, pairs.measured) == (24, False)
    assert not (tmp_path / "out").exists()


def test_documents_that_are_not_usable_are_reported(tmp_path: Path) -> None:
    """Catches a plan that stops at a bad document, counts it as an empty one, or does not say which it is."""
    wanted = recipe(tmp_path)
    silent = [Document((picture(n),), key=f"silent{n}") for n in range(4)]
    write_shards([*silent, *(document(n, 2, key=f"page{n}") for n in range(12))], tmp_path / "pages")
    planned = plan(wanted)
    assert planned.sources[1].lengths.media == 2
    (said,) = [fault for fault in planned.faults if "pages" in fault]
    assert "4 of 16 documents" in said and "silent" in said


def test_faults_of_the_recipe_are_listed_together(tmp_path: Path) -> None:
    """Catches a dry run that stops at the first fault, and rows longer than the language model reads."""
    wanted = recipe(tmp_path, packing=True)
    wanted.batch, wanted.data.max_tokens = 9, 1024
    wanted.evaluation.every, wanted.evaluation.tasks = 5, ["glyphs_5way", "nope"]
    said = "\n".join(plan(wanted, world=2).faults)
    for part in ("batch=9: expected a multiple", "max_tokens=1024", "512 positions", "task 'nope'", "pairs", "pages"):
        assert part in said, part


@pytest.mark.parametrize("missing", ["tokenizer", "config.json", "preprocessor_config.json"])
def test_without_tokenizer_or_configuration_there_is_no_plan(tmp_path: Path, missing: str) -> None:
    """Catches a run that is planned and then cannot start, and an error that does not say in which folder."""
    wanted = recipe(tmp_path)
    part = "vision" if missing.startswith("pre") else "language"
    for path in (tmp_path / "llama" / part).glob(f"{missing}*"):
        path.unlink()
    with pytest.raises(FlamingoError, match=re.escape(str(tmp_path / "llama" / part))):
        plan(wanted)


def test_hours_go_with_the_work(tmp_path: Path) -> None:
    """Catches hours of one GPU that are given for all, and operations of one step for those of the run."""
    wanted = recipe(tmp_path)
    one, four = plan(wanted), plan(wanted, world=4)
    assert one.hours(1e12) == pytest.approx(4 * four.hours(1e12))
    assert one.hours(1e12, mfu=0.2) == pytest.approx(2 * one.hours(1e12))
    longer = plan(replace(wanted, steps=20))
    assert longer.operations() == pytest.approx(2 * one.operations())
    assert one.hours(1e12, mfu=1.0) * 3600e12 == pytest.approx(one.operations())


def test_the_command_prints_the_plan_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a dry run that joins a process group, writes into the run's folder or leaves out a part of the plan."""
    wanted = recipe(tmp_path)
    without_weights(tmp_path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(wanted.as_dict()))
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(sys, "argv", ["flamingo-pretrain", "--config", str(tmp_path / "recipe.yaml"), "--dry-run"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None)
    said = capsys.readouterr().out
    for part in ("vision tower", "gated cross-attention", "decayed", "warm-up", "4, each 1 × 2 sequences",
                 "memory per GPU", "4 × H100", "fault  data.sources.pages"):  # fmt: skip
        assert part in said, part
    assert not (tmp_path / "out").exists()


def test_the_embedded_world_needs_no_shards_to_be_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches shards that the run writes itself and that a plan takes for missing."""
    embedded = from_command_line(Recipe, ["--out", str(tmp_path / "out")], default=packaged(EMBEDDED))
    dry_run(Pretraining(embedded), world=2)
    assert "no faults found" in capsys.readouterr().out
    planned = plan(embedded)
    assert [source.documents for source in planned.sources] == [6500, 12100]
    assert sum(source.samples for source in planned.sources) == embedded.steps * embedded.batch
    assert not (tmp_path / "out").exists()
