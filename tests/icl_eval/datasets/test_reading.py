"""Entries that say where they stand, trees of media, and the registry."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

import pytest

from flamingo.document import Image
from flamingo.errors import FlamingoError
from icl_eval.datasets import DATASETS, folder_of, load_dataset
from icl_eval.datasets.checking import problems
from icl_eval.datasets.own import Own
from icl_eval.datasets.reading import Entry, LocalDataSet, json_entries, json_lines, open_tree
from tests.icl_eval.datasets.published import picture, write_json, write_lines


@pytest.mark.parametrize("name", DATASETS)
def test_every_data_set_has_the_protocol(name: str, tmp_path: Path) -> None:
    """A name in the registry whose module, class or texts for the listing are not there."""
    dataset = load_dataset(name, tmp_path)
    assert isinstance(dataset, LocalDataSet)
    assert dataset.splits and len(set(dataset.splits)) == len(dataset.splits)
    assert dataset.files or name in ("digits", "glyphs")
    assert all(isinstance(text, str) and text for entry in dataset.files.items() for text in entry)


@pytest.mark.parametrize("name", [name for name in DATASETS if name not in ("digits", "glyphs")])
def test_missing_files_are_named(name: str, tmp_path: Path) -> None:
    """A folder without the files: an error of the operating system, or one that does not name what is missing."""
    (tmp_path / name).mkdir()
    dataset = load_dataset(name, tmp_path)
    for split in dataset.splits:
        with pytest.raises(FlamingoError, match=rf"{name}/\S+: .*(no such file|expected)"):
            dataset.examples(split)


def test_an_unknown_split_is_refused(tmp_path: Path) -> None:
    """A misspelled split that reads as an empty one."""
    with pytest.raises(FlamingoError, match="split 'testing', Coco has train, restval, val, test"):
        load_dataset("coco", tmp_path).examples("testing")


def test_an_unknown_data_set_is_refused(tmp_path: Path) -> None:
    """A misspelled data set, taken for a folder of one's own questions."""
    with pytest.raises(FlamingoError, match=r"did you mean 'textvqa'.*textvqa2 with \.jsonl files"):
        load_dataset("textvqa2", tmp_path)


def test_a_folder_of_ones_own_is_a_data_set(tmp_path: Path) -> None:
    """Own questions that must be registered in code, or are found only below the root."""
    write_lines(tmp_path / "mine" / "test.jsonl", [{"question": "?", "answer": "!"}])
    assert isinstance(load_dataset("mine", tmp_path), Own)
    assert isinstance(load_dataset(str(tmp_path / "mine"), Path("/nowhere")), Own)


def test_published_names_of_folders_are_found(tmp_path: Path) -> None:
    """A folder under its published name that is not found, or one that is preferred to the data set's own name."""
    assert folder_of("open_miniimagenet", tmp_path) == tmp_path / "open_miniimagenet"
    (tmp_path / "open_mi").mkdir()
    assert folder_of("open_miniimagenet", tmp_path) == tmp_path / "open_mi"
    (tmp_path / "open_miniimagenet").mkdir()
    assert folder_of("open_miniimagenet", tmp_path) == tmp_path / "open_miniimagenet"


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"images": [{"a": 1}, 5]}', r"images\[1\]: 5, expected an object"),
        ('{"images": []}', "nothing in the list 'images'"),
        ('{"pictures": [{}]}', "nothing in the list 'images'"),
        ('{"images": [{"a": 1}, {"a"', "expected a JSON file"),
        ("", "expected a JSON file"),
    ],
)
def test_json_entries_name_the_place(content: str, message: str, tmp_path: Path) -> None:
    """A file that breaks off, or holds something else, that reads as a shorter one."""
    path = tmp_path / "file.json"
    path.write_text(content)
    with pytest.raises(FlamingoError, match=rf"file\.json.*{message}"):
        list(json_entries(path, "images"))


def test_json_lines_name_the_line(tmp_path: Path) -> None:
    """An error without its line, or lines counted without the blank ones."""
    path = tmp_path / "file.jsonl"
    path.write_text('\ufeff{"a": 1}\n\n{"a": 2}\n{"a":\n')
    lines = json_lines(path)
    assert [next(lines).place, next(lines).place] == [f"{path}:1", f"{path}:3"]
    with pytest.raises(FlamingoError, match=r"file\.jsonl:4: expected a JSON object a line"):
        next(lines)
    path.write_text("[1]\n")
    with pytest.raises(FlamingoError, match=r"file\.jsonl:1: \[1\], expected an object"):
        list(json_lines(path))


@pytest.mark.parametrize(
    "read, value, expected",
    [
        ("text", 3, "a text"),
        ("name", 1.5, "a text"),
        ("name", True, "a text"),
        ("number", "3", "an integer"),
        ("number", True, "an integer"),
        ("texts", [["a"]], "a text or a list of texts"),
        ("texts", None, "a text or a list of texts"),
        ("mapping", [], "an object"),
        ("entries", [1], "a list of objects"),
        ("entries", {}, "a list of objects"),
    ],
)
def test_values_of_another_kind_are_refused(read: str, value: object, expected: str) -> None:
    """A value of another kind that is turned into a text, or that raises a bare TypeError later on."""
    with pytest.raises(FlamingoError, match=rf"FILE: list\[3\]: key: .*expected {expected}"):
        getattr(Entry("FILE: list[3]", {"key": value}), read)("key")
    with pytest.raises(FlamingoError, match=r"FILE: list\[3\]: key: no such key"):
        getattr(Entry("FILE: list[3]", {}), read)("key")


def test_an_id_is_given_once(tmp_path: Path) -> None:
    """Two examples of one id, whose draws of demonstrations would be the same."""
    write_lines(tmp_path / "mine" / "test.jsonl", [{"id": 7, "answer": "a"}, {"id": "7", "answer": "b"}])
    with pytest.raises(FlamingoError, match=r"mine: split 'test' has two examples '7'"):
        load_dataset("mine", tmp_path).examples("test")


def test_media_do_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    """A downloaded list that makes the evaluation read any file of the machine."""
    picture(tmp_path / "secret.png")
    write_lines(tmp_path / "mine" / "test.jsonl", [{"image": "a.png", "answer": "a"}])
    for name in ("../secret.png", str(tmp_path / "secret.png")):
        with pytest.raises(FlamingoError, match="expected a path below this folder"):
            load_dataset("mine", tmp_path).medium(name)


def test_trees_are_alike(tmp_path: Path) -> None:
    """A folder, zip or tar that has other names, another order, or other bytes; hidden files taken for images."""
    contents = {name: picture(tmp_path / "tree" / name, level) for level, name in enumerate(("b/2.png", "a/10.PNG"))}
    for other in ("b/.hidden.png", "b/notes.txt"):
        (tmp_path / "tree" / other).write_text("no image")
    with tarfile.open(tmp_path / "tree.tar", "w") as tar, zipfile.ZipFile(tmp_path / "tree.zip", "w") as archive:
        for path in (tmp_path / "tree").rglob("*.*"):
            tar.add(path, f"./{path.relative_to(tmp_path / 'tree')}")
            archive.write(path, path.relative_to(tmp_path / "tree"))
    for name in ("tree", "tree.tar", "tree.zip"):
        tree = open_tree(tmp_path / name)
        assert tree.names() == ["a/10.PNG", "b/2.png"]
        assert {name: tree.read(name) for name in tree.names()} == contents
        with pytest.raises(FlamingoError, match=rf"{name}/b/3\.png"):
            tree.read("b/3.png")


@pytest.mark.parametrize("name", ["tree.tar", "tree.zip"])
def test_broken_archives_are_named(name: str, tmp_path: Path) -> None:
    """An archive that is none, and an error that does not name it."""
    (tmp_path / name).write_bytes(b"no archive" * 100)
    with pytest.raises(FlamingoError, match=rf"{name}: expected a"):
        open_tree(tmp_path / name).names()


def test_problems_of_a_folder(tmp_path: Path) -> None:
    """A check that passes where files are missing, broken, or no images."""
    (said,) = problems("pope", tmp_path)
    assert said.startswith(f"{tmp_path}/pope: no such folder, expected coco_pope_*.json (questions: ")
    assert "; val2014/COCO_val2014_*.jpg (images; " in said
    row = {"question_id": 1, "image": "COCO_val2014_000000000001.jpg", "text": "?", "label": "no"}
    write_lines(tmp_path / "pope" / "coco_pope_random.json", [row])
    missing = problems("pope", tmp_path, ["random"])
    assert len(missing) == 1 and "val2014/COCO_val2014_000000000001.jpg" in missing[0]
    assert "no such file, expected an image" in missing[0]
    image = tmp_path / "coco" / "val2014" / "COCO_val2014_000000000001.jpg"
    picture(image)
    assert problems("pope", tmp_path, ["random"]) == []
    assert len(problems("pope", tmp_path)) == 2, "the two splits that are not there"
    image.write_text("<html>")
    assert problems("pope", tmp_path, ["random"]) == [
        "val2014/COCO_val2014_000000000001.jpg of split 'random': 6 bytes, expected an image file"
    ]


def test_problems_reads_media_of_the_whole_split(tmp_path: Path) -> None:
    """A check of the first media only, or of more than it was told."""
    rows = [{"image": f"{number}.png", "answer": "a"} for number in range(100)]
    write_lines(tmp_path / "mine" / "test.jsonl", rows)
    found = problems("mine", tmp_path, ["test"], media=10)
    assert [line.split("/")[-1].split(".")[0] for line in found] == [str(number) for number in range(0, 100, 10)]


def test_media_are_bytes_of_their_files(tmp_path: Path) -> None:
    """A medium that is encoded anew, or read before it is asked for."""
    write_json(
        tmp_path / "coco" / "dataset_coco.json",
        {"images": [{"cocoid": 1, "filepath": "val2014", "filename": "1.jpg", "split": "test",
                     "sentences": [{"raw": " A cat. "}]}]},
    )  # fmt: skip
    dataset = load_dataset("coco", tmp_path)
    (example,) = dataset.examples("test")
    data = picture(tmp_path / "coco" / "val2014" / "1.jpg")
    assert dataset.medium(example.media[0]) == Image(data, "val2014/1.jpg")
