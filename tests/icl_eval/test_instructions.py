"""Held-out instructions: from MIMIC-IT's files to ranked and free answers, controls, and models side by side."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from flamingo import FlamingoError, Video
from flamingo.backbones import add_tokens
from flamingo.instructions import ANSWER, instruction_document
from icl_eval import evaluate, write_report
from icl_eval.comparison import comparison_table, examples
from icl_eval.evaluation import TIE
from icl_eval.instructions import (
    Item,
    _cells,
    evaluate_instructions,
    load_instructions,
    shown_under,
)
from tests.icl_eval.conftest import lively_flamingo
from tests.tiny import picture
from tests.train.runs import forked

KINDS = {"LA_NAMING": ("naming", 1), "SD_SAME": ("same", 2), "VST_STORY": ("story", 3)}
ANSWERS = {"naming": ["bado", "nili", "pu"], "same": ["yes", "no"], "story": ["a b c", "a c b", "b", "c"]}
QUERIES = {"naming": 5, "same": 4, "story": 3}
CONTEXTS = 2


def write_set(folder):
    """A held-out set of three datasets, each query with two contexts; every instruction has pictures of its own."""
    groups: dict[str, dict] = {"IMAGE_TEXT_IN_CONTEXT": {}, "IMAGE_TEXT": {}}
    kinds, candidates, seed = {}, {}, 0
    for name, (kind, pictures) in KINDS.items():
        instructions, images, contexts = {}, {}, {}
        for number in range(QUERIES[kind]):
            ids = [f"{name}_{number}_{role}" for role in ("q", "c1", "c2")]
            for place, key in enumerate(ids):
                shown = [f"{key}_{n}" for n in range(pictures - (pictures == 3 and number == 0))]
                for each in shown:
                    seed += 1
                    images[each] = base64.b64encode(picture(seed).data).decode()
                answer = ANSWERS[kind][(number + place) % len(ANSWERS[kind])]
                question = f"what{' ever' * (number % 3)}?"
                instructions[key] = {"instruction": question, "answer": answer, "image_ids": shown, "rel_ins_ids": []}
            contexts[ids[0]], kinds[ids[0]], candidates[ids[0]] = ids[1:], kind, ANSWERS[kind]
        (folder / f"{name}_instructions.json").write_text(json.dumps({"meta": {}, "data": instructions}))
        (folder / f"{name}.json").write_text(json.dumps(images))
        (folder / f"{name}_train.json").write_text(json.dumps(contexts))
        groups["IMAGE_TEXT" if kind == "same" else "IMAGE_TEXT_IN_CONTEXT"][name] = {
            "mimicit_path": f"{name}_instructions.json",
            "images_path": f"{name}.json",
            "train_config_path": f"{name}_train.json",
        }
    (folder / "mixture.yaml").write_text(yaml.safe_dump(groups, sort_keys=False))
    (folder / "kinds.json").write_text(json.dumps(kinds))
    (folder / "candidates.json").write_text(json.dumps(candidates))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("held_out")
    write_set(place)
    return place


@pytest.fixture(scope="module")
def items(folder):
    return load_instructions(folder)


@pytest.fixture(scope="module")
def untuned(tmp_path_factory):
    """A model that does not know `<answer>`."""
    return lively_flamingo(tmp_path_factory.mktemp("untuned"), "lfm2")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A model that does."""
    model, processor = lively_flamingo(tmp_path_factory.mktemp("tuned"), "llama")
    add_tokens(model, processor, [ANSWER])
    return model, processor


@pytest.fixture(scope="module")
def runs(untuned, tuned, items):
    torch.set_num_threads(1)
    options = {"shots": (0, 1, 2), "max_new_tokens": 4}
    return {
        "untuned": evaluate_instructions(*untuned, items, **options),
        "tuned": evaluate_instructions(*tuned, items, **options, batch_size=8),
    }


# -- the held-out set --------------------------------------------------------------------------------------------------


def test_a_held_out_set_is_read_as_it_is_written(items, folder):
    """Contexts without media of their own, in another order, or a pair that is two media instead of two frames."""
    by_id = {item.id: item for item in items}
    assert Counter(item.kind for item in items) == QUERIES
    naming, same, story = (by_id[f"{name}_1_q"] for name in KINDS)
    for item in (naming, same, story):
        assert [turn.key for turn in item.contexts] == [item.id.replace("_q", role) for role in ("_c1", "_c2")]
        assert item.candidates == tuple(ANSWERS[item.kind])
        assert item.candidates[item.target] == item.query.answer == ANSWERS[item.kind][1]
        shown = [medium for turn in (*item.contexts, item.query) for medium in turn.media]
        frames = [frame.data for m in shown for frame in (m.frames if isinstance(m, Video) else (m,))]
        assert len(set(frames)) == len(frames)
    assert [len(turn.media) for turn in (*naming.contexts, *same.contexts, *story.contexts)] == [1, 1, 1, 1, 3, 3]
    assert isinstance(same.query.media[0], Video)
    assert len(same.query.media[0].frames) == 2
    assert not list(folder.glob("**/*.index*")), "an index was left in the folder"


def change(folder, name, edit):
    path = folder / name
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "file, edit, message",
    [
        ("kinds.json", lambda c: c.pop("SD_SAME_1_q"), "kinds.json: expected SD_SAME_1_q, a query in"),
        ("kinds.json", lambda c: c.update(x=1), "kinds.json: x: expected a text, found 1"),
        ("candidates.json", lambda c: c.pop("SD_SAME_1_q"), "candidates.json: expected SD_SAME_1_q"),
        (
            "candidates.json",
            lambda c: c.update(SD_SAME_1_q=["yes", "si"]),
            "SD_SAME_1_q: expected different answers, 'no'",
        ),
        (
            "candidates.json",
            lambda c: c.update(SD_SAME_1_q=["no", "no"]),
            "SD_SAME_1_q: expected different answers, 'no'",
        ),
        ("candidates.json", lambda c: c.update(SD_SAME_1_q="no"), "SD_SAME_1_q: expected a list of texts, found 'no'"),
        ("SD_SAME_train.json", lambda c: c["SD_SAME_0_q"].append("gone"), "SD_SAME_0_q and its contexts: "),
        ("SD_SAME_instructions.json", lambda c: c["data"]["SD_SAME_2_c2"].update(answer=""), "SD_SAME_2_q and its con"),
        ("LA_NAMING_train.json", lambda c: c.update(SD_SAME_0_q=[]), "LA_NAMING_instructions.json: SD_SAME_0_q and"),
    ],
)
def test_a_fault_in_the_set_is_named_and_not_skipped(tmp_path, file, edit, message):
    """An item that is left out in silence: two models would be compared on different sets."""
    write_set(tmp_path)
    change(tmp_path, file, edit)
    with pytest.raises(FlamingoError) as raised:
        load_instructions(tmp_path)
    assert message in str(raised.value)


def test_missing_files_and_contexts_are_named(tmp_path):
    """A traceback of pathlib; or rel_ins_ids taken for the nested contexts of a held-out set."""
    with pytest.raises(FlamingoError, match=r"kinds.json: expected a JSON object"):
        load_instructions(tmp_path)
    write_set(tmp_path)
    mixture = yaml.safe_load((tmp_path / "mixture.yaml").read_text())
    del mixture["IMAGE_TEXT"]["SD_SAME"]["train_config_path"]
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump(mixture))
    with pytest.raises(FlamingoError, match=r"SD_SAME: expected train_config_path"):
        load_instructions(tmp_path)


# -- scores ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def plainly(model, processor, item, shots, media, **form):
    """Each candidate in the document that tuning would train on, in one forward."""
    scores = []
    for candidate in item.candidates:
        turns = [*item.contexts[:shots], replace(item.query, media=media, answer=None)]
        start = len(processor.encode(instruction_document(turns, **form)).input_ids)
        turns[-1] = replace(turns[-1], answer=candidate)
        encoding = processor.encode(instruction_document(turns, **form))
        latents = torch.cat([model.encode_media(processor.pixels([medium])) for medium in encoding.media])
        logits = model(input_ids=torch.tensor([encoding.input_ids]), media_latents=latents).logits[0].log_softmax(-1)
        scores.append(
            sum(float(logits[at - 1, encoding.input_ids[at]]) for at in range(start, len(encoding.input_ids)))
        )
    return scores


@pytest.mark.parametrize("name, mark", [("untuned", False), ("tuned", True)])
def test_candidates_are_scored_in_the_documents_of_tuning(name, mark, runs, items, request):
    """A prompt in another form than that of training, without `<answer>`, or with another turn's media."""
    model, processor = request.getfixturevalue(name)
    by_id = {item.id: item for item in items}
    assert runs[name].settings["answer_mark"] is mark
    for kind in ("naming", "same", "story"):
        for shots, control in ((0, None), (2, None), (1, "random_query")):
            outcome = runs[name].cell(kind, shots, control).outcomes[1]
            item, shown = by_id[outcome.id], by_id[outcome.shown]
            expected = plainly(model, processor, item, shots, shown.query.media, answer_mark=mark)
            np.testing.assert_allclose(outcome.scores, expected, atol=1e-5, rtol=0)
            assert outcome.contexts == tuple(turn.key for turn in item.contexts[:shots])
            assert outcome.right == item.query.answer
            best = np.flatnonzero(np.array(expected) >= max(expected) - TIE)
            assert outcome.prediction == best[0]


def test_spaced_prompts_are_those_of_early_models(untuned, items):
    """A space before the answer that stands in the contexts but not before the candidates."""
    found = evaluate_instructions(*untuned, items[:2], shots=(1,), controls=(), generate=False, spaced=True)
    expected = plainly(*untuned, items[0], 1, items[0].query.media, answer_mark=False, spaced=True)
    np.testing.assert_allclose(found.cell(items[0].kind, 1).outcomes[0].scores, expected, atol=1e-5, rtol=0)


def predictions(results):
    return [
        {**vars(outcome), "shots": cell.shots, "control": cell.control}
        for cell in results.cells
        for outcome in cell.outcomes
    ]


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one["scores"], other["scores"], atol=1e-5, rtol=0)
        assert {**one, "scores": ()} == {**other, "scores": ()}


def test_neither_batches_nor_ranks_change_anything(untuned, runs, items):
    """Ranks that ask the same items, results in the order of ranks, an answer that depends on its neighbours."""
    options = {"shots": (0, 1, 2), "max_new_tokens": 4}
    expected = predictions(runs["untuned"])
    for batch_size in (1, 3):
        found = evaluate_instructions(*untuned, items, **options, batch_size=batch_size)
        assert_same(predictions(found), expected)
    ranks = forked(lambda _: evaluate_instructions(*untuned, items, **options), world=2)
    for code, found in ranks:
        assert code == 0
        assert not isinstance(found, str), found
        assert_same(predictions(found), expected)
        assert found.summary() == runs["untuned"].summary()


def test_gates_at_zero_sees_no_medium_and_leaves_the_model_as_it_was(untuned, items, runs):
    """A control that is run with open gates, or a model that goes on with shut ones."""
    model, _ = untuned
    gates = {name: float(value) for name, value in model.gates().items()}
    item = items[0]
    other = replace(item, id="other", query=replace(item.query, media=items[1].query.media, key="other"))
    model.train()
    found = evaluate_instructions(*untuned, [item, other], shots=(2,), controls=("gates_at_zero",), generate=False)
    assert model.training
    model.eval()
    assert {name: float(value) for name, value in model.gates().items()} == gates
    shut = found.cell(item.kind, 2, "gates_at_zero").outcomes
    opened = found.cell(item.kind, 2).outcomes
    np.testing.assert_allclose(shut[0].scores, shut[1].scores, atol=1e-5, rtol=0)
    assert np.abs(np.subtract(opened[0].scores, opened[1].scores)).max() > 1e-3


def test_a_broken_model_has_no_score(untuned, items, monkeypatch):
    """NaN that counts as the first candidate."""
    monkeypatch.setattr("icl_eval.engine.Engine.rank", lambda *_, **__: [[np.array([np.nan, 0.0])]] * len(items))
    with pytest.raises(FlamingoError, match=rf"instructions: {items[0].id} after 1 examples: log-likelihoods"):
        evaluate_instructions(*untuned, items, shots=(1,), controls=(), generate=False)


def test_a_random_query_says_nothing_about_the_answer(items):
    """A control that never shows an item its own media: of two answers, the wrong one would be told."""
    alike = [Item(str(number), "same", (), items[0].query, ("yes", "no")) for number in range(10)]
    shown = [
        (number, int(shown_under("random_query", each, alike, seed).id))
        for seed in range(400)
        for number, each in enumerate(alike)
    ]
    counts = np.zeros((10, 10))
    for pair in shown:
        counts[pair] += 1
    assert abs(counts.trace() / counts.sum() - 0.1) < 0.02
    assert counts.min() > 15  # of 40 on average
    again = shown_under("random_query", alike[3], list(alike), 0)
    assert again is shown_under("random_query", alike[3], alike, 0)
    assert shown_under(None, alike[3], alike, 0) is alike[3]


# -- figures and files -------------------------------------------------------------------------------------------------


def test_the_mean_of_kinds_counts_kinds_alike(runs):
    """Kinds with more items that weigh more, or an interval of all items at once."""
    outcome = runs["tuned"].cell("same", 0).outcomes[0]
    made = [
        replace(outcome, kind=kind, target=0, prediction=int(number >= right), answer=answer, candidates=("a b", "c"))
        for kind, count, right, answer in (("one", 300, 300, "A  b."), ("two", 20, 0, "x y z a b"))
        for number in range(count)
    ]
    one, two, mean = _cells((0, None), made, ("one", "two"), 0)
    assert (one.accuracy.value, two.accuracy.value, mean.accuracy.value) == (1.0, 0.0, 0.5)
    assert mean.accuracy.interval == (0.5, 0.5)  # within each kind nothing varies
    assert (one.exact.value, two.exact.value, mean.exact.value) == (1.0, 0.0, 0.5)
    assert (one.words.value, two.words.value, mean.words.value, mean.right_words) == (2.0, 5.0, 3.5, 2.0)
    assert mean.chance == 0.5
    # Two kinds alike, drawn anew each by itself: drawn as one, the interval would be wider by √2.
    half = [replace(outcome, kind=kind, target=0, prediction=n % 2) for kind in ("one", "two") for n in range(100)]
    low, high = _cells((0, None), half, ("one", "two"), 0)[2].accuracy.interval
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt((0.25 / 100 + 0.25 / 100) / 4), rel=0.12)


def test_results_are_kept_whole(runs, tmp_path):
    """Predictions without the free answers, controls that are missing, a summary with numbers as keys."""
    results = runs["tuned"]
    path = results.save(tmp_path, "instructions_tuned")
    content = json.loads(path.read_text())
    assert content["schema"] == 1
    assert content["kinds"] == QUERIES
    assert content["settings"]["answer_mark"] is True
    assert content["facts"]["versions"]["torch"] == torch.__version__
    cells = {(cell["kind"], cell["shots"], cell["control"]): cell for cell in content["cells"]}
    assert len(cells) == 4 * 3 * 3
    assert "exact" in cells[None, 2, None]
    assert "exact" not in cells[None, 2, "random_query"]
    lines = [json.loads(line) for line in (tmp_path / content["predictions"]).read_text().splitlines()]
    assert len(lines) == sum(QUERIES.values()) * 3 * 3
    assert all((line["answer"] is None) == (line["control"] is not None) for line in lines)
    plain = [line for line in lines if (line["shots"], line["control"], line["kind"]) == (1, None, "story")]
    right = np.mean([line["prediction"] == line["target"] for line in plain])
    assert cells["story", 1, None]["accuracy"] == right
    assert results.summary() == {str(n): cells[None, n, None]["accuracy"] for n in (0, 1, 2)}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"shots": (0, 3)}, r"shots: \[0, 3\], expected 0 to 2, the examples of LA_NAMING_0_q"),
        ({"shots": (0,), "control_shots": (4,)}, r"control_shots: \[4\], expected 0 to 2"),
        ({"controls": ("labels_permuted",)}, "controls: 'labels_permuted', expected some of gates_at_zero"),
        ({"items": []}, "0 items"),
    ],
)
def test_nonsense_is_refused_before_the_model_is_asked(untuned, items, options, message):
    """Cells of fewer examples than they say, found out after minutes or never."""
    options = {"shots": (0,), "items": items, **options}
    with pytest.raises(FlamingoError, match=message):
        evaluate_instructions(*untuned, options.pop("items"), **options)


# -- side by side ------------------------------------------------------------------------------------------------------


def test_models_stand_side_by_side_in_the_terminal(runs):
    """A row of one model under the name of the other, or a kind that is missing."""
    text = io.StringIO()
    Console(file=text, width=140).print(comparison_table(runs))
    lines = text.getvalue().splitlines()
    for kind in (*QUERIES, None):
        at = next(n for n, line in enumerate(lines) if line.strip().startswith(kind or "mean of kinds"))
        for line, model in ((lines[at], "untuned"), (lines[at + 2], "tuned")):
            words = line.split()
            assert model in words
            expected = [f"{runs[model].cell(kind, shots).accuracy.value:.3f}" for shots in (0, 1, 2)]
            assert words[words.index(model) + 1 :][:3] == expected
    assert "gates at zero" in text.getvalue()
    assert "exact match" in text.getvalue()


def test_results_of_other_items_are_not_compared(runs, untuned, items):
    """Two numbers beside one another that are of different sets."""
    other = evaluate_instructions(*untuned, items[:-1], shots=(0, 1, 2), controls=(), generate=False)
    with pytest.raises(FlamingoError, match="tuned was asked otherwise than untuned"):
        comparison_table({"untuned": runs["untuned"], "tuned": other})


def test_examples_are_of_all_kinds_with_both_answers(runs, items):
    """Items of one kind alone, or an answer shown beside another item's pictures."""
    found = examples(runs, items)
    assert len(found) == 6
    assert {each.about.split(",")[0] for each in found} == set(QUERIES)
    by_id = {item.id: item for item in items}
    for each in found:
        kind, key, shots = each.about.split(", ")
        item, count = by_id[key], int(shots.split()[0])
        assert each.query.question == item.query.question
        assert len(each.contexts) == count
        for model, answer, right in each.answers:
            (outcome,) = (o for o in runs[model].cell(kind, count).outcomes if o.id == key)
            assert (answer, right) == (outcome.answer, outcome.prediction == outcome.target)


def test_the_report_gains_a_section_and_is_as_before_without(runs, items, untuned, tmp_path):
    """A section without pictures or numbers; or a quickstart without tuning whose page changes."""
    results = evaluate(*untuned, ["digits_2way"], shots=[1], queries=2)
    before = write_report(tmp_path / "before.html", results=results).read_text()
    page = write_report(tmp_path / "report.html", results=results, instructions=runs, items=items).read_text()
    assert "Instructions" not in before
    assert 'asked"' not in before, "a card; the style is there either way"
    assert page.count('class="card asked"') == 6
    for model, each in runs.items():
        assert f"<dt>{model}</dt>" in page
        for shots in (0, 1, 2):
            assert f"{each.cell(None, shots).accuracy.value:.3f}" in page
    assert page.count("accuracy against examples") == 4
    for example in examples(runs, items):
        for turn in (*example.contexts, example.query):
            assert turn.pictures
            assert all(base64.b64encode(each).decode() in page for each in turn.pictures)
    assert not any(mark in page for mark in ("<script", "http:", "https:", 'src="/'))
