"""Questions of one's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PilImage

from flamingo.document import Image, Video
from flamingo.errors import FlamingoError
from icl_eval.datasets import Example, load_dataset
from icl_eval.datasets.checking import problems
from icl_eval.evaluation import evaluate_answerer
from tests.icl_eval.datasets.published import picture, write_lines
from tests.icl_eval.made import Stub


def test_every_form_of_a_line(tmp_path: Path) -> None:
    """A form that the description promises and that is read otherwise."""
    rows = [
        {"image": "a.png", "question": "What?", "answers": ["one", "two"]},
        {"id": "x", "images": ["a.png", "b/c.png"], "answer": 5, "scene": "kitchen", "year": 1999},
        {"video": "clip", "question": "What?", "label": "run", "candidates": ["walk", "run"]},
        {"question": "Text?", "answers": ["no"], "candidates": ["yes", "no"]},
    ]
    write_lines(tmp_path / "mine" / "train.jsonl", rows)
    assert load_dataset("mine", tmp_path).examples("train") == (
        Example("1", ("a.png",), "What?", ("one", "two")),
        Example("x", ("a.png", "b/c.png"), "", ("5",), fields={"scene": "kitchen", "year": "1999"}),
        Example("3", ("video:clip",), "What?", ("run",), "run", ("walk", "run")),
        Example("4", (), "Text?", ("no",), "no", ("yes", "no")),
    )


@pytest.mark.parametrize(
    "row, message",
    [
        ({"image": "a.png", "video": "b", "answer": "a"}, "video: 'b', expected none beside image"),
        ({"answer": "a", "answers": ["b"]}, "answer: 'a', expected none beside answers"),
        ({"answers": [["a"]]}, r"answers: \[\['a'\]\], expected a text or a list of texts"),
        ({"answer": "c", "candidates": ["a", "b"]}, "answer: 'c', expected one of its candidates"),
        ({"candidates": ["a", "b"]}, "answers: no such key, expected one of its candidates"),
        ({"label": "c", "candidates": ["a", "b"]}, "label: 'c', expected one of its candidates"),
        (
            {"answer": "a", "candidates": ["a", "b", "a"]},
            r"candidates: \['a', 'b', 'a'\], expected candidates that differ",
        ),
        ({"image": 3.5, "answer": "a"}, "image: 3.5, expected a text or a list of texts"),
        ({"answer": "a", "scene": {"b": 1}}, "scene: {'b': 1}, expected a text"),
    ],
)
def test_a_malformed_line_is_named(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    """A line whose meaning is guessed, or that is passed over."""
    write_lines(tmp_path / "mine" / "test.jsonl", [{"answer": "fine"}, row])
    with pytest.raises(FlamingoError, match=rf"test\.jsonl:2: {message}"):
        load_dataset("mine", tmp_path).examples("test")


def test_images_and_videos_beside_it(tmp_path: Path) -> None:
    """A video read as an image of its first frame, or an animation that is named as an image read as a video."""
    frames = [PilImage.new("RGB", (4, 4), (level, 0, 0)) for level in (0, 100, 200)]
    (tmp_path / "mine").mkdir()
    frames[0].save(tmp_path / "mine" / "clip.gif", save_all=True, append_images=frames[1:])
    for level in range(2):
        picture(tmp_path / "mine" / "folder" / f"{level}.png", level)
    rows = [
        {"video": "clip.gif", "answer": "a"},
        {"video": "folder", "answer": "b"},
        {"image": "clip.gif", "answer": "c"},
    ]
    write_lines(tmp_path / "mine" / "test.jsonl", rows)
    dataset = load_dataset("mine", tmp_path)
    animation, folder, image = (dataset.medium(example.media[0]) for example in dataset.examples("test"))
    assert isinstance(animation, Video) and len(animation.frames) == 3
    assert isinstance(folder, Video) and len(folder.frames) == 2
    assert image == Image((tmp_path / "mine" / "clip.gif").read_bytes(), "clip.gif")
    assert problems("mine", tmp_path, ["test"]) == []
    with pytest.raises(FlamingoError, match=r"mine/other\.mp4: no such file, expected a video"):
        dataset.medium("video:other.mp4")


def test_the_readmes_task_runs(tmp_path: Path) -> None:
    """A README whose line or task file is refused."""
    readme = (Path(__file__).parents[3] / "README.md").read_text()
    (tmp_path / "mine.yaml").write_text(readme.split("```yaml\n")[1].split("```")[0])
    line = next(json.loads(line) for line in readme.splitlines() if line.startswith('{"image"'))
    for level in range(6):
        picture(tmp_path / "mine" / f"{level}.png", level)
    for split, levels in (("train", range(5)), ("test", range(5, 6))):
        write_lines(tmp_path / "mine" / f"{split}.jsonl", [{**line, "image": f"{level}.png"} for level in levels])
    results = evaluate_answerer(Stub(), [tmp_path / "mine.yaml"], data=tmp_path)
    assert [cell.shots for cell in results.cells] == [0, 4] and results.cells[0].value == 1
