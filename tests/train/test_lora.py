"""Adapters on the LM: which projections get them, what trains, merging, and weights of 4 bits."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from flamingo import FlamingoError, FlamingoForConditionalGeneration, FlamingoProcessor
from flamingo.interop import otter
from tests.tiny import document, language_configs, tiny_flamingo
from train import lora
from train.memory import components, memory_estimate
from train.optim import build_optimizer
from train.parallel import store_frozen_in_bfloat16
from train.recipe import LoraRecipe, OptimizerRecipe, Recipe

pytest.importorskip("peft")

PER_LAYER = {"opt": 6, "gpt_neox": 4, "gpt2": 4, "gptj": 6, "gpt_neo": 6, "mpt": 4, "bloom": 4, "phi": 6, "lfm2": None}
"""Projections of a decoder layer, where they are not the seven of LLaMA; LFM2 has convolutions in some layers."""
Built = tuple[FlamingoForConditionalGeneration, FlamingoProcessor]


def built(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float64, **options: object) -> Built:
    """A tiny Flamingo whose gates are open."""
    torch.manual_seed(0)
    model, processor = tiny_flamingo(folder, family, **options)
    return model.to(dtype), processor


def logits(model: FlamingoForConditionalGeneration, processor: FlamingoProcessor) -> Tensor:
    """Of the tokens of documents with and without media, for ids that tokens have."""
    batch = processor(documents=[document(1, 2), document(2, 0)], padding_side="right")
    batch.pop("labels")
    with torch.no_grad():
        made = model.eval()(**batch.to(model.dtype)).logits
    return made[batch["attention_mask"].bool()][:, : model.row_of.shape[0]]


def gradients(model: FlamingoForConditionalGeneration, processor: FlamingoProcessor) -> dict[str, Tensor]:
    """By name, after one backward pass."""
    model.train().zero_grad()
    model(**processor(documents=[document(1, 2), document(2, 0)], padding_side="right").to(model.dtype)).loss.backward()
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


def disturb(model: FlamingoForConditionalGeneration) -> None:
    """Let adapters have an effect: they begin with a zero matrix."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, each in model.named_parameters():
            if ".lora_B." in name:
                each.normal_(std=0.2)


@pytest.mark.parametrize("family", sorted(language_configs()))
def test_adapters_of_every_family(tmp_path: Path, family: str) -> None:
    """Catches a family whose projections are not found, an LM that trains itself, a gradient that stops above the gated
    blocks, hooks or names that are lost, and a merge that transposes, scales or forgets an adapter.
    """
    model, processor = built(tmp_path, family)
    names, before = list(model.state_dict()), logits(model, processor)
    lora.add_adapters(model, LoraRecipe(rank=4, dropout=0.0))
    assert torch.equal(logits(model, processor), before), "they begin without effect"
    expected = PER_LAYER.get(family, 4 if family.startswith("falcon") else 7)
    assert expected is None or len(lora.adapters(model)) == 2 * expected
    kinds = [any(part in name for name in lora.adapters(model)) for part in ("att", "fc1", "mlp", "ffn", "feed")]
    assert kinds[0] and any(kinds[1:])
    disturb(model)
    found = gradients(model, processor)
    own = ("resampler.", "cross_attention.", "new_")
    assert found.keys() == {n for n, _ in model.named_parameters() if n.startswith(own) or ".lora_" in n}
    assert all(gradient.abs().max() > 0 for name, gradient in found.items() if name.endswith("_gate"))
    assert all(gradient.abs().max() > 0 for name, gradient in found.items() if ".lora_B." in name)
    unmerged = logits(model, processor)
    assert (unmerged - before).abs().max() > 1e-3
    lora.merge(model)
    assert list(model.state_dict()) == names
    torch.testing.assert_close(logits(model, processor), unmerged, atol=1e-12, rtol=1e-12)
    assert not lora.adapters(model) and not hasattr(model.language_model, "peft_config")


def test_merging_in_float32_and_keeping_adapters(tmp_path: Path) -> None:
    """Catches adapters that peft cannot load, a model that is saved with them in the LM, where nothing finds them
    again, a merged one that `save_trained` writes without them, a merge that goes on growing, and a merge of gathered
    tensors that differs.
    """
    model, processor = built(tmp_path, dtype=torch.float32)
    lora.add_adapters(model, LoraRecipe(rank=4, alpha=6.0))
    disturb(model)
    unmerged = logits(model, processor)
    lora.save_adapters(model, tmp_path / "adapters")
    for save in (model.save_trained, model.save_pretrained, partial(otter.save, model)):
        with pytest.raises(FlamingoError, match="the LM has adapters; expected one without: `train.lora.merge`"):
            save(tmp_path / "unmerged")
    assert not (tmp_path / "unmerged").exists()
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = lora.merged(model, tensors)
    assert made.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, made[name]) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(logits(model, processor), unmerged, atol=1e-5, rtol=1e-5)
    lora.merge(model)
    assert torch.equal(model.state_dict()[model.config.replaced[0]], made[model.config.replaced[0]])
    assert len(model.config.replaced) == 14

    model.save_trained(tmp_path / "small")
    small = FlamingoForConditionalGeneration.from_trained(tmp_path / "small")
    assert torch.equal(logits(small, processor), logits(model, processor))

    from peft import PeftModel

    settings = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "language")
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "language")
    adapted = PeftModel.from_pretrained(lm, tmp_path / "adapters").eval()
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, model.language_model(ids).logits, atol=1e-5, rtol=1e-5)


def test_which_projections(tmp_path: Path) -> None:
    """Catches choices that are not obeyed, a pattern that is no expression, and adapters on adapters."""
    model, _ = built(tmp_path)
    names = lora.target_names(model, LoraRecipe(projections=["attention"]))
    assert len(names) == 8 and all(".self_attn." in name for name in names)
    names = lora.target_names(model, LoraRecipe(pattern=r"self_attn\.[qv]_proj"))
    assert names == [f"model.layers.{k}.self_attn.{p}_proj" for k in (0, 1) for p in "qv"]
    assert lora.pattern_of(names) == r"model\.layers\.\d+\.self_attn\.q_proj|model\.layers\.\d+\.self_attn\.v_proj"
    with pytest.raises(FlamingoError, match=r"LlamaForCausalLM has no projections of qkv .*mlp\.down_proj"):
        lora.target_names(model, LoraRecipe(pattern="qkv"))
    with pytest.raises(FlamingoError, match=r"lora.pattern='\(': expected a regular expression"):
        lora.target_names(model, LoraRecipe(pattern="("))
    lora.add_adapters(model, LoraRecipe())
    with pytest.raises(FlamingoError, match="has adapters already"):
        lora.add_adapters(model, LoraRecipe())


def test_what_the_optimizer_and_the_precision_make_of_adapters(tmp_path: Path) -> None:
    """Catches adapters that decay or have no rate of their own, adapters in bfloat16, and an LM that stays in float32
    because some of it trains, and inputs of adapters that no estimate counts.
    """
    model, processor = built(tmp_path, dtype=torch.float32)
    before = memory_estimate(model, Recipe(), 1)
    lora.add_adapters(model, LoraRecipe(rank=4))
    after = memory_estimate(model, Recipe(), 1)
    inputs = 6 * 32 + 64 + 7 * 4  # of the matrices A and B of a layer
    assert after.activations - before.activations == 2 * (32 * 256) * inputs * 4
    assert after.gradients > before.gradients
    optimizer = build_optimizer(model, OptimizerRecipe(learning_rate=1e-3, adapter_factor=3.0))
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert len(groups["adapters"]["params"]) == 28
    assert groups["adapters"]["lr"] == pytest.approx(3e-3) and groups["adapters"]["weight_decay"] == 0
    store_frozen_in_bfloat16(model)
    dtypes = {name: each.dtype for name, each in model.language_model.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if ".lora_" in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if ".lora_" not in name} == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(model, processor)
    assert {each.dtype for name, each in found.items() if ".lora_" in name} == {torch.float32}


# -- 4 bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "opt", "lfm2"])
def test_qlora_runs_here(tmp_path: Path, family: str) -> None:
    """Catches 4-bit weights that let no gradient through to adapters, gated blocks or new rows, that train, that lose
    their bias, that bloat a checkpoint, and a merge into other weights than those that were trained over.
    """
    pytest.importorskip("bitsandbytes")
    model, processor = built(tmp_path, family, torch.float32)
    names, exact, total = list(model.state_dict()), logits(model, processor), components(model)[3].total
    lora.quantise(model)
    quantised = logits(model, processor)
    assert 0 < (quantised - exact).abs().max() < 0.2 * exact.abs().max()
    assert list(model.state_dict()) == names, "statistics of quantised weights are not saved"
    lm = components(model)[3]
    assert lm.total == total and lm.trained == 0
    lora.add_adapters(model, LoraRecipe(rank=4, dropout=0.0))
    assert torch.equal(logits(model, processor), quantised)
    disturb(model)
    found = gradients(model, processor)
    own = ("resampler.", "cross_attention.", "new_")
    assert found.keys() == {n for n, _ in model.named_parameters() if n.startswith(own) or ".lora_" in n}
    assert all(gradient.abs().max() > 0 for name, gradient in found.items() if ".lora_A." not in name)
    unmerged = logits(model, processor)
    lora.merge(model)
    assert list(model.state_dict()) == names and all(each.is_floating_point() for each in model.parameters())
    torch.testing.assert_close(logits(model, processor), unmerged, atol=1e-5, rtol=1e-5)
    matrices = [n for n, m in model.named_modules() if type(m) is nn.Linear and n.startswith("language_model.")]
    assert {f"{n}.weight" for n in matrices if "lm_head" not in n} == set(model.config.replaced)


def test_no_linear_layers_no_4_bits(tmp_path: Path) -> None:
    """Catches an LM that is taken for quantised and is not."""
    pytest.importorskip("bitsandbytes")
    model, _ = built(tmp_path, "gpt2", torch.float32)
    with pytest.raises(FlamingoError, match=r"GPT2LMHeadModel has no nn\.Linear"):
        lora.quantise(model)
