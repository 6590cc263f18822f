"""What published evaluations keep of a generated answer."""

import pytest

from icl_eval.metrics.kept import KEEPS


@pytest.mark.parametrize(
    ("rule", "said", "kept"),
    [
        ("", "a dogOutput: a cat", "a dogOutput: a cat"),
        ("first_caption", 'a "dog"Output: a cat', "a dog"),
        ("short_answer", "red, I think", "red"),
        ("short_answer", "1,000 Question: what", "1,000 "),
        ("first_line", "\nSTOP. No\nQuestion", "STOP. No"),
        ("first_line", "7. Because", "7"),
        ("first_line", ".5", ".5"),
        ("first_number", "It is 12, not 3", "12"),
        ("first_number", "none\n4", ""),
    ],
)
def test_an_answer_ends_where_the_published_evaluation_cuts_it(rule: str, said: str, kept: str) -> None:
    """A generation scored together with the next question that the model went on to write."""
    assert KEEPS[rule](said) == kept
