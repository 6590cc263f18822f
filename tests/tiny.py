"""Tiny random backbones that tests build, save and load: the real code paths on models of a few thousand parameters."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image as PilImage
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    MptConfig,
    Olmo2Config,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from flamingo import Document, FlamingoForConditionalGeneration, FlamingoProcessor, Image, Text, from_backbones

WIDTH, VOCABULARY = 32, 128


def language_configs(vocabulary: int = VOCABULARY) -> dict[str, Callable[[], PretrainedConfig]]:
    """Makers of tiny configurations, by family; a vocabulary larger than the tokenizer's is as with OPT or Pythia."""
    size: dict[str, Any] = dict(
        vocab_size=vocabulary, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    untied: dict[str, Any] = dict(size, num_key_value_heads=1, tie_word_embeddings=False)
    older: dict[str, Any] = dict(vocab_size=vocabulary, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    gpt2: dict[str, Any] = dict(older, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=512)
    return {
        "llama": lambda: LlamaConfig(**untied),
        "mistral": lambda: MistralConfig(**untied),
        "qwen2": lambda: Qwen2Config(**{**untied, "tie_word_embeddings": True}),
        "qwen3": lambda: Qwen3Config(**untied, head_dim=16),
        "gemma2": lambda: Gemma2Config(**{**untied, "tie_word_embeddings": True}, head_dim=16, sliding_window=64),
        "gemma3": lambda: Gemma3TextConfig(
            **{**untied, "tie_word_embeddings": True}, head_dim=16, sliding_window=64, query_pre_attn_scalar=16
        ),
        "smollm3": lambda: SmolLM3Config(**untied),
        "olmo2": lambda: Olmo2Config(**untied),
        "phi": lambda: PhiConfig(**size, tie_word_embeddings=False),
        "opt": lambda: OPTConfig(**size, ffn_dim=64, word_embed_proj_dim=WIDTH, dropout=0.0),
        "gpt_neox": lambda: GPTNeoXConfig(**size, tie_word_embeddings=False),
        "gpt2": lambda: GPT2Config(**gpt2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
        "gptj": lambda: GPTJConfig(**gpt2, rotary_dim=8, tie_word_embeddings=False),
        "gpt_neo": lambda: GPTNeoConfig(
            **older, hidden_size=WIDTH, num_layers=2, num_heads=2, max_position_embeddings=512,
            attention_types=[[["global", "local"], 1]], window_size=64, resid_dropout=0.0, embed_dropout=0.0,
        ),
        "mpt": lambda: MptConfig(**older, d_model=WIDTH, n_heads=2, n_layers=2, expansion_ratio=2, max_seq_len=512),
        "bloom": lambda: BloomConfig(**older, hidden_size=WIDTH, n_layer=2, n_head=2),
        "falcon": lambda: FalconConfig(**older, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2),
        "falcon_alibi": lambda: FalconConfig(
            **older, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, alibi=True
        ),
        "lfm2": lambda: Lfm2Config(
            **{**untied, "tie_word_embeddings": True}, layer_types=["conv", "full_attention"], conv_L_cache=4
        ),
    }  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes-level characters: every ASCII text, no merges, ids < 103."""
    characters = sorted({pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(chr(c))[0][0]
                         for c in [10, *range(32, 127)]})  # fmt: skip
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *characters])}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def save_backbones(folder: Path, family: str = "llama", vocabulary: int = VOCABULARY) -> tuple[Path, Path]:
    """Random CLIP tower (16×16 images, 4 patches) and LM with its tokenizer, saved under `folder`."""
    torch.manual_seed(0)
    vision, language = folder / "vision", folder / "language"
    config = CLIPVisionConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    CLIPVisionModel(config).save_pretrained(vision)
    size = {"height": 16, "width": 16}
    CLIPImageProcessorPil(size=size, crop_size=size).save_pretrained(vision)
    AutoModelForCausalLM.from_config(language_configs(vocabulary)[family]()).save_pretrained(language)
    tokenizer().save_pretrained(language)
    return vision, language


def tiny_flamingo(
    folder: Path, family: str = "llama", *, vocabulary: int = VOCABULARY, open_gates: bool = True, **options: object
) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
    """A random Flamingo over tiny backbones, in evaluation mode; open gates let media matter."""
    vision, language = save_backbones(folder, family, vocabulary)
    shape = dict(
        cross_attention_heads=2, cross_attention_head_dim=8, resampler_depth=1, resampler_latents=4, resampler_heads=2,
        resampler_head_dim=8,
    )  # fmt: skip
    model, processor = from_backbones(vision, language, **{**shape, **options})
    if open_gates:
        with torch.no_grad():
            for block in model.cross_attention:
                block.attn_gate.fill_(0.8)
                block.ff_gate.fill_(0.5)
    return model.eval(), processor


def picture(seed: int = 0, size: int = 16, mode: str = "RGB", suffix: str = "png") -> Image:
    """A picture of random pixels."""
    shape = (size, size) if mode == "L" else (size, size, 3)
    pixels = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    buffer = io.BytesIO()
    PilImage.fromarray(pixels.numpy(), mode).save(buffer, {"png": "PNG", "jpg": "JPEG"}[suffix])
    return Image(buffer.getvalue(), f"{seed}.{suffix}")


def document(seed: int, media: int, *, key: str = "", lead: bool = False) -> Document:
    """A document of `media` pictures, each followed by a few words; with `lead`, words before the first."""
    rng = random.Random(seed)
    words = lambda: " ".join(rng.choice(["cat", "dog", "sun", "sea", "red"]) for _ in range(rng.randint(1, 3)))  # noqa: E731
    segments: list[object] = [Text(words())] if lead or not media else []
    for n in range(media):
        segments += [picture(seed * 100 + n), Text(words())]
    return Document(tuple(segments), key=key or f"doc{seed}")  # type: ignore[arg-type]
