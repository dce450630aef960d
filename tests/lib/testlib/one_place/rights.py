"""Judge a command that accepts a changed file and gives another result: a plain reading of the file
must say the same. Everything else must be unchanged.
"""

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import yaml

from rekindle.data.cache import Cache
from rekindle.pipeline.checks.verify import verify_cache
from testlib.one_place import plain
from testlib.one_place.changes import at
from testlib.one_place.commands import same
from testlib.one_place.judged import Made
from testlib.one_place.world import World


def right(world: World, made: Made, found: Any, expected: Any) -> str:
    """Return "" or what is wrong with a result."""
    if same(found, expected):
        return ""
    kind = next(kind for ends, kind in KINDS.items() if made.file.endswith(ends))
    return kind(world, made, found, expected)


def of_run_file(world: World, made: Made, found: Any, expected: Any) -> str:
    """Check that the run, or the cache, follows the changed key."""
    if made.command == "plan":
        return ""
    if made.command == "cache":
        return sound(world, "cache")
    about = json.loads((world.root / "new/run.json").read_text())
    section = made.change.place[0]
    if section == "teachers":  # the number of candidates read follows the file
        k = yaml.safe_load((world.root / "run.yaml").read_text())["teachers"][0]["targets"]["k"]
        return "" if about["cache"]["targets"]["lm"]["k"] == k else f"not {k} candidates"
    if section not in ("student", "train"):
        return "other weights, though neither student nor train is another"
    try:
        said, kept = made.change.now(), at(about, made.change.place)
    except (KeyError, IndexError, TypeError):
        return ""  # it is gone, so the default holds
    return "" if covers(kept, said) else f"run.json has {kept!r}"


def of_cycle_file(world: World, made: Made, found: Any, expected: Any) -> str:
    try:
        said, kept = made.change.now(), at(found, made.change.place)
    except (KeyError, IndexError, TypeError):
        return ""
    return "" if covers(kept, said) else f"run.yaml has {kept!r}"


def of_sweep(world: World, made: Made, found: Any, expected: Any) -> str:
    """Allow ``compare`` to show another planned student, but no other weights."""
    return "" if made.command == "compare sweep" else "other weights"


def covers(kept: Any, said: Any) -> bool:
    """Return whether the kept values contain everything said; others may be defaults."""
    if isinstance(said, dict) and isinstance(kept, dict):
        return all(covers(kept.get(key), value) for key, value in said.items())
    if isinstance(said, list) and isinstance(kept, list):
        return len(said) == len(kept) and all(map(covers, kept, said))
    return bool(kept == said or said in (None, [], {}))


def of_labels(world: World, made: Made, found: Any, expected: Any) -> str:
    rows = plain.records(world.root / made.file)
    if made.command == "finetune":
        names = json.loads((world.root / "tuned/config.json").read_text())["id2label"]
        said = sorted({row["label"].strip() for row in rows})
        return "" if sorted(names.values()) == said else f"its labels are {names}"
    wanted = plain.probabilities(world.root / "expert", [row["text"] for row in rows])
    names = [["no", "yes"][best] for best in wanted.argmax(axis=1)]
    score = np.mean([name == row["label"] for name, row in zip(names, rows, strict=True)])
    given = found["scores"]["accuracy"]
    return "" if math.isclose(given, score, abs_tol=1e-6) else f"accuracy {given}, not {score}"


def of_texts(world: World, made: Made, found: Any, expected: Any) -> str:
    if made.command == "perplexity":
        return ""
    rows = plain.records(world.root / made.file)
    if made.command == "predict":
        return judged_plainly(world, [row["text"] for row in rows], found, expected)
    wanted = [plain.pieces(world.root / "student", row["text"]) for row in rows]
    return holds(world, "new-text", [ids for ids in wanted if ids])


ENDS = {2, 3}  # [CLS] and [SEP]


def holds(world: World, name: str, wanted: list[list[int]]) -> str:
    """Check that a sound cache has these tokens; the special tokens of documents do not matter."""
    cache = Cache.open(world.root / name)
    given = [int(n) for e in map(cache.example, range(len(cache))) for n in e.input_ids]
    said = [number for ids in wanted for number in ids if number not in ENDS]
    if [number for number in given if number not in ENDS] != said:
        return f"the corpus holds {len(given)} tokens, which are not the {len(said)} of the file"
    return sound(world, name)


def sound(world: World, name: str) -> str:
    problems = verify_cache(str(world.root / name)).problems
    return f"the cache is not sound: {problems[0]}" if problems else ""


def of_chat(world: World, made: Made, found: Any, expected: Any) -> str:
    if made.command == "generate":
        others = [n for n in range(len(expected)) if n != int(made.line) - 1]
        return "" if all(same(found[n], expected[n]) for n in others) else "other rows differ"
    rows = {row["document"]: row for row in shard_rows(world, "new-chat")}
    for number, record in enumerate(plain.records(world.root / made.file), 1):
        said = "".join(
            text_of(message.get("content")) + " "
            for message in record["messages"]
            if message["role"] == "assistant"
        )
        wanted = [one for one in plain.pieces(world.root / "student", said) if one not in ENDS]
        row = rows.get(f"chat.jsonl:{number}")
        if row is None:  # nothing to learn, or all of it was cut
            if wanted and len(str(record)) < LONG:
                return f"dialogue {number} is missing"
            continue
        each = zip(row["input_ids"], row["trained"], strict=True)
        given = [one for one, is_trained in each if is_trained and one not in ENDS]
        if given != wanted[: len(given)] or (len(given) < len(wanted) and len(str(record)) < LONG):
            return f"dialogue {number} has {given} trained, not {wanted}"
    return sound(world, "new-chat")


LONG = 300  # characters of a record, of which some may be cut


def text_of(content: Any) -> str:
    return content if isinstance(content, str) else "" if content is None else str(content)


def shard_rows(world: World, name: str) -> list[dict[str, Any]]:
    corpus = Cache.open(world.root / name).corpus
    tables = (corpus.shard(number).table() for number in range(len(corpus.commits)))
    return [row for table in tables for row in table.to_pylist()]


def of_tokens(world: World, made: Made, found: Any, expected: Any) -> str:
    rows = plain.records(world.root / made.file)
    return holds(world, "new-tokens", [[int(n) for n in row["input_ids"]] for row in rows])


def of_model(world: World, made: Made, found: Any, expected: Any) -> str:
    """Compare an expert with transformers alone, on the changed folder."""
    if made.file.startswith("expert/") and made.command == "predict":
        texts = [row["text"] for row in plain.records(world.root / "docs.jsonl")]
        return judged_plainly(world, texts, found, expected)
    if made.command.startswith("cache"):
        return sound(world, "new-text")
    return ""


def judged_plainly(world: World, texts: list[str], found: Any, expected: Any) -> str:
    """Check that transformers alone gives the same; if it loads no model because label names are
    missing, that everything else is unchanged.
    """
    given = values_of(found)
    try:
        wanted = plain.probabilities(world.root / "expert", texts)
    except RuntimeError:
        wanted = values_of(expected)
    if given.shape != wanted.shape or not np.allclose(given, wanted, atol=1e-5):
        return "transformers alone says otherwise"
    return ""


def values_of(rows: Any) -> np.ndarray:
    return np.array([list(row["probabilities"].values()) for row in rows])


def of_expert(world: World, made: Made, found: Any, expected: Any) -> str:
    """Allow an expert to be asked by what remains of its fine-tuning record, as in older
    results.
    """
    return "" if made.change.keys[:1] == ["config"] and len(made.change.place) > 1 else "other"


def never(world: World, made: Made, found: Any, expected: Any) -> str:
    """Refuse any other result; only ``plan`` may count by a forged file."""
    return "" if made.signed and made.command == "plan" else "other result"


def of_comparison(world: World, made: Made, found: Any, expected: Any) -> str:
    """Allow ``compare`` to show what the folders say."""
    return "" if made.command == "compare" else "other result"


Right = Callable[[World, Made, Any, Any], str]
KINDS: dict[str, Right] = {
    "run.yaml": of_run_file,
    "cycle.yaml": of_cycle_file,
    "sweep.json": of_sweep,
    "labels.jsonl": of_labels,
    "docs.jsonl": of_texts,
    "chat.jsonl": of_chat,
    "tokens.jsonl": of_tokens,
    "half/run.json": of_comparison,
    "taught/metrics.json": of_expert,
    "metrics.jsonl": of_comparison,
    "whole/run.json": of_comparison,
    "whole/summary.json": of_comparison,
    "whole/config.json": of_model,
    "generation_config.json": of_model,
    "expert/config.json": of_model,
    "lm/config.json": of_model,
    "student/config.json": of_model,
    "expert/tokenizer.json": of_model,
    "student/tokenizer.json": of_model,
    "tokenizer_config.json": of_model,
    "special_tokens_map.json": of_model,
    "model.safetensors": of_model,
    "": never,
}
