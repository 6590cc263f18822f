"""Which media a text token may see.

Visibility is an interval of media of the token's own sample, `media_first … media_last`, counted from 1; `media_last`
is 0 where the token sees nothing. `<image>` sees its own medium. Text before the first medium sees nothing.

    token           BOS  a    <image> cat  .    <image> dog  <image> <image> fish
    previous first  0    0    1       1    1    2       2    3       4       4
    previous last   0    0    1       1    1    2       2    3       4       4
    all first       0    0    1       1    1    1       1    1       1       1
    all last        0    0    1       1    1    2       2    3       4       4

Under "previous" a token sees the one medium that stands last before it (Flamingo, section 2.3 and appendix A.1.3),
under "all" every medium up to it. In a packed row "all" begins at the first medium of the token's own document, and
text before a document's first medium sees nothing:

    token           a    <image> cat  |    dogs <image> bark <image> run
    document        1    1       1    |    2    2       2    2       2
    previous first  0    1       1    |    0    2       2    3       3
    previous last   0    1       1    |    0    2       2    3       3
    all first       0    1       1    |    0    2       2    2       2
    all last        0    1       1    |    0    2       2    3       3

Legend: B samples, T text tokens, N media of the batch, S media slots a sample (the most of any), R latents, H heads,
C channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor

from flamingo.errors import FlamingoError


def visible_media(
    input_ids: Tensor, image_token_id: int, *, media_attention: str = "previous", documents: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The interval of media that each token may see, from the positions of `<image>`.

    Args:
        input_ids: (B, T).
        image_token_id: id of `<image>`.
        media_attention: "previous" or "all".
        documents: (B, T) number of each token's document in a packed row, not falling; None: one document a row.

    Returns:
        `media_first`, `media_last`, each (B, T) int64: 1-based and inclusive, both 0 where the token sees nothing.
    """
    is_media = input_ids == image_token_id
    last = is_media.long().cumsum(dim=1)
    before = torch.zeros_like(last)  # media that stand before the token's own document
    if documents is not None:
        starts = torch.ones_like(is_media)
        starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
        before = ((last - is_media.long()) * starts).cummax(dim=1).values
    last = last.where(last > before, torch.zeros_like(last))
    first = last if media_attention == "previous" else (before + 1).where(last > 0, last)
    return first, last


@dataclass(frozen=True)
class MediaSlots:
    """Where the flat media of a batch stand in rows of samples: medium n is in slot `index[n]` of B·S slots."""

    index: Tensor
    samples: int
    slots: int

    @staticmethod
    def of(media_per_sample: Tensor) -> MediaSlots:
        """Slots for `media_per_sample` (B,) media, flat and in reading order."""
        samples = media_per_sample.shape[0]
        slots = max(1, int(media_per_sample.max())) if samples else 1
        sample = torch.repeat_interleave(media_per_sample)
        starts = media_per_sample.cumsum(0) - media_per_sample
        order = torch.arange(sample.shape[0], device=sample.device) - starts[sample]
        return MediaSlots(sample * slots + order, samples, slots)

    def spread(self, flat: Tensor) -> Tensor:
        """(N, R, H, C) of the flat media → (B, H, S·R, C), zeros in the slots that no medium fills.

        The tensor takes part in the graph with N = 0 too, so that every parameter of a step gets a gradient.
        """
        rows = flat.new_zeros(self.samples * self.slots, *flat.shape[1:]).index_copy(0, self.index, flat)
        return rearrange(rows, "(b s) r h c -> b h (s r) c", b=self.samples)

    def visible(self, media_first: Tensor, media_last: Tensor, latents: int) -> Tensor:
        """(B, 1, T, S·R) bool: whether token t may attend to latent r of slot s."""
        slot = torch.arange(1, self.slots + 1, device=media_first.device)
        seen = (slot >= media_first[..., None]) & (slot <= media_last[..., None])
        return repeat(seen, "b t s -> b 1 t (s r)", r=latents)


@dataclass(frozen=True)
class MediaMemory:
    """Keys and values of N media for every gated block, so that generation and scoring project each medium once.

    `keys[i]`, `values[i]`: (N, R, H, C) of gated block i.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    def __len__(self) -> int:
        return self.keys[0].shape[0]

    def select(self, index: Tensor) -> MediaMemory:
        """The media at `index` (M,), in that order and with repeats."""
        return MediaMemory(
            tuple(key.index_select(0, index) for key in self.keys),
            tuple(value.index_select(0, index) for value in self.values),
        )

    @staticmethod
    def cat(memories: list[MediaMemory]) -> MediaMemory:
        """The media of several memories, one after the other."""
        if not memories:
            raise FlamingoError("MediaMemory.cat: expected at least one memory")
        return MediaMemory(
            tuple(torch.cat(keys) for keys in zip(*(m.keys for m in memories), strict=True)),
            tuple(torch.cat(values) for values in zip(*(m.values for m in memories), strict=True)),
        )
