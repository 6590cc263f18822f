"""Operations by formula, against another count and against what torch computes, and peaks of GPUs."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flamingo import Document, Text, Video
from tests.tiny import WIDTH, document, picture, tiny_flamingo
from train.flops import OperationCounter, peak_flops

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_they_are_those_of_the_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches two rules of counting: MFU in a run's log that is not the benchmarks'."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    models: Any = importlib.import_module("_models")
    shape, counts, tokens = models.SHAPES["tiny"], (1, 2, 2, 3), 64
    model = models.ours(models.Place(shape, "cpu", torch.float32))
    ids, labels = models.interleaved(shape, counts, tokens)
    batch = {"attention_mask": torch.ones_like(ids), "labels": labels}
    batch["pixel_values"] = models.pictures(shape, sum(counts))[:, None]
    expected = models.operations(
        shape, samples=len(counts), tokens=tokens, media=sum(counts), visible=1,
        logits=int((labels[:, 1:] >= 0).sum()), head_trains=False,
    )  # fmt: skip
    assert OperationCounter(model)(batch) == pytest.approx(sum(map(sum, expected.values())), rel=1e-12)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("opt", {}),
        ("gpt2", {}),
        ("llama", {"cross_attention_every": 2, "trains": False}),
        ("gpt_neox", {"freeze_language": False}),
        ("qwen2", {"freeze_vision": False}),
    ],
)
def test_they_are_what_torch_computes(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    """Catches matrices left out, frozen ones counted as trained, and gradients where none goes.

    Torch does not count attention's kernel: it is taken off by the numbers of `tests.tiny`. Nor does it take gradients
    of pixels.
    """
    trains = options.pop("trains", True)
    model, processor = tiny_flamingo(tmp_path, family, **options)
    model.train()
    for rows in (model.new_input_rows, model.new_output_rows):
        if rows is not None:
            rows.requires_grad_(trains)
    batch = processor(documents=[document(1, 3, lead=True)], padding_side="right")
    counter = OperationCounter(model)
    with FlopCounterMode(display=False) as counted:
        model(**batch).loss.backward()
    tokens, media, latents, vision_tokens, inner = batch["input_ids"].shape[1], 3, 4, 4, 16
    passes = 2 if trains else 1  # the first of two layers lies below the only block
    attention = (
        4 * (2 + 2 * passes) * tokens**2 / 2 * WIDTH + 12 * len(model.cross_attention) * tokens * latents * inner
    )
    attention += 12 * media * (vision_tokens + latents) * latents * inner
    pixels = 0 if model.config.freeze_vision else 2 * media * vision_tokens * 24 * 3 * 8**2
    assert counter(batch) - attention - pixels == pytest.approx(counted.get_total_flops(), rel=0.01)


def test_padding_and_packing_change_nothing(tmp_path: Path) -> None:
    """Catches operations of padding, and attention counted across packed documents."""
    model, processor = tiny_flamingo(tmp_path, packing=True)
    documents = [document(seed, media) for seed, media in ((1, 1), (2, 3), (3, 2))]
    counter = OperationCounter(model)
    alone = sum(counter(processor(documents=[each], padding_side="right")) for each in documents)
    assert counter(processor(documents=documents, padding_side="right")) == pytest.approx(alone, rel=1e-12)
    packed = processor.collate_packed([[processor.encode(each) for each in documents]])
    # One row has fewer first tokens, which nothing foretells: none of them counts in a row of its own either.
    assert counter(packed) == pytest.approx(alone, rel=0.02)


def test_videos_of_any_length_cost_what_each_does(tmp_path: Path) -> None:
    """Catches frames counted as media, and the padding of short videos beside long ones."""
    model, processor = tiny_flamingo(tmp_path, resampler_max_frames=2)
    media = [picture(1), Video((picture(2),) * 2), Video((picture(3),) * 7)]
    documents = [Document((medium, Text("see"))) for medium in media]
    counter = OperationCounter(model)
    batch = processor(documents=documents, padding_side="right")
    assert len(batch["media_frames"]) == 3 and len(batch["pixel_values"]) == 10
    alone = [counter(processor(documents=each, padding_side="right")) for each in documents]
    assert counter(batch) == pytest.approx(sum(alone), rel=1e-12)
    # Beyond the first, frames cost the tower and the keys of the resampler, and nothing else.
    assert alone[2] - alone[0] == pytest.approx(6 * (alone[1] - alone[0]), rel=1e-12)


def test_text_alone_costs_no_pixels(tmp_path: Path) -> None:
    """Catches a division by the media that are not there."""
    model, processor = tiny_flamingo(tmp_path)
    counter = OperationCounter(model)
    text, both = (counter(processor(documents=[document(1, media)], padding_side="right")) for media in (0, 1))
    assert 0 < text < both


def test_peaks_are_those_of_the_gpu_at_hand() -> None:
    """Catches an A10 taken for an A100, an L4 for an L40S, and a number for what is not known."""
    names = {
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA A10G": 70e12,
        "NVIDIA A10": 125e12,
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H200": 989e12,
        "NVIDIA L4": 121e12,
        "NVIDIA L40S": 362e12,
        "NVIDIA GeForce RTX 4090": 165e12,
        "NVIDIA GeForce RTX 4090 Laptop GPU": None,
        "Tesla V100-SXM2-16GB": None,
    }
    assert {name: peak_flops(name) for name in names} == names
    assert peak_flops(torch.device("cpu")) is None
