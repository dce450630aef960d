"""Places of this machine in a text that people read: a model's card."""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from itertools import chain

from rekindle.data.sharing.names import is_place, last_part

# Where a path can begin: /x, ~/x, ./x, C:\x, C:/x, \\server\x, s3://x; not http://: a card has
# links, which are for everybody.
_START = r"(?!https?:)(?:~[\w-]*/|\.{1,2}/|/|[A-Za-z]:[\\/]|\\\\|[a-z][a-z0-9+.-]+:/)"
_QUOTED = re.compile(rf"""(?P<mark>`+|"|(?<!\w)')(?P<place>{_START}[^\n]*?)(?P=mark)""")
# Words of commands, and of the block at the top. /dev/null and the like are on every machine.
_BARE = re.compile(
    r"(?<=[\s=])(?!/(?:dev|usr|bin|etc)/)"
    r"(?:~[\w-]*/|/[\w.-]+/|[A-Za-z]:[\\/]|\\\\[\w.-]+\\|(?!https?:|hf:)[a-z][a-z0-9+.-]+://)\S+"
)
_CODE = re.compile(r"\A---\r?\n.*?\n---$|^ *```.*?(?:^ *```|\Z)", re.DOTALL | re.MULTILINE)
_HUB_CACHE = re.compile(r"/models--([\w.-]+?)--([\w.-]+)/snapshots/[^/]+/?$")


def replace_paths(text: str, names: Mapping[str, str], suffixes: Collection[str] = ()) -> str:
    """Return ``text`` with the paths ``names`` called otherwise. A longer path that only begins or
    ends like one of them stays, unless what it has more is one of the ``suffixes``.
    """
    replacements = dict(chain.from_iterable(_spellings(*pair) for pair in names.items() if pair[0]))
    if not replacements:
        return text
    suffix_pattern = "|".join(map(re.escape, sorted(suffixes, key=len, reverse=True)))
    path = r"(?![\w~+@-]|\.\w)"  # not within a name; a full stop may end a sentence
    end = rf"(?=(?:{suffix_pattern}){path})|{path}" if suffix_pattern else path
    paths_pattern = "|".join(map(_path_pattern, sorted(replacements, key=len, reverse=True)))
    return re.sub(rf"({paths_pattern})(?:{end})", lambda match: replacements[match[1]], text)


def _spellings(name: str, replacement: str) -> Iterable[tuple[str, str]]:
    """Yield a name as it is, and as a quoted one of a program."""
    yield from ((name, replacement), (json.dumps(name)[1:-1], replacement))


def _path_pattern(name: str) -> str:
    inside = r"[\w.~-]" if is_place(name) else r"[\w.~/\\-]"
    return rf"(?<!{inside}){re.escape(name)}"


def without_places(text: str) -> str:
    """Return ``text`` in which the places that are quoted, between backticks, or words of its code
    and of the block at its top are their last parts.
    """

    def shorten_quoted(match: re.Match[str]) -> str:
        place, mark = match["place"], match["mark"]
        return f"{mark}{portable_name(place) if is_place(place) else place}{mark}"

    def shorten_words(match: re.Match[str]) -> str:
        return _BARE.sub(lambda word: portable_name(word[0]), match[0])

    return _CODE.sub(shorten_words, _QUOTED.sub(shorten_quoted, text))


def portable_name(place: str) -> str:
    """Return the last part of a place; of a model in a hub's cache, its id."""
    found = _HUB_CACHE.search(place)
    return f"{found[1]}/{found[2]}" if found else last_part(place) or place
