"""Anyone's own questions: `{split}.jsonl` in a folder, images and videos beside it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from flamingo.document import Medium
from flamingo.video import read_video
from icl_eval.datasets import Example
from icl_eval.datasets.reading import Entry, LocalDataSet, json_lines

VIDEO = "video:"
"""what the names of videos begin with, among the media of an example"""
_MEDIA = ("image", "images", "video")
_KNOWN = ("id", *_MEDIA, "question", "answer", "answers", "label", "candidates")


class Own(LocalDataSet):
    """A line an example, an object of

    - `image` (a path from this folder), `images` (several, in reading order) or `video` (an animation, a video file or
      a folder of frames), or none of them;
    - `question`, where the task's template does not ask;
    - `answers`, all that are right, or `answer`, one; the first stands in a demonstration;
    - `label`, its class; without it, and with `candidates`, its first answer;
    - `candidates`, answers to choose among, to the metric roc_auc the last is the positive class;
    - `id`; without it, the line's number from 1;
    - any other texts or integers, as fields for the template.
    """

    splits = ("train", "validation", "test")
    files: ClassVar = {
        "*.jsonl": "examples: train, validation, test",
        "**/*": "images and videos, by their paths",
    }

    def read(self, split: str) -> Iterator[Example]:
        """An example for each line."""
        for number, entry in enumerate(json_lines(self.folder / f"{split}.jsonl"), 1):
            answers = _answers(entry)
            candidates = entry.texts("candidates") if "candidates" in entry.values else ()
            if len(set(candidates)) < len(candidates):
                raise entry.error("candidates", "candidates that differ")
            label = entry.name("label") if "label" in entry.values else None
            if candidates and label is None and answers:
                label = answers[0]
            if candidates and label not in candidates:
                given = next((key for key in ("label", "answer") if key in entry.values), "answers")
                raise entry.error(given, "one of its candidates")
            yield Example(
                entry.name("id", str(number)),
                _media(entry),
                entry.text("question", ""),
                answers or (() if label is None else (label,)),
                label,
                candidates,
                {key: entry.name(key) for key in entry.values if key not in _KNOWN},
            )

    def medium(self, name: str) -> Medium:
        """See `DataSet`; of a video, as many frames as `flamingo.video` takes."""
        if name.startswith(VIDEO):
            return read_video(self.path(name.removeprefix(VIDEO), "a video"))
        return super().medium(name)


def _answers(entry: Entry) -> tuple[str, ...]:
    if "answer" in entry.values and "answers" in entry.values:
        raise entry.error("answer", "none beside answers")
    if "answers" in entry.values:
        return entry.texts("answers")
    return (entry.name("answer"),) if "answer" in entry.values else ()


def _media(entry: Entry) -> tuple[str, ...]:
    given = [key for key in _MEDIA if key in entry.values]
    if len(given) > 1:
        raise entry.error(given[1], f"none beside {given[0]}")
    if not given:
        return ()
    return (VIDEO + entry.text("video"),) if given == ["video"] else entry.texts(given[0])
