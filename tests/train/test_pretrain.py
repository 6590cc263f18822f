"""Pretraining from the command line: the loss, resuming, ranks, and what users get wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import BatchFeature

from data_shards.shards import write_shards
from flamingo import FlamingoError, FlamingoForConditionalGeneration
from flamingo.processing import IGNORED
from tests.tiny import document, save_backbones
from train import loop
from train.checkpoint import Checkpoints
from train.parallel import Processes
from train.pretrain import build_model, main, pretrain
from train.quickstart import Quickstart
from train.recipe import EMBEDDED, Recipe, from_command_line, packaged

STEPS = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny backbones, two sources of shards, and a recipe over them."""
    folder = tmp_path_factory.mktemp("tiny")
    vision, language = save_backbones(folder)
    for number, name in enumerate(("pairs", "interleaved")):
        documents = (document(100 * number + n, 1 + 2 * number * (n % 2), key=f"{name}{n}") for n in range(23))
        write_shards(documents, folder / name, max_samples=5)
    shape = dict(cross_attention_heads=2, cross_attention_head_dim=8, resampler_depth=1, resampler_latents=4,
                 resampler_heads=2, resampler_head_dim=8)  # fmt: skip
    recipe = {
        "steps": STEPS,
        "batch": 8,
        "micro_batch": 2,
        "save_every": 4,
        "model": {"vision": str(vision), "language": str(language), **shape},
        "data": {
            "sources": {
                "pairs": {"shards": str(folder / "pairs"), "loss_weight": 0.2},
                "interleaved": {"shards": str(folder / "interleaved"), "start_step": 2},
            },
            "workers": 0,
        },
        "optimizer": {"learning_rate": 1e-3, "gate_factor": 20.0, "warmup_steps": 3, "schedule": "cosine"},
        "tracking": {"mode": "disabled", "log_every": 1},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def read_recipe(folder: Path, out: Path, *overrides: str) -> Recipe:
    """The folder's recipe, with another output folder."""
    return from_command_line(Recipe, ["--config", str(folder / "recipe.yaml"), "--out", str(out), *overrides])


def losses(out: Path) -> list[float]:
    """The logged loss of every step."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def command(*arguments: str | Path, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """`python -m …`, or torchrun."""
    launcher = (
        ["-m"]
        if processes == 1
        else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run(
        [sys.executable, *launcher, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=300
    )


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """An uninterrupted run in this process."""
    out = folder / "whole"
    pretrain(read_recipe(folder, out), Processes())
    return out


def test_a_run_learns_and_leaves_a_model(whole: Path) -> None:
    """Catches a loop that updates nothing, and a model folder that cannot be loaded."""
    curve = losses(whole)
    assert len(curve) == STEPS and curve[-1] < curve[2] - 0.05
    model = FlamingoForConditionalGeneration.from_pretrained(whole / "model")
    assert any(value != 0 for value in model.gates().values())
    row = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"loss/pairs", "loss/interleaved", "gradient_norm", "learning_rate/gates", "gate/attention.0",
            "tokens_per_second", "images_per_second", "data_wait_share", "samples"} <= set(row)  # fmt: skip
    assert row["loss"] == pytest.approx(0.2 * row["loss/pairs"] + row["loss/interleaved"])


def test_two_processes_equal_one(folder: Path, whole: Path) -> None:
    """Catches losses or gradients that depend on how the micro-batches of a step are shared out."""
    out = folder / "two"
    done = command("train.pretrain", "--config", folder / "recipe.yaml", "--out", out, processes=2)
    assert done.returncode == 0, done.stderr
    assert losses(out) == pytest.approx(losses(whole), abs=1e-6)


def test_a_resumed_run_equals_an_uninterrupted_one(folder: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches optimizer, schedule or data that start anew, and rows that are kept twice."""
    out = folder / "resumed"
    step = loop.update_parameters
    calls = []

    def stops(*arguments: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return step(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "update_parameters", stops)
    with pytest.raises(KeyboardInterrupt):
        pretrain(read_recipe(folder, out), Processes())
    assert not (out / "model").exists()
    monkeypatch.undo()
    pretrain(read_recipe(folder, out), Processes())
    assert losses(out) == losses(whole)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-000008", "step-000010"]
    with pytest.raises(FlamingoError, match="seed was 0, now 1"):
        pretrain(read_recipe(folder, out, "--seed", "1"), Processes())


def test_an_unfinished_checkpoint_is_never_picked(folder: Path, whole: Path) -> None:
    """Catches a save cut short that is taken for the newest state."""
    checkpoints = Checkpoints(whole, {}, Processes())
    newest = checkpoints.newest()
    assert newest is not None and newest.name == "step-000010"
    (whole / "checkpoints" / "step-000099").mkdir()
    (whole / "checkpoints" / ".step-000100.unfinished").mkdir()
    assert checkpoints.newest() == newest


def test_the_loss_is_weighted_by_source_and_by_the_tokens_of_the_whole_step(folder: Path) -> None:
    """Catches means of means: gradients must be those of Σ w_s · Σ nll / tokens over all micro-batches."""
    recipe = read_recipe(folder, folder / "x")
    torch.manual_seed(0)
    model, processor = build_model(recipe)
    batches = []
    for sources, seeds in (([0, 1], [1, 2]), ([1, 1], [3, 4])):
        batch = processor(documents=[document(seed, seed) for seed in seeds], padding_side="right")
        batches.append(BatchFeature({**batch, "sources": torch.tensor(sources), "keys": ["a", "b"]}))
    weights = torch.tensor([0.2, 1.0])
    expected = torch.zeros(())
    for source in (0, 1):
        nll, tokens = torch.zeros(()), 0
        for batch in batches:
            inputs = {key: batch[key] for key in batch if key not in ("sources", "keys")}
            mine = batch["sources"] == source
            nll = nll + model(**inputs).sample_losses[mine].sum()
            tokens += int((batch["labels"][mine][:, 1:] != IGNORED).sum())
        expected = expected + weights[source] * nll / tokens
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(expected, list(trained.values()))
    meter = loop.Meter(Processes(), ("pairs", "interleaved"))
    loop.accumulate_gradients(model, batches, weights, Processes(), meter)
    assert meter.loss == pytest.approx(expected.item(), rel=1e-5)
    for (name, parameter), gradient in zip(trained.items(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, msg=name)


def test_a_recipe_is_checked_and_overridden() -> None:
    """Catches unknown keys that are ignored, and flags that cannot be set to false."""
    recipe = from_command_line(
        Recipe, ["--steps", "7", "--model.train_new_tokens", "false", "--data.sources.naming.share", "2"],
        default=packaged(EMBEDDED),
    )  # fmt: skip
    assert (recipe.steps, recipe.model.train_new_tokens, recipe.data.sources["naming"].share) == (7, False, 2.0)
    assert recipe.data.sources["episodes"].start_step == 150
    assert from_command_line(Quickstart, []).processes == 2
    assert from_command_line(Quickstart, ["--from-scratch", "--eval-batch", "3"]).from_scratch
    assert not from_command_line(Quickstart, ["--from-scratch", "false"]).from_scratch
    with pytest.raises(FlamingoError, match="--data.nope"):
        from_command_line(Recipe, ["--data.nope", "1"])
    with pytest.raises(FlamingoError, match="no/such.yaml"):
        from_command_line(Recipe, ["--config", "no/such.yaml"])
    with pytest.raises(FlamingoError, match="batch=0"):
        from_command_line(Recipe, ["--batch", "0"], default=packaged(EMBEDDED)).check()


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        ({"stepz": 3}, "stepz"),
        ({"data": {"sources": {"a": {"shards": "missing/folder"}}}}, "missing/folder"),
        ({"data": {"sources": {"a": {"shards": "NOTAR"}}}}, "broken.tar"),
        ({"model": {"vision": "./no-tower"}}, "./no-tower"),
        ({"model": {"language": "EMPTY"}}, "empty"),
        ({"tracking": {"mode": "disabled", "log_every": 0}}, "log_every"),
        ({"batch": 7}, "batch=7"),
    ],
)
def test_mistakes_are_one_line(
    folder: Path,
    tmp_path: Path,
    change: dict,
    culprit: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """Catches tracebacks, and messages that do not name the culprit."""
    (tmp_path / "broken.tar").write_text("not a tar file")
    (tmp_path / "empty").mkdir()
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    for key, value in change.items():
        recipe[key] = {**recipe[key], **value} if key == "model" else value
    text = yaml.safe_dump(recipe).replace("NOTAR", str(tmp_path)).replace("EMPTY", str(tmp_path / "empty"))
    (tmp_path / "recipe.yaml").write_text(text)
    arguments = ["--config", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["flamingo-pretrain", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and culprit in lines[0]
