"""The student: a Hugging Face language model plus a head per task expert. It never makes [N,V]
logits in training.

Saved, it is an ordinary Hugging Face directory (``AutoModelForMaskedLM.from_pretrained`` loads it)
with files beside: ``heads.safetensors``, ``rekindle_student.json`` and, of a student with domain
prompts, ``prompts.safetensors``.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rekindle.data.errors import InputError
from rekindle.data.settings import Settings, parse_settings
from rekindle.data.targets.schema import TeacherInfo
from rekindle.train.config import StudentConfig
from rekindle.train.method import add_module
from rekindle.train.method_names import find_method
from rekindle.train.model.domain_prompts import (
    DOMAINS,
    DomainPrompts,
    prompted_domains,
    with_prompt,
    without_prompt,
)
from rekindle.train.model.files import longest_input, quiet_transformers, resolve_model
from rekindle.train.model.load import load_language_model, new_language_model
from rekindle.train.model.split_model import OutputHead, SplitLanguageModel

HEADS_FILE = "heads.safetensors"
PROMPTS_FILE = "prompts.safetensors"
ABOUT_FILE = "rekindle_student.json"
# What the names of a student's weights begin with.
MODEL, HEADS, PROMPTS = "model.", "heads.", "prompts."


class HeadConfig(Settings):
    """A task head: which expert it imitates and what comes out of it."""

    kind: Literal["sequence", "token"]
    num_labels: int = Field(gt=0)
    label_names: tuple[str, ...] = ()
    problem: str | None = None

    @classmethod
    def of(cls, info: TeacherInfo) -> "HeadConfig":
        """The head that fits a cached expert."""
        names = ("kind", "num_labels", "label_names", "problem")
        return cls.model_validate({name: getattr(info, name) for name in names})


class TaskHead(nn.Module):
    """Dense, tanh, dropout, linear: BERT's pooler and classifier, on any hidden states [...,H]."""

    def __init__(self, hidden_size: int, num_labels: int, dropout: float):
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(hidden_size, num_labels)

    def forward(self, states: Tensor) -> Tensor:
        """Logits [...,C]."""
        logits: Tensor = self.out(self.dropout(torch.tanh(self.dense(states))))
        return logits


class StudentOutput(NamedTuple):
    """One forward pass. What was not asked for is None or empty."""

    hidden: Tensor | None  # [N,H] what the output matrix multiplies, at the selected positions
    logits: dict[str, Tensor]  # by head: [B,C], or [P,C] at the positions asked for


class Student(nn.Module):
    """A masked or causal LM with task heads.

    ``vocabulary_size`` is the tokenizer's; rows of the output matrix past it are padding and take
    no part in any loss. ``domains``: a prompt for each (and for none of them) is put into every
    sequence; None: no prompts. All positions are those of the sequence without it.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Literal["masked_lm", "causal_lm"],
        heads: Mapping[str, HeadConfig] | None = None,
        vocabulary_size: int | None = None,
        domains: Sequence[str] | None = None,
    ):
        super().__init__()
        self.model: Any = model  # a PreTrainedModel
        self.task = task
        self.head_configs: dict[str, HeadConfig] = {}
        self.heads = nn.ModuleDict()  # of experts, and what methods add
        self.methods: dict[str, dict[str, Any]] = {}  # the settings of those that added something
        self.source: Path | None = None  # the directory that its weights come from
        try:
            self._split = SplitLanguageModel(model, causal=task == "causal_lm")
        except NotImplementedError as error:
            raise InputError(str(error)) from None
        self.vocabulary_size = vocabulary_size or self._split.head.weight.shape[0]
        self.prompts = None if domains is None else DomainPrompts.of(model, domains)
        self.add_heads(heads or {})

    def add_heads(self, heads: Mapping[str, HeadConfig]) -> None:
        """Add freshly initialised heads where there are none of that name and shape."""
        config = self.model.config.get_text_config()
        for name, head in heads.items():
            if self.head_configs.get(name) != head:
                module = TaskHead(config.hidden_size, head.num_labels, _dropout(config))
                for linear in (module.dense, module.out):
                    nn.init.normal_(linear.weight, std=getattr(config, "initializer_range", 0.02))
                    nn.init.zeros_(linear.bias)
                self.heads[_key(name)] = module
                self.head_configs[name] = head

    def add_method(self, name: str, settings: Mapping[str, Any], module: nn.Module | None) -> None:
        """Take a method's own parameters on; those that an earlier student left in the directory
        that the weights come from are taken over where all of them fit.
        """
        self.methods[name] = dict(settings)
        if module is None:
            return
        key = _method_key(name)
        self.heads[key] = module
        if self.source is not None and (self.source / HEADS_FILE).is_file():
            found = _below(load_file(self.source / HEADS_FILE), key)
            shapes = {k: v.shape for k, v in module.state_dict().items()}
            if shapes == {k: v.shape for k, v in found.items()}:
                module.load_state_dict(found)

    def method_module(self, name: str) -> nn.Module:
        """What a method has added."""
        return self.heads[_method_key(name)]

    def forward(
        self,
        inputs: Mapping[str, Tensor],
        select: Tensor | None = None,
        sequence_heads: Sequence[str] = (),
        token_heads: Mapping[str, Tensor] | None = None,
    ) -> StudentOutput:
        """Run the body once.

        ``inputs``: input_ids [B,S], attention_mask [B,S], token_type_ids?, and what
        ``with_domains`` adds (without it prompts are those of no domain). ``select`` [N]: flat
        indices into [B·S] whose hidden states the LM loss needs. ``sequence_heads``: heads run on
        the pooled state (first token; last token of a causal LM). ``token_heads``: head -> flat
        indices [P].
        """
        hidden, states = self._run(inputs, select)
        logits: dict[str, Tensor] = {}
        if sequence_heads:
            pooled = self._pool(states, inputs["attention_mask"])
            logits |= {name: self.heads[_key(name)](pooled) for name in sequence_heads}
        for name, places in (token_heads or {}).items():
            logits[name] = self.heads[_key(name)](states.flatten(0, 1)[places])
        return StudentOutput(hidden, logits)

    def states(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The body's final hidden states [B,S,H] of one forward pass."""
        return self._run(inputs, None)[1]

    def _run(
        self, inputs: Mapping[str, Tensor], select: Tensor | None
    ) -> tuple[Tensor | None, Tensor]:
        """Hidden states for the output matrix [N,H] at ``select``, and the body's [B,S,H]."""
        read = inputs
        if self.prompts is not None:
            read = self.prompts.insert(inputs, self.model.get_input_embeddings())
            select = None if select is None else with_prompt(select, inputs["input_ids"].shape[1])
        hidden, states = (
            (None, self._split.states(read)) if select is None else self._split.hidden(read, select)
        )
        return hidden, states if self.prompts is None else without_prompt(states)

    def with_domains(
        self, inputs: Mapping[str, Tensor], domains: Sequence[str | None]
    ) -> Mapping[str, Tensor]:
        """The inputs of a pass over sequences of these ``domains`` [B], told to the prompts, if
        there are any.
        """
        if self.prompts is None:
            return inputs
        numbers = torch.tensor(self.prompts.numbers(domains))
        return {**inputs, DOMAINS: numbers.to(inputs["input_ids"].device)}

    @property
    def output_head(self) -> OutputHead:
        """The output matrix over real tokens."""
        return self._split.head.cut(self.vocabulary_size)

    def _pool(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        if self.task == "masked_lm":
            return states[:, 0]
        last = attention_mask.sum(dim=1).clamp_min(1) - 1
        return states[torch.arange(len(states), device=states.device), last]

    def save_pretrained(
        self,
        directory: str | Path,
        about: Mapping[str, Any] | None = None,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write the Hugging Face files, the heads and prompts, and what the student is, plus
        ``about``.

        ``tensors``: the whole weights by name, of a student that is held in shards.
        """
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        held = self.state_dict() if tensors is None else tensors
        body = {k[len(MODEL) :]: v for k, v in held.items() if k.startswith(MODEL)}
        heads = {k[len(HEADS) :]: v.contiguous() for k, v in held.items() if k.startswith(HEADS)}
        with quiet_transformers():
            self.model.save_pretrained(path, state_dict=None if tensors is None else body)
        save_file(heads, path / HEADS_FILE)
        if self.prompts is not None:
            prompts = {k: v.contiguous() for k, v in held.items() if k.startswith(PROMPTS)}
            save_file({k[len(PROMPTS) :]: v for k, v in prompts.items()}, path / PROMPTS_FILE)
        described: dict[str, Any] = {
            "task": self.task,
            "vocabulary_size": self.vocabulary_size,
            "heads": {name: head.model_dump() for name, head in self.head_configs.items()},
            "methods": self.methods,
        }
        if self.prompts is not None:
            described["domains"] = list(self.prompts.domains)
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
        about = _read_about(path)
        model = load_language_model(path, about["task"])
        size = vocabulary_size or about["vocabulary_size"]
        student = cls(model, about["task"], about["heads"], size, about.get("domains"))
        student.source = path
        student.take_heads(path)
        student.take_prompts(path)
        for name, settings in about.get("methods", {}).items():
            kind = find_method(name)
            add_module(kind, parse_settings(kind.Settings, settings, str(path)), student)
        return student

    def take_heads(self, directory: Path) -> None:
        """Take over the heads of the student in ``directory`` that are heads of this one, too."""
        earlier, weights = _read_about(directory)["heads"], load_file(directory / HEADS_FILE)
        for name, head in self.head_configs.items():
            if earlier.get(name) == head:
                self.heads[_key(name)].load_state_dict(_below(weights, _key(name)))

    def take_prompts(self, directory: Path) -> None:
        """Take over the prompts of the student in ``directory``, of domains that are ours, too."""
        earlier = _read_about(directory).get("domains")
        if self.prompts is not None and earlier is not None:
            self.prompts.take(earlier, load_file(directory / PROMPTS_FILE)["vectors.weight"])


def own_weights(directory: Path) -> dict[str, Tensor]:
    """What a student's directory holds beside its model: heads and prompts, by a student's names.

    Raises what safetensors raises for a damaged file.
    """
    found = {HEADS + k: v for k, v in load_file(directory / HEADS_FILE).items()}
    if (directory / PROMPTS_FILE).is_file():
        found |= {PROMPTS + k: v for k, v in load_file(directory / PROMPTS_FILE).items()}
    return found


def _dropout(config: Any) -> float:
    """The model's own rate for what stands on its body; 0.1, BERT's, where it names none."""
    for name in ("classifier_dropout", "hidden_dropout_prob", "resid_pdrop"):
        if (rate := getattr(config, name, None)) is not None:
            return float(rate)
    return 0.1


def _key(name: str) -> str:
    """What a head's module is called: no dot, and no attribute that a ModuleDict has."""
    key = name.replace(".", "·")
    return key + "*" if hasattr(nn.ModuleDict(), key) else key


def _method_key(name: str) -> str:
    """The same of a method's module; no teacher's name has a colon."""
    return f"method:{name}"


def _below(weights: Mapping[str, Tensor], key: str) -> dict[str, Tensor]:
    """The weights of the module ``key``, by their names in it."""
    prefix = key + "."
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def _read_about(directory: Path) -> dict[str, Any]:
    """What ``save_pretrained`` wrote of a student: task, vocabulary_size, heads by name."""
    try:
        about: dict[str, Any] = json.loads((directory / ABOUT_FILE).read_text(encoding="utf-8"))
        heads = about["heads"].items()
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{directory} is not the directory of a student: {ABOUT_FILE} cannot be read "
            f"({type(error).__name__}). `pipeline train-student` writes such directories"
        ) from None
    return about | {"heads": {n: parse_settings(HeadConfig, h, str(directory)) for n, h in heads}}


def build_student(
    config: StudentConfig,
    heads: Mapping[str, HeadConfig],
    vocabulary_size: int,
    seed: int,
    sequence_length: int = 0,
    domains: Sequence[str] = (),
) -> Student:
    """The student of a configuration, from pre-trained weights or scratch; the same for a ``seed``.

    The heads and prompts of an earlier student in the directory are taken over where name, shape
    and labels agree. ``domains``: of the corpus, for domain prompts. Raises InputError when the
    model has fewer tokens than the tokenizer, or takes shorter sequences than ``sequence_length``.
    Growth comes after (``rekindle.train.growth.student``).
    """
    directory = resolve_model(config.model)
    torch.manual_seed(seed)
    build = new_language_model if config.from_scratch else load_language_model
    attention = None if config.attention == "auto" else config.attention
    model = build(directory, config.language_task, attention)
    size = model.config.get_text_config().vocab_size
    if size < vocabulary_size:
        raise InputError(
            f"student {config.model!r} has a vocabulary of {size:,}, the corpus tokenizer has "
            f"{vocabulary_size:,} tokens; it belongs to another tokenizer"
        )
    _check_length(config, model.config, sequence_length)
    prompted = prompted_domains(domains) if config.domain_prompts else None
    student = Student(model, config.language_task, heads, vocabulary_size, prompted)
    if config.from_scratch:
        return student
    student.source = directory
    if (directory / HEADS_FILE).is_file():
        student.take_heads(directory)
        student.take_prompts(directory)
    return student


def _check_length(config: StudentConfig, model_config: Any, sequence_length: int) -> None:
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
