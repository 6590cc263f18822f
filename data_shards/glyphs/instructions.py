"""The embedded world's instruction set, in MIMIC-IT's own files: what a pretrained Flamingo is tuned and judged on.

| kind | asks for | dataset | its pictures |
|---|---|---|---|
| naming | the name that the context gave to the glyph | LA_NAMING, in-context examples | one |
| style | the way it is drawn | LA_STYLE, in-context examples | one |
| position | where it stands | LA_POSITION, in-context examples | one |
| same | whether two show one glyph | SD_SAME, two pictures compared | two, as two frames |
| story | what comes first, then and last, by its style | VST_STORY, stories | two or three |
| sequence | from where to where a glyph moves | DC_SEQUENCE, videos | three frames |

Training speaks of train classes, by names and in wordings of training, and answers in the concise form. What is held
out differs in all three: classes of another split, unseen names, unseen wordings. A held-out query has `CONTEXTS`
instructions of its kind as examples, each with pictures of its own; k shots are the first k of them. Beside the files
of MIMIC-IT it has `candidates.json`, the answers to be ranked (the right one among them), and `kinds.json`.

Query `number` of a kind and its examples are a pure function of (seed, split, kind, number).
"""

from __future__ import annotations

import base64
import functools
import itertools
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data_shards.glyphs.pictures import POSITIONS, STYLES, PictureKey, load_world, process_map
from data_shards.glyphs.words import ANSWERS, fresh_names, held_out_questions, story, training_questions
from flamingo.errors import FlamingoError
from flamingo.files import write_text

CONTEXTS = 4  # examples of a query
VARIANTS = 12  # pictures of a class in one style at one place
HELD_OUT_VARIANT = 20_000  # from here on in held-out sets: icl_eval draws classes of the same splits from 10,000 on
DISTRACTORS = 2  # unseen names among the candidates for a name, so that naming any example is no even chance
NAMES = 2  # glyphs that the examples of a naming query show, and names


@dataclass(frozen=True)
class Dataset:
    """How a kind stands in MIMIC-IT: the dataset's name, by whose beginning it is assembled, and its group."""

    name: str
    group: str
    taught_with: int
    """examples of a query in training: every turn counts, so that each document trains so many numbers of examples;
    none where the assembly of the dataset shows examples no pictures of their own"""


DATASETS: Mapping[str, Dataset] = {
    "naming": Dataset("LA_NAMING", "IMAGE_TEXT_IN_CONTEXT", CONTEXTS),
    "style": Dataset("LA_STYLE", "IMAGE_TEXT_IN_CONTEXT", CONTEXTS),
    "position": Dataset("LA_POSITION", "IMAGE_TEXT_IN_CONTEXT", CONTEXTS),
    "same": Dataset("SD_SAME", "IMAGE_TEXT", 0),
    "story": Dataset("VST_STORY", "IMAGE_TEXT_IN_CONTEXT", 1),
    "sequence": Dataset("DC_SEQUENCE", "VIDEO_TEXT", 0),
}
KINDS = tuple(DATASETS)
HELD_OUT_SPLITS = ("validation", "test")


@dataclass(frozen=True)
class Exchange:
    """A question about pictures and its answer; `candidates`: answers to choose from, the right one among them."""

    question: str
    answer: str
    pictures: tuple[PictureKey, ...]
    candidates: tuple[str, ...]


@dataclass(frozen=True)
class _Setting:
    """Where exchanges take their classes, names, wordings and pictures from."""

    split: str

    @property
    def is_held_out(self) -> bool:
        return self.split != "train"

    @functools.cached_property
    def classes(self) -> list[int]:
        return load_world().split(self.split)

    def names(self, rng: random.Random, count: int) -> list[str]:
        return fresh_names(rng, count, "unseen" if self.is_held_out else "train")

    def question(self, rng: random.Random, topic: str) -> str:
        return rng.choice(held_out_questions(topic) if self.is_held_out else training_questions(topic))

    def picture(
        self, rng: random.Random, class_id: int, *, style: str | None = None, position: str | None = None
    ) -> PictureKey:
        variant = rng.randrange(VARIANTS) + (HELD_OUT_VARIANT if self.is_held_out else 0)
        return PictureKey(class_id, variant, 0, style, position)


def exchanges(kind: str, number: int, *, split: str = "train", seed: int = 0) -> list[Exchange]:
    """Query `number` of a kind: its `CONTEXTS` examples, then itself.

    Raises:
        FlamingoError: where there is no such kind, or the split is neither "train" nor held out.
    """
    if kind not in MAKERS:
        raise FlamingoError(f"kind {kind!r}: expected one of {', '.join(KINDS)}")
    if split not in ("train", *HELD_OUT_SPLITS):
        raise FlamingoError(f"split {split!r}: expected train, {' or '.join(HELD_OUT_SPLITS)}")
    rng = random.Random(f"instructions/{seed}/{split}/{kind}/{number}")
    return MAKERS[kind](rng, _Setting(split))


def _naming(rng: random.Random, setting: _Setting) -> list[Exchange]:
    """Every glyph once among the first examples and again among the next, in an order of its own; then any of them."""
    shown = rng.sample(setting.classes, NAMES)
    names = setting.names(rng, NAMES + DISTRACTORS)
    name_of = dict(zip(shown, names, strict=False))
    candidates = tuple(rng.sample(names, len(names)))
    rounds = [class_id for _ in range(CONTEXTS // NAMES) for class_id in rng.sample(shown, NAMES)]
    return [
        Exchange(setting.question(rng, "name"), name_of[class_id], (setting.picture(rng, class_id),), candidates)
        for class_id in (*rounds, rng.choice(shown))
    ]


def _each(make: Callable[[random.Random, _Setting], Exchange]) -> Callable[[random.Random, _Setting], list[Exchange]]:
    """Examples and query that have nothing to do with one another but their kind."""
    return lambda rng, setting: [make(rng, setting) for _ in range(CONTEXTS + 1)]


def _style(rng: random.Random, setting: _Setting) -> Exchange:
    style = rng.choice(STYLES)
    picture = setting.picture(rng, rng.choice(setting.classes), style=style)
    return Exchange(setting.question(rng, "style"), _concise("style", style), (picture,), STYLES)


def _position(rng: random.Random, setting: _Setting) -> Exchange:
    position = rng.choice(POSITIONS)
    picture = setting.picture(rng, rng.choice(setting.classes), position=position)
    return Exchange(setting.question(rng, "position"), _concise("position", position), (picture,), POSITIONS)


def _same(rng: random.Random, setting: _Setting) -> Exchange:
    one, other = rng.sample(setting.classes, 2)
    answer = rng.choice(("same", "different"))
    first = setting.picture(rng, one)
    second = setting.picture(rng, one if answer == "same" else other)
    while second == first:  # one picture twice would be told by its pixels
        second = setting.picture(rng, one)
    return Exchange(setting.question(rng, "same"), _concise("same", answer), (first, second), ("same", "different"))


def _story(rng: random.Random, setting: _Setting) -> Exchange:
    """Glyphs in different styles. The candidates are told of other orders, and with one style changed."""
    told = rng.sample(STYLES, 3 if setting.is_held_out else rng.choice((2, 3)))
    pictures = tuple(setting.picture(rng, rng.choice(setting.classes), style=style) for style in told)
    orders = [list(order) for order in itertools.permutations(told) if list(order) != told]
    unseen = [style for style in STYLES if style not in told]
    changed = [[*told[:place], rng.choice(unseen), *told[place + 1 :]] for place in range(len(told))]
    chosen = [told, *rng.sample(orders, min(2, len(orders))), *changed]
    candidates = tuple(_tell(styles) for styles in rng.sample(chosen, len(chosen)))
    return Exchange(setting.question(rng, "story"), _tell(told), pictures, candidates)


def _tell(styles: Sequence[str]) -> str:
    return story([f"{style} glyph" for style in styles])


def _sequence(rng: random.Random, setting: _Setting) -> Exchange:
    """A glyph that sets out at one side, grows in the middle, and ends at another side."""
    start, end = rng.sample(POSITIONS, 2)
    class_id = rng.choice(setting.classes)
    frames = tuple(setting.picture(rng, class_id, position=place) for place in (start, None, end))
    candidates = tuple(_concise("sequence", f"from {a} to {b}") for a, b in itertools.permutations(POSITIONS, 2))
    answer = _concise("sequence", f"from {start} to {end}")
    return Exchange(setting.question(rng, "sequence"), answer, frames, candidates)


def _concise(topic: str, answer: str) -> str:
    return ANSWERS[topic][0].format(a=answer)


MAKERS: Mapping[str, Callable[[random.Random, _Setting], list[Exchange]]] = {
    "naming": _naming,
    "style": _each(_style),
    "position": _each(_position),
    "same": _each(_same),
    "story": _each(_story),
    "sequence": _each(_sequence),
}


# ----------------------------------------------------------------------------------------------------------- files


def write_training_instructions(
    folder: str | Path, queries: Mapping[str, int], *, seed: int = 0, processes: int = 1
) -> dict[str, dict[str, int]]:
    """Write the training set: a dataset of each kind, and `mixture.yaml`, which names them.

    Args:
        folder: made where it is not there.
        queries: of each kind, how many queries; each becomes one document.
        processes: that draw; the files do not depend on it.

    Returns:
        Of each kind, the numbers of `queries`, `instructions` (their examples among them) and `pictures`.

    Raises:
        FlamingoError: where a kind is unknown, or a number not positive.
    """
    return _write(Path(folder), queries, "train", seed, processes)


def write_held_out_instructions(
    folder: str | Path, queries: int, *, split: str = "test", seed: int = 0, processes: int = 1
) -> dict[str, dict[str, int]]:
    """Write a held-out set: as the training set, with the examples of every query, `candidates.json` and `kinds.json`.

    Args:
        folder: made where it is not there.
        queries: of each kind.
        split: "test", or "validation" to choose designs on.
        processes: that draw; the files do not depend on it.

    Returns:
        As `write_training_instructions`.

    Raises:
        FlamingoError: where the number is not positive, or the split is not held out.
    """
    if split not in HELD_OUT_SPLITS:
        raise FlamingoError(f"split {split!r}: expected {' or '.join(HELD_OUT_SPLITS)}")
    return _write(Path(folder), dict.fromkeys(KINDS, queries), split, seed, processes)


@dataclass(frozen=True)
class _Content:
    """A dataset of one kind before its pictures are drawn, all by their ids.

    Attributes:
        instructions: every exchange.
        contexts: the queries, and the ids of their examples.
    """

    dataset: Dataset
    instructions: dict[str, Exchange]
    contexts: dict[str, list[str]]

    @property
    def pictures(self) -> dict[str, PictureKey]:
        return {self.picture_id(picture): picture for each in self.instructions.values() for picture in each.pictures}

    def picture_id(self, key: PictureKey) -> str:
        """What it shows is part of its id, so that a picture of several instructions stands in the file once."""
        shown = "_".join(value for value in (key.style, key.position) if value)
        return f"{self.dataset.name}_IMG_{key.class_id:04d}_{key.variant:05d}" + (f"_{shown}" if shown else "")

    def instruction_json(self) -> dict[str, Any]:
        """The content of `{NAME}_instructions.json`."""
        data = {
            key: {
                "instruction": each.question,
                "answer": each.answer,
                "image_ids": [self.picture_id(picture) for picture in each.pictures],
                "rel_ins_ids": self.contexts.get(key, []),
            }
            for key, each in self.instructions.items()
        }
        return {"meta": {"version": "0.0.1", "time": "2026-11", "author": "the embedded world"}, "data": data}


def _content(kind: str, queries: int, split: str, seed: int) -> _Content:
    dataset = DATASETS[kind]
    examples = dataset.taught_with if split == "train" else CONTEXTS
    instructions: dict[str, Exchange] = {}
    contexts: dict[str, list[str]] = {}
    for number in range(queries):
        turns = exchanges(kind, number, split=split, seed=seed)[CONTEXTS - examples :]
        ids = [f"{dataset.name}_INS_{len(instructions) + place:06d}" for place in range(len(turns))]
        instructions.update(zip(ids, turns, strict=True))
        contexts[ids[-1]] = ids[:-1]
    return _Content(dataset, instructions, contexts)


def _write(
    folder: Path, queries: Mapping[str, int], split: str, seed: int, processes: int
) -> dict[str, dict[str, int]]:
    for kind, number in queries.items():
        if number < 1:
            raise FlamingoError(f"queries of {kind}={number}: expected a positive number")
    if processes < 1:
        raise FlamingoError(f"processes={processes}: expected a positive number")
    if unknown := [kind for kind in queries if kind not in DATASETS]:
        raise FlamingoError(f"kind {unknown[0]!r}: expected one of {', '.join(KINDS)}")
    contents = {kind: _content(kind, number, split, seed) for kind, number in queries.items()}
    drawn = _draw({key for content in contents.values() for key in content.pictures.values()}, processes)
    folder.mkdir(parents=True, exist_ok=True)
    mixture: dict[str, dict[str, Any]] = {}
    for content in contents.values():
        name = content.dataset.name
        _write_json(folder / f"{name}_instructions.json", content.instruction_json())
        _write_json(folder / f"{name}_train.json", content.contexts)
        _write_pictures(folder / f"{name}_images.parquet", content.pictures, drawn)
        mixture.setdefault(content.dataset.group, {})[name] = {
            "mimicit_path": f"{name}_instructions.json",
            "images_path": f"{name}_images.parquet",
            "train_config_path": f"{name}_train.json",
        }
    if split in HELD_OUT_SPLITS:
        asked = [(kind, content, query) for kind, content in contents.items() for query in content.contexts]
        _write_json(folder / "candidates.json", {q: list(c.instructions[q].candidates) for _, c, q in asked})
        _write_json(folder / "kinds.json", {query: kind for kind, _, query in asked})
    # Last: a folder with a mixture is whole.
    write_text(folder / "mixture.yaml", yaml.safe_dump(mixture, sort_keys=False))
    return {
        kind: {
            "queries": len(content.contexts),
            "instructions": len(content.instructions),
            "pictures": len(content.pictures),
        }
        for kind, content in contents.items()
    }


def _draw(keys: Iterable[PictureKey], processes: int) -> dict[PictureKey, bytes]:
    """PNG of every key; a class is drawn by one process alone, which makes its distance maps once."""
    shares: list[list[PictureKey]] = [[] for _ in range(processes)]
    # The styles and places are text or None, which do not compare.
    for key in sorted(keys, key=lambda key: (key.class_id, key.variant, str(key.style), str(key.position))):
        shares[key.class_id % processes].append(key)
    with process_map(processes) as in_processes:
        drawn = in_processes(_pngs, shares)
    return {key: png for share, pngs in zip(shares, drawn, strict=True) for key, png in zip(share, pngs, strict=True)}


def _pngs(keys: Sequence[PictureKey]) -> list[bytes]:
    return load_world().pngs(keys)


def _write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def _write_pictures(path: Path, pictures: Mapping[str, PictureKey], drawn: Mapping[PictureKey, bytes]) -> None:
    """The parquet file that pandas would write of a frame with the column `base64` and the ids as its index."""
    import pyarrow as pa
    from pyarrow import parquet

    index = "__index_level_0__"
    text = {"pandas_type": "unicode", "numpy_type": "object", "metadata": None}
    columns = [{"name": "base64", "field_name": "base64", **text}, {"name": None, "field_name": index, **text}]
    names = [{"name": None, "field_name": None, **text, "metadata": {"encoding": "UTF-8"}}]
    told = {"index_columns": [index], "column_indexes": names, "columns": columns, "pandas_version": "2.2.0"}
    table = pa.table(
        {
            "base64": [base64.b64encode(drawn[key]).decode("ascii") for key in pictures.values()],
            index: list(pictures),
        }
    )
    parquet.write_table(table.replace_schema_metadata({"pandas": json.dumps(told)}), path)
