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

In training a sequence may be read with each text belonging to the medium that comes next, because on web pages texts
stand before their pictures as well as after them (Flamingo, appendix on M3W; drawn with probability ½ by the sequence
builder, never by the model). Text after the last medium of its document then sees nothing:

    token           BOS  a    <image> cat  .    <image> dog  |    saw  <image> fish
    document        1    1    1       1    1    1       1    |    2    2       2
    next first      1    1    1       2    2    2       0    |    3    3       0
    next last       1    1    1       2    2    2       0    |    3    3       0

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
        media_attention: "previous", "all", or, in training, "next".
        documents: (B, T) number of each token's document in a packed row, not falling; None: one document a row.

    Returns:
        `media_first`, `media_last`, each (B, T) int64: 1-based and inclusive, both 0 where the token sees nothing.

    Raises:
        FlamingoError: where `media_attention` is none of these.
    """
    if media_attention not in ("previous", "all", "next"):
        raise FlamingoError(f"media_attention={media_attention!r}: expected previous, all or next")
    is_media = input_ids == image_token_id
    seen = is_media.long().cumsum(dim=1)
    starts = torch.zeros_like(is_media)
    starts[:, :1] = True
    if documents is not None:
        starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    # Media that stand before the token's own document.
    before = ((seen - is_media.long()) * starts).cummax(dim=1).values
    if media_attention == "next":
        ends = starts.roll(-1, dims=1)
        ends[:, -1:] = True
        # Media up to the end of the token's own document: the least over the ends that are still to come.
        through = torch.where(ends, seen, seen.shape[1] + 1).flip(1).cummin(dim=1).values.flip(1)
        coming = seen + (~is_media).long()
        coming = coming.where(coming <= through, torch.zeros_like(coming))
        return coming, coming
    last = seen.where(seen > before, torch.zeros_like(seen))
    first = last if media_attention == "previous" else (before + 1).where(last > 0, last)
    return first, last


@dataclass(frozen=True)
class MediaSlots:
    """Where the flat media of a batch stand in rows of samples: medium n is in slot `index[n]` of B·S slots."""

    index: Tensor
    samples: int
    slots: int

    @staticmethod
    def of(media_per_sample: Tensor, media: int, most: int | None = None) -> MediaSlots:
        """Slots for `media_per_sample` (B,), which add up to `media`, flat and in reading order.

        Args:
            most: the most media of a sample, where it is known. Else it is asked for, except in a compiled graph,
                where no shape may depend on values: there each sample gets a slot for every medium.
        """
        samples = media_per_sample.shape[0]
        if most is None:
            most = media if torch.compiler.is_compiling() or not samples else int(media_per_sample.max())
        sample = torch.repeat_interleave(media_per_sample, output_size=media)
        starts = media_per_sample.cumsum(0) - media_per_sample
        order = torch.arange(media, device=sample.device) - starts[sample]
        return MediaSlots(sample * max(1, most) + order, samples, max(1, most))

    def spread(self, flat: Tensor) -> Tensor:
        """(N, R, H, C) of the flat media → (B, H, S·R, C), zeros in the slots that no medium fills.

        The tensor takes part in the graph with N = 0 too, so that every parameter of a step gets a gradient.
        """
        rows = flat
        if flat.shape[0] != self.samples * self.slots:
            # Unlike index_copy, index_put does not keep `flat` for the backward pass.
            rows = flat.new_zeros(self.samples * self.slots, *flat.shape[1:])
            rows = rows.index_put((self.index.to(flat.device),), flat)
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
            tuple(key.index_select(0, index.to(key.device)) for key in self.keys),
            tuple(value.index_select(0, index.to(value.device)) for value in self.values),
        )

    def contiguous(self) -> MediaMemory:
        """The same with (H, R) in the order in which attention reads them, so that no pass copies them."""

        def by_head(flat: Tensor) -> Tensor:
            return flat.transpose(1, 2).contiguous().transpose(1, 2)

        return MediaMemory(tuple(map(by_head, self.keys)), tuple(map(by_head, self.values)))

    @staticmethod
    def cat(memories: list[MediaMemory]) -> MediaMemory:
        """The media of several memories, one after the other."""
        if not memories:
            raise FlamingoError("MediaMemory.cat: expected at least one memory")
        return MediaMemory(
            tuple(torch.cat(keys) for keys in zip(*(m.keys for m in memories), strict=True)),
            tuple(torch.cat(values) for values in zip(*(m.values for m in memories), strict=True)),
        )
