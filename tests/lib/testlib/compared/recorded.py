"""A benchmark table, and the folder of a cycle from which its rows are recorded."""

from itertools import product
from pathlib import Path

import yaml

from testlib.cycles import GRID, drawn, own_head_scored, student, write

ARMS = ["expert", "longer", "mlm", "kd", "committee"]
TASKS = {"cola": "matthews", "mrpc": "f1"}
PRIMARY = {"arm": "committee", "against": ["expert", "longer", "mlm"], "about": "why"}
DRAWS, SEEDS = 3, 2


def table_in(folder: Path, name: str, own_texts: bool) -> Path:
    """Return a table of two tasks and three draws without recorded rows."""
    made = folder / name
    made.mkdir()
    texts = [{"corpus": {"source": task}} if own_texts else {} for task in TASKS]
    values = {
        "corpus": {"tokenizer": "m"} | ({} if own_texts else {"source": "text"}),
        "student": {"model": "m"},
        "tasks": [
            {"name": task, "metric": metric, "train": "t", "test": "t", **text}
            for (task, metric), text in zip(TASKS.items(), texts, strict=True)
        ],
        "arms": ARMS,
        "primary": PRIMARY,
        "seeds": SEEDS,
        "label_draws": DRAWS,
        "search": GRID if own_texts else {},
    }
    (made / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return made


def run_in(out: Path, own_texts: bool) -> Path:
    """Make the whole folder, as `pipeline rekindle` leaves it."""
    drawn(out, ARMS, TASKS, GRID if own_texts else {}, seeds=SEEDS, draws=DRAWS, primary=PRIMARY)
    for draw, task in product(range(DRAWS), TASKS):
        home = out / "draws" / str(draw)
        costs = home / "costs" / "texts" / task if own_texts else home / "costs"
        write(costs / "corpus" / "held.json", {"exact": 2, "near": 1, "removed": True})
        for arm in ("kd", "committee"):
            own_head_scored(home, arm, task, draw=draw)
            student(home, f"{arm}-{task}", 40 + draw, **{task: 3.0})
    return out
