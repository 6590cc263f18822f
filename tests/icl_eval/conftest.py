"""Small random Flamingos with open gates, whose scores tell both candidates and pictures apart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flamingo import FlamingoForConditionalGeneration, FlamingoProcessor
from tests.tiny import tiny_flamingo

Pair = tuple[FlamingoForConditionalGeneration, FlamingoProcessor]


def lively_flamingo(folder: Path, family: str, **options: object) -> Pair:
    """`tiny_flamingo` with larger weights, so that scores differ by nats."""
    model, processor = tiny_flamingo(folder, family, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and name.startswith(("language_model", "cross_attention", "resampler")):
                parameter.mul_(3.0)
        model.new_input_rows.mul_(3.0)
    return model, processor


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small only lose by a second thread, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", params=["lfm2", "llama"])
def flamingo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return lively_flamingo(tmp_path_factory.mktemp(request.param), request.param)
