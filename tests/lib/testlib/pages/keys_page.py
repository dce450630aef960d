"""docs/keys.md, made from the classes of the configuration by running this file.

What excludes what is found by trying: each value alone, and each two of a section together.
"""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rekindle.data.errors import InputError
from rekindle.data.settings import Settings, parse_settings, sections_in
from rekindle.data.settings_schema import KeysOf, schema_of
from rekindle.pipeline.config import RunConfig
from rekindle.pipeline.cycle.config import CycleConfig

PAGE = Path(__file__).parents[4] / "docs" / "keys.md"
CORPUS = {"source": ["a.txt"], "tokenizer": "t"}
TEACHER = {"name": "a", "model": "m", "task": "causal_lm"}
TASK = {"name": "a", "train": "a.jsonl", "test": "b.jsonl"}
# What must be said of a section that needs anything.
LEAST: dict[str, dict[str, Any]] = {
    "CacheConfig": {"path": "c"},
    "CorpusConfig": CORPUS,
    "CurriculumConfig": {"teacher": "a"},
    "CycleConfig": {"corpus": CORPUS, "student": {"model": "s"}, "tasks": [TASK]},
    "CycleCorpusConfig": {"tokenizer": "t"},
    "CycleTask": TASK,
    "DistillTerm": {"teachers": ["a"]},
    "MergeConfig": {"experts": ["a"]},
    "MethodTerm": {"method": "replaced_tokens"},
    "PrimaryConfig": {"arm": "kd", "against": ["longer"]},
    "PromptsConfig": {"teacher": "a", "to": "p.jsonl"},
    "ReplayConfig": {"domains": ["d"]},
    "RunConfig": {"corpus": CORPUS, "cache": {"path": "c"}},
    "ServedConfig": {"url": "http://a/v1", "model": "m"},
    "SourceEntry": {"path": "a", "format": "text"},
    "StageConfig": {"name": "one"},
    "StudentConfig": {"model": "s"},
    "TeacherConfig": TEACHER,
}
HEAD = """\
# Every key of a configuration file

<!-- Made by tests/lib/testlib/pages/keys_page.py from the classes of the configuration. -->

A **run file** (of `pipeline cache-teachers`, `plan` and `train-student`) has the sections of
[the first table](#the-run-file), a **cycle's file** (of `pipeline rekindle`) those of
[the second](#the-cycles-file). Each key can be set from the command line: `--set train.steps=500`,
`--set teachers.0.targets.k=32`. Keys marked **required** must be given; if the default is left
blank, it is an empty list, or a section with its own defaults.

An editor completes keys and underlines mistyped ones while you write, if it knows the schema. Print
it into a file beside the run file (`pipeline schema cycle` for a cycle's):

```bash
pipeline schema > run.schema.json
```

and name it in the file's first line (for VS Code with its YAML extension, and every editor with
yaml-language-server):

```yaml
# yaml-language-server: $schema=run.schema.json
```
"""


class Clash(NamedTuple):
    """Values of one or two keys of a section that are refused, and why."""

    keys: tuple[str, ...]
    values: tuple[object, ...]
    why: str


def sections() -> dict[type[Settings], str]:
    """Each section of both files, once, with the place of its first key: of a run's file first."""
    found: dict[type[Settings], str] = {}
    for whole, place in (RunConfig, ""), (CycleConfig, "cycle: "):
        new: list[tuple[Any, str]] = [(whole, place)]
        while new:
            one, place = new.pop(0)
            if one in found:
                continue
            found[one] = place
            for name, field in one.model_fields.items():
                inside = sections_in(field.annotation)
                inside += [mark.section for mark in field.metadata if isinstance(mark, KeysOf)]
                many = "[]" if "tuple" in str(field.annotation) else ""
                new += [(each, f"{place}{field.alias or name}{many}.") for each in inside]
    return found


def keys_of(section: type[Settings]) -> list[str]:
    return [field.alias or name for name, field in section.model_fields.items()]


def least_of(section: type[Settings]) -> dict[str, Any]:
    return LEAST.get(section.__name__, {})


def refused(section: type[Settings], values: object) -> str:
    """Why the program refuses ``values``; nothing where it takes them."""
    try:
        parse_settings(section, values)
    except InputError as error:
        return str(error)
    return ""


# --- what a key may be, in words ------------------------------------------------------------------


def _words(schema: dict[str, Any], names: dict[str, str]) -> str:
    """The type of a key in words; ``names``: where the page has a section, by the class."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"section: [{names[name]}](#{_anchor(names[name])})"
    if "anyOf" in schema:
        each = [_words(one, names) for one in schema["anyOf"]]
        return " or ".join(dict.fromkeys(one for one in each if one))
    if "enum" in schema or "const" in schema:
        return " \\| ".join(f"`{one}`" for one in schema.get("enum") or [schema["const"]])
    kind = schema.get("type", "")
    kind = kind[0] if isinstance(kind, list) else kind  # the others: nothing
    if kind == "array" and "prefixItems" in schema:
        return f"list of {len(schema['prefixItems'])}: {_words(schema['prefixItems'][0], names)}"
    if kind == "array":
        return f"list of {_words(schema['items'], names)}"
    return {"string": "text", "object": "mapping", "boolean": "true or false", "": "any"}.get(
        kind, f"{'whole number' if kind == 'integer' else kind}{_limits(schema)}"
    )


def _limits(schema: dict[str, Any]) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    least_of_64_bits = 2**62
    told = [
        f"{sign} {schema[key]:,}"
        for key, sign in signs.items()
        if key in schema and abs(schema[key]) < least_of_64_bits
    ]
    return " " + ", ".join(told) if told else ""


def _type_of(
    key: str, schema: dict[str, Any], section: type[Settings], names: dict[str, str]
) -> str:
    field = next(f for n, f in section.model_fields.items() if (f.alias or n) == key)
    for mark in field.metadata:
        if isinstance(mark, KeysOf):
            of = names[mark.section.__name__]
            return f"keys of [{of}](#{_anchor(of)}){', a list of values each' * mark.lists}"
    choices = schema.get("anyOf", [])
    lists = [one for one in choices if one.get("type") == "array" and "items" in one]
    if lists:  # one that stands alone is said in a word
        alone = [one for one in choices if one in (lists[0]["items"], {"type": "string"})]
        others = [one for one in choices if one not in alone and one != {"type": "null"}]
        null = [one for one in choices if one == {"type": "null"} and field.default is None]
        told = " or ".join(_words(one, names) for one in others)
        return told + ", or one" * bool(alone) + " or null" * bool(null)
    told = _words(schema, names)
    return told if field.default is None else told.removesuffix(" or null")


def _required(key: str, schema: dict[str, Any]) -> str:
    """Whether a key must be given; where there is a choice, what stands in its place."""
    choices = [one["required"] for one in schema.get("anyOf", ())] or [schema.get("required", [])]
    if all(key in one for one in choices):
        return "**required**"
    if any(key in one for one in choices):
        others = {other for one in choices for other in one if key not in one}
        instead = sorted(others - set.intersection(*map(set, choices)))
        if len(choices[0]) > len(choices[-1]) and key in choices[0]:
            return f"**required** without {' and '.join(f'`{one}`' for one in instead)}"
    return ""


def _default_of(schema: dict[str, Any], required: str) -> str:
    if required:
        return required
    value = schema.get("default", "")
    text = value if isinstance(value, str) else json.dumps(value)
    return "" if text in ("", "[]", "{}") else f"`{text}`"


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


# --- what excludes what ---------------------------------------------------------------------------


def values_of(section: type[Settings]) -> Iterator[tuple[str, object, str]]:
    """Values of each key that are of its type, and why the program refuses one all the same."""
    whole = schema_of(section, "")
    usual: list[object] = [True, False, 2, 0.25, ["a"], {}]
    for key in keys_of(section):
        field = next(f for n, f in section.model_fields.items() if (f.alias or n) == key)
        if any(isinstance(mark, KeysOf) for mark in field.metadata):
            continue
        tried: list[object] = []
        for value in (*usual, f"…{key}", *_chosen(whole["properties"].get(key, {}), whole)):
            if (type(value), value) in [(type(one), one) for one in tried]:
                continue
            tried.append(value)
            why = refused(section, least_of(section) | {key: value})
            about_text = f"…{key}" in why  # a rule on the text alone
            if not why or (why.startswith("the configuration: ") and not about_text):
                yield key, value, why.removeprefix("the configuration: ")


def _chosen(schema: dict[str, Any], whole: dict[str, Any]) -> Iterator[object]:
    """The words that a key may be."""
    yield from schema.get("enum", [schema["const"]] if "const" in schema else [])
    for one in schema.get("anyOf", ()):
        yield from _chosen(one, whole)


def clashes(section: type[Settings]) -> list[Clash]:
    """What is refused though each key is of its type: a value alone, or two that do alone."""
    least, found = least_of(section), list[Clash]()
    values = [*values_of(section)]
    found += [Clash((key,), (value,), why) for key, value, why in values if why]
    alone = [(key, value) for key, value, why in values if not why]
    for (key, value), (other, beside) in itertools.combinations(alone, 2):
        if key != other and (why := refused(section, least | {key: value, other: beside})):
            why = why.removeprefix("the configuration: ")
            found.append(Clash((key, other), (value, beside), why))
    return found


def clashes_across() -> list[Clash]:
    """What is refused though each section of a run's file is taken: two of them together."""
    least = {
        **LEAST["RunConfig"],
        **{"teachers": LEAST["TeacherConfig"], "student": LEAST["StudentConfig"], "train": {}},
    }
    names = {place.rstrip(".[]"): one for one, place in sections().items()}
    changed = [
        (top, key, value, least | {top: least[top] | {key: value}})
        for top in least
        for key, value, why in values_of(names[top])
        if not why
    ]

    def told(values: dict[str, Any]) -> str:
        why = refused(RunConfig, values | {"teachers": [values["teachers"]]})
        return why.removeprefix("the configuration: ")

    alone = [one for one in changed if not told(one[3])]
    found = []
    for (top, key, value, values), (other, its, beside, more) in itertools.combinations(alone, 2):
        if top != other and (why := told(values | {other: more[other]})):
            found.append(Clash((f"{top}.{key}", f"{other}.{its}"), (value, beside), why))
    return found


def _told(found: list[Clash]) -> Iterator[str]:
    """A line for each pair of keys: the values that exclude each other, and the first reason."""
    for keys in dict.fromkeys(one.keys for one in found):
        of = [one for one in found if one.keys == keys]
        parts = []
        for place, key in enumerate(keys):
            values = dict.fromkeys(_as_yaml(one.values[place]) for one in of)
            parts.append(f"`{key}: {' | '.join(values)}`")
        yield f"- {' with '.join(parts)}: {_plain(of[0].why)}"


def _plain(text: str) -> str:
    """Text as it is, in a cell of a table."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def _as_yaml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return (
        "…"
        if isinstance(value, int | float | list | dict) or str(value)[:2] == "a_"
        else str(value)
    )


# --- the page -------------------------------------------------------------------------------------


def page() -> str:
    """The whole page."""
    places = sections()
    names = {one.__name__: _name(one, place) for one, place in places.items()}
    parts = [HEAD]
    for section in places:
        schema = schema_of(section, "")
        parts.append(
            f"\n## {names[section.__name__]}\n\n{' '.join((section.__doc__ or '').split())}\n"
        )
        parts.append("| key | type | default | meaning |\n|---|---|---|---|")
        for key, one in schema["properties"].items():
            cells = [
                f"`{key}`",
                _type_of(key, one, section, names),
                _default_of(one, _required(key, schema)),
                _plain(one.get("description", "")),
            ]
            parts.append(f"| {' | '.join(cells)} |")
        found = clashes_across() if section is RunConfig else clashes(section)
        if lines := [*_told(found)]:
            parts.append("\nRefused:\n\n" + "\n".join(lines))
    return "\n".join(parts) + "\n"


def _name(section: type[Settings], place: str) -> str:
    whole = {RunConfig: "The run file", CycleConfig: "The cycle's file"}
    return whole.get(section) or place.rstrip(".")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
