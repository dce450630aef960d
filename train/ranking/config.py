"""How the scores of a ranking expert teach a student. Does not import torch."""

from typing import Literal

from pydantic import Field

from rekindle.data.settings import Settings
from rekindle.train.schedules import Amount


class RankingConfig(Settings):
    """How the scores of a regression expert teach an order: squared errors of scores and of their
    differences, and the divergence of their distributions over a group. Splitting a group among
    micro-batches or processes changes only rounding (and dropout), at the price of one more forward
    pass.
    """

    pointwise: Amount = Field(1.0, description="weight of the squared error of a score")
    pairwise: Amount = Field(
        1.0,
        description="weight of the squared error of the difference of two scores (MarginMSE), "
        "mean over the pairs of a group in a step; 0: none",
    )
    pairs: Literal["all", "best"] = Field(
        "all",
        description="for pairwise. all: every two sequences of a group; best: the one that the "
        "expert scores highest with each other one (among equal ones the first in the corpus)",
    )
    listwise: Amount = Field(
        0.0,
        description="weight of τ² · KL(softmax(t/τ) ‖ softmax(s/τ)) over the scores of a group, "
        "mean over the groups in a step; τ is the term's temperature, which the other two do not "
        "use",
    )
    group: Literal["batch", "domain", "document", "group"] = Field(
        "batch",
        description="which sequences of a step are compared: all, those of one domain, of one "
        "document, or of one group (corpus.group_field). With a large corpus a step rarely holds "
        "two of a document or group; with train.batching: groups it holds whole groups",
    )

    @property
    def weights(self) -> tuple[float, float, float]:
        """Return the weights of scores, of differences and of groups."""
        return self.pointwise, self.pairwise, self.listwise


def missing_groups_message(key: str, corpus: str) -> str:
    """Return the message for a run that needs groups on a corpus without them."""
    return (
        f"{key} needs groups, but the sequences of {corpus} have none: set corpus.group_field to "
        "the field that all documents of a query have in common, and cache the corpus with it"
    )
