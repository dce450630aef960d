"""Where the text of a corpus comes from and how it is packed, and what a cache records of both."""

from collections.abc import Mapping
from typing import Literal, NotRequired, TypedDict, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from rekindle.data.corpus.encoder import GivenEncoder, special_tokens
from rekindle.data.corpus.packing import PackingName, lacks_end
from rekindle.data.corpus.tokenizer import Tokenizer
from rekindle.data.forms.dialogue import Dialogues
from rekindle.data.forms.template import Template, find_template
from rekindle.data.forms.tokens import TokenRows
from rekindle.data.forms.written import WRITTEN, WrittenDialogues
from rekindle.data.settings import Changeable, Place, Settings
from rekindle.data.settings_schema import one_or_many
from rekindle.data.source.content import Form
from rekindle.data.source.held_texts import RULE, HeldTexts
from rekindle.data.source.sources import Content, Entry
from rekindle.data.source.without import DEFAULT_FIELDS, read_held
from rekindle.data.storage.seal import FORMAT_VERSION, WITH_GROUPS, WITH_PACKED, WITH_TRAINED

MAX_SEQUENCE_LENGTH = 65_536  # positions are stored as uint16


class SourceEntry(Settings):
    """A part of the source with its own format."""

    path: Place = Field(description="files, a glob or a datasets id, as in source")
    format: Content = Field(description="the kind of its records, as in corpus.format")


class CorpusConfig(Settings):
    """Where the text comes from and how it becomes sequences."""

    source: tuple[Place | SourceEntry, ...] = Field(
        min_length=1,
        json_schema_extra=one_or_many,
        description="files or globs (txt, jsonl, csv, tsv, parquet, arrow), here or in a store "
        "(s3://…), a datasets id, or python-docs; {path, format}: one with its own "
        "format",
    )
    format: Content = Field(
        "text",
        description="what a record is: text; chat, a dialogue (messages, and tools if any) in "
        "which the assistant's part is trained; tokens (input_ids, and labels or "
        "loss_mask)",
    )
    chat_template: Place | None = Field(
        None,
        description="a file with the chat template (Jinja), used instead of the tokenizer's own",
    )
    text_field: str = Field(
        "text",
        description="the field (column) with a record's text; inside another field: meta.text",
    )
    pair_field: str | None = Field(
        None,
        description="the field of a second text: each record is a pair of texts, and a sequence "
        "holds both, as the tokenizer joins pairs; sequence experts read them as pairs",
    )
    domain_field: str | None = Field(
        None, description="the field with a record's domain: text or a number"
    )
    group_field: str | None = Field(
        None, description="the field with a record's group, such as its query's id"
    )
    tokenizer: Place = Field(description="the student's tokenizer: a directory or a hub id")
    sequence_length: int = Field(
        128,
        ge=8,
        le=MAX_SEQUENCE_LENGTH,
        description="tokens per sequence, special tokens included",
    )
    packing: PackingName = Field(
        "document",
        description="document: no sequence crosses a document; contiguous: every sequence is "
        "filled; packed: several documents in one, with attention within each",
    )
    attention: Literal["row", "document"] | None = Field(
        None, description="for packing: contiguous, what a token sees; default: its row"
    )
    special_tokens: Literal["text", "token"] = Field(
        "text",
        description="names of special tokens within a text (</s>, <|im_end|>): text reads them "
        "like any other text; token reads each as the token itself",
    )
    on_bad_record: Changeable[Literal["error", "skip"]] = Field(
        "error",
        description="a record without a valid text (not JSON, not UTF-8, no text field, …): "
        "error stops; skip leaves it out and counts it",
    )
    limit_sequences: int | None = Field(
        None, gt=0, description="take the first ones only; shuffle a file that is sorted by class"
    )
    without: tuple[Place, ...] = Field(
        (),
        json_schema_extra=one_or_many,
        description="files with texts of tests: records that hold one of them, exactly or "
        "nearly, are left out and counted",
    )
    without_fields: tuple[str, ...] = Field(
        (),
        json_schema_extra=one_or_many,
        description="the fields of those files that hold their texts; default: those named like "
        f"the corpus's own, and {', '.join(DEFAULT_FIELDS)}",
    )

    @field_validator("source", "without", "without_fields", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return [value] if isinstance(value, str | Mapping) else value

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Return what ``source`` names, with the kind of its records."""
        return tuple(
            Entry(one.path, one.format) if isinstance(one, SourceEntry) else Entry(one, self.format)
            for one in self.source
        )

    @property
    def places(self) -> tuple[str, ...]:
        """Return what ``source`` names."""
        return tuple(entry.place for entry in self.entries)

    @property
    def contents(self) -> frozenset[str]:
        """Return the kinds of content of its source."""
        return frozenset(entry.content for entry in self.entries)

    @model_validator(mode="after")
    def _of_the_format(self) -> "CorpusConfig":
        other_formats = sorted(self.contents - {"text"})
        if other_formats and self.pair_field is not None:
            raise ValueError(
                "pair_field is for records of two texts, but the source has some of the format "
                f"{other_formats[0]}; make a separate corpus of the pairs"
            )
        if "tokens" in other_formats and self.without:
            raise ValueError(
                "without looks for texts, but rows of the format tokens have none; leave out "
                "what holds a test when making the tokens"
            )
        if self.chat_template is not None and "chat" not in other_formats:
            raise ValueError(
                "chat_template is for dialogues, but no part of the source is one; set format: chat"
            )
        return self

    @model_validator(mode="after")
    def _attention_of_rows(self) -> "CorpusConfig":
        if self.attention is not None and self.packing != "contiguous":
            raise ValueError(
                f"attention is for packing: contiguous; with packing: {self.packing} a token sees "
                "only its document. Leave attention out"
            )
        return self

    @model_validator(mode="after")
    def _one_group_a_sequence(self) -> "CorpusConfig":
        if self.group_field is not None and self.packing != "document":
            raise ValueError(
                f"packing {self.packing} joins records, but with group_field a sequence belongs "
                "to one group; leave packing out"
            )
        return self

    @model_validator(mode="after")
    def _fields_of_files(self) -> "CorpusConfig":
        if self.without_fields and not self.without:
            raise ValueError("without_fields are fields of the files in without, which names none")
        return self

    @model_validator(mode="after")
    def _one_pair_a_sequence(self) -> "CorpusConfig":
        if self.pair_field is None:
            return self
        if self.packing != "document":
            raise ValueError(
                f"packing {self.packing} joins records, but with pair_field each one is a "
                "sequence of its own; leave packing out"
            )
        if self.pair_field == self.text_field:
            raise ValueError(
                f"pair_field and text_field are both {self.pair_field}; name the two texts of a "
                "pair, such as text_field: sentence1, pair_field: sentence2"
            )
        return self

    def held_texts(self) -> HeldTexts | None:
        """Read the texts that no record may hold; None if there are none.

        Raises InputError as ``read_held`` does.
        """
        if not self.without:
            return None
        fields = [self.text_field, *filter(None, [self.pair_field])]
        return read_held(self.without, self.without_fields, fields)


class WithoutFacts(TypedDict):
    """The texts that no record of a corpus holds: how they were looked for, their identity, how
    many there are, and the names of their files.
    """

    rule: int
    digest: str
    texts: int
    files: list[str]


class PackingFacts(TypedDict):
    """What decides the sequences, except the tokenizer, as a cache records it.

    Not ``on_bad_record``: the good records are the same, and the number left out is recorded with
    the corpus's end. Keys with their original value are left out, so that corpora of other versions
    compare equal: end_of_text, if the end-of-text token comes after each document for a tokenizer
    that begins a text and does not end it; special_tokens, if they are read as such; without, if
    records that hold a test's text are left out; pair_field, for pairs; group_field, for groups;
    trained, if tokens are marked as trained or not; chat_template, its digest, for dialogues;
    contents, each part's kind, if not all text; attention, if contiguous rows see one document.
    """

    source: list[str]
    text_field: str
    domain_field: str | None
    sequence_length: int
    packing: PackingName
    limit_sequences: int | None
    sequences_per_shard: int
    end_of_text: NotRequired[bool]
    special_tokens: NotRequired[Literal["text", "token"]]
    without: NotRequired[WithoutFacts]
    pair_field: NotRequired[str]
    group_field: NotRequired[str]
    trained: NotRequired[bool]
    chat_template: NotRequired[str]
    contents: NotRequired[list[str]]
    attention: NotRequired[Literal["document"]]


# Not recorded in the form they are given.
_NOT_RECORDED = {
    "source", "tokenizer", "on_bad_record", "without", "without_fields", "format", "chat_template"
}  # fmt: skip


class TokenizerFacts(TypedDict):
    """What a cache records of the tokenizer besides its files.

    size: one past the largest id (before format 3: the number of tokens, so ids above it were
    unknown). holes: [first, past the last] of each gap in the ids; left out if there is none.
    """

    digest: str
    size: int
    mask_id: int | None
    pad_id: int
    eos_id: int | None
    special_ids: list[int]
    holes: NotRequired[list[list[int]]]


class CorpusInfo(TypedDict):
    """What a corpus is made of: everything that decides its bytes, and nothing else."""

    config: PackingFacts
    tokenizer: TokenizerFacts


def within_documents(config: PackingFacts) -> bool:
    """Return whether a row may hold several documents, with a token seeing only its own."""
    return config["packing"] == "packed" or config.get("attention") == "document"


def version_of(config: PackingFacts) -> int:
    """Return the least format version of a cache with such a corpus."""
    if "group_field" in config:
        return WITH_GROUPS
    if within_documents(config):
        return WITH_PACKED
    return WITH_TRAINED if "trained" in config else FORMAT_VERSION


def describe_corpus(
    config: CorpusConfig, tokenizer: Tokenizer, sequences_per_shard: int, held: HeldTexts | None
) -> CorpusInfo:
    """Return what the corpus will be made of; ``held`` are the configuration's texts of tests.

    Raises InputError for dialogues without a chat template.
    """
    values = config.model_dump(mode="json", exclude=_NOT_RECORDED)
    values["source"] = [*config.places]
    if config.contents != {"text"}:
        values |= {"trained": True, "contents": [entry.content for entry in config.entries]}
    if "chat" in config.contents:
        values["chat_template"] = chat_template(config, tokenizer).digest
    if config.special_tokens == "text":
        del values["special_tokens"]
    for name in ("pair_field", "group_field"):
        if values[name] is None:
            del values[name]
    if config.attention != "document":
        del values["attention"]
    if config.packing != "contiguous" and config.pair_field is None and lacks_end(tokenizer):
        values["end_of_text"] = True
    if held is not None:
        files = [*config.without]
        values["without"] = WithoutFacts(
            rule=RULE, digest=held.digest, texts=held.size, files=files
        )
    packing = cast("PackingFacts", values | {"sequences_per_shard": sequences_per_shard})
    return {"config": packing, "tokenizer": tokenizer_facts(tokenizer)}


def chat_template(config: CorpusConfig, tokenizer: Tokenizer) -> Template:
    """Return the chat template for the configured dialogues. Raise InputError if there is none."""
    return find_template(tokenizer.hf, config.tokenizer, config.chat_template)


def forms_of(config: CorpusConfig, tokenizer: Tokenizer) -> dict[str, Form]:
    """Return the readers of the configuration's records that are not texts."""
    forms: dict[str, Form] = {}
    if WRITTEN in config.contents:
        forms[WRITTEN] = WrittenDialogues()
    if "tokens" in config.contents:
        forms["tokens"] = TokenRows(tokenizer.size, tokenizer.gaps)
    if "chat" in config.contents:
        names = [token.content for token in special_tokens(tokenizer.encoder.backend).values()]
        as_tokens = config.special_tokens == "token"
        forms["chat"] = Dialogues(chat_template(config, tokenizer), names, as_tokens)
    return forms


def given_encoder(tokenizer: Tokenizer, forms: Mapping[str, Form]) -> GivenEncoder:
    """Return the tokenizer of records that are not texts, for these ``forms``."""
    has_dialogues = not forms.keys().isdisjoint(("chat", WRITTEN))
    special = np.zeros(tokenizer.size, np.bool_)
    special[[*tokenizer.special_ids - {tokenizer.hf.unk_token_id}]] = True
    return GivenEncoder(tokenizer.encoder.for_dialogues() if has_dialogues else None, special)


def recorded_entries(config: PackingFacts) -> list[Entry]:
    """Return what a corpus was read from, as its cache records it."""
    contents = config.get("contents") or ["text"] * len(config["source"])
    return [*map(Entry, config["source"], contents)]


def with_recorded_rules(new: PackingFacts, recorded: PackingFacts) -> PackingFacts:
    """Return ``new`` with a corpus's ``recorded`` packing rules: later ones are for new corpora."""
    if "end_of_text" in recorded:
        return new
    return cast("PackingFacts", {key: value for key, value in new.items() if key != "end_of_text"})


def differing_keys(one: PackingFacts, other: PackingFacts) -> list[str]:
    """Return the differing keys among those that decide the sequences. The location of files
    decides nothing: they are identified by content.
    """
    facts: list[dict[str, object]] = []
    for config in (one, other):
        compared: dict[str, object] = {
            key: value for key, value in config.items() if key not in ("source", "contents")
        }
        if without := config.get("without"):
            compared["without"] = (without["rule"], without["digest"])
        facts.append(compared)
    return sorted(k for k in facts[0].keys() | facts[1] if facts[0].get(k) != facts[1].get(k))


def tokenizer_facts(tokenizer: Tokenizer) -> TokenizerFacts:
    """Return what a cache records of the tokenizer."""
    names = TokenizerFacts.__required_keys__
    facts: dict[str, object] = {name: getattr(tokenizer, name) for name in sorted(names)}
    if tokenizer.gaps:
        facts["holes"] = [list(gap) for gap in tokenizer.gaps]
    return cast("TokenizerFacts", facts | {"special_ids": sorted(tokenizer.special_ids)})


def gap_ids(facts: TokenizerFacts) -> NDArray[np.int32]:
    """Return the ids below ``size`` that are not tokens, ascending."""
    gaps = [np.arange(first, past, dtype=np.int32) for first, past in facts.get("holes", [])]
    return np.concatenate([np.zeros(0, np.int32), *gaps])


def content_ids(facts: TokenizerFacts) -> NDArray[np.int32]:
    """Return the ids of all tokens that are not special, ascending; random tokens are these."""
    ids = np.setdiff1d(np.arange(facts["size"]), facts["special_ids"]).astype(np.int32)
    return np.setdiff1d(ids, gap_ids(facts)) if "holes" in facts else ids


def are_tokens(ids: NDArray[np.int32], facts: TokenizerFacts) -> bool:
    """Return whether all of ``ids`` are ids of tokens."""
    if not len(ids):
        return True
    in_range = bool(ids.min() >= 0 and ids.max() < facts["size"])
    return in_range and not ("holes" in facts and np.isin(ids, gap_ids(facts)).any())
