"""Packed rows: documents that see neither one another's text nor media."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flamingo import FlamingoError, FlamingoForConditionalGeneration
from flamingo.processing import IGNORED, Encoding, FlamingoProcessor
from tests.tiny import document, language_configs, tiny_flamingo

REFUSED = {"bloom", "falcon_alibi", "lfm2"}
FAMILIES = sorted(language_configs().keys() - REFUSED)


def packed(
    processor: FlamingoProcessor, seeds: list[int], media: list[int]
) -> tuple[dict[str, torch.Tensor], list[Encoding]]:
    """One row of documents, and their encodings."""
    encodings = [processor.encode(document(seed, count, lead=True)) for seed, count in zip(seeds, media, strict=True)]
    row = {
        "input_ids": torch.tensor([[token for each in encodings for token in each.input_ids]]),
        "labels": torch.tensor([[label for each in encodings for label in each.labels]]),
        "documents": torch.tensor([[n for n, each in enumerate(encodings, 1) for _ in each.input_ids]]),
        "pixel_values": processor.pixels([medium for each in encodings for medium in each.media]),
    }
    return row, encodings


@torch.no_grad()
@pytest.mark.parametrize("media_attention", ["previous", "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_equal_the_same_documents_alone(tmp_path: Path, family: str, media_attention: str) -> None:
    """Catches a mask that a family misreads, positions that go on, and media of the document before."""
    model, processor = tiny_flamingo(tmp_path, family, packing=True, media_attention=media_attention)
    row, encodings = packed(processor, [1, 2, 3], [2, 0, 1])
    labels = row.pop("labels")
    logits = model(**row).logits[0].split([len(each.input_ids) for each in encodings])
    known = len(processor.tokenizer)
    losses = []
    for each, together in zip(encodings, logits, strict=True):
        alone = {"input_ids": torch.tensor([each.input_ids]), "pixel_values": processor.pixels(each.media)}
        torch.testing.assert_close(model(**alone).logits[0, :, :known], together[:, :known])
        losses.append(model(**alone, labels=torch.tensor([each.labels])).sample_losses)
    torch.testing.assert_close(model(**row, labels=labels).sample_losses, sum(losses))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_of_another_document_is_seen(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    """Catches the least leak of text or media from one packed document into the next: bit for bit."""
    model, processor = tiny_flamingo(tmp_path, family, packing=True)
    model = model.to(dtype)
    row, encodings = packed(processor, [1, 2, 3], [2, 1, 1])
    row.pop("labels")
    before = model(**row).logits[0]
    start, end = len(encodings[0].input_ids), len(encodings[0].input_ids) + len(encodings[1].input_ids)
    pixels, ids = row["pixel_values"].clone(), row["input_ids"].clone()
    pixels[2] += 1  # the only medium of the second document
    text = (ids[0] != processor.image_token_id) & (row["documents"][0] == 2)
    ids[0, text] = ids[0, text].roll(1)
    changed = (model(**{**row, "pixel_values": pixels, "input_ids": ids}).logits[0] != before).any(-1)
    assert changed[start:end].any()
    assert not changed[:start].any()
    assert not changed[end:].any()


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_families_that_cannot_be_packed_are_refused(tmp_path: Path, family: str) -> None:
    """Catches a family that would train on leaking rows without a word."""
    with pytest.raises(FlamingoError, match=r"packing=True: .*(Bloom|Falcon|Lfm2)ForCausalLM"):
        tiny_flamingo(tmp_path, family, packing=True)


def test_what_packed_rows_need_is_asked_for(tmp_path: Path) -> None:
    """Catches rows packed for a model that never was checked, or longer than the LM's window."""
    model, processor = tiny_flamingo(tmp_path)
    row, _ = packed(processor, [1, 2], [1, 1])
    with pytest.raises(FlamingoError, match="packing=True"):
        model(**row)
    model, _ = tiny_flamingo(tmp_path / "gemma", "gemma3", packing=True)
    with pytest.raises(FlamingoError, match="expected at most 64, the sliding window of Gemma3ForCausalLM"):
        model(torch.ones(1, 65, dtype=torch.long), documents=torch.ones(1, 65, dtype=torch.long))
    model.save_pretrained(tmp_path / "saved")
    assert FlamingoForConditionalGeneration.from_pretrained(tmp_path / "saved").config.packing


def test_the_first_token_of_a_packed_document_is_not_scored(tmp_path: Path) -> None:
    """Catches a loss on what one document says about the next, for tokenizers without a first token."""
    model, processor = tiny_flamingo(tmp_path, packing=True)
    row, encodings = packed(processor, [1, 2], [1, 0])
    second = len(encodings[0].input_ids)
    labels = torch.full_like(row["labels"], IGNORED)
    labels[0, second] = row["input_ids"][0, second]
    assert model(**{**row, "labels": labels}).sample_tokens.tolist() == [0]
