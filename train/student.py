"""The student: its network (``model.network``), and how it is built, saved and loaded.

Saved, it is an ordinary Hugging Face directory (``AutoModelForMaskedLM.from_pretrained`` loads it)
with files beside: ``heads.safetensors``, ``rekindle_student.json`` and, of a student with domain
prompts, ``prompts.safetensors``.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from rekindle.data.corpus.tokenizer import Tokenizer
from rekindle.data.errors import InputError
from rekindle.data.settings import Settings, parse_settings
from rekindle.train.config import StudentConfig
from rekindle.train.method import add_module, find_method
from rekindle.train.model.causes import quiet_transformers
from rekindle.train.model.files import (
    load_language_model,
    load_student_model,
    longest_input,
    new_language_model,
)
from rekindle.train.model.folder import resolve_model, weight_files
from rekindle.train.model.headers import check_student_files
from rekindle.train.model.network import (
    HEADS_FILE,
    HeadConfig,
    StudentNetwork,
    head_key,
    weights_below,
)
from rekindle.train.model.padding import padding_of
from rekindle.train.model.sight import check_padding

log = logging.getLogger("rekindle")

PROMPTS_FILE = "prompts.safetensors"
ABOUT_FILE = "rekindle_student.json"
UNRECORDED = 512  # tokens, of students that do not say what they were trained with
# What the names of a student's weights begin with.
OWN_FILES = {"heads": HEADS_FILE, "prompts": PROMPTS_FILE}  # by the part of the state dict


class _About(Settings):
    """What ``save_pretrained`` writes of a student, beside what its caller adds."""

    model_config = ConfigDict(extra="ignore")

    task: Literal["masked_lm", "causal_lm"]
    vocabulary_size: int
    heads: dict[str, HeadConfig]
    methods: dict[str, dict[str, object]] = Field(default_factory=dict)
    domains: tuple[str, ...] | None = None
    sequence_length: int | None = None

    @classmethod
    def of(cls, directory: Path) -> "_About":
        """Read it; InputError where there is none."""
        try:
            found = json.loads((directory / ABOUT_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"{directory} is not the directory of a student: {ABOUT_FILE} cannot be read "
                f"({type(error).__name__}). `pipeline train-student` writes such directories"
            ) from None
        return parse_settings(cls, found, str(directory / ABOUT_FILE))


class Student(StudentNetwork):
    """The network of a student, and how it is saved and loaded."""

    @property
    def longest_text(self) -> int:
        """The tokens of a text that it was trained with, as far as that is recorded."""
        return self.sequence_length or UNRECORDED

    def save_pretrained(
        self,
        directory: str | Path,
        about: Mapping[str, object] | None = None,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write the Hugging Face files, the heads and prompts, and what the student is, plus
        ``about``.

        ``tensors``: the whole weights by name, of a student that is held in shards.
        """
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        held = self.state_dict() if tensors is None else tensors
        body = None if tensors is None else weights_below(held, "model")
        with quiet_transformers():
            self.model.save_pretrained(path, state_dict=body)
        for part, file in OWN_FILES.items():
            own = {k: v.contiguous() for k, v in weights_below(held, part).items()}
            if own or file == HEADS_FILE:
                save_file(own, path / file)
        described = _About(
            task=self.task,
            vocabulary_size=self.vocabulary_size,
            heads=self.head_configs,
            methods=self.methods,
            domains=None if self.prompts is None else self.prompts.domains,
            sequence_length=self.sequence_length,
        ).model_dump(mode="json")
        described = {key: value for key, value in described.items() if value is not None}
        content = json.dumps(described | dict(about or {}), indent=1, sort_keys=True)
        (path / ABOUT_FILE).write_text(content + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, *, vocabulary_size: int | None = None
    ) -> "Student":
        """Load a directory written by ``save_pretrained``, heads and prompts included.

        Raises InputError when it is none.
        """
        path = Path(directory)
        about = _About.of(path)
        model = load_language_model(path, about.task)
        size = vocabulary_size or about.vocabulary_size
        student = cls(model, about.task, about.heads, size, about.domains)
        student.source, student.sequence_length = path, about.sequence_length
        student.take_over(path)
        for name, settings in about.methods.items():
            kind = find_method(name)
            add_module(kind, parse_settings(kind.Settings, settings, str(path)), student)
        return student

    def take_over(self, directory: Path) -> None:
        """Take over the heads of the student in ``directory`` that are heads of this one, too, and
        the prompts of the domains that both have.
        """
        earlier, weights = _About.of(directory), load_file(directory / HEADS_FILE)
        for name, head in self.head_configs.items():
            before = earlier.heads.get(name)
            if before == head:
                self.heads[head_key(name)].load_state_dict(weights_below(weights, head_key(name)))
            elif before is not None:
                keys = [
                    k for k in HeadConfig.model_fields if getattr(before, k) != getattr(head, k)
                ]
                told = "student: the head %r begins afresh, for that of %s is another one (%s)"
                log.warning(told, name, directory, ", ".join(keys))
        if self.prompts is not None and earlier.domains is not None:
            vectors = load_file(directory / PROMPTS_FILE)["vectors.weight"]
            self.prompts.take(earlier.domains, vectors)


def saved_heads(directory: Path) -> dict[str, HeadConfig]:
    """The heads of the student in ``directory``, by name; empty for what is no student of ours."""
    return _About.of(directory).heads if (directory / ABOUT_FILE).is_file() else {}


def saved_weights(directory: Path) -> dict[str, Tensor]:
    """Read what ``save_pretrained`` wrote, by the names of the student's state dict.

    Large models are in several files. Raises InputError where one is missing, and what safetensors
    raises for a damaged one.
    """
    files = [("model", file) for file in weight_files(directory)]
    files += [(part, directory / file) for part, file in OWN_FILES.items()]
    found: dict[str, Tensor] = {}
    for part, file in files:
        if file.name != PROMPTS_FILE or file.is_file():
            found |= {f"{part}.{name}": v for name, v in load_file(file).items()}
    return found


def check_student(
    config: StudentConfig, vocabulary_size: int = 0, sequence_length: int = 0
) -> None:
    """Check the configured student without its weights; InputError as ``build_student`` raises."""
    attention = config.chosen_attention
    directory, task = resolve_model(config.model), config.language_task
    who = f"student {config.model!r}"
    found = check_student_files(directory, task, who, config.from_scratch, attention)
    _check_sizes(config, found, vocabulary_size, sequence_length)


def build_student(
    config: StudentConfig,
    heads: Mapping[str, HeadConfig],
    vocabulary_size: int,
    seed: int,
    sequence_length: int = 0,
    domains: Sequence[str] = (),
    tokenizer: Tokenizer | None = None,
) -> Student:
    """Build the configured student, from pre-trained weights or scratch; the same for a ``seed``.

    The heads and prompts of an earlier student in the directory are taken over where name, form,
    shape and labels agree. ``domains``: of the corpus, for domain prompts. ``tokenizer``: of the
    corpus, for new weights (``padding_of_new``) and heads that look for the last token. Raises
    InputError when the model has fewer tokens than the tokenizer, takes shorter sequences than
    ``sequence_length``, or is of a family without the heads that are asked for.
    Growth comes after (``rekindle.train.growth.student``).
    """
    check_student(config, vocabulary_size, sequence_length)
    directory = resolve_model(config.model)
    torch.manual_seed(seed)
    attention, fresh = config.chosen_attention, False
    if config.from_scratch:
        model = new_language_model(directory, config.language_task, attention, tokenizer)
    else:
        loaded = load_student_model(directory, config.language_task, attention)
        model, fresh = loaded.model, bool(loaded.head)
    check_padding(model, f"student {config.model!r}")
    prompted = domains if config.domain_prompts else None
    asked = {name: _formed(head, config, model, tokenizer) for name, head in heads.items()}
    student = Student(model, config.language_task, asked, vocabulary_size, prompted)
    student.sequence_length = sequence_length or None
    if config.from_scratch:
        return student
    student.source, student.has_fresh_head = directory, fresh
    if (directory / HEADS_FILE).is_file():
        student.take_over(directory)
    return student


def _formed(
    head: HeadConfig, config: StudentConfig, model: Any, tokenizer: Tokenizer | None
) -> HeadConfig:
    """The ``head`` in the configured form, with a padding id where ``model`` has none."""
    padding = None
    if config.head == "family" and padding_of(model.config) is None and tokenizer is not None:
        known = (tokenizer.hf.pad_token_id, tokenizer.eos_id)
        padding = next((number for number in known if number is not None), None)
    return head.model_copy(update={"form": config.head, "padding": padding})


def _check_sizes(
    config: StudentConfig, model_config: Any, vocabulary_size: int, sequence_length: int
) -> None:
    size = model_config.get_text_config().vocab_size
    if size < vocabulary_size:
        raise InputError(
            f"student {config.model!r} has a vocabulary of {size:,}, the ids of the corpus "
            f"tokenizer go up to {vocabulary_size - 1:,}; "
            + (
                f"set vocab_size in its config.json to {vocabulary_size:,} or more"
                if config.from_scratch
                else "it belongs to another tokenizer, or its embedding was not made larger when "
                "tokens were added (transformers' resize_token_embeddings does that)"
            )
        )
    longest = longest_input(model_config)
    if longest is None or longest >= sequence_length + config.domain_prompts:
        return
    more = " and the domain prompt one more" if config.domain_prompts else ""
    less = ", or leave out student.domain_prompts" if longest == sequence_length else ""
    raise InputError(
        f"student {config.model!r} takes at most {longest:,} tokens, the cache's sequences "
        f"have up to {sequence_length:,}{more}. Use a student with more positions, or make a cache "
        f"with a smaller corpus.sequence_length{less}"
    )
