"""Scores with shared prefixes, caches and batches against the plain way: one full forward for each candidate."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from flamingo import Document, FlamingoError, FlamingoProcessor, Text
from icl_eval.engine import Engine, Ladder
from icl_eval.sources import Item, Pool
from tests.icl_eval.conftest import lively_flamingo
from tests.tiny import picture

NAMES = ("bado", "nili", "pu", "zozozo")  # of four, four, two and six tokens
EQUAL = ("bado", "nili", "pupu", "zozo")


@pytest.fixture(scope="module")
def pool():
    """Twelve pictures of noise."""
    items = tuple(Item(f"noise/{n}", str(n % 4)) for n in range(12))
    return Pool(items, lambda indices: [picture(index) for index in indices])


def ladders(prompt="", names=NAMES):
    """Three ladders with prompts of different lengths, asked after 0, 1 and 3 demonstrations."""
    rng = np.random.default_rng(1)
    made = []
    for number in range(3):
        images = tuple(rng.permutation(12)[:4].tolist())
        labels = [names[(number + place) % len(names)] for place in range(3)]
        queries = ((0, images[3]), (1, images[3]), (3, images[3]), (3, images[0]))
        texts = tuple(f"{prompt}{label}" for label in labels)
        made.append(Ladder(images[:3], texts, queries, prompt, tuple(f"{prompt}{name}" for name in names), str(number)))
    return made


@torch.no_grad()
def plainly(model, processor, pool, ladder, normalise="sum"):
    """Each candidate appended to its prompt as one document, in one forward without a cache."""
    scores = []
    for count, query in ladder.queries:
        shown = pool.images([*ladder.images[:count], query])
        before = [part for pair in zip(shown, map(Text, ladder.texts[:count]), strict=False) for part in pair]
        prompt = Document((*before, shown[-1], Text(ladder.prompt)), complete=False)
        start = len(processor.encode(prompt).input_ids)
        encodings = [processor.encode(Document((*before, shown[-1], Text(answer)))) for answer in ladder.answers]
        batch = processor.collate(encodings)
        batch.pop("labels")
        likelihood = model(**batch).logits.log_softmax(-1)
        row = []
        for encoding, each in zip(encodings, likelihood, strict=True):
            tokens = torch.tensor(encoding.input_ids[start:])
            picked = each[start - 1 : start - 1 + len(tokens)].gather(1, tokens[:, None])
            row.append(float(picked.sum() if normalise == "sum" else picked.mean()))
        scores.append(row)
    return np.array(scores)


@pytest.mark.parametrize("media_attention", ["previous", "all"])
@pytest.mark.parametrize("family", ["lfm2", "llama"])
def test_scores_equal_the_plain_way(family, media_attention, pool, tmp_path):
    """A cache read on wrongly, a candidate that sees another picture than the query's, padding that is not masked."""
    model, processor = lively_flamingo(tmp_path, family, media_attention=media_attention)
    for prompt in ("", "a: "):
        made = ladders(prompt)
        expected = [plainly(model, processor, pool, ladder) for ladder in made]
        assert np.ptp(expected[0]) > 1  # scores tell candidates apart,
        assert np.abs(expected[0][2] - expected[0][3]).max() > 1e-2  # and pictures of the query
        for batch_size in (1, 8):  # 8: lengths differ, so prompts are read alone and padded
            found = Engine(model, processor, batch_size=batch_size).rank(pool, made)
            np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


def test_a_tokenizer_without_a_beginning(pool, tmp_path):
    """Nothing to read before the query at 0 shots: an empty pass, or a cache that is expected and not there."""
    model, processor = lively_flamingo(tmp_path, "llama")
    processor.tokenizer.bos_token = None
    made = ladders(names=EQUAL)
    expected = [plainly(model, processor, pool, ladder) for ladder in made]
    np.testing.assert_allclose(Engine(model, processor).rank(pool, made), expected, atol=1e-5, rtol=0)


def test_equal_lengths_share_their_prefix(flamingo, pool, monkeypatch):
    """Demonstrations read again for each shot count: right scores, but twice the time."""
    model, processor = flamingo
    made = ladders(names=EQUAL)
    expected = [plainly(model, processor, pool, ladder) for ladder in made]
    engine = Engine(model, processor)
    read = []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda **inputs: (read.append(inputs["input_ids"].shape), forward(**inputs))[1]
    )
    np.testing.assert_allclose(engine.rank(pool, made), expected, atol=1e-5, rtol=0)
    chunk = 1 + 4 + 1  # <image>, four letters, the end
    assert [length for rows, length in read if rows == 3 and length % chunk == 0] == [chunk, 2 * chunk]


def test_long_prompts_split_their_candidates(flamingo, pool, monkeypatch):
    """Candidates read in several groups that are put together in the wrong order."""
    import icl_eval.engine

    model, processor = flamingo
    made = ladders()
    expected = Engine(model, processor).rank(pool, made)
    monkeypatch.setattr(icl_eval.engine, "CACHED_TOKENS", 1)
    np.testing.assert_allclose(Engine(model, processor).rank(pool, made), expected, atol=1e-5, rtol=0)


def test_token_by_token_equals_several_at_once(flamingo, pool):
    """The way that is taken for LMs whose cache goes on by one token only: a picture given to the wrong token."""
    model, processor = flamingo
    made = ladders("a: ", names=EQUAL)
    engine = Engine(model, processor)
    assert engine.reads_ahead
    expected = engine.rank(pool, made)
    engine.reads_ahead = False
    np.testing.assert_allclose(engine.rank(pool, made), expected, atol=1e-5, rtol=0)


def test_a_cache_that_goes_on_wrongly_is_noticed(pool, monkeypatch, tmp_path):
    """LFM2 with a release of transformers that continues its convolution by one token only: quietly wrong scores."""
    from transformers.cache_utils import LinearAttentionLayer

    right = LinearAttentionLayer.update_conv_state
    model, processor = lively_flamingo(tmp_path, "lfm2")
    expected = Engine(model, processor).rank(pool, ladders())

    def forgetful(self, conv_states, state_idx=0, **kwargs):
        self.has_previous_state[state_idx] = False
        return right(self, conv_states, state_idx, **kwargs)

    monkeypatch.setattr(LinearAttentionLayer, "update_conv_state", forgetful)
    engine = Engine(model, processor)
    assert not engine.reads_ahead
    np.testing.assert_allclose(engine.rank(pool, ladders()), expected, atol=1e-5, rtol=0)


def test_mean_divides_by_the_tokens_of_the_answer(flamingo, pool):
    """`normalise: mean` over the longest candidate's length, or over label tokens without the end of chunk."""
    model, processor = flamingo
    made = ladders()
    expected = [plainly(model, processor, pool, ladder, "mean") for ladder in made]
    np.testing.assert_allclose(Engine(model, processor).rank(pool, made, normalise="mean"), expected, atol=1e-5, rtol=0)


def test_a_small_store_gives_the_same_scores(flamingo, pool):
    """Pictures mixed up when the store gives some up for others."""
    model, processor = flamingo
    made = ladders() * 2
    expected = Engine(model, processor).rank(pool, made)
    engine = Engine(model, processor)
    engine.store.capacity = 5
    np.testing.assert_allclose(engine.rank(pool, made), expected, atol=1e-5, rtol=0)
    assert len(engine.store.memory) <= 5
    engine.store.capacity = 3
    with pytest.raises(FlamingoError, match="holds 3 pictures, but a query alone needs 4"):
        engine.rank(pool, made)


def test_a_picture_is_encoded_once_a_run(flamingo, pool, monkeypatch):
    """Demonstrations encoded anew for every query that shows them."""
    model, processor = flamingo
    engine = Engine(model, processor)
    encoded = []
    encode = model.encode_media
    monkeypatch.setattr(model, "encode_media", lambda pixels: (encoded.append(len(pixels)), encode(pixels))[1])
    made = ladders()
    engine.rank(pool, made)
    engine.rank(pool, made)
    assert sum(encoded) == len({image for each in made for image in (*each.images, each.queries[0][1])})


def test_a_prompt_that_is_no_prefix_is_refused(flamingo, pool):
    """A label whose first letter joins the prompt's last token: its likelihood would be of other tokens."""
    from data_shards.glyphs.words import build_tokenizer

    model, processor = flamingo
    merging = build_tokenizer()
    merging.add_special_tokens({"additional_special_tokens": ["<image>", "<|endofchunk|>"]})
    engine = Engine(model, processor)
    engine.processor = FlamingoProcessor(processor.image_processor, merging)
    ladder = dataclasses.replace(ladders("b")[0], answers=("bado", "bnili"))
    with pytest.raises(FlamingoError, match=r"prompt 'b' are no prefix of those of prompt and answer 'bado'"):
        engine.rank(pool, [ladder])


def test_a_tokenizer_that_joins_chunks_is_refused(flamingo, pool, monkeypatch):
    """Chunks are tokenised alone; where a row of them gives other tokens, the model would be asked something else."""
    engine = Engine(*flamingo)
    chunk = engine.chunk
    monkeypatch.setattr(
        engine,
        "chunk",
        lambda text, complete=True: (*chunk(text, complete=complete)[:1], 5, *chunk(text, complete=complete)[1:]),
    )
    with pytest.raises(
        FlamingoError, match=r"0: the tokenizer reads a chunk differently alone and in a row .first at token 2"
    ):
        engine.rank(pool, ladders()[:1])
