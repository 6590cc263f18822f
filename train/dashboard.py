"""The W&B dashboard as code: `python -m train.dashboard --entity E --project P`.

It shows what `train.metrics.PLOTS` lists, as the local page of `train.curves` does. Saving it needs a key; without one
the command prints what it would save. The package wandb-workspaces comes with the extra `dashboard`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from flamingo.errors import FlamingoError, command_line
from icl_eval.weights_and_biases import has_key
from train.metrics import AXES, PLOTS, Plot, check_plots, regular_expression
from train.recipe import TrackingRecipe, from_command_line


@dataclass
class Options:
    """Where the dashboard is saved."""

    entity: str
    """user or team of W&B"""
    project: str = TrackingRecipe.project
    """project of the runs that it shows"""
    name: str = "Flamingo"
    """of the view; every saving makes a new one"""


def build(entity: str, project: str, name: str = Options.name, plots: Iterable[Plot] = PLOTS) -> Any:
    """The `wandb_workspaces.workspaces.Workspace`; nothing is sent.

    Raises:
        FlamingoError: where wandb-workspaces is not installed, or a plot shows what the tracker does not record.
    """
    plots = tuple(plots)
    check_plots(plots)
    try:
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise FlamingoError(
            "dashboard: expected the package wandb-workspaces: pip install 'flamingo-icl[dashboard]'"
        ) from error

    sections = [
        workspaces.Section(name=heading, panels=[panel(plot) for plot in group], is_open=True)
        for heading, group in groupby(plots, lambda plot: plot.section)
    ]
    settings = workspaces.WorkspaceSettings(x_axis="samples", smoothing_type="none")
    return workspaces.Workspace(entity=entity, project=project, name=name, sections=sections, settings=settings)


def panel(plot: Plot) -> Any:
    """The panel of wandb-workspaces that shows a plot."""
    import wandb_workspaces.reports.v2 as panels

    if plot.kind == "table":
        (table,) = plot.metrics
        return panels.WeavePanelSummaryTable(table_name=table)
    several = any(name.endswith("*") for name in plot.metrics)
    shown: dict[str, Any] = {"metric_regex": regular_expression(plot.metrics)} if several else {"y": list(plot.metrics)}
    return panels.LinePlot(
        title=plot.title,
        x=plot.axis,
        title_x=AXES[plot.axis],
        title_y=plot.unit,
        range_y=plot.bounds or (None, None),
        **shown,
    )


def as_json(workspace: Any) -> str:
    """What saving a workspace sends."""
    return str(workspace._to_model().spec.model_dump_json(by_alias=True, exclude_none=True, indent=1))


@command_line
def main() -> None:
    """Entry point of `python -m train.dashboard`."""
    options = from_command_line(Options, description="Save the dashboard of runs in W&B.")
    workspace = build(options.entity, options.project, options.name)
    if not has_key():
        print(as_json(workspace))
        return
    try:
        workspace.save()
    except Exception as error:  # W&B raises whatever it likes
        raise FlamingoError(f"dashboard: not saved to {options.entity}/{options.project}: {error}") from error
    print(f"dashboard: {workspace.url}")


if __name__ == "__main__":
    main()
