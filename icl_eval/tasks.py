"""A task: what is shown, what is asked, and how the answer is scored. Data, not code: `tasks/*.yaml`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from flamingo.errors import FlamingoError

FOLDER = Path(__file__).parent / "tasks"
IMAGE, LABEL = "<image>", "{label}"
HELD_OUT = ("validation", "test", "scripts")
CHOICES = {"names": ("fresh", "fixed"), "normalise": ("sum", "mean"), "metric": ("accuracy",)}


@dataclass(frozen=True)
class Task:
    """One task. Every field but `file` is a key of its YAML file; those without a default are required.

    Attributes:
        name: how results call it; enters the seed of every draw.
        version: raised whenever a change of the task changes its scores.
        source: where the pictures come from, a key of `icl_eval.sources.SOURCES`.
        split: which classes of the source; "validation", "test" and "scripts" are held out of training.
        ways: classes of an episode, and so candidate labels of a query.
        names: "fresh": names invented for each episode; "fixed": the names that the source gives its classes.
        template: one chunk, demonstration and query alike: `<image>`, then text around `{label}`.
        shots: demonstrations per way, each value a cell of the result.
        chance: expected accuracy of a guess.
        episodes: queries of a cell.
        seed: of the draws, where the run gives none.
        normalise: "sum": the log-likelihood of label + end of chunk; "mean": the same per token.
        metric: a key of `icl_eval.metrics.METRICS`.
        variants: pictures per class of the pool, for sources that draw their pictures; 0: the source's own number.
        file: the file that it was read from, for messages.
    """

    name: str
    version: int
    source: str
    split: str
    ways: int
    names: str
    template: str
    shots: tuple[int, ...]
    chance: float
    episodes: int = 1000
    seed: int = 0
    normalise: str = "sum"
    metric: str = "accuracy"
    variants: int = 0
    file: str = ""

    @property
    def prompt_text(self) -> str:
        """What stands between the query's image and its label."""
        return self.template.removeprefix(IMAGE).split(LABEL)[0]

    def answer_text(self, label: str) -> str:
        """The text of a chunk that holds `label`: a demonstration, or the query completed by a candidate."""
        return self.template.removeprefix(IMAGE).replace(LABEL, label)

    def definition(self) -> dict[str, Any]:
        """The fields as plain data, for results."""
        return asdict(self)


def available() -> list[str]:
    """Names of the tasks that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_task(name: str | Path) -> Task:
    """Read a task by its name or by the path of its YAML file.

    Raises:
        FlamingoError: unknown name; unreadable file; a key that is unknown, missing, or has a bad value.
    """
    path = Path(name) if str(name).endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise FlamingoError(f"task {str(name)!r}: expected the path of a .yaml file or one of {', '.join(available())}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FlamingoError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(content, Mapping):
        raise FlamingoError(f"{path}: expected keys and values, found {type(content).__name__}")
    return _checked(content, str(path))


def _checked(content: Mapping[str, Any], file: str) -> Task:
    known = {field.name: field for field in fields(Task) if field.name != "file"}
    for key in content:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            raise FlamingoError(f"{file}: unknown key {key!r}" + (f" (did you mean {close[0]!r}?)" if close else ""))
    for key, field in known.items():
        if key not in content and field.default is MISSING:
            raise FlamingoError(f"{file}: missing key {key!r}")
    values = {key: _typed(key, value, str(known[key].type), file) for key, value in content.items()}
    task = Task(**values, file=file)
    for key, allowed in CHOICES.items():
        if getattr(task, key) not in allowed:
            raise FlamingoError(f"{file}: {key}: {getattr(task, key)!r}, expected one of {', '.join(allowed)}")
    if not task.template.startswith(IMAGE) or task.template.count(IMAGE) != 1 or task.template.count(LABEL) != 1:
        raise FlamingoError(f"{file}: template: {task.template!r}, expected {IMAGE} and then text with {LABEL} once")
    for key, least in (("ways", 2), ("episodes", 1), ("variants", 0)):
        if getattr(task, key) < least:
            raise FlamingoError(f"{file}: {key}: {getattr(task, key)}, expected at least {least}")
    if not task.shots or min(task.shots) < 0:
        raise FlamingoError(f"{file}: shots: {list(task.shots)}, expected numbers from 0")
    return task


def _typed(key: str, value: Any, kind: str, file: str) -> Any:
    if kind == "tuple[int, ...]":
        if isinstance(value, list) and all(type(entry) is int for entry in value):
            return tuple(value)
    elif kind == "float":
        if type(value) in (int, float):
            return float(value)
    elif type(value).__name__ == kind:
        return value
    expected = {"tuple[int, ...]": "a list of integers", "str": "text", "int": "an integer", "float": "a number"}
    raise FlamingoError(f"{file}: {key}: {value!r}, expected {expected[kind]}")
