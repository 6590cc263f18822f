"""Captions as words: the Penn Treebank tokenizer's habits, and agreement with it on real captions."""

from __future__ import annotations

import json
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from icl_eval.metrics.tokenizer import DROPPED, tokenize

GOLDEN = "coco_caption_golden"


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ('A dog, a cat; and "two" birds: ok!', "a dog a cat and two birds ok"),
        ("It isn't the man's, they'll can't", "it is n't the man 's they 'll ca n't"),
        ("It isn’t the man’s “dog”", "it is n't the man 's dog"),
        ("dogs' bowls, 'quoted' words, o'clock, O'Brien", "dogs bowls quoted words o'clock o'brien"),
        ("you cannot, gonna wanna gotta 'tis y'all", "you can not gon na wan na got ta 't is y' all"),
        ("On St. Mark's at 5 p.m. in the U.S. today.", "on st. mark 's at 5 p.m. in the u.s. today"),
        ("no. 5 is no. But J. Doe in D. The end", "no. 5 is no but j. doe in d the end"),
        ("a twin-hulled boat - and/or a half- eaten pie", "a twin-hulled boat and/or a half eaten pie"),
        ("boat.The end..a wow...yes", "boat.the end a wow yes"),
        ("red,black-and-white yellow,green", "red,black-and-white yellow green"),
        ("$5.00 50% 3:30pm 1,000 12\" 5'4 1950's '90s", "$ 5.00 50 % 3:30 pm 1,000 12 5 4 1950 's '90s"),
        ("man,2 dogs 11th 50s 2x4 2nd,3rd", "man ,2 dogs 11th 50s 2x4 2nd ,3 rd"),
        ("(a) [b] {c} :)", "-lrb- a -rrb- -lsb- b -rsb- -lcb- c -rcb- :-rrb-"),
        ("what?! no!!! why?", "what ?! no !!! why"),
        ("½ cup – £3 … AT&T a & b", "1/2 cup # 3 at&t a & b"),
        ("a👍b x👨\u200d👩y ❤\ufe0f zero\u200bwidth so\xadft", "a b x y ❤ zero width soft"),
        ("cafe\u0301 e\u0301te\u0301's £five", "cafe\u0301 e\u0301te\u0301 's # five"),
        ("  two\n lines\t here ", "two lines here"),
        ("", ""),
    ],
)
def test_captions_become_the_words_of_the_penn_treebank_tokenizer(caption: str, words: str) -> None:
    """One of its habits missed: every figure of captions then differs from the published ones by a little."""
    assert tokenize(caption) == words


def test_every_reference_becomes_one_of_the_tokenised_file(real_data: Path) -> None:
    """A rule that real captions need: plain lower-casing and dropping punctuation gives 3,953 of 4,005."""
    raw = json.loads((real_data / GOLDEN / "raw_refs_4_of_5.json").read_text())
    tokenised = json.loads((real_data / GOLDEN / "refs_and_hyp_ptb_tokenised.json").read_text())
    known = {reference for item in tokenised for reference in item["refs"]}
    references = [reference for several in raw.values() for reference in several]
    missed = [reference for reference in references if tokenize(reference) not in known]
    assert len(references) == 4005
    assert not missed


def test_questions_and_answers_as_the_java_tokenizer_splits_them(real_data: Path, tmp_path: Path) -> None:
    """A rule fitted to COCO's captions that fails on other text."""
    package = find_spec("pycocoevalcap")
    if shutil.which("java") is None or package is None:
        pytest.skip("the tokenizer to compare with needs Java and pycocoevalcap")
    folder = real_data / "textvqa_val"
    questions = json.loads((folder / "val_questions_vqa_format.json").read_text())["questions"]
    annotations = json.loads((folder / "val_annotations_vqa_format.json").read_text())["annotations"]
    answers = {answer["answer"] for annotation in annotations for answer in annotation["answers"]}
    lines = [" ".join(text.split()) for text in [*(each["question"] for each in questions), *sorted(answers)]]
    (tmp_path / "lines").write_text("\n".join(lines), encoding="utf-8")
    jar = Path(package.submodule_search_locations[0]) / "tokenizer" / "stanford-corenlp-3.4.1.jar"
    program = ["java", "-Dfile.encoding=UTF-8", "-cp", jar, "edu.stanford.nlp.process.PTBTokenizer"]
    options = ["-preserveLines", "-lowerCase", tmp_path / "lines"]
    expected = subprocess.run([*program, *options], capture_output=True, check=True, timeout=120).stdout.decode()
    rows = zip(lines, expected.splitlines(), strict=True)
    wrong = [
        line for line, row in rows if [word for word in row.split() if word not in DROPPED] != tokenize(line).split()
    ]
    assert not wrong
