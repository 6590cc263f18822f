"""What a run records: a line of `metrics.jsonl` a row, and the same row in Weights & Biases.

`metrics.jsonl` is the record that reports are drawn from, with `generations.jsonl` and its pictures beside it; it needs
no account and no network. W&B is a convenience: whatever goes wrong there is said once and training goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TextIO

import numpy as np
import torch.distributed as dist
from PIL.Image import Image

from flamingo.files import whole, write_text
from icl_eval.weights_and_biases import Mode, resolved, staged_in
from train.metrics import AXES, METRICS

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
GENERATIONS_FILE = "generations.jsonl"
PICTURES = "generations"
"""Folder of the pictures in `generations.jsonl`, each named by its SHA-256: most come again at every evaluation."""
GATE_KINDS = ("attention", "feed_forward")
GATE_BINS = 40
"""Of a histogram of gates, from −1 to 1."""

_FLUSH_SECONDS = 0.1
"""W&B's own default is 15 s: a killed run lost all its rows."""
_INIT_SECONDS = 30.0
"""How long W&B may take to answer before the run is kept offline."""
_FINISH_SECONDS = 15.0
"""How long the last upload may hold up the end of a run, of which torchrun gives 30 s to one that is preempted; what is
not sent by then stays on disk for `wandb sync`."""


@dataclass(frozen=True)
class Generation:
    """What a model was shown of a query, and what it answered in its own words.

    Attributes:
        task, shots, query: which query it is; shots per class.
        demonstrations: their pictures in a row, None where there are none.
        prompt: the text, with a mark where each picture stands.
        picture: the query's.
        answer: the right one; `generated`: the model's.
        right: whether they are equal.
    """

    task: str
    shots: int
    query: str
    demonstrations: Image | None
    prompt: str
    picture: Image
    answer: str
    generated: str
    right: bool


class Tracker:
    """Records the metrics of one run. Only rank 0 writes; on other ranks every method does nothing.

    Make it after the process group, so that it knows its rank.

    Args:
        out: folder of the run: gets `metrics.jsonl`, `generations.jsonl`, and `wandb/` with the files of W&B, in one
            folder for each time that the run is started or resumed. They hold steps that were computed twice twice;
            `train.curves` joins them by step, `wandb sync --append` sends them.
        project: W&B project.
        name: name of the run in W&B.
        mode: `online`, `offline` (files only, sent later by `wandb sync`) or `disabled` (no W&B). `auto`: see
            `icl_eval.weights_and_biases.resolved`. Where the server does not answer, an online run is kept offline.
        config: the recipe, kept with the run in W&B.
        resume_id: the `run_id` of the run that this one continues. Online, W&B appends to that run.
        start_step: the step that the run continues from. Rows of later steps, written before an interruption, are
            dropped from both files, so that a curve never has a step twice; at 0 all are.
    """

    def __init__(
        self,
        out: Path,
        *,
        project: str,
        name: str,
        mode: Mode = "auto",
        config: Mapping[str, Any] | None = None,
        resume_id: str | None = None,
        start_step: int = 0,
    ) -> None:
        self.run_id: str | None = resume_id
        """W&B's id of the run, for checkpoints; None where W&B is not used."""
        self._run: Any = None
        self._file: TextIO | None = None
        self._out = out
        if not _is_rank_0():
            return
        path = out / METRICS_FILE
        with _tolerated(f"cannot write {path}; the run has no metrics file"):
            out.mkdir(parents=True, exist_ok=True)
            drop_rows_after(out / GENERATIONS_FILE, start_step)
            drop_rows_after(path, start_step)
            self._file = path.open("a", encoding="utf-8", buffering=1)
        chosen = resolved(mode)
        if chosen != "disabled":
            self._start(out, chosen, project=project, name=name, config=dict(config or {}), id=resume_id)

    def log(self, step: int, metrics: Mapping[str, float], generations: Sequence[Generation] = ()) -> None:
        """Record a row. Several rows may share a step: `read_curves` joins them.

        Args:
            step: optimizer steps done.
            metrics: columns (`train.metrics`), those of `AXES` among them. A value that is not finite becomes null in
                `metrics.jsonl`: JSON has no name for it. W&B also gets the gates as histograms over blocks.
            generations: of this step; a table in W&B, lines of `generations.jsonl` here.
        """
        if self._file is not None:
            row = {"step": step} | {key: _finite(value) for key, value in metrics.items()}
            try:
                self._file.write(json.dumps(row) + "\n")
            except OSError as error:
                file, self._file = self._file, None
                logger.warning("metrics are no longer written to %s: %s", file.name, error)
                with contextlib.suppress(OSError):
                    file.close()
            if generations:
                with _tolerated(f"generations of step {step} are not in {self._out / GENERATIONS_FILE}"):
                    _write_generations(self._out, step, generations)
        # The step is a column and not W&B's own counter, which refuses to go back where a resumed run starts again.
        with staged_in(self._out / "wandb"):
            self._guarded(
                lambda run: run.log({**metrics, "step": step, **_histograms(metrics), **_table(generations)}),
                "W&B stopped recording; metrics.jsonl goes on",
            )

    def finish(self, *, failed: bool = False) -> None:
        """Close files and the W&B run, which `failed` marks as such. A second call does nothing."""
        if self._file is not None:
            with _tolerated("the metrics file could not be closed"):
                self._file.close()
            self._file = None
        self._guarded(lambda run: run.finish(exit_code=int(failed)), "W&B could not finish the run")
        self._run = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.finish(failed=error is not None)

    def _start(self, out: Path, mode: Literal["offline", "online"], **arguments: Any) -> None:
        """Begin a W&B run; one that cannot go online is begun offline."""
        try:
            import wandb  # here, because it takes a second that only rank 0 need spend

            settings = wandb.Settings(
                x_transaction_log_flush_interval=_FLUSH_SECONDS,
                init_timeout=_INIT_SECONDS,
                finish_timeout=_FINISH_SECONDS,
                console="off",  # it would capture the progress display
                silent=True,
            )
            resume: Literal["allow"] | None = "allow" if mode == "online" and arguments["id"] else None
            self._run = wandb.init(dir=out, mode=mode, resume=resume, settings=settings, **arguments)
            self.run_id = self._run.id
            for axis in AXES:
                self._run.define_metric(axis, hidden=True)
            for metric in METRICS:
                self._run.define_metric(metric.name, step_metric=metric.axis)
        except Exception as error:  # noqa: BLE001 - W&B raises whatever it likes, and none of it may stop a training
            self._run = None
            if mode == "online":
                logger.warning("W&B did not start online; the run is kept offline: %s", _line(error))
                self._start(out, "offline", **arguments)
            else:
                logger.warning("W&B did not start; metrics.jsonl is the only record: %s", _line(error))

    def _guarded(self, action: Callable[[Any], None], otherwise: str) -> None:
        """Do something with the W&B run, if there is one; where it fails, say so and let go of the run."""
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:  # noqa: BLE001 - as above
            self._run = None
            logger.warning("%s: %s", otherwise, _line(error))


@contextlib.contextmanager
def _tolerated(otherwise: str) -> Iterator[None]:
    """Turn an OSError into a warning."""
    try:
        yield
    except OSError as error:
        logger.warning("%s: %s", otherwise, error)


def _histograms(metrics: Mapping[str, float]) -> dict[str, Any]:
    """`gates/KIND`: W&B's histogram of all finite `gate/KIND.BLOCK`, in bins that are the same at all steps."""
    import wandb

    gates = {kind: [v for k, v in metrics.items() if k.startswith(f"gate/{kind}.")] for kind in GATE_KINDS}
    finite = {kind: [value for value in values if math.isfinite(value)] for kind, values in gates.items()}
    return {
        f"gates/{kind}": wandb.Histogram(np_histogram=np.histogram(values, GATE_BINS, (-1.0, 1.0)))
        for kind, values in finite.items()
        if values
    }


def _table(generations: Sequence[Generation]) -> dict[str, Any]:
    """`generations`: W&B's table of them; nothing for none."""
    if not generations:
        return {}
    import wandb

    rows = [
        [wandb.Image(value) if isinstance(value, Image) else value for value in vars(each).values()]
        for each in generations
    ]
    return {"generations": wandb.Table(columns=list(vars(generations[0])), data=rows)}


def _write_generations(out: Path, step: int, generations: Iterable[Generation]) -> None:
    """Add lines to `generations.jsonl`; a picture is a file beside it, named in its place."""
    (out / PICTURES).mkdir(exist_ok=True)

    def plain(value: Any) -> Any:
        if not isinstance(value, Image):
            return value
        buffer = io.BytesIO()
        value.save(buffer, "PNG")
        path = out / PICTURES / f"{hashlib.sha256(buffer.getvalue()).hexdigest()[:16]}.png"
        if not path.exists():
            with whole(path) as unfinished:
                unfinished.write_bytes(buffer.getvalue())
        return f"{PICTURES}/{path.name}"

    rows = [{"step": step} | {key: plain(value) for key, value in vars(each).items()} for each in generations]
    with (out / GENERATIONS_FILE).open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def read_curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    """The curves in a `metrics.jsonl`: metric → [(step, value), …] in order of steps. Nulls are left out.

    A last line that a kill cut short is ignored. A missing file has no curves.
    """
    curves: dict[str, dict[int, float]] = {}
    for row in read_rows(path):
        for key, value in row.items():
            if key != "step" and value is not None:
                curves.setdefault(key, {})[row["step"]] = value
    return {key: sorted(points.items()) for key, points in curves.items()}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows, lines of JSON with a `step`, of a file, but for those that a kill cut short; none of a missing file."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and "step" in row]


def drop_rows_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Take the rows after `step`, at 0 all, out of a file that `read_rows` reads, and return those that are left.

    The file is replaced at once: a kill leaves the old one or the new one. A missing file has no rows.
    """
    if not path.exists():
        return []
    kept = [row for row in read_rows(path) if row["step"] <= step] if step else []
    write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
    return kept


def _is_rank_0() -> bool:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return int(os.environ.get("RANK", "0")) == 0


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
