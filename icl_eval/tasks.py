"""A task: what is shown, what is asked, and how the answer is scored. Data, not code: `tasks/*.yaml`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from flamingo.errors import FlamingoError
from icl_eval.datasets import load_dataset
from icl_eval.metrics import METRICS
from icl_eval.metrics.kept import KEEPS

FOLDER = Path(__file__).parent / "tasks"
IMAGE = "<image>"
SLOTS = ("answer", "label")
HELD_OUT = ("validation", "test", "scripts")
MOST_ORDERS = 6
CHOICES = {
    "names": ("", "fresh", "fixed"),
    "mode": ("rank", "generate"),
    "normalise": ("sum", "mean"),
    "demonstrations": ("random", "fixed", "balanced", "rices"),
    "zero_shot": ("honest", "text_only"),
    "metric": tuple(METRICS),
}


@dataclass(frozen=True)
class Generation:
    """How free answers are decoded, up to `<|endofchunk|>`, and what of them counts.

    Attributes:
        max_new_tokens: at most.
        beams: 1: greedily.
        length_penalty: of beams, see `icl_eval.engine.Engine.generate`; OpenFlamingo's evaluation has 0.
        keep: what counts of an answer, a key of `icl_eval.metrics.kept.KEEPS`; "": all of it.
    """

    max_new_tokens: int
    beams: int = 1
    length_penalty: float = 1.0
    keep: str = ""

    def kept(self, text: str) -> str:
        """What counts of an answer, without spaces around it."""
        return KEEPS[self.keep](text).strip()


@dataclass(frozen=True)
class Task:
    """One task. Every field but `file` is a key of its YAML file; those without a default are required.

    A file may hold `include: other.yaml`, whose keys it then has too, unless it has them itself. Names of files that
    begin with "_" are no tasks of their own.

    Attributes:
        name: how results and their files call it; enters the seed of every draw.
        version: raised whenever a change of the task changes its scores.
        dataset: a key of `icl_eval.datasets.DATASETS`, or a folder of questions of one's own.
        split: of the queries; of the embedded ones "validation", "test" and "scripts" are held out of training.
        template: one chunk, demonstration and query alike: `<image>` where each medium stands, `{question}`,
            `{answer}` (of a demonstration its first one) or `{label}`, and other fields of the example. All media of an
            example stand in the place of a single `<image>`.
        inverted: whether light and dark of all pictures are exchanged.
        shots: demonstrations before a query, each value a cell of the result; of fast binding: of each way.
        support: split of the demonstrations; empty: that of the queries.
        separator: white space between chunks.
        mode: "rank": the most likely of the candidates; "generate": what the model says freely.
        generate: how; for `mode: generate`.
        demonstrations: "random" for each query; "fixed" for all queries; "balanced": classes take turns; "rices": those
            whose media look most like the query's, the most similar last.
        features: for "rices": folder or hub id of the vision tower that media are compared by; empty: the model's own.
        ensemble: orders of the demonstrations over which log-likelihoods are averaged, at most 6.
        within: a field that a query has in common with its demonstrations.
        zero_shot: "honest": nothing stands before the query; "text_only": two demonstrations without their media, as in
            the papers.
        normalise: "sum": the log-likelihood of answer + end of chunk; "mean": the same per token.
        metric: a key of `icl_eval.metrics.METRICS`; to roc_auc the last of the candidates is the positive class.
        queries: of a cell, drawn from the split; 0: all of it. Of fast binding: episodes.
        seed: of the draws, where the run gives none.
        ways: fast binding: classes of an episode, and so candidates of a query; 0: no fast binding.
        names: of the classes: "fresh": invented for each episode; "fixed": their own.
        chance: expected score of a guess; without it, it follows from metric and candidates, where it can.
        file: the file that it was read from, for messages.
    """

    name: str
    version: int
    dataset: str
    split: str
    template: str
    shots: tuple[int, ...]
    support: str = ""
    inverted: bool = False
    separator: str = ""
    mode: str = "rank"
    generate: Generation | None = None
    demonstrations: str = "random"
    features: str = ""
    ensemble: int = 1
    within: str = ""
    zero_shot: str = "honest"
    normalise: str = "sum"
    metric: str = "accuracy"
    queries: int = 0
    seed: int = 0
    ways: int = 0
    names: str = ""
    chance: float | None = None
    file: str = ""

    @property
    def support_split(self) -> str:
        """The split that demonstrations come from."""
        return self.support or self.split

    @property
    def per_shot(self) -> int:
        """Demonstrations of a shot."""
        return self.ways or 1

    def definition(self) -> dict[str, Any]:
        """The fields as plain data, for results."""
        return asdict(self)


def available() -> list[str]:
    """Names of the tasks that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml") if not path.stem.startswith("_"))


def needing_no_files() -> list[str]:
    """Names of the tasks that come with the package together with all that they are about."""
    return [name for name in available() if not load_dataset(load_task(name).dataset, Path()).files]


def load_task(name: str | Path) -> Task:
    """Read a task by its name or by the path of its YAML file.

    Raises:
        FlamingoError: unknown name; unreadable file; a key that is unknown, missing, or has a bad value.
    """
    path = Path(name) if str(name).endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        close = difflib.get_close_matches(str(name), available(), n=1)
        meant = f" (did you mean {close[0]!r}?)" if close else ""
        raise FlamingoError(
            f"task {str(name)!r}{meant}: expected the path of a .yaml file or one of {', '.join(available())}"
        )
    return _checked(_read(path, ()), str(path))


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML keeps the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read(path: Path, including: tuple[Path, ...]) -> dict[str, tuple[Any, str]]:
    """Keys of a file and of what it includes: the value, and the file that it stands in."""
    if path.resolve() in including:
        raise FlamingoError(f"{path}: include: it includes itself")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise FlamingoError(f"{path}: expected a file that can be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FlamingoError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(content, Mapping):
        raise FlamingoError(f"{path}: expected keys and values, found {type(content).__name__}")
    own = {key: (value, str(path)) for key, value in content.items() if key != "include"}
    if "include" not in content:
        return own
    other = content["include"]
    if not isinstance(other, str) or not (path.parent / other).is_file():
        raise FlamingoError(f"{path}: include: {other!r}, expected a file beside it")
    return {**_read(path.parent / other, (*including, path.resolve())), **own}


def _checked(content: Mapping[str, tuple[Any, str]], file: str) -> Task:
    known = {field.name: field for field in fields(Task) if field.name != "file"}
    for key, (_, place) in content.items():
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            raise FlamingoError(f"{place}: unknown key {key!r}" + (f" (did you mean {close[0]!r}?)" if close else ""))
    for key, field in known.items():
        if key not in content and field.default is MISSING:
            raise FlamingoError(f"{file}: missing key {key!r}")
    values = {key: _typed(key, value, str(known[key].type), place) for key, (value, place) in content.items()}
    task = Task(**values, file=file)
    for key, found, expected in _faults(task):
        place = content[key][1] if key in content else file
        where = file if place == file else f"{file}: of {place}, which it includes"
        raise FlamingoError(f"{where}: {key}: {found}, expected {expected}")
    return task


def _faults(task: Task) -> list[tuple[str, str, str]]:
    """Values that do not fit, each with its key and what was expected."""
    slots = [slot for slot in SLOTS if f"{{{slot}}}" in task.template]
    after = task.template.partition(f"{{{slots[0]}}}")[2] if slots else ""
    decoding = task.generate or Generation(1)
    binding, generates = task.ways > 0, task.mode == "generate"
    takes = METRICS[task.metric].takes if task.metric in METRICS else "text"
    checks = [
        *((key, getattr(task, key) in allowed, f"one of {', '.join(filter(None, allowed))}")
          for key, allowed in CHOICES.items()),
        ("template", len(slots) == 1 and task.template.count(f"{{{slots[0]}}}") == 1, "{answer} or {label} once"),
        ("template", IMAGE not in after, f"each {IMAGE} before the answer"),
        ("shots", bool(task.shots) and min(task.shots, default=0) >= 0, "numbers from 0"),
        ("name", bool(re.fullmatch(r"[^./\\][^/\\]*", task.name)), "text that a file's name may begin with"),
        ("separator", not task.separator.strip(), "white space"),
        ("queries", task.queries >= (binding and not task.within), f"at least {int(binding and not task.within)}"),
        ("ensemble", 1 <= task.ensemble <= (1 if generates else MOST_ORDERS),
         "1 where answers are generated" if generates else f"1 to {MOST_ORDERS}"),
        ("generate", generates == (task.generate is not None),
         "max_new_tokens and beams" if generates else "nothing (generate: null) where candidates are ranked"),
        ("generate", decoding.max_new_tokens >= 1 and decoding.beams >= 1, "positive numbers"),
        ("generate", decoding.length_penalty is not None, "a number as length_penalty"),
        ("generate", decoding.keep in KEEPS, f"keep: one of {', '.join(filter(None, KEEPS))}"),
        ("metric", not generates or takes == "text", "a metric of texts where answers are generated"),
        ("ways", task.ways == 0 or task.ways >= 2, "at least 2"),
        ("ways", not (binding and generates), "none where answers are generated"),
        ("features", not task.features or task.demonstrations == "rices", "nothing where demonstrations are not rices"),
        ("demonstrations", not binding or task.demonstrations == "balanced", "balanced where there are ways"),
        ("zero_shot", not binding or task.zero_shot == "honest", "honest where there are ways"),
        ("names", bool(task.names) == binding, "fresh or fixed where there are ways, and else nothing"),
    ]  # fmt: skip
    shown = asdict(task) | {"shots": list(task.shots)}
    return [(key, repr(shown[key]), expected) for key, fits, expected in checks if not fits]


def _typed(key: str, value: Any, kind: str, file: str) -> Any:
    if kind == "tuple[int, ...]":
        if isinstance(value, list) and all(type(entry) is int for entry in value):
            return tuple(value)
    elif kind == "float | None":
        if value is None or type(value) in (int, float):
            return None if value is None else float(value)
    elif kind == "Generation | None":
        if value is None:
            return None
        kinds = {"max_new_tokens": "int", "beams": "int", "length_penalty": "float | None", "keep": "str"}
        if isinstance(value, Mapping) and "max_new_tokens" in value and not set(value) - set(kinds):
            return Generation(
                **{name: _typed(f"{key}.{name}", each, kinds[name], file) for name, each in value.items()}
            )
    elif type(value).__name__ == kind:
        return value
    expected = {
        "tuple[int, ...]": "a list of integers",
        "str": "text",
        "int": "an integer",
        "bool": "true or false",
        "float | None": "a number",
        "Generation | None": "max_new_tokens and beams",
    }
    raise FlamingoError(f"{file}: {key}: {value!r}, expected {expected[kind]}")
