"""The former place of ``rekindle.train.finetune.merge_baselines``, kept for programs that
use it.
"""

import warnings

from rekindle.train.finetune.merge_baselines import merge_scores as merge_scores

warnings.warn("moved to rekindle.train.finetune.merge_baselines", DeprecationWarning, stacklevel=2)
