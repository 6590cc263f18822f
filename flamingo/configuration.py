"""FlamingoConfig: the two backbones' configurations and the shape of what Flamingo puts between them."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from flamingo.errors import FlamingoError

MEDIA_ATTENTION = ("previous", "all")


class FlamingoConfig(PretrainedConfig):
    """Configuration of `FlamingoForConditionalGeneration`. Defaults are those of OpenFlamingo 2.0 (paper, appendix A).

    Args:
        vision_config: configuration of the vision tower, any of `AutoModel`.
        text_config: configuration of the causal LM, any of `AutoModelForCausalLM`.
        cross_attention_every: a gated block stands before decoder layer k where (k + 1) % cross_attention_every == 0.
        cross_attention_heads, cross_attention_head_dim, cross_attention_ff_mult: shape of the gated blocks.
        resampler_depth, resampler_latents, resampler_heads, resampler_head_dim, resampler_ff_mult: shape of the
            Perceiver resampler; its width is that of the vision tower.
        resampler_max_frames: frames per video with an embedding of their own; 0 makes no frame embeddings.
        media_attention: "previous": a token sees the media item that stands last before it; "all": every earlier one.
        image_token_id, end_of_chunk_token_id: ids of `<image>` and `<|endofchunk|>`.
        new_token_ids: ids of the tokens that the LM does not know, in the order of the rows of the new embeddings.
        vocab_size: ids in use by the tokenizer, new ones included; logits of larger ids are −inf.
        decoder_layers: path of the LM's list of decoder layers, such as "model.layers"; found by itself where unset.
        freeze_vision, freeze_language: whether the backbones stay as they are.
        open_flamingo_compatible: train what open_flamingo trains: an untied LM's new output rows stay frozen.
        replaced: names of backbone parameters whose values are not the backbone's, as Otter's checkpoints have them.
        backbones: for `vision` and `language`, the `name` (folder or hub id) it was loaded from, and its `revision`
            there or the `sha256` of its files.
        backbone_dtypes: for `vision` and `language`, the precision in which it was saved; Flamingo's own parts may have
            another.
        packing: rows may hold several documents; building checks that the LM keeps them apart (`flamingo.packing`).
    """

    model_type = "flamingo"
    sub_configs: ClassVar[dict[str, Any]] = {"vision_config": AutoConfig, "text_config": AutoConfig}

    def __init__(
        self,
        vision_config: PretrainedConfig | dict[str, Any] | None = None,
        text_config: PretrainedConfig | dict[str, Any] | None = None,
        *,
        cross_attention_every: int = 1,
        cross_attention_heads: int = 8,
        cross_attention_head_dim: int = 64,
        cross_attention_ff_mult: int = 4,
        resampler_depth: int = 6,
        resampler_latents: int = 64,
        resampler_heads: int = 8,
        resampler_head_dim: int = 64,
        resampler_ff_mult: int = 4,
        resampler_max_frames: int = 0,
        media_attention: Literal["previous", "all"] = "previous",
        image_token_id: int = -1,
        end_of_chunk_token_id: int = -1,
        new_token_ids: list[int] | None = None,
        vocab_size: int | None = None,
        decoder_layers: str | None = None,
        freeze_vision: bool = True,
        freeze_language: bool = True,
        open_flamingo_compatible: bool = False,
        packing: bool = False,
        replaced: list[str] | None = None,
        backbones: dict[str, dict[str, Any]] | None = None,
        backbone_dtypes: dict[str, str] | None = None,
        **kwargs: Any,
    ):
        if media_attention not in MEDIA_ATTENTION:
            raise FlamingoError(f"media_attention={media_attention!r}: expected one of {', '.join(MEDIA_ATTENTION)}")
        if cross_attention_every < 1:
            raise FlamingoError(f"cross_attention_every={cross_attention_every}: expected a positive number of layers")
        self.vision_config: Any = _as_config(vision_config)
        self.text_config: Any = _as_config(text_config)
        self.cross_attention_every = cross_attention_every
        self.cross_attention_heads = cross_attention_heads
        self.cross_attention_head_dim = cross_attention_head_dim
        self.cross_attention_ff_mult = cross_attention_ff_mult
        self.resampler_depth = resampler_depth
        self.resampler_latents = resampler_latents
        self.resampler_heads = resampler_heads
        self.resampler_head_dim = resampler_head_dim
        self.resampler_ff_mult = resampler_ff_mult
        self.resampler_max_frames = resampler_max_frames
        self.media_attention = media_attention
        self.image_token_id = image_token_id
        self.end_of_chunk_token_id = end_of_chunk_token_id
        self.new_token_ids = list(new_token_ids or [])
        self.vocab_size = vocab_size
        self.decoder_layers = decoder_layers
        self.freeze_vision = freeze_vision
        self.freeze_language = freeze_language
        self.open_flamingo_compatible = open_flamingo_compatible
        self.packing = packing
        self.replaced = sorted(replaced or [])
        self.backbones = dict(backbones or {})
        self.backbone_dtypes = dict(backbone_dtypes or {})
        if self.text_config is not None:
            kwargs.setdefault("tie_word_embeddings", bool(getattr(self.text_config, "tie_word_embeddings", False)))
        super().__init__(**kwargs)

    @property
    def vision_width(self) -> int:
        """Width D of the vision tower's tokens: `hidden_size`, or the last of `hidden_sizes` for feature maps."""
        width = getattr(self.vision_config, "hidden_size", None)
        if width is None:
            widths = getattr(self.vision_config, "hidden_sizes", None)
            width = widths[-1] if widths else None
        if not isinstance(width, int):
            raise FlamingoError(
                f"vision_config of type {type(self.vision_config).__name__}: expected hidden_size or hidden_sizes"
            )
        return width


def _as_config(config: PretrainedConfig | dict[str, Any] | None) -> PretrainedConfig | None:
    if isinstance(config, dict):
        if "model_type" not in config:
            raise FlamingoError("backbone configuration without `model_type`: expected the dictionary of a config.json")
        if config["model_type"] not in CONFIG_MAPPING:  # code of its own, which only `from_trained` may be told to run
            return PretrainedConfig(**config)
        return AutoConfig.for_model(**config)
    return config
