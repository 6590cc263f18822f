"""The model: identity at closed gates, no leak, cached as uncached, saved as loaded."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from flamingo import Document, FlamingoError, FlamingoForConditionalGeneration, FlamingoProcessor, Text
from flamingo.modeling import decoder_layers, trainable_names
from tests.tiny import VOCABULARY, document, language_configs, picture, tiny_flamingo

FAMILIES = sorted(language_configs())
Tiny = tuple[FlamingoForConditionalGeneration, FlamingoProcessor]


@pytest.fixture(params=FAMILIES)
def tiny(request: pytest.FixtureRequest, tmp_path: Path) -> Tiny:
    """A random Flamingo with open gates over each family."""
    return tiny_flamingo(tmp_path, request.param)


def ragged() -> list[Document]:
    """Samples with 3, 0 and 1 media, the first with text before them."""
    return [document(1, 3, lead=True), document(2, 0), document(3, 1)]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_closed_gates_give_the_frozen_lm_bit_for_bit(tiny: Tiny, dtype: torch.dtype) -> None:
    """Catches anything that touches the LM: resized tables, moved ids, a block that is no identity at zero gates."""
    model, processor = tiny
    lm = copy.deepcopy(model.language_model).to(dtype)
    model = model.to(dtype)
    batch = processor(documents=ragged(), padding_side="right")
    ids = batch["input_ids"]
    media = (ids == processor.image_token_id).any(dim=1)
    end = ids == model.config.end_of_chunk_token_id
    with model.gates_closed():
        ours = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    # Of rows with media the LM knows the tokens before the first new one.
    known = ~((ids == processor.image_token_id) | end).cumsum(dim=1).bool()
    theirs = lm(input_ids=ids.masked_fill(~known, 0), attention_mask=batch["attention_mask"]).logits
    size = len(processor.tokenizer) - len(model.config.new_token_ids)
    assert known[media].any() and known[~media].any()
    assert torch.equal(ours[known][:, :size], theirs[known][:, :size])


@torch.no_grad()
def test_closed_gates_ignore_media_and_open_ones_do_not(tiny: Tiny) -> None:
    """Catches gates that do not close, and media that never reach the text."""
    model, processor = tiny
    batch = processor(documents=ragged())
    batch.pop("labels")
    other = {**batch, "pixel_values": batch["pixel_values"] + 1}
    assert not torch.equal(model(**batch).logits, model(**other).logits)
    with model.gates_closed():
        assert torch.equal(model(**batch).logits, model(**other).logits)
    assert all(value > 0.4 for value in model.gates().values())


@torch.no_grad()
@pytest.mark.parametrize("media_attention", ["previous", "all"])
def test_a_medium_changes_nothing_before_it_nor_in_other_samples(tmp_path: Path, media_attention: str) -> None:
    """Catches a leak: backwards in a sample, into a neighbouring sample, or to text before the first medium."""
    model, processor = tiny_flamingo(tmp_path, "llama", media_attention=media_attention)
    batch = processor(documents=ragged(), padding_side="right")
    batch.pop("labels")
    before = model(**batch).logits
    images = (batch["input_ids"] == processor.image_token_id).nonzero()
    for medium, (sample, position) in enumerate(images.tolist()):
        pixels = batch["pixel_values"].clone()
        pixels[medium] += 1
        changed = (model(**{**batch, "pixel_values": pixels}).logits != before).any(dim=-1)
        assert changed[sample, position:].any(), "the medium has no effect at all"
        changed[sample, position:] = False
        assert not changed.any()


@torch.no_grad()
def test_a_token_that_sees_nothing_gets_exactly_zero(tmp_path: Path) -> None:
    """Catches attention that spreads evenly over media a token may not see."""
    model, _ = tiny_flamingo(tmp_path)
    block = model.cross_attention[0].attn
    keys, values = torch.randn(2, 1, 2, 8, 8).unbind(0)
    visible = torch.zeros(1, 1, 3, 8, dtype=torch.bool)
    visible[:, :, 2] = True
    sees = visible.any(-1, keepdim=True)
    attended = block(torch.randn(1, 3, 32), keys, values, visible | ~sees, sees)
    assert (attended[:, :2] == 0).all() and (attended[:, 2] != 0).any()


@torch.no_grad()
def test_padding_and_batch_do_not_change_a_sample(tiny: Tiny) -> None:
    """Catches padding that is attended to, and media counted over the wrong rows."""
    model, processor = tiny
    batch = processor(documents=ragged(), padding_side="left")
    batch.pop("labels")
    together = model(**batch, logits_to_keep=1).logits[:, -1, : len(processor.tokenizer)]
    for sample, each in enumerate(ragged()):
        alone = processor(documents=each)
        alone.pop("labels")
        torch.testing.assert_close(model(**alone).logits[0, -1, : len(processor.tokenizer)], together[sample])


def test_generation_is_the_same_cached_uncached_batched_and_in_beams(tiny: Tiny) -> None:
    """Catches a cache that loses the media after the prefill, and beams that see another sample's media."""
    model, processor = tiny
    batch = processor(documents=ragged(), padding_side="left")
    batch.pop("labels")
    options = dict(max_new_tokens=6, do_sample=False)
    new = slice(batch["input_ids"].shape[1], None)
    cached, uncached = (model.generate(**batch, **options, use_cache=cache)[:, new] for cache in (True, False))
    assert torch.equal(cached, uncached)
    beams = model.generate(**batch, **options, num_beams=3)[:, new]
    assert processor.image_token_id not in cached
    for sample, each in enumerate(ragged()):
        alone = processor(documents=each)
        alone.pop("labels")
        start = alone["input_ids"].shape[1]
        assert torch.equal(model.generate(**alone, **options)[0, start:], cached[sample])
        expected = model.generate(**alone, **options, num_beams=3)[0, start:]
        assert torch.equal(expected, beams[sample, : len(expected)])


def test_stepping_with_a_memory_equals_one_pass(tiny: Tiny) -> None:
    """Catches wrong keys and values in the memory, and wrong visibility when tokens come one at a time."""
    model, processor = tiny
    batch = processor(documents=document(5, 2))
    batch.pop("labels")
    with torch.inference_mode():
        whole = model(**batch).logits
        memory = model.remember_media(model.encode_media(batch["pixel_values"]))
        ids, cut = batch["input_ids"], batch["input_ids"].shape[1] - 3
        step = model(ids[:, :cut], media_memory=memory, media_per_sample=torch.tensor([2]), use_cache=True)
        parts = [step.logits]
        for position in range(cut, ids.shape[1]):
            seen = torch.tensor([[2]])
            step = model(
                ids[:, position : position + 1],
                attention_mask=torch.ones(1, position + 1, dtype=torch.long),
                media_memory=memory,
                media_per_sample=torch.tensor([2]),
                media_first=seen,
                media_last=seen,
                past_key_values=step.past_key_values,
                use_cache=True,
            )
            parts.append(step.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1)[..., :100], whole[..., :100])


def test_loss_is_the_cross_entropy_of_supervised_tokens(tiny: Tiny) -> None:
    """Catches labels that are shifted wrongly, logits at other positions than the supervised ones, and a cache made."""
    model, processor = tiny
    batch = processor(documents=ragged(), padding_side="right")
    caches = []
    hook = model.language_model.register_forward_hook(lambda *call: caches.append(call[-1].get("past_key_values")))
    output = model(**batch)
    hook.remove()
    assert caches == [None] and output.past_key_values is None
    labels = batch.pop("labels")
    logits = model(**batch).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
    torch.testing.assert_close(output.sample_losses, losses.sum(dim=1))
    torch.testing.assert_close(output.loss, losses.sum() / (labels[:, 1:] != -100).sum())
    assert output.sample_tokens.tolist() == (labels[:, 1:] != -100).sum(dim=1).tolist()


@pytest.mark.parametrize("media", [0, 2])
def test_every_trained_parameter_gets_a_gradient_and_no_frozen_one(tiny: Tiny, media: int) -> None:
    """Catches text-only batches that leave parameters unused (DDP fails then), and backbones that train."""
    model, processor = tiny
    model.train()(**processor(documents=document(4, media))).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    parts = {name.partition(".")[0] for name in trained}
    assert parts - {"new_output_rows"} == {"resampler", "cross_attention", "new_input_rows"}
    assert ("new_output_rows" in parts) == (not model.config.tie_word_embeddings)


@pytest.mark.parametrize("media", [0, 2])
def test_a_tower_that_trains_gets_gradients_from_every_batch(tmp_path: Path, media: int) -> None:
    """Catches a tower left out of the graph by a batch without media, at which DDP would stop."""
    model, processor = tiny_flamingo(tmp_path, freeze_vision=False)
    model.train()(**processor(documents=document(4, media))).loss.backward()
    without = {name for name in trainable_names(model) if model.get_parameter(name).grad is None}
    assert not without
    assert any(each.grad is not None and each.grad.any() for each in model.vision_tower.parameters()) == (media > 0)


@torch.no_grad()
def test_save_and_load_give_the_same_model(tiny: Tiny, tmp_path: Path) -> None:
    """Catches tensors that are dropped or made anew on loading, and backbones that come back unfrozen."""
    model, processor = tiny
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    loaded = FlamingoForConditionalGeneration.from_pretrained(tmp_path / "saved").eval()
    batch = FlamingoProcessor.from_pretrained(tmp_path / "saved")(documents=ragged())
    for key, value in processor(documents=ragged()).items():
        assert torch.equal(batch[key], value)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == [name for name, parameter in loaded.named_parameters() if parameter.requires_grad]
    assert torch.equal(copy.deepcopy(loaded)(**batch).logits, model(**batch).logits)


@torch.no_grad()
def test_ids_inside_padded_rows_are_shadowed_and_unused_ones_impossible(tmp_path: Path) -> None:
    """Catches new tokens that read or write the LM's padding rows, as in OPT or Pythia."""
    model, processor = tiny_flamingo(tmp_path, "opt", vocabulary=160)
    assert max(model.config.new_token_ids) < 160
    batch = processor(documents=document(1, 1))
    batch.pop("labels")
    before = model(**batch).logits
    assert (before[..., len(processor.tokenizer) :] == -torch.inf).all()
    assert before[..., : len(processor.tokenizer)].isfinite().all()
    model.get_input_embeddings().weight[model.config.new_token_ids] += 1
    assert torch.equal(model(**batch).logits, before)
    model.new_input_rows += 1
    assert not torch.equal(model(**batch).logits, before)


def test_one_batch_of_videos(tmp_path: Path) -> None:
    """Catches frames that are mixed up with media, and frame embeddings that end at the trained number."""
    from flamingo import Video

    model, processor = tiny_flamingo(tmp_path, resampler_max_frames=2)
    video = Document((Video((picture(0), picture(1), picture(2))), Text("cat")))
    pixels = processor(documents=video)["pixel_values"]
    assert pixels.shape == (1, 3, 3, 16, 16)
    assert model.encode_media(pixels).shape == (1, 4, 24)
    assert not torch.equal(model.encode_media(pixels), model.encode_media(pixels.flip(1)))


def test_errors_name_what_is_wrong(tmp_path: Path) -> None:
    """Catches mismatches that would be broadcast or ignored."""
    model, processor = tiny_flamingo(tmp_path)
    batch = processor(documents=document(1, 2))
    with pytest.raises(FlamingoError, match="found 2 image tokens but received 1 media"):
        model(batch["input_ids"], pixel_values=batch["pixel_values"][:1], media_per_sample=torch.tensor([1]))
    with pytest.raises(FlamingoError, match="media, frames, channels, height, width"):
        model(batch["input_ids"], pixel_values=batch["pixel_values"][:, 0])
    with pytest.raises(FlamingoError, match=f"found id {VOCABULARY + 5}"):
        model(torch.tensor([[VOCABULARY + 5]]))
    with pytest.raises(FlamingoError, match="LlamaForCausalLM has no such submodule"):
        decoder_layers(model.language_model, "model.blocks")
    with pytest.raises(FlamingoError, match="cross_attention_every=3"):
        tiny_flamingo(tmp_path / "other", cross_attention_every=3)
