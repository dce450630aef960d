"""The precise codec of vocabulary targets: 16-bit values. NumPy in, NumPy out; it knows no file.

For teachers whose values need more than the default codec's eight bits. Ids, the best
log-probability and the tails are as in ``codec.py``; per stored position (P positions, K candidates
by falling probability, T temperatures):

=================  ===================  =========================================================
column             type                 meaning
=================  ===================  =========================================================
``ids``            uint16 [P,K]         token id, low 16 bits
``ids_high``       uint8 [P,⌈K·b/8⌉]    bits 16 and up (only when V > 65,536)
``values``         uint16 [P,K]         lp₁ − lp in 1/2048 nat; 65535: 32 nats or more
``log_prob_max``   uint16 [P]           −lp₁ in 1/1024 nat
``tail_log_odds``  int16 [P,T]          log(kept mass / tail mass), 1/1024 nat; 32767: no tail
=================  ===================  =========================================================

The step is fixed, so a flat row or one distant candidate cannot coarsen the others, and no smallest
log-probability has to be stored. Reading works as in the default codec: softmax over the candidates
of −values/(2048·τ), times the stored kept mass at τ.

Precision: |error of a log-prob at τ| ≤ 1/(2048·τ) + 1/2048. The second term comes from the kept
mass, which all candidates of a row share; differences within a row are exact to 1/(2048·τ).
Candidates more than 32 nats below the best (logits of −inf, for instance) are stored as 32 nats
below it: at τ they are read as e^(−32/τ) of the best one's probability.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from rekindle.data.targets.codec import Columns, Floats, encode, with_tail

VALUE_STEP = 2048.0  # units per nat
SATURATED = 65535  # 31.9995 nats


def encode_precise(
    ids: NDArray[np.int64], log_probs: Floats, tail_log_odds: Floats, vocabulary_size: int
) -> Columns:
    """Encode ``ids`` [P,K] and ``log_probs`` [P,K] at τ = 1, both by falling probability.

    ``tail_log_odds`` [P,T] holds log(kept/tail) at the stored temperatures, +inf without a tail.
    """
    columns = encode(ids, log_probs, tail_log_odds, vocabulary_size)
    del columns["log_prob_min"]
    # Subtract in float64: at 32 nats a float32 is only exact to 1/262,144.
    log_probs = log_probs.astype(np.float64)
    below = np.minimum((log_probs[:, :1] - log_probs) * VALUE_STEP, SATURATED)
    return columns | {"values": np.rint(below).astype(np.uint16)}


def decode_precise(
    columns: Mapping[str, NDArray], temperature: float = 1.0, slot: int = 0, k: int | None = None
) -> tuple[Floats, Floats]:
    """Return log-probabilities [P,k] and log tail mass [P] at ``temperature``, stored in ``slot``.

    With ``k`` below the stored number the dropped candidates' mass joins the tail.
    """
    relative = columns["values"] / (-VALUE_STEP * temperature)
    return with_tail(relative, columns["tail_log_odds"][:, slot], k)
