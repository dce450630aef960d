"""Decisions about a corpus's text that nobody asked for: one line each."""

import numpy as np

from rekindle.data.corpus.columns import CUT_FACTS, TRAINED_FACTS
from rekindle.data.corpus.config import CorpusConfig
from rekindle.data.corpus.corpus import Corpus
from rekindle.data.corpus.packing import document_end, document_separators
from rekindle.data.counted import counted
from rekindle.data.source.generated import describe_generated
from rekindle.data.source.left_out import describe_bad, describe_held


def end_of_text(corpus: Corpus) -> int | None:
    """Return the token that packing puts after each document; None if the tokenizer itself ends
    texts, or nothing does.
    """
    config = corpus.info["config"]
    if corpus.has_pairs:
        return None
    if config["packing"] != "contiguous" and "text" not in config.get("contents", ["text"]):
        return None
    if config["packing"] == "contiguous":
        end = document_separators(corpus.tokenizer)[1]
    else:
        end = document_end(corpus.tokenizer, config.get("end_of_text", False))
    return end[0] if end else None


def special_names(corpus: Corpus) -> int:
    """Return how many documents have the name of a special token in their text, as far as counted:
    versions before format 3 did not count.
    """
    return int(np.nansum(corpus.commits_by_unit.number_facts("special_names")))


_COMPARED_KEYS = ("sequence_length", "packing", "text_field", "pair_field", "limit_sequences")


def describe_text_difference(config: CorpusConfig, corpus: Corpus) -> str | None:
    """Return what a run file asks of the text that this corpus does not have; None if they agree.
    For commands that only read it: the corpus is used as it is.
    """
    requested, recorded = config.model_dump(mode="json"), dict(corpus.info["config"])
    differences = [
        f"{key} {recorded.get(key)} (the run file says {requested[key]})"
        for key in _COMPARED_KEYS
        if key in config.model_fields_set and requested[key] != recorded.get(key)
    ]
    return (
        f"the corpus of the cache has {', '.join(differences)}: the cache's is used"
        if differences
        else None
    )


def _pair_remarks(corpus: Corpus) -> list[str]:
    config = corpus.info["config"]
    if not corpus.has_pairs:
        return []
    fields = f"{config['text_field']} and {config['pair_field']}"
    pairs, tokens = (int(corpus.commits_by_unit.count_facts(name).sum()) for name in CUT_FACTS)
    cut = f"; {counted(pairs, 'pair')} cut, the longer text first: {counted(tokens, 'token')} lost"
    return [f"each sequence is a pair of texts: {fields}{cut if pairs else ''}"]


def _training_remarks(corpus: Corpus) -> list[str]:
    """Return what of it is trained, if not everything."""
    if not corpus.has_trained:
        return []
    trained, left_out, cut, lost = (
        int(corpus.commits_by_unit.count_facts(name).sum()) for name in TRAINED_FACTS
    )
    share = trained / max(corpus.tokens, 1)
    lines = [f"trained: {counted(trained, 'token')}, {share:.1%} of all"]
    if left_out:
        lines.append(f"left out, with no trained token: {counted(left_out, 'sequence')}")
    if cut:
        lines.append(
            f"longer than sequence_length, the end cut: {counted(cut, 'dialogue')} (or rows of "
            f"tokens), {counted(lost, 'token')} lost"
        )
    generated = {place: facts for one in corpus.additions for place, facts in one.generated.items()}
    return [*lines, *(describe_generated(place, facts) for place, facts in generated.items())]


def _row_remarks(corpus: Corpus) -> list[str]:
    """Return how full rows of several documents are."""
    if corpus.full is None:
        return []
    length = corpus.info["config"]["sequence_length"]
    per_row = f"{corpus.documents / len(corpus):.1f} documents in each, attention within them"
    return [f"rows of {length:,} tokens are {corpus.full:.1%} full: {per_row}"]


def remarks(corpus: Corpus) -> list[str]:
    """Return what a user should know about it, in lines."""
    lines = [*_training_remarks(corpus), *_pair_remarks(corpus), *_row_remarks(corpus)]
    number = end_of_text(corpus)
    if number is not None:
        token = corpus.tokenizer.hf.convert_ids_to_tokens(number)
        lines.append(f"{token} comes after each document: the tokenizer does not end a text itself")
    if count := special_names(corpus):
        as_tokens = corpus.info["config"].get("special_tokens") == "token"
        lines.append(
            f"documents with names of special tokens in their text: {count:,}; they are read as "
            f"{'these tokens' if as_tokens else 'text'} (corpus.special_tokens: text | token)"
        )
    if bad := describe_bad(corpus.bad_records):
        lines.append(bad)
    if without := corpus.info["config"].get("without"):
        note = f"records that hold texts of {', '.join(without['files'])} are left out: "
        note += "counted when the corpus is finished"
        lines.append(describe_held(corpus.held, without["files"]) if corpus.complete else note)
    return lines
