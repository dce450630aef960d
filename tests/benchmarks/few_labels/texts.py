"""Writes the files named in few_labels.yaml for the tasks whose text is not used whole.

    python tests/benchmarks/few_labels/texts.py shared/data data/few_labels

- clinc: the first three domains of CLINC150 in the order of its file (travel, banking, utility), 45
  intents; its train, val and test sets.
- sst2: 6,000 of the 67,349 train sentences as unlabelled text, and 1,000 others to draw the
  labelled ones from: no row is both (18 are, up to a full stop or the like).
"""

import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

DOMAINS = ("travel", "banking", "utility")
UNLABELLED, LABELLED = 6_000, 1_000

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(shared: Path, out: Path) -> None:
    for split in ("train", "val", "test"):
        rows = read(shared / "cls" / f"clinc150_{split}.jsonl")
        write(out / f"clinc_{split}.jsonl", (row for row in rows if row["domain"] in DOMAINS))
    rows = read(shared / "glue" / "sst2_train.jsonl")
    random.Random(0).shuffle(rows)
    write(out / "sst2_unlabelled.jsonl", ({"text": row["sentence1"]} for row in rows[:UNLABELLED]))
    write(out / "sst2_train.jsonl", rows[UNLABELLED : UNLABELLED + LABELLED])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
