"""Describe a served teacher (one behind an API) by asking its server; there are no model files."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from rekindle.data.corpus.config import gap_ids
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
from rekindle.pipeline.served.probes import (
    ProbeAnswers,
    ask_probes,
    check_spelling,
    probe_prompts,
    probes_of,
)
from rekindle.pipeline.served.server import GENERATED_TOKENS, Server
from rekindle.pipeline.teacher_config import TeacherConfig

log = logging.getLogger("rekindle")


@dataclass(frozen=True)
class NamedServer:
    """A server, and its name in messages."""

    server: Server
    subject: str

    @classmethod
    def of(cls, config: TeacherConfig) -> "NamedServer":
        """Return the server of a teacher. Raises InputError if its API key is missing."""
        assert config.served is not None
        subject = f"teacher {config.name!r} ({config.served.model} at {config.served.url})"
        with naming(subject):
            return cls(Server(config.served), subject)

    @contextmanager
    def naming(self, place: str = "") -> Iterator[None]:
        """Prefix an error's message with the server and the ``place`` that it was asked about."""
        prefix = f"{self.subject}: {place}"
        try:
            yield
        except ServerAwayError as error:
            raise ServerAwayError(f"{prefix}{error}") from None
        except InputError as error:
            raise InputError(f"{prefix}{error}") from None


def describe_served(config: TeacherConfig, corpus: Corpus, view: str) -> TeacherInfo:
    """Return the cache's description of the teacher, shown ``view``. Asks the server a few
    questions.

    A server that does not answer is assumed to be as the cache describes it: perhaps no unit is
    missing, and the server is asked again before one is made. Raises ServerAwayError if the cache
    does not describe it, InputError if it cannot teach on this corpus, CacheMismatchError if the
    cache has targets of another model.
    """
    named_server = NamedServer.of(config)
    cached_info = _read_described(config, corpus)
    facts = corpus.info["tokenizer"]
    tokens = facts["size"] - len(gap_ids(facts))
    targets = config.targets
    settings = TopK.settings(targets.k, (1.0,), targets.codec, facts["size"], None, tokens)
    settings["estimator"] = {**settings["estimator"], "tail": "derived"}  # type: ignore[dict-item]
    with named_server.naming():
        _check_codec(targets.codec, facts["size"])
        try:
            served = _identify(
                named_server.server, corpus, config, cached_info, int(str(settings["k"]))
            )
            versions = named_server.server.versions
        except ServerAwayError as error:
            if cached_info is None or cached_info.served is None:
                raise
            log.warning("%s: %s It is assumed to be unchanged", named_server.subject, error)
            served, versions = cached_info.served, cached_info.versions
        fields: dict[str, object] = {
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
    if CODECS[targets.codec].is_compressed:
        fields["rows_per_batch"] = compact_rows(corpus.info["config"]["sequence_length"])
    return TeacherInfo.model_validate(settings | fields)


def _read_described(config: TeacherConfig, corpus: Corpus) -> TeacherInfo | None:
    """Return the teacher as the cache has it; raise CacheMismatchError if it was served under
    another name there.
    """
    assert config.served is not None
    if not is_described(corpus.store, config.name):
        return None
    cached_info = read_teacher(corpus.store, config.name)
    if cached_info.served is not None and cached_info.served.model != config.served.model:
        raise CacheMismatchError(
            f"the cache {corpus.store.location} already holds a teacher {config.name!r} that was "
            f"served as {cached_info.served.model!r}, not as {config.served.model!r}. Give this "
            "one another name, or remove that one (`pipeline teachers`) to make it again"
        )
    return cached_info


def _identify(
    server: Server, corpus: Corpus, config: TeacherConfig, cached_info: TeacherInfo | None, k: int
) -> Served:
    """Return the identity of the server's model: the cache's, if it is still the same."""
    assert config.served is not None
    _check_length(server, corpus)
    _check_tokenizer(config.served, corpus)
    cached = None if cached_info is None else cached_info.served
    prompts = probe_prompts(corpus) if cached is None else [[*p.input_ids] for p in cached.probes]
    answers, answered_entries = ask_probes(server, prompts, k)
    if config.served.tokenizer is None:
        check_spelling(answered_entries, corpus.tokenizer)
    if cached is None:
        return Served(model=config.served.model, probes=probes_of(prompts, answers, k))
    check_same_answers(cached, answers, config)
    return cached


def check_same_answers(cached: Served, answers: ProbeAnswers, config: TeacherConfig) -> None:
    """Raise CacheMismatchError if the server's answers to the probes of ``cached`` differ from the
    cached ones by more than the tolerance.
    """
    assert config.served is not None
    change, tolerance = difference(cached.probes, answers), config.served.tolerance
    log.debug("%s: the probes are answered as before, within %.3g nats", config.name, change)
    if change > tolerance:
        raise CacheMismatchError(
            f"teacher {config.name!r}: the server {config.served.url} answers fixed sequences "
            f"differently than when these targets were begun: by {change:.3g} nats on average, "
            f"allowed {tolerance:g} (served.tolerance). Another model, or the same in another "
            f"precision, is now behind the name {cached.model!r}. Serve the former one again, or "
            "give this one another name"
        )


def _check_length(server: Server, corpus: Corpus) -> None:
    length, max_length = corpus.info["config"]["sequence_length"], server.model.max_length
    if max_length is not None and length + GENERATED_TOKENS > max_length:
        raise InputError(
            f"the server takes at most {max_length} tokens, including {GENERATED_TOKENS} that it "
            f"generates; corpus.sequence_length is {length}. Serve the model with --max-model-len "
            f"{length + GENERATED_TOKENS}, or use corpus.sequence_length "
            f"{max_length - GENERATED_TOKENS}"
        )


def _check_tokenizer(config: ServedConfig, corpus: Corpus) -> None:
    if config.tokenizer is None:
        return
    advice = "Use corpus.tokenizer from the served model"
    served_tokenizer = load_tokenizer(config.tokenizer)
    unshared_ids(corpus, served_tokenizer, np.zeros(0, np.int64), "the served model", advice)


def _check_codec(codec: str, size: int) -> None:
    limit = CODECS[codec].largest_vocabulary
    if size > limit:
        raise InputError(
            f"the compact codec takes vocabularies up to {limit:,} tokens, not {size:,}; use "
            "targets.codec: default"
        )
