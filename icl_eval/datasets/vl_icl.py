"""VL-ICL Bench (Zong et al. 2024, arXiv 2403.13164): tasks whose rule only the demonstrations tell.

Each is a folder with `query.json` and `support.json`, lists of `image` (paths from the folder above), `question` and
`answer`. Where a query can use only some of the support, both have a field in common, for the key `within` of a task:
open_miniimagenet `episode`, operator induction `operator`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from icl_eval.datasets import Example
from icl_eval.datasets.reading import Entry, LocalDataSet, json_entries

OPERATORS = ("+", "-", "x")


class VlIcl(LocalDataSet):
    """A task of VL-ICL Bench whose examples are what its files say."""

    published: ClassVar[str]
    """the folder's name in the release, with which the paths of its images begin"""
    splits = ("support", "query")
    files: ClassVar = {
        "query.json": "queries",
        "support.json": "demonstrations",
        "**/*.jpg": "images of both, unpacked by the release's unzip.sh; .png likewise",
    }

    def read(self, split: str) -> Iterator[Example]:
        """An example for each entry; entries without an id are numbered from 0."""
        for number, entry in enumerate(json_entries(self.folder / f"{split}.json")):
            yield from self.entry_examples(entry, split, entry.name("id", str(number)))

    def entry_examples(self, entry: Entry, split: str, identifier: str) -> Iterator[Example]:
        """The examples that an entry makes."""
        yield self.example(entry, identifier, entry.name("answer"))

    def example(self, entry: Entry, identifier: str, answer: str, **fields: str) -> Example:
        """The example of an entry and an answer."""
        return Example(
            identifier, self.pictures(entry.texts("image")), entry.text("question"), (answer,), answer, fields=fields
        )

    def pictures(self, paths: tuple[str, ...]) -> tuple[str, ...]:
        """Images by their paths from the data set's own folder."""
        return tuple(path.removeprefix("./").removeprefix(f"{self.published}/") for path in paths)


class ClevrCounting(VlIcl):
    """CLEVR count induction: a question like "shape: large" is answered by how many objects are."""

    published = "clevr"


class TextOcr(VlIcl):
    """TextOCR: which text does the red box hold?"""

    published = "textocr"


class OperatorInduction(VlIcl):
    """Two numbers and an operator that is not told: plus, minus or times.

    An entry of the support has its answer under each; it makes an example for each, `{id}/{operator}`.
    """

    published = "operator_induction"

    def entry_examples(self, entry: Entry, split: str, identifier: str) -> Iterator[Example]:
        """A query's one example, or three of the support's."""
        if split == "query":
            operator = entry.text("operator")
            if operator not in OPERATORS:
                raise entry.error("operator", f"one of {', '.join(OPERATORS)}")
            yield self.example(entry, identifier, entry.name("answer"), operator=operator)
            return
        answers = entry.texts("answer")
        if len(answers) != len(OPERATORS):
            raise entry.error("answer", f"one under each of {', '.join(OPERATORS)}")
        for operator, answer in zip(OPERATORS, answers, strict=True):
            yield self.example(entry, f"{identifier}/{operator}", answer, operator=operator)


class OperatorInductionInterleaved(OperatorInduction):
    """The same, each number an image of its own."""

    published = "operator_induction_interleaved"


class OpenMiniImageNet(VlIcl):
    """Fast open-ended MiniImageNet (Tsimpoukelli et al. 2021, arXiv 2106.13884): invented names for five classes.

    All is in `query.json`: a query's `classes`, and under `support` the five `images` of each. So split "support" has
    them all, five a class and query, `{query id}/{class}/{number}`; a query's own have its id as `episode`.
    """

    published = "open_mi"
    files: ClassVar = {
        "query.json": "queries, the names and the images of their classes",
        "query/*": "images of the queries",
        "support/*": "images of the classes",
    }

    def read(self, split: str) -> Iterator[Example]:
        """An example for each query, or for each image that shows one of its classes."""
        for number, entry in enumerate(json_entries(self.folder / "query.json")):
            episode = entry.name("id", str(number))
            classes = entry.texts("classes")
            answer = entry.text("answer")
            if answer not in classes:
                raise entry.error("answer", "one of its classes")
            if split == "query":
                pictures, question = self.pictures(entry.texts("image")), entry.text("question")
                yield Example(episode, pictures, question, (answer,), answer, classes, {"episode": episode})
                continue
            for name in classes:
                images = self.pictures(entry.mapping("support").mapping(name).texts("images"))
                for place, image in enumerate(images):
                    yield Example(
                        f"{episode}/{name}/{place}",
                        (image,),
                        entry.text("question"),
                        (name,),
                        name,
                        classes,
                        {"episode": episode},
                    )
