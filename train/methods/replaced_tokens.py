"""Replaced-token detection from the cache: the student finds the tokens put in by a cached masked
LM, which is not run again.

ELECTRA (Clark et al., 2020) trains a generator beside the student and samples from it. Here the
replacements at the masked positions are sampled from a teacher's cached targets, and the student's
head, with one output, classifies every token of the corrupted text: L = weight · mean
BCE(head(h_i), [x_i ≠ original]). A token that is sampled unchanged counts as original. Shapes: B
sequences, S positions, P masked ones with a target, K kept ids, V vocabulary, N tokens that are
classified.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from weakref import ref

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor, nn

from rekindle.data.batch import Batch, TokenTargetBatch
from rekindle.data.corpus.config import content_ids
from rekindle.data.errors import InputError, naming
from rekindle.data.targets.kinds.registry import vocabulary_kind
from rekindle.data.targets.schema import TeacherInfo
from rekindle.data.views.masking import generator
from rekindle.kernels.blocks import row_blocks
from rekindle.kernels.targets import DecodedTargets
from rekindle.train.config import MethodSettings, WeightField
from rekindle.train.device_batch import clean_inputs, send, sparse_targets
from rekindle.train.method import Method, MethodRun
from rekindle.train.model.folder import own_files
from rekindle.train.model.network import StudentNetwork, weights_below

ELECTRA_HEAD = "discriminator_predictions"  # its name in ElectraForPreTraining


class ReplacedTokensSettings(MethodSettings):
    """Settings of ``method: replaced_tokens``."""

    weight: WeightField = Field(
        50.0,
        description=(
            "weight relative to the masked-LM loss (ELECTRA's 50): a number or a schedule"
        ),
    )
    teacher: str | None = Field(
        None,
        description="the masked-LM teacher that replacements are sampled from; null: the only "
        "one in the cache that saw the student's masks",
    )
    temperature: float = Field(
        1.0, gt=0, description="temperature of the sampling; one that the teacher stores"
    )


class ReplacedTokens(Method):
    """Sampled replacements, and the student's loss on finding them.

    A draw depends only on (train.seed, epoch, example, position), not on batch size, processes or
    micro-batches. (The probabilities of a ``hidden`` teacher are a matrix product over the batch,
    so its rounding may decide a draw at the very edge of an outcome.)
    """

    Settings = ReplacedTokensSettings
    settings: ReplacedTokensSettings
    values = ("loss", "accuracy", "precision", "recall", "f1")
    evaluates_losses = True

    def __init__(self, settings: ReplacedTokensSettings, run: MethodRun):
        super().__init__(settings, run)
        if run.task != "masked_lm":
            raise InputError(
                f"the method {self.name}: a {run.task} student has no masked view in which to "
                "replace positions. Use student.task: replaced_token_detection"
            )
        self.teacher = settings.teacher or _only_teacher(run)
        _check_teacher(run.cache.teacher(self.teacher).info, run, settings.temperature)
        facts = run.cache.corpus.info["tokenizer"]
        self.special = np.zeros(facts["size"], bool)
        self.special[sorted(facts["special_ids"])] = True
        self.content = content_ids(facts).astype(np.int64)
        self._latest: tuple[ref[Batch], torch.device, CorruptedText] | None = None

    @property
    def teachers(self) -> tuple[str, ...]:  # noqa: D102
        return (self.teacher,)

    @classmethod
    def module(cls, settings: MethodSettings, student: StudentNetwork) -> nn.Module | None:
        """Return the head; an ELECTRA model holds it itself, so that ElectraForPreTraining loads
        it.
        """
        config = student.model.config
        head = ReplacedTokenHead(config)
        if config.model_type != "electra":
            return head
        if student.source is not None:
            head.take(own_files(student.source))
        setattr(student.model, ELECTRA_HEAD, head)
        return None

    def count(self, batch: Batch) -> dict[str, int]:
        """Return the number of classified tokens."""
        return {"loss": len(self._classified(batch))}

    def losses(
        self, student: StudentNetwork, batch: Batch, step: int, device: torch.device
    ) -> Iterable[tuple[str, Tensor, Tensor]]:
        """Yield the binary cross-entropy, summed over the classified tokens."""
        loss, _, _ = self._classify(student, batch, device)
        yield "loss", loss, loss.detach()

    def evaluate(
        self, student: StudentNetwork, batch: Batch, device: torch.device
    ) -> dict[str, tuple[float, int]]:
        """Return loss and accuracy over all tokens; precision, recall and F1 of the
        replaced ones.
        """
        loss, logits, replaced = self._classify(student, batch, device)
        flagged = logits > 0
        outcomes = torch.stack([flagged == replaced, flagged & replaced, flagged])
        correct, true_positives, flagged_count = outcomes.sum(dim=1).tolist()
        count, replaced_count = len(logits), int(replaced.sum())
        return {
            "loss": (float(loss), count),
            "accuracy": (correct, count),
            "precision": (true_positives, flagged_count),
            "recall": (true_positives, replaced_count),
            "f1": (2 * true_positives, flagged_count + replaced_count),
        }

    def corrupted(self, batch: Batch, device: torch.device) -> "CorruptedText":
        """Return the batch's text with replacements, the same for an example in every batch.

        If asked again for one batch, as at steps that measure gradients: the same tensors, which
        nobody need compare.
        """
        if self._latest is None or self._latest[0]() is not batch or self._latest[1] != device:
            self._latest = (ref(batch), device, self._corrupt(batch, device))
        return self._latest[2]

    def _corrupt(self, batch: Batch, device: torch.device) -> "CorruptedText":
        target = self._target(batch)
        sampled = self._sample(batch, target, device)
        inputs = clean_inputs(batch, device)
        original = inputs["input_ids"].flatten()
        places = send(target.rows * batch.input_ids.shape[1] + target.positions, device)
        changed = original.index_copy(0, places, sampled)
        classified = send(self._classified(batch), device)
        inputs["input_ids"] = changed.view(inputs["input_ids"].shape)
        return CorruptedText(inputs, classified, (changed != original)[classified])

    def _target(self, batch: Batch) -> TokenTargetBatch:
        target = batch.targets[self.teacher]
        assert isinstance(target, TokenTargetBatch)
        return target

    def _classified(self, batch: Batch) -> NDArray[np.int64]:
        """Return flat indices [N] into [B·S]: all tokens except special ones, in sequences with a
        target.

        Other sequences have no replacements, so there is nothing to learn from them.
        """
        classified = batch.attention_mask & ~self.special[batch.input_ids]
        if batch.trained is not None:
            classified &= batch.trained
        with_target = np.zeros(len(classified), bool)
        with_target[self._target(batch).rows] = True
        return np.flatnonzero(classified & with_target[:, None])

    def _classify(
        self, student: StudentNetwork, batch: Batch, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the summed loss, the logits [N] and which tokens are replaced [N] bool."""
        text = self.corrupted(batch, device)
        states = student.states(student.with_domains(text.inputs, batch.domains))
        head = getattr(student.model, ELECTRA_HEAD, None)
        if head is None:
            head = student.method_module(self.name)
        logits: Tensor = head(states.flatten(0, 1)[text.classified]).float()
        truth = text.replaced.float()
        loss = F.binary_cross_entropy_with_logits(logits, truth, reduction="sum")
        return loss, logits, text.replaced

    def _sample(self, batch: Batch, target: TokenTargetBatch, device: torch.device) -> Tensor:
        """Return a sampled token [P] for each position with a target."""
        uniforms = _uniforms(batch, target, self.run.seed)
        if not target.kind.has_all_probabilities:
            candidates = sparse_targets(target, self.settings.temperature, None, device)
            return sample(candidates, send(uniforms, device), send(self.content, device))
        # Whole distributions [P,V] in bounded blocks.
        samples = [torch.zeros(0, dtype=torch.int64, device=device)]
        bytes_per_id = 4 * torch.float64.itemsize
        for part in row_blocks(len(target.rows), len(self.special), bytes_per_id, device):
            candidates = sparse_targets(target.keep(part), self.settings.temperature, None, device)
            samples.append(sample(candidates, send(uniforms[part], device), None))
        return torch.cat(samples)


class CorruptedText(NamedTuple):
    """The text that the student classifies."""

    inputs: Mapping[str, Tensor]  # input_ids and attention_mask [B,S]
    classified: Tensor  # [N] flat indices into [B·S]
    replaced: Tensor  # [N] bool: the token is not the original


class ReplacedTokenHead(nn.Module):
    """Dense, the model's activation, one output: ELECTRA's discriminator head with its names."""

    def __init__(self, config: Any):
        super().__init__()
        from transformers.activations import get_activation

        size, spread = config.hidden_size, getattr(config, "initializer_range", 0.02)
        self.dense = nn.Linear(size, size)
        name = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", "gelu")
        self.activation = get_activation(name)
        self.dense_prediction = nn.Linear(size, 1)
        for linear in (self.dense, self.dense_prediction):
            nn.init.normal_(linear.weight, std=spread)
            nn.init.zeros_(linear.bias)

    def forward(self, states: Tensor) -> Tensor:
        """Return logits [N] of "this token was replaced" for states [N,H]."""
        logits: Tensor = self.dense_prediction(self.activation(self.dense(states)))
        return logits.squeeze(-1)

    def take(self, files: Iterable[Path]) -> None:
        """Load the weights of a discriminator's head from its model files, if all are there."""
        head_weights: dict[str, Tensor] = {}
        for file in files:
            head_weights |= weights_below(load_file(file), ELECTRA_HEAD)
        if head_weights.keys() == self.state_dict().keys():
            self.load_state_dict(head_weights)


def _uniforms(batch: Batch, target: TokenTargetBatch, seed: int) -> NDArray[np.float64]:
    """Return two numbers [P,2] in [0,1) per position with a target: a function of seed, epoch,
    example and position.
    """
    numbers = np.zeros((len(target.rows), 2))
    for row in np.unique(target.rows).tolist():
        rng = generator(f"replaced-tokens/{batch.epoch}", seed, str(batch.digests[row]))
        in_row = target.rows == row
        numbers[in_row] = rng.random((int(batch.lengths[row]), 2))[target.positions[in_row]]
    return numbers


def sample(targets: DecodedTargets, uniforms: Tensor, content: Tensor | None) -> Tensor:
    """Draw a token [P] from each row's distribution, by inverting its cumulative sum.

    ``uniforms`` [P,2] in [0,1): the first chooses among the K kept ids and the tail, the second
    among the tail's tokens: those of ``content`` (ascending ids) that are not kept, with equal
    probability. ``content`` None: nothing is outside the kept ids.
    """
    ids, probs, tail = targets
    mass = probs.double()
    if content is not None:
        rank = _ranks(ids, content)
        tail_counts = len(content) - (rank < len(content)).sum(dim=1)
        mass = torch.cat([mass, (tail.double() * (tail_counts > 0))[:, None]], dim=1)
    cumulative = mass.cumsum(dim=1)
    total = cumulative[:, -1:]
    # Keep below the total despite rounding: an outcome without mass is never chosen.
    point = torch.minimum(uniforms[:, :1] * total, torch.nextafter(total, torch.zeros_like(total)))
    outcome = torch.searchsorted(cumulative, point, right=True)
    chosen = ids.gather(1, outcome.clamp(max=ids.shape[1] - 1))[:, 0]
    if content is None:
        return chosen
    in_tail = outcome[:, 0] == ids.shape[1]
    return torch.where(in_tail, _outside(rank, content, tail_counts, uniforms[:, 1]), chosen)


def _ranks(ids: Tensor, content: Tensor) -> Tensor:
    """Return each id's [P,K] index in ``content``; len(content) for ids that are not in it."""
    ranks = torch.searchsorted(content, ids.contiguous())
    is_content = content[ranks.clamp(max=len(content) - 1)] == ids
    return torch.where(is_content, ranks, len(content))


def _outside(rank: Tensor, content: Tensor, tail_counts: Tensor, uniform: Tensor) -> Tensor:
    """Choose a token [P] of ``content`` whose rank is not in ``rank`` [P,K], among ``tail_counts``
    [P] of them.

    The n-th of them is at index n plus the number of kept ranks before it: the j-th smallest kept
    rank s_j comes before it if s_j − j ≤ n.
    """
    number = (uniform * tail_counts).long().minimum(tail_counts - 1).clamp(min=0)
    kept_ranks = rank.sort(dim=1).values
    is_before = (
        kept_ranks - torch.arange(kept_ranks.shape[1], device=kept_ranks.device) <= number[:, None]
    )
    index = number + (is_before & (kept_ranks < len(content))).sum(dim=1)
    return content[index.clamp(max=len(content) - 1)]


def _only_teacher(run: MethodRun) -> str:
    """Return the only masked LM that saw what the student sees."""
    infos = [reader.info for reader in run.cache.teachers.values()]
    names = [i.name for i in infos if i.task == "masked_lm" and i.view == run.masked_view]
    if len(names) != 1:
        raise InputError(
            "replaced tokens are sampled from a masked-LM teacher, but "
            f"{run.cache.store.location} has {', '.join(names) or 'none'} for the student's "
            "masks. "
            + (
                "Name one: train.objective.methods: [{method: replaced_tokens, teacher: NAME}]"
                if names
                else "Cache one with `pipeline cache-teachers`"
            )
        )
    return names[0]


def _check_teacher(info: TeacherInfo, run: MethodRun, temperature: float) -> None:
    if info.task != "masked_lm" or not info.view_class.masked:
        raise InputError(
            "replaced tokens are sampled from a masked LM's predictions at masked positions, but "
            f"teacher {info.name!r} is a {info.task} that saw {info.view}. Name another teacher"
        )
    with naming("replaced tokens"):
        vocabulary_kind(info).slot(temperature)
