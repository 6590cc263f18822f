"""Models of others give the scores and texts that they give by hand, and open_flamingo's those of ours."""

from __future__ import annotations

import inspect
import sys

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    IdeficsProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil

from flamingo import FlamingoError, FlamingoProcessor, Video
from icl_eval import run
from icl_eval.engine import Answerer, Chunk, Engine, Ladder, Query
from icl_eval.peers import open_flamingo
from icl_eval.peers.image_text_to_text import ImageTextToText
from icl_eval.peers.open_flamingo import OpenFlamingo
from icl_eval.saved import read_results
from tests.peer import pair_of
from tests.tiny import picture, tokenizer

ANSWERS = ("cat", "do", "a b c")


class Drawer:
    """Pictures, and from 100 on videos."""

    def name(self, index):
        return str(index)

    def media(self, indices):
        return [picture(i) if i < 100 else Video((picture(i), picture(i + 1))) for i in indices]


def ladders(count=3, after=(0, 3, 3)):
    """Prompts of different lengths, one without media, asked after none and after three demonstrations."""
    made = []
    for number in range(count):
        shown = tuple(Chunk((10 * number + place, f"la{'ha' * number} so")) for place in range(3))
        media = ((), (number + 1,), (number + 50, "or", number + 51))
        queries = tuple(
            Query(shots, Chunk((*own, "a:")), ANSWERS) for shots, own in zip(after, media[: len(after)], strict=True)
        )
        made.append(Ladder(shown, queries, str(number)))
    return made


def equal(found, expected, atol=1e-5):
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=atol, rtol=0)


@pytest.mark.parametrize("peer", [OpenFlamingo, ImageTextToText])
@pytest.mark.parametrize("method", ["rank", "generate"])
def test_peers_are_asked_as_the_engine_is(peer, method):
    """An argument that the engine takes and a peer does not: an evaluation of that peer would stop there."""
    signatures = [
        [(each.name, each.kind, each.default) for each in inspect.signature(getattr(kind, method)).parameters.values()]
        for kind in (Answerer, Engine, peer)
    ]
    assert signatures[0] == signatures[1] == signatures[2]


# -- open_flamingo -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["opt", "gpt_neox", "llama", "mpt"])
def test_scores_of_open_flamingo_are_ours(family):
    """A cache that is not cut back between candidates, a candidate that sees an earlier picture, rows mixed up."""
    pair = pair_of(family, dtype=torch.float32)
    made = ladders()
    expected = Engine(pair.ours, pair.processor).rank(Drawer(), made)
    assert np.ptp(expected) > 1
    assert np.abs(np.subtract(expected[0], expected[1])).max() > 1e-2  # pictures and demonstrations matter
    for batch_size in (1, 8):
        equal(OpenFlamingo(pair.peer, pair.processor, batch_size=batch_size).rank(Drawer(), made), expected)


@pytest.mark.parametrize("beams", [1, 3])
def test_open_flamingo_says_what_ours_says(beams):
    """Images of one row given to another, a prompt that is decoded with its answer."""
    pair = pair_of("llama")
    options = {"max_new_tokens": 6, "beams": beams}
    expected = Engine(pair.ours, pair.processor).generate(Drawer(), ladders(), **options)
    assert len({text for row in expected for text in row}) >= 4
    assert OpenFlamingo(pair.peer, pair.processor).generate(Drawer(), ladders(), **options) == expected


def test_open_flamingo_ranks_the_best_by_means():
    """`normalise` or `top_k` taken and not heeded."""
    pair = pair_of("opt")
    options = {"normalise": "mean", "top_k": 2}
    expected = Engine(pair.ours, pair.processor).rank(Drawer(), ladders(), **options)
    found = OpenFlamingo(pair.peer, pair.processor).rank(Drawer(), ladders(), **options)
    equal(found, expected)
    assert all(np.isneginf(scores).sum() == 1 for row in found for scores in row)


def test_progress_counts_queries():
    """Progress that counts batches, or nothing."""
    pair, counts = pair_of("opt"), []
    OpenFlamingo(pair.peer, pair.processor).rank(Drawer(), ladders(), progress=counts.append)
    OpenFlamingo(pair.peer, pair.processor).generate(Drawer(), ladders(), max_new_tokens=1, progress=counts.append)
    assert sum(counts) == 2 * 9


def test_what_open_flamingo_cannot_be_asked():
    """Two frames read as two images; an answer whose first letter joins the prompt; batches of nothing."""
    from data_shards.glyphs.words import build_tokenizer

    pair = pair_of("opt")
    peer = OpenFlamingo(pair.peer, pair.processor)
    video = Ladder((), (Query(0, Chunk((100, "a:")), ANSWERS),), "v")
    with pytest.raises(FlamingoError, match="images, not videos"):
        peer.rank(Drawer(), [video])
    merging = build_tokenizer()
    merging.add_special_tokens({"additional_special_tokens": ["<image>", "<|endofchunk|>"]})
    peer.processor = FlamingoProcessor(pair.processor.image_processor, merging)
    with pytest.raises(FlamingoError, match=r"v: the tokens of the prompt 'b' are no prefix .* answer 'bado'"):
        peer.rank(Drawer(), [Ladder((), (Query(0, Chunk((1, "b")), ("ado",)),), "v")])
    with pytest.raises(FlamingoError, match="batch_size: 0"):
        OpenFlamingo(pair.peer, pair.processor, batch_size=0)


def test_a_missing_open_flamingo_is_named(monkeypatch):
    """A bare ImportError about a package that no extra installs."""
    monkeypatch.setitem(sys.modules, "open_flamingo.src", None)
    monkeypatch.delitem(sys.modules, "open_flamingo.src.flamingo", raising=False)
    open_flamingo.part.cache_clear()
    with pytest.raises(FlamingoError, match=r"open_flamingo cannot be imported .*pip install --no-deps open_flamingo"):
        open_flamingo.part("flamingo")
    open_flamingo.part.cache_clear()


# -- models of transformers --------------------------------------------------------------------------------------------

SMALL = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, image_size=16, patch_size=8)
LANGUAGE = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, bos_token_id=1, eos_token_id=2,
    pad_token_id=0, initializer_range=0.3,
)  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}:{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %} {{ c['text'] }}{% endif %}{% endfor %}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def idefics(tmp_path_factory):
    """A base model: tiny Idefics, saved and loaded by the Auto classes."""
    torch.manual_seed(0)
    words = tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<fake_token_around_image>", "<image>"]})
    vision = {**SMALL, "embed_dim": 32, "num_hidden_layers": 1}
    perceiver = dict(resampler_n_latents=4, resampler_depth=1, resampler_n_heads=2, resampler_head_dim=8)
    config = IdeficsConfig(
        vocab_size=len(words), cross_layer_interval=1, alpha_initializer="ones", use_resampler=True,
        vision_config=vision, perceiver_config={"use_resampler": True, **perceiver}, **LANGUAGE,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("idefics")
    IdeficsForVisionText2Text(config).save_pretrained(folder)
    IdeficsProcessor(IdeficsImageProcessorPil(image_size=16), words).save_pretrained(folder)
    return ImageTextToText.from_pretrained(folder)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """A chat model: tiny LLaVA; each image stands in its text as four tokens."""
    torch.manual_seed(0)
    words = tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<image>", "<end>"]})
    config = LlavaConfig(
        text_config=LlamaConfig(vocab_size=len(words), **LANGUAGE),
        vision_config=CLIPVisionConfig(**SMALL, num_hidden_layers=2),
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )
    folder, size = tmp_path_factory.mktemp("llava"), {"height": 16, "width": 16}
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessorPil(size=size, crop_size=size), words, patch_size=8, num_additional_image_tokens=1,
        vision_feature_select_strategy="default", chat_template=TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip
    return ImageTextToText.from_pretrained(folder)


def by_hand(logits, ids, count):
    """Log-likelihood of the last `count` of `ids`, by `logits` (T, V)."""
    likelihoods = logits.log_softmax(-1)
    return float(sum(likelihoods[place - 1, ids[place]] for place in range(len(ids) - count, len(ids))))


def pixels(*indices):
    """(N, C, H, W) as CLIP wants them: 16 × 16 pixels need no resizing."""
    size = {"height": 16, "width": 16}
    images = [ImageTextToText._parts(Drawer(), Chunk((index,)))[0] for index in indices]
    return CLIPImageProcessorPil(size=size, crop_size=size)(images, return_tensors="pt")["pixel_values"]


def test_scores_of_idefics_are_those_of_a_forward_by_hand(idefics):
    """A wrong mask of images, an answer that is not closed, tokens of the prompt that are scored."""
    words, answers = idefics.processor.tokenizer, ("cat", "do")
    made = Ladder((Chunk((3, "la so")),), (Query(1, Chunk((5, "a:")), answers),), "x")
    assert idefics.form == "plain"
    mark = ["<fake_token_around_image>", "<image>", "<fake_token_around_image>"]
    expected = []
    for answer in answers:
        letters = [*"laĠso", "Ċ"], [*"a:", *answer, "Ċ"]
        ids = words.convert_tokens_to_ids(["<s>", *mark, *letters[0], *mark, *letters[1]])
        second = 1 + len(mark) + len(letters[0]) + 1  # place of the second <image>
        seen = torch.zeros(1, len(ids), 2, dtype=torch.long)
        seen[0, 2:second, 0] = 1
        seen[0, second:, 1] = 1
        with torch.inference_mode():
            logits = idefics.model(
                input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                pixel_values=pixels(3, 5)[None], image_attention_mask=seen,
            ).logits[0]  # fmt: skip
        expected.append(by_hand(logits, ids, len(answer) + 1))
    found = idefics.rank(Drawer(), [made])[0][0]
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
    assert abs(found[0] - found[1]) > 0.1
    other = Ladder(made.demonstrations, (Query(1, Chunk((6, "a:")), answers),), "x")
    assert np.abs(idefics.rank(Drawer(), [other])[0][0] - found).max() > 1e-3  # the picture matters
    mean = idefics.rank(Drawer(), [made], normalise="mean", top_k=1)[0][0]
    kept = int(np.argmax(np.divide(expected, [4, 3])))
    assert mean[kept] == pytest.approx(expected[kept] / (4, 3)[kept], abs=1e-5) and np.isneginf(mean[1 - kept])


def chat_by_hand(llava, prompt, answer, end):
    """The log-likelihood of an answer and its end after a prompt over the pictures 3 and 5."""
    ids = llava.processor.tokenizer(f"{prompt}{answer}{end}").input_ids
    with torch.inference_mode():
        logits = llava.model(input_ids=torch.tensor([ids]), pixel_values=pixels(3, 5)).logits[0]
    return by_hand(logits, ids, len(answer) + 2)


def test_scores_of_a_chat_model_are_those_of_a_forward_by_hand(llava):
    """Demonstrations lost by the template, its line break behind the end scored as if it were the answer's."""
    assert llava.form == "chat"
    made = Ladder((Chunk((3, "la so")),), (Query(1, Chunk((5, "a:")), ANSWERS),), "x")
    prompt = f"user:{'<image>' * 4} la so\n{'<image>' * 4} a:<end>\nassistant: "
    expected = [chat_by_hand(llava, prompt, answer, "<end>") for answer in ANSWERS]
    np.testing.assert_allclose(llava.rank(Drawer(), [made])[0][0], expected, atol=1e-5, rtol=0)
    other = Ladder(made.demonstrations, (Query(1, Chunk((6, "a:")), ANSWERS),), "x")
    assert np.abs(llava.rank(Drawer(), [other])[0][0] - expected).max() > 1e-3


IMAGES_FIRST = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""As that of llava-1.5"""


def test_a_chat_template_does_not_move_images(llava, monkeypatch):
    """LLaVA's templates put all images before all texts: demonstrations that say nothing about any of them."""
    monkeypatch.setattr(llava.processor, "chat_template", IMAGES_FIRST)
    peer = ImageTextToText(llava.model, llava.processor)
    made = Ladder((Chunk((3, "la so")),), (Query(1, Chunk((5, "a:")), ANSWERS),), "x")
    prompt = f"USER: {'<image>' * 4}la so\n{'<image>' * 4}a: ASSISTANT: "
    expected = [chat_by_hand(llava, prompt, answer, " ") for answer in ANSWERS]
    np.testing.assert_allclose(peer.rank(Drawer(), [made])[0][0], expected, atol=1e-5, rtol=0)
    monkeypatch.delattr(llava.processor, "image_token")
    with pytest.raises(FlamingoError, match="form: chat, but LlavaProcessor names no image_token"):
        ImageTextToText(llava.model, llava.processor)


@pytest.mark.parametrize("template", [TEMPLATE, "<s>" + TEMPLATE])
def test_a_chat_has_one_beginning(llava, template, monkeypatch):
    """Two beginnings, the template's and the tokenizer's, which no model was trained on; or none."""
    backend = llava.processor.tokenizer.backend_tokenizer
    monkeypatch.setattr(llava.processor, "chat_template", template)
    adds_beginning = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    before, backend.post_processor = backend.post_processor, adds_beginning
    try:
        peer = ImageTextToText(llava.model, llava.processor)
        ids = []
        peer._each(Drawer(), ladders(1), lambda asked: ids.append(peer._inputs(asked, None)["input_ids"][0]), None)
    finally:
        backend.post_processor = before
    assert [(int(each[0]), each.tolist().count(1)) for each in ids] == [(1, 1)] * 3


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", ["idefics", "llava"])
def test_models_of_transformers_say_what_they_say_by_hand(name, beams, request):
    """A prompt that is returned with its answer, queries mixed up."""
    peer = request.getfixturevalue(name)
    found = peer.generate(Drawer(), ladders(2), max_new_tokens=6, beams=beams)
    options = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False}
    expected = []

    def say(asked):
        inputs = peer._inputs(asked, None)
        ids = peer.model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
        text = peer.processor.tokenizer.decode(ids, skip_special_tokens=True)
        expected.append((text.split("\n")[0] if name == "idefics" else text).strip())

    peer._each(Drawer(), ladders(2), say, None)
    assert [text for row in found for text in row] == expected
    assert len(set(expected)) > 1


def test_plain_generation_stops_where_the_answer_is_closed(idefics, monkeypatch):
    """A base model that goes on with a demonstration of its own, for as many tokens as it may."""
    end = idefics.processor.tokenizer.convert_tokens_to_ids("Ċ")
    made, generate = [], idefics.model.generate
    monkeypatch.setattr(idefics.model, "generate", lambda **given: (made.append(generate(**given)), made[-1])[1])
    steps = iter(range(20))

    def close_after_two(module, given, logits):
        if next(steps) == 2:
            logits[..., end] = logits.max() + 1

    handle = idefics.model.lm_head.register_forward_hook(close_after_two)
    try:
        [[text]] = idefics.generate(Drawer(), [Ladder((), (Query(0, Chunk((3, "a:"))),), "x")], max_new_tokens=20)
    finally:
        handle.remove()
    assert made[0][0, -1] == end and len(text) == 2


def test_what_models_of_transformers_cannot_be_asked(idefics, llava):
    """A video shown as its first frame, a chat with a base model, an answer that nothing closes."""
    video = Ladder((), (Query(0, Chunk((100, "a:")), ANSWERS),), "v")
    with pytest.raises(FlamingoError, match="found a video"):
        llava.rank(Drawer(), [video])
    marked = Ladder((), (Query(0, Chunk((1, "what is <image>?")), ANSWERS),), "m")
    for peer in (idefics, llava):
        with pytest.raises(FlamingoError, match="m: a text holds <image>, which would be read as an image"):
            peer.rank(Drawer(), [marked])
    with pytest.raises(FlamingoError, match="IdeficsProcessor has no chat template"):
        ImageTextToText(idefics.model, idefics.processor, form="chat")
    with pytest.raises(FlamingoError, match="end: ''"):
        ImageTextToText(idefics.model, idefics.processor, end="")
    with pytest.raises(FlamingoError, match="CLIPImageProcessorPil names no image_token"):
        ImageTextToText(llava.model, llava.processor.image_processor, form="plain")


def test_the_form_of_a_chat_model_can_be_plain(llava):
    """Images of a plain prompt lost, or not expanded to their tokens."""
    peer = ImageTextToText(llava.model, llava.processor, form="plain", end="\n\n")
    made = Ladder((Chunk((3, "la so")),), (Query(1, Chunk((5, "a:")), ANSWERS),), "x")
    expected = []
    for answer in ANSWERS:
        ids = llava.processor.tokenizer(f"{'<image>' * 4}la so\n\n{'<image>' * 4}a:{answer}\n\n").input_ids
        with torch.inference_mode():
            logits = llava.model(input_ids=torch.tensor([ids]), pixel_values=pixels(3, 5)).logits[0]
        expected.append(by_hand(logits, ids, len(answer) + 2))
    np.testing.assert_allclose(peer.rank(Drawer(), [made])[0][0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["idefics", "llava"])
def test_the_command_line_takes_models_of_transformers(name, request, tmp_path, monkeypatch, capsys):
    """Catches a command that takes Flamingos alone, and a folder that nothing can load ending in a traceback."""
    peer = request.getfixturevalue(name)
    command = ["flamingo-eval", "--task", "digits_2way", "--shots", "0,1", "--queries", "3", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [*command, "--model", peer.model.name_or_path, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="0"):
        run.main()
    assert set(read_results(tmp_path / "out").cells) == {("digits_2way", shots, None) for shots in (0, 1)}
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    monkeypatch.setattr(sys, "argv", [*command, "--model", str(tmp_path), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="2"):
        run.main()
    assert "neither a Flamingo nor another model of transformers" in capsys.readouterr().err
