"""How well a model follows instructions that it was not tuned on, after 0, 1, 2, … examples of such instructions.

A held-out set is a folder in MIMIC-IT's files (`mixture.yaml` names them), with two more: `candidates.json`,
{instruction id: [answer, …]}, the right answer among them, and `kinds.json`, {instruction id: kind}. The file of
contexts of each dataset ({query id: [context id, …]}) says which ids are queries. k examples are a query's first k
contexts; each comes with media of its own.

Candidates are ranked by the log-likelihood of all their tokens, `<|endofchunk|>` the last: the same candidates for
every model, and no prior of lengths taken out. Two controls break the link between the media and the answer:

- `gates_at_zero`: the model's gates are shut, so no medium reaches the language model.
- `random_query`: the query's media are replaced by those of an item of the same kind, drawn uniformly from all of them
  (its own included), so that the answer is independent of the media shown.

Beside that the model answers freely, up to `<|endofchunk|>`: how often that is the right answer word for word, and how
many words it takes.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from data_shards.sources.mimic_it import MimicItReader
from flamingo.document import Medium, Text
from flamingo.errors import FlamingoError
from flamingo.files import read_object, whole, write_text
from flamingo.instructions import ANSWER, Turn, instruction_document
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.processing import FlamingoProcessor
from icl_eval.demonstrations import generator
from icl_eval.engine import TIE, Chunk, Engine, Ladder, Query
from icl_eval.evaluation import Progress, check_finite, decide, evaluating, provenance
from icl_eval.ledger import exchanged, rank_and_ranks
from icl_eval.metrics.bootstrap import LEVEL, bootstrap_interval, draws
from icl_eval.metrics.classification import exact_match

SCHEMA = 1
SHOTS = (0, 1, 2, 4)
CONTROLS = ("gates_at_zero", "random_query")
SPARE_TOKENS = 8
"""how many tokens a free answer may be longer than the longest candidate"""

Key = tuple[int, str | None]
"""shots, and the control or None"""


@dataclass(frozen=True)
class Item:
    """An instruction that is asked.

    Attributes:
        id: of the instruction.
        kind: what is asked for; results are by kind.
        contexts: the examples that may stand before it, the first ones first, each with its own media and answer.
        query: with its media, and the right answer.
        candidates: answers to choose among, the right one among them.
    """

    id: str
    kind: str
    contexts: tuple[Turn, ...]
    query: Turn
    candidates: tuple[str, ...]

    @property
    def target(self) -> int:
        """Which candidate is right."""
        return self.candidates.index(str(self.query.answer))


# -- the held-out set --------------------------------------------------------------------------------------------------


def load_instructions(folder: str | Path) -> list[Item]:
    """The items of a held-out set, its datasets in the order of the mixture, queries in that of their files.

    Raises:
        FlamingoError: where a file is missing or has another form, a query has no kind or no candidates or its answer
            is not among them, or an instruction cannot be used. It names the file and the id: unlike in training,
            nothing is left out, so that scores are comparable.
    """
    folder = Path(folder)
    kinds, candidates = _read(folder / "kinds.json", str), _read(folder / "candidates.json", list)
    items = []
    with TemporaryDirectory() as index:  # the folder may be shared, and not ours to write to
        for dataset in MimicItReader(str(folder / "mixture.yaml"), cache=index).datasets():
            if not dataset.train:
                raise FlamingoError(f"{folder / 'mixture.yaml'}: {dataset.name}: expected train_config_path")
            for query, contexts in _read(Path(dataset.train), list).items():
                items.append(_item(folder, dataset, query, contexts, kinds, candidates))
    again = [key for key, count in Counter(item.id for item in items).items() if count > 1]
    if again:
        raise FlamingoError(f"{folder}: {min(again)}: expected each id in one dataset")
    if not items:
        raise FlamingoError(f"{folder / 'mixture.yaml'}: expected datasets with queries, found none")
    return items


def _read(path: Path, kind: type) -> dict[str, Any]:
    """A JSON object whose values are all of one type."""
    content = read_object(path)
    for key, value in content.items():
        texts = value if isinstance(value, list) else [value]
        if not isinstance(value, kind) or not all(isinstance(each, str) for each in texts):
            expected = "a text" if kind is str else "a list of texts"
            raise FlamingoError(f"{path}: {key}: expected {expected}, found {value!r:.60}")
    return content


def _item(
    folder: Path,
    dataset: MimicItReader,
    query: str,
    contexts: Sequence[str],
    kinds: Mapping[str, str],
    candidates: Mapping[str, list[str]],
) -> Item:
    for file, known in (("kinds.json", kinds), ("candidates.json", candidates)):
        if query not in known:
            raise FlamingoError(f"{folder / file}: expected {query}, a query in {dataset.train}")
    try:
        asked, *shown = (dataset.turn(key) for key in (query, *contexts))
    except FlamingoError as error:
        raise FlamingoError(f"{dataset.input}: {query} and its contexts: {error}") from error
    choices = tuple(candidates[query])
    if asked.answer not in choices or len(set(choices)) < max(2, len(choices)):
        raise FlamingoError(
            f"{folder / 'candidates.json'}: {query}: expected different answers, {asked.answer!r} among them, "
            f"found {list(choices)!r:.80}"
        )
    return Item(query, kinds[query], tuple(shown), asked, choices)


# -- prompts -----------------------------------------------------------------------------------------------------------


class Shelf:
    """All media of some items, each once (`icl_eval.engine.Library`), and their turns as chunks of prompts.

    Args:
        answer_mark, spaced: see `instruction_document`.
    """

    def __init__(self, items: Sequence[Item], *, answer_mark: bool, spaced: bool):
        self.answer_mark, self.spaced = answer_mark, spaced
        turns = {turn.key: turn for item in items for turn in (*item.contexts, item.query)}
        self.names = [f"{key}/{place}" for key, turn in turns.items() for place in range(len(turn.media))]
        self.all: list[Medium] = [medium for turn in turns.values() for medium in turn.media]
        self.places = {name: index for index, name in enumerate(self.names)}

    def name(self, index: int) -> str:
        """Id of the instruction, and the medium's number there."""
        return self.names[index]

    def media(self, indices: Sequence[int]) -> list[Medium]:
        """The media at some indices."""
        return [self.all[index] for index in indices]

    def chunk(self, turn: Turn, shown: Turn) -> Chunk:
        """A turn with the media of `shown`; without its answer it stays open."""
        indices = (self.places[f"{shown.key}/{place}"] for place in range(len(shown.media)))
        turns = [replace(turn, media=shown.media)]
        document = instruction_document(turns, answer_mark=self.answer_mark, spaced=self.spaced)
        return Chunk(tuple(each.text if isinstance(each, Text) else next(indices) for each in document.segments))

    def answer(self, text: str) -> str:
        """An answer as it stands after an open turn."""
        return f" {text}" if self.spaced else text


@dataclass(frozen=True)
class Asked:
    """One query of a cell: an item after `shots` examples, with the media of the item `shown`."""

    item: Item
    shots: int
    shown: Item

    def query(self, shelf: Shelf) -> Query:
        """It for the engine."""
        chunk = shelf.chunk(replace(self.item.query, answer=None), self.shown.query)
        return Query(self.shots, chunk, tuple(map(shelf.answer, self.item.candidates)))


def shown_under(control: str | None, item: Item, alike: Sequence[Item], seed: int) -> Item:
    """The item whose media a query shows: under `random_query` any of those of its kind, else itself."""
    if control != "random_query":
        return item
    return alike[int(generator(seed, item.id, control).integers(len(alike)))]


# -- results -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What a model was asked in one query of a cell, and what it answered.

    Attributes:
        id, kind: of the item.
        contexts: ids of the examples before it, in order.
        shown: id of the item whose media the query shows; under `random_query` mostly another.
        candidates: the answers to choose among; `scores`: the log-likelihood of each, in nats.
        target, prediction: indices into `candidates`; `tied`: as in `icl_eval.evaluation.Outcome`.
        answer: what the model says freely; None where it was not asked.
        prompt: SHA-256 of the prompt's text and of the names of its media, 16 hexadecimal digits.
    """

    id: str
    kind: str
    contexts: tuple[str, ...]
    shown: str
    candidates: tuple[str, ...]
    scores: tuple[float, ...]
    target: int
    prediction: int
    tied: bool
    answer: str | None
    prompt: str

    @property
    def right(self) -> str:
        """The right answer."""
        return self.candidates[self.target]


@dataclass(frozen=True)
class Mean:
    """A mean over queries, and its 95 % interval."""

    value: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Cell:
    """One kind (or None: the mean over kinds) at some shots, plain or under a control.

    Attributes:
        accuracy: of the ranked candidates.
        exact: share of free answers that are the right one word for word; None where nothing was generated.
        words: words of a free answer; likewise.
        right_words: words of the right answers, on average.
        chance: expected accuracy of a guess.
        ties: queries whose two best candidates were tied.
        outcomes: of a kind; none for the mean over kinds.
    """

    kind: str | None
    shots: int
    control: str | None
    accuracy: Mean
    exact: Mean | None
    words: Mean | None
    right_words: float
    chance: float
    ties: int
    outcomes: tuple[Outcome, ...] = field(repr=False, default=())


@dataclass
class InstructionResults:
    """All cells of an evaluation and what is needed to make it again.

    Attributes:
        cells: plain ones and controls, each by shots, each by kind and then the mean over kinds.
        shots: that were asked for; `kinds`: in order of the items.
        settings: seed, form of the prompts, generation.
        seconds: that it took.
        facts: versions, commit, machine, and what the caller adds (model, recipe).
    """

    cells: list[Cell]
    shots: tuple[int, ...]
    kinds: tuple[str, ...]
    settings: dict[str, Any]
    seconds: float
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def controls(self) -> tuple[str, ...]:
        """That were run."""
        return tuple(name for name in CONTROLS if any(cell.control == name for cell in self.cells))

    def cell(self, kind: str | None, shots: int, control: str | None = None) -> Cell:
        """The cell of a kind, or of the mean over kinds.

        Raises:
            KeyError: it was not run.
        """
        for cell in self.cells:
            if (cell.kind, cell.shots, cell.control) == (kind, shots, control):
                return cell
        raise KeyError((kind, shots, control))

    def summary(self) -> dict[str, float]:
        """Accuracy by shots, the mean over kinds: a part of the quickstart's summary.json."""
        return {str(shots): self.cell(None, shots).accuracy.value for shots in self.shots}

    def as_dict(self) -> dict[str, Any]:
        """Everything but the single outcomes, as plain data."""
        return {
            "schema": SCHEMA,
            "tie_nats": TIE,
            "facts": self.facts,
            "settings": self.settings,
            "seconds": self.seconds,
            "shots": list(self.shots),
            "kinds": {kind: len(self.cell(kind, self.shots[0]).outcomes) for kind in self.kinds},
            "cells": [_cell_as_dict(cell) for cell in self.cells],
        }

    def save(self, folder: str | Path, name: str = "instructions") -> Path:
        """Write `NAME.json` and `NAME_predictions.jsonl`, a line for each outcome; returns the former's path."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        predictions = folder / f"{name}_predictions.jsonl"
        with whole(predictions) as unfinished, unfinished.open("w", encoding="utf-8") as lines:
            for cell in self.cells:
                for outcome in cell.outcomes:
                    scores = [round(score, 6) for score in outcome.scores]
                    line = {"shots": cell.shots, "control": cell.control, **vars(outcome), "scores": scores}
                    lines.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n")
        path = folder / f"{name}.json"
        content = {**self.as_dict(), "predictions": predictions.name}
        write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        return path


def _cell_as_dict(cell: Cell) -> dict[str, Any]:
    made: dict[str, Any] = {"kind": cell.kind, "shots": cell.shots, "control": cell.control}
    for name in ("accuracy", "exact", "words"):
        mean: Mean | None = getattr(cell, name)
        if mean is not None:
            made |= {name: mean.value, f"{name}_interval_95": list(mean.interval)}
    return made | {"right_words": cell.right_words, "chance": cell.chance, "ties": cell.ties}


# -- evaluation --------------------------------------------------------------------------------------------------------


def evaluate_instructions(
    model: FlamingoForConditionalGeneration,
    processor: FlamingoProcessor,
    items: Sequence[Item],
    *,
    shots: Sequence[int] = SHOTS,
    controls: Sequence[str] = CONTROLS,
    control_shots: Sequence[int] | None = None,
    generate: bool = True,
    beams: int = 1,
    max_new_tokens: int | None = None,
    spaced: bool = False,
    batch_size: int = 128,
    seed: int = 0,
    progress: Progress | None = None,
) -> InstructionResults:
    """Ask `model` all items. Under torch.distributed the ranks share the items, and each returns all results.

    Args:
        model: any Flamingo; it is put into evaluation mode for the time being.
        processor: the model's. Where its tokenizer knows `<answer>`, as that of a tuned model does, prompts end in it.
        items: of `load_instructions`.
        shots: examples before the query; the cells.
        controls: of `CONTROLS`.
        control_shots: shots at which they are run; default: all of `shots`.
        generate: let the model answer freely too, where nothing is under control.
        beams: of that.
        max_new_tokens: of that; default: `SPARE_TOKENS` more than the longest candidate has.
        spaced: see `instruction_document`.
        batch_size: rows of a pass; scores do not depend on it beyond 1e-5, in float32.
        seed: of `random_query`.
        progress: see `Progress`; called on every rank, with "instructions" as the task's name.

    Raises:
        FlamingoError: what is wrong with an argument, or with an item's number of examples.
    """
    start = time.perf_counter()
    shots = tuple(sorted(set(shots)))
    asked = _asked_cells(items, shots, controls, shots if control_shots is None else sorted(set(control_shots)))
    form = {"answer_mark": ANSWER in processor.tokenizer.get_vocab(), "spaced": spaced}
    shelf = Shelf(items, **form)
    if max_new_tokens is None:
        texts = {shelf.answer(text) for item in items for text in item.candidates}
        max_new_tokens = SPARE_TOKENS + max(len(processor.tokenizer(text).input_ids) for text in texts)
    with evaluating(model):
        times = len(asked) + (len(shots) if generate else 0)
        run = _Run(Engine(model, processor, batch_size=batch_size), shelf, items, seed, times, progress)
        found = run.rank(asked)
        free = run.generate(shots, beams, max_new_tokens) if generate else {}
    order = {item.id: place for place, item in enumerate(items)}
    shares = exchanged({key: run.outcomes(key, found[key], free.get(key)) for key in asked})
    outcomes = {
        key: sorted((each for share in shares for each in share[key]), key=lambda outcome: order[outcome.id])
        for key in asked
    }
    kinds = tuple(dict.fromkeys(item.kind for item in items))
    settings = {"seed": seed, **form, "generate": generate, "beams": beams, "max_new_tokens": max_new_tokens}
    cells = [cell for key in asked for cell in _cells(key, outcomes[key], kinds, seed)]
    return InstructionResults(cells, shots, kinds, settings, time.perf_counter() - start, provenance())


def _asked_cells(
    items: Sequence[Item], shots: tuple[int, ...], controls: Sequence[str], control_shots: Sequence[int]
) -> list[Key]:
    """The keys of all cells, once the arguments are checked."""
    if not items or not shots:
        raise FlamingoError(f"{len(items)} items and shots {list(shots)}: expected some of both")
    for control in controls:
        if control not in CONTROLS:
            raise FlamingoError(f"controls: {control!r}, expected some of {', '.join(CONTROLS)}")
    for name, counts in (("shots", shots), ("control_shots", control_shots if controls else ())):
        for item in items:
            if not all(0 <= count <= len(item.contexts) for count in counts):
                expected = f"0 to {len(item.contexts)}, the examples of {item.id}"
                raise FlamingoError(f"{name}: {list(counts)}, expected {expected}")
    return [*((count, None) for count in shots), *((count, c) for c, count in product(controls, control_shots))]


@dataclass
class _Run:
    """The items of one rank, and the engine that answers them."""

    engine: Engine
    shelf: Shelf
    items: Sequence[Item]
    seed: int
    asked_times: int
    progress: Progress | None
    done: int = 0

    def __post_init__(self) -> None:
        rank, ranks = rank_and_ranks()
        self.own = self.items[rank::ranks]
        self.alike: dict[str, list[Item]] = defaultdict(list)
        for item in self.items:
            self.alike[item.kind].append(item)

    def ladder(self, item: Item, keys: Sequence[Key]) -> Ladder:
        """An item at several cells, whose prompts are nested in one another."""
        most = max(count for count, _ in keys)
        examples = tuple(self.shelf.chunk(turn, turn) for turn in item.contexts[:most])
        return Ladder(examples, tuple(self.asked(item, key).query(self.shelf) for key in keys), item.id)

    def asked(self, item: Item, key: Key) -> Asked:
        """An item at a cell."""
        return Asked(item, key[0], shown_under(key[1], item, self.alike[item.kind], self.seed))

    def rank(self, asked: Sequence[Key]) -> dict[Key, list[np.ndarray]]:
        """Scores of the own items' candidates, by cell."""
        found: dict[Key, list[np.ndarray]] = {}
        shut = [key for key in asked if key[1] == "gates_at_zero"]
        for keys in ([key for key in asked if key not in shut], shut):
            if keys:
                with self.engine.model.gates_closed() if keys is shut else nullcontext():
                    ladders = [self.ladder(item, keys) for item in self.own]
                    scores = self.engine.rank(self.shelf, ladders, progress=self._advance)
                found |= {key: [row[column] for row in scores] for column, key in enumerate(keys)}
        return found

    def generate(self, shots: Sequence[int], beams: int, max_new_tokens: int) -> dict[Key, list[str]]:
        """Free answers to the own items, by cell."""
        keys: list[Key] = [(count, None) for count in shots]
        ladders = [self.ladder(item, keys) for item in self.own]
        texts = self.engine.generate(
            self.shelf, ladders, beams=beams, max_new_tokens=max_new_tokens, progress=self._advance
        )
        return {key: [row[column] for row in texts] for column, key in enumerate(keys)}

    def _advance(self, queries: int) -> None:
        self.done += queries
        if self.progress is not None:
            self.progress("instructions", self.done, len(self.own) * self.asked_times)

    def outcomes(self, key: Key, scores: Sequence[np.ndarray], answers: Sequence[str] | None) -> list[Outcome]:
        """What the own items came to at a cell."""
        free: Sequence[str | None] = [None] * len(self.own) if answers is None else answers
        rows = zip(self.own, scores, free, strict=True)
        return [self._outcome(self.asked(item, key), each, answer) for item, each, answer in rows]

    def _outcome(self, asked: Asked, scores: np.ndarray, answer: str | None) -> Outcome:
        item, examples = asked.item, asked.item.contexts[: asked.shots]
        check_finite(scores, f"instructions: {item.id} after {asked.shots} examples")
        prediction, tied = decide(scores)
        chunks = [*(self.shelf.chunk(turn, turn) for turn in examples), asked.query(self.shelf).chunk]
        prompt = json.dumps([self.shelf.name(p) if isinstance(p, int) else [p] for c in chunks for p in c.parts])
        return Outcome(
            id=item.id,
            kind=item.kind,
            contexts=tuple(turn.key for turn in examples),
            shown=asked.shown.id,
            candidates=item.candidates,
            scores=tuple(scores.tolist()),
            target=item.target,
            prediction=prediction,
            tied=tied,
            answer=answer,
            prompt=hashlib.sha256(prompt.encode()).hexdigest()[:16],
        )


# -- figures -----------------------------------------------------------------------------------------------------------


def _cells(key: Key, outcomes: Sequence[Outcome], kinds: Sequence[str], seed: int) -> list[Cell]:
    """The cells of all kinds, and of the mean over them."""
    by_kind = [tuple(each for each in outcomes if each.kind == kind) for kind in kinds]
    cells = [_cell(kind, key, [own], seed, own) for kind, own in zip(kinds, by_kind, strict=True)]
    return [*cells, _cell(None, key, by_kind, seed)]


def _cell(
    kind: str | None, key: Key, groups: Sequence[Sequence[Outcome]], seed: int, outcomes: tuple[Outcome, ...] = ()
) -> Cell:
    """Means over groups, each of which counts alike."""
    free = all(each.answer is not None for group in groups for each in group)
    return Cell(
        kind,
        *key,
        accuracy=_mean([_right(group) for group in groups], seed),
        exact=_mean([_exact(group) for group in groups], seed) if free else None,
        words=_mean([_words([str(each.answer) for each in group]) for group in groups], seed) if free else None,
        right_words=float(np.mean([_words([each.right for each in group]).mean() for group in groups])),
        chance=float(np.mean([np.mean([1 / len(each.candidates) for each in group]) for group in groups])),
        ties=sum(each.tied for group in groups for each in group),
        outcomes=outcomes,
    )


def _right(outcomes: Sequence[Outcome]) -> np.ndarray:
    return np.array([each.prediction == each.target for each in outcomes], dtype=np.float64)


def _exact(outcomes: Sequence[Outcome]) -> np.ndarray:
    return exact_match([str(each.answer) for each in outcomes], [[each.right] for each in outcomes])


def _words(texts: Sequence[str]) -> np.ndarray:
    return np.array([len(text.split()) for text in texts], dtype=np.float64)


def _mean(groups: Sequence[np.ndarray], seed: int) -> Mean:
    """The mean of the groups' means; its interval, if other items had been drawn of each group."""
    value = float(np.mean([values.mean() for values in groups]))
    if len(groups) == 1:
        return Mean(value, bootstrap_interval(groups[0], seed=seed))
    means = [
        np.concatenate([weights @ values / len(values) for weights in draws(len(values), seed=seed + number)])
        for number, values in enumerate(groups)
    ]
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(np.mean(means, axis=0), [tail, 1 - tail])
    return Mean(value, (float(low), float(high)))
