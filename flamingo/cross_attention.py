"""GatedCrossAttention: the block that stands before a frozen decoder layer.

Flamingo, section 2.3 and figure 4; parameters and order of operations are those of open_flamingo 2.0.1.
Legend: B samples, T text tokens, N media, S media slots a sample, R latents, H heads, C channels of a head, D width.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_layers import GradientCheckpointingLayer

from flamingo.lean import add_feed_forward, add_linear
from flamingo.resampler import feed_forward


class CrossAttention(nn.Module):
    """Text tokens attend to the latents of the media that they may see."""

    def __init__(self, width: int, media_width: int, heads: int, head_dim: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(media_width, 2 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, width, bias=False)

    def forward(self, hidden: Tensor, keys: Tensor, values: Tensor, mask: Tensor, sees: Tensor) -> Tensor:
        """`hidden` (B, T, D) → (B, T, H·C), to be projected by `to_out`, with `keys` and `values` (B, H, S·R, C).

        `mask` (B, 1, T, S·R) and `sees` (B, 1, T, 1) are booleans. Attention goes where `mask` is true; the branch is
        exactly zero for a token that `sees` nothing, whose row of the mask must not be empty, since kernels define
        attention to nothing differently.
        """
        query = rearrange(self.to_q(self.norm(hidden)), "b t (h c) -> b h t c", h=self.heads)
        attended = scaled_dot_product_attention(query, keys.to(query.dtype), values.to(query.dtype), attn_mask=mask)
        return rearrange(attended.masked_fill(~sees, 0.0), "b h t c -> b t (h c)")


class GatedCrossAttention(GradientCheckpointingLayer):
    """Gated cross-attention, then a gated feed-forward; with both gates at 0 the block is the identity."""

    def __init__(self, width: int, media_width: int, *, heads: int = 8, head_dim: int = 64, ff_mult: int = 4):
        super().__init__()
        self.attn = CrossAttention(width, media_width, heads, head_dim)
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self.ff = feed_forward(width, ff_mult)
        self.ff_gate = nn.Parameter(torch.zeros(1))

    def project_media(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """`latents` (N, R, D) → keys and values, each (N, R, H, C)."""
        weight = self.attn.to_kv.weight
        if not weight.is_meta:  # in a model spread over devices, latents and blocks may lie on different ones
            latents = latents.to(weight.device)
        key, value = rearrange(
            self.attn.to_kv(latents), "n r (two h c) -> two n r h c", two=2, h=self.attn.heads
        ).unbind(0)
        return key, value

    def forward(self, hidden: Tensor, keys: Tensor, values: Tensor, mask: Tensor, sees: Tensor) -> Tensor:
        """`hidden` (B, T, D) → (B, T, D), in the block's own precision; other arguments as `CrossAttention`."""
        stream = hidden.dtype
        hidden = hidden.to(self.attn_gate.dtype)
        attended = self.attn(hidden, keys, values, mask, sees)
        hidden = add_linear(hidden, attended, self.attn.to_out, self.attn_gate.tanh())
        hidden = add_feed_forward(hidden, self.ff, self.ff_gate.tanh())
        return hidden.to(stream)
