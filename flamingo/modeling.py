"""FlamingoForConditionalGeneration: a frozen causal LM that attends to media through gated blocks between its layers.

The LM is used as it is: gated blocks are called by pre-hooks on its decoder layers, new tokens have embeddings of their
own beside its table and its head, and which positions get logits is decided at the head's input. So its classes are
neither subclassed nor copied, and its own forward (scales, soft-caps, biases, projections) runs unchanged.

Legend: B samples, T text tokens, N media of the batch (flat, in reading order), F frames, M frames of all media, R
latents, D width, S supervised positions of the batch, K new tokens, V logits.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_masks_for_generate
from transformers.utils import ModelOutput

from flamingo.cache import with_room
from flamingo.configuration import FlamingoConfig
from flamingo.cross_attention import GatedCrossAttention
from flamingo.errors import FlamingoError
from flamingo.loss import PutColumns, negative_log_likelihood
from flamingo.media import MediaMemory, MediaSlots, visible_media
from flamingo.packing import check_packing, pack
from flamingo.processing import IGNORED
from flamingo.products import fast_products
from flamingo.resampler import PerceiverResampler

TRAINED = "trained.safetensors"
"""What `save_trained` calls the file of trained tensors."""


@dataclass
class FlamingoOutput(ModelOutput):
    """What a forward returns.

    Attributes:
        loss: () mean negative log-likelihood of the supervised tokens, in nats; with labels only.
        logits: (B, T, V); the last `logits_to_keep` positions alone where that is set; with labels (S, V), those of the
            supervised positions alone, and None where gradients are on: the loss is made in their place.
        past_key_values: the LM's cache.
        sample_losses: (B,) summed negative log-likelihood of each sample's supervised tokens; with labels only.
        sample_tokens: (B,) number of supervised tokens of each sample; with labels only.
        hidden_states, attentions: the LM's, where `output_hidden_states` or `output_attentions` ask for them.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None
    sample_losses: Tensor | None = None
    sample_tokens: Tensor | None = None
    hidden_states: Any = None
    attentions: Any = None


@dataclass(frozen=True)
class _Conditioning:
    """What the hooks need during one forward."""

    memory: MediaMemory
    slots: MediaSlots
    mask: Tensor
    """(B, 1, T, S·R) where attention goes: to what a token may see; anywhere, for one that sees nothing"""
    sees: Tensor
    """(B, 1, T, 1) whether a token sees anything"""
    positions: int | Tensor
    """at the head: 0 for all positions, k > 0 for the last k, or (S,) indices into the flattened (B·T) positions"""
    in_place: bool
    """whether the logits go into a loss that is made in their place"""


class FlamingoForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """A vision tower, a Perceiver resampler, and a causal LM with gated cross-attention before its decoder layers.

    Build one over backbones with `flamingo.from_backbones`, load one with `from_pretrained`. Flamingo, section 2.
    """

    config_class = FlamingoConfig
    config: FlamingoConfig
    row_of: Tensor
    new_ids: Tensor
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _no_split_modules = ("GatedCrossAttention", "PerceiverResampler")

    def __init__(
        self,
        config: FlamingoConfig,
        vision_tower: PreTrainedModel | None = None,
        language_model: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config) if vision_tower is None else vision_tower
        self.language_model = (
            AutoModelForCausalLM.from_config(config.text_config) if language_model is None else language_model
        )
        self.resampler = PerceiverResampler(
            config.vision_width,
            depth=config.resampler_depth,
            latents=config.resampler_latents,
            heads=config.resampler_heads,
            head_dim=config.resampler_head_dim,
            ff_mult=config.resampler_ff_mult,
            max_frames=config.resampler_max_frames,
        )
        embedding, head = self.get_input_embeddings(), self.language_model.get_output_embeddings()
        layers = decoder_layers(self.language_model, config.decoder_layers)
        conditioned = [k for k in range(len(layers)) if (k + 1) % config.cross_attention_every == 0]
        if not conditioned:
            raise FlamingoError(
                f"cross_attention_every={config.cross_attention_every}: the LM has only {len(layers)} decoder layers"
            )
        text_config = config.text_config.get_text_config()
        self.cross_attention = nn.ModuleList(
            GatedCrossAttention(
                text_config.hidden_size,
                config.vision_width,
                heads=config.cross_attention_heads,
                head_dim=config.cross_attention_head_dim,
                ff_mult=config.cross_attention_ff_mult,
            )
            for _ in conditioned
        )
        new = len(config.new_token_ids)
        self.new_input_rows = nn.Parameter(torch.zeros(new, embedding.embedding_dim))
        self.new_output_rows = (
            None if text_config.tie_word_embeddings else nn.Parameter(torch.zeros(new, head.weight.shape[1]))
        )
        self._register_ids()

        self._conditioning: _Conditioning | None = None
        for block, k in enumerate(conditioned):
            layers[k].register_forward_pre_hook(_LayerHook(self, block), with_kwargs=True)
        head.register_forward_pre_hook(_SelectPositions(self))
        head.register_forward_hook(_AppendNewTokens(self))
        self.takes_positions = "position_ids" in inspect.signature(self.language_model.forward).parameters
        self.post_init()
        self.prepare_backbones()

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise what Flamingo adds, as PyTorch and open_flamingo do; the backbones initialise themselves."""
        if isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, PerceiverResampler):
            module.reset_parameters()
        elif isinstance(module, GatedCrossAttention):
            init.zeros_(module.attn_gate)
            init.zeros_(module.ff_gate)
        elif module is self:
            init.normal_(self.new_input_rows, std=0.02)
            if self.new_output_rows is not None:
                init.normal_(self.new_output_rows, std=0.02)
            row_of = torch.full_like(self.row_of, -1)
            row_of[self.config.new_token_ids] = torch.arange(len(self.config.new_token_ids), device=row_of.device)
            init.copy_(self.row_of, row_of)
            init.copy_(self.new_ids, torch.tensor(self.config.new_token_ids, device=row_of.device))

    def _register_ids(self, device: torch.device | None = None) -> None:
        """From the configuration: `row_of[id]`, the row of a new token, −1 for a token of the LM; and the new ids."""
        ids = self.config.new_token_ids
        row_of = torch.full((max([self.config.vocab_size or 0, *[i + 1 for i in ids]]),), -1, device=device)
        row_of[ids] = torch.arange(len(ids), device=device)
        self.register_buffer("row_of", row_of, persistent=False)
        self.register_buffer("new_ids", torch.tensor(ids, dtype=torch.long, device=device), persistent=False)

    def append_new_rows(self, ids: list[int], vocab_size: int) -> None:
        """Give further tokens rows, of zeros, after those of the tokens that are new already; in place.

        The parameters of new rows are other ones afterwards: no optimizer may hold them yet.
        """
        for name in ("new_input_rows", "new_output_rows"):
            rows = getattr(self, name)
            if rows is not None:
                grown = torch.cat((rows.detach(), rows.new_zeros(len(ids), rows.shape[1])))
                setattr(self, name, nn.Parameter(grown, requires_grad=rows.requires_grad))
        self.config.new_token_ids = [*self.config.new_token_ids, *ids]
        self.config.vocab_size = vocab_size
        self._register_ids(self.row_of.device)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`, with the backbones frozen as the configuration says.

        Raises:
            FlamingoError: where a tensor is missing, unexpected or of another shape.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs.pop("ignore_mismatched_sizes", None)
        source = str(args[0] if args else kwargs.get("pretrained_model_name_or_path"))
        if (Path(source) / TRAINED).exists():
            raise FlamingoError(f"{source}: holds what was trained alone; load it with `from_trained`")
        options = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # the message is ours
        model, info = super().from_pretrained(*args, **options, **kwargs)
        shapes = [f"{name} {tuple(found)} (for {tuple(own)})" for name, found, own in info["mismatched_keys"]]
        check_names(source, info["missing_keys"], [*info["unexpected_keys"], *shapes])
        if not kwargs.keys() & {"dtype", "torch_dtype", "device_map"}:  # each part in the precision it was saved in
            for part, dtype in model.config.backbone_dtypes.items():
                model.backbones()[part].to(getattr(torch, dtype))
        model.prepare_backbones()
        if model.config.packing:
            check_packing(model)
        return (model, info) if wants_info else model

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedModel.save_pretrained`; the configuration says in which precision each backbone is.

        Raises:
            FlamingoError: where a backbone runs code that came with it, which such a folder would lack, or the LM has
                adapters.
        """
        self.check_without_adapters()
        for part in self.backbones().values():
            if type(part).__module__.startswith("transformers_modules."):
                raise FlamingoError(
                    f"save_pretrained: {type(part).__name__} came with code of its own; use `save_trained`, which "
                    "takes it from where it is"
                )
        self.note_precision()
        return super().save_pretrained(*args, **kwargs)

    def check_without_adapters(self) -> None:
        """Raise FlamingoError where the LM has peft's adapters: nothing that loads a Flamingo knows their names."""
        if hasattr(self.language_model, "peft_config"):
            raise FlamingoError(
                "the LM has adapters; expected one without: `train.lora.merge` folds them in, "
                "`train.lora.save_adapters` keeps them by themselves"
            )

    def backbones(self) -> dict[str, PreTrainedModel]:
        """Both backbones: `vision` and `language`."""
        return {"vision": self.vision_tower, "language": self.language_model}

    def note_precision(self) -> None:
        """Write into the configuration in which precision each backbone is."""
        dtypes = {part: str(backbone.dtype).removeprefix("torch.") for part, backbone in self.backbones().items()}
        self.config.backbone_dtypes = dtypes

    def save_trained(self, folder: str | Path) -> None:
        """Write what Flamingo trains, its configuration, and the identity of both backbones (`flamingo.trained`)."""
        from flamingo.trained import save_trained

        save_trained(self, folder)

    @classmethod
    def from_trained(cls, folder: str | Path, **options: Any) -> FlamingoForConditionalGeneration:
        """A model that `save_trained` wrote, over its backbones; options as `flamingo.trained.from_trained`."""
        from flamingo.trained import from_trained

        return from_trained(folder, **options)

    def get_input_embeddings(self) -> nn.Embedding:
        """The LM's own embedding; new tokens stand beside it in `new_input_rows`."""
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The LM's own head; new tokens stand beside it in `new_output_rows` (tied LMs: in `new_input_rows`)."""
        return self.language_model.get_output_embeddings()

    def prepare_backbones(self) -> None:
        """Freeze both backbones as the configuration says, and lay the tower's convolutions out channels last.

        On CPUs and tensor cores alike convolutions are faster so (a third, for the embedded tower on a CPU).
        """
        if any(isinstance(module, nn.Conv2d) for module in self.vision_tower.modules()):
            self.vision_tower.to(memory_format=torch.channels_last)
        self.vision_tower.requires_grad_(not self.config.freeze_vision)
        self.language_model.requires_grad_(not self.config.freeze_language)
        if self.new_output_rows is not None:
            self.new_output_rows.requires_grad_(not self.config.open_flamingo_compatible)

    def train(self, mode: bool = True) -> FlamingoForConditionalGeneration:
        """As `nn.Module.train`, but a frozen vision tower stays in evaluation mode (batch norms, dropout)."""
        super().train(mode)
        if self.config.freeze_vision:
            self.vision_tower.eval()
        return self

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, **options: Any
    ) -> None:
        """What is computed again in the backward pass, outside of `forward`, is computed by the same products."""
        alike = partial(_checkpoint_fast, gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, alike, **options)

    def _blocks(self) -> list[GatedCrossAttention]:
        return cast(list[GatedCrossAttention], list(self.cross_attention))

    def gates(self) -> dict[str, Tensor]:
        """`tanh` of every gate, by name: `attention.{block}` and `feed_forward.{block}`, each ().

        Where FSDP2 has shared the model out, all processes call this together, and each gets all gates.
        """
        gates = {
            f"{kind}.{number}": gate.detach()
            for number, block in enumerate(self._blocks())
            for kind, gate in (("attention", block.attn_gate), ("feed_forward", block.ff_gate))
        }
        if any(isinstance(gate, DTensor) for gate in gates.values()):
            together = cast(DTensor, torch.stack(list(gates.values()))).full_tensor()  # one word between the processes
            gates = dict(zip(gates, together, strict=True))
        return {name: gate.tanh().squeeze() for name, gate in gates.items()}

    @contextmanager
    def gates_closed(self) -> Iterator[None]:
        """While open, every gate is zero: the frozen LM, which sees no medium."""
        gates = [gate for block in self._blocks() for gate in (block.attn_gate, block.ff_gate)]
        opened = [gate.detach().clone() for gate in gates]
        with torch.no_grad():
            for gate in gates:
                gate.zero_()
        try:
            yield
        finally:
            with torch.no_grad():
                for gate, value in zip(gates, opened, strict=True):
                    gate.copy_(value)

    # -- media ---------------------------------------------------------------------------------------------------------

    def encode_media(self, pixel_values: Tensor, media_frames: Tensor | None = None) -> Tensor:
        """`pixel_values` (N, F, C, H, W) → latents (N, R, D). A frozen tower runs without a graph; N may be 0.

        Args:
            media_frames: (N,) number of frames of each medium, where these differ; `pixel_values` is then
                (M, 1, C, H, W), the frames of all media flat and in order, M = Σ `media_frames`.

        Raises:
            FlamingoError: where shapes, numbers or types are others.
        """
        check_pixels(pixel_values, media_frames)
        rows, frames = pixel_values.shape[:2]
        tower_trains = torch.is_grad_enabled() and not self.config.freeze_vision
        dtype = self.resampler.latents.dtype
        if rows == 0:  # towers reshape with −1, which zero images leave undefined
            # On the images' device: the resampler may be offloaded.
            tokens = pixel_values.new_zeros(0, frames, 1, self.config.vision_width, dtype=dtype)
        else:
            with torch.set_grad_enabled(tower_trains):
                images = rearrange(pixel_values, "n f c h w -> (n f) c h w")
                images = images.to(self.vision_tower.dtype, memory_format=torch.channels_last)
                tokens = patch_tokens(self.vision_tower, images)
            tokens = rearrange(tokens.to(dtype), "(n f) v d -> n f v d", n=rows)
        if tower_trains:  # a gradient for every parameter, also of a tower without images, or of a norm not applied
            whole = torch.stack([each.sum() for each in self.vision_tower.parameters()]).sum()
            tokens = tokens + 0.0 * whole.to(tokens)
        if media_frames is None or rows == 0:
            return self.resampler(tokens)
        return self.resampler(tokens, media_frames.to(tokens.device))

    def remember_media(self, media_latents: Tensor) -> MediaMemory:
        """`media_latents` (N, R, D) → their keys and values for every gated block."""
        projected = [block.project_media(media_latents) for block in self._blocks()]
        keys, values = zip(*projected, strict=True)
        return MediaMemory(keys, values)

    # -- forward -------------------------------------------------------------------------------------------------------

    def embed_tokens(self, input_ids: Tensor) -> Tensor:
        """`input_ids` (B, T) → (B, T, D): rows of the LM's table, or of the new tokens'."""
        embedding = self.get_input_embeddings()
        row = self.row_of.to(input_ids.device)[input_ids]
        known = embedding(input_ids.masked_fill(row >= 0, 0))
        if self.new_input_rows.shape[0] == 0:
            return known
        # Some LMs scale inside their embedding module (Gemma 3): new rows are scaled likewise.
        new = self.new_input_rows[row.clamp(min=0)].to(known) * getattr(embedding, "embed_scale", 1.0)
        return torch.where((row >= 0)[..., None].to(known.device), new, known)

    def _check_ids(self, input_ids: Tensor) -> None:
        largest = int(input_ids.max()) if input_ids.numel() else 0
        if largest >= self.row_of.shape[0] or largest < 0:
            raise FlamingoError(f"input_ids: found id {largest}, expected ids from 0 to {self.row_of.shape[0] - 1}")

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        pixel_values: Tensor | None = None,
        media_frames: Tensor | None = None,
        media_latents: Tensor | None = None,
        media_memory: MediaMemory | None = None,
        media_per_sample: Tensor | None = None,
        media_first: Tensor | None = None,
        media_last: Tensor | None = None,
        documents: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        media_slots: int | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """One pass over interleaved text and media.

        Args:
            input_ids: (B, T) ids, `<image>` where a medium stands.
            attention_mask: (B, T) 1 for tokens, 0 for padding; with a cache, of the whole sequence so far.
            position_ids: (B, T), for LMs that take them, other LMs refuse them here; default: from `attention_mask`.
            past_key_values: the cache of an earlier pass, which then needs `media_first` and `media_last`.
            pixel_values: (N, F, C, H, W) of the batch's media, flat and in reading order, or (M, 1, C, H, W) with
            media_frames: (N,) number of frames of each medium, where these differ; M = Σ `media_frames`; or
            media_latents: (N, R, D), as `encode_media` gives them; or
            media_memory: as `remember_media` gives it. None of them: no media.
            media_per_sample: (B,) number of media of each sample; default: its number of `<image>`.
            media_first, media_last: (B, T) the media that each token may see (`flamingo.media`); default: from
                `input_ids` and the configuration.
            documents: (B, T) number of each token's document in packed rows, from 1 and not falling, 0 for padding:
                documents see neither one another's text nor media. Needs a model built with `packing=True`.
            labels: (B, T) ids aligned with `input_ids`, −100 where unsupervised; shifted here.
            num_items_in_batch: what the summed loss is divided by, instead of the supervised tokens of this batch
                (transformers' Trainer gives those of all accumulated batches).
            media_slots: the most media of any sample, where the caller knows it: a compiled graph, which may not ask,
                otherwise has a slot for every medium of the batch in every sample.
            use_cache: whether the output carries a cache; never with labels.
            logits_to_keep: k > 0 makes logits for the last k positions alone.
            return_dict: False gives a tuple.
            kwargs: further arguments of the LM's forward.

        Raises:
            FlamingoError: where numbers of media and of `<image>` differ, or an argument has another shape.

        Returns:
            `FlamingoOutput`.
        """
        media = _number(pixel_values, media_frames, media_latents, media_memory)
        continues = past_key_values is not None and past_key_values.get_seq_length() > 0
        counts = self._count_marks(input_ids)
        if media_per_sample is None:
            media_per_sample = counts
        if not torch.compiler.is_compiling() and not continues:
            self._check_ids(input_ids)
            check_media(media_per_sample, media, counts)
        trains = labels is not None and torch.is_grad_enabled()
        if media_memory is None:
            with fast_products(trains):
                media_memory = self._remember(pixel_values, media_frames, media_latents, input_ids)
        if media_first is None or media_last is None:
            if continues:
                raise FlamingoError("media_first and media_last: expected with the cache of an earlier pass")
            media_first, media_last = visible_media(
                input_ids,
                self.config.image_token_id,
                media_attention=self.config.media_attention,
                documents=documents,
            )
        if documents is not None and (attention_mask is not None or position_ids is not None or use_cache):
            raise FlamingoError("documents: expected without attention_mask, position_ids and use_cache")
        attention_mask, places = self._places(input_ids.shape[1], attention_mask, position_ids, documents)
        targets, supervised, positions = self._supervision(labels, documents)
        positions = logits_to_keep if positions is None else positions
        in_place = trains and supervised is not None

        slots = MediaSlots.of(media_per_sample, len(media_memory), media_slots)
        visible = slots.visible(media_first, media_last, media_memory.keys[0].shape[1])
        sees = visible.any(dim=-1, keepdim=True)
        self._conditioning = _Conditioning(media_memory, slots, visible | ~sees, sees, positions, in_place)
        try:
            with fast_products(trains):
                output = self.language_model(
                    inputs_embeds=self.embed_tokens(input_ids),
                    attention_mask=attention_mask,
                    past_key_values=past_key_values,
                    use_cache=use_cache if labels is None and documents is None else False,
                    **places,
                    **kwargs,
                )
        finally:
            self._conditioning = None
        made: dict[str, Any]
        if labels is None or targets is None:
            made = {"logits": self._mask_unused(output.logits), "past_key_values": output.get("past_key_values")}
        elif supervised is None:
            made = self._compiled_loss(self._mask_unused(output.logits), targets)
        else:
            made = self._loss(output.logits.squeeze(0), targets, supervised, in_place)
        if labels is not None:
            made["loss"] = made["sample_losses"].sum() / (
                made["sample_tokens"].sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            )
        inside = {name: output.get(name) for name in ("hidden_states", "attentions")}
        made_output = FlamingoOutput(**made, **inside)
        return made_output.to_tuple() if return_dict is False else made_output

    def _places(
        self, length: int, attention_mask: Tensor | None, position_ids: Tensor | None, documents: Tensor | None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The mask for the LM, and the positions of `length` tokens if it takes any, as keyword arguments."""
        name = type(self.language_model).__name__
        if documents is not None:
            if not self.config.packing:
                raise FlamingoError("documents: expected a model built with packing=True, which checks its LM")
            attention_mask, position_ids = pack(documents, self.language_model)
        elif position_ids is not None and not self.takes_positions:
            raise FlamingoError(f"position_ids: {name} does not take them")
        elif position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            # Positions count tokens, not padding, for LMs too that do not see to it themselves (GPT-2).
            position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -length:]
        return attention_mask, {
            "position_ids": position_ids
        } if position_ids is not None and self.takes_positions else {}

    def _supervision(
        self, labels: Tensor | None, documents: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, int | Tensor | None]:
        """Targets (B, T − 1), the supervised (S, 2) of them, and these as positions (S,) in flattened (B·T) tokens.

        In a compiled graph, where no shape may depend on values, all positions take part: None and 0.
        """
        if labels is None:
            return None, None, None
        targets = labels[:, 1:]
        if documents is not None:  # nothing foretells the first token of a document
            targets = targets.masked_fill(documents[:, 1:] != documents[:, :-1], IGNORED)
        if torch.compiler.is_compiling():
            return targets, None, 0
        supervised = (targets != IGNORED).nonzero()
        return targets, supervised, supervised[:, 0] * labels.shape[1] + supervised[:, 1]

    def _loss(self, logits: Tensor, targets: Tensor, supervised: Tensor, in_place: bool) -> dict[str, Any]:
        """From logits (S, V) of the positions `supervised` (S, 2) of `targets` (B, T − 1)."""
        sample = supervised[:, 0]
        target = targets[sample, supervised[:, 1]].to(logits.device)
        kept = None
        if in_place:
            losses = negative_log_likelihood(logits, target, self.row_of.shape[0])
        else:
            kept = self._mask_unused(logits)
            losses = cross_entropy(kept.float(), target, reduction="none")
        sample = sample.to(losses.device)
        zeros = losses.new_zeros(targets.shape[0])
        return {
            "logits": kept,
            "sample_losses": zeros.index_add(0, sample, losses),
            "sample_tokens": zeros.long().index_add(0, sample, torch.ones_like(sample)),
        }

    def _compiled_loss(self, logits: Tensor, targets: Tensor) -> dict[str, Any]:
        """From logits (B, T, V) of all positions: in a compiled graph no shape may depend on the labels."""
        flat = rearrange(logits[:, :-1], "b t v -> (b t) v").float()
        losses = cross_entropy(flat, targets.flatten(), reduction="none", ignore_index=IGNORED).view_as(targets)
        return {
            "logits": logits,
            "sample_losses": losses.sum(dim=1),
            "sample_tokens": (targets != IGNORED).sum(dim=1),
        }

    def _count_marks(self, input_ids: Tensor) -> Tensor:
        return input_ids.eq(self.config.image_token_id).sum(dim=1)

    def _remember(
        self,
        pixel_values: Tensor | None,
        media_frames: Tensor | None,
        media_latents: Tensor | None,
        input_ids: Tensor,
    ) -> MediaMemory:
        """Keys and values of the media in either form; of none, through the resampler all the same, for its graph."""
        if media_latents is None:
            if pixel_values is None:
                pixel_values = torch.zeros(0, 1, 1, 1, 1, device=input_ids.device)
            media_latents = self.encode_media(pixel_values, media_frames)
        return self.remember_media(media_latents)

    def _mask_unused(self, logits: Tensor) -> Tensor:
        """−inf for the ids that no token has: padding rows of the LM's embedding."""
        if logits.shape[-1] <= self.row_of.shape[0]:
            return logits
        if not torch.is_grad_enabled():  # in place: a copy of many logits costs as much as a layer
            logits[..., self.row_of.shape[0] :] = -torch.inf
            return logits
        unused = torch.arange(logits.shape[-1], device=logits.device) >= self.row_of.shape[0]
        return logits.masked_fill(unused, -torch.inf)

    # -- generation ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """`GenerationMixin.generate`; takes the media arguments of `forward` and encodes each medium once.

        `<image>` is never generated. To go on from a cache, give all ids, those that the cache holds too.

        Raises:
            FlamingoError: where media do not fit the marks, and for an assistant or a prompt read in pieces
                (`prefill_chunk_size`), in which marks would be counted from the start of each piece.
        """
        input_ids = kwargs["input_ids"] if inputs is None and "input_ids" in kwargs else inputs
        if input_ids is None:
            raise FlamingoError("generate: expected input_ids")
        settings = generation_config or self.generation_config
        chunk = kwargs.get("prefill_chunk_size", getattr(settings, "prefill_chunk_size", None))
        if chunk is not None or kwargs.get("assistant_model") is not None:
            raise FlamingoError("generate: expected neither prefill_chunk_size nor assistant_model")
        cache = kwargs.get("past_key_values")
        if cache is not None and 0 < input_ids.shape[1] <= cache.get_seq_length():
            raise FlamingoError(
                f"input_ids: expected all ids, those of the {cache.get_seq_length()} tokens in past_key_values too, "
                f"got {input_ids.shape[1]}"
            )
        pixel_values, frames = kwargs.pop("pixel_values", None), kwargs.pop("media_frames", None)
        latents, memory = kwargs.pop("media_latents", None), kwargs.get("media_memory")
        media = _number(pixel_values, frames, latents, memory)
        counts = self._count_marks(input_ids)
        if kwargs.get("media_per_sample") is None:
            kwargs["media_per_sample"] = counts
        check_media(kwargs["media_per_sample"], media, counts)
        kwargs["media_slots"] = int(counts.max()) if len(counts) else 0
        asked = kwargs.pop("suppress_tokens", None) or getattr(settings, "suppress_tokens", None) or []
        suppressed = sorted({*asked, self.config.image_token_id})
        with fast_products():
            if memory is None:
                kwargs["media_memory"] = self._remember(pixel_values, frames, latents, input_ids)
            return super().generate(inputs, generation_config, suppress_tokens=suppressed, **kwargs)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """Visibility from all ids so far, cut to the tokens of this pass."""
        settled: Tensor | None = kwargs.pop("media_settled", None)
        prepared = super().prepare_inputs_for_generation(input_ids, **kwargs)
        length = prepared["input_ids"].shape[1]
        if settled is not None:
            last = settled[:, None].expand(-1, length)
            prepared["media_first"], prepared["media_last"] = last.clamp(max=1), last
        else:
            first, last = visible_media(
                input_ids, self.config.image_token_id, media_attention=self.config.media_attention
            )
            prepared["media_first"], prepared["media_last"] = first[:, -length:], last[:, -length:]
        if not self.takes_positions:
            prepared.pop("position_ids", None)
        return prepared

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        given = model_kwargs.get("past_key_values")
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if given is None and "past_key_values" in model_kwargs:
            model_kwargs["past_key_values"] = with_room(model_kwargs["past_key_values"])

    def create_masks_for_generate(self, config: Any, **kwargs: Any) -> Any:
        """For a static cache, as the LM makes them: BLOOM's alibi wants a mask of its own."""
        make = getattr(self.language_model, "create_masks_for_generate", create_masks_for_generate)
        return make(config=self.language_model.config, **kwargs)

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """After the prompt, keep only the media that new tokens see, in the layout that attention reads.

        `<image>` is never generated, so that is the same for all of them: the last medium of each sample, or all.
        So a new token costs no copy of keys and values, and under "previous" nothing grows with the number of media.
        """
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        memory: MediaMemory = model_kwargs["media_memory"]
        if "media_settled" in model_kwargs or not len(memory) or model_kwargs.get("past_key_values") is None:
            return model_kwargs
        counts: Tensor = model_kwargs["media_per_sample"]
        ends = counts.cumsum(0)
        if self.config.media_attention == "previous":
            index, settled = (ends - 1)[:, None], counts.clamp(max=1)
        else:
            index, settled = (ends - counts)[:, None] + torch.arange(int(counts.max()), device=counts.device), counts
        # Samples with fewer media get another's in the slots that they do not see.
        model_kwargs["media_memory"] = memory.select(index.clamp(0, len(memory) - 1).flatten()).contiguous()
        model_kwargs["media_per_sample"] = torch.full_like(counts, index.shape[1])
        model_kwargs["media_settled"], model_kwargs["media_slots"] = settled, index.shape[1]
        return model_kwargs

    @staticmethod
    def _expand_inputs_for_generation(
        expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **model_kwargs: Any
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeat every sample for its beams; flat media are repeated sample by sample, never one by one."""
        if expand_size == 1:
            return input_ids, model_kwargs
        counts = model_kwargs.get("media_per_sample")
        memory = model_kwargs.get("media_memory")
        if memory is not None and counts is not None:
            per_sample = torch.arange(len(memory), device=counts.device).split(counts.tolist())
            index = torch.cat([sample for sample in per_sample for _ in range(expand_size)])
            model_kwargs["media_memory"] = memory.select(index)
        for name, value in model_kwargs.items():
            if isinstance(value, Tensor):
                model_kwargs[name] = value.repeat_interleave(expand_size, dim=0)
        if input_ids is not None:
            input_ids = input_ids.repeat_interleave(expand_size, dim=0)
        return input_ids, model_kwargs


class _Hook:
    """A hook that knows its model, and does nothing outside of that model's forward. Copied along by deepcopy."""

    def __init__(self, model: FlamingoForConditionalGeneration):
        self.model = model


class _LayerHook(_Hook):
    """Runs a gated block on the hidden states that enter a decoder layer."""

    def __init__(self, model: FlamingoForConditionalGeneration, block: int):
        super().__init__(model)
        self.block = block

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        now = self.model._conditioning
        if now is None:
            return None
        keys, values = now.memory.keys[self.block], now.memory.values[self.block]
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden = self.model.cross_attention[self.block](
            hidden, now.slots.spread(keys), now.slots.spread(values), now.mask, now.sees
        )
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


class _SelectPositions(_Hook):
    """Lets only those positions into the LM's head whose logits are asked for."""

    def __call__(self, head: nn.Module, args: tuple[Any, ...]) -> Any:
        now = self.model._conditioning
        if now is None or (isinstance(now.positions, int) and now.positions == 0):
            return None
        hidden = args[0]
        if isinstance(now.positions, int):
            return (hidden[:, -now.positions :],)
        return (rearrange(hidden, "b t d -> (b t) d")[now.positions.to(hidden.device)][None],)


class _AppendNewTokens(_Hook):
    """Puts the logits of the new tokens into the columns of their ids, beside or over those of the head's own rows."""

    def __call__(self, head: nn.Module, args: tuple[Any, ...], logits: Tensor) -> Any:
        model, now = self.model, self.model._conditioning
        ids = model.config.new_token_ids
        if now is None or not ids:
            return None
        rows = model.new_input_rows if model.new_output_rows is None else model.new_output_rows
        new = (args[0] @ rows.to(args[0]).T).to(logits)
        missing = max(ids) + 1 - logits.shape[-1]
        if missing > 0:
            logits = torch.cat((logits, logits.new_zeros(*logits.shape[:-1], missing)), dim=-1)
        columns = model.new_ids.to(logits.device)
        if now.in_place:
            return PutColumns.apply(logits, new, columns)
        if not torch.is_grad_enabled():
            return logits.index_copy_(-1, columns, new)
        return logits.index_copy(-1, columns, new)


def _checkpoint_fast(checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(fast_products()(function), *args)


def _number(
    pixel_values: Tensor | None, media_frames: Tensor | None, latents: Tensor | None, memory: MediaMemory | None
) -> int:
    """How many media there are, in whichever form they are given: one, or none."""
    forms = [given for given in (pixel_values, latents, memory) if given is not None]
    if len(forms) > 1:
        raise FlamingoError("expected one of pixel_values, media_latents and media_memory")
    if media_frames is not None:
        if pixel_values is None:
            raise FlamingoError("media_frames: expected with pixel_values alone, whose rows they share out")
        return media_frames.numel()
    return len(forms[0]) if forms else 0


def check_pixels(pixel_values: Tensor, media_frames: Tensor | None = None) -> None:
    """Refuse what `encode_media` does not take; it names shapes and numbers."""
    shape = tuple(pixel_values.shape)
    if pixel_values.ndim != 5:
        raise FlamingoError(f"pixel_values of shape {shape}: expected (media, frames, channels, height, width)")
    if not pixel_values.is_floating_point():
        raise FlamingoError(f"pixel_values of {pixel_values.dtype}: expected normalised ones, in floating point")
    if media_frames is None:
        return
    if media_frames.ndim != 1 or media_frames.is_floating_point():
        raise FlamingoError(
            f"media_frames of shape {tuple(media_frames.shape)} and {media_frames.dtype}: expected a whole number for "
            "each medium"
        )
    if shape[1] != 1:
        raise FlamingoError(
            f"pixel_values of shape {shape}: expected (frames of all media, 1, channels, height, width), with "
            "media_frames"
        )
    if not torch.compiler.is_compiling():  # a graph may not ask
        counts = media_frames.tolist()
        if sum(counts) != shape[0] or min(counts, default=1) < 1:
            raise FlamingoError(
                f"media_frames: expected numbers from 1 that add up to {shape[0]} rows of pixel_values, got {counts}"
            )


def check_media(media_per_sample: Tensor, media: int, counts: Tensor) -> None:
    """Refuse numbers of media that do not fit one another or the marks in the text; it names the sample."""
    if int(media_per_sample.sum()) != media:
        raise FlamingoError(
            f"media_per_sample: expected numbers that add up to {media} media, got {media_per_sample.tolist()}"
        )
    if not torch.equal(counts, media_per_sample):
        sample = int((counts != media_per_sample).nonzero()[0])
        raise FlamingoError(
            f"found {int(counts[sample])} image tokens but received {int(media_per_sample[sample])} media "
            f"(sample {sample})"
        )


def check_names(source: str, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Refuse a set of tensors that is not the model's.

    Raises:
        FlamingoError: it names the source and the tensors that are missing or not expected.
    """
    faults = [
        f"{kind} {', '.join(sorted(names))}"
        for kind, names in (("without", list(missing)), ("with unexpected", list(unexpected)))
        if names
    ]
    if faults:
        raise FlamingoError(f"{source}: {'; '.join(faults)}; expected exactly the model's tensors")


def trainable_names(model: nn.Module) -> set[str]:
    """Names of the parameters that train."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def decoder_layers(language_model: nn.Module, path: str | None = None) -> nn.ModuleList:
    """The list of an LM's decoder layers: the one at `path`, or the only list as long as the LM has layers.

    Raises:
        FlamingoError: where there is none, or more than one; it names the LM's class and the option to give the path.
    """
    name = type(language_model).__name__
    if path is not None:
        try:
            found = language_model.get_submodule(path)
        except AttributeError:
            raise FlamingoError(f"decoder_layers={path!r}: {name} has no such submodule") from None
        if not isinstance(found, nn.ModuleList):
            raise FlamingoError(
                f"decoder_layers={path!r}: expected a ModuleList of {name}, found {type(found).__name__}"
            )
        return found
    config: Any = language_model.config
    depth = config.get_text_config().num_hidden_layers
    lists = {
        path: module
        for path, module in language_model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth and path.count(".layers.") == 0
    }
    if len(lists) != 1:
        raise FlamingoError(
            f"decoder layers of {name}: expected one list of {depth} layers, found {sorted(lists) or 'none'}; "
            "give its path as `decoder_layers`, such as 'model.layers'"
        )
    return next(iter(lists.values()))


def patch_tokens(vision_tower: PreTrainedModel, images: Tensor) -> Tensor:
    """`images` (N, C, H, W) → the tower's patch tokens (N, V, D), in rows: its `last_hidden_state`, less other tokens.

    | tower | leading tokens dropped | final norm |
    |---|---|---|
    | CLIP | class | not applied, as Flamingo and open_flamingo have it |
    | SigLIP, SigLIP 2 | none there | applied |
    | ViT, DINOv2 | class, registers | applied |
    | ConvNeXt, ResNet, RegNet and other feature maps | none there; the map is flattened | not applied |
    | Swin | none there | applied |
    """
    config: Any = vision_tower.config
    if config.model_type == "siglip2_vision_model":  # takes patches, and how many stand in a column and a row
        side = config.patch_size
        height, width = images.shape[2] // side, images.shape[3] // side
        patches = rearrange(images, "n c (h p) (w q) -> n (h w) (p q c)", p=side, q=side)
        return vision_tower(
            pixel_values=patches,
            pixel_attention_mask=torch.ones(patches.shape[:2], dtype=torch.long, device=images.device),
            spatial_shapes=torch.tensor([[height, width]], device=images.device).expand(len(images), -1),
        ).last_hidden_state
    hidden = vision_tower(pixel_values=images).last_hidden_state
    if hidden.ndim == 4:
        return rearrange(hidden, "n d h w -> n (h w) d")
    patch = getattr(config, "patch_size", None)
    if patch is None:
        return hidden
    vertical, horizontal = (patch, patch) if isinstance(patch, int) else patch
    patches_there = (images.shape[2] // vertical) * (images.shape[3] // horizontal)
    return hidden[:, max(0, hidden.shape[1] - patches_there) :]
