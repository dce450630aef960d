"""The cards (README.md) of a student's folder and of an export: how to use it, in the first lines.

Whoever opens a student's folder must not expect transformers to find its task heads.
"""

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from rekindle.data.counted import counted
from rekindle.train.export.plain import EMBEDDING, not_exportable, plain_labels, problem_of
from rekindle.train.export.provenance import Provenance, metadata
from rekindle.train.export.result import PIPELINES, Exported
from rekindle.train.export.sentence_folder import (
    Encoder,
    encoder_of,
    gives_vectors,
    not_an_encoder,
)
from rekindle.train.measures import UNSEEN
from rekindle.train.model.network import HeadConfig
from rekindle.train.model.parts.head_config import width_of
from rekindle.train.student import Student

CARD_FILE = "README.md"
HUB_TASK = {"masked_lm": "fill-mask", "causal_lm": "text-generation"}
BODY_TASK = "feature-extraction"
ENCODERS = "sentence-transformers"
SHOWN = 12  # labels that a card lists
_UNTRAINED_HEAD = (
    "**It is no language model**: no loss of this run reached the head that predicts tokens "
    "(`hard.weight: 0`, and no teacher of tokens), while the body below that head was trained."
)
LANGUAGE = {
    "masked_lm": ("A masked language model", "AutoModelForMaskedLM"),
    "causal_lm": ("A causal language model", "AutoModelForCausalLM"),
}


def student_card(
    student: Student,
    directory: Path,
    best: Path | None = None,
    provenance: Provenance | None = None,
) -> str:
    """Return how to use the student in ``directory``, its heads first, then the language model; and
    how it was made (its ``provenance``).

    ``best``: the checkpoint with the best held-out value, if that is not the student.
    """
    title, auto_class = LANGUAGE[student.task]
    is_body = provenance is not None and not provenance.trains_lm_head
    title = f"The body of {title[0].lower()}{title[1:]}" if is_body else title
    folder = str(directory)
    heads = {n: one for n, one in student.head_configs.items() if one.kind != "embedding"}
    reasons = {name: not_exportable(student, name) for name in heads}
    encoder = None if not_an_encoder(student) else encoder_of(student, student.vectors)
    additions = " with task heads" if heads else ""
    additions += " that gives vectors" if gives_vectors(student.head_configs) else ""
    lines = [f"# {title}{additions}, trained by Rekindle", ""]
    lines += _vector_lines(folder, student, encoder)
    if heads:
        lines += [
            "A plain `from_pretrained` of this folder as a classifier starts with a **random** "
            "head: the trained ones are beside the model (`heads.safetensors`). To use one:",
            "",
            *_export_lines(directory, heads, reasons),
            "With Rekindle they work directly:",
            "",
            "```sh",
            *_command_lines(folder, next(iter(heads))),
            "```",
            "",
        ]
    if student.base is None:
        load = f"{'AutoModel' if is_body else auto_class}.from_pretrained({json.dumps(folder)})"
        subject = "Its body" if is_body else "As a language model it"
        lines += [f"{subject} needs no export: `{load}`."]
    else:
        lines += _adapter_lines(folder, auto_class, student.base)
    if is_body:
        lines += ["", _UNTRAINED_HEAD]
    if best is not None:
        best_line = f"The best value {UNSEEN} was that of `{best}`, which is used the same way."
        lines += ["", best_line]
    lines += [] if provenance is None else provenance.card_lines()
    task, library = BODY_TASK if is_body else HUB_TASK[student.task], "transformers"
    if encoder is not None:
        task, library = PIPELINES[EMBEDDING], ENCODERS
    block = metadata(task, "" if provenance is None else provenance.model, library)
    return block + "\n".join(lines) + "\n"


def _vector_lines(folder: str, student: Student, encoder: Encoder | None) -> list[str]:
    """Return how to use a student as a sentence encoder, or why it cannot be used as one."""
    names = [name for name, head in student.head_configs.items() if head.kind == "embedding"]
    if not names:
        return []
    if encoder is None:
        return [f"As a sentence encoder it is not saved: {not_an_encoder(student)}.", ""]
    size = encoder.size(width_of(student.model.config))
    lines = [
        f"Its vectors have {counted(size, 'number')}: {encoder.description}.",
        "",
        *_encoding_lines(folder),
    ]
    other_heads = [name for name in names if name != student.vectors]
    if other_heads:
        export = shlex.join(["pipeline", "export", folder, "--head", other_heads[0]])
        also = f"It also learnt the vectors of {', '.join(other_heads)}:"
        lines += [also, "", "```sh", f"{export} --out DIR", "```", ""]
    return lines


def _encoding_lines(folder: str) -> list[str]:
    return [
        "```python",
        "from sentence_transformers import SentenceTransformer",
        f"model = SentenceTransformer({json.dumps(folder)})",
        'vectors = model.encode(["a text", "another"])',
        "```",
        "",
    ]


def _adapter_lines(folder: str, auto_class: str, about: Mapping[str, str]) -> list[str]:
    """Return how to use an adapter: directly with Rekindle, with peft on its base, or merged."""
    base = about["model"]
    merge = shlex.join(["pipeline", "merge-adapter", folder, "--out", f"{folder}-merged"])
    with_peft = [
        "With peft:",
        "",
        "```python",
        "import peft, transformers",
        f"base = transformers.{auto_class}.from_pretrained({json.dumps(base)})",
        f"model = peft.PeftModel.from_pretrained(base, {json.dumps(folder)})",
        "```",
        "",
    ]
    if kind := about.get("quantize"):
        with_peft = [
            f"It was trained on weights of its base that were rounded to {kind}: on the unrounded "
            "base peft would compute something else.",
            "",
        ]
    return [
        f"The language model is an **adapter** (LoRA) of `{base}`, and needs that. Rekindle "
        "accepts this folder wherever it accepts a model.",
        "",
        *with_peft,
        "As a whole model of its own:",
        "",
        "```sh",
        merge,
        "```",
    ]


def _export_lines(
    directory: Path, heads: dict[str, HeadConfig], reasons: dict[str, str | None]
) -> list[str]:
    """Return the commands that export what can be, how to use the results, and why others cannot
    be.
    """
    out_folders = {
        name: f"{directory}-{file_name(name)}" for name, reason in reasons.items() if not reason
    }
    lines = []
    if out_folders:
        lines += ["```sh"]
        for name, out in out_folders.items():
            command = ["pipeline", "export", str(directory), "--head", name, "--out", out]
            lines += [f"# {_describe_labels(name, heads[name])}", shlex.join(command)]
        first, out = next(iter(out_folders.items()))
        task = "token" if heads[first].kind == "token" else "text"
        lines += ["```", "", "and then, anywhere, with transformers alone:", ""]
        lines += ["```python", *_usage_lines(out, f"{task}-classification"), "```", ""]
    for reason in reasons.values():
        lines += [] if reason is None else [f"{reason[0].upper()}{reason[1:]}.", ""]
    return lines


def _command_lines(folder: str, head: str) -> list[str]:
    student = shlex.join([folder, "--head", head])
    return [
        f"pipeline evaluate {student} --test FILE",
        f"pipeline predict {student} --text FILE --out FILE",
        f"pipeline finetune {student} --train FILE --dev FILE --out DIR  # goes on from it",
    ]


def _usage_lines(folder: str, task: str) -> list[str]:
    truncation = "" if task == "token-classification" else ", truncation=True"
    return [
        "from transformers import pipeline",
        f'judge = pipeline("{task}", model={json.dumps(folder)}{truncation})',
        'print(judge("a text"))',
    ]


def _describe_labels(name: str, head: HeadConfig) -> str:
    """Return a head's labels in a line."""
    names = plain_labels(name, head)
    if problem_of(head) == "regression":
        return f"{len(names)} scores" if len(names) > 1 else "a score"
    shown = ", ".join(json.dumps(label, ensure_ascii=False)[1:-1] for label in names[:SHOWN])
    return f"{len(names)} labels: {shown}{', …' if names[SHOWN:] else ''}"


def file_name(name: str) -> str:
    """Return a head's name as part of a file name."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", name)


def export_card(export: Exported) -> str:
    """Return how to use an export."""
    if export.vectors:
        block = metadata(export.pipeline, "", ENCODERS)
        title = "# A sentence encoder: a student trained by Rekindle"
        return (
            block
            + "\n".join([title, "", *_encoding_lines(export.out), f"{export.describe()}."])
            + "\n"
        )
    lines = [
        metadata(export.pipeline, "").rstrip("\n"),
        "",
        f"# The task head `{export.head}` of a student trained by Rekindle",
        "",
        "transformers loads it alone, with the trained head:",
        "",
        "```python",
        *_usage_lines(export.out, export.pipeline),
        "```",
        "",
        f"{export.describe()}.",
    ]
    return "\n".join(lines) + "\n"
