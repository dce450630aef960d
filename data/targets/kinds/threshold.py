"""``threshold``: an unbiased sample of exactly K ids per position, stored like ``topk``.

It holds for the one temperature it was drawn at (``threshold_sample`` in ``caching/sampling.py``).
"""

from rekindle.data.targets.kinds.topk import TopK


class Threshold(TopK):
    """K sampled ids per position with values that sum to 1, so there is no tail."""

    name = "threshold"
    template = "a threshold sample of {k} of {vocabulary_size:,} tokens"
    is_sample = True
    has_tail = can_grow = False

    @property
    def certainty_threshold(self) -> float:
        """1/K: a more probable id is always kept; in a row of K equal values the ids may
        be others.
        """
        return (1 + 1e-3) / self.k
