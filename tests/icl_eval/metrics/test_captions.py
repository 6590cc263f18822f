"""CIDEr, BLEU, ROUGE-L and METEOR against published figures and against pycocoevalcap."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from flamingo import FlamingoError
from icl_eval.metrics import METRICS
from icl_eval.metrics.captions import bleu, cider, meteor, prepare_captions, rouge_l

GOLDEN = "coco_caption_golden"
WORDS = "a a a the the dog cat sits on of red two".split()


@pytest.fixture(scope="module")
def golden(real_data: Path) -> list[dict]:
    return json.loads((real_data / GOLDEN / "refs_and_hyp_ptb_tokenised.json").read_text())


def split(captions):
    return [caption.split() for caption in captions]


def made(seed: int, pictures: int = 40) -> tuple[list[list[str]], list[list[list[str]]]]:
    """Captions of few words, so that many n-grams repeat and match; some of one word or none."""
    rng = np.random.default_rng(seed)

    def caption(least):
        return rng.choice(WORDS, size=rng.integers(least, 9)).tolist()

    candidates = [caption(0) for _ in range(pictures)]
    return candidates, [[caption(1) for _ in range(rng.integers(1, 6))] for _ in range(pictures)]


def test_the_published_figures_come_out_of_the_tokenised_file(golden: list[dict]) -> None:
    """A formula that is not COCO's: CIDEr without the clip, n-grams weighed once more, BLEU of another length."""
    prepared = prepare_captions(
        [item["test"] for item in golden], [item["refs"] for item in golden], split=str, with_meteor=False
    )
    found = dict(zip(prepared.names, prepared.figures(np.ones((1, len(golden))))[0], strict=True))
    assert found["cider"] == pytest.approx(0.5997905185184199, abs=1e-9)
    assert found["rouge_l"] == pytest.approx(0.39625269, abs=1e-8)
    expected = [0.57939958, 0.40439130, 0.27853639, 0.19082904]  # of pycocoevalcap 1.2
    assert [found[f"bleu_{order}"] for order in (1, 2, 3, 4)] == pytest.approx(expected, abs=1e-8)


def test_vinvl_from_raw_captions_to_cider(real_data: Path, golden: list[dict]) -> None:
    """A tokenizer that scores captions otherwise than COCO's evaluation does: 1.345 with the Java one."""
    said = {
        item["image_id"]: item["caption"]
        for item in json.loads((real_data / GOLDEN / "vinvl_base_hyp.json").read_text())
    }
    predictions = [said[item["image_id"]] for item in golden]
    score = METRICS["cider"].score(predictions, [item["refs"] for item in golden], resamples=200)
    assert score.value == pytest.approx(1.345115, abs=0.002)
    low, high = score.interval
    assert low < score.value < high
    assert 0.05 < high - low < 0.15
    assert score.per_item.mean() == pytest.approx(score.value)
    assert "flamingo-icl ptb" in score.details["tokenizer"]


@pytest.mark.parametrize("seed", range(5))
def test_figures_are_those_of_pycocoevalcap(seed: int) -> None:
    """A case that well-formed captions do not show: no words, one word, equal lengths either side, one reference."""
    pytest.importorskip("pycocoevalcap")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    candidates, references = made(seed)
    wanted = {place: [" ".join(words) for words in several] for place, several in enumerate(references)}
    said = {place: [" ".join(words)] for place, words in enumerate(candidates)}
    assert cider(candidates, references) == pytest.approx(Cider().compute_score(wanted, said)[1], abs=1e-12)
    assert rouge_l(candidates, references) == pytest.approx(Rouge().compute_score(wanted, said)[1], abs=1e-12)
    expected, _ = Bleu(4).compute_score(wanted, said, verbose=0)
    assert bleu(candidates, references)(np.ones((1, len(candidates))))[0] == pytest.approx(expected, abs=1e-12)


def test_bleu_under_weights_is_bleu_of_the_repeated_corpus() -> None:
    """A bootstrap that averages the pictures' own BLEU, or that divides by another number of pictures."""
    candidates, references = made(0, pictures=6)
    weights = np.array([[2.0, 0, 1, 3, 0, 0]])
    repeated = [0, 0, 2, 3, 3, 3]
    expected = bleu([candidates[place] for place in repeated], [references[place] for place in repeated])
    assert bleu(candidates, references)(weights)[0] == pytest.approx(expected(np.ones((1, 6)))[0], abs=1e-12)


def test_cider_of_a_perfect_caption_and_of_a_foreign_one() -> None:
    """A score that is not 10 for a picture whose only reference is repeated, and 0 without a word in common."""
    references = [["a dog sits on the red mat".split()], ["two birds fly over water".split()]]
    assert cider([references[0][0], "men ski".split()], references).tolist() == pytest.approx([10, 0])


def test_meteor_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A figure that is silently missing, or a crash, where there is no Java."""
    monkeypatch.setattr(shutil, "which", lambda _: None)
    score = METRICS["captions"].score(["a dog", "a cat"], [["a dog"], ["the cat"]], resamples=10)
    assert "meteor" not in score.figures
    assert "java" in score.details["meteor"]
    assert "cider" in score.figures


@pytest.mark.slow
def test_meteor_is_the_published_one(golden: list[dict]) -> None:
    """Captions handed to the Java program in another order or form: .195 is published."""
    figure, said = meteor(split(item["test"] for item in golden), [split(item["refs"]) for item in golden])
    if figure is None:
        pytest.skip(said)
    assert figure == pytest.approx(0.195, abs=5e-4)


@pytest.mark.parametrize("targets", [["a dog", ["a cat"]], [["a dog"], []], [["a dog"], [3]]])
def test_references_that_are_no_lists_of_texts_are_refused(targets: list) -> None:
    """A reference given as text and scored letter by letter; a picture without references, which divides by 0."""
    with pytest.raises(FlamingoError, match="target [01] is .* expected a list of texts"):
        METRICS["cider"].score(["a dog", "a cat"], targets)
