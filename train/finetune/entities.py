"""Entities in tags: which tokens belong together, and the F1 of whole entities.

The rules are those of CoNLL's conlleval, with the tags of IOB1, BIO, BIOES and BILOU.
"""

import re
from collections.abc import Iterable, Sequence

_TAG = re.compile(r"([BIESLU])(?:-(.+))?")
_LAST, _INSIDE = "ESUL", "IEL"  # E and S of BIOES are L and U of BILOU

Entity = tuple[str, int, int]  # its type, its first token, one past its last


def tags_entities(names: Iterable[str]) -> bool:
    """Return whether all tags ``names`` are entity tags: O, B-…, I-… and the like."""
    each = {*names}
    return "O" in each and len(each) > 1 and all(n == "O" or _TAG.fullmatch(n) for n in each)


def complete(names: Iterable[str]) -> set[str]:
    """Return the tags ``names`` and, if they are entity tags, others that the same entities may
    need.
    """
    each = {*names}
    if not tags_entities(each):
        return each
    found = [_parts(name) for name in each - {"O"}]
    begins = {begin for begin, _ in found} | {"B", "I"}
    return {"O"} | {f"{b}-{kind}" if kind else b for b in begins for _, kind in found}


def entities(tags: Sequence[str | None]) -> set[Entity]:
    """Return the entities of one text; a token without a tag is outside.

    A new one begins with B or S, with another type, or with an I or E that continues none.
    """
    found: set[Entity] = set()
    start, before, of = -1, "O", ""
    for place, tag in enumerate([*tags, None]):
        now, kind = _parts(tag or "O")
        goes_on = now in _INSIDE and before != "O" and before not in _LAST and kind == of
        if start >= 0 and not goes_on:
            found.add((of, start, place))
            start = -1
        if now != "O" and not goes_on:
            start = place
        before, of = now, kind
    return found


def entity_f1(
    predicted: Iterable[Sequence[str | None]], true: Iterable[Sequence[str | None]]
) -> float:
    """Return the F1 of entities over all texts: one counts if its type and tokens are all right;
    0.0 if there is none.
    """
    right = both = 0
    for own, wanted in zip(predicted, true, strict=True):
        given, there = entities(own), entities(wanted)
        right += len(given & there)
        both += len(given) + len(there)
    return 2 * right / both if both else 0.0


def _parts(tag: str) -> tuple[str, str]:
    found = _TAG.fullmatch(tag)
    return (found[1], found[2] or "") if found else ("O", "")
