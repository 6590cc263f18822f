"""The models that benchmarks compare, of equal shape and with equal random weights, what they are fed, and floors.

Each side lives in a process of its own (`Worker`), so that its peak memory is its own, and only one computes at a time.

Legend: B samples, T text tokens, N media, R latents.
"""

from __future__ import annotations

import argparse
import atexit
import multiprocessing
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from einops import rearrange
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import (
    AutoModelForCausalLM,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    OPTConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from flamingo import FlamingoConfig
from flamingo.backbones import assemble
from flamingo.processing import IGNORED, FlamingoProcessor
from flamingo.products import fast_products
from icl_eval.peers.open_flamingo import build

MLP = 4
"""width of the backbones' feed-forwards, in widths of their streams: of OPT and CLIP alike"""


@dataclass(frozen=True)
class Shape:
    """An OPT and a CLIP vision tower: widths, layers, heads; images and patches in pixels."""

    width: int
    layers: int
    heads: int
    words: int
    """ids that the tokenizer knows; the two new tokens follow"""
    rows: int
    """of the LM's embedding, which OPT pads"""
    vision_width: int
    vision_layers: int
    vision_heads: int
    image: int
    patch: int

    @property
    def end_of_chunk(self) -> int:
        """Id of `<|endofchunk|>`."""
        return self.words

    @property
    def image_token(self) -> int:
        """Id of `<image>`."""
        return self.words + 1

    @property
    def patches(self) -> int:
        """Patch tokens an image."""
        return (self.image // self.patch) ** 2


SHAPES = {
    "tiny": Shape(64, 2, 2, 500, 512, 64, 2, 2, 32, 8),
    "125m": Shape(768, 12, 12, 50265, 50272, 768, 12, 12, 224, 32),  # OPT-125M, CLIP ViT-B/32
    "3b": Shape(2048, 24, 32, 50265, 50272, 1024, 24, 16, 224, 14),  # OPT-1.3B, CLIP ViT-L/14
}
BETWEEN = FlamingoConfig()
"""The shape of what stands between the backbones: the defaults, which open_flamingo has as constants."""
INNER = BETWEEN.cross_attention_heads * BETWEEN.cross_attention_head_dim


@dataclass(frozen=True)
class Place:
    """Which shape is built, where it computes and how precisely."""

    shape: Shape
    device: str
    dtype: torch.dtype

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        """The command line of a benchmark."""
        parser.add_argument("--quick", action="store_true", help="tiny shapes, few rounds: shows that it runs")
        parser.add_argument("--json", help="where to keep the results")
        parser.add_argument("--shape", choices=sorted(SHAPES), default="125m")
        parser.add_argument("--device", default="cpu", help="cpu or cuda")
        parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")

    @staticmethod
    def of(options: argparse.Namespace) -> Place:
        """As the command line says."""
        shape = SHAPES["tiny" if options.quick else options.shape]
        return Place(shape, options.device, getattr(torch, options.dtype))

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision over float32 weights, as open_flamingo's `amp_bfloat16`; none for float32."""
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device, self.dtype)

    def now(self) -> float:
        """The time in seconds, after what was left to the device."""
        if self.device != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    def seconds(self, work: Callable[[], object]) -> float:
        """How long `work` takes."""
        start = self.now()
        work()
        return self.now() - start

    def matmul_peak(self, multiply: Callable[[Tensor, Tensor], Tensor] = torch.matmul) -> float:
        """Operations a second of one large matrix product: the best of ten."""
        size = 2048 if self.device == "cpu" else 8192
        left, right = torch.randn(2, size, size, device=self.device, dtype=self.dtype)
        return 2 * size**3 / min(self.seconds(lambda: multiply(left, right)) for _ in range(10))

    def bandwidth(self) -> float:
        """Bytes a second at which a matrix-vector product reads weights too large for any cache: the best of ten."""
        matrix = torch.randn(16384, 8192, device=self.device, dtype=self.dtype)
        vector = torch.randn(1, 8192, device=self.device, dtype=self.dtype)
        with torch.no_grad(), fast_products():
            seconds = min(self.seconds(lambda: linear(vector, matrix)) for _ in range(10))
        return matrix.numel() * matrix.element_size() / seconds


# -- the sides ---------------------------------------------------------------------------------------------------------


def backbones(shape: Shape) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Vision tower and LM, the same weights at every call; dropout as OPT has it."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=shape.vision_width,
        intermediate_size=MLP * shape.vision_width,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=shape.vision_heads,
        image_size=shape.image,
        patch_size=shape.patch,
    )
    language = OPTConfig(
        vocab_size=shape.rows,
        hidden_size=shape.width,
        word_embed_proj_dim=shape.width,
        ffn_dim=MLP * shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
    )
    return CLIPVisionModel(vision), AutoModelForCausalLM.from_config(language)


def ours(place: Place) -> PreTrainedModel:
    """Flamingo over the backbones, which are kept in `place.dtype`; what trains is float32."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(place.shape.words)}, unk_token="w3"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w2", eos_token="w2", pad_token="w1")
    return ours_with(place, tokenizer)[0]


def ours_with(place: Place, tokenizer: PreTrainedTokenizerFast) -> tuple[PreTrainedModel, FlamingoProcessor]:
    """As `ours`, with a processor; the tokenizer knows `place.shape.words` tokens."""
    shape = place.shape
    tower, lm = backbones(shape)
    size = {"height": shape.image, "width": shape.image}
    images = CLIPImageProcessorPil(size=size, crop_size=size)
    model, processor = assemble(
        tower.to(place.dtype), lm.to(place.dtype), images, tokenizer, open_flamingo_compatible=True
    )
    _draw([model.resampler, *model.cross_attention])
    with torch.no_grad():
        model.new_input_rows.copy_(_new_rows(shape))
    return model.to(place.device), processor


def open_flamingo(place: Place) -> nn.Module:
    """open_flamingo's `Flamingo` over the backbones, put together and frozen as its own factory does."""
    return open_flamingo_over(place, *backbones(place.shape))


def open_flamingo_over(place: Place, tower: PreTrainedModel, lm: PreTrainedModel) -> nn.Module:
    """As `open_flamingo`, over backbones of that shape."""
    shape = place.shape
    model = build(
        tower,
        lm,
        tokens=shape.image_token + 1,
        end_of_chunk_token_id=shape.end_of_chunk,
        image_token_id=shape.image_token,
    )
    lm = model.lang_encoder
    _draw([model.perceiver, *lm.gated_cross_attn_layers])
    with torch.no_grad():
        lm.get_input_embeddings().weight[shape.end_of_chunk : shape.image_token + 1] = _new_rows(shape)
    return model.to(place.device)


@torch.no_grad()
def _draw(parts: list[nn.Module]) -> None:
    """Weights of what trains, by the names that ours and open_flamingo's share; gates open, so that media matter."""
    generator = torch.Generator().manual_seed(0)
    for part in parts:
        for name, parameter in sorted(part.named_parameters()):
            if name.endswith("gate"):
                parameter.fill_(0.5)
            elif parameter.ndim > 1:
                parameter.normal_(std=0.02, generator=generator)


def _new_rows(shape: Shape) -> Tensor:
    return 0.02 * torch.randn(2, shape.width, generator=torch.Generator().manual_seed(1))


def idefics(place: Place) -> PreTrainedModel:
    """transformers' Idefics of equal shape, as far as its configuration goes.

    Its decoder is a Llama's, whose feed-forwards have three matrices: at two thirds of OPT's width, they hold as much.
    """
    shape = place.shape
    torch.manual_seed(0)
    config = IdeficsConfig(
        vocab_size=shape.rows,
        hidden_size=shape.width,
        intermediate_size=2 * MLP * shape.width // 3,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        cross_layer_interval=1,
        use_resampler=True,
        alpha_initializer="ones",
        vision_config={
            "embed_dim": shape.vision_width,
            "intermediate_size": MLP * shape.vision_width,
            "num_hidden_layers": shape.vision_layers,
            "num_attention_heads": shape.vision_heads,
            "image_size": shape.image,
            "patch_size": shape.patch,
        },
        perceiver_config={
            "use_resampler": True,
            "resampler_n_latents": BETWEEN.resampler_latents,
            "resampler_depth": BETWEEN.resampler_depth,
            "resampler_n_heads": BETWEEN.resampler_heads,
            "resampler_head_dim": BETWEEN.resampler_head_dim,
        },
    )
    return IdeficsForVisionText2Text(config).to(place.device)


SIDES: dict[str, Callable[[Place], nn.Module]] = {"ours": ours, "open_flamingo": open_flamingo, "idefics": idefics}


# -- what they are fed -------------------------------------------------------------------------------------------------


def pictures(shape: Shape, media: int) -> Tensor:
    """(N, 3, H, W) random pixels."""
    generator = torch.Generator().manual_seed(media)
    return torch.randn(media, 3, shape.image, shape.image, generator=generator)


def padded(pixels: Tensor, counts: tuple[int, ...], media: int) -> Tensor:
    """(N, 3, H, W) → (B, `media`, 1, 3, H, W), as open_flamingo's loader pads a sample's images: with zeros."""
    filled = pixels.new_zeros(len(counts), media, *pixels.shape[1:])
    for row, sample in zip(filled, pixels.split(counts), strict=True):
        row[: len(sample)] = sample
    return rearrange(filled, "b n c h w -> b n 1 c h w")


def interleaved(shape: Shape, counts: tuple[int, ...], tokens: int) -> tuple[Tensor, Tensor]:
    """`input_ids`, `labels` (B, T) of sequences like those of MMC4, cut at `tokens`: a sample of 16 sentences each.

    Before `counts[b]` of them, drawn at random, stands an image, which closes the chunk before it. Labels as
    open_flamingo's trainer makes them: no loss before the first image, on `<image>`, and after `<|endofchunk|>`.
    """
    generator = torch.Generator().manual_seed(tokens)
    input_ids = torch.randint(4, shape.words, (len(counts), tokens), generator=generator)
    for row, media in zip(input_ids, counts, strict=True):
        places = 1 + tokens // 16 * torch.randperm(16, generator=generator)[:media].sort().values
        row[places] = shape.image_token
        row[places[1:] - 1] = shape.end_of_chunk
    place = torch.arange(1, tokens + 1)
    image, end = input_ids == shape.image_token, input_ids == shape.end_of_chunk
    last_image, last_end = (torch.where(mark, place, 0).cummax(dim=1).values for mark in (image, end))
    in_chunk = last_image > torch.where(end, 0, last_end)
    return input_ids, input_ids.where(in_chunk & ~image | end & (last_image > 0), IGNORED)


def prompt(shape: Shape, samples: int, chunks: int, media: int) -> Tensor:
    """(B, T) a prompt of chunks of 16 tokens each, the last one still open; `media` of them, evenly, have an image."""
    generator = torch.Generator().manual_seed(chunks)
    input_ids = torch.randint(4, shape.words, (samples, 16 * chunks), generator=generator)
    input_ids[:, :: 16 * (chunks // media)] = shape.image_token
    input_ids[:, 15:-1:16] = shape.end_of_chunk
    return input_ids


# -- floors ------------------------------------------------------------------------------------------------------------


def operations(
    shape: Shape, *, samples: int, tokens: int, media: int, visible: int, logits: int, head_trains: bool
) -> dict[str, tuple[float, float]]:
    """Operations (forward, backward) of one training step, a part each; a multiplication and an addition are two.

    Matrix products alone. Backwards a trained matrix costs twice its forward (gradients of its input and of itself), a
    frozen one once, and attention twice.

    Args:
        shape: of the backbones.
        samples, tokens: B and T.
        media: images that are encoded.
        visible: images whose latents a token's attention is computed over.
        logits: positions that get logits.
        head_trains: whether the whole head, which is the embedding, gets a gradient.
    """
    latents, text = BETWEEN.resampler_latents, samples * tokens
    width, seen = shape.vision_width, shape.patches + 1

    def linear(rows: int, *sizes: int) -> float:
        return 2.0 * rows * sum(a * b for a, b in pairwise(sizes))

    def layer(rows: int, keys: float, width: int) -> tuple[float, float]:
        """A backbone's layer: its matrices (query, key, value, output and feed-forward), and its attention."""
        return linear(rows, width, 4 * width) + linear(rows, width, MLP * width, width), 4.0 * rows * keys * width

    tower = shape.vision_layers * sum(layer(media * seen, seen, width))
    tower += linear(media * shape.patches, 3 * shape.patch**2, width)
    resampler = BETWEEN.resampler_depth * (
        linear(media * latents, INNER, width, INNER)
        + linear(media * (shape.patches + latents), width, 2 * INNER)
        + 4.0 * media * latents * (shape.patches + latents) * INNER
        + linear(media * latents, width, BETWEEN.resampler_ff_mult * width, width)
    )
    gated = shape.layers * (
        linear(media * latents, width, 2 * INNER)
        + linear(text, INNER, shape.width, INNER)
        + 4.0 * text * visible * latents * INNER
        + linear(text, shape.width, BETWEEN.cross_attention_ff_mult * shape.width, shape.width)
    )
    matrices, attention = (shape.layers * part for part in layer(text, tokens / 2, shape.width))
    head = linear(logits, shape.width, shape.rows)
    return {
        "tower": (tower, 0.0),
        "resampler": (resampler, 2 * resampler),
        "gated blocks": (gated, 2 * gated),
        "LM": (matrices + attention, matrices + 2 * attention),
        "head": (head, (2 if head_trains else 1) * head),
    }


# -- processes ---------------------------------------------------------------------------------------------------------


class Worker:
    """`kind(**options)` in a process of its own; a call names one of its methods and waits for what that returns."""

    def __init__(self, kind: type, **options: Any):
        context = multiprocessing.get_context("spawn")  # fork would hand our memory down
        self.pipe, theirs = context.Pipe()
        # No daemon, since those may not have loaders; it ends with our end of the pipe, whatever happens to us.
        self.process = context.Process(target=_serve, args=(theirs, kind, options), daemon=False)
        self.process.start()
        atexit.register(self.pipe.close)
        theirs.close()
        self._answer()

    def __call__(self, method: str, *args: Any) -> Any:
        self.pipe.send((method, args))
        return self._answer()

    def close(self) -> None:
        """End the process, with what it still has to print."""
        self.pipe.close()
        self.process.join()

    def _answer(self) -> Any:
        try:
            return self.pipe.recv()
        except EOFError:
            raise SystemExit("a side of the benchmark stopped; its error stands above") from None


def _serve(pipe: Any, kind: type, options: dict[str, Any]) -> None:
    side = kind(**options)
    pipe.send(None)
    while True:
        try:
            method, args = pipe.recv()
        except EOFError:  # the benchmark is over
            return
        pipe.send(getattr(side, method)(*args))


def in_turn(workers: dict[str, Worker], rounds: int, method: str, *args: Any) -> dict[str, list[Any]]:
    """What each worker answers in each of `rounds`: one after the other, so that all meet the same weather."""
    answers: dict[str, list[Any]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            answers[name].append(worker(method, *args))
    return answers
