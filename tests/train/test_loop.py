"""The loop's steps in one process: what is clipped, counted, skipped and called, and when."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BatchFeature

from flamingo import FlamingoError
from tests.tiny import document, tiny_flamingo
from train import loop
from train.checkpoint import TrainingState
from train.faults import Faults
from train.meter import Meter, Update
from train.optim import build_optimizer, build_schedule, clip_gradients, squared_norms
from train.parallel import Processes
from train.recipe import DataRecipe, EvaluationRecipe, OptimizerRecipe, Recipe, SourceRecipe, TrackingRecipe
from train.skipped import SKIPPED_FILE, Skipped
from train.tracking import METRICS_FILE

ALONE = Processes()
STEPS = 6


def test_clipping_is_by_the_norm_over_all_groups(tmp_path: Path) -> None:
    """Catches groups that are clipped one by one, and norms that are not those of the gradients."""
    model, _ = tiny_flamingo(tmp_path)
    optimizer = build_optimizer(model, OptimizerRecipe())
    groups = [group["params"] for group in optimizer.param_groups]
    for parameter in (each for group in groups for each in group):
        parameter.grad = torch.randn_like(parameter)
    before = [torch.cat([each.grad.flatten() for each in group]) for group in groups]
    squares = squared_norms(optimizer, 1)
    assert squares.tolist() == pytest.approx([float(each.square().sum()) for each in before], rel=1e-5)
    assert squared_norms(optimizer, 4).sum() * 4 == pytest.approx(float(squares.sum()))
    norm = math.sqrt(float(squares.sum()))
    clip_gradients(optimizer, norm / 2, norm)
    for group, gradient in zip(groups, before, strict=True):
        torch.testing.assert_close(torch.cat([each.grad.flatten() for each in group]), gradient / 2)
    clip_gradients(optimizer, norm, norm / 2)
    torch.testing.assert_close(groups[0][0].grad.flatten(), before[0][: groups[0][0].numel()] / 2)


def update(loss: float, *, skipped: bool = False) -> Update:
    """What became of a step of ten tokens and two images."""
    return Update(loss, 10, 2, {"plain": 1.0}, 1.0, skipped)


def test_a_row_is_the_mean_over_tokens_and_leaves_skipped_steps_out(tmp_path: Path) -> None:
    """Catches means of means, and a skipped step's NaN in the row of the others."""
    state: Any = SimpleNamespace(model=tiny_flamingo(tmp_path)[0])
    meter = Meter(ALONE, ("a", "b"), tokens=100)
    steps = [((6.0, 0.0), (2.0, 0.0), False), ((3.0, 8.0), (1.0, 4.0), False), ((math.nan, 1.0), (1.0, 1.0), True)]
    for losses, tokens, skipped in steps:
        meter.begin()
        meter.count(torch.tensor(losses), torch.tensor(tokens), torch.tensor([1.0]))
        meter.end(update(1.0, skipped=skipped))
    row = meter.report(state, update(1.0), [0.5, 1.0])
    assert (row["loss/a"], row["loss/b"], row["loss"]) == (3.0, 2.0, 3.5)
    assert row["tokens"] == 130 and row["images_per_second"] == pytest.approx(row["tokens_per_second"] / 5)
    assert row["gate/attention.1"] == pytest.approx(math.tanh(0.8)) and "mfu" not in row
    assert math.isnan(meter.report(state, update(1.0), [0.5, 1.0])["loss"]), "nothing since the last row"


def test_what_is_between_steps_is_no_training_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches tokens a second that fall at every checkpoint and evaluation."""
    clock = iter([0.0, 1.0, 2.0, 50.0, 51.0, 52.0])
    monkeypatch.setattr("train.meter.time.perf_counter", lambda: next(clock))
    meter = Meter(ALONE, ("a",))
    for _ in range(2):
        meter.begin()
        meter.fetched()
        meter.count(torch.zeros(1), torch.ones(1), torch.zeros(1))
        meter.end(update(1.0))
    assert meter.rates() == {"tokens_per_second": 20 / 4, "images_per_second": 1.0, "data_wait_share": 0.5}


def test_draws_of_a_step_do_not_depend_on_those_before() -> None:
    """Catches dropout that differs after a restart, or that is the same in all steps and processes."""

    def drawn(*place: int) -> list[float]:
        loop.draw_anew(*place)
        return torch.rand(3).tolist()

    first = drawn(0, 1, 0)
    torch.rand(7)
    assert drawn(0, 1, 0) == first
    assert len({tuple(drawn(seed, step, rank)) for seed in (0, 1) for step in (1, 2) for rank in (0, 1)}) == 8


def test_skipped_steps_are_counted_over_restarts_and_written_once(tmp_path: Path) -> None:
    """Catches a count that begins anew, lines that are there twice, and a limit that forgets good steps between."""
    shares, keys = torch.tensor([math.inf, 1.0]), [["a", "b"], ["c"]]
    skipped = Skipped(ALONE, tmp_path, 2)
    for step, bad in ((3, True), (4, False), (5, True)):
        skipped.note(step, bad, shares, keys)
    resumed = Skipped(ALONE, tmp_path, 2)
    resumed.resume(4)
    assert (skipped.steps, resumed.steps) == (2, 1)
    resumed.note(5, True, shares, keys)
    with pytest.raises(FlamingoError, match=r"step 6: .* 2 steps in a row \(non_finite_limit=2\); .*skipped\.jsonl"):
        resumed.note(6, True, shares, keys)
    rows = [json.loads(line) for line in (tmp_path / SKIPPED_FILE).read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 3, 5, 5, 6, 6]
    assert rows[0] == {"step": 3, "rank": 0, "loss": None, "keys": ["a", "b"]} and rows[1]["loss"] == 1.0


@pytest.fixture
def training(tmp_path: Path) -> Callable[..., list[str]]:
    """Runs the loop over a tiny model and returns what it called, in order."""
    model, processor = tiny_flamingo(tmp_path)

    def batches() -> Iterator[BatchFeature]:
        while True:
            batch = processor(documents=[document(1, 1), document(2, 2)], padding_side="right")
            yield BatchFeature({**batch, "sources": torch.tensor([0, 0]), "keys": ["a", "b"], "faults": []})

    def run(*, start: int = 0, stop: int = 0, **options: Any) -> list[str]:
        called: list[str] = []
        recipe = Recipe(
            out=str(tmp_path), steps=STEPS, batch=2, micro_batch=2, save_every=4,
            data=DataRecipe({"web": SourceRecipe("")}), tracking=TrackingRecipe("disabled", log_every=3),
            evaluation=EvaluationRecipe(every=2), **options,
        )  # fmt: skip
        optimizer = build_optimizer(model, recipe.optimizer)
        faults = Faults(ALONE, tmp_path, 1.0)
        state = TrainingState(model, optimizer, build_schedule(optimizer, recipe.optimizer, STEPS), faults, start)
        parts: dict[str, Any] = {
            "data": SimpleNamespace(used=lambda position: {"web": position}, epochs=lambda position: {"web": 0.5}),
            "checkpoints": SimpleNamespace(save=lambda state: called.append(f"save {state.step}"), watch=lambda: None),
            "tracker": SimpleNamespace(log=lambda step, row: called.append(f"log {step} {row['tokens']:.0f}")),
            "progress": SimpleNamespace(update=lambda *figures: None),
            "preemption": SimpleNamespace(requested=lambda: state.step == stop),
            "evaluations": SimpleNamespace(run=lambda step: called.append(f"evaluate {step}")),
        }
        loop.run(recipe, state, model, batches=batches(), processes=ALONE, **parts)
        return called

    return run


def test_what_is_due_is_done_in_order(training: Callable[..., list[str]]) -> None:
    """Catches a checkpoint without a row of its step (from which counts go on), and a last step without either."""
    called = training()
    tokens = int(called[1].split()[2]) // 3
    assert called == [
        "evaluate 2", f"log 3 {3 * tokens}", f"log 4 {4 * tokens}", "evaluate 4", "save 4",
        f"log 6 {6 * tokens}", "evaluate 6", "save 6",
    ]  # fmt: skip


def test_a_machine_that_is_wanted_back_gets_a_checkpoint_at_once(training: Callable[..., list[str]]) -> None:
    """Catches a run that evaluates first, or goes on to the next checkpoint, while the grace runs out."""
    assert [each.rpartition(" ")[0] or each for each in training(stop=2)] == ["log 2", "save"]


def test_tokens_go_on_from_the_log(training: Callable[..., list[str]], tmp_path: Path) -> None:
    """Catches an axis of tokens that starts again at 0 after a restart, or that counts dropped rows."""
    rows = [{"step": 4, "tokens": 1000.0}, {"step": 4, "fewshot/x": 0.5}, {"step": 5, "tokens": 9000.0}]
    (tmp_path / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (line,) = (each for each in training(start=4) if each.startswith("log"))
    assert 1000 < int(line.split()[2]) < 2000


def test_a_recipe_names_an_impossible_limit() -> None:
    """Catches a limit of 0, which would end the run at its first step."""
    with pytest.raises(FlamingoError, match="non_finite_limit=0"):
        Recipe(non_finite_limit=0, data=DataRecipe({"a": SourceRecipe("a")})).check()


def test_the_model_gets_its_arguments_alone() -> None:
    """Catches keys and sources that are handed to the model, which would refuse them."""
    seen: list[set[str]] = []

    class Model(nn.Module):
        def forward(self, **inputs: Any) -> Any:
            seen.append(set(inputs))
            return SimpleNamespace(sample_losses=torch.ones(1, requires_grad=True))

    batch = BatchFeature(
        {"labels": torch.ones(1, 3), "attention_mask": torch.ones(1, 3), "pixel_values": torch.zeros(0, 1, 1, 1, 1),
         "sources": torch.tensor([0]), "keys": ["a"]}
    )  # fmt: skip
    loop.accumulate_gradients(Model(), [batch], torch.ones(1), ALONE, Meter(ALONE, ("a",)))
    assert seen == [{"labels", "attention_mask", "pixel_values"}]
    assert batch["keys"] == ["a"], "the keys are still needed, to name a skipped step's samples"
