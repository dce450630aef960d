"""Which additions a corpus consists of: read, compared with a configuration, and recorded.

``corpus/corpus.json`` describes what a corpus was begun with. A longer corpus (a larger
``limit_sequences``, further source files after those that were read) is an addition to it,
``corpus/growth-001.json``: its sequences come after all existing ones, which do not change.
``corpus/complete.json`` and ``corpus/complete-001.json`` say how many shards there were
when each was complete.

A description has the size and a checksum of samples of every source file, by its path at the time
(``sources``), the ``order`` in which they and other sources were read, and the ``contents`` of
those whose records are not texts. An end counts the ``bad_records`` that were left out, by kind,
and ``held``: records left out because they contain a test's text. A missing key means the behaviour
of the version that wrote the file. No text is read here, and no shard written.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from itertools import count, pairwise
from typing import Any, cast

from rekindle.data.corpus.config import (
    CorpusConfig,
    CorpusInfo,
    PackingFacts,
    TokenizerFacts,
    differing_keys,
    with_recorded_rules,
)
from rekindle.data.corpus.stored_tokenizer import check_gaps
from rekindle.data.counted import counted
from rekindle.data.errors import CacheMismatchError, InputError, unusable
from rekindle.data.places import same_place
from rekindle.data.source.generated import check_generated, generated_in
from rekindle.data.source.held_texts import HeldCounts
from rekindle.data.source.left_out import LeftOut
from rekindle.data.source.source_states import (
    Present,
    States,
    assumed_order,
    contents_of,
    find_present,
    match_recorded,
    states_of,
)
from rekindle.data.source.sources import Entry, Origin
from rekindle.data.storage.base import Store
from rekindle.data.storage.commits import Commits
from rekindle.data.storage.seal import REPAIR, read_sealed, seal

log = logging.getLogger("rekindle")


@dataclass(frozen=True)
class Addition:
    """One span of a corpus: what it was begun with, or what it was then extended by.

    ``sources``: the files that it and those before it read; ``order``: everything they read, in
    reading order; ``origins``: where these are now, and what is new (empty until looked for).
    ``bad_records``: how many were left out of it and those before it, by kind; ``held``: how many
    because they hold a text of a test. ``contents``: the kinds of content that are not text, by
    place; ``generated``: for those that a model generated, which model, and how.
    """

    number: int
    config: PackingFacts
    sources: States
    order: tuple[str, ...]
    first_shard: int = 0
    first_sequence: int = 0
    shards: int | None = None  # shards at its end, of all additions; None while it is being made
    bad_records: Mapping[str, int] = field(default_factory=dict)
    held: HeldCounts = field(default_factory=HeldCounts)
    contents: Mapping[str, str] = field(default_factory=dict)
    generated: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    origins: tuple[Origin, ...] = field(default=(), compare=False)

    def end_sequence(self, following: Sequence["Addition"]) -> int | None:
        """Return the sequences in the corpus at this addition's end, if known."""
        if following:
            return following[0].first_sequence
        return self.config["limit_sequences"]


def info_name(number: int) -> str:
    """Return where the description of an addition is kept."""
    return "corpus/corpus.json" if number == 0 else f"corpus/growth-{number:03d}.json"


def complete_name(number: int) -> str:
    """Return where it is recorded that an addition is finished."""
    return "corpus/complete.json" if number == 0 else f"corpus/complete-{number:03d}.json"


def read_additions(store: Store) -> tuple[list[Addition], TokenizerFacts | None]:
    """Return the additions of the corpus in ``store`` and its tokenizer's facts; none for a new
    cache.

    Raises CacheFormatError if a description is damaged.
    """
    additions: list[Addition] = []
    tokenizer: TokenizerFacts | None = None
    for number in count():
        name = info_name(number)
        try:
            body = read_sealed(store, name)
        except FileNotFoundError:
            # If another one begins, an addition has ended, whether that was recorded or not.
            ended = [replace(one, shards=after.first_shard) for one, after in pairwise(additions)]
            return ended + additions[-1:], tokenizer
        with _checking_description(store, name):
            start = body["after"] if number else {"shards": 0, "sequences": 0}
            if number == 0:
                tokenizer = body["tokenizer"]
                _check_tokenizer(body["tokenizer"])
            config, sources = cast("PackingFacts", dict(body["config"])), dict(body["sources"])
            if not all(isinstance(state, list) for state in sources.values()):
                raise TypeError("sources has, for some file, no list of its size and checksum")
            order = tuple(map(str, body.get("order") or assumed_order(config["source"], sources)))
            if not all(order):
                raise ValueError("order has a file without a name")
            shards, sequences = int(start["shards"]), int(start["sequences"])
            contents: dict[str, str] = dict(body.get("contents", {}))
            generated = {str(place): dict(of) for place, of in body.get("generated", {}).items()}
        name, ended_at, bad_records, held = complete_name(number), None, {}, HeldCounts()
        with suppress(FileNotFoundError), _checking_description(store, name):
            end = read_sealed(store, name)
            ended_at = int(end["shards"])
            bad_records = {
                str(kind): int(count) for kind, count in end.get("bad_records", {}).items()
            }
            counts = end.get("held", {})
            held = HeldCounts(*(int(counts.get(kind, 0)) for kind in HeldCounts._fields))
        addition = Addition(
            number, config, sources, order, shards, sequences, ended_at, bad_records, held
        )
        additions.append(replace(addition, contents=contents, generated=generated))
    raise AssertionError  # count() does not end


def recorded_shard_size(store: Store) -> int | None:
    """Return the sequences per shard of the corpus in ``store``; None if none is begun."""
    additions = read_additions(store)[0]
    return additions[-1].config["sequences_per_shard"] if additions else None


def _checking_description(store: Store, name: str) -> AbstractContextManager[None]:
    """Raise CacheFormatError if what is read within does not describe a corpus."""
    message = f"{store.location}/{name} is damaged: it does not say what the corpus is made of"
    bad_content = (KeyError, TypeError, ValueError, OverflowError)
    return unusable(message, *bad_content, advice=f". {REPAIR}")


def _check_tokenizer(facts: TokenizerFacts) -> None:
    """Raise ValueError or similar unless ``tokenizer_facts`` could have given these facts."""
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


def resolve_addition(
    store: Store,
    info: CorpusInfo,
    config: CorpusConfig,
    count_existing: Callable[[], tuple[int, int]],
) -> Addition:
    """Return the addition that ``config`` belongs to: the last one, or a new one that extends it.

    A new one is returned without a record; ``record_addition`` writes it. ``count_existing()``
    returns the shards and sequences there are, after which the new one begins; it raises
    CacheMismatchError if a shard is missing. This raises CacheMismatchError, too, if the cache
    holds a corpus of another configuration or the source was changed.
    """
    additions, tokenizer = read_additions(store)
    if not additions:
        addition = new_addition(info["config"], find_present(config.entries))
        check_generated(addition.generated, info["tokenizer"]["digest"])
        return addition
    last = additions[-1]
    assert tokenizer is not None  # it is in the first description
    if tokenizer != info["tokenizer"]:
        check_gaps(store, tokenizer, info["tokenizer"])
        raise _made_differently(store, "another tokenizer")
    new = with_recorded_rules(info["config"], last.config)
    if new != info["config"]:
        log.info("corpus: it was begun without end-of-text tokens, and continues so")
    present = _present_or_none(config.entries, last)
    unordered = sorted(last.sources.keys() - {*last.order})
    order = (*last.order, *unordered)
    found_origins: list[Origin] = []
    added: list[Origin] = []
    if present is not None:
        found_origins, added = match_recorded(order, last.sources, present, last.contents)
    last = replace(last, origins=(*found_origins, *added))
    changed_keys = differing_keys(last.config, new)
    if not changed_keys and not added and not (unordered and last.shards is None):
        return last
    if set(changed_keys) - ({"limit_sequences"} if _is_longer(last.config, new) else set()):
        differences = (
            f"{k}: {describe_value(last.config, k)} there, {describe_value(new, k)} here"
            for k in changed_keys
        )
        raise _made_differently(store, "; ".join(differences))
    if unordered:
        raise CacheMismatchError(
            f"{store.location} does not record the order in which its {len(order)} source files "
            f"were read (an older version made it; where {unordered[0]} was in "
            f"{last.config['source']} cannot be known), so nothing can be added. Use another "
            "cache.path"
        )
    shards, sequences = count_existing()
    if present is None:
        present = find_present(config.entries)  # it reports what is missing
    sources, order = states_of(present), tuple(origin.place for origin in last.origins)
    addition = Addition(last.number + 1, new, sources, order, shards, sequences)
    addition = _with_contents(addition, present, last.origins)
    check_generated(addition.generated, info["tokenizer"]["digest"])
    return addition


def new_addition(
    config: PackingFacts,
    present: Sequence[Present],
    number: int = 0,
    first_shard: int = 0,
    first_sequence: int = 0,
) -> Addition:
    """Return a corpus, or a part of one, made from what is ``present``."""
    origins = tuple(one.origin for one in present)
    order = tuple(origin.place for origin in origins)
    addition = Addition(number, config, states_of(present), order, first_shard, first_sequence)
    return _with_contents(addition, present, origins)


def _with_contents(
    addition: Addition, present: Sequence[Present], origins: tuple[Origin, ...]
) -> Addition:
    """Return it with what is known of the present origins."""
    known = {"contents": contents_of(present), "generated": generated_in(origins)}
    return replace(addition, origins=origins, **known)  # type: ignore[arg-type]


def record_addition(store: Store, addition: Addition, tokenizer: TokenizerFacts) -> None:
    """Record an addition, if it is not recorded yet; this ends the one before it."""
    body: dict[str, object] = {"config": addition.config, "sources": addition.sources}
    body["order"] = list(addition.order)
    if addition.contents:
        body["contents"] = dict(addition.contents)
    if addition.generated:
        body["generated"] = dict(addition.generated)
    if addition.number:
        body["after"] = {"shards": addition.first_shard, "sequences": addition.first_sequence}
        store.create(complete_name(addition.number - 1), seal({"shards": addition.first_shard}))
    else:
        body["tokenizer"] = tokenizer
    if store.create(info_name(addition.number), seal(body)):
        return
    additions, recorded_tokenizer = read_additions(store)
    same = addition.number < len(additions) and additions[addition.number].config == addition.config
    if not same or recorded_tokenizer != tokenizer:
        raise _made_differently(store, "another process began it meanwhile")


def complete_addition(
    store: Store, addition: Addition, shards: int, bad_records: Mapping[str, int], held: HeldCounts
) -> None:
    """Record that an addition's last shard is there, and what was left out on the way."""
    body: dict[str, object] = {"shards": shards}
    if bad_records:
        body["bad_records"] = dict(bad_records)
    if sum(held):
        body["held"] = held._asdict()
    store.create(complete_name(addition.number), seal(body))


def count_left_out(
    left_out: LeftOut, committed: Commits, end_sequence: int | None
) -> tuple[dict[str, int], HeldCounts]:
    """Return how many records were left out before the corpus's end: bad ones, by kind, and those
    that hold a text of a test.
    """
    last = last_document(committed, end_sequence)
    return left_out.counts(last), left_out.held(last)


def last_document(commits: Commits, end_sequence: int | None) -> int | None:
    """Return the index of the last document in a corpus that ends after ``end_sequence`` sequences
    (reading goes beyond that); None if the source ends first, -1 if no document is in it.
    """
    if end_sequence is None or commits.rows.sum() < end_sequence:
        return None
    if not commits:
        return -1
    document, token = commits.last_commit.facts["next"]
    return int(document) - (token == 0)


def _is_longer(old: PackingFacts, new: PackingFacts) -> bool:
    before, after = old["limit_sequences"], new["limit_sequences"]
    return before is not None and (after is None or after > before)


def has_corpus(store: Store) -> bool:
    """Return whether there is a corpus in ``store``, complete or not."""
    return bool(read_additions(store)[0])


def is_same_source(store: Store, source: Sequence[str | Entry]) -> bool:
    """Return whether ``source`` is exactly what the corpus in ``store`` was read from, however it
    is written.
    """
    additions = read_additions(store)[0]
    if not additions:
        return False
    last = additions[-1]
    try:
        present = _present_or_none(source, last)
        if present is None:  # the places equal the recorded ones, and no longer exist
            return True
        return not match_recorded(last.order, last.sources, present, last.contents)[1]
    except (InputError, CacheMismatchError):
        return False


def _present_or_none(source: Sequence[str | Entry], last: Addition) -> list[Present] | None:
    """Return what the source stands for; None if it is missing and no longer needed."""
    try:
        return find_present(source)
    except InputError as error:
        recorded = last.config["source"]
        if last.shards is None:
            raise
        if not same_place([Entry.of(one).place for one in source], recorded):
            raise InputError(
                f"{error}. Or, as the corpus in the cache is complete, leave corpus.source as it "
                f"was: [{', '.join(recorded)}], even if that no longer exists"
            ) from None
        log.info("the corpus source no longer exists; continuing with the corpus in the cache")
        return None


def _made_differently(store: Store, difference: str) -> CacheMismatchError:
    return CacheMismatchError(
        f"{store.location} holds a corpus that was made differently ({difference}). Use another "
        "cache.path for this corpus, or the configuration the cache was made with"
    )


def empty_corpus_error(config: CorpusConfig, left_out: LeftOut) -> InputError:
    """Return the error for a source without a sequence."""
    usual = "give a source with at least one non-blank document, or the model's own tokenizer"
    if config.contents != {"text"}:
        usual += (
            ". Dialogues and rows of tokens count only if some token is trained: what the role "
            "'assistant' (not 'gpt' or 'model') says within sequence_length, labels other than "
            "-100, a loss_mask of 1"
        )
    advice = left_out.advice(usual)
    return InputError(
        f"the corpus is empty: no text in {', '.join(config.places)} (field "
        f"{config.text_field!r}) gives the tokenizer {config.tokenizer} a token; "
        f"{advice}{f'; {described}' if (described := left_out.describe()) else ''}"
    )


# Defaults of keys that are not recorded.
UNRECORDED_DEFAULTS: dict[str, object] = {
    "special_tokens": "text",
    "without": "nothing",
    "pair_field": None,
    "attention": "row",
}


def describe_value(config: PackingFacts, key: str) -> str:
    """Return its value of a key, for a message."""
    if key == "without" and (without := config.get("without")):
        names = ", ".join(map(os.path.basename, without["files"]))
        rule = f"{without['digest'][:8]}, found by rule {without['rule']}"
        return f"{counted(without['texts'], 'text')} of {names} ({rule})"
    value = (UNRECORDED_DEFAULTS | config).get(key)
    return str(value) if key == "without" else repr(value)


def shard_metadata(shard: int, addition: Addition, tokenizer: TokenizerFacts) -> dict[str, object]:
    """Return a corpus shard's metadata."""
    metadata: dict[str, object] = {"kind": "corpus", "shard": shard, "config": addition.config}
    metadata |= {"tokenizer": tokenizer}
    return metadata | ({"stage": addition.number} if addition.number else {})
