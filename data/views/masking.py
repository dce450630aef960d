"""Choose the tokens that masked-LM teachers and students do not see. Pure, without input or output.

A mask depends only on (policy, seed, replica, example digest) and is drawn from NumPy's
counter-based Philox generator: any process computes the same mask for the same example, in any
order.

Policies: ``random`` masks ``probability`` of the content tokens, independently per replica (BERT).
``cover`` divides the tokens among the replicas, so that each token is masked in exactly one of
them. ``hard`` masks what a teacher finds hard, by its stored losses: see ``hard_masks.py``. Units:
``token``; ``word`` (all pieces of a word together); ``span`` (contiguous words, their number drawn
from a geometric distribution with p = 0.2 clipped at 10, as in SpanBERT). Words and spans never
cross a special token.
"""

from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray
from pydantic import Field, model_validator

from rekindle.data.settings import Settings

SPAN_P = 0.2
SPAN_MAX = 10
HARD_KEYS = ("teacher", "loss_above", "limit")  # keys of policy hard only


class MaskConfig(Settings):
    """How tokens are chosen and replaced."""

    policy: Literal["random", "cover", "hard"] = Field(
        "random",
        description="random: independent replicas; cover: each token is masked in one replica; "
        "hard: the tokens that a teacher finds hard when it sees the text unmasked, "
        "in one replica (self-evolution)",
    )
    unit: Literal["token", "word", "span"] = Field("token", description="what is masked together")
    probability: float = Field(
        0.15, gt=0, lt=1, description="share of the content tokens that are masked (policy random)"
    )
    mask_token: float = Field(
        0.8,
        ge=0,
        le=1,
        description="share of the chosen tokens replaced by the mask token; default with policy "
        "hard: all that are not replaced by a random one",
    )
    random_token: float = Field(
        0.1,
        ge=0,
        le=1,
        description="share of the chosen tokens replaced by a random one; default with policy "
        "hard: none",
    )
    teacher: str | None = Field(
        None,
        description=("policy hard: the masked_lm teacher with view: clean whose losses are used"),
    )
    loss_above: float = Field(
        0.1,
        ge=0,
        description="policy hard: a token is hard if −log p of the true token exceeds this many "
        "nats",
    )
    limit: float | None = Field(
        None,
        gt=0,
        le=1,
        description="policy hard: at most this share of a sequence's tokens (but at least one), "
        "the hardest first; null: all hard ones",
    )

    @model_validator(mode="after")
    def _of_the_policy(self) -> "MaskConfig":
        is_hard = self.policy == "hard"
        unused = ("unit", "probability") if is_hard else HARD_KEYS
        defaults = {key: MaskConfig.model_fields[key].default for key in unused}
        set_keys = [key for key in unused if getattr(self, key) != defaults[key]]
        if set_keys:
            raise ValueError(
                f"{set_keys[0]} has no meaning with policy {self.policy}; leave it out"
            )
        if is_hard and self.teacher is None:
            raise ValueError(
                "policy hard needs teacher: the name of the masked_lm teacher with view: clean "
                "whose losses decide which tokens are hard"
            )
        # Frozen, hence setattr: self-evolution hides every token that it masks.
        if is_hard and "random_token" not in self.model_fields_set:
            object.__setattr__(self, "random_token", 0.0)
        if is_hard and "mask_token" not in self.model_fields_set:
            object.__setattr__(self, "mask_token", 1.0 - self.random_token)
        if self.mask_token + self.random_token > 1 + 1e-9:
            raise ValueError(
                "mask_token + random_token must not exceed 1 (the rest stays unchanged)"
            )
        if self.mask_token + self.random_token == 0:
            raise ValueError(
                "mask_token and random_token are 0: every chosen token would stay unchanged and "
                "visible. Give one of them a share"
            )
        return self

    def identity(self) -> dict[str, object]:
        """Return what decides masks; the same for every version that has made them.

        The teacher of policy hard counts by its identity, not by its name: see ``HardMaskedView``.
        """
        unused = ("unit", "probability", "teacher") if self.policy == "hard" else HARD_KEYS
        return self.model_dump(exclude={*unused})


def generator(purpose: str, seed: int, digest: str) -> np.random.Generator:
    """Return a Philox generator keyed by (purpose, seed, example digest)."""
    key = xxhash.xxh3_128_intdigest(f"{purpose}\0{seed}\0{digest}".encode())
    return np.random.Generator(np.random.Philox(key=key))


class Masker(NamedTuple):
    """Draws the masks of examples: ``replicas`` of each, under one configuration and seed."""

    config: MaskConfig
    seed: int
    replicas: int
    mask_id: int | None
    content_ids: NDArray[np.int32]  # random tokens are drawn from these

    def positions(
        self, content: NDArray[np.bool_], word_starts: NDArray[np.bool_], digest: str, replica: int
    ) -> NDArray[np.intp]:
        """Return the masked positions of one sequence of S tokens, ascending.

        ``content`` [S] is False at special tokens, which are never masked; ``word_starts`` [S] is
        True where a word begins. With policy ``random`` at least one token is masked if there is
        any content. Raises ValueError for policy ``hard``, which needs losses.
        """
        config, positions = self.config, np.flatnonzero(content)
        if config.policy == "hard":
            raise ValueError("masks of policy hard come from a teacher's losses: HardMaskedView")
        if not len(positions):
            return positions
        if config.policy == "cover":  # the same division for every replica
            random = generator(f"cover/{self.replicas}", self.seed, digest)
            units = _units(positions, word_starts, config.unit, random, longest=SPAN_MAX)
            chosen = _deal_units(units, random, self.replicas)[replica]
        else:
            random = generator(f"mask/{replica}", self.seed, digest)
            budget = max(1, round(config.probability * len(positions)))
            if config.unit == "token":
                return np.sort(random.choice(positions, size=budget, replace=False))
            # A span of full length would hide most of a short sequence.
            longest = min(budget, SPAN_MAX)
            units = _units(positions, word_starts, config.unit, random, longest)
            chosen = _choose_units(units, random, budget)
        return np.sort(np.concatenate([positions[:0], *chosen]))

    def replacements(
        self, input_ids: NDArray[np.int32], chosen: NDArray[np.intp], digest: str, replica: int
    ) -> NDArray[np.int32]:
        """Return the ids that replace those of one sequence [S] at the positions ``chosen``."""
        random = generator(f"replace/{replica}", self.seed, digest)
        draws = random.random(len(chosen))
        assert self.mask_id is not None  # checked by the caller
        ids = input_ids[chosen].astype(np.int32)
        mask_share = self.config.mask_token
        ids[draws < mask_share] = self.mask_id
        gets_random = (draws >= mask_share) & (draws < mask_share + self.config.random_token)
        ids[gets_random] = random.choice(self.content_ids, size=int(gets_random.sum()))
        return ids


Units = list[NDArray[np.intp]]  # positions that are masked together


def _choose_units(units: Units, random: np.random.Generator, budget: int) -> Units:
    """Return units of at most ``budget`` tokens together, or the shortest one."""
    chosen: Units = []
    token_count = 0
    for index in random.permutation(len(units)):
        if token_count + len(units[index]) <= budget:
            chosen.append(units[index])
            token_count += len(units[index])
        if token_count == budget:
            break
    return chosen or [min(units, key=len)]


def _deal_units(units: Units, random: np.random.Generator, replicas: int) -> list[Units]:
    """Divide units randomly: all replicas get equally many, give or take one."""
    owner = (random.permutation(len(units)) + int(random.integers(replicas))) % replicas
    return [[units[i] for i in np.flatnonzero(owner == replica)] for replica in range(replicas)]


def _units(
    positions: NDArray[np.intp],
    word_starts: NDArray[np.bool_],
    unit: str,
    random: np.random.Generator,
    longest: int,
) -> Units:
    """Cut the content positions into tokens, words, or runs of up to ``longest`` adjacent words."""
    if unit == "token":
        return list(positions.reshape(-1, 1))
    is_interrupted = np.diff(positions) > 1
    word_begins = np.flatnonzero(word_starts[positions][1:] | is_interrupted) + 1
    words = np.split(positions, word_begins)
    if unit == "word":
        return words
    ends = np.cumsum(np.minimum(random.geometric(SPAN_P, size=len(words)), longest))
    cuts = {
        *ends[ends < len(words)].tolist(),
        *(np.flatnonzero(is_interrupted[word_begins - 1]) + 1),
    }
    return [np.concatenate(words[a:b]) for a, b in pairwise([0, *sorted(cuts), len(words)])]
