"""The names of what a ranker is fine-tuned on. Torch is not imported here."""

from typing import Literal

Loss = Literal["pointwise", "pairwise", "listwise"]
RANKING = "ranking"  # the problem of a labelled task whose documents are in groups
