"""Checkpoints of OpenFlamingo and Otter and towers of open_clip, in and out: used whole, or refused with names."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention
from transformers import AutoTokenizer

from flamingo import FlamingoError, FlamingoForConditionalGeneration, FlamingoProcessor, from_backbones
from flamingo.convert import convert, load, parse
from flamingo.interop import open_clip, open_flamingo, otter
from tests.peer import open_flamingo_over, randomise
from tests.tiny import document, language_configs, save_backbones

SAMPLES = [document(1, 2, lead=True), document(2, 0)]


@dataclass(frozen=True)
class World:
    """A random peer over backbones on disk, and what open_flamingo's trainer writes of it."""

    vision: Path
    language: Path
    processor: FlamingoProcessor
    peer: Any
    released: dict[str, Tensor]

    def model(self, **options: Any) -> FlamingoForConditionalGeneration:
        """Ours over the same backbones, untrained."""
        return from_backbones(self.vision, self.language, **{"cross_attention_every": 2, **options})[0].eval()

    @torch.no_grad()
    def logits(self, model: Any) -> Tensor:
        """Of ours or of the peer, for the samples' tokens and the ids that ours knows."""
        batch = self.processor(documents=SAMPLES)
        batch.pop("labels")
        if isinstance(model, FlamingoForConditionalGeneration):
            logits = model(**batch).logits
        else:
            pixels = batch["pixel_values"]
            vision_x = torch.stack((pixels, torch.zeros_like(pixels)))
            logits = model(vision_x, batch["input_ids"], batch["attention_mask"]).logits
        return logits[batch["attention_mask"].bool()][:, : len(self.processor.tokenizer)]


def make_world(folder: Path, family: str, *, vocabulary: int = 128, pad: bool = True) -> World:
    """Backbones whose LM has `vocabulary` rows, under a tokenizer with or without a token for padding."""
    vision, language = save_backbones(folder, family, vocabulary)
    if not pad:
        words = AutoTokenizer.from_pretrained(language)
        words.pad_token = None
        words.save_pretrained(language)
    model, processor = from_backbones(vision, language, cross_attention_every=2)
    theirs = copy.deepcopy(processor.tokenizer)
    if theirs.pad_token is None:
        theirs.add_special_tokens({"pad_token": "<PAD>"})
    peer = open_flamingo_over(model, SimpleNamespace(tokenizer=theirs)).eval()
    randomise(peer.perceiver)
    randomise(peer.lang_encoder.gated_cross_attn_layers)
    trainer = import_module("open_flamingo.train.train_utils")
    released = trainer.filter_state_dict_to_trainable(peer, peer.state_dict())
    return World(vision, language, processor, peer, {name: tensor.clone() for name, tensor in released.items()})


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., World]:
    """`make_world`, each made once."""
    made: dict[Any, World] = {}

    def world(family: str, **options: Any) -> World:
        key = (family, *options.items())
        if key not in made:
            made[key] = make_world(tmp_path_factory.mktemp(family), family, **options)
        return made[key]

    return world


def to_otter(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under Otter's names."""
    renamed = {}
    for name, tensor in tensors.items():
        name = re.sub(r"^(perceiver\.layers\.\d+)\.0\.", r"\1.", name)
        name = re.sub(r"^(perceiver\.layers\.\d+)\.1\.", r"\1.feed_forward.", name)
        renamed[re.sub(r"gated_cross_attn_layer\.ff\.", "gated_cross_attn_layer.feed_forward.", name)] = tensor
    return renamed


# -- OpenFlamingo ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [100, 160])
@pytest.mark.parametrize("family", ["opt", "gpt_neox", "llama", "mpt"])
def test_a_released_checkpoint_and_one_of_ours_give_the_peers_logits(
    worlds: Callable[..., World], family: str, vocabulary: int, tmp_path: Path
) -> None:
    """Catches tensors put in the wrong place, shapes not read off the checkpoint, and tables of another length."""
    world = worlds(family, vocabulary=vocabulary)
    tensors, head = dict(world.released), "lang_encoder.lm_head.weight"
    assert (head in tensors) == (family in ("opt", "mpt"))  # the trainer keeps frozen tensors named "embed" alone
    older = {"gpt_neox": "lang_encoder.embed_out.weight"}  # as in transformers 4, where its name kept it
    if head not in tensors:
        tensors[older.get(family, head)] = world.peer.lang_encoder.lm_head.weight.detach()
    torch.save(
        {"epoch": 3, "model_state_dict": {f"module.{name}": t for name, t in tensors.items()}}, tmp_path / "a.pt"
    )
    model, processor = open_flamingo.from_open_flamingo(tmp_path / "a.pt", world.vision, world.language)
    assert model.config.cross_attention_every == 2 and model.config.replaced == []
    assert torch.equal(processor(documents=SAMPLES)["input_ids"], world.processor(documents=SAMPLES)["input_ids"])
    expected = world.logits(world.peer)
    torch.testing.assert_close(world.logits(model.eval()), expected)

    open_flamingo.save(model, tmp_path / "b.pt")
    again = open_flamingo_over(world.model(), processor).eval()
    found = again.load_state_dict(torch.load(tmp_path / "b.pt", weights_only=True), strict=False)
    trainable = {name for name, parameter in again.named_parameters() if parameter.requires_grad}
    assert trainable and trainable.isdisjoint(found.missing_keys)
    assert set(found.unexpected_keys) == {older[family]} if family in older else not found.unexpected_keys
    torch.testing.assert_close(world.logits(again), expected)


def test_every_copy_and_every_old_buffer_is_accounted_for(worlds: Callable[..., World]) -> None:
    """Catches layouts that are refused: whole states, the second copies alone, constants that old versions saved."""
    world = worlds("llama", vocabulary=160)
    whole = {name: t for name, t in world.peer.state_dict().items() if not name.startswith("vision_encoder.")}
    second = {name: t for name, t in whole.items() if not name.startswith("lang_encoder.model.layers.")}
    assert len(second) < len(whole) and any("gated_cross_attn_layers" in name for name in second)
    mask = {"lang_encoder.model.layers.0.decoder_layer.self_attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool)}
    rotary = {"lang_encoder.model.layers.0.decoder_layer.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    for tensors in (whole, second, {**whole, **mask, **rotary}):
        model = world.model()
        open_flamingo.load(model, tensors)
        torch.testing.assert_close(world.logits(model), world.logits(world.peer))


def test_a_tokenizer_without_padding_gets_one_row_more(worlds: Callable[..., World], tmp_path: Path) -> None:
    """Catches tables without a row for the `<PAD>` that open_flamingo adds, which it then refuses."""
    world = worlds("opt", pad=False)
    model = world.model()
    assert world.processor.tokenizer.pad_token is None
    open_flamingo.load(model, world.released)
    torch.testing.assert_close(world.logits(model), world.logits(world.peer))
    open_flamingo.save(model, tmp_path / "a.pt")
    tensors = torch.load(tmp_path / "a.pt", weights_only=True)
    assert tensors.keys() <= world.peer.state_dict().keys()
    copy.deepcopy(world.peer).load_state_dict(tensors, strict=False)
    with pytest.raises(FlamingoError, match="at least the 102 rows in use"):
        open_flamingo.save(model, tmp_path / "a.pt", rows=101)


def test_rows_that_were_trained_replace_the_backbones(worlds: Callable[..., World], tmp_path: Path) -> None:
    """Catches a trained embedding or head that is dropped in silence, at loading or by the small save."""
    world = worlds("llama", vocabulary=160)
    tensors = dict(world.released)
    head = world.peer.lang_encoder.lm_head.weight.detach()
    table = tensors["lang_encoder.model.embed_tokens.weight"]
    tensors["lang_encoder.model.embed_tokens.weight"] = table + torch.randn(table.shape)
    tensors["lang_encoder.lm_head.weight"] = head + torch.randn(head.shape)
    model = world.model()
    open_flamingo.load(model, tensors)
    assert model.config.replaced == ["language_model.lm_head.weight", "language_model.model.embed_tokens.weight"]
    peer = copy.deepcopy(world.peer)
    peer.load_state_dict(tensors, strict=False)
    torch.testing.assert_close(world.logits(model), world.logits(peer))
    model.save_trained(tmp_path)
    loaded = FlamingoForConditionalGeneration.from_trained(tmp_path)
    assert torch.equal(world.logits(loaded), world.logits(model))


@torch.no_grad()
def test_backbones_that_train_or_were_replaced_are_written(worlds: Callable[..., World], tmp_path: Path) -> None:
    """Catches a tuned tower, LM or buffer that open_flamingo's or Otter's format loses in silence."""
    world = worlds("llama", vocabulary=160)
    model = world.model(freeze_vision=False, freeze_language=False)
    open_flamingo.load(model, world.released, new_output_rows="mean")
    for parameter in (*model.vision_tower.parameters(), *model.language_model.parameters()):
        parameter += 0.05 * torch.randn(parameter.shape)
    expected = world.logits(model)
    open_flamingo.save(model, tmp_path / "a.pt")
    written = open_flamingo.read_checkpoint(tmp_path / "a.pt")

    peer = copy.deepcopy(world.peer)
    found = peer.load_state_dict(written, strict=False)
    visual = {name.removeprefix("vision_encoder."): tensor for name, tensor in written.items() if "vision" in name}
    assert {f"vision_encoder.{name}" for name in visual} == set(found.unexpected_keys)  # the peer's tower is not a ViT
    peer.vision_encoder.tower.load_state_dict(model.vision_tower.state_dict())
    torch.testing.assert_close(world.logits(peer), expected)
    images = torch.randn(2, 3, 16, 16)
    tokens = model.vision_tower(pixel_values=images).last_hidden_state[:, 1:]
    torch.testing.assert_close(vit_tokens(visual, images, heads=2, quick=True), tokens, atol=1e-4, rtol=1e-4)

    again, whole = world.model(), world.model()
    with pytest.raises(FlamingoError, match="patch_embedding.weight .not equal to the backbone"):
        open_flamingo.load(again, written)
    otter.load(again, written)
    assert torch.equal(world.logits(again), expected)
    open_flamingo.save(again, tmp_path / "b.pt")  # nothing trains, all was replaced
    second = open_flamingo.read_checkpoint(tmp_path / "b.pt")
    assert second.keys() == written.keys()
    assert all(torch.equal(tensor, written[name]) for name, tensor in second.items())
    otter.save(model, tmp_path / "otter.pt")
    otter.load(whole, tmp_path / "otter.pt")
    assert torch.equal(world.logits(whole), expected)

    model.language_model.register_buffer("count", torch.ones(1))
    open_flamingo.save(model, tmp_path / "c.pt")
    assert "lang_encoder.count" in open_flamingo.read_checkpoint(tmp_path / "c.pt")
    model.vision_tower.register_buffer("running_mean", torch.ones(1))
    with pytest.raises(FlamingoError, match="vision_tower: open_clip's ViT has no place for running_mean"):
        open_flamingo.save(model, tmp_path / "d.pt")
    assert not (tmp_path / "d.pt").exists()


def test_missing_output_rows_must_be_asked_for(worlds: Callable[..., World]) -> None:
    """Catches output rows that stay what they happened to be when an untied LM's checkpoint lacks them."""
    world = worlds("llama", vocabulary=160)
    with pytest.raises(FlamingoError, match="new_output_rows=mean, random, or input"):
        open_flamingo.load(world.model(), world.released)
    started = {}
    for start in ("mean", "input", "random"):
        model = world.model()
        open_flamingo.load(model, world.released, new_output_rows=start)  # type: ignore[arg-type]
        started[start] = model.new_output_rows.detach()
    head = model.get_output_embeddings().weight[:100]
    torch.testing.assert_close(started["mean"], head.mean(0).expand(2, -1))
    assert torch.equal(started["input"], model.new_input_rows)
    assert 0 < started["random"].std() < 0.05


def test_what_does_not_fit_is_named_and_changes_nothing(worlds: Callable[..., World]) -> None:
    """Catches checkpoints of which something is dropped, invented or broadcast, and models that are half loaded."""
    world = worlds("opt", vocabulary=160)
    model = world.model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    norm, gate = "perceiver.norm.weight", "lang_encoder.model.decoder.layers.1.gated_cross_attn_layer.attn_gate"
    table, layer = "lang_encoder.lm_head.weight", "lang_encoder.model.decoder.layers.0.decoder_layer"
    released = {name: t for name, t in world.released.items() if "embed_tokens" not in name}  # OPT's table is tied
    second = "lang_encoder.gated_cross_attn_layers.1.attn_gate"
    frozen = f"{layer}.fc1.weight"
    whole = world.peer.state_dict()
    cases: list[tuple[str, dict[str, Tensor], str]] = [
        ("without perceiver.norm.weight", {}, norm),
        ("without .*layers.1.gated_cross_attn_layer.attn_gate", {}, gate),
        ("without .*embed_tokens.weight", {}, table),
        ("unexpected perceiver.norms", {"perceiver.norms": torch.ones(1)}, ""),
        (r"perceiver.norm.weight of shape \(1,\) in place of \(24,\)", {norm: torch.ones(1)}, ""),
        (r"embed_tokens.weight of shape \(101, 32\) where 102 rows", {table: released[table][:101]}, ""),
        ("attn_gate .not equal to its other copy", {second: torch.full((1,), 9.0)}, ""),
        ("fc1.weight .not equal to the backbone's", {frozen: whole[frozen] + 1}, ""),
        ("embeddings of a medium's place", {"perceiver.media_time_embs": torch.ones(1)}, ""),
        ("QK LayerNorm", {f"{layer}.attn.q_ln.weight": torch.ones(1)}, ""),
        ("without .*attn_gate.*; with unexpected perceiver.norms", {"perceiver.norms": torch.ones(1)}, gate),
    ]
    for message, added, removed in cases:
        tensors = {name: tensor for name, tensor in {**released, **added}.items() if name != removed}
        with pytest.raises(FlamingoError, match=message):
            open_flamingo.load(model, tensors)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.replaced == []
    with pytest.raises(FlamingoError, match="no resampler or no gated blocks"):
        open_flamingo.shape_options({"perceiver.norm.weight": torch.ones(1)}, "x", {})


def test_an_lm_with_qk_layer_norm_is_refused(worlds: Callable[..., World]) -> None:
    """Catches MPT-1B's LayerNorms left out, as transformers' MPT does without a word."""
    world = worlds("mpt", vocabulary=160)
    model = world.model()
    model.config.text_config.attn_config.qk_ln = True
    with pytest.raises(FlamingoError, match="QK LayerNorm .*MptForCausalLM"):
        open_flamingo.load(model, world.released)


@torch.no_grad()
def test_an_lm_that_has_qk_layer_norm_is_taken(worlds: Callable[..., World]) -> None:
    """Catches an LM with LayerNorms of its own (MPT-1B's code) refused for the second copies of them."""
    world = worlds("mpt", vocabulary=160)
    model, norm = world.model(), torch.nn.LayerNorm(32)
    model.language_model.transformer.blocks[0].attn.q_ln = norm
    layers = {"lang_encoder.transformer.blocks": "0.decoder_layer", "lang_encoder.old_decoder_blocks": "0"}
    copies = {f"{path}.{layer}.attn.q_ln.weight": norm.weight for path, layer in layers.items()}
    open_flamingo.load(model, {**world.released, **copies})
    with pytest.raises(FlamingoError, match="QK LayerNorm"):
        open_flamingo.load(world.model(), {**world.released, **copies})


def test_frame_embeddings_are_read(worlds: Callable[..., World], tmp_path: Path) -> None:
    """Catches embeddings of frames that a video model loses."""
    world = worlds("opt", vocabulary=160)
    frames = torch.randn(3, 24)
    torch.save({**world.released, "perceiver.frame_embs": frames}, tmp_path / "a.pt")
    model, _ = open_flamingo.from_open_flamingo(tmp_path / "a.pt", world.vision, world.language)
    assert torch.equal(model.resampler.frame_embeddings, frames)
    open_flamingo.save(model, tmp_path / "b.pt")
    assert torch.equal(open_flamingo.read_checkpoint(tmp_path / "b.pt")["perceiver.frame_embs"], frames)


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    """Catches pickles that are trusted, and files without tensors that end in a traceback."""
    marker = tmp_path / "ran"

    class Code:
        def __reduce__(self) -> Any:
            return Path.touch, (marker,)

    contents = {"code": {"perceiver.norm.weight": Code()}, "list": [1], "nested": {"model_state_dict": {"a": 1}}}
    for name, content in contents.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(FlamingoError, match=f"{name}: (cannot be read|expected tensors)"):
            open_flamingo.read_checkpoint(tmp_path / name)
    assert not marker.exists()


# -- Otter -------------------------------------------------------------------------------------------------------------


def otter_tensors(world: World) -> dict[str, Tensor]:
    """A model as Otter has it: whole tables trained, one more row for `<answer>`, the LM and a tuned tower inside."""
    peer = world.peer.state_dict()
    kept = {name: t for name, t in peer.items() if not re.search(r"old_decoder|gated_cross_attn_layers|^vision", name)}
    for name in ("lang_encoder.model.embed_tokens.weight", "lang_encoder.lm_head.weight"):
        kept[name] = torch.cat((kept[name] + 0.1, torch.randn(1, kept[name].shape[1])))
    tower = world.model().vision_tower.state_dict()
    vision = {f"vision_encoder.vision_model.{name}": (tensor + 0.01).contiguous() for name, tensor in tower.items()}
    positions = {"vision_encoder.vision_model.embeddings.position_ids": torch.arange(5)[None]}
    return {**to_otter(kept), **vision, **positions}


@pytest.mark.parametrize("suffix", ["bin", "safetensors", "pt"])
def test_otter_is_read_whole(worlds: Callable[..., World], tmp_path: Path, suffix: str) -> None:
    """Catches shards left out, Otter's own tables or tower dropped, and `<answer>` without its row."""
    world = worlds("llama", vocabulary=160)
    tensors = otter_tensors(world)
    if suffix == "pt":
        torch.save(tensors, tmp_path / "final_weights.pt")
    else:
        stem, weight_map = {"bin": "pytorch_model", "safetensors": "model"}[suffix], {}
        for part in (0, 1):
            file = f"{stem}-{part}.{suffix}"
            shard = dict(list(tensors.items())[part::2])
            weight_map.update(dict.fromkeys(shard, file))
            if suffix == "bin":
                torch.save(shard, tmp_path / file)
            else:
                save_file(shard, tmp_path / file)
        (tmp_path / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "otter"}))
    path = tmp_path / "final_weights.pt" if suffix == "pt" else tmp_path
    model, processor = otter.from_otter(path, world.vision, world.language)
    assert processor.tokenizer.convert_tokens_to_ids("<answer>") == model.config.new_token_ids[-1]
    assert torch.equal(model.new_input_rows[-1], tensors["lang_encoder.model.embed_tokens.weight"][-1])
    assert "language_model.lm_head.weight" in model.config.replaced
    assert any(name.startswith("vision_tower.") for name in model.config.replaced)
    assert not any(name.startswith("language_model.model.layers.") for name in model.config.replaced)

    peer = copy.deepcopy(world.peer)  # the same LM and tower, by open_flamingo
    rows = ("lang_encoder.model.embed_tokens.weight", "lang_encoder.lm_head.weight")
    peer.load_state_dict({name: tensors[name][:-1] for name in rows}, strict=False)
    for parameter in peer.vision_encoder.parameters():
        parameter.data += 0.01
    torch.testing.assert_close(world.logits(model.eval()), world.logits(peer))


def test_otters_layout_is_written(worlds: Callable[..., World], tmp_path: Path) -> None:
    """Catches names that Otter's code does not know, tables shorter than its tokenizer, and values that are lost."""
    world = worlds("llama", vocabulary=160)
    expected = otter_tensors(world)
    model = world.model(extra_tokens=("<answer>",))
    otter.load(model, expected)
    otter.save(model, tmp_path / "otter")
    written = otter.read_checkpoint(tmp_path / "otter")
    expected.pop("vision_encoder.vision_model.embeddings.position_ids")
    assert written.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in written.items())
    config = json.loads((tmp_path / "otter" / "config.json").read_text())
    assert config["model_type"] == "otter" and config["cross_attn_every_n_layers"] == 2
    assert config["text_config"]["architectures"] == ["LlamaForCausalLM"]
    assert config["text_config"]["vocab_size"] == 103 == len(written["lang_encoder.lm_head.weight"])
    four = world.model(extra_tokens=("<answer>",), cross_attention_heads=4, cross_attention_head_dim=16)
    for block in four.cross_attention:
        block.attn_gate.data.fill_(0.8)
    otter.save(four, tmp_path / "four")
    back, _ = otter.from_otter(tmp_path / "four", world.vision, world.language)
    assert (back.config.cross_attention_heads, back.config.cross_attention_head_dim) == (4, 16)
    assert torch.equal(world.logits(back), world.logits(four)), "no shape tells how many heads there are"
    otter.save(world.model(), tmp_path / "a.pt")  # Otter's tokenizer has `<answer>` even where ours has not
    assert len(otter.read_checkpoint(tmp_path / "a.pt")["lang_encoder.lm_head.weight"]) == 103
    with pytest.raises(FlamingoError, match=r"expected a folder with model\.safetensors"):
        otter.read_checkpoint(tmp_path)


# -- open_clip ---------------------------------------------------------------------------------------------------------


def vit(width: int, layers: int, patch: int, side: int) -> dict[str, Tensor]:
    """Random weights of an open_clip ViT under its names."""
    draw = lambda *shape: torch.randn(shape) * shape[-1] ** -0.5  # noqa: E731
    tensors = {
        "class_embedding": draw(width),
        "positional_embedding": draw(side**2 + 1, width),
        "proj": draw(width, 8),
        "conv1.weight": draw(width, 3, patch, patch),
    }
    norms = ["ln_pre", "ln_post", *(f"transformer.resblocks.{i}.ln_{n}" for i in range(layers) for n in (1, 2))]
    for norm in norms:
        tensors |= {f"{norm}.weight": 1 + draw(width), f"{norm}.bias": draw(width)}
    for i in range(layers):
        block = f"transformer.resblocks.{i}"
        tensors |= {
            f"{block}.attn.in_proj_weight": draw(3 * width, width),
            f"{block}.attn.in_proj_bias": draw(3 * width),
        }
        shapes = {"attn.out_proj": (width, width), "mlp.c_fc": (3 * width, width), "mlp.c_proj": (width, 3 * width)}
        for name, (rows, columns) in shapes.items():
            tensors |= {f"{block}.{name}.weight": draw(rows, columns), f"{block}.{name}.bias": draw(rows)}
    return tensors


def vit_tokens(tensors: dict[str, Tensor], images: Tensor, heads: int, quick: bool) -> Tensor:
    """Patch tokens (N, V, D) of `images` (N, C, H, W) as open_clip computes them, without its last norm."""
    patch = tensors["conv1.weight"].shape[-1]
    patches = rearrange(images, "n c (h p) (w q) -> n (h w) (c p q)", p=patch, q=patch)
    x = patches @ tensors["conv1.weight"].flatten(1).T
    x = torch.cat((tensors["class_embedding"].expand(len(x), 1, -1), x), dim=1) + tensors["positional_embedding"]
    norm = lambda x, name: layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"])  # noqa: E731
    affine = lambda x, name: linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])  # noqa: E731
    x = norm(x, "ln_pre")
    for i in range(sum(name.endswith("in_proj_bias") for name in tensors)):
        block = f"transformer.resblocks.{i}"
        fused = (
            norm(x, f"{block}.ln_1") @ tensors[f"{block}.attn.in_proj_weight"].T + tensors[f"{block}.attn.in_proj_bias"]
        )
        query, key, value = rearrange(fused, "n v (three h c) -> three n h v c", three=3, h=heads)
        attended = rearrange(scaled_dot_product_attention(query, key, value), "n h v c -> n v (h c)")
        x = x + affine(attended, f"{block}.attn.out_proj")
        inner = affine(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
        inner = inner * torch.sigmoid(1.702 * inner) if quick else gelu(inner)  # QuickGELU of OpenAI's CLIP
        x = x + affine(inner, f"{block}.mlp.c_proj")
    return x[:, 1:]


@torch.no_grad()
@pytest.mark.parametrize("quick", [False, True])
def test_an_open_clip_tower_gives_the_same_patch_tokens(quick: bool) -> None:
    """Catches projections of attention that change places, the wrong GELU, and a shape that is not the weights'."""
    torch.manual_seed(0)
    tensors = vit(width=128, layers=2, patch=4, side=3)
    images = torch.randn(2, 3, 12, 12)
    whole = {
        **{f"visual.{name}": t for name, t in tensors.items()},
        "transformer.resblocks.0.ln_1.weight": torch.ones(1),
    }
    tower = open_clip.to_hugging_face(whole, hidden_act="quick_gelu" if quick else "gelu")
    found = tower(pixel_values=images).last_hidden_state[:, 1:]
    torch.testing.assert_close(found, vit_tokens(tensors, images, heads=2, quick=quick), atol=1e-4, rtol=1e-4)
    other = vit_tokens(tensors, images, heads=2, quick=not quick)
    assert (found - other).abs().max() > 1e-2
    with pytest.raises(FlamingoError, match="found transformer.resblocks.0.ls_1.gamma"):
        open_clip.to_hugging_face({**tensors, "transformer.resblocks.0.ls_1.gamma": torch.ones(1)})
    with pytest.raises(FlamingoError, match="not the tensors of an open_clip ViT"):
        open_clip.to_hugging_face({name: t for name, t in tensors.items() if name != "ln_post.bias"})


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_converts_there_and_back(worlds: Callable[..., World], tmp_path: Path) -> None:
    """Catches options that do not arrive, and formats that do not give back what they were given."""
    world = worlds("llama", vocabulary=160)
    torch.save(world.released, tmp_path / "checkpoint.pt")
    run = lambda line, **paths: convert(*parse([*line.split(), *(f"--{k}={v}" for k, v in paths.items())]))  # noqa: E731
    backbones = {"vision": world.vision, "language": world.language}
    given = {"checkpoint": tmp_path / "checkpoint.pt", **backbones}
    run("--from open_flamingo --new-output-rows mean", out=tmp_path / "all", **given)
    run("--from open_flamingo --new-output-rows mean --trained-only", out=tmp_path / "small", **given)
    whole = FlamingoForConditionalGeneration.from_pretrained(tmp_path / "all").eval()
    small = FlamingoForConditionalGeneration.from_trained(tmp_path / "small").eval()
    expected = world.logits(whole)
    assert torch.equal(world.logits(small), expected)
    FlamingoProcessor.from_pretrained(tmp_path / "small")

    run("--from flamingo --to otter", checkpoint=tmp_path / "small", out=tmp_path / "deep" / "otter")
    run("--from otter", checkpoint=tmp_path / "deep" / "otter", out=tmp_path / "back", **backbones)
    run("--from flamingo --to open_flamingo", checkpoint=tmp_path / "back", out=tmp_path / "back.pt")
    model = world.model(extra_tokens=("<answer>",))
    open_flamingo.load(model, tmp_path / "back.pt")
    torch.testing.assert_close(world.logits(model), expected)

    tower = vit(width=24, layers=1, patch=8, side=2)
    torch.save(
        {"state_dict": {f"module.visual.{name}": tensor for name, tensor in tower.items()}}, tmp_path / "clip.pt"
    )
    run("--from open_clip --heads 2", checkpoint=tmp_path / "clip.pt", out=tmp_path / "tower")
    over_clip = from_backbones(tmp_path / "tower", world.language, cross_attention_every=2)[0]
    assert over_clip.config.vision_config.image_size == 16
    within = {**world.released, **{f"vision_encoder.{name}": tensor for name, tensor in tower.items()}}
    open_flamingo.load(over_clip, within, new_output_rows="mean")  # a checkpoint may hold its tower
    with pytest.raises(FlamingoError, match="pre_layrnorm.bias .not equal to the backbone"):
        within["vision_encoder.ln_pre.bias"] = within["vision_encoder.ln_pre.bias"] + 1
        open_flamingo.load(over_clip, within, new_output_rows="mean")
    for line, message in {
        "--from otter": "expected --vision and --language",
        "--from open_flamingo --to otter --trained-only": "--trained-only: expected with --to flamingo",
        "--from open_clip --to otter": "--from open_clip: is a vision tower",
        "--from idefics": "idefics",
    }.items():
        with pytest.raises(FlamingoError, match=message):
            run(line, checkpoint=tmp_path / "x", out=tmp_path / "y")


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    """Catches a traceback of transformers for a folder that is missing, or holds no model."""
    for name, said in (
        ("no/such/folder", "is not on this machine, and cannot be loaded"),
        ("empty", "cannot be loaded"),
    ):
        (tmp_path / "empty").mkdir(exist_ok=True)
        line = ["--from=flamingo", "--to=otter", f"--checkpoint={tmp_path / name}", f"--out={tmp_path / 'out'}"]
        with pytest.raises(FlamingoError, match=f"--checkpoint: {tmp_path / name}: {said} as a model: "):
            convert(*parse(line))
    assert not (tmp_path / "out").exists()


def test_the_command_runs_a_backbones_code_where_it_may(
    worlds: Callable[..., World], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches `--trust-remote-code` that reaches the reader of one format alone, and code that runs without it."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    world, language = worlds("llama", vocabulary=160), tmp_path / "language"
    shutil.copytree(world.language, language)
    code = "from transformers import LlamaForCausalLM\n\n\nclass Remote(LlamaForCausalLM):\n    pass\n"
    (language / "remote.py").write_text(code)
    config = json.loads((language / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "remote.Remote"}
    (language / "config.json").write_text(json.dumps(config))
    checkpoint = tmp_path / "checkpoint.pt"
    torch.save(world.released, checkpoint)
    given = [f"--vision={world.vision}", f"--language={language}", "--new-output-rows=mean"]
    for read, path in (("open_flamingo", checkpoint), ("flamingo", tmp_path / "small")):
        for trusted in (["--trust-remote-code"], []):
            options, *_ = parse([f"--from={read}", f"--checkpoint={path}", "--out=x", *given, *trusted])
            model, processor = load(options, read)
            assert type(model.language_model).__name__ == ("Remote" if trusted else "LlamaForCausalLM")
            if trusted and read == "open_flamingo":
                model.save_trained(tmp_path / "small")
                processor.save_pretrained(tmp_path / "small")


def test_the_families_of_open_flamingo_are_there() -> None:
    """Catches a family that the other tests would lose by being renamed."""
    assert {"opt", "gpt_neox", "llama", "mpt"} <= language_configs().keys()
