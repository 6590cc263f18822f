"""What is kept of an evaluation while it runs, and that it is gone on with, or written over, by the same one alone."""

from __future__ import annotations

import json
import math
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed, nn

from flamingo import FlamingoError
from icl_eval import run
from icl_eval.evaluation import evaluate, evaluate_answerer, evaluating, provenance
from icl_eval.ledger import UNFINISHED, discard
from icl_eval.run import ranks
from icl_eval.saved import Predictions, read_results
from tests.icl_eval.conftest import lively_flamingo
from tests.icl_eval.made import Stub, write_own, write_task


class Dying(Stub):
    """Is interrupted when it is asked again."""

    def rank(self, *arguments, **options):
        if self.asked:
            raise KeyboardInterrupt
        return super().rank(*arguments, **options)


class Scoring(Stub):
    """Gives every query the same scores."""

    def __init__(self, *scores):
        super().__init__()
        self.scores = np.array(scores)

    def rank(self, *arguments, **options):
        return [[self.scores for _ in row] for row in super().rank(*arguments, **options)]


@pytest.fixture
def task(tmp_path):
    """A task whose data are in `tmp_path`."""
    write_own(tmp_path)
    return write_task(tmp_path)


def killed(task, out, **options):
    """Leave an evaluation after its first window; returns how many lines it leaves."""
    with pytest.raises(KeyboardInterrupt):
        evaluate_answerer(Dying(), [task], data=task.parent, out=out, window=4, **options)
    return len((out / UNFINISHED / "rank-0.jsonl").read_text().splitlines())


def test_changed_data_are_other_data(task, tmp_path):
    """Answers to the questions of yesterday's file among those to today's."""
    assert killed(task, tmp_path / "out") == 4
    file = tmp_path / "quiz" / "test.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:-1], lines[-1].replace('"question": "', '"question": "not ')]) + "\n")
    with pytest.raises(FlamingoError, match=r"unfinished: holds an unfinished evaluation of .*facts\.examples\.quiz: "):
        evaluate_answerer(Stub(), [task], data=tmp_path, out=tmp_path / "out")


def test_what_differs_is_named(task, tmp_path):
    """A refusal that leaves one to guess which of twenty options was another."""
    killed(task, tmp_path / "out", facts={"model": {"recipe": "x" * 500}})
    for options, said in (
        ({"seed": 3}, "tasks.quiz.seed: 0 there, 3 here"),
        ({"shots": [1]}, "tasks.quiz.shots: 0, 1, 3 there, 1 here"),
        ({"controls": ["text_only"]}, "cells.quiz: 0, 1, 3 there, 0, 1, 3, 4, 4 text_only here"),
        ({"facts": {"model": {"recipe": "y" * 500}}}, "facts.model.recipe: another"),
        ({"facts": {}}, "facts.model: only there"),
    ):
        how = {"facts": {"model": {"recipe": "x" * 500}}, **options}
        with pytest.raises(FlamingoError, match=re.escape(f"({said})")):
            evaluate_answerer(Stub(), [task], data=tmp_path, out=tmp_path / "out", **how)


def test_going_on_is_told(task, tmp_path, capsys):
    """Somebody who cannot tell whether hours of work are gone on with or begun anew."""
    out = tmp_path / "out"
    killed(task, out)
    assert "goes on" not in capsys.readouterr().err
    evaluate_answerer(Stub(), [task], data=tmp_path, out=out)
    assert capsys.readouterr().err == f"{out}: goes on after {4 * 3} of {14 * 3} answers\n"


def test_progress_is_that_of_all_ranks(task, tmp_path, monkeypatch):
    """A bar that is full after one rank's share."""
    monkeypatch.setattr("icl_eval.evaluation.rank_and_ranks", lambda: (0, 2))
    seen = []
    evaluate_answerer(
        Stub(), [task], data=tmp_path, shots=[1], window=4, progress=lambda _, done, total: seen.append((done, total))
    )
    assert seen == [(8, 14), (14, 14)]


def test_all_code_that_had_a_part_is_named(task, tmp_path):
    """Half of the answers by a commit that the results do not tell of."""
    out = tmp_path / "out"
    killed(task, out, facts={"commit": "a" * 40})
    results = evaluate_answerer(Stub(), [task], data=tmp_path, out=out, facts={"commit": "b" * 40})
    assert results.facts["commit"] == read_results(out).facts["commit"] == f"{'a' * 40}, {'b' * 40}"
    results = evaluate_answerer(Stub(), [task], data=tmp_path, out=out, facts={"commit": "b" * 40})
    assert results.facts["commit"] == "b" * 40


@pytest.mark.parametrize("change", ["weights", "vocabulary"])
def test_another_model_is_told_without_being_named(task, tmp_path, monkeypatch, change):
    """A model that was trained on between a kill and the next start; answers of both in one file."""
    model, processor = lively_flamingo(tmp_path / "model", "lfm2")
    monkeypatch.setattr("icl_eval.evaluation.Engine", lambda *_, **__: Dying())
    options = {"data": tmp_path, "out": tmp_path / "out", "window": 4}
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, processor, [task], **options)
    if change == "weights":
        with torch.no_grad():
            next(model.cross_attention.parameters()).add_(1)
    else:
        processor.tokenizer.add_tokens(["<new>"])
    monkeypatch.setattr("icl_eval.evaluation.Engine", lambda *_, **__: Stub())
    with pytest.raises(FlamingoError, match="facts.model" if change == "weights" else "facts.processing"):
        evaluate(model, processor, [task], **options)


def test_results_of_another_evaluation_are_not_written_over(task, tmp_path):
    """Hours of work lost to a forgotten --out; or the same evaluation that cannot be made again."""
    evaluate_answerer(Stub(), [task], data=tmp_path, out=tmp_path / "out")
    before = (tmp_path / "out" / "results.json").read_text()
    with pytest.raises(FlamingoError, match=r"results\.json: holds results of .*tasks\.quiz\.shots: "):
        evaluate_answerer(Stub(), [task], data=tmp_path, out=tmp_path / "out", shots=[1])
    assert (tmp_path / "out" / "results.json").read_text() == before
    assert not (tmp_path / "out" / UNFINISHED).exists()
    stub = Stub()
    evaluate_answerer(stub, [task], data=tmp_path, out=tmp_path / "out")
    assert sum(stub.asked) == 2 * 14, "anew: the code may be another"


def test_what_a_cut_removal_leaves_does_not_count(task, tmp_path):
    """Answers of a finished evaluation of anything that stand for those of the next."""
    killed(task, tmp_path / "out")
    (tmp_path / "out" / UNFINISHED / "evaluation.json").unlink()
    stub = Stub()
    results = evaluate_answerer(stub, [task], data=tmp_path, out=tmp_path / "out", shots=[1], seed=5)
    assert sum(stub.asked) == 14 and len(results.cell("quiz", 1).outcomes) == 14


def test_answers_that_are_gone_are_missed(task, tmp_path):
    """A folder that not all ranks see, or that two evaluations share: a score over the part of the queries in it."""

    class Losing(Stub):
        def rank(self, *arguments, **options):
            if len(self.asked) == 2:
                (tmp_path / "out" / UNFINISHED / "rank-0.jsonl").unlink()
            return super().rank(*arguments, **options)

    with pytest.raises(FlamingoError, match=r"unfinished: \d+ of the 14 queries of quiz in it"):
        evaluate_answerer(Losing(), [task], data=tmp_path, out=tmp_path / "out", window=4)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_told_and_gone_on_from(task, tmp_path):
    """A traceback that names no file, or a part of a line that makes the rest unreadable."""
    part = tmp_path / "out" / UNFINISHED / "rank-0.jsonl"

    class Filling(Stub):
        def rank(self, *arguments, **options):
            part.symlink_to("/dev/full")
            return super().rank(*arguments, **options)

    with pytest.raises(FlamingoError, match=r"rank-0\.jsonl: No space left on device"):
        evaluate_answerer(Filling(), [task], data=tmp_path, out=tmp_path / "out")
    part.unlink()
    stub = Stub()
    evaluate_answerer(stub, [task], data=tmp_path, out=tmp_path / "out")
    assert sum(stub.asked) == 2 * 14


def test_a_file_is_no_folder_for_results(task, tmp_path):
    """A traceback of pathlib."""
    (tmp_path / "out").write_text("")
    with pytest.raises(FlamingoError, match=r"out/unfinished: Not a directory, expected a folder"):
        evaluate_answerer(Stub(), [task], data=tmp_path, out=tmp_path / "out")


def test_what_a_longer_evaluation_needs_is_kept(task, tmp_path):
    """Parts that are finished asked anew when a later one is killed; or left behind for ever."""
    out = tmp_path / "out"
    evaluate_answerer(Stub(), [task], data=tmp_path, out=out, keep=True)
    stub = Stub()
    evaluate_answerer(stub, [task], data=tmp_path, out=out, keep=True)
    assert not stub.asked and len(Predictions(read_results(out)).cell(("quiz", 3, None))) == 14
    discard(out)
    assert sorted(path.name for path in out.iterdir()) == ["predictions.jsonl", "results.json"]


# -- what cannot be a result -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scores", [(math.nan, -1.0, -2.0, -3.0), (-1.0, -2.0, math.nan, -3.0), (-math.inf,) * 4])
def test_a_broken_model_has_no_score(task, tmp_path, scores):
    """NaN that counts as the first candidate, or as none: a score at chance, without a word."""
    with pytest.raises(FlamingoError, match=r"task quiz: query test0 at 0 shots: log-likelihoods .* expected finite"):
        evaluate_answerer(Scoring(*scores), [task], data=tmp_path)


def test_files_hold_no_number_that_json_does_not_know(task, tmp_path):
    """A candidate that cannot be said, as -Infinity, at which other readers of the file stop; or lost on the way."""
    results = evaluate_answerer(Scoring(-math.inf, -1.0, -2.0, -3.0), [task], data=tmp_path, out=tmp_path / "out")
    assert results.cells[0].outcomes[0].scores == (-math.inf, -1.0, -2.0, -3.0)

    def refuse(name):
        raise AssertionError(name)

    for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines():
        assert json.loads(line, parse_constant=refuse)["scores"] == [None, -1.0, -2.0, -3.0]
    json.loads((tmp_path / "out" / "results.json").read_text(), parse_constant=refuse)
    Predictions(read_results(tmp_path / "out"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shots": []}, "shots: none"),
        ({"seed": -1}, "task quiz: seed: -1"),
        ({"window": 0}, "window: 0"),
        ({"controls": ["text_only", "text_only"]}, "controls: expected different names"),
    ],
)
def test_mistakes_are_named_before_anything_is_asked(task, tmp_path, options, message):
    """A traceback after hours, when intervals are drawn."""
    stub = Stub()
    with pytest.raises(FlamingoError, match=message):
        evaluate_answerer(stub, [task], data=tmp_path, **options)
    with pytest.raises(FlamingoError, match="tasks: none"):
        evaluate_answerer(stub, [], data=tmp_path)
    (tmp_path / "quiz" / "test.jsonl").write_text("")
    with pytest.raises(FlamingoError):
        evaluate_answerer(stub, [task], data=tmp_path)
    assert not stub.asked


# -- what stands around it ---------------------------------------------------------------------------------------------


def test_modules_come_back_into_their_own_modes():
    """A frozen part in evaluation mode that is set to train by an evaluation."""
    model = nn.Sequential(nn.Dropout(), nn.Dropout()).train()
    model[0].eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, False, True]


def test_the_commit_is_that_of_the_code(tmp_path, monkeypatch):
    """Changes of the model that a clean commit stands for, or the commit of a project in which this is installed."""

    def git(*words):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True)

    files = [tmp_path / room / "evaluation.py" for room in ("flamingo", "icl_eval")]
    for file in files:
        file.parent.mkdir()
        file.write_text("1\n")
    git("init")
    git("add", "flamingo")
    author = ("-c", "user.name=a", "-c", "user.email=b")
    git(*author, "commit", "-m", "c")
    monkeypatch.setattr("icl_eval.evaluation.__file__", str(files[1]))
    assert provenance()["commit"] is None
    git("add", ".")
    git(*author, "commit", "-m", "d")
    assert len(provenance()["commit"]) == 40
    files[0].write_text("2\n")
    assert provenance()["commit"].endswith("-dirty")


def test_ranks_wait_for_the_slowest(monkeypatch):
    """A slow rank that ends an evaluation of days after torch's half an hour."""
    given = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed, "init_process_group", lambda *_, **options: given.update(options))
    monkeypatch.setattr(distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(distributed, "destroy_process_group", lambda: None)
    with ranks() as rank:
        assert rank == 1 and given["timeout"] == run.PATIENCE > distributed.default_pg_timeout
