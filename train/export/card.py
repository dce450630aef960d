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
ENCODERS = "sentence-transformers"
SHOWN = 12  # labels that a card lists
LANGUAGE = {
    "masked_lm": ("A masked language model", "AutoModelForMaskedLM"),
    "causal_lm": ("A causal language model", "AutoModelForCausalLM"),
}


def student_card(
    student: Student, directory: Path, best: Path | None = None, made: Provenance | None = None
) -> str:
    """Return how to use the student in ``directory``, its heads first, then the language model; and
    how it was ``made``.

    ``best``: the checkpoint with the best held-out value, if that is not the student.
    """
    kind, auto = LANGUAGE[student.task]
    where = str(directory)
    heads = {n: one for n, one in student.head_configs.items() if one.kind != "embedding"}
    reasons = {name: not_exportable(student, name) for name in heads}
    encoder = None if not_an_encoder(student) else encoder_of(student, student.vectors)
    beside = " with task heads" if heads else ""
    beside += " that gives vectors" if gives_vectors(student.head_configs) else ""
    lines = [f"# {kind}{beside}, trained by Rekindle", ""]
    lines += _vectors(where, student, encoder)
    if heads:
        lines += [
            "A plain `from_pretrained` of this folder as a classifier starts with a **random** "
            "head: the trained ones are beside the model (`heads.safetensors`). To use one:",
            "",
            *_exports(directory, heads, reasons),
            "With Rekindle they work directly:",
            "",
            "```sh",
            *_commands(where, next(iter(heads))),
            "```",
            "",
        ]
    if student.base is None:
        load = f"`{auto}.from_pretrained({json.dumps(where)})`"
        lines += [f"As a language model it needs no export: {load}."]
    else:
        lines += _adapter(where, auto, student.base)
    if best is not None:
        told = f"The best value {UNSEEN} was that of `{best}`, which is used the same way."
        lines += ["", told]
    lines += [] if made is None else made.told()
    task, library = HUB_TASK[student.task], "transformers"
    if encoder is not None:
        task, library = PIPELINES[EMBEDDING], ENCODERS
    block = metadata(task, "" if made is None else made.model, library)
    return block + "\n".join(lines) + "\n"


def _vectors(where: str, student: Student, encoder: Encoder | None) -> list[str]:
    """Return how to use a student as a sentence encoder, or why it cannot be used as one."""
    names = [name for name, head in student.head_configs.items() if head.kind == "embedding"]
    if not names:
        return []
    if encoder is None:
        return [f"As a sentence encoder it is not saved: {not_an_encoder(student)}.", ""]
    size = encoder.size(width_of(student.model.config))
    lines = [f"Its vectors have {counted(size, 'number')}: {encoder.told}.", "", *_encoding(where)]
    others = [name for name in names if name != student.vectors]
    if others:
        export = shlex.join(["pipeline", "export", where, "--head", others[0]])
        told = f"It also learnt the vectors of {', '.join(others)}:"
        lines += [told, "", "```sh", f"{export} --out DIR", "```", ""]
    return lines


def _encoding(where: str) -> list[str]:
    return [
        "```python",
        "from sentence_transformers import SentenceTransformer",
        f"model = SentenceTransformer({json.dumps(where)})",
        'vectors = model.encode(["a text", "another"])',
        "```",
        "",
    ]


def _adapter(where: str, auto: str, about: Mapping[str, str]) -> list[str]:
    """Return how to use an adapter: directly with Rekindle, with peft on its base, or merged."""
    base = about["model"]
    merge = shlex.join(["pipeline", "merge-adapter", where, "--out", f"{where}-merged"])
    with_peft = [
        "With peft:",
        "",
        "```python",
        "import peft, transformers",
        f"base = transformers.{auto}.from_pretrained({json.dumps(base)})",
        f"model = peft.PeftModel.from_pretrained(base, {json.dumps(where)})",
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


def _exports(
    directory: Path, heads: dict[str, HeadConfig], reasons: dict[str, str | None]
) -> list[str]:
    """Return the commands that export what can be, how to use the results, and why others cannot
    be.
    """
    outs = {name: f"{directory}-{file_name(name)}" for name, told in reasons.items() if not told}
    lines = []
    if outs:
        lines += ["```sh"]
        for name, out in outs.items():
            command = ["pipeline", "export", str(directory), "--head", name, "--out", out]
            lines += [f"# {_described(name, heads[name])}", shlex.join(command)]
        first, out = next(iter(outs.items()))
        task = "token" if heads[first].kind == "token" else "text"
        lines += ["```", "", "and then, anywhere, with transformers alone:", ""]
        lines += ["```python", *_usage(out, f"{task}-classification"), "```", ""]
    for told in reasons.values():
        lines += [] if told is None else [f"{told[0].upper()}{told[1:]}.", ""]
    return lines


def _commands(where: str, head: str) -> list[str]:
    student = shlex.join([where, "--head", head])
    return [
        f"pipeline evaluate {student} --test FILE",
        f"pipeline predict {student} --text FILE --out FILE",
        f"pipeline finetune {student} --train FILE --dev FILE --out DIR  # goes on from it",
    ]


def _usage(folder: str, task: str) -> list[str]:
    cut = "" if task == "token-classification" else ", truncation=True"
    return [
        "from transformers import pipeline",
        f'judge = pipeline("{task}", model={json.dumps(folder)}{cut})',
        'print(judge("a text"))',
    ]


def _described(name: str, head: HeadConfig) -> str:
    """Return a head's labels in a line."""
    names = plain_labels(name, head)
    if problem_of(head) == "regression":
        return f"{len(names)} scores" if len(names) > 1 else "a score"
    shown = ", ".join(json.dumps(label, ensure_ascii=False)[1:-1] for label in names[:SHOWN])
    return f"{len(names)} labels: {shown}{', …' if names[SHOWN:] else ''}"


def file_name(name: str) -> str:
    """Return a head's name as part of a file name."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", name)


def export_card(found: Exported) -> str:
    """Return how to use an export."""
    if found.vectors:
        block = metadata(found.pipeline, "", ENCODERS)
        title = "# A sentence encoder: a student trained by Rekindle"
        return block + "\n".join([title, "", *_encoding(found.out), f"{found.told()}."]) + "\n"
    lines = [
        metadata(found.pipeline, "").rstrip("\n"),
        "",
        f"# The task head `{found.head}` of a student trained by Rekindle",
        "",
        "transformers loads it alone, with the trained head:",
        "",
        "```python",
        *_usage(found.out, found.pipeline),
        "```",
        "",
        f"{found.told()}.",
    ]
    return "\n".join(lines) + "\n"
