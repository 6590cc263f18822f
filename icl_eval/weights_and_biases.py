"""An evaluation in Weights & Biases: scores against shots, and a table of answers with their pictures.

results.json and predictions.jsonl are the record; W&B is a convenience. Whatever goes wrong there is said once, and
spoils no evaluation. Without a key everything is kept in files, which `wandb sync` sends later.
"""

from __future__ import annotations

import contextlib
import logging
import netrc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from icl_eval.evaluation import Results
from icl_eval.examples import Answered, Reader, in_a_row, readable_cell

logger = logging.getLogger(__name__)

Mode = Literal["auto", "offline", "online", "disabled"]

ANSWERS = 16
"""queries of a task whose answers are in the table"""
MARK = "<image>"
"""where a picture stands in a prompt's text"""
INIT_SECONDS = 30.0
"""how long W&B may take to answer before a run is kept offline"""
FINISH_SECONDS = 60.0
SCORES = ("task", "shots", "control", "metric", "figure", "value", "low", "high", "queries", "ties")
TABLE = ("task", "shots", "query", "demonstrations", "prompt", "pictures", "right", "answer", "value", "is right")


def record(
    results: Results,
    folder: str | Path,
    *,
    project: str = "flamingo-eval",
    name: str | None = None,
    mode: Mode = "auto",
    answers: int = ANSWERS,
) -> str | None:
    """Keep an evaluation as a W&B run.

    `score/TASK` are curves over `shots`; the table `scores` has all figures with their intervals, `answers` the first
    queries of each task, with pictures of demonstrations and query, the right answer and the model's.

    Args:
        results: of `evaluate`.
        folder: gets `wandb/` with the run's files.
        project: in W&B.
        name: of the run; None: W&B invents one.
        mode: see `resolved`.
        answers: queries of each task in the table.

    Returns:
        W&B's id of the run; None where there is none.
    """
    chosen = resolved(mode)
    if chosen == "disabled":
        return None
    try:
        rows = answered(results, answers)
        run = _start(Path(folder), chosen, project=project, name=name, config=_config(results))
        with staged_in(Path(folder) / "wandb"):
            try:
                _log(run, results, rows)
            except Exception:
                run.finish(exit_code=1)
                raise
            run.finish()
    except Exception as error:  # noqa: BLE001 - W&B raises whatever it likes, and the results are on disk already
        logger.warning("W&B did not take the evaluation: %s: %s", type(error).__name__, error)
        return None
    return str(run.id)


def answered(results: Results, count: int) -> list[Answered]:
    """The first `count` answers of each task, after as many shots as can be looked at."""
    found = []
    for name, task in results.tasks.items():
        cell, reader = readable_cell(results, name), Reader(task, results.data)
        found += [reader.answered(cell, place) for place in range(min(count, len(cell.outcomes)))]
    return found


def score_rows(results: Results) -> list[list[Any]]:
    """A row of `SCORES` for each figure of each cell."""
    rows = []
    for cell in results.cells:
        for name, figure in cell.score.figures.items():
            about = [cell.task, cell.shots, cell.control, cell.score.metric, name]
            rows.append([*about, figure.value, *(figure.interval or (None, None)), cell.score.queries, cell.ties])
    return rows


def answer_row(each: Answered) -> list[Any]:
    """A row of `TABLE`; pictures as `PIL.Image.Image`, those of all demonstrations in a row."""
    demonstrations = [part for chunk in each.demonstrations for part in chunk if isinstance(part, bytes)]
    chunks = [
        "".join(MARK if isinstance(part, bytes) else part for part in c) for c in (*each.demonstrations, each.query)
    ]
    return [
        each.task,
        each.shots,
        each.query_id,
        in_a_row(demonstrations),
        "\n".join(chunks),
        in_a_row([part for part in each.query if isinstance(part, bytes)]),
        " · ".join(dict.fromkeys(each.references or filter(None, [each.right]))),
        each.answer,
        each.value,
        each.is_right,
    ]


def _config(results: Results) -> dict[str, Any]:
    tasks = {name: task.definition() for name, task in results.tasks.items()}
    return {"tasks": tasks, "seeds": results.seed, **results.facts}


def _start(folder: Path, mode: Literal["offline", "online"], **arguments: Any) -> Any:
    """Begin a W&B run beside any that the caller has; one that cannot go online is begun offline."""
    import wandb

    settings = wandb.Settings(init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS, console="off", silent=True)
    try:
        return wandb.init(
            dir=folder, mode=mode, job_type="evaluation", settings=settings, reinit="create_new", **arguments
        )
    except Exception as error:
        if mode == "offline":
            raise
        logger.warning("W&B did not start online; the run is kept offline: %s: %s", type(error).__name__, error)
        return _start(folder, "offline", **arguments)


def _log(run: Any, results: Results, rows: list[Answered]) -> None:
    import wandb
    from PIL.Image import Image

    run.define_metric("shots", hidden=True)
    run.define_metric("score/*", step_metric="shots")
    plain = [cell for cell in results.cells if cell.control is None]
    for shots in sorted({cell.shots for cell in plain}):
        run.log({"shots": shots, **{f"score/{cell.task}": cell.value for cell in plain if cell.shots == shots}})
    table = [[wandb.Image(value) if isinstance(value, Image) else value for value in answer_row(each)] for each in rows]
    run.log(
        {
            "scores": wandb.Table(columns=list(SCORES), data=score_rows(results)),
            "answers": wandb.Table(columns=list(TABLE), data=table),
        }
    )
    for name, found in results.diagnostics.items():
        run.summary[f"verdict/{name}"] = found["verdict"]


# -- how W&B is used here and in training ------------------------------------------------------------------------------


def resolved(mode: Mode) -> Literal["offline", "online", "disabled"]:
    """What a mode means here.

    `auto` follows `WANDB_MODE` where it is set, and else is online where a key is found (`has_key`) and offline without
    one; the other modes are themselves.
    """
    if mode != "auto":
        return mode
    match os.environ.get("WANDB_MODE", "").lower():
        case "online" | "shared":
            return "online"
        case "offline" | "dryrun":
            return "offline"
        case "disabled":
            return "disabled"
    return "online" if has_key() else "offline"


def has_key() -> bool:
    """Whether W&B would find credentials without asking, looked up where W&B itself looks."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    try:
        path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
        login = netrc.netrc(path).authenticators(host)
    except (OSError, RuntimeError, netrc.NetrcParseError):
        return False
    return login is not None and bool(login[2])


@contextlib.contextmanager
def staged_in(folder: Path) -> Iterator[None]:
    """Let W&B keep the pictures of a table in the run's folder until they are sent, and not in the user's home."""
    name = "WANDB_DATA_DIR"
    if name in os.environ:
        yield
        return
    os.environ[name] = str(folder)
    try:
        yield
    finally:
        os.environ.pop(name, None)
