"""Several classifiers as one: the union of their labels, and how much weight each gets (MUKI).

Source: "From Mimicking to Integrating: Knowledge Integration for Pre-Trained Language Models",
Findings of EMNLP 2022. Shapes: B sequences, J experts, C_j labels of expert j, U labels of all.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from rekindle.data.errors import InputError
from rekindle.data.targets.schema import TeacherInfo
from rekindle.train.config import UncertaintyConfig
from rekindle.train.device_batch import send

FLOOR = 1e-6  # of a margin: an example that two experts claim equally still counts a little


@dataclass(frozen=True)
class LabelUnion:
    """The labels of all experts: ``names`` [U], and each expert's ``places`` [C_j] among them."""

    names: tuple[str, ...]
    places: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, experts: Sequence[TeacherInfo], overlap: Literal["merge", "apart"]) -> "LabelUnion":
        """Unite labels in the order of the experts and of their labels; equal names become one
        label, or are kept apart.

        Raises InputError for an expert without label names, or with repeated ones.
        """
        names: dict[str, int] = {}
        places = {}
        for expert in experts:
            labels = _labels(expert)
            if overlap == "apart":
                labels = tuple(f"{expert.name}/{name}" for name in labels)
            elif all(re.fullmatch(r"LABEL_\d+", name) for name in labels) and len(experts) > 1:
                raise InputError(
                    f"the classes of teacher {expert.name!r} have no names ({labels[0]} …), but "
                    "equal names would become one label. Name them (id2label in its config.json), "
                    "or use labels: apart"
                )
            places[expert.name] = tuple(names.setdefault(name, len(names)) for name in labels)
        return cls(tuple(names), places)

    def pad(self, expert: str, probs: Tensor) -> Tensor:
        """Return an expert's probabilities [B,C_j] among all labels [B,U]; 0 for those it lacks."""
        places = send(np.array(self.places[expert], np.int64), probs.device)
        return probs.new_zeros(len(probs), len(self.names)).index_copy_(1, places, probs)

    def mix(self, logits: Mapping[str, Tensor], weights: Tensor, temperature: float) -> Tensor:
        """Return Σ_j w_j · pad_j(softmax(z_j/τ)) [B,U], of ``logits`` z_j [B,C_j] and ``weights``
        w [B,J].
        """
        parts = [
            weights[:, j : j + 1] * self.pad(name, torch.softmax(z / temperature, dim=1))
            for j, (name, z) in enumerate(logits.items())
        ]
        return torch.stack(parts).sum(dim=0)

    def concatenate(self, logits: Mapping[str, Tensor], temperature: float) -> Tensor:
        """Return the softmax over all experts' logits z_j [B,C_j] side by side, among all labels
        [B,U].

        Labels that share a place add up. ``logits`` in the order of the experts.
        """
        probs = torch.softmax(torch.cat(list(logits.values()), dim=1) / temperature, dim=1)
        places = [place for expert_places in self.places.values() for place in expert_places]
        index = send(np.array(places, np.int64), probs.device)
        return probs.new_zeros(len(probs), len(self.names)).index_add_(1, index, probs)


def bare_names(names: Sequence[str], experts: Sequence[str]) -> tuple[str, ...]:
    """Return label names without the experts' prefixes in a union with ``labels: apart``."""
    owners = [next((e for e in experts if n.startswith(f"{e}/")), None) for n in names]
    if None in owners:
        return tuple(names)
    return tuple(name.removeprefix(f"{e}/") for name, e in zip(names, owners, strict=True))


def _labels(expert: TeacherInfo) -> tuple[str, ...]:
    names = expert.label_names
    if len(names) != expert.num_labels or len(set(names)) != len(names):
        raise InputError(
            f"teacher {expert.name!r} has {expert.num_labels} classes and the label names "
            f"{list(names)}: a union of label sets needs a different name for each class (id2label "
            "in the expert's config.json)"
        )
    return names


def certainty(mc_probs: Tensor) -> Tensor:
    """Return S = 1 − H(p̄)/log C [B] of Monte-Carlo means p̄ [B,C]: 1 certain, 0 uniform."""
    entropy = -torch.xlogy(mc_probs, mc_probs).sum(dim=1)
    return 1.0 - entropy / torch.log(torch.tensor(float(mc_probs.shape[1])))


def expert_weights(certainties: Tensor, config: UncertaintyConfig) -> Tensor:
    """Return W [B,J] of certainties s [B,J]: softmax(s / sharpness), or 1 for the most certain."""
    if config.selection == "hard":
        best = certainties.argmax(dim=1, keepdim=True)
        return torch.zeros_like(certainties).scatter_(1, best, 1.0)
    return torch.softmax(certainties / config.sharpness, dim=1)


def margin(certainties: Tensor) -> Tensor:
    """Return V = s₍₁₎ − s₍₂₎ + 1e-6 [B]: how clearly one expert is the right one."""
    best = certainties.topk(2, dim=1).values
    return best[:, 0] - best[:, 1] + FLOOR
