"""Otter's checkpoints, in and out (github.com/Luodian/Otter): Hugging Face folders, and `.pt` files of what it trained.

A folder holds the whole model. Otter trained all rows of the embedding, of LLaMA the head, and in some models more:
what is not the backbone's replaces it, and `model.config.replaced` says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flamingo.backbones import from_backbones
from flamingo.errors import FlamingoError
from flamingo.files import read_object, whole
from flamingo.instructions import ANSWER
from flamingo.interop import open_flamingo
from flamingo.interop.open_flamingo import NewOutputRows
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.processing import FlamingoProcessor, chat_template

WEIGHTS = ("model", "safetensors"), ("pytorch_model", "bin")
HEADS = ("cross_attention_heads", "resampler_heads")
"""What no shape tells: Otter's code has 8 of each; `save` writes ours into config.json, which Otter's does not mind."""
CLASSES = {"llama": "LlamaForCausalLM", "mpt": "MPTForCausalLM"}
"""LMs that Otter's code builds, and its names for them."""


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a folder (one file or shards, safetensors or pickles of tensors alone), or of a file.

    Raises:
        FlamingoError: where a file is missing or cannot be read.
    """
    path = Path(path)
    if not path.is_dir():
        return open_flamingo.read_checkpoint(path)
    for stem, suffix in WEIGHTS:
        index, file = path / f"{stem}.{suffix}.index.json", path / f"{stem}.{suffix}"
        if index.is_file():
            shards = sorted(set(read_object(index)["weight_map"].values()))
            read = [open_flamingo.read_checkpoint(path / shard) for shard in shards]
            return {name: tensor for shard in read for name, tensor in shard.items()}
        if file.is_file():
            return open_flamingo.read_checkpoint(file)
    raise FlamingoError(f"{path}: expected a folder with model.safetensors or pytorch_model.bin, or their shards")


def load(
    model: FlamingoForConditionalGeneration,
    checkpoint: str | Path | Mapping[str, Tensor],
    *,
    new_output_rows: NewOutputRows | None = None,
) -> None:
    """As `open_flamingo.load`, for either layout, but all that is not the backbone's replaces it."""
    source = "checkpoint" if isinstance(checkpoint, Mapping) else str(checkpoint)
    tensors = checkpoint if isinstance(checkpoint, Mapping) else read_checkpoint(checkpoint)
    open_flamingo.put(model, tensors, source, new_output_rows=new_output_rows, replace=True)


def from_otter(
    checkpoint: str | Path,
    vision: str | Path,
    language: str | Path,
    *,
    new_output_rows: NewOutputRows | None = None,
    **options: Any,
) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
    """A checkpoint over its two backbones; the shape of the model is read off the checkpoint.

    Args:
        checkpoint: folder or file.
        vision, language: folder or hub id; the language model gives the tokenizer too.
        new_output_rows: as in `open_flamingo.load`.
        options: as in `flamingo.from_backbones`; `extra_tokens` is `<answer>` by default, and nothing for a folder
            whose config.json says that it is no Otter but an OpenFlamingo in Otter's layout.

    Returns:
        The model and its processor, which asks with `<answer>` if there is one; nothing in a checkpoint says whether
        with spaces, as released through July 2023: then `chat_template(answer_mark=True, spaced=True)` is the form.

    Raises:
        FlamingoError: as `load` and `from_backbones`.
    """
    tensors = read_checkpoint(checkpoint)
    options = shape_options(tensors, checkpoint, options)
    model, processor = from_backbones(vision, language, **options)
    open_flamingo.put(model, tensors, str(checkpoint), new_output_rows=new_output_rows, replace=True)
    if ANSWER in options["extra_tokens"]:
        processor.chat_template = chat_template(answer_mark=True, spaced=False)
    return model, processor


def shape_options(tensors: Mapping[str, Tensor], checkpoint: str | Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """As `open_flamingo.shape_options`, with the tokens and heads that the folder's config.json tells.

    Raises:
        FlamingoError: as that, and where config.json is no JSON object.
    """
    file = Path(checkpoint) / "config.json"
    config = read_object(file) if file.is_file() else {"model_type": "otter"}
    heads = {name: config[name] for name in HEADS if name in config}
    options = {"extra_tokens": (ANSWER,) if config.get("model_type") == "otter" else (), **heads, **options}
    return open_flamingo.shape_options(tensors, str(checkpoint), options)


def save(model: FlamingoForConditionalGeneration, path: str | Path) -> None:
    """Write the whole model in Otter's layout: a folder, or a file of tensors where `path` ends in `.pt`.

    Otter's code builds LLaMA and MPT. It resizes LLaMA's tables to its tokenizer's length, `<answer>` after `<image>`
    included, and keeps MPT's.
    """
    path, own = Path(path), model.state_dict()
    names = open_flamingo.names(model, "otter")
    config, text_config = model.config, model.config.text_config
    answer = max(config.image_token_id, config.end_of_chunk_token_id) + 1
    rows = open_flamingo.table_rows(model) + int(answer == model.row_of.shape[0])
    if text_config.model_type != "llama":
        rows = max(rows, model.get_input_embeddings().get_parameter("weight").shape[0])
    tables = open_flamingo.resized_tables(model, rows)
    tensors = {theirs: tables.get(ours, own[ours]).cpu() for ours, theirs in names.items()}
    with whole(path) as unfinished:
        if path.suffix == ".pt":
            torch.save(tensors, unfinished)
            return
        unfinished.mkdir()
        torch.save(tensors, unfinished / "pytorch_model.bin")
        described = {
            "model_type": "otter",
            "architectures": ["OtterForConditionalGeneration"],
            "cross_attn_every_n_layers": config.cross_attention_every,
            **{name: getattr(config, name) for name in HEADS},
            "max_num_frames": config.resampler_max_frames or None,
            "tie_word_embeddings": model.new_output_rows is None,
            "vision_config": config.vision_config.to_dict(),
            "text_config": {
                **text_config.to_dict(),
                "vocab_size": rows,
                "architectures": [CLASSES.get(text_config.model_type, type(model.language_model).__name__)],
                "_name_or_path": config.backbones.get("language", {}).get("name", ""),
            },
        }
        (unfinished / "config.json").write_text(json.dumps(described, indent=2, default=str) + "\n", encoding="utf-8")
