"""A vision tower and a causal LM → a Flamingo: loading, special tokens, new rows, freezing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
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
from flamingo.modeling import FlamingoForConditionalGeneration
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
    trust_remote_code: bool = False,
    dtype: torch.dtype | str = "auto",
    **options: Any,
) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
    """Put a Flamingo over two backbones; its own parts are new, and its gates closed.

    Args:
        vision: folder or hub id of a vision tower that yields patch tokens or a feature map; of a two-tower model
            (CLIP, SigLIP) the vision part is taken.
        language: folder or hub id of a causal LM with its tokenizer.
        trust_remote_code: run code that comes with the weights.
        dtype: of the backbones.
        options: fields of `FlamingoConfig`, such as `cross_attention_every`.

    Raises:
        FlamingoError: where a backbone cannot be loaded; it names the backbone.

    Returns:
        The model, whose backbones are frozen unless the options say otherwise, and its processor.
    """
    vision, language = backbone_path(vision), backbone_path(language)
    common: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    with _loading(vision):
        vision_config = AutoConfig.from_pretrained(vision, **common)
        vision_config = getattr(vision_config, "vision_config", vision_config)
        tower = AutoModel.from_pretrained(vision, config=vision_config, dtype=dtype, **common)
        image_processor = AutoImageProcessor.from_pretrained(vision, backend="pil", **common)
    with _loading(language):
        lm = AutoModelForCausalLM.from_pretrained(language, dtype=dtype, **common)
        tokenizer = AutoTokenizer.from_pretrained(language, **common)
    return assemble(tower, lm, image_processor, tokenizer, **options)


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Errors of transformers as one that names the backbone."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
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
    **options: Any,
) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
    """`from_backbones` over loaded parts: adds the special tokens, builds the model and starts its new rows."""
    kernels = {backbone: backbone.config._attn_implementation for backbone in (vision_tower, language_model)}
    known = set(tokenizer.get_vocab().values())
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [END_OF_CHUNK, IMAGE_TOKEN]}, replace_extra_special_tokens=False
    )
    ids = {mark: tokenizer.convert_tokens_to_ids(mark) for mark in (END_OF_CHUNK, IMAGE_TOKEN)}
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
    _start_new_rows(model, sorted(known))
    ends = {ids[END_OF_CHUNK], tokenizer.eos_token_id} - {None}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=sorted(ends), pad_token_id=pad
    )
    channels = int(getattr(vision_tower.config, "num_channels", 3))
    return model, FlamingoProcessor(image_processor, tokenizer, channels=channels)


@torch.no_grad()
def _start_new_rows(model: FlamingoForConditionalGeneration, known: list[int]) -> None:
    """New rows start at the mean of the LM's rows plus a tenth of their spread, so that no new token stands out."""
    ends: list[tuple[Tensor, Any]] = [(model.new_input_rows, model.get_input_embeddings().weight)]
    if model.new_output_rows is not None:
        ends.append((model.new_output_rows, model.get_output_embeddings().weight))
    for rows, table in ends:
        used = table[[i for i in known if i < table.shape[0]]].float()
        rows.copy_(used.mean(0) + 0.1 * used.std(0) * torch.randn(rows.shape))
