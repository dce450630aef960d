"""The card (README.md) of a cache: its content, its teachers and text, and how to read it.

It is beside the cache and not part of it: no checksum covers it, and only people and hubs read it.
What somebody has added (a licence in the block, words outside the marks) stays.
"""

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import yaml

from rekindle.data.corpus.corpus import Corpus
from rekindle.data.counted import counted, shown_bytes
from rekindle.data.errors import CacheError, InputError
from rekindle.data.hub.places import hub_place, is_hub
from rekindle.data.sharing.names import LICENCE, TAGS, last_part, shown_model
from rekindle.data.storage.base import Store
from rekindle.data.targets.reading.reader import TeacherReader

CARD = "README.md"
BEGIN = "<!-- begin: written by Rekindle, and again whenever the cache has changed -->"
END = "<!-- end -->"
TASKS = {
    "masked_lm": "fill-mask",
    "causal_lm": "text-generation",
    "sequence_classification": "text-classification",
    "regression": "text-classification",
    "token_classification": "token-classification",
    "embedding": "sentence-similarity",
}
# what people set
USER_KEYS = ("license", "license_name", "license_link", "language", "pretty_name")
SOURCES = 5  # that a card lists
_SIZES = {10 ** (3 + 3 * n + m): f"{10**m}{unit}" for n, unit in enumerate("KMB") for m in range(3)}
_SIZES[10**12] = "1T"
_BLOCK = re.compile(r"---\r?\n(.*?)\r?\n---\r?\n", re.DOTALL)


def write_card(
    store: Store, corpus: Corpus, teachers: Mapping[str, TeacherReader], version: int
) -> None:
    """Write the card of a complete cache, unless it is up to date.

    A cache that cannot be written to is left as it is.
    """
    if not (store.writable and corpus.complete and (teachers or store.exists(CARD))):
        return
    if any(one.coverage < 1 for one in teachers.values() if one.info.imported is None):
        return
    before = ""
    with suppress(FileNotFoundError, UnicodeDecodeError):
        before = store.read_bytes(CARD).decode()
    card = cache_card(corpus, teachers, version, before=before)
    if card != before:
        with suppress(InputError):  # of a full disk: what it tells of is whole
            store.replace(CARD, card.encode())


def cache_card(
    corpus: Corpus,
    teachers: Mapping[str, TeacherReader],
    version: int,
    *,
    address: str | None = None,
    with_text: bool = True,
    before: str = "",
) -> str:
    """Return the card. ``address``: where others find the cache (None: in the card's own folder);
    ``with_text``: whether its text is there too; ``before``: the current card, of which some parts
    stay.
    """
    block, surroundings = _split_card(before)
    body = [
        BEGIN,
        "",
        f"# What {counted(len(teachers), 'teacher')} said of {counted(len(corpus), 'sequence')} of "
        "text",
        "",
        "A cache of Rekindle: the teachers were run once over the text, and students are trained "
        "from what they said, without them.",
        *_teacher_lines(teachers.values()),
        *_text_lines(corpus),
        *_usage_lines(corpus, teachers, address, with_text),
        "",
        f"Cache format {version}. "
        + ("" if block.get("license") else LICENCE.format("the text, and of the teachers"))
        + "",
        END,
    ]
    values = _metadata(corpus, teachers, block, with_text)
    text = "\n".join(line.rstrip() for line in body)
    return f"---\n{values}---\n{surroundings[0]}{text}{surroundings[1]}"


def _metadata(
    corpus: Corpus,
    teachers: Mapping[str, TeacherReader],
    before: Mapping[str, Any],
    with_text: bool,
) -> str:
    """Return the block that hubs read, as YAML."""
    user_values: dict[str, Any] = {key: before[key] for key in USER_KEYS if before.get(key)}
    tasks = [TASKS[one.info.task] for one in teachers.values() if one.info.task in TASKS]
    values: dict[str, Any] = user_values | {
        "tags": [*TAGS, *(tag for tag in _as_list(before.get("tags")) if tag not in TAGS)],
        "size_categories": [_size_category(len(corpus))],
    }
    values |= {"task_categories": sorted({*tasks})} if tasks else {}
    parts = {"corpus": "corpus"} if with_text else {}
    parts |= {name: one.folder for name, one in teachers.items() if name != "corpus"}
    values["configs"] = [
        {"config_name": name, "data_files": f"{folder}/data/*.arrow"}
        for name, folder in parts.items()
    ]
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=1000)
    return text


def _size_category(rows: int) -> str:
    """Return the hub's category for so many rows."""
    previous = None
    for limit, word in _SIZES.items():
        if rows < limit:
            return f"n<{word}" if previous is None else f"{previous}<n<{word}"
        previous = word
    return f"n>{previous}"


def _as_list(value: object) -> list[str]:
    return [str(one) for one in value] if isinstance(value, list) else []


def _split_card(card: str) -> tuple[dict[str, Any], tuple[str, str]]:
    """Return the values of a card's block, and the text before and after our own words."""
    values: dict[str, Any] = {}
    match = _BLOCK.match(card)
    if match:
        with suppress(yaml.YAMLError):
            loaded = yaml.safe_load(match[1])
            values = loaded if isinstance(loaded, dict) else {}
        card = card[match.end() :]
    first, has_begin, remainder = card.partition(BEGIN)
    _, end, after = remainder.partition(END)
    return values, (first, after) if has_begin and end else ("\n", "\n")


def licence_of(card: str) -> str | None:
    """Return the licence in a card's block, if there is one."""
    found = _split_card(card)[0].get("license")
    return None if found is None else str(found)


def _teacher_lines(teachers: Iterable[TeacherReader]) -> Iterator[str]:
    yield from ("", "| teacher | model | task | kept | shown | bytes | run on | weights |")
    yield "|---|---|---|---|---|---:|---:|---|"
    lines: list[str] = []
    for one in teachers:
        info, stored = one.info, one.kind.description
        weights = f"`{one.fingerprint[:12]}`" if one.fingerprint else "not known"
        stored += f", {info.codec}" if info.codec != "default" else ""
        yield (
            f"| {info.name} | `{shown_model(info.model)}` | {info.task} | {stored} | "
            f"{info.view_class.kind} | {shown_bytes(one.bytes_on_disk)} | {one.coverage:.1%} | "
            f"{weights} |"
        )
        lines += _origin(one)
    if lines:
        yield from ("", *lines)


def _origin(teacher: TeacherReader) -> Iterator[str]:
    """Yield how a teacher came to be, if it was not run as it is."""
    info = teacher.info
    if info.imported:
        yield f"- {info.name} was imported, not run: {info.imported.summary()}."
    if info.served:
        yield f"- {info.name} was run by a server, and is known by its answers to probes."
    if info.mapped:
        yield f"- {info.name} has a tokenizer of its own; its tokens are mapped to the corpus's."
    for run in info.lineage:
        taught = ", ".join(f"{name} `{sha[:12]}`" for name, sha in run.teachers.items()) or "nobody"
        yield (
            f"- {info.name} is a student: of `{shown_model(run.student)}`, "
            f"{counted(run.steps, 'step')} on the corpus `{run.corpus[:12]}`, taught by {taught}."
        )


def _text_lines(corpus: Corpus) -> Iterator[str]:
    config, facts = corpus.info["config"], corpus.info["tokenizer"]
    names = [f"`{last_part(str(place))}`" for place in config["source"]]
    more = f" and {len(names) - SOURCES} more" if names[SOURCES:] else ""
    yield from ("", "## The text", "")
    yield (
        f"{counted(len(corpus), 'sequence')} of at most {config['sequence_length']} tokens, "
        f"{counted(corpus.tokens, 'token')}, of {', '.join(names[:SOURCES])}{more} (corpus "
        f"`{corpus.fingerprint[:12]}`). Tokenizer: {facts['size']:,} ids, digest "
        f"`{facts['digest'][:12]}`; it lies in `corpus/tokenizer`."
    )
    with suppress(CacheError):
        if domains := corpus.domains:
            shares = ", ".join(f"{name} {count:,}" for name, count in [*domains.items()][:SOURCES])
            yield f"Domains, by sequences: {shares}{', …' if len(domains) > SOURCES else ''}."


def run_file(corpus: Corpus, path: str) -> list[str]:
    """Return the lines of a run file that makes the same corpus from the same text, for a cache in
    ``path``. The last one says that no teacher is run.
    """
    config: Mapping[str, Any] = corpus.info["config"]
    names = [last_part(str(place)) for place in config["source"]]
    contents = config.get("contents") or ["text"] * len(names)
    source = [
        name if content == "text" else {"path": name, "format": content}
        for name, content in zip(names, contents, strict=True)
    ]
    values: dict[str, Any] = {"source": source, "tokenizer": f"{path}/corpus/tokenizer"}
    defaults = {"text_field": "text", "domain_field": None, "limit_sequences": None}
    keys = ("text_field", "domain_field", "pair_field", "group_field", "special_tokens")
    for key in (*keys, "attention", "limit_sequences"):
        if key in config and config[key] != defaults.get(key):
            values[key] = config[key]
    if without := config.get("without"):
        values["without"] = [last_part(str(name)) for name in without["files"]]
    values |= {key: config[key] for key in ("sequence_length", "packing")}
    shards = {"path": path, "sequences_per_shard": config["sequences_per_shard"]}
    lines = [f"corpus: {_flow(values)}", f"cache: {_flow(shards)}"]
    return [*lines, "teachers: []"]


def _flow(values: Mapping[str, Any]) -> str:
    text: str = yaml.safe_dump(
        dict(values), default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6
    )
    return text.strip()


def _usage_lines(
    corpus: Corpus, teachers: Mapping[str, TeacherReader], address: str | None, with_text: bool
) -> Iterator[str]:
    yield from ("", "## How to use it", "")
    if not with_text:
        yield from _rebuild_lines(corpus, address or "")
        return
    place = address or "the/path/of/this/folder"
    first = next(iter(teachers), "NAME")
    yield from ("```yaml", "# run.yaml, for `pipeline train-student run.yaml --out runs/a`")
    yield from run_file(corpus, place)[:-1]
    yield from ("student: {model: path/to/model}", "train:")
    yield f"  objective: {{distill: [{{teachers: [{first}]}}]}}"
    yield from ("```", "", "```python", "from rekindle.data.cache import Cache")
    yield f'cache = Cache.open("{place}")'
    yield from (f'batch = next(cache.batches(teachers=["{first}"], batch_sequences=8))', "```", "")
    yield (
        "It was made by `pipeline cache-teachers`; `pipeline verify` holds every byte against its "
        "checksum. Its files are Arrow, which `datasets`, pyarrow, polars and DuckDB read."
    )


def _rebuild_lines(corpus: Corpus, address: str) -> Iterator[str]:
    """Yield how somebody with the same text gets the whole cache."""
    place = hub_place(address) if is_hub(address) else None
    repo = "OWNER/NAME" if place is None else place.repo
    revision = f" --revision {shlex.quote(place.revision)}" if place and place.revision else ""
    yield (
        "**The text is not here**: of the corpus there are the checksums, the tokenizer and how it "
        "was cut. Whoever has the same files of text makes it again, and each target is held "
        "against the digest of its sequence:"
    )
    yield from ("", "```sh", f"hf download {repo} --repo-type dataset{revision} --local-dir shared")
    yield "pipeline cache-teachers rebuild.yaml   # reads the text, runs no teacher"
    yield from ("pipeline verify shared", "```", "", "```yaml", "# rebuild.yaml")
    yield from (*run_file(corpus, "shared"), "```", "")
    yield (
        "Files of text are known by their content, wherever they lie. `verify` says that all is "
        "sound where every sequence is the same to the byte; other text is refused."
    )
