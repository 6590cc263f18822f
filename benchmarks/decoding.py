"""How fast are tokens generated after eight images, beside open_flamingo and Idefics?

    python benchmarks/decoding.py [--quick] [--json FILE] [--shape 3b --device cuda --dtype bfloat16]

A prompt of eight chunks of 16 tokens, an image in each; every side makes exactly 64 tokens, in turn, each in a process
of its own. Seconds a token are the time from the first token to the last, over 63: the encoding of prompt and images is
not in them. `ratio decoding_…` compares those; `ratio generation_…` compares the time of all 64, encoding included.
Ours and open_flamingo have equal weights: greedily they must make the same tokens, but for near ties.

The floor of a token is what must be read for it (weights, the LM's cache, the visible media's keys and values) over
the rate at which a matrix-vector product reads memory.
"""

from __future__ import annotations

import argparse
from statistics import median
from typing import Any

import torch
from _models import BETWEEN, INNER, SIDES, Place, Worker, in_turn, padded, pictures, prompt
from _record import publish
from einops import repeat
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

IMAGES = 8
NEW = 64
SETTINGS = {"batch1": (1, 1), "batch8": (8, 1), "beams3": (1, 3)}
"""samples and beams"""


class _Clock(LogitsProcessor):
    """Notes when each token's logits are there."""

    def __init__(self, place: Place):
        self.place = place
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.times.append(self.place.now())
        return scores


class Decoder:
    """One side in evaluation, with all of its weights in the precision asked for."""

    def __init__(self, name: str, place: Place):
        self.name, self.place = name, place
        self.model = SIDES[name](place).eval().to(place.dtype)

    def generate(self, samples: int, beams: int, chunks: int, images: int) -> tuple[float, float, Tensor]:
        """Seconds of `NEW` tokens, seconds a token, and the tokens, after a prompt of `chunks`, some with an image."""
        shape = self.place.shape
        ids = prompt(shape, samples, chunks, images)
        pixels = pictures(shape, samples * images)
        counts = (images,) * samples
        if self.name == "ours":
            fields = {"input_ids": ids, "pixel_values": pixels[:, None]}
        elif self.name == "open_flamingo":
            fields = {"lang_x": ids, "vision_x": padded(pixels, counts, images)}
        else:
            seen = (ids == shape.image_token).cumsum(dim=1)  # a token sees the last image before it
            number = repeat(torch.arange(1, images + 1), "n -> b 1 n", b=samples)
            fields = {
                "input_ids": ids,
                "pixel_values": padded(pixels, counts, images)[:, :, 0],
                "image_attention_mask": (seen[..., None] == number).long(),
            }
        fields = {
            key: value.to(self.place.device, self.place.dtype if value.is_floating_point() else None)
            for key, value in {**fields, "attention_mask": torch.ones_like(ids)}.items()
        }
        clock = _Clock(self.place)
        options: dict[str, Any] = {
            "logits_processor": LogitsProcessorList([clock]),
            "num_beams": beams,
            "min_new_tokens": NEW,
            "max_new_tokens": NEW,
            "do_sample": False,
            "suppress_tokens": [shape.image_token],  # to open_flamingo an image that is generated is one it must have
            "eos_token_id": shape.end_of_chunk,
            "pad_token_id": 1,
        }
        start = self.place.now()
        with torch.inference_mode():
            made = self.model.generate(**fields, **options)
        seconds = self.place.now() - start
        if made.shape != (samples, ids.shape[1] + NEW) or len(clock.times) != NEW:
            raise RuntimeError(f"{self.name}: expected {NEW} new tokens, got a result of {tuple(made.shape)}")
        return seconds, (clock.times[-1] - clock.times[0]) / (NEW - 1), made[:, -NEW:].cpu()

    def weight_bytes(self) -> int:
        """Bytes of the weights that a token of ours is computed with: LM, head and gated blocks."""
        read = [
            parameter
            for name, parameter in self.model.named_parameters()
            if name.startswith(("language_model", "cross_attention"))
            and "embed_positions" not in name  # one row of it
            and "to_kv" not in name  # once per image
        ]
        return sum(parameter.numel() * parameter.element_size() for parameter in read)

    def bandwidth(self) -> float:
        """Bytes a second, in this process."""
        return self.place.bandwidth()


def main() -> None:
    """Run, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    Place.add_options(parser)
    parser.add_argument("--runs", type=int, help="of each side and setting (default 3; --quick: 1)")
    options = parser.parse_args()
    place, rounds = Place.of(options), options.runs or (1 if options.quick else 3)
    sides = {name: Worker(Decoder, name=name, place=place) for name in SIDES}
    ours = sides["ours"]
    figures: dict[str, float | str] = {}

    in_turn(sides, 1, "generate", 1, 1, IMAGES, 1)  # warm-up
    shape, bandwidth, weights = place.shape, ours("bandwidth"), ours("weight_bytes")
    figures["memory bandwidth GB/s"] = bandwidth / 1e9
    figures["weights read MB a token ours"] = weights / 1e6
    for setting, (samples, beams) in SETTINGS.items():
        peers = {name: side for name, side in sides.items() if name != "idefics" or setting == "batch8"}
        runs = in_turn(peers, rounds, "generate", samples, beams, IMAGES, IMAGES)
        whole = {name: median(run[0] for run in each) for name, each in runs.items()}
        token = {name: median(run[1] for run in each) for name, each in runs.items()}
        for name in peers:
            figures[f"{setting} seconds a token {name}"] = token[name]
            figures[f"{setting} seconds of {NEW} tokens {name}"] = whole[name]
        same = (runs["ours"][0][2] == runs["open_flamingo"][0][2]).float().mean()
        figures[f"{setting} share of tokens equal to open_flamingo's"] = float(same)
        context = 16 * IMAGES + NEW / 2  # tokens that stand in the cache, on average
        entries = 2 * shape.layers * (context * shape.width + BETWEEN.resampler_latents * INNER)
        cached = samples * beams * entries * torch.finfo(place.dtype).bits / 8
        floor = (weights + cached) / bandwidth
        figures[f"{setting} cache read MB a token ours"] = cached / 1e6
        figures[f"{setting} floor seconds a token ours"] = floor
        figures[f"{setting} share of floor ours"] = floor / token["ours"]
        for peer in peers.keys() - {"ours"}:
            figures[f"ratio decoding_{setting} vs {peer}"] = token[peer] / token["ours"]
            figures[f"ratio generation_{setting} vs {peer}"] = whole[peer] / whole["ours"]
    for images in (1, 4, 8, 16):  # in one and the same text, so that only their number changes
        runs = in_turn({"ours": ours}, rounds, "generate", *SETTINGS["batch8"], 16, images)
        figures[f"batch8 seconds a token ours, {images} images"] = median(run[1] for run in runs["ours"])
    for side in sides.values():
        side.close()
    publish(figures, options.json)


if __name__ == "__main__":
    main()
