"""How many operations a training step takes, by formula, and how many a GPU can do in a second: for MFU and for plans.

    counter = OperationCounter(model)                        # once, before the model is sharded or compiled
    operations += counter(inputs)                            # of a micro-batch, forward and backward, of this process
    mfu = operations / seconds / peak_flops(device)          # where the peak is known; the same on every process

The rule is that of `benchmarks/_models.py`: matrix products alone, a multiplication and an addition are two. Backwards
a trained matrix costs twice its forward (gradients of its input and of itself), a frozen one that a gradient passes
through once, the frozen tower nothing, attention twice. What is computed without need is no use of the hardware and not
counted: padding, media that a token does not see, and what activation checkpointing computes a second time.

Legend: T tokens of a document, V vision tokens of a frame, R latents, D width.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from flamingo import FlamingoForConditionalGeneration
from flamingo.modeling import decoder_layers, patch_tokens
from flamingo.processing import IGNORED

PEAKS = {
    "A100": 312e12,
    "A800": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10": 125e12,
    "A10G": 70e12,
    "RTX A6000": 154.8e12,
    "H100": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H800": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H20": 148e12,
    "B200": 2250e12,
    "L4": 121e12,
    "L40": 181e12,
    "L40S": 362e12,
    "RTX 6000 Ada": 364e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165e12,
    "RTX 5090": 209e12,
    "MI250X": 383e12,
    "MI300X": 1307e12,
}
"""Operations a second of dense bfloat16 products with float32 sums, by the words in a GPU's name: the makers' figures,
of the variant with the fastest clock where a name has several."""


def peak_flops(device: torch.device | str) -> float | None:
    """What `PEAKS` says of a device, or of a GPU's name; None where it says nothing, as of CPUs."""
    if isinstance(device, torch.device):
        if device.type != "cuda":
            return None
        device = torch.cuda.get_device_name(device)
    named = [words for words in PEAKS if re.search(rf"\b{re.escape(words)}\b", device)]
    return None if "Laptop" in device or not named else PEAKS[max(named, key=len)]


class OperationCounter:
    """Operations of a micro-batch of one model, forward and backward, in the process that computes it.

    Made of the model's modules, and of what trains when it is made. LMs count as dense decoders with full attention: of
    a mixture of experts every expert counts, of a sliding window the whole row.
    """

    def __init__(self, model: FlamingoForConditionalGeneration):
        self.config = config = model.config
        text = config.text_config.get_text_config()
        layers = decoder_layers(model.language_model, config.decoder_layers)
        kinds = getattr(text, "layer_types", None) or ["full_attention"] * len(layers)
        # A gradient goes below the first gated block only where something there trains.
        below = model.new_input_rows.requires_grad or not config.freeze_language
        first = 0 if below else config.cross_attention_every - 1
        passes = [number >= first for number in range(len(layers))]
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        head, blocks, resampler = model.get_output_embeddings(), model.cross_attention, model.resampler
        of_media, of_keys = _named(blocks, "to_kv"), _named(resampler, "to_kv")
        latents, inner = config.resampler_latents, config.cross_attention_heads * config.cross_attention_head_dim

        self._token = sum(_cost(layer, gradient=by) for layer, by in zip(layers, passes, strict=True))
        self._token += _cost(model.language_model, without=[*layers.modules(), head]) + _cost(blocks, without=of_media)
        self._sight = len(blocks) * 3 * 4.0 * latents * inner
        """a token that sees a medium"""
        attends = [1 + 2 * by for kind, by in zip(kinds, passes, strict=True) if "attention" in kind]
        self._pair = sum(attends) * 4.0 * text.num_attention_heads * width
        """a token that sees a token"""
        self._supervised = _cost(head)
        self._medium = latents * (sum(map(_cost, of_media)) + _cost(resampler, without=of_keys))
        self._key = sum(map(_cost, of_keys))
        """a vision token or latent that latents attend to"""
        self._key += config.resampler_depth * 3 * 4.0 * latents * config.resampler_heads * config.resampler_head_dim
        self._tower = cache(partial(tower_operations, type(model.vision_tower), model.vision_tower.config))

    def __call__(self, inputs: Mapping[str, Any]) -> float:
        """Operations of a micro-batch. Call it before the batch is moved to a GPU, which it would wait for.

        Args:
            inputs: `attention_mask` (B, T) or `documents` (B, T), `labels` (B, T), `pixel_values` (N, F, C, H, W), or
                (M, 1, C, H, W) with `media_frames` (N,).
        """
        rows, frames, _, height, width = inputs["pixel_values"].shape
        lengths = _lengths(inputs["documents" if "documents" in inputs else "attention_mask"])
        return self.total(
            documents=len(lengths),
            tokens=int(lengths.sum()),
            pairs=float(lengths.square().sum()) / 2,
            supervised=int((inputs["labels"][:, 1:] != IGNORED).sum()),
            media=len(inputs.get("media_frames", inputs["pixel_values"])),
            frames=rows * frames,
            size=(height, width),
        )

    def total(
        self,
        *,
        documents: float,
        tokens: float,
        pairs: float,
        supervised: float,
        media: float,
        frames: float,
        size: tuple[int, int],
    ) -> float:
        """Operations of so many documents with, in all, so many tokens, supervised tokens, media and their frames.

        Args:
            pairs: of a token and one of its own document that it sees: half the square of each document's length.
            size: height and width of a frame in pixels.
        """
        seen = 1.0 if self.config.media_attention == "previous" else (media / max(documents, 1) + 1) / 2
        total = tokens * (self._token + seen * self._sight) + pairs * self._pair + supervised * self._supervised
        if frames:
            tower, vision_tokens = self._tower(size)
            total += frames * tower * (1 if self.config.freeze_vision else 3) + media * self._medium
            total += (frames * vision_tokens + media * self.config.resampler_latents) * self._key
        return total


def tower_operations(kind: type[PreTrainedModel], config: Any, size: tuple[int, int]) -> tuple[float, int]:
    """Operations of a vision tower's forward over one frame of `size` (height, width), and the tokens that it gives.

    They are counted while a tower without weights runs on the meta device, so that any kind will do.
    """
    with torch.device("meta"), torch.no_grad():
        tower = kind(config).eval()
        if config.model_type == "siglip2_vision_model":  # asks for values of its inputs, which the meta device lacks
            tokens = (size[0] // config.patch_size) * (size[1] // config.patch_size)
            attention = 4.0 * config.num_hidden_layers * tokens**2 * config.hidden_size
            return tokens * sum(forward for forward, _ in _matrices(tower)) + attention, tokens
        with FlopCounterMode(display=False) as counted:
            frame = torch.zeros(1, getattr(config, "num_channels", 3), *size, dtype=tower.dtype)
            tokens = patch_tokens(tower, frame).shape[1]
    return float(counted.get_total_flops()), tokens


def _named(module: nn.Module, name: str) -> list[nn.Module]:
    """The modules within one that have a name."""
    return [each for path, each in module.named_modules() if path.rpartition(".")[2] == name]


def _matrices(module: nn.Module, without: Iterable[nn.Module] = ()) -> Iterator[tuple[float, bool]]:
    """The matrices in a module, but for those of modules `without`: operations forward for a row, whether it trains."""
    left_out = {id(each) for each in without}
    for each in module.modules():
        if id(each) in left_out:
            continue
        if isinstance(each, nn.Linear):  # not the weight's own size: a quantised one is packed
            yield 2.0 * each.in_features * each.out_features, each.weight.requires_grad
        elif isinstance(each, (nn.Conv1d, Conv1D)):
            yield 2.0 * each.weight.numel(), each.weight.requires_grad


def _cost(module: nn.Module, *, without: Iterable[nn.Module] = (), gradient: bool = True) -> float:
    """Operations of a module's matrices for a row, forward and backward; `gradient`: one passes through frozen ones."""
    return sum(forward * (3 if trains else 1 + gradient) for forward, trains in _matrices(module, without))


def _lengths(documents: Tensor) -> Tensor:
    """Tokens of every document: `documents` (B, T) has its number at each token, 0 for padding; a mask is one a row."""
    rows = torch.arange(documents.shape[0], device=documents.device)[:, None] * (int(documents.max()) + 1)
    return torch.bincount((documents + rows)[documents > 0])
