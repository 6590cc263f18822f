"""open_clip's ViT weights ↔ a Hugging Face CLIPVisionModel, the tower of OpenFlamingo.

open_clip keeps the names of `visual` in OpenAI's CLIP. Its last projection, into the space shared with texts, has no
place in a CLIPVisionModel and is left out: no Flamingo uses it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from flamingo.errors import FlamingoError

HEAD_WIDTH = 64
"""Channels of an attention head in every ViT of CLIP."""
NAMES = (
    ("class_embedding", "embeddings.class_embedding"),
    ("conv1.weight", "embeddings.patch_embedding.weight"),
    ("positional_embedding", "embeddings.position_embedding.weight"),
    ("ln_pre.{kind}", "pre_layrnorm.{kind}"),  # transformers' spelling
    ("ln_post.{kind}", "post_layernorm.{kind}"),
    ("transformer.resblocks.{layer}.ln_{norm}.{kind}", "encoder.layers.{layer}.layer_norm{norm}.{kind}"),
    ("transformer.resblocks.{layer}.attn.out_proj.{kind}", "encoder.layers.{layer}.self_attn.out_proj.{kind}"),
    ("transformer.resblocks.{layer}.mlp.c_fc.{kind}", "encoder.layers.{layer}.mlp.fc1.{kind}"),
    ("transformer.resblocks.{layer}.mlp.c_proj.{kind}", "encoder.layers.{layer}.mlp.fc2.{kind}"),
)
"""open_clip's names, and the names in a CLIPVisionModel"""
FUSED = "transformer.resblocks.{layer}.attn.in_proj_{kind}"
"""open_clip's name of what is three tensors here"""
PROJECTION = "encoder.layers.{layer}.self_attn.{part}_proj.{kind}"
FIELDS = {"layer": r"\d+", "norm": "[12]", "part": "[qkv]", "kind": "weight|bias"}
"""what stands in the names"""


def _fields(template: str, name: str) -> dict[str, str] | None:
    """The fields of a name that is written after `template`."""
    pattern = re.sub(r"\\{(\w+)\\}", lambda field: f"(?P<{field[1]}>{FIELDS[field[1]]})", re.escape(template))
    match = re.fullmatch(pattern, name)
    return None if match is None else match.groupdict()


def _renamed(name: str, pairs: Iterable[tuple[str, str]]) -> str | None:
    for template, other in pairs:
        if (fields := _fields(template, name)) is not None:
            return other.format(**fields)
    return None


def rename(tensors: Mapping[str, Tensor], source: str = "checkpoint") -> dict[str, Tensor]:
    """The tensors of open_clip's `visual` (names with or without that prefix) under the names of a CLIPVisionModel.

    Of a whole CLIP the text tower is left out.

    Raises:
        FlamingoError: where a tensor belongs to no plain ViT; it names the source and the tensors.
    """
    visual = {name.removeprefix("visual."): tensor for name, tensor in tensors.items() if name.startswith("visual.")}
    renamed, unexpected = {}, []
    for name, tensor in (visual or tensors).items():
        if fused := _fields(FUSED, name):
            for part, value in zip("qkv", tensor.chunk(3), strict=True):
                renamed[PROJECTION.format(part=part, **fused)] = value
        elif ours := _renamed(name, NAMES):
            renamed[ours] = tensor
        elif name != "proj":
            unexpected.append(name)
    if unexpected or not renamed:
        raise FlamingoError(
            f"{source}: expected the tensors of an open_clip ViT, found {', '.join(sorted(unexpected))}"
        )
    return renamed


def restore(tensors: Mapping[str, Tensor], source: str = "vision tower") -> dict[str, Tensor]:
    """The inverse of `rename`: all tensors of a CLIPVisionModel under the names of open_clip's `visual`.

    Raises:
        FlamingoError: where a tensor belongs to no CLIPVisionModel; it names the source and the tensors.
    """
    restored, unexpected = {}, []
    for name, tensor in tensors.items():
        if fields := _fields(PROJECTION, name):
            parts = [tensors[PROJECTION.format(**{**fields, "part": part})] for part in "qkv"]
            restored[FUSED.format(**fields)] = torch.cat(parts)
        elif theirs := _renamed(name, [(ours, theirs) for theirs, ours in NAMES]):
            restored[theirs] = tensor
        else:
            unexpected.append(name)
    if unexpected:
        raise FlamingoError(
            f"{source}: open_clip's ViT has no place for {', '.join(sorted(unexpected))}; expected a CLIPVisionModel"
        )
    return restored


def to_hugging_face(
    tensors: Mapping[str, Tensor],
    *,
    heads: int | None = None,
    hidden_act: Literal["gelu", "quick_gelu"] = "gelu",
    source: str = "checkpoint",
) -> CLIPVisionModel:
    """A CLIPVisionModel with open_clip's ViT weights; its shape is read off the tensors.

    Args:
        tensors: of `visual`, with or without that prefix, or of a whole CLIP.
        heads: attention heads of a layer; default: 64 channels each.
        hidden_act: "quick_gelu" for OpenAI's weights and models named so, which OpenFlamingo's tower is one of.
        source: what errors name.

    Raises:
        FlamingoError: where the tensors are not exactly those of a plain ViT for square images.
    """
    renamed = rename(tensors, source)
    try:
        positions, width = renamed["embeddings.position_embedding.weight"].shape
        patch = renamed["embeddings.patch_embedding.weight"].shape[-1]
        inner = renamed["encoder.layers.0.mlp.fc1.weight"].shape[0]
        side = math.isqrt(positions - 1)
        config = CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=sum(name.endswith("fc1.weight") for name in renamed),
            num_attention_heads=width // HEAD_WIDTH if heads is None else heads,
            image_size=side * patch,
            patch_size=patch,
            hidden_act=hidden_act,
        )
        model = CLIPVisionModel(config)
        model.load_state_dict(renamed)
    except (KeyError, RuntimeError, ValueError) as error:
        raise FlamingoError(f"{source}: not the tensors of an open_clip ViT for square images: {error}") from error
    return model.eval()
