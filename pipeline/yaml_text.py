"""YAML as people mean it: read by the rules of YAML 1.2's core schema, and written for any reader.

PyYAML follows 1.1, where ``yes`` is true, ``010`` is 8, ``1:30`` is 90, and ``1e-4`` is text.
"""

import re
from typing import Any

import yaml

from rekindle.data.errors import InputError

_TAG = "tag:yaml.org,2002:"
_TEXT_TAG, _MERGE_TAG = f"{_TAG}str", f"{_TAG}merge"
_PLAIN_VALUES = {  # for unquoted values: the expression, and how it may begin
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": ("<<", ["<"]),
}


class Loader(yaml.SafeLoader):
    """Safe YAML 1.2 in which keys are text and unique; PyYAML would take the last of duplicates."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012 - not those of the base

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.deep_construct = True  # a value that contains itself is refused, not built

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping. Raise ConstructorError for a key that is not text, or is
        given twice.
        """
        keys: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                problem = "a key must be text; a value that begins with a brace or a bracket"
                raise _error_at(f'{problem}, such as "{{first}}", is written in quotes', key)
            if key.tag == f"{_TAG}null":
                raise _error_at("nothing stands before the colon", key)
            if key.tag == _MERGE_TAG:
                continue
            if key.value in keys:
                raise _error_at(f"the key {key.value!r} is given twice; keep one of them", key)
            keys.add(key.value)
            key.tag = _TEXT_TAG  # as written: 1 and true are names of keys
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Quotes what readers of either version would not take for text."""


def _error_at(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _whole_number(loader: Loader, node: yaml.ScalarNode) -> int:
    text = str(node.value)
    try:
        return int(text, 0 if text[:2] in ("0o", "0x") else 10)
    except ValueError as error:
        raise _error_at(str(error), node) from None


def _represent_text(dumper: Dumper, text: str) -> yaml.ScalarNode:
    # Outside double quotes, PyYAML writes these characters unchanged and reads a line break.
    style = '"' if set(text) & set("\x85\u2028\u2029\ufeff") else None
    return dumper.represent_scalar(_TEXT_TAG, text, style)


for _name, (_expression, _first) in _PLAIN_VALUES.items():
    for _class in (Loader, Dumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_expression})\Z"), _first)
Loader.add_constructor(f"{_TAG}int", _whole_number)
Dumper.add_representer(str, _represent_text)


def parse_yaml(text: str, source: str) -> object:
    """Return the values of a YAML text. Raise InputError, naming ``source`` and the line, for
    invalid YAML.
    """
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise InputError(f"{source} is not valid YAML{describe_error(error, text)}") from None
    except RecursionError:
        raise InputError(f"{source} is not valid YAML: it is nested too deeply") from None


def describe_error(error: yaml.YAMLError, text: str) -> str:
    """Return the place in ``text`` and the cause, to be appended to a message."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark, cause = error.problem_mark, str(error.problem)
        if error.context:
            context_mark = error.context_mark
            cause += f", {error.context}" + (
                f" from line {context_mark.line + 1}" if context_mark else ""
            )
        if "constructor for the tag" in cause:
            cause += "; only plain values are read: leave the tag (!…) out"
        if "'\\t'" in cause:
            cause += "; indent with spaces, not with a tab"
        return f" (line {mark.line + 1}, column {mark.column + 1}): {' '.join(cause.split())}"
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return f" (line {line}): the character {chr(error.character)!r} may not stand in it"
    return f": {' '.join(str(error).split())}"


def dump_yaml(values: object) -> str:
    """Return ``values`` as a YAML text that ``parse_yaml`` reads as the same."""
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True)
