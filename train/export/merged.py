"""Write a student that is an adapter as a whole model: merged with its base."""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from rekindle.data.errors import InputError
from rekindle.data.storage.atomic import new_folder
from rekindle.data.storage.client import is_remote
from rekindle.train.export.card import CARD_FILE, student_card
from rekindle.train.export.folder import WRITER, check_target, longest_text, student_tokenizer
from rekindle.train.export.sentence_folder import write_beside
from rekindle.train.model.files import base_fingerprints
from rekindle.train.model.folder import (
    ABOUT_FILE,
    ADAPTER_FILE,
    base_of,
    read_object,
    resolve_model,
)
from rekindle.train.record.lineage import EXPORT_FILE, LINEAGE, lineage_of_model
from rekindle.train.record.stored_result import upload_result
from rekindle.train.record.working_copy import shown_folder
from rekindle.train.running_out import report_shortage
from rekindle.train.student import Student

log = logging.getLogger("rekindle")


@dataclass(frozen=True)
class Merged:
    """What was written: where, from which adapter and base."""

    out: str
    student: str
    base: str
    auto_class: str  # the class of transformers that loads it
    heads: tuple[str, ...]  # stored beside it

    def as_dict(self) -> dict[str, object]:
        """Return it as plain values for JSON."""
        return asdict(self)

    def describe(self) -> str:
        """Return what it is, in a sentence."""
        beside = f", with its task heads beside it ({', '.join(self.heads)})" if self.heads else ""
        return f"{self.student}, merged into its base {self.base}: a whole model{beside}"


def merge_student(model: str, out: str, *, force: bool = False) -> Merged:
    """Write the student in ``model``, an adapter, to ``out`` merged with its base as one model in
    float32, which needs neither peft nor the base; heads, tokenizer and lineage are kept. The
    folder appears completely or not at all.

    Raises InputError if ``model`` is not a student or not an adapter, if its base is missing or
    another one, and if ``out`` is in use; ``force`` replaces an earlier export.
    """
    check_target(Path(out), force)
    directory = resolve_model(model)
    base = base_of(directory)
    if base is None:
        raise InputError(
            f"{model!r} is a whole model, not an adapter: there is nothing to merge, and it can "
            "be used wherever a model is needed"
        )
    if not (directory / ABOUT_FILE).is_file():
        raise InputError(
            f"{model!r} is an adapter, but not a student of Rekindle's. Merge it with peft "
            "(PeftModel.from_pretrained(base, folder).merge_and_unload(), then save_pretrained); "
            "Rekindle accepts it unmerged wherever it accepts a model folder"
        )
    recorded_base = str(read_object(directory / ADAPTER_FILE)["base_model_name_or_path"])
    tokenizer, shown_out = student_tokenizer(directory), shown_folder(Path(out))
    with report_shortage(Path(out), lambda: f"{out} is left as it was", "Free some"):
        student = Student.from_pretrained(directory)
        _check_finite(student, model)
        shown_base, class_name = (
            recorded_base if is_remote(recorded_base) else str(base),
            type(student.model).__name__,
        )
        merged = Merged(shown_out, model, shown_base, class_name, tuple(student.head_configs))
        with new_folder(Path(out).resolve()) as staged:
            student.save_pretrained(staged)
            tokenizer.save_pretrained(staged)
            write_beside(student, longest_text(student), staged)
            lineage = [run.model_dump(mode="json") for run in lineage_of_model(directory)]
            record = {"written_by": WRITER, **merged.as_dict(), **base_fingerprints(base)}
            text = json.dumps({**record, LINEAGE: lineage}, indent=1) + "\n"
            (staged / EXPORT_FILE).write_text(text, encoding="utf-8")
            card = student_card(student, Path(out)).replace(out, shown_out)
            (staged / CARD_FILE).write_text(card, encoding="utf-8")
        upload_result(Path(out), force)
    return merged


def _check_finite(student: Student, model: str) -> None:
    not_finite = [
        name for name, values in student.named_parameters() if not torch.isfinite(values).all()
    ]
    if not_finite:
        raise InputError(f"{model!r} cannot be merged: {not_finite[0]} would not be finite")
