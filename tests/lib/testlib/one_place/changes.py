"""Change one place of a nested value at random; each operator is one way in which files go bad.

``change`` draws a place and an operator, which fit into a line of description.
"""

import copy
import json
import random
from collections.abc import Callable
from typing import Any, NamedTuple

from testlib.fuzz.described import inner_paths

Path = tuple[str | int, ...]
EXTREME = [0, -1, 1e308, float("nan"), float("-inf"), 10**30, 2**31, "", "x" * 3000, None]
EXTREME += [[[1, [2]]], [], {}, True]
LETTERS = ["ünï-文字-🙂", "a\x00b", "line\nbreak", "\u202eright", " ", "../../x", "[MASK]", "tab\t"]


class Change(NamedTuple):
    """A change: the new value, the place, and the operator's name."""

    value: Any
    place: Path
    how: str

    @property
    def keys(self) -> list[str]:
        """The names on the way to the place."""
        return [part for part in self.place if isinstance(part, str)]

    def now(self) -> Any:
        """Return the value at the place; KeyError or IndexError if it is gone."""
        return at(self.value, self.place)


def at(value: Any, place: Path) -> Any:
    for part in place:
        value = value[part]
    return value


# --- operators: each changes ``holder[key]``, or raises Unfit -------------------------------------


class Unfit(Exception):
    """The operator does not apply to such a value."""


def dropped(draw: random.Random, holder: Any, key: Any, whole: Any) -> None:
    del holder[key]


def mistyped(draw: random.Random, holder: Any, key: Any, whole: Any) -> None:
    if not isinstance(holder, dict) or len(key) < 2:
        raise Unfit
    spot = draw.randrange(len(key) - 1)
    wrong = key[:spot] + key[spot + 1] + key[spot] + key[spot + 2 :]
    if wrong in holder:
        raise Unfit
    items = [(wrong if k == key else k, v) for k, v in holder.items()]
    holder.clear()
    holder.update(items)


def added(draw: random.Random, holder: Any, key: Any, whole: Any) -> None:
    if isinstance(holder, dict):
        holder[draw.choice(["x", "version", "type", "", "after"])] = draw.choice(EXTREME)
    else:
        holder.insert(key, draw.choice(EXTREME))


def retyped(draw: random.Random, holder: Any, key: Any, whole: Any) -> None:
    value = holder[key]
    ways = [[value], {"a": value}, str(value), json.dumps(value)]
    if isinstance(value, int | float):
        ways += [float(value), bool(value), value + 0.5]
    if isinstance(value, str):
        ways += [len(value), list(value)]
    if isinstance(value, list | dict):
        ways += [dict(enumerate(map(str, value))), list(value), len(value)]
    holder[key] = draw.choice(ways)


def extreme(draw: random.Random, holder: Any, key: Any, whole: Any) -> None:
    holder[key] = draw.choice(EXTREME)


def elsewhere(draw: random.Random, holder: Any, key: Any, whole: Any) -> None:
    kind = type(holder[key])
    others = [at(whole, place) for place in inner_paths(whole) if place]
    others = [one for one in others if type(one) is kind and one != holder[key]]
    if not others:
        raise Unfit
    holder[key] = copy.deepcopy(draw.choice(others))


def lettered(draw: random.Random, holder: Any, key: Any, whole: Any) -> None:
    if not isinstance(holder[key], str):
        raise Unfit
    strange = draw.choice(LETTERS)
    holder[key] = draw.choice([strange, holder[key] + strange, holder[key][:-1]])


def relisted(draw: random.Random, holder: Any, key: Any, whole: Any) -> None:
    value = holder[key]
    if not isinstance(value, list) or not value:
        raise Unfit
    spot = draw.randrange(len(value))
    ways = [value[:spot], [*value, value[spot]], value[::-1], value[:spot] + value[spot + 1 :]]
    holder[key] = copy.deepcopy(draw.choice(ways))


def nudged(draw: random.Random, holder: Any, key: Any, whole: Any) -> None:
    if type(holder[key]) not in (int, float):
        raise Unfit
    holder[key] += draw.choice([1, -1])


OPERATORS: list[Callable[..., None]] = [
    dropped,
    mistyped,
    added,
    retyped,
    extreme,
    extreme,
    elsewhere,
    lettered,
    relisted,
    nudged,
]


def change(draw: random.Random, value: Any) -> Change:
    """Change one place of a copy of ``value``; every depth is equally likely."""
    places = [place for place in inner_paths(value) if place]
    while True:
        depth = draw.choice(sorted({len(place) for place in places}))
        place = draw.choice([one for one in places if len(one) == depth])
        operator = draw.choice(OPERATORS)
        whole = copy.deepcopy(value)
        try:
            operator(draw, at(whole, place[:-1]), place[-1], value)
        except Unfit:
            continue
        if _text(whole) != _text(value):
            return Change(whole, place, operator.__name__)


def _text(value: Any) -> str:
    """Return JSON, in which NaN equals itself and the order of keys counts."""
    return json.dumps(value)
