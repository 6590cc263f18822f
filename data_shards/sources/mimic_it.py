"""MIMIC-IT (Li et al. 2023, arXiv 2306.05425; github.com/Luodian/Otter) and whatever has its layout → documents.

A dataset is a file of instructions, one of images, and perhaps one that says which instructions serve as examples of
which; a mixture is a YAML file of datasets. How an instruction, its examples and their images become one document
differs by dataset: `SUBSETS` is the table, and no other place knows of it.

`task_description` of a mixture is a list of texts of which one, drawn by the query's id, is put before the first
instruction, on a line of its own. Otter puts it before everything, which Flamingo's form of a document would close as
a chunk by itself, out of sight of any image.
"""

from __future__ import annotations

import heapq
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml

from data_shards.account import Account
from data_shards.faults import (
    BAD_BASE64,
    BAD_RECORD,
    DANGLING_IMAGE,
    DANGLING_INSTRUCTION,
    DUPLICATE_ID,
    EMPTY_ANSWER,
    LEFT_OUT,
    MISSING_IMAGE,
    NO_IMAGES,
    OF_TURN,
    OWN_CONTEXT,
    UNPICKED,
    SampleError,
)
from data_shards.sources import Record
from data_shards.sources.reading import Images, image_file, parse_object, plain, read_record
from data_shards.sources.store import Store, image_rows, instruction_rows, mapping_rows, store_of
from flamingo.document import Document, Image, Medium, Video
from flamingo.errors import FlamingoError
from flamingo.instructions import Turn, instruction_document
from flamingo.video import evenly

MIXTURES = (".yaml", ".yml")
"""endings of files that name several datasets"""


@dataclass(frozen=True)
class Assembly:
    """How an instruction, its contexts and their images become one document."""

    shown: Literal["every", "query", "none"]
    """whose images: those of every example before it, those of the query alone before all, or none"""
    video: bool = False
    """the images of an example are the frames of one medium, not media of their own"""
    frames: int | None = None
    """of a video, at most so many, picked evenly; None: all"""
    exactly: int | None = None
    """so many images must be there; None: at least one"""
    contexts: bool = True
    """whether examples stand before the query"""


_IN_CONTEXT, _CONVERSATION, _VIDEO = Assembly("every"), Assembly("query"), Assembly("query", video=True, frames=32)
_PAIR = Assembly("query", video=True, exactly=2, contexts=False)

SUBSETS: Mapping[str, Assembly] = {
    "LA_": _IN_CONTEXT,
    "LACR": _IN_CONTEXT,
    "LADD": _IN_CONTEXT,
    "LACONV": _CONVERSATION,
    "LLAVAR": _CONVERSATION,
    "DC": _VIDEO,
    "TVC": _VIDEO,
    "FUNQA": _VIDEO,
    "E4D": replace(_VIDEO, frames=16),
    "SD": _PAIR,
    "CGD": _PAIR,
    "SN": replace(_VIDEO, frames=None),
    "VST": _IN_CONTEXT,
    "TEXT": Assembly("none"),
}
"""beginning of a dataset's name, in upper case → its assembly. LA: several pictures of one kind; LACONV: rounds about
one picture; DC, TVC, FunQA, E4D: videos; SD, CGD: two pictures compared; SN: a walk through rooms; VST: stories, each
of several pictures"""
TEXT_ONLY = "TEXT"
GROUPS = ("IMAGE_TEXT", "TEXT_ONLY", "VIDEO_TEXT", "IMAGE_TEXT_IN_CONTEXT")
"""of a mixture; of the datasets of TEXT_ONLY it says the subset, of the others their names do"""
_KEYS = ("mimicit_path", "images_path", "train_config_path", "num_samples", "task_description", "subset")


def subset_of(name: str) -> str:
    """The subset that a dataset's name begins with, the longest one; upper and lower case are the same.

    Raises:
        FlamingoError: where it begins with none.
    """
    known = [subset for subset in SUBSETS if name.upper().startswith(subset)]
    if not known:
        raise FlamingoError(
            f"{name}: expected a name that begins with a known subset, or the option subset, of {', '.join(SUBSETS)}"
        )
    return max(known, key=len)


@dataclass(frozen=True)
class _AgainImage:
    """An image that stands in its file once more."""


@dataclass(frozen=True)
class MimicItReader:
    """Instructions with images in MIMIC-IT's files."""

    input: str
    """a dataset's XX_instructions.json, or a mixture of several (.yaml), each of which becomes a folder of shards"""
    images: str = ""
    """of one dataset: .parquet (ids as index, column base64) or .json ({id: base64})"""
    train: str = ""
    """of one dataset: XX_train.json, {query id: [context id, …]}; empty: every instruction is a query, and its
    rel_ins_ids are its contexts"""
    subset: str = ""
    """of one dataset: which assembly it has; empty: the one that its name begins with"""
    name: str = ""
    """of one dataset: its name in documents, by which losses are reported; empty: what stands before _instructions"""
    num_samples: int = 0
    """of one dataset: queries that are used, drawn by their ids; 0 or -1: all"""
    task_description: tuple[str, ...] = ()
    """of one dataset: texts of which one is put before the first instruction"""
    seed: int = 0
    """another one draws other queries and task descriptions"""
    max_contexts: int | None = None
    """examples before a query: the first so many of those that are named; default: all"""
    resample_frames: int | None = None
    """frames picked evenly from a video that has more; default: 32, for E4D 16, for SN all"""
    spaced: bool = False
    """a space after `User:` and before the answer, as models released through July 2023 were tuned"""
    cache: str = field(default="", compare=False)
    """folder for the index of instructions and images, about as large as the images; empty: in the folder of the
    shards until they are finished"""

    long_turns: ClassVar[Literal["contexts"]] = "contexts"

    def __post_init__(self) -> None:
        for option, least in (("num_samples", -1), ("max_contexts", 0), ("resample_frames", 1)):
            number = getattr(self, option)
            if number is not None and number < least:
                raise FlamingoError(f"{option}={number}: expected at least {least}")
        if self.is_mixture:
            self._check_mixture()
            return
        if not self.name:
            object.__setattr__(self, "name", Path(self.input).stem.removesuffix("_instructions"))
        object.__setattr__(self, "subset", subset_of(self.subset or self.name))
        if self.assembly.shown != "none" and not self.images:
            raise FlamingoError(f"{self.name}: expected images, which {self.subset} shows (option images, in a mixture "
                                "images_path)")  # fmt: skip

    # -- mixtures ------------------------------------------------------------------------------------------------------

    @property
    def is_mixture(self) -> bool:
        """Whether the input names several datasets."""
        return self.input.lower().endswith(MIXTURES)

    def datasets(self) -> list[MimicItReader]:
        """The readers of a mixture's datasets, in its order and with the options of this one; else this one.

        Raises:
            FlamingoError: where the mixture cannot be read, or says something that is not understood; it names the
                file, the dataset and the key.
        """
        if not self.is_mixture:
            return [self]
        groups = _read_mixture(self.input)
        found = [self._dataset(group, name, content) for group, each in groups for name, content in each.items()]
        names = [each.name for each in found]
        again = {name for name in names if names.count(name) > 1}
        if again or not found:
            raise FlamingoError(f"{self.input}: expected datasets, each of a name of its own, found {names}")
        return found

    def _check_mixture(self) -> None:
        told = ("images", "train", "subset", "name", "num_samples", "task_description")
        if given := [option for option in told if getattr(self, option)]:
            raise FlamingoError(f"{', '.join(given)}: expected in {self.input}, for each dataset")

    def _dataset(self, group: str, name: str, content: Any) -> MimicItReader:
        place = f"{self.input}: {group}.{name}"
        if not re.fullmatch(r"[\w][\w.-]*", name):
            raise FlamingoError(f"{place}: expected a name that a folder can have")
        if not isinstance(content, dict) or not isinstance(content.get("mimicit_path"), str):
            raise FlamingoError(f"{place}: expected keys of a dataset, mimicit_path among them")
        if unknown := [str(key) for key in content if key not in _KEYS]:
            raise FlamingoError(f"{place}: {', '.join(unknown)}: expected keys {', '.join(_KEYS)}")
        number, described = content.get("num_samples") or 0, content.get("task_description") or []
        described = [described] if isinstance(described, str) else described
        if not isinstance(number, int) or not isinstance(described, list) or not all(map(_is_text, described)):
            raise FlamingoError(f"{place}: expected num_samples to be a number, task_description a list of texts")
        try:
            return replace(
                self,
                input=self._path(place, content, "mimicit_path"),
                images=self._path(place, content, "images_path"),
                train=self._path(place, content, "train_config_path"),
                subset=str(content.get("subset") or (TEXT_ONLY if group == "TEXT_ONLY" else "")),
                name=name,
                num_samples=number,
                task_description=tuple(described),
            )
        except FlamingoError as error:
            raise FlamingoError(f"{place}: {error}") from error

    def _path(self, place: str, content: dict[str, Any], key: str) -> str:
        """A path of the mixture, which is relative to its file; "" where there is none."""
        value = content.get(key) or ""
        if not isinstance(value, str):
            raise FlamingoError(f"{place}: {key}: expected a path")
        return str(Path(self.input).parent / value) if value else ""

    # -- one dataset ---------------------------------------------------------------------------------------------------

    @property
    def assembly(self) -> Assembly:
        """How its documents are put together."""
        found = SUBSETS[self.subset]
        if found.frames is None or self.resample_frames is None:
            return found
        return replace(found, frames=self.resample_frames)

    def parts(self) -> Sequence[str]:
        """The file of instructions.

        Raises:
            FlamingoError: where the input is a mixture.
        """
        if self.is_mixture:
            raise FlamingoError(f"{self.input}: a mixture, of which every dataset is read alone: see `datasets`")
        return [self.input]

    def prepare(self) -> None:
        """Index instructions and images on disk, where that is not done."""
        _ = self._instructions, self._contexts, self._pictures

    def records(self, part: str) -> Iterator[Record]:
        """A record for each query that is used, for each id that stands twice, and for each such image."""
        queries = self._contexts or self._instructions
        limit = self._limit(queries)
        for query in queries.ids():
            if limit is None or _draw(self.seed, query) <= limit:
                yield Record(f"{part}: {query}", query)
        for store, file in ((self._instructions, part), (self._contexts, self.train)):
            for again in store.again() if store else ():
                yield Record(f"{file}: {again}", SampleError(DUPLICATE_ID, "expected each id once; the first counts"))
        for again in self._pictures.again() if self._pictures else ():
            yield Record(f"{self.images}: {again}", _AgainImage())

    def documents(self, record: Record, account: Account) -> list[Document]:
        """The document of one query; none where it is dropped."""
        if isinstance(record.content, _AgainImage):
            account.drop_image(f"{record.place}: expected each id once; the first counts", DUPLICATE_ID)
            return []
        return read_record(record, account, lambda query, images: [self._document(query, images)])

    def turn(self, key: str) -> Turn:
        """One instruction with its own images, as its subset shows the query's.

        Raises:
            SampleError: where it cannot be used, or any image that it names cannot: unlike in a document a video is
                not shown without the frames that are missing.
        """
        images = Images()
        turn = self._example(key, images, shown=self.assembly.shown != "none")
        for detail, reason in images.lost:
            if reason not in LEFT_OUT:
                raise SampleError(reason, f"{key}: {detail}")
        return turn

    def _document(self, query: str, images: Images) -> Document:
        images.turns = 1
        turns = self._turns(query, images)
        if self.task_description:
            described = self.task_description[_draw(self.seed, f"task:{query}") % len(self.task_description)]
            turns = (replace(turns[0], question=f"{described.strip()}\n{turns[0].question}"), *turns[1:])
        return instruction_document(
            turns,
            spaced=self.spaced,
            source=self.name,
            metadata={"subset": self.subset, "ids": [turn.key for turn in turns]},
        )

    def _turns(self, query: str, images: Images) -> tuple[Turn, ...]:
        shown = self.assembly.shown
        last = self._example(query, images, shown=shown != "none")
        if not self.assembly.contexts:
            return (last,)
        contexts = list(self._usable_contexts(query, images))
        if contexts and shown == "query":
            contexts[0], last = replace(contexts[0], media=last.media), replace(last, media=())
        return (*contexts, last)

    def _usable_contexts(self, query: str, images: Images) -> Iterator[Turn]:
        for key in self._context_ids(query)[: self.max_contexts]:
            images.turns += 1
            named, lost = images.named, len(images.lost)
            try:
                if key == query:
                    raise SampleError(OWN_CONTEXT, "expected another instruction")
                yield self._example(key, images, shown=self.assembly.shown == "every")
            except SampleError as error:
                images.leave_out(error.reason, f"context {key}: {error.detail}")
                for _ in range(images.named - named - (len(images.lost) - lost)):
                    images.lose(OF_TURN, f"context {key}")

    def _context_ids(self, query: str) -> list[str]:
        if self._contexts is None:
            return _ids(self._entry(query).get("rel_ins_ids"), "rel_ins_ids")
        found = self._contexts.get(query)
        return _ids(None if found is None else json.loads(found), f"contexts in {self.train}")

    def _example(self, key: str, images: Images, *, shown: bool) -> Turn:
        """One instruction.

        Raises:
            SampleError: where it is not there, lacks a text, or cannot be shown what it is about.
        """
        entry = self._entry(key)
        question, answer = entry.get("instruction"), entry.get("answer")
        if not _is_text(question):
            raise SampleError(BAD_RECORD, f"expected a text as instruction, found {question!r:.40}")
        if not _is_text(answer):
            raise SampleError(EMPTY_ANSWER, f"expected a text as answer, found {answer!r:.40}")
        media = self._media(_ids(entry.get("image_ids"), "image_ids"), images) if shown else ()
        return Turn(plain(question).strip(), plain(answer).strip(), media, key)

    def _entry(self, key: str) -> dict[str, Any]:
        found = self._instructions.get(key)
        if found is None:
            raise SampleError(DANGLING_INSTRUCTION, f"expected an id of {self.input}")
        return parse_object(found.encode() if isinstance(found, str) else found)

    def _media(self, ids: list[str], images: Images) -> tuple[Medium, ...]:
        """The images of one example as its subset shows them; each that is named is entered."""
        assembly = self.assembly
        images.named += len(ids)
        if not ids:
            raise SampleError(MISSING_IMAGE, "expected image_ids")
        found = [image for key in self._picked(ids, images) if (image := self._image(key, images))]
        if not found or (not assembly.video and len(found) < len(ids)):
            raise SampleError(NO_IMAGES, f"expected its images {', '.join(ids):.80}")
        if assembly.exactly not in (None, len(found)):
            raise SampleError(NO_IMAGES, f"expected {assembly.exactly} images, found {len(found)} of {len(ids)}")
        return (Video(tuple(found)),) if assembly.video else tuple(found)

    def _picked(self, ids: list[str], images: Images) -> list[str]:
        """The ids that are there; of a video with more than enough, some of them."""
        assert self._pictures is not None
        there = []
        for key in ids:
            if key in self._pictures:
                there.append(key)
            else:
                images.lose(DANGLING_IMAGE, f"image {key}: expected an id of {self.images}")
        places = evenly(len(there), self.assembly.frames)
        for place in sorted(set(range(len(there))) - set(places)):
            images.lose(UNPICKED, f"image {there[place]}")
        return [there[place] for place in places]

    def _image(self, key: str, images: Images) -> Image | None:
        assert self._pictures is not None
        found = self._pictures.get(key)
        try:
            if not isinstance(found, bytes):
                raise SampleError(BAD_BASE64, f"expected base64 in {self.images} ({found})")
            return image_file(found, key)
        except SampleError as error:
            images.lose(error.reason, f"image {key}: {error.detail}")
            return None

    def _limit(self, queries: Store) -> int | None:
        """The largest draw of a query that is used; None: all are."""
        if self.num_samples < 1:
            return None
        draws = (_draw(self.seed, query) for query in queries.ids())
        return max(heapq.nsmallest(self.num_samples, draws), default=None)

    @cached_property
    def _instructions(self) -> Store:
        return store_of(self.input, instruction_rows, self._folder)

    @cached_property
    def _contexts(self) -> Store | None:
        return store_of(self.train, mapping_rows, self._folder) if self.train else None

    @cached_property
    def _pictures(self) -> Store | None:
        return store_of(self.images, image_rows, self._folder) if self.assembly.shown != "none" else None

    @property
    def _folder(self) -> str:
        return self.cache or str(Path(self.input).parent / ".index")


def _draw(seed: int, key: str) -> int:
    """A number below 2⁶⁴ of a seed and an id alone."""
    return int.from_bytes(blake2b(f"{seed}:{key}".encode("utf-8", "surrogatepass"), digest_size=8).digest())


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _ids(value: Any, what: str) -> list[str]:
    """A list of ids; null and absent are none, a bare id is one.

    Raises:
        SampleError: where it is something else.
    """
    values = [] if value in (None, "") else value if isinstance(value, list) else [value]
    if not all(isinstance(each, (str, int)) for each in values):
        raise SampleError(BAD_RECORD, f"{what}: expected a list of ids, found {value!r:.60}")
    return [str(each) for each in values]


def _read_mixture(path: str) -> list[tuple[str, dict[str, Any]]]:
    """The groups of a mixture, each with its datasets by name.

    Raises:
        FlamingoError: where it has another form.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise FlamingoError(f"{path}: expected a mixture in YAML ({error})") from error
    if not isinstance(content, dict) or not set(content) <= set(GROUPS):
        raise FlamingoError(f"{path}: expected groups {', '.join(GROUPS)}, found {content!r:.80}")
    groups = [(group, each or {}) for group, each in content.items()]
    for group, each in groups:
        if not isinstance(each, dict):
            raise FlamingoError(f"{path}: {group}: expected datasets by their names")
    return [(group, {str(name): value for name, value in each.items()}) for group, each in groups]
