"""DDP and FSDP2 against one process, in two processes that torchrun starts once for all cases."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from flamingo import FlamingoError
from tests.tiny import save_backbones, tiny_flamingo
from tests.train.parallel_cases import CASES, FAMILIES, Case
from train.parallel import Processes, prepare
from train.recipe import ParallelRecipe

SCRIPT = Path(__file__).with_name("parallel_cases.py")
KINDS = ("ddp", "fsdp")
LOSSES, GRADIENTS = 1e-6, {"float32": 1e-5, "float64": 1e-10}


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny backbones of every family that is compared."""
    folder = tmp_path_factory.mktemp("backbones")
    for family in FAMILIES:
        save_backbones(folder / family, family)
    return folder


def launch(backbones: Path, out: Path, which: str, timeout: float) -> list[dict[str, Any]]:
    """What both processes found, by ranks."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(SCRIPT),
         str(backbones), str(out), which],
        capture_output=True, text=True, timeout=timeout, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def quick(backbones: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """A selection of the cases, and all others."""
    return launch(backbones, tmp_path_factory.mktemp("quick"), "quick", 120)


@pytest.fixture(scope="module")
def full(backbones: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The full cross product."""
    return launch(backbones, tmp_path_factory.mktemp("full"), "full", 1200)


def check_equal(case: Case, results: list[dict[str, Any]]) -> None:
    for found in (each[case.name] for each in results):
        assert found["learns"] > 0.1
        assert found["losses"] <= LOSSES
        assert found["gradients"] <= GRADIENTS[case.dtype], found["culprit"]
        assert found["norms"] <= GRADIENTS[case.dtype] and found["read"]


@pytest.mark.parametrize("case", CASES["quick"], ids=lambda case: case.name)
def test_two_processes_equal_one(quick: list[dict[str, Any]], case: Case) -> None:
    """Catches gradients that are averaged, summed or clipped per process, tied or tiny parameters that FSDP2 splits
    wrongly, layers computed again without their media, and a process without media that the other waits for.
    """
    check_equal(case, quick)


@pytest.mark.slow
@pytest.mark.timeout(1300)
@pytest.mark.parametrize("case", CASES["full"], ids=lambda case: case.name)
def test_two_processes_equal_one_in_every_combination(full: list[dict[str, Any]], case: Case) -> None:
    """Catches what only some combination of LM, kind, checkpointing, accumulation and precision breaks."""
    check_equal(case, full)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_of_products_alone(quick: list[dict[str, Any]], kind: str) -> None:
    """Catches moments or trained parameters in bfloat16, which lose small updates, and kinds that differ in it."""
    found = quick[0][f"half-{kind}"]
    assert found["trained"] == found["moments"] == ["torch.float32"] and found["frozen"] == ["torch.bfloat16"]
    assert found["losses"] == pytest.approx(found["float32"], abs=0.02)
    assert found["losses"] != found["float32"], "nothing was computed in bfloat16"
    assert found["losses"] == pytest.approx(quick[0]["half-ddp"]["losses"], abs=1e-3)


def test_gradients_are_sent_once_a_step(quick: list[dict[str, Any]]) -> None:
    """Catches an all-reduce a micro-batch: the same numbers, at several times the traffic."""
    first, second = (each["unsynchronised-ddp"] for each in quick)
    assert all(one != other for one, other in zip(first, second, strict=True))
    assert {each for found in quick for each in found["unsynchronised-fsdp"]} == {None}, "they lie with the whole ones"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spoil", ["pixels", "loss"])
def test_what_is_not_finite_in_one_process_is_skipped_by_both(
    quick: list[dict[str, Any]], kind: str, spoil: str
) -> None:
    """Catches one process that steps while the other does not, an infinite loss whose gradient is finite, a NaN that
    gets into AdamW's moments or into the log's means, and samples that nobody can name.
    """
    first, second = (each[f"{spoil}-1-{kind}"] for each in quick)
    assert first["error"] is None and first["step"] == second["step"] == 8
    assert first["sums"] == second["sums"]
    assert first["sums"][1] == first["sums"][0] and len(set(first["sums"])) == 7, "step 2 alone changes nothing"
    assert first["moments"] == second["moments"] == [7.0]
    losses = [row["loss"] for row in first["rows"]]
    assert math.isnan(losses[1]) and all(map(math.isfinite, losses[:1] + losses[2:])) and losses[-1] < losses[0]
    assert [row["skipped_steps"] for row in first["rows"]] == [0] + 7 * [1]
    assert [(row["step"], row["rank"], row["loss"] is None) for row in first["written"]] == [
        (2, 0, False), (2, 0, False), (2, 1, False), (2, 1, True),
    ]  # fmt: skip
    assert [len(row["keys"]) for row in first["written"]] == [2, 2, 2, 2]
    assert len({key for row in first["written"] for key in row["keys"]}) == 8


@pytest.mark.parametrize("kind", KINDS)
def test_too_many_in_a_row_stop_both(quick: list[dict[str, Any]], kind: str) -> None:
    """Catches a run that burns its hours on NaN, a limit that counts steps far apart, and a process left waiting."""
    first, second = (each[f"pixels-4-{kind}"] for each in quick)
    assert first["error"] == second["error"] and first["step"] == second["step"] == 5
    assert "step 6" in first["error"] and "3 steps in a row" in first["error"] and "skipped.jsonl" in first["error"]
    assert sorted({row["step"] for row in first["written"]}) == [2, 4, 5, 6]


def test_the_log_has_every_measure(quick: list[dict[str, Any]]) -> None:
    """Catches a column that is missing, or gates and norms of one process's shards alone."""
    (ddp, fsdp) = (quick[0][f"pixels-1-{kind}"]["rows"] for kind in KINDS)
    assert {"loss", "loss/pairs", "loss/web", "gradient_norm", "gradient_norm/decayed", "gradient_norm/plain",
            "gradient_norm/gates", "learning_rate/gates", "gate/attention.1", "gate/feed_forward.0",
            "tokens_per_second", "images_per_second", "memory_gb", "data_wait_share", "skipped_steps", "faults/web",
            "samples", "tokens"} <= fsdp[0].keys() == ddp[0].keys()  # fmt: skip
    parts = ("decayed", "plain", "gates")
    for one, other in zip(ddp[2:], fsdp[2:], strict=True):
        for name in ("loss", "gradient_norm", "gate/attention.1", "tokens"):
            assert one[name] == pytest.approx(other[name], rel=1e-5), name
        assert other["gradient_norm"] == pytest.approx(math.hypot(*(other[f"gradient_norm/{each}"] for each in parts)))
    assert fsdp[0]["gate/attention.1"] == pytest.approx(math.tanh(0.8), abs=0.01)
    assert fsdp[-1]["tokens"] == 8 * fsdp[0]["tokens"] and fsdp[0]["memory_gb"] > 0.1


def test_a_shared_out_model_can_be_used_by_each_process_alone(quick: list[dict[str, Any]]) -> None:
    """Catches evaluations that hang where processes have different numbers of queries."""
    for found in quick:
        assert found["evaluating"]["generated"] == found["evaluating"]["alone"]


def test_frozen_backbones_are_stored_in_bfloat16_but_for_what_would_lose(tmp_path: Path) -> None:
    """Catches rotary frequencies in bfloat16, and backbones that train losing their precision."""
    model, _ = tiny_flamingo(tmp_path / "frozen")
    prepare(model, ParallelRecipe(frozen_in_bfloat16=True), Processes())
    for part in model.backbones().values():
        assert {each.dtype for each in part.parameters()} == {torch.bfloat16}
        assert {each.dtype for each in part.buffers() if each.is_floating_point()} <= {torch.float32}
    assert model.resampler.latents.dtype == torch.float32
    model, _ = tiny_flamingo(tmp_path / "trained", freeze_vision=False)
    prepare(model, ParallelRecipe(frozen_in_bfloat16=True), Processes())
    assert (model.vision_tower.dtype, model.language_model.dtype) == (torch.float32, torch.bfloat16)


def test_what_cannot_be_compiled_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a page of a compiler's traceback where one word in the recipe would do."""

    def compiler(model: torch.nn.Module, **_: object) -> torch.nn.Module:
        class Broken(torch.nn.Module):
            def forward(self, **_: object) -> None:
                raise torch._dynamo.exc.Unsupported("no C++ compiler\nand so on")

        return Broken()

    monkeypatch.setattr(torch, "compile", compiler)
    model, _ = tiny_flamingo(tmp_path)
    prepared = prepare(model, ParallelRecipe(compile=True), Processes())
    with pytest.raises(FlamingoError, match=r"parallel\.compile: .*no C\+\+ compiler\); expected .*=false"):
        prepared(input_ids=torch.ones(1, 3, dtype=torch.long))


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        ({"timeout": 0}, r"parallel\.timeout=0"),
        ({"cpu_offload": True}, r"parallel\.cpu_offload=true: expected parallel\.kind=fsdp"),
        ({"kind": "fsdp", "compile": True}, r"parallel\.compile=true: expected parallel\.kind=ddp"),
    ],
)
def test_settings_that_do_not_go_together_are_named(options: dict, culprit: str) -> None:
    """Catches an option that is ignored in silence."""
    with pytest.raises(FlamingoError, match=culprit):
        ParallelRecipe(**options).check()


def test_one_process_needs_no_group() -> None:
    """Catches a run on a laptop that asks torch.distributed for what is not there."""
    alone = Processes()
    assert alone.any(True) and not alone.any(False) and alone.most(3.0) == 3.0 and alone.gather({"a": 1}) == [{"a": 1}]
