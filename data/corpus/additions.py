"""The additions in which a corpus grew; no text is read here, no shard written.

``corpus/corpus.json`` describes what a corpus was begun with. A longer corpus (a larger
``limit_sequences``, further source files after those that were read) is an addition to it,
``corpus/growth-001.json``: its sequences come after all that is there, which stays as it is.
``corpus/complete.json`` and ``corpus/complete-001.json`` say how many shards there are then.

A description has the size and a checksum of samples of every source file, by the path it then had
(``sources``), and in which ``order`` they were read, with what is no file; and the ``contents`` of
those whose records are no texts. An end has the
``bad_records`` that were left out, by kind, and how many were that ``held`` a text of a test. What
older ones lack is taken as it was then.
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
    as_begun,
    differing_keys,
)
from rekindle.data.corpus.stored_tokenizer import check_gaps
from rekindle.data.counted import counted
from rekindle.data.errors import CacheMismatchError, InputError, unusable
from rekindle.data.places import same_place
from rekindle.data.source.generated import check_generated, generated_in
from rekindle.data.source.held_texts import Found
from rekindle.data.source.left_out import LeftOut
from rekindle.data.source.source_states import (
    Present,
    States,
    contents_of,
    found_again,
    look_at,
    states_of,
    usual_order,
)
from rekindle.data.source.sources import Entry, Origin
from rekindle.data.storage.base import Store
from rekindle.data.storage.commits import Commits
from rekindle.data.storage.seal import REPAIR, read_sealed, seal

log = logging.getLogger("rekindle")


@dataclass(frozen=True)
class Addition:
    """One span of a corpus: what it was begun with, or what it was then extended by.

    ``sources`` and ``order``: the files and everything that it and those before it read, in reading
    order; ``origins``: where that is now, and what is new, once it was looked for. ``bad_records``:
    how many were left out of it and those before it, by kind; ``held``: how many because they hold
    a text of a test. ``contents``: what the records of those hold that are no texts, by place;
    ``generated``: of those that a model generated, which model, and how.
    """

    number: int
    config: PackingFacts
    sources: States
    order: tuple[str, ...]
    first_shard: int = 0
    first_sequence: int = 0
    shards: int | None = None  # shards at its end, of all additions; None while it is being made
    bad_records: Mapping[str, int] = field(default_factory=dict)
    held: Found = field(default_factory=Found)
    contents: Mapping[str, str] = field(default_factory=dict)
    generated: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    origins: tuple[Origin, ...] = field(default=(), compare=False)

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
            if not all(isinstance(one, list) for one in sources.values()):
                raise TypeError("sources says of a file what is no list of its bytes and checksum")
            order = tuple(map(str, body.get("order") or usual_order(config["source"], sources)))
            if not all(order):
                raise ValueError("order has a file without a name")
            shards, sequences = int(after["shards"]), int(after["sequences"])
            contents: dict[str, str] = dict(body.get("contents", {}))
            generated = {str(place): dict(of) for place, of in body.get("generated", {}).items()}
        name, ends, bad, held = complete_name(number), None, {}, Found()
        with suppress(FileNotFoundError), _stated(store, name):
            end = read_sealed(store, name)
            ends = int(end["shards"])
            bad = {str(kind): int(count) for kind, count in end.get("bad_records", {}).items()}
            held = Found(*(int(end.get("held", {}).get(kind, 0)) for kind in Found._fields))
        one = Addition(number, config, sources, order, shards, sequences, ends, bad, held)
        one = replace(one, contents=contents, generated=generated)
        additions.append(one)
    raise AssertionError  # count() does not end


def recorded_shard_size(store: Store) -> int | None:
    """Sequences per shard of the corpus in ``store``; None where none is begun."""
    additions = read_additions(store)[0]
    return additions[-1].config["sequences_per_shard"] if additions else None


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
        begun = begun_addition(info["config"], look_at(config.entries))
        check_generated(begun.generated, info["tokenizer"]["digest"])
        return begun
    last = additions[-1]
    assert tokenizer is not None  # it stands in the first description
    if tokenizer != info["tokenizer"]:
        check_gaps(store, tokenizer, info["tokenizer"])
        raise _made_differently(store, "another tokenizer")
    new = as_begun(info["config"], last.config)
    if new != info["config"]:
        log.info("corpus: it was begun without end-of-text tokens, and goes on so")
    present = _present_or_none(config.entries, last)
    unknown = sorted(last.sources.keys() - {*last.order})
    order = (*last.order, *unknown)
    read: list[Origin] = []
    added: list[Origin] = []
    if present is not None:
        read, added = found_again(order, last.sources, present, last.contents)
    last = replace(last, origins=(*read, *added))
    changed = differing_keys(last.config, new)
    if not changed and not added and not (unknown and last.shards is None):
        return last
    if set(changed) - ({"limit_sequences"} if _longer(last.config, new) else set()):
        shown = (f"{k}: {told_of(last.config, k)} there, {told_of(new, k)} here" for k in changed)
        raise _made_differently(store, "; ".join(shown))
    if unknown:
        raise CacheMismatchError(
            f"{store.location} does not say in which order its {len(order)} source files were read "
            f"(it is of an older version; where {unknown[0]} stood in {last.config['source']} "
            "cannot be known), so nothing can come after them. Use another cache.path"
        )
    shards, sequences = grown()
    if present is None:
        present = look_at(config.entries)  # which says what is not there
    sources, order = states_of(present), tuple(origin.place for origin in last.origins)
    begun = Addition(last.number + 1, new, sources, order, shards, sequences)
    begun = _described(begun, present, last.origins)
    check_generated(begun.generated, info["tokenizer"]["digest"])
    return begun


def begun_addition(
    config: PackingFacts,
    present: Sequence[Present],
    number: int = 0,
    first_shard: int = 0,
    first_sequence: int = 0,
) -> Addition:
    """A corpus, or a part of one, that is made of what is ``present``."""
    origins = tuple(one.origin for one in present)
    order = tuple(origin.place for origin in origins)
    begun = Addition(number, config, states_of(present), order, first_shard, first_sequence)
    return _described(begun, present, origins)


def _described(
    begun: Addition, present: Sequence[Present], origins: tuple[Origin, ...]
) -> Addition:
    """With what is known of what is present."""
    known = {"contents": contents_of(present), "generated": generated_in(origins)}
    return replace(begun, origins=origins, **known)  # type: ignore[arg-type]


def describe_addition(store: Store, addition: Addition, tokenizer: TokenizerFacts) -> None:
    """Record an addition, if it is not recorded yet; the one before it is at its end then."""
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
    additions, present = read_additions(store)
    same = addition.number < len(additions) and additions[addition.number].config == addition.config
    if not same or present != tokenizer:
        raise _made_differently(store, "another process began it meanwhile")


def complete_addition(
    store: Store, addition: Addition, shards: int, bad_records: Mapping[str, int], held: Found
) -> None:
    """Record that an addition's last shard is there, and what was left out on the way."""
    body: dict[str, object] = {"shards": shards}
    if bad_records:
        body["bad_records"] = dict(bad_records)
    if sum(held):
        body["held"] = held._asdict()
    store.create(complete_name(addition.number), seal(body))


def counted_before_end(
    left_out: LeftOut, committed: Commits, ends_at: int | None
) -> tuple[dict[str, int], Found]:
    """How many records were left out before the corpus's end: bad ones, by kind, and those that
    hold a text of a test.
    """
    last = last_document(committed, ends_at)
    return left_out.counts(last), left_out.held(last)


def last_document(commits: Commits, ends_at: int | None) -> int | None:
    """The index of the last document of a corpus of so many sequences, ahead of whose end text is
    read; None where its end is the source's, -1 where it ends before the first.
    """
    if ends_at is None or commits.rows.sum() < ends_at:
        return None
    if not commits:
        return -1
    document, token = commits.newest.facts["next"]
    return int(document) - (token == 0)


def _longer(old: PackingFacts, new: PackingFacts) -> bool:
    before, after = old["limit_sequences"], new["limit_sequences"]
    return before is not None and (after is None or after > before)


def is_begun(store: Store) -> bool:
    """Whether there is a corpus in ``store``, whole or not."""
    return bool(read_additions(store)[0])


def is_same_source(store: Store, source: Sequence[str | Entry]) -> bool:
    """Whether ``source`` is what the corpus in ``store`` was read from, and no more, however it is
    written.
    """
    additions = read_additions(store)[0]
    if not additions:
        return False
    last = additions[-1]
    try:
        present = _present_or_none(source, last)
        if present is None:
            return True
        return not found_again(last.order, last.sources, present, last.contents)[1]
    except (InputError, CacheMismatchError):
        return False


def _present_or_none(source: Sequence[str | Entry], last: Addition) -> list[Present] | None:
    """What the source stands for; None where it is gone from its place, and no more needed."""
    try:
        return look_at(source)
    except InputError as error:
        recorded = last.config["source"]
        if last.shards is None:
            raise
        if not same_place([Entry.of(one).place for one in source], recorded):
            raise InputError(
                f"{error}. Or, as the corpus in the cache is complete, corpus.source as it was: "
                f"[{', '.join(recorded)}], whether that is there or not"
            ) from None
        log.info("the corpus source is no longer there; going on with the corpus in the cache")
        return None


def _made_differently(store: Store, difference: str) -> CacheMismatchError:
    return CacheMismatchError(
        f"{store.location} holds a corpus made differently ({difference}). "
        "Use another cache.path for this corpus, or the configuration the cache was made with"
    )


def empty_corpus(config: CorpusConfig, left_out: LeftOut) -> InputError:
    """What is raised for a source without a sequence."""
    usual = "give a source with at least one non-blank document, or the model's own tokenizer"
    if config.contents != {"text"}:
        usual += (
            ". Of dialogues and rows of tokens those count of which some token is trained: what "
            "the role 'assistant' (none called 'gpt' or 'model') says within sequence_length, "
            "labels other than -100, a loss_mask of 1"
        )
    advice = left_out.advice(usual)
    return InputError(
        f"the corpus is empty: no text in {', '.join(config.places)} (field "
        f"{config.text_field!r}) of which the tokenizer {config.tokenizer} makes a token; {advice}"
        f"{f'; {told}' if (told := left_out.told()) else ''}"
    )


# What is meant where nothing is said.
UNSTATED: dict[str, object] = {
    "special_tokens": "text",
    "without": "nothing",
    "pair_field": None,
    "attention": "row",
}


def told_of(config: PackingFacts, key: str) -> str:
    """What it says of a key, in a message."""
    if key == "without" and (without := config.get("without")):
        names = ", ".join(map(os.path.basename, without["files"]))
        how = f"{without['digest'][:8]}, found by rule {without['rule']}"
        return f"{counted(without['texts'], 'text')} of {names} ({how})"
    value = (UNSTATED | config).get(key)
    return str(value) if key == "without" else repr(value)


def about_shard(shard: int, addition: Addition, tokenizer: TokenizerFacts) -> dict[str, object]:
    """What a shard of the corpus says of itself."""
    about: dict[str, object] = {"kind": "corpus", "shard": shard, "config": addition.config}
    about |= {"tokenizer": tokenizer}
    return about | ({"stage": addition.number} if addition.number else {})
