"""Results depend on nothing but model, task and seed: not on batches, windows, ranks, caches, or a kill in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from flamingo import FlamingoError
from icl_eval.datasets import Example
from icl_eval.evaluation import evaluate, evaluate_answerer
from icl_eval.ledger import UNFINISHED
from icl_eval.tasks import Task, load_task
from tests.icl_eval.conftest import lively_flamingo
from tests.icl_eval.made import Made, Stub, write_own, write_task

ROOT = Path(__file__).parents[2]
CONTROLS = ("gates_at_zero", "labels_permuted", "text_only")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_own(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Ranked, by similarity and over orders, and answered freely."""
    folder = tmp_path_factory.mktemp("tasks")
    generate = {"mode": "generate", "generate": {"max_new_tokens": 4}, "metric": "exact_match"}
    return [
        write_task(folder, "ranked", normalise="mean", metric="top1"),
        write_task(folder, "similar", demonstrations="rices", ensemble=3, zero_shot="honest"),
        write_task(folder, "free", demonstrations="balanced", **generate),
    ]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return lively_flamingo(tmp_path_factory.mktemp("lively"), "lfm2")


@pytest.fixture(scope="module")
def saved(pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    for part in pair:
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(pair, tasks, data, tmp_path_factory):
    """Lines of predictions.jsonl, in one go."""
    out = tmp_path_factory.mktemp("expected")
    evaluate(*pair, tasks, data=data, controls=CONTROLS, cache=out / "cache", out=out)
    assert not (out / UNFINISHED).exists()
    return lines(out)


def lines(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def assert_same(found, expected, atol=1e-5):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for key in ("task", "shots", "control", "query_id", "query", "demonstrations", "labels", "prompt", "target"):
            assert one[key] == other[key], key
        if "scores" in other:
            np.testing.assert_allclose(one["scores"], other["scores"], atol=atol, rtol=0)
        if not other.get("tied"):
            assert one["answer"] == other["answer"]


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_neither_batch_nor_window_nor_cache_changes_a_result(pair, tasks, data, expected, tmp_path, batch):
    """Rows of a pass that disturb one another; windows that lose or repeat a query; features that differ."""
    results = evaluate(
        *pair, tasks, data=data, controls=CONTROLS, batch_size=batch, window=2 * batch + 1, cache=tmp_path / "cache"
    )
    results.save(tmp_path)  # in memory until here
    assert_same(lines(tmp_path), expected)


def test_float64_agrees_to_ten_digits(tasks, data, tmp_path_factory, tmp_path):
    """Scores that are rounded, or summed in float32, on their way into the files."""
    model, processor = lively_flamingo(tmp_path_factory.mktemp("double"), "lfm2")
    model.double()
    for batch in (1, 8):
        out = tmp_path / str(batch)
        evaluate(model, processor, tasks[:2], data=data, batch_size=batch, cache=tmp_path / "cache", out=out)
    found = lines(tmp_path / "1")
    assert_same(found, lines(tmp_path / "8"), atol=1e-10)
    assert any(abs(score - round(score, 8)) > 1e-10 for line in found for score in line["scores"])


SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from icl_eval.evaluation import evaluate
from icl_eval.run import load, ranks

model, data, out, cache, kill, *tasks = sys.argv[1:]
asked = 0
def progress(task, done, total):
    global asked
    asked += 1
    if asked == int(kill):
        os.kill(os.getpid(), signal.SIGKILL)
with ranks():
    evaluate(*load(model, "cpu"), tasks, data=data, controls={controls!r}, batch_size=2, window=3, cache=cache,
             out=out, progress=progress)
"""


def start(saved, data, tasks, tmp_path, out, *, kill=-1, ranks=1):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(controls=CONTROLS))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launch, str(script), *map(str, (saved, data, out, tmp_path / "cache", kill, *tasks))]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


def test_a_killed_evaluation_goes_on_where_it_stopped(saved, data, tasks, expected, tmp_path):
    """Queries lost or answered twice after a SIGKILL, a line cut short that counts, or a start from the beginning."""
    out = tmp_path / "out"
    assert start(saved, data, tasks, tmp_path, out, kill=40).returncode == -signal.SIGKILL
    part = out / UNFINISHED / "rank-0.jsonl"
    kept = len(part.read_text().splitlines())
    assert kept >= 3 and not (out / "results.json").exists()
    with part.open("a") as file:
        file.write('{"task":"ranked","number":')  # what a process that is killed while it writes leaves
    done = start(saved, data, tasks, tmp_path, out, kill=80)
    assert done.returncode == -signal.SIGKILL
    joined = (out / UNFINISHED / "before.jsonl").read_text().splitlines()
    assert len(joined) == kept
    # the rest by two processes
    done = start(saved, data, tasks, tmp_path, out, ranks=2)
    assert done.returncode == 0, done.stderr
    assert_same(lines(out), expected)
    assert not (out / UNFINISHED).exists()


def test_an_unfinished_evaluation_of_something_else_is_left_alone(tmp_path, data, tasks):
    """Answers of another model, or to other shots, that end up in these results."""

    class Dying(Stub):
        def rank(self, *arguments, **options):
            if self.asked:
                raise KeyboardInterrupt
            return super().rank(*arguments, **options)

    with pytest.raises(KeyboardInterrupt):
        evaluate_answerer(Dying(), tasks[:1], data=data, out=tmp_path, window=4)
    kept = (tmp_path / UNFINISHED / "rank-0.jsonl").read_text()
    for change in ({"shots": [2]}, {"facts": {"model": "another"}}, {"seed": 7}, {"controls": ["text_only"]}):
        with pytest.raises(FlamingoError, match="holds an unfinished evaluation of another model"):
            evaluate_answerer(Stub(), tasks[:1], data=data, out=tmp_path, **change)
    assert (tmp_path / UNFINISHED / "rank-0.jsonl").read_text() == kept
    stub = Stub()
    results = evaluate_answerer(stub, tasks[:1], data=data, out=tmp_path, window=4)
    assert len(results.cell("ranked", 3).outcomes) == 14 and sum(stub.asked) == 2 * (14 - len(kept.splitlines()))


def test_ranks_share_the_queries(monkeypatch, data, tasks):
    """Every rank asking all queries, or some that none asks."""
    found = []
    for rank in range(3):
        monkeypatch.setattr("icl_eval.evaluation.rank_and_ranks", lambda rank=rank: (rank, 3))
        results = evaluate_answerer(Stub(), tasks[:1], data=data)
        found += [outcome.query_id for outcome in results.cell("ranked", 3).outcomes]
    assert len(found) == 14 and set(found) == {f"test{number}" for number in range(14)}


def trivial(monkeypatch, count, candidates=("x", "y")):
    """A task of so many queries, two shots before each."""
    support = [Example(f"s{n}", (), answers=("x",), label="x") for n in range(count)]
    queries = [Example(f"q{n}", (), f"what is {n}?", ("y",), "y") for n in range(count)]
    monkeypatch.setattr("icl_eval.sources.load_dataset", lambda name, root: Made(support, queries, candidates))
    return Task("trivial", 1, "made", "test", "<image>{question}{label}", (0, 2), support="train", file="f")


def peak(monkeypatch, count, out):
    """Bytes that an evaluation of so many queries needs at most, beyond its examples."""
    task = trivial(monkeypatch, count)
    monkeypatch.setattr("icl_eval.metrics.bootstrap._CELLS", 2**17)  # its own bound, which hides all others
    tracemalloc.start()
    try:
        results = evaluate_answerer(Stub(), [task], out=out)
        assert len(results.cell("trivial", 2).outcomes) == count
        assert results.cell("trivial", 2).outcomes[count - 1].query_id == f"q{count - 1}"
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_hardly_grows_with_the_queries(monkeypatch, tmp_path):
    """Prompts or outcomes of all queries that are held at once."""
    few, many = (peak(monkeypatch, count, tmp_path / str(count)) for count in (1000, 3000))
    outcome = 1500  # what a query's outcomes in two cells take in memory, at least
    assert (many - few) / 2000 < outcome / 2


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_hundred_thousand_queries_fit(monkeypatch, tmp_path):
    """An evaluation whose memory is that of all its answers: here some 400 MB."""
    assert peak(monkeypatch, 100_000, tmp_path) < 100e6


def test_tasks_of_the_fixture_are_what_they_say(tasks):
    """Three tasks that are one and the same after all."""
    assert [load_task(task).demonstrations for task in tasks] == ["random", "rices", "balanced"]
