"""Describes a teacher that a server runs from the server's answers, without any files."""

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
    """A server, and its name in messages."""

    server: Server
    who: str

    @classmethod
    def of(cls, config: TeacherConfig) -> "Source":
        """Return the source of a teacher. Raises InputError if its API key is missing."""
        assert config.served is not None
        who = f"teacher {config.name!r} ({config.served.model} at {config.served.url})"
        with naming(who):
            return cls(Server(config.served), who)

    @contextmanager
    def naming(self, what: str = "") -> Iterator[None]:
        """Prefix an error's message with the server and ``what`` it was asked about."""
        lead = f"{self.who}: {what}"
        try:
            yield
        except ServerAwayError as error:
            raise ServerAwayError(f"{lead}{error}") from None
        except InputError as error:
            raise InputError(f"{lead}{error}") from None


def describe_served(config: TeacherConfig, corpus: Corpus, view: str) -> TeacherInfo:
    """Return the cache's description of the teacher, shown ``view``. Asks the server a few
    questions.

    An unreachable server is taken to be as the cache describes it: nothing may be missing of it,
    and whoever makes a unit asks first. Raises ServerAwayError if the cache does not describe it,
    InputError if it cannot teach on this corpus, CacheMismatchError if the cache has targets of
    another model.
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
            log.warning("%s: %s It is assumed to be unchanged", source.who, error)
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
    if CODECS[kept.codec].is_compressed:
        about["rows_per_batch"] = compact_rows(corpus.info["config"]["sequence_length"])
    return TeacherInfo.model_validate(settings | about)


def _described(config: TeacherConfig, corpus: Corpus) -> TeacherInfo | None:
    """Return the teacher as the cache has it; raise CacheMismatchError if it was served under
    another name there.
    """
    assert config.served is not None
    if not is_described(corpus.store, config.name):
        return None
    base = read_teacher(corpus.store, config.name)
    if base.served is not None and base.served.model != config.served.model:
        raise CacheMismatchError(
            f"the cache {corpus.store.location} already holds a teacher {config.name!r} that was "
            f"served as {base.served.model!r}, not as {config.served.model!r}. Give this one "
            "another name, or remove that one (`pipeline teachers`) to make it again"
        )
    return base


def _identified(
    server: Server, corpus: Corpus, config: TeacherConfig, base: TeacherInfo | None, k: int
) -> Served:
    """Return the identity of the server's model: the cache's, if it is still the same."""
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
    """Raise CacheMismatchError if the server's answers to the probes of ``known`` have changed by
    more than the tolerance.
    """
    assert config.served is not None
    away, most = difference(known.probes, said), config.served.tolerance
    log.debug("%s: the probes are answered as before, within %.3g nats", config.name, away)
    if away > most:
        raise CacheMismatchError(
            f"teacher {config.name!r}: the server {config.served.url} answers fixed sequences "
            f"differently than when these targets were begun: by {away:.3g} nats on average, "
            f"allowed {most:g} (served.tolerance). Another model, or the same in another "
            f"precision, is now behind the name {known.model!r}. Serve the former one again, or "
            "give this one another name"
        )


def _check_length(server: Server, corpus: Corpus) -> None:
    length, longest = corpus.info["config"]["sequence_length"], server.model.longest
    if longest is not None and length + GENERATED > longest:
        raise InputError(
            f"the server takes at most {longest} tokens, including {GENERATED} that it generates; "
            f"corpus.sequence_length is {length}. Serve the model with --max-model-len "
            f"{length + GENERATED}, or use corpus.sequence_length {longest - GENERATED}"
        )


def _check_tokenizer(config: ServedConfig, corpus: Corpus) -> None:
    if config.tokenizer is None:
        return
    advice = "Use corpus.tokenizer from the served model"
    theirs = load_tokenizer(config.tokenizer)
    unshared_ids(corpus, theirs, np.zeros(0, np.int64), "the served model", advice)


def _check_codec(codec: str, size: int) -> None:
    most = CODECS[codec].largest_vocabulary
    if size > most:
        raise InputError(
            f"the compact codec takes vocabularies up to {most:,} tokens, not {size:,}; use "
            "targets.codec: default"
        )
