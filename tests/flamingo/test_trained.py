"""The small save: complete, strict, and sure of its backbones."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, CLIPImageProcessorPil, ResNetConfig

from flamingo import FlamingoError, FlamingoForConditionalGeneration, from_backbones
from flamingo.modeling import TRAINED, trainable_names
from tests.tiny import document, save_backbones, tiny_flamingo

from_trained = FlamingoForConditionalGeneration.from_trained


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox"])
@pytest.mark.parametrize("options", [{}, {"open_flamingo_compatible": True}, {"freeze_language": False}])
def test_a_trained_model_comes_back_over_its_backbones(tmp_path: Path, family: str, options: dict[str, bool]) -> None:
    """Catches a trained tensor that is not written, a frozen one that is, and one that is lost on loading."""
    model, processor = tiny_flamingo(tmp_path, family, **options)
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    model(**processor(documents=document(1, 2))).loss.backward()
    optimizer.step()
    model.save_trained(tmp_path / "saved")
    written = set(load_file(tmp_path / "saved" / TRAINED))
    frozen_rows = {"new_output_rows"} if options.get("open_flamingo_compatible") and family != "opt" else set()
    assert written == trainable_names(model) | frozen_rows
    loaded = from_trained(tmp_path / "saved")
    batch = processor(documents=document(2, 1))
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert trainable_names(loaded) == trainable_names(model)
    assert loaded.generation_config.eos_token_id == model.generation_config.eos_token_id


def test_backbones_that_are_missing_or_different_are_named(tmp_path: Path) -> None:
    """Catches a model put over another backbone than it was trained on, and a missing one found out too late."""
    model, _ = tiny_flamingo(tmp_path)
    model.save_trained(tmp_path / "saved")
    shutil.move(tmp_path / "language", tmp_path / "moved")
    with pytest.raises(FlamingoError, match="language backbone is missing.*give its place as language="):
        from_trained(tmp_path / "saved")
    found = from_trained(tmp_path / "saved", language=tmp_path / "moved")
    found.save_trained(tmp_path / "again")
    from_trained(tmp_path / "again")
    save_backbones(tmp_path / "other", "opt")
    with pytest.raises(FlamingoError, match="language backbone differs"):
        from_trained(tmp_path / "saved", language=tmp_path / "other" / "language")
    with pytest.raises(FlamingoError, match="load it with `from_trained`"):
        FlamingoForConditionalGeneration.from_pretrained(tmp_path / "saved")
    with pytest.raises(FlamingoError, match=f"expected {TRAINED}"):
        from_trained(tmp_path / "moved")


def test_a_backbone_changed_after_loading_is_different(tmp_path: Path) -> None:
    """Catches an identity taken of what lies in the folder when the model is saved, not of what was loaded."""
    model, _ = tiny_flamingo(tmp_path)
    save_backbones(tmp_path / "other", "opt")
    shutil.copytree(tmp_path / "other" / "language", tmp_path / "language", dirs_exist_ok=True)
    model.save_trained(tmp_path / "saved")
    with pytest.raises(FlamingoError, match="language backbone differs"):
        from_trained(tmp_path / "saved")


def test_a_backbone_of_the_hub_is_not_taken_from_a_folder_unasked(tmp_path: Path) -> None:
    """Catches another backbone that slips in because only the hub's revision is known."""
    model, _ = tiny_flamingo(tmp_path)
    model.config.backbones["language"] = {"name": "someone/model", "revision": "abc", "sha256": None}
    model.save_trained(tmp_path / "saved")
    with pytest.raises(FlamingoError, match="language backbone was someone/model"):
        from_trained(tmp_path / "saved", language=tmp_path / "language")
    from_trained(tmp_path / "saved", language=tmp_path / "language", any_backbones=True)


def test_running_means_of_a_tower_that_trains_are_saved(tmp_path: Path) -> None:
    """Catches buffers that change in training and are lost."""
    _, language = save_backbones(tmp_path)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 24], depths=[1, 1], layer_type="basic")
    AutoModel.from_config(config).save_pretrained(tmp_path / "tower")
    size = {"height": 16, "width": 16}
    CLIPImageProcessorPil(size=size, crop_size=size).save_pretrained(tmp_path / "tower")
    small = dict(resampler_depth=1, resampler_latents=4, cross_attention_heads=2, freeze_vision=False)
    model, processor = from_backbones(tmp_path / "tower", language, **small)
    batch = processor(documents=document(1, 2))
    model.train()(**batch)
    model.save_trained(tmp_path / "saved")
    loaded = from_trained(tmp_path / "saved")
    means = {name for name, _ in model.named_buffers() if name.endswith("running_mean")}
    assert means and means <= set(load_file(tmp_path / "saved" / TRAINED))
    with torch.no_grad():
        assert torch.equal(loaded.encode_media(batch["pixel_values"]), model.eval().encode_media(batch["pixel_values"]))


def test_missing_unexpected_and_misshapen_tensors_are_errors(tmp_path: Path) -> None:
    """Catches tensors that are dropped or made up with a warning at most."""
    model, _ = tiny_flamingo(tmp_path)
    model.save_trained(tmp_path / "small")
    model.save_pretrained(tmp_path / "whole")
    loaders = {"small": from_trained, "whole": FlamingoForConditionalGeneration.from_pretrained}
    for folder, load in loaders.items():
        file = tmp_path / folder / (TRAINED if folder == "small" else "model.safetensors")
        tensors = load_file(file)
        name = "resampler.latents"
        for change, message in [
            ({name: None}, "without resampler.latents"),
            ({"resampler.extra": torch.zeros(1)}, "with unexpected resampler.extra"),
            ({name: tensors[name][:-1].clone()}, name),
        ]:
            changed = {key: value for key, value in {**tensors, **change}.items() if value is not None}
            save_file(changed, file, metadata={"format": "pt"})
            with pytest.raises(FlamingoError, match=message):
                load(tmp_path / folder)
        save_file(tensors, file, metadata={"format": "pt"})
        load(tmp_path / folder)


def test_each_part_comes_back_in_its_precision(tmp_path: Path) -> None:
    """Catches a bfloat16 LM that is loaded in float32, twice as large, because other parts are float32."""
    model, processor = tiny_flamingo(tmp_path, dtype=torch.bfloat16)
    assert (model.language_model.dtype, model.resampler.latents.dtype) == (torch.bfloat16, torch.float32)
    model.save_pretrained(tmp_path / "whole")
    model.save_trained(tmp_path / "small")
    batch = processor(documents=document(1, 2))
    for loaded in (
        FlamingoForConditionalGeneration.from_pretrained(tmp_path / "whole"),
        from_trained(tmp_path / "small"),
    ):
        assert {name: each.dtype for name, each in loaded.named_parameters()} == {
            name: each.dtype for name, each in model.named_parameters()
        }
        with torch.no_grad():
            assert torch.equal(loaded(**batch).logits, model(**batch).logits)
