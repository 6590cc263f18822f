"""The progress display: what a log file gets, and what a terminal shows."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from train.progress import Progress, Stages

RATES = {"tokens_per_second": 81_234.0, "images_per_second": 950.0, "data_wait_share": 0.021}


def console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=100, color_system=None)


def written(to: Console) -> str:
    assert isinstance(to.file, io.StringIO)
    return to.file.getvalue()


def test_a_log_file_gets_plain_lines_now_and_then() -> None:
    """A CI log of 800 redrawn bars, or one in which nothing moves."""
    log = console(terminal=False)
    with Progress(800, start=100, console=log, every_seconds=1000) as progress:
        for step in range(101, 801):
            progress.update(step, 0.4124, 3e-3, RATES)
    first, last = written(log).splitlines()
    assert first.startswith("step 101/800  loss 0.412  lr 3.0e-03  81.2k tok/s  950 img/s  data 2%  rest ")
    assert last.startswith("step 800/800 ")
    assert last.endswith("rest 0 s")
    assert "\x1b" not in written(log)


def test_a_terminal_shows_the_figures() -> None:
    """A bar that hides what it is for, or counts a resumed run from zero."""
    terminal = console(terminal=True)
    with Progress(800, start=100, console=terminal) as progress:
        progress.update(101, 0.4124, 3e-3, RATES)
    assert "101/800" in written(terminal)
    assert "loss 0.412  lr 3.0e-03  81.2k tok/s  950 img/s  data 2%" in written(terminal)


def test_other_ranks_are_silent() -> None:
    """Eight ranks drawing eight bars over each other."""
    terminal = console(terminal=True)
    with Stages(["a"], enabled=False, console=terminal) as stages, stages.run("a"):
        with Progress(2, enabled=False, console=terminal) as progress:
            progress.update(1, 0.0, 0.0, {})
        stages.note("here")
    assert written(terminal) == ""
    assert set(stages.seconds) == {"a"}


def test_stages_in_a_log_file() -> None:
    """A stage that begins or ends unseen; a kept or failed one that counts as run."""
    log = console(terminal=False)
    with Stages(["shards", "pretraining", "report"], console=log) as stages:
        stages.keep("shards", "26,000 documents")
        with stages.run("pretraining"):
            stages.note("[800 steps]")
        with pytest.raises(KeyError), stages.run("report"):
            raise KeyError
    kept, begins, ends, report, fails = written(log).splitlines()
    assert kept == "[shards] kept: 26,000 documents"
    assert begins == "[pretraining] running"
    assert ends.startswith("[pretraining] done 0.0 s: [800 steps]")
    assert report == "[report] running"
    assert fails.startswith("[report] failed")
    assert set(stages.seconds) == {"pretraining"}


def test_a_bar_within_a_stage_on_a_terminal() -> None:
    """In rich before 14.1 one live display opened within another raises."""
    terminal = console(terminal=True)
    with Stages(["shards", "pretraining"], console=terminal) as stages, stages.run("pretraining"):
        with Progress(5, console=terminal) as progress:
            progress.update(5, 1.0, 1.0, RATES)
        stages.note("done")
    assert "shards" in written(terminal)
    assert "5/5" in written(terminal)
    assert "✓ pretraining" in " ".join(written(terminal).split())
