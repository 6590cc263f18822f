"""The LM's cache of a generation, which a new token does not copy.

Legend: B rows, H heads, T tokens, C channels of a head.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` with room behind its tokens: new ones are written there.

    transformers' own layer joins all tokens anew for each one that comes, and beam search, which reorders rows at each
    step, copies them once more. Here the first pass of a generation, the prompt, is equal in all beams of a sample:
    only what was generated since is reordered.
    """

    keys: Tensor
    values: Tensor
    prompt = 0
    """tokens of the first pass"""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, T, C) of all tokens, with those of the new ones (B, H, T', C) behind."""
        before = self.get_seq_length()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.prompt, self._room = key_states.shape[-2], (self.keys, self.values)
        elif before < self.prompt:  # it was cropped
            self.prompt = before
        rooms = [
            _append(room, held, new)
            for room, held, new in zip(self._room, (self.keys, self.values), (key_states, value_states), strict=True)
        ]
        self._room = (rooms[0], rooms[1])
        self.keys, self.values = (room[:, :, : before + key_states.shape[-2]] for room in rooms)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes row `beam_idx[b]`, another beam of the same sample."""
        if self.get_seq_length() > self.prompt:
            index = beam_idx.to(self.keys.device)
            for held in (self.keys, self.values):
                held[:, :, self.prompt :] = held[:, :, self.prompt :].index_select(0, index)


def _append(room: Tensor, held: Tensor, new: Tensor) -> Tensor:
    """`room` with `new` written behind `held`, or a larger one where it does not fit or `held` lies elsewhere."""
    before = held.shape[-2] if held.numel() else 0
    after = before + new.shape[-2]
    fits = room.numel() and room.data_ptr() == held.data_ptr() and room.shape[-2] >= after
    if not fits or room.stride() != held.stride():
        room = new.new_empty(*new.shape[:2], after + after // 8 + 256, new.shape[-1])
        if before:
            room[:, :, :before] = held
    room[:, :, before:after] = new
    return room


def with_room(cache: Any) -> Any:
    """The cache that transformers made for a generation, its plain layers replaced by growing ones."""
    if isinstance(cache, DynamicCache) and not cache.offloading:
        cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
