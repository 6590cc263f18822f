"""OpenFlamingo's checkpoints, in and out (package open_flamingo 2.0.1; the released 3B, 4B and 9B models).

A checkpoint holds what was trained, the LM's embeddings, and sometimes more of the LM. Each of its tensors is used, is
equal to the backbone's, or is an error. `names` is the one place that relates its names to ours, and to Otter's.

Legend: K new tokens, D width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from flamingo.backbones import from_backbones, ignores_qk_norm
from flamingo.configuration import FlamingoConfig
from flamingo.errors import FlamingoError
from flamingo.files import whole
from flamingo.interop import open_clip
from flamingo.modeling import FlamingoForConditionalGeneration, check_names, decoder_layers
from flamingo.processing import FlamingoProcessor
from flamingo.trained import changed_names

NewOutputRows = Literal["mean", "input", "random"]
Layout = Literal["open_flamingo", "otter"]
OWN_PARTS = ("resampler.", "cross_attention.")
"""of the model's tensors, those of Flamingo's own modules"""
OLDER = {"gpt_neox": ("lang_encoder.embed_out.", "lang_encoder.lm_head.")}
"""by the LM's model type: a prefix in checkpoints made with transformers before 5, and what it is now"""


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The model's tensors in a `.pt`, `.bin` or `.safetensors` file, by name and without the prefix `module.`.

    Pickles are read with `weights_only=True`: nothing in them runs.

    Raises:
        FlamingoError: where the file cannot be read so, or holds something else.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, UnpicklingError, EOFError, SafetensorError) as error:
        raise FlamingoError(f"{path}: cannot be read as a checkpoint of tensors: {error}") from error
    return _flat(content, str(path))


def _flat(content: Any, source: str) -> dict[str, Tensor]:
    for nested in ("model_state_dict", "state_dict"):  # OpenFlamingo's and open_clip's training checkpoints
        if isinstance(content, Mapping) and nested in content:
            content = content[nested]
    if not isinstance(content, Mapping) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise FlamingoError(f"{source}: expected tensors by name, or those under `model_state_dict`")
    return {str(name).removeprefix("module."): tensor for name, tensor in content.items()}


def load(
    model: FlamingoForConditionalGeneration,
    checkpoint: str | Path | Mapping[str, Tensor],
    *,
    new_output_rows: NewOutputRows | None = None,
) -> None:
    """Put a checkpoint (a file, or its tensors by name) into a model of its shape over the LM it was trained on.

    Where the rows of known tokens in its embedding or head are not the backbone's, they replace them, and
    `model.config.replaced` names the parameter. Other tensors of the LM or the tower must equal the backbone's.

    Args:
        model: the model; nothing of it changes where the checkpoint is refused.
        checkpoint: all layouts that OpenFlamingo writes.
        new_output_rows: of an untied LM, where the checkpoint has no head: "mean" of the head's rows in use, "input"
            for the new input rows, "random" for a normal distribution of deviation 0.02.

    Raises:
        FlamingoError: where a tensor is missing, unexpected, of another shape or not the backbone's; it names them.
    """
    if isinstance(checkpoint, Mapping):
        put(model, _flat(checkpoint, "checkpoint"), "checkpoint", new_output_rows=new_output_rows)
    else:
        put(model, read_checkpoint(checkpoint), str(checkpoint), new_output_rows=new_output_rows)


def from_open_flamingo(
    checkpoint: str | Path,
    vision: str | Path,
    language: str | Path,
    *,
    new_output_rows: NewOutputRows | None = None,
    **options: Any,
) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
    """A checkpoint over its two backbones; the shape of the model is read off the checkpoint.

    Args:
        checkpoint, new_output_rows: as in `load`.
        vision, language, options: as in `flamingo.from_backbones`.

    Raises:
        FlamingoError: as `load` and `from_backbones`.

    Returns:
        The model and its processor.
    """
    tensors = read_checkpoint(checkpoint)
    model, processor = from_backbones(vision, language, **shape_options(tensors, str(checkpoint), options))
    put(model, tensors, str(checkpoint), new_output_rows=new_output_rows)
    return model, processor


def save(model: FlamingoForConditionalGeneration, path: str | Path, *, rows: int | None = None) -> None:
    """Write a checkpoint that open_flamingo's model over the same backbones loads with `strict=False`.

    Backbone tensors that are not its files' any more (`changed_names`) are in it; where one is the tower's, the whole
    tower, under open_clip's names. Such a checkpoint is for `otter.load`: `load` takes none with other backbones.

    Args:
        model: the model.
        path: the file.
        rows: length of open_flamingo's tokenizer; see `table_rows` for the default.

    Raises:
        FlamingoError: where `rows` are too few, or a tower that changed has tensors that open_clip's ViT has not.
    """
    rows = table_rows(model) if rows is None else rows
    own, named, others = model.state_dict(), names(model), changed_names(model)
    written = {name: tensor for name, tensor in own.items() if name.startswith(OWN_PARTS)}
    written.update({name: own[name] for name in others if name.startswith("language_model.")})
    written.update(resized_tables(model, rows))
    tensors = {named[name]: tensor.cpu() for name, tensor in written.items()}
    if any(name.startswith("vision_tower.") for name in others):
        tower = open_clip.restore(model.vision_tower.state_dict(), "vision_tower")
        tensors |= {f"vision_encoder.{name}": tensor.cpu() for name, tensor in tower.items()}
    older, newer = OLDER.get(model.config.text_config.model_type, ("", None))
    if newer is not None:  # open_flamingo runs over either version
        tensors |= {older + name.removeprefix(newer): t for name, t in tensors.items() if name.startswith(newer)}
    with whole(Path(path)) as unfinished:
        torch.save(tensors, unfinished)


# -- names -------------------------------------------------------------------------------------------------------------


def names(model: FlamingoForConditionalGeneration, layout: Layout = "open_flamingo") -> dict[str, str]:
    """Our name of each tensor but the new rows → its name in a checkpoint.

    Raises:
        FlamingoError: where the LM has adapters.
    """
    model.check_without_adapters()
    path = _layers_path(model)
    every = model.config.cross_attention_every
    # transformers 5 dropped a level of CLIPVisionModel's names
    older_clip = layout == "otter" and model.config.vision_config.model_type == "clip_vision_model"

    def theirs(name: str) -> str:
        part, _, rest = name.partition(".")
        if part == "vision_tower":
            return f"vision_encoder.{'vision_model.' if older_clip else ''}{rest}"
        if part == "language_model":
            return "lang_encoder." + re.sub(rf"^({re.escape(path)}\.\d+)\.", r"\1.decoder_layer.", rest)
        if part == "resampler":
            rest = re.sub(r"^frame_embeddings$", "frame_embs", rest)
            if layout == "otter":
                rest = re.sub(r"^(layers\.\d+)\.0\.", r"\1.", rest)
                rest = re.sub(r"^(layers\.\d+)\.1\.", r"\1.feed_forward.", rest)
            return f"perceiver.{rest}"
        block, _, rest = rest.partition(".")
        if layout == "otter":
            rest = re.sub(r"^ff\.", "feed_forward.", rest)
        return f"lang_encoder.{path}.{(int(block) + 1) * every - 1}.gated_cross_attn_layer.{rest}"

    return {name: theirs(name) for name in model.state_dict() if not name.startswith("new_")}


def _layers_path(model: FlamingoForConditionalGeneration) -> str:
    layers = decoder_layers(model.language_model, model.config.decoder_layers)
    return next(path for path, module in model.language_model.named_modules() if module is layers)


def _canonical(name: str, path: str, model_type: str) -> str:
    """A name as `names` has it: today's, and within the decoder layers, of what open_flamingo registers twice."""
    older, newer = OLDER.get(model_type, ("", ""))
    if older and name.startswith(older):
        return newer + name.removeprefix(older)
    name = re.sub(
        r"^lang_encoder\.gated_cross_attn_layers\.(\d+)\.", rf"lang_encoder.{path}.\1.gated_cross_attn_layer.", name
    )
    return re.sub(r"^lang_encoder\.old_decoder_blocks\.(\d+)\.", rf"lang_encoder.{path}.\1.decoder_layer.", name)


def _is_constant(name: str, tensor: Tensor) -> bool:
    """Whether this is a buffer that older transformers saved: causal masks, rotary frequencies, position numbers."""
    if name.endswith((".attn.bias", ".attention.bias", ".self_attn.bias")):
        return tensor.dtype in (torch.bool, torch.uint8)
    return name.endswith((".rotary_emb.inv_freq", ".masked_bias", ".embeddings.position_ids"))


def shape_options(tensors: Mapping[str, Tensor], source: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` for `from_backbones`, completed by those that the shapes and names of a checkpoint determine.

    A checkpoint does not tell how many heads share a projection: OpenFlamingo has as many as `FlamingoConfig`.

    Raises:
        FlamingoError: where the checkpoint has no resampler or gated blocks, or these at uneven distances.
    """
    default = FlamingoConfig()

    def find(pattern: str) -> dict[int, Tensor]:
        found = {}
        for name, tensor in tensors.items():
            name = re.sub(r"gated_cross_attn_layers\.(\d+)\.", r"\1.gated_cross_attn_layer.", name)
            if match := re.search(pattern, name):
                found[int(match[1])] = tensor
        if not found:
            raise FlamingoError(
                f"{source}: no resampler or no gated blocks; expected OpenFlamingo's or Otter's tensors"
            )
        return dict(sorted(found.items()))

    queries = find(r"\.(\d+)\.gated_cross_attn_layer\.attn\.to_q\.weight$")
    up = find(r"\.(\d+)\.gated_cross_attn_layer\.(?:ff|feed_forward)\.1\.weight$")
    layers = find(r"^perceiver\.layers\.(\d+)\.(?:0\.)?to_q\.weight$")
    resampler_up = find(r"^perceiver\.layers\.(\d+)\.(?:1|feed_forward)\.1\.weight$")
    latents, frames = tensors.get("perceiver.latents"), tensors.get("perceiver.frame_embs")
    every = min(queries) + 1
    if list(queries) != list(range(every - 1, every * len(queries), every)):
        raise FlamingoError(f"{source}: gated blocks before layers {list(queries)}; expected equal distances")
    heads = options.get("cross_attention_heads", default.cross_attention_heads)
    resampler_heads = options.get("resampler_heads", default.resampler_heads)
    found = {
        "cross_attention_every": every,
        "cross_attention_head_dim": queries[every - 1].shape[0] // heads,
        "cross_attention_ff_mult": up[every - 1].shape[0] // up[every - 1].shape[1],
        "resampler_depth": len(layers),
        "resampler_head_dim": layers[0].shape[0] // resampler_heads,
        "resampler_ff_mult": resampler_up[0].shape[0] // resampler_up[0].shape[1],
        "resampler_max_frames": 0 if frames is None else frames.shape[0],
    }
    if latents is not None:
        found["resampler_latents"] = latents.shape[0]
    return {**found, **options}


# -- tensors -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def put(
    model: FlamingoForConditionalGeneration,
    tensors: Mapping[str, Tensor],
    source: str,
    *,
    new_output_rows: NewOutputRows | None = None,
    replace: bool = False,
) -> None:
    """`load`, for tensors of either layout; with `replace`, whatever is not the backbone's replaces it."""
    refuse_unsupported(model, tensors, source)
    if "vision_encoder.conv1.weight" in tensors:
        tower = {name: tensor for name, tensor in tensors.items() if name.startswith("vision_encoder.")}
        rest = {name: tensor for name, tensor in tensors.items() if name not in tower}
        tower = open_clip.rename({name.removeprefix("vision_encoder."): tensor for name, tensor in tower.items()})
        tensors = {**rest, **{f"vision_encoder.{name}": tensor for name, tensor in tower.items()}}
    own, path, named = model.state_dict(), _layers_path(model), names(model)
    known = {theirs: ours for layout in ("open_flamingo", "otter") for ours, theirs in names(model, layout).items()}
    inputs, outputs, bias = _table_names(model)
    found: dict[str, Tensor] = {}
    unexpected = []
    for name, tensor in tensors.items():
        ours = known.get(_canonical(name, path, model.config.text_config.model_type))
        if ours is None:
            if not _is_constant(name, tensor):
                unexpected.append(name)
            continue
        if model.new_output_rows is None and ours == outputs:
            ours = inputs
        if not torch.equal(found.setdefault(ours, tensor), tensor):
            unexpected.append(f"{name} (not equal to its other copy)")

    ids = model.config.new_token_ids
    needed = [name for name in own if name.startswith(OWN_PARTS)] + ([inputs] if ids else [])
    known_rows = _known_rows(model)
    replaced = []
    for name, tensor in found.items():
        mine = own[name]
        if name in (inputs, outputs, bias):
            if tensor.shape[1:] != mine.shape[1:] or len(tensor) < _rows_in_use(model):
                unexpected.append(
                    f"{named[name]} of shape {tuple(tensor.shape)} where {_rows_in_use(model)} rows are in use, "
                    f"of width {tuple(mine.shape[1:])}"
                )
            elif name == bias and tensor[ids].any():
                unexpected.append(f"{named[name]} (with a bias for new tokens, which have none here)")
            elif not same(tensor[known_rows], mine[known_rows]):
                replaced.append(name)
        elif tensor.shape != mine.shape:
            unexpected.append(f"{named[name]} of shape {tuple(tensor.shape)} in place of {tuple(mine.shape)}")
        elif not name.startswith(OWN_PARTS) and not same(tensor, mine):
            replaced.append(name)
            if not replace:
                unexpected.append(f"{named[name]} (not equal to the backbone's)")
    check_names(source, [named[name] for name in needed if name not in found], unexpected)
    if model.new_output_rows is not None and ids and outputs not in found:
        started = _started_output_rows(model, found[inputs][ids], new_output_rows, source)
    else:
        started = None

    for name in {*needed, *replaced} & found.keys():
        if name in (inputs, outputs, bias):
            if name in replaced:
                own[name][known_rows] = found[name][known_rows].to(own[name])
        else:
            own[name].copy_(found[name])
    if ids:
        model.new_input_rows.copy_(found[inputs][ids])
        if model.new_output_rows is not None:
            model.new_output_rows.copy_(found[outputs][ids] if started is None else started)
    model.config.replaced = sorted({*model.config.replaced, *replaced})


def refuse_unsupported(model: FlamingoForConditionalGeneration, tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse what this model has no place for.

    Raises:
        FlamingoError: positions of media, or an LM with QK LayerNorm (MPT-1B) that transformers' MPT would ignore.
    """
    if "perceiver.media_time_embs" in tensors:
        raise FlamingoError(
            f"{source}: perceiver.media_time_embs are embeddings of a medium's place among the media, which this model "
            "does not have; expected a checkpoint without them"
        )
    path, model_type = _layers_path(model), model.config.text_config.model_type
    unknown = {_canonical(name, path, model_type) for name in tensors} - set(names(model).values())
    if ignores_qk_norm(model.language_model) or any(re.search(r"\.[qk]_ln\.", name) for name in unknown):
        raise FlamingoError(
            f"{source}: its LM has QK LayerNorm (qk_ln, as MPT-1B and MosaicGPT), which "
            f"{type(model.language_model).__name__} has not; expected an LM without it, or its own code with "
            "trust_remote_code=True"
        )


def same(theirs: Tensor, ours: Tensor) -> bool:
    """Whether two tensors are equal up to the rounding of one of them into the other's precision."""
    theirs = theirs.to(ours.device)
    return torch.equal(theirs.to(ours.dtype), ours) or torch.equal(theirs, ours.to(theirs.dtype))


def _table_names(model: FlamingoForConditionalGeneration) -> tuple[str, str, str]:
    """Names of the LM's embedding, of its head and of the head's bias, where it has one."""
    paths = {module: name for name, module in model.named_modules()}
    head = paths[model.get_output_embeddings()]
    return f"{paths[model.get_input_embeddings()]}.weight", f"{head}.weight", f"{head}.bias"


def _rows_in_use(model: FlamingoForConditionalGeneration) -> int:
    return model.row_of.shape[0]


def _known_rows(model: FlamingoForConditionalGeneration) -> list[int]:
    """Ids of the tokens that the LM knew."""
    table: Tensor = model.get_input_embeddings().get_parameter("weight")
    ids = (model.row_of < 0).nonzero().flatten().tolist()
    return [row for row in ids if row < table.shape[0]]


def _started_output_rows(
    model: FlamingoForConditionalGeneration, new_inputs: Tensor, start: NewOutputRows | None, source: str
) -> Tensor:
    """Output rows (K, D) of new tokens for a checkpoint that has none."""
    assert model.new_output_rows is not None
    head = model.get_output_embeddings().get_parameter("weight")
    if start == "mean":
        return head[_known_rows(model)].float().mean(0).expand_as(model.new_output_rows)
    if start == "random":
        return 0.02 * torch.randn(model.new_output_rows.shape)
    if start == "input" and new_inputs.shape == model.new_output_rows.shape:
        return new_inputs
    raise FlamingoError(
        f"{source}: has no output rows for the new tokens, which the LM's untied head needs; expected "
        f"new_output_rows=mean, random, or input where the head is as wide as the embedding; found {start}"
    )


def table_rows(model: FlamingoForConditionalGeneration) -> int:
    """Length of open_flamingo's tokenizer: ours, and `<PAD>` where the LM's tokenizer has no token for padding.

    That it has none is read off the generation's settings, which pad with the end of the sequence then.
    """
    settings = model.generation_config
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    padless = settings.pad_token_id is None or settings.pad_token_id in ends
    return _rows_in_use(model) + int(padless)


def resized_tables(model: FlamingoForConditionalGeneration, rows: int) -> dict[str, Tensor]:
    """The LM's embedding and head by our names, with the new rows in them, cut or extended to `rows` rows.

    open_flamingo resizes them so. Rows that no token of ours has (`<PAD>`) are the LM's, or the mean of those in use.

    Raises:
        FlamingoError: where `rows` are fewer than are in use.
    """
    if rows < _rows_in_use(model):
        raise FlamingoError(f"rows={rows}: expected at least the {_rows_in_use(model)} rows in use")
    own, ids = model.state_dict(), model.config.new_token_ids
    inputs, outputs, bias = _table_names(model)
    new: dict[str, Tensor] = {inputs: model.new_input_rows.detach()}
    new[outputs] = new[inputs] if model.new_output_rows is None else model.new_output_rows.detach()
    if bias in own:
        new[bias] = own[bias].new_zeros(len(ids))
    tables = {}
    for name, new_rows in new.items():
        mean = own[name][_known_rows(model)].float().mean(0)
        table = torch.cat((own[name][:rows], mean.to(own[name]).expand(max(0, rows - len(own[name])), *mean.shape)))
        table[ids] = new_rows.to(table)
        tables[name] = table
    if model.new_output_rows is None:
        tables[outputs] = tables[inputs]  # a tensor under two names is stored once
    return tables
