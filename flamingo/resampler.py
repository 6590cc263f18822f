"""PerceiverResampler: any number of visual tokens → a fixed number of latents a medium.

Flamingo, section 2.2 and figure 5; parameters and order of operations are those of open_flamingo 2.0.1.
Legend: N media, F frames, V vision tokens a frame, R latents, H heads, C channels of a head, D width.
"""

from __future__ import annotations

from typing import cast

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn.functional import interpolate, scaled_dot_product_attention
from transformers import initialization as init

from flamingo.lean import add_feed_forward


def feed_forward(width: int, mult: int) -> nn.Sequential:
    """LayerNorm → linear → GELU → linear, without biases but the norm's."""
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, width * mult, bias=False),
        nn.GELU(),
        nn.Linear(width * mult, width, bias=False),
    )


class PerceiverAttention(nn.Module):
    """Latents attend to the media's tokens and to themselves."""

    def __init__(self, width: int, heads: int, head_dim: int):
        super().__init__()
        self.heads = heads
        self.norm_media = nn.LayerNorm(width)
        self.norm_latents = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(width, 2 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, width, bias=False)

    def forward(self, media: Tensor, latents: Tensor) -> Tensor:
        """`media` (N, F·V, D), `latents` (N, R, D) → (N, R, D)."""
        media, latents = self.norm_media(media), self.norm_latents(latents)
        query = rearrange(self.to_q(latents), "n r (h c) -> n h r c", h=self.heads)
        key_value = self.to_kv(torch.cat((media, latents), dim=1))
        key, value = rearrange(key_value, "n v (two h c) -> two n h v c", two=2, h=self.heads)
        attended = scaled_dot_product_attention(query, key, value)
        return self.to_out(rearrange(attended, "n h r c -> n r (h c)"))


class PerceiverResampler(nn.Module):
    """The resampler: `depth` layers of attention and feed-forward over `latents` learned queries.

    With `max_frames` > 0 every frame gets a learned embedding; more frames than that share linearly interpolated ones
    (section 2.2: temporal embeddings are interpolated at test time).
    """

    def __init__(
        self,
        width: int,
        *,
        depth: int = 6,
        latents: int = 64,
        heads: int = 8,
        head_dim: int = 64,
        ff_mult: int = 4,
        max_frames: int = 0,
    ):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(latents, width))
        self.frame_embeddings = nn.Parameter(torch.randn(max_frames, width)) if max_frames else None
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(width, heads, head_dim), feed_forward(width, ff_mult)])
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)

    def reset_parameters(self) -> None:
        """Draw the bare parameters anew, for models that Hugging Face builds without storage."""
        init.normal_(self.latents)
        if self.frame_embeddings is not None:
            init.normal_(self.frame_embeddings)

    def forward(self, media: Tensor) -> Tensor:
        """`media` (N, F, V, D) → latents (N, R, D); N may be 0."""
        if self.frame_embeddings is not None:
            media = media + rearrange(self._frames(media.shape[1]), "f d -> f 1 d")
        media = rearrange(media, "n f v d -> n (f v) d")
        latents: Tensor = repeat(self.latents, "r d -> n r d", n=media.shape[0])
        for layer in self.layers:
            attention, mlp = cast(tuple[PerceiverAttention, nn.Sequential], layer)
            latents = attention(media, latents) + latents
            latents = add_feed_forward(latents, mlp, media.new_ones(1))
        return self.norm(latents)

    def _frames(self, frames: int) -> Tensor:
        assert self.frame_embeddings is not None
        if frames <= self.frame_embeddings.shape[0]:
            return self.frame_embeddings[:frames]
        learned = rearrange(self.frame_embeddings, "f d -> 1 d f")
        return rearrange(interpolate(learned, size=frames, mode="linear", align_corners=True), "1 d f -> f d")
