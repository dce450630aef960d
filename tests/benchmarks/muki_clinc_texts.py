"""Splits CLINC150: which texts the experts see, which the students, and which nobody before the
end.
"""

import json
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

GROUPS = {"group-1": slice(0, 3), "group-2": slice(3, 6), "group-3": slice(6, None)}
Row = dict[str, str]


class Counts(NamedTuple):
    """Numbers of texts of an intent."""

    expert: int  # with labels, for the expert that knows the intent
    seen: int  # without labels, for all experts and all students
    dev: int


def read_rows(file: Path) -> list[Row]:
    """Return the rows of a jsonl file."""
    with open(file, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def domains_of(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Return the domains of each group, in alphabetical order: nothing was chosen."""
    names = sorted({row["domain"] for row in rows})
    return {group: names[part] for group, part in GROUPS.items()}


def splits(train: Sequence[Row], dev: Sequence[Row], counts: Counts) -> dict[str, list[Row]]:
    """Return the ``experts`` and ``seen`` halves of the training texts, and ``dev``; each also by
    group.

    The first texts of every intent in a fixed random order go to its expert, texts of the second
    half to the students. No text is in both.
    """
    half: dict[str, list[Row]] = {"experts": [], "seen": [], "dev": []}
    for rows in _by_intent(train).values():
        random.Random(0).shuffle(rows)
        middle = len(rows) // 2
        half["experts"] += rows[: min(counts.expert, middle)]
        half["seen"] += rows[middle : middle + counts.seen]
    for rows in _by_intent(dev).values():
        half["dev"] += rows[: counts.dev]
    found = {}
    for name, rows in half.items():
        random.Random(1).shuffle(rows)
        found[name] = rows
        for group, domains in domains_of(train).items():
            found[f"{name}-{group}"] = [row for row in rows if row["domain"] in domains]
    return found


def _by_intent(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found = defaultdict(list)
    for row in rows:
        found[row["label"]].append(row)
    return dict(sorted(found.items()))


def write_splits(data: Path, out: Path, counts: Counts) -> None:
    """Write the splits as files; ``corpus.jsonl`` holds only the texts of ``seen``."""
    if (out / "corpus.jsonl").exists():
        return
    out.mkdir(parents=True, exist_ok=True)
    train, dev = (read_rows(data / f"clinc150_{name}.jsonl") for name in ("train", "val"))
    made = splits(train, dev, counts) | {"test": read_rows(data / "clinc150_test.jsonl")}
    for name, rows in made.items():
        _write(out / f"{name}.jsonl", rows)
    _write(out / "corpus.jsonl", [{"text": row["text"]} for row in made["seen"]])


def _write(file: Path, rows: Sequence[Row]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
