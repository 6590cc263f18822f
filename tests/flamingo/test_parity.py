"""Ours equals the real open_flamingo 2.0.1 with equal weights; its parts equal open_flamingo's and Idefics' too.

The tables of all figures: `python benchmarks/parity.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import IdeficsConfig
from transformers.models.idefics import modeling_idefics, perceiver

from flamingo.cross_attention import GatedCrossAttention
from flamingo.media import MediaSlots, visible_media
from flamingo.resampler import PerceiverResampler
from icl_eval.peers.open_flamingo import part
from tests.peer import (
    FAMILIES,
    TOLERANCE,
    difference,
    generations,
    pair_of,
    randomise,
    training_differences,
)
from tests.tiny import document

PRECISIONS = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
IMAGE, WIDTH, MEDIA_WIDTH, LATENTS = 1, 32, 24, 3


Case = tuple[str, int, bool, torch.dtype]
pair_at = cache(pair_of)


def cases(dtype: torch.dtype, *sizes: tuple[int, bool]) -> list[Case]:
    """Every family, with these of `cross_attention_every` and padded tables."""
    return [(family, every, padded, dtype) for family in FAMILIES for every, padded in sizes]


def over(cases: list[Case]) -> pytest.MarkDecorator:
    """Parametrises a test over pairs: with more embedding rows than tokens, or fewer than with the new ones."""
    return pytest.mark.parametrize(
        "case",
        cases,
        ids=lambda case: f"{case[0]}-every{case[1]}-{'padded' if case[2] else 'full'}-{str(case[3])[6:]}",
    )


# Each combination of sizes generates in one precision: it takes most of the time, and compares ids alone.
GENERATED = [*cases(torch.float64, (1, True), (2, False)), *cases(torch.float32, (1, False), (2, True))]


@over([*GENERATED, *cases(torch.float64, (1, False), (2, True))])
def test_training_equals_open_flamingo(case: Case) -> None:
    """Catches any other mathematics, weights in the wrong place, and a set of trained tensors that is not theirs.

    Pairs in float32 are drawn until no gate's gradient nearly cancels (`tests.peer`): it is one number, a sum of large
    terms of both signs, and where little is left of them two exact implementations differ by more than the tolerance,
    which is relative to what is left. In float64 nothing is redrawn, and the same sums agree to 1e-10.
    """
    pair, dtype = pair_at(case[0], every=case[1], padded=case[2], dtype=case[3]), case[3]
    found = training_differences(pair)
    assert {name: value for name, value in found.items() if not value <= TOLERANCE[dtype]} == {}
    assert all(p.grad.any() for p in pair.ours.parameters() if p.requires_grad), "nothing to compare: no gradient"


@over(GENERATED)
def test_generation_equals_open_flamingo(case: Case) -> None:
    """Catches media that are lost or mixed up with left padding, in the cache, or among beams."""
    pair = pair_at(case[0], every=case[1], padded=case[2], dtype=case[3])
    different = []
    for beams in (1, 3):
        ours, theirs = generations(pair, beams)
        assert ours == theirs
        different.append(len({tuple(ids) for ids in theirs}))
    assert max(different) > 1, "nothing to compare: every sample gives the same"


def test_text_alone_trains_as_in_open_flamingo() -> None:
    """Catches a batch without media that skips the gated feed-forward, which open_flamingo runs on every token."""
    found = training_differences(
        pair_at("opt", every=1, padded=True, dtype=torch.float64), [document(1, 0), document(2, 0)]
    )
    assert max(found.values()) <= TOLERANCE[torch.float64]


# -- parts alone -------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def assert_equal(dtype: torch.dtype, ours: Tensor, theirs: Tensor, tensors: list[tuple[Tensor, Tensor]]) -> None:
    """Values, and gradients of a random functional for each pair of our and their tensors.

    The functional leans towards the output: of an entirely random one, the gradient of a gate may nearly cancel.
    """
    weight = torch.randn_like(theirs) + theirs.detach()
    mine, others = (
        torch.autograd.grad((output * weight).sum(), side)
        for output, side in zip((ours, theirs), zip(*tensors, strict=True), strict=True)
    )
    assert difference(ours, theirs) <= TOLERANCE[dtype]
    assert max(map(difference, mine, others)) <= TOLERANCE[dtype]


def parameters(ours: nn.Module, theirs: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Pairs of equal names, after ours have been given random values and theirs the same."""
    randomise(ours)
    theirs.load_state_dict(ours.state_dict())
    return list(zip(ours.parameters(), theirs.parameters(), strict=True))


@PRECISIONS
@pytest.mark.parametrize("frames", [1, 2])
def test_resampler_equals_open_flamingo(dtype: torch.dtype, frames: int) -> None:
    """Catches frames or tokens in another order, frame embeddings in the wrong place, and norms that are left out."""
    ours = PerceiverResampler(WIDTH, max_frames=3)
    theirs = part("helpers").PerceiverResampler(dim=WIDTH, max_num_frames=3)
    theirs.register_load_state_dict_pre_hook(
        lambda _, state, *rest: state.update(frame_embs=state.pop("frame_embeddings"))
    )
    tensors = parameters(ours.to(dtype), theirs.to(dtype))
    media = torch.randn(4, frames, 5, WIDTH, dtype=dtype, requires_grad=True)
    output = theirs(rearrange(media, "(b t) f v d -> b t f v d", b=2))
    assert_equal(dtype, ours(media), rearrange(output, "b t r d -> (b t) r d"), [(media, media), *tensors])


def text_and_media(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Samples of 2, 0, 3 and 1 images: ids (B, T), hidden (B, T, D), latents (N, R, D') and padded (B, S, R, D')."""
    ids = torch.tensor([[0, 1, 0, 1, 0, 0], [0] * 6, [1, 1, 0, 0, 1, 0], [0, 0, 1, 0, 0, 0]])
    hidden = torch.randn(*ids.shape, WIDTH, dtype=dtype, requires_grad=True)
    flat = torch.randn(int(ids.sum()), LATENTS, MEDIA_WIDTH, dtype=dtype, requires_grad=True)
    counts = ids.sum(dim=1)
    slots = torch.arange(int(counts.max())) < counts[:, None]
    padded = torch.zeros(*slots.shape, LATENTS, MEDIA_WIDTH, dtype=dtype).masked_scatter(slots[..., None, None], flat)
    return ids, hidden, flat, padded


def gated(block: GatedCrossAttention, ids: Tensor, hidden: Tensor, flat: Tensor, media_attention: str) -> Tensor:
    """Our block as the model runs it: `flat` (N, R, D') → (B, T, D)."""
    slots = MediaSlots.of(ids.eq(IMAGE).sum(dim=1), len(flat))
    first, last = visible_media(ids, IMAGE, media_attention=media_attention)
    visible = slots.visible(first, last, LATENTS)
    sees = visible.any(dim=-1, keepdim=True)
    keys, values = (slots.spread(each) for each in block.project_media(flat))
    return block(hidden, keys, values, visible | ~sees, sees)


@PRECISIONS
@pytest.mark.parametrize("media_attention", ["previous", "all"])
def test_gated_block_equals_open_flamingo(dtype: torch.dtype, media_attention: str) -> None:
    """Catches media seen too early or too late, gates in the wrong place, and what samples of few media get in padding.

    With all earlier media, tokens before the first are left out: open_flamingo lets these attend evenly to every
    medium of the batch's longest sample, to later ones and to padding. Ours see nothing.
    """
    ours = GatedCrossAttention(WIDTH, MEDIA_WIDTH)
    theirs = part("helpers").GatedCrossAttentionBlock(
        dim=WIDTH, dim_visual=MEDIA_WIDTH, only_attend_immediate_media=media_attention == "previous"
    )
    tensors = parameters(ours.to(dtype), theirs.to(dtype))
    ids, hidden, flat, padded = text_and_media(dtype)
    compared = ids.cumsum(dim=1) > 0 if media_attention == "all" else torch.ones_like(ids).bool()
    assert_equal(
        dtype,
        gated(ours, ids, hidden, flat, media_attention)[compared],
        theirs(hidden, padded, media_locations=ids == IMAGE)[compared],
        [(hidden, hidden), (flat, flat), *tensors],
    )


def idefics() -> IdeficsConfig:
    """Idefics with heads of 8 channels, without the QK norms that ours does not have."""
    config = IdeficsConfig(
        hidden_size=WIDTH,
        num_attention_heads=WIDTH // 8,
        vision_config={"embed_dim": MEDIA_WIDTH},
        qk_layer_norms=False,
    )
    config._attn_implementation = "sdpa"
    return config


def halves(to_kv: Any) -> Iterator[nn.Linear]:
    """Layers for keys and for values with the weights of one for both."""
    for weight in to_kv.weight.chunk(2):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight = nn.Parameter(weight.detach())
        yield layer


@PRECISIONS
def test_resampler_equals_idefics(dtype: torch.dtype) -> None:
    """Catches a fault that open_flamingo has too. Idefics' ReLU is exchanged for GELU; all else is its own."""
    ours = PerceiverResampler(MEDIA_WIDTH, depth=2, latents=LATENTS, heads=2, head_dim=8)
    theirs = perceiver.IdeficsPerceiverResampler(
        idefics(), MEDIA_WIDTH, depth=2, n_heads=2, head_dim=8, n_latents=LATENTS
    )
    randomise(ours.to(dtype))
    theirs.latents, theirs.layer_norm = ours.latents, ours.norm
    for layer, (attention, mlp) in zip(ours.layers, theirs.blocks, strict=True):
        own, feed_forward = layer.children()
        attention.context_layer_norm, attention.latents_layer_norm = own.norm_media, own.norm_latents
        attention.q_proj, attention.output_proj = own.to_q, own.to_out
        attention.k_proj, attention.v_proj = halves(own.to_kv)
        mlp.ln, mlp.fc, mlp.act, mlp.c_proj = feed_forward.children()
    media = torch.randn(4, 5, MEDIA_WIDTH, dtype=dtype, requires_grad=True)
    assert_equal(dtype, ours(media[:, None]), theirs(media), [(media, media), (ours.latents, ours.latents)])


@PRECISIONS
@pytest.mark.parametrize("media_attention", ["previous", "all"])
def test_gated_block_equals_idefics(dtype: torch.dtype, media_attention: str) -> None:
    """Catches a fault that open_flamingo has too: here text before the first medium sees nothing in both modes.

    Idefics' RMSNorms and its gated MLP are exchanged for our LayerNorms and feed-forward: their mathematics differs.
    Attention, mask, zeroing, gates and residuals are its own.
    """
    config = idefics()
    ours = GatedCrossAttention(WIDTH, MEDIA_WIDTH, heads=config.num_attention_heads, head_dim=8)
    theirs = modeling_idefics.IdeficsGatedCrossAttentionLayer(config, layer_idx=0)
    randomise(ours.to(dtype))
    theirs.input_layernorm, theirs.cross_attn.q_proj, theirs.cross_attn.o_proj = (
        ours.attn.norm, ours.attn.to_q, ours.attn.to_out
    )  # fmt: skip
    theirs.cross_attn.k_proj, theirs.cross_attn.v_proj = halves(ours.attn.to_kv)
    theirs.post_attention_layernorm, theirs.mlp = ours.ff[0], ours.ff[1:]
    theirs.alpha_cross_attn, theirs.alpha_dense = ours.attn_gate, ours.ff_gate
    ids, hidden, flat, padded = text_and_media(dtype)
    # (B, T, S) whether token t sees medium s, as Idefics' processor would give it.
    seen = ids.cumsum(dim=1)[..., None]
    medium = torch.arange(1, padded.shape[1] + 1)
    visible = seen == medium if media_attention == "previous" else seen >= medium
    mask = torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
    output = theirs(
        hidden,
        image_hidden_states=rearrange(padded, "b s r d -> b (s r) d"),
        image_attention_mask=mask.repeat_interleave(LATENTS, dim=-1)[:, None],
        cross_attention_gate=visible.any(dim=-1).to(dtype),
    )
    gates = [(gate, gate) for gate in (ours.attn_gate, ours.ff_gate)]
    assert_equal(
        dtype, gated(ours, ids, hidden, flat, media_attention), output, [(hidden, hidden), (flat, flat), *gates]
    )
