"""Find sentences by regular expressions: good enough for English prose and docstrings.

Returns character spans only; changes no text. Tokens are unknown here.
"""

import re

_ABBREVIATIONS = frozenset(
    re.findall(
        r"\w+",
        """mr mrs ms dr prof rev gen col lt sgt capt gov sen rep hon st jr sr messrs mt ft
    vs cf eg ie approx ca al fig figs eq no nos vol vols pp ed eds ch sec dept est
    inc ltd co corp bros assn univ jan feb mar apr jun jul aug sep sept oct nov dec""",
    )
)

# What may separate two sentences. Possessive repeats (++) keep long runs of dots linear.
_BOUNDARY = re.compile(
    r"""
      (?P<paragraph> \n[^\S\n]*+\n )                             # a blank line
    | (?P<item> \n[^\S\n]*+(?= (?:[-*•]|>>>|\d{1,3}[.)])[^\S\n] ))  # a list item, an example
    | (?P<wide> [。！？]++[」』”’）]*+ )                          # no space follows these
    | (?P<stop> (?<![.!?…])[.!?…]++ ["'”’)\]]*+ ) \s++ (?= ["'“‘(\[]*+ (?P<next> \w ) )
    """,
    re.VERBOSE,
)
_LAST_WORD = re.compile(r"[^\W\d_](?:[^\W\d_]|\.(?=[^\W\d_]))*$")
_WITHOUT_SPACE = re.compile(r"\S(?:.*\S)?", re.DOTALL)
_LONGEST_WORD = 32  # characters searched backwards for an abbreviation


def split_sentences(text: str) -> list[tuple[int, int]]:
    """Return (start, end) of each sentence of ``text``, in order, in characters.

    Spans do not overlap, do not begin or end with white space, and cover every other character. A
    sentence ends at . ! ? or … before white space and a word that does not begin in lower case,
    unless the dot belongs to an abbreviation ("Mr.", "e.g.") or an initial ("J. Smith"); at a blank
    line; and before a list item or a ``>>>`` example.
    """
    spans = []
    begin = 0
    for match in _BOUNDARY.finditer(text):
        if match["stop"] is None or _ends_sentence(text, match):
            spans.append((begin, match.end()))
            begin = match.end()
    spans.append((begin, len(text)))
    return [kept.span() for span in spans if (kept := _WITHOUT_SPACE.search(text, *span))]


def _ends_sentence(text: str, match: re.Match[str]) -> bool:
    if match["next"].islower():
        return False
    if match["stop"] != ".":
        return True
    before = _LAST_WORD.search(text[max(0, match.start() - _LONGEST_WORD) : match.start()])
    if before is None:
        return True
    word = before[0].lower()
    return word not in _ABBREVIATIONS and len(word.rpartition(".")[2]) > 1
