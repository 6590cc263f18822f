"""Instruction turns as interleaved documents, in Otter's form: what tuning, evaluation prompts and chats share.

`<image>User:{question} GPT:<answer>{answer}<|endofchunk|>`, turn after turn without a separator (MIMIC-IT; Otter,
github.com/Luodian/Otter). What is answered counts in the loss, in the examples of a context too; what is asked never.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flamingo.document import Document, Medium, Segment, Text
from flamingo.errors import FlamingoError
from flamingo.processing import ANSWER, END_OF_CHUNK

__all__ = ["ANSWER", "Turn", "instruction_document"]


@dataclass(frozen=True)
class Turn:
    """A question about the media that stand before it, and its answer; None leaves it to the model."""

    question: str
    answer: str | None = None
    media: tuple[Medium, ...] = ()
    key: str = ""
    """names it in messages"""


def instruction_document(
    turns: Sequence[Turn],
    *,
    spaced: bool = False,
    answer_mark: bool = True,
    key: str = "",
    source: str = "",
    metadata: dict[str, Any] | None = None,
) -> Document:
    """Turns as one document; a prompt, where the last one has no answer.

    Args:
        spaced: a space after `User:` and before the answer, as models released through July 2023 were tuned.
        answer_mark: put `<answer>` before each answer; models that were never tuned do not know it.

    Raises:
        FlamingoError: where there is no turn, or one before the last has no answer.
    """
    if not turns:
        raise FlamingoError(f"instructions {key or '?'}: expected at least one turn")
    space, mark = " " if spaced else "", ANSWER if answer_mark else ""
    segments: list[Segment] = []
    for turn in turns:
        segments += [*turn.media, Text(f"User:{space}{turn.question} GPT:{mark}", supervised=False)]
        if turn.answer is not None:
            segments.append(Text(f"{space}{turn.answer}{END_OF_CHUNK}"))
        elif turn is not turns[-1]:
            raise FlamingoError(f"instructions {key or '?'}: turn {turn.key or turn.question!r} has no answer")
    return Document(tuple(segments), key, source, metadata or {}, complete=turns[-1].answer is not None)
