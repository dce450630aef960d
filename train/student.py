"""The student: its network (``model.network``), and how it is built, saved and loaded.

Saved, it is an ordinary Hugging Face directory (``AutoModelForMaskedLM.from_pretrained`` loads it)
with further files: ``heads.safetensors``, ``rekindle_student.json`` and, for a student with domain
prompts, ``prompts.safetensors``. If the student is an adapter, the adapter replaces the model
there, as peft writes it; ``rekindle_student.json`` has its base's digests.
"""

import json
import logging
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import torch
from pydantic import ConfigDict, Field
from safetensors.torch import save_file
from torch import Tensor

from rekindle.data.corpus.tokenizer import Tokenizer
from rekindle.data.errors import InputError
from rekindle.data.settings import Settings, parse_settings
from rekindle.train.config import StudentConfig
from rekindle.train.deferred.recording import try_when_filled
from rekindle.train.embedding.student import check_embedding, choose_output, fit_head
from rekindle.train.method import add_module, find_method
from rekindle.train.model.files import (
    base_fingerprints,
    load_language_model,
    load_student_model,
    longest_input,
    new_language_model,
)
from rekindle.train.model.fitting import AUTO_CLASSES
from rekindle.train.model.folder import ABOUT_FILE as ABOUT_FILE
from rekindle.train.model.folder import is_adapter, read_header, resolve_model, weight_files
from rekindle.train.model.headers import check_student_files
from rekindle.train.model.lora import Adapter
from rekindle.train.model.meta import read_tensors, shape_only
from rekindle.train.model.network import (
    HEADS_FILE,
    HeadConfig,
    StudentNetwork,
    head_key,
    weights_below,
)
from rekindle.train.model.padding import padding_of
from rekindle.train.model.sight import check_padding
from rekindle.train.outside.quiet import quiet_transformers

log = logging.getLogger("rekindle")

PROMPTS_FILE = "prompts.safetensors"
UNRECORDED = 512  # tokens, for students whose training length is not recorded
# Prefixes of the names of a student's weights.
OWN_FILES = {"heads": HEADS_FILE, "prompts": PROMPTS_FILE}  # by part of the state dict


class _StudentRecord(Settings):
    """What ``save_pretrained`` writes about a student, besides what its caller adds."""

    model_config = ConfigDict(extra="ignore")

    task: Literal["masked_lm", "causal_lm"]
    vocabulary_size: int
    heads: dict[str, HeadConfig]
    methods: dict[str, dict[str, object]] = Field(default_factory=dict)
    domains: tuple[str, ...] | None = None
    vectors: str | None = None  # whose it gives as a sentence encoder: a head's, or its own
    sequence_length: int | None = None
    base: dict[str, str] | None = None  # for an adapter: its base's location and digests

    @classmethod
    def of(cls, directory: Path) -> "_StudentRecord":
        """Read the record; raise InputError if there is none."""
        try:
            record = json.loads((directory / ABOUT_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"{directory} is not the directory of a student: {ABOUT_FILE} cannot be read "
                f"({type(error).__name__}). `pipeline train-student` writes such directories"
            ) from None
        return parse_settings(cls, record, str(directory / ABOUT_FILE))


class Student(StudentNetwork):
    """The network of a student, and how it is saved and loaded."""

    adapter: Adapter | None = None  # trained and saved in place of the model
    base: dict[str, str] | None = None  # the base of an adapter, as recorded
    vectors: str | None = None  # whose vectors it gives as an encoder: a head's, or `own`

    @property
    def longest_text(self) -> int:
        """Return the tokens of a text that it was trained with, as far as that is recorded."""
        return self.sequence_length or UNRECORDED

    def save_pretrained(
        self,
        directory: str | Path,
        about: Mapping[str, object] | None = None,
        *,
        as_held: bool = False,
    ) -> None:
        """Write the Hugging Face files, the heads and prompts, and the student's record plus
        ``about``. ``as_held``: see ``save_model``.
        """
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        self.save_model(path, as_held=as_held)
        self.save_beside(path, self.state_dict(), about)

    def save_model(
        self,
        path: Path,
        tensors: Mapping[str, Tensor] | None = None,
        *,
        as_held: bool = False,
    ) -> None:
        """Write the Hugging Face files. ``tensors``: only these of the model's.

        ``as_held``: with the model's own tensors. For some families (Mixtral) the published files
        have others, into which transformers converts; it loads both.
        """
        if self.adapter is not None and self.base is not None:
            self.adapter.save(path, self.base["model"])
            return
        with quiet_transformers():
            weights = None if tensors is None else dict(tensors)
            self.model.save_pretrained(path, state_dict=weights, save_original_format=not as_held)

    def save_beside(
        self, path: Path, weights: Mapping[str, Tensor], about: Mapping[str, object] | None = None
    ) -> None:
        """Write the heads and prompts among the ``weights``, and the student's record plus
        ``about``.
        """
        for part, file in OWN_FILES.items():
            part_weights = {k: v.contiguous() for k, v in weights_below(weights, part).items()}
            if part_weights or file == HEADS_FILE:
                save_file(part_weights, path / file)
        record = _StudentRecord(
            task=self.task,
            vocabulary_size=self.vocabulary_size,
            heads=self.head_configs,
            methods=self.methods,
            domains=None if self.prompts is None else self.prompts.domains,
            vectors=self.vectors,
            sequence_length=self.sequence_length,
            base=self.base,
        ).model_dump(mode="json")
        record = {key: value for key, value in record.items() if value is not None}
        content = json.dumps(record | dict(about or {}), indent=1, sort_keys=True)
        (path / ABOUT_FILE).write_text(content + "\n", encoding="utf-8")

    def own_weights(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds, by the names of ``saved_tensors``; shares the student's
        memory.

        For an adapter: itself, heads and prompts, without its base.
        """
        weights: dict[str, Tensor] = self.state_dict(keep_vars=True)
        if self.adapter is None:
            return weights
        trained = {
            name: values for name, values in weights.items() if not name.startswith("model.")
        }
        return trained | {f"model.{k}": values for k, values in self.adapter.tensors().items()}

    def finished(self) -> "Student":
        """Return what a run leaves: with ``student.lora.merge``, an adapter and its base as one
        model. Training is over then.
        """
        if self.adapter is None or not self.adapter.merges:
            return self
        if self.adapter.quantize is not None:  # four bits have no room for the sum
            with TemporaryDirectory() as folder:
                self.save_pretrained(folder)
                return type(self).from_pretrained(folder)
        self.adapter.merge()
        self.adapter = self.base = None
        return self

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, *, vocabulary_size: int | None = None
    ) -> "Student":
        """Load a directory written by ``save_pretrained``, with heads and prompts; an adapter is
        merged into its base.

        Raises InputError if it is not such a directory.
        """
        path = Path(directory)
        record = _StudentRecord.of(path)
        model = load_language_model(path, record.task)
        size = vocabulary_size or record.vocabulary_size
        student = cls(model, record.task, record.heads, size, record.domains)
        student.source, student.sequence_length = path, record.sequence_length
        student.vectors = record.vectors
        student.take_over(path)
        for name, settings in record.methods.items():
            method_class = find_method(name)
            parsed = parse_settings(method_class.Settings, settings, str(path))
            add_module(method_class, parsed, student)
        return student

    def take_over(self, directory: Path) -> None:
        """Copy the heads that this student shares with the one in ``directory``, and the prompts of
        domains that both have.
        """
        earlier_record = _StudentRecord.of(directory)
        head_weights = _read_beside(directory / HEADS_FILE)
        for name, head in self.head_configs.items():
            earlier_head = earlier_record.heads.get(name)
            if earlier_head == head:
                self.heads[head_key(name)].load_state_dict(
                    weights_below(head_weights, head_key(name))
                )
            elif earlier_head is not None:
                differing = [
                    k
                    for k in HeadConfig.model_fields
                    if getattr(earlier_head, k) != getattr(head, k)
                ]
                message = "student: the head %r starts afresh, because that of %s differs (%s)"
                log.warning(message, name, directory, ", ".join(differing))
        if self.prompts is not None and earlier_record.domains is not None:
            vectors = _read_beside(directory / PROMPTS_FILE)["vectors.weight"]
            self.prompts.take(earlier_record.domains, vectors)


def _read_beside(file: Path) -> dict[str, Tensor]:
    """Read a file beside a student's weights; raise InputError if it is missing or damaged."""
    if not file.is_file():
        raise InputError(
            f"{file.parent} is a student without its {file.name}, which belongs beside its "
            "weights. Copy that too"
        )
    return read_tensors(file)


def saved_heads(directory: Path) -> dict[str, HeadConfig]:
    """Return the heads of the student in ``directory``, by name; {} if it is not a
    student of ours.
    """
    return _StudentRecord.of(directory).heads if (directory / ABOUT_FILE).is_file() else {}


class SavedTensor(NamedTuple):
    """Where a tensor is stored."""

    file: Path
    key: str  # its name in the file
    shape: tuple[int, ...]

    @classmethod
    def all_in(cls, file: Path, prefix: str = "") -> dict[str, "SavedTensor"]:
        """Return a file's tensors by their names after ``prefix``; raise InputError if it is
        damaged.
        """
        found = read_header(file).items()
        return {prefix + key: cls(file, key, stored.shape) for key, stored in found}


def saved_tensors(directory: Path) -> dict[str, SavedTensor]:
    """Return what ``save_pretrained`` wrote, by the names of the student's state dict.

    Large models are in several files. Raises InputError if one is missing or damaged.
    """
    files = [("model", file) for file in weight_files(directory)]
    files += [(part, directory / file) for part, file in OWN_FILES.items()]
    tensors: dict[str, SavedTensor] = {}
    for part, file in files:
        if file.name != PROMPTS_FILE or file.is_file():
            tensors |= SavedTensor.all_in(file, f"{part}.")
    return tensors


def check_student(
    config: StudentConfig, vocabulary_size: int = 0, sequence_length: int = 0
) -> None:
    """Check the configured student without its weights; raise InputError as
    ``build_student`` does.
    """
    attention = config.chosen_attention
    directory, task = resolve_model(config.model), config.language_task
    subject = f"student {config.model!r}"
    model_config = check_student_files(directory, task, subject, config.from_scratch, attention)
    _check_sizes(config, model_config, vocabulary_size, sequence_length)
    if config.lora is not None:
        if is_adapter(directory):
            raise InputError(
                f"{subject} is already an adapter, and student.lora would put another one on it. "
                f"Merge it first (`pipeline merge-adapter {shlex.quote(config.model)} --out DIR`) "
                "and adapt the result, or leave student.lora out to train the merged model"
            )
        without_dora = config.lora.model_copy(update={"dora": False})  # which needs the weights
        with torch.random.fork_rng(devices=[]):
            Adapter(shape_only(model_config, AUTO_CLASSES[task]), without_dora, task, subject)


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

    The heads and prompts of an earlier student in the directory are kept if name, form, shape and
    labels agree. ``domains``: the corpus's, for domain prompts. ``tokenizer``: the corpus's, for
    new weights (``padding_of_new``) and heads that look for the last token. Raises InputError if
    the model has fewer tokens than the tokenizer, takes shorter sequences than ``sequence_length``,
    or belongs to a family without the requested heads. Growth comes after
    (``rekindle.train.growth.student``).
    """
    check_student(config, vocabulary_size, sequence_length)
    check_embedding(config, heads)
    directory = resolve_model(config.model)
    torch.manual_seed(seed)
    attention, fresh = config.chosen_attention, False
    if config.from_scratch:
        model = new_language_model(directory, config.language_task, attention, tokenizer)
    else:
        loaded = load_student_model(directory, config.language_task, attention)
        model, fresh = loaded.model, bool(loaded.head)
    try_when_filled(lambda: check_padding(model, f"student {config.model!r}"))
    adapter, task = None, config.language_task
    if config.lora is not None:  # before it is split, which tries its logits
        adapter = Adapter(model, config.lora, task, f"student {config.model!r}")
    prompt_domains = domains if config.domain_prompts else None
    head_configs = {
        name: _configure_head(name, head, config, model, tokenizer) for name, head in heads.items()
    }
    student = Student(model, task, head_configs, vocabulary_size, prompt_domains)
    student.sequence_length = sequence_length or None
    student.vectors = choose_output(config, head_configs)
    if adapter is not None:
        base_place = (
            directory.resolve() if Path(config.model).expanduser().is_dir() else config.model
        )
        student.adapter = adapter
        student.base = {"model": str(base_place), **base_fingerprints(directory)}
        student.base |= {} if adapter.quantize is None else {"quantize": adapter.quantize}
    if config.from_scratch:
        return student
    student.source, student.has_fresh_head = directory, fresh
    if (directory / HEADS_FILE).is_file():
        student.take_over(directory)
    return student


def _configure_head(
    name: str, head: HeadConfig, config: StudentConfig, model: Any, tokenizer: Tokenizer | None
) -> HeadConfig:
    """Return the ``head`` in the configured form, with a padding id if ``model`` has none.

    An embedding head also gets what the student's size decides.
    """
    if head.kind == "embedding":
        return fit_head(head, name, config, model.config)
    padding = None
    if config.head == "family" and padding_of(model.config) is None and tokenizer is not None:
        candidates = (tokenizer.hf.pad_token_id, tokenizer.eos_id)
        padding = next((number for number in candidates if number is not None), None)
    return head.model_copy(update={"form": config.head, "padding": padding})


def _check_sizes(
    config: StudentConfig, model_config: Any, vocabulary_size: int, sequence_length: int
) -> None:
    size = model_config.get_text_config().vocab_size
    if size < vocabulary_size:
        raise InputError(
            f"student {config.model!r} has a vocabulary of {size:,}, but the ids of the corpus "
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
    prompt_note = " and the domain prompt one more" if config.domain_prompts else ""
    prompt_advice = ", or leave out student.domain_prompts" if longest == sequence_length else ""
    raise InputError(
        f"student {config.model!r} takes at most {longest:,} tokens, but the cache's sequences "
        f"have up to {sequence_length:,}{prompt_note}. Use a student with more positions, or "
        f"make a cache with a smaller corpus.sequence_length{prompt_advice}"
    )
