"""Check a server's answer for a sequence and convert it to the cache's columns.

``prompt_logprobs`` are read, and the mass outside the top k becomes the tail, as for imports
(``data/exchange``). Checks that an import cannot make are made here.

S tokens of a sequence, P = S − 1 predictions.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rekindle.data.corpus.config import gap_ids
from rekindle.data.corpus.corpus import Corpus
from rekindle.data.errors import InputError
from rekindle.data.exchange.logprobs import GOLD_FIELDS, fields_of_prompt
from rekindle.data.exchange.token_rows import TopKRows
from rekindle.data.targets.codec import Columns
from rekindle.data.targets.schema import TeacherInfo

ROUNDING_ABOVE_ZERO = 1e-5  # nats by which rounding to float32 may lift a log-probability above 0
LOWEST_LOG_PROB = -9000.0  # vLLM writes −9999 for probability 0


class AnswerReader:
    """Reads the answers of one teacher."""

    def __init__(self, corpus: Corpus, info: TeacherInfo):
        self.corpus, self.info = corpus, info
        facts = corpus.info["tokenizer"]
        self.size, self.gap_ids = int(facts["size"]), {*gap_ids(facts).tolist()}

    def columns(
        self, entries: Any, tokens: NDArray[np.int32], positions: NDArray[np.int64]
    ) -> Columns:
        """Return the target columns of a sequence with ``tokens`` [S] and targets at ``positions``.

        Raise InputError, naming the place, if an entry is not the top of a distribution or does not
        belong to these tokens.
        """
        fields = _fields(entries, tokens)
        _check_entries(entries, self.info.k or 0)
        fields = {
            name: [values[position] for position in positions] for name, values in fields.items()
        }
        self._without_foreign(fields, positions)
        rows = TopKRows(self.corpus, self.info, GOLD_FIELDS, allow_missing=False)
        return rows.columns(fields, tokens, positions)

    def _without_foreign(self, fields: dict[str, Any], positions: NDArray[np.int64]) -> None:
        """Drop candidates that the corpus's tokenizer has no token for; their mass joins
        the tail.
        """
        for place, (ids, log_probs) in enumerate(
            zip(fields["ids"], fields["log_probs"], strict=True)
        ):
            if max(ids) < self.size and not (self.gap_ids and self.gap_ids.intersection(ids)):
                continue
            in_vocabulary = [
                n for n, i in enumerate(ids) if i < self.size and i not in self.gap_ids
            ]
            if len(in_vocabulary) < (self.info.k or 0):
                foreign = next(i for i in ids if i >= self.size or i in self.gap_ids)
                raise InputError(
                    f"prompt_logprobs: entry {positions[place] + 1}: {foreign} is no token of the "
                    f"cache's vocabulary of {self.size:,}. Without it {len(in_vocabulary)} "
                    f"candidates are left, and {self.info.k} are kept. Take corpus.tokenizer from "
                    "the served model, or a smaller targets.k"
                )
            fields["ids"][place] = [ids[n] for n in in_vocabulary]
            fields["log_probs"][place] = [log_probs[n] for n in in_vocabulary]


def _fields(entries: Any, tokens: NDArray[np.int32]) -> dict[str, Any]:
    """Return ``fields_of_prompt``; raise InputError if the server left out cached parts."""
    if isinstance(entries, list) and len(entries) == len(tokens) and None in entries[1:]:
        raise InputError(
            f"prompt_logprobs: entry {entries.index(None, 1)} is null: the server has read that "
            "part of the prompt from its prefix cache. Serve the model with "
            "--no-enable-prefix-caching"
        )
    return fields_of_prompt(entries, tokens)


def _check_entries(entries: Sequence[Any], k: int) -> None:
    """Raise InputError unless each entry has the ``k`` likeliest tokens."""
    ranks = {*range(1, k + 1)}
    for place, entry in enumerate(entries[1:], start=1):
        for key, value in entry.items():
            label = f"prompt_logprobs: entry {place}, token {key}"
            if not isinstance(value, dict) or value.get("rank") is None:
                raise InputError(f"{label} has no rank (given: {str(value)[:60]})")
            log_prob = value["logprob"]
            if log_prob > ROUNDING_ABOVE_ZERO:
                raise InputError(
                    f"{label}: a log-probability is {log_prob:.6g}, above 0. The server must give "
                    "raw_logprobs (--logprobs-mode), not logits"
                )
            if log_prob < LOWEST_LOG_PROB:
                raise InputError(
                    f"{label} has probability 0 ({log_prob:g}): the server gives what is left "
                    "after its filters; it must give raw_logprobs (--logprobs-mode)"
                )
        if missing := ranks - {value["rank"] for value in entry.values()}:
            raise InputError(
                f"prompt_logprobs: entry {place} lacks the candidate of rank {min(missing)}, and "
                f"the {k} likeliest were asked for"
            )


def parse_answers(entries: Any, tokens: Sequence[int], k: int) -> list[dict[int, float]]:
    """Return the log-probabilities by id for each prediction [P]: the ``k`` likeliest and the token
    itself. Raise InputError as ``columns``.
    """
    fields = _fields(entries, np.array(tokens, np.int32))
    _check_entries(entries, k)
    pairs = zip(fields["ids"], fields["log_probs"], strict=True)
    return [dict(zip(ids, log_probs, strict=True)) for ids, log_probs in pairs]
