"""What a medium may change, and what it may not: bit for bit, on random documents."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from flamingo import Document, FlamingoForConditionalGeneration, FlamingoProcessor, Text
from flamingo.media import MediaSlots, visible_media
from tests.tiny import language_configs, picture, tiny_flamingo

Tiny = tuple[FlamingoForConditionalGeneration, FlamingoProcessor]

# A sample: for each segment None, a medium, or the length of a text.
samples = st.lists(st.none() | st.integers(1, 4), min_size=1, max_size=6)
batches = st.lists(samples, min_size=1, max_size=3).filter(lambda batch: any(None in sample for sample in batch))
few = settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def documents(batch: list[list[int | None]]) -> list[Document]:
    """The documents of a batch; every picture is another."""
    numbers = iter(range(100))
    return [
        Document(tuple(picture(next(numbers)) if size is None else Text("abcdefgh "[:size]) for size in sample))
        for sample in batch
    ]


@pytest.fixture(
    scope="module",
    params=[
        (kernel, dtype, media_attention)
        for kernel in ("eager", "sdpa")
        for dtype in (torch.float32, torch.bfloat16)
        for media_attention in ("previous", "all")
    ],
    ids=lambda parameters: "-".join(str(each).removeprefix("torch.") for each in parameters),
)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A random Flamingo with open gates, for each kernel, precision and way of attention."""
    kernel, dtype, media_attention = request.param
    folder = tmp_path_factory.mktemp("tiny")
    model, processor = tiny_flamingo(folder, attn_implementation=kernel, media_attention=media_attention)
    return model.to(dtype), processor


def read(model: FlamingoForConditionalGeneration, batch: dict[str, Tensor], *, cached: bool) -> Tensor:
    """Logits (B, T, V) in one pass, or from the cache, token by token."""
    if not cached:
        return model(**batch).logits
    ids = batch["input_ids"]
    first, last = visible_media(ids, model.config.image_token_id, media_attention=model.config.media_attention)
    memory = model.remember_media(model.encode_media(batch["pixel_values"]))
    cache, logits = None, []
    for t in range(ids.shape[1]):
        now = slice(t, t + 1)
        step = model(
            ids[:, now], attention_mask=batch["attention_mask"][:, : t + 1], past_key_values=cache, use_cache=True,
            media_memory=memory, media_per_sample=batch["media_per_sample"],
            media_first=first[:, now], media_last=last[:, now],
        )  # fmt: skip
        cache = step.past_key_values
        logits.append(step.logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize(("side", "cached"), [("right", False), ("left", False), ("right", True)])
@given(batch=batches, data=st.data())
@few
@torch.no_grad()
def test_a_medium_changes_what_may_see_it_and_nothing_before_nor_beside_it(
    tiny: Tiny, side: str, cached: bool, batch: list[list[int | None]], data: st.DataObject
) -> None:
    """Catches a leak backwards, into another sample or past a mask; and media that later chunks do not profit from."""
    model, processor = tiny
    inputs = processor(documents=documents(batch), padding_side=side)
    inputs.pop("labels")
    images = (inputs["input_ids"] == processor.image_token_id).nonzero().tolist()
    medium = data.draw(st.integers(0, len(images) - 1))
    pixels = inputs["pixel_values"].clone()
    pixels[medium] = -pixels[medium]
    before, after = (
        read(model, {**inputs, "pixel_values": each}, cached=cached) for each in (inputs["pixel_values"], pixels)
    )
    changed = (before != after).any(dim=-1) & inputs["attention_mask"].bool()  # padding is nobody's to read
    sample, position = images[medium]  # the first token that may see a medium is its own mark
    assert changed[sample, position]
    later = [place for row, place in images[medium + 1 :] if row == sample]
    if later:
        assert changed[sample, later[0] :].any(), "later chunks do not see the text of earlier ones"
    changed[sample, position:] = False
    assert not changed.any()


@given(batch=batches, data=st.data())
@few
@torch.no_grad()
def test_the_branch_of_a_token_that_may_not_see_a_medium_does_not_change(
    tiny: Tiny, batch: list[list[int | None]], data: st.DataObject
) -> None:
    """Catches attention that weighs forbidden media, which the LM's own attention would hide in later tokens."""
    model, processor = tiny
    inputs = processor(documents=documents(batch), padding_side="right")
    counts = inputs["media_per_sample"]
    media = int(counts.sum())
    first, last = visible_media(
        inputs["input_ids"], processor.image_token_id, media_attention=model.config.media_attention
    )
    block = model.cross_attention[0]
    latents = torch.randn(media, 4, 24, dtype=model.dtype)
    medium = data.draw(st.integers(0, media - 1))
    changed_latents = latents.clone()
    changed_latents[medium] += 1
    slots = MediaSlots.of(counts, media)
    visible = slots.visible(first, last, 4)
    sees = visible.any(dim=-1, keepdim=True)
    hidden = torch.randn(*first.shape, 32, dtype=model.dtype)
    before, after = (
        block.attn(hidden, *(slots.spread(each) for each in block.project_media(given)), visible | ~sees, sees)
        for given in (latents, changed_latents)
    )
    sample = int(torch.repeat_interleave(counts)[medium])
    number = medium - int(counts[:sample].sum()) + 1
    may = torch.zeros_like(first, dtype=torch.bool)
    may[sample] = (first[sample] <= number) & (number <= last[sample])
    changed = (before != after).any(dim=-1)
    assert changed[may].any()
    assert not changed[~may].any()
    assert (before[last == 0] == 0).all()


@torch.no_grad()
@pytest.mark.parametrize("family", sorted(language_configs()))
def test_no_family_leaks(tmp_path: Path, family: str) -> None:
    """Catches a family whose layers take the hidden states from elsewhere than where media enter."""
    model, processor = tiny_flamingo(tmp_path, family)
    batch = processor(documents=documents([[2, None, 3, None, 2], [None, 4], [3]]), padding_side="right")
    batch.pop("labels")
    before = model(**batch).logits
    for medium, (sample, position) in enumerate((batch["input_ids"] == processor.image_token_id).nonzero().tolist()):
        pixels = batch["pixel_values"].clone()
        pixels[medium] = -pixels[medium]
        changed = (model(**{**batch, "pixel_values": pixels}).logits != before).any(dim=-1)
        assert changed[sample, position:].all()
        changed[sample, position:] = False
        assert not changed.any()
