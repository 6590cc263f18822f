"""Data sets to evaluate on, in the files in which they are published: a small reader each, from a local folder.

Reading order: this file, reading.py (what readers share), captions.py, vqa.py, hateful_memes.py, pope.py, scienceqa.py,
nlvr.py, imagenet.py, omniglot.py, fashion.py, vl_icl.py, own.py, embedded.py, checking.py.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import ClassVar, Protocol, cast

from flamingo.document import Medium
from flamingo.errors import FlamingoError


@dataclass(frozen=True)
class Example:
    """One example of a data set: what is shown, what is asked, and what counts as right.

    Attributes:
        id: names it within its split, in results too.
        media: names of its media in reading order, for `DataSet.medium`.
        question: what is asked; empty where the task's template asks.
        answers: reference answers or captions, all of them; the first stands in a demonstration.
        label: its class, which balances demonstrations and is the right one of the candidates.
        candidates: answers to choose among, where each example has its own; else `DataSet.candidates`.
        fields: further texts that a template may name, such as the words written on a meme.
    """

    id: str
    media: tuple[str, ...]
    question: str = ""
    answers: tuple[str, ...] = ()
    label: str | None = None
    candidates: tuple[str, ...] = ()
    fields: Mapping[str, str] = field(default_factory=dict)


class DataSet(Protocol):
    """A published data set in a folder.

    Its examples are texts and names, so that 10⁵ of them fit into memory; media are read when they are needed.
    """

    files: ClassVar[Mapping[str, str]]
    """what it expects below its folder: glob pattern → what it is, for `flamingo-eval tasks`"""
    splits: ClassVar[tuple[str, ...]]

    def __init__(self, folder: Path) -> None:
        """Nothing is read yet."""

    def examples(self, split: str) -> Sequence[Example]:
        """The examples of a split, in the order of the published file.

        Raises:
            FlamingoError: a file is missing or malformed; it names file and entry, and what was expected.
        """

    def candidates(self) -> tuple[str, ...]:
        """The class names to choose among, in the data set's order; () where there are none."""

    def medium(self, name: str) -> Medium:
        """A medium of an example, as the encoded bytes of its file.

        Raises:
            FlamingoError: it is not there; it names the file.
        """


DATASETS: dict[str, tuple[str, str]] = {
    "clevr_counting": ("icl_eval.datasets.vl_icl", "ClevrCounting"),
    "coco": ("icl_eval.datasets.captions", "Coco"),
    "coco_photos": ("icl_eval.datasets.captions", "CocoPhotos"),
    "digits": ("icl_eval.datasets.embedded", "Digits"),
    "fashion": ("icl_eval.datasets.fashion", "FashionSprite"),
    "flickr30k": ("icl_eval.datasets.captions", "Flickr30k"),
    "glyphs": ("icl_eval.datasets.embedded", "Glyphs"),
    "hateful_memes": ("icl_eval.datasets.hateful_memes", "HatefulMemes"),
    "imagenet": ("icl_eval.datasets.imagenet", "ImageNet"),
    "nlvr": ("icl_eval.datasets.nlvr", "Nlvr"),
    "okvqa": ("icl_eval.datasets.vqa", "OkVqa"),
    "omniglot": ("icl_eval.datasets.omniglot", "Omniglot"),
    "open_miniimagenet": ("icl_eval.datasets.vl_icl", "OpenMiniImageNet"),
    "operator_induction": ("icl_eval.datasets.vl_icl", "OperatorInduction"),
    "operator_induction_interleaved": ("icl_eval.datasets.vl_icl", "OperatorInductionInterleaved"),
    "pope": ("icl_eval.datasets.pope", "Pope"),
    "scienceqa": ("icl_eval.datasets.scienceqa", "ScienceQa"),
    "textocr": ("icl_eval.datasets.vl_icl", "TextOcr"),
    "textvqa": ("icl_eval.datasets.vqa", "TextVqa"),
    "vizwiz": ("icl_eval.datasets.vqa", "VizWiz"),
    "vqav2": ("icl_eval.datasets.vqa", "VqaV2"),
}
"""Module and class of each data set, by the name that tasks give, which is also its folder's."""

OWN = ("icl_eval.datasets.own", "Own")
"""Module and class of questions of one's own, in a folder of any name."""

OTHER_FOLDERS = {
    "clevr_counting": ("clevr",),
    "fashion": ("fashion_sprite",),
    "nlvr": ("nlvr_dev",),
    "omniglot": ("omniglot_background",),
    "open_miniimagenet": ("open_mi",),
    "scienceqa": ("ScienceQA",),
    "textvqa": ("textvqa_val",),
}
"""Further names of folders, under which data sets are published or were cut for tests."""


def folder_of(name: str, root: Path) -> Path:
    """A data set's folder below `root`: the first that is there of its name and `OTHER_FOLDERS`, else of its name."""
    folders = [Path(root) / folder for folder in (name, *OTHER_FOLDERS.get(name, ()))]
    return next((folder for folder in folders if folder.is_dir()), folders[0])


def load_dataset(name: str, root: Path) -> DataSet:
    """A data set in its folder below `root`, of which nothing is read yet.

    Args:
        name: one of `DATASETS`, or a folder below `root` (or any folder's path) of questions of one's own
            (`icl_eval.datasets.own`).
        root: the folder in which the folders of data sets are.

    Raises:
        FlamingoError: it is neither.
    """
    folder = folder_of(name, root)
    if name not in DATASETS and not any(folder.glob("*.jsonl")):
        close = difflib.get_close_matches(name, DATASETS, n=1)
        meant = f" (did you mean {close[0]!r}?)" if close else ""
        known = ", ".join(DATASETS)
        raise FlamingoError(
            f"data set {name!r}{meant}: expected one of {known}, or {folder} with .jsonl files of your own"
        )
    module, kind = DATASETS.get(name, OWN)
    return cast(DataSet, getattr(import_module(module), kind)(folder))
