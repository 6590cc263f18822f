"""`flamingo-eval` beside a plain evaluation: tasks and their files, exact prompts, several seeds, diagnostics."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from torch import nn
from transformers.utils import logging as transformers_logging

from icl_eval.demonstrations import Draws
from icl_eval.diagnostics import CONTROLS
from icl_eval.ledger import UNFINISHED
from icl_eval.run import main
from icl_eval.saved import read_results
from icl_eval.sources import load_pool
from icl_eval.tasks import load_task
from tests.icl_eval.conftest import lively_flamingo
from tests.icl_eval.made import Stub, write_own, write_task


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    for part in lively_flamingo(tmp_path_factory.mktemp("lively"), "lfm2"):
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["flamingo-eval", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            main()
        shown = capsys.readouterr()
        return stopped.value.code, shown.out, shown.err

    return run


def test_tasks_are_listed_and_their_files_checked(run, tmp_path):
    """A list without a task, or that calls a task ready whose files are missing or broken."""
    code, out, _ = run("tasks")
    assert code == 0 and all(name in out for name in ("glyphs_5way", "coco_captions", "nlvr", "dataset_coco.json"))
    data = write_own(tmp_path)
    task = write_task(tmp_path)
    assert run("tasks", task, "--data", data)[0] == 0
    (data / "quiz" / "test3.png").write_text("no picture")
    code, out, err = run("tasks", task, "glyphs_2way", "--data", data)
    assert code == 2 and "test3.png" in "".join(out.split()) and err == f"error: {data}: not ready: quiz\n"
    code, out, err = run("tasks", "nlvr", "--data", data)
    assert code == 2 and "nlvr" in err
    assert run("tasks", "--dtaa", data)[2].startswith("error: tasks: ")


def test_exact_prompts_are_shown(run, saved, tmp_path):
    """Pages of other queries than the first, or of other demonstrations than are evaluated; pictures left out."""
    data, task = write_own(tmp_path), write_task(tmp_path)
    code, out, _ = run("--model", saved, "--task", task, "--data", data, "--show", 2, "--out", tmp_path / "out")
    pages = out.split()
    assert code == 0 and [Path(page).name for page in pages] == [
        f"quiz-{n}-{k}.html" for n in (0, 1) for k in (0, 1, 3)
    ]
    assert not (tmp_path / "out" / "results.json").exists()
    loaded = load_task(task)
    pool = load_pool(loaded, data)
    episode = Draws(loaded, pool, 0, 3).episode(1)
    page = Path(pages[-1]).read_text()
    for each in episode.ranking:
        assert each.example.id in page and each.example.question in page
    (tmp_path / "file").touch()
    code, _, err = run("--model", saved, "--task", task, "--data", data, "--show", 1, "--out", tmp_path / "file")
    assert code == 2 and err.endswith("file/prompts: Not a directory, expected a folder with room to write in\n")
    assert page.count("data:image/png;base64") == 4 and episode.query_id in page
    assert Path(pages[0]).read_text().count("data:image/png;base64") == 1


def test_seeds_have_folders_of_their_own_and_a_spread(run, saved, tmp_path):
    """Seeds that overwrite one another, a spread that is not theirs, a verdict that is computed and thrown away."""
    data, task, out = write_own(tmp_path), write_task(tmp_path), tmp_path / "out"
    words = ("--model", saved, "--task", task, "--data", data, "--queries", 5, "--shots", "0,1")
    code, shown, err = run(*words, "--diagnostics", "--seeds", "3,4", "--out", out)
    assert code == 0, err
    each = [read_results(out / f"seed-{seed}") for seed in (3, 4)]
    assert [results.seeds["quiz"] for results in each] == [3, 4]
    assert "Verdict:" in each[0].diagnostics["quiz"]["verdict"] and "Verdict:" in " ".join(shown.split())
    spread = json.loads((out / "seeds.json").read_text())
    assert spread["seeds"] == [3, 4] and len(spread["cells"]) == len(each[0].cells) == 3 + 8
    for cell in spread["cells"]:
        values = [results.cells[cell["task"], cell["shots"], cell["control"]].score.value for results in each]
        assert cell["figures"]["accuracy"]["mean"] == pytest.approx(sum(values) / 2)
        assert cell["figures"]["accuracy"]["std"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    for wrong in ("3,3", "a"):
        assert run(*words, "--seeds", wrong, "--out", out)[2].startswith(f"error: --seeds {wrong}: expected")
    assert run(*words, "--seeds", "1", "--seed", "2", "--out", out)[0] == 2
    assert run(*words, "--zero-shot", "none", "--out", out)[2].startswith("error: zero_shot: 'none', expected one of")


def test_several_seeds_go_on_where_they_were_killed(run, saved, tmp_path, monkeypatch):
    """Seeds that were done already asked all over again, which may be most of the work."""
    data, task, out = write_own(tmp_path), write_task(tmp_path), tmp_path / "out"
    words = ("--model", saved, "--task", task, "--data", data, "--queries", 5, "--shots", "1", "--out", out)

    class Dying(Stub):
        def rank(self, *arguments, **options):
            if len(self.asked) == 2:
                raise KeyboardInterrupt
            return super().rank(*arguments, **options)

    for stub in (Dying(), Stub()):
        monkeypatch.setattr("icl_eval.evaluation.Engine", lambda *_, stub=stub, **__: stub)
        code, _, err = run(*words, "--seeds", "3,4,5")
        assert code == (130 if isinstance(stub, Dying) else 0), err
    assert stub.asked == [5], "the last seed alone"
    assert json.loads((out / "seeds.json").read_text())["seeds"] == [3, 4, 5]
    assert not list(out.glob(f"**/{UNFINISHED}"))


def test_no_list_of_all_models_is_shown(run, tmp_path):
    """An error that stands before 700 characters of classes."""
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    code, _, err = run("--model", tmp_path / "bert", "--task", "naming", "--out", tmp_path / "out")
    assert code == 2 and "AutoModelForImageTextToText" in err and len(err) < 400 + len(str(tmp_path)), err


@pytest.mark.parametrize("wanted", [None, "warning"])
def test_transformers_is_silent_unless_it_is_asked_to_speak(run, tmp_path, monkeypatch, wanted):
    """Every evaluation beginning with advice on kernels; or a wish of the user that is overruled."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_warning()
    monkeypatch.delenv("TRANSFORMERS_VERBOSITY", raising=False)
    if wanted is not None:
        monkeypatch.setenv("TRANSFORMERS_VERBOSITY", wanted)
    try:
        run("--model", tmp_path / "none", "--task", "naming", "--out", tmp_path / "out")
        level = transformers_logging.get_verbosity()
    finally:
        transformers_logging.set_verbosity(before)
    assert level == (transformers_logging.ERROR if wanted is None else transformers_logging.WARNING)


def test_models_without_gates_have_the_other_controls(run, tmp_path, monkeypatch):
    """Somebody else's model for which no control can be run, since one cannot."""
    data, task, out = write_own(tmp_path), write_task(tmp_path), tmp_path / "out"
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "another"}')
    peer = Stub()
    peer.model = nn.Identity()
    found = "icl_eval.peers.image_text_to_text.ImageTextToText.from_pretrained"
    monkeypatch.setattr(found, lambda *_, **__: peer)
    words = ("--model", tmp_path / "model", "--task", task, "--data", data, "--queries", 5, "--out", out)
    code, _, err = run(*words, "--controls", "--device", "cpu")
    assert code == 0 and "gates_at_zero is left out" in err
    controls = {control for _, _, control in read_results(out).cells}
    assert controls == {None, *CONTROLS} - {"gates_at_zero"}
