"""What all tests share: the folder of real test data, and threads that leave the machine to others."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))  # tiny models gain nothing from more


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real test data: `FLAMINGO_TEST_DATA`, by default `../shared/data` beside the checkout.

    A test that asks for it is skipped where the folder is absent, and the summary says so.
    """
    given = os.environ.get("FLAMINGO_TEST_DATA")
    folder = Path(given) if given else ROOT.parent / "shared" / "data"
    if folder.is_dir():
        return folder
    said = f"real test data not found: {folder} is no folder; set FLAMINGO_TEST_DATA"
    if given:
        pytest.fail(said)  # who names a folder wants these tests
    warnings.warn(said, stacklevel=1)
    pytest.skip(said)
