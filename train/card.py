"""The model card: what a model was made of and from, as far as its checkpoint knows it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from data_shards.order import MixtureOrder
from train.recipe import sampling_shares

USE = """```python
from flamingo import FlamingoForConditionalGeneration, FlamingoProcessor

model = FlamingoForConditionalGeneration.from_pretrained(FOLDER)
processor = FlamingoProcessor.from_pretrained(FOLDER)
```"""
DATA_COLUMNS = ("source", "shards", "SHA-256", "documents", "samples used", "epochs", "loss weight")


def model_card(
    record: Mapping[str, Any],
    results: Mapping[str, Any] | None = None,
    log: Iterable[Mapping[str, Any]] = (),
) -> str:
    """Markdown with the header that the Hugging Face hub reads.

    Args:
        record: `run.json` of a checkpoint.
        results: `results.json` of an evaluation of this model (`icl_eval.evaluation.Results.save`).
        log: rows of `metrics.jsonl`; without results, few-shot scores that were taken while training are shown.
    """
    recipe, origins = record["recipe"], _origins(record)
    header = {"library_name": "transformers", "pipeline_tag": "image-text-to-text", "tags": ["flamingo", "few-shot"]}
    if on_hub := [name for _, name, identity in origins if identity == name]:
        header["base_model"] = on_hub
    made_by = record["made_by"]
    parts = [
        f"---\n{_yaml(header)}---\n# {_title(record)}",
        f"Trained for {record['step']:,} of {recipe['steps']:,} steps of {recipe['batch']:,} sequences.",
        USE,
        *(_scores(results) if results is not None else _scores_while_training(record["step"], log)),
        "## Data",
        *_data(record),
        "## Faults",
        *_faults(record["faults"].get("counts", {})),
        "## Backbones",
        _table(("part", "from", "SHA-256, or id on the hub"), [(*each[:2], f"`{each[2]}`") for each in origins]),
        "## Recipe",
        f"```yaml\n{_yaml(recipe)}```",
        "## Made by",
        f"Commit {made_by['commit'] or 'unknown'}; "
        + ", ".join(f"{name} {version}" for name, version in made_by["versions"].items()),
    ]
    return "\n\n".join(parts) + "\n"


def samples_used(record: Mapping[str, Any]) -> dict[str, int]:
    """How many samples each source had given at a checkpoint's step: a function of the step."""
    recipe = record["recipe"]
    sources = recipe["data"]["sources"]
    order = MixtureOrder(
        sampling_shares(recipe["data"], record["documents"]),
        recipe["seed"],
        [source["start_step"] * recipe["batch"] for source in sources.values()],
    )
    return dict(zip(sources, order.used(record["step"] * recipe["batch"]), strict=True))


def _data(record: Mapping[str, Any]) -> list[str]:
    """What was read, how often, and what its conversion kept."""
    rows = []
    for name, used in samples_used(record).items():
        source, documents = record["recipe"]["data"]["sources"][name], record["documents"][name]
        sha256 = str(record["identity"]["sources"][name]["shards"])[:12]
        counts = f"{documents:,}", f"{used:,}", f"{used / documents:.2f}", f"{source['loss_weight']:g}"
        rows.append((name, source["shards"], f"`{sha256}`", *counts))
    return [_table(DATA_COLUMNS, rows), *(_account(*named) for named in record.get("accounts", {}).items())]


def _account(name: str, account: Mapping[str, Any]) -> str:
    """What became of the documents and images of a source when it was converted."""
    parts = []
    for what in ("documents", "images"):
        dropped = ", ".join(f"{reason}: {count:,}" for reason, count in account[f"{what}_dropped"].items())
        parts.append(
            f"of {account[f'{what}_read']:,} {what} {account[f'{what}_kept']:,} were kept"
            + (f" (dropped: {dropped})" if dropped else "")
        )
    return f"The conversion of {name}: {'; '.join(parts)}."


def _faults(counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    rows = [(source, reason, f"{count:,}") for source, reasons in counts.items() for reason, count in reasons.items()]
    if not rows:
        return ["No sample was unusable."]
    return [
        "Samples that could not be used, each replaced by a neighbour:",
        _table(("source", "reason", "samples"), rows),
    ]


def _title(record: Mapping[str, Any]) -> str:
    """What it is, in a line."""
    names = {part: name for part, name, _ in _origins(record)}
    if "tuned from" in names:
        return f"A Flamingo tuned on instructions from {names['tuned from']}"
    return f"A Flamingo over {names['language']} and {names['vision']}"


def _origins(record: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What the model was made from: the part, its name, and its SHA-256 or id on the hub."""
    recipe, identity = record["recipe"], record["identity"]
    if "model" in recipe:
        return [(part, recipe["model"][part], identity["backbones"][part]) for part in ("language", "vision")]
    backbones = record["backbones"].items()
    return [
        ("tuned from", recipe["init"]["path"], identity["init"]),
        *((part, origin["name"], origin["sha256"] or origin["name"]) for part, origin in backbones),
    ]


def _scores(results: Mapping[str, Any]) -> list[str]:
    """Tasks by shots per way, with 95 % intervals; controls below."""
    plain = [cell for cell in results["cells"] if cell["control"] is None]
    shots = sorted({cell["shots"] for cell in plain})
    shown = {(cell["task"], cell["shots"]): _score(cell) for cell in plain}
    tasks = list(dict.fromkeys(cell["task"] for cell in plain))
    rows = [(task, *(shown.get((task, count), "–") for count in shots)) for task in tasks]
    commit = results["facts"].get("commit") or "unknown"
    parts = [
        "## Few-shot scores",
        f"Shots per way, score with its 95 % interval; evaluated at commit {commit}:",
        _table(("task", *map(str, shots)), rows),
    ]
    controls = [cell for cell in results["cells"] if cell["control"] is not None]
    if controls:
        found = [(cell["control"], cell["task"], str(cell["shots"]), _score(cell)) for cell in controls]
        parts += ["Controls, which must be at chance:", _table(("control", "task", "shots", "score"), found)]
    return parts


def _scores_while_training(step: int, log: Iterable[Mapping[str, Any]]) -> list[str]:
    """The last scores up to a step, of `fewshot/TASK/SHOTS`."""
    last: dict[str, tuple[int, float]] = {}
    for row in log:
        found = {name: score for name, score in row.items() if name.startswith("fewshot/") and score is not None}
        last |= {name: (row["step"], score) for name, score in found.items() if row["step"] <= step}
    if not last:
        return []
    rows = [(*name.split("/")[1:], f"{at:,}", f"{score:.3f}") for name, (at, score) in last.items()]
    table = _table(("task", "shots", "step", "accuracy"), rows)
    return ["## Few-shot scores", "Taken while training, on few queries:", table]


def _score(cell: Mapping[str, Any]) -> str:
    """The headline of the metric."""
    figure = next(iter(cell["figures"].values()))
    interval = "" if figure["interval"] is None else " ({:.3f}–{:.3f})".format(*figure["interval"])
    return f"{figure['value']:.3f}{interval}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _yaml(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)
