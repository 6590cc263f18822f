"""Evaluations while training: what they find, and that the training does not notice them."""

from __future__ import annotations

import io
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image as PilImage
from torch import nn

from flamingo import FlamingoError
from flamingo.document import Image
from icl_eval.engine import Engine
from icl_eval.evaluation import evaluate
from icl_eval.examples import in_a_row, small
from icl_eval.prompts import prompt_document
from icl_eval.questions import Questions
from icl_eval.run import load
from icl_eval.sources import ROOT, load_pool
from icl_eval.tasks import load_task
from tests.icl_eval.made import write_own, write_task
from tests.tiny import picture
from tests.train.runs import forked, recipe_of
from train.evaluations import SPARE_TOKENS, Evaluations, undisturbed
from train.parallel import Processes
from train.pretrain import pretrain
from train.recipe import EvaluationRecipe, ParallelRecipe
from train.tracking import GENERATIONS_FILE, METRICS_FILE, read_curves, read_rows

EVALUATION = EvaluationRecipe(every=3, tasks=["digits_2way"], shots=[0, 2], queries=7, generations=2, batch=4)
STEPS = 6


def run(folder: Path, out: Path, processes: Processes, evaluation: EvaluationRecipe, **fields: Any) -> Path:
    """Train for a few steps."""
    pretrain(recipe_of(folder, out, steps=STEPS, evaluation=evaluation, **fields), processes)
    return out


@pytest.fixture(scope="module")
def plain_run(folder: Path) -> Path:
    """A run without evaluations."""
    return run(folder, folder / "plain", Processes(), EvaluationRecipe())


@pytest.fixture(scope="module")
def evaluated(folder: Path, plain_run: Path) -> Path:
    """The same run with evaluations at steps 3 and 6."""
    return run(folder, folder / "evaluated", Processes(), EVALUATION)


def test_training_does_not_notice(plain_run: Path, evaluated: Path) -> None:
    """Dropout left off, a random state moved on, a buffer made in inference mode: other losses from there on."""
    with_it, without = read_curves(evaluated / METRICS_FILE), read_curves(plain_run / METRICS_FILE)
    assert with_it["loss"] == without["loss"]
    assert with_it["gradient_norm"] == without["gradient_norm"]
    assert {name for name in with_it if name not in without} == {"fewshot/digits_2way/0", "fewshot/digits_2way/2"}
    weights = [(out / "model" / "model.safetensors").read_bytes() for out in (plain_run, evaluated)]
    assert weights[0] == weights[1]


def test_scores_are_those_of_the_evaluation(evaluated: Path) -> None:
    """A curve of another split, of fewer queries, or at the wrong number of samples."""
    curves = read_curves(evaluated / METRICS_FILE)
    model, processor = load(str(evaluated / "model"), "cpu")
    expected = evaluate(
        model, processor, ["digits_2way"], shots=[0, 2], queries=7, batch_size=128, split="validation"
    )  # fmt: skip
    for cell in expected.cells:
        steps, scores = zip(*curves[f"fewshot/digits_2way/{cell.shots}"], strict=True)
        assert steps == (3, 6)
        assert scores[-1] == cell.value
    assert dict(curves["samples"])[6] == 6 * 8


def test_generations_are_written_with_their_pictures(evaluated: Path) -> None:
    """A table that has the picture of another query, or a resumed run that writes each picture anew."""
    rows = read_rows(evaluated / GENERATIONS_FILE)
    assert [(row["step"], row["query"]) for row in rows] == [
        (step, f"digits_2way/00000{number}") for step in (3, 6) for number in (0, 1)
    ]
    task = replace(load_task("digits_2way"), split="validation")
    questions = Questions(task, load_pool(task), [(2, None)])
    for number, row in enumerate(rows[:2]):
        prompt = questions.draws.episode(number).prompt(2)
        (query,) = questions.pool.media(questions.pool.indices(prompt.query))
        assert isinstance(query, Image)
        assert PilImage.open(evaluated / row["picture"]).tobytes() == small(query.data).tobytes()
        assert row["prompt"].count("<image>") == 5 and row["prompt"].endswith("<image>")
        assert row["answer"] in prompt.candidates and row["right"] == (row["generated"] == row["answer"])
        width = PilImage.open(evaluated / row["demonstrations"]).width
        assert width > 4 * small(query.data).width
    assert rows[0]["picture"] == rows[2]["picture"]
    assert len(list((evaluated / "generations").iterdir())) == 4


@torch.no_grad()
def test_answers_are_the_most_likely_text_up_to_its_end(folder: Path, evaluated: Path) -> None:
    """Padding, the prompt or the mark of the end taken for a part of the answer; answers of a batch mixed up."""
    model, processor = load(str(evaluated / "model"), "cpu")
    task = replace(load_task("digits_2way"), split="validation")
    questions = Questions(task, load_pool(task), [(2, None)])
    rows = read_rows(evaluated / GENERATIONS_FILE)[2:]
    assert [row["step"] for row in rows] == [STEPS] * 2, "the last step's, which is the saved model's"
    for number, row in enumerate(rows):
        prompt = questions.draws.episode(number).prompt(2)
        batch = processor(documents=prompt_document(questions.pool, questions.chunks(prompt)))
        ids = batch["input_ids"]
        longest = max(len(processor.tokenizer(text).input_ids) for text in prompt.candidates)
        for _ in range(longest + SPARE_TOKENS):
            logits = model(**{**batch, "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": None}).logits
            logits[:, -1, model.config.image_token_id] = -torch.inf
            token = logits[:, -1].argmax(-1, keepdim=True)
            if int(token) == model.config.end_of_chunk_token_id:
                break
            ids = torch.cat((ids, token), dim=1)
        new = ids[0, batch["input_ids"].shape[1] :]
        assert row["generated"] == processor.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_a_split_with_fewer_queries_than_are_shown(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """A run that ends at its first evaluation, since a small data set has no fifth query, or a task is of any kind.

    Answers that are decoded, or count, otherwise than where the task is scored.
    """
    told = []

    class Talking(Engine):
        def generate(self, library: Any, ladders: Any, **how: Any) -> list[list[str]]:
            told.append((how["beams"], how["length_penalty"]))
            assert len(super().generate(library, ladders, **how)) == len(ladders)
            return [["ba, I think"] for _ in ladders]

    monkeypatch.setattr("train.evaluations.Engine", Talking)
    monkeypatch.setenv(ROOT, str(write_own(tmp_path, train=6, test=2)))
    decoding = {"max_new_tokens": 3, "beams": 2, "length_penalty": 0, "keep": "short_answer"}
    free = {"mode": "generate", "generate": decoding, "metric": "exact_match"}
    monkeypatch.setenv("FLAMINGO_CACHE", str(tmp_path / "cache"))
    kinds = (
        ("ranked", {"zero_shot": "honest"}),
        ("similar", {"demonstrations": "rices", "ensemble": 2}),
        ("free", free),
    )
    tasks = [str(write_task(tmp_path, name, **keys)) for name, keys in kinds]
    evaluation = EvaluationRecipe(**{**vars(EVALUATION), "tasks": tasks, "every": STEPS, "generations": 5, "split": ""})
    out = run(folder, tmp_path / "out", Processes(), evaluation)
    rows = read_rows(out / GENERATIONS_FILE)
    assert [row["task"] for row in rows] == [name for name, _ in kinds for _ in range(2)]
    assert told == [(1, 1), (1, 1), (2, 0)]
    assert {row["generated"] for row in rows} == {"ba, I think"} and rows[4]["answer"] == "ba"
    assert [row["right"] for row in rows] == [False] * 4 + [row["answer"] == "ba" for row in rows[4:]]


class Restless(nn.Module):
    """Draws numbers, and computes its buffer anew, whenever it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Dropout(0.5)
        self.register_buffer("table", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.table = torch.rand(2) + random.random() + np.random.random()  # noqa: NPY002
        return self.inner(x)


def test_what_an_evaluation_may_change_comes_back() -> None:
    """A module that was on its own in evaluation mode set to train; generators that go on from somewhere else."""
    model = Restless().train()
    model.inner.eval()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index] # noqa: NPY002
    held = model.table
    with undisturbed(model), torch.inference_mode():
        assert not model.training
        model(torch.ones(3))
    assert model.training and not model.inner.training
    assert model.table is held and not model.table.is_inference()
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]  # type: ignore[index] # noqa: NPY002


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        ({"tasks": ["no_such"]}, "no_such"),
        ({"shots": [10_000]}, "shots: 10000"),
        ({"tasks": []}, "evaluation.tasks"),
        ({"queries": 0}, "evaluation.queries=0"),
    ],
)
def test_mistakes_come_before_the_first_step(folder: Path, tmp_path: Path, change: dict, culprit: str) -> None:
    """A misspelt task that ends a run at its first evaluation, hours later."""
    evaluation = EvaluationRecipe(**{**vars(EVALUATION), **change})
    with pytest.raises(FlamingoError, match=culprit):
        run(folder, tmp_path / "out", Processes(), evaluation)
    assert not read_rows(tmp_path / "out" / METRICS_FILE)


def test_a_task_of_ones_own(folder: Path, tmp_path: Path) -> None:
    """Tasks that are files found only where the package keeps its own."""
    task = {key: value for key, value in load_task("digits_2way").definition().items() if key != "file"}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(task)) | {"name": "mine"}))
    evaluation = EvaluationRecipe(**{**vars(EVALUATION), "tasks": [str(path)], "every": STEPS, "generations": 0})
    out = run(folder, tmp_path / "out", Processes(), evaluation)
    assert "fewshot/mine/2" in read_curves(out / METRICS_FILE)
    assert not (out / GENERATIONS_FILE).exists()


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_find_what_one_finds(folder: Path, evaluated: Path, tmp_path: Path, kind: str) -> None:
    """Processes that wait for each other for ever because one of them had fewer queries; queries asked twice."""

    def trained(processes: Processes) -> str:
        torch.set_num_threads(1)
        run(folder, tmp_path / "on", processes, EVALUATION, parallel=ParallelRecipe(kind, timeout=40))
        run(folder, tmp_path / "off", processes, EvaluationRecipe(), parallel=ParallelRecipe(kind, timeout=40))
        return "done"

    assert forked(trained, 2) == [(0, "done"), (0, "done")]
    found, expected = read_curves(tmp_path / "on" / METRICS_FILE), read_curves(evaluated / METRICS_FILE)
    assert found["loss"] == read_curves(tmp_path / "off" / METRICS_FILE)["loss"]
    for name in ("fewshot/digits_2way/0", "fewshot/digits_2way/2"):
        assert found[name] == expected[name]
    said = [[row["generated"] for row in read_rows(out / GENERATIONS_FILE)] for out in (tmp_path / "on", evaluated)]
    assert said[0] == said[1]


def test_pictures_of_any_kind_fit_the_table() -> None:
    """A large photograph or a grey picture with transparency that breaks the table, or fills the disk."""
    assert max(small(picture(0, 500).data).size) == 160
    buffer = io.BytesIO()
    PilImage.new("LA", (30, 10)).save(buffer, "PNG")
    row = in_a_row([buffer.getvalue(), picture(1, 20).data])
    assert row is not None and row.size == (30 + 2 + 20, 20) and row.mode == "RGB"
    assert in_a_row([]) is None


def test_only_when_asked_for(folder: Path, tmp_path: Path) -> None:
    """Tasks loaded, and fonts drawn, by runs that evaluate nothing."""
    recipe = recipe_of(folder, tmp_path, evaluation=EvaluationRecipe(every=0, tasks=["no_such"]))
    assert Evaluations(recipe, None, None, None, Processes()).tasks == []  # type: ignore[arg-type]
