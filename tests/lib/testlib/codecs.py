"""Rows of logits, and the float64 values a codec is compared with."""

import numpy as np
from hypothesis import strategies as st


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def truth(logits, ids, temperature):
    """Return log-probabilities of ``ids`` and log tail mass at a temperature."""
    log_probs = log_softmax(np.asarray(logits, np.float64) / temperature)
    kept = np.take_along_axis(log_probs, ids, axis=1)
    np.put_along_axis(log_probs, ids, -np.inf, axis=1)
    return kept, np.logaddexp.reduce(log_probs, axis=1)


@st.composite
def logit_rows(draw):
    """Draw (logits [7,V], k): any vocabulary and any k, flat rows and peaked ones."""
    size = draw(st.integers(2, 400))
    seed = draw(st.integers(0, 2**32))
    scale = draw(st.sampled_from([0.0, 0.01, 1.0, 3.0]))
    return np.random.default_rng(seed).normal(0, scale, (7, size)), draw(st.integers(1, size))
