"""Language models of the grid, by transformers' name of their family."""

import transformers

from testlib.families.rows import FAMILIES

ENCODERS = {family.kind for family in FAMILIES if family.task == "masked_lm"}
CAUSAL = {f"{f.kind} causal" if f.kind in ENCODERS else f.kind for f in FAMILIES} - ENCODERS
CAUSAL |= {family.title for family in FAMILIES if family.task == "causal_lm"}


def language_model(name: str) -> transformers.PreTrainedModel:
    """Return the model of its first row, or of the row with that title. "bert causal" is a
    decoder.
    """
    kind, _, causal = name.partition(" ")
    task = ("causal_lm",) if causal else ("masked_lm", "causal_lm")
    found = (f for f in FAMILIES if name == f.title or (f.kind == kind and f.task in task))
    return next(found).build()
