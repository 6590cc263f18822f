"""What the model reads of every subset of MIMIC-IT: text, what each token may see, what counts in the loss."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken
from transformers import CLIPImageProcessorPil

from data_shards.account import Account
from data_shards.sources.mimic_it import SUBSETS
from flamingo import FlamingoProcessor, Video
from flamingo.document import Document
from flamingo.instructions import ANSWER
from flamingo.media import visible_media
from flamingo.processing import END_OF_CHUNK, IGNORED, IMAGE_TOKEN
from tests.data_shards.sources.mimic import instruction, mimic_it, pictures
from tests.tiny import tokenizer


@pytest.fixture(scope="module")
def processor() -> FlamingoProcessor:
    words = tokenizer()
    words.add_tokens([AddedToken(mark, special=True) for mark in (IMAGE_TOKEN, END_OF_CHUNK, ANSWER)])
    size = {"height": 16, "width": 16}
    return FlamingoProcessor(CLIPImageProcessorPil(size=size, crop_size=size), words)


IN_CONTEXT = """
    <s>                      │   │
    <image>                  │ 1 │
    User:ask 1 GPT:<answer>  │ 1 │
    say 1<|endofchunk|>      │ 1 │ loss
    <image>                  │ 2 │
    User:ask 2 GPT:<answer>  │ 2 │
    say 2<|endofchunk|>      │ 2 │ loss
    <image>                  │ 3 │
    User:ask q GPT:<answer>  │ 3 │
    say q<|endofchunk|></s>  │ 3 │ loss
    media: 1.0; 2.0; q.0
"""
ONCE = """
    <s>                      │   │
    <image>                  │ 1 │
    User:ask 1 GPT:<answer>  │ 1 │
    say 1<|endofchunk|>      │ 1 │ loss
    User:ask 2 GPT:<answer>  │ 1 │
    say 2<|endofchunk|>      │ 1 │ loss
    User:ask q GPT:<answer>  │ 1 │
    say q<|endofchunk|></s>  │ 1 │ loss
"""
PAIR = """
    <s>                      │   │
    <image>                  │ 1 │
    User:ask q GPT:<answer>  │ 1 │
    say q<|endofchunk|></s>  │ 1 │ loss
    media: video of 2: q.0 … q.1
"""
STORY = """
    <s>                      │   │
    <image>                  │ 1 │
    <image>                  │ 2 │
    User:ask 1 GPT:<answer>  │ 2 │
    say 1<|endofchunk|>      │ 2 │ loss
    <image>                  │ 3 │
    <image>                  │ 4 │
    User:ask 2 GPT:<answer>  │ 4 │
    say 2<|endofchunk|>      │ 4 │ loss
    <image>                  │ 5 │
    <image>                  │ 6 │
    User:ask q GPT:<answer>  │ 6 │
    say q<|endofchunk|></s>  │ 6 │ loss
    media: 1.0; 1.1; 2.0; 2.1; q.0; q.1
"""
TEXT = """
    <s>User:ask 1 GPT:<answer>  │   │
    say 1<|endofchunk|>      │   │ loss
    User:ask 2 GPT:<answer>  │   │
    say 2<|endofchunk|>      │   │ loss
    User:ask q GPT:<answer>  │   │
    say q<|endofchunk|></s>  │   │ loss
    media:
"""
GOLDEN = {
    "LACR_I2I": (1, IN_CONTEXT),
    "LACR_T2T": (1, IN_CONTEXT),
    "LADD": (1, IN_CONTEXT),
    "LA_MINE": (1, IN_CONTEXT),
    "LACONV": (1, ONCE + "media: q.0"),
    "LLaVAR": (1, ONCE + "media: q.0"),
    "DC": (70, ONCE + "media: video of 32: q.0 … q.69"),
    "TVC": (70, ONCE + "media: video of 32: q.0 … q.69"),
    "FunQA": (70, ONCE + "media: video of 32: q.0 … q.69"),
    "E4D": (70, ONCE + "media: video of 16: q.0 … q.69"),
    "SN": (70, ONCE + "media: video of 70: q.0 … q.69"),
    "SD": (2, PAIR),
    "CGD": (2, PAIR),
    "VST": (2, STORY),
    "TEXT": (1, TEXT),
}
"""dataset → images of each instruction, and the table of tokens │ medium that they see │ whether they count"""
SPACED = """
    <s>                       │   │
    <image>                   │ 1 │
    User: ask 1 GPT:<answer>  │ 1 │
    say 1<|endofchunk|>       │ 1 │ loss
    <image>                   │ 2 │
    User: ask q GPT:<answer>  │ 2 │
    say q<|endofchunk|></s>   │ 2 │ loss
    media: 1.0; q.0
"""


def document(folder: Path, name: str, images: int, **options: object) -> Document:
    """Of a query q, whose contexts are 1 and 2."""
    shown = {key: [f"{key}.{n}" for n in range(images)] for key in "12q"}
    data = {key: instruction(f"ask {key}", f"say {key}", shown[key], [*"12"]) for key in "12q"}
    reader = mimic_it(folder, name, data, pictures(*(each for ids in shown.values() for each in ids)), **options)
    (record,) = (each for each in reader.records(reader.input) if each.content == "q")
    (found,) = reader.documents(record, Account())
    return found


def table(processor: FlamingoProcessor, found: Document) -> list[list[str]]:
    """Runs of tokens that see the same and count alike, `<image>` alone; then the names of the media."""
    encoding = processor.encode(found, eos=True)
    first, last = visible_media(torch.tensor([encoding.input_ids]), processor.image_token_id)
    assert (first == last).all()
    tokens = zip(encoding.input_ids, last[0].tolist(), encoding.labels, strict=True)
    rows = []
    for (_, _, medium, counts), run in groupby(
        enumerate(tokens), lambda each: (each[1][0] == processor.image_token_id and each[0], 0, *_seen(each[1]))
    ):
        ids = [token for _, (token, _, _) in run]
        rows.append([processor.decode(ids).strip(), str(medium or ""), "loss" if counts else ""])
    names = "; ".join(
        f"video of {len(each.frames)}: {each.frames[0].name} … {each.frames[-1].name}"
        if isinstance(each, Video)
        else each.name
        for each in found.media
    )
    return [*rows, [f"media: {names.replace('.png', '')}".strip()]]


def _seen(token: tuple[int, int, int]) -> tuple[int, bool]:
    identity, medium, label = token
    assert label in (identity, IGNORED)
    return medium, label != IGNORED


def rows(golden: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("│")] for line in golden.strip().splitlines()]


@pytest.mark.parametrize("name", GOLDEN)
def test_what_is_read_of_every_subset(tmp_path: Path, processor: FlamingoProcessor, name: str) -> None:
    """Catches a subset with an `<image>` too many or too few, in another order, with contexts where it has none or of
    other frames; an instruction that counts in the loss; an answer, its end or the final end that does not.
    """
    images, golden = GOLDEN[name]
    found = document(tmp_path, name, images)
    assert table(processor, found) == rows(golden)


def test_what_is_read_with_spaces(tmp_path: Path, processor: FlamingoProcessor) -> None:
    """Catches the older spacing where it is not asked for, or only on one side; contexts beyond the most."""
    found = document(tmp_path, "LACR_I2I", 1, spaced=True, max_contexts=1)
    assert table(processor, found) == rows(SPACED)
    assert "<answer> say 1<|endofchunk|><image>User: ask q" in processor.encode(found).text


def test_every_subset_has_a_golden_table() -> None:
    """Catches a subset that is added to the table and read by nobody."""
    assert {max((key for key in SUBSETS if name.upper().startswith(key)), key=len) for name in GOLDEN} == set(SUBSETS)
