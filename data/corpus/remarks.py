"""Decisions about a corpus's text that nobody asked for: one line each."""

import numpy as np

from rekindle.data.corpus.columns import CUT, LEARNT
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
    return int(np.nansum(corpus.units.numbers("special_names")))


_ASKED = ("sequence_length", "packing", "text_field", "pair_field", "limit_sequences")


def asked_otherwise(config: CorpusConfig, corpus: Corpus) -> str | None:
    """Return what a run file asks of the text that this corpus does not have; None if they agree.
    For commands that only read it: the corpus is used as it is.
    """
    asked, made = config.model_dump(mode="json"), dict(corpus.info["config"])
    other = [
        f"{key} {made.get(key)} (the run file says {asked[key]})"
        for key in _ASKED
        if key in config.model_fields_set and asked[key] != made.get(key)
    ]
    return f"the corpus of the cache has {', '.join(other)}: the cache's is used" if other else None


def _of_pairs(corpus: Corpus) -> list[str]:
    config = corpus.info["config"]
    if not corpus.has_pairs:
        return []
    names = f"{config['text_field']} and {config['pair_field']}"
    pairs, tokens = (int(corpus.units.counts(name).sum()) for name in CUT)
    cut = f"; {counted(pairs, 'pair')} cut, the longer text first: {counted(tokens, 'token')} lost"
    return [f"each sequence is a pair of texts: {names}{cut if pairs else ''}"]


def _of_training(corpus: Corpus) -> list[str]:
    """Return what of it is trained, if not everything."""
    if not corpus.has_trained:
        return []
    trained, left_out, cut, lost = (int(corpus.units.counts(name).sum()) for name in LEARNT)
    share = trained / max(corpus.tokens, 1)
    lines = [f"trained: {counted(trained, 'token')}, {share:.1%} of all"]
    if left_out:
        lines.append(f"left out, with no trained token: {counted(left_out, 'sequence')}")
    if cut:
        lines.append(
            f"longer than sequence_length, the end cut: {counted(cut, 'dialogue')} (or rows of "
            f"tokens), {counted(lost, 'token')} lost"
        )
    generated = {place: of for one in corpus.additions for place, of in one.generated.items()}
    return [*lines, *(describe_generated(place, about) for place, about in generated.items())]


def _of_rows(corpus: Corpus) -> list[str]:
    """Return how full rows of several documents are."""
    if corpus.full is None:
        return []
    length = corpus.info["config"]["sequence_length"]
    each = f"{corpus.documents / len(corpus):.1f} documents in each, attention within them"
    return [f"rows of {length:,} tokens are {corpus.full:.1%} full: {each}"]


def remarks(corpus: Corpus) -> list[str]:
    """Return what a user should know about it, in lines."""
    lines = [*_of_training(corpus), *_of_pairs(corpus), *_of_rows(corpus)]
    number = end_of_text(corpus)
    if number is not None:
        token = corpus.tokenizer.hf.convert_ids_to_tokens(number)
        lines.append(f"{token} comes after each document: the tokenizer does not end a text itself")
    if count := special_names(corpus):
        tokens = corpus.info["config"].get("special_tokens") == "token"
        lines.append(
            f"documents with names of special tokens in their text: {count:,}; they are read as "
            f"{'these tokens' if tokens else 'text'} (corpus.special_tokens: text | token)"
        )
    if bad := describe_bad(corpus.bad_records):
        lines.append(bad)
    if without := corpus.info["config"].get("without"):
        later = f"records that hold texts of {', '.join(without['files'])} are left out: "
        later += "counted when the corpus is finished"
        lines.append(describe_held(corpus.held, without["files"]) if corpus.complete else later)
    return lines
