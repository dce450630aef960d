"""The former place of ``rekindle.pipeline.stages.prompts``, for programs that still import it."""

import warnings

from rekindle.pipeline.stages.prompts import write_prompts as write_prompts

warnings.warn("moved to rekindle.pipeline.stages.prompts", DeprecationWarning, stacklevel=2)
