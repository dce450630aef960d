"""A row of an import: which sequence it belongs to, the proof of that, and its fields.

P positions, W candidates of the position that has most.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rekindle.data.corpus.corpus import Corpus
from rekindle.data.corpus.pieces import PieceTexts
from rekindle.data.errors import InputError, did_you_mean, naming

Row = Mapping[str, object]
Floats64 = NDArray[np.float64]

# Written by `pipeline export-targets` for people; an import ignores them.
IGNORED_FIELDS = (
    *("text", "document", "domain", "group", "tokens"),
    *("candidates", "gold_tokens", "label"),
)
# Must match the cache if given. ``labels``: see label_rows.py.
PROOF_FIELDS = ("shown_ids", "labels")
# an export's fields, for a teacher that stores draws
SAMPLE_FIELDS = ("sampled_ids", "sampled_log_probs")
KEY_FIELDS = ("index", "digest", "input_ids", "replica")


@dataclass(frozen=True)
class SequencePlace:
    """Where a row belongs."""

    index: int  # the sequence's number in the corpus
    shard: int
    row: int  # within the shard
    replica: int | None


def place_of(row: Row, corpus: Corpus, replicas: int | None) -> SequencePlace:
    """Return the sequence that ``row`` belongs to; raise InputError unless the row proves it.

    ``replicas``: the number of replicas of a masked view, whose rows name theirs; None without
    masks.
    """
    index = _whole_number(row, "index", len(corpus), "the sequence's number in the cache")
    shards, rows = corpus.locate(np.array([index]))
    place = (int(shards[0]), int(rows[0]))
    if row.get("input_ids") is None and row.get("digest") is None:
        raise InputError(
            "it has neither input_ids nor digest, so nothing shows which sequence its targets "
            "belong to. Give the token ids that the model was shown, or the digest that "
            "`pipeline export-targets` writes"
        )
    if row.get("digest") is not None and row["digest"] != corpus.text("digest", place):
        raise InputError(
            f"its digest is {str(row['digest'])[:40]!r}, but that of sequence {index} in the "
            f"cache is {corpus.text('digest', place)!r}: its targets belong to another sequence, "
            "or to another cache"
        )
    if row.get("input_ids") is not None:
        with naming("input_ids"):
            _check_tokens(whole_numbers(row["input_ids"]), tokens_of(corpus, place), corpus, index)
    replica = None
    if replicas is not None:
        replica = _whole_number(row, "replica", replicas, "which masking the model was shown")
    elif row.get("replica") is not None:
        raise InputError(
            "it has a replica, but this teacher sees no masks. Rows of a masked LM need its task "
            "(task, --task masked_lm); otherwise leave the replica out"
        )
    return SequencePlace(index, *place, replica)


def check_shown(row: Row, expected_ids: NDArray[np.int32], place: SequencePlace) -> None:
    """Raise InputError if ``shown_ids`` are not the tokens [S] that the model was shown, or nothing
    proves which masks it saw.
    """
    if row.get("shown_ids") is not None:
        with naming("shown_ids"):
            row_ids = whole_numbers(row["shown_ids"])
            if not np.array_equal(row_ids, expected_ids):
                replica_text = f" with the masks of replica {place.replica}"
                masks = replica_text if place.replica is not None else ""
                shared_length = min(len(row_ids), len(expected_ids))
                at = [
                    *np.flatnonzero(row_ids[:shared_length] != expected_ids[:shared_length]),
                    shared_length,
                ][0]
                raise InputError(
                    f"they differ from those of sequence {place.index}{masks} from place {at} on: "
                    "its targets belong to other inputs"
                )
    elif place.replica is not None and row.get("positions") is None:
        raise InputError(
            "it has neither positions nor shown_ids, so nothing shows that its targets belong to "
            f"the masks of replica {place.replica}. `pipeline export-targets --view masked` "
            "writes both"
        )


def tokens_of(corpus: Corpus, place: tuple[int, int]) -> NDArray[np.int32]:
    """Return the token ids [S] of a row of the corpus."""
    lists, first, last = corpus.cut(place)
    ids: NDArray[np.int32] = lists.columns["input_ids"][first:last]
    return ids


def _check_tokens(
    row_ids: NDArray[np.int64], expected: NDArray[np.int32], corpus: Corpus, index: int
) -> None:
    if np.array_equal(row_ids, expected):
        return
    if len(row_ids) != len(expected):
        difference = f"{len(row_ids)} tokens, but sequence {index} has {len(expected)}"
    else:
        at = int(np.flatnonzero(row_ids != expected)[0])
        texts = PieceTexts(corpus.tokenizer.hf)
        difference = (
            f"at place {at} token {int(row_ids[at])}, but sequence {index} has {int(expected[at])} "
            f"({texts[int(expected[at])]!r}) there"
        )
    raise InputError(
        f"{difference}: its targets belong to another text, or to another tokenizer. Show the "
        "model the token ids of the cache (`pipeline export-targets` without --teacher writes them)"
    )


def check_keys(row: Row, fields: Sequence[str]) -> None:
    """Raise InputError for an unknown key; null columns do not count."""
    for key, value in row.items():
        if value is not None and key not in (*KEY_FIELDS, *PROOF_FIELDS, *IGNORED_FIELDS, *fields):
            known = (*KEY_FIELDS, *fields)
            if key in SAMPLE_FIELDS:
                raise InputError(
                    f"it has {key}: its teacher keeps draws (targets.kind threshold or random), "
                    "which are not likeliest candidates. Cache that model with targets.kind "
                    "topk, and export it again"
                )
            raise InputError(
                f"{key!r} is not a field of a row (known: {', '.join(known)})"
                f"{did_you_mean(str(key), known)}"
            )


def _whole_number(row: Row, name: str, limit: int, meaning: str) -> int:
    value = row.get(name)
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        preview = "missing" if value is None else f"{str(value)[:40]!r}"
        raise InputError(f"{name} must be a whole number, {meaning} (given: {preview})")
    if not 0 <= value < limit:
        raise InputError(f"{name} is {value}, but the cache has 0 to {limit - 1}")
    return int(value)


# --- values of fields -----------------------------------------------------------------------------


def whole_numbers(value: Any) -> NDArray[np.int64]:
    """Return a list of whole numbers [N]; raise InputError for anything else."""
    array = _array(value)
    if array is None or array.ndim != 1 or (len(array) and array.dtype.kind not in "iu"):
        raise InputError(f"must be a list of whole numbers (given: {_preview(value)})")
    return array.astype(np.int64)


def numbers(value: Any, count: int, item: str) -> Floats64:
    """Return a list of ``count`` finite numbers [N]; raise InputError for anything else."""
    array = _array(value)
    if array is None or array.ndim != 1 or (len(array) and array.dtype.kind not in "iuf"):
        raise InputError(f"must be a list of numbers (given: {_preview(value)})")
    if len(array) != count:
        raise InputError(f"has {len(array)} numbers; there must be {count}, one for each {item}")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        at = int(np.flatnonzero(~np.isfinite(array))[0])
        raise InputError(f"entry {at} is {array[at]}; it must be finite")
    return array


def log_masses(value: Any, count: int) -> Floats64:
    """Return logarithms of masses [P]; null is zero mass, −inf."""
    if isinstance(value, Sequence | np.ndarray):
        value = [-math.inf if one is None else one for one in value]
    array = _array(value)
    if array is None or array.ndim != 1 or (len(array) and array.dtype.kind not in "iuf"):
        raise InputError(f"must be a list of numbers and nulls (given: {_preview(value)})")
    if len(array) != count or np.isnan(array).any() or (array > 0).any():
        raise InputError(f"must be {count} logarithms, none above 0 (given: {_preview(value)})")
    return array.astype(np.float64)


def matrix(value: Any, kinds: str, fill: float) -> tuple[NDArray, NDArray[np.int64]]:
    """Return a list of lists as [P,W], with ``fill`` where one is shorter, and each one's length
    [P].

    ``kinds``: NumPy's letters of the allowed types. Raises InputError for anything else.
    """
    type_name = "whole numbers" if "f" not in kinds else "numbers"
    message = (
        f"must be a list of lists of {type_name}, one for each position (given: {_preview(value)})"
    )
    if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str):
        raise InputError(message)
    array = _array(value)
    if array is not None and array.ndim == 2 and (not array.size or array.dtype.kind in kinds):
        return array, np.full(len(array), array.shape[1], np.int64)
    arrays = [_array(one) for one in value]
    if any(one is None or one.ndim != 1 for one in arrays):
        raise InputError(message)
    lists = [one for one in arrays if one is not None]
    if any(len(one) and one.dtype.kind not in kinds for one in lists):
        raise InputError(message)
    counts = np.array([len(one) for one in lists], np.int64)
    out = np.full((len(lists), int(counts.max(initial=0))), fill)
    for target, one in zip(out, lists, strict=True):
        target[: len(one)] = one
    return out, counts


def _array(value: Any) -> NDArray | None:
    """Return ``value`` as an array; None if it is not one, such as lists of different lengths."""
    if isinstance(value, str | bytes) or not isinstance(value, Sequence | np.ndarray):
        return None
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):
        return None
    return array if array.dtype.kind in "iuf" or not array.size else None


def _preview(value: object) -> str:
    text = "nothing" if value is None else str(value)
    return f"{text[:40]}{'…' if len(text) > 40 else ''}"
