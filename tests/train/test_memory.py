"""What a model weighs and what training takes, against what is really kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, OPTConfig, PretrainedConfig

from flamingo import FlamingoConfig, FlamingoForConditionalGeneration
from tests.tiny import tiny_flamingo
from train.memory import advice, component_table, components, memory_estimate
from train.recipe import DataRecipe, ParallelRecipe, Recipe

ROWS, TOKENS, MEDIA = 4, 128, 3
SIZE: dict[str, Any] = dict(vocab_size=1000, hidden_size=128, num_hidden_layers=4, num_attention_heads=4)
LANGUAGES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZE, intermediate_size=344, tie_word_embeddings=False),
    "opt": OPTConfig(**SIZE, ffn_dim=512, word_embed_proj_dim=128, dropout=0.0, max_position_embeddings=256),
}


def recipe_of(**parallel: Any) -> Recipe:
    """Micro-batches that are full."""
    data = DataRecipe(max_tokens=TOKENS, max_media=MEDIA)
    return Recipe(batch=ROWS, micro_batch=ROWS, data=data, parallel=ParallelRecipe(**parallel))


def flamingo(language: str, frames: int = 0) -> FlamingoForConditionalGeneration:
    """A model that is large enough for activations to count, of images or of videos."""
    vision = CLIPVisionConfig(
        hidden_size=96, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4, image_size=96, patch_size=16
    )
    config = FlamingoConfig(
        vision, LANGUAGES[language], image_token_id=999, end_of_chunk_token_id=998, new_token_ids=[998, 999],
        vocab_size=1000, resampler_depth=2, resampler_latents=16, cross_attention_every=2, resampler_max_frames=frames,
    )  # fmt: skip
    return FlamingoForConditionalGeneration(config).train()


@pytest.mark.parametrize("language", sorted(LANGUAGES))
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("frames", [0, 24])
def test_activations_are_near_what_is_kept(language: str, precision: str, checkpointing: bool, frames: int) -> None:
    """Catches an estimate that forgets a large tensor, takes a video for an image, or counts what nobody keeps."""
    model = flamingo(language, frames)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(3, 900, (ROWS, TOKENS))
    ids[:, [0, 40, 80]] = 999
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        return kept.setdefault(tensor.untyped_storage().data_ptr(), tensor) if tensor.numel() else tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: (keep(tensor), tensor)[1], lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"),
    ):
        pixels = torch.randn(ROWS * MEDIA, max(1, frames), 3, 96, 96)
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, pixel_values=pixels)
    really = sum(each.untyped_storage().nbytes() for place, each in kept.items() if place not in own)
    estimate = memory_estimate(model, recipe_of(precision=precision, activation_checkpointing=checkpointing), 1)
    # A layer that is computed again keeps its own beside, which the hooks do not see before the backward pass.
    assert really / 1.4 < estimate.activations + estimate.casts < really * (2.5 if checkpointing else 1.6)


def test_components_count_a_tied_parameter_once(tmp_path: Path) -> None:
    """Catches a head that is counted beside the embedding that it is, and frozen rows among what trains."""
    model, _ = tiny_flamingo(tmp_path, "opt")
    found = {part.name: part for part in components(model)}
    assert sum(part.total for part in found.values()) == sum(each.numel() for each in model.parameters())
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    assert sum(part.trained for part in found.values()) == trained
    assert found["language model"].trained == found["vision tower"].trained == 0
    table = component_table(model)
    assert f"{trained:,}" in table.splitlines()[-1] and "gated cross-attention" in table


def test_weights_follow_from_the_recipe_on_the_meta_device(tmp_path: Path) -> None:
    """Catches estimates that need a model's numbers, shares that are not shared, and gradients that accumulate whole
    under FSDP2 without being counted.
    """
    model, _ = tiny_flamingo(tmp_path)
    model = model.to("meta")
    whole = sum(each.numel() for each in model.parameters())
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    ddp = memory_estimate(model, recipe_of(), 4)
    assert (ddp.weights, ddp.gradients, ddp.optimizer, ddp.gathered) == (4 * whole, 4 * trained, 8 * trained, 0)
    halved = memory_estimate(model, recipe_of(frozen_in_bfloat16=True), 4)
    assert halved.weights == 2 * whole + 2 * (trained)
    tower = sum(each.numel() for each in model.vision_tower.parameters())
    recipe = replace(recipe_of(kind="fsdp"), batch=4 * ROWS)
    fsdp = memory_estimate(model, recipe, 4)
    assert fsdp.weights == 4 * (tower + (whole - tower) / 4)
    assert (fsdp.gradients, fsdp.optimizer) == (trained, 2 * trained) and fsdp.gathered > 0
    assert memory_estimate(model, replace(recipe, batch=8 * ROWS), 4).gradients == 4 * trained
    offloaded = memory_estimate(model, replace(recipe, parallel=ParallelRecipe("fsdp", cpu_offload=True)), 4)
    assert (offloaded.weights, offloaded.gradients, offloaded.optimizer) == (4 * tower, 0, 0)
    ((label, value),) = ddp
    assert label == "memory per GPU" and "optimizer" in value and "gathered" not in value


def test_advice_names_cheaper_settings(tmp_path: Path) -> None:
    """Catches a run that dies though a word in the recipe would have saved it, or pays without need."""
    model: nn.Module = tiny_flamingo(tmp_path)[0]
    now = memory_estimate(model, recipe_of(), 2).total

    def said(capacity: float | None, world: int = 2, **parallel: Any) -> str:
        return "\n".join(advice(model, recipe_of(**parallel), world, capacity))

    assert said(None) == "" and "one process" in said(None, world=1, kind="fsdp")
    assert "precision=float32" in said(10 * now) and "frozen_in_bfloat16 saves" in said(10 * now)
    tight = said(now)
    assert "hardly fit" in tight and "activation_checkpointing takes" in tight and "kind=fsdp takes" in tight
    assert "cpu_offload takes" in said(0.1 * now, kind="fsdp", activation_checkpointing=True)
    roomy = said(10 * now, kind="fsdp", activation_checkpointing=True, precision="bfloat16", frozen_in_bfloat16=True)
    assert "kind=ddp sends less" in roomy and "activations fit" in roomy and "hardly" not in roomy
