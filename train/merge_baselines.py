"""The former place of ``rekindle.train.finetune.merge_baselines``, for programs that name it."""

import warnings

from rekindle.train.finetune.merge_baselines import merge_scores

__all__ = ["merge_scores"]

warnings.warn(
    "rekindle.train.merge_baselines is now rekindle.train.finetune.merge_baselines",
    DeprecationWarning,
    stacklevel=2,
)
