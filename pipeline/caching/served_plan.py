"""Describes a teacher that a server runs: by what the server says, without any files."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from rekindle.data.corpus.config import hole_ids
from rekindle.data.corpus.corpus import Corpus
from rekindle.data.corpus.shared_ids import unshared_ids
from rekindle.data.corpus.tokenizer import load_tokenizer
from rekindle.data.errors import CacheMismatchError, InputError, naming
from rekindle.data.targets.codec_compact import compact_rows
from rekindle.data.targets.codec_registry import CODECS
from rekindle.data.targets.kinds.topk import TopK
from rekindle.data.targets.reading.files import is_described, read_teacher
from rekindle.data.targets.schema import TeacherInfo
from rekindle.data.targets.served import Served, difference
from rekindle.pipeline.served.client import ServerAwayError
from rekindle.pipeline.served.config import ServedConfig
from rekindle.pipeline.served.probes import Said, ask, check_spelling, probe_prompts, probes_of
from rekindle.pipeline.served.server import GENERATED, Server
from rekindle.pipeline.teacher_config import TeacherConfig

log = logging.getLogger("rekindle")


@dataclass(frozen=True)
class Source:
    """A server, and what it is called in messages."""

    server: Server
    who: str

    @classmethod
    def of(cls, config: TeacherConfig) -> "Source":
        """Raises InputError where its API key is not there."""
        assert config.served is not None
        who = f"teacher {config.name!r} ({config.served.model} at {config.served.url})"
        with naming(who):
            return cls(Server(config.served), who)

    @contextmanager
    def naming(self, what: str = "") -> Iterator[None]:
        """Put whose server, and ``what`` it was asked about, before an error's message."""
        lead = f"{self.who}: {what}"
        try:
            yield
        except ServerAwayError as error:
            raise ServerAwayError(f"{lead}{error}") from None
        except InputError as error:
            raise InputError(f"{lead}{error}") from None


def describe_served(config: TeacherConfig, corpus: Corpus, view: str) -> TeacherInfo:
    """What the cache says of the teacher, shown ``view``. The server is asked a few questions.

    One that cannot be reached is taken to be as the cache describes it: nothing may be missing of
    it, and whoever makes a unit asks first. Raises ServerAwayError where the cache does not
    describe it, InputError when it cannot teach on this corpus, CacheMismatchError when the cache
    has targets of another model.
    """
    source = Source.of(config)
    base = _described(config, corpus)
    facts = corpus.info["tokenizer"]
    tokens = facts["size"] - len(hole_ids(facts))
    kept = config.targets
    settings = TopK.settings(kept.k, (1.0,), kept.codec, facts["size"], None, tokens)
    settings["estimator"] = {**settings["estimator"], "tail": "derived"}  # type: ignore[dict-item]
    with source.naming():
        _check_codec(kept.codec, facts["size"])
        try:
            served = _identified(source.server, corpus, config, base, int(str(settings["k"])))
            versions = source.server.versions
        except ServerAwayError as error:
            if base is None or base.served is None:
                raise
            log.warning("%s: %s It is taken to be as before", source.who, error)
            served, versions = base.served, base.versions
        about: dict[str, object] = {
            "name": config.name,
            "task": config.task,
            "view": view,
            "domains": config.domains and tuple(sorted(set(config.domains))),
            "precision": "served",
            "served": served,
            "fingerprints": {"probes": served.fingerprint, "tokenizer": facts["digest"]},
            "model": served.model,
            "versions": versions,
        }
    if CODECS[kept.codec].compressed:
        about["rows_per_batch"] = compact_rows(corpus.info["config"]["sequence_length"])
    return TeacherInfo.model_validate(settings | about)


def _described(config: TeacherConfig, corpus: Corpus) -> TeacherInfo | None:
    """The teacher as the cache has it; CacheMismatchError where it had another name there."""
    assert config.served is not None
    if not is_described(corpus.store, config.name):
        return None
    base = read_teacher(corpus.store, config.name)
    if base.served is not None and base.served.model != config.served.model:
        raise CacheMismatchError(
            f"the cache {corpus.store.location} already holds a teacher {config.name!r} that was "
            f"served as {base.served.model!r}, not as {config.served.model!r}. Give this one "
            f"another name, or remove that one (`pipeline teachers`) to make it anew"
        )
    return base


def _identified(
    server: Server, corpus: Corpus, config: TeacherConfig, base: TeacherInfo | None, k: int
) -> Served:
    """What the server's model is known by: what the cache says, if it is still the same."""
    assert config.served is not None
    _check_length(server, corpus)
    _check_tokenizer(config.served, corpus)
    known = None if base is None else base.served
    asked = probe_prompts(corpus) if known is None else [[*p.input_ids] for p in known.probes]
    said, found = ask(server, asked, k)
    if config.served.tokenizer is None:
        check_spelling(found, corpus.tokenizer)
    if known is None:
        return Served(model=config.served.model, probes=probes_of(asked, said, k))
    check_same_answers(known, said, config)
    return known


def check_same_answers(known: Served, said: Said, config: TeacherConfig) -> None:
    """Raise CacheMismatchError where the server answers the probes of ``known`` otherwise by now,
    by more than the tolerance.
    """
    assert config.served is not None
    away, most = difference(known.probes, said), config.served.tolerance
    log.debug("%s: the probes are answered as before, but for %.3g nats", config.name, away)
    if away > most:
        raise CacheMismatchError(
            f"teacher {config.name!r}: the server {config.served.url} answers fixed sequences "
            f"otherwise than when these targets were begun: by {away:.3g} nats in the mean, at "
            f"most {most:g} (served.tolerance). Another model, or the same in another precision, "
            f"stands behind the name {known.model!r} now. Serve the former one again, or give "
            "this one another name"
        )


def _check_length(server: Server, corpus: Corpus) -> None:
    length, longest = corpus.info["config"]["sequence_length"], server.model.longest
    if longest is not None and length + GENERATED > longest:
        raise InputError(
            f"the server takes at most {longest} tokens, of which it makes {GENERATED} itself; "
            f"corpus.sequence_length is {length}. Serve the model with --max-model-len "
            f"{length + GENERATED}, or take corpus.sequence_length {longest - GENERATED}"
        )


def _check_tokenizer(config: ServedConfig, corpus: Corpus) -> None:
    if config.tokenizer is None:
        return
    advice = "Take corpus.tokenizer from the served model"
    theirs = load_tokenizer(config.tokenizer)
    unshared_ids(corpus, theirs, np.zeros(0, np.int64), "the served model", advice)


def _check_codec(codec: str, size: int) -> None:
    most = CODECS[codec].largest_vocabulary
    if size > most:
        raise InputError(
            f"the compact codec takes vocabularies up to {most:,} tokens, not {size:,}; use "
            "targets.codec: default"
        )
