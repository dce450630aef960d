"""What a model came from, for its card: the hub's metadata block, and how it was made."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCardData

from rekindle.data.cache import Cache
from rekindle.data.corpus.corpus import Corpus
from rekindle.data.counted import counted
from rekindle.data.sharing.names import LICENCE, TAGS, is_local, shown_model
from rekindle.data.targets.schema import TeacherInfo
from rekindle.train.step_config import recorded_steps


def metadata(task: str, model: str, library: str = "transformers") -> str:
    """Return the block that the hub reads: which pipeline runs the model, and its base model."""
    base = shown_model(model) if model and not is_local(model) else None
    block = ModelCardData(library_name=library, pipeline_tag=task, tags=[*TAGS], base_model=base)
    return f"---\n{block.to_yaml()}\n---\n\n"


@dataclass(frozen=True)
class Provenance:
    """How a student was made: with which teachers, on which text, with which scores."""

    model: str  # the model it began as
    teachers: tuple[TeacherInfo, ...]
    text: str  # described in a line
    steps: int
    scores: Mapping[str, float]  # on held-out sequences
    trains_lm_head: bool  # whether a loss reached the language model's own head

    @classmethod
    def of(
        cls,
        about: Mapping[str, Any],
        cache: Cache,
        scores: Mapping[str, float],
        trains_lm_head: bool,
    ) -> "Provenance":
        """Return that of the run ``about``, as from ``describe_run``, with the ``cache``."""
        teachers = tuple(cache.teacher(name).info for name in about["cache"]["teachers"])
        corpus = cache.corpus
        text = (
            f"{counted(len(corpus), 'sequence')} of {_sources(corpus)} "
            f"({counted(corpus.tokens, 'token')}; fingerprint `{corpus.fingerprint[:12]}`)"
        )
        model, steps = about["student"]["model"], recorded_steps(about) or 0
        return cls(model, teachers, text, steps, scores, trains_lm_head)

    def card_lines(self) -> list[str]:
        """Return the lines of a card."""
        return [
            "",
            "## How it was made",
            "",
            f"By `pipeline train-student` ({counted(self.steps, 'step')}, "
            f"from `{shown_model(self.model)}`) on {self.text}; `run.yaml` beside this "
            "has the settings.",
            *_teacher_table(self.teachers),
            *_score_table(self.scores),
            "",
            LICENCE.format("the model that it began as, of its teachers, and of the text"),
        ]


def _sources(corpus: Corpus) -> str:
    """Return the names of the first files of its text, without their folders."""
    names = [f"`{shown_model(str(path))}`" for path in corpus.info["config"]["source"]]
    unnamed = f" and {len(names) - _SOURCES} more" if names[_SOURCES:] else ""
    return f"{', '.join(names[:_SOURCES])}{unnamed}"


_SOURCES = 5


def _teacher_table(teachers: Iterable[TeacherInfo]) -> list[str]:
    rows = [
        f"| {one.name} | `{shown_model(one.model)}` | {one.task} | {one.kind}"
        f"{f', k = {one.k}' * (one.k is not None)} | {_short_fingerprint(one)} |"
        for one in teachers
    ]
    head = ["", "| teacher | model | task | targets | weights |", "|---|---|---|---|---|"]
    return [*head, *rows] if rows else ["", "It had no teachers."]


def _short_fingerprint(teacher: TeacherInfo) -> str:
    """Return the beginning of the fingerprint that identifies a teacher's weights."""
    fingerprint = teacher.fingerprints.get("weights")
    return f"`{fingerprint[:12]}`" if fingerprint else "not known"


def _score_table(scores: Mapping[str, float]) -> list[str]:
    if not scores:
        return []
    rows = [f"| {name} | {value:.4f} |" for name, value in sorted(scores.items())]
    return ["", "On sequences that were held out:", "", "| | value |", "|---|---:|", *rows]
