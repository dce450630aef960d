"""Texts of tests in records: what is found, and what is not."""

import random
import tracemalloc

import pytest

from rekindle.data.source import held_texts
from rekindle.data.source.held_texts import HeldCounts, HeldTexts, find_held, normalised
from rekindle.data.source.rows import read_rows
from testlib.corpora import SHARED

WORDS = [f"w{number}" for number in range(3000)]
TWENTY = (
    "the old ferryman told us that no boat had crossed this wide grey river since the bridge was "
    "built here"
)


FREQUENCIES = [1 / (rank + 2.7) for rank in range(len(WORDS))]


def prose(random, length):
    """Words as frequent as those of a language (Zipf's law)."""
    return random.choices(WORDS, FREQUENCIES, k=length)


def kind(texts, *record):
    found = HeldTexts(texts).find(*record)
    return found and found.kind


@pytest.mark.parametrize("seed", range(20))
def test_no_text_survives_within_a_record_whatever_its_case_and_punctuation(seed):
    rng = random.Random(seed)
    texts = [prose(rng, rng.randint(8, 40)) for _ in range(50)]
    held = HeldTexts(" ".join(text) for text in texts)
    for text in texts:
        dressed = "".join(
            rng.choice([w, w.upper(), f'"{w}"']) + rng.choice([" ", ", ", "\n", " - ", "... "])
            for w in text
        )
        record = f"{' '.join(prose(rng, 30))} {dressed} {' '.join(prose(rng, 30))}"
        assert held.find(record).kind == "exact"


@pytest.mark.parametrize("place", range(20))
def test_a_word_edited_left_out_or_put_in_is_forgiven_wherever_it_is(place):
    words = TWENTY.split()
    assert len(words) == 20
    for there in (["other"], [], [words[place], "really"]):
        record = " ".join(["Indeed:", *words[:place], *there, *words[place + 1 :], "- he said."])
        expected = "exact" if len(there) == 2 and place == 19 else "near"
        assert kind([TWENTY], record.upper()) == expected


def test_one_word_in_five_makes_another_text():
    words = TWENTY.split()
    for place in (3, 8, 13, 17):
        words[place] = "other"
    assert kind([TWENTY], " ".join(words)) is None
    words[17] = TWENTY.split()[17]
    assert kind([TWENTY], " ".join(words)) == "near"


@pytest.mark.parametrize("seed", range(20))
def test_no_record_without_a_text_is_left_out(seed):
    rng = random.Random(seed)
    texts = [" ".join(prose(rng, rng.randint(8, 30))) for _ in range(100)]
    records = [" ".join(prose(rng, 200)) for _ in range(100)]
    assert find_held(texts, records) == HeldCounts(0, 0)


def test_what_stands_far_apart_is_no_text():
    """A long record has all phrases of a text somewhere."""
    words = TWENTY.split()
    apart = [" ".join(words[at : at + 4]) + " and so on for a while" * 3 for at in range(0, 20, 4)]
    assert kind([TWENTY], ". ".join(apart)) is None
    assert kind([TWENTY], " ".join(reversed([" ".join(words[:10]), " ".join(words[10:])]))) is None


def test_a_short_text_is_a_whole_record_or_sentence():
    for record in ("Not good!", "I saw it. Not good. I left.", "A film.\n\nnot good\n\nThe end."):
        assert kind(["not good"], record) == "exact"
    for record in ("It is not good.", "not good at all", "It is not. Good!"):
        assert kind(["not good"], record) is None
    seven = "what is the date of the day"
    assert kind([seven], f"I ask: {seven}") is None
    assert kind([f"{seven} before"], f"I ask: {seven} before") == "exact"
    assert kind(["what's the date"], "What 's the date?") == "exact"


def test_a_record_shorter_than_the_texts_has_sentences_and_lines_too():
    for record in ("Great movie. Bad", "Bad!\nGreat movie"):
        assert kind(["great movie"], record) == "exact"
    assert kind(["great movie"], "Great movie bad") is None


def test_three_words_that_recur_in_text_and_record_take_neither_time_nor_memory():
    text, record = "0 " * 60 + "1 2 3", "0 " * 60_000 + "1"
    tracemalloc.start()
    assert kind([text, TWENTY], f"{record} {TWENTY.replace('ferryman', 'sailor')}") == "near"
    assert tracemalloc.get_traced_memory()[1] < 60 << 20
    tracemalloc.stop()


def test_questions_that_differ_in_a_name_are_others(monkeypatch):
    monkeypatch.setattr(held_texts, "MAX_SHARING", 4)
    ask = "how many bags may i take with me on board of a flight to {}".format
    texts = [ask(f"city{number}") for number in range(6)]
    assert kind(texts, ask("rome")) is None
    assert kind(texts, ask("city3") + " please") == "exact"
    assert kind(texts[:4], ask("rome")) == "near"
    assert kind([ask("").strip()] * 9 + texts, ask("rome")) == "exact"  # the rarest lead to it


def test_every_field_of_a_record_is_looked_at_and_exact_ones_come_first():
    near = TWENTY.replace("ferryman", "sailor")
    assert kind([TWENTY, "a b c d e f g h"], near, "x a b c d e f g h y") == "exact"
    assert kind([TWENTY, "a b c d e f g h"], "a b c d", "e f g h") is None
    assert find_held([TWENTY], [("other", near), TWENTY, "neither"]) == HeldCounts(exact=1, near=1)


def test_order_and_repetitions_of_texts_make_no_difference():
    texts = ["One, two!", "three four", "five", "..."]
    one, other = HeldTexts(texts), HeldTexts([*texts[::-1], "ONE TWO"])
    assert (one.digest, one.size) == (other.digest, 3)
    assert HeldTexts(texts[:2]).digest != one.digest


def test_text_without_a_letter_is_held_nowhere():
    assert kind(["...", "", "?!"], "") is None
    assert kind(["...", "", "?!"], "what ?!") is None


def test_a_text_with_another_number_is_another():
    text = TWENTY.replace("ferryman", "51 men")
    assert kind([text], text.replace("bridge", "dam")) == "near"
    assert kind([text], text.replace("51", "52")) is None


def test_other_scripts():
    assert normalised("ÉCOLE, ﬁn\tdes cours") == "école fin des cours"
    assert normalised("E\u0301cole") == "école"
    long = "长江是亚洲第一长河也是世界第三长河"
    assert kind([long], f"众所周知，{long}。") == "exact"
    assert kind([long], "长江很长。") is None
    assert kind(["非常好的"], "这部电影是非常好的一部作品") is None
    assert kind(["非常好的"], "电影。非常好的。") == "exact"


def test_combining_marks_belong_to_the_word():
    assert normalised("मेरी किताब") == "मेरी किताब"
    assert normalised("İstanbul ภาษาไทย").split()[0] == "i̇stanbul"
    words = "मेरी किताब यहाँ है और वह भी कल मिली"
    assert kind([words], f"सुनो {words} थी") == "exact"
    assert kind([words], f"सुनो {words.replace('ी', 'ा')} थी") is None


def test_of_real_text_hardly_anything_holds_real_questions():
    wiki, trec = SHARED / "corpus/wiki_heldout.jsonl", SHARED / "cls/trec6_test.jsonl"
    if not (wiki.exists() and trec.exists()):
        pytest.skip(f"the real corpora are not here: {wiki}, {trec}")
    questions, records = ([row["text"] for row in read_rows(str(p))] for p in (trec, wiki))
    assert sum(find_held(questions, records)) <= 0.01 * len(records)
    among = [
        f"{record[:2000]}\n{question}" for record, question in zip(records, questions, strict=False)
    ]
    assert find_held(questions, among) == HeldCounts(exact=len(among))
