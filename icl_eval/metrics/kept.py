"""What counts of a generated answer: models go on to the next question, or explain.

Published evaluations cut before they score, each in its own way; tasks name theirs (`generate: {keep: …}`).
"""

from __future__ import annotations

import re
from collections.abc import Callable


def first_caption(text: str) -> str:
    """OpenFlamingo's rule for captions: what precedes a next "Output", without quotes."""
    return text.split("Output", 1)[0].replace('"', "")


def short_answer(text: str) -> str:
    """OpenFlamingo's rule for questions: up to a next question or the first comma."""
    return re.split("Question|Answer|Short|, ", text, maxsplit=1)[0]


def first_line(text: str) -> str:
    """VL-ICL's rule: the first line, or of a single line what precedes its first full stop; neither begins the text."""
    line, _, more = text.strip().partition("\n")
    end = line.find(".")
    return line if more or end < 1 else line[:end]


def first_number(text: str) -> str:
    """VL-ICL's rule where numbers are asked for: the first one of the first line; "" where there is none."""
    found = re.search(r"\d+", first_line(text))
    return found[0] if found else ""


KEEPS: dict[str, Callable[[str], str]] = {
    "": str,
    "first_caption": first_caption,
    "short_answer": short_answer,
    "first_line": first_line,
    "first_number": first_number,
}
"""Rules by the names that tasks give; "" keeps all."""
