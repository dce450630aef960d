"""Generate the page of the grid, docs/families.md, from its rows."""

from collections.abc import Sequence
from pathlib import Path

from testlib.families.kinds import EXPERT, ROLES, STUDENT, TEACHER, Family

PRECISION = 1e-5
STATED = "1e-5"
DOCS = Path(__file__).parents[4] / "docs/families.md"
# Features tested together, whatever is installed.
PINNED = dict(
    line.split("==")
    for line in (DOCS.parents[1] / "constraints.txt").read_text().splitlines()
    if "==" in line
)

HEAD = f"""# Families of models

Which model families work as a teacher, as a student and as an expert with a head. Each cell was
tried with tiny models of random weights under transformers {PINNED["transformers"]} on a CPU; the
tests in `tests/pipeline/families` make this page and check every cell. *Equal* means:

- **teacher**: what stage 1 keeps, from a padded batch of sequences of different lengths, equals the
  log-probabilities of transformers' own forward pass of each sequence alone, at every masked
  position (encoders) or every next token (decoders): whole distributions to {STATED}, top-k ones to
  their codec's precision. In bfloat16 they are as near to float32 as transformers' own; FNet and
  DeBERTa (not v2 and v3) do not run in bfloat16 on a CPU.
- **student**: the loss of a step (KD and cross-entropy) and all its gradients equal those of
  transformers and torch alone to {STATED}; after the step it is saved, and transformers loads it
  with equal logits.
- **expert**: the logits that stage 1 keeps of a classifier of texts, and those of
  `pipeline predict`, equal those of transformers for each text alone to {STATED}.

*Sequences of one length together*: padding changes this family's outputs, so only sequences of
equal length share a batch. *Refused*: the result would be wrong, so the command ends with exit code
2 before any costly work, and its message has these words. A family that is not listed is tried in
the same way when it is loaded: its logits against its states, which tokens it sees, what padding
changes.
"""
KINDS = {"masked_lm": "Encoders", "causal_lm": "Decoders"}
NOTES = {"one": "equal, sequences of one length together", "fresh": "equal, with a fresh LM head"}


def page(families: Sequence[Family]) -> str:
    """Return the whole page."""
    parts = [HEAD]
    for task, title in KINDS.items():
        parts.append(
            f"## {title} ({task})\n\n| family | `model_type` | teacher | student | expert |"
        )
        parts[-1] += "\n|---|---|---|---|---|\n"
        parts[-1] += "".join(_row(family) for family in families if family.task == task)
    return "\n".join(parts)


def _row(family: Family) -> str:
    cells = [family.title, f"`{family.kind}`", *(_cell(family, role) for role in ROLES)]
    return f"| {' | '.join(cells)} |\n"


def _cell(family: Family, role: str) -> str:
    if role in family.refused:
        return f"refused: {family.refused[role]}"
    if family.moved_by_padding and role in (TEACHER, EXPERT):
        return NOTES["one"]
    return NOTES["fresh"] if family.fresh_head and role == STUDENT else "equal"


if __name__ == "__main__":
    from testlib.families.rows import FAMILIES

    DOCS.write_text(page(FAMILIES), encoding="utf-8")
