"""What most tests of training share: a folder to train from, and a run to compare others with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.runs import prepare_folder, recipe_of
from train.parallel import Processes
from train.pretrain import pretrain


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny backbones and two sources; a module's own, for runs that it leaves there."""
    return prepare_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """An uninterrupted run."""
    out = folder / "whole"
    pretrain(recipe_of(folder, out), Processes())
    return out
