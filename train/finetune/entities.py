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


def complete_tags(names: Iterable[str]) -> set[str]:
    """Return the tags ``names`` and, if they are entity tags, others that the same entities may
    need.
    """
    tags = {*names}
    if not tags_entities(tags):
        return tags
    parts = [_parts(name) for name in tags - {"O"}]
    begins = {begin for begin, _ in parts} | {"B", "I"}
    return {"O"} | {f"{b}-{kind}" if kind else b for b in begins for _, kind in parts}


def entities(tags: Sequence[str | None]) -> set[Entity]:
    """Return the entities of one text; a token without a tag is outside.

    A new one begins with B or S, with another type, or with an I or E that continues none.
    """
    found: set[Entity] = set()
    start, previous, kind_before = -1, "O", ""
    for place, tag in enumerate([*tags, None]):
        prefix, kind = _parts(tag or "O")
        continues = (
            prefix in _INSIDE and previous != "O" and previous not in _LAST and kind == kind_before
        )
        if start >= 0 and not continues:
            found.add((kind_before, start, place))
            start = -1
        if prefix != "O" and not continues:
            start = place
        previous, kind_before = prefix, kind
    return found


def entity_f1(
    predicted: Iterable[Sequence[str | None]], true: Iterable[Sequence[str | None]]
) -> float:
    """Return the F1 of entities over all texts: one counts if its type and tokens are all right;
    0.0 if there is none.
    """
    correct = total = 0
    for predicted_tags, true_tags in zip(predicted, true, strict=True):
        found, existing = entities(predicted_tags), entities(true_tags)
        correct += len(found & existing)
        total += len(found) + len(existing)
    return 2 * correct / total if total else 0.0


def _parts(tag: str) -> tuple[str, str]:
    match = _TAG.fullmatch(tag)
    return (match[1], match[2] or "") if match else ("O", "")
