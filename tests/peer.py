"""The real open_flamingo 2.0.1 as a peer: its `Flamingo` over copies of our backbones, and how far ours is from it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
)

from flamingo import Document, FlamingoForConditionalGeneration, FlamingoProcessor
from flamingo.backbones import assemble
from flamingo.interop.open_flamingo import load
from flamingo.modeling import trainable_names
from icl_eval.peers.open_flamingo import build
from tests.tiny import document, language_configs, tokenizer

FAMILIES = ("opt", "gpt_neox", "llama", "mpt")
"""Those of open_flamingo: OPT, Pythia and RedPajama, LLaMA, MPT."""
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
"""of `difference`, by precision"""
NO_PADDING = {("mpt", torch.float64)}
"""Where transformers' LM makes NaN of left padding: MPT masks with the least float64, and casts that to float32."""
SAMPLES = (document(1, 1), document(2, 2, lead=True), document(3, 3), document(4, 0))
"""1, 2, 3 and 0 images, one with text before the first."""


def open_flamingo_over(model: FlamingoForConditionalGeneration, processor: FlamingoProcessor) -> Any:
    """An open_flamingo `Flamingo` over copies of our model's backbones, in our model's precision; its parts are new."""
    ours = model.language_model
    lm = AutoModelForCausalLM.from_config(
        copy.deepcopy(ours.config), attn_implementation=ours.config._attn_implementation
    )
    lm.load_state_dict(ours.state_dict())
    peer = build(
        copy.deepcopy(model.vision_tower),
        lm,
        tokens=len(processor.tokenizer),
        end_of_chunk_token_id=model.config.end_of_chunk_token_id,
        image_token_id=model.config.image_token_id,
        cross_attention_every=model.config.cross_attention_every,
    )
    return peer.to(model.resampler.latents.dtype)


def own_parameters(peer: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """What open_flamingo puts between its backbones, under the names of our model."""
    for name, parameter in peer.perceiver.named_parameters():
        yield f"resampler.{name.replace('frame_embs', 'frame_embeddings')}", parameter
    blocks = [block for block in peer.lang_encoder.gated_cross_attn_layers if block is not None]
    for index, block in enumerate(blocks):
        for name, parameter in block.named_parameters():
            yield f"cross_attention.{index}.{name}", parameter


@torch.no_grad()
def randomise(module: nn.Module) -> None:
    """Weights that matter: matrices of unit gain, norms that are no identity, gates of 0.3 to 0.8 and either sign."""
    for name, parameter in module.named_parameters():
        if name.endswith("_gate"):
            sign = torch.randint(0, 2, parameter.shape) * 2 - 1
            parameter.copy_(sign * (0.3 + 0.5 * torch.rand(parameter.shape)))
        elif parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn(parameter.shape))
        else:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)


def checkpoint(peer: Any) -> dict[str, Tensor]:
    """The peer's state without the vision encoder, whose tensors have open_clip's names in a real one."""
    return {name: tensor for name, tensor in peer.state_dict().items() if not name.startswith("vision_encoder.")}


@dataclass(frozen=True)
class Pair:
    """Ours and the peer, with equal weights and in evaluation mode."""

    ours: FlamingoForConditionalGeneration
    processor: FlamingoProcessor
    peer: Any


def pair_of(family: str, *, every: int = 1, padded: bool = True, dtype: torch.dtype = torch.float64) -> Pair:
    """A random peer over tiny backbones, and ours with its weights.

    Args:
        family: one of `FAMILIES`.
        every: `cross_attention_every`, of four decoder layers.
        padded: whether the LM has more embedding rows than its tokenizer has tokens, new ones included; else it has
            as many as without the new ones.
        dtype: of all parameters.
    """
    torch.manual_seed(0)
    words = tokenizer()
    config = language_configs(len(words) + 26 if padded else len(words))[family]()
    config.num_hidden_layers = 4
    lm = AutoModelForCausalLM.from_config(config)
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        )
    )
    randomise(lm)
    size = {"height": 16, "width": 16}
    images = CLIPImageProcessorPil(size=size, crop_size=size)
    model, processor = assemble(tower, lm, images, words, cross_attention_every=every, open_flamingo_compatible=True)
    model = model.to(dtype).eval()
    peer = open_flamingo_over(model, processor).eval()
    randomise(peer.perceiver)
    with torch.no_grad():  # new rows, of the same size as the others
        for table in (peer.lang_encoder.get_input_embeddings(), peer.lang_encoder.get_output_embeddings()):
            rows = table.weight[model.config.new_token_ids]
            table.weight[model.config.new_token_ids] = torch.randn_like(rows) * rows.shape[1] ** -0.5
    pair = Pair(model, processor, peer)
    randomise(peer.lang_encoder.gated_cross_attn_layers)
    while dtype == torch.float32 and _gates_cancel(pair):  # one would compare rounding; float64 has digits to spare
        randomise(peer.lang_encoder.gated_cross_attn_layers)
    load(model, checkpoint(peer))
    return pair


def _gates_cancel(pair: Pair) -> bool:
    """Whether some gate's gradient is the small rest of large terms of both signs, by the peer alone.

    It is one number, the product of a branch with the branch's gradient, and at a random point it may nearly vanish.
    """
    batch, vision_x = batch_of(pair, SAMPLES, "right")
    loss = pair.peer(vision_x, batch["input_ids"], batch["attention_mask"], labels=batch["labels"]).loss
    gates = [parameter for name, parameter in own_parameters(pair.peer) if name.endswith("_gate")]
    sizes = torch.cat(torch.autograd.grad(loss, gates)).abs()
    return bool(sizes.min() < sizes.max() / 10)


def difference(ours: Tensor, theirs: Tensor) -> float:
    """max|a − b| / max|b|; 0 where the two are equal."""
    ours, theirs = ours.detach(), theirs.detach()
    return 0.0 if torch.equal(ours, theirs) else float((ours - theirs).abs().max() / theirs.abs().max())


def batch_of(pair: Pair, samples: Sequence[Document], padding_side: str) -> tuple[dict[str, Tensor], Tensor]:
    """Our batch, in the model's precision; and its images as the peer wants them.

    Returns:
        What our model takes; (B, T_img, 1, C, H, W) with zero images after a sample's own, T_img at least 1.
    """
    batch = dict(pair.processor(documents=list(samples), padding_side=padding_side))
    pixels = batch["pixel_values"] = batch["pixel_values"].to(pair.ours.resampler.latents.dtype)
    counts = batch["media_per_sample"].tolist()
    vision_x = pixels.new_zeros(len(counts), max(1, *counts), *pixels.shape[1:])
    for row, media in zip(vision_x, pixels.split(counts), strict=True):
        row[: len(media)] = media
    return batch, vision_x


def training_differences(pair: Pair, samples: Sequence[Document] = SAMPLES) -> dict[str, float]:
    """Of logits at tokens, loss, and the gradient of every tensor that trains (`gradient NAME`), as `difference`.

    Raises:
        AssertionError: where ours trains other tensors than the peer.
    """
    ours, peer = pair.ours, pair.peer
    batch, vision_x = batch_of(pair, samples, "right")
    tokens, known = batch["attention_mask"].bool(), len(pair.processor.tokenizer)
    labels = batch.pop("labels")
    theirs = peer(vision_x, batch["input_ids"], batch["attention_mask"], labels=labels)
    loss = theirs.loss
    if vision_x.dtype == torch.float64:  # transformers' loss falls back to float32
        loss = cross_entropy(rearrange(theirs.logits[:, :-1], "b t v -> (b t) v"), labels[:, 1:].flatten())
    ours.zero_grad()
    peer.zero_grad()
    loss.backward()
    with torch.no_grad():
        logits = ours(**batch).logits[..., :known]
    output = ours(**batch, labels=labels)
    output.loss.backward()
    found = {
        "logits": difference(logits[tokens], theirs.logits[tokens]),
        "loss": difference(output.loss, loss),
    }
    new_rows = peer.lang_encoder.get_input_embeddings().weight.grad[ours.config.new_token_ids]
    gradients = {"new_input_rows": new_rows, **{name: p.grad for name, p in own_parameters(peer)}}
    assert gradients.keys() == trainable_names(ours)
    assert all(parameter.grad is None for parameter in ours.parameters() if not parameter.requires_grad)
    for name, gradient in gradients.items():
        found[f"gradient {name}"] = difference(ours.get_parameter(name).grad, gradient)
    return found


def generations(pair: Pair, beams: int) -> tuple[list[list[int]], list[list[int]]]:
    """The ids that ours and the peer generate for `SAMPLES`, left-padded to one length: at most 6 each."""
    dtype = pair.ours.resampler.latents.dtype
    singly = (pair.ours.config.text_config.model_type, dtype) in NO_PADDING
    ours, theirs = [], []
    for samples in [[sample] for sample in SAMPLES] if singly else [SAMPLES]:
        batch, vision_x = batch_of(pair, samples, "left")
        batch.pop("labels")
        options = dict(
            max_new_tokens=6, num_beams=beams, do_sample=False, use_cache=True,
            pad_token_id=pair.processor.tokenizer.pad_token_id, eos_token_id=pair.ours.config.end_of_chunk_token_id,
        )  # fmt: skip
        suppressed = [pair.ours.config.image_token_id]  # ours never generates it
        ids, mask = batch["input_ids"], batch["attention_mask"]
        theirs += pair.peer.generate(vision_x, ids, mask, suppress_tokens=suppressed, **options)[
            :, ids.shape[1] :
        ].tolist()
        ours += pair.ours.generate(**batch, **options)[:, ids.shape[1] :].tolist()
    return ours, theirs
