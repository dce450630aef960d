"""Models of the families in the grid, and caches of their targets, made once."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rekindle.data.cache import Cache
from rekindle.data.settings import parse_settings
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.config import RunConfig
from testlib.families.kinds import EXPERT, STUDENT, TEACHER, WORDS, Family, save_tokenizer
from testlib.families.rows import FAMILIES

Targets = Mapping[str, Mapping[str, Any]]
TARGETS: Targets = {
    "topk": {"kind": "topk", "k": 8},
    "dense": {"kind": "dense"},
    "hidden": {"kind": "hidden"},
}
LENGTHS = (3, 20, 9, 1, 15, 30, 5, 12)  # words of the texts; the fourth has nothing to predict


class Grid:
    """Folders of models, and caches of teachers and experts over the same texts."""

    def __init__(self, folder: Path, targets: Targets = TARGETS, precision: str = "fp32"):
        self.folder, self.cached = folder, dict[tuple[str, str], Path]()
        self.targets, self.precision = targets, precision
        draw = random.Random(0)
        texts = [" ".join(draw.choices(WORDS, k=length)) for length in LENGTHS]
        (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        self.tokenizers = {
            task: save_tokenizer(folder / f"words-{task}", task)
            for task in ("masked_lm", "causal_lm")
        }

    def model(self, family: Family, role: str) -> Path:
        """Return a model of ``family`` for a role. Teachers, students and refused experts share
        one.
        """
        role = TEACHER if role == STUDENT or role in family.refused else role
        folder = self.folder / f"{name_of(family)}-{role}"
        return folder if folder.exists() else family.save(folder, role)

    def cache(self, family: Family, role: str) -> Cache:
        """Return the cache with the family's targets; InputError for those that are refused.

        The quick cases are made together, all others separately, because an example is read with
        the targets of every teacher in its cache.
        """
        if (family.title, role) not in self.cached:
            together = [f for f in FAMILIES if f.quick and f.task == family.task]
            together = together if self.targets is TARGETS else []
            asked = [(f, r) for f in together for r in (TEACHER, EXPERT) if r not in f.refused]
            path = self.folder / family.task
            if (family, role) not in asked:
                asked, path = [(family, role)], self.folder / f"cache-{name_of(family)}-{role}"
            cache_teachers(self.config(asked, path))
            self.cached |= dict.fromkeys(((f.title, r) for f, r in asked), path)
        return Cache.open(self.cached[family.title, role])

    def config(self, asked: list[tuple[Family, str]], path: Path) -> RunConfig:
        """Return a run file for the ``asked`` teachers and experts of one task."""
        task, cache = asked[0][0].task, dict[str, Any](path=str(path))
        if task == "masked_lm":  # the two replicas together mask every token once
            cache |= {"replicas": 2, "mask": {"policy": "cover"}}
        corpus = {
            "source": [str(self.folder / "text.jsonl")],
            "tokenizer": str(self.tokenizers[task]),
            "sequence_length": 24,
        }
        teachers = [teacher for family, role in asked for teacher in self.teachers(family, role)]
        return parse_settings(RunConfig, {"corpus": corpus, "cache": cache, "teachers": teachers})

    def teachers(self, family: Family, role: str) -> list[dict[str, Any]]:
        """Return its entries of a run file; two kinds of targets share the same passes."""
        about = {"model": str(self.model(family, role)), "task": family.task}
        about |= {"precision": self.precision}
        if role == EXPERT:
            return [about | {"name": name_of(family), "task": "sequence_classification"}]
        return [
            about | {"name": f"{name_of(family)}-{kind}", "targets": targets}
            for kind, targets in self.targets.items()
        ]


def name_of(family: Family) -> str:
    """Return a name usable for a folder and a teacher."""
    return "".join(letter if letter.isalnum() else "-" for letter in family.title).lower()
