"""Pretraining: `python -m train.pretrain`, or `torchrun --nproc-per-node N -m train.pretrain --config FILE`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers.utils import logging

from data_shards.convert import ACCOUNT
from data_shards.loader import MicroBatches, Source, rank_batches
from data_shards.sequences import Sequences
from data_shards.shards import open_shards
from flamingo import FlamingoForConditionalGeneration, FlamingoProcessor, from_backbones
from flamingo.backbones import backbone_identity
from flamingo.errors import FlamingoError, command_line
from flamingo.files import whole, write_text
from icl_eval.evaluation import provenance
from train import loop
from train.card import model_card
from train.checkpoint import Checkpoints, TrainingState, newest_record
from train.evaluations import Evaluations
from train.faults import Faults
from train.optim import build_optimizer, build_schedule
from train.parallel import Processes, prepare, processes
from train.preemption import Preemption, end
from train.progress import Progress
from train.recipe import EMBEDDED, Recipe, from_command_line, packaged
from train.tracking import METRICS_FILE, Tracker, read_rows


@dataclass
class Command(Recipe):
    """A recipe, and what to do with it."""

    dry_run: bool = False
    """build everything without memory for it, print the plan, and train nothing"""


SEQUENCE_OPTIONS = ("max_tokens", "max_media", "next_media", "rules", "leading_space", "flip", "crop", "packing")


def pretrain(recipe: Recipe, processes: Processes) -> Path:
    """Run a recipe from where it stands, and return the folder of the trained model.

    Raises:
        FlamingoError: where shards, backbones or the recipe are not as expected, or a checkpoint cannot be written.
        SystemExit: where the machine was wanted back, after the state is saved (`train.preemption.end`).
    """
    recipe = recipe.alone()
    recipe.check(processes.world)
    if recipe.data.glyphs is not None:
        make_glyphs(recipe, processes)
    sources = open_sources(recipe)
    torch.manual_seed(recipe.seed)
    model, processor = build_model(recipe)
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
            Checkpoints(out, identity(recipe, sources, processor), processes, recipe.keep_checkpoints,
                        recipe.keep_every, about(recipe, sources)) as checkpoints,
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
    recipe: Recipe,
    state: TrainingState,
    prepared: nn.Module,
    sources: list[Source],
    processor: FlamingoProcessor,
    checkpoints: Checkpoints,
    preemption: Preemption,
    processes: Processes,
) -> None:
    """Set up what the loop reads from and writes to, and run it; `prepared` is `state.model`, made parallel."""
    data = micro_batches(recipe, sources, processor)
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
def while_others_answer(recipe: Recipe, state: TrainingState, processes: Processes) -> Iterator[None]:
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


def open_sources(recipe: Recipe) -> list[Source]:
    """The shard sets of the mixture."""
    data = recipe.data
    cache, room = recipe.path(data.cache), int(data.cache_gb * 1e9)
    return [
        Source(
            name,
            open_shards(recipe.place(source.shards), cache=cache, cache_bytes=room),
            source.share,
            source.start_step * recipe.batch,
        )
        for name, source in data.sources.items()
    ]


def micro_batches(recipe: Recipe, sources: list[Source], processor: FlamingoProcessor) -> MicroBatches:
    """The micro-batches of a recipe, by their numbers."""
    sequences = Sequences(processor, media_attention=recipe.model.media_attention, **sequence_options(recipe))
    return MicroBatches(sources, sequences, micro_batch=recipe.micro_batch, seed=recipe.seed)


def sequence_options(recipe: Recipe) -> dict[str, Any]:
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


def make_glyphs(recipe: Recipe, processes: Processes) -> dict[str, Any]:
    """Write the embedded world's shards where they are not there yet, and return the account of what is in them.

    Raises:
        FlamingoError: where the folder holds shards of another seed or size.
    """
    from data_shards.glyphs.documents import write_world_shards  # fonts and digits, for those who ask for them

    glyphs = recipe.data.glyphs
    assert glyphs is not None
    folder = recipe.path(glyphs.folder)
    record = folder / "account.json"
    wanted = {"seed": recipe.seed, "naming": glyphs.naming, "episodes": glyphs.episodes}
    if processes.is_main and not record.exists():
        account = write_world_shards(folder, **wanted, processes=glyphs.processes)
        write_text(record, json.dumps({"wanted": wanted, "account": account}, indent=1) + "\n")
    processes.wait()
    found = json.loads(record.read_text())
    if found["wanted"] != wanted:
        raise FlamingoError(f"{folder}: holds the embedded world of {found['wanted']}, expected {wanted}")
    return found["account"]


def identity(recipe: Recipe, sources: list[Source], processor: FlamingoProcessor) -> dict[str, Any]:
    """What a resumed run must share with the run that it continues."""
    described = recipe.as_dict()
    data = described.pop("data")
    mixture = {
        name: {**source, "shards": opened.shards.sha256}
        for (name, source), opened in zip(data["sources"].items(), sources, strict=True)
    }
    kept = {key: described[key] for key in ("seed", "steps", "batch", "micro_batch", "model", "optimizer")}
    kept["backbones"] = {part: backbone_identity(kept["model"][part]) for part in ("vision", "language")}
    kept["tokenizer"] = tokenizer_identity(processor)
    kept["order_of_sources"] = list(mixture)  # which comes first decides which positions are whose
    return json.loads(json.dumps({**kept, **sequence_options(recipe), "sources": mixture}))  # as it will be read back


def about(recipe: Recipe, sources: list[Source]) -> dict[str, Any]:
    """What a checkpoint says of its making, beside what it must share with the run that goes on from it."""
    documents = {source.name: len(source.shards) for source in sources}
    accounts = {
        name: json.loads(file.read_text(encoding="utf-8"))
        for name, source in recipe.data.sources.items()
        if (file := recipe.path(source.shards) / ACCOUNT).is_file()
    }
    return {"recipe": recipe.as_dict(), "documents": documents, "accounts": accounts, "made_by": provenance()}


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
    """
    tensors = whole_tensors(model)
    if processes.is_main:
        with whole(folder) as unfinished:
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


@command_line
def main() -> None:
    """Entry point of `flamingo-pretrain`."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    command = from_command_line(Command, default=packaged(EMBEDDED), description="Pretrain a Flamingo.")
    if command.dry_run:
        from train.plan import dry_run  # it builds what this module builds

        dry_run(command)
        return
    with processes(command.parallel.timeout) as group:
        folder = pretrain(command, group)
        if group.is_main:
            print(f"model: {folder}")


if __name__ == "__main__":
    main()
