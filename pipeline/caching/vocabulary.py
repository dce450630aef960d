"""A teacher's vocabulary beside the corpus's: its tokenizer, and which of its logits count.

V ids of the corpus (one past the largest), W rows of the teacher's output matrix that are used, F
tokens that only the teacher has, N rows of hidden states.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rekindle.data.corpus.config import gap_ids
from rekindle.data.corpus.corpus import Corpus
from rekindle.data.corpus.shared_ids import differing_ids, unshared_ids
from rekindle.data.corpus.tokenizer import Tokenizer, load_tokenizer
from rekindle.data.corpus.tokenizer_files import has_tokenizer_files
from rekindle.data.errors import InputError
from rekindle.data.targets.head import StoredHead
from rekindle.data.text_files import state_of
from rekindle.pipeline.caching.mapped import VocabularyMap
from rekindle.train.model.folder import tokenizer_folder
from rekindle.train.model.split_model import OutputHead

log = logging.getLogger("rekindle")

NO_TOKEN_LOGIT = -100.0  # a logit with no weight beside a token's; see ``scoring.NO_TOKEN``


def tokenizer_of(directory: Path, settings: Any, corpus: Corpus, name: str) -> Tokenizer:
    """Return the tokenizer of the teacher ``name``; the corpus's if it has none of its own."""
    directory = tokenizer_folder(directory)
    corpus_size, model_size = (
        corpus.info["tokenizer"]["size"],
        settings.get_text_config().vocab_size,
    )
    if has_tokenizer_files(directory):
        tokenizer = _loaded(directory)
        highest_special = max((*tokenizer.prefix, *tokenizer.suffix), default=0)
        if highest_special >= model_size:
            token = tokenizer.hf.convert_ids_to_tokens(highest_special)
            raise InputError(
                f"teacher {name!r}: the tokenizer of {directory} puts id {highest_special} "
                f"({token!r}) around each text, and the model's embedding has {model_size:,} rows. "
                "Give it the tokenizer files (tokenizer.json, tokenizer_config.json, "
                "special_tokens_map.json) that it was saved with"
            )
        return tokenizer
    if model_size != corpus_size:
        raise InputError(
            f"teacher {name!r}: {directory} has no tokenizer files, and its vocabulary "
            f"({model_size:,}) is not the corpus tokenizer's ({corpus_size:,}). Save the teacher's "
            "tokenizer into its directory"
        )
    log.info(
        "teacher %s has no tokenizer files; its vocabulary has the corpus tokenizer's size, so "
        "the corpus tokenizer is used for it",
        name,
    )
    return corpus.tokenizer


# A run needs a teacher's tokenizer three times: on a corpus's beginning, on all of it, and to run
# it.
_LOADED: dict[Path, tuple[object, Tokenizer]] = {}


def _loaded(directory: Path) -> Tokenizer:
    """Return the tokenizer in a folder, loaded again only if its files have changed."""
    files = [(path, state_of(path)) for path in sorted(directory.iterdir())]
    cached = _LOADED.get(directory)
    if cached is None or cached[0] != files:
        cached = _LOADED[directory] = files, load_tokenizer(str(directory))
    return cached[1]


def count_shared_tokens(
    corpus: Corpus,
    tokenizer: Tokenizer,
    name: str,
    extra_ids: NDArray[np.int64],
    embedding_rows: int,
) -> int:
    """Return how many tokens of the corpus's vocabulary the teacher ``name``, with
    ``embedding_rows`` rows in its embedding, has under the same id.

    Raises InputError if a token that occurs in the corpus, or among the ``extra_ids`` that the
    teacher is shown, is another token to the teacher, or none.
    """
    advice = (
        "Use a teacher of corpus.tokenizer, or corpus.tokenizer of this teacher; experts on "
        "sequences and words may have their own"
    )
    unshared = unshared_ids(
        corpus, tokenizer, extra_ids, f"teacher {name!r}", advice, embedding_rows
    )
    if len(unshared):
        log.info(
            "teacher %s has other tokens, or none, under %s ids of the corpus's vocabulary; no "
            "text of the corpus has them, and they get no probability",
            name,
            f"{len(unshared):,}",
        )
    facts = corpus.info["tokenizer"]
    return facts["size"] - len(gap_ids(facts)) - len(unshared)


@dataclass(frozen=True)
class TokenColumns:
    """Which of a teacher's logits belong to which ids.

    Ids that are no token of the corpus's vocabulary (``absent``, below V), and rows that pad the
    output matrix to a round size, get no probability. Tokens that only the teacher has
    (``foreign``: chat tokens, say) take part in the softmax where a tail is stored, to which their
    mass is added; else they are left out before it, like padding: whole distributions, samples and
    hidden states are those of the common vocabulary. ``rows`` [V]: the teacher's id of each, −1 for
    absent ones, and ``others``: the teacher's remaining tokens; None: the ids are the same.
    """

    size: int
    absent: NDArray[np.int64]
    foreign: NDArray[np.int64]
    rows: NDArray[np.int64] | None = None
    others: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    _sent: dict[torch.device, tuple[Tensor, ...]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, corpus: Corpus, tokenizer: Tokenizer, rows: int, with_tail: bool) -> "TokenColumns":
        """Return the columns of a teacher with ``rows`` rows in its output matrix."""
        facts = corpus.info["tokenizer"]
        unshared = differing_ids(corpus.tokenizer, tokenizer, rows)
        absent = np.union1d(gap_ids(facts), unshared).astype(np.int64)
        foreign: list[int] = []
        if with_tail and tokenizer.digest != corpus.tokenizer.digest:
            teacher_only = tokenizer.tokens() - corpus.tokenizer.tokens()
            foreign = sorted({number for number, _ in teacher_only if number < rows})
        return cls(facts["size"], absent, np.array(foreign, np.int64))

    @classmethod
    def mapped(cls, mapping: VocabularyMap, with_tail: bool) -> "TokenColumns":
        """Return the columns of a teacher whose tokens have other ids."""
        absent = np.flatnonzero(mapping.rows < 0)
        foreign = mapping.others if with_tail else mapping.others[:0]
        return cls(len(mapping.rows), absent, foreign, mapping.rows, mapping.others)

    def cut(self, head: OutputHead) -> OutputHead:
        """Return the head of the W rows that are used."""
        if self.rows is not None:
            return head.cut(1 + int(np.concatenate([self.rows, self.others]).max()))
        return head.cut(max(self.size, int(self.foreign.max(initial=-1)) + 1))

    def mapped_mass(self, logits: Tensor) -> Tensor:
        """Return [N]: the share of the teacher's probability that the tokens in ``rows`` hold."""
        others = self._ids_on(logits.device)[3]
        corpus_logits = torch.logsumexp(self._corpus_logits(logits), dim=1)
        return torch.sigmoid(corpus_logits - torch.logsumexp(logits[:, others], dim=1))

    def _corpus_logits(self, logits: Tensor) -> Tensor:
        """Return logits [N,V] of a teacher whose tokens have other ids."""
        absent, _, rows, _ = self._ids_on(logits.device)
        corpus_logits = logits[:, rows]
        corpus_logits[:, absent] = -torch.inf
        return corpus_logits

    def arranged(self, logits: Tensor) -> Tensor:
        """Return logits [N,V+F] of ``logits`` [N,W]: the corpus's ids, then the foreign tokens."""
        is_unchanged = self.rows is None and not len(self.absent) and not len(self.foreign)
        if is_unchanged and logits.shape[1] == self.size:
            return logits
        absent, foreign_ids, *_ = self._ids_on(logits.device)
        foreign = logits[:, foreign_ids]
        if self.rows is not None:
            return torch.cat([self._corpus_logits(logits), foreign], dim=1)
        corpus_logits = logits[:, : self.size]
        missing_count = self.size - corpus_logits.shape[1]  # for a teacher with fewer tokens
        corpus_logits = (
            torch.nn.functional.pad(corpus_logits, (0, missing_count))
            if missing_count
            else corpus_logits.clone()
        )
        corpus_logits[:, absent] = -torch.inf
        return torch.cat([corpus_logits, foreign], dim=1)

    def _ids_on(self, device: torch.device) -> tuple[Tensor, ...]:
        """Return ``absent``, ``foreign``, ``rows`` and ``others`` on the device, sent once, because
        sending waits for it.
        """
        if device not in self._sent:
            rows = self.foreign[:0] if self.rows is None else self.rows.clip(min=0)
            arrays = map(torch.from_numpy, (self.absent, self.foreign, rows, self.others))
            self._sent[device] = tuple(ids.to(device) for ids in arrays)
        return self._sent[device]

    def stored(self, head: OutputHead) -> StoredHead:
        """Return the output matrix [V,H] as a cache keeps it: absent ids have a bias that gives
        them no weight.
        """
        cut = self.cut(head)
        weight = cut.weight.detach().float().cpu().numpy()
        bias = None if cut.bias is None else cut.bias.detach().float().cpu().numpy()
        if len(self.absent):
            missing_rows = ((0, self.size - len(weight)),)
            weight = np.pad(weight, (*missing_rows, (0, 0)))
            bias = np.zeros(self.size, np.float32) if bias is None else np.pad(bias, missing_rows)
            weight[self.absent], bias[self.absent] = 0.0, NO_TOKEN_LOGIT / cut.logit_scale
        return StoredHead(weight, bias, cut.logit_scale, cut.softcap)
