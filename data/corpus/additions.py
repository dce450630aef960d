"""The additions in which a corpus grew; no text is read here, no shard written.

``corpus/corpus.json`` describes what a corpus was begun with. A longer corpus (a larger
``limit_sequences``, further source files after those that were read) is an addition to it,
``corpus/growth-001.json``: its sequences come after all that is there, which stays as it is.
``corpus/complete.json`` and ``corpus/complete-001.json`` say how many shards there are then.
"""

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from itertools import count, pairwise
from typing import cast

import xxhash

from rekindle.data.corpus.config import CorpusConfig, CorpusInfo, PackingFacts, TokenizerFacts
from rekindle.data.corpus.documents import only_files, source_files
from rekindle.data.corpus.stored_tokenizer import check_gaps
from rekindle.data.errors import CacheMismatchError, InputError, unusable
from rekindle.data.storage.seal import REPAIR, read_sealed, seal
from rekindle.data.storage.store import Store

log = logging.getLogger("rekindle")

States = dict[str, list[int | str]]  # path of a source file -> [bytes, checksum of samples]
SAMPLES = 8  # places at which a source file is looked at, to notice that it was changed
SAMPLE_BYTES = 1 << 16


@dataclass(frozen=True)
class Addition:
    """One span of a corpus: what it was begun with, or what it was then extended by."""

    number: int
    config: PackingFacts
    sources: States
    first_shard: int = 0
    first_sequence: int = 0
    shards: int | None = None  # shards at its end, of all additions; None while it is being made

    def ends_at(self, following: Sequence["Addition"]) -> int | None:
        """Sequences in the corpus at this addition's end, where that is known."""
        if following:
            return following[0].first_sequence
        return self.config["limit_sequences"]


def info_name(number: int) -> str:
    """Where the description of an addition is kept."""
    return "corpus/corpus.json" if number == 0 else f"corpus/growth-{number:03d}.json"


def complete_name(number: int) -> str:
    """Where it is recorded that an addition is finished."""
    return "corpus/complete.json" if number == 0 else f"corpus/complete-{number:03d}.json"


def read_additions(store: Store) -> tuple[list[Addition], TokenizerFacts | None]:
    """The additions of the corpus in ``store`` and its tokenizer's facts; none of a new cache.

    Raises CacheFormatError when a description is damaged.
    """
    additions: list[Addition] = []
    tokenizer: TokenizerFacts | None = None
    for number in count():
        name = info_name(number)
        try:
            body = read_sealed(store, name)
        except FileNotFoundError:
            # Where another begins, an addition has ended, whether that was recorded or not.
            ended = [replace(one, shards=after.first_shard) for one, after in pairwise(additions)]
            return ended + additions[-1:], tokenizer
        with _stated(store, name):
            after = body["after"] if number else {"shards": 0, "sequences": 0}
            if number == 0:
                tokenizer = body["tokenizer"]
                _check_tokenizer(body["tokenizer"])
            config, sources = cast("PackingFacts", dict(body["config"])), dict(body["sources"])
            shards, sequences = int(after["shards"]), int(after["sequences"])
        name, ends = complete_name(number), None
        with suppress(FileNotFoundError), _stated(store, name):
            ends = int(read_sealed(store, name)["shards"])
        additions.append(Addition(number, config, sources, shards, sequences, ends))
    raise AssertionError  # count() does not end


def _stated(store: Store, name: str) -> AbstractContextManager[None]:
    """CacheFormatError when what is read within does not say what the corpus is made of."""
    told = f"{store.location}/{name} is damaged: it does not say what the corpus is made of"
    wrong = (KeyError, TypeError, ValueError, OverflowError)
    return unusable(told, *wrong, advice=f". {REPAIR}")


def _check_tokenizer(facts: TokenizerFacts) -> None:
    """ValueError or the like unless these are facts that ``tokenizer_facts`` could have given."""
    size = facts["size"]
    optional = [number for number in (facts["mask_id"], facts["eos_id"]) if number is not None]
    ids = [facts["pad_id"], *optional, *facts["special_ids"]]
    if not isinstance(facts["digest"], str) or type(size) is not int or not 0 < size < 2**31:
        raise ValueError
    gaps = facts.get("holes", [])
    ends = [end for first, past in gaps for end in (first, past)]
    if not all(type(number) is int and 0 <= number < size for number in [*ids, *ends]):
        raise ValueError
    if any(a >= b for a, b in pairwise(ends)):
        raise ValueError


def claim_addition(
    store: Store,
    info: CorpusInfo,
    config: CorpusConfig,
    grown: Callable[[], tuple[int, int]],
) -> Addition:
    """The addition that ``config`` belongs to: the last one, or a new one that extends it.

    A new one is returned undescribed; ``describe_addition`` records it. ``grown()`` gives the
    shards and sequences there are, to begin a new one after; CacheMismatchError if it cannot begin
    there.
    Raises CacheMismatchError when the cache holds a corpus of another configuration or when the
    source was changed since.
    """
    additions, tokenizer = read_additions(store)
    if not additions:
        return Addition(0, info["config"], file_states(config.source))
    last = additions[-1]
    assert tokenizer is not None  # it stands in the first description
    if tokenizer != info["tokenizer"]:
        check_gaps(store, tokenizer, info["tokenizer"])
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
    return Addition(last.number + 1, new, sources or last.sources, shards, sequences)


def describe_addition(store: Store, addition: Addition, tokenizer: TokenizerFacts) -> None:
    """Record an addition, if it is not recorded yet; the one before it is at its end then."""
    body: dict[str, object] = {"config": addition.config, "sources": addition.sources}
    if addition.number:
        body["after"] = {"shards": addition.first_shard, "sequences": addition.first_sequence}
        store.create(complete_name(addition.number - 1), seal({"shards": addition.first_shard}))
    else:
        body["tokenizer"] = tokenizer
    if store.create(info_name(addition.number), seal(body)):
        return
    additions, present = read_additions(store)
    same = addition.number < len(additions) and additions[addition.number].config == addition.config
    if not same or present != tokenizer:
        raise _made_differently(store, "another process began it meanwhile")


def complete_addition(store: Store, addition: Addition, shards: int) -> None:
    """Record that an addition's last shard is there."""
    store.create(complete_name(addition.number), seal({"shards": shards}))


def _longer(old: PackingFacts, new: PackingFacts) -> bool:
    before, after = old["limit_sequences"], new["limit_sequences"]
    return before is not None and (after is None or after > before)


def _check_sources(last: Addition, present: States) -> bool:
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
    read = [path for path in source_files(last.config["source"]) if path in last.sources]
    if read != list(present)[: len(read)]:
        raise CacheMismatchError(
            f"the corpus source has its files in another order: {', '.join(read[:3])} were read "
            "first. A corpus grows by files that come after those already read"
        )
    return len(present) > len(last.sources)


def _states_or_none(config: CorpusConfig, complete: bool) -> States | None:
    try:
        return file_states(config.source)
    except InputError:
        if not complete:
            raise
        log.info("the corpus source is no longer there; going on with the corpus in the cache")
        return None


def file_states(source: Sequence[str]) -> States:
    """Size and a checksum of samples of every source file, by path, in reading order."""
    return {path: _state_of(path) for path in source_files(source)}


def _state_of(path: str) -> list[int | str]:
    state, size = xxhash.xxh3_64(), os.path.getsize(path)
    with open(path, "rb") as file:
        for sample in range(SAMPLES):
            file.seek(max(0, size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
            state.update(file.read(SAMPLE_BYTES))
    return [size, state.hexdigest()]


def _made_differently(store: Store, difference: str) -> CacheMismatchError:
    return CacheMismatchError(
        f"{store.location} holds a corpus made differently ({difference}). "
        "Use another cache.path for this corpus, or the configuration the cache was made with"
    )
