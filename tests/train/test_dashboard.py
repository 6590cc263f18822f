"""The dashboard as code, checked without a server."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from flamingo import FlamingoError
from train.dashboard import as_json, build, main
from train.metrics import AXES, METRICS, PLOTS, Plot

workspaces = pytest.importorskip("wandb_workspaces.workspaces", reason="the extra `dashboard` is not installed")

COLUMNS = [metric.name.replace("*", "some") for metric in METRICS] + ["gate/attention.3", "gate/feed_forward.0",
           "gates/attention", "gates/feed_forward"]  # fmt: skip


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def panels(workspace: Any) -> list[dict[str, Any]]:
    """The panels as they are sent."""
    sections = json.loads(as_json(workspace))["section"]["panelBankConfig"]["sections"]
    return [panel for section in sections for panel in section["panels"]]


def test_every_plot_is_a_panel_that_finds_its_metrics() -> None:
    """A panel over a metric that nobody records; a pattern that W&B reads otherwise than the local page."""
    shown = panels(build("someone", "flamingo"))
    assert len(shown) == len(PLOTS)
    for plot, panel in zip(PLOTS, shown, strict=True):
        if plot.kind == "table":
            assert panel["viewType"] == "Weave" and '"val": "generations"' in json.dumps(panel)
            continue
        config = panel["config"]
        assert config["chartTitle"] == plot.title and config["xAxis"] == plot.axis and plot.axis in AXES
        expression = config.get("metricRegex") or f"^({'|'.join(map(re.escape, config['metrics']))})$"
        found = [name for name in COLUMNS if re.match(expression, name)]
        assert found and found == [name for name in COLUMNS if plot.shows(name)]
    assert {section.name for section in build("someone", "flamingo").sections} == {plot.section for plot in PLOTS}


def test_it_is_read_back_as_it_was_built() -> None:
    """A setting that the package takes and W&B forgets."""
    built = build("someone", "flamingo", "A name")
    again = workspaces.Workspace._from_model(built._to_model())
    assert (again.entity, again.project, again.name) == ("someone", "flamingo", "A name")
    strip = re.compile(r'"__id__": "[^"]*"')
    assert strip.sub("", as_json(again)) == strip.sub("", as_json(built))


def test_a_plot_of_nothing_is_refused() -> None:
    """A panel that stays empty because a metric was renamed."""
    with pytest.raises(FlamingoError, match="plot 'Perplexity': .*'perplexity'"):
        build("someone", "flamingo", plots=[*PLOTS, Plot("Loss", "Perplexity", "", ("perplexity",))])


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["dashboard", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(str(ended.value.code))


def test_without_a_key_it_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """A newcomer asked for a key, or an answer that no tool can read."""
    monkeypatch.setattr(workspaces.Workspace, "save", lambda _: pytest.fail("saved"))
    assert run(monkeypatch, "--entity", "someone", "--project", "here") == 0
    assert "section" in json.loads(capsys.readouterr().out)


def test_with_a_key_it_is_saved(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """A dashboard saved into another project, and a server's refusal shown as a traceback."""
    saved = []
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setattr(workspaces.Workspace, "save", lambda workspace: saved.append(workspace))  # noqa: PLW0108  bound
    monkeypatch.setattr(workspaces.Workspace, "url", "https://example.org/view")
    assert run(monkeypatch, "--entity", "someone", "--project", "here") == 0
    assert [(each.entity, each.project) for each in saved] == [("someone", "here")]
    assert "https://example.org/view" in capsys.readouterr().out

    def refuse(_: Any) -> None:
        raise RuntimeError("no such entity")

    monkeypatch.setattr(workspaces.Workspace, "save", refuse)
    assert run(monkeypatch, "--entity", "nobody") == 2
    assert capsys.readouterr().err.strip() == "error: dashboard: not saved to nobody/flamingo: no such entity"


def test_without_the_package_it_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A ModuleNotFoundError with a traceback."""
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    assert run(monkeypatch, "--entity", "someone") == 2
    assert "flamingo-icl[dashboard]" in capsys.readouterr().err
