"""The cache that grows in place: what transformers' own holds, without its copies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicLayer

from flamingo import modeling
from flamingo.cache import GrowingLayer
from tests.tiny import document, tiny_flamingo

STEPS = st.lists(st.sampled_from(["one", "few", "many", "crop", "repeat", "select", "reorder", "reset"]), max_size=12)


@given(STEPS, st.integers(0, 1000))
@example(["crop", "crop", "few", "reorder"], 0)
@settings(max_examples=60, deadline=None)
def test_it_holds_what_the_plain_layer_holds(steps: list[str], seed: int) -> None:
    """Catches tokens written over others, lost when the room is full, or left out of a reordering."""
    generator = torch.Generator().manual_seed(seed)
    ours, plain = GrowingLayer(), DynamicLayer()
    beams = 2
    for number, step in enumerate(["prompt", *steps]):
        if step == "prompt" or not plain.is_initialized:  # equal in all beams, as the prompt of a generation is
            new = torch.randn(1, 2, 5, 3, generator=generator).expand(beams, -1, -1, -1)
        elif step in ("one", "few", "many"):
            new = torch.randn(beams, 2, {"one": 1, "few": 3, "many": 400}[step], 3, generator=generator)
        else:
            for layer in (ours, plain):
                if step == "crop":
                    layer.crop(-min(number, layer.get_seq_length() - 1))
                elif step == "repeat":
                    layer.batch_repeat_interleave(2)
                elif step == "select":
                    layer.batch_select_indices(torch.arange(2))
                elif step == "reorder":
                    layer.reorder_cache(torch.arange(beams).flip(0))
                else:
                    layer.reset()
            beams = beams * 2 if step == "repeat" else 2 if step == "select" else beams
            if not plain.is_initialized:
                beams = 2
            continue
        found, expected = ours.update(new, -new), plain.update(new, -new)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    if plain.is_initialized:
        assert torch.equal(ours.keys, plain.keys) and torch.equal(ours.values, plain.values)


def test_a_new_token_copies_nothing() -> None:
    """Catches room that is made anew at each token."""
    layer = GrowingLayer()
    layer.update(torch.randn(2, 2, 5, 3), torch.randn(2, 2, 5, 3))
    places = set()
    for _ in range(200):
        keys, _ = layer.update(torch.randn(2, 2, 1, 3), torch.randn(2, 2, 1, 3))
        places.add(keys.data_ptr())
    assert len(places) == 1


@pytest.mark.parametrize("family", ["llama", "opt", "bloom", "gemma2", "lfm2"])
def test_generations_are_those_of_transformers_cache(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches beams that read another beam's tokens, and layers of other kinds taken for plain ones."""
    model, processor = tiny_flamingo(tmp_path, family)
    inputs = processor(documents=[document(1, 2), document(2, 1)])
    del inputs["labels"]
    options = dict(max_new_tokens=12, num_beams=3, num_return_sequences=2, do_sample=False, min_new_tokens=12)
    used: list[type] = []
    grown = modeling.with_room

    def noted(cache: object) -> object:
        used.extend(type(layer) for layer in grown(cache).layers)
        return cache

    monkeypatch.setattr(modeling, "with_room", noted)
    found = model.generate(**inputs, **options)
    assert GrowingLayer in used
    monkeypatch.setattr(modeling, "with_room", lambda cache: cache)
    assert torch.equal(found, model.generate(**inputs, **options))
