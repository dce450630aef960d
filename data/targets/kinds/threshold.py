"""``threshold``: an unbiased sample of exactly K ids a position, stored as ``topk`` is.

It is of the one temperature that it was drawn at: ``threshold_sample`` in ``caching/sampling.py``.
"""

from rekindle.data.targets.kinds.topk import TopK


class Threshold(TopK):
    """K sampled ids a position with values that sum to 1: nothing lies outside."""

    name = "threshold"
    told = "a threshold sample of {k} of {vocabulary_size:,} tokens"
    sampled = True
    has_tail = grows = False

    @property
    def sure_above(self) -> float:
        """1/K: an id of more is kept as it is; a row of K equal values may be of other ids."""
        return (1 + 1e-3) / self.k
