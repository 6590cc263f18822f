"""The embedded data sets: their ids, order and pictures enter every draw and score of the embedded tasks."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from flamingo.document import Image
from flamingo.errors import FlamingoError
from icl_eval.datasets import load_dataset


@pytest.mark.parametrize(
    "name, split, count, digest",
    [
        ("glyphs", "known", 1200, "5872c925641376c0"),
        ("glyphs", "test", 3200, "c75d86a212d837f7"),
        ("glyphs", "scripts", 2352, "961af0971967e159"),
        ("digits", "test", 1347, "82323cfb27b1dbb8"),
    ],
)
def test_ids_order_and_pictures_are_those_of_the_first_release(name: str, split: str, count: int, digest: str) -> None:
    """A change of ids, order or pixels, after which scores cannot be compared with earlier ones."""
    dataset = load_dataset(name, Path("no folder"))
    examples = dataset.examples(split)
    hashed = hashlib.sha256()
    for example in examples:
        hashed.update(example.id.encode())
    for example in examples[::37]:
        medium = dataset.medium(example.media[0])
        assert isinstance(medium, Image) and medium.name == example.media[0]
        hashed.update(medium.data)
    assert (len(examples), hashed.hexdigest()[:16]) == (count, digest)


def test_only_known_glyphs_have_names() -> None:
    """Classes without a name that are asked for by their number, or names of other classes."""
    from data_shards.glyphs.words import fixed_names

    dataset = load_dataset("glyphs", Path("no folder"))
    names = fixed_names()
    known = dataset.examples("known")
    assert {(example.id.split("/")[1], example.label) for example in known} == {(str(k), v) for k, v in names.items()}
    assert all(example.answers == (example.label,) for example in known)
    other = dataset.examples("validation")
    assert all(example.label == example.id.split("/")[1] and not example.answers for example in other)


def test_the_digits_of_the_two_splits_are_all_of_them() -> None:
    """A digit in both splits, or in none."""
    dataset = load_dataset("digits", Path("no folder"))
    ids = [example.id for split in ("test", "validation") for example in dataset.examples(split)]
    assert sorted(ids) == sorted(f"digits/{number}" for number in range(1797))
    assert {example.label for example in dataset.examples("validation")} == set(dataset.candidates())


@pytest.mark.parametrize("name, picture", [("glyphs", "a.png"), ("glyphs", "1.png"), ("digits", "digit-1797.png")])
def test_other_pictures_are_refused(name: str, picture: str) -> None:
    """A misspelled picture that raises a bare ValueError or IndexError."""
    with pytest.raises(FlamingoError, match=f"{name}: picture '{picture}'"):
        load_dataset(name, Path("no folder")).medium(picture)
