"""Plan the students of a sweep: one for every combination of the values of ``--sweep``.

Each student equals, to the bit, the one that ``--set`` with the same values trains alone on as many
threads. Only the run file is read here, so a wrong definition is refused at once.
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from rekindle.data.errors import InputError, naming
from rekindle.pipeline.config import RunConfig, load_config
from rekindle.pipeline.several_runs import SECTIONS
from rekindle.pipeline.yaml_text import Loader, describe_error

_LONGEST_NAME = 120  # characters; file systems take 255 bytes


@dataclass(frozen=True)
class SweepRun:
    """One student: its run's folder, its swept values, and its whole configuration."""

    name: str
    values: dict[str, str]
    config: RunConfig

    @property
    def record(self) -> dict[str, object]:
        """The student's entry in ``sweep.json``."""
        config = self.config.model_dump(mode="json", by_alias=True)
        return {"name": self.name, "values": self.values} | {s: config[s] for s in SECTIONS}


def plan_sweep(
    run: str | Path, sweep: Sequence[str], overrides: Sequence[str] | None = None
) -> list[SweepRun]:
    """Return a student for every combination of the values of ``sweep`` (``key.path=V1,V2``), each
    with the ``key.path=value`` overrides.

    Raise InputError for an invalid configuration, for two that are the same, and for keys that
    students of one cache must share.
    """
    axes = [parse_swept_key(text) for text in sweep]
    keys = [key for key, _ in axes]
    _check_keys(keys)
    tails = shortest_tails([key.split(".") for key in keys])
    products = list(itertools.product(*(values for _, values in axes)))
    names = unique_names([zip(tails, product, strict=True) for product in products])
    runs = []
    for name, product in zip(names, products, strict=True):
        values = dict(zip(keys, product, strict=True))
        runs.append(SweepRun(name, values, _configure(run, values, overrides or ())))
    for one, other in itertools.combinations(runs, 2):
        if one.config == other.config:
            raise InputError(
                f"--sweep: {one.name} and {other.name} are the same configuration, so they would "
                "be the same student; leave one out"
            )
    return runs


def parse_swept_key(text: str) -> tuple[str, tuple[str, ...]]:
    """Parse ``a.b=1,2`` into the key and its values. The values are items of a YAML flow sequence,
    for instance ``a.b=[1,2],[3]``, returned as YAML texts.

    Raise InputError if there is no key, no value, or no valid YAML.
    """
    key, separator, values = text.partition("=")
    if not separator or not key.strip():
        raise InputError(f"--sweep takes key.path=value,value,…, got {text!r}")
    inside = f"[{values}]"
    try:
        node = yaml.compose(inside, Loader)
    except yaml.YAMLError as error:
        told = describe_error(error, inside)
        raise InputError(f"--sweep {key}: {values!r} is not a list of YAML values{told}") from None
    if not isinstance(node, yaml.SequenceNode) or node.end_mark.index < len(inside):
        raise InputError(f"--sweep {key}: {values!r} is not a list of YAML values")
    if not node.value:
        raise InputError(f"--sweep {key}= names no value; give key.path=value,value,…")
    # As written: each is then read exactly as `--set` reads it.
    texts = [inside[item.start_mark.index : item.end_mark.index] for item in node.value]
    return key.strip(), tuple(texts)


def _check_keys(keys: Sequence[str]) -> None:
    for key in keys:
        section = key.split(".")[0]
        if section in RunConfig.model_fields and section not in SECTIONS:
            raise InputError(
                f"--sweep {key}: the students of a sweep learn from one cache, so {section}.* is "
                "the same for all of them. Sweep keys of student.* or train.*; for another cache "
                "start another sweep with --set"
            )
        if keys.count(key) > 1:
            raise InputError(f"--sweep {key} is given twice; list all its values in one")


def _configure(run: str | Path, values: Mapping[str, str], overrides: Sequence[str]) -> RunConfig:
    settings = [f"{key}={value}" for key, value in values.items()]
    with naming(f"--sweep, at {', '.join(settings)}"):
        config = load_config(run, [*overrides, *settings])
    if config.stages:
        raise InputError(
            f"{run} has stages, which cannot be swept: the students of a sweep learn from one "
            "cache. Sweep the run.yaml that a stage leaves in its folder, or a file without "
            "`stages`"
        )
    config.needed_student()
    return config


def shortest_tails(paths: Sequence[Sequence[str]], joint: str = ".", least: int = 1) -> list[str]:
    """Shorten each path to its last parts, joined: as few as distinguish it from the others, and at
    least ``least`` besides numbers.
    """

    def tail(path: Sequence[str]) -> str:
        for length in range(1, len(path)):
            end = path[-length:]
            alone = sum(other[-length:] == end for other in paths) == 1
            if alone and sum(not part.isdecimal() for part in end) >= least:
                return joint.join(end)
        return joint.join(path)

    return [tail(path) for path in paths]


def unique_names(runs: Sequence[Iterable[tuple[str, str]]]) -> list[str]:
    """Name a folder for each run's (key, value) pairs: readable, safe on any file system, and
    distinct even if upper and lower case count as equal.
    """
    names: list[str] = []
    taken: set[str] = set()
    for pairs in runs:
        plain = ",".join(f"{_plain(key)}={_plain(value)}" for key, value in pairs)
        plain = plain[:_LONGEST_NAME].rstrip(".")
        tries = itertools.chain([plain], (f"{plain}-{number}" for number in itertools.count(2)))
        name = next(found for found in tries if found.casefold() not in taken)
        taken.add(name.casefold())
        names.append(name)
    return names


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+_-]+", " ", text).strip().replace(" ", "-") or "empty"
