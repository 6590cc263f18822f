"""A vision tower and a causal LM → a Flamingo: loading, special tokens, new rows, freezing; and what is added later."""

from __future__ import annotations

import hashlib
import pickle
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)

from flamingo.configuration import FlamingoConfig
from flamingo.errors import FlamingoError
from flamingo.files import sha256
from flamingo.modeling import FlamingoForConditionalGeneration, check_names
from flamingo.packing import check_packing
from flamingo.processing import END_OF_CHUNK, IMAGE_TOKEN, FlamingoProcessor

PACKAGED = "package:"


def backbone_path(name: str | Path) -> str:
    """The folder or hub id of a backbone. `package:NAME/FOLDER` is a folder inside the installed package NAME.

    Raises:
        FlamingoError: where a packaged folder, or something that looks like a path, does not exist.
    """
    name = str(name)
    if name.startswith(PACKAGED):
        package, _, folder = name.removeprefix(PACKAGED).partition("/")
        try:
            path = Path(str(resources.files(package))) / folder
        except ModuleNotFoundError:
            raise FlamingoError(f"{name}: there is no package {package}") from None
    else:
        path = Path(name)
        if not path.exists() and name.count("/") <= 1 and not name.startswith((".", "/", "~")):
            return name  # an id on the hub
    if not path.is_dir():
        raise FlamingoError(f"{name}: expected a folder with a Hugging Face model")
    return str(path)


def from_backbones(
    vision: str | Path,
    language: str | Path,
    *,
    vision_revision: str | None = None,
    language_revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: torch.dtype | str = "auto",
    attn_implementation: str | None = None,
    extra_tokens: Sequence[str] = (),
    **options: Any,
) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
    """Put a Flamingo over two backbones; its own parts are new, and its gates closed.

    Args:
        vision: folder or hub id of a vision tower that yields patch tokens or a feature map (`patch_tokens` says what
            is taken of which); of a two-tower model (CLIP, SigLIP) the vision part is taken.
        language: folder or hub id of a causal LM with its tokenizer.
        vision_revision, language_revision: branch, tag or commit on the hub.
        trust_remote_code: run code that comes with the weights. Without it none is run, and pickled weights are
            loaded as tensors alone (`weights_only`) in either case.
        dtype: of the backbones; "auto" takes that of the files.
        attn_implementation: attention kernel of the LM: "eager", "sdpa", "flash_attention_2" or "flex_attention".
        extra_tokens: further special tokens, each with rows of its own after those of `<|endofchunk|>` and `<image>`.
        options: fields of `FlamingoConfig`, such as `cross_attention_every`.

    Raises:
        FlamingoError: where a backbone cannot be loaded, or is not the same model in transformers; it names it.

    Returns:
        The model, whose backbones are frozen unless the options say otherwise, and its processor.
    """
    tower, image_processor = load_vision(vision, vision_revision, trust_remote_code=trust_remote_code, dtype=dtype)
    lm, tokenizer = load_language(
        language,
        language_revision,
        trust_remote_code=trust_remote_code,
        dtype=dtype,
        attn_implementation=attn_implementation,
    )
    options["backbones"] = {"vision": _origin(vision, tower), "language": _origin(language, lm)}
    return assemble(tower, lm, image_processor, tokenizer, extra_tokens=extra_tokens, **options)


def load_vision(
    name: str | Path, revision: str | None = None, *, trust_remote_code: bool = False, dtype: torch.dtype | str = "auto"
) -> tuple[PreTrainedModel, Any]:
    """A vision tower and its image processor, from a folder or hub id."""
    path = backbone_path(name)
    common: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
    with _loading(path):
        config = AutoConfig.from_pretrained(path, **common)
        config = getattr(config, "vision_config", config)
        tower, info = AutoModel.from_pretrained(
            path, config=config, dtype=dtype, weights_only=True, output_loading_info=True, **common
        )
        # Whatever pools the patch tokens is not used, and many checkpoints lack it.
        check_names(path, [name for name in info["missing_keys"] if not re.search(r"pooler|head\.", name)], [])
        return tower, AutoImageProcessor.from_pretrained(path, backend="pil", **common)


def load_language(
    name: str | Path,
    revision: str | None = None,
    *,
    trust_remote_code: bool = False,
    dtype: torch.dtype | str = "auto",
    attn_implementation: str | None = None,
) -> tuple[PreTrainedModel, Any]:
    """A causal LM and its tokenizer, from a folder or hub id."""
    path = backbone_path(name)
    common: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
    kernel = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with _loading(path):
        lm, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, weights_only=True, output_loading_info=True, **kernel, **common
        )
        check_names(path, info["missing_keys"], [])
        if ignores_qk_norm(lm):
            raise FlamingoError(
                f"{path}: attn_config.qk_ln is set (MPT-1B), but transformers' MPT has no QK LayerNorm and would be "
                "another model; expected an LM without it, or its own code with trust_remote_code=True"
            )
        return lm, AutoTokenizer.from_pretrained(path, **common)


def ignores_qk_norm(language_model: PreTrainedModel) -> bool:
    """Whether an LM's configuration asks for a QK LayerNorm that its class, transformers' MPT, does not have."""
    attention = getattr(language_model.config, "attn_config", None)
    asked = attention.get("qk_ln") if isinstance(attention, dict) else getattr(attention, "qk_ln", False)
    return bool(asked) and type(language_model).__module__.startswith("transformers.")


def _origin(name: str | Path, backbone: PreTrainedModel) -> dict[str, Any]:
    """Where a backbone came from: a folder with its whole path and SHA-256, a hub id with its commit."""
    path = Path(backbone_path(name))
    if not path.is_dir():
        revision = getattr(backbone.config, "_commit_hash", None)
        return {"name": str(name), "revision": revision, "sha256": None}
    place = str(name) if str(name).startswith(PACKAGED) else str(path.resolve())
    return {"name": place, "revision": None, "sha256": backbone_identity(name)}


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Errors of transformers as one that names the backbone."""
    try:
        yield
    except FlamingoError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise FlamingoError(f"{name}: cannot be loaded as a backbone: {error}") from error


def backbone_identity(name: str | Path) -> str:
    """What tells one backbone from another: SHA-256 over the weights, configuration and tokenizer of its folder.

    Of a hub id it is the id itself.
    """
    path = Path(backbone_path(name))
    if not path.is_dir():
        return str(name)
    files = sorted(file for suffix in ("safetensors", "bin", "json") for file in path.glob(f"*.{suffix}"))
    return hashlib.sha256("".join(f"{file.name} {sha256(file)}\n" for file in files).encode()).hexdigest()


def assemble(
    vision_tower: PreTrainedModel,
    language_model: PreTrainedModel,
    image_processor: Any,
    tokenizer: Any,
    *,
    extra_tokens: Sequence[str] = (),
    **options: Any,
) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
    """`from_backbones` over loaded parts: adds the special tokens, builds the model and starts its new rows."""
    kernels = {backbone: backbone.config._attn_implementation for backbone in (vision_tower, language_model)}
    known = set(tokenizer.get_vocab().values())
    marks = [END_OF_CHUNK, IMAGE_TOKEN, *extra_tokens]
    tokenizer.add_special_tokens({"additional_special_tokens": marks}, replace_extra_special_tokens=False)
    ids = {mark: tokenizer.convert_tokens_to_ids(mark) for mark in marks}
    config = FlamingoConfig(
        vision_tower.config,
        language_model.config,
        image_token_id=ids[IMAGE_TOKEN],
        end_of_chunk_token_id=ids[END_OF_CHUNK],
        new_token_ids=sorted(set(ids.values()) - known),
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        **options,
    )
    for backbone, kernel in kernels.items():  # building a composite configuration clears those of its parts
        backbone.config._attn_implementation = kernel
    model = FlamingoForConditionalGeneration(config, vision_tower, language_model)
    if config.packing:
        check_packing(model)
    _start_new_rows(model, sorted(known))
    ends = {ids[END_OF_CHUNK], tokenizer.eos_token_id} - {None}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=sorted(ends), pad_token_id=pad
    )
    channels = int(getattr(vision_tower.config, "num_channels", 3))
    return model, FlamingoProcessor(image_processor, tokenizer, channels=channels)


def add_tokens(model: FlamingoForConditionalGeneration, processor: FlamingoProcessor, tokens: Sequence[str]) -> None:
    """Give special tokens rows of their own, in model and processor, in place: `<answer>` for a pretrained model.

    All else stays as it is, bit for bit: the backbones, the rows of tokens that are new already, and their logits. The
    further rows start as all new rows do. Do it before an optimizer is made and before the model is compiled or shared
    out over processes; save the processor with the model.

    Args:
        tokens: those that the model has, or its LM knows, get no rows.

    Raises:
        FlamingoError: where a token is blank, or the processor is not the model's.
    """
    tokenizer, own = processor.tokenizer, model.row_of.shape[0]
    if processor.image_token_id != model.config.image_token_id:
        raise FlamingoError(
            f"processor: {IMAGE_TOKEN} has id {processor.image_token_id}, expected the model's, "
            f"{model.config.image_token_id}"
        )
    if blank := [token for token in tokens if not token.strip()]:
        raise FlamingoError(f"tokens: expected words, got {blank[0]!r}")
    vocabulary = tokenizer.get_vocab()
    if strange := sorted(token for token, i in vocabulary.items() if i >= own and token not in tokens):
        raise FlamingoError(
            f"processor: it has tokens that the model lacks: {', '.join(strange)}; expected the model's"
        )
    tokenizer.add_special_tokens({"additional_special_tokens": [*tokens]}, replace_extra_special_tokens=False)
    lacking = [token for token in dict.fromkeys(tokens) if vocabulary.get(token, own) >= own]
    known = sorted({i for i in vocabulary.values() if i < own} - set(model.config.new_token_ids))
    first = len(model.config.new_token_ids)
    model.append_new_rows(tokenizer.convert_tokens_to_ids(lacking), max(tokenizer.get_vocab().values()) + 1)
    _start_new_rows(model, known, first)


def add_frames(model: FlamingoForConditionalGeneration, frames: int) -> None:
    """Give a model that was trained on images embeddings of so many frames, in place; zeros, which change nothing yet.

    Do it before an optimizer is made and before the model is compiled or shared out over processes.

    Raises:
        FlamingoError: where the model has some, or `frames` is not positive.
    """
    resampler = model.resampler
    if resampler.frame_embeddings is not None:
        raise FlamingoError(f"add_frames: the model has embeddings of {len(resampler.frame_embeddings)} frames already")
    if frames < 1:
        raise FlamingoError(f"frames={frames}: expected at least 1")
    resampler.frame_embeddings = nn.Parameter(resampler.latents.new_zeros(frames, resampler.latents.shape[1]))
    model.config.resampler_max_frames = frames


@torch.no_grad()
def _start_new_rows(model: FlamingoForConditionalGeneration, known: list[int], first: int = 0) -> None:
    """New rows start at the mean of the LM's rows plus a tenth of their spread, so that no new token stands out.

    Those from `first` on, of the LM's rows `known`.
    """
    ends: list[tuple[Tensor, Any]] = [(model.new_input_rows, model.get_input_embeddings().weight)]
    if model.new_output_rows is not None:
        ends.append((model.new_output_rows, model.get_output_embeddings().weight))
    for rows, table in ends:
        used = table[[i for i in known if i < table.shape[0]]].float()
        rows[first:].copy_(used.mean(0) + 0.1 * used.std(0) * torch.randn(rows[first:].shape).to(used))
