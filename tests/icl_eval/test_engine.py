"""Scores with shared prefixes, caches and batches against the plain way: one full forward for each candidate."""

from __future__ import annotations

import dataclasses
import json
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from flamingo import FlamingoError, FlamingoProcessor, Video
from icl_eval import plain
from icl_eval.engine import Chunk, Engine, Ladder, Query, answer_text
from tests.icl_eval.conftest import lively_flamingo
from tests.tiny import picture, tokenizer

NAMES = ("bado", "nili", "pu", "zozozo")  # of four, four, two and six tokens
EQUAL = ("bado", "nili", "pupu", "zozo")


class Noise:
    """Twelve pictures of noise."""

    def name(self, index):
        return f"noise/{index}"

    def media(self, indices):
        return [picture(index) for index in indices]


@pytest.fixture(scope="module")
def pool():
    return Noise()


def ladders(prompt="", names=NAMES):
    """Three ladders with prompts of different lengths, asked after 0, 1 and 3 demonstrations."""
    rng = np.random.default_rng(1)
    made = []
    for number in range(3):
        images = rng.permutation(12)[:4].tolist()
        labels = [names[(number + place) % len(names)] for place in range(3)]
        shown = tuple(Chunk((image, f"{prompt}{label}")) for image, label in zip(images, labels, strict=False))
        asked = ((0, images[3]), (1, images[3]), (3, images[3]), (3, images[0]))
        queries = tuple(Query(after, Chunk((image, prompt)), names) for after, image in asked)
        made.append(Ladder(shown, queries, str(number)))
    return made


@pytest.mark.parametrize("media_attention", ["previous", "all"])
@pytest.mark.parametrize("family", ["lfm2", "llama"])
def test_scores_equal_the_plain_way(family, media_attention, pool, tmp_path):
    """A cache read on wrongly, a candidate that sees another picture than the query's, padding that is not masked."""
    model, processor = lively_flamingo(tmp_path, family, media_attention=media_attention)
    for prompt in ("", "a: "):
        made = ladders(prompt)
        expected = [plain.rank(model, processor, pool, ladder) for ladder in made]
        assert np.ptp(expected[0]) > 1  # scores tell candidates apart,
        assert np.abs(expected[0][2] - expected[0][3]).max() > 1e-2  # and pictures of the query
        for batch_size in (1, 8):  # 8: lengths differ, so caches are joined
            found = Engine(model, processor, batch_size=batch_size).rank(pool, made)
            np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


def test_a_tokenizer_without_a_beginning(pool, tmp_path):
    """Nothing to read before the query at 0 shots: an empty pass, or a cache that is expected and not there."""
    model, processor = lively_flamingo(tmp_path, "llama")
    processor.tokenizer.bos_token = None
    made = ladders(names=EQUAL)
    expected = [plain.rank(model, processor, pool, ladder) for ladder in made]
    np.testing.assert_allclose(Engine(model, processor).rank(pool, made), expected, atol=1e-5, rtol=0)


def test_equal_lengths_share_their_prefix(flamingo, pool, monkeypatch):
    """Demonstrations read again for each shot count: right scores, but twice the time."""
    model, processor = flamingo
    made = ladders(names=EQUAL)
    expected = [plain.rank(model, processor, pool, ladder) for ladder in made]
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


def test_a_cache_that_goes_on_wrongly_is_noticed_in_half_precision(monkeypatch, tmp_path):
    """A tolerance of a hundred roundings, which in bfloat16 is most of what there is."""
    model, processor = lively_flamingo(tmp_path, "llama")
    model.bfloat16()
    assert Engine(model, processor).reads_ahead
    forward = model.forward

    def wrong(**given):
        output = forward(**given)
        if given["past_key_values"] is not None and given["input_ids"].shape[1] > 1:
            output.logits *= 1.3
        return output

    monkeypatch.setattr(model, "forward", wrong)
    assert not Engine(model, processor).reads_ahead


def test_an_lm_without_a_cache_is_refused(monkeypatch, tmp_path):
    """RecurrentGemma, which keeps its states to itself: text-only prompts of which nothing but the end is read."""
    model, processor = lively_flamingo(tmp_path, "llama")
    forward = model.forward

    def without(**given):
        output = forward(**given)
        output.past_key_values = None
        return output

    monkeypatch.setattr(model, "forward", without)
    with pytest.raises(FlamingoError, match="LlamaForCausalLM gives no past_key_values"):
        Engine(model, processor)


def test_mean_divides_by_the_tokens_of_the_answer(flamingo, pool):
    """`normalise: mean` over the longest candidate's length, or over label tokens without the end of chunk."""
    model, processor = flamingo
    made = ladders()
    expected = [plain.rank(model, processor, pool, ladder, normalise="mean") for ladder in made]
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
    with pytest.raises(FlamingoError, match="holds 3 media, but a query alone needs 4"):
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
    assert sum(encoded) == len(set().union(*(each.media for each in made)))


def test_a_prompt_that_is_no_prefix_is_refused(flamingo, pool):
    """A label whose first letter joins the prompt's last token: its likelihood would be of other tokens."""
    from data_shards.glyphs.words import build_tokenizer

    model, processor = flamingo
    merging = build_tokenizer()
    merging.add_special_tokens({"additional_special_tokens": ["<image>", "<|endofchunk|>"]})
    engine = Engine(model, processor)
    engine.processor = FlamingoProcessor(processor.image_processor, merging)
    ladder = ladders("b", names=("ado", "nili"))[0]
    with pytest.raises(FlamingoError, match=r"prompt 'b' are no prefix of those of prompt and answer 'bado'"):
        engine.rank(pool, [ladder])


def test_a_tokenizer_that_joins_chunks_is_refused(flamingo, pool, monkeypatch):
    """Chunks are tokenised alone; where a row of them gives other tokens, the model would be asked something else."""
    engine = Engine(*flamingo)
    tokens = engine.tokens
    monkeypatch.setattr(engine, "tokens", lambda *given: (*tokens(*given)[:1], 5, *tokens(*given)[1:]))
    with pytest.raises(FlamingoError, match=r"0: the tokenizer reads '<image>' differently alone and in a row"):
        engine.rank(pool, ladders()[:1])


def test_borders_of_every_ladder_are_tried(flamingo, pool):
    """Text-only demonstrations, which begin with text, joined to the separator before them: others begin with marks."""
    model, processor = flamingo
    merging = tokenizer()
    backend = json.loads(merging.backend_tokenizer.to_str())
    backend["model"]["vocab"]["Ġs"] = len(backend["model"]["vocab"])
    backend["model"]["merges"] = [["Ġ", "s"]]
    merging = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend)), bos_token="<s>")
    merging.add_special_tokens({"additional_special_tokens": ["<|endofchunk|>", "<image>"]})
    engine = Engine(model, processor)
    engine.processor = FlamingoProcessor(processor.image_processor, merging)
    query = Query(2, Chunk((4, "so:")), ("a", "b"))
    pictured = Ladder(tuple(Chunk((n, "so: a"), " ") for n in range(3)), (dataclasses.replace(query, after=3),), "long")
    text_only = Ladder((Chunk(("so: a",), " "), Chunk(("so: b",), " ")), (query,), "short")
    engine.check_tokens(pictured)
    with pytest.raises(FlamingoError, match="short: the tokenizer reads 'so: b' differently alone and in a row"):
        engine.rank(pool, [pictured, text_only])
    asked = Ladder((Chunk((0, "bado"), " "),), (Query(1, Chunk(("so:",))),), "asked")
    with pytest.raises(FlamingoError, match="asked: the tokenizer reads 'so:' differently"):
        engine.rank(pool, [asked])


def test_borders_that_were_tried_are_not_tried_again(flamingo, monkeypatch):
    """Demonstrations without pictures, all of which are read once more for every query of every depth."""
    engine, read = Engine(*flamingo), []
    encode = engine.processor.encode
    monkeypatch.setattr(
        engine.processor,
        "encode",
        lambda document, **how: (read.append(len(document.segments)), encode(document, **how))[1],
    )

    def ladder(text):
        shown = tuple(Chunk((f"so {number}",), "\n") for number in range(6))
        return Ladder(shown, tuple(Query(after, Chunk((text,))) for after in (0, 2, 4, 6)), text)

    for made, expected in ((ladder("ha"), 6), (ladder("ha"), 0), (ladder("pu"), 1)):
        engine.encode(made, 0)
        read.clear()
        engine.check_tokens(made)
        assert len(read) <= 2 * expected and sum(count > 2 for count in read) == expected


def test_what_cannot_be_asked_names_the_query(flamingo, pool, monkeypatch):
    """No question at all, a question with a mark of its own, or more tokens than there are positions: a traceback."""
    engine = Engine(*flamingo)

    def ladder(*parts):
        return [Ladder((Chunk((1, "bado")),), (Query(1, Chunk(parts), NAMES),), "quiz/7")]

    for ask in (engine.rank, partial(engine.generate, max_new_tokens=4)):
        with pytest.raises(FlamingoError, match="quiz/7: nothing is asked"):
            ask(pool, ladder())
        with pytest.raises(FlamingoError, match="found 2 image tokens but received 1 images .sample key=quiz/7"):
            ask(pool, ladder(2, "what is <image>?"))
    room = len(engine.encode(ladder(2, "what?")[0], 0).pieces[0].ids) + 6 + 7  # <image>what?, zozozo and its end
    monkeypatch.setattr(engine.model.config.text_config, "max_position_embeddings", room)
    engine.rank(pool, ladder(2, "what?"))
    engine.generate(pool, ladder(2, "what?"), max_new_tokens=7)
    monkeypatch.setattr(engine.model.config.text_config, "max_position_embeddings", room - 1)
    with pytest.raises(FlamingoError, match=f"quiz/7: a prompt and its answer of {room} tokens, but the LM has"):
        engine.rank(pool, ladder(2, "what?"))
    with pytest.raises(FlamingoError, match=f"{room} tokens, but the LM has {room - 1} positions"):
        engine.generate(pool, ladder(2, "what?"), max_new_tokens=7)


# -- chunks of any media and texts -------------------------------------------------------------------------------------

QUESTIONS = ("what is it?", "same or not", "tell the whole story", "and then?")
CANDIDATES = (("bado", "nili", "pu"), ("yes", "no"), ("a b c", "a b d", "a", "zozozo"), ("pu",))


class Drawer:
    """Twenty-four media: pictures, and videos of two and of three frames."""

    def name(self, index):
        return f"drawer/{index}"

    def media(self, indices):
        return [self._medium(index) for index in indices]

    @staticmethod
    def _medium(index):
        if index % 4 < 2:
            return picture(index)
        return Video(tuple(picture(100 * index + frame) for frame in range(index % 4)))


def chunk(rng, text):
    """None to three media of different kinds, text before them now and then."""
    media = rng.integers(24, size=rng.integers(4)).tolist()
    lead = (["so: "] if rng.random() < 0.3 else []) if media else []
    return Chunk((*lead, *media, text))


def mixture(count=7, seed=0):
    """Ladders of different questions and examples; some begin alike, every third has a query of other media."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        own = np.random.default_rng(number // 2)  # two begin with the same examples
        examples = tuple(chunk(own, f"{QUESTIONS[own.integers(4)]} {'la' * own.integers(1, 4)}") for _ in range(3))
        kind = int(rng.integers(4))
        afters = [(0, 1, 3), (2,), (3, 0)][number % 3]
        queries = [Query(after, chunk(rng, f"{QUESTIONS[kind]} "), CANDIDATES[kind]) for after in afters]
        made.append(Ladder(examples, tuple(queries), f"mixture/{number}"))
    return made


def assert_close(found, expected, atol):
    assert [len(row) for row in found] == [len(row) for row in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(one, other, atol=atol, rtol=0)


@pytest.mark.parametrize(
    "family, media_attention, precision, atol",
    [
        ("lfm2", "previous", "float", 1e-5),
        ("lfm2", "all", "double", 1e-10),
        ("llama", "all", "float", 1e-5),
        ("llama", "previous", "double", 1e-10),
    ],
)
def test_any_chunks_equal_the_plain_way(family, media_attention, precision, atol, tmp_path):
    """Rows whose caches are joined wrongly, media of other frames mixed up, a query that sees another's media."""
    model, processor = lively_flamingo(tmp_path, family, media_attention=media_attention)
    model = getattr(model, precision)()
    made, drawer = mixture(), Drawer()
    expected = [plain.rank(model, processor, drawer, ladder) for ladder in made]
    for batch_size in (1, 3, 8):
        found = Engine(model, processor, batch_size=batch_size).rank(drawer, made)
        assert_close(found, expected, atol)


def test_rows_of_one_length_may_have_padding(flamingo):
    """Rows of two passes, equally long, of which one is filled up: its padding forgotten."""
    made = [
        Ladder(
            (Chunk((number, first)), Chunk((number + 3, second))),
            (Query(1, Chunk((9, "?")), ("bado",)), Query(2, Chunk((10, question)), ("bado", "pu"))),
            first,
        )
        for number, (first, second, question) in enumerate(
            [("h", "so", "a?"), ("hah", "so", "aa?"), ("ha", "soo", "a?")]
        )
    ]
    expected = [plain.rank(*flamingo, Drawer(), ladder) for ladder in made]
    assert_close(Engine(*flamingo, batch_size=3).rank(Drawer(), made), expected, 1e-5)


@pytest.mark.parametrize("family", ["gemma3", "gpt2", "mpt", "bloom", "opt"])
def test_other_families_join_their_caches(family, tmp_path):
    """Windows of attention shorter than a prompt, learned positions, alibi: each counts padding in a way of its own."""
    model, processor = lively_flamingo(tmp_path, family)
    made, drawer = mixture(5), Drawer()
    expected = [plain.rank(model, processor, drawer, ladder) for ladder in made]
    assert_close(Engine(model, processor, batch_size=8).rank(drawer, made), expected, 2e-5)


@pytest.mark.parametrize("how", [{}, {"beams": 3}, {"beams": 3, "length_penalty": 0.0}])
def test_generations_equal_the_plain_way(flamingo, how):
    """A beam that goes on from another row's cache, a prompt whose last token is read twice, text beyond the end."""
    model, processor = flamingo
    made, drawer = mixture(), Drawer()
    expected = [plain.generate(model, processor, drawer, ladder, max_new_tokens=6, **how) for ladder in made]
    assert len({text for row in expected for text in row}) >= 4
    for batch_size in (1, 3, 8):
        engine = Engine(model, processor, batch_size=batch_size)
        assert engine.generate(drawer, made, max_new_tokens=6, **how) == expected


def test_generation_goes_on_from_all_but_the_last_token(flamingo, monkeypatch):
    """A last token that is read twice, or padding that counts: small models hardly show either in what they say."""
    model, processor = flamingo
    made, drawer, given = mixture(), Drawer(), []
    generate = model.generate
    monkeypatch.setattr(
        model,
        "generate",
        lambda **inputs: (given.append((inputs, inputs["past_key_values"].get_seq_length())), generate(**inputs))[1],
    )
    Engine(model, processor, batch_size=8).generate(drawer, made, max_new_tokens=1)
    rows = []
    for inputs, read in given:
        assert read == inputs["input_ids"].shape[1] - 1
        whole = zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True)
        rows += [[token for token, real in zip(ids, mask, strict=True) if real] for ids, mask in whole]
    documents = [plain.document(drawer, ladder, query) for ladder in made for query in ladder.queries]
    assert sorted(rows) == sorted(processor.encode(each).input_ids for each in documents)


def test_prompts_of_one_token_are_generated_from_by_themselves(pool, monkeypatch, tmp_path):
    """Without a beginning and at 0 shots nothing is read before the query's mark: padding that is read."""
    model, processor = lively_flamingo(tmp_path, "llama")
    processor.tokenizer.bos_token = None
    shown = (Chunk((2, "bado")), Chunk((3, "pu")))
    made = [Ladder(shown, (Query(after, Chunk((1,))),), str(after)) for after in (0, 2, 0)]
    expected = [plain.generate(model, processor, pool, ladder, max_new_tokens=4) for ladder in made]
    rows, generate = [], model.generate
    monkeypatch.setattr(
        model,
        "generate",
        lambda **given: (rows.extend(given["attention_mask"].sum(dim=1).tolist()), generate(**given))[1],
    )
    for some in (made, made[::-1]):
        found = Engine(model, processor, batch_size=8).generate(pool, some, max_new_tokens=4)
        assert found == (expected if some is made else expected[::-1])
    assert sorted(rows) == [1] * 4 + [1 + len("bado") + 1 + 1 + len("pu") + 1 + 1] * 2


@contextmanager
def likely_ends(model):
    """Answers end after none, one, two and more tokens."""
    end = torch.tensor([model.config.end_of_chunk_token_id])
    hook = model.get_output_embeddings().register_forward_hook(
        lambda head, given, logits: logits.index_add(-1, end, torch.ones(*logits.shape[:-1], 1))
    )
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_stops_at_the_end_of_the_chunk(beams, tmp_path):
    """Answers that run on into a next chunk; beams that do not know where they end."""
    model, processor = lively_flamingo(tmp_path, "llama")
    end, how = model.config.end_of_chunk_token_id, {"max_new_tokens": 8, "beams": beams, "length_penalty": 2.0}
    with likely_ends(model):
        found = Engine(model, processor).generate(Drawer(), mixture(), **how)
        assert found == [plain.generate(model, processor, Drawer(), each, **how) for each in mixture()]
    lengths = {len(text) for row in found for text in row}
    assert min(lengths) < 2 and max(lengths) == 8
    assert answer_text(processor, [70, 71, end, 72]) == processor.decode([70, 71])


def test_beams_may_prefer_short_answers(tmp_path):
    """`length_penalty` taken and not heeded."""
    model, processor = lively_flamingo(tmp_path, "llama")
    lengths = []
    with likely_ends(model):
        for penalty in (0.0, 1.0, 3.0):
            how = {"max_new_tokens": 8, "beams": 3, "length_penalty": penalty}
            found = Engine(model, processor).generate(Drawer(), mixture(), **how)
            lengths.append(sum(len(text) for row in found for text in row))
    assert lengths[0] < lengths[1] < lengths[2]


def test_what_ladders_have_in_common_is_read_once(flamingo, monkeypatch):
    """Demonstrations shared by many queries read for each of them; media of one length encoded one by one."""
    model, processor = flamingo
    examples = mixture(1)[0].demonstrations
    made = [
        Ladder(examples, (Query(3, Chunk((number, f"{'ha' * number} ")), ("bado", "pu")),), str(number))
        for number in range(1, 7)
    ]
    engine = Engine(model, processor)
    rows, encoded = [], []
    forward, encode = model.forward, model.encode_media
    monkeypatch.setattr(model, "forward", lambda **given: (rows.append(given["input_ids"].shape), forward(**given))[1])
    monkeypatch.setattr(model, "encode_media", lambda pixels: (encoded.append(pixels.shape[:2]), encode(pixels))[1])
    engine.rank(Drawer(), made)
    longest = max(length for _, length in rows)
    assert [count for count, length in rows if length == longest] == [1]
    needed = set().union(*(ladder.media for ladder in made))
    assert sorted(frames for _, frames in encoded) == sorted({len(m.frames) if isinstance(m, Video) else 1
                                                              for m in Drawer().media(sorted(needed))})  # fmt: skip
    assert sum(count for count, _ in encoded) == len(needed)


def test_questions_of_one_length_share_their_passes(flamingo, monkeypatch):
    """Prompts read one by one because what came before them differs in length."""
    model, processor = flamingo
    made = [
        Ladder((Chunk((n, "ha" * n)),), (Query(1, Chunk((n, "so? ")), ("bado", "pu")),), str(n)) for n in range(1, 7)
    ]
    engine = Engine(model, processor)
    rows = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **given: (rows.append(len(given["input_ids"])), forward(**given))[1])
    engine.rank(Drawer(), made)
    # Six demonstrations; all queries; their candidates, as trees or side by side.
    assert rows == [1] * 6 + [6, 6 if engine.reads_trees else 12]


@pytest.mark.parametrize(
    "arguments, message",
    [({"max_new_tokens": 0}, "max_new_tokens: 0"), ({"max_new_tokens": 2, "beams": 0}, "beams: 0")],
)
def test_generation_refuses_nonsense(flamingo, arguments, message):
    """Settings that transformers would only stumble over."""
    with pytest.raises(FlamingoError, match=f"{message}, expected at least 1"):
        Engine(*flamingo).generate(Drawer(), mixture(1), **arguments)
