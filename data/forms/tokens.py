"""Rows of tokens: ``input_ids``, and ``labels`` or ``loss_mask``, which say what is trained."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rekindle.data.errors import did_you_mean
from rekindle.data.source.given import GivenTokens
from rekindle.data.source.record import BadRecord, show_value

UNTRAINED = -100  # the label of an untrained token, as in transformers and torch
_FIELDS = ("input_ids", "labels", "loss_mask")


class TokenRows(NamedTuple):
    """Reads rows of tokens; ids must lie below ``size`` and not in ``holes`` (first, past the
    last).
    """

    size: int
    holes: tuple[tuple[int, int], ...]

    @property
    def fields(self) -> tuple[str, ...]:
        """Return the fields that it reads."""
        return _FIELDS

    def __call__(
        self, values: Mapping[str, object], columns: bool, where: str
    ) -> tuple[str, GivenTokens] | BadRecord:
        """Return the tokens of a record, with no text."""
        ids = self._ids(values, where)
        if isinstance(ids, BadRecord):
            return ids
        trained = _trained(values, ids, where)
        if isinstance(trained, BadRecord):
            return trained
        return "", GivenTokens(ids.astype(np.int32), trained)

    def _ids(self, values: Mapping[str, object], where: str) -> NDArray[np.int64] | BadRecord:
        if values.get("input_ids") is None:
            has = ", ".join(map(str, values)) or "no fields"
            near = did_you_mean("input_ids", map(str, values))
            return BadRecord("no tokens", f"{where}: no field 'input_ids'; it has: {has}{near}")
        ids = _integers(values["input_ids"])
        if ids is None or not len(ids):
            told = f"the field 'input_ids' holds {show_value(values['input_ids'])}"
            return BadRecord("no tokens", f"{where}: {told}; it must be a list of ids, one or more")
        known = (ids >= 0) & (ids < self.size)
        for first, past in self.holes:
            known &= (ids < first) | (ids >= past)
        if not known.all():
            at = int(np.flatnonzero(~known)[0])
            return BadRecord(
                "ids outside the vocabulary",
                f"{where}: input_ids[{at}] is {ids[at]}, which is not a token of corpus.tokenizer "
                f"({self.size:,} ids): the row was made with another tokenizer",
            )
        return ids


def _integers(value: object) -> NDArray[np.int64] | None:
    """Return a list of integers of any width as int64; None for anything else."""
    if not isinstance(value, list | tuple | np.ndarray):
        return None
    if any(isinstance(one, bool | float | str) or one is None for one in value):
        return None
    try:
        found = np.asarray(value, np.int64)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if found.ndim == 1 else None


def _trained(
    values: Mapping[str, object], ids: NDArray[np.int64], where: str
) -> NDArray[np.bool_] | BadRecord | None:
    """Return which tokens are trained; None if the record does not say: all are."""
    given = [name for name in _FIELDS[1:] if values.get(name) is not None]
    if not given:
        return None
    if len(given) > 1:
        told = "it has labels and loss_mask, so it is unclear which says what is trained"
        return BadRecord("labels and loss_mask", f"{where}: {told}: leave one out")
    (name,) = given
    value = values[name]
    if isinstance(value, list) and name == "loss_mask":
        value = [int(one) if isinstance(one, bool) else one for one in value]
    found = _integers(value)
    if found is None or len(found) != len(ids):
        many = "not a list of whole numbers" if found is None else f"{len(found):,}"
        told = f"{name} must have as many numbers as input_ids ({len(ids):,}), but has {many}"
        return BadRecord(f"wrong {name}", f"{where}: {told}")
    if name == "loss_mask":
        if not np.isin(found, (0, 1)).all():
            told = "loss_mask must be 1 (trained) or 0 at each token"
            return BadRecord(
                "wrong loss_mask", f"{where}: {told}; it has {found.min()}..{found.max()}"
            )
        return found == 1
    trained = found != UNTRAINED
    wrong = np.flatnonzero(trained & (found != ids))
    if len(wrong):
        at = int(wrong[0])
        shifted = np.array_equal(found[:-1][trained[:-1]], ids[1:][trained[:-1]])
        hint = ". They are shifted by one: transformers shifts labels itself" if shifted else ""
        return BadRecord(
            "wrong labels",
            f"{where}: labels[{at}] is {found[at]} but input_ids[{at}] is {ids[at]}; a label is "
            f"the token's own id, or {UNTRAINED} if it is not trained{hint}",
        )
    return trained
