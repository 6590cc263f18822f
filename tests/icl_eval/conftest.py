"""Small random Flamingos with open gates, whose scores tell both candidates and pictures apart."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
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


@pytest.fixture
def browser(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Opens a page in headless Chromium, with some of its options."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("NO BROWSER: install chromium to check pages as people see them")

    def opened(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
        command = [found, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        return subprocess.run([*command, *options, page.as_uri()], capture_output=True, text=True, timeout=120)

    return opened


@pytest.fixture
def phone(browser: Callable[..., subprocess.CompletedProcess[str]]) -> Callable[[Path, str], str]:
    """Opens a page in a frame as wide as a phone, and returns what a script at its end posts to its parent."""

    def measured(page: Path, script: str) -> str:
        page.write_text(f"{page.read_text()}<script>{script}</script>")
        frame = page.with_name("phone.html")
        frame.write_text(
            "<script>onmessage = (event) => document.body.append(event.data)</script>"
            f'<body><iframe src="{page.name}" width="390" height="800" style="border: 0"></iframe>'
        )
        return browser(frame, "--dump-dom", "--virtual-time-budget=5000").stdout

    return measured
