"""Sequences and the batches of a rank."""

from __future__ import annotations

import gc
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards.loader import MicroBatches, Source, rank_batches
from data_shards.sequences import Sequences
from data_shards.shards import open_shards, write_shards
from flamingo import Document, FlamingoError, FlamingoProcessor, Image, Text, Video
from tests.tiny import document, picture, tiny_flamingo


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> FlamingoProcessor:
    """Of a tiny Flamingo over llama."""
    return tiny_flamingo(tmp_path_factory.mktemp("tiny"))[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, processor: FlamingoProcessor) -> MicroBatches:
    """Two sources of three and of five uneven shards, the second from sample 8 on."""
    folder = tmp_path_factory.mktemp("shards")
    sources = []
    for number, name in enumerate(("one", "two")):
        documents = (document(n, n % 3, key=f"{name}{n}") for n in range(11 - 2 * number))
        write_shards(documents, folder / name, max_samples=(4, 2)[number])
        sources.append(Source(name, open_shards(folder / name), share=1 + number, start=8 * number))
    return MicroBatches(sources, Sequences(processor, max_tokens=40, max_media=2), micro_batch=2, seed=0)


def keys(data: MicroBatches, world: int, workers: int, start: int = 0, steps: int = 6) -> list[list[str]]:
    """The keys of every step, put together from all ranks' micro-batches."""
    ranks = [
        [batch["keys"] for batch in
         rank_batches(data, batch=16, start_step=start, steps=steps, rank=rank, world=world, workers=workers)]
        for rank in range(world)
    ]  # fmt: skip
    each = 8 // world
    return [
        [key for number in range(each) for rank in ranks for key in rank[step * each + number]] for step in range(steps)
    ]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_the_global_order_is_the_same_for_any_ranks_and_workers(data: MicroBatches) -> None:
    """Catches samples that depend on who computes them."""
    expected = keys(data, 1, 0)
    for world, workers in ((2, 3), (4, 0), (8, 0), (1, 1), (1, 2), (1, 4)):
        assert keys(data, world, workers) == expected
    assert len({key for step in expected for key in step}) > 11


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_uneven_shards_end_together(data: MicroBatches) -> None:
    """Catches a rank or a worker that runs out of samples before the others, and leaves them waiting."""
    assert [len(source.shards.sizes) for source in data.sources] == [3, 5]
    ranks = [rank_batches(data, batch=16, start_step=0, steps=3, rank=rank, world=2, workers=3) for rank in (0, 1)]
    pairs = list(zip(*ranks, strict=True))
    assert [[key for batch in pair for key in batch["keys"]] for pair in pairs] == [
        data[2 * number]["keys"] + data[2 * number + 1]["keys"] for number in range(12)
    ]


@settings(max_examples=10, deadline=None)
@given(start=st.integers(0, 20), world=st.sampled_from([1, 2, 4, 8]))
def test_resuming_anywhere_continues_identically(data: MicroBatches, start: int, world: int) -> None:
    """Catches a loader with state that a restart loses, also with another number of ranks."""
    expected = [data[number]["keys"] for number in range(8 * start, 8 * start + 8)]
    assert keys(data, world, 0, start=start, steps=1) == [[key for each in expected for key in each]]


def test_what_is_drawn_belongs_to_the_position(data: MicroBatches, processor: FlamingoProcessor) -> None:
    """Catches augmentation by a sample's own number, which would be the same in every run of a mixture."""
    sequences = Sequences(processor, max_tokens=40, max_media=1, leading_space=0.5, flip=0.5)
    drawn = MicroBatches(data.sources, sequences, micro_batch=1, seed=7)
    for position in range(40):
        source, within = drawn.mixture(position)
        place = drawn.orders[source](within)
        document = drawn.sources[source].shards.shards[place.shard].read(place.index)
        expected = sequences.collate([sequences(document, np.random.default_rng([7, position]))])
        found = drawn[position]
        found["pixel_values"] = processor.pixel_settings.normalise(found["pixel_values"])
        assert found["keys"] == [document.key]
        assert all(torch.equal(found[name], expected[name]) for name in ("input_ids", "labels", "pixel_values"))


def test_data_travel_to_workers_that_are_spawned(data: MicroBatches) -> None:
    """Catches open files and caches that cannot be pickled: elsewhere than on Linux workers are not forked."""
    data[3]
    here, there = data[5], pickle.loads(pickle.dumps(data))[5]
    assert here["keys"] == there["keys"] and torch.equal(here["pixel_values"], there["pixel_values"])


def test_a_long_run_takes_no_room(data: MicroBatches) -> None:
    """Catches a list of all that a run will ever read."""
    batches = rank_batches(data, batch=16, start_step=10**8, steps=10**12, rank=3, world=8)
    assert next(batches)["keys"] == data[8 * 10**8 + 3]["keys"]


def test_counts_of_a_source_and_its_epochs(data: MicroBatches) -> None:
    """Catches a source whose epochs are counted by the samples of the mixture, or while it is silent."""
    drawn = [source for number in range(40) for source in data[number]["sources"].tolist()]
    assert data.used(80) == {"one": drawn.count(0), "two": drawn.count(1)}
    assert data.used(8) == {"one": 8, "two": 0}
    assert data.epochs(80) == {"one": drawn.count(0) / 11, "two": drawn.count(1) / 9}


def test_packed_rows_hold_the_same_sequences(data: MicroBatches, processor: FlamingoProcessor) -> None:
    """Catches sequences that packing loses, rows of two sources, and media that go to another row's marks."""
    sequences = Sequences(processor, max_tokens=80, max_media=2, packing=True)
    packed = MicroBatches(data.sources, sequences, micro_batch=8, seed=0)
    plain = MicroBatches(data.sources, Sequences(processor, max_tokens=80, max_media=2), micro_batch=8, seed=0)
    fewer = 0
    for number in range(4):
        rows, each = packed[number], plain[number]
        assert sorted(rows["keys"]) == sorted(each["keys"])
        assert rows["documents"].shape == rows["input_ids"].shape and rows["documents"].shape[1] <= 80
        fewer += len(each["sources"]) - len(rows["sources"])
        tokens = {key: ids[mask == 1] for key, ids, mask in
                  zip(each["keys"], each["input_ids"], each["attention_mask"], strict=True)}  # fmt: skip
        keys_left = iter(rows["keys"])
        for ids, documents, source, media in zip(
            rows["input_ids"], rows["documents"], rows["sources"], rows["media_per_sample"], strict=True
        ):
            assert (ids == processor.image_token_id).sum() == media
            for place in range(1, int(documents.max()) + 1):
                key = next(keys_left)
                assert key.startswith(("one", "two")[source])
                assert torch.equal(ids[documents == place], tokens[key])
    assert fewer > 4


def test_memory_stays_flat_over_fifty_epochs(tmp_path: Path, processor: FlamingoProcessor) -> None:
    """Catches whatever of a sample is kept: its bytes, its pixels, its errors."""
    large = [Document((picture(n, 200), Text("x")), f"d{n}") for n in range(19)]
    write_shards([*large, Document((Image(b"x" * 100_000, "bad.png"), Text("x")), "bad")], tmp_path, max_samples=4)
    data = MicroBatches([Source("s", open_shards(tmp_path))], Sequences(processor), micro_batch=4, seed=0)

    def after(epochs: int, begin: int = 0) -> int:
        for number in range(5 * begin, 5 * epochs):
            data[number]
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1])

    early = after(5)
    assert after(50, 5) <= 1.05 * early


def test_batches_carry_their_tensors_and_sources(data: MicroBatches) -> None:
    """Catches media that do not belong to the batch's marks, and wrong source numbers."""
    for number in range(6):
        batch = data[number]
        assert (batch["input_ids"] == data.sequences.processor.image_token_id).sum(dim=1).tolist() == batch[
            "media_per_sample"
        ].tolist()
        assert len(batch["pixel_values"]) == batch["media_per_sample"].sum()
        assert [("one", "two")[source] for source in batch["sources"]] == [
            key.rstrip("0123456789") for key in batch["keys"]
        ]
        again = data[number]
        assert all(torch.equal(batch[name], again[name]) for name in ("input_ids", "labels", "pixel_values"))


@pytest.mark.parametrize("packing", [False, True])
def test_images_videos_and_texts_share_a_micro_batch(tmp_path: Path, packing: bool) -> None:
    """Catches a mixture whose first batch of media with different numbers of frames ends the run, or whose frames are
    those of another document.
    """
    model, processor = tiny_flamingo(tmp_path, resampler_max_frames=4, packing=packing)
    sources, whole = [], {}
    for number, (name, frames) in enumerate({"images": 1, "pairs": 2, "films": 8, "texts": 0}.items()):
        film = tuple(picture(100 * number + n) for n in range(frames))
        medium = () if not frames else film if frames == 1 else (Video(film),)
        documents = [Document((*medium, Text(f"a text {n}")), f"{name}{n}") for n in range(4)]
        whole |= {each.key: each for each in documents}
        write_shards(iter(documents), tmp_path / name)
        sources.append(Source(name, open_shards(tmp_path / name)))
    sequences = Sequences(processor, max_tokens=80, flip=0.5, packing=packing)
    data = MicroBatches(sources, sequences, micro_batch=8, seed=0)
    lengths = set()
    for batch in rank_batches(data, batch=8, start_step=0, steps=4, workers=1):
        assert not batch.pop("faults")
        media = [medium for key in batch.pop("keys") for medium in whole[key].media]
        frames = processor.media_frames(media)
        assert frames is not None and torch.equal(batch["media_frames"], frames)
        assert batch["pixel_values"].shape == (int(frames.sum()), 1, 3, 16, 16)
        pixels = processor.pixels(media)
        flipped = torch.stack(
            [(batch["pixel_values"] - each).flatten(1).abs().amax(1) for each in (pixels, pixels.flip(4))]
        )
        assert flipped.amin(0).max() < 1e-6
        lengths |= set(frames.tolist())
        batch.pop("sources")
        model.train()(**batch).loss.backward()
    assert lengths == {1, 2, 8}
    embeddings = model.resampler.frame_embeddings
    assert embeddings is not None and embeddings.grad is not None and embeddings.grad.abs().amin() > 0


def test_uneven_batches_are_refused(data: MicroBatches) -> None:
    """Catches ranks of uneven work, which hang."""
    with pytest.raises(FlamingoError, match=r"batch=6: expected a multiple .* 2 · 2"):
        rank_batches(data, batch=6, start_step=0, steps=1, world=2)


def test_windows_keep_media_with_their_text(processor: FlamingoProcessor) -> None:
    """Catches windows that cut a medium from its text, drop the lead always, or never reach the end."""
    sequences = Sequences(processor, max_tokens=500, max_media=2)
    whole = document(7, 5, lead=True)
    texts = set()
    for seed in range(40):
        encoding = sequences(whole, np.random.default_rng(seed))
        assert len(encoding.media) == 2
        assert (
            all(segment in whole.media for segment in encoding.media) and encoding.text in processor.encode(whole).text
        )
        texts.add(encoding.text)
    assert len(texts) == 4
    ends = [sequences(whole, np.random.default_rng(seed)).input_ids[-1] for seed in range(40)]
    assert 0 < ends.count(processor.tokenizer.eos_token_id) < 40


def test_only_the_end_of_a_document_is_its_end(processor: FlamingoProcessor) -> None:
    """Catches a supervised end-of-sequence where a window ends on text that equals the document's last."""
    repeats = Document(tuple(part for n in range(4) for part in (picture(n), Text("same"))))
    for seed in range(20):
        encoding = Sequences(processor, max_media=1)(repeats, np.random.default_rng(seed))
        at_end = encoding.media[0] == repeats.media[-1]
        assert (encoding.input_ids[-1] == processor.tokenizer.eos_token_id) == at_end


def test_an_error_in_a_worker_is_one_line(tmp_path: Path, processor: FlamingoProcessor) -> None:
    """Catches the worker's whole traceback in the message."""
    write_shards([Document((Text("x", supervised=False),), "silent")], tmp_path)
    data = MicroBatches([Source("s", open_shards(tmp_path))], Sequences(processor), micro_batch=1, seed=0)
    found = r"^data: source s has no usable sample .*; no supervised token: 128 \(silent of \S*\.tar\); the first: "
    with pytest.raises(FlamingoError, match=found):
        next(rank_batches(data, batch=1, start_step=0, steps=1, workers=1))


def test_long_text_is_cut_with_its_media_and_unsupervised_is_an_error(processor: FlamingoProcessor) -> None:
    """Catches marks without media after cutting, and sequences that train nothing."""
    sequences = Sequences(processor, max_tokens=12, max_media=9)
    encoding = sequences(document(7, 5), np.random.default_rng(0))
    assert len(encoding.input_ids) == len(encoding.labels) == 12
    assert encoding.input_ids.count(processor.image_token_id) == len(encoding.media) < 5
    with pytest.raises(FlamingoError, match="document silent: no token"):
        sequences(Document((Text("x" * 30, supervised=False),), "silent"), np.random.default_rng(0))


def test_texts_belong_to_the_next_medium_with_a_probability(processor: FlamingoProcessor) -> None:
    """Catches a draw that never happens or always does, moves the window, or does not reach what tokens may see."""
    usual, drawn = Sequences(processor, max_media=2), Sequences(processor, max_media=2, next_media=0.5)
    whole = document(7, 5, lead=True)
    pairs = [[make(whole, np.random.default_rng(seed)) for make in (usual, drawn)] for seed in range(40)]
    assert all(one.input_ids == other.input_ids and not one.next_media for one, other in pairs)
    assert 8 < sum(other.next_media for _, other in pairs) < 32
    batch = drawn.collate([next(pair for pair in pairs if pair[1].next_media)[1], pairs[0][0]])
    assert batch["media_last"][0, 1] == 1, "the text before the first medium sees it"
    ids = batch["input_ids"][1]
    assert torch.equal(batch["media_last"][1], (ids == processor.image_token_id).cumsum(0))
    assert "media_last" not in usual.collate([pairs[0][0]])
    with pytest.raises(FlamingoError, match=r"next_media=2: expected a probability"):
        Sequences(processor, next_media=2)
