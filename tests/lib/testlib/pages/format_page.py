"""docs/format.md, made from the code that writes a cache by running this file.

Columns, their types, keys and versions come from the code; what each means is said here. Whoever
adds one is told where to say it.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pyarrow as pa
import yaml

from rekindle.data.corpus.columns import fields_of
from rekindle.data.storage.commits import ROWS_PER_BATCH, Commit
from rekindle.data.storage.manifest import NEWEST_VERSION
from rekindle.data.storage.units import FIELDS
from rekindle.data.targets.codec_registry import CODECS
from rekindle.data.targets.kinds.base import TargetKind
from rekindle.data.targets.kinds.registry import KINDS
from rekindle.data.targets.schema import TeacherInfo
from rekindle.data.views.base import StoredView
from rekindle.data.views.masked import MaskedView
from rekindle.data.views.pairs import PairView

PAGE = Path(__file__).parents[4] / "docs" / "format.md"
WORDS = Path(__file__).with_name("format_words.yaml")
words = SimpleNamespace(**yaml.safe_load(WORDS.read_text("utf-8")))
# What capital words in the names of files stand for.
LETTERS = {
    "UNIT": r"\d{5,12}(-r\d{3,6})?",
    "ATTEMPT": r"[0-9a-f]{8}",
    "TEACHER": r"[A-Za-z0-9][A-Za-z0-9._-]*",
    "PART": r"[a-z0-9.-]+",
    "VIEW": r"(masked|pairs)-[a-z0-9-]+",
    "NNN": r"\d{3}",
    "STEP": r"\d{8}",
    "FILE": r".+",
}
VIEWS: tuple[type[StoredView], ...] = (MaskedView, PairView)
# Sizes that stand for letters: no two are equal, none is a width of another reason.
SIZES = {"K": 29, "T": 11, "C": 17, "H": 53, "D": 61}
SMALL, LARGE = 1_000, 131_072  # vocabularies: ids of 16 bits, of 17
BIG = "V > 65,536"
# Keys of ``teacher.json`` beside the codec that columns depend on: the usual value first.
VARIANTS = {"embedding": ("vectors", ("fp16", "int8"))}


class Column(NamedTuple):
    """A column on disk: its name, its type in words, and when it is there ('' for always)."""

    name: str
    kind: str
    when: str = ""


# --- columns, from the schemas --------------------------------------------------------------------


def type_in_words(dtype: pa.DataType) -> str:
    """An Arrow type; of lists of a fixed size the width is in brackets, by its letter."""
    if pa.types.is_fixed_size_list(dtype):
        width = {size: name for name, size in SIZES.items()}.get(dtype.list_size)
        width = width or _width_of(dtype.list_size)
        return f"{type_in_words(dtype.value_type)}[{width}]"
    if pa.types.is_list(dtype) or pa.types.is_large_list(dtype):
        name = "large_list" if pa.types.is_large_list(dtype) else "list"
        return f"{name}<{type_in_words(dtype.value_type)}>"
    return str(dtype)


def _width_of(size: int) -> str:
    """A width that is computed from the letters: those of the codecs' columns."""
    k, t = SIZES["K"], SIZES["T"]
    of_letters = {
        -(-k // 8): "⌈K/8⌉",
        3 + t: "3 + T",
        k - 8: "K − 8",
        SMALL: "V",
        LARGE: "V",
        4 + -(-k // 4) * 2: "4 + 2·⌈K/4⌉",
        4 + -(-k // 4) * 3: "4 + 3·⌈K/4⌉",
        -(-k * 13 // 8): "⌈13·K/8⌉",
        -(-k * 14 // 8): "⌈14·K/8⌉",
    }
    return of_letters.get(size, str(size))


def info_of(kind: type[TargetKind], variant: str, vocabulary: int) -> TeacherInfo:
    """A teacher of that kind, in sizes that stand for letters."""
    task = kind.tasks[0]
    part = {"part": "t8", "extends": ""} if kind.is_extension else {}
    key, _ = VARIANTS.get(kind.name, ("codec", ()))
    if kind.name in VARIANTS:
        part["dimensions"] = SIZES["D"]
    return TeacherInfo(
        name="teacher",
        task=task,
        kind=kind.name,
        view="masked-0" if task == "masked_lm" else "text",
        vocabulary_size=vocabulary,
        k=SIZES["K"],
        temperatures=tuple(float(n) for n in range(1, SIZES["T"] + 1)),
        num_labels=SIZES["C"],
        hidden_size=SIZES["H"],
        monte_carlo_passes=1 if kind.per_sequence else 0,
        **{key: variant},
        **part,
    )


def _columns(schema: Iterable[pa.Field]) -> list[Column]:
    return [Column(field.name, type_in_words(field.type)) for field in schema]


def target_columns(kind: type[TargetKind], variant: str) -> list[Column]:
    """The columns of a kind's shards in a codec, and those that large vocabularies add or widen."""
    small, large = (
        _columns(kind(info_of(kind, variant, size)).schema({})) for size in (SMALL, LARGE)
    )
    found = {one.name: one for one in small}
    for one in large:
        before = found.get(one.name)
        if before is None:
            found[one.name] = one._replace(when=BIG)
        elif before != one:
            found[one.name] = one._replace(kind=f"{before.kind}; {one.kind} if {BIG}")
    names = dict.fromkeys([*(one.name for one in large), *found])
    return [found[name] for name in names]


def table(columns: Sequence[Column], meaning: Mapping[str, str], of: str) -> str:
    """A table of columns; a KeyError that says where to describe one."""
    lines = ["| column | Arrow type | meaning |", "|---|---|---|"]
    for name, kind, when in columns:
        told = said(meaning, name, of) + (f" (only if {when})" if when else "")
        lines.append(f"| `{name}` | {kind.replace('<', '&lt;')} | {told} |")
    return "\n".join(lines)


def said(meaning: Mapping[str, str], name: str, of: str) -> str:
    if name not in meaning:
        raise KeyError(f"say what {name!r} of {of} is in tests/lib/testlib/pages/format_words.yaml")
    return meaning[name]


def keys_table(names: Iterable[str], meaning: Mapping[str, str], of: str) -> str:
    lines = ["| key | meaning |", "|---|---|"]
    return "\n".join(lines + [f"| `{name}` | {said(meaning, name, of)} |" for name in names])


# --- the page -------------------------------------------------------------------------------------


def files_list(files: Mapping[str, str]) -> str:
    return "\n".join(f"- `{name}`: {what}" for name, what in files.items())


def pattern_of(name: str) -> str:
    """A regular expression for the names that a name of the page stands for."""
    found = re.escape(name)
    for letters, stands_for in LETTERS.items():
        found = found.replace(letters, stands_for)
    return found


def corpus_section() -> str:
    always = {column.name for column in _columns(fields_of({}))}
    every = _columns(fields_of({"pair_field": "b", "group_field": "c", "trained": True}))
    columns = [c if c.name in always else c._replace(when=words.WHEN[c.name]) for c in every]
    return table(columns, words.CORPUS, "the corpus")


def view_sections() -> list[str]:
    return [
        f"**`{view.kind}-…`**: {words.VIEWS[view.kind]}\n\n"
        + table(_columns(view.fields), words.OF_VIEWS[view.kind], f"the view {view.kind}")
        for view in VIEWS
    ]


def kind_sections() -> list[str]:
    parts, seen = list[str](), dict[tuple[str, ...], str]()
    for name, kind in KINDS.items():
        own = words.TARGETS | words.OF_KINDS.get(name, {})
        key, values = VARIANTS.get(name, ("codec", [one for one in CODECS if one in kind.codecs]))
        tables = {
            one: table(
                target_columns(kind, one),
                own | words.OF_CODECS.get(one, {}),
                f"the kind {name}",
            )
            for one in values
        }
        about = f"### `{name}`\n\n{said(words.KINDS, name, 'the kinds')}\n\n"
        same = seen.setdefault((*tables.values(),), name)
        if same != name:
            parts.append(f"{about}The columns are those of `{same}`, in each codec.")
            continue
        usual, *others = tables.items()
        parts.append(about + usual[1])
        for one, columns in others:
            told = f"**`{name}` with `{key}: {one}`**: "
            alike = columns == usual[1]
            parts.append(told + ("the same columns." if alike else words.CODECS[one]))
            parts += [] if alike else [columns]
    return parts


def versions_table() -> str:
    lines = [
        "| version | a cache has it | why older versions of Rekindle refuse it |",
        "|---|---|---|",
    ]
    for version in range(1, NEWEST_VERSION + 1):
        when, why = words.VERSIONS[version]
        lines.append(f"| {version} | {when} | {why} |")
    return "\n".join(lines)


def page() -> str:
    """The whole page."""
    record = [field.name for field in dataclasses.fields(Commit)]
    roll_up = [Column(name, str(dtype)) for name, dtype in FIELDS.items()]
    parts = [
        words.HEAD.format(newest=NEWEST_VERSION),
        "## The files of a cache\n",
        files_list(words.FILES),
        words.AFTER_FILES,
        "## Sealed files and commit records\n",
        words.SEALS.format(rows=ROWS_PER_BATCH),
        keys_table([*record, "record"], words.RECORD, "a commit record"),
        words.AFTER_RECORD,
        table(roll_up, words.ROLL_UP, "the roll-up"),
        words.AFTER_ROLL_UP,
        "## The corpus\n",
        corpus_section(),
        words.AFTER_CORPUS,
        "## Views\n",
        words.BEFORE_VIEWS,
        "\n\n".join(view_sections()),
        "\n## Targets\n",
        words.BEFORE_TARGETS,
        "\n\n".join(kind_sections()),
        "\n### `teacher.json`\n",
        words.BEFORE_TEACHER,
        keys_table(TeacherInfo.model_fields, words.TEACHER, "teacher.json"),
        "\n## Format versions\n",
        words.BEFORE_VERSIONS,
        versions_table(),
        "\n## A student's folder, and its checkpoints\n",
        words.BEFORE_RUN,
        files_list(words.RUN_FILES),
        words.AFTER_RUN,
    ]
    return "\n".join(parts).rstrip("\n") + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
