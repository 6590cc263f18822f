"""Faulty samples in training: logged, written down, kept over a restart; too many stop all processes at one step."""

from __future__ import annotations

import json
import multiprocessing
from collections import Counter
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import BatchFeature

from data_shards.faults import BAD_JSON, MISSING_IMAGE, Fault
from data_shards.shards import write_shards
from flamingo import FlamingoError
from flamingo.processing import IGNORED
from tests.tiny import document, save_backbones
from train import faults, loop
from train.faults import FAULTS_FILE, Faults
from train.parallel import Processes
from train.plan import plan
from train.pretrain import Pretraining, open_sources, pretrain
from train.recipe import DataRecipe, ModelRecipe, OptimizerRecipe, Recipe, SourceRecipe, TrackingRecipe

STEPS, BATCH = 8, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny backbones, and two sources: of ten samples of the first two are faulty, of the second's none."""
    folder = tmp_path_factory.mktemp("tiny")
    save_backbones(folder)
    for name in ("bad", "good"):
        write_shards((document(n, 1 + n % 2, key=f"{name}{n}") for n in range(10)), folder / name, max_samples=5)
    shards = [folder / "bad" / f"shard-{number:05d}.tar" for number in (0, 1)]
    shards[0].write_bytes(shards[0].read_bytes().replace(b'"segments"', b'"segments_', 1))
    shards[1].write_bytes(shards[1].read_bytes().replace(b'"0.png"', b'"9.png"', 1))
    return folder


def recipe_of(folder: Path, out: Path, **data: Any) -> Recipe:
    """A short run over both sources."""
    sources = {name: SourceRecipe(str(folder / name)) for name in ("bad", "good")}
    return Recipe(
        out=str(out),
        steps=STEPS,
        batch=BATCH,
        micro_batch=2,
        save_every=3,
        model=ModelRecipe(
            str(folder / "vision"), str(folder / "language"), cross_attention_heads=2, cross_attention_head_dim=8,
            resampler_depth=1, resampler_latents=4, resampler_heads=2, resampler_head_dim=8,
        ),
        data=DataRecipe(sources, **{"workers": 0, "max_fault_share": 0.5, **data}),
        optimizer=OptimizerRecipe(warmup_steps=2),
        tracking=TrackingRecipe("disabled", log_every=1),
    )  # fmt: skip


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """An uninterrupted run."""
    out = folder / "whole"
    pretrain(recipe_of(folder, out), Processes())
    return out


def test_faults_are_logged_and_written_down(folder: Path, whole: Path) -> None:
    """Catches faults that are counted by nobody, or of which nobody can say where they are."""
    last, written = rows_of(whole / "metrics.jsonl")[-1], rows_of(whole / FAULTS_FILE)
    assert last["faults/good"] == 0 and last["faults/bad"] == len(written) > 3
    found = Counter(row["reason"] for row in written)
    assert set(found) == {BAD_JSON, MISSING_IMAGE}
    assert {reason: last[f"faults/bad/{reason}"] for reason in found} == found
    places = {(Path(row["shard"]).name, row["key"], row["reason"], row["source"]) for row in written}
    assert places == {
        ("shard-00000.tar", "bad0", BAD_JSON, "bad"),
        ("shard-00001.tar", "bad5", MISSING_IMAGE, "bad"),
    }
    assert all(0 < row["step"] <= STEPS and row["detail"] for row in written)
    assert last["epoch/bad"] + last["epoch/good"] == pytest.approx(STEPS * BATCH / 10)
    assert last["epoch/bad"] == pytest.approx(len(written) / 2, abs=1)


def test_counts_go_on_after_a_restart(folder: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches counts that begin anew, and faults that are counted or written twice."""
    out, step, calls = folder / "resumed", loop.update_parameters, []

    def stops(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(loop, "update_parameters", stops)
    with pytest.raises(KeyboardInterrupt):
        pretrain(recipe_of(folder, out), Processes())
    monkeypatch.undo()
    assert max(row["step"] for row in rows_of(out / FAULTS_FILE)) > 3, "after the checkpoint"
    pretrain(recipe_of(folder, out), Processes())
    assert rows_of(out / FAULTS_FILE) == rows_of(whole / FAULTS_FILE)
    ends = [
        json.loads((run / "checkpoints" / "step-000008" / "run.json").read_text())["faults"] for run in (out, whole)
    ]
    assert ends[0] == ends[1] and ends[0]["counts"]["bad"]
    with pytest.raises(FlamingoError, match="flip was 0.0, now 0.5"):
        pretrain(recipe_of(folder, out, flip=0.5), Processes())


@pytest.mark.timeout(60)
def test_too_many_faults_stop_all_processes_at_one_step(folder: Path, tmp_path: Path) -> None:
    """Catches one process that stops while the others wait for it, and a message without reasons and places."""
    context = multiprocessing.get_context("fork")
    said: Queue[tuple[int, str]] = context.SimpleQueue()  # type: ignore[assignment]
    ranks = [context.Process(target=run_rank, args=(rank, folder, tmp_path, said)) for rank in (0, 1)]
    for each in ranks:
        each.start()
    messages = dict(said.get() for _ in ranks)
    for each in ranks:
        each.join(timeout=30)
    assert messages[0] == messages[1]
    assert "samples of bad were not usable, more than data.max_fault_share=0.1: " in messages[0]
    assert f"{BAD_JSON}: " in messages[0] and "bad0 of " in messages[0] and "shard-00000.tar" in messages[0]
    steps = {row["step"] for row in rows_of(tmp_path / FAULTS_FILE)}
    assert max(steps) <= 4 and len(rows_of(tmp_path / "metrics.jsonl")) < STEPS / 2


def run_rank(rank: int, folder: Path, out: Path, said: Queue[tuple[int, str]]) -> None:
    """One of two processes of a run that is meant to stop."""
    dist.init_process_group("gloo", f"file://{out / 'meeting'}", rank=rank, world_size=2)
    faults.LEAST_SAMPLES = 10
    try:
        pretrain(recipe_of(folder, out, max_fault_share=0.1), Processes(rank, 2))
        said.put((rank, "no error"))
    except FlamingoError as error:
        said.put((rank, str(error)))


def test_few_faults_at_the_start_are_no_verdict(tmp_path: Path) -> None:
    """Catches a run that ends because one of its first ten samples is bad, or that never ends."""
    counted = Faults(Processes(), tmp_path, 0.02)
    counted.note(1, [Fault("s.tar", f"k{n}", BAD_JSON, "d", "web") for n in range(20)])
    counted.settle({"web": 30, "other": 1000})
    assert counted.row(["web", "other"]) == {"faults/web": 20, "faults/other": 0, f"faults/web/{BAD_JSON}": 20}
    counted.note(2, [Fault("s.tar", "k20", BAD_JSON, "d", "web")])
    with pytest.raises(FlamingoError, match=rf"21 of 60 samples of web .*: {BAD_JSON}: 21 \(k0 of s.tar, k1 of s.tar"):
        counted.settle({"web": 60, "other": 1000})
    counted.settle({"web": 1050})
    assert len(rows_of(tmp_path / FAULTS_FILE)) == 21


def test_a_recipe_names_impossible_shares() -> None:
    """Catches a share in percent, which would let every fault pass."""
    with pytest.raises(FlamingoError, match=r"data\.max_fault_share=2"):
        Recipe(data=DataRecipe({"a": SourceRecipe("a")}, max_fault_share=2)).check()
    with pytest.raises(FlamingoError, match=r"data\.cache_gb=0"):
        Recipe(data=DataRecipe({"a": SourceRecipe("a")}, cache_gb=0)).check()


def test_packed_rows_train_as_unpacked_ones(folder: Path) -> None:
    """Catches token counts, gradients or meters that take a packed row for one document."""
    losses = []
    for packing in (False, True):
        out = folder / f"packing-{packing}"
        pretrain(recipe_of(folder, out, packing=packing, max_tokens=80, workers=int(packing)), Processes())
        losses.append([row["loss"] for row in rows_of(out / "metrics.jsonl")])
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)


def test_tokens_that_begin_a_packed_document_are_not_foretold() -> None:
    """Catches a count of tokens that holds more than the model's loss does, so that packed rows weigh less."""
    labels = torch.tensor([[5, 6, 7, 8, IGNORED], [IGNORED, 6, 7, 8, 9]])
    documents = torch.tensor([[1, 1, 2, 2, 0], [1, 1, 1, 2, 3]])
    assert loop.supervised_tokens(BatchFeature({"labels": labels})).tolist() == [3, 4]
    assert loop.supervised_tokens(BatchFeature({"labels": labels, "documents": documents})).tolist() == [2, 2]


def test_remote_shards_train_as_those_here(folder: Path, whole: Path) -> None:
    """Catches a URL that is taken for a path, and a cache that is not where the recipe says."""
    out = folder / "remote"
    recipe = recipe_of(folder, out)
    for source in recipe.data.sources.values():
        source.shards = f"file://{source.shards}"
    recipe.data.sources["bad"].shards = str(folder / "bad")  # the checksums of its changed shards are wrong
    pretrain(recipe, Processes())
    pairs = zip(rows_of(out / "metrics.jsonl"), rows_of(whole / "metrics.jsonl"), strict=True)
    assert all(here["loss"] == there["loss"] for here, there in pairs)
    assert len(list((out / "cache").glob("*.tar"))) == 2


def test_the_cache_holds_what_all_sources_read_at_one_time(folder: Path, tmp_path: Path) -> None:
    """Catches sources of which each fits into the cache, and that fetch the same shards again and again together."""
    recipe = recipe_of(folder, tmp_path)
    sizes = []
    for name, source in recipe.data.sources.items():
        source.shards = f"file://{folder / name}"
        sizes.append(sum(path.stat().st_size for path in (folder / name).glob("*.tar")))
    recipe.data.cache_gb = (sum(sizes) - 1) / 1e9
    with pytest.raises(FlamingoError, match=rf"at least {sum(sizes):,} bytes for bad, good together") as raised:
        open_sources(recipe)
    assert str(raised.value) in plan(Pretraining(recipe)).faults
    recipe.data.cache_gb = sum(sizes) / 1e9
    assert [len(source.shards) for source in open_sources(recipe)] == [10, 10]
