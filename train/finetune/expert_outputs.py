"""What classifiers say of labelled texts: logits, Monte-Carlo means, a student's task head.

Trains nothing. N texts, C classes of an expert or of a head.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.special import softmax

from rekindle.data.corpus.tokenizer import load_tokenizer
from rekindle.data.errors import InputError
from rekindle.data.targets.schema import TeacherInfo
from rekindle.train.finetune.classifier import EncodedTexts, by_length, load_expert, predict
from rekindle.train.finetune.task_data import TaskData
from rekindle.train.model.files import longest_input, place, quiet_transformers
from rekindle.train.model.network import HeadConfig
from rekindle.train.student import Student


@dataclass(frozen=True)
class ExpertOutput:
    """One expert's answers: logits [N,C], and the mean probabilities of dropout passes [N,C]."""

    info: TeacherInfo
    logits: np.ndarray
    mc_probs: np.ndarray | None


def expert_output(
    name: str, model: str, data: TaskData, passes: int, seed: int, max_length: int, batch: int
) -> ExpertOutput:
    """Run a classifier on the texts of a task; ``passes`` times more with dropout.

    Raises InputError for a model without a trained head, or without dropout where passes are asked.
    """
    with quiet_transformers():
        network, encoded = load_expert(model, data, max_length)
        logits = predict(network, encoded, batch)
        means = None
        if passes:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                each = [predict(network, encoded, batch, dropout=True) for _ in range(passes)]
            if all(np.array_equal(one, logits) for one in each):
                raise InputError(
                    f"{model!r}: {passes} Monte-Carlo passes are identical, so the model has no "
                    "dropout to draw uncertainty from. Set merge.passes to 0 to leave MUKI out"
                )
            means = np.mean([softmax(one, axis=1) for one in each], axis=0)
    about = {"task": "sequence_classification", "kind": "sequence", "view": "text"}
    config = network.config
    names = tuple(str(config.id2label[i]) for i in range(config.num_labels))
    info = TeacherInfo(name=name, num_labels=config.num_labels, label_names=names, **about)
    return ExpertOutput(info, logits, means)


def names_for(models: list[str]) -> list[str]:
    """A name for each expert: its directory's, or a number where that is none or is taken."""
    names: list[str] = []
    for number, model in enumerate(models):
        name = re.sub(r"[^A-Za-z0-9._-]", "-", Path(model).name)[:100].lstrip("._-")
        names.append(name if name and name not in names else f"expert-{number}")
    return names


def head_of(student: Student, wanted: str | None, directory: str) -> tuple[str, HeadConfig]:
    """The head of a student that is scored; InputError when it is not clear which."""
    heads = {n: h for n, h in student.head_configs.items() if h.kind == "sequence"}
    if wanted is None and len(heads) == 1:
        wanted = next(iter(heads))
    if wanted is None or wanted not in heads:
        has = ", ".join(heads) or "none that judges whole texts"
        raise InputError(
            f"student {directory!r} has the task heads {has}"
            + (f", not {wanted!r}" if wanted else "; say which with head")
            + ". Train one with a distill term of task experts, or fine-tune it (epochs above 0)"
        )
    return wanted, heads[wanted]


def student_logits(
    student: Student, head: str, directory: str, data: TaskData, max_length: int, batch: int
) -> np.ndarray:
    """Logits [N,C] of one task head, on texts shown as in training."""
    device = torch.device(place("fp32").device)
    student = student.to(device).eval()
    encoded = _encoded(student, directory, data, max_length)

    def run(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        logits: torch.Tensor = student(inputs, sequence_heads=[head]).logits[head]
        return logits

    return by_length(encoded, batch, device, run)


def _encoded(student: Student, directory: str, data: TaskData, max_length: int) -> EncodedTexts:
    """Tokenize the texts or pairs as the cache shows them."""
    tokenizer = load_tokenizer(directory)
    longest = longest_input(student.model.config) or max_length + 1
    prompted = student.prompts is not None  # that of no domain takes a place, too
    most = min(max_length, longest - prompted)
    if data.pairs is not None:
        two = getattr(student.model.config, "type_vocab_size", 0) >= 2
        pairs = zip(data.texts, data.pairs, strict=True)
        joined = [tokenizer.encode_pair(a, b, max_length=most) for a, b in pairs]
        types = [types if two else np.zeros_like(types) for _, types in joined]
        return EncodedTexts([ids for ids, _ in joined], types, padding_id=0)
    room = most - len(tokenizer.prefix) - len(tokenizer.suffix)
    wrapped = [
        np.concatenate([tokenizer.prefix, found.ids[:room], tokenizer.suffix]).astype(np.int32)
        for found in tokenizer.encode(data.texts)
    ]
    filled = [ids if len(ids) else np.zeros(1, np.int32) for ids in wrapped]
    return EncodedTexts(filled, None, padding_id=0)
