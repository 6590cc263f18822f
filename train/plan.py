"""What a recipe would do, without weights and without a GPU: `python -m train.pretrain --config FILE --dry-run`.

Models are built from their configurations on the meta device, so that a plan needs a few kilobytes of JSON and a
tokenizer. `WORLD_SIZE=64` in front of the command plans for 64 processes. `train.tune` plans likewise.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer

from data_shards.loader import cut_instructions, looked_at
from data_shards.order import MixtureOrder
from data_shards.sequences import Sequences
from data_shards.shards import ShardSet, open_shards
from flamingo import FlamingoForConditionalGeneration, FlamingoProcessor
from flamingo.backbones import assemble, backbone_path, ignores_qk_norm
from flamingo.errors import FlamingoError
from flamingo.images import frames_of
from flamingo.packing import pack
from flamingo.processing import IGNORED
from icl_eval.tasks import load_task
from train.flops import PEAKS, OperationCounter, peak_flops
from train.memory import advice, component_table, memory_estimate
from train.optim import build_optimizer
from train.pretrain import Training, check_cache, sequence_options
from train.recipe import Recipe, Run, SourceRecipe

EXPECTED_MFU = 0.4
"""Share of a GPU's peak that hours are given for: an assumption, since only a run can tell."""
REFERENCES = ("A100", "H100", "H200")
"""GPUs that hours are given for, where there is none at hand: names in `PEAKS`."""


@dataclass(frozen=True)
class Lengths:
    """A sequence of a source, on average: its tokens, those that count in the loss, its media, and their frames.

    `squared` is the mean of the squares of `tokens`, which attention goes by. An image is a frame.
    """

    tokens: float
    supervised: float
    media: float
    squared: float
    frames: float

    @staticmethod
    def at_most(tokens: int, media: int) -> Lengths:
        """Every sequence is as long as it may be; its media are images."""
        return Lengths(tokens, tokens, media, tokens**2, media)


@dataclass(frozen=True)
class PlannedSource:
    """What a run reads of a source."""

    name: str
    recipe: SourceRecipe
    samples: int
    documents: int | None
    """in the source; None where its shards are not there"""
    lengths: Lengths
    measured: bool
    """whether `lengths` are those of some of its documents, or the most that the recipe allows"""


@dataclass(frozen=True)
class Plan:
    """What a recipe would do on `world` processes."""

    recipe: Run
    """with its steps"""
    origin: str
    """what the model comes from"""
    world: int
    model: FlamingoForConditionalGeneration
    """on the meta device"""
    processor: FlamingoProcessor
    sources: list[PlannedSource]
    faults: list[str] = field(default_factory=list)

    def operations(self) -> float:
        """Of the whole run, over all processes, forward and backward."""
        counter, settings = OperationCounter(self.model), self.processor.pixel_settings
        return sum(
            source.samples
            * counter.total(
                documents=1,
                tokens=source.lengths.tokens,
                pairs=source.lengths.squared / 2,
                supervised=source.lengths.supervised,
                media=source.lengths.media,
                frames=source.lengths.frames,
                size=(settings.height, settings.width),
            )
            for source in self.sources
        )

    def hours(self, peak: float, mfu: float = EXPECTED_MFU) -> float:
        """Of the whole run, on `world` GPUs that do `peak` operations a second, of which it uses the share `mfu`."""
        return self.operations() / (peak * mfu * self.world) / 3600

    def text(self) -> str:
        """All of it, to read."""
        gpu = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
        said = [f"note   {note}" for note in advice(self.model, self.recipe, self.world, gpu)]
        said += [f"fault  {fault}" for fault in self.faults] or ["no faults found"]
        tables = [self._run(), self._sources(), self._cost()]
        return "\n\n".join([component_table(self.model), *map(aligned, tables), "\n".join(said)])

    def _run(self) -> list[list[str]]:
        """What trains, how fast, and in which steps."""
        recipe, optimizer = self.recipe, build_optimizer(self.model, self.recipe.optimizer)
        groups = [
            f"{group['name']} {short(sum(parameter.numel() for parameter in group['params']))} "
            f"(rate {group['lr']:g}, decay {group['weight_decay']:g})"
            for group in optimizer.param_groups
        ]
        course = {"constant": "constant", "cosine": "a cosine to zero"}[recipe.optimizer.schedule]
        switches = [name for name, value in vars(recipe.parallel).items() if value is True]
        own = recipe.batch // self.world
        return [
            ["model", self.origin],
            ["trains", "; ".join(groups)],
            ["rate", f"{recipe.optimizer.warmup(recipe.steps):,} steps of warm-up, then {course}"],
            ["steps", f"{recipe.steps:,} of {recipe.batch:,} sequences; saved every {recipe.save_every:,}"],
            ["processes", f"{self.world}, each {own / recipe.micro_batch:g} × {recipe.micro_batch} sequences a step"],
            ["parallel", ", ".join([recipe.parallel.kind, recipe.parallel.precision, *switches])],
        ]

    def _sources(self) -> list[list[str]]:
        """What is read."""
        rows = [["source", "samples", "epochs", "loss weight", "tokens a sample", "media a sample", ""]]
        for source in self.sources:
            epochs = "?" if source.documents is None else f"{source.samples / source.documents:.3g}"
            lengths, basis = source.lengths, "measured" if source.measured else "at most"
            rows.append(
                [source.name, f"{source.samples:,}", epochs, f"{source.recipe.loss_weight:g}",
                 f"{lengths.tokens:.0f}", f"{lengths.media:.1f}", basis]
            )  # fmt: skip
        tokens, media = (
            short(sum(source.samples * getattr(source.lengths, name) for source in self.sources))
            for name in ("tokens", "media")
        )
        samples = sum(source.samples for source in self.sources)
        return [*rows, ["in all", f"{samples:,}", "", "", tokens, media, ""]]

    def _cost(self) -> list[list[str]]:
        """Memory, operations and hours."""
        operations = self.operations()
        here = peak_flops(torch.device("cuda", 0)) if torch.cuda.is_available() else None
        peaks = {torch.cuda.get_device_name(0): here} if here else {name: PEAKS[name] for name in REFERENCES}
        hours = [f"{self.hours(peak):.3g} on {self.world} × {name}" for name, peak in peaks.items()]
        return [
            *([label, value] for label, value in memory_estimate(self.model, self.recipe, self.world)),
            ["operations", f"{operations:.3g}, {operations / self.recipe.steps:.3g} a step"],
            ["hours", ", ".join(hours) + f"; where {EXPECTED_MFU:.0%} of the peak is reached, waiting for nothing"],
        ]


def dry_run(training: Training, world: int | None = None) -> None:
    """Print what a recipe would do on `world` processes; None: what `WORLD_SIZE` says, or 1.

    Raises:
        FlamingoError: where configurations, the tokenizer or the image processor are missing.
    """
    print(plan(training, int(os.environ.get("WORLD_SIZE", "1")) if world is None else world).text())


def plan(training: Training, world: int = 1) -> Plan:
    """The plan of a recipe, with what is wrong with it in `Plan.faults`.

    Raises:
        FlamingoError: where configurations, the tokenizer or the image processor are missing.
    """
    recipe, faults = training.recipe, list[str]()
    try:
        recipe.check(world)
    except FlamingoError as error:
        faults.append(str(error))
    model, processor = training.outline()
    faults += [*_misfits(recipe, model), *_unknown_tasks(recipe)]
    recipe, sources = planned_sources(recipe, processor, model.config.media_attention, faults)
    return Plan(recipe, training.origin(), world, model, processor, sources, faults)


def without_weights(recipe: Recipe) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
    """The recipe's Flamingo as `train.pretrain.build_model` makes it, but on the meta device, and its processor.

    Raises:
        FlamingoError: where a configuration, the tokenizer or the image processor cannot be loaded; it names it.
    """
    options: dict[str, Any] = dict(vars(recipe.model))
    train_new_tokens = options.pop("train_new_tokens")
    model, processor = outline_of_backbones(**options)
    for rows in (model.new_input_rows, model.new_output_rows):
        if rows is not None:
            rows.requires_grad_(train_new_tokens)
    return model, processor


def outline_of_backbones(
    vision: str, language: str, *, trust_remote_code: bool = False, **options: Any
) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
    """As `flamingo.from_backbones`, but on the meta device.

    Raises:
        FlamingoError: as `without_weights`.
    """
    code = {"trust_remote_code": trust_remote_code}
    new: dict[str, Any] = {"dtype": torch.float32, **code}
    vision, language = backbone_path(vision), backbone_path(language)
    with _reading(vision), torch.device("meta"):
        config = AutoConfig.from_pretrained(vision, **code)
        tower = AutoModel.from_config(getattr(config, "vision_config", config), **new)
        image_processor = AutoImageProcessor.from_pretrained(vision, backend="pil", **code)
    with _reading(language), torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(language, **code), **new)
        tokenizer = AutoTokenizer.from_pretrained(language, **code)
    with torch.device("meta"):
        return assemble(tower, lm, image_processor, tokenizer, **options)


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Errors of transformers as one that names the folder or hub id."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise FlamingoError(f"{name}: cannot be planned without its configuration and processors: {error}") from error


def _misfits(recipe: Run, model: FlamingoForConditionalGeneration) -> Iterator[str]:
    """What does not fit the language model."""
    lm, tokens = model.language_model, recipe.data.max_tokens
    longest = getattr(lm.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and tokens > longest:
        yield f"data.max_tokens={tokens}: {type(lm).__name__} has {longest} positions here"
    if ignores_qk_norm(lm):
        yield f"the language model asks for a QK LayerNorm that {type(lm).__name__} does not have"
    if recipe.data.packing:
        try:
            pack(torch.ones(1, tokens, dtype=torch.long), lm)
        except FlamingoError as error:
            yield str(error)


def _unknown_tasks(recipe: Run) -> Iterator[str]:
    """Tasks of the evaluations while training that cannot be read."""
    for name in recipe.evaluation.tasks if recipe.evaluation.every else ():
        try:
            load_task(name)
        except FlamingoError as error:
            yield f"evaluation.tasks: {error}"


def planned_sources(
    recipe: Run, processor: FlamingoProcessor, media_attention: str, faults: list[str]
) -> tuple[Run, list[PlannedSource]]:
    """The recipe with its steps, and what is read of each source; what is wrong with them is added to `faults`."""
    sources, shards = recipe.data.sources, open_shard_sets(recipe, faults)
    written = {name: to_be_written(recipe, source) for name, source in sources.items()}
    documents = written | {name: len(each) for name, each in shards.items()}
    known = {name: number for name, number in documents.items() if number is not None}
    if unknown := [name for name in sources if name not in known]:
        settled = recipe.settled(known)
        if settled.steps != recipe.steps or recipe.data.shares_of == "documents":
            faults.append(f"data.sources.{unknown[0]}: steps and shares depend on its number of documents; taken as 1")
    counted = dict.fromkeys(sources, 1) | known
    recipe = recipe.settled(counted)
    try:
        starts = [source.start_step * recipe.batch for source in sources.values()]
        order = MixtureOrder(recipe.data.shares(counted), recipe.seed, starts)
        samples = order.used(recipe.steps * recipe.batch)
        sequences = Sequences(processor, media_attention=media_attention, **sequence_options(recipe))
    except FlamingoError as error:
        faults.append(f"data: {error}")
        return recipe, []
    most = Lengths.at_most(recipe.data.max_tokens, recipe.data.max_media)
    planned = []
    for (name, source), number in zip(sources.items(), samples, strict=True):
        local = name in shards and "://" not in source.shards
        lengths = measure(shards[name], sequences, f"data.sources.{name}", faults) if local else None
        planned.append(PlannedSource(name, source, number, documents[name], lengths or most, lengths is not None))
    return recipe, planned


def open_shard_sets(recipe: Run, faults: list[str]) -> dict[str, ShardSet]:
    """The shards of every source that has some and does not write them first; others are added to `faults`."""
    opened = {}
    for name, source in recipe.data.sources.items():
        if to_be_written(recipe, source) is not None:
            continue
        try:
            with TemporaryDirectory() as cache:  # a plan brings nothing here but the index
                room = int(recipe.data.cache_gb * 1e9)
                opened[name] = open_shards(recipe.place(source.shards), cache=cache, cache_bytes=room)
        except FlamingoError as error:
            faults.append(f"data.sources.{name}: {error}")
    try:
        check_cache(recipe, opened)
    except FlamingoError as error:
        faults.append(str(error))
    return opened


def to_be_written(recipe: Run, source: SourceRecipe) -> int | None:
    """Documents of a source of the embedded world that the run itself writes first; None of another, or if it has."""
    glyphs, instructions, folder = recipe.data.glyphs, recipe.data.instructions, recipe.path(source.shards)
    if folder.exists():
        return None
    if glyphs is not None and folder.parent == recipe.path(glyphs.folder):
        return {"naming": glyphs.naming, "episodes": glyphs.episodes}.get(folder.name)
    if instructions is not None and folder.parent == recipe.path(instructions.folder) / "shards":
        from data_shards.glyphs.instructions import DATASETS  # fonts and pictures, for those who ask for them

        kinds = {dataset.name: kind for kind, dataset in DATASETS.items()}
        return instructions.queries.get(kinds.get(folder.name, ""))
    return None


def measure(shards: ShardSet, sequences: Sequences, name: str, faults: list[str]) -> Lengths | None:
    """Means over sequences of some documents, spread evenly; None where none is usable. Faults name the `name`."""
    numbers = looked_at(shards)
    found, wrong = [], Counter[str]()
    for number in numbers:
        try:
            made = sequences(shards[number], np.random.default_rng(number))
        except FlamingoError as error:
            wrong[str(error)] += 1
        else:
            supervised = sum(label != IGNORED for label in made.labels[1:])
            tokens = len(made.input_ids)
            frames = sum(len(frames_of(medium)) for medium in made.media)
            found.append((tokens, supervised, len(made.media), tokens**2, frames))
    if wrong:
        faults.append(f"{name}: {wrong.total()} of {len(numbers)} documents were not usable; one: {next(iter(wrong))}")
    if (said := cut_instructions(name, shards, sequences)) is not None:
        faults.append(said)
    return Lengths(*np.mean(found, axis=0).tolist()) if found else None


def aligned(rows: list[list[str]]) -> str:
    """Rows as lines, their columns below one another."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def short(number: float) -> str:
    """Three digits and a factor: `1.03 B`."""
    for factor, suffix in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= factor:
            return f"{number / factor:.3g}{suffix}"
    return f"{number:.3g}"
