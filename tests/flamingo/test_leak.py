"""What a medium may change, and what it may not: bit for bit, on random documents."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from flamingo import Document, FlamingoForConditionalGeneration, FlamingoProcessor, Text
from flamingo.media import MediaSlots, visible_media
from tests.tiny import language_configs, picture, tiny_flamingo

Tiny = tuple[FlamingoForConditionalGeneration, FlamingoProcessor]

# A sample: for each segment None, a medium, or the length of a text.
samples = st.lists(st.none() | st.integers(1, 4), min_size=1, max_size=6)
batches = st.lists(samples, min_size=1, max_size=3).filter(lambda batch: any(None in sample for sample in batch))
Property = Callable[[list[list[int | None]], st.DataObject], None]


def holds_for_batches(request: pytest.FixtureRequest) -> Callable[[Property], None]:
    """Checks a property of random batches at once: always the same ones in a test, others in each of its variants."""

    def check(holds: Property) -> None:
        few = settings(max_examples=6, deadline=None, database=None)
        seed(zlib.crc32(request.node.name.encode()))(few(given(batch=batches, data=st.data())(holds)))()

    return check


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
    options = dict(attn_implementation=kernel, media_attention=media_attention, packing=True)
    model, processor = tiny_flamingo(folder, **options)
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
        media = dict(media_memory=memory, media_per_sample=batch["media_per_sample"]) if t else {}  # BOS has seen none
        step = model(
            ids[:, now], attention_mask=batch["attention_mask"][:, : t + 1], past_key_values=cache, use_cache=True,
            media_first=first[:, now], media_last=last[:, now], **media,
        )  # fmt: skip
        cache = step.past_key_values
        logits.append(step.logits)
    return torch.cat(logits, dim=1)


def assert_only_later_logits_change(
    before: Tensor, after: Tensor, sample: Tensor, position: int, later: list[int]
) -> None:
    """Of logits (B, T, V) of two inputs, which differ at `position`, where `sample` (B, T) holds.

    There they change, and from the first of the `later` media on; they may nowhere before, nor outside of `sample`.
    """
    changed = (before != after).any(dim=-1)
    own = changed & sample
    assert own[:, position].any()
    assert not later or own[:, later[0] :].any(), "later chunks do not see the text of earlier ones"
    own[:, position:] = False
    assert not own.any(), "leaks backwards"
    assert not (changed & ~sample).any(), "leaks into another sample or document"


@pytest.mark.parametrize(("side", "cached"), [("right", False), ("left", False), ("right", True), ("left", True)])
@torch.no_grad()
def test_a_medium_changes_what_may_see_it_and_nothing_before_nor_beside_it(
    tiny: Tiny, side: str, cached: bool, request: pytest.FixtureRequest
) -> None:
    """Catches a leak backwards, into another sample or past a mask; and media that later chunks do not profit from."""
    model, processor = tiny

    @holds_for_batches(request)
    def _(batch: list[list[int | None]], data: st.DataObject) -> None:
        inputs = processor(documents=documents(batch), padding_side=side)
        inputs.pop("labels")
        images = (inputs["input_ids"] == processor.image_token_id).nonzero().tolist()
        medium = data.draw(st.integers(0, len(images) - 1))
        pixels = inputs["pixel_values"].clone()
        pixels[medium] = -pixels[medium]
        before, after = (
            read(model, {**inputs, "pixel_values": each}, cached=cached) for each in (inputs["pixel_values"], pixels)
        )
        tokens = inputs["attention_mask"].bool()[..., None]  # padding is nobody's to read
        before, after = (each.where(tokens, torch.zeros_like(each)) for each in (before, after))
        sample, position = images[medium]  # the first token that may see a medium is its own mark
        own = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        own[sample] = True
        later = [place for row, place in images[medium + 1 :] if row == sample]
        assert_only_later_logits_change(before, after, own, position, later)


@pytest.mark.parametrize("what", ["medium", "text"])
@torch.no_grad()
def test_in_a_packed_row_nothing_changes_outside_of_its_document(
    tiny: Tiny, what: str, request: pytest.FixtureRequest
) -> None:
    """Catches media or text of one document that another one in the row sees, and a leak backwards in its own."""
    model, processor = tiny

    @holds_for_batches(request)
    def _(batch: list[list[int | None]], data: st.DataObject) -> None:
        row = [processor.encode(each) for each in documents(batch)]
        inputs = processor.collate_packed([row], media_attention=model.config.media_attention)
        inputs.pop("labels")
        before = model(**inputs).logits
        mark = inputs["input_ids"][0] == processor.image_token_id
        pixels, ids = inputs["pixel_values"].clone(), inputs["input_ids"].clone()
        images = mark.nonzero().flatten().tolist()
        if what == "medium":
            medium = data.draw(st.integers(0, len(images) - 1))
            pixels[medium] = -pixels[medium]
            position = images[medium]
        else:
            position = data.draw(st.sampled_from((~mark).nonzero().flatten().tolist()))
            ids[0, position] = (ids[0, position] + 1) % processor.image_token_id
        own = inputs["documents"] == inputs["documents"][0, position]
        later = [place for place in images if place > position and own[0, place]]
        after = model(**{**inputs, "pixel_values": pixels, "input_ids": ids}).logits
        assert_only_later_logits_change(before, after, own, position, later)


@torch.no_grad()
def test_the_branch_of_a_token_that_may_not_see_a_medium_does_not_change(
    tiny: Tiny, request: pytest.FixtureRequest
) -> None:
    """Catches attention that weighs forbidden media, which the LM's own attention would hide in later tokens."""
    model, processor = tiny

    @holds_for_batches(request)
    def _(batch: list[list[int | None]], data: st.DataObject) -> None:
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
