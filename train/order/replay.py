"""Which sequences of earlier domains a training step replays (ELLE, Findings of ACL 2022).

Everything is arithmetic on the step and on past evaluations, without a random generator: what a
step replays does not depend on threads, on the number of processes or on where a run was resumed.
(Weights by loss change are as equal as the losses: these differ in their last bits if another
number of processes adds gradients in another order.)

*How many.* Of the first n sequences that a run reads, ⌊fraction · n⌋ are replayed, at every step.

*Which domain.* Every evaluation interval (``train.evaluate_every`` steps) divides its replayed
slots among the domains in proportion to their weights, evenly: a cycle of CYCLE slots has a whole
number of each domain's slots, spread over it, and an interval begins at a different point of the
cycle, so that small weights get their turn over many short intervals. The weights are equal, or
with ``loss_change`` in interval i those of the authors (``weights_by_loss``):

  w_d = (L_d(i−2) − L_d(i−1)) / n_d,   L_d(k): held-out loss of domain d after k intervals, k ≥ 1,

n_d the masked tokens (for a causal LM: the predicted tokens) of d that were replayed between the
two, at least 1. If that is not above 0, the domain is being forgotten or does not change: in the
first half of a run it has the largest weight of all, in the second half none. Interval i−1 itself
is left out so that batches of i can be read ahead before i begins. In the first three intervals, in
which not both losses are known, and if a loss is not finite, the weights are equal. Losses and
counts are part of the checkpoint. (The authors use the same rule in the recovery after growth, with
the largest weight throughout; here that is a separate run on the known domains, without replay.)

*Which sequence.* Each domain is an endless stream: every sequence once per epoch of it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import TypedDict

import numpy as np
import xxhash

from rekindle.data.batch import Batch, Ints
from rekindle.data.errors import CheckpointError
from rekindle.data.permutation import stream_part
from rekindle.train.order.held_out import Ranges

CYCLE = 1000  # slots after which the domains' turns repeat
# of the weights: rule 1 used the size of a loss's change, in either direction and for any number of
# tokens
RULE = 2
FLOOR = 1e-9  # least weight

Total = Callable[[Sequence[float]], Sequence[float]]  # sums a list over all processes


class ReplayState(TypedDict):
    """What a checkpoint holds: values by interval and domain, and the tokens since the last
    interval.
    """

    rule: int
    losses: list[list[float | None]]  # null: not a number
    tokens: list[list[int]]
    since: list[int]


class Replay:
    """The replayed part of every step's batch.

    ``memories``: the sequences of each domain; without any, nothing is replayed. ``batch``
    sequences are read per step, ``fraction`` of them replayed. Every ``every`` steps ``learn`` gets
    an evaluation's losses, for weights by loss change; None for equal weights. ``steps``: of the
    whole run; None if it has no second half. Only one thread calls ``count`` and ``learn``; any may
    call the rest.
    """

    def __init__(
        self,
        memories: Mapping[str, Ranges],
        fraction: float,
        batch: int,
        seed: int,
        every: int | None = None,
        steps: int | None = None,
    ):
        self.names, self.memories = list(memories), list(memories.values())
        self.fraction, self.batch, self.every = Fraction(str(fraction)), batch, every
        self._seed, self._steps = seed, steps
        self._losses: list[list[float]] = []  # [k−1][d] after k intervals
        self._tokens: list[list[int]] = []  # [k−1][d] replayed in interval k, counted from 1
        # Tokens since then: of all processes before this one began, and of this one.
        self._tokens_before, self._own_tokens = [0] * len(self.names), [0] * len(self.names)
        self._starts: list[Ints] = [np.zeros(len(self.names), np.int64)]  # [i][D] see `_start`
        self._extend()

    def slots_before(self, step: int) -> int:
        """Return how many sequences are replayed in all steps before ``step``."""
        return math.floor(self.fraction * (step * self.batch))

    def knows(self, step: int) -> bool:
        """Return whether it is decided yet what ``step`` replays."""
        # Not judged by the losses: they are noted shortly before their consequences are summed up.
        return self.interval(step) < len(self._starts)

    def at(self, step: int) -> Ints:
        """Return the sequence numbers that ``step`` replays. ``knows(step)`` must be true."""
        if not self.names:
            return np.zeros(0, np.int64)
        interval = self.interval(step)
        slots_at_start = self.slots_before(interval * (self.every or 0))
        turn_table = _deal(self.weights(interval))
        offset = self._offset(interval)
        first, last = (offset + self.slots_before(s) - slots_at_start for s in (step, step + 1))
        turns = turn_table.domains[np.arange(first, last) % CYCLE]
        sequences = np.zeros(last - first, np.int64)
        base = self._starts[interval] - turn_table.before(offset)
        starts, stops = base + turn_table.before(first), base + turn_table.before(last)
        for number in np.unique(turns):
            memory, seed = self.memories[number], self._seed_of("memory", self.names[number])
            places = stream_part(starts[number], stops[number], len(memory), seed=seed)
            sequences[turns == number] = memory.select(places)
        return sequences

    def weights(self, interval: int) -> tuple[float, ...]:
        """Return the share of each domain's slots in an interval (0-based)."""
        equal = (1 / len(self.names),) * len(self.names)
        if self.every is None or interval < 3:
            return equal
        later, earlier = self._losses[interval - 2], self._losses[interval - 3]
        if not all(map(math.isfinite, [*later, *earlier])):
            return equal
        second_half = self._steps is not None and 2 * interval * self.every >= self._steps
        return weights_by_loss(earlier, later, self._tokens[interval - 2], second_half)

    def count(self, batch: Batch) -> None:
        """Add this process's share of a step to the replayed tokens of each domain."""
        if self.every is None or not self.names:
            return
        owners = batch.next_places[0] if batch.masked is None else batch.masked.rows
        rows = np.bincount(owners, minlength=len(batch.index))
        for domain, tokens in zip(batch.domains, rows.tolist(), strict=True):
            if domain in self.names:
                self._own_tokens[self.names.index(domain)] += tokens

    def learn(self, steps_done: int, values: Mapping[str, float], total: Total = list) -> None:
        """Note the evaluation after ``steps_done`` steps: each domain's ``ce/DOMAIN``, or
        ``loss/DOMAIN`` if no cross-entropy is measured (``train.measures``).

        Every process calls it; ``total`` sums a list over them.
        """
        if self.every is None or steps_done != (len(self._losses) + 1) * self.every:
            return  # the one at the end of a run may fall within an interval
        # The losses come last: other threads call `knows`, which uses the result of `_extend`.
        self._tokens.append(self._since(total))
        self._tokens_before, self._own_tokens = ([0] * len(self.names) for _ in range(2))
        losses = [values.get(f"ce/{name}", values.get(f"loss/{name}")) for name in self.names]
        self._losses.append([math.nan if one is None else one for one in losses])
        self._extend()

    def state(self, total: Total = list) -> ReplayState | None:
        """Return what a checkpoint must hold; None if nothing is replayed. ``total`` as for
        ``learn``.
        """
        if not self.names:
            return None
        losses = [
            [one if math.isfinite(one) else None for one in losses] for losses in self._losses
        ]
        tokens_since = self._since(total)
        return {"rule": RULE, "losses": losses, "tokens": self._tokens, "since": tokens_since}

    def restore(self, state: ReplayState | Sequence[object] | None) -> None:
        """Continue from ``state``; None for the beginning.

        Raises CheckpointError if it follows another rule and the weights depend on losses.
        """
        is_current = isinstance(state, Mapping) and state.get("rule") == RULE
        if state is not None and not is_current and self.every is not None:
            raise CheckpointError(
                "train.replay.choose: loss_change: the run was begun by another version, which "
                "replayed in proportion to the size of each loss's change; now a forgotten "
                "domain has the largest weight (docs/recipes/elle.md). Continuing would mix the "
                "two: start again in another --out, or continue with that version. Finished "
                "stages stay as they are"
            )
        if isinstance(state, Mapping) and is_current:
            losses = state["losses"]
            self._losses = [[math.nan if x is None else x for x in row] for row in losses]
            self._tokens = [list(row) for row in state["tokens"]]
            self._tokens_before, self._own_tokens = list(state["since"]), [0] * len(self.names)
        del self._starts[1:]
        self._extend()

    def _since(self, total: Total) -> list[int]:
        """Return each domain's tokens since the last interval's end, over all processes."""
        counted = total(self._own_tokens)
        return [
            before + round(now) for before, now in zip(self._tokens_before, counted, strict=True)
        ]

    def interval(self, step: int) -> int:
        """Return the evaluation interval of ``step``; replay is decided once per interval."""
        return 0 if self.every is None else step // self.every

    def _extend(self) -> None:
        """Sum up, for every interval with known weights, each domain's slots before it.

        Readers treat an interval as known only after this (see `knows`).
        """
        decided = 0 if self.every is None else max(3, len(self._losses) + 2)
        for interval in range(len(self._starts) - 1, decided - 1):
            offset, every = self._offset(interval), self.every or 0
            slots = self.slots_before((interval + 1) * every) - self.slots_before(interval * every)
            turn_table = _deal(self.weights(interval))
            interval_turns = turn_table.before(offset + slots) - turn_table.before(offset)
            self._starts.append(self._starts[interval] + interval_turns)

    def _offset(self, interval: int) -> int:
        """Return where in the cycle an interval begins."""
        return self._seed_of("interval", str(interval)) % CYCLE

    def _seed_of(self, *names: str) -> int:
        parts = ["replay", str(self._seed), *names]
        return int(xxhash.xxh3_64_intdigest("\0".join(parts).encode("utf-8", "surrogatepass")))


def weights_by_loss(
    earlier: Sequence[float], later: Sequence[float], tokens: Sequence[int], second_half: bool
) -> tuple[float, ...]:
    """Return each domain's share of the replay: ELLE's rule, as in its authors' code.

    The decrease of its loss per replayed token; if it does not decrease, the largest of all, or 0
    in the second half; at least FLOOR; normalised.
    """
    falls = [(a - b) / max(n, 1) for a, b, n in zip(earlier, later, tokens, strict=True)]
    largest = 0.0 if second_half else max(falls)
    weights = [max(fall if fall > 0 else largest, FLOOR) for fall in falls]
    return tuple(weight / sum(weights) for weight in weights)


@dataclass(frozen=True)
class _Deal:
    """How slots are divided among domains, repeatedly."""

    domains: Ints  # [CYCLE] the domain whose turn each slot is
    counts: Ints  # [CYCLE+1,D] each domain's turns before a slot

    def before(self, slot: int) -> Ints:
        """Return each domain's turns [D] in the first ``slot`` slots."""
        cycles, rest = divmod(slot, CYCLE)
        counts: Ints = cycles * self.counts[-1] + self.counts[rest]
        return counts


@lru_cache(maxsize=64)
def _deal(weights: tuple[float, ...]) -> _Deal:
    """Divide slots in proportion to ``weights``, as evenly as possible: the largest remainders are
    rounded up, and turn k of a domain's n lies about (k + ½)/n of the way through the cycle.
    """
    exact = np.array(weights) * CYCLE
    turns = np.floor(exact).astype(np.int64)
    missing = CYCLE - int(turns.sum())
    turns[np.argsort(turns - exact, kind="stable")[:missing]] += 1
    domains = np.repeat(np.arange(len(weights)), turns)
    places = np.concatenate([(np.arange(n) + 0.5) / max(n, 1) for n in turns])
    domains = domains[np.argsort(places, kind="stable")]
    turns_so_far = np.cumsum(domains[:, None] == np.arange(len(weights)), axis=0)
    counts = np.concatenate([np.zeros((1, len(weights)), np.int64), turns_so_far])
    return _Deal(domains, counts)
