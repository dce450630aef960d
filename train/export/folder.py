"""Write a student's head as a folder of its own, which transformers alone loads.

``export.json`` in it says from which student it comes, and marks a folder that may be replaced.
"""

import json
import logging
import math
import shlex
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rekindle.data.corpus.tokenizer import load_tokenizer
from rekindle.data.corpus.tokenizer_files import has_tokenizer_files
from rekindle.data.counted import counted
from rekindle.data.errors import InputError
from rekindle.data.storage.atomic import new_folder
from rekindle.train.export.card import CARD_FILE, export_card
from rekindle.train.export.plain import (
    EMBEDDING,
    logit_distance,
    plain_labels,
    plain_model,
    problem_of,
)
from rekindle.train.export.result import ENCODER_CLASS, Exported
from rekindle.train.export.sentence_folder import (
    Encoder,
    chosen_encoder,
    encoder_distance,
    gives_vectors,
    plain_body,
    write_modules,
)
from rekindle.train.model.family_head import SAME, auto_class
from rekindle.train.model.files import longest_input
from rekindle.train.model.fitting import knows_segments
from rekindle.train.model.folder import is_adapter, resolve_model
from rekindle.train.model.network import HeadConfig
from rekindle.train.model.padding import padding_of
from rekindle.train.model.parts.head_config import width_of
from rekindle.train.model.student_config import OWN
from rekindle.train.outside.quiet import quiet_transformers
from rekindle.train.record.lineage import EXPORT_FILE, LINEAGE, lineage_of_model
from rekindle.train.record.stored_result import upload_result
from rekindle.train.record.working_copy import shown_folder
from rekindle.train.running_out import report_shortage
from rekindle.train.student import ABOUT_FILE, Student, saved_heads

log = logging.getLogger("rekindle")

WRITER = "rekindle export"  # marks a folder that --force may replace


def export_head(model: str, out: str, head: str | None = None, *, force: bool = False) -> Exported:
    """Write the task head ``head`` of the student in ``model`` (its only one by default) with the
    student's body to ``out``, as transformers' class of its family, with a tokenizer that cuts
    texts as the student was trained. The folder appears completely or not at all.

    For a head that gives vectors (``own``: the student's, without a projection) the folder is one
    of sentence-transformers.

    Raises InputError if ``model`` is not a student, ``head`` is not one of its heads or has no
    place in its family, or ``out`` is in use; ``force`` replaces an earlier export.
    """
    check_target(Path(out), force)
    directory = resolve_model(model)
    name = chosen_head(directory, model, head)
    own_tokenizer = student_tokenizer(directory)
    with (
        report_shortage(Path(out), lambda: f"{out} is left as it was", "Free some"),
        quiet_transformers(),
    ):
        student = Student.from_pretrained(directory)
        encoder = chosen_encoder(student, name)
        plain = plain_model(student, name) if encoder is None else plain_body(student)
        max_length = longest_text(student)
        tokenizer = plain_tokenizer(own_tokenizer, plain, max_length)
        with new_folder(Path(out).resolve()) as staged:
            plain.save_pretrained(staged)
            tokenizer.save_pretrained(staged)
            shown_out = shown_folder(Path(out))
            if encoder is None:
                exported = _check_and_describe(
                    student, name, plain, staged, model, shown_out, max_length
                )
            else:
                write_modules(encoder, width_of(student.model.config), max_length, staged)
                exported = _check_and_describe_vectors(
                    student, encoder, staged, model, shown_out, max_length
                )
            lineage = [run.model_dump(mode="json") for run in lineage_of_model(directory)]
            content = {"written_by": WRITER, **exported.as_dict(), LINEAGE: lineage}
            text = json.dumps(content, indent=1) + "\n"
            (staged / EXPORT_FILE).write_text(text, encoding="utf-8")
            (staged / CARD_FILE).write_text(export_card(exported), encoding="utf-8")
        upload_result(Path(out), force)
    return exported


def chosen_head(directory: Path, model: str, requested: str | None) -> str:
    """Return the name of the requested head; raise InputError if that is unclear."""
    if not (directory / ABOUT_FILE).is_file():
        raise InputError(f"{model!r} is {_describe_non_student(directory)}")
    heads = saved_heads(directory)
    if requested == OWN and requested not in heads and gives_vectors(heads):
        return OWN
    if requested is None and len(heads) == 1:
        return next(iter(heads))
    if not heads and is_adapter(directory):
        raise InputError(
            f"student {model!r} has no task heads: it is an adapter of a language model. "
            f"`pipeline merge-adapter {shlex.quote(model)} --out DIR` writes the whole model"
        )
    if not heads:
        auto = "AutoModelForMaskedLM or AutoModelForCausalLM"
        raise InputError(
            f"student {model!r} has no task heads: it is a language model, which needs no export. "
            f"transformers loads it directly ({auto}.from_pretrained({str(directory)!r}))"
        )
    if requested is None or requested not in heads:
        advice = "say which with --head" if requested is None else f"not {requested!r}"
        raise InputError(
            f"student {model!r} has the task heads {', '.join(heads)}; {advice}. As a language "
            "model it needs no export: transformers loads its folder directly"
        )
    return requested


def _describe_non_student(directory: Path) -> str:
    if (directory / EXPORT_FILE).is_file():
        return "already an export: transformers loads it directly"
    return (
        "not a student of Rekindle's, so it has no heads beside it: transformers loads it "
        "directly. An expert of `pipeline finetune` needs no export"
    )


def check_target(out: Path, force: bool) -> None:
    """Raise InputError if ``out`` must not be written to."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not _is_export(out):
        raise InputError(
            f"{str(out)!r} exists and is not an export; it is left as it is: give another --out"
        )
    if not force:
        raise InputError(
            f"{str(out)!r} already holds an export: give another --out, or --force to replace it"
        )


def _is_export(out: Path) -> bool:
    try:
        return bool(json.loads((out / EXPORT_FILE).read_text())["written_by"] == WRITER)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def student_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a student; a checkpoint's is beside its run."""
    run = directory.parents[1] if directory.resolve().parent.name == "checkpoints" else directory
    folder = next(
        (candidate for candidate in (directory, run) if has_tokenizer_files(candidate)), None
    )
    if folder is None:
        raise InputError(
            f"student {directory} has no tokenizer beside it, but a classifier needs one. Copy "
            f"that of the model it began as (tokenizer.json, tokenizer_config.json) into {run}"
        )
    return load_tokenizer(str(folder)).hf


def longest_text(student: Student) -> int:
    """Return the tokens of a text that the student was trained with, as far as recorded."""
    most = longest_input(student.model.config) or math.inf
    return int(min(student.longest_text, most))


def plain_tokenizer(
    tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel, max_length: int
) -> PreTrainedTokenizerFast:
    """Make it cut at ``max_length`` tokens and pad as the student was trained: on the right, with
    the padding of ``model``; a special token's name within a text is text.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    tokenizer.model_max_length = max_length
    if (padding := padding_of(model.config)) is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding)
    elif tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    settings: dict[str, object] = {"split_special_tokens": True}
    if not knows_segments(model.config):  # others take segment ids for words
        settings["model_input_names"] = ["input_ids", "attention_mask"]
    for key, value in settings.items():
        setattr(tokenizer, key, value)
        tokenizer.init_kwargs[key] = value
    return tokenizer


def _check_and_describe(
    student: Student,
    name: str,
    plain: PreTrainedModel,
    folder: Path,
    model: str,
    out: str,
    max_length: int,
) -> Exported:
    """Return what was written, after loading it as others will."""
    head: HeadConfig = student.head_configs[name]
    class_name = auto_class(plain.config, head.judges)
    reloaded, info = getattr(transformers, class_name).from_pretrained(
        str(folder), dtype=torch.float32, output_loading_info=True
    )
    missing = sorted(info["missing_keys"]) + sorted(info["mismatched_keys"])
    largest_difference = logit_distance(student, name, reloaded)
    if missing or largest_difference > SAME:
        problem = (
            f"lacks {', '.join(map(str, missing[:3]))}"
            if missing
            else f"is {largest_difference:.2g} off"
        )
        raise InputError(
            f"the head {name!r} cannot be exported: what transformers loads as {class_name} "
            f"{problem}"
        )
    labels = plain_labels(name, head)
    return Exported(
        out, model, name, class_name, problem_of(head), labels, max_length, largest_difference
    )


def _check_and_describe_vectors(
    student: Student, encoder: Encoder, folder: Path, model: str, out: str, max_length: int
) -> Exported:
    """Return what was written, after reading it as others will."""
    largest_difference = encoder_distance(student, encoder, folder)
    if largest_difference > SAME:
        raise InputError(
            f"the vectors of {encoder.name!r} cannot be exported: those of the folder differ by "
            f"{largest_difference:.2g}"
        )
    size = encoder.size(width_of(student.model.config))
    fields = (
        out,
        model,
        encoder.name,
        ENCODER_CLASS,
        EMBEDDING,
        (),
        max_length,
        largest_difference,
    )
    return Exported(*fields, vectors=f"{counted(size, 'number')}, {encoder.description}")
