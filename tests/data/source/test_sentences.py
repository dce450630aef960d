import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekindle.data.source.sentences import split_sentences


def sentences(text):
    return [text[begin:end] for begin, end in split_sentences(text)]


# Letters, spaces and everything the expressions look for, often enough to meet.
TRICKY = st.text(alphabet=st.sampled_from("aA. !?…\n\t\"')(]“”。」->*1)é中\u2028"), max_size=60)


@given(st.one_of(TRICKY, st.text(max_size=60)))
def test_spans_cover_every_character_that_is_not_space_once_and_in_order(text):
    covered = [i for begin, end in split_sentences(text) for i in range(begin, end)]
    assert covered == sorted(set(covered))
    assert {i for i, c in enumerate(text) if not c.isspace()} <= set(covered)


@given(TRICKY)
def test_spans_are_neither_empty_nor_begin_or_end_with_space(text):
    for sentence in sentences(text):
        assert sentence
        assert sentence == sentence.strip()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" \n\n\t ", []),
        ("No end", ["No end"]),
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("Really?! Yes...", ["Really?!", "Yes..."]),
        ("He said “Go.” Then he went.", ["He said “Go.”", "Then he went."]),
        ("(It is so.) [Next] one. 3 more.", ["(It is so.)", "[Next] one.", "3 more."]),
        (
            "Mr. Smith met Dr. J. R. Jones. They ate.",
            ["Mr. Smith met Dr. J. R. Jones.", "They ate."],
        ),
        ("Units, e.g. Metres, i.e. SI. Fine.", ["Units, e.g. Metres, i.e. SI.", "Fine."]),
        ("The U.S. Senate sat. It rose.", ["The U.S. Senate sat.", "It rose."]),
        ("It costs 3.14 or so. x.y is code.", ["It costs 3.14 or so. x.y is code."]),
        ("Wait... what? No.", ["Wait... what?", "No."]),
        ("A heading\n\nA paragraph\nof two lines.", ["A heading", "A paragraph\nof two lines."]),
        ("Ends here.\nGoes on.", ["Ends here.", "Goes on."]),
        ("Options:\n  - one\n  - two", ["Options:", "- one", "- two"]),
        ("Use it:\n>>> f(1)\n2", ["Use it:", ">>> f(1)\n2"]),
        ("C'est fini. Éric part. être", ["C'est fini.", "Éric part. être"]),
        ("你好。再见！Bye.", ["你好。", "再见！", "Bye."]),
    ],
)
def test_examples(text, expected):
    assert sentences(text) == expected


@pytest.mark.parametrize("unit", [".", "\n ", '."', " ", ". ", "a.", "(", "。", "\n- "])
def test_time_is_linear_on_text_made_to_backtrack(unit):
    started = time.process_time()
    split_sentences(unit * 100_000)
    assert time.process_time() - started < 5  # quadratic time would take minutes
