"""Which media a token may see."""

from __future__ import annotations

import pytest
import torch

import flamingo.media
from flamingo.media import MediaSlots, visible_media

IMAGE = 7


def tables() -> list[dict[str, list[str]]]:
    """The tables drawn in the module's docstring, each row by its name."""
    drawn: list[dict[str, list[str]]] = []
    for line in flamingo.media.__doc__.splitlines():
        if not line.startswith("    "):
            continue
        words = line.split()
        if words[0] == "token":
            drawn.append({"token": words[1:]})
        elif words[0] in ("previous", "all", "next", "document"):
            name, cells = (words[0], words[1:]) if words[0] == "document" else (" ".join(words[:2]), words[2:])
            drawn[-1][name] = cells
    return drawn


def columns(table: dict[str, list[str]], row: str) -> list[int]:
    """The numbers of a row; the bar between documents is no token."""
    return [int(cell) for cell, token in zip(table[row], table["token"], strict=True) if token != "|"]


@pytest.mark.parametrize(
    ("number", "media_attention"), [(0, "previous"), (0, "all"), (1, "previous"), (1, "all"), (2, "next")]
)
def test_intervals_are_those_drawn_in_the_docstring(number: int, media_attention: str) -> None:
    """Catches a token that sees another medium than the table says, in single documents and packed rows."""
    table = tables()[number]
    tokens = [token for token in table["token"] if token != "|"]
    ids = torch.tensor([[IMAGE if token == "<image>" else 1 for token in tokens]])
    documents = torch.tensor([columns(table, "document")]) if "document" in table else None
    first, last = visible_media(ids, IMAGE, media_attention=media_attention, documents=documents)
    assert first[0].tolist() == columns(table, f"{media_attention} first")
    assert last[0].tolist() == columns(table, f"{media_attention} last")


def test_docstring_has_all_tables() -> None:
    """Catches a parser that finds no table, with which the test above would compare nothing."""
    assert [sorted(table) for table in tables()] == [
        ["all first", "all last", "previous first", "previous last", "token"],
        ["all first", "all last", "document", "previous first", "previous last", "token"],
        ["document", "next first", "next last", "token"],
    ]


def test_slots_put_flat_media_into_their_samples() -> None:
    """Catches media that reach a neighbouring sample where samples have 2, 0 and 1 of them."""
    slots = MediaSlots.of(torch.tensor([2, 0, 1]), 3)
    flat = torch.arange(1.0, 4.0)[:, None, None, None]  # N=3, R=H=C=1
    assert slots.spread(flat).flatten(1).tolist() == [[1, 2], [0, 0], [3, 0]]


def test_without_media_the_projection_still_gets_a_gradient() -> None:
    """Catches a batch without media that leaves parameters out of the graph, which breaks DDP."""
    weight = torch.ones(1, requires_grad=True)
    spread = MediaSlots.of(torch.tensor([0, 0]), 0).spread(torch.zeros(0, 2, 1, 3) * weight)
    assert spread.shape == (2, 1, 2, 3)
    spread.sum().backward()
    assert weight.grad is not None and weight.grad.item() == 0
