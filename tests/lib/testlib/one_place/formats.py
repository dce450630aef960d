"""Read a file of each format as nested values, and write it with one place changed."""

import json
import random
from collections.abc import Callable
from typing import Any

import yaml

from rekindle.data.storage.seal import SEAL, VERSION
from testlib.fuzz.strangers import describe_as, sealed_record
from testlib.one_place.changes import Change, change

Changed = tuple[bytes, Change, str]  # the new content, the change, and its line, if any


def whole(draw: random.Random, content: bytes) -> Changed:
    """Change a JSON file."""
    made = change(draw, json.loads(content))
    return json.dumps(made.value, indent=1).encode(), made, ""


def signed(draw: random.Random, content: bytes) -> Changed:
    """Change a sealed JSON file, and seal it again."""
    before = json.loads(content)
    made = change(draw, {k: v for k, v in before.items() if k not in (SEAL, VERSION)})
    if VERSION in before:
        return describe_as(before, made.value), made, ""
    return sealed_record(made.value), made, ""


def settings(draw: random.Random, content: bytes) -> Changed:
    """Change a YAML file."""
    made = change(draw, yaml.safe_load(content))
    text = yaml.safe_dump(made.value, sort_keys=False, allow_unicode=False)
    return text.encode(), made, ""


def line(draw: random.Random, content: bytes) -> Changed:
    """Change one line of a file of JSON lines."""
    rows = content.splitlines()
    number = draw.randrange(len(rows))
    made = change(draw, json.loads(rows[number]))
    rows[number] = json.dumps(made.value).encode()
    return b"".join(row + b"\n" for row in rows), made, str(number + 1)


def header(draw: random.Random, content: bytes) -> Changed:
    """Change the header of a safetensors file."""
    end = 8 + int.from_bytes(content[:8], "little")
    made = change(draw, json.loads(content[8:end]))
    said = json.dumps(made.value).encode()
    return len(said).to_bytes(8, "little") + said + content[end:], made, ""


Format = Callable[[random.Random, bytes], Changed]
FORMATS: dict[str, Format] = {one.__name__: one for one in (whole, signed, settings, line, header)}
Values = Any
