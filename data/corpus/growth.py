"""What a corpus is made of, and the stages in which it grew; no text is read here, no shard
written.

``corpus/corpus.json`` describes what a corpus was begun with. A longer corpus (a larger
``limit_sequences``, further source files after those that were read) is a further stage,
``corpus/growth-001.json``: its sequences come after all that is there, which stays as it is.
``corpus/complete.json`` and ``corpus/complete-001.json`` say how many shards there are at a stage's
end.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, pairwise
from typing import Any, Literal

import xxhash
from pydantic import Field, field_validator

from rekindle.data.corpus.documents import only_files, source_files
from rekindle.data.corpus.tokenizer import Tokenizer
from rekindle.data.errors import CacheFormatError, CacheMismatchError, InputError
from rekindle.data.settings import Settings
from rekindle.data.storage.seal import REPAIR, read_sealed, seal
from rekindle.data.storage.store import Store

log = logging.getLogger("rekindle")

MAX_SEQUENCE_LENGTH = 65_536  # positions are stored as uint16
SAMPLES = 8  # places at which a source file is looked at, to notice that it was changed
SAMPLE_BYTES = 1 << 16


class CorpusConfig(Settings):
    """Where the text comes from and how it becomes sequences."""

    source: tuple[str, ...] = Field(
        description="files or globs (txt, jsonl, parquet, arrow), a datasets id, or python-docs"
    )
    text_field: str = Field("text", description="the field of a record that holds its text")
    domain_field: str | None = Field(None, description="the field that names a record's domain")
    tokenizer: str = Field(description="the student's tokenizer: a directory or a hub id")
    sequence_length: int = Field(
        128,
        ge=8,
        le=MAX_SEQUENCE_LENGTH,
        description="tokens per sequence, special tokens included",
    )
    packing: Literal["document", "contiguous"] = Field(
        "document", description="document never crosses a document; contiguous fills every sequence"
    )
    limit_sequences: int | None = Field(None, gt=0, description="stop after this many sequences")

    @field_validator("source", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


@dataclass(frozen=True)
class Stage:
    """One span of a corpus: what it was begun with, or what it was then extended by."""

    number: int
    config: dict[str, Any]  # all that decides the sequences, but the tokenizer
    sources: dict[str, list[Any]]  # path -> [bytes, checksum of samples]
    first_shard: int = 0
    first_sequence: int = 0
    shards: int | None = None  # shards at its end, of all stages; None while it is being made

    def ends_at(self, following: Sequence["Stage"]) -> int | None:
        """Sequences in the corpus at this stage's end, where that is known."""
        if following:
            return following[0].first_sequence
        limit: int | None = self.config["limit_sequences"]
        return limit


def info_name(number: int) -> str:
    """Where the description of a stage is kept."""
    return "corpus/corpus.json" if number == 0 else f"corpus/growth-{number:03d}.json"


def complete_name(number: int) -> str:
    """Where it is recorded that a stage is finished."""
    return "corpus/complete.json" if number == 0 else f"corpus/complete-{number:03d}.json"


def describe_corpus(
    config: CorpusConfig, tokenizer: Tokenizer, sequences_per_shard: int
) -> dict[str, Any]:
    """What a corpus is made of: everything that decides its bytes, nothing that does not."""
    values = config.model_dump(mode="json", exclude={"tokenizer"})
    return {
        "config": values | {"sequences_per_shard": sequences_per_shard},
        "tokenizer": tokenizer_facts(tokenizer),
    }


def tokenizer_facts(tokenizer: Tokenizer) -> dict[str, Any]:
    """What a cache records of the tokenizer beside its files."""
    return {
        "digest": tokenizer.digest,
        "size": tokenizer.size,
        "mask_id": tokenizer.mask_id,
        "pad_id": tokenizer.pad_id,
        "eos_id": tokenizer.eos_id,
        "special_ids": sorted(tokenizer.special_ids),
    }


def read_stages(store: Store) -> tuple[list[Stage], dict[str, Any] | None]:
    """The stages of the corpus in ``store`` and its tokenizer's facts; none of a new cache.

    Raises CacheFormatError when a description is damaged.
    """
    stages: list[Stage] = []
    tokenizer = None
    for number in count():
        name = info_name(number)
        try:
            body = read_sealed(store, name)
        except FileNotFoundError:
            # Where another begins, a stage has ended, whether that was recorded or not.
            ended = [replace(s, shards=following.first_shard) for s, following in pairwise(stages)]
            return ended + stages[-1:], tokenizer
        try:
            after = body["after"] if number else {"shards": 0, "sequences": 0}
            if number == 0:
                tokenizer = body["tokenizer"]
                _check_tokenizer(tokenizer)
            stages.append(
                Stage(
                    number,
                    dict(body["config"]),
                    dict(body["sources"]),
                    int(after["shards"]),
                    int(after["sequences"]),
                    _shards_at_end(store, number),
                )
            )
        except (KeyError, TypeError, ValueError, OverflowError):
            raise CacheFormatError(
                f"{store.location}/{name} is damaged: it does not say what the corpus is made of. "
                f"{REPAIR}"
            ) from None
    raise AssertionError  # count() does not end


def _check_tokenizer(facts: dict[str, Any]) -> None:
    """ValueError or the like unless these are facts that ``tokenizer_facts`` could have given."""
    size = facts["size"]
    optional = [facts[key] for key in ("mask_id", "eos_id") if facts[key] is not None]
    ids = [facts["pad_id"], *optional, *facts["special_ids"]]
    if not isinstance(facts["digest"], str) or type(size) is not int or not 0 < size < 2**31:
        raise ValueError
    if not all(type(number) is int and 0 <= number < size for number in ids):
        raise ValueError


def _shards_at_end(store: Store, number: int) -> int | None:
    name = complete_name(number)
    try:
        return int(read_sealed(store, name)["shards"])
    except FileNotFoundError:
        return None
    except (KeyError, TypeError, ValueError, OverflowError):
        raise CacheFormatError(f"{store.location}/{name} is damaged. {REPAIR}") from None


def claim_stage(
    store: Store,
    info: Mapping[str, Any],
    config: CorpusConfig,
    grown: Callable[[], tuple[int, int]],
) -> Stage:
    """The stage that ``config`` belongs to: the last one, or a new one that extends it.

    A new stage is returned undescribed; ``describe_stage`` records it. ``grown()`` gives the shards
    and sequences there are, to begin a new one after; CacheMismatchError if it cannot begin there.
    Raises CacheMismatchError when the cache holds a corpus of another configuration or when the
    source was changed since.
    """
    stages, tokenizer = read_stages(store)
    if not stages:
        return Stage(0, dict(info["config"]), file_states(config.source))
    last = stages[-1]
    if tokenizer != info["tokenizer"]:
        raise _made_differently(store, "another tokenizer")
    new = info["config"]
    changed = sorted(k for k in last.config.keys() | new.keys() if last.config.get(k) != new.get(k))
    sources = _states_or_none(config, complete=last.shards is not None)
    appended = sources is not None and _check_sources(last, sources)
    if appended and not (only_files(config.source) and only_files(last.config["source"])):
        raise _made_differently(store, "files come after a source that is no file")
    if not changed and not appended:
        return last
    allowed = {"limit_sequences"} if _longer(last.config, new) else set()
    allowed |= {"source"} if appended else set()
    if set(changed) - allowed:
        shown = (f"{k}: {last.config.get(k)!r} there, {new.get(k)!r} here" for k in changed)
        raise _made_differently(store, "; ".join(shown))
    shards, sequences = grown()
    return Stage(last.number + 1, dict(new), dict(sources or last.sources), shards, sequences)


def describe_stage(store: Store, stage: Stage, tokenizer: Mapping[str, Any]) -> None:
    """Record a stage, if it is not recorded yet; a stage that it extends is at its end then."""
    body: dict[str, Any] = {"config": stage.config, "sources": stage.sources}
    if stage.number:
        body["after"] = {"shards": stage.first_shard, "sequences": stage.first_sequence}
        store.create(complete_name(stage.number - 1), seal({"shards": stage.first_shard}))
    else:
        body["tokenizer"] = dict(tokenizer)
    if store.create(info_name(stage.number), seal(body)):
        return
    stages, present = read_stages(store)
    same = stage.number < len(stages) and stages[stage.number].config == stage.config
    if not same or present != dict(tokenizer):
        raise _made_differently(store, "another process began it meanwhile")


def complete_stage(store: Store, stage: Stage, shards: int) -> None:
    """Record that a stage's last shard is there."""
    store.create(complete_name(stage.number), seal({"shards": shards}))


def _longer(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    before, after = old["limit_sequences"], new["limit_sequences"]
    return before is not None and (after is None or after > before)


def _check_sources(last: Stage, present: Mapping[str, list[Any]]) -> bool:
    """Whether source files were appended. A changed source must not be mixed with what was read of
    it before, nor pass unnoticed.
    """
    first = dict(list(present.items())[: len(last.sources)])
    changed = sorted(p for p in first.keys() | last.sources if first.get(p) != last.sources.get(p))
    if changed:
        raise CacheMismatchError(
            f"the corpus source has changed since the cache was begun: {', '.join(changed[:3])}. "
            "A corpus grows by files that come after those already read (and by a larger "
            "limit_sequences). Use another cache.path for changed text"
        )
    # Sealed files have their keys sorted: the order is that of the description's own source.
    read = [f.path for f in source_files(last.config["source"]) if f.path in last.sources]
    if read != list(present)[: len(read)]:
        raise CacheMismatchError(
            f"the corpus source has its files in another order: {', '.join(read[:3])} were read "
            "first. A corpus grows by files that come after those already read"
        )
    return len(present) > len(last.sources)


def _states_or_none(config: CorpusConfig, complete: bool) -> dict[str, list[Any]] | None:
    try:
        return file_states(config.source)
    except InputError:
        if not complete:
            raise
        log.info("the corpus source is no longer there; going on with the corpus in the cache")
        return None


def file_states(source: Sequence[str]) -> dict[str, list[Any]]:
    """Size and a checksum of samples of every source file, by path, in reading order."""
    return {f.path: [f.bytes, _sampled(f.path, f.bytes)] for f in source_files(source)}


def _sampled(path: str, size: int) -> str:
    state = xxhash.xxh3_64()
    with open(path, "rb") as file:
        for sample in range(SAMPLES):
            file.seek(max(0, size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
            state.update(file.read(SAMPLE_BYTES))
    return str(state.hexdigest())


def _made_differently(store: Store, difference: str) -> CacheMismatchError:
    return CacheMismatchError(
        f"{store.location} holds a corpus made differently ({difference}). "
        "Use another cache.path for this corpus, or the configuration the cache was made with"
    )
