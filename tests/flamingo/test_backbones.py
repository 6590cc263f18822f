"""Backbones: which towers and LMs a Flamingo stands on, what of it trains, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    ConvNextConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    MptConfig,
    PretrainedConfig,
    ResNetConfig,
    Siglip2VisionConfig,
    SiglipConfig,
    SiglipVisionConfig,
    SwinConfig,
    ViTConfig,
)

from flamingo import FlamingoError, FlamingoForConditionalGeneration, FlamingoProcessor, from_backbones
from flamingo.backbones import add_frames, add_tokens
from flamingo.instructions import ANSWER, Turn, instruction_document
from flamingo.modeling import decoder_layers, patch_tokens, trainable_names
from tests.tiny import document, picture, save_backbones, tiny_flamingo, tokenizer

PATCHES: dict[str, Any] = dict(
    hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
)
TEXT: dict[str, Any] = dict(PATCHES, vocab_size=30)
TOWERS: dict[str, tuple[PretrainedConfig, int]] = {  # and the tokens of an image of 16×16
    "clip of two towers": (CLIPConfig(vision_config=PATCHES, text_config=TEXT), 4),
    "siglip": (SiglipVisionConfig(**PATCHES), 4),
    "siglip of two towers": (SiglipConfig(vision_config=PATCHES, text_config=TEXT), 4),
    "siglip2": (Siglip2VisionConfig(**{**PATCHES, "num_patches": 4}), 4),
    "vit": (ViTConfig(**PATCHES), 4),
    "dinov2": (Dinov2Config(**PATCHES), 4),
    "dinov2 with registers": (Dinov2WithRegistersConfig(**PATCHES, num_register_tokens=3), 4),
    "convnext": (ConvNextConfig(hidden_sizes=[8, 16, 16, 24], depths=[1, 1, 1, 1], patch_size=2), 1),
    "resnet": (ResNetConfig(embedding_size=8, hidden_sizes=[8, 24], depths=[1, 1], layer_type="basic"), 4),
    "swin": (SwinConfig(image_size=16, patch_size=2, embed_dim=6, depths=[1] * 3, num_heads=[2] * 3, window_size=2), 4),
}  # fmt: skip


@pytest.mark.parametrize("name", TOWERS)
def test_every_tower_yields_its_patch_tokens(tmp_path: Path, name: str) -> None:
    """Catches class tokens and registers taken for patches, towers that want another input, and weights made anew."""
    config, count = TOWERS[name]
    _, language = save_backbones(tmp_path)
    saved = AutoModel.from_config(config).eval()
    saved.save_pretrained(tmp_path / "tower")
    reference = getattr(saved, "vision_model", saved)
    size = {"height": 16, "width": 16}
    CLIPImageProcessorPil(size=size, crop_size=size).save_pretrained(tmp_path / "tower")
    small = dict(resampler_depth=1, resampler_latents=4, resampler_heads=2, cross_attention_heads=2)
    model, processor = from_backbones(tmp_path / "tower", language, **small)
    batch = processor(documents=[document(1, 2), document(2, 0)])
    images = batch["pixel_values"][:, 0]
    tokens = patch_tokens(model.vision_tower, images)
    assert tokens.shape == (2, count, 24)
    if name == "siglip2":
        torch.testing.assert_close(tokens, patch_tokens(reference, images))
    else:
        hidden = reference(pixel_values=images).last_hidden_state
        hidden = hidden.flatten(2).mT if hidden.ndim == 4 else hidden
        torch.testing.assert_close(tokens, hidden[:, -count:])
        others = {"clip of two towers": 1, "vit": 1, "dinov2": 1, "dinov2 with registers": 4}
        assert hidden.shape[1] - count == others.get(name, 0)
    model.train()(**batch).loss.backward()
    assert all(each.grad is not None for each in model.parameters() if each.requires_grad)


def test_siglip2_reads_the_same_patches_as_its_own_image_processor(tmp_path: Path) -> None:
    """Catches patches whose pixels stand in another order than the tower was trained on."""
    from transformers import Siglip2ImageProcessorPil

    tower = AutoModel.from_config(Siglip2VisionConfig(**{**PATCHES, "num_patches": 4})).eval()
    image = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    theirs = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=4)(images=image.numpy(), return_tensors="pt")
    expected = tower(**theirs).last_hidden_state
    normalised = (image.float() / 255 - 0.5) / 0.5
    torch.testing.assert_close(patch_tokens(tower, normalised[None]), expected, atol=1e-4, rtol=1e-4)


def test_what_trains_is_this_and_nothing_frozen_changes(tmp_path: Path) -> None:
    """Catches a backbone that trains, and a part of Flamingo that does not."""
    model, processor = tiny_flamingo(tmp_path, resampler_max_frames=2)
    attention = ["norm.weight", "norm.bias", "to_q.weight", "to_kv.weight", "to_out.weight"]
    mlp = ["0.weight", "0.bias", "1.weight", "3.weight"]
    perceiver = ["norm_media.weight", "norm_media.bias", "norm_latents.weight", "norm_latents.bias", *attention[2:]]
    expected = {
        *(f"cross_attention.{k}.attn.{name}" for k in (0, 1) for name in attention),
        *(f"cross_attention.{k}.ff.{name}" for k in (0, 1) for name in mlp),
        *(f"cross_attention.{k}.{gate}" for k in (0, 1) for gate in ("attn_gate", "ff_gate")),
        *(f"resampler.layers.0.0.{name}" for name in perceiver),
        *(f"resampler.layers.0.1.{name}" for name in mlp),
        "resampler.latents",
        "resampler.frame_embeddings",
        "resampler.norm.weight",
        "resampler.norm.bias",
        "new_input_rows",
        "new_output_rows",
    }
    assert trainable_names(model) == expected
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    model.train()(**processor(documents=[document(1, 2), document(2, 1)])).loss.backward()
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == expected
    compatible, _ = tiny_flamingo(tmp_path / "compatible", open_flamingo_compatible=True)
    assert trainable_names(compatible) == expected - {"new_output_rows", "resampler.frame_embeddings"}


def test_no_graph_below_the_first_gated_block_where_new_rows_are_frozen(tmp_path: Path) -> None:
    """Catches activations kept for layers that no gradient flows through."""
    model, processor = tiny_flamingo(tmp_path, cross_attention_every=2)
    batch = processor(documents=document(1, 2))
    needs: list[bool] = []
    decoder_layers(model.language_model)[0].register_forward_hook(
        lambda layer, args, output: needs.append((output[0] if isinstance(output, tuple) else output).requires_grad)
    )
    model.train()(**batch)
    model.new_input_rows.requires_grad_(False)
    model(**batch)
    assert needs == [True, False]


def test_layers_that_cannot_be_found_are_asked_for(tmp_path: Path) -> None:
    """Catches cross-attention put between the wrong modules."""
    model, _ = tiny_flamingo(tmp_path)
    lm = model.language_model
    lm.model.other = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(2))
    with pytest.raises(FlamingoError, match="decoder layers of LlamaForCausalLM.*give its path as `decoder_layers`"):
        decoder_layers(lm)
    assert decoder_layers(lm, "model.layers") is lm.model.layers


def test_mpt_with_qk_layernorm_is_refused(tmp_path: Path) -> None:
    """Catches MPT-1B read without its QK LayerNorm, which would be another model."""
    vision, language = save_backbones(tmp_path, "mpt")
    config = MptConfig.from_pretrained(language)
    config.attn_config.qk_ln = True
    config.auto_map = {"AutoConfig": "own.Config"}  # code that is there but may not run
    config.save_pretrained(language)
    with pytest.raises(FlamingoError, match="qk_ln"):
        from_backbones(vision, language)


def test_code_and_pickles_of_a_backbone_do_not_run(tmp_path: Path) -> None:
    """Catches code that runs because a folder says so, from its configuration or from a pickle."""
    vision, language = save_backbones(tmp_path)
    (language / "model.safetensors").unlink()
    (language / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path(tmp_path / "ran").touch, ())

    torch.save({"model.embed_tokens.weight": Evil()}, language / "pytorch_model.bin")
    with pytest.raises(FlamingoError, match="cannot be loaded as a backbone"):
        from_backbones(vision, language)
    config = AutoConfig.from_pretrained(language)
    config.auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    config.model_type = "evil"
    config.save_pretrained(language)
    with pytest.raises(FlamingoError, match="cannot be loaded as a backbone"):
        from_backbones(vision, language)
    assert not (tmp_path / "ran").exists()


def test_further_tokens_have_rows_of_their_own(tmp_path: Path) -> None:
    """Catches a further token that moves the ids of the first two."""
    vision, language = save_backbones(tmp_path)
    known = len(AutoTokenizer.from_pretrained(language))
    model, processor = from_backbones(vision, language, extra_tokens=["<answer>"])
    assert model.config.new_token_ids == [known, known + 1, known + 2]
    assert model.config.end_of_chunk_token_id == known
    assert processor.tokenizer.convert_tokens_to_ids(["<image>", "<answer>"]) == [known + 1, known + 2]
    assert model.new_input_rows.shape[0] == 3


# -- what is added later -----------------------------------------------------------------------------------------------

BASE = len(tokenizer())


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox", "lfm2"])
@pytest.mark.parametrize("padding", [0, 2, 20])
def test_a_token_added_later_disturbs_nothing(tmp_path: Path, family: str, padding: int) -> None:
    """Catches rows made anew or moved, ids that read the padding rows of the LM's tables or miss its end, tied LMs
    with output rows and untied ones without, and a token that is lost by saving.

    The LM's tables end with its vocabulary, after the first two new tokens, or far behind the third.
    """
    model, processor = tiny_flamingo(tmp_path, family, vocabulary=BASE + padding)
    batch = processor(documents=[document(1, 2), document(2, 0)])
    batch.pop("labels")
    inputs, answer = batch["input_ids"], BASE + 2
    with torch.no_grad():
        logits, embedded = model(**batch).logits, model.embed_tokens(inputs)
    rows = [each.clone() for each in (model.new_input_rows, model.new_output_rows) if each is not None]
    add_tokens(model, processor, [ANSWER])
    assert processor.tokenizer.convert_tokens_to_ids(ANSWER) == answer == model.config.new_token_ids[-1]
    with torch.no_grad():
        after = model(**batch).logits
    assert torch.equal(model.embed_tokens(inputs), embedded)
    assert torch.equal(after[..., :answer], logits[..., :answer])
    assert after.shape[-1] == BASE + max(padding, 3) and after[..., answer].isfinite().all()
    assert (after[..., answer + 1 :] == -torch.inf).all()
    grown = [each for each in (model.new_input_rows, model.new_output_rows) if each is not None]
    assert len(grown) == (1 if family in ("opt", "lfm2") else 2) and all(each.requires_grad for each in grown)
    for before, now in zip(rows, grown, strict=True):
        assert torch.equal(now[:2], before) and now.shape[0] == 3 and now[2].any()
    check_that_it_is_saved(model, processor, tmp_path)


def check_that_it_is_saved(model: FlamingoForConditionalGeneration, processor: FlamingoProcessor, folder: Path) -> None:
    """In both forms: loss, logits and what is generated of a question stay the same; `<image>` is none of it."""
    model.save_pretrained(folder / "whole")
    model.save_trained(folder / "trained")
    processor.save_pretrained(folder / "whole")
    loaded = FlamingoProcessor.from_pretrained(folder / "whole")
    asked = instruction_document([Turn("what", "cat", (picture(1),)), Turn("and", media=(picture(2),))])
    batch = loaded(documents=asked)
    assert (batch["input_ids"] == model.config.new_token_ids[-1]).sum() == 2
    del batch["labels"]
    said = model.generate(**batch, max_new_tokens=8, do_sample=False)
    assert loaded.image_token_id not in said[0, batch["input_ids"].shape[1] :]
    with torch.no_grad():
        for other in (
            FlamingoForConditionalGeneration.from_pretrained(folder / "whole").eval(),
            FlamingoForConditionalGeneration.from_trained(folder / "trained"),
        ):
            assert torch.equal(other(**batch).logits, model.eval()(**batch).logits)
            assert other.config.new_token_ids == model.config.new_token_ids


def test_a_token_added_later_is_as_one_from_the_start(tmp_path: Path) -> None:
    """Catches another id, another order of rows, and rows that start elsewhere than those of the other new tokens."""
    vision, language = save_backbones(tmp_path)
    torch.manual_seed(1)
    early, known = from_backbones(vision, language, extra_tokens=[ANSWER])
    torch.manual_seed(1)
    late, processor = from_backbones(vision, language)
    add_tokens(late, processor, [ANSWER, ANSWER])
    assert late.config.new_token_ids == early.config.new_token_ids
    assert late.config.vocab_size == early.config.vocab_size
    assert processor.tokenizer.get_vocab() == known.tokenizer.get_vocab()
    table = late.get_input_embeddings().weight[:BASE]
    assert ((late.new_input_rows[2] - table.mean(0)).abs() < 0.6 * table.std(0)).all()
    late.new_input_rows.requires_grad_(False)
    add_tokens(late, processor, ["<more>", ANSWER, "<image>", "<s>"])
    assert late.new_input_rows.shape[0] == 4 and not late.new_input_rows.requires_grad
    text = processor(text="<image>cat<answer><more>", images=[picture(1)])["input_ids"][0].tolist()
    assert text[-2:] == late.config.new_token_ids[2:]


def test_tokens_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """Catches ids without rows: a processor that knows more than the model, or is another one's."""
    model, processor = tiny_flamingo(tmp_path)
    with pytest.raises(FlamingoError, match="tokens: expected words, got ' '"):
        add_tokens(model, processor, ["<a>", " "])
    processor.tokenizer.add_tokens(["<own>"])
    with pytest.raises(FlamingoError, match="it has tokens that the model lacks: <own>"):
        add_tokens(model, processor, [ANSWER])
    assert ANSWER not in processor.tokenizer.get_vocab()
    add_tokens(model, processor, [ANSWER, "<own>"])
    assert model.row_of.tolist()[-2:] == [3, 2] and model.config.new_token_ids[-2:] == [BASE + 3, BASE + 2]
    _, other = tiny_flamingo(tmp_path / "other")
    other.image_token_id -= 1
    with pytest.raises(FlamingoError, match=f"<image> has id {BASE}, expected the model's, {BASE + 1}"):
        add_tokens(model, other, ["<b>"])


def test_frames_added_later_change_no_image(tmp_path: Path) -> None:
    """Catches embeddings that start at random, do not train, or are lost by saving."""
    model, processor = tiny_flamingo(tmp_path)
    batch = processor(documents=document(1, 2), padding_side="right")
    before = model.encode_media(batch["pixel_values"])
    add_frames(model, 4)
    assert torch.equal(model.encode_media(batch["pixel_values"]), before)
    assert model.config.resampler_max_frames == 4 and "resampler.frame_embeddings" in trainable_names(model)
    model(**batch).loss.backward()
    embeddings = model.resampler.frame_embeddings
    assert embeddings is not None and embeddings.grad is not None and embeddings.grad[0].any()
    with torch.no_grad():
        embeddings += torch.randn_like(embeddings)
    model.save_pretrained(tmp_path / "whole")
    model.save_trained(tmp_path / "trained")
    for loaded in (
        FlamingoForConditionalGeneration.from_pretrained(tmp_path / "whole").eval(),
        FlamingoForConditionalGeneration.from_trained(tmp_path / "trained"),
    ):
        assert torch.equal(loaded.encode_media(batch["pixel_values"]), model.encode_media(batch["pixel_values"]))
        assert list(loaded.state_dict()) == list(model.state_dict())
    with pytest.raises(FlamingoError, match="the model has embeddings of 4 frames already"):
        add_frames(model, 8)
    with pytest.raises(FlamingoError, match="frames=0: expected at least 1"):
        add_frames(tiny_flamingo(tmp_path / "other")[0], 0)
