"""The tables of docs/results/real_model.md, from the rows of `real_model/real_model.py`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROWS = Path(__file__).resolve().parents[1] / "real_model" / "rows.json"
KIND = {"bytes": ".1f", "kept mass": ".3f", "KL": ".1e", "best token": ".3f"}


def regions() -> dict[str, str]:
    """Return the page's regions by name."""
    rows = json.loads(ROWS.read_text(encoding="utf-8"))
    mapped = rows["map"]
    kinds = [[f"`{name}`", *_cells(one)] for name, one in rows["kinds"].items()]
    trained = [[str(s["step"]), f"{s['ce']:.3f}", f"{s['KL']:.3f}"] for s in rows["trained"]]
    shares = [f"{mapped['tokens']:,}", f"{mapped['positions']:.1%}", f"{mapped['probability']:.1%}"]
    return {
        "run": _run(rows),
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


def _run(rows: Mapping[str, Any]) -> str:
    generated, cached, trained = (
        rows[f"{stage} seconds"] for stage in ("generate", "cache", "train")
    )
    return (
        f"{rows['sequences']} dialogues, {rows['tokens']:,} tokens, of which "
        f"{rows['trained share']:.1%} are trained. Generating took {generated:.0f} s, caching all "
        f"kinds in one pass {cached:.0f} s, {rows['steps']} steps of the student {trained:.0f} s "
        f"({rows['machine']})."
    )


def _cells(one: Mapping[str, float]) -> list[str]:
    return [format(one[key], form) if key in one else "–" for key, form in KIND.items()]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
