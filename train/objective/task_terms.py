"""What the task-side settings of a distillation term need: ranking experts and pseudo-labels."""

from collections.abc import Sequence

from rekindle.data.errors import InputError
from rekindle.data.targets.schema import TeacherInfo
from rekindle.train.config import DistillTerm


def check_ranking(where: str, term: DistillTerm, infos: Sequence[TeacherInfo]) -> None:
    """Raise InputError where ``ranking`` is set and the term has no scores to rank by."""
    if term.ranking is None:
        return
    other = next((i for i in infos if i.problem != "regression"), None)
    if other is not None:
        raise InputError(
            f"{where}: ranking is for regression experts, whose score is an order, and "
            f"{other.name!r} is a {other.problem or other.task} expert; leave ranking out"
        )
    if term.combine != "separate":
        raise InputError(
            f"{where}: ranking compares the scores of one expert with each other, so combine: "
            f"{term.combine} has no pairs; use separate"
        )
    if term.ranking.pointwise == 0 and term.ranking.pairwise == 0:
        raise InputError(f"{where}: ranking has the weights 0 and 0; give one of them a weight")
    if term.divergence not in ("forward_kl", "mse"):
        raise InputError(
            f"{where}: ranking is a squared error; leave divergence: {term.divergence} out"
        )


def check_pseudo_labels(where: str, term: DistillTerm, infos: Sequence[TeacherInfo]) -> None:
    """Raise InputError where pseudo-labels are asked of what has no classes to be sure of."""
    if term.divergence != "pseudo_label":
        if term.confidence is not None:
            raise InputError(
                f"{where}: confidence is for divergence: pseudo_label, not {term.divergence}"
            )
        return
    for info in infos:
        if info.is_vocabulary or info.problem == "regression":
            raise InputError(
                f"{where}: pseudo_label is for classifiers, and {info.name!r} is a "
                f"{info.problem or info.task} expert; use mse or forward_kl"
            )
    if term.combine not in ("separate", "route"):
        raise InputError(
            f"{where}: pseudo_label takes one expert's word for a class; combine: {term.combine} "
            "makes a distribution of several. Use separate, or route: the first that is sure"
        )
    if term.temperature != 1:
        raise InputError(
            f"{where}: a pseudo-label has no temperature; leave temperature: {term.temperature} out"
        )
