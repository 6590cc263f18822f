"""`flamingo-eval tasks`: what it says of tasks and files, in a terminal of 80 columns."""

from __future__ import annotations

import pytest

from flamingo import FlamingoError
from icl_eval.datasets import DATASETS, checking, load_dataset
from icl_eval.listing import main
from icl_eval.tasks import available, load_task
from tests.icl_eval.made import write_own, write_task


@pytest.fixture
def listed(monkeypatch, capsys):
    """What a command prints, a line each."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("FLAMINGO_EVAL_DATA", raising=False)

    def run(*words):
        capsys.readouterr()
        main([str(word) for word in words])
        return [line.rstrip() for line in capsys.readouterr().out.splitlines()]

    return run


def test_every_task_and_file_is_told_in_80_columns(listed, tmp_path):
    """A name broken over two lines, which nobody can search for, or a file that is not told."""
    for words in ((), ("--data", tmp_path)):
        lines = listed(*words)
        assert max(map(len, lines)) <= 80 and len(lines) < 135
        for name in available():
            task = load_task(name)
            (line,) = (line for line in lines if line.split()[:1] == [name])
            assert ",".join(map(str, task.shots)) in line.split() and task.metric in line.split()
        for dataset in DATASETS:
            for pattern in load_dataset(dataset, tmp_path).files:
                assert any(line.split()[:1] == [pattern] for line in lines)
            assert any(f"{dataset}/" in line for line in lines) or not load_dataset(dataset, tmp_path).files


def test_a_task_is_ready_faulty_or_absent(listed, tmp_path):
    """A folder without its files that is called ready, or one that is not there called faulty at length."""
    data, task = write_own(tmp_path), write_task(tmp_path)

    def state(*words):
        return {line.split()[0]: line.split()[-1] for line in listed(*words) if line}

    assert state("--data", data)["glyphs_2way"] == "ready" and state("--data", data)["coco_captions"] == "absent"
    assert state(task, "--data", data)["quiz"] == "ready"
    for name in ("test1.png", "test2.png", "train0.png"):
        (data / "quiz" / name).unlink()
    with pytest.raises(FlamingoError, match=f"^{data}: not ready: quiz$"):
        listed(task, "--data", data)
    (data / "coco").mkdir()
    assert state("--data", data)["coco_captions"] == "faulty"
    assert "coco/dataset_coco.json:nosuchfile" in "".join("".join(listed("--data", data)).split())


def test_faults_of_both_splits_are_told(tmp_path, capsys, monkeypatch):
    """The first split's missing images hiding that the other has no annotations at all; a data set read twice."""
    monkeypatch.setenv("COLUMNS", "300")
    data, task, other = write_own(tmp_path), write_task(tmp_path), write_task(tmp_path, "other")
    for name in ("test1.png", "test2.png", "train.jsonl"):
        (data / "quiz" / name).unlink()
    read = []
    monkeypatch.setattr(checking, "load_dataset", lambda *words: read.append(words) or load_dataset(*words))
    with pytest.raises(FlamingoError, match="not ready: quiz, other"):
        main([str(task), str(other), "--data", str(data)])
    shown = capsys.readouterr().out
    assert f"{data}/quiz/test1.png: no such file, expected an image (and 1 more of split 'test')" in shown
    assert shown.count(f"{data}/quiz/train.jsonl: no such file") == 1 and len(read) == 2


def test_a_folder_of_data_sets_that_is_not_there_is_refused(listed, monkeypatch, tmp_path):
    """A misspelled folder, in which every task is absent."""
    with pytest.raises(FlamingoError, match=r"^--data /no/where: expected the folder of data sets$"):
        listed("--data", "/no/where")
    monkeypatch.setenv("FLAMINGO_EVAL_DATA", "/no/where")
    with pytest.raises(FlamingoError, match=r"^FLAMINGO_EVAL_DATA /no/where: expected"):
        listed()
