"""How fast does a training step go, and how much memory does it take, beside open_flamingo's own?

    python benchmarks/training_step.py [--quick] [--json FILE] [--shape 3b --device cuda --dtype bfloat16 --peak TFLOPS]

Eight sequences like those of MMC4, of 256 tokens with 1 to 6 images (3 on average). Both sides start from the same
weights, get the same sequences, train the same tensors by the same rule (open_flamingo's: AdamW, decay for the gated
blocks alone, gradients clipped at 1) and take steps in turn, each in a process of its own. Ours is fed flat
images; open_flamingo is fed as its loader feeds it, with images padded to 6 a sample, and trains as its trainer does,
with a masked gradient of the whole embedding. Ours once more, at the end, with activation checkpointing, which computes
the LM's layers and the gated blocks a second time instead of keeping what is in them.

Floors are the operations of the matrix products, counted by formula, over the peak that one large product reaches, by
the kernel that the side takes (ours: `flamingo.products`; the ratio of the peaks is what that gives by itself). Of
attention to media, ours counts what is needed, the one image that a token sees; open_flamingo's counts the 6 that it
computes and masks.
"""

from __future__ import annotations

import argparse
import resource
import sys
from statistics import median
from typing import Any

import torch
from _models import SIDES, Place, Worker, in_turn, interleaved, operations, padded, pictures
from _record import publish
from torch import nn

from flamingo.products import product

COUNTS = (1, 2, 2, 3, 3, 3, 4, 6)
"""images of each sequence"""
TOKENS = 256
PADDED = 6
"""images to which open_flamingo's loader pads (its --mmc4_max_num_images)"""


class Trainee:
    """One side: a model, its optimizer, a batch."""

    def __init__(self, name: str, place: Place, tokens: int, checkpointed: bool = False):
        self.place, self.peer = place, name == "open_flamingo"
        self.model = SIDES[name](place).train()
        if checkpointed:
            self.model.activation_checkpointing_enable()
        self.parameters: dict[str, nn.Parameter] = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        decayed = [p for n, p in self.parameters.items() if "cross_attention" in n or "gated_cross_attn" in n]
        others = [p for p in self.parameters.values() if all(p is not each for each in decayed)]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        # Each as its own trainer has it: `train.optim` takes the fused kernel, open_flamingo's the default.
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=None if self.peer else True)
        self.load(COUNTS, tokens)

    def load(self, counts: tuple[int, ...], tokens: int) -> None:
        """Make the batch that the next steps train on."""
        shape = self.place.shape
        ids, labels = interleaved(shape, counts, tokens)
        pixels = pictures(shape, sum(counts))
        fields: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "labels": labels}
        if self.peer:
            fields |= {"lang_x": ids, "vision_x": padded(pixels, counts, PADDED)}
        else:
            fields |= {"input_ids": ids, "pixel_values": pixels[:, None], "media_per_sample": torch.tensor(counts)}
        self.batch = {name: value.to(self.place.device) for name, value in fields.items()}

    def trained(self) -> int:
        """Number of weights that train; of open_flamingo's embedding the two rows that its mask leaves."""
        embedding = self.model.lang_encoder.get_input_embeddings().weight if self.peer else None
        return sum(2 * p.shape[1] if p is embedding else p.numel() for p in self.parameters.values())

    @torch.no_grad()
    def loss(self) -> float:
        """Without dropout."""
        self.model.eval()
        with self.place.autocast():
            loss = self.model(**self.batch).loss
        self.model.train()
        return float(loss)

    def step(self) -> float:
        """Seconds of forward, backward and update."""
        return self.place.seconds(self._step)

    def _step(self) -> None:
        with self.place.autocast():
            loss = self.model(**self.batch).loss
        loss.backward()
        if self.peer:
            shape = self.place.shape
            embedding = self.model.lang_encoder.get_input_embeddings().weight
            mask = torch.zeros_like(embedding.grad)
            mask[[shape.end_of_chunk, shape.image_token]] = 1
            embedding.grad = embedding.grad * mask
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def peak_memory(self) -> int:
        """Bytes: of the process, or of the accelerator."""
        if self.place.device != "cpu":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def profile(self) -> list[str]:
        """The operators in which a step spends most time, with their share of it."""
        with torch.profiler.profile() as profiler:
            self.step()
        events = profiler.key_averages()
        if self.place.device == "cpu":
            seconds = {event.key: event.self_cpu_time_total for event in events}
        else:
            seconds = {event.key: event.self_device_time_total for event in events}
        top = sorted(seconds, key=lambda key: -seconds[key])[:5]
        return [f"{key} {seconds[key] / sum(seconds.values()):.0%}" for key in top]

    def matmul_peak(self) -> float:
        """Operations a second, in this process, of the product that this side takes."""
        return self.place.matmul_peak(torch.matmul if self.peer else product)


def main() -> None:
    """Run, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    Place.add_options(parser)
    parser.add_argument("--steps", type=int, help="timed steps of each side (default 5; --quick: 2)")
    parser.add_argument("--peak", type=float, help="the maker's peak in TFLOP/s, for MFU")
    options = parser.parse_args()
    place, rounds = Place.of(options), options.steps or (2 if options.quick else 5)
    tokens = TOKENS // 4 if options.quick else TOKENS
    sides = {name: Worker(Trainee, name=name, place=place, tokens=tokens) for name in ("ours", "open_flamingo")}
    figures: dict[str, float | str] = {}

    trained = {name: side("trained") for name, side in sides.items()}
    losses = {name: side("loss") for name, side in sides.items()}
    figures.update({f"trained weights {name}": str(number) for name, number in trained.items()})
    figures.update({f"loss {name}": value for name, value in losses.items()})
    nearly = torch.finfo(place.dtype).eps ** 0.75
    if len(set(trained.values())) > 1 or abs(losses["ours"] / losses["open_flamingo"] - 1) > nearly:
        raise SystemExit(f"the sides do not do the same: weights that train {trained}, losses {losses}")

    in_turn(sides, 1, "step")  # warm-up
    seconds = {name: median(each) for name, each in in_turn(sides, rounds, "step").items()}
    memory = {name: side("peak_memory") for name, side in sides.items()}
    peaks = {name: side("matmul_peak") for name, side in sides.items()}
    _, labels = interleaved(place.shape, COUNTS, tokens)
    supervised, text = int((labels[:, 1:] >= 0).sum()), labels.numel()
    common = {"samples": len(COUNTS), "tokens": tokens}
    counted = {
        "ours": operations(place.shape, **common, media=sum(COUNTS), visible=1, logits=supervised, head_trains=False),
        "open_flamingo": operations(
            place.shape, **common, media=PADDED * len(COUNTS), visible=PADDED, logits=text, head_trains=True
        ),
    }
    figures["supervised share"] = supervised / text
    for name, parts in counted.items():
        total, peak = sum(map(sum, parts.values())), peaks[name]
        figures[f"matmul peak GFLOP/s {name}"] = peak / 1e9
        figures[f"step seconds {name}"] = seconds[name]
        figures[f"tokens/s {name}"] = text / seconds[name]
        figures[f"peak memory GB {name}"] = memory[name] / 1e9
        for part, (forward, backward) in parts.items():
            figures[f"TFLOP {name} {part}"] = f"{forward / 1e12:.4g} forward, {backward / 1e12:.4g} backward"
        figures[f"TFLOP {name}"] = total / 1e12
        figures[f"floor seconds {name}"] = total / peak
        figures[f"share of floor {name}"] = total / peak / seconds[name]
        figures[f"TFLOP/s {name}"] = total / seconds[name] / 1e12
        if options.peak:
            figures[f"MFU {name}"] = total / seconds[name] / 1e12 / options.peak
    for rank, line in enumerate(sides["ours"]("profile"), 1):
        figures[f"profile {rank}"] = line
    for images, length in [(1, tokens), (3, tokens), (6, tokens), (3, tokens // 2)]:
        sides["ours"]("load", (images,) * len(COUNTS), length)
        sides["ours"]("step")
        figures[f"step seconds ours, {images} images, {length} tokens"] = sides["ours"]("step")
    figures["ratio tokens_per_second vs open_flamingo"] = seconds["open_flamingo"] / seconds["ours"]
    figures["ratio peak_memory vs open_flamingo"] = memory["open_flamingo"] / memory["ours"]
    for side in sides.values():
        side.close()
    # After the others, since all three together do not fit into the memory of a laptop.
    checkpointed = Worker(Trainee, name="ours", place=place, tokens=tokens, checkpointed=True)
    in_turn({"ours": checkpointed}, 1, "step")
    figures["step seconds ours, checkpointed"] = median(in_turn({"ours": checkpointed}, rounds, "step")["ours"])
    figures["peak memory GB ours, checkpointed"] = checkpointed("peak_memory") / 1e9
    figures["ratio tokens_per_second_checkpointed vs open_flamingo"] = (
        seconds["open_flamingo"] / figures["step seconds ours, checkpointed"]
    )
    figures["ratio peak_memory_checkpointed vs open_flamingo"] = (
        memory["open_flamingo"] / 1e9 / figures["peak memory GB ours, checkpointed"]
    )
    checkpointed.close()
    publish(figures, options.json)


if __name__ == "__main__":
    main()
