"""Small random Flamingos, with open gates, over vocabularies of syllables."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from flamingo.backbones import assemble

SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]


def tokenizer_of_syllables() -> PreTrainedTokenizerFast:
    """One token for two letters, so that a name of four letters has two."""
    pieces = ["<s>", "<pad>", "<unk>", *SYLLABLES, *"abcdefghijklmnopqrstuvwxyz :"]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[bdfgklmnprstvz][aeiou]|."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", unk_token="<unk>")


def small_flamingo(family: str, media_attention: str = "previous", seed: int = 0):
    """A random Flamingo of width 32 and its processor; every gate is open, so pictures change the scores."""
    torch.manual_seed(seed)
    tokenizer = tokenizer_of_syllables()
    common = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    if family == "lfm2":
        config = Lfm2Config(
            **common,
            num_key_value_heads=2,
            num_hidden_layers=2,
            layer_types=["conv", "full_attention"],
            conv_L_cache=5,
            block_auto_adjust_ff_dim=False,
        )
        lm = Lfm2ForCausalLM(config)
    else:
        lm = LlamaForCausalLM(LlamaConfig(**common, num_key_value_heads=2, num_hidden_layers=2))
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        num_channels=1,
    )
    images = CLIPImageProcessorPil(
        size={"height": 32, "width": 32}, do_center_crop=False, image_mean=[0.5], image_std=[0.5], do_convert_rgb=False
    )
    model, processor = assemble(
        CLIPVisionModel(vision),
        lm,
        images,
        tokenizer,
        media_attention=media_attention,
        resampler_depth=1,
        resampler_latents=4,
        resampler_heads=2,
        resampler_head_dim=8,
        cross_attention_heads=2,
        cross_attention_head_dim=8,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate"):
                parameter.fill_(1.0)
            elif name.startswith(("language_model", "cross_attention")):
                parameter.mul_(3.0 if parameter.ndim > 1 else 1.0)  # so that predictions are far from uniform
    return model.eval(), processor


@pytest.fixture(scope="session", params=["lfm2", "llama"])
def flamingo(request):
    return small_flamingo(request.param)
