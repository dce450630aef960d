"""The former place of ``rekindle.pipeline.stages.prompts``, for programs that name it."""

import warnings

from rekindle.pipeline.stages.prompts import write_prompts

__all__ = ["write_prompts"]

warnings.warn(
    "rekindle.pipeline.prompts is now rekindle.pipeline.stages.prompts",
    DeprecationWarning,
    stacklevel=2,
)
