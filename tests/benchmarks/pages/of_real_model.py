"""The tables of docs/results/real_model.md, from the rows of `real_model/real_model.py`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROWS = Path(__file__).resolve().parents[1] / "real_model" / "rows.json"
KIND = {"bytes": ".1f", "kept mass": ".3f", "KL": ".1e", "best token": ".3f"}


def regions() -> dict[str, str]:
    """Return the page's regions by name."""
    found = json.loads(ROWS.read_text(encoding="utf-8"))
    kept = found["map"]
    kinds = [[f"`{name}`", *_cells(one)] for name, one in found["kinds"].items()]
    trained = [[str(s["step"]), f"{s['ce']:.3f}", f"{s['KL']:.3f}"] for s in found["trained"]]
    shares = [f"{kept['tokens']:,}", f"{kept['positions']:.1%}", f"{kept['probability']:.1%}"]
    return {
        "run": _run(found),
        "kinds": _table(
            ["targets", "bytes a position", "kept mass", "KL, nats", "best token kept"], kinds
        ),
        "trained": _table(
            ["step", "cross-entropy, held out", "KL to the teacher, held out"], trained
        ),
        "mapped": _table(
            ["corpus's tokenizer", "teacher's", "tokens of both", "positions", "probability"],
            [["GPT-2's (50,257)", "SmolLM2's (49,152)", *shares]],
        ),
    }


def _run(found: Mapping[str, Any]) -> str:
    generated, cached, trained = (
        found[f"{what} seconds"] for what in ("generate", "cache", "train")
    )
    return (
        f"{found['sequences']} dialogues, {found['tokens']:,} tokens, of which "
        f"{found['trained share']:.1%} are trained. Generating took {generated:.0f} s, caching all "
        f"kinds in one pass {cached:.0f} s, {found['steps']} steps of the student {trained:.0f} s "
        f"({found['machine']})."
    )


def _cells(one: Mapping[str, float]) -> list[str]:
    return [format(one[key], form) if key in one else "–" for key, form in KIND.items()]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
