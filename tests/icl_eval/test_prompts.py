"""Templates of tasks filled in: the exact text that a model reads."""

from __future__ import annotations

import dataclasses

import pytest

from flamingo import FlamingoError
from flamingo.document import Document, Text
from flamingo.processing import render
from icl_eval.datasets import Example
from icl_eval.engine import Chunk
from icl_eval.prompts import Prompt, Shown, Template, fingerprint, prompt_document, rendered
from icl_eval.sources import Pool
from icl_eval.tasks import Task
from tests.icl_eval.made import Made
from tests.tiny import tiny_flamingo

TASK = Task("made", 1, "made", "test", "", (2,), mode="generate", file="f")
FIRST = Example("one", ("1-a",), "What?", ("this", "that"), "k", fields={"text": "a {answer} <b>"})
SECOND = Example("two", ("2-a",), "Who?", ("he",), "l")


def made(template: str, *shown: Example, query: Example = SECOND, separator: str = "", pictured: bool = True):
    task = dataclasses.replace(TASK, template=template, separator=separator)
    pool = Pool(task, Made((), (FIRST, SECOND)))
    prompt = Prompt(tuple(Shown(e, e.answers[0], e if pictured else None) for e in shown), query, query)
    return pool, prompt, Template(task, pool).chunks(prompt)


@pytest.mark.parametrize(
    "template, separator, expected",
    [
        (
            "<image>Question:{question} Short answer:{answer}",
            "\n",
            "<image>Question:What? Short answer:this<|endofchunk|>\n<image>Question:Who? Short answer:",
        ),
        ("<image>Output:{answer}", "\n", "<image>Output:this<|endofchunk|>\n<image>Output:"),
        (
            "<image>User: {question} Please answer in short words. GPT:<answer>{answer}",
            "",
            (
                "<image>User: What? Please answer in short words. GPT:<answer>this<|endofchunk|><image>User: Who? "
                "Please answer in short words. GPT:<answer>"
            ),
        ),
        ("<image>{question} {answer}.", "", "<image>What? this.<|endofchunk|><image>Who? "),
    ],
)
def test_prompts_are_those_of_the_papers(template, separator, expected, tmp_path):
    """A mark too many or too few, a separator within the answer, a document that reads otherwise than the engine."""
    pool, _, chunks = made(template, FIRST, separator=separator)
    assert rendered(chunks) == expected
    assert render(prompt_document(pool, chunks))[0] == expected
    _, processor = tiny_flamingo(tmp_path)
    assert processor.encode(prompt_document(pool, chunks), bos=False).text == expected


def test_demonstrations_may_be_text_alone():
    """Marks without media at 0 shots."""
    _, _, chunks = made("<image>Output:{answer}", FIRST, FIRST, separator="\n", pictured=False)
    assert rendered(chunks) == "Output:this<|endofchunk|>\n" * 2 + "<image>Output:"


def test_fields_are_filled_in_once():
    """Braces in an example's own text that are filled in too, or a missing field left as it is."""
    _, _, chunks = made("<image>'{text}' {answer}", query=FIRST)
    assert rendered(chunks) == "<image>'a {answer} <b>' "
    with pytest.raises(FlamingoError, match=r"f: template: \{text\}, but example 'two' of made has question"):
        made("<image>'{text}' {answer}")


def test_a_field_after_the_answer_is_refused():
    """`{text}` read by the model as these six letters, in every demonstration."""
    with pytest.raises(FlamingoError, match=r"f: template: \{text\} after \{answer\}"):
        made("<image>{question} {answer} ({text})", query=FIRST)


def test_media_stand_where_the_template_has_them():
    """Media in another order, all in the first place, or more than there are places."""
    several = Example("three", ("3-a", "4-a"), "Q", ("x",))
    pool, _, chunks = made("<image>{question}<image>:{answer}", query=several)
    first, second = pool.indices(several)
    assert chunks == (Chunk((first, "Q", second, ":")),)
    _, _, chunks = made("<image>{question}:{answer}", query=several)
    assert rendered(chunks) == "<image><image>Q:"
    _, _, chunks = made("<image>{question}:{answer}", query=Example("none", (), "Q", ("x",)))
    assert rendered(chunks) == "Q:"
    with pytest.raises(FlamingoError, match="f: template: 2 times <image>, but example 'two' of made has 1 media"):
        made("<image><image>{question}{answer}")


def test_fingerprints_tell_prompts_apart():
    """Equal texts over other pictures, or other texts over the same, with one fingerprint."""
    prompts = [
        made("<image>{answer}", FIRST, query=query, pictured=pictured, separator=separator)[1:]
        for query in (FIRST, SECOND)
        for pictured in (True, False)
        for separator in ("", " ")
    ]
    assert len({fingerprint(chunks, prompt) for prompt, chunks in prompts}) == 8


def test_white_space_behind_the_end_of_a_chunk_opens_none():
    """A second mark between the separator and the next picture."""
    text = Document((Text("a<|endofchunk|>\n"), Made((), ()).medium("1-a"), Text("b")))
    assert render(text)[0] == "a<|endofchunk|>\n<image>b<|endofchunk|>"
