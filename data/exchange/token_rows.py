"""Check the top-k log-probabilities of rows, and encode them as the cache stores them.

P positions, W candidates of the position that has most, K kept ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rekindle.data.corpus.config import gap_ids
from rekindle.data.corpus.corpus import Corpus
from rekindle.data.counted import counted
from rekindle.data.errors import InputError, naming
from rekindle.data.exchange.alignment import Alignment
from rekindle.data.exchange.config import ImportConfig
from rekindle.data.exchange.expected import keep_trained
from rekindle.data.exchange.logprobs import GOLD_FIELDS, PROMPT_LOGPROBS
from rekindle.data.exchange.noticed import Noticed
from rekindle.data.exchange.rows import (
    Floats64,
    Row,
    check_keys,
    log_masses,
    matrix,
    numbers,
    whole_numbers,
)
from rekindle.data.exchange.tails import (
    CODEC_TOLERANCE,
    FURTHER_TAILS,
    TAIL,
    TEMPERATURE,
    at_temperature_one,
    check_same_tails,
    further_odds,
    further_tails,
    temperature_of,
)
from rekindle.data.targets.codec import Columns, fixed_point
from rekindle.data.targets.codec_compact import compact_rows
from rekindle.data.targets.codec_registry import CODECS
from rekindle.data.targets.imported import Imported, Scalar
from rekindle.data.targets.kinds.topk import TopK
from rekindle.data.targets.schema import TeacherInfo, rank_dtype

MASS_TOLERANCE = 0.01  # how far a position's masses may sum from 1
NATS_TOLERANCE = 0.01  # how far a value in nats may lie outside its range
CANDIDATE_FIELDS = ("positions", "ids", "log_probs")
OPTIONAL_FIELDS = (TAIL, *GOLD_FIELDS, "entropy")
FIELDS = (*CANDIDATE_FIELDS, TEMPERATURE, *OPTIONAL_FIELDS, FURTHER_TAILS, PROMPT_LOGPROBS)
FIELD_OF_SCALAR: dict[Scalar, str] = {  # column -> field
    "gold_log_prob": "gold_log_probs",
    "gold_rank": "gold_ranks",
    "entropy": "entropy",
}


@dataclass
class TopKRows:
    """Reads the rows of one vocabulary teacher, which all have the same ``optional`` fields, the
    same ``temperature``, and tails at the same ``further`` ones.
    """

    corpus: Corpus
    info: TeacherInfo
    optional: tuple[str, ...]
    allow_missing: bool
    temperature: float = 1.0
    further: tuple[float, ...] = ()
    noticed: Noticed = field(default_factory=Noticed)
    alignment: Alignment = field(default_factory=Alignment)

    fields = FIELDS

    @classmethod
    def begin(
        cls,
        corpus: Corpus,
        config: ImportConfig,
        view: tuple[str, float],
        k: int | None,
        row: Row,
    ) -> "TopKRows | None":
        """Return the parser of rows like ``row``; None if that has no position and ``k`` is
        unknown. ``view``: its name, and about which share of a sequence's tokens has a target.
        """
        check_keys(row, FIELDS)
        if k is None:
            with naming("ids"):
                counts = matrix(row.get("ids"), "iu", -1)[1]
            if not len(counts):
                return None
            k = int(counts.min())
            if k < 1:
                raise InputError("ids: a position has no candidates")
        facts, optional = corpus.info["tokenizer"], optional_of(row)
        token_count = facts["size"] - len(gap_ids(facts))
        temperature, further = temperature_of(row), tuple(further_tails(row))
        stored = tuple(sorted({temperature, *further}))
        target_fields = TopK.settings(k, stored, config.codec, facts["size"], None, token_count)
        target_fields["estimator"] = {
            **target_fields["estimator"],  # type: ignore[dict-item]
            "tail": "given" if TAIL in optional else "derived",
        }
        lacks = tuple(column for column, name in FIELD_OF_SCALAR.items() if name not in optional)
        imported = Imported(provenance=config.provenance, lacks=lacks)
        fingerprints = {"provenance": imported.fingerprint, "tokenizer": facts["digest"]}
        fields: dict[str, object] = {"name": config.name, "task": config.task, "view": view[0]}
        fields |= {"imported": imported}
        if (codec := CODECS[config.codec]).is_compressed:
            if facts["size"] > codec.largest_vocabulary:
                raise InputError(
                    f"the compact codec takes vocabularies of up to {codec.largest_vocabulary:,} "
                    f"tokens, not {facts['size']:,}; use codec: default"
                )
            positions = corpus.info["config"]["sequence_length"] * view[1]
            fields["rows_per_batch"] = compact_rows(positions)
        fields |= {"model": config.provenance["model"], "fingerprints": fingerprints}
        info = TeacherInfo.model_validate(fields | target_fields)
        return cls(corpus, info, optional, config.allow_missing, temperature, further)

    @property
    def k(self) -> int:
        """Return K."""
        assert self.info.k is not None
        return self.info.k

    def columns(self, row: Row, tokens: NDArray[np.int32], expected: NDArray[np.int64]) -> Columns:
        """Return the columns of a row's targets, as they are used.

        ``tokens`` [S] are its sequence's; ``expected`` the positions that have a target. Raises
        InputError for anything that is not a distribution's top, or not where it must be.
        """
        check_keys(row, FIELDS)
        if self.corpus.has_trained and self.info.task == "causal_lm":
            row = keep_trained(row, len(tokens), expected)
        if (present := optional_of(row)) != self.optional:
            different = sorted({*present} ^ {*self.optional})
            raise InputError(
                f"{different[0]}: "
                f"{'the first rows have none' if different[0] in present else 'missing'}; every "
                "row must have the same fields"
            )
        check_same_tails(row, self.temperature, self.further)
        positions = self._positions(row, expected)
        count = len(positions)
        ids, log_probs = self._candidates(row, positions)
        gold_positions = positions + (self.info.task == "causal_lm")
        gold_ids = tokens[gold_positions].astype(np.int64)
        if GOLD_FIELDS[0] not in self.optional:
            self.alignment.add(ids, tokens, gold_positions)
        scalars = self._scalars(row, ids, log_probs, gold_ids)
        order = np.argsort(-log_probs, axis=1, kind="stable")
        self.noticed.sorted += int((order != np.arange(order.shape[1])).any(axis=1).sum())
        ids = np.take_along_axis(ids, order, axis=1)
        log_probs = np.take_along_axis(log_probs, order, axis=1)
        self.noticed.cut += int(np.isfinite(log_probs[:, self.k :]).any(axis=1).sum())
        encode, size = CODECS[self.info.codec].encode, self.info.vocabulary_size or 0
        top = ids[:, : self.k].reshape(count, self.k)
        kept, odds = np.zeros((0, self.k)), np.zeros((0, len(self.info.temperatures)))
        if count:
            kept, odds = self._candidates_and_odds(row, log_probs, positions)
        columns = encode(top, kept.astype(np.float32), odds.astype(np.float32), size)
        return {"positions": positions.astype(np.uint16)} | columns | scalars

    def _candidates_and_odds(
        self, row: Row, log_probs: Floats64, positions: NDArray[np.int64]
    ) -> tuple[Floats64, Floats64]:
        """Return the K likeliest log-probabilities [P,K] at 1, and log(kept/tail) [P,T] at each
        stored temperature.
        """
        given_tail, stored = None, self.info.temperatures
        if TAIL in self.optional:
            with naming(TAIL):
                given_tail = log_masses(row[TAIL], len(positions))
        kept, own_odds = self._with_tail(log_probs, given_tail, positions)
        if stored == (1.0,):
            return kept, own_odds
        odds = {self.temperature: own_odds[:, 0]}
        if self.further:
            assert given_tail is not None
            facts = self.corpus.info["tokenizer"]
            token_count = facts["size"] - len(gap_ids(facts))
            further = further_odds(row, log_probs, given_tail, self.k, token_count, positions)
            odds |= dict(zip(self.further, further.T, strict=True))
        if self.temperature != 1.0:
            kept = at_temperature_one(kept, self.temperature, odds.get(1.0))
        return kept, np.stack([odds[tau] for tau in stored], axis=1)

    def _positions(self, row: Row, expected: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the positions [P] that the row has targets for."""
        positions = expected
        if row.get("positions") is not None:
            with naming("positions"):
                positions = whole_numbers(row["positions"])
                self._check_positions(positions, expected)
        id_count = len(row["ids"]) if hasattr(row.get("ids"), "__len__") else None  # type: ignore[arg-type]
        if id_count is not None and id_count != len(positions):
            subject = "positions has" if row.get("positions") is not None else "its sequence has"
            raise InputError(
                f"ids has {counted(id_count, 'position')}, but {subject} {len(positions)}"
                + ("" if row.get("positions") is not None else "; name those with `positions`")
            )
        missing = np.setdiff1d(expected, positions)
        if len(missing) and not self.allow_missing:
            raise InputError(
                f"{len(missing)} of its {counted(len(expected), 'position')} have no target (the "
                f"first is {int(missing[0])}). Give them all, or allow that some are missing "
                "(allow_missing, --allow-missing)"
            )
        self.noticed.missing += len(missing)
        return positions

    def _check_positions(self, positions: NDArray[np.int64], expected: NDArray[np.int64]) -> None:
        if (np.diff(positions) <= 0).any():
            first = int(np.flatnonzero(np.diff(positions) <= 0)[0])
            raise InputError(
                f"{int(positions[first + 1])} comes after {int(positions[first])}; each must be "
                "larger than the one before"
            )
        unexpected = positions[~np.isin(positions, expected)]
        if not len(unexpected):
            return
        if not len(expected):
            raise InputError(f"{int(unexpected[0])} is given, but this sequence has no target")
        rule = f"its sequence has targets at {int(expected[0])} to {int(expected[-1])}"
        if self.info.task == "causal_lm":
            rule += ", where t stands for the token after t: the last token predicts none"
            if self.corpus.has_trained:
                rule += ", and only of tokens that the corpus trains"
        elif self.info.view_class.masked:
            rule = "it is not masked in this replica; those that are: "
            rule += f"{expected[:8].tolist()}{' …' if len(expected) > 8 else ''}"
        else:
            rule += ", special tokens aside"
        raise InputError(f"{int(unexpected[0])} has no target: {rule}")

    def _candidates(
        self, row: Row, positions: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], Floats64]:
        """Return ids and log-probabilities [P,W] as given; −1 and −inf where there are fewer."""
        with naming("ids"):
            ids, counts = matrix(row.get("ids"), "iu", -1)
        with naming("log_probs"):
            log_probs, value_counts = matrix(row.get("log_probs"), "iuf", -np.inf)
        if not np.array_equal(counts, value_counts):
            raise InputError(
                f"log_probs must have a number for each of ids (given: {_sizes(value_counts)} "
                f"beside {_sizes(counts)})"
            )
        ids, log_probs = ids.astype(np.int64), log_probs.astype(np.float64)
        is_given = np.arange(ids.shape[1]) < counts[:, None]
        first = _first_true(counts < self.k)
        if first is not None:
            raise InputError(
                f"position {positions[first]} has {counted(int(counts[first]), 'candidate')}, but "
                f"{self.k} are kept of each. Give as many, or set k: {int(counts.min())}"
            )
        facts = self.corpus.info["tokenizer"]
        unexpected = (ids < 0) | (ids >= facts["size"]) | np.isin(ids, gap_ids(facts))
        if (first := _first_true((unexpected & is_given).any(axis=1))) is not None:
            wrong_id = int(ids[first][unexpected[first] & is_given[first]][0])
            raise InputError(
                f"position {positions[first]}: {wrong_id} is not a token of the cache's vocabulary "
                f"of {facts['size']:,}. Targets must use the ids of corpus.tokenizer; leave others "
                "out, and their mass joins the tail"
            )
        ordered = np.sort(ids, axis=1)
        is_repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
        if (first := _first_true(is_repeated.any(axis=1))) is not None:
            wrong_id = int(ordered[first, 1:][is_repeated[first]][0])
            raise InputError(
                f"position {positions[first]}: token {wrong_id} is there twice, so its mass would "
                "count twice"
            )
        self._check_masses(log_probs, is_given, positions)
        return ids, log_probs

    def _check_masses(
        self, log_probs: Floats64, is_given: NDArray[np.bool_], positions: NDArray[np.int64]
    ) -> None:
        at = f"temperature {self.temperature:g}"
        advice = f"log_probs are natural logarithms of probabilities at {at}"
        if (first := _first_true((is_given & ~np.isfinite(log_probs)).any(axis=1))) is not None:
            value = log_probs[first][is_given[first] & ~np.isfinite(log_probs[first])][0]
            raise InputError(
                f"position {positions[first]}: a log-probability is {value}; {advice}, which are "
                "finite. Leave out candidates of zero probability"
            )
        if (first := _first_true((log_probs > NATS_TOLERANCE).any(axis=1))) is not None:
            listed = np.where(is_given, log_probs, 0.0)
            hint = (
                "; these look like probabilities" if 0 <= listed.min() <= listed.max() <= 1 else ""
            )
            raise InputError(
                f"position {positions[first]}: a log-probability is {log_probs[first].max():.6g}, "
                f"above 0; {advice}{hint}"
            )
        masses = np.exp(log_probs).sum(axis=1)
        if (first := _first_true(masses > 1 + MASS_TOLERANCE)) is not None:
            raise InputError(
                f"position {positions[first]}: the probabilities sum to {masses[first]:.6g}, more "
                f"than 1; {advice}"
            )

    def _with_tail(
        self, log_probs: Floats64, log_tail: Floats64 | None, positions: NDArray[np.int64]
    ) -> tuple[Floats64, Floats64]:
        """Return the K likeliest log-probabilities [P,K] and log(kept/tail) [P,1].

        ``log_probs`` [P,W] fall. A missing tail is 1 minus the kept mass, computed in float64.
        """
        kept, dropped = log_probs[:, : self.k], log_probs[:, self.k :]
        kept_mass = np.exp(kept).sum(axis=1)
        if log_tail is None:
            tail_mass = 1.0 - kept_mass
        else:
            tail_mass = np.exp(log_tail) + np.exp(dropped).sum(axis=1)
            excess = np.abs(kept_mass + tail_mass - 1)
            if (first := _first_true(excess > MASS_TOLERANCE)) is not None:
                raise InputError(
                    f"log_tail: position {positions[first]}: candidates and tail sum to "
                    f"{kept_mass[first] + tail_mass[first]:.6g}, not to 1"
                )
        if self.info.estimator["bias"] == "exact":  # nothing is outside
            if (first := _first_true(tail_mass > MASS_TOLERANCE)) is not None:
                raise InputError(
                    f"position {positions[first]}: all {self.k} tokens are given, but their "
                    f"probabilities sum to {kept_mass[first]:.6g}, not to 1"
                )
            tail_mass = np.zeros_like(tail_mass)
        self.noticed.above_one += int((kept_mass > 1 + 1e-6).sum())
        scale = np.where(kept_mass > 1, kept_mass, 1.0)
        with np.errstate(divide="ignore"):
            odds = np.log(kept_mass) - np.log(np.maximum(tail_mass, 0.0))
        return kept - np.log(scale)[:, None], odds[:, None]

    def _scalars(
        self, row: Row, ids: NDArray[np.int64], log_probs: Floats64, gold_ids: NDArray[np.int64]
    ) -> Columns:
        """Return the scalars of the true tokens (log p negated) and of the whole distributions."""
        size, count = self.info.vocabulary_size or 0, len(ids)
        columns: Columns = {}
        if "entropy" in self.optional:
            with naming("entropy"):
                nats = numbers(row["entropy"], count, "position")
                if ((nats < -NATS_TOLERANCE) | (nats > np.log(size) + NATS_TOLERANCE)).any():
                    raise InputError(f"must lie between 0 and {np.log(size):.4g} nats")
            columns["entropy"] = fixed_point(np.maximum(nats, 0.0).astype(np.float32))
        if "gold_ranks" not in self.optional:
            return columns
        with naming("gold_ranks"):
            ranks = whole_numbers(row["gold_ranks"])
            if len(ranks) != count or ((ranks < 0) | (ranks >= size)).any():
                raise InputError(
                    f"must be {counted(count, 'number')} from 0 (the likeliest) to {size - 1}"
                )
        with naming("gold_log_probs"):
            values = numbers(row["gold_log_probs"], count, "position")
            if (first := _first_true(values > NATS_TOLERANCE)) is not None:
                raise InputError(
                    f"entry {first} is {values[first]:.4g}; a log-probability is at most 0"
                )
            is_gold = ids == gold_ids[:, None]
            stated = np.where(is_gold, log_probs, 0.0).sum(axis=1)
            contradicts = is_gold.any(axis=1) & (np.abs(stated - values) > CODEC_TOLERANCE)
            if (first := _first_true(contradicts)) is not None:
                raise InputError(
                    f"entry {first} is {values[first]:.4g} for the true token "
                    f"{int(gold_ids[first])}, but its log_probs entry is {stated[first]:.4g}; do "
                    "the gold fields belong to another position?"
                )
        columns["gold_log_prob"] = fixed_point(np.maximum(-values, 0.0).astype(np.float32))
        columns["gold_rank"] = ranks.astype(rank_dtype(size))
        return columns


def optional_of(row: Row) -> tuple[str, ...]:
    """Return the OPTIONAL fields that a row has; raise InputError for half of a pair."""
    present = tuple(name for name in OPTIONAL_FIELDS if row.get(name) is not None)
    if (tau := temperature_of(row)) != 1 and (others := [name for name in present if name != TAIL]):
        raise InputError(
            f"{others[0]}: it is stored at temperature 1, but the row's is {tau:g}; leave it out"
        )
    if ("gold_ranks" in present) != ("gold_log_probs" in present):
        raise InputError("gold_log_probs and gold_ranks belong together; give both or neither")
    return present


def _first_true(is_wrong: Any) -> int | None:
    """Return the first place [P] that is wrong."""
    return int(np.argmax(is_wrong)) if np.any(is_wrong) else None


def _sizes(counts: Sequence[int] | NDArray[np.int64]) -> str:
    shown = sorted(set(map(int, counts)))
    return f"{len(counts)} positions of {shown[0]} to {shown[-1]}" if shown else "no positions"
