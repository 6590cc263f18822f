"""Pretraining: `python -m train.pretrain`, or `torchrun --nproc-per-node N -m train.pretrain --config FILE`."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers.utils import logging

from data_shards.convert import ACCOUNT, InstructionOptions, convert_each
from data_shards.loader import MicroBatches, Source, cut_instructions, rank_batches
from data_shards.order import SHARDS_AT_ONCE
from data_shards.sequences import Sequences
from data_shards.shards import ShardSet, open_shards
from data_shards.sources.mimic_it import MimicItReader
from flamingo import FlamingoForConditionalGeneration, FlamingoProcessor, from_backbones
from flamingo.backbones import backbone_identity
from flamingo.errors import FlamingoError, command_line
from flamingo.files import whole, write_text
from icl_eval.evaluation import provenance
from train import loop, lora
from train.card import model_card
from train.checkpoint import Checkpoints, TrainingState, newest_record
from train.evaluations import Evaluations
from train.faults import Faults
from train.optim import build_optimizer, build_schedule
from train.parallel import Processes, prepare, processes
from train.preemption import Preemption, end
from train.progress import Progress
from train.recipe import EMBEDDED, Recipe, Run, TuneRecipe, from_command_line, packaged
from train.tracking import METRICS_FILE, Tracker, read_rows


@dataclass
class Command(Recipe):
    """A recipe, and what to do with it."""

    dry_run: bool = False
    """build everything without memory for it, print the plan, and train nothing"""


ADAPTERS = "adapters"
"""Where in a model's folder the LM's adapters are, as they were before they were folded in."""
SEQUENCE_OPTIONS = ("max_tokens", "max_media", "next_media", "rules", "leading_space", "flip", "crop", "packing")


class Training(Protocol):
    """Where a run's model comes from and what of it trains: all that tells pretraining and tuning apart."""

    @property
    def name(self) -> str:
        """What `run.json` calls it."""

    @property
    def recipe(self) -> Run:
        """As it was given."""

    def build(self) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
        """The model as training begins, in float32, and its processor."""

    def outline(self) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
        """The same on the meta device, without weights, from configurations alone."""

    def identity(self) -> dict[str, Any]:
        """What else a resumed run must share with the run that it continues."""

    def origin(self) -> str:
        """What the model comes from, to read."""


@dataclass(frozen=True)
class Pretraining:
    """A Flamingo over two backbones, of which it trains what is new."""

    recipe: Recipe
    name: str = "pretrain"

    def build(self) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
        """As `build_model`."""
        return build_model(self.recipe)

    def outline(self) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
        """As `train.plan.without_weights`."""
        from train.plan import without_weights  # it plans what this module builds

        return without_weights(self.recipe)

    def identity(self) -> dict[str, Any]:
        """The shape of the model, and its backbones."""
        model = vars(self.recipe.model)
        return {"model": model, "backbones": {part: backbone_identity(model[part]) for part in ("vision", "language")}}

    def origin(self) -> str:
        """Both backbones."""
        return f"{self.recipe.model.vision}, {self.recipe.model.language}"


def pretrain(recipe: Recipe, processes: Processes) -> Path:
    """As `run`, for a Flamingo over the recipe's backbones."""
    return run(Pretraining(recipe.alone()), processes)


def run(training: Training, processes: Processes) -> Path:
    """Train from where a run stands, and return the folder of the trained model.

    Raises:
        FlamingoError: where shards, the model or the recipe are not as expected, or a checkpoint cannot be written.
        SystemExit: where the machine was wanted back, after the state is saved (`train.preemption.end`).
    """
    recipe = training.recipe
    recipe.check(processes.world)
    if recipe.data.glyphs is not None:
        make_glyphs(recipe, processes)
    if recipe.data.instructions is not None:
        make_instructions(recipe, processes)
    sources = open_sources(recipe)
    recipe = recipe.settled(numbers_of_documents(sources))
    torch.manual_seed(recipe.seed)
    model, processor = training.build()
    if recipe.data.glyphs is not None:
        check_language_model(model, processor)
    prepared = prepare(model, recipe.parallel, processes)
    optimizer = build_optimizer(model, recipe.optimizer)
    out = Path(recipe.out)
    faults = Faults(processes, out, recipe.data.max_fault_share)
    state = TrainingState(model, optimizer, build_schedule(optimizer, recipe.optimizer, recipe.steps), faults)
    with Preemption(processes) as preemption:
        with (
            while_others_answer(recipe, state, processes),
            Checkpoints(out, identity(training, recipe, sources, processor), processes, recipe.keep_checkpoints,
                        recipe.keep_every, about(training, recipe, sources, model)) as checkpoints,
        ):  # fmt: skip
            resumed = checkpoints.resume(state, anyway=recipe.resume_anyway)
            if processes.is_main and resumed:
                print(f"resumed from step {state.step} of {recipe.steps} in {out}")
            unfinished = state.step < recipe.steps
            if unfinished:
                train(recipe, state, prepared, sources, processor, checkpoints, preemption, processes)
        if state.step < recipe.steps:
            end(out, state.step, processes)
    if unfinished or not (out / "model").exists():
        save_model(model, processor, newest_record(out), read_rows(out / METRICS_FILE), out / "model", processes)
    processes.wait()
    return out / "model"


def train(
    recipe: Run,
    state: TrainingState,
    prepared: nn.Module,
    sources: list[Source],
    processor: FlamingoProcessor,
    checkpoints: Checkpoints,
    preemption: Preemption,
    processes: Processes,
) -> None:
    """Set up what the loop reads from and writes to, and run it; `prepared` is `state.model`, made parallel."""
    data = micro_batches(recipe, sources, processor, state.model.config.media_attention)
    if processes.is_main:
        warn_of_cuts(recipe, data)
    batches = rank_batches(
        data,
        batch=recipe.batch,
        start_step=state.step,
        steps=recipe.steps - state.step,
        rank=processes.rank,
        world=processes.world,
        workers=recipe.data.workers,
        device=processes.device,
    )
    out = Path(recipe.out)
    with (
        Tracker(out, project=recipe.tracking.project, name=out.name, mode=recipe.tracking.mode,
                config=recipe.as_dict(), resume_id=state.run_id, start_step=state.step) as tracker,
        Progress(recipe.steps, start=state.step, enabled=processes.is_main) as progress,
    ):  # fmt: skip
        state.run_id = tracker.run_id
        loop.run(
            recipe,
            state,
            prepared,
            data,
            batches,
            checkpoints,
            tracker,
            progress,
            processes,
            preemption=preemption,
            evaluations=Evaluations(recipe, state, processor, tracker, processes),
        )


@contextmanager
def while_others_answer(recipe: Run, state: TrainingState, processes: Processes) -> Iterator[None]:
    """Within it a process that is gone is an error in one line, in all that are left.

    Raises:
        FlamingoError: it names this process, the step, and what torch.distributed said.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise FlamingoError(
            f"process {processes.rank} of {processes.world}, after step {state.step}: another process is gone, or did "
            f"not answer for parallel.timeout={recipe.parallel.timeout:g} seconds; start again to go on from the last "
            f"checkpoint ({str(error).splitlines()[0]})"
        ) from error


def open_sources(recipe: Run) -> list[Source]:
    """The shard sets of the mixture.

    Raises:
        FlamingoError: where one is not as expected, or the cache cannot hold what all of them read at one time.
    """
    data = recipe.data
    cache, room = recipe.path(data.cache), int(data.cache_gb * 1e9)
    opened = {
        name: open_shards(recipe.place(source.shards), cache=cache, cache_bytes=room)
        for name, source in data.sources.items()
    }
    check_cache(recipe, opened)
    shares = data.shares({name: len(shards) for name, shards in opened.items()})
    return [
        Source(name, shards, share, data.sources[name].start_step * recipe.batch)
        for (name, shards), share in zip(opened.items(), shares, strict=True)
    ]


def check_cache(recipe: Run, opened: Mapping[str, ShardSet]) -> None:
    """Stop where remote sources would push each other's shards out of the cache: `open_shards` looks at each alone.

    Raises:
        FlamingoError: it names the sources, and the bytes that their largest shards take together.
    """
    remote = [name for name in opened if "://" in recipe.data.sources[name].shards]
    largest = [sorted((shard.size for shard in opened[name].shards), reverse=True)[:SHARDS_AT_ONCE] for name in remote]
    needed = sum(map(sum, largest))
    if needed > recipe.data.cache_gb * 1e9:
        raise FlamingoError(
            f"data.cache_gb={recipe.data.cache_gb:g}: expected at least {needed:,} bytes for {', '.join(remote)} "
            f"together, because the samples of {SHARDS_AT_ONCE} shards of each are read in turn"
        )


def numbers_of_documents(sources: list[Source]) -> dict[str, int]:
    """How many documents each source has."""
    return {source.name: len(source.shards) for source in sources}


def micro_batches(
    recipe: Run, sources: list[Source], processor: FlamingoProcessor, media_attention: str
) -> MicroBatches:
    """The micro-batches of a recipe, by their numbers; `media_attention` is the model's."""
    sequences = Sequences(processor, media_attention=media_attention, **sequence_options(recipe))
    return MicroBatches(sources, sequences, micro_batch=recipe.micro_batch, seed=recipe.seed)


def warn_of_cuts(recipe: Run, data: MicroBatches) -> None:
    """Say which sources on this machine have instructions that are longer than a sequence."""
    for source in data.sources:
        if "://" in recipe.data.sources[source.name].shards:
            continue
        if (said := cut_instructions(f"data.sources.{source.name}", source.shards, data.sequences)) is not None:
            print(f"warning: {said}")


def sequence_options(recipe: Run) -> dict[str, Any]:
    """The recipe's options of `Sequences`."""
    return {name: getattr(recipe.data, name) for name in SEQUENCE_OPTIONS}


def build_model(recipe: Recipe) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
    """The recipe's Flamingo over its backbones, in float32."""
    options = dict(vars(recipe.model))
    train_new_tokens = options.pop("train_new_tokens")
    model, processor = from_backbones(dtype=torch.float32, packing=recipe.data.packing, **options)
    for rows in (model.new_input_rows, model.new_output_rows):
        if rows is not None:
            rows.requires_grad_(train_new_tokens)
    return model, processor


def check_language_model(model: FlamingoForConditionalGeneration, processor: FlamingoProcessor) -> None:
    """Stop where the LM cannot copy from its context: naming would be learnt all the same, in-context learning never.

    Raises:
        FlamingoError: it gives the LM's accuracy and the bar.
    """
    from data_shards.glyphs.backbones import check_induction

    check_induction(model.language_model, processor.tokenizer)


def make_glyphs(recipe: Run, processes: Processes) -> dict[str, Any]:
    """Write the embedded world's shards where they are not there yet, and return the account of what is in them.

    Raises:
        FlamingoError: where the folder holds shards of another seed or size.
    """
    from data_shards.glyphs.documents import write_world_shards  # fonts and digits, for those who ask for them

    glyphs = recipe.data.glyphs
    assert glyphs is not None
    folder = recipe.path(glyphs.folder)
    wanted = {"seed": recipe.seed, "naming": glyphs.naming, "episodes": glyphs.episodes}
    return made_once(
        folder, wanted, lambda: write_world_shards(folder, **wanted, processes=glyphs.processes), processes
    )


def make_instructions(recipe: Run, processes: Processes) -> dict[str, Any]:
    """Write the embedded world's instructions in MIMIC-IT's files, and shards of them, as `make_glyphs` does.

    Raises:
        FlamingoError: where the folder holds instructions of another seed or number, shards for sequences of another
            form or size, or a kind is unknown.
    """
    from data_shards.glyphs.instructions import write_training_instructions

    instructions = recipe.data.instructions
    assert instructions is not None
    folder, spaced = recipe.path(instructions.folder), isinstance(recipe, TuneRecipe) and recipe.spaced
    limits: dict[str, Any] = {"max_tokens": recipe.data.max_tokens, "max_media": recipe.data.max_media}

    def make() -> dict[str, Any]:
        shutil.rmtree(folder / "shards", ignore_errors=True)  # of a start that was stopped, perhaps with another seed
        written = write_training_instructions(
            folder, instructions.queries, seed=recipe.seed, processes=instructions.processes
        )
        readers = MimicItReader(str(folder / "mixture.yaml"), spaced=spaced).datasets()
        options = InstructionOptions(**limits)
        convert_each(readers, folder / "shards", options, processes=instructions.processes, strict=True)
        return written

    wanted = {"seed": recipe.seed, "queries": instructions.queries, "spaced": spaced, **limits}
    return made_once(folder, wanted, make, processes)


def made_once(
    folder: Path, wanted: dict[str, Any], make: Callable[[], dict[str, Any]], processes: Processes
) -> dict[str, Any]:
    """What `make` says of what it wrote into a folder; the main process calls it, where that was never finished.

    Raises:
        FlamingoError: where the folder holds what was made of something else than `wanted`.
    """
    record = folder / ACCOUNT
    if processes.is_main and not record.exists():
        account = make()
        write_text(record, json.dumps({"wanted": wanted, "account": account}, indent=1) + "\n")
    processes.wait()
    found = json.loads(record.read_text())
    if found.get("wanted") != wanted:
        raise FlamingoError(f"{folder}: holds the embedded world of {found.get('wanted')}, expected {wanted}")
    return found["account"]


def identity(training: Training, recipe: Run, sources: list[Source], processor: FlamingoProcessor) -> dict[str, Any]:
    """What a resumed run must share with the run that it continues."""
    described = recipe.as_dict()
    mixture = {
        name: {**source, "shards": opened.shards.sha256}
        for (name, source), opened in zip(described["data"]["sources"].items(), sources, strict=True)
    }
    kept = {key: described[key] for key in ("seed", "steps", "batch", "micro_batch", "optimizer")}
    kept |= training.identity()
    kept["tokenizer"] = tokenizer_identity(processor)
    kept["order_of_sources"] = list(mixture)  # which comes first decides which positions are whose
    kept["shares"] = [source.share for source in sources]
    return json.loads(json.dumps({**kept, **sequence_options(recipe), "sources": mixture}))  # as it will be read back


def about(
    training: Training, recipe: Run, sources: list[Source], model: FlamingoForConditionalGeneration
) -> dict[str, Any]:
    """What a checkpoint says of its making, beside what it must share with the run that goes on from it."""
    accounts = {
        name: json.loads(file.read_text(encoding="utf-8"))
        for name, source in recipe.data.sources.items()
        if (file := recipe.path(source.shards) / ACCOUNT).is_file()
    }
    return {
        "training": training.name,
        "recipe": recipe.as_dict(),
        "documents": numbers_of_documents(sources),
        "accounts": accounts,
        "backbones": model.config.backbones,
        "made_by": provenance(),
    }


def tokenizer_identity(processor: FlamingoProcessor) -> str:
    """SHA-256 over all that makes tokens of text; how batches are padded and cut is no part of it."""
    tokenizer = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    return hashlib.sha256(json.dumps(tokenizer | {"padding": None, "truncation": None}).encode()).hexdigest()


def save_model(
    model: FlamingoForConditionalGeneration,
    processor: FlamingoProcessor,
    record: dict[str, Any],
    log: list[dict[str, Any]],
    folder: Path,
    processes: Processes,
) -> None:
    """Write a `from_pretrained` folder, with recipe and model card beside the weights, whole or not at all.

    Args:
        record: `run.json` of the checkpoint that holds the same state.
        log: rows of the run's `metrics.jsonl`.

    Adapters of the LM are folded into it, here and in the `model`; as they are they go into the folder's `ADAPTERS`.
    """
    tensors = whole_tensors(model)
    if processes.is_main:
        with whole(folder) as unfinished:
            if lora.adapters(model):
                lora.save_adapters(model, unfinished / ADAPTERS, tensors)
                tensors = lora.merged(model, model.state_dict() if tensors is None else tensors)
            model.save_pretrained(unfinished, state_dict=tensors)
            processor.save_pretrained(unfinished)
            write_text(unfinished / "recipe.json", json.dumps(record["recipe"], indent=1) + "\n")
            write_text(unfinished / "README.md", model_card(record, log=log))


def whole_tensors(model: FlamingoForConditionalGeneration) -> dict[str, Any] | None:
    """All tensors of a model whose parameters are shared out, in the main process; None where they are not."""
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return None
    tensors = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    once = {name for named in (model.named_parameters(), model.named_buffers()) for name, _ in named}
    return {name: tensor for name, tensor in tensors.items() if name in once}  # a tied one has two names


def launch(training: Training, *, dry_run: bool) -> None:
    """What a command line does: plan, or train in the processes of torchrun."""
    if dry_run:
        from train.plan import dry_run as plan  # it builds what this module builds

        plan(training)
        return
    with processes(training.recipe.parallel.timeout) as group:
        folder = run(training, group)
        if group.is_main:
            print(f"model: {folder}")


@command_line
def main() -> None:
    """Entry point of `flamingo-pretrain`."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    command = from_command_line(Command, default=packaged(EMBEDDED), description="Pretrain a Flamingo.")
    launch(Pretraining(command.alone()), dry_run=command.dry_run)


if __name__ == "__main__":
    main()
