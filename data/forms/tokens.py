"""Rows of tokens: ``input_ids``, and ``labels`` or ``loss_mask``, which say what is trained."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rekindle.data.errors import did_you_mean
from rekindle.data.source.content import TokenRow
from rekindle.data.source.record import BadRecord, show_value

UNTRAINED = -100  # the label of an untrained token, as in transformers and torch
_FIELDS = ("input_ids", "labels", "loss_mask")


class TokenRows(NamedTuple):
    """Reads rows of tokens; ids must lie below ``size`` and not in ``gaps`` (first, past the
    last).
    """

    size: int
    gaps: tuple[tuple[int, int], ...]

    @property
    def fields(self) -> tuple[str, ...]:
        """Return the fields that it reads."""
        return _FIELDS

    def __call__(
        self, values: Mapping[str, object], columns: bool, where: str
    ) -> tuple[str, TokenRow] | BadRecord:
        """Return the tokens of a record, with no text."""
        ids = self._ids(values, where)
        if isinstance(ids, BadRecord):
            return ids
        trained = _trained(values, ids, where)
        if isinstance(trained, BadRecord):
            return trained
        return "", TokenRow(ids.astype(np.int32), trained)

    def _ids(self, values: Mapping[str, object], where: str) -> NDArray[np.int64] | BadRecord:
        if values.get("input_ids") is None:
            present = ", ".join(map(str, values)) or "no fields"
            hint = did_you_mean("input_ids", map(str, values))
            return BadRecord("no tokens", f"{where}: no field 'input_ids'; it has: {present}{hint}")
        ids = _integers(values["input_ids"])
        if ids is None or not len(ids):
            problem = f"the field 'input_ids' holds {show_value(values['input_ids'])}"
            return BadRecord(
                "no tokens", f"{where}: {problem}; it must be a list of ids, one or more"
            )
        is_known = (ids >= 0) & (ids < self.size)
        for first, past in self.gaps:
            is_known &= (ids < first) | (ids >= past)
        if not is_known.all():
            first = int(np.flatnonzero(~is_known)[0])
            return BadRecord(
                "ids outside the vocabulary",
                f"{where}: input_ids[{first}] is {ids[first]}, which is not a token of "
                f"corpus.tokenizer ({self.size:,} ids): the row was made with another tokenizer",
            )
        return ids


def _integers(value: object) -> NDArray[np.int64] | None:
    """Return a list of integers of any width as int64; None for anything else."""
    if not isinstance(value, list | tuple | np.ndarray):
        return None
    if any(isinstance(one, bool | float | str) or one is None for one in value):
        return None
    try:
        numbers = np.asarray(value, np.int64)
    except (TypeError, ValueError, OverflowError):
        return None
    return numbers if numbers.ndim == 1 else None


def _trained(
    values: Mapping[str, object], ids: NDArray[np.int64], where: str
) -> NDArray[np.bool_] | BadRecord | None:
    """Return which tokens are trained; None if the record does not say: all are."""
    fields = [name for name in _FIELDS[1:] if values.get(name) is not None]
    if not fields:
        return None
    if len(fields) > 1:
        problem = "it has labels and loss_mask, so it is unclear which says what is trained"
        return BadRecord("labels and loss_mask", f"{where}: {problem}: leave one out")
    (name,) = fields
    value = values[name]
    if isinstance(value, list) and name == "loss_mask":
        value = [int(one) if isinstance(one, bool) else one for one in value]
    numbers = _integers(value)
    if numbers is None or len(numbers) != len(ids):
        actual = "not a list of whole numbers" if numbers is None else f"{len(numbers):,}"
        problem = f"{name} must have as many numbers as input_ids ({len(ids):,}), but has {actual}"
        return BadRecord(f"wrong {name}", f"{where}: {problem}")
    if name == "loss_mask":
        if not np.isin(numbers, (0, 1)).all():
            problem = "loss_mask must be 1 (trained) or 0 at each token"
            return BadRecord(
                "wrong loss_mask", f"{where}: {problem}; it has {numbers.min()}..{numbers.max()}"
            )
        return numbers == 1
    trained = numbers != UNTRAINED
    differing = np.flatnonzero(trained & (numbers != ids))
    if len(differing):
        first = int(differing[0])
        is_shifted = np.array_equal(numbers[:-1][trained[:-1]], ids[1:][trained[:-1]])
        hint = ". They are shifted by one: transformers shifts labels itself" if is_shifted else ""
        return BadRecord(
            "wrong labels",
            f"{where}: labels[{first}] is {numbers[first]} but input_ids[{first}] is {ids[first]}; "
            f"a label is the token's own id, or {UNTRAINED} if it is not trained{hint}",
        )
    return trained
