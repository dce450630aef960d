"""``threshold``: an unbiased sample of exactly K ids a position, stored as ``topk`` is.

It is of the one temperature that it was drawn at: ``threshold_sample`` in ``caching/sampling.py``.
"""

from rekindle.data.targets.kinds.topk import TopK


class Threshold(TopK):
    """K sampled ids a position with values that sum to 1: nothing lies outside."""

    name = "threshold"
    sampled = True
    has_tail = grows = False

    @property
    def sentence(self) -> str:
        """What is kept of each target, in a line."""
        return f"a threshold sample of {self.k} of {self.size:,} tokens"
