"""The temperatures of rows, and the mass outside their candidates at each.

A row's ``log_probs`` and ``log_tail`` are at its ``temperature`` T (1 unless it states another);
``log_tails`` has that mass at further temperatures. A codec stores the candidates' differences at τ
= 1, which are T times those of ``log_probs``, so they are known for any T. At a temperature that no
row states, 1 included, the mass outside them is unknown, so nothing can be read there.

P positions, W candidates of the position that has most, K kept ones, T temperatures.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from rekindle.data.errors import InputError, naming
from rekindle.data.exchange.rows import Floats64, Row, log_masses
from rekindle.data.targets.codec import RANGE

TEMPERATURE, TAIL, FURTHER_TAILS = "temperature", "log_tail", "log_tails"
MAX_TEMPERATURE = 1000.0
CODEC_TOLERANCE = (
    0.25  # nats between two statements of the same value: more than any codec's rounding
)


def temperature_of(row: Row) -> float:
    """Return the temperature of a row's log-probabilities."""
    value = row.get(TEMPERATURE)
    return 1.0 if value is None else _temperature(value, TEMPERATURE)


def further_tails(row: Row) -> dict[float, object]:
    """Return ``log_tails`` by temperature, ascending; empty if the row has none."""
    tails = row.get(FURTHER_TAILS)
    if tails is None:
        return {}
    if not isinstance(tails, Mapping):
        raise InputError(
            f"{FURTHER_TAILS} must be an object: temperature -> list of logarithms (given: "
            f"{str(tails)[:40]})"
        )
    if row.get(TAIL) is None:
        raise InputError(
            f"{FURTHER_TAILS} are given without {TAIL}, the mass that belongs to log_probs"
        )
    result: dict[float, object] = {}
    for key, values in tails.items():
        if values is None:  # Arrow's structs have every key of the file
            continue
        tau = _temperature(key, FURTHER_TAILS)
        if tau in result or tau == temperature_of(row):
            raise InputError(
                f"{FURTHER_TAILS}: {tau:g} is there twice ({TAIL} belongs to `{TEMPERATURE}`)"
            )
        result[tau] = values
    return dict(sorted(result.items()))


def _temperature(value: object, name: str) -> float:
    try:
        result = float(value) if not isinstance(value, bool) else 0.0  # type: ignore[arg-type]
    except (TypeError, ValueError):
        result = 0.0
    if not 0 < result < MAX_TEMPERATURE:
        raise InputError(
            f"{name}: {str(value)[:40]!r} is not a temperature: a number above 0 and below "
            f"{MAX_TEMPERATURE:g}"
        )
    return result


def check_same_tails(row: Row, temperature: float, further: Sequence[float]) -> None:
    """Raise InputError for a row whose temperatures differ from those before it."""
    if (row_temperature := temperature_of(row)) != temperature:
        raise InputError(
            f"{TEMPERATURE} is {row_temperature:g}, but that of the first rows is {temperature:g}; "
            "all rows must have the same. Import the others as another teacher"
        )
    if (row_further := [*further_tails(row)]) != [*further]:
        raise InputError(
            f"{FURTHER_TAILS} have the temperatures {row_further}, but those of the first rows "
            f"{[*further]}; every row must have the same"
        )


def further_odds(
    row: Row,
    log_probs: Floats64,
    log_tail: Floats64,
    k: int,
    tokens: int,
    positions: NDArray[np.int64],
) -> Floats64:
    """Return log(kept mass / mass outside) [P,T] at the temperatures of ``log_tails``.

    ``log_probs`` [P,W], by falling probability with −inf for missing ones, and ``log_tail`` [P] are
    at the row's own temperature; ``tokens``: how many ids can have a probability. Raises InputError
    if no distribution has the candidates as its likeliest and these masses outside them.
    """
    row_temperature, further = temperature_of(row), further_tails(row)
    relative = row_temperature * (log_probs - log_probs[:, :1])
    tails = {row_temperature: log_tail}
    for tau, values in further.items():
        with naming(f"{FURTHER_TAILS}: {tau:g}"):
            tails[tau] = log_masses(values, len(log_probs))
            if (tails[tau] > -1e-12).any():
                raise InputError("no mass is left for the candidates of a position")
    log_outside = {tau: _outside(relative, tau, log_mass) for tau, log_mass in tails.items()}
    others = tokens - np.isfinite(log_probs).sum(axis=1)
    contradicts = _contradicts(relative, log_outside, relative[:, k - 1], others)
    if contradicts.any():
        first = int(np.argmax(contradicts))
        masses = ", ".join(f"{np.exp(tails[tau][first]):.4g} at {tau:g}" for tau in sorted(tails))
        raise InputError(
            f"{FURTHER_TAILS}: position {positions[first]}: masses of {masses} outside the "
            "candidates fit no distribution with these as its likeliest tokens. Do they belong to "
            "these temperatures, and to all tokens but these?"
        )
    odds = []
    for tau in further:
        kept, dropped = (_sum(part / tau) for part in (relative[:, :k], relative[:, k:]))
        odds.append(kept - np.logaddexp(dropped, log_outside[tau]))
    return np.stack(odds, axis=1)


def at_temperature_one(log_probs: Floats64, temperature: float, odds: Floats64 | None) -> Floats64:
    """Return ``log_probs`` [P,K] at ``temperature``, by falling probability, converted to 1.

    ``odds`` [P]: log(kept mass / tail) at 1; if None, unknown, and the result is over the
    candidates alone. Raises InputError for candidates further apart than a codec can store.
    """
    relative = temperature * (log_probs - log_probs[:, :1])
    if (relative < -RANGE).any():
        distance = float((log_probs[:, 0] - log_probs.min(axis=1)).max())
        raise InputError(
            f"candidates lie {distance:.3g} nats apart at temperature {temperature:g}, but those "
            f"of a position may be at most {RANGE / temperature:.3g} apart: give fewer of each (k)"
        )
    log_kept_mass = 0.0 if odds is None else -np.logaddexp(0.0, -odds)[:, None]
    result: Floats64 = relative - _sum(relative)[:, None] + log_kept_mass
    return result


def _outside(relative: Floats64, temperature: float, log_tail: Floats64) -> Floats64:
    """Return log Σ exp(relative/τ) [P] over the tokens that are not candidates."""
    return _sum(relative / temperature) + log_tail - np.log(-np.expm1(log_tail))


def _sum(values: Floats64) -> Floats64:
    result: Floats64 = np.logaddexp.reduce(values, axis=1)
    return result


def _contradicts(
    relative: Floats64,
    log_outside: Mapping[float, Floats64],
    last: Floats64,
    others: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """Return where [P] no distribution has all these masses.

    f(β) = log Σ exp(β·relative) over the other tokens is convex in β = 1/τ; f(0) is the log of
    their number, at most ``others`` [P]; and because none of them is likelier than the ``last`` [P]
    kept, f falls by at least −last from β to β + 1. Values that a codec had to clip are not judged.
    """
    order = sorted(log_outside, reverse=True)
    betas = np.array([0.0, *(1 / tau for tau in order)])
    sums = np.stack([np.log(np.maximum(others, 1)), *(log_outside[tau] for tau in order)], axis=1)
    is_finite = np.isfinite(sums[:, 1:])
    is_partly_finite = is_finite.any(axis=1) & ~is_finite.all(axis=1)
    odds = np.stack([_sum(relative / tau) - log_outside[tau] for tau in order], axis=1)
    is_judged = is_finite.all(axis=1) & (np.abs(odds) < RANGE - 0.1).all(axis=1)
    sums = np.where(is_judged[:, None], sums, 0.0)
    step_sizes = np.diff(betas)
    falls_too_little = (np.diff(sums, axis=1) > last[:, None] * step_sizes + CODEC_TOLERANCE).any(
        axis=1
    )
    fraction = step_sizes[:-1] / (step_sizes[:-1] + step_sizes[1:])
    chord = sums[:, :-2] + fraction * (sums[:, 2:] - sums[:, :-2])
    is_not_convex = (sums[:, 1:-1] > chord + CODEC_TOLERANCE).any(axis=1)
    result: NDArray[np.bool_] = is_partly_finite | (is_judged & (falls_too_little | is_not_convex))
    return result
