"""The first losses of the embedded recipe, pinned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from train.parallel import Processes
from train.pretrain import pretrain
from train.recipe import EMBEDDED, Recipe, from_command_line, packaged

GOLDEN = [1.6167, 1.6390, 2.9998, 2.7919, 2.3961, 2.1363]


def test_losses_of_the_embedded_recipe(tmp_path: Path) -> None:
    """Catches any change of pictures, words, tokens, order, labels, initialisation or arithmetic that nobody meant.

    Who means one pins the new losses, which the failure shows, and says in the commit why they changed.
    """
    recipe = from_command_line(
        Recipe,
        [
            *("--out", str(tmp_path), "--steps", "6", "--tracking.mode", "disabled", "--tracking.log_every", "1"),
            *("--data.glyphs.naming", "100", "--data.glyphs.episodes", "100", "--data.glyphs.processes", "1"),
            *("--data.sources.episodes.start_step", "2", "--optimizer.warmup_steps", "2"),
        ],
        default=packaged(EMBEDDED),
    )
    pretrain(recipe, Processes())
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert losses == pytest.approx(GOLDEN, abs=2e-3), losses
