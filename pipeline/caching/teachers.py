"""Teachers: the configuration of one, its record in the cache, and the loaded model.

A teacher's identity (``TeacherInfo``) is made without loading weights, so that a finished cache is
recognised in seconds: from its files or a server's answers, and the precision, which the file, the
cache or the device decides.
"""

import logging
from collections.abc import Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rekindle.data.corpus.corpus import Corpus
from rekindle.data.corpus.tokenizer import Tokenizer
from rekindle.data.errors import InputError, naming
from rekindle.data.targets.codec_compact import compact_rows
from rekindle.data.targets.codec_registry import CODECS
from rekindle.data.targets.head import StoredHead
from rekindle.data.targets.kinds.registry import KINDS, VOCABULARY_KINDS, kind_of
from rekindle.data.targets.reading.files import is_described, read_teacher
from rekindle.data.targets.schema import TeacherInfo
from rekindle.data.views.pairs import RECORD
from rekindle.data.views.reader import shown_view
from rekindle.pipeline.caching.in_flight import transfer_to
from rekindle.pipeline.caching.mapped import VocabularyMap, check_positions
from rekindle.pipeline.caching.model_parallel import check_spread, from_pretrained_kwargs
from rekindle.pipeline.caching.served_plan import describe_served
from rekindle.pipeline.caching.views import Views
from rekindle.pipeline.caching.vocabulary import TokenColumns, count_shared_tokens, tokenizer_of
from rekindle.pipeline.describing.encoders import find_teacher
from rekindle.pipeline.describing.heads import head_info
from rekindle.pipeline.teacher_config import TeacherConfig
from rekindle.train.answers.recorded import read_expert_record
from rekindle.train.embedding.encoder import SentenceEncoder
from rekindle.train.embedding.folder import EncoderFolder
from rekindle.train.embedding.texts import (
    describe_prompts,
    longest_text,
    own_tokenizer,
    skipped_tokens,
)
from rekindle.train.model.files import (
    Placement,
    adapted_fingerprints,
    config_fingerprint,
    load_config,
    load_model,
    longest_input,
    place,
    weights_fingerprint,
)
from rekindle.train.model.fitting import AUTO_CLASSES, auto_class_of, knows_segments
from rekindle.train.model.headers import check_teacher_files
from rekindle.train.model.meta import shape_only
from rekindle.train.model.padding import padding_of
from rekindle.train.model.sight import padding_influence
from rekindle.train.model.split_model import SplitLanguageModel, output_width, splittable
from rekindle.train.precision import describe_slow_precision
from rekindle.train.record.lineage import lineage_of_model
from rekindle.train.record.versions import package_versions

log = logging.getLogger("rekindle")

AUTO_BATCH_TOKENS = {"cpu": 4096, "cuda": 65_536}
UNLIMITED = 2**31 - 1  # tokens; tokenizers without a limit say 10^30


@dataclass(frozen=True)
class TeacherPlan:
    """A teacher before it is loaded: configuration, directory, description for the cache.

    One that a server runs has no ``directory``.
    """

    config: TeacherConfig
    directory: Path
    info: TeacherInfo
    encoder: EncoderFolder | None = None  # how a sentence encoder makes vectors

    def with_prompt(self, texts: Sequence[str]) -> Sequence[str]:
        """Return the texts as the teacher reads them: after its prompt."""
        prompt = self.info.prompt
        return [prompt + text for text in texts] if prompt else texts


def plan_teacher(
    config: TeacherConfig, corpus: Corpus, views: Views, seed: int, directory: Path | None = None
) -> TeacherPlan:
    """Describe a teacher from its files, those in ``directory`` if that is known already.

    Raises InputError if it cannot teach on this corpus.
    """
    if corpus.is_packed:
        _check_reads_packed_rows(config)
    if config.served is not None:
        return TeacherPlan(config, Path(), describe_served(config, corpus, views.shown_to(config)))
    subject = f"teacher {config.name!r} ({config.model})"
    with naming(f"teacher {config.name!r}"):
        directory, encoder = find_teacher(config, directory)
    model_config: Any = check_teacher_files(directory, config.task, subject)
    weights = weights_fingerprint(directory)
    precision: str = config.precision
    # If unset, the precision is that of the teacher's targets in the cache, else what suits the
    # device: a cache made on a GPU can be finished on a machine without one.
    if precision == "auto" and is_described(corpus.store, config.name):
        precision = read_teacher(corpus.store, config.name).precision
    size = corpus.info["tokenizer"]["size"]
    tokenizer = tokenizer_of(directory, model_config, corpus, config.name)
    fingerprints = {
        "weights": weights,
        "config": config_fingerprint(directory),
        "tokenizer": tokenizer.digest,
        **adapted_fingerprints(directory),
    }
    info: dict[str, object] = {
        "precision": place(precision).precision,
        "estimator": {"kind": "dense", "bias": "exact"},
        "fingerprints": fingerprints,
        "versions": package_versions(),
        "model": config.model,
        "lineage": lineage_of_model(directory, weights),
    }
    assert views.masked is not None or not config.sees_masks
    if encoder is not None:
        info |= configured_fields(config, views, size, encoder.width(model_config.hidden_size))
        info |= {"pooling": encoder.pooling_name, "normalised": encoder.normalised}
        info |= {"prompt": encoder.prompt or None}
        info["fingerprints"] = {**fingerprints, "modules": encoder.fingerprint}
    elif config.vocabulary:
        _check_language_model(config, model_config, corpus)
        width = None
        if "hidden_size" in VOCABULARY_KINDS[config.targets.vocabulary_kind].needs:
            with naming(subject), splittable():
                width = output_width(shape_only(model_config, AUTO_CLASSES[config.task]))
        if config.mapping == "map":
            embedding_rows = int(model_config.get_text_config().vocab_size)
            mapping = VocabularyMap.of(corpus, tokenizer, embedding_rows)
            check_positions(mapping, corpus, config.name, config.map_coverage)
            tokens = info["mapped"] = mapping.count
        else:
            tokens = _count_shared(corpus, tokenizer, model_config, config, views)
        info |= configured_fields(config, views, size, width, tokens)
        if CODECS[config.targets.codec].is_compressed:
            share = 1.0 if views.masked is None or config.view == "clean" else views.masked.share
            info["rows_per_batch"] = compact_rows(corpus.info["config"]["sequence_length"] * share)
    else:
        if config.pairs == RECORD and read_expert_record(directory).pairs is False:
            raise InputError(
                f"{subject} was fine-tuned on single texts, but with corpus.pair_field each record "
                "is a pair; give an expert on pairs, or cache this one over a corpus of single "
                "texts"
            )
        info |= configured_fields(config, views, size, int(model_config.num_labels))
        info |= head_info(config, model_config)
    if config.monte_carlo.passes or KINDS[str(info["kind"])].is_sample:
        info["seed"] = seed
    return TeacherPlan(config, directory, TeacherInfo.model_validate(info), encoder)


def _check_reads_packed_rows(config: TeacherConfig) -> None:
    """Raise InputError for a teacher that cannot be run directly on packed rows: task
    experts, servers, other tokenizers.
    """
    prefix = f"teacher {config.name!r}: with corpus.packing: packed a sequence holds several "
    advice = ". Use packing: document for it"
    if not config.vocabulary:
        raise InputError(f"{prefix}documents, which have no common label{advice}")
    if config.served is not None or config.mapping == "map":
        reader = "a server" if config.served is not None else "another tokenizer"
        raise InputError(f"{prefix}documents, and {reader} reads it as one text{advice}")


def slow_pass_warning(plan: TeacherPlan, corpus: Corpus) -> str | None:
    """Return a warning, before a teacher runs, about a precision that this device has no
    instructions for; None for any other.
    """
    name, info = plan.config.name, plan.info
    if info.served is not None:
        return None
    advice = ""
    if is_described(corpus.store, name):
        advice = (
            "Its targets in the cache have that precision, and the missing ones must: finish it on "
            "a device with such instructions, or cache it again under another name in fp32"
        )
    settings = {f"teachers.{name}.precision: {{}}": info.precision}
    device = place(info.precision).device.partition(":")[0]
    return describe_slow_precision(settings, device, advice)


def tokenizer_and_limit(
    plan: TeacherPlan, corpus: Corpus, model_config: Any = None
) -> tuple[Tokenizer, int]:
    """Return the teacher's tokenizer, and how many tokens its model takes (UNLIMITED if neither
    says); ``model_config`` is that of the model, if loaded.
    """
    model_config = model_config or load_config(plan.directory, AUTO_CLASSES[plan.info.task])
    tokenizer = tokenizer_of(plan.directory, model_config, corpus, plan.config.name)
    if plan.encoder is not None:
        tokenizer = own_tokenizer(plan.encoder, tokenizer)
        return tokenizer, longest_text(plan.encoder, tokenizer, model_config)
    lengths = (int(tokenizer.hf.model_max_length), longest_input(model_config))
    return tokenizer, min(length for length in (*lengths, UNLIMITED) if length is not None)


def _count_shared(
    corpus: Corpus, tokenizer: Tokenizer, model_config: Any, config: TeacherConfig, views: Views
) -> int:
    """Return how many tokens a vocabulary teacher has in common with the corpus; raises InputError
    as ``count_shared_tokens`` does.
    """
    masked = views.masked if config.sees_masks else None
    extra_ids = np.zeros(0, np.int64) if masked is None else masked.shown_ids
    embedding_rows = int(model_config.get_text_config().vocab_size)
    return count_shared_tokens(corpus, tokenizer, config.name, extra_ids, embedding_rows)


def configured_fields(
    config: TeacherConfig,
    views: Views,
    vocabulary_size: int,
    width: int | None,
    tokens: int | None = None,
) -> dict[str, object]:
    """Return the part of ``teacher.json`` that the configuration decides.

    ``width`` is the size of the model's output: of its hidden states or vectors, or its number of
    labels. ``tokens``: how many of the ids are also tokens of the teacher; None: all.
    """
    info: dict[str, object] = {
        "name": config.name,
        "task": config.task,
        "view": views.shown_to(config),
        "domains": config.domains and tuple(sorted(set(config.domains))),
    }
    if config.task == "embedding":
        return info | {"kind": config.task, "dimensions": width, "vectors": config.targets.vectors}
    if not config.vocabulary:
        info["kind"] = "token" if config.task == "token_classification" else "sequence"
        return info | {"num_labels": width, "monte_carlo_passes": config.monte_carlo.passes}
    targets, kind = config.targets, VOCABULARY_KINDS[config.targets.vocabulary_kind]
    info |= kind.settings(
        targets.k, targets.temperatures, targets.codec, vocabulary_size, width, tokens
    )
    return info


def _check_language_model(config: TeacherConfig, model_config: Any, corpus: Corpus) -> None:
    size = corpus.info["tokenizer"]["size"]
    length, limit = corpus.info["config"]["sequence_length"], longest_input(model_config)
    if limit is not None and length > limit:
        raise InputError(
            f"teacher {config.name!r} takes at most {limit} tokens; corpus.sequence_length is "
            f"{length}"
        )
    codec = CODECS[config.targets.codec]
    if size > codec.largest_vocabulary:
        raise InputError(
            f"teacher {config.name!r}: the compact codec takes vocabularies up to "
            f"{codec.largest_vocabulary:,} tokens, not {size:,}; use targets.codec: default"
        )


def _stores_tails(info: TeacherInfo) -> bool:
    kind = kind_of(info)
    return kind.has_tail or kind.is_extension


class Teacher:
    """A loaded teacher, on its device, ready to run on a corpus."""

    def __init__(self, plan: TeacherPlan, corpus: Corpus):
        self.info, self.config, self.corpus = plan.info, plan.config, corpus
        self.view = shown_view(corpus, plan.info.view)
        self.placement: Placement = place(plan.info.precision)
        self.transfer = transfer_to(self.placement.device)
        self.stores_tails = _stores_tails(plan.info)
        subject, device = f"teacher {plan.info.name!r}", self.placement.device
        auto_class = auto_class_of(load_config(plan.directory), plan.info.task)
        load_kwargs = from_pretrained_kwargs(plan.config, plan.directory, auto_class)
        model = load_model(plan.directory, auto_class, self.placement.dtype, load_kwargs)
        check_spread(model, subject)
        self.model: nn.Module = (model if load_kwargs else model.to(device)).eval()
        model_config: Any = model.config
        self.plan = plan
        self.tokenizer, self.max_length = tokenizer_and_limit(plan, corpus, model_config)
        self.map: VocabularyMap | None = None
        if plan.info.mapped is not None:
            embedding_rows = int(model_config.get_text_config().vocab_size)
            self.map = VocabularyMap.of(corpus, self.tokenizer, embedding_rows)
        self.encoder: SentenceEncoder | None = None
        self.skipped = 0  # tokens of the prompt that its pooling leaves out
        if plan.encoder is not None:
            self.encoder = SentenceEncoder(self.model, plan.encoder, device)
            self.skipped = skipped_tokens(plan.encoder, self.tokenizer)
            if prompt_note := describe_prompts(plan.encoder, plan.config.prompt is not None):
                log.info("%s: %s", subject, prompt_note)
        # As in fine-tuning: segments are for models with two, whose tokenizer tells them apart.
        has_segments = "token_type_ids" in self.tokenizer.hf.model_input_names
        self.token_types = has_segments and knows_segments(model_config)
        pad_id = padding_of(model_config)
        self.pad_id: int | None = pad_id if isinstance(pad_id, int) and pad_id >= 0 else None
        batch_tokens = plan.config.batch_tokens
        device_kind = "cpu" if self.placement.device == "cpu" else "cuda"
        # Tokens per forward pass, padding included; halved when the device runs out of memory.
        self.batch_tokens: int = (
            AUTO_BATCH_TOKENS[device_kind] if batch_tokens == "auto" else batch_tokens
        )
        self._language_model: SplitLanguageModel | None = None
        if plan.config.vocabulary:
            with suppress(torch.OutOfMemoryError, MemoryError):  # reported with the first batch
                self._language_model = self._split()
        # If padding changes outputs, only sequences of one length are batched: a target must not
        # depend on the others in its batch.
        self.equal_lengths = padding_influence(model) > 0
        if self.equal_lengths:
            log.info(
                "teacher %s: %s lets padding change what it gives for the tokens themselves; "
                "only sequences of one length are shown to it together",
                self.info.name,
                type(model).__name__,
            )

    def with_plan(self, plan: TeacherPlan) -> "Teacher":
        """Return the teacher of ``plan``, which differs only in what it keeps, with this one's
        model.
        """
        other = copy(self)
        other.__dict__.pop("token_columns", None)  # with a tail, the columns differ
        other.info, other.config = plan.info, plan.config
        other.stores_tails = _stores_tails(plan.info)
        return other

    @property
    def language_model(self) -> SplitLanguageModel:
        """The body and head of a vocabulary teacher."""
        if self._language_model is None:
            self._language_model = self._split()
        return self._language_model

    def _split(self) -> SplitLanguageModel:
        """Return body and head. Raises InputError for a model that cannot be split, or whose
        attention crosses document borders in packed rows.
        """
        with naming(f"teacher {self.info.name!r}"), splittable():
            split = SplitLanguageModel(self.model, causal=self.info.task == "causal_lm")
            if self.corpus.is_packed:
                split.check_packed(self.corpus.info["config"]["sequence_length"])
            return split

    @cached_property
    def token_columns(self) -> TokenColumns:
        """Which of a vocabulary teacher's logits belong to which ids."""
        output_rows = len(self.language_model.head.weight)
        if self.map is not None:
            return TokenColumns.mapped(self.map, self.stores_tails)
        return TokenColumns.of(self.corpus, self.tokenizer, output_rows, self.stores_tails)

    def output_matrix(self) -> StoredHead:
        """Return the matrix that hidden states are multiplied with."""
        return self.token_columns.stored(self.language_model.head)

    def tensor(self, values: np.ndarray) -> Tensor:
        """Return an integer array on the teacher's device as int64."""
        return self.transfer.send(values.astype(np.int64))
