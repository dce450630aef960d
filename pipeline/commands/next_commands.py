"""The commands to run after fine-tuning an expert, as lines to type or to paste."""

import shlex

import yaml

from rekindle.pipeline.builtin.names import PREFIX
from rekindle.pipeline.yaml_text import Dumper
from rekindle.train.answers.score import names_for
from rekindle.train.finetune.label_lists import TAGS
from rekindle.train.finetune.result import FinetuneResult
from rekindle.train.ranking.kinds import RANKING

# Of a teacher, by problem.
_TASKS = {TAGS: "token_classification", "regression": "regression", RANKING: "regression"}
YAML_WIDTH = 10_000  # columns: an entry is one line


def next_commands(out: str, result: FinetuneResult) -> list[str]:
    """Return a line each for scoring the expert in ``out``, asking it, and making it a teacher."""
    expert = f"./{out}" if out.startswith(("-", PREFIX)) else out
    return [
        shlex.join(["pipeline", "evaluate", expert, "--test", "FILE"]),
        shlex.join(["pipeline", "predict", expert, "--text", "FILE", "--out", "answers.jsonl"]),
        f"as a teacher, in a run file: {_teacher_entry(expert, result)}",
    ]


def _teacher_entry(expert: str, result: FinetuneResult) -> str:
    """Return the entry of a run file."""
    task = _TASKS.get(result.problem, "sequence_classification")
    entry = {"name": names_for([expert])[0], "model": expert, "task": task}
    if result.pairs:  # a ranker reads what a corpus pairs itself (pair_field), as it was taught
        entry |= {"pairs": "record" if result.problem == RANKING else "adjacent"}
    line = yaml.dump(
        {"teachers": [entry]},
        Dumper=Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=True,
        width=YAML_WIDTH,
    )
    return str(line).strip()[1:-1]
