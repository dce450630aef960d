"""The card (README.md) of an expert that ``pipeline finetune`` made."""

import json
from collections.abc import Mapping, Sequence

from rekindle.data.sharing.names import LICENCE, shown_model
from rekindle.train.export.provenance import metadata
from rekindle.train.export.result import PIPELINES

SHOWN = 20  # labels that a card lists
TASKS = {
    "regression": "regression",
    "ranking": "regression",
    "token_classification": "token_classification",
}


def expert_card(
    folder: str, model: str, problem: str, label_names: Sequence[str], scores: Mapping[str, float]
) -> str:
    """Return what the expert in ``folder`` is, how to use it, its scores, and its origin.

    ``model``: its base; ``scores``: by name, on dev and perhaps test.
    """
    task = PIPELINES.get(problem, "text-classification")
    teacher_task = TASKS.get(problem, "sequence_classification")
    task_name = problem.replace("_", " ")
    labels = ", ".join(f"`{name}`" for name in label_names[:SHOWN])
    others = f" and {len(label_names) - SHOWN} more" if label_names[SHOWN:] else ""
    input_example = '"a text"'
    if problem == "ranking":
        input_example = '{"text": "a query", "text_pair": "a document"}'
    lines = [
        f"# An expert for {task_name}, fine-tuned from `{shown_model(model)}`",
        "",
        "```python",
        "from transformers import pipeline",
        f'judge = pipeline("{task}", model={json.dumps(folder)})',
        f"print(judge({input_example}))",
        "```",
        "",
        f"It answers with {labels}{others}." if labels else "It answers with numbers.",
        "As a teacher (`pipeline cache-teachers`), in a run file:",
        "",
        "```yaml",
        "teachers:",
        f"  - {{name: expert, model: {json.dumps(folder)}, task: {teacher_task}}}",
        "```",
        "",
        "## How it was made",
        "",
        "By `pipeline finetune`; `metrics.json` beside this has the settings, every seed's scores "
        "and the digests of the labelled files.",
        "",
        "| | |",
        "|---|---:|",
        *[f"| {name} | {value:.4f} |" for name, value in scores.items()],
        "",
        LICENCE.format("the model that it began as, and of the labelled rows"),
    ]
    return metadata(task, model) + "\n".join(lines) + "\n"
