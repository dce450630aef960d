"""What scores are called where they are printed. Files and ``--metric`` have the recorded names."""

from rekindle.train.finetune.label_lists import TAGS


def printed_name(metric: str, problem: str, classes: int) -> str:
    """Return the name of ``metric`` with what its F1 is of: entities, or the mean over more than
    two ``classes``. That of one class of two is ``f1``, as GLUE has it.
    """
    if metric != "f1":
        return metric
    if problem == TAGS:
        return "entity f1"
    return "macro f1" if classes > 2 else metric
