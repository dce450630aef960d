"""Find the texts of test files in records: exactly or nearly. Reads no files.

Why: a student that has read the texts it is tested on, taught by an expert that answered them, has
seen the test. Published work looks for long word n-grams: of 13 words (GPT-3, 8 to 13 by the length
of a task's texts), of 8 of which 70 % are shared (PaLM), or counts the words of a text that lie in
shared n-grams, and calls one of 80 % dirty (Llama 2). That suits web pages; a task's texts are
often one short sentence, so here n-grams are short, and must lie close together.

The rule. Words are runs of letters and digits, each with its combining marks, in lower case (NFKC,
case folded), so case, punctuation and white space make no difference: "what's", "what 's" and "what
s" are the same. A character of a script without blanks is a word, and counts as half a one. A
record **holds** a text
- of fewer than LEAST_WORDS words: if the record, or a sentence or line of it, is exactly the text
  (within a sentence so few words are often just a common phrase);
- of others **exactly**: if the text's words appear in the record consecutively;
- of NEAR_WORDS or more **nearly**: if runs of GRAM or more words that both share cover at least
  NEAR_SHARE of the text's words. They must lie in the record as they do in the text, shifted
  against each other by at most a quarter of the text's words, because long records contain all
  common phrases somewhere. One word in fifteen or more that is changed, left out or inserted is
  always forgiven, whatever it is, even a name; but each number of the text must be in the record. A
  text is compared only if three words occur that few of the texts share (or its rarest ones): many
  questions that differ only in a name are different questions. Three words that recur, "0 0 0" in a
  table, do not count (see MAX_PLACE_PAIRS).
A text without a letter or digit is held nowhere.
"""

import hashlib
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import chain
from typing import Literal, NamedTuple

from rekindle.data.source.sentences import split_sentences

RULE = 2  # version of this rule, as a cache records it: raise it when other records would be found
LEAST_WORDS = 8
NEAR_WORDS = 13
GRAM = 3
NEAR_SHARE = 0.8
MAX_SHARING = 64  # if more texts share three words, these do not lead to any of them
# places of three words in a text, times those in a record: if more, they do not count
MAX_PLACE_PAIRS = 4096

Kind = Literal["exact", "near"]
_Gram = tuple[str, ...]

# Thai to Myanmar, Khmer; kana; Han: scripts without blanks between words.
_UNSPACED = "\u0e00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_UNSPACED += "\U00020000-\U0003ffff"
_MARKED = range(0x300, 0x20000)  # where combining marks are found
_UNSPACED_CHARACTER = re.compile(f"[{_UNSPACED}]")


class HeldText(NamedTuple):
    """A text that a record holds: how, and the text's words."""

    kind: Kind
    text: str


class HeldCounts(NamedTuple):
    """How many records hold a text exactly, and how many only nearly."""

    exact: int = 0
    near: int = 0


def normalised(text: str) -> str:
    """Return the words of a text separated by blanks: equal results mean the same text here."""
    return " ".join(_words(text))


def _words(text: str) -> list[str]:
    normal = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return _word().findall(normal.casefold())


@cache
def _word() -> re.Pattern[str]:
    marks = "".join(c for c in map(chr, _MARKED) if unicodedata.category(c).startswith("M"))
    return re.compile(rf"[^\W_{_UNSPACED}](?:[^\W_{_UNSPACED}]|[{marks}])*|[{_UNSPACED}][{marks}]*")


def _length(words: Sequence[str]) -> float:
    return len(words) - sum(map(bool, map(_UNSPACED_CHARACTER.match, words))) / 2


def _grams(words: Sequence[str], size: int = GRAM) -> Iterator[_Gram]:
    return zip(*(words[first:] for first in range(size)), strict=False)


class HeldTexts:
    """Texts that are looked for in records; the module docstring has the rule.

    Memory is used only for these texts. ``size``: how many there are, without repetitions; their
    order makes no difference. ``digest``: their identity.
    """

    def __init__(self, texts: Iterable[str]):
        texts_found = sorted({normalised(text) for text in texts} - {""})
        self.size = len(texts_found)
        self.digest = hashlib.sha256("\n".join(texts_found).encode()).hexdigest()
        words = [text.split(" ") for text in texts_found]
        lengths = [*map(_length, words)]
        self._short_texts: defaultdict[_Gram, set[str]] = defaultdict(set)  # by its first words
        for text, text_words, length in zip(texts_found, words, lengths, strict=True):
            if length < LEAST_WORDS:
                self._short_texts[tuple(text_words[:GRAM])].add(text)
        self._long_texts = [
            each for each, n in zip(words, lengths, strict=True) if n >= LEAST_WORDS
        ]
        shared = Counter(
            chain.from_iterable(set(_grams(text_words)) for text_words in self._long_texts)
        )
        texts_by_gram: defaultdict[_Gram, list[int]] = defaultdict(list)
        for number, text_words in enumerate(self._long_texts):
            grams = {*_grams(text_words)}
            rare = [gram for gram in grams if shared[gram] <= MAX_SHARING]
            for gram in rare or [min(grams, key=lambda gram: (shared[gram], gram))]:
                texts_by_gram[gram].append(number)
        self._texts_by_gram: Mapping[_Gram, list[int]] = texts_by_gram
        self._rare_grams = frozenset(texts_by_gram)

    def find(self, *fields: str) -> HeldText | None:
        """Return a text that one of a record's ``fields`` holds, an exact one if possible."""
        near = None
        for field in fields:
            found = self._find_in_field(field)
            if found and found.kind == "exact":
                return found
            near = near or found
        return near

    def _find_in_field(self, field: str) -> HeldText | None:
        words = _words(field)
        joined = f" {' '.join(words)} "
        if self._short_texts and (short := self._find_short(field, words, joined)):
            return HeldText("exact", short)
        record_grams = {*_grams(words)}
        if not (leading := self._rare_grams & record_grams):
            return None
        numbers = sorted({number for gram in leading for number in self._texts_by_gram[gram]})
        near: list[Sequence[str]] = []
        for text in (self._long_texts[number] for number in numbers):
            grams = [*_grams(text)]
            shared = sum(gram in record_grams for gram in grams)
            if shared == len(grams) and f" {' '.join(text)} " in joined:
                return HeldText("exact", " ".join(text))
            if GRAM * shared < NEAR_SHARE * len(text) or _length(text) < NEAR_WORDS:
                continue
            if {*filter(str.isdigit, text)} <= {*words}:
                near.append(text)
        places: dict[_Gram, list[int]] = {gram: [] for text in near for gram in _grams(text)}
        for place, gram in enumerate(_grams(words) if near else ()):
            if gram in places:
                places[gram].append(place)
        return next((HeldText("near", " ".join(t)) for t in near if _is_near(t, places)), None)

    def _find_short(self, field: str, words: Sequence[str], joined: str) -> str | None:
        starts = chain.from_iterable(_grams(words, n) for n in {*map(len, self._short_texts)})
        texts = {
            text
            for first in self._short_texts.keys() & {*starts}
            for text in self._short_texts[first]
        }
        # Finding sentences is slow, and hardly any record has the words at all.
        if not (texts := {text for text in texts if f" {text} " in joined}):
            return None
        sentences = (field[begin:end] for begin, end in split_sentences(field))
        parts = map(normalised, chain((field,), field.splitlines(), sentences))
        return next((part for part in parts if part in texts), None)


def _is_near(text: Sequence[str], places: Mapping[_Gram, list[int]]) -> bool:
    """Return whether a record, with its grams at those ``places``, nearly holds the words of
    ``text``.
    """
    length, grams = len(text), [*_grams(text)]
    times = Counter(grams)
    matches = sorted(
        (place - position, position)
        for position, gram in enumerate(grams)
        if times[gram] * len(places[gram]) <= MAX_PLACE_PAIRS
        for place in places[gram]
    )
    coverage, covered, first = [0] * length, 0, 0
    for shift, position in matches:
        for word in range(position, position + GRAM):
            covered += not coverage[word]
            coverage[word] += 1
        while shift - matches[first][0] > length // 4:
            for word in range(matches[first][1], matches[first][1] + GRAM):
                coverage[word] -= 1
                covered -= not coverage[word]
            first += 1
        if covered >= NEAR_SHARE * length:
            return True
    return False


def find_held(
    texts: Iterable[str] | HeldTexts, records: Iterable[str | Sequence[str]]
) -> HeldCounts:
    """Return how many of ``records`` (texts, or the fields of each) hold one of the test's
    ``texts``.
    """
    held_texts = texts if isinstance(texts, HeldTexts) else HeldTexts(texts)
    fields = ((one,) if isinstance(one, str) else one for one in records)
    kinds = Counter(found.kind for one in fields if (found := held_texts.find(*one)))
    return HeldCounts(kinds["exact"], kinds["near"])
