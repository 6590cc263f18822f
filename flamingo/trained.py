"""The small save: what Flamingo trained, and which backbones it stands on.

A folder holds `config.json`, with the name of each backbone and its revision on the hub or the SHA-256 of its files,
and `trained.safetensors`. `save_pretrained` writes everything instead.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig

from flamingo.backbones import backbone_identity, backbone_path, load_language, load_vision
from flamingo.configuration import FlamingoConfig
from flamingo.errors import FlamingoError
from flamingo.files import whole
from flamingo.modeling import TRAINED, FlamingoForConditionalGeneration, check_names, trainable_names
from flamingo.packing import check_packing

PARTS = {"vision": "vision_tower.", "language": "language_model."}


def trained_tensors(model: FlamingoForConditionalGeneration, replaced: list[str]) -> dict[str, Tensor]:
    """The tensors of a model, by name, that are not its backbones': Flamingo's own, and the backbones' `replaced`."""
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith(tuple(PARTS.values())) or name in replaced
    }


def changed_names(model: FlamingoForConditionalGeneration) -> list[str]:
    """Names of backbone tensors that are not the backbones' any more, or need not be.

    They are those that train, the buffers beside them (running means), and those that a checkpoint replaced.
    """
    trained = {name for name in trainable_names(model) if name.startswith(tuple(PARTS.values()))}
    parts = {prefix for prefix in PARTS.values() if any(name.startswith(prefix) for name in trained)}
    buffers = {name for name, _ in model.named_buffers() if name.startswith(tuple(parts))} & model.state_dict().keys()
    return sorted(trained | buffers | set(model.config.replaced))


def save_trained(model: FlamingoForConditionalGeneration, folder: str | Path) -> None:
    """Write `config.json`, `generation_config.json` and `trained.safetensors` into `folder`.

    Tensors of the backbones that train, or that a checkpoint replaced (`config.replaced`), are written too. The
    processor is saved beside it by `processor.save_pretrained(folder)`.

    Raises:
        FlamingoError: where the model does not know where its backbones came from, or its LM has adapters.
    """
    model.check_without_adapters()
    folder = Path(folder)
    model.note_precision()
    config = copy.deepcopy(model.config)
    for part in PARTS:
        if part not in config.backbones:
            raise FlamingoError(
                f"save_trained: config.backbones has no {part!r}; expected a model built by `from_backbones`, "
                "or use `save_pretrained`"
            )
    config.replaced = changed_names(model)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in trained_tensors(model, config.replaced).items()}
    with whole(folder / TRAINED) as unfinished:
        save_file(tensors, unfinished, metadata={"format": "pt"})


def from_trained(
    folder: str | Path,
    *,
    vision: str | Path | None = None,
    language: str | Path | None = None,
    trust_remote_code: bool = False,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    any_backbones: bool = False,
) -> FlamingoForConditionalGeneration:
    """Load what `save_trained` wrote over its backbones.

    Args:
        folder: as written.
        vision, language: where the backbones are now, if not where they were.
        dtype: of the backbones; default: as they were.
        trust_remote_code, attn_implementation: as `flamingo.from_backbones` has them.
        any_backbones: take the backbones as they are, without comparing them.

    Raises:
        FlamingoError: where a backbone is missing, or has other contents than the one that the model was trained on
            (known by the SHA-256 of a folder, or by the revision on the hub); and where tensors are missing,
            unexpected or of another shape.
    """
    folder = Path(folder)
    if not (folder / TRAINED).is_file():
        raise FlamingoError(f"{folder}: expected {TRAINED}, as `save_trained` writes it")
    config = FlamingoConfig.from_pretrained(folder)
    names = {
        part: given or config.backbones[part]["name"] for part, given in zip(PARTS, (vision, language), strict=True)
    }
    faults = [
        fault
        for part, name in names.items()
        if (fault := _fault(part, name, config.backbones[part], compare=not any_backbones))
    ]
    if faults:
        raise FlamingoError(f"{folder}: {'; '.join(faults)}")
    revisions = {part: config.backbones[part]["revision"] for part in PARTS}
    config.backbones = {part: {**config.backbones[part], "name": str(name)} for part, name in names.items()}
    common: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    dtypes = {part: dtype or config.backbone_dtypes[part] for part in PARTS}
    tower, _ = load_vision(names["vision"], revisions["vision"], dtype=dtypes["vision"], **common)
    common["attn_implementation"] = attn_implementation
    lm, _ = load_language(names["language"], revisions["language"], dtype=dtypes["language"], **common)
    kernels = {backbone: backbone.config._attn_implementation for backbone in (tower, lm)}
    config.vision_config, config.text_config = tower.config, lm.config
    for backbone, kernel in kernels.items():
        backbone.config._attn_implementation = kernel
    model = FlamingoForConditionalGeneration(config, tower, lm)
    _load(model, folder / TRAINED)
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    if config.packing:
        check_packing(model)
    return model.eval()


def _fault(part: str, name: str | Path, origin: dict[str, Any], *, compare: bool) -> str | None:
    """What is wrong with a backbone, if anything."""
    try:
        path = Path(backbone_path(name))
    except FlamingoError:
        return f"the {part} backbone is missing: {name}; give its place as {part}=…"
    wanted = origin["sha256"]
    if not compare or (wanted is None and str(name) == origin["name"]):  # from the hub, by its revision
        return None
    if wanted is None or not path.is_dir():
        return (
            f"the {part} backbone was {origin['name']}, and nothing tells whether {name} is the same; "
            "any_backbones=True takes it"
        )
    found = backbone_identity(name)
    if found == wanted:
        return None
    return f"the {part} backbone differs: {name} has SHA-256 {found[:12]}…, expected {wanted[:12]}…"


@torch.no_grad()
def _load(model: FlamingoForConditionalGeneration, file: Path) -> None:
    """Put the tensors of `file` into the model: exactly those that it needs, of the right shapes."""
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise FlamingoError(f"{file}: cannot be read: {error}") from error
    wanted = trained_tensors(model, model.config.replaced)
    check_names(str(file), wanted.keys() - tensors.keys(), tensors.keys() - wanted.keys())
    for name, parameter in wanted.items():
        if tensors[name].shape != parameter.shape:
            raise FlamingoError(
                f"{file}: {name} has shape {tuple(tensors[name].shape)}, expected {tuple(parameter.shape)}"
            )
        parameter.copy_(tensors[name])
