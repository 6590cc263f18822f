"""What a person sees of a run: a bar while training, and the list of stages around it.

On a terminal both redraw themselves. Elsewhere (a CI log, a Slurm file) they print plain lines now and then.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

from rich import get_console
from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

PLAIN_SECONDS = 10.0
"""Between two lines where the display cannot redraw itself."""


class Progress:
    """The bar of a training run: step, loss, learning rate, tokens/s, images/s, share of time waiting for data, rest.

    Args:
        total: optimizer steps of the whole run.
        start: steps done before this process started.
        enabled: False on all ranks but the main one.
        console: where to draw; standard output by default.
        every_seconds: between two plain lines where the console is no terminal.
    """

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        enabled: bool = True,
        console: Console | None = None,
        every_seconds: float = PLAIN_SECONDS,
    ) -> None:
        self._total, self._start, self._enabled, self._every = total, start, enabled, every_seconds
        self._console = console or get_console()
        self._began = self._printed = time.monotonic()
        self._bar: RichProgress | None = None

    def __enter__(self) -> Self:
        self._began = self._printed = time.monotonic()
        if self._enabled and self._console.is_terminal:
            self._bar = RichProgress(
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(compact=True),
                console=self._console,
            )
            self._task = self._bar.add_task("", total=self._total, completed=self._start)
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def update(self, step: int, loss: float, learning_rate: float, rates: Mapping[str, float]) -> None:
        """Show where the run stands after `step`. Cheap enough for every step.

        Args:
            step: optimizer steps done, those before `start` included.
            loss: of this step.
            learning_rate: of this step.
            rates: `tokens_per_second`, `images_per_second`, `data_wait_share` (0 to 1); a missing one is not shown.
        """
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=_figures(loss, learning_rate, rates))
            return
        now = time.monotonic()
        if now - self._printed >= self._every or step in (self._start + 1, self._total):
            self._printed = now
            rest = (now - self._began) / max(step - self._start, 1) * (self._total - step)
            _plain(
                self._console, f"step {step}/{self._total}  {_figures(loss, learning_rate, rates)}  rest {rest:.0f} s"
            )


def _figures(loss: float, learning_rate: float, rates: Mapping[str, float]) -> str:
    """`loss 0.412  lr 3.0e-03  81.2k tok/s  1.9k img/s  data 2 %`."""
    figures = [f"loss {loss:.3f}", f"lr {learning_rate:.1e}"]
    for key, unit in (("tokens_per_second", "tok/s"), ("images_per_second", "img/s")):
        if key in rates:
            figures.append(f"{_short(rates[key])} {unit}")
    if "data_wait_share" in rates:
        figures.append(f"data {rates['data_wait_share']:.0%}")
    return "  ".join(figures)


def _short(number: float) -> str:
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.1f}{suffix}"
    return f"{number:.0f}"


def _plain(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


@dataclass
class _Stage:
    name: str
    status: Literal["waiting", "running", "done", "kept", "failed"] = "waiting"
    note: str = ""
    began: float = 0.0
    seconds: float = 0.0


class Stages:
    """The stages of a longer command and where it is: which are done, which runs, and for how many seconds.

    A `Progress` may be shown within a stage; it is drawn below the list.

        with Stages(["shards", "pretraining"]) as stages:
            stages.keep("shards", "26,000 documents")       # there already
            with stages.run("pretraining"):
                stages.note("step 12 of 800")

    Args:
        names: of the stages, in order.
        enabled: False on all ranks but the main one; seconds are measured all the same.
        console: where to draw; standard output by default.
    """

    def __init__(self, names: list[str], *, enabled: bool = True, console: Console | None = None) -> None:
        self._stages = {name: _Stage(name) for name in names}
        self._enabled = enabled
        self._console = console or get_console()
        self._running: _Stage | None = None
        self._noted = 0.0
        self._live: Live | None = None
        self._spinner = Spinner("dots")

    @property
    def seconds(self) -> dict[str, float]:
        """Wall-clock seconds of every stage that ran to its end, by name."""
        return {stage.name: stage.seconds for stage in self._stages.values() if stage.status == "done"}

    def __enter__(self) -> Self:
        if self._enabled and self._console.is_terminal:
            self._live = Live(get_renderable=self._table, console=self._console, refresh_per_second=8)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    @contextmanager
    def run(self, name: str) -> Iterator[None]:
        """Within it the stage runs; an exception marks it as failed."""
        stage = self._stages[name]
        stage.status, stage.note, stage.began = "running", "", time.monotonic()
        self._running = stage
        self._say(stage)
        try:
            yield
        except BaseException:
            stage.status = "failed"
            raise
        else:
            stage.status = "done"
        finally:
            stage.seconds = time.monotonic() - stage.began
            self._running = None
            self._say(stage)

    def note(self, text: str) -> None:
        """Say what the running stage is doing, or what it found; the last note stays."""
        if self._running is None:
            return
        self._running.note = text
        if self._live is None and time.monotonic() - self._noted >= PLAIN_SECONDS:
            self._say(self._running)

    def keep(self, name: str, note: str) -> None:
        """Mark a stage whose result is there already and is used as it is."""
        stage = self._stages[name]
        stage.status, stage.note = "kept", note
        self._say(stage)

    def _say(self, stage: _Stage) -> None:
        """A plain line, where nothing is redrawn."""
        if not self._enabled or self._live is not None:
            return
        self._noted = time.monotonic()
        seconds = f" {stage.seconds:.1f} s" if stage.status in ("done", "failed") else ""
        _plain(self._console, f"[{stage.name}] {stage.status}{seconds}" + (f": {stage.note}" if stage.note else ""))

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        table.add_column(width=1)
        table.add_column(no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(style="dim")
        for stage in self._stages.values():
            marks: dict[str, RenderableType] = {
                "waiting": Text("·", "dim"),
                "running": self._spinner,
                "done": Text("✓", "green"),
                "kept": Text("✓", "cyan"),
                "failed": Text("✗", "red"),
            }
            elapsed = time.monotonic() - stage.began if stage.status == "running" else stage.seconds
            seconds = {"waiting": "", "kept": "kept"}.get(stage.status, f"{elapsed:.1f} s")
            style = {"waiting": "dim", "running": "bold"}.get(stage.status, "")
            table.add_row(marks[stage.status], Text(stage.name, style), seconds, Text(stage.note))
        return table
