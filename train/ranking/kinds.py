"""The names of ranking losses in fine-tuning. Does not import torch."""

from typing import Literal

Loss = Literal["pointwise", "pairwise", "listwise"]
RANKING = "ranking"  # the problem of a labelled task whose documents are in groups
