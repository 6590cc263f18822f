"""PerceiverResampler: any number of visual tokens → a fixed number of latents a medium.

Flamingo, section 2.2 and figure 5; parameters and order of operations are those of open_flamingo 2.0.1.

Media may differ in their numbers of frames. What is computed token by token then runs over all tokens in one line, and
for attention alone keys and values are put into rows of one length, whose ends no latent sees:

    frames 1, 3, 2   →   a R . .      a … f: the tokens of a frame, R: latents, . : masked
                         b c d R
                         e f R .

Legend: N media, M frames of all media, F frames of a medium, V vision tokens a frame, R latents, K keys of a row, H
heads, C channels of a head, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True)
class RaggedMedia:
    """Where the tokens and latents of media with different numbers of frames stand, as the drawing above has it.

    Attributes:
        order: (M,) number of each frame in its medium, from 0.
        frames: (M,) how many frames its medium has.
        index: (M·V + N·R,) place of each token, then of each latent, in N rows of K keys.
        mask: (N, 1, 1, K) which keys there are.
    """

    order: Tensor
    frames: Tensor
    index: Tensor
    mask: Tensor

    @staticmethod
    def of(media_frames: Tensor, rows: int, vision_tokens: int, latents: int) -> RaggedMedia:
        """For `media_frames` (N,), each at least 1, which add up to `rows`; N is at least 1.

        In a compiled graph, where no shape may depend on values, a row has room for the most frames there could be.
        """
        media = media_frames.shape[0]
        most = rows - media + 1 if torch.compiler.is_compiling() else int(media_frames.max())
        length = most * vision_tokens + latents

        def count(upto: int) -> Tensor:
            return torch.arange(upto, device=media_frames.device)

        medium = torch.repeat_interleave(media_frames, output_size=rows)
        order = count(rows) - (media_frames.cumsum(0) - media_frames)[medium]
        begin, tokens = count(media) * length, media_frames * vision_tokens
        of_tokens = (begin[medium] + order * vision_tokens)[:, None] + count(vision_tokens)
        of_latents = (begin + tokens)[:, None] + count(latents)
        mask = rearrange(count(length) < (tokens + latents)[:, None], "n k -> n 1 1 k")
        return RaggedMedia(order, media_frames[medium], torch.cat((of_tokens.flatten(), of_latents.flatten())), mask)

    def in_rows(self, flat: Tensor) -> Tensor:
        """(M·V + N·R, D) → (N, K, D), zeros where nothing stands."""
        media, length = self.mask.shape[0], self.mask.shape[3]
        # Unlike a gather, index_put adds nothing up in the backward pass, so that it gives the same bits each time.
        rows = flat.new_zeros(media * length, flat.shape[1]).index_put((self.index,), flat)
        return rearrange(rows, "(n k) d -> n k d", n=media)


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

    def forward(self, media: Tensor, latents: Tensor, ragged: RaggedMedia | None = None) -> Tensor:
        """`media` (N, F·V, D), `latents` (N, R, D) → (N, R, D); with `ragged`, `media` is (M·V, D)."""
        media, latents = self.norm_media(media), self.norm_latents(latents)
        query = rearrange(self.to_q(latents), "n r (h c) -> n h r c", h=self.heads)
        if ragged is None:
            key_value = self.to_kv(torch.cat((media, latents), dim=1))
        else:
            key_value = ragged.in_rows(self.to_kv(torch.cat((media, rearrange(latents, "n r d -> (n r) d")))))
        key, value = rearrange(key_value, "n v (two h c) -> two n h v c", two=2, h=self.heads)
        attended = scaled_dot_product_attention(query, key, value, None if ragged is None else ragged.mask)
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

    def forward(self, media: Tensor, media_frames: Tensor | None = None) -> Tensor:
        """`media` (N, F, V, D) → latents (N, R, D); N may be 0.

        Args:
            media_frames: (N,) number of frames of each medium, where these differ, N ≥ 1; `media` is then
                (M, 1, V, D), their frames flat and in order, M = Σ `media_frames`.
        """
        ragged, count = None, media.shape[0]
        if media_frames is not None:
            count = media_frames.shape[0]
            ragged = RaggedMedia.of(media_frames, media.shape[0], media.shape[2], self.latents.shape[0])
        if self.frame_embeddings is not None:
            frames = self._frames(media.shape[1]) if ragged is None else self._ragged_frames(ragged)[:, None]
            media = media + rearrange(frames, "... d -> ... 1 d")
        media = rearrange(media, "n f v d -> n (f v) d" if ragged is None else "m f v d -> (m f v) d")
        latents: Tensor = repeat(self.latents, "r d -> n r d", n=count)
        for layer in self.layers:
            attention, mlp = cast(tuple[PerceiverAttention, nn.Sequential], layer)
            latents = attention(media, latents, ragged) + latents
            latents = add_feed_forward(latents, mlp, media.new_ones(1))
        return self.norm(latents)

    def _frames(self, frames: int) -> Tensor:
        assert self.frame_embeddings is not None
        if frames <= self.frame_embeddings.shape[0]:
            return self.frame_embeddings[:frames]
        learned = rearrange(self.frame_embeddings, "f d -> 1 d f")
        return rearrange(interpolate(learned, size=frames, mode="linear", align_corners=True), "1 d f -> f d")

    def _ragged_frames(self, ragged: RaggedMedia) -> Tensor:
        """(M, D): of every frame what `_frames` gives for the number of frames of its medium."""
        assert self.frame_embeddings is not None
        most = self.frame_embeddings.shape[0]
        longer = ragged.frames > most
        # The place among the learned ones is the fraction place ÷ steps, in integers: whole ones are met exactly.
        place = torch.where(longer, ragged.order * (most - 1), ragged.order)
        steps = torch.where(longer, ragged.frames - 1, 1)
        before = place // steps
        after = (before + 1).clamp(max=most - 1)
        weight = ((place % steps).to(self.frame_embeddings) / steps)[:, None]
        return torch.lerp(self.frame_embeddings[before], self.frame_embeddings[after], weight)
