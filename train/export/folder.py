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
from rekindle.train.export.plain import EMBEDDING, distance, plain_labels, plain_model, problem_of
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
from rekindle.train.running_out import running_out
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
    tokens = tokenizer_of(directory)
    with (
        running_out(Path(out), lambda: f"{out} is left as it was", "Free some"),
        quiet_transformers(),
    ):
        student = Student.from_pretrained(directory)
        encoder = chosen_encoder(student, name)
        made = plain_model(student, name) if encoder is None else plain_body(student)
        limit = longest_text(student)
        tokenizer = plain_tokenizer(tokens, made, limit)
        with new_folder(Path(out).resolve()) as staged:
            made.save_pretrained(staged)
            tokenizer.save_pretrained(staged)
            place = shown_folder(Path(out))
            if encoder is None:
                found = _described(student, name, made, staged, model, place, limit)
            else:
                write_modules(encoder, width_of(student.model.config), limit, staged)
                found = _described_vectors(student, encoder, staged, model, place, limit)
            lineage = [run.model_dump(mode="json") for run in lineage_of_model(directory)]
            content = {"written_by": WRITER, **found.as_dict(), LINEAGE: lineage}
            text = json.dumps(content, indent=1) + "\n"
            (staged / EXPORT_FILE).write_text(text, encoding="utf-8")
            (staged / CARD_FILE).write_text(export_card(found), encoding="utf-8")
        upload_result(Path(out), force)
    return found


def chosen_head(directory: Path, model: str, wanted: str | None) -> str:
    """Return the name of the requested head; raise InputError if that is unclear."""
    if not (directory / ABOUT_FILE).is_file():
        raise InputError(f"{model!r} is {_what_else(directory)}")
    heads = saved_heads(directory)
    if wanted == OWN and wanted not in heads and gives_vectors(heads):
        return OWN
    if wanted is None and len(heads) == 1:
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
    if wanted is None or wanted not in heads:
        told = "say which with --head" if wanted is None else f"not {wanted!r}"
        raise InputError(
            f"student {model!r} has the task heads {', '.join(heads)}; {told}. As a language "
            "model it needs no export: transformers loads its folder directly"
        )
    return wanted


def _what_else(directory: Path) -> str:
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


def tokenizer_of(directory: Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a student; a checkpoint's is beside its run."""
    run = directory.parents[1] if directory.resolve().parent.name == "checkpoints" else directory
    found = next((place for place in (directory, run) if has_tokenizer_files(place)), None)
    if found is None:
        raise InputError(
            f"student {directory} has no tokenizer beside it, but a classifier needs one. Copy "
            f"that of the model it began as (tokenizer.json, tokenizer_config.json) into {run}"
        )
    return load_tokenizer(str(found)).hf


def longest_text(student: Student) -> int:
    """Return the tokens of a text that the student was trained with, as far as recorded."""
    takes = longest_input(student.model.config) or math.inf
    return int(min(student.longest_text, takes))


def plain_tokenizer(
    tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel, limit: int
) -> PreTrainedTokenizerFast:
    """Make it cut at ``limit`` tokens and pad as the student was trained: on the right, with the
    padding of ``model``; a special token's name within a text is text.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    tokenizer.model_max_length = limit
    if (padding := padding_of(model.config)) is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding)
    elif tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    told: dict[str, object] = {"split_special_tokens": True}
    if not knows_segments(model.config):  # others take segment ids for words
        told["model_input_names"] = ["input_ids", "attention_mask"]
    for key, value in told.items():
        setattr(tokenizer, key, value)
        tokenizer.init_kwargs[key] = value
    return tokenizer


def _described(
    student: Student,
    name: str,
    made: PreTrainedModel,
    folder: Path,
    model: str,
    out: str,
    limit: int,
) -> Exported:
    """Return what was written, after loading it as others will."""
    head: HeadConfig = student.head_configs[name]
    auto = auto_class(made.config, head.judges)
    again, info = getattr(transformers, auto).from_pretrained(
        str(folder), dtype=torch.float32, output_loading_info=True
    )
    missing = sorted(info["missing_keys"]) + sorted(info["mismatched_keys"])
    apart = distance(student, name, again)
    if missing or apart > SAME:
        told = f"lacks {', '.join(map(str, missing[:3]))}" if missing else f"is {apart:.2g} off"
        raise InputError(
            f"the head {name!r} cannot be exported: what transformers loads as {auto} {told}"
        )
    labels = plain_labels(name, head)
    return Exported(out, model, name, auto, problem_of(head), labels, limit, apart)


def _described_vectors(
    student: Student, encoder: Encoder, folder: Path, model: str, out: str, limit: int
) -> Exported:
    """Return what was written, after reading it as others will."""
    apart = encoder_distance(student, encoder, folder)
    if apart > SAME:
        raise InputError(
            f"the vectors of {encoder.name!r} cannot be exported: those of the folder differ by "
            f"{apart:.2g}"
        )
    size = encoder.size(width_of(student.model.config))
    told = (out, model, encoder.name, ENCODER_CLASS, EMBEDDING, (), limit, apart)
    return Exported(*told, vectors=f"{counted(size, 'number')}, {encoder.told}")
