"""open_clip's ViT weights → a Hugging Face CLIPVisionModel, the tower of OpenFlamingo.

open_clip keeps the names of `visual` in OpenAI's CLIP. Its last projection, into the space shared with texts, has no
place in a CLIPVisionModel and is left out: no Flamingo uses it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Literal

from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from flamingo.errors import FlamingoError

HEAD_WIDTH = 64
"""Channels of an attention head in every ViT of CLIP."""
NAMES = (
    (r"class_embedding", "embeddings.class_embedding"),
    (r"conv1\.weight", "embeddings.patch_embedding.weight"),
    (r"positional_embedding", "embeddings.position_embedding.weight"),
    (r"ln_pre\.(weight|bias)", r"pre_layrnorm.\1"),  # transformers' spelling
    (r"ln_post\.(weight|bias)", r"post_layernorm.\1"),
    (r"transformer\.resblocks\.(\d+)\.ln_([12])\.(weight|bias)", r"encoder.layers.\1.layer_norm\2.\3"),
    (r"transformer\.resblocks\.(\d+)\.attn\.out_proj\.(weight|bias)", r"encoder.layers.\1.self_attn.out_proj.\2"),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.(weight|bias)", r"encoder.layers.\1.mlp.fc1.\2"),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_proj\.(weight|bias)", r"encoder.layers.\1.mlp.fc2.\2"),
)
"""Patterns of open_clip's names, and the names in a CLIPVisionModel."""


def rename(tensors: Mapping[str, Tensor], source: str = "checkpoint") -> dict[str, Tensor]:
    """The tensors of open_clip's `visual` (names with or without that prefix) under the names of a CLIPVisionModel.

    Of a whole CLIP the text tower is left out.

    Raises:
        FlamingoError: where a tensor belongs to no plain ViT; it names the source and the tensors.
    """
    visual = {name.removeprefix("visual."): tensor for name, tensor in tensors.items() if name.startswith("visual.")}
    renamed, unexpected = {}, []
    for name, tensor in (visual or tensors).items():
        fused = re.fullmatch(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)", name)
        found = [re.sub(pattern, ours, name) for pattern, ours in NAMES if re.fullmatch(pattern, name)]
        if fused:
            for part, value in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"encoder.layers.{fused[1]}.self_attn.{part}_proj.{fused[2]}"] = value
        elif found:
            renamed[found[0]] = tensor
        elif name != "proj":
            unexpected.append(name)
    if unexpected or not renamed:
        raise FlamingoError(
            f"{source}: expected the tensors of an open_clip ViT, found {', '.join(sorted(unexpected))}"
        )
    return renamed


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
