"""What a model weighs and what training takes of a GPU: a table at the start of a run, and where it could be cheaper.

The estimate is made of shapes alone, so it works on the meta device. Weights, gradients and AdamW's state are counted;
activations are those that decoder layers, gated blocks and the resampler keep for the backward pass in their usual
form, for micro-batches that are full: `max_tokens` tokens and `max_media` media a row, each of as many frames as have
embeddings. Not in it: CUDA's own memory (about 1 GB), the allocator's gaps, and what collectives hold for a moment.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich import box, get_console
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from flamingo import FlamingoForConditionalGeneration
from flamingo.modeling import decoder_layers
from train.parallel import Processes
from train.recipe import Run

FULL = 0.9
"""The share of a GPU's memory from which on an estimate is taken for too much."""


@dataclass(frozen=True)
class Component:
    """A part of the model: its parameters, those of them that train, and their bytes as they are stored."""

    name: str
    total: int
    trained: int
    stored: int


def components(model: FlamingoForConditionalGeneration) -> list[Component]:
    """The parts, in the order in which a medium goes through them; a shared parameter counts once."""
    new = [rows for rows in (model.new_input_rows, model.new_output_rows) if rows is not None]
    parts: dict[str, list[nn.Parameter]] = {
        "vision tower": list(model.vision_tower.parameters()),
        "resampler": list(model.resampler.parameters()),
        "gated cross-attention": list(model.cross_attention.parameters()),
        "language model": list(model.language_model.parameters()),
        "new tokens": new,
    }
    return [
        Component(
            name,
            sum(map(_elements, parameters)),
            sum(each.numel() for each in parameters if each.requires_grad),
            sum(each.numel() * each.element_size() for each in parameters),
        )
        for name, parameters in parts.items()
    ]


def _elements(parameter: nn.Parameter) -> int:
    """Numbers in a parameter; of 4 bits each, two share a byte (`train.nf4`)."""
    return parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1)


def component_table(model: FlamingoForConditionalGeneration) -> str:
    """Total and trained parameters of every part, and of all, as lines of text."""
    parts = components(model)
    everything = Component("all", *(sum(getattr(part, of) for part in parts) for of in ("total", "trained", "stored")))
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading in ("component", "parameters", "trained", "stored"):
        table.add_column(heading, justify="left" if heading == "component" else "right")
    for part in (*parts, everything):
        table.add_row(part.name, f"{part.total:,}", f"{part.trained:,}", _gigabytes(part.stored))
    text = io.StringIO()
    Console(file=text, width=100).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of each GPU's memory. Iterating gives labels and values to print.

    Attributes:
        weights: of the parameters that lie there all the time.
        gathered: of those that other processes hold in part, while they are used (fsdp).
        casts: their copies in bfloat16 that the backward pass waits for, where they are stored in float32.
        gradients, optimizer: of what trains.
        activations: of a full micro-batch.
    """

    weights: float
    gathered: float
    casts: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        """Their sum."""
        return sum(vars(self).values())

    def __iter__(self) -> Iterator[tuple[str, str]]:
        parts = ", ".join(f"{name} {_gigabytes(size)}" for name, size in vars(self).items() if size)
        yield "memory per GPU", f"about {_gigabytes(self.total)}: {parts}"


def memory_estimate(model: FlamingoForConditionalGeneration, recipe: Run, world: int) -> MemoryEstimate:
    """What a run of `world` processes takes of each GPU. The model may be on the meta device, or prepared already."""
    parallel, config = recipe.parallel, model.config
    halved = {
        id(parameter)
        for backbone in model.backbones().values()
        for parameter in backbone.parameters()
        if parallel.frozen_in_bfloat16 and not parameter.requires_grad and parameter.is_floating_point()
    }

    def stored(parameters: Iterable[nn.Parameter]) -> float:
        return float(sum(each.numel() * (2 if id(each) in halved else each.element_size()) for each in parameters))

    trained = sum(part.trained for part in components(model))
    sharded = parallel.kind == "fsdp" and world > 1
    whole = stored(model.parameters())
    casts = 0.0
    if parallel.precision == "bfloat16":
        casts += 2.0 * trained
        if config.freeze_language and not (parallel.frozen_in_bfloat16 or parallel.activation_checkpointing):
            casts += 2.0 * sum(each.numel() for each in model.language_model.parameters() if each.element_size() > 2)
    activations = _activations(model, recipe)
    if not sharded:
        return MemoryEstimate(whole, 0.0, casts, 4.0 * trained, 8.0 * trained, activations)
    tower = stored(model.vision_tower.parameters()) if config.freeze_vision else 0.0
    layers = [stored(each.parameters()) for each in decoder_layers(model.language_model, config.decoder_layers)]
    blocks = [stored(each.parameters()) for each in model.cross_attention]
    # A layer and its block are used while the next ones arrive; what is in neither is there all the time.
    gathered = 2 * (max(layers) + max(blocks)) + whole - tower - sum(layers) - sum(blocks)
    accumulation = max(1, recipe.batch // (recipe.micro_batch * world))
    kept = 0.0 if parallel.cpu_offload else 1.0
    return MemoryEstimate(
        weights=tower + kept * (whole - tower) / world,
        gathered=gathered,
        casts=casts,
        # Until the last micro-batch gradients are added up where they are made, without a word to the others.
        gradients=4.0 * trained * (1.0 if accumulation > 1 else kept / world),
        optimizer=kept * 8.0 * trained / world,
        activations=activations,
    )


def _activations(model: FlamingoForConditionalGeneration, recipe: Run) -> float:
    """Bytes that a full micro-batch keeps for its backward pass."""
    config, parallel = model.config, recipe.parallel
    text: Any = config.text_config.get_text_config()
    product = 2 if parallel.precision == "bfloat16" else 4
    stream = 2 if parallel.frozen_in_bfloat16 else 4
    tokens, media = recipe.micro_batch * recipe.data.max_tokens, recipe.micro_batch * recipe.data.max_media
    width, layers = text.hidden_size, len(decoder_layers(model.language_model, config.decoder_layers))
    inner = _first(text, ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")) or 4 * width
    heads = config.cross_attention_heads * config.cross_attention_head_dim
    # Frozen matrices keep no input: norms' inputs, queries, keys, values, what attention gives, and around the GELU.
    layer = tokens * (2 * width * stream + (4 * width + 3 * inner) * product)
    layer += tokens * _kept_inputs(model) * product
    block = tokens * (8 * width + (2 * heads + (1 + config.cross_attention_ff_mult) * width) * product)
    keys_values = 4 * media * config.resampler_latents * heads * product
    blocks = len(model.cross_attention)
    if parallel.activation_checkpointing:
        decoder = tokens * width * stream * (layers + blocks) + layer + block
    else:
        decoder = layers * layer + blocks * block
    logits = tokens * text.vocab_size * product
    return float(decoder + blocks * keys_values + logits + _media_activations(model, media, product))


def _kept_inputs(model: FlamingoForConditionalGeneration) -> int:
    """Width of the inputs that the matrices of a decoder layer keep because they train: adapters, or all of them."""
    layers = decoder_layers(model.language_model, model.config.decoder_layers)
    return max(
        sum(each.in_features for each in layer.modules() if isinstance(each, nn.Linear) and each.weight.requires_grad)
        for layer in layers
    )


def _media_activations(model: FlamingoForConditionalGeneration, media: int, product: int) -> float:
    """Those of the resampler, or of a layer of the frozen tower, which are gone before the resampler begins."""
    config: Any = model.config
    vision, width, latents = config.vision_config, config.vision_width, config.resampler_latents
    size, patch = _first(vision, ("image_size",)) or 224, _first(vision, ("patch_size",)) or 16
    seen = (size // patch) ** 2 * max(1, config.resampler_max_frames)
    inner = config.resampler_heads * config.resampler_head_dim
    layer = (seen + latents) * (4 * width + (width + 2 * inner) * product)
    layer += latents * (12 * width + (2 * inner + config.resampler_ff_mult * width) * product)
    resampler = config.resampler_depth * media * layer
    tower_layer = media * seen * 12 * (_first(vision, ("hidden_size",)) or width) * product
    depth = 1 if config.freeze_vision else _first(vision, ("num_hidden_layers",)) or 1
    return float(max(resampler, tower_layer) if depth == 1 else resampler + depth * tower_layer)


def _first(config: Any, names: tuple[str, ...]) -> int | None:
    """The first field that a configuration has; of a pair, the larger."""
    found = next((value for name in names if (value := getattr(config, name, None))), None)
    return max(found) if isinstance(found, (list, tuple)) else found


def advice(
    model: FlamingoForConditionalGeneration, recipe: Run, world: int, capacity: float | None = None
) -> list[str]:
    """Where a cheaper setting exists, a sentence each.

    Args:
        capacity: bytes of a GPU's memory; None: there is none, and nothing to say but what holds on CPUs.
    """
    parallel, said = recipe.parallel, []
    if parallel.kind == "fsdp" and world == 1:
        said.append("parallel.kind=fsdp shares nothing out in one process")
    if capacity is None:
        return said
    room = FULL * capacity

    def needs(**changes: Any) -> float:
        return memory_estimate(model, replace(recipe, parallel=replace(parallel, **changes)), world).total

    now = needs()
    if parallel.precision == "float32":
        said.append(
            "parallel.precision=float32 leaves the tensor cores of the GPU unused: bfloat16 is several times faster"
        )
    if now - (less := needs(frozen_in_bfloat16=True)) > 0.01 * now:
        said.append(
            f"frozen backbones are stored in float32: parallel.frozen_in_bfloat16 saves {_gigabytes(now - less)}"
        )
    if now > room:
        said.append(
            f"about {_gigabytes(now)} will hardly fit into {_gigabytes(capacity)}: {_cheaper(recipe, world, needs)}"
        )
    elif parallel.kind == "fsdp" and world > 1 and needs(kind="ddp", cpu_offload=False) < room:
        said.append("the whole model fits into each GPU: parallel.kind=ddp sends less around")
    if parallel.activation_checkpointing and needs(activation_checkpointing=False) < room:
        said.append("activations fit: without parallel.activation_checkpointing a step takes about a quarter less time")
    return said


def _cheaper(recipe: Run, world: int, needs: Callable[..., float]) -> str:
    """The settings that take less memory, with what they would take."""
    parallel = recipe.parallel
    changes: dict[str, dict[str, Any]] = {}
    if not parallel.activation_checkpointing:
        changes["parallel.activation_checkpointing"] = {"activation_checkpointing": True}
    if parallel.kind == "ddp" and world > 1:
        changes["parallel.kind=fsdp"] = {"kind": "fsdp", "compile": False}
    elif parallel.kind == "fsdp" and not parallel.cpu_offload:
        changes["parallel.cpu_offload"] = {"cpu_offload": True}
    options = [f"{name} takes {_gigabytes(needs(**change))}" for name, change in changes.items()]
    return "; ".join([*options, f"micro_batch is {recipe.micro_batch}"])


def announce(model: FlamingoForConditionalGeneration, recipe: Run, processes: Processes) -> None:
    """Print, from the main process, what the model weighs, what training takes, and where it could be cheaper."""
    if not processes.is_main:
        return
    device = processes.device
    capacity = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    console = get_console()
    console.print(component_table(model), highlight=False, markup=False)
    for label, value in memory_estimate(model, recipe, processes.world):
        console.print(f"{label}: {value}", highlight=False, markup=False)
    for sentence in advice(model, recipe, processes.world, capacity):
        console.print(f"[yellow]note:[/yellow] {escape(sentence)}", highlight=False)


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
